// SPDX-License-Identifier: Apache-2.0
// The loops of the inputs family (cpu/inputs.h: for which instruction sets). Data of 16 bits pass through buffers.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/geometry.h"
#include "cpu/inputs.h"

#if !defined(FASTFLAT_ISA_AVX512)
#include "cpu/isa_begin.h"
#include "math/convert.h"
#include "math/inputs.h"

namespace fastflat::cpu {
namespace FASTFLAT_ISA {
namespace {

using namespace inputs;

#include "cpu/in_blocks.h"
#include "cpu/loops.h"
#include "cpu/noise_fill.h"

void strengths(const NoiseCall& call) {
  const PhiloxState state = stream_of(call.state[0], call.state[1], strength_stream);
  for (int64_t i = 0; i < call.K * call.samples; ++i) call.sigma[i] = strength(state, call.law, call.most, i);
}

template <class C>
void noise(const NoiseCall& call, int64_t begin, int64_t end) {
  const int64_t n = call.samples * call.length, of_copy = draws_of_copy(n);
  const PhiloxState state = PhiloxState::make(call.state[0], call.state[1]);
  const PhiloxState of_mask = stream_of(call.state[0], call.state[1], mask_stream);
  const Geometry samples{1, call.samples, call.length};
  const float keep = call.keep;
  alignas(64) float draw[block], kept[block], factor[block];
  alignas(64) C of_x[block], of_out[block];
  std::fill_n(kept, block, -1.0f);
  for (int64_t i = begin; i < end; i += block) {
    const int64_t count = std::min(block, end - i);
    const C* const x = fetch(call.storage, call.x, i, count, of_x);
    for (int64_t k = 0; k < call.K; ++k) {
      fill_normal(state, k * of_copy + i, count, draw);
      if (keep < 1.0f) fill_uniform(of_mask, k * of_copy + i, count, kept);
      for_runs(samples, i, i + count, [&](int64_t at, int64_t length, int64_t sample) {
        std::fill_n(factor + (at - i), length, factor_of(call.sigma[k * call.samples + sample]));
      });
      C* const out = target(call.storage, call.noisy, k * n + i, of_out);
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) out[j] = noisy(x[j], factor[j], draw[j], kept[j] < keep);
      deliver(call.storage, out, call.noisy, k * n + i, count);
    }
  }
}

// Calls body(xa, x0, g, out, count) for the blocks of the elements [begin, end) of one sample; inactive ones stay.
template <class C, class Body>
inline void for_blocks(const StepCall& call, int64_t begin, int64_t end, const Body& body) {
  alignas(64) C of_xa[block], of_x0[block], of_g[block], of_out[block];
  for (int64_t i = begin; i < end; i += block) {
    const int64_t count = std::min(block, end - i);
    const C* const xa = fetch(call.storage, call.xa, i, count, of_xa);
    const C* const x0 = fetch(call.storage, call.x0, i, count, of_x0);
    const C* const g = fetch(call.storage, call.g, i, count, of_g);
    C* const out = target(call.storage, call.out, i, of_out);
    if (body(xa, x0, g, out, count)) deliver(call.storage, out, call.out, i, count);
  }
}

inline bool stays(const StepCall& call, int64_t sample, int64_t begin, int64_t end) {
  if (!call.active || call.active[sample]) return false;
  const int64_t bytes = storage_bytes(call.storage);
  std::memcpy(static_cast<char*>(call.out) + begin * bytes, static_cast<const char*>(call.xa) + begin * bytes,
              (end - begin) * bytes);
  return true;
}

template <class C>
void sign_step(const StepCall& call, int64_t begin, int64_t end) {
  const SignStep<C> step{static_cast<C>(call.step), static_cast<C>(call.eps), static_cast<C>(call.low),
                         static_cast<C>(call.high)};
  for_runs({1, call.samples, call.length}, begin, end, [&](int64_t at, int64_t length, int64_t sample) {
    if (stays(call, sample, at, at + length)) return;
    for_blocks<C>(call, at, at + length, [&](const C* xa, const C* x0, const C* g, C* out, int64_t count) {
      const SignStep<C> own = step;
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) out[j] = own(xa[j], x0[j], g[j]);
      return true;
    });
  });
}

// The length of a vector that comes in blocks.
template <class C>
struct Squares {
  BlockSum<C> sum;

  void add(const C* v, int64_t n) {
    alignas(64) C square[block];
    for (int64_t j = 0; j < n; ++j) square[j] = v[j] * v[j];
    sum.add(square, n);
  }
  C length() { return static_cast<C>(std::sqrt(sum.total())); }
};

template <class C>
void norm_step(const StepCall& call, int64_t begin, int64_t end) {
  const int64_t n = call.length;
  for (int64_t sample = begin; sample < end; ++sample) {
    const int64_t first = sample * n, last = first + n;
    if (stays(call, sample, first, last)) continue;
    NormStep<C> step{C(0), C(1), static_cast<C>(call.low), static_cast<C>(call.high)};
    Squares<C> of_g, of_distance;
    alignas(64) C buffer[block];
    for (int64_t i = first; i < last; i += block) {
      const int64_t count = std::min(block, last - i);
      of_g.add(fetch(call.storage, call.g, i, count, buffer), count);
    }
    step.scale = NormStep<C>::scale_of(static_cast<C>(call.step), of_g.length());
    for_blocks<C>(call, first, last, [&](const C* xa, const C* x0, const C* g, C*, int64_t count) {
      const NormStep<C> own = step;
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) buffer[j] = own.distance(xa[j], x0[j], g[j]);
      of_distance.add(buffer, count);
      return false;
    });
    step.shrink = NormStep<C>::shrink_of(static_cast<C>(call.eps), of_distance.length());
    for_blocks<C>(call, first, last, [&](const C* xa, const C* x0, const C* g, C* out, int64_t count) {
      const NormStep<C> own = step;
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) out[j] = own(xa[j], x0[j], g[j]);
      return true;
    });
  }
}

}  // namespace
}  // namespace FASTFLAT_ISA

#define FASTFLAT_INPUTS_LOOPS(C) \
  {FASTFLAT_ISA::strengths, FASTFLAT_ISA::noise<C>, FASTFLAT_ISA::sign_step<C>, FASTFLAT_ISA::norm_step<C>}

const InputsLoops FASTFLAT_TABLE(inputs) = FASTFLAT_INPUTS_LOOPS(float);
#if !defined(FASTFLAT_ISA_AVX2)
const InputsLoops inputs_double = FASTFLAT_INPUTS_LOOPS(double);
#endif

}  // namespace fastflat::cpu

#include "cpu/isa_end.h"
#endif
