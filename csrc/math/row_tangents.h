// SPDX-License-Identifier: Apache-2.0
// Tangents of normalisation and softmax over rows, element by element, from the sums of a row. Formulas of the ops:
// fastflat/_ops/row_tangents.py. V is a number, or a vector register of them.
#pragma once

#include "elementary.h"
#include "macros.h"

namespace fastflat::row_tangents {

// x^ = (x - mean) inv moved along x: m = mean of the tangent x, s = mean of its product with x^.
template <class C>
struct Norm {
  C m, s, inv;

  template <class V>
  FASTFLAT_HD V operator()(V x, V normal) const {
    return ((x - m) - normal * s) * inv;
  }

  // Tangent of inv.
  FASTFLAT_HD C scale() const { return -s * inv * inv; }
};

// The tangent of inv (h - A - x^ B), B = mean h x^, collected by what differs from element to element:
//
//   inv (rh - mean rh) - x^ (inv (P + inv Q) + 3 i B) - inv^2 B (x - m) + i (h - A)
//
// with i, m the tangents of inv and of the mean, P = mean rh x^, Q = mean (x - m) h.
template <class C>
struct NormBackward {
  C rh_mean, by_rh, by_normal, m, by_x, h_mean, by_h;

  FASTFLAT_HD static NormBackward make(C inv, C i, C m, C h_mean, C B, C rh_mean, C P, C Q) {
    const C by_normal = -(inv * (P + inv * Q) + C(3) * (i * B));
    return {rh_mean, inv, by_normal, m, -(inv * inv) * B, h_mean, i};
  }

  template <class V>
  FASTFLAT_HD V of_rh(V rh) const {
    return (rh - rh_mean) * by_rh;
  }
  template <class V>
  FASTFLAT_HD V of_normal(V normal) const {
    return normal * by_normal;
  }
  template <class V>
  FASTFLAT_HD V of_x(V x) const {
    return (x - m) * by_x;
  }
  template <class V>
  FASTFLAT_HD V of_h(V h) const {
    return (h - h_mean) * by_h;
  }
};

// (scale q) (t - <q, t>)
template <class C>
struct Softmax {
  C scale, dot;

  template <class V>
  FASTFLAT_HD V operator()(V t, V q) const {
    return (scale * q) * (t - dot);
  }
};

// The tangent of p (grad - D), D = <grad, p>.
template <class C>
struct SoftmaxBackward {
  C D, along_dot, g_dot;  // <along, grad>, <g, p>

  template <class V>
  FASTFLAT_HD V of_along(V along, V p, V grad) const {
    return along * (grad - D) - p * along_dot;
  }
  template <class V>
  FASTFLAT_HD V of_g(V g, V p) const {
    return p * (g - g_dot);
  }
};

}  // namespace fastflat::row_tangents
