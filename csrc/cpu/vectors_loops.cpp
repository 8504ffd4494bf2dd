// SPDX-License-Identifier: Apache-2.0
// The loops of the vectors family. Compiled once for each instruction set (cpu/isa.h).
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/vectors.h"

#include "cpu/isa_begin.h"
#include "math/convert.h"
#include "math/noise.h"
#include "math/vectors.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

#include "cpu/noise_fill.h"

// A dot is formed in eight lanes of double whatever the vector width; how many dots are formed at once is free.
constexpr int dot_lanes = 8;
#if defined(FASTFLAT_ISA_AVX512)
constexpr int dots_down = 4, dots_across = 4, lone_dots = 8, vector_lanes = 8;
#elif defined(FASTFLAT_ISA_AVX2)
constexpr int dots_down = 2, dots_across = 2, lone_dots = 4, vector_lanes = 4;
#else
constexpr int dots_down = 1, dots_across = 2, lone_dots = 2, vector_lanes = 2;
#endif
constexpr int dot_parts = dot_lanes / vector_lanes;

typedef double Wide __attribute__((vector_size(8 * vector_lanes)));
typedef float Single __attribute__((vector_size(4 * vector_lanes)));
typedef uint32_t Word __attribute__((vector_size(4 * vector_lanes)));
typedef uint16_t HalfWord __attribute__((vector_size(2 * vector_lanes)));

inline Wide widen(Single v) {
#if defined(FASTFLAT_ISA_AVX512) && !defined(__clang__)
  // g++ converts each half by itself and joins them.
  return __builtin_ia32_cvtps2pd512_mask(v, Wide{}, 0xff, 4);
#else
  return __builtin_convertvector(v, Wide);
#endif
}
inline Wide load_wide(const double* from) {
  Wide v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
inline Wide load_wide(const float* from) {
  Single v;
  std::memcpy(&v, from, sizeof(v));
  return widen(v);
}
inline Wide load_wide(const BFloat16* from) {
  HalfWord v;
  std::memcpy(&v, from, sizeof(v));
  return widen(reinterpret_cast<Single>(__builtin_convertvector(v, Word) << 16));
}

inline double total(const Wide* sum) {
  double lane[dot_lanes];
  std::memcpy(lane, sum, sizeof(lane));
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// J rows of the basis with K vectors, n elements of each; a stride leads from one row to the next.
template <class Q, class W, int J, int K>
FASTFLAT_SHARED_CODE void few_dots(const Q* q, const W* w, int64_t stride, int64_t n, double* result, int64_t vectors) {
  Wide sum[J][K][dot_parts] = {};
  const auto add = [&](const Q* x_, const W* y_, int64_t apart) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int p = 0; p < dot_parts; ++p) {
      Wide x[J];
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) x[j] = load_wide(x_ + j * apart + p * vector_lanes);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        const Wide y = load_wide(y_ + k * apart + p * vector_lanes);
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) sum[j][k][p] += x[j] * y;
      }
    }
  };
  int64_t i = 0;
  for (; i + dot_lanes <= n; i += dot_lanes) add(q + i, w + i, stride);
  if (i < n) {
    Q last_q[J][dot_lanes] = {};
    W last_w[K][dot_lanes] = {};
    for (int j = 0; j < J; ++j) std::memcpy(last_q[j], q + j * stride + i, (n - i) * sizeof(Q));
    for (int k = 0; k < K; ++k) std::memcpy(last_w[k], w + k * stride + i, (n - i) * sizeof(W));
    add(last_q[0], last_w[0], dot_lanes);
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      result[j * vectors + k] += total(sum[j][k]);
    }
  }
}

// Of sixteen lanes; changes them.
inline double long_total(Wide* sum) {
  for (int p = 0; p < dot_parts; ++p) sum[p] += sum[p + dot_parts];
  return total(sum);
}

// A dot by itself, in sixteen lanes: eight would wait for one another.
template <class Q, class W>
FASTFLAT_SHARED_CODE double long_dot(const Q* q, const W* w, int64_t n) {
  constexpr int lanes = 2 * dot_lanes;
  Wide sum[2 * dot_parts] = {};
  const auto add = [&](const Q* x, const W* y) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int p = 0; p < 2 * dot_parts; ++p) sum[p] += load_wide(x + p * vector_lanes) * load_wide(y + p * vector_lanes);
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) add(q + i, w + i);
  if (i < n) {
    Q last_q[lanes] = {};
    W last_w[lanes] = {};
    std::memcpy(last_q, q + i, (n - i) * sizeof(Q));
    std::memcpy(last_w, w + i, (n - i) * sizeof(W));
    add(last_q, last_w);
  }
  return long_total(sum);
}

