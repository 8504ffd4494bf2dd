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
  alignas(64) C s[block], mul[block], div[block], out[block], z_in[block], z_out[block], z[block], reach[block];
  alignas(64) C ts[block], tz[block];

  bool uniform;  // all elements share the parameters of the first

  FASTFLAT_HD GeneralGroup<C> at(int64_t i) const {
    return {s[i], mul[i], div[i], out[i], z_in[i], z_out[i], z[i], reach[i]};
  }
};

// Shorter runs of one scale are walked with the parameters of each element.
constexpr int64_t least_run = 16;

template <class C>
struct Shares {
  alignas(64) C scale[block], outside[block], delta[block];
};

template <class C>
struct Walk;

// The rule on n elements, n at most `block`, for one kind of grid and noise; the parameters are the walk's.
template <class C>
struct Kind {
  void (*group)(const GeneralGrid<C>&, const GeneralQuantizeCall&, const C* scale, const C* zero, int64_t n,
                Groups<C>&);
  void (*forward)(const Walk<C>&, const C* x, const C* xi, int64_t n, C* y);
  void (*backward)(const Walk<C>&, const C* gy, const C* x, const C* xi, int64_t n, C* gx, Shares<C>&, int64_t first);
  // The same without the shares of zero-point and delta, for delta = 0.
  void (*backward_scale)(const Walk<C>&, const C* gy, const C* x, const C* xi, int64_t n, C* gx, Shares<C>&,
                         int64_t first);
  void (*tangent)(const Walk<C>&, const C* tx, const C* x, const C* xi, int64_t n, C* ty);
};

// One thread's walk: the parameters and draws of the block at hand.
template <class C>
struct Walk {
  const GeneralQuantizeCall& call;
  const Geometry& geometry;
  const Kind<C>& kind;
  const GeneralGrid<C> grid;
  const NoiseScale<C> scalars;
  const PhiloxState state;
  const bool normal;
  int64_t met = -1;  // the scale whose parameters are at hand
  Groups<C> groups;
  alignas(64) float draws[block + 8];
  alignas(64) C xi_buffer[block];
  alignas(64) C scale[block], zero[block];

  Walk(const GeneralQuantizeCall& c, const Kind<C>& kind_)
      : call(c),
        geometry(c.geometry),
        kind(kind_),
        grid(GeneralGrid<C>::make(c.qmin, c.qmax, c.eps, c.factor, c.rules)),
        scalars{static_cast<C>(c.nu), static_cast<C>(c.a),
                c.rules & (rules::noise_uniform | rules::noise_temper) ? C(0.5) : C(0)},
        state(PhiloxState::make(c.seed, c.offset)),
        normal(c.rules & rules::noise_normal) {
    std::fill_n(xi_buffer, block, C(0));
    std::fill_n(groups.ts, block, C(0));
    std::fill_n(groups.tz, block, C(0));
  }

  // Calls piece(offset, count) for each run of one scale in [i, i + n) with its parameters met. Short runs are one
  // piece with parameters an element.
  template <class Piece>
  FASTFLAT_HD void pieces(int64_t i, int64_t n, const Piece& piece) {
    if (geometry.channels > 1 && geometry.inner < least_run) {
      meet_elements(i, n);
      return piece(0, n);
    }
    for (int64_t done = 0; done < n;) {
      const int64_t run = (i + done) / geometry.inner;
      const int64_t count = std::min(n - done, (run + 1) * geometry.inner - (i + done));
      meet_run(run % geometry.channels);
      piece(done, count);
      done += count;
    }
  }

  // All elements share the parameters of scale c.
  void meet_run(int64_t c) {
    groups.uniform = true;
    if (c == met) return;
    met = c;
    const auto* z = static_cast<const C*>(call.zero_point);
    kind.group(grid, call, static_cast<const C*>(call.scale) + c, z ? z + c : nullptr, 1, groups);
    if (call.ts) groups.ts[0] = static_cast<const C*>(call.ts)[c];
    if (call.tz) groups.tz[0] = static_cast<const C*>(call.tz)[c];
  }

