// SPDX-License-Identifier: Apache-2.0
// The loops of the fake_quantize family. Compiled once for each instruction set (cpu/isa.h).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/fake_quantize.h"

#include "cpu/isa_begin.h"
#include "math/convert.h"
#include "math/fake_quantize.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

#include "cpu/loops.h"

// Per-channel parameters of a call in the compute type.
template <class C>
struct Parameters {
  const C* scale;
  const C* zero;
  const C* ts;
  const C* tz;

  explicit Parameters(const FakeQuantizeCall& call)
      : scale(static_cast<const C*>(call.scale)),
        zero(static_cast<const C*>(call.zero_point)),
        ts(static_cast<const C*>(call.ts)),
        tz(static_cast<const C*>(call.tz)) {}

  template <class Grid>
  FASTFLAT_HD QuantGroup<C> group(const Grid& grid, int64_t c) const {
    return zero ? grid.group(scale[c], zero[c]) : grid.group(scale[c]);
  }
};

// The same, one value an element, for `block` elements of short runs.
template <class C>
struct SpreadParameters {
  alignas(64) C scale[block];
  alignas(64) C zero[block];
  alignas(64) C ts[block];
  alignas(64) C tz[block];

  void fill(const Geometry& g, const Parameters<C>& p, int64_t begin, int64_t count) {
    spread(g, p.scale, begin, count, scale);
    if (p.zero) spread(g, p.zero, begin, count, zero);
    if (p.ts) spread(g, p.ts, begin, count, ts);
    if (p.tz) spread(g, p.tz, begin, count, tz);
  }
};

// Runs body(grid) with the form of the grid known to the compiler: the plain one, the chained one where it may come, or
// one kind of division.
template <class C, bool with_chained, class Body>
FASTFLAT_HD void by_form(const FakeQuantizeCall& call, const Body& body) {
  if (IntegerGrid<C>::is_plain(call.rules, call.zero_point != nullptr)) {
    body(IntegerGrid<C, GridForm::plain>::make(call.qmin, call.qmax, call.eps, call.factor, 0));
    return;
  }
  if constexpr (with_chained) {
    if (IntegerGrid<C>::is_chained(call.rules, call.zero_point != nullptr)) {
      body(IntegerGrid<C, GridForm::chained>::make(call.qmin, call.qmax, call.eps, call.factor, call.rules));
      return;
    }
  }
  auto grid = IntegerGrid<C>::make(call.qmin, call.qmax, call.eps, call.factor, call.rules);
  if (grid.reciprocal) {
    grid.reciprocal = true;
    body(grid);
  } else {
    grid.reciprocal = false;
    body(grid);
  }
}

// Whether loops over these storage types come in the chained form: those that other libraries' quantizers meet.
template <class X, class Y>
constexpr bool chains = std::is_same_v<X, float> && std::is_same_v<Y, float>;

// The map skeleton: element(i, grid, group, ts, tz) for every storage offset in [begin, end).
template <class C, class Grid, class Element>
FASTFLAT_HD void map_on_grid(const FakeQuantizeCall& call, int64_t begin, int64_t end, const Grid grid,
                             const Element& element) {
  const Geometry& geometry = call.geometry;
  const Parameters<C> p(call);
  if (geometry.inner >= short_run || geometry.channels == 1) {
    for_runs(geometry, begin, end, [&](int64_t i, int64_t n, int64_t c) __attribute__((always_inline)) {
      const QuantGroup<C> g = p.group(grid, c);
      const C ts = p.ts ? p.ts[c] : C(0), tz = p.tz ? p.tz[c] : C(0);
      for (int64_t j = i; j < i + n; ++j) element(j, grid, g, ts, tz);
    });
    return;
  }
  SpreadParameters<C> s;
  if (!p.ts) std::fill_n(s.ts, block, C(0));
  if (!p.tz) std::fill_n(s.tz, block, C(0));
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    s.fill(geometry, p, i, n);
    if (p.zero) {
      for (int64_t j = 0; j < n; ++j) element(i + j, grid, grid.group(s.scale[j], s.zero[j]), s.ts[j], s.tz[j]);
    } else {
      for (int64_t j = 0; j < n; ++j) element(i + j, grid, grid.group(s.scale[j]), s.ts[j], s.tz[j]);
    }
  }
}

