// SPDX-License-Identifier: Apache-2.0
// The loops of the general_quantize family. Compiled once for each instruction set (cpu/isa.h).
//
// Data pass in blocks through buffers of the compute type: storage types are converted at the ends, and the rule itself
// is compiled for each kind of grid and noise, but not for each storage type.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/fake_quantize.h"
#include "cpu/general_quantize.h"

#include "cpu/isa_begin.h"
#include "math/convert.h"
#include "math/general_quantize.h"
#include "math/noise.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

#include "cpu/loops.h"
#include "cpu/noise_fill.h"

// The parameters of a block's elements, one an element.
template <class C>
struct Groups {
  alignas(64) C s[block], mul[block], div[block], z_in[block], z_out[block], z[block];
  alignas(64) C ts[block], tz[block];

  FASTFLAT_HD GeneralGroup<C> at(int64_t i) const { return {s[i], mul[i], div[i], z_in[i], z_out[i], z[i]}; }
};

template <class C>
struct Shares {
  alignas(64) C scale[block], outside[block], delta[block];
};

// The rule on n elements, n at most `block`, for one kind of grid and noise.
template <class C>
struct Kind {
  using Grid = GeneralGrid<C>;
  using Scalars = NoiseScale<C>;
  void (*group)(const Grid&, const C* scale, const C* zero, int64_t n, Groups<C>&);
  void (*forward)(const Grid&, Scalars, const C* x, const C* xi, int64_t n, const Groups<C>&, C* y);
  void (*backward)(const Grid&, Scalars, C delta, const C* gy, const C* x, const C* xi, int64_t n, const Groups<C>&,
                   C* gx, Shares<C>&);
  // The same without the shares of zero-point and delta.
  void (*backward_scale)(const Grid&, Scalars, C delta, const C* gy, const C* x, const C* xi, int64_t n,
                         const Groups<C>&, C* gx, Shares<C>&);
  void (*tangent)(const Grid&, Scalars, const C* tx, const C* x, const C* xi, int64_t n, const Groups<C>&, C* ty);
};

template <class C, class Precision>
void group_elements(const GeneralGrid<C>& grid_, const C* __restrict scale, const C* __restrict zero, int64_t n,
                    Groups<C>& to) {
  const GeneralGrid<C> grid = grid_;
  const auto put = [&to](int64_t i, const GeneralGroup<C>& g) __attribute__((always_inline)) {
    to.s[i] = g.s;
    to.mul[i] = g.mul;
    to.div[i] = g.div;
    to.z_in[i] = g.z_in;
    to.z_out[i] = g.z_out;
    to.z[i] = g.z;
  };
  if (zero) {
    for (int64_t i = 0; i < n; ++i) put(i, grid.group(scale[i], zero[i], Precision{}));
  } else {
    for (int64_t i = 0; i < n; ++i) put(i, grid.group(scale[i], Precision{}));
  }
}

template <class C, bool floats, Noise noise, class Precision>
struct Rule {
  static void forward(const GeneralGrid<C>& grid_, NoiseScale<C> scalars, const C* __restrict x, const C* __restrict xi,
                      int64_t n, const Groups<C>& g, C* __restrict y) {
    const GeneralGrid<C> grid = grid_;
    for (int64_t i = 0; i < n; ++i) {
      y[i] = grid.forward(x[i], xi[i], g.at(i), scalars, floats, noise, Precision{});
    }
  }

  template <bool all>
  static void backward(const GeneralGrid<C>& grid_, NoiseScale<C> scalars, C delta, const C* __restrict gy,
                       const C* __restrict x, const C* __restrict xi, int64_t n, const Groups<C>& g, C* __restrict gx,
                       Shares<C>& shares_) {
    const GeneralGrid<C> grid = grid_;
    C* __restrict scale = shares_.scale;
    C* __restrict outside = shares_.outside;
    C* __restrict of_delta = shares_.delta;
    for (int64_t i = 0; i < n; ++i) {
      const auto c = grid.code(x[i], xi[i], g.at(i), scalars, floats, noise, Precision{});
      const auto d = grid.backward(gy[i], x[i], c, delta);
      gx[i] = d.x;
      scale[i] = d.scale;
      if (all) outside[i] = d.outside;
      if (all) of_delta[i] = d.delta;
    }
  }

