// SPDX-License-Identifier: Apache-2.0
// Fake-quantization by every rule of QuantSpec: number formats, all roundings, noise, PACT and EWGS. The integer grid
// of fake_quantize.h is the fast form of the commonest of them; where both apply they give the same bits.
//
//   u = x / s   or   x * (1/s)               xi: one draw an element (noise.h)
//   none, stochastic, temper, bypass         r = round(u + z_in) + z_out    q = clamp(r)     d = q - z
//   additive noise                           r = (u + z_in) + nu xi + z_out, not rounded
//   temper                                   d = d + a (clip - d) + nu xi,  clip = clamp(u + z) - z
//   y = d s                                  bypass: y = x where xi < nu
//
// Derivatives as in fake_quantize.h, with the mask m and the residual frozen: dy/dx = m, dy/ds = d - m u,
// dy/dz = -(1 - m) s. PACT: dy/ds = (1 - m) d. EWGS: the gradient that passes is gy (1 + delta sign(gy) e), e = u - d
// before tempering.
#pragma once

#include <cmath>
#include <cstdint>

#include "convert.h"
#include "fake_quantize.h"
#include "macros.h"
#include "minifloat.h"
#include "round.h"
#include "rules.h"

namespace fastflat {

enum class Noise { none, additive, stochastic, temper, bypass };

// The whole rule, and forms of it that leave out what they have no use for, with the same bits.
enum class GeneralForm { full, plain, divide, reciprocal };

FASTFLAT_HD Noise noise_of(int64_t rules) {
  if (rules & (rules::noise_uniform | rules::noise_normal)) return Noise::additive;
  if (rules & rules::noise_temper) return Noise::temper;
  if (rules & rules::noise_bypass) return Noise::bypass;
  return rules & rules::round_stochastic ? Noise::stochastic : Noise::none;
}

inline constexpr int64_t minifloats = rules::e4m3 | rules::e5m2 | rules::e3m2 | rules::e2m3 | rules::e2m1;

// a where the mask is set, else b.
template <class C>
FASTFLAT_HD C choose(typename MaskOf<C>::type mask, C a, C b) {
  using Bits = typename MaskOf<C>::type;
  return bit_cast<C>((bit_cast<Bits>(a) & mask) | (bit_cast<Bits>(b) & ~mask));
}

template <class C>
FASTFLAT_HD typename MaskOf<C>::type mask_of(bool condition) {
  return typename MaskOf<C>::type(0) - typename MaskOf<C>::type(condition);
}

// What is rounded to the storage type of x: nothing, or with a 16-bit type the product of rules::through_chain and, by
// rules::compute_input, the result of every operation.
struct Exact {
  template <class C>
  FASTFLAT_HD C operator()(C v) const {
    return v;
  }
  template <class C>
  FASTFLAT_HD C stored(C v) const {
    return v;
  }
};
template <class Storage>
struct RoundedTo {
  uint32_t every;  // mask

  FASTFLAT_HD float operator()(float v) const { return choose(every, stored(v), v); }
  FASTFLAT_HD float stored(float v) const { return load(store<Storage>(v)); }
};

// What one scale shares. u = (x * mul) / div and y = (d * s) / out: of each pair one is 1, and both are exact by it.
template <class C>
struct GeneralGroup {
  C s, mul, div, out;
  C z_in, z_out, z;
  C reach;  // the magnitude up to which rules::mask_absmax passes
};

// Device scalars of a call. Draws are taken less `shift`: 1/2 centres uniform ones.
template <class C>
struct NoiseScale {
  C nu, a, shift;
};

template <class C>
struct GeneralGrid {
  using Mask = typename MaskOf<C>::type;

  IntegerGrid<C> base;  // limits and conventions
  Minifloat<C> format;
  Mask away, binary, pact, chain, nan_passes, by_reach, rectified;
  bool inverse;

  FASTFLAT_HD static bool floats(int64_t rules) { return (rules & minifloats) != 0; }

