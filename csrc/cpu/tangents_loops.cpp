// SPDX-License-Identifier: Apache-2.0
// The loops of the tangents family. Compiled once for each instruction set (cpu/isa.h). Walks are compiled for each
// arithmetic type; storage of 16 bits passes through buffers, and what is absent costs no loop.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/tangents.h"

#include "cpu/isa_begin.h"
#include "math/convert.h"
#include "math/tangents.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

#include "cpu/loops.h"

// Called once a tile: one copy of the code of each will do.
#define FASTFLAT_SHARED_CODE __attribute__((noinline))

// What is written may be what is read, element by element.
#define FASTFLAT_EACH(n) \
  _Pragma("GCC ivdep") for (int64_t i = 0; i < (n); ++i)

template <class C>
FASTFLAT_SHARED_CODE void multiply(C* out, const C* a, const C* b, int64_t n) {
  FASTFLAT_EACH(n) out[i] = a[i] * b[i];
}
template <class C>
FASTFLAT_SHARED_CODE void add(C* out, const C* v, const C* a, int64_t n) {
  FASTFLAT_EACH(n) out[i] = v[i] + a[i];
}
template <class C>
FASTFLAT_SHARED_CODE void add_product(C* out, const C* v, const C* a, const C* b, int64_t n) {
  FASTFLAT_EACH(n) out[i] = v[i] + a[i] * b[i];
}
template <class C>
FASTFLAT_SHARED_CODE void add_products(C* out, const C* a, const C* b, const C* c, const C* d, int64_t n) {
  FASTFLAT_EACH(n) out[i] = a[i] * b[i] + c[i] * d[i];
}

template <class T>
FASTFLAT_SHARED_CODE void widen(const T* __restrict from, int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
}
template <class T>
FASTFLAT_SHARED_CODE void narrow(const float* __restrict from, int64_t n, T* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = store<T>(from[i]);
}

// n elements in the arithmetic type: where they are, or in the buffer. Null where the stream is absent.
template <class C>
inline const C* fetch(Storage storage, const void* from, int64_t at, int64_t n, C* buffer) {
  if (!from) return nullptr;
  if constexpr (sizeof(C) == 4) {
    if (storage == bf16) return widen(static_cast<const BFloat16*>(from) + at, n, buffer), buffer;
    if (storage == f16) return widen(static_cast<const Half*>(from) + at, n, buffer), buffer;
  }
  return static_cast<const C*>(from) + at;
}

// Where n elements are formed, and how they reach their place from there.
template <class C>
inline C* target(Storage storage, void* to, int64_t at, C* buffer) {
  return storage == bf16 || storage == f16 ? buffer : static_cast<C*>(to) + at;
}
template <class C>
inline void deliver(Storage storage, const C* from, int64_t n, void* to, int64_t at) {
  if constexpr (sizeof(C) == 4) {
    if (storage == bf16) narrow(from, n, static_cast<BFloat16*>(to) + at);
    if (storage == f16) narrow(from, n, static_cast<Half*>(to) + at);
  }
}

template <class C, class Factors>
FASTFLAT_SHARED_CODE void form_factors(const Factors& factors, const C* p, const C* g, int64_t n, C* first, C* second) {
  FASTFLAT_EACH(n) {
    const TangentFactors<C> f = factors(p[i], g[i]);
    first[i] = f.first;
    second[i] = f.second;
  }
}

template <class C>
void activation_factors(int kind, const C* p, const C* g, int64_t n, C* first, C* second) {
  switch (kind) {
    case sigmoid_output:
      return form_factors(SigmoidFactors{}, p, g, n, first, second);
    case tanh_output:
      return form_factors(TanhFactors{}, p, g, n, first, second);
    case silu_input:
      return form_factors(SiluFactors{}, p, g, n, first, second);
    default:
      return form_factors(ReluFactors{}, p, g, n, first, second);
  }
}

// One coefficient an element for the columns [column, column + n) of a row of periods.
template <class C>
FASTFLAT_SHARED_CODE void spread_columns(const Geometry& g, const C* p, int64_t column, int64_t n, C* out) {
  int64_t filled = std::min(n, g.channels * g.inner);
  spread(g, p, column, filled, out);
  for (int64_t m; filled < n; filled += m) {
    m = std::min(filled, n - filled);
    std::memcpy(out + filled, out, m * sizeof(C));
  }
}

constexpr int64_t held_tangents = 16;  // of which the spread coefficients of a tile are kept

// The coefficients of a tile's columns, spread; formed anew only where they are others than those of the last tile.
template <class C>
struct Coefficients {
  static constexpr int most = 3;

  const Geometry& g;
  const void* from[most];
  int64_t first, held;
  int64_t key = -1, column = 0, n = 0;
  std::vector<C> kept;
  alignas(64) C fresh[most][combine_tile];
  alignas(64) C of_channel[2][combine_tile];