// The same with the form of the grid known to the compiler.
template <class C, bool with_chained, class Element>
FASTFLAT_HD void map_elements(const FakeQuantizeCall& call, int64_t begin, int64_t end, const Element& element) {
  by_form<C, with_chained>(
      call, [&](const auto grid) __attribute__((always_inline)) { map_on_grid<C>(call, begin, end, grid, element); });
}

template <class X, class Y>
void fake_quantize_forward(const FakeQuantizeCall& call, int64_t begin, int64_t end) {
  using C = compute_t<X>;
  const X* __restrict x = static_cast<const X*>(call.x);
  Y* __restrict y = static_cast<Y*>(call.out);
  map_elements<C, chains<X, Y>>(call, begin, end,
                                [=](int64_t i, const auto& grid, const QuantGroup<C>& g, C, C)
                                    __attribute__((always_inline)) { y[i] = store<Y>(grid.forward(load(x[i]), g)); });
}

template <class X, class Y>
void fake_quantize_backward(const FakeQuantizeCall& call, int64_t begin, int64_t end) {
  using C = compute_t<X>;
  const X* __restrict x = static_cast<const X*>(call.x);
  const Y* __restrict gy = static_cast<const Y*>(call.in);
  X* __restrict gx = static_cast<X*>(call.out);
  map_elements<C, chains<X, Y>>(
      call, begin, end, [=](int64_t i, const auto& grid, const QuantGroup<C>& g, C, C) __attribute__((always_inline)) {
        gx[i] = store<X>(grid.backward(load(gy[i]), load(x[i]), g).x);
      });
}

template <class X, class T, class Y>
void fake_quantize_tangent(const FakeQuantizeCall& call, int64_t begin, int64_t end) {
  using C = compute_t<X>;
  const X* __restrict x = static_cast<const X*>(call.x);
  const T* __restrict tx = static_cast<const T*>(call.in);
  Y* __restrict ty = static_cast<Y*>(call.out);
  if (tx) {
    map_elements<C, false>(
        call, begin, end,
        [=](int64_t i, const auto& grid, const QuantGroup<C>& g, C ts, C tz)
            __attribute__((always_inline)) { ty[i] = store<Y>(grid.tangent(load(tx[i]), ts, tz, load(x[i]), g)); });
  } else {
    // Tangents of the scale alone are rare: one form of the grid for all.
    const auto any = IntegerGrid<C>::make(call.qmin, call.qmax, call.eps, call.factor, call.rules);
    map_on_grid<C>(call, begin, end, any,
                   [=](int64_t i, const auto& grid, const QuantGroup<C>& g, C ts, C tz)
                       __attribute__((always_inline)) { ty[i] = store<Y>(grid.tangent(C(0), ts, tz, load(x[i]), g)); });
  }
}

// Gradients of up to `block` elements; their shares of the sums go to scale[] and outside[].
template <bool with_zero, class X, class Y, class C, class Grid, class GroupAt>
FASTFLAT_HD void backward_block(const X* __restrict x, const Y* __restrict gy, X* __restrict gx, int64_t n,
                                const Grid& grid, const GroupAt& group_at, C* __restrict scale, C* __restrict outside) {
  for (int64_t i = 0; i < n; ++i) {
    const auto d = grid.backward(load(gy[i]), load(x[i]), group_at(i));
    gx[i] = store<X>(d.x);
    scale[i] = d.scale;
    if (with_zero) outside[i] = d.outside;
  }
}

// The same for short runs, whose parameters are spread.
template <class X, class Y, class C, class Grid>
FASTFLAT_HD void backward_spread(const X* x, const Y* gy, X* gx, int64_t n, const Grid& grid,
                                 const SpreadParameters<C>& s, bool with_zero, C* scale, C* outside) {
  if (with_zero) {
    const auto at = [&](int64_t i) __attribute__((always_inline)) { return grid.group(s.scale[i], s.zero[i]); };
    backward_block<true>(x, gy, gx, n, grid, at, scale, outside);
  } else {
    const auto at = [&](int64_t i) __attribute__((always_inline)) { return grid.group(s.scale[i]); };
    backward_block<false>(x, gy, gx, n, grid, at, scale, outside);
  }
}

