// SPDX-License-Identifier: Apache-2.0
// Distributions over classes, element by element, from the two numbers of a row: its largest logit and the logarithm of
// the sum of exponentials below it. Formulas of the ops: fastflat/_ops/logits.py.
#pragma once

#include "elementary.h"
#include "macros.h"

namespace fastflat::logits {

template <class C>
struct Norm {
  C most, log_sum;

  // log p; -inf for a class that cannot be.
  FASTFLAT_HD C operator()(C z) const { return (z - most) - log_sum; }
  FASTFLAT_HD C probability(C z) const { return elementary::exp((*this)(z)); }
};

// p (log p - log q), nothing where p is 0.
template <class C>
FASTFLAT_HD C divergence(C p, C log_p, C log_q) {
  const C v = p * (log_p - log_q);
  return p == C(0) ? C(0) : v;
}

// Of KL(P, Q): to the logits of Q.
template <class C>
FASTFLAT_HD C gradient_to_second(C g, C p, C q) {
  return g * (q - p);
}
// To those of P; of a Jensen-Shannon divergence to those of each P, with M in the place of Q.
template <class C>
FASTFLAT_HD C gradient_to_first(C g, C p, C log_p, C log_q, C all) {
  const C v = g * (p * ((log_p - log_q) - all));
  return p == C(0) ? C(0) : v;
}

// The logit that a re-balanced cross-entropy sees; `margin` is 0 but for the label.
template <class C>
FASTFLAT_HD C balanced(C s, C z, C mult, C add, C margin) {
  return s * ((mult * z + add) - margin);
}
// Its gradient; `label` is 1 for the label, else 0.
template <class C>
FASTFLAT_HD C gradient_of_loss(C g, C s, C mult, C p, C label) {
  const C v = (g * (s * mult)) * (p - label);
  return g == C(0) ? C(0) : v;
}

// Loss of a row, from the logit of its label.
template <class C>
FASTFLAT_HD C loss(const Norm<C>& norm, C of_label) {
  return norm.log_sum - (of_label - norm.most);
}

// Statistics of a row: `other` is the largest logit but that of the label, -inf if there is none.
template <class C>
struct Stats {
  C loss, p, gap, curvature;

  FASTFLAT_HD static Stats make(const Norm<C>& norm, C of_label, C other) {
    const C p = norm.probability(of_label), largest = elementary::exp(-norm.log_sum);
    return {logits::loss(norm, of_label), p, norm.probability(other) - p, C(2) * (largest * (C(1) - largest))};
  }
};

}  // namespace fastflat::logits
