// SPDX-License-Identifier: Apache-2.0
// Skeleton: n streams in, m streams out, element by element, each element with the parameters of its scale.
//
// A functor has
//   auto group(int64_t channel) const                                   the parameters of one scale
//   void operator()(const Group&, inputs..., outputs&...) const         one element, in storage types
// and may have what launch.cuh lists before apply().
#pragma once

#include "cuda/launch.cuh"

namespace fastflat::cuda {

// Packs of each input that a thread loads before it stores the first result: two hide latency, and at most 64 bytes, so
// that the wide mixed pairs do not spill.
template <class In, int N>
inline constexpr int packs_per_thread = sizeof(packs_of<N, In>) > 32 ? 1 : 2;

template <int N, class F, class In, class Out>
__global__ void __launch_bounds__(kBlock, blocks_at_once<F>) map_kernel(int64_t n, Geometry g, F f, In in, Out out) {
  constexpr int packs = packs_per_thread<In, N>;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * (kBlock * packs * N);
  const Range all{0, n};
  const Locator locate(g, base);
  const bool one_scale_a_pack = g.channels == 1 || g.inner % N == 0;

  packs_of<N, In> loaded[packs];
#pragma unroll
  for (int v = 0; v < packs; ++v) {
    loaded[v] = load_packs<N>(in, base + (v * kBlock + static_cast<int>(threadIdx.x)) * N, all);
  }
  open(f);
  auto group = f.group(locate.base.channel);
#pragma unroll
  for (int v = 0; v < packs; ++v) {
    const int local = (v * kBlock + static_cast<int>(threadIdx.x)) * N;
    if (base + local >= n) return;
    Position position = locate.base;
    if (g.channels > 1) position = locate.at(local);
    const auto own = pack_of<N>(f, base + local);
    packs_of<N, Out> result;
    if (takes_packs(f) && one_scale_a_pack) {
      apply_all(f, loaded[v], result, own, pack_group(f, position.channel));
    } else {
      if (g.channels > 1) group = f.group(position.channel);
      if (!long_body<F> && one_scale_a_pack) {
#pragma unroll
        for (int i = 0; i < N; ++i) apply(f, i, loaded[v], result, own, group);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (i > 0 && !(long_body<F> && one_scale_a_pack) && position.advance(g)) group = f.group(position.channel);
          apply(f, i, loaded[v], result, own, group);
        }
      }
    }
    store_packs(out, base + local, all, result);
  }
}

template <int N, class F, class In, class Out>
cudaError_t launch_map(const Geometry& g, const F& f, const In& in, const Out& out, cudaStream_t stream) {
  const int64_t n = g.numel();
  if (n == 0) return cudaSuccess;
  if (!aligned(in) || !aligned(out)) return cudaErrorMisalignedAddress;
  const int64_t blocks = ceil_div(n, kBlock * packs_per_thread<In, N> * N);
  return launch(map_kernel<N, F, In, Out>, blocks, kBlock, stream, n, g, f, in, out);
}

}  // namespace fastflat::cuda
