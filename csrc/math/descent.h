// SPDX-License-Identifier: Apache-2.0
// Updates of the optimizers, element by element. u = c2 g + c1 f mixes the gradient g of the second pass with that f of
// the first; all numbers of a tensor come from its row (fastflat/_ops/descent.py has the same table).
#pragma once

#include <cmath>
#include <cstdint>

#include "elementary.h"
#include "macros.h"

namespace fastflat {

namespace row {
enum Column : int {
  c1,       // of the first gradient
  c2,       // of the second
  rate,     // w' = shrink w - rate d
  beta1,    // momentum
  gain1,    // 1 - dampening, 1 - beta1
  beta2,    // of the squares
  gain2,    // 1 - beta2
  root,     // square root of the bias correction of the squares
  unbias,   // 1 / (1 - beta1^t); LAMB only
  eps,      // beside the root of the squares
  decay,    // weight decay that is part of the gradient, in LAMB of the update
  shrink,   // 1 - lr weight_decay where it is not
  power,    // twice the exponent of Padam
  gain,     // of the whole gradient: LARS
  average,  // a' = a + average (w' - a)
  flags,    // sum of the bits of `Flag`
  columns
};
enum Flag : int { skip = 1, first = 2, nesterov = 4 };
}  // namespace row

namespace hyper {
enum Column : int {
  lr,
  beta1,      // momentum
  beta2,      // dampening of SGD
  eps,        // beside a root or, in LARS, a norm
  decay,      // weight decay
  decoupled,  // 1: of the weight, not of the gradient
  nesterov,   // 1 or 0
  partial,    // exponent of Padam: 1/2 is Adam
  trust,      // LARS: coefficient; LAMB: 1; 0 turns it off
  average,    // weight of the new value in an average
  ascend,     // 1: maximize
  unused,
  columns
};
}  // namespace hyper

enum DescentRule : int64_t { rule_sgd, rule_adam, rule_padam, rule_lars, rule_lamb };

// beta^step for a whole number of steps, by squaring: the same bits on every target.
FASTFLAT_HD double whole_power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result = result * base;
    base = base * base;
  }
  return result;
}

// c2^2 g.g + 2 c1 c2 f.g + c1^2 f.f
FASTFLAT_HD double mixed_square(double c1, double c2, double gg, double gf, double ff) {
  return (c2 * c2) * gg + (2.0 * (c1 * c2)) * gf + (c1 * c1) * ff;
}

// |w| / |u|, 1 where one of them is 0 or not finite.
FASTFLAT_HD double norm_ratio(double ww, double uu) {
  const double ratio = std::sqrt(ww) / std::sqrt(uu);
  return ratio > 0.0 && ratio <= 1.7976931348623157e308 ? ratio : 1.0;
}

// LARS: trust |w| / (|u| + decay |w| + eps), 1 where |w| or |u| is 0.
FASTFLAT_HD double lars_ratio(double trust, double ww, double uu, double decay, double eps) {
  const double w = std::sqrt(ww), u = std::sqrt(uu);
  const double ratio = trust * w / (u + decay * w + eps);
  return w > 0.0 && u > 0.0 && trust > 0.0 ? ratio : 1.0;
}

// The row of one tensor from the numbers of its group. `step` counts this step already, unless it is skipped.
// gradients = {g.g, g.f, f.f} and ww = w.w of the tensor; LARS alone reads them.
FASTFLAT_HD void fill_row(double* out, const double* of_group, double step, double c1, double c2, bool skip,
                          const double* gradients, double ww, int64_t rule) {
  const double lr = of_group[hyper::lr], decay = of_group[hyper::decay];
  const bool decoupled = of_group[hyper::decoupled] != 0.0, sgd = rule == rule_sgd || rule == rule_lars;
  const double sign = of_group[hyper::ascend] != 0.0 ? -1.0 : 1.0;
  const double beta1 = of_group[hyper::beta1], beta2 = of_group[hyper::beta2];
  const int64_t count = static_cast<int64_t>(step);
  const double bias1 = 1.0 - whole_power(beta1, count), bias2 = 1.0 - whole_power(beta2, count);
  out[row::c1] = sign * c1;
  out[row::c2] = sign * c2;
  out[row::beta1] = beta1;
  out[row::gain1] = sgd ? 1.0 - beta2 : 1.0 - beta1;
  out[row::beta2] = beta2;
  out[row::gain2] = 1.0 - beta2;
  out[row::root] = rule == rule_padam || sgd ? 1.0 : std::sqrt(bias2);
  out[row::unbias] = sgd ? 1.0 : 1.0 / bias1;
  out[row::eps] = of_group[hyper::eps];
  out[row::decay] = decoupled ? 0.0 : decay;
  out[row::shrink] = decoupled ? 1.0 - lr * decay : 1.0;
  out[row::power] = 2.0 * of_group[hyper::partial];
  out[row::average] = of_group[hyper::average];
  out[row::rate] = rule == rule_adam ? lr / bias1 : rule == rule_padam ? lr * std::sqrt(bias2) / bias1 : lr;
  out[row::gain] = 1.0;
  if (rule == rule_lars) {
    const double uu = mixed_square(c1, c2, gradients[0], gradients[1], gradients[2]);
    out[row::gain] = lr * lars_ratio(of_group[hyper::trust], ww, uu, out[row::decay], out[row::eps]);
    out[row::rate] = 1.0;
  }
  if (rule == rule_lamb && of_group[hyper::trust] == 0.0) out[row::gain] = 0.0;
  const bool nesterov = of_group[hyper::nesterov] != 0.0;
  out[row::flags] = (skip ? row::skip : 0) + (step <= 1.0 ? row::first : 0) + (nesterov ? row::nesterov : 0);
}