  Coefficients(const CombineCall& call, int64_t first_, int64_t last)
      : g(call.geometry),
        from{call.r0, call.r1, call.shift},
        first(first_),
        held(std::min(held_tangents, last - first_)),
        kept(call.r0 || call.r1 || call.shift ? held * most * combine_tile : 0) {}

  void move(const CombineCall& call, int64_t column_, int64_t n_) {
    const int64_t run = column_ / g.inner, last = (column_ + n_ - 1) / g.inner;
    const int64_t wanted = run == last ? run % g.channels : g.channels + column_;
    if (wanted == key && n_ <= n) return;
    key = wanted;
    column = column_;
    n = n_;
    if (call.first_of_channel) spread_columns(g, static_cast<const C*>(call.p0), column, n, of_channel[0]);
    if (call.second_of_channel) spread_columns(g, static_cast<const C*>(call.p1), column, n, of_channel[1]);
    for (int64_t k = 0; k < held; ++k) {
      for (int which = 0; which < most; ++which) {
        if (from[which]) form(first + k, which, kept.data() + (k * most + which) * combine_tile);
      }
    }
  }

  const C* of(int64_t k, int which) {
    if (!from[which]) return nullptr;
    if (k - first < held) return kept.data() + ((k - first) * most + which) * combine_tile;
    form(k, which, fresh[which]);
    return fresh[which];
  }

 private:
  void form(int64_t k, int which, C* out) const {
    spread_columns(g, static_cast<const C*>(from[which]) + k * g.channels, column, n, out);
  }
};

// a b, or b alone without a.
template <class C>
struct Term {
  const C *a, *b;
};

template <class C>
void combine(const CombineCall& call, int64_t first, int64_t last, int64_t begin, int64_t end) {
  alignas(64) C factor[2][combine_tile], of_f0[combine_tile], of_f1[combine_tile], of_mask[combine_tile],
      of_t0[combine_tile], of_t1[combine_tile], sum[combine_tile];
  Coefficients<C> coefficients(call, first, last);
  const TangentTiles& tiles = call.tiles;
  const Storage storage = call.storage;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t row = call.by_rows ? tile / tiles.across : tile % tiles.rows;
    const int64_t column = (call.by_rows ? tile % tiles.across : tile / tiles.rows) * tiles.size;
    const int64_t at = row * tiles.row + column;
    const int64_t columns = std::min(tiles.size, tiles.row - column), n = std::min(columns, tiles.n - at);
    if (n <= 0) continue;
    coefficients.move(call, column, columns);
    // What all tangents share.
    const C* a0 = coefficients.of_channel[0];
    const C* a1 = coefficients.of_channel[1];
    if (!call.first_of_channel) a0 = fetch(storage, call.p0, at, n, factor[0]);
    if (!call.second_of_channel) a1 = fetch(storage, call.p1, at, n, factor[1]);
    if (call.kind != given) {
      activation_factors(call.kind, a0, a1 ? a1 : a0, n, factor[0], factor[1]);
      a0 = factor[0];
      a1 = factor[1];
    }
    const C* const f0 = fetch(storage, call.f0, at, n, of_f0);
    const C* const f1 = fetch(storage, call.f1, at, n, of_f1);
    const C* const mask = fetch(storage, call.mask, at, n, of_mask);
    for (int64_t k = first; k < last; ++k) {
      const int64_t place = k * tiles.n + at;
      C* const out = target(storage, call.out, place, sum);
      Term<C> terms[5];
      int count = 0;
      const auto add_term = [&](const C* a, const C* b) {
        if (b) terms[count++] = {a, b};
      };
      add_term(a0, fetch(storage, call.t0, place, n, of_t0));
      add_term(a1, fetch(storage, call.t1, place, n, of_t1));
      add_term(f0, coefficients.of(k, 0));
      add_term(f1, coefficients.of(k, 1));
      add_term(nullptr, coefficients.of(k, 2));
      const C* v = terms[0].b;  // the sum so far
      int next = 1;
      if (terms[0].a && count > 1 && terms[1].a) {
        add_products(out, terms[0].a, terms[0].b, terms[1].a, terms[1].b, n);
        next = 2;
        v = out;
      } else if (terms[0].a) {
        multiply(out, terms[0].a, terms[0].b, n);
        v = out;
      }
      for (; next < count; ++next, v = out) {
        const Term<C>& term = terms[next];
        term.a ? add_product(out, v, term.a, term.b, n) : add(out, v, term.b, n);
      }
      if (mask) {
        multiply(out, v, mask, n);
      } else if (v != out) {
        std::memcpy(out, v, n * sizeof(C));
      }
      deliver(storage, out, n, call.out, place);
    }
  }
}