  static void tangent(const GeneralGrid<C>& grid_, NoiseScale<C> scalars, const C* __restrict tx, const C* __restrict x,
                      const C* __restrict xi, int64_t n, const Groups<C>& g, C* __restrict ty) {
    const GeneralGrid<C> grid = grid_;
    for (int64_t i = 0; i < n; ++i) {
      const auto group = g.at(i);
      const auto c = grid.code(x[i], xi[i], group, scalars, floats, noise, Precision{});
      ty[i] = grid.tangent(tx[i], g.ts[i], g.tz[i], c, group);
    }
  }

  static constexpr Kind<C> kind = {group_elements<C, Precision>, forward, backward<true>, backward<false>, tangent};
};

template <class C, bool floats>
const Kind<C>& kind_by_noise(Noise noise) {
  switch (noise) {
    case Noise::additive:
      return Rule<C, floats, Noise::additive, Exact>::kind;
    case Noise::stochastic:
      return Rule<C, floats, Noise::stochastic, Exact>::kind;
    case Noise::temper:
      return Rule<C, floats, Noise::temper, Exact>::kind;
    case Noise::bypass:
      return Rule<C, floats, Noise::bypass, Exact>::kind;
    default:
      return Rule<C, floats, Noise::none, Exact>::kind;
  }
}

template <class C>
const Kind<C>& kind_of(const GeneralQuantizeCall& call) {
  if constexpr (sizeof(C) == 4) {
    if (call.rules & rules::compute_input) {
      if (call.half) return Rule<C, false, Noise::none, RoundedTo<Half>>::kind;
      return Rule<C, false, Noise::none, RoundedTo<BFloat16>>::kind;
    }
  }
  const Noise noise = call.drawn ? noise_of(call.rules) : Noise::none;
  return GeneralGrid<C>::floats(call.rules) ? kind_by_noise<C, true>(noise) : kind_by_noise<C, false>(noise);
}

template <class C, class X>
const C* widened(const X* __restrict from, int64_t n, C* __restrict buffer) {
  if constexpr (std::is_same_v<C, X>) {
    return from;
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<C>(load(from[i]));
    return buffer;
  }
}

template <class C, class Y>
FASTFLAT_HD C* target(Y* to, C* buffer) {
  if constexpr (std::is_same_v<C, Y>) {
    return to;
  } else {
    return buffer;
  }
}

template <class C, class Y>
void narrowed(const C* __restrict from, int64_t n, Y* __restrict to) {
  if constexpr (!std::is_same_v<C, Y>) {
    for (int64_t i = 0; i < n; ++i) to[i] = store<Y>(from[i]);
  }
}

// One thread's walk: the parameters and draws of the block at hand.
template <class C>
struct Walk {
  const GeneralQuantizeCall& call;
  const Geometry& geometry;
  const Kind<C>& kind;
  const GeneralGrid<C> grid;
  const NoiseScale<C> scalars;
  const PhiloxState state;
  const bool normal, centred;
  int64_t filled_channel = -1, filled = 0;
  Groups<C> groups;
  alignas(64) float draws[block + 8];
  alignas(64) C xi_buffer[block];
  alignas(64) C scale[block], zero[block];

  explicit Walk(const GeneralQuantizeCall& c)
      : call(c),
        geometry(c.geometry),
        kind(kind_of<C>(c)),
        grid(GeneralGrid<C>::make(c.qmin, c.qmax, c.eps, c.factor, c.rules)),
        scalars{static_cast<C>(c.nu), static_cast<C>(c.a)},
        state(PhiloxState::make(c.seed, c.offset)),
        normal(c.rules & rules::noise_normal),
        centred(c.rules & (rules::noise_uniform | rules::noise_temper)) {
    std::fill_n(xi_buffer, block, C(0));
    std::fill_n(groups.ts, block, C(0));
    std::fill_n(groups.tz, block, C(0));
  }

