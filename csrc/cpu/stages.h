// SPDX-License-Identifier: Apache-2.0
// Loops over streams of any storage type, a stage of elements at a time: what is not stored in the compute type C, or
// is written past the caches, goes through a buffer that stays in the first cache. Included once per instruction set,
// inside its namespace; no torch, no threads.

constexpr int64_t stage = 512;

template <class C>
struct alignas(64) StageBuffer {
  C v[stage];
};

template <class C>
inline constexpr Storage own_storage = sizeof(C) == 8 ? f64 : f32;

template <class S>
FASTFLAT_SHARED_CODE inline void widen(const S* __restrict from, int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
}
template <class S>
FASTFLAT_SHARED_CODE inline void narrow(const float* __restrict from, int64_t n, S* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = store<S>(from[i]);
}

// Elements [at, at + n) in the compute type: in place, or in the buffer.
template <class C>
inline const C* fetch(const Stream& s, int64_t at, int64_t n, StageBuffer<C>& buffer) {
  if constexpr (sizeof(C) == 4) {
    if (s.storage == bf16) widen(static_cast<const BFloat16*>(s.data) + at, n, buffer.v);
    if (s.storage == f16) widen(static_cast<const Half*>(s.data) + at, n, buffer.v);
  }
  return s.storage == own_storage<C> ? static_cast<const C*>(s.data) + at : buffer.v;
}

// Where a loop writes the elements of a stream: to their place, or to the buffer that deliver() empties.
template <class C>
inline C* target(const Stream& s, int64_t at, StageBuffer<C>& buffer) {
  return s.storage == own_storage<C> && !s.bypass ? static_cast<C*>(s.data) + at : buffer.v;
}

// A line of 64 bytes past the caches, in the widest stores there are: `to` is aligned to their width.
#if defined(FASTFLAT_ISA_AVX512)
constexpr int64_t line_alignment = 64;
inline void stream_line(char* to, const char* from) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(FASTFLAT_ISA_AVX2)
constexpr int64_t line_alignment = 32;
inline void stream_line(char* to, const char* from) {
  for (int k = 0; k < 64; k += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + k), v);
  }
}
#elif defined(__SSE2__)
constexpr int64_t line_alignment = 16;
inline void stream_line(char* to, const char* from) {
  for (int k = 0; k < 64; k += 16) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + k), v);
  }
}
#endif

// memcpy past the caches.
FASTFLAT_SHARED_CODE inline void copy_past_caches(void* to_, const void* from_, int64_t bytes) {
#if defined(__SSE2__)
  char* to = static_cast<char*>(to_);
  const char* from = static_cast<const char*>(from_);
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & (line_alignment - 1));
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) stream_line(to + i, from + i);
  std::memcpy(to + i, from + i, bytes - i);
#else
  std::memcpy(to_, from_, bytes);
#endif
}

// Whether stream_values takes a stream: aligned fp32 that is written past the caches. Double goes through its buffer.
template <class C>
inline bool streamed(const Stream& s) {
#if defined(__SSE2__)
  return sizeof(C) == 4 && s.bypass && s.storage == f32 && reinterpret_cast<uintptr_t>(s.data) % 64 == 0;
#else
  return false;
#endif
}

// to[i] = value(i), past the caches: a line at a time from registers. `to` is aligned to a line.
template <class Value>
inline void stream_values(float* to, int64_t n, const Value& value) {
  int64_t i = 0;
#if defined(__SSE2__)
  for (; i + 16 <= n; i += 16) {
    alignas(64) float values[16];
#pragma GCC ivdep
    for (int64_t k = 0; k < 16; ++k) values[k] = value(i + k);
    stream_line(reinterpret_cast<char*>(to + i), reinterpret_cast<const char*>(values));
  }
#endif
  for (; i < n; ++i) {
    to[i] = value(i);
    asm volatile("");  // not worth a vector loop
  }
}

// Makes what went past the caches visible to other threads.
inline void settle() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline void copy_bytes(const Stream& to, int64_t at, const void* from, int64_t n) {
  const int64_t size = storage_bytes(to.storage);
  char* place = static_cast<char*>(to.data) + at * size;
  if (to.bypass) return copy_past_caches(place, from, n * size);
  if (place != from) std::memmove(place, from, n * size);
}

FASTFLAT_SHARED_CODE inline void narrow_stochastic(const float* __restrict from, int64_t n, const StreamDraws& draws,
                                                   int64_t at, BFloat16* __restrict to) {
  constexpr int64_t drawn = 8 * noise_blocks;
  const PhiloxState state = PhiloxState::make(draws.state[0], draws.state[1]);
  for (int64_t i = 0; i < n; i += drawn) {
    NoiseWords words;
    draw_words(state, static_cast<uint64_t>(draws.start + at + i) / 8, words);
    const int64_t count = std::min(drawn, n - i);
    for (int64_t k = 0; k < count; ++k) {
      const uint32_t random = (words.of[k >> 1] >> (16 * (k & 1))) & 0xffffu;
      to[i + k] = to_bfloat16_stochastic(from[i + k], random);
    }
  }
}

