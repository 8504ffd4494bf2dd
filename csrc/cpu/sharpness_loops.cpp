// SPDX-License-Identifier: Apache-2.0
// The loops of the sharpness family. Compiled once for each instruction set (cpu/isa.h).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/sharpness.h"

#include "cpu/isa_begin.h"
#include "math/convert.h"
#include "math/noise.h"
#include "math/sharpness.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

#include "cpu/noise_fill.h"

#include "cpu/stages.h"

template <class C>
void sums(const SumsCall& call, int64_t begin, int64_t end, double* result) {
  StageBuffer<C> first, second;
  LaneSum gg, go, oo;
  double of_gradients = 0.0;
  const double e = call.eta;
  const Quad eta = {e, e, e, e};
  for (int64_t at = begin; at < end; at += stage) {
    const int64_t n = std::min(stage, end - at);
    const C* g = fetch(call.g, at, n, first);
    const C* o = call.kind == sum_gradient ? g : fetch(call.other, at, n, second);
    if (call.kind == sum_gradient) {
      of_gradients += squares(g, n);
    } else if (call.kind == sum_pair) {
      for_lanes(g, o, n, [&](const Quad* x, const Quad* y) {
        add_product(gg, x, x);
        add_product(go, x, y);
        add_product(oo, y, y);
      });
    } else {
      for_lanes(g, o, n, [&](const Quad* x, const Quad* y) {
        Quad scaled[4];
        for (int k = 0; k < 4; ++k) scaled[k] = ((y[k] < 0.0 ? -y[k] : y[k]) + eta) * x[k];
        add_product(gg, scaled, scaled);
      });
    }
  }
  result[0] = of_gradients + gg.total();
  result[1] = go.total();
  result[2] = oo.total();
}

// Where a stage writes: the perturbed weights to `to`. Past the caches go, at `past`, those weights instead or, where
// it `keeps`, the weights before.
template <class C>
struct Targets {
  C *to, *past;
  bool keeps;
};

template <class C>
inline void rise(const Ascent<C>& functor, const C* w, const C* g, const Targets<C>& targets, int64_t n) {
  C* to = targets.to;
  if constexpr (sizeof(C) == 4) {
    if (targets.keeps) {
      return stream_values(targets.past, n, [=](int64_t i) __attribute__((always_inline)) {
        const C before = w[i];
        to[i] = functor(before, g[i]);
        return before;
      });
    }
    if (targets.past) {
      return stream_values(targets.past, n,
                           [=](int64_t i) __attribute__((always_inline)) { return functor(w[i], g[i]); });
    }
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) to[i] = functor(w[i], g[i]);
}

template <class C>
void ascent(const AscentCall& call, int64_t begin, int64_t end) {
  StageBuffer<C> first, second, third;
  Ascent<C> functor{static_cast<C>(call.scale), static_cast<C>(call.eta), call.metric};
  const Stream& result = call.out ? call.out : call.w;
  const bool keeps = call.backup && streamed<C>(call.backup), past = streamed<C>(result);
  for (int64_t at = begin; at < end; at += stage) {
    const int64_t n = std::min(stage, end - at);
    if (call.backup && !keeps) convert<C>(call.w, call.backup, at, n);
    const C* w = fetch(call.w, at, n, first);
    const C* g = fetch(call.g, at, n, second);
    Targets<C> targets{target(result, at, third), nullptr, keeps};
    if (keeps || past) targets.past = static_cast<C*>((keeps ? call.backup : result).data) + at;
    // A constant metric makes a loop without its question.
    if (functor.metric == metric_l2) {
      rise(Ascent<C>{functor.scale, functor.eta, metric_l2}, w, g, targets, n);
    } else if (functor.metric == metric_scaled) {
      rise(Ascent<C>{functor.scale, functor.eta, metric_scaled}, w, g, targets, n);
    } else {
      rise(Ascent<C>{functor.scale, functor.eta, metric_linf}, w, g, targets, n);
    }
    if (!past) deliver(result, at, n, targets.to, call.draws);
  }
  settle();
}

}  // namespace
}  // namespace FASTFLAT_ISA

const SharpnessLoops FASTFLAT_TABLE(sharpness_loops) = {
    {FASTFLAT_ISA::sums<float>, FASTFLAT_ISA::sums<double>},
    {FASTFLAT_ISA::ascent<float>, FASTFLAT_ISA::ascent<double>},
};

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"