// Sum of a run.
template <class C>
double total_of(const C* v, int64_t n) {
  if (n >= lanes) {
    alignas(64) C lane[lanes] = {};
    add_lanes(v, n, lane);
    return fold(lane);
  }
  if (n >= 8) return fold_short(v, n);
  C sum = v[0];
  for (int64_t i = 1; i < n; ++i) sum += v[i];
  return static_cast<double>(sum);
}

// Adds the numbers of columns [column, column + n) to those of their channels.
template <class C>
FASTFLAT_SHARED_CODE void add_columns(const Geometry& g, const C* v, int64_t column, int64_t n, double* sums) {
  if (g.inner == 1) {
    int64_t c = column % g.channels;
    for (int64_t i = 0; i < n; c = 0) {
      const int64_t m = std::min(n - i, g.channels - c);
      for (int64_t j = 0; j < m; ++j) sums[c + j] += static_cast<double>(v[i + j]);
      i += m;
    }
    return;
  }
  const int64_t run = column / g.inner;
  int64_t c = run % g.channels, stop = (run + 1) * g.inner - column;
  for (int64_t i = 0; i < n; stop += g.inner) {
    const int64_t until = std::min(stop, n);
    sums[c] += total_of(v + i, until - i);
    i = until;
    if (++c == g.channels) c = 0;
  }
}

// An element-wise primal of a tile: in its place, or its rows behind one another in a buffer.
template <class C>
struct TilePrimal {
  const C* data;
  int64_t stride;

  TilePrimal(const SumsCall& call, const void* from, int64_t at, int64_t columns, int64_t rows, C* buffer)
      : data(nullptr), stride(call.tiles.row) {
    if (!from) return;
    data = fetch(call.storage, from, at, std::min(columns, call.tiles.n - at), buffer);
    if (data != buffer) return;
    stride = columns;
    for (int64_t r = 1; r < rows; ++r) {
      const int64_t next = at + r * call.tiles.row;
      fetch(call.storage, from, next, std::min(columns, call.tiles.n - next), buffer + r * columns);
    }
  }
};

template <class C>
void sums(const SumsCall& call, int64_t first, int64_t last, int64_t begin, int64_t end, double* dots, double* totals) {
  alignas(64) C of_p0[sums_tile], of_p1[sums_tile], of_mask[sums_tile];
  alignas(64) C of_t0[sums_columns], of_t1[sums_columns], mapped[sums_columns];
  alignas(64) C dot[sums_columns], total[sums_columns];
  const TangentTiles& tiles = call.tiles;
  const Storage storage = call.storage;
  const int64_t channels = call.geometry.channels;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t column = tile % tiles.across * tiles.size, row = tile / tiles.across * tiles.deep;
    const int64_t at = row * tiles.row + column;
    const int64_t columns = std::min(tiles.size, tiles.row - column);
    // The last row may be shorter than a tile's first column.
    int64_t rows = std::min(tiles.deep, tiles.rows - row);
    while (rows > 0 && at + (rows - 1) * tiles.row >= tiles.n) --rows;
    if (rows == 0) continue;
    const TilePrimal<C> p0(call, call.p0, at, columns, rows, of_p0), p1(call, call.p1, at, columns, rows, of_p1),
        mask(call, call.mask, at, columns, rows, of_mask);
    for (int64_t k = first; k < last; ++k) {
      for (int64_t from = 0; from < columns; from += sums_columns) {
        int64_t width = 0;
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t place = at + r * tiles.row + from, here = k * tiles.n + place;
          const int64_t n = std::min({sums_columns, columns - from, tiles.n - place});
          if (n <= 0) break;
          if (r == 0) width = n;
          const C* const t0 = fetch(storage, call.t0, here, n, of_t0);
          if (call.dots) {
            const C* const p = p0.data + r * p0.stride + from;
            r == 0 ? multiply(dot, t0, p, n) : add_product(dot, dot, t0, p, n);
          }
          if (call.t1) {
            const C* const t1 = fetch(storage, call.t1, here, n, of_t1);
            add_product(dot, dot, t1, p1.data + r * p1.stride + from, n);
          }
          if (call.totals) r == 0 ? void(std::memcpy(total, t0, n * sizeof(C))) : add(total, total, t0, n);
          if (call.mask) {
            C* const out = target(storage, call.mapped, here, mapped);
            multiply(out, t0, mask.data + r * mask.stride + from, n);
            deliver(storage, out, n, call.mapped, here);
          }
        }
        const int64_t numbers = (k - first) * channels;
        if (call.dots) add_columns(call.geometry, dot, column + from, width, dots + numbers);
        if (call.totals) add_columns(call.geometry, total, column + from, width, totals + numbers);
      }
    }
  }
}

}  // namespace
}  // namespace FASTFLAT_ISA

const TangentsLoops FASTFLAT_TABLE(tangents_loops) = {
    {FASTFLAT_ISA::combine<float>, FASTFLAT_ISA::combine<double>},
    {FASTFLAT_ISA::sums<float>, FASTFLAT_ISA::sums<double>},
};

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"