// Writes what a loop left at `from` to the stream. Only bfloat16 takes draws.
template <class C>
FASTFLAT_SHARED_CODE inline void deliver(const Stream& s, int64_t at, int64_t n, const C* from,
                                         const StreamDraws& draws = {}) {
  if (s.storage == own_storage<C>) return copy_bytes(s, at, from, n);
  if constexpr (sizeof(C) == 4) {
    StageBuffer<uint16_t> narrowed;
    if (s.storage == bf16) {
      BFloat16* to = reinterpret_cast<BFloat16*>(narrowed.v);
      if (draws.state) {
        narrow_stochastic(from, n, draws, at, to);
      } else {
        narrow(from, n, to);
      }
    } else {
      narrow(from, n, reinterpret_cast<Half*>(narrowed.v));
    }
    copy_bytes(s, at, narrowed.v, n);
  }
}

// Copies a stream to another of its storage type, or of 16 bits.
template <class C>
FASTFLAT_SHARED_CODE inline void convert(const Stream& from, const Stream& to, int64_t at, int64_t n) {
  if (from.storage == to.storage) {
    return copy_bytes(to, at, static_cast<const char*>(from.data) + at * storage_bytes(from.storage), n);
  }
  StageBuffer<C> buffer;
  deliver(to, at, n, fetch(from, at, n, buffer));
}

// Sums in double, sixteen lanes whatever the vector width.
typedef double Quad __attribute__((vector_size(32)));
typedef float SingleQuad __attribute__((vector_size(16)));
typedef float SingleOctet __attribute__((vector_size(32)));

struct LaneSum {
  Quad part[4] = {};

  double total() const {
    const Quad all = (part[0] + part[2]) + (part[1] + part[3]);
    return (all[0] + all[2]) + (all[1] + all[3]);
  }
};

inline void load_lanes(const float* from, Quad* to) {
  for (int k = 0; k < 4; ++k) {
    SingleQuad v;
    std::memcpy(&v, from + 4 * k, sizeof(v));
    to[k] = __builtin_convertvector(v, Quad);
  }
}
inline void load_lanes(const double* from, Quad* to) { std::memcpy(to, from, 4 * sizeof(Quad)); }

inline void add_product(LaneSum& sum, const Quad* a, const Quad* b) {
  for (int k = 0; k < 4; ++k) sum.part[k] += a[k] * b[k];
}

// add(lanes of a, lanes of b) for 16 elements at a time; the last ones are filled up with zeros.
template <class C, class Add>
inline void for_lanes(const C* a, const C* b, int64_t n, const Add& add) {
  Quad x[4], y[4];
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    load_lanes(a + i, x);
    load_lanes(b + i, y);
    add(x, y);
  }
  if (i == n) return;
  C last_a[16] = {}, last_b[16] = {};
  std::memcpy(last_a, a + i, (n - i) * sizeof(C));
  std::memcpy(last_b, b + i, (n - i) * sizeof(C));
  load_lanes(last_a, x);
  load_lanes(last_b, y);
  add(x, y);
}

// Sum of the squares of a stage in 32 lanes of fp32, which are added up in double: half the time of doubles.
inline double narrow_squares(const float* a, int64_t n) {
  SingleOctet lane[4] = {};
  int64_t i = 0;
  const auto add = [&](const float* from) {
    for (int k = 0; k < 4; ++k) {
      SingleOctet v;
      std::memcpy(&v, from + 8 * k, sizeof(v));
      lane[k] += v * v;
    }
  };
  for (; i + 32 <= n; i += 32) add(a + i);
  if (i < n) {
    float last[32] = {};
    std::memcpy(last, a + i, (n - i) * sizeof(float));
    add(last);
  }
  Quad all = {};
  for (int half = 0; half < 2; ++half) {
    Quad part[4];
    for (int k = 0; k < 4; ++k) {
      SingleQuad v;
      std::memcpy(&v, reinterpret_cast<const char*>(&lane[k]) + half * sizeof(v), sizeof(v));
      part[k] = __builtin_convertvector(v, Quad);
    }
    all += (part[0] + part[2]) + (part[1] + part[3]);
  }
  return (all[0] + all[2]) + (all[1] + all[3]);
}

inline double squares(const double* a, int64_t n) {
  LaneSum sum;
  for_lanes(a, a, n, [&](const Quad* x, const Quad*) { add_product(sum, x, x); });
  return sum.total();
}

// fp32 squares between 1e-25 and 1e37 neither overflowed nor lost more than their last digit to underflow; the rest is
// taken again in double.
inline double squares(const float* a, int64_t n) {
  const double narrow = narrow_squares(a, n);
  if (narrow > 1e-25 && narrow < 1e37) return narrow;
  LaneSum sum;
  for_lanes(a, a, n, [&](const Quad* x, const Quad*) { add_product(sum, x, x); });
  return sum.total();
}