// What is left of the rows from j on, J at a time, with the vectors, K at a time.
template <int J, int K, class Q, class W>
inline void block_dots(const DotCall& call, const Q* q, const W* w, int64_t n, int64_t& j, double* result) {
  const int64_t length = call.n, vectors = call.vectors;
  for (; j + J <= call.rows; j += J) {
    int64_t k = 0;
    for (; k + K <= vectors; k += K) {
      few_dots<Q, W, J, K>(q + j * length, w + k * length, length, n, result + j * vectors + k, vectors);
    }
    for (; k < vectors; ++k) {
      few_dots<Q, W, J, 1>(q + j * length, w + k * length, length, n, result + j * vectors + k, vectors);
    }
  }
}

template <class Q, class W>
void dot(const DotCall& call, int64_t begin, int64_t end, double* result) {
  const int64_t tile = rows_tile(call.rows, call.vectors);
  for (int64_t at = begin; at < end; at += tile) {
    const int64_t n = std::min(tile, end - at);
    const Q* q = static_cast<const Q*>(call.q) + at;
    const W* w = static_cast<const W*>(call.w) + at;
    if (call.rows == 1 && call.vectors == 1) {
      *result += long_dot(q, w, n);
      continue;
    }
    int64_t j = 0;
    // One vector leaves registers for more rows, and many streams at once are what memory is fastest with.
    if (call.vectors == 1) block_dots<lone_dots, 1>(call, q, w, n, j, result);
    block_dots<dots_down, dots_across>(call, q, w, n, j, result);
    block_dots<2, dots_across>(call, q, w, n, j, result);
    block_dots<1, dots_across>(call, q, w, n, j, result);
  }
}

// A full vector of the arithmetic type of an update.
typedef float Singles __attribute__((vector_size(8 * vector_lanes)));
typedef uint32_t Words __attribute__((vector_size(8 * vector_lanes)));
typedef uint16_t HalfWords __attribute__((vector_size(4 * vector_lanes)));

inline void load_full(const double* from, Wide& v) { std::memcpy(&v, from, sizeof(v)); }
inline void load_full(const float* from, Singles& v) { std::memcpy(&v, from, sizeof(v)); }
inline void load_full(const BFloat16* from, Singles& v) {
  HalfWords bits;
  std::memcpy(&bits, from, sizeof(bits));
  v = reinterpret_cast<Singles>(__builtin_convertvector(bits, Words) << 16);
}

inline void add_squares(const Wide& v, Wide* sum) { *sum += v * v; }
inline void add_squares(const Singles& v, Wide* sum) {
  Single half[2];
  std::memcpy(half, &v, sizeof(v));
  for (int h = 0; h < 2; ++h) add_squares(widen(half[h]), sum + h);
}

template <class C>
struct FullOf {
  using type = Wide;
};
template <>
struct FullOf<float> {
  using type = Singles;
};

// K vectors less J rows of the basis; the squares of what is left, where they are wanted, come in the same pass.
template <class Q, class C, int J, int K, bool with_squares>
FASTFLAT_SHARED_CODE void few_updates(const Q* q, C* w, int64_t stride, const double* c_, int64_t vectors, int64_t n,
                                      [[maybe_unused]] double* squares) {
  using Full = typename FullOf<C>::type;
  constexpr int lanes = 2 * dot_lanes, width = sizeof(Full) / sizeof(C), sums = 2 * dot_parts;
  const Subtract subtract;
  C c[J][K];
  for (int j = 0; j < J; ++j) {
    for (int k = 0; k < K; ++k) c[j][k] = static_cast<C>(c_[j * vectors + k]);
  }
  [[maybe_unused]] Wide sum[K][sums] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
#pragma GCC unroll 8
    for (int p = 0; p < lanes / width; ++p) {
      const int64_t at = i + p * width;
      Full left[K];
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) load_full(w + k * stride + at, left[k]);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) {
        Full x;
        load_full(q + j * stride + at, x);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) left[k] = subtract(left[k], c[j][k], x);
      }
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        std::memcpy(w + k * stride + at, &left[k], sizeof(Full));
        if constexpr (with_squares) add_squares(left[k], &sum[k][p * (sums * width / lanes)]);
      }
    }
  }
  double rest[K] = {};
  for (; i < n; ++i) {
    for (int k = 0; k < K; ++k) {
      C& left = w[k * stride + i];
      for (int j = 0; j < J; ++j) left = subtract(left, c[j][k], static_cast<C>(load(q[j * stride + i])));
      rest[k] += static_cast<double>(left) * static_cast<double>(left);
    }
  }
  if constexpr (with_squares) {
    for (int k = 0; k < K; ++k) squares[k] += rest[k] + long_total(sum[k]);
  }
}

