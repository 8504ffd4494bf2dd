// SPDX-License-Identifier: Apache-2.0
// A mixture of quantizers, element by element: y = sum_j w_j Q_j(x), each Q_j an IntegerGrid with scale, limits and
// weight of its own. Terms are added in the order of the candidates to -0, the neutral element.
//
// A candidate of weight 0 is left out, whatever Q_j(x) is: infinity times zero must not poison the others. Then a
// one-hot weight gives fake_quantize in every bit. The rule holds for every factor that is the same for all elements of
// a scale: a term with factor 0 adds -0.
//
//   dy/dx = sum_j w_j m_j      dy/ds_j = w_j (d_j - m_j u_j)      dy/dw_j = Q_j(x)
//
// with the masks and the residuals frozen as in fake_quantize.h.
#pragma once

#include "fake_quantize.h"

namespace fastflat {

// Candidates of one call at most.
inline constexpr int most_candidates = 8;

// Whether a term with this factor is in the sum; NaN is.
template <class C>
FASTFLAT_HD bool counts(C factor) {
  return !(factor == C(0));
}

// The term v * factor of a sum, -0 where the factor is 0.
template <class C>
FASTFLAT_HD C weighted(C v, C factor) {
  return counts(factor) ? v * factor : -C(0);
}

// v * pass: through the mixture passes what its candidates let pass; +0 where none does, whatever v is.
template <class C>
FASTFLAT_HD C passed(C v, C pass) {
  using Mask = typename MaskOf<C>::type;
  return keep<C>(Mask(0) - Mask(counts(pass)), v * pass);
}

template <class C, bool plain = false>
struct Candidate {
  using Grid = IntegerGrid<C, plain ? GridForm::plain : GridForm::full>;
  Grid grid;
  C weight;

  // The limits are data: small integers in the compute type.
  FASTFLAT_HD static Candidate make(C qmin, C qmax, C weight, double eps, int64_t rules) {
    // The ends count here only where one is 0.
    Candidate candidate{Grid::make(qmin == 0 || qmax == 0 ? 0 : -1, 1, eps, 1.0, rules), weight};
    candidate.grid.limit(qmin, qmax, rules);
    return candidate;
  }

  // IntegerGrid's, with the reciprocal only where the rules ask for it: for loops that meet a scale an element.
  FASTFLAT_HD QuantGroup<C> group(C scale) const {
    QuantGroup<C> g{scale < grid.eps ? grid.eps : scale, C(0), -C(0), -C(0), C(0)};
    if (grid.reciprocal) g.inv = C(1) / g.s;
    return g;
  }

  struct Term {
    C value;     // Q_j(x)
    C by_scale;  // dQ_j/ds
    C pass;      // w_j m_j
  };

  FASTFLAT_HD Term term(C x, const QuantGroup<C>& g) const {
    const auto c = grid.code(x, g);
    return {c.d * g.s, c.d - keep<C>(c.in, c.u), keep<C>(c.in, weight)};
  }
};

// Gradient of a scale from sum(gy dQ_j/ds): +0 for a candidate that is left out.
template <class C>
FASTFLAT_HD C mixture_scale_gradient(C sum, C weight, C factor) {
  return counts(weight) ? sum * (weight * factor) : C(0);
}

// The factor of dQ_j/ds in the tangent of y.
template <class C>
FASTFLAT_HD C mixture_scale_tangent(C ts, C weight, C factor) {
  return ts * (weight * factor);
}

}  // namespace fastflat
