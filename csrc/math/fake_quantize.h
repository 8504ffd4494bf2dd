// SPDX-License-Identifier: Apache-2.0
// Fake-quantization on an integer grid: the whole mathematics of the op family, element by element.
//
//   u = x / s   or   x * (1/s)           s = max(scale, eps), NaN stays
//   r = round(u) + z   or   round(u + z)
//   q = clamp(r, qmin, qmax)             y = (q - z) * s
//
// Derivatives follow the straight-through rule with the mask m and the residual frozen:
//   dy/dx = m       dy/ds = (q - z) - m u       dy/dz = -(1 - m) s
//
// No branch depends on data and none of the options costs more than an addition of zero: -0 is the neutral element of
// IEEE addition, so an absent term is added as -0.
#pragma once

#include <cstdint>

#include "convert.h"
#include "macros.h"
#include "round.h"
#include "rules.h"

namespace fastflat {

// All bits set where a condition holds. Choices by mask stay choices: compilers turn `m ? a : b` between products into
// branches, which do not vectorise.
template <class C>
struct MaskOf;
template <>
struct MaskOf<float> {
  using type = uint32_t;
};
template <>
struct MaskOf<double> {
  using type = uint64_t;
};

// v where the mask is set, else +0.
template <class C>
FASTFLAT_HD C keep(typename MaskOf<C>::type mask, C v) {
  return bit_cast<C>(bit_cast<typename MaskOf<C>::type>(v) & mask);
}

// What one scale group shares.
template <class C>
struct QuantGroup {
  C s;      // scale, held at eps from below
  C inv;    // 1 / s
  C z_in;   // added before rounding
  C z_out;  // added after rounding
  C z;      // zero-point as the code of 0
};

// The whole rule, and forms of it that leave out what they have no use for, with the same bits. `plain`, the commonest:
// no zero-point and rules 0 (division, mask before rounding, NaN stays, infinity saturates, -0 stays); is_plain() says
// when it may stand in. `chained` adds to it what chains of eager operations do, rules::through_chain, ::mask_none and
// ::rectified of the general_quantize family; is_chained() says when.
enum class GridForm { full, plain, chained };

// What the chained form alone holds: whether the gradient that passes is (gy s) / s, and whether x is max(x, 0).
template <class C, GridForm form>
struct Chain {};
template <class C>
struct Chain<C, GridForm::chained> {
  typename MaskOf<C>::type chain, rectified;
};

template <class C, GridForm form = GridForm::full>
struct IntegerGrid : Chain<C, form> {
  static constexpr bool plain = form != GridForm::full, chained = form == GridForm::chained;
  using Mask = typename MaskOf<C>::type;

  C qmin, qmax;
  C eps;
  C overflow;    // code of r >= 2^63
  C not_number;  // code of NaN
  C zero_fix;    // +0 turns -0 into +0; -0 changes nothing
  C factor;      // of the gradients of scale and zero-point
  // The gradient passes where the unrounded code lies in [from, to] and the rounded one in [after_from, after_to].
  C from, to, after_from, after_to;
  bool reciprocal, zero_inside, zero_float;
  Mask pass_all;  // set: every gradient passes

  FASTFLAT_HD static bool is_plain(int64_t rules, bool has_zero_point) { return rules == 0 && !has_zero_point; }

  FASTFLAT_HD static bool is_chained(int64_t rules, bool has_zero_point) {
    const int64_t known = rules::through_chain | rules::mask_none | rules::rectified;
    return rules != 0 && (rules & ~known) == 0 && !has_zero_point;
  }

  FASTFLAT_HD static IntegerGrid make(int64_t qmin, int64_t qmax, double eps, double factor, int64_t rules) {
    IntegerGrid grid;
    grid.qmin = static_cast<C>(qmin);
    grid.qmax = static_cast<C>(qmax);
    grid.eps = static_cast<C>(eps);
    grid.factor = static_cast<C>(factor);
    const C zero = 0;
    grid.zero_fix = (rules & rules::positive_zero) ? zero : -zero;
    // The plain clamp keeps a -0 that meets an end of the grid; the general one gives the end itself.
    if (plain) grid.zero_fix = qmin == 0 || qmax == 0 ? zero : -zero;
    grid.reciprocal = rules & rules::reciprocal;
    grid.zero_inside = rules & rules::zero_inside;
    grid.zero_float = rules & rules::zero_float;
    grid.pass_all = (rules & rules::mask_none) ? ~Mask(0) : Mask(0);
    if constexpr (chained) {
      grid.chain = (rules & rules::through_chain) ? ~Mask(0) : Mask(0);
      grid.rectified = (rules & rules::rectified) ? ~Mask(0) : Mask(0);
    }
    grid.limit(grid.qmin, grid.qmax, rules);
    return grid;
  }

