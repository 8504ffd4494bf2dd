// SPDX-License-Identifier: Apache-2.0
// The dynamic forms: the largest magnitude of each channel, the scale that follows from it, then the map.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/fake_quantize.h"
#include "cpu/threads.h"
#include "math/fake_quantize.h"

namespace fastflat::cpu {

// Elements that a thread goes over twice before it goes on: a share of its second-level cache.
constexpr int64_t in_cache = 1 << 15;

// Magnitudes of `measured`, whose data have the type `storage`; store(absmax, begin, end) sets the scales of these
// channels, and `forward` maps `call`, which points at them. Where channels are pieces of their own each is mapped
// while it is in the cache.
template <class Call, class Store>
void scale_from_data(Storage storage, const FakeQuantizeCall& measured, const Store& store,
                     void (*forward)(const Call&, int64_t begin, int64_t end), const Call& call) {
  const FakeQuantizeLoops& loops = fake_quantize_loops();
  const Geometry& g = measured.geometry;
  std::vector<double> absmax(g.channels, 0.0);
  if (g.numel() == 0 || !Cut(g).by_channel) {
    reduce(loops.absmax_channels[storage], loops.absmax_range[storage], measured, 1, absmax.data(),
           [](double a, double b) { return larger_magnitude(a, b); });
    store(absmax.data(), 0, g.channels);
    return map(forward, call);
  }
  const int64_t per_turn = std::max<int64_t>(1, in_cache / g.inner);
  torch::stable::parallel_for(0, g.channels, std::max<int64_t>(1, grain / g.inner), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += per_turn) {
      const int64_t stop = std::min(end, c + per_turn);
      loops.absmax_channels[storage](measured, c, stop, absmax.data());
      store(absmax.data(), c, stop);
      forward(call, c * g.inner, stop * g.inner);
    }
  });
}

}  // namespace fastflat::cpu
