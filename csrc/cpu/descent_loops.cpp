// SPDX-License-Identifier: Apache-2.0
// The loops of the descent family. Compiled once for each instruction set (cpu/isa.h).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/descent.h"

#include "cpu/isa_begin.h"
#include "math/convert.h"
#include "math/descent.h"
#include "math/noise.h"
#include "math/sharpness.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

#include "cpu/noise_fill.h"

#include "cpu/stages.h"

// The buffers of a stage.
template <class C>
struct Buffers {
  StageBuffer<C> w, g, f, to, mixed;
};

// One stage of a call: where its operands are.
template <class C>
struct Stage {
  const DescentCall& call;
  int64_t at, n;
  Buffers<C>& buffers;

  C* state(const Stream& s) const { return static_cast<C*>(s.data) + at; }
  const C* weights() const { return fetch(call.source, at, n, buffers.w); }

  // The new weights, value(i), to their place or to the buffer that finish() delivers. `direct`: past the caches
  // without the buffer, where that is possible.
  template <class Value>
  C* write(const Value& value, bool direct = true) const {
    if constexpr (sizeof(C) == 4) {
      if (direct && streamed<C>(call.w) && !call.a && !call.out) {
        stream_values(state(call.w), n, value);
        return nullptr;
      }
    }
    C* to = target(call.w, at, buffers.to);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) to[i] = value(i);
    return to;
  }

  // The mixed gradient, of which the functor then takes once itself: c2 = 1 changes no bit of it.
  const C* gradient(Update<C>& common) const {
    const C* g = fetch(call.g, at, n, buffers.g);
    if (!call.f) return g;
    const C* f = fetch(call.f, at, n, buffers.f);
    C* __restrict mixed = buffers.mixed.v;
    const Update<C> mix = common;
    for (int64_t i = 0; i < n; ++i) mixed[i] = mix.mix(g[i], f[i]);
    return mixed;
  }

  // What follows the new weights `to`, null where they are written: their average, and their way to memory.
  void finish(const Update<C>& common, const C* to) const {
    if (!to) return;
    if (call.a && common.average != C(0)) {
      C* a = state(call.a);
      const Update<C> average = common;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) a[i] = average.averaged(a[i], to[i]);
    }
    if (call.out) deliver(call.out, at, n, to, call.draws);
    deliver(call.w, at, n, to, call.draws);
  }
};

// body(stage, update) for each stage; a skipped tensor is restored instead.
template <class C, class Functor, class Body>
inline void walk(const DescentCall& call, int64_t begin, int64_t end, Functor functor, const Body& body) {
  Buffers<C> buffers;
  const Update<C> as_given = functor.common;
  for (int64_t at = begin; at < end; at += stage) {
    const Stage<C> now{call, at, std::min(stage, end - at), buffers};
    if (as_given.skipped) {
      convert<C>(call.source, call.w, at, now.n);
      if (call.out) convert<C>(call.source, call.out, at, now.n);
    } else {
      functor.common = as_given;
      body(now, functor);
    }
  }
  settle();
}

// Functors that take a mixed gradient as their only one.
template <class C, class Functor>
inline Functor unmixed(Functor functor, const DescentCall& call) {
  if (call.f) functor.common.c2 = C(1);
  functor.common.mixed = false;
  return functor;
}

template <class C>
void sgd(const DescentCall& call, int64_t begin, int64_t end) {
  walk<C>(call, begin, end, Sgd<C>::make(call.row, true), [](const Stage<C>& now, Sgd<C>& given) {
    const C* g = now.gradient(given.common);
    const C* w = now.weights();
    const Sgd<C> functor = unmixed<C>(given, now.call);
    C *m = now.state(now.call.m), *to;
    if (now.call.m) {
      to = now.write([=](int64_t i)
                         __attribute__((always_inline)) { return functor.with_momentum(w[i], g[i], C(0), m[i]); });
    } else {
      to = now.write([=](int64_t i) __attribute__((always_inline)) { return functor.plain(w[i], g[i], C(0)); });
    }
    now.finish(functor.common, to);
  });
}