  FASTFLAT_HD static GeneralGrid make(int64_t qmin, int64_t qmax, double eps, double factor, int64_t rules) {
    GeneralGrid grid;
    grid.base = IntegerGrid<C>::make(qmin, qmax, eps, factor, rules);
    grid.format = Minifloat<C>::make(rules);
    if (rules & (minifloats | rules::binary)) grid.base.limit(-grid.format.largest, grid.format.largest, rules);
    grid.away = mask_of<C>(rules & rules::round_away);
    grid.binary = mask_of<C>(rules & rules::binary);
    grid.pact = mask_of<C>(rules & rules::pact);
    grid.chain = mask_of<C>(rules & rules::through_chain);
    grid.nan_passes = mask_of<C>(rules & rules::nan_passes);
    grid.rectified = mask_of<C>(rules & rules::rectified);
    grid.by_reach = mask_of<C>(rules & rules::mask_absmax);
    grid.inverse = rules & rules::inverse;
    return grid;
  }

  template <class Precision = Exact>
  FASTFLAT_HD GeneralGroup<C> group(C scale, Precision precision = {}) const {
    return of(scale, base.group(scale), precision);
  }
  template <class Precision = Exact>
  FASTFLAT_HD GeneralGroup<C> group(C scale, C zero_point, Precision precision = {}) const {
    return of(scale, base.group(scale, zero_point), precision);
  }

  struct Code {
    C u;      // x in units of the scale
    C d;      // y in units of the scale
    C e;      // u - (q - z): what rounding took away
    Mask in;  // m: the gradient passes
    Mask kept;
  };

  // Whether code_of_plain may stand in for code: an integer grid whose only rule is its noise, or a float grid of
  // which at most every gradient passes. How a scale came about is no matter.
  FASTFLAT_HD static bool is_plain(int64_t rules, bool has_zero_point) {
    const int64_t noises = rules::noise_uniform | rules::noise_normal | rules::round_stochastic;
    const int64_t scales =
        rules::scale_floor | rules::scale_ceil | rules::scale_even | rules::scale_rceil | rules::scale_e4m3;
    if (floats(rules)) return !has_zero_point && (rules & ~(minifloats | scales | rules::mask_none)) == 0;
    return (rules & noises) != 0 && IntegerGrid<C>::is_plain(rules & ~noises, has_zero_point);
  }

  // What of code the commonest forms have use for, with the same bits: additive noise, stochastic rounding, or floats.
  FASTFLAT_HD Code code_of_plain(C x, C draw, const GeneralGroup<C>& g, const NoiseScale<C>& scale, bool floats,
                                 Noise noise) const {
    Code c;
    c.kept = 0;
    const C xi = draw - scale.shift;
    c.u = x / g.s;
    const C w = noise == Noise::additive ? c.u + scale.nu * xi : c.u;
    C r;
    if (noise == Noise::additive) {
      r = w;
    } else if (floats) {
      const C near = between(w, -(format.largest + format.largest), format.largest + format.largest);
      const C step = format.step(near);
      r = round_even(near * inverse_power(step)) * step;
    } else {
      r = rounded(w, xi, noise);
    }
    c.d = between(r, base.qmin, base.qmax) + end_fix();
    c.e = c.u - c.d;
    c.in = base.pass_all | mask_of<C>((w >= base.qmin) & (w <= base.qmax));
    return c;
  }

  // Whether code_of_eager may stand in for code: an integer grid without draws, ties to even, NaN and infinity as they
  // come, by any convention for zero-point and mask. So compute chains of eager operations.
  FASTFLAT_HD static bool is_eager(int64_t rules) {
    const int64_t known = rules::reciprocal | rules::zero_inside | rules::zero_float | rules::mask_after |
                          rules::mask_none | rules::positive_zero | rules::through_chain | rules::nan_passes |
                          rules::rectified;
    return (rules & ~known) == 0;
  }