  // The elements [i, i + n) have parameters each.
  void meet_elements(int64_t i, int64_t n) {
    groups.uniform = false;
    met = -1;
    const auto* z = static_cast<const C*>(call.zero_point);
    spread(geometry, static_cast<const C*>(call.scale), i, n, scale);
    if (z) spread(geometry, z, i, n, zero);
    if (call.ts) spread(geometry, static_cast<const C*>(call.ts), i, n, groups.ts);
    if (call.tz) spread(geometry, static_cast<const C*>(call.tz), i, n, groups.tz);
    kind.group(grid, call, scale, z ? zero : nullptr, n, groups);
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
    if constexpr (sizeof(C) == sizeof(float)) {
      return draws + lead;
    } else {
      for (int64_t k = 0; k < n; ++k) xi_buffer[k] = static_cast<C>(draws[lead + k]);
      return xi_buffer;
    }
  }
};

template <class C, class Precision>
Precision precision_of(const GeneralQuantizeCall& call) {
  if constexpr (std::is_same_v<Precision, Exact>) {
    return {};
  } else {
    return {mask_of<float>(call.rules & rules::compute_input)};
  }
}

template <class C, class Precision>
void group_elements(const GeneralGrid<C>& grid_, const GeneralQuantizeCall& call, const C* __restrict scale,
                    const C* __restrict zero, int64_t n, Groups<C>& to) {
  const GeneralGrid<C> grid = grid_;
  const Precision precision = precision_of<C, Precision>(call);
  const auto put = [&to](int64_t i, const GeneralGroup<C>& g) __attribute__((always_inline)) {
    to.s[i] = g.s;
    to.mul[i] = g.mul;
    to.div[i] = g.div;
    to.out[i] = g.out;
    to.z_in[i] = g.z_in;
    to.z_out[i] = g.z_out;
    to.z[i] = g.z;
    to.reach[i] = g.reach;
  };
  if (zero) {
    for (int64_t i = 0; i < n; ++i) put(i, grid.group(scale[i], zero[i], precision));
  } else {
    for (int64_t i = 0; i < n; ++i) put(i, grid.group(scale[i], precision));
  }
}

template <class C, bool floats, Noise noise, class Precision, GeneralForm form = GeneralForm::full>
struct Rule {
  static constexpr bool plain = form == GeneralForm::plain,
                        eager = form == GeneralForm::divide || form == GeneralForm::reciprocal;
  static constexpr bool chained = noise == Noise::none && !floats;

  static FASTFLAT_HD auto code(const GeneralGrid<C>& grid, Precision precision, NoiseScale<C> scalars, C x, C xi,
                               const GeneralGroup<C>& g) {
    if constexpr (plain) return grid.code_of_plain(x, xi, g, scalars, floats, noise);
    if constexpr (eager) return grid.code_of_eager(x, g, form == GeneralForm::reciprocal);
    return grid.code(x, xi, g, scalars, floats, noise, precision);
  }

  template <class GroupAt>
  static FASTFLAT_HD void forward_loop(const GeneralGrid<C>& grid, Precision precision, NoiseScale<C> scalars,
                                       const C* __restrict x, const C* __restrict xi, int64_t n, const GroupAt& at,
                                       C* __restrict y) {
    for (int64_t i = 0; i < n; ++i) {
      const auto group = at(i);
      const auto c = code(grid, precision, scalars, x[i], xi[i], group);
      y[i] = eager ? c.d * group.s : grid.result(c, x[i], group, noise);
    }
  }

  static void forward(const Walk<C>& walk, const C* x, const C* xi, int64_t n, C* y) {
    const GeneralGrid<C> grid = walk.grid;
    const Precision precision = precision_of<C, Precision>(walk.call);
    if (walk.groups.uniform) {
      const GeneralGroup<C> g = walk.groups.at(0);
      forward_loop(
          grid, precision, walk.scalars, x, xi, n, [g](int64_t) __attribute__((always_inline)) { return g; }, y);
    } else {
      const Groups<C>& g = walk.groups;
      forward_loop(
          grid, precision, walk.scalars, x, xi, n, [&g](int64_t i) __attribute__((always_inline)) { return g.at(i); },
          y);
    }
  }