template <int K>
struct Across {
  static constexpr int count = K;
};

// As block_dots. The squares are those after the last row.
template <int J, int K, class Q, class C>
inline void block_updates(const SubtractCall& call, const Q* q, C* w, int64_t n, int64_t& j, double* squares) {
  const int64_t length = call.n, vectors = call.vectors;
  for (; j + J <= call.rows; j += J) {
    const auto update = [&](auto across, int64_t k) {
      constexpr int count = decltype(across)::count;
      const auto few = j + J == call.rows ? few_updates<Q, C, J, count, true> : few_updates<Q, C, J, count, J == 1>;
      few(q + j * length, w + k * length, length, call.c + j * vectors + k, vectors, n, squares + k);
    };
    int64_t k = 0;
    if constexpr (K > 1) {
      for (; k + K <= vectors; k += K) update(Across<K>{}, k);
    }
    for (; k < vectors; ++k) update(Across<1>{}, k);
  }
}

template <class Q, class C>
void subtract(const SubtractCall& call, int64_t begin, int64_t end, double* squares) {
  const int64_t tile = rows_tile(call.rows, call.vectors);
  for (int64_t at = begin; at < end; at += tile) {
    const int64_t n = std::min(tile, end - at);
    const Q* q = static_cast<const Q*>(call.q) + at;
    C* w = static_cast<C*>(call.w) + at;
    int64_t j = 0;
    if (call.vectors == 1) block_updates<8, 1>(call, q, w, n, j, squares);
    block_updates<4, 4>(call, q, w, n, j, squares);
    block_updates<2, 4>(call, q, w, n, j, squares);
    block_updates<1, 4>(call, q, w, n, j, squares);
    for (int64_t k = 0; k < (call.rows ? 0 : call.vectors); ++k) {
      squares[k] += long_dot(w + k * call.n, w + k * call.n, n);
    }
  }
}

template <class Q, class W>
double form(const void* v, const void* hv, int64_t begin, int64_t end) {
  return long_dot(static_cast<const Q*>(v) + begin, static_cast<const W*>(hv) + begin, end - begin);
}

template <class Bits>
void signs(const SignsCall& call, int64_t begin, int64_t end) {
  constexpr int64_t drawn = signs_per_block * noise_blocks;
  const auto one = static_cast<Bits>(call.one);
  const PhiloxState state = PhiloxState::make(call.state[0], call.state[1]);
  for (int64_t at = begin; at < end; at += drawn) {
    NoiseWords words;
    draw_words(state, static_cast<uint64_t>(at) / signs_per_block, words);
    Bits buffer[drawn];
    for (int64_t i = 0; i < drawn / signs_per_word; ++i) {
      const uint32_t word = words.of[i];
      for (int k = 0; k < signs_per_word; ++k) buffer[signs_per_word * i + k] = signed_one(one, word, k);
    }
    std::memcpy(static_cast<Bits*>(call.to) + at, buffer, std::min(drawn, end - at) * sizeof(Bits));
  }
}

}  // namespace
}  // namespace FASTFLAT_ISA

const VectorsLoops FASTFLAT_TABLE(vectors_loops) = {
    {FASTFLAT_ISA::dot<float, float>, FASTFLAT_ISA::dot<BFloat16, float>, FASTFLAT_ISA::dot<double, double>},
    {FASTFLAT_ISA::subtract<float, float>, FASTFLAT_ISA::subtract<BFloat16, float>,
     FASTFLAT_ISA::subtract<double, double>},
    {FASTFLAT_ISA::form<float, float>, FASTFLAT_ISA::form<BFloat16, float>, FASTFLAT_ISA::form<double, double>},
    {FASTFLAT_ISA::signs<uint16_t>, FASTFLAT_ISA::signs<uint32_t>, FASTFLAT_ISA::signs<uint64_t>},
};

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"