  // Fills the parameters of the elements [i, i + n).
  void meet(int64_t i, int64_t n) {
    const auto* s = static_cast<const C*>(call.scale);
    const auto* z = static_cast<const C*>(call.zero_point);
    const auto* ts = static_cast<const C*>(call.ts);
    const auto* tz = static_cast<const C*>(call.tz);
    const int64_t run = i / geometry.inner;
    if (geometry.channels == 1 || (run + 1) * geometry.inner >= i + n) {
      const int64_t c = run % geometry.channels;
      if (c == filled_channel && n <= filled) return;
      // As much as may follow of this run, so that its next blocks find it.
      const int64_t count = geometry.channels == 1 ? block : std::min(block, geometry.inner);
      std::fill_n(scale, count, s[c]);
      if (z) std::fill_n(zero, count, z[c]);
      if (ts) std::fill_n(groups.ts, count, ts[c]);
      if (tz) std::fill_n(groups.tz, count, tz[c]);
      kind.group(grid, scale, z ? zero : nullptr, count, groups);
      filled_channel = c;
      filled = count;
      return;
    }
    spread(geometry, s, i, n, scale);
    if (z) spread(geometry, z, i, n, zero);
    if (ts) spread(geometry, ts, i, n, groups.ts);
    if (tz) spread(geometry, tz, i, n, groups.tz);
    kind.group(grid, scale, z ? zero : nullptr, n, groups);
    filled_channel = -1;
  }

  // The draws of the elements [i, i + n); anything where the rules draw nothing.
  const C* draw(int64_t i, int64_t n) {
    if (!call.drawn) return xi_buffer;
    const int64_t lead = i & 7;
    if (normal) {
      fill_normal(state, i - lead, n + lead, draws);
    } else {
      fill_uniform(state, i - lead, n + lead, draws);
    }
    const float* __restrict from = draws + lead;
    C* __restrict to = xi_buffer;
    const float shift = centred ? 0.5f : 0.0f;
    for (int64_t k = 0; k < n; ++k) to[k] = static_cast<C>(from[k] - shift);
    return to;
  }
};

template <class X, class Y>
void general_quantize_forward(const GeneralQuantizeCall& call, int64_t begin, int64_t end) {
  using C = compute_t<X>;
  Walk<C> walk(call);
  alignas(64) C x[block], y[block];
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    Y* to = static_cast<Y*>(call.out) + i;
    C* result = target<C>(to, y);
    walk.meet(i, n);
    walk.kind.forward(walk.grid, walk.scalars, widened<C>(static_cast<const X*>(call.x) + i, n, x), walk.draw(i, n), n,
                      walk.groups, result);
    narrowed(result, n, to);
  }
}

// Gradients of the elements [i, i + n), n at most `block`, with their shares of the sums.
template <class X, class Y, class C>
void backward_block(Walk<C>& walk, int64_t i, int64_t n, bool all, Shares<C>& shares) {
  const GeneralQuantizeCall& call = walk.call;
  alignas(64) C x[block], gy[block], gx[block];
  X* to = static_cast<X*>(call.out) + i;
  C* result = target<C>(to, gx);
  const auto rule = all ? walk.kind.backward : walk.kind.backward_scale;
  rule(walk.grid, walk.scalars, static_cast<C>(call.delta), widened<C>(static_cast<const Y*>(call.in) + i, n, gy),
       widened<C>(static_cast<const X*>(call.x) + i, n, x), walk.draw(i, n), n, walk.groups, result, shares);
  narrowed(result, n, to);
}

template <class X, class Y>
void general_quantize_backward(const GeneralQuantizeCall& call, int64_t begin, int64_t end) {
  using C = compute_t<X>;
  Walk<C> walk(call);
  Shares<C> shares;
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    walk.meet(i, n);
    backward_block<X, Y>(walk, i, n, false, shares);
  }
}

// Whether more than the scale's gradient is asked for.
inline bool wants_all(const GeneralQuantizeCall& call) { return call.zero_point || call.need_delta; }

template <class X, class Y, class C>
void backward_run(Walk<C>& walk, int64_t begin, int64_t n, bool all, double* sums) {
  Shares<C> shares;
  for (int64_t start = 0; start < n; start += flush) {
    const int64_t stop = std::min(n, start + flush);
    alignas(64) C lane[3][lanes] = {};
    for (int64_t i = start; i < stop; i += block) {
      const int64_t count = std::min(block, stop - i);
      walk.meet(begin + i, count);
      backward_block<X, Y>(walk, begin + i, count, all, shares);
      add_lanes(shares.scale, count, lane[0]);
      if (all) add_lanes(shares.outside, count, lane[1]);
      if (all) add_lanes(shares.delta, count, lane[2]);
    }
    sums[0] += fold(lane[0]);
    if (all) sums[1] += fold(lane[1]);
    if (all) sums[2] += fold(lane[2]);
  }
}