  template <bool all, class GroupAt>
  static FASTFLAT_HD void backward_loop(const GeneralGrid<C>& grid, Precision precision, NoiseScale<C> scalars, C delta,
                                        const C* __restrict gy, const C* __restrict x, const C* __restrict xi,
                                        int64_t n, const GroupAt& at, C* __restrict gx, C* __restrict scale,
                                        C* __restrict outside, C* __restrict of_delta) {
    for (int64_t i = 0; i < n; ++i) {
      const auto group = at(i);
      const auto c = code(grid, precision, scalars, x[i], xi[i], group);
      if constexpr (plain && !all) {
        gx[i] = keep<C>(c.in, gy[i]);
        scale[i] = gy[i] * (c.d - keep<C>(c.in, c.u));
        continue;
      }
      if constexpr (eager) {
        gx[i] = keep<C>(c.in, grid.returned_of_eager(gy[i], group, form == GeneralForm::reciprocal));
        scale[i] = gy[i] * (c.d - keep<C>(c.in, c.u));
        if (all) outside[i] = keep<C>(~c.in, gy[i]);
        if (all) of_delta[i] = C(0);
        continue;
      }
      const auto d = grid.backward(gy[i], x[i], c, group, delta, chained, precision);
      gx[i] = d.x;
      scale[i] = d.scale;
      if (all) outside[i] = d.outside;
      if (all) of_delta[i] = d.delta;
    }
  }

  template <bool all>
  static void backward(const Walk<C>& walk, const C* gy, const C* x, const C* xi, int64_t n, C* gx, Shares<C>& to,
                       int64_t first) {
    const GeneralGrid<C> grid = walk.grid;
    const Precision precision = precision_of<C, Precision>(walk.call);
    // Without the other shares there is no delta either: known here, it costs nothing.
    const C delta = all ? static_cast<C>(walk.call.delta) : C(0);
    if (walk.groups.uniform) {
      const GeneralGroup<C> g = walk.groups.at(0);
      backward_loop<all>(
          grid, precision, walk.scalars, delta, gy, x, xi, n, [g](int64_t) __attribute__((always_inline)) { return g; },
          gx, to.scale + first, to.outside + first, to.delta + first);
    } else {
      const Groups<C>& g = walk.groups;
      backward_loop<all>(
          grid, precision, walk.scalars, delta, gy, x, xi, n,
          [&g](int64_t i) __attribute__((always_inline)) { return g.at(i); }, gx, to.scale + first, to.outside + first,
          to.delta + first);
    }
  }