// What all updates share.
template <class C>
struct Update {
  C c1, c2, rate, decay, shrink, average;
  bool skipped, mixed, decays;

  FASTFLAT_HD static Update make(const double* r, bool mixed) {
    const int flags = static_cast<int>(r[row::flags]);
    return {static_cast<C>(r[row::c1]),
            static_cast<C>(r[row::c2]),
            static_cast<C>(r[row::rate]),
            static_cast<C>(r[row::decay]),
            static_cast<C>(r[row::shrink]),
            static_cast<C>(r[row::average]),
            (flags & row::skip) != 0,
            mixed,
            static_cast<C>(r[row::decay]) != C(0)};
  }

  // The direction without weight decay.
  FASTFLAT_HD C mix(C g, C f) const {
    const C second = c2 * g;
    return mixed ? second + c1 * f : second;
  }
  FASTFLAT_HD C direction(C w, C g, C f) const {
    const C u = mix(g, f);
    return decays ? u + decay * w : u;
  }
  FASTFLAT_HD C step(C w, C d) const { return shrink * w - rate * d; }
  FASTFLAT_HD C averaged(C a, C w) const { return a + average * (w - a); }
};

// SGD and LARS. A tensor without momentum has no m.
template <class C>
struct Sgd {
  Update<C> common;
  C momentum, gain1, gain;
  bool first, nesterov;

  FASTFLAT_HD static Sgd make(const double* r, bool mixed) {
    const int flags = static_cast<int>(r[row::flags]);
    return {Update<C>::make(r, mixed),    static_cast<C>(r[row::beta1]), static_cast<C>(r[row::gain1]),
            static_cast<C>(r[row::gain]), (flags & row::first) != 0,     (flags & row::nesterov) != 0};
  }

  FASTFLAT_HD C plain(C w, C g, C f) const { return common.step(w, gain * common.direction(w, g, f)); }
  FASTFLAT_HD C with_momentum(C w, C g, C f, C& m) const {
    const C u = gain * common.direction(w, g, f);
    m = first ? u : momentum * m + gain1 * u;
    return common.step(w, nesterov ? u + momentum * m : m);
  }
};

template <class C>
FASTFLAT_HD C larger(C a, C b) {
  return a > b ? a : b;
}

// Adam, AdamW, their AMSGrad forms (a tensor with `largest`), Padam and LAMB.
template <class C>
struct Adam {
  Update<C> common;
  C beta1, gain1, beta2, gain2, root, unbias, eps, power;

  FASTFLAT_HD static Adam make(const double* r, bool mixed) {
    return {Update<C>::make(r, mixed),      static_cast<C>(r[row::beta1]), static_cast<C>(r[row::gain1]),
            static_cast<C>(r[row::beta2]),  static_cast<C>(r[row::gain2]), static_cast<C>(r[row::root]),
            static_cast<C>(r[row::unbias]), static_cast<C>(r[row::eps]),   static_cast<C>(r[row::power])};
  }

  FASTFLAT_HD void moments(C u, C& m, C& v) const {
    m = beta1 * m + gain1 * u;
    v = beta2 * v + gain2 * (u * u);
  }
  FASTFLAT_HD C adam(C w, C m, C v) const { return common.step(w, m / (std::sqrt(v) / root + eps)); }
  // (sqrt(v) + eps)^power
  FASTFLAT_HD C raised(C v) const { return elementary::exp(power * elementary::log(std::sqrt(v) + eps)); }
  FASTFLAT_HD C padam(C w, C m, C v) const { return common.step(w, m / raised(v)); }
  // LAMB: the update before the ratio of norms.
  FASTFLAT_HD C lamb(C w, C m, C v) const {
    const C q = (m * unbias) / (std::sqrt(v) / root + eps);
    return common.decays ? q + common.decay * w : q;
  }
};

// rate times the ratio of norms of a tensor, from its row and {u.u, -, w.w}.
FASTFLAT_HD double lamb_rate(const double* r, const double* sums) {
  return r[row::gain] != 0.0 ? r[row::rate] * norm_ratio(sums[2], sums[0]) : r[row::rate];
}

}  // namespace fastflat