// One loop a form: `largest` and `padam` are constants of it. Powers have a loop of their own, which vectorises.
template <bool largest, bool padam, class C>
inline C* adam_stage(const Stage<C>& now, const Adam<C>& functor, const C* w, const C* g) {
  C *m = now.state(now.call.m), *v = now.state(now.call.v), *x = largest ? now.state(now.call.x) : v;
  const auto moments = [=](int64_t i) __attribute__((always_inline)) {
    C mean = m[i], square = v[i];
    functor.moments(functor.common.direction(w[i], g[i], C(0)), mean, square);
    m[i] = mean;
    v[i] = square;
    C most = square;
    if (largest) {
      most = larger(x[i], square);
      x[i] = most;
    }
    return most;
  };
  if (!padam) {
    return now.write([=](int64_t i) __attribute__((always_inline)) {
      const C most = moments(i);
      return functor.adam(w[i], m[i], most);
    });
  }
  C* __restrict power = now.buffers.mixed.v;
  const int64_t n = now.n;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) power[i] = moments(i);
  for (int64_t i = 0; i < n; ++i) power[i] = functor.raised(power[i]);
  const auto step = [=](int64_t i)
                        __attribute__((always_inline)) { return functor.common.step(w[i], m[i] / power[i]); };
  return now.write(step, false);
}

template <class C>
void adam(const DescentCall& call, int64_t begin, int64_t end) {
  walk<C>(call, begin, end, Adam<C>::make(call.row, true), [](const Stage<C>& now, Adam<C>& given) {
    const C* g = now.gradient(given.common);
    const C* w = now.weights();
    const Adam<C> functor = unmixed<C>(given, now.call);
    C* to;
    if (now.call.x) {
      to = now.call.padam ? adam_stage<true, true>(now, functor, w, g) : adam_stage<true, false>(now, functor, w, g);
    } else {
      to = now.call.padam ? adam_stage<false, true>(now, functor, w, g) : adam_stage<false, false>(now, functor, w, g);
    }
    now.finish(functor.common, to);
  });
}

template <class C>
void lamb_moments(const DescentCall& call, int64_t begin, int64_t end, double* result) {
  Buffers<C> buffers;
  LaneSum qq, ww;
  Adam<C> functor = Adam<C>::make(call.row, true);
  const bool skipped = functor.common.skipped;
  for (int64_t at = begin; at < end; at += stage) {
    const Stage<C> now{call, at, std::min(stage, end - at), buffers};
    C *m = now.state(call.m), *v = now.state(call.v);
    const C* w = now.weights();
    C* __restrict q = buffers.to.v;
    if (!skipped) {
      const C* g = now.gradient(functor.common);
      const Adam<C> single = unmixed<C>(functor, call);
#pragma GCC ivdep
      for (int64_t i = 0; i < now.n; ++i) {
        C mean = m[i], square = v[i];
        single.moments(single.common.mix(g[i], C(0)), mean, square);
        m[i] = mean;
        v[i] = square;
      }
    }
    for (int64_t i = 0; i < now.n; ++i) q[i] = functor.lamb(w[i], m[i], v[i]);
    for_lanes(const_cast<const C*>(q), w, now.n, [&](const Quad* a, const Quad* b) {
      add_product(qq, a, a);
      add_product(ww, b, b);
    });
  }
  result[0] = qq.total();
  result[1] = 0.0;
  result[2] = ww.total();
}

template <class C>
void lamb(const DescentCall& call, int64_t begin, int64_t end) {
  Adam<C> functor = Adam<C>::make(call.row, true);
  functor.common.rate = static_cast<C>(call.rate);
  walk<C>(call, begin, end, functor, [](const Stage<C>& now, Adam<C>& given) {
    const C* w = now.weights();
    const C *m = now.state(now.call.m), *v = now.state(now.call.v);
    const Adam<C> functor = given;
    const C* to = now.write([=](int64_t i) __attribute__((always_inline)) {
      return functor.common.step(w[i], functor.lamb(w[i], m[i], v[i]));
    });
    now.finish(functor.common, to);
  });
}

}  // namespace
}  // namespace FASTFLAT_ISA

const DescentLoops FASTFLAT_TABLE(descent_loops) = {
    {FASTFLAT_ISA::sgd<float>, FASTFLAT_ISA::sgd<double>},
    {FASTFLAT_ISA::adam<float>, FASTFLAT_ISA::adam<double>},
    {FASTFLAT_ISA::lamb<float>, FASTFLAT_ISA::lamb<double>},
    {FASTFLAT_ISA::lamb_moments<float>, FASTFLAT_ISA::lamb_moments<double>},
};

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"