template <class X, class Y>
void general_quantize_backward_range(const GeneralQuantizeCall& call, int64_t begin, int64_t end, double* sums) {
  using C = compute_t<X>;
  const Geometry& geometry = call.geometry;
  const bool all = wants_all(call);
  Walk<C> walk(call);
  if (geometry.inner >= short_run || geometry.channels == 1) {
    for_runs(geometry, begin, end,
             [&](int64_t i, int64_t n, int64_t c) { backward_run<X, Y>(walk, i, n, all, sums + 3 * c); });
    return;
  }
  // Columns: rows of all channels are added up elementwise, at most `flush / lanes` of them in the compute type.
  const int64_t row = geometry.channels * geometry.inner;
  Shares<C> shares;
  alignas(64) C sum[3][block];
  for (int64_t column = 0; column < row; column += block) {
    const int64_t n = std::min(block, row - column);
    walk.meet(column, n);
    for (int64_t start = begin; start < end; start += row * (flush / lanes)) {
      const int64_t stop = std::min(end, start + row * (flush / lanes));
      for (auto& s : sum) std::fill_n(s, n, C(0));
      for (int64_t i = start + column; i < stop; i += row) {
        backward_block<X, Y>(walk, i, n, all, shares);
        for (int64_t j = 0; j < n; ++j) sum[0][j] += shares.scale[j];
        if (!all) continue;
        for (int64_t j = 0; j < n; ++j) sum[1][j] += shares.outside[j];
        for (int64_t j = 0; j < n; ++j) sum[2][j] += shares.delta[j];
      }
      for (int64_t j = 0; j < n; ++j) {
        double* to = sums + 3 * ((column + j) / geometry.inner);
        for (int k = 0; k < 3; ++k) to[k] += static_cast<double>(sum[k][j]);
      }
    }
  }
}

template <class X, class Y>
void general_quantize_backward_channels(const GeneralQuantizeCall& call, int64_t begin, int64_t end, double* sums) {
  using C = compute_t<X>;
  const int64_t inner = call.geometry.inner;
  if (inner >= short_run) return general_quantize_backward_range<X, Y>(call, begin * inner, end * inner, sums);
  const bool all = wants_all(call);
  Walk<C> walk(call);
  Shares<C> shares;
  const int64_t per_block = block / inner;
  for (int64_t c = begin; c < end; c += per_block) {
    const int64_t channels = std::min(per_block, end - c), i = c * inner;
    walk.meet(i, channels * inner);
    backward_block<X, Y>(walk, i, channels * inner, all, shares);
    for (int64_t k = 0; k < channels; ++k) {
      double* to = sums + 3 * (c + k);
      to[0] += fold_short(shares.scale + k * inner, inner);
      if (all) to[1] += fold_short(shares.outside + k * inner, inner);
      if (all) to[2] += fold_short(shares.delta + k * inner, inner);
    }
  }
}

template <class X, class T, class Y>
void general_quantize_tangent(const GeneralQuantizeCall& call, int64_t begin, int64_t end) {
  using C = compute_t<X>;
  Walk<C> walk(call);
  alignas(64) C x[block], tx[block] = {}, ty[block];
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    Y* to = static_cast<Y*>(call.out) + i;
    C* result = target<C>(to, ty);
    const C* tangent = call.in ? widened<C>(static_cast<const T*>(call.in) + i, n, tx) : tx;
    walk.meet(i, n);
    walk.kind.tangent(walk.grid, walk.scalars, tangent, widened<C>(static_cast<const X*>(call.x) + i, n, x),
                      walk.draw(i, n), n, walk.groups, result);
    narrowed(result, n, to);
  }
}

template <class X, class Y>
constexpr auto tangent_of_data = general_quantize_tangent<X, X, Y>;
template <class X, class Y>
constexpr auto tangent_of_result = general_quantize_tangent<X, Y, Y>;

}  // namespace
}  // namespace FASTFLAT_ISA

const GeneralQuantizeLoops FASTFLAT_TABLE(general_quantize_loops) = {
    FASTFLAT_PAIRS(general_quantize_forward),
    FASTFLAT_PAIRS(general_quantize_backward),
    FASTFLAT_PAIRS(general_quantize_backward_channels),
    FASTFLAT_PAIRS(general_quantize_backward_range),
    FASTFLAT_PAIRS(tangent_of_data),
    FASTFLAT_PAIRS(tangent_of_result),
};

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"
