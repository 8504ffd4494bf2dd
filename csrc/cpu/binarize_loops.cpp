// SPDX-License-Identifier: Apache-2.0
// The loops of the binarize family. Compiled once for each instruction set (cpu/isa.h).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/binarize.h"
#include "cpu/fake_quantize.h"

#include "cpu/isa_begin.h"
#include "math/binarize.h"
#include "math/convert.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

#include "cpu/loops.h"

#include "cpu/channels.h"

template <class C>
PerChannel<C> parameters(const BinarizeCall& call) {
  return {static_cast<const C*>(call.alpha), static_cast<const C*>(call.k)};
}

template <class X, class Y>
void binarize_forward(const BinarizeCall& call, int64_t begin, int64_t end) {
  using C = compute_t<X>;
  const X* __restrict x = static_cast<const X*>(call.x);
  Y* __restrict y = static_cast<Y*>(call.out);
  map_channels<C>(call.geometry, parameters<C>(call), begin, end,
                  [=](int64_t i, Shared<C> s)
                      __attribute__((always_inline)) { y[i] = store<Y>(Binarize<C>::forward(load(x[i]), s.a)); });
}

template <class X, class Y>
void binarize_backward(const BinarizeCall& call, int64_t begin, int64_t end) {
  using C = compute_t<X>;
  const Binarize<C> rule{static_cast<C>(call.clip)};
  const X* __restrict x = static_cast<const X*>(call.x);
  const Y* __restrict gy = static_cast<const Y*>(call.in);
  const C* __restrict h = static_cast<const C*>(call.h);
  X* __restrict gx = static_cast<X*>(call.out);
  const PerChannel<C> p = parameters<C>(call);
  const Geometry& g = call.geometry;
  if (!p.b) {
    map_channels<C>(g, p, begin, end, [=](int64_t i, Shared<C> s) __attribute__((always_inline)) {
      gx[i] = store<X>(rule.passed(load(gy[i]), load(x[i]), s.a));
    });
  } else if (h) {
    map_channels<C>(g, p, begin, end, [=](int64_t i, Shared<C> s) __attribute__((always_inline)) {
      const C v = load(x[i]);
      gx[i] = store<X>(rule.passed(load(gy[i]), v, s.a) + (h[i] * rule.sign(v)) * s.b);
    });
  } else {
    map_channels<C>(g, p, begin, end, [=](int64_t i, Shared<C> s) __attribute__((always_inline)) {
      const C v = load(x[i]);
      gx[i] = store<X>(rule.passed(load(gy[i]), v, s.a) + rule.sign(v) * s.b);
    });
  }
}

template <class X, class Y>
void binarize_tangent(const BinarizeCall& call, int64_t begin, int64_t end) {
  using C = compute_t<X>;
  const Binarize<C> rule{static_cast<C>(call.clip)};
  const X* __restrict x = static_cast<const X*>(call.x);
  const X* __restrict tx = static_cast<const X*>(call.in);
  Y* __restrict ty = static_cast<Y*>(call.out);
  const PerChannel<C> p = parameters<C>(call);
  if (p.b) {
    map_channels<C>(call.geometry, p, begin, end, [=](int64_t i, Shared<C> s) __attribute__((always_inline)) {
      const C v = load(x[i]);
      ty[i] = store<Y>(rule.passed(load(tx[i]), v, s.a) + rule.sign(v) * s.b);
    });
  } else {
    map_channels<C>(call.geometry, p, begin, end, [=](int64_t i, Shared<C> s) __attribute__((always_inline)) {
      ty[i] = store<Y>(rule.passed(load(tx[i]), load(x[i]), s.a));
    });
  }
}

// Sums of of(i), weighed by h on wish, and of h.
template <bool whole, bool weigh, class C, class Of>
FASTFLAT_HD void sums_with_importance(const BinarizeCall& call, int64_t begin, int64_t end, double* sums,
                                      const Of& of) {
  const Geometry& g = call.geometry;
  const C* __restrict h = static_cast<const C*>(call.h);
  const auto plain = [=](int64_t i, Shared<C>) __attribute__((always_inline)) { return Shared<C>{of(i), C(0)}; };
  const auto weighed = [=](int64_t i, Shared<C>)
                           __attribute__((always_inline)) { return Shared<C>{weigh ? h[i] * of(i) : of(i), h[i]}; };
  if (whole) {
    h ? sum_channels<2, C>(g, {}, begin, end, sums, weighed) : sum_channels<2, C>(g, {}, begin, end, sums, plain);
  } else {
    h ? sum_range<2, C>(g, {}, begin, end, sums, weighed) : sum_range<2, C>(g, {}, begin, end, sums, plain);
  }
}

template <bool whole, class X>
void magnitude_sums(const BinarizeCall& call, int64_t begin, int64_t end, double* sums) {
  using C = compute_t<X>;
  const X* __restrict x = static_cast<const X*>(call.x);
  sums_with_importance<whole, true, C>(call, begin, end, sums, [=](int64_t i) __attribute__((always_inline)) {
    return Binarize<C>::magnitude(load(x[i]));
  });
}

template <bool whole, class X>
void tangent_sums(const BinarizeCall& call, int64_t begin, int64_t end, double* sums) {
  using C = compute_t<X>;
  const X* __restrict x = static_cast<const X*>(call.x);
  const X* __restrict tx = static_cast<const X*>(call.in);
  sums_with_importance<whole, true, C>(call, begin, end, sums, [=](int64_t i) __attribute__((always_inline)) {
    return Binarize<C>::sign(load(x[i])) * load(tx[i]);
  });
}

template <bool whole, class X, class Y>
void backward_sums(const BinarizeCall& call, int64_t begin, int64_t end, double* sums) {
  using C = compute_t<X>;
  const X* __restrict x = static_cast<const X*>(call.x);
  const Y* __restrict gy = static_cast<const Y*>(call.in);
  sums_with_importance<whole, false, C>(call, begin, end, sums, [=](int64_t i) __attribute__((always_inline)) {
    return load(gy[i]) * Binarize<C>::sign(load(x[i]));
  });
}

template <class X, class Y>
constexpr auto backward_channels = backward_sums<true, X, Y>;
template <class X, class Y>
constexpr auto backward_range = backward_sums<false, X, Y>;
template <class X>
constexpr auto magnitude_channels = magnitude_sums<true, X>;
template <class X>
constexpr auto magnitude_range = magnitude_sums<false, X>;
template <class X>
constexpr auto tangent_channels = tangent_sums<true, X>;
template <class X>
constexpr auto tangent_range = tangent_sums<false, X>;

}  // namespace
}  // namespace FASTFLAT_ISA

const BinarizeLoops FASTFLAT_TABLE(binarize_loops) = {
    FASTFLAT_PAIRS(binarize_forward),   FASTFLAT_PAIRS(binarize_backward),   FASTFLAT_PAIRS(binarize_tangent),
    FASTFLAT_PAIRS(backward_channels),  FASTFLAT_PAIRS(backward_range),      FASTFLAT_STORAGES(magnitude_channels),
    FASTFLAT_STORAGES(magnitude_range), FASTFLAT_STORAGES(tangent_channels), FASTFLAT_STORAGES(tangent_range),
};

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"