  // What of code such rules have use for, with the same bits.
  FASTFLAT_HD Code code_of_eager(C x, const GeneralGroup<C>& g, bool reciprocal) const {
    Code c;
    c.kept = 0;
    x = keep<C>(~(rectified & mask_of<C>(x <= C(0))), x);
    c.u = reciprocal ? x * g.mul : x / g.div;
    const C v = c.u + g.z_in;
    const C w = v + g.z_out;
    const C r = round_even(v) + g.z_out;
    const C q = between(r, base.qmin, base.qmax) + end_fix();
    c.d = (q - g.z) + base.zero_fix;
    c.e = c.u - c.d;
    const bool on_grid = (w >= base.from) & (w <= base.to) & (r >= base.after_from) & (r <= base.after_to);
    c.in = (base.pass_all | (nan_passes & mask_of<C>(w != w)) | mask_of<C>(on_grid)) & lit(x);
    return c;
  }

  // The gradient that passes there, before the mask.
  FASTFLAT_HD C returned_of_eager(C gy, const GeneralGroup<C>& g, bool reciprocal) const {
    const C scaled = gy * g.s;
    return choose(chain, reciprocal ? scaled * g.mul : scaled / g.div, gy);
  }

  // `floats` and `noise` follow from the rules; callers that know them at compile time pass constants.
  template <class Precision = Exact>
  FASTFLAT_HD Code code(C x, C draw, const GeneralGroup<C>& g, const NoiseScale<C>& scale, bool floats, Noise noise,
                        Precision precision = {}) const {
    Code c;
    c.kept = 0;
    const C xi = draw - scale.shift;
    x = keep<C>(~(rectified & mask_of<C>(x <= C(0))), x);
    c.u = precision((x * g.mul) / g.div);
    C v = precision(c.u + g.z_in);
    if (noise == Noise::additive) v = v + scale.nu * xi;
    const C w = precision(v + g.z_out);
    C r;
    if (noise == Noise::additive) {
      r = w;
    } else if (floats) {
      // Beyond twice the largest value nothing new happens, and steps stay finite.
      const C bound = format.largest + format.largest;
      const C lifted = v > -bound ? v : -bound;
      const C near = lifted < bound ? lifted : bound;
      const C step = format.step(near);
      r = rounded(near * inverse_power(step), xi, noise) * step;
    } else {
      const C whole = precision(rounded(v, xi, noise) + g.z_out);
      r = choose(binary, sign(v, xi, noise), whole);
    }
    const C lifted = r > base.qmin ? r : base.qmin;
    const C clamped = lifted < base.qmax ? lifted : base.qmax;
    const C beyond = w == w ? base.overflow : base.not_number;
    const C q = (r < C(9223372036854775808.0)) & (w == w) ? clamped : beyond;
    c.d = precision(q - g.z) + base.zero_fix;
    c.e = c.u - c.d;
    const bool on_grid = (w >= base.from) & (w <= base.to) & (r >= base.after_from) & (r <= base.after_to);
    const Mask near_zero = mask_of<C>(std::fabs(x) <= g.reach);
    c.in = base.pass_all | (nan_passes & mask_of<C>(w != w)) |
           (noise == Noise::none ? (by_reach & near_zero) | (~by_reach & mask_of<C>(on_grid)) : mask_of<C>(on_grid));
    c.in = c.in & lit(x);
    if (noise == Noise::temper) {
      const C up = w > base.qmin ? w : base.qmin;
      const C clip = (up < base.qmax ? up : base.qmax) - g.z;
      c.d = (c.d + scale.a * (clip - c.d)) + scale.nu * xi;
    }
    if (noise == Noise::bypass) {
      c.kept = mask_of<C>(xi < scale.nu);
      // A kept element has no share in the scale: u = d = 0 say so, whatever u was.
      c.u = keep<C>(~c.kept, c.u);
      c.d = keep<C>(~c.kept, c.d);
      c.e = keep<C>(~c.kept, c.e);
      c.in = c.in | c.kept;
    }
    return c;
  }

  // y
  template <class Precision = Exact>
  FASTFLAT_HD C forward(C x, C draw, const GeneralGroup<C>& g, const NoiseScale<C>& scale, bool floats, Noise noise,
                        Precision precision = {}) const {
    return result(code(x, draw, g, scale, floats, noise, precision), x, g, noise);
  }

  FASTFLAT_HD C result(const Code& c, C x, const GeneralGroup<C>& g, Noise noise) const {
    const C y = c.d * g.s;
    if (noise == Noise::none) return y / g.out;
    return noise == Noise::bypass ? choose(c.kept, x, y) : y;
  }

