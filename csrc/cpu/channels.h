// SPDX-License-Identifier: Apache-2.0
// Maps and sums of families whose elements share up to two numbers with their channel. Included after loops.h, inside
// the namespace of an instruction set.

// What an element shares with its channel.
template <class C>
struct Shared {
  C a, b;
};

// Both numbers of every channel; absent ones are 0.
template <class C>
struct PerChannel {
  const C* a;
  const C* b;

  FASTFLAT_HD Shared<C> of(int64_t c) const { return {a ? a[c] : C(0), b ? b[c] : C(0)}; }
};

// The same, one an element, for `block` elements of short runs.
template <class C>
struct SpreadChannels {
  alignas(64) C a[block] = {};
  alignas(64) C b[block] = {};

  void fill(const Geometry& g, const PerChannel<C>& p, int64_t begin, int64_t count) {
    if (p.a) spread(g, p.a, begin, count, a);
    if (p.b) spread(g, p.b, begin, count, b);
  }
};

// element(i, shared) for every storage offset in [begin, end).
template <class C, class Element>
FASTFLAT_HD void map_channels(const Geometry& g, const PerChannel<C>& p, int64_t begin, int64_t end,
                              const Element& element) {
  if (g.inner >= short_run || g.channels == 1) {
    for_runs(g, begin, end, [&](int64_t i, int64_t n, int64_t c) __attribute__((always_inline)) {
      const Shared<C> shared = p.of(c);
      for (int64_t j = i; j < i + n; ++j) element(j, shared);
    });
    return;
  }
  SpreadChannels<C> s;
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    s.fill(g, p, i, n);
    for (int64_t j = 0; j < n; ++j) element(i + j, Shared<C>{s.a[j], s.b[j]});
  }
}

// Sums of `width` terms, 1 or 2, of every element: term(i, shared) returns them as a Shared. Adds to
// sums[width c]; begin is a multiple of channels * inner where inner < short_run and channels > 1.
template <int width, class C, class Term>
FASTFLAT_HD void sum_range(const Geometry& g, const PerChannel<C>& p, int64_t begin, int64_t end, double* sums,
                           const Term& term) {
  alignas(64) C first[block], second[block];
  if (g.inner >= short_run || g.channels == 1) {
    for_runs(g, begin, end, [&](int64_t run, int64_t n, int64_t c) __attribute__((always_inline)) {
      const Shared<C> shared = p.of(c);
      for (int64_t start = run; start < run + n; start += flush) {
        const int64_t stop = std::min(run + n, start + flush);
        alignas(64) C first_lane[lanes] = {};
        alignas(64) C second_lane[lanes] = {};
        for (int64_t i = start; i < stop; i += block) {
          const int64_t count = std::min(block, stop - i);
          for (int64_t j = 0; j < count; ++j) {
            const Shared<C> t = term(i + j, shared);
            first[j] = t.a;
            if (width == 2) second[j] = t.b;
          }
          add_lanes(first, count, first_lane);
          if (width == 2) add_lanes(second, count, second_lane);
        }
        sums[width * c] += fold(first_lane);
        if (width == 2) sums[width * c + 1] += fold(second_lane);
      }
    });
    return;
  }
  // Columns: rows of all channels are added up elementwise, at most `flush / lanes` of them in the compute type.
  const int64_t row = g.channels * g.inner;
  SpreadChannels<C> s;
  for (int64_t column = 0; column < row; column += block) {
    const int64_t n = std::min(block, row - column);
    s.fill(g, p, column, n);
    for (int64_t start = begin; start < end; start += row * (flush / lanes)) {
      const int64_t stop = std::min(end, start + row * (flush / lanes));
      std::fill_n(first, n, C(0));
      std::fill_n(second, n, C(0));
      for (int64_t i = start + column; i < stop; i += row) {
        for (int64_t j = 0; j < n; ++j) {
          const Shared<C> t = term(i + j, Shared<C>{s.a[j], s.b[j]});
          first[j] += t.a;
          if (width == 2) second[j] += t.b;
        }
      }
      for (int64_t j = 0; j < n; ++j) {
        const int64_t c = (column + j) / g.inner;
        sums[width * c] += static_cast<double>(first[j]);
        if (width == 2) sums[width * c + 1] += static_cast<double>(second[j]);
      }
    }
  }
}

// The same for whole channels [begin, end) where outer == 1.
template <int width, class C, class Term>
FASTFLAT_HD void sum_channels(const Geometry& g, const PerChannel<C>& p, int64_t begin, int64_t end, double* sums,
                              const Term& term) {
  if (g.inner >= short_run) return sum_range<width, C>(g, p, begin * g.inner, end * g.inner, sums, term);
  alignas(64) C first[short_run], second[short_run];
  for (int64_t c = begin; c < end; ++c) {
    const Shared<C> shared = p.of(c);
    for (int64_t j = 0; j < g.inner; ++j) {
      const Shared<C> t = term(c * g.inner + j, shared);
      first[j] = t.a;
      if (width == 2) second[j] = t.b;
    }
    sums[width * c] = fold_short(first, g.inner);
    if (width == 2) sums[width * c + 1] = fold_short(second, g.inner);
  }
}