template <bool with_zero, class X, class Y, class C, class Grid>
FASTFLAT_HD void backward_lanes(const X* x, const Y* gy, X* gx, int64_t n, const Grid& grid, const QuantGroup<C>& g,
                                double* sums) {
  const auto at = [g](int64_t) __attribute__((always_inline)) { return g; };
  alignas(64) C scale[block], outside[block];
  for (int64_t start = 0; start < n; start += flush) {
    const int64_t stop = std::min(n, start + flush);
    alignas(64) C scale_lane[lanes] = {};
    alignas(64) C outside_lane[lanes] = {};
    for (int64_t i = start; i < stop; i += block) {
      const int64_t count = std::min(block, stop - i);
      backward_block<with_zero>(x + i, gy + i, gx + i, count, grid, at, scale, outside);
      add_lanes(scale, count, scale_lane);
      if (with_zero) add_lanes(outside, count, outside_lane);
    }
    sums[0] += fold(scale_lane);
    if (with_zero) sums[1] += fold(outside_lane);
  }
}

// Gradients of one long run; adds its sums. Without a zero-point the second sum is not formed. A function of its own,
// with its parameters in registers: inlined into its callers the loop is too much for the vectoriser.
template <bool with_zero, class X, class Y>
__attribute__((noinline)) void backward_run(const FakeQuantizeCall& call, int64_t begin, int64_t n, int64_t channel,
                                            double* sums) {
  using C = compute_t<X>;
  const X* x = static_cast<const X*>(call.x) + begin;
  const Y* gy = static_cast<const Y*>(call.in) + begin;
  X* gx = static_cast<X*>(call.out) + begin;
  by_form<C, chains<X, Y>>(call, [=](const auto grid) __attribute__((always_inline)) {
    const QuantGroup<C> g = Parameters<C>(call).group(grid, channel);
    backward_lanes<with_zero>(x, gy, gx, n, grid, g, sums + 2 * channel);
  });
}

template <class X, class Y>
void fake_quantize_backward_range(const FakeQuantizeCall& call, int64_t begin, int64_t end, double* sums) {
  using C = compute_t<X>;
  const Geometry& geometry = call.geometry;
  const Parameters<C> p(call);
  const X* x = static_cast<const X*>(call.x);
  const Y* gy = static_cast<const Y*>(call.in);
  X* gx = static_cast<X*>(call.out);
  if (geometry.inner >= short_run || geometry.channels == 1) {
    const auto run = p.zero ? backward_run<true, X, Y> : backward_run<false, X, Y>;
    for_runs(geometry, begin, end, [&](int64_t i, int64_t n, int64_t c) { run(call, i, n, c, sums); });
    return;
  }
  by_form<C, chains<X, Y>>(call, [&](const auto grid) __attribute__((always_inline)) {
    // Columns: rows of all channels are added up elementwise, at most `flush / lanes` of them in the compute type.
    const int64_t row = geometry.channels * geometry.inner;
    SpreadParameters<C> s;
    alignas(64) C scale[block], outside[block], scale_sum[block], outside_sum[block];
    for (int64_t column = 0; column < row; column += block) {
      const int64_t n = std::min(block, row - column);
      s.fill(geometry, p, column, n);
      for (int64_t start = begin; start < end; start += row * (flush / lanes)) {
        const int64_t stop = std::min(end, start + row * (flush / lanes));
        std::fill_n(scale_sum, n, C(0));
        std::fill_n(outside_sum, n, C(0));
        for (int64_t i = start + column; i < stop; i += row) {
          backward_spread(x + i, gy + i, gx + i, n, grid, s, p.zero != nullptr, scale, outside);
          for (int64_t j = 0; j < n; ++j) scale_sum[j] += scale[j];
          if (p.zero) {
            for (int64_t j = 0; j < n; ++j) outside_sum[j] += outside[j];
          }
        }
        for (int64_t j = 0; j < n; ++j) {
          const int64_t c = (column + j) / geometry.inner;
          sums[2 * c] += static_cast<double>(scale_sum[j]);
          sums[2 * c + 1] += static_cast<double>(outside_sum[j]);
        }
      }
    }
  });
}