  // Sets the ends of the grid and everything that follows from them.
  FASTFLAT_HD void limit(C lowest, C highest, int64_t rules) {
    const C zero = 0, infinity = C(1) / zero;
    const bool after = rules & rules::mask_after;
    qmin = lowest;
    qmax = highest;
    overflow = (rules & rules::inf_qmin) ? qmin : qmax;
    not_number = (rules & rules::nan_qmin) ? qmin : zero / zero;
    from = after ? -infinity : qmin;
    to = after ? infinity : qmax;
    after_from = after ? qmin : -infinity;
    after_to = after ? qmax : infinity;
  }

  FASTFLAT_HD QuantGroup<C> group(C scale) const {
    QuantGroup<C> g;
    g.s = scale < eps ? eps : scale;
    g.inv = C(1) / g.s;
    g.z_in = -C(0);
    g.z_out = -C(0);
    g.z = C(0);
    return g;
  }

  FASTFLAT_HD QuantGroup<C> group(C scale, C zero_point) const {
    QuantGroup<C> g = group(scale);
    const C rounded = round_even(zero_point);
    const C lifted = rounded < qmin ? qmin : rounded;
    const C code = lifted > qmax ? qmax : lifted;
    g.z = (zero_float ? zero_point : code) + C(0);
    g.z_in = zero_inside ? g.z : -C(0);
    g.z_out = zero_inside ? -C(0) : g.z;
    return g;
  }

  struct Code {
    C u;      // x in units of the scale
    C d;      // q - z
    Mask in;  // m: the gradient passes
  };

  FASTFLAT_HD Code code(C x, const QuantGroup<C>& g) const {
    Code c;
    if constexpr (plain) {
      if constexpr (chained) x = keep<C>(~(this->rectified & (Mask(0) - Mask(x <= C(0)))), x);
      c.u = x / g.s;
      const C r = round_even(c.u);
      const C lifted = r < qmin ? qmin : r;
      c.d = (lifted > qmax ? qmax : lifted) + zero_fix;
      c.in = Mask(0) - Mask((c.u >= qmin) & (c.u <= qmax));
      if constexpr (chained) c.in = (c.in | pass_all) & ~(this->rectified & (Mask(0) - Mask(x == C(0))));
      return c;
    }
    c.u = reciprocal ? x * g.inv : x / g.s;
    const C v = c.u + g.z_in;
    const C r = round_even(v) + g.z_out;
    const C lifted = r > qmin ? r : qmin;
    const C clamped = lifted < qmax ? lifted : qmax;
    const C beyond = r == r ? overflow : not_number;
    const C q = r < C(9223372036854775808.0) ? clamped : beyond;
    const C w = v + g.z_out;
    c.d = (q - g.z) + zero_fix;
    const bool on_grid = (w >= from) & (w <= to) & (r >= after_from) & (r <= after_to);
    c.in = pass_all | (Mask(0) - Mask(on_grid));
    return c;
  }

  // y
  FASTFLAT_HD C forward(C x, const QuantGroup<C>& g) const { return code(x, g).d * g.s; }

  struct Gradient {
    C x;        // dL/dx
    C scale;    // this element's share of dL/ds
    C outside;  // this element's share of sum((1 - m) dL/dy); dL/dz = -s times the sum
  };

  FASTFLAT_HD Gradient backward(C gy, C x, const QuantGroup<C>& g) const {
    const Code c = code(x, g);
    return {keep<C>(c.in, returned(gy, g)), gy * (c.d - keep<C>(c.in, c.u)), keep<C>(~c.in, gy)};
  }

  // The gradient that passes, before the mask.
  FASTFLAT_HD C returned(C gy, const QuantGroup<C>& g) const {
    if constexpr (chained) {
      // A chain of one is none.
      const C s = bit_cast<C>((bit_cast<Mask>(g.s) & this->chain) | (bit_cast<Mask>(C(1)) & ~this->chain));
      return (gy * s) / s;
    } else {
      return gy;
    }
  }

  // Group sums of Gradient::scale and ::outside to the gradients of scale and zero-point.
  FASTFLAT_HD C scale_gradient(C sum) const { return sum * factor; }
  FASTFLAT_HD C zero_gradient(C sum, const QuantGroup<C>& g) const { return -(g.s * (sum * factor)); }

  // The tangent of y: the transpose of backward, factor included. Absent tangents are passed as 0.
  FASTFLAT_HD C tangent(C tx, C ts, C tz, C x, const QuantGroup<C>& g) const {
    const Code c = code(x, g);
    const C through = keep<C>(c.in, tx);
    const C by_scale = (c.d - keep<C>(c.in, c.u)) * (ts * factor);
    const C by_zero = keep<C>(~c.in, g.s * (tz * factor));
    return (through + by_scale) - by_zero;
  }
};

// Scale of the dynamic form: the largest magnitude of the group lands on the highest code. NaN in the group wins.
template <class C>
FASTFLAT_HD C larger_magnitude(C a, C b) {
  return a > b || a != a ? a : b;
}
template <class C>
FASTFLAT_HD C absmax_scale(C absmax, C qmax) {
  return absmax / (qmax < C(1) ? C(1) : qmax);
}

}  // namespace fastflat
