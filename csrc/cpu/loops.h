// SPDX-License-Identifier: Apache-2.0
// The CPU skeletons: how elements meet the scale of their channel, and how sums are formed. Included once per
// instruction set, inside its namespace; no torch, no threads.
//
// The order of every sum depends on shape and type alone: 64 virtual lanes whatever the vector width, lanes folded in
// halves, runs of at most `flush` elements added up in double.

// Rows of a family's table, in the order of Pair and Storage (core/pairs.h).
#define FASTFLAT_PAIRS(f)                                                                             \
  {FASTFLAT_ISA::f<float, float>,   FASTFLAT_ISA::f<BFloat16, BFloat16>, FASTFLAT_ISA::f<Half, Half>, \
   FASTFLAT_ISA::f<double, double>, FASTFLAT_ISA::f<float, BFloat16>,    FASTFLAT_ISA::f<float, Half>}
#define FASTFLAT_STORAGES(f) \
  {FASTFLAT_ISA::f<float>, FASTFLAT_ISA::f<BFloat16>, FASTFLAT_ISA::f<Half>, FASTFLAT_ISA::f<double>}

constexpr int lanes = 64;
constexpr int64_t flush = 16384;
constexpr int64_t block = 512;  // elements walked at once with one scale each

// Calls uniform(offset, count, channel) for each run of one scale in [begin, end).
template <class Uniform>
FASTFLAT_HD void for_runs(const Geometry& g, int64_t begin, int64_t end, const Uniform& uniform) {
  int64_t run = g.inner ? begin / g.inner : 0;
  for (int64_t i = begin; i < end; ++run) {
    const int64_t stop = std::min(end, (run + 1) * g.inner);
    uniform(i, stop - i, run % g.channels);
    i = stop;
  }
}

// Writes the per-channel values p of the elements [begin, begin + count) to `out`, one an element.
template <class T>
FASTFLAT_SHARED_CODE void spread(const Geometry& g, const T* p, int64_t begin, int64_t count, T* __restrict out) {
  if (g.inner == 1) {
    int64_t c = begin % g.channels;
    for (int64_t i = 0; i < count; c = 0) {
      const int64_t n = std::min(count - i, g.channels - c);
      std::memcpy(out + i, p + c, n * sizeof(T));
      i += n;
    }
    return;
  }
  int64_t run = begin / g.inner;
  int64_t c = run % g.channels;
  int64_t stop = (run + 1) * g.inner - begin;
  for (int64_t i = 0; i < count; stop += g.inner) {
    const T value = p[c];
    const int64_t n = std::min(stop, count);
    for (; i < n; ++i) out[i] = value;
    if (++c == g.channels) c = 0;
  }
}

// Adds n values, at most `block` of them, to the lanes; the first goes to lane 0.
template <class C>
FASTFLAT_SHARED_CODE void add_lanes(const C* __restrict t, int64_t n, C* __restrict lane) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int l = 0; l < lanes; ++l) lane[l] += t[i + l];
  }
  for (int l = 0; l < n - i; ++l) lane[l] += t[i + l];
}

// Sum of the lanes by halving; changes them.
template <class C>
FASTFLAT_SHARED_CODE double fold(C* lane) {
  for (int width = lanes / 2; width; width /= 2) {
    for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
  }
  return static_cast<double>(lane[0]);
}

// A sum of values that come in blocks: in lanes, in double after every eight blocks.
template <class C>
struct BlockSum {
  alignas(64) C lane[lanes] = {};
  double sum = 0.0;
  int64_t blocks = 0;

  void add(const C* terms, int64_t n) {
    add_lanes(terms, n, lane);
    if (++blocks % 8) return;
    sum += fold(lane);
    std::fill_n(lane, lanes, C(0));
  }
  double total() { return sum + fold(lane); }
};

// Sum of a short run, in eight lanes.
template <class C>
inline double fold_short(const C* t, int64_t n) {
  C lane[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int l = 0; l < 8; ++l) lane[l] += t[i + l];
  }
  for (int l = 0; i < n; ++i, ++l) lane[l] += t[i];
  return static_cast<double>(((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7])));
}