  struct Gradient {
    C x;        // dL/dx
    C scale;    // this element's share of dL/ds
    C outside;  // of sum(gy - what passes); dL/dz = -s times the sum
    C delta;    // of dL/d delta
  };

  // delta = 0 is the straight-through rule, in every bit. `chained`: the rules may ask for through_chain.
  template <class Precision = Exact>
  FASTFLAT_HD Gradient backward(C gy, C x, const Code& c, const GeneralGroup<C>& g, C delta, bool chained,
                                Precision precision = {}) const {
    const C returned = chained ? choose(chain, (precision.stored(gy * g.s) * g.mul) / g.div, gy) : gy;
    const C straight = keep<C>(c.in, returned);
    const C size = std::fabs(straight), e = keep<C>(c.in, c.e);
    // gy delta sign(gy) e, with sign(0) = 0 by the product itself.
    const Mask scaled = mask_of<C>(delta != C(0));
    const C extra = keep<C>(scaled, size * (delta * e));
    const C inner = keep<C>(c.in, choose(pact, c.d, c.u));
    return {choose(scaled, straight + extra, straight), gy * (c.d - inner) - extra * keep<C>(c.in, c.u),
            keep<C>(~c.in, gy) - extra, (size * e) * x};
  }

  FASTFLAT_HD C tangent(C tx, C ts, C tz, const Code& c, const GeneralGroup<C>& g) const {
    const C through = keep<C>(c.in, tx);
    const C inner = keep<C>(c.in, choose(pact, c.d, c.u));
    const C by_scale = (c.d - inner) * (ts * base.factor);
    const C by_zero = keep<C>(~c.in, g.s * (tz * base.factor));
    return (through + by_scale) - by_zero;
  }

 private:
  // between() keeps a -0 that meets an end of the grid, which this mends by addition.
  FASTFLAT_HD C end_fix() const { return (base.qmin == C(0)) | (base.qmax == C(0)) ? C(0) : -C(0); }

  // Whether a rectified x may pass its gradient: it is not 0.
  FASTFLAT_HD Mask lit(C x) const { return ~(rectified & mask_of<C>(x == C(0))); }

  // v clamped; NaN stays.
  FASTFLAT_HD static C between(C v, C lowest, C highest) {
    const C lifted = v < lowest ? lowest : v;
    return lifted > highest ? highest : lifted;
  }

  template <class Precision>
  FASTFLAT_HD GeneralGroup<C> of(C scale, const QuantGroup<C>& g, Precision precision) const {
    const C one = 1;
    if (inverse) {
      // k of rules::inverse; at or below eps all codes are 0.
      const C k = base.qmax / scale;
      const bool dead = scale <= base.eps;
      return {one, dead ? C(0) : k, one, dead ? one : k, g.z_in, g.z_out, g.z, scale};
    }
    const C mul = base.reciprocal ? precision(g.inv) : one;
    return {g.s, mul, base.reciprocal ? one : g.s, one, g.z_in, g.z_out, g.z, scale};
  }

  // An integer beside v by the rounding of the rules.
  FASTFLAT_HD C rounded(C v, C xi, Noise noise) const {
    const C even = round_even(v);
    if (noise == Noise::stochastic) {
      const C floor = choose(mask_of<C>(even > v), even - C(1), even);
      return choose(mask_of<C>(xi < v - floor), floor + C(1), floor);
    }
    // A tie that went towards zero goes the other way.
    const C rest = v - even;
    const C unit = std::copysign(C(1), v);
    return choose(away & mask_of<C>(rest * unit == C(0.5)), even + unit, even);
  }

  // The grid {-1, 1}: sign(v), with +1 at both zeros; stochastically with the mean v.
  FASTFLAT_HD C sign(C v, C xi, Noise noise) const {
    if (noise == Noise::stochastic) return xi < (v + C(1)) * C(0.5) ? C(1) : C(-1);
    return v < C(0) ? C(-1) : C(1);
  }
};

}  // namespace fastflat