  static void tangent(const Walk<C>& walk, const C* __restrict tx, const C* __restrict x, const C* __restrict xi,
                      int64_t n, C* __restrict ty) {
    const GeneralGrid<C> grid = walk.grid;
    const Groups<C>& groups = walk.groups;
    const NoiseScale<C> scalars = walk.scalars;
    const Precision precision = precision_of<C, Precision>(walk.call);
    const auto element = [&](int64_t i, const GeneralGroup<C>& g, C ts, C tz) __attribute__((always_inline)) {
      const auto c = code(grid, precision, scalars, x[i], xi[i], g);
      ty[i] = grid.tangent(tx[i], ts, tz, c, g);
    };
    if (groups.uniform) {
      const GeneralGroup<C> g = groups.at(0);
      const C ts = groups.ts[0], tz = groups.tz[0];
      for (int64_t i = 0; i < n; ++i) element(i, g, ts, tz);
    } else {
      for (int64_t i = 0; i < n; ++i) element(i, groups.at(i), groups.ts[i], groups.tz[i]);
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
    if (call.narrow && (call.rules & (rules::compute_input | rules::through_chain))) {
      if (call.half) return Rule<C, false, Noise::none, RoundedTo<Half>>::kind;
      return Rule<C, false, Noise::none, RoundedTo<BFloat16>>::kind;
    }
  }
  const Noise noise = call.drawn ? noise_of(call.rules) : Noise::none;
  if constexpr (sizeof(C) == 4) {
    if (GeneralGrid<C>::is_plain(call.rules, call.zero_point != nullptr)) {
      if (noise == Noise::additive) return Rule<C, false, Noise::additive, Exact, GeneralForm::plain>::kind;
      if (noise == Noise::stochastic) return Rule<C, false, Noise::stochastic, Exact, GeneralForm::plain>::kind;
      return Rule<C, true, Noise::none, Exact, GeneralForm::plain>::kind;
    }
    if (GeneralGrid<C>::is_eager(call.rules) && call.delta == 0 && !call.need_delta) {
      if (call.rules & rules::reciprocal) return Rule<C, false, Noise::none, Exact, GeneralForm::reciprocal>::kind;
      return Rule<C, false, Noise::none, Exact, GeneralForm::divide>::kind;
    }
  }
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

template <class X, class Y>
void general_quantize_forward(const GeneralQuantizeCall& call, int64_t begin, int64_t end) {
  using C = compute_t<X>;
  Walk<C> walk(call, kind_of<C>(call));
  alignas(64) C x[block], y[block];
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    Y* to = static_cast<Y*>(call.out) + i;
    C* result = target<C>(to, y);
    const C* data = widened<C>(static_cast<const X*>(call.x) + i, n, x);
    const C* xi = walk.draw(i, n);
    walk.pieces(i, n,
                [&](int64_t at, int64_t count) { walk.kind.forward(walk, data + at, xi + at, count, result + at); });
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
  const C* cotangent = widened<C>(static_cast<const Y*>(call.in) + i, n, gy);
  const C* data = widened<C>(static_cast<const X*>(call.x) + i, n, x);
  const C* xi = walk.draw(i, n);
  walk.pieces(i, n, [&](int64_t at, int64_t count) {
    rule(walk, cotangent + at, data + at, xi + at, count, result + at, shares, at);
  });
  narrowed(result, n, to);
}

template <class X, class Y>
void general_quantize_backward(const GeneralQuantizeCall& call, int64_t begin, int64_t end) {
  using C = compute_t<X>;
  Walk<C> walk(call, kind_of<C>(call));
  Shares<C> shares;
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    backward_block<X, Y>(walk, i, n, call.delta != 0, shares);
  }
}

// Whether more than the scale's gradient is asked for.
inline bool wants_all(const GeneralQuantizeCall& call) { return call.zero_point || call.delta != 0 || call.need_delta; }

template <class X, class Y, class C>
void backward_run(Walk<C>& walk, int64_t begin, int64_t n, bool all, double* sums) {
  Shares<C> shares;
  for (int64_t start = 0; start < n; start += flush) {
    const int64_t stop = std::min(n, start + flush);
    alignas(64) C lane[3][lanes] = {};
    for (int64_t i = start; i < stop; i += block) {
      const int64_t count = std::min(block, stop - i);
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
  Walk<C> walk(call, kind_of<C>(call));
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
  Walk<C> walk(call, kind_of<C>(call));
  Shares<C> shares;
  const int64_t per_block = block / inner;
  for (int64_t c = begin; c < end; c += per_block) {
    const int64_t channels = std::min(per_block, end - c), i = c * inner;
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
  Walk<C> walk(call, kind_of<C>(call));
  alignas(64) C x[block], tx[block] = {}, ty[block];
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    Y* to = static_cast<Y*>(call.out) + i;
    C* result = target<C>(to, ty);
    const C* tangent = call.in ? widened<C>(static_cast<const T*>(call.in) + i, n, tx) : tx;
    const C* data = widened<C>(static_cast<const X*>(call.x) + i, n, x);
    const C* xi = walk.draw(i, n);
    walk.pieces(i, n, [&](int64_t at, int64_t count) {
      walk.kind.tangent(walk, tangent + at, data + at, xi + at, count, result + at);
    });
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
