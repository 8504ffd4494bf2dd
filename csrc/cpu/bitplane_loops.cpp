// SPDX-License-Identifier: Apache-2.0
// The loops of the bitplane family: a block of elements stays in the first cache while all its planes pass by.
// Compiled once for each instruction set (cpu/isa.h).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/geometry.h"
#include "cpu/bitplane.h"

#include "cpu/isa_begin.h"
#include "math/bitplane.h"
#include "math/convert.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

#include "cpu/loops.h"

template <class C>
struct Parameters {
  BitPlanes<C> form;
  Plane<C> plane[most_planes];

  explicit Parameters(const BitplaneCall& call)
      : form(BitPlanes<C>::make(call.planes, *static_cast<const C*>(call.scale), *static_cast<const C*>(call.beta))) {
    for (int b = 0; b < call.planes; ++b) plane[b] = form.plane(b, static_cast<const C*>(call.m)[b], call.hard_m);
  }
};

// One plane of up to `block` elements on top of their sums. Functions of their own, so that all constants of the
// sigmoid and the plane's stay in registers.
template <bool hard, class P, class C>
__attribute__((noinline)) void add_plane(const BitPlanes<C> form, const Plane<C> plane, const P* __restrict p,
                                         const P* __restrict q, int64_t n, C* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] = form.add(sum[i], plane, load(p[i]), load(q[i]), hard);
}

template <bool hard, class P, class C>
__attribute__((noinline)) void backward_plane(const BitPlanes<C> form, const Plane<C> plane, const C* __restrict g,
                                              const P* __restrict p, const P* __restrict q, int64_t n, P* __restrict gp,
                                              P* __restrict gq, C* __restrict share) {
  for (int64_t i = 0; i < n; ++i) {
    const auto gradient = form.backward(plane, g[i], load(p[i]), load(q[i]), hard);
    gp[i] = store<P>(gradient.p);
    gq[i] = store<P>(gradient.q);
    share[i] = gradient.share;
  }
}

template <bool hard, class P, class C>
__attribute__((noinline)) void tangent_plane(const BitPlanes<C> form, const Plane<C> plane, C lift,
                                             const P* __restrict tp, const P* __restrict tq, const P* __restrict p,
                                             const P* __restrict q, int64_t n, C* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) {
    sum[i] = form.add_tangent(sum[i], plane, lift, load(tp[i]), load(tq[i]), load(p[i]), load(q[i]), hard);
  }
}

template <class P, class W>
void bitplane_forward(const BitplaneCall& call, int64_t begin, int64_t end) {
  using C = compute_t<P>;
  const Parameters<C> s(call);
  const auto add = call.hard_w ? add_plane<true, P, C> : add_plane<false, P, C>;
  const P* p = static_cast<const P*>(call.p);
  const P* q = static_cast<const P*>(call.q);
  W* __restrict w = static_cast<W*>(call.out);
  alignas(64) C sum[block];
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    std::fill_n(sum, n, C(0));
    for (int b = 0; b < call.planes; ++b) add(s.form, s.plane[b], p + b * call.n + i, q + b * call.n + i, n, sum);
    for (int64_t j = 0; j < n; ++j) w[i + j] = store<W>(s.form.weight(sum[j]));
  }
}

template <class P, class W>
void bitplane_backward(const BitplaneCall& call, int64_t begin, int64_t end, double* sums) {
  using C = compute_t<P>;
  const Parameters<C> s(call);
  const auto backward = call.hard_w ? backward_plane<true, P, C> : backward_plane<false, P, C>;
  const P* p = static_cast<const P*>(call.p);
  const P* q = static_cast<const P*>(call.q);
  const W* __restrict gw = static_cast<const W*>(call.gw);
  P* gp = static_cast<P*>(call.gp);
  P* gq = static_cast<P*>(call.gq);
  alignas(64) C g[block], share[block], lane[most_planes][lanes];
  for (int64_t start = begin; start < end; start += flush) {
    const int64_t stop = std::min(end, start + flush);
    std::fill_n(lane[0], call.planes * lanes, C(0));
    for (int64_t i = start; i < stop; i += block) {
      const int64_t n = std::min(block, stop - i);
      for (int64_t j = 0; j < n; ++j) g[j] = load(gw[i + j]);
      for (int b = 0; b < call.planes; ++b) {
        const int64_t at = b * call.n + i;
        backward(s.form, s.plane[b], g, p + at, q + at, n, gp + at, gq + at, share);
        add_lanes(share, n, lane[b]);
      }
    }
    for (int b = 0; b < call.planes; ++b) sums[b] += fold(lane[b]);
  }
}

template <class P, class W>
void bitplane_tangent(const BitplaneCall& call, int64_t begin, int64_t end) {
  using C = compute_t<P>;
  const Parameters<C> s(call);
  const auto add = call.hard_w ? tangent_plane<true, P, C> : tangent_plane<false, P, C>;
  const P* p = static_cast<const P*>(call.p);
  const P* q = static_cast<const P*>(call.q);
  const P* tp = static_cast<const P*>(call.tp);
  const P* tq = static_cast<const P*>(call.tq);
  const C* tm = static_cast<const C*>(call.tm);
  const C ts = call.ts ? *static_cast<const C*>(call.ts) : C(0);
  W* __restrict out = static_cast<W*>(call.out);
  alignas(64) C sum[block];
  alignas(64) P absent[block];
  std::memset(absent, 0, sizeof(absent));
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min(block, end - i);
    std::fill_n(sum, n, C(0));
    for (int b = 0; b < call.planes; ++b) {
      const int64_t at = b * call.n + i;
      const C lift = s.form.lift(s.plane[b], tm ? tm[b] : C(0), ts);
      add(s.form, s.plane[b], lift, tp ? tp + at : absent, tq ? tq + at : absent, p + at, q + at, n, sum);
    }
    for (int64_t j = 0; j < n; ++j) out[i + j] = store<W>(sum[j]);
  }
}

template <class P>
void bitplane_finish(const BitplaneCall& call, const double* sums, void* gm, void* gs) {
  using C = compute_t<P>;
  const Parameters<C> s(call);
  double total = 0;
  for (int b = 0; b < call.planes; ++b) {
    static_cast<C*>(gm)[b] = s.form.mask_gradient(s.plane[b], sums[b], call.hard_m);
    total += s.form.scale_share(s.plane[b], sums[b]);
  }
  *static_cast<C*>(gs) = s.form.scale_gradient(total);
}

}  // namespace
}  // namespace FASTFLAT_ISA

const BitplaneLoops FASTFLAT_TABLE(bitplane_loops) = {
    FASTFLAT_PAIRS(bitplane_forward),
    FASTFLAT_PAIRS(bitplane_backward),
    FASTFLAT_PAIRS(bitplane_tangent),
    FASTFLAT_STORAGES(bitplane_finish),
};

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"