template <class X, class Y>
void fake_quantize_backward_channels(const FakeQuantizeCall& call, int64_t begin, int64_t end, double* sums) {
  using C = compute_t<X>;
  const Geometry& geometry = call.geometry;
  const int64_t inner = geometry.inner;
  if (inner >= short_run) return fake_quantize_backward_range<X, Y>(call, begin * inner, end * inner, sums);
  const Parameters<C> p(call);
  const X* x = static_cast<const X*>(call.x);
  const Y* gy = static_cast<const Y*>(call.in);
  X* gx = static_cast<X*>(call.out);
  const int64_t per_block = block / inner;
  by_form<C, chains<X, Y>>(call, [&](const auto grid) __attribute__((always_inline)) {
    SpreadParameters<C> s;
    alignas(64) C scale[block], outside[block];
    for (int64_t c = begin; c < end; c += per_block) {
      const int64_t channels = std::min(per_block, end - c), i = c * inner;
      s.fill(geometry, p, i, channels * inner);
      backward_spread(x + i, gy + i, gx + i, channels * inner, grid, s, p.zero != nullptr, scale, outside);
      for (int64_t k = 0; k < channels; ++k) {
        sums[2 * (c + k)] += fold_short(scale + k * inner, inner);
        if (p.zero) sums[2 * (c + k) + 1] += fold_short(outside + k * inner, inner);
      }
    }
  });
}

// Largest magnitude of n elements and `so_far`; any order gives the same, and NaN wins. Magnitudes are compared as the
// integers of their bits, which have the same order with NaN above all: compilers vectorise such a maximum.
template <class X>
FASTFLAT_HD double absmax_run(const X* __restrict x, int64_t n, double so_far) {
  using C = compute_t<X>;
  using Bits = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
  Bits largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, bit_cast<Bits>(static_cast<C>(std::fabs(load(x[i])))));
  return larger_magnitude<double>(so_far, static_cast<double>(bit_cast<C>(largest)));
}

template <class X>
void fake_quantize_absmax_range(const FakeQuantizeCall& call, int64_t begin, int64_t end, double* absmax) {
  using C = compute_t<X>;
  const Geometry& geometry = call.geometry;
  const X* __restrict x = static_cast<const X*>(call.x);
  if (geometry.inner == 1 && geometry.channels > 1) {
    alignas(64) C largest[block];
    for (int64_t column = 0; column < geometry.channels; column += block) {
      const int64_t n = std::min(block, geometry.channels - column);
      std::fill_n(largest, n, C(0));
      for (int64_t i = begin + column; i < end; i += geometry.channels) {
        for (int64_t j = 0; j < n; ++j) largest[j] = larger_magnitude<C>(largest[j], std::fabs(load(x[i + j])));
      }
      for (int64_t j = 0; j < n; ++j) absmax[column + j] = larger_magnitude<double>(absmax[column + j], largest[j]);
    }
    return;
  }
  for_runs(geometry, begin, end, [&](int64_t i, int64_t n, int64_t c) { absmax[c] = absmax_run(x + i, n, absmax[c]); });
}

template <class X>
void fake_quantize_absmax_channels(const FakeQuantizeCall& call, int64_t begin, int64_t end, double* absmax) {
  fake_quantize_absmax_range<X>(call, begin * call.geometry.inner, end * call.geometry.inner, absmax);
}

template <class X, class Y>
constexpr auto tangent_of_data = fake_quantize_tangent<X, X, Y>;
template <class X, class Y>
constexpr auto tangent_of_result = fake_quantize_tangent<X, Y, Y>;

}  // namespace
}  // namespace FASTFLAT_ISA

const FakeQuantizeLoops FASTFLAT_TABLE(fake_quantize_loops) = {
    FASTFLAT_PAIRS(fake_quantize_forward),
    FASTFLAT_PAIRS(fake_quantize_backward),
    FASTFLAT_PAIRS(fake_quantize_backward_channels),
    FASTFLAT_PAIRS(fake_quantize_backward_range),
    FASTFLAT_PAIRS(tangent_of_data),
    FASTFLAT_PAIRS(tangent_of_result),
    FASTFLAT_STORAGES(fake_quantize_absmax_channels),
    FASTFLAT_STORAGES(fake_quantize_absmax_range),
};

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"
