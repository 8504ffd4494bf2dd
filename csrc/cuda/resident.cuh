// SPDX-License-Identifier: Apache-2.0
// Skeleton: a value of the whole run of each scale (a maximum, say) and then a map that uses it, with the run held in
// registers in between: every element is read once and written once.
//
// A functor has
//   using Compute; static constexpr int sums = 1;
//   Compute measure(input) const, static T combine(T a, T b)             the value of the run
//   Group group(int64_t channel, Compute total) const                   its parameters
//   void finish(int64_t channel, const Sums<double, 1>&) const          called once a run
//   void operator()(const Group&, input, output&) const
#pragma once

#include "cuda/reduce.cuh"

namespace fastflat::cuda {

inline constexpr int kResidentBlock = 512;
// Packs a thread holds: 32 registers of data, with room among the 128 that 512 threads may have. (1024 threads of 64
// registers hold as much, but spill in fp16 on sm_80.)
template <class X, int N>
inline constexpr int resident_packs = 128 / static_cast<int>(N * sizeof(X));

// Threads of the team that holds a run of `inner` elements in registers; 0 if none can.
template <class X, int N>
int resident_team(const Geometry& g) {
  if (g.outer != 1 || g.numel() == 0) return 0;
  // A run that starts inside a pack touches one pack more.
  const int64_t packs = g.inner / N + (g.inner % N == 0 ? 0 : 2);
  for (int team = 1; team <= kWarp; team *= 2) {
    // A single pack a thread keeps short groups coalesced; the full warp takes what it can hold.
    if (packs <= team * (team < kWarp ? 1 : resident_packs<X, N>)) return team;
  }
  for (int team : {kBlock, kResidentBlock}) {
    if (packs <= static_cast<int64_t>(team) * resident_packs<X, N>) return team;
  }
  return 0;
}

template <int N, class F, class X, class Y>
__global__ void __launch_bounds__(kResidentBlock) resident_kernel(Geometry g, int team, F f, const X* x, Y* y) {
  constexpr int packs = resident_packs<X, N>;
  const int teams = static_cast<int>(blockDim.x) / team;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * teams + static_cast<int>(threadIdx.x) / team;
  const int rank = static_cast<int>(threadIdx.x) % team;
  const bool busy = channel < g.channels;
  const Range run{channel * g.inner, busy ? (channel + 1) * g.inner : 0};
  const int64_t first = (run.begin / N + rank) * N;
  const int64_t stride = static_cast<int64_t>(team) * N;

  Pack<X, N> held[packs];
#pragma unroll
  for (int j = 0; j < packs; ++j) held[j] = load_pack<N>(x, first + j * stride, run);
  Sums<typename F::Compute, 1> total{};
#pragma unroll
  for (int j = 0; j < packs; ++j) {
#pragma unroll
    for (int i = 0; i < N; ++i) total.v[0] = F::combine(total.v[0], f.measure(held[j].v[i]));
  }
  combine_team<F>(total, team);
  if (!busy) return;
  if (rank == 0) f.finish(channel, widen<1>(total));
  const auto group = f.group(channel, total.v[0]);
#pragma unroll
  for (int j = 0; j < packs; ++j) {
    if (first + j * stride >= run.end) return;
    Pack<Y, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) f(group, held[j].v[i], result.v[i]);
    store_pack(y, first + j * stride, run, result);
  }
}

template <int N, class F, class X, class Y>
cudaError_t launch_resident(const Geometry& g, int team, const F& f, const X* x, Y* y, cudaStream_t stream) {
  if (!aligned(streams(x, y))) return cudaErrorMisalignedAddress;
  const int threads = team > kBlock ? kResidentBlock : kBlock;
  return launch(resident_kernel<N, F, X, Y>, ceil_div(g.channels, threads / team), threads, stream, g, team, f, x, y);
}

}  // namespace fastflat::cuda
