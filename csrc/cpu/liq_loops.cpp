// SPDX-License-Identifier: Apache-2.0
// The loops of the liq family. Compiled once for each instruction set (cpu/isa.h).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/fake_quantize.h"
#include "cpu/liq.h"

#include "cpu/isa_begin.h"
#include "math/convert.h"
#include "math/liq.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

#include "cpu/loops.h"

#include "cpu/channels.h"

template <class C>
PerChannel<C> moments(const LiqCall& call) {
  return {static_cast<const C*>(call.mean), static_cast<const C*>(call.std)};
}

template <class C>
Liq<C> rule_of(const LiqCall& call) {
  return Liq<C>::make(call.levels, *static_cast<const C*>(call.clip), call.eps);
}

template <class X, class Y>
void liq_forward(const LiqCall& call, int64_t begin, int64_t end) {
  using C = compute_t<X>;
  const Liq<C> rule = rule_of<C>(call);
  const X* __restrict w = static_cast<const X*>(call.w);
  Y* __restrict y = static_cast<Y*>(call.out);
  map_channels<C>(call.geometry, moments<C>(call), begin, end,
                  [=](int64_t i, Shared<C> s) __attribute__((always_inline)) {
                    y[i] = store<Y>(rule.forward(load(w[i]), s.a, rule.held(s.b)));
                  });
}

template <class X, class Y>
void liq_tangent(const LiqCall& call, int64_t begin, int64_t end) {
  using C = compute_t<X>;
  const Liq<C> rule = rule_of<C>(call);
  const X* __restrict w = static_cast<const X*>(call.w);
  const X* __restrict tw = static_cast<const X*>(call.in);
  const C tclip = call.tclip ? *static_cast<const C*>(call.tclip) : C(0);
  Y* __restrict ty = static_cast<Y*>(call.out);
  if (tw) {
    map_channels<C>(call.geometry, moments<C>(call), begin, end,
                    [=](int64_t i, Shared<C> s) __attribute__((always_inline)) {
                      ty[i] = store<Y>(rule.tangent(load(tw[i]), tclip, load(w[i]), s.a, rule.held(s.b)));
                    });
  } else {
    map_channels<C>(call.geometry, moments<C>(call), begin, end,
                    [=](int64_t i, Shared<C> s) __attribute__((always_inline)) {
                      ty[i] = store<Y>(rule.tangent(C(0), tclip, load(w[i]), s.a, rule.held(s.b)));
                    });
  }
}

template <bool whole, class X, class Y>
void backward_sums(const LiqCall& call, int64_t begin, int64_t end, double* sums) {
  using C = compute_t<X>;
  const Liq<C> rule = rule_of<C>(call);
  const X* __restrict w = static_cast<const X*>(call.w);
  const Y* __restrict gy = static_cast<const Y*>(call.in);
  X* __restrict gw = static_cast<X*>(call.out);
  const auto term = [=](int64_t i, Shared<C> s) __attribute__((always_inline)) {
    const auto d = rule.backward(load(gy[i]), load(w[i]), s.a, rule.held(s.b));
    gw[i] = store<X>(d.w);
    return Shared<C>{d.clip, C(0)};
  };
  if (whole) {
    sum_channels<1, C>(call.geometry, moments<C>(call), begin, end, sums, term);
  } else {
    sum_range<1, C>(call.geometry, moments<C>(call), begin, end, sums, term);
  }
}

template <bool whole, class X>
void moment_sums(const LiqCall& call, int64_t begin, int64_t end, double* sums) {
  const X* __restrict w = static_cast<const X*>(call.w);
  const PerChannel<double> about{call.about, nullptr};
  const auto first = [=](int64_t i, Shared<double>) __attribute__((always_inline)) {
    return Shared<double>{static_cast<double>(load(w[i])), 0.0};
  };
  const auto second = [=](int64_t i, Shared<double> s) __attribute__((always_inline)) {
    const double d = static_cast<double>(load(w[i])) - s.a;
    return Shared<double>{d * d, 0.0};
  };
  const Geometry& g = call.geometry;
  if (whole) {
    call.about ? sum_channels<1, double>(g, about, begin, end, sums, second)
               : sum_channels<1, double>(g, about, begin, end, sums, first);
  } else {
    call.about ? sum_range<1, double>(g, about, begin, end, sums, second)
               : sum_range<1, double>(g, about, begin, end, sums, first);
  }
}

template <class X, class Y>
constexpr auto backward_channels = backward_sums<true, X, Y>;
template <class X, class Y>
constexpr auto backward_range = backward_sums<false, X, Y>;
template <class X>
constexpr auto moment_channels = moment_sums<true, X>;
template <class X>
constexpr auto moment_range = moment_sums<false, X>;

}  // namespace
}  // namespace FASTFLAT_ISA

const LiqLoops FASTFLAT_TABLE(liq_loops) = {
    FASTFLAT_PAIRS(liq_forward),    FASTFLAT_PAIRS(liq_tangent),        FASTFLAT_PAIRS(backward_channels),
    FASTFLAT_PAIRS(backward_range), FASTFLAT_STORAGES(moment_channels), FASTFLAT_STORAGES(moment_range),
};

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"
