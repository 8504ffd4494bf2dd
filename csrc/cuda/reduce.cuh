// SPDX-License-Identifier: Apache-2.0
// Skeleton: n streams in, m streams out and, in the same pass, K sums (or maxima) over the elements of each scale.
// Partial results go to a workspace and a second kernel combines them in a fixed order, in fp64: no atomics.
//
// A functor has
//   using Compute; static constexpr int sums = K;
//   auto group(int64_t channel) const
//   void operator()(const Group&, Sums<Compute, K>&, inputs..., outputs&...) const
//   static T combine(T a, T b) const                                    for T = Compute and double
//   void finish(int64_t channel, const Sums<double, K>&) const          writes the results of one scale
// and may have what launch.cuh lists before apply(), and
//   using Finish                                                        a base with sums, Compute, combine() and
//                                                                       finish(), so that functors share the second
//                                                                       kernel; of K sums it may leave out the last,
//                                                                       which then go over all scales:
//   void total(int64_t unit, const Sums<Compute, K>&) const             called once for each of reduce_units() pieces
//   int used() const                                                    how many of Finish's sums are in use: the first
#pragma once

#include "cuda/launch.cuh"
#include "cuda/reduce_plan.h"

namespace fastflat::cuda {

template <class T, int K>
struct Sums {
  T v[K];
};

template <class F>
struct FinishOf {
  using type = F;
};
template <class F>
  requires requires { typename F::Finish; }
struct FinishOf<F> {
  using type = typename F::Finish;
};
template <class F>
using finish_of = typename FinishOf<F>::type;

template <class F>
__device__ __forceinline__ int used_sums(const F& f) {
  if constexpr (requires { f.used(); }) {
    return f.used();
  } else {
    return finish_of<F>::sums;
  }
}

// Combines over the threads of a team (a power of two up to a warp, or all threads of the block); each of them gets the
// result. One call a kernel: the shared array is not guarded for reuse.
template <class F, class T, int K>
__device__ __forceinline__ void combine_team(Sums<T, K>& sums, int team) {
  __shared__ T of_warp[K][kWarp];
  for (int distance = (team < kWarp ? team : kWarp) / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < K; ++k) sums.v[k] = F::combine(sums.v[k], __shfl_xor_sync(0xffffffffu, sums.v[k], distance));
  }
  if (team <= kWarp) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) of_warp[k][warp] = sums.v[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    sums.v[k] = of_warp[k][0];
    for (int w = 1; w < team / kWarp; ++w) sums.v[k] = F::combine(sums.v[k], of_warp[k][w]);
  }
}

// The first K of the sums.
template <int K, class T, int all>
__device__ __forceinline__ Sums<double, K> widen(const Sums<T, all>& sums) {
  Sums<double, K> wide;
#pragma unroll
  for (int k = 0; k < K; ++k) wide.v[k] = static_cast<double>(sums.v[k]);
  return wide;
}

// Long runs of one scale: a team of threads walks [begin, end) pack by pack; the packs that overlap its ends are read
// element by element, so that odd sizes stay wide in the middle.
template <int N, class F, class In, class Out>
__global__ void __launch_bounds__(kBlock, blocks_at_once<F>)
    reduce_runs_kernel(int64_t, Geometry g, ReducePlan p, F f, In in, Out out, typename F::Compute* partials) {
  const int teams = kBlock / p.team;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * teams + static_cast<int>(threadIdx.x) / p.team;
  const int rank = static_cast<int>(threadIdx.x) % p.team;
  const bool busy = unit < g.channels * p.parts;
  const int64_t part = unit / g.channels;  // neighbouring teams take neighbouring scales: neighbouring memory
  const int64_t channel = unit % g.channels;
  Sums<typename F::Compute, F::sums> sums{};
  if (busy) {
    const int64_t first = part / p.chunks_per_run * p.rows;
    const int64_t last = least(first + p.rows, g.outer);
    const int64_t skip = part % p.chunks_per_run * p.chunk;
    open(f);
    const auto group = f.group(channel);
    [[maybe_unused]] const auto of_packs = pack_group(f, channel);
    for (int64_t row = first; row < last; ++row) {
      const int64_t run = (row * g.channels + channel) * g.inner;
      const Range piece{run + skip, least(run + skip + p.chunk, run + g.inner)};
      for (int64_t at = (piece.begin / N + rank) * N; at < piece.end; at += static_cast<int64_t>(p.team) * N) {
        const auto loaded = load_packs<N>(in, at, piece);
        const auto own = pack_of<N>(f, at);
        packs_of<N, Out> result;
        const bool whole = piece.holds_all(at, N);
        if (takes_packs(f) && whole) {
          apply_all(f, loaded, result, own, of_packs, sums);
        } else if (!long_body<F> && whole) {
#pragma unroll
          for (int i = 0; i < N; ++i) apply(f, i, loaded, result, own, group, sums);
        } else {
          const Lanes lanes = piece.lanes(at, N);
#pragma unroll
          for (int i = 0; i < N; ++i) {
            if (lanes.holds(i)) apply(f, i, loaded, result, own, group, sums);
          }
        }
        store_packs(out, at, piece, result);
      }
    }
  }
  combine_team<F>(sums, p.team);
  if (!busy || rank != 0) return;
  constexpr int of_scale = finish_of<F>::sums;
  if constexpr (of_scale < F::sums) f.total(unit, sums);
  if (p.direct(g)) {
    f.finish(channel, widen<of_scale>(sums));
  } else {
#pragma unroll
    for (int k = 0; k < of_scale; ++k) {
      if (k >= used_sums(f)) break;
      partials[k * p.partials() + part * p.width + channel] = sums.v[k];
      platform::count_written(sizeof(sums.v[k]));
    }
  }
}

// Scales that alternate along memory (channels last, short runs): a thread owns N neighbouring columns of the matrix
// [rows, width], whose scales never change, and walks down its share of the rows. Sums over all scales are formed row
// by row, so that they cost one register each, and joined over the block.
template <int N, class F, class In, class Out>
__global__ void __launch_bounds__(kBlock, column_blocks_at_once<F>)
    reduce_columns_kernel(int64_t n, Geometry g, ReducePlan p, F f, In in, Out out, typename F::Compute* partials) {
  using C = typename F::Compute;
  constexpr int of_scale = finish_of<F>::sums;
  constexpr bool totals = of_scale < F::sums;
  const int64_t column_blocks = ceil_div(p.width, kBlock * N);
  const int64_t part = blockIdx.x / column_blocks;
  const int64_t column = (blockIdx.x % column_blocks * kBlock + threadIdx.x) * N;
  const bool busy = column < p.width;
  if (!totals && !busy) return;
  decltype(compact_group(f, 0)) group[N];
  Position position = Locator(g, column).base;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    group[i] = compact_group(f, position.channel);
    position.advance(g);
  }
  Sums<C, of_scale> sums[N]{};
  Sums<C, F::sums> total{};
  const Range all{0, n};
  open(f);
  const int64_t last = busy ? (part + 1) * p.rows : 0;
  for (int64_t row = part * p.rows; row < last; ++row) {
    const int64_t at = row * p.width + column;
    if (at >= all.end) break;
    const auto loaded = load_packs<N>(in, at, all);
    const auto own = pack_of<N>(f, at);
    packs_of<N, Out> result;
    Sums<C, F::sums> of_row{};
    const auto element = [&](int i) {
#pragma unroll
      for (int k = 0; k < of_scale; ++k) of_row.v[k] = sums[i].v[k];
      apply(f, i, loaded, result, own, group[i], of_row);
#pragma unroll
      for (int k = 0; k < of_scale; ++k) sums[i].v[k] = of_row.v[k];
    };
    if (!long_body<F> && all.holds_all(at, N)) {
#pragma unroll
      for (int i = 0; i < N; ++i) element(i);
    } else {
      const Lanes lanes = all.lanes(at, N);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (lanes.holds(i)) element(i);
      }
    }
#pragma unroll
    for (int k = of_scale; k < F::sums; ++k) total.v[k] = F::combine(total.v[k], of_row.v[k]);
    store_packs(out, at, all, result);
  }
  if constexpr (totals) {
    Sums<C, F::sums - of_scale> of_block;
#pragma unroll
    for (int k = of_scale; k < F::sums; ++k) of_block.v[k - of_scale] = total.v[k];
    combine_team<F>(of_block, kBlock);
#pragma unroll
    for (int k = of_scale; k < F::sums; ++k) total.v[k] = of_block.v[k - of_scale];
    if (threadIdx.x == 0) f.total(blockIdx.x, total);
    if (!busy) return;
  }
  if (p.direct(g)) {
#pragma unroll
    for (int i = 0; i < N; ++i) f.finish(column + i, widen<of_scale>(sums[i]));
    return;
  }
#pragma unroll
  for (int k = 0; k < of_scale; ++k) {
    if (k >= used_sums(f)) break;
    Pack<C, N> row;
#pragma unroll
    for (int i = 0; i < N; ++i) row.v[i] = sums[i].v[k];
    const int64_t at = k * p.partials() + part * p.width + column;
    store_pack(partials, at, Range{at, at + N}, row);
  }
}

// How the second pass shares out the partial sums: `lanes` threads a scale, more for more terms; neighbours are lanes
// of one scale where its terms lie side by side, else scales.
struct FinishPlan {
  int lanes;
  bool along;
  int64_t blocks;

  FinishPlan(const Geometry& g, const ReducePlan& p) {
    constexpr int64_t terms_of_lane = 16;
    along = p.columns && g.inner > 1;
    const int64_t terms = p.parts * p.fold * (p.columns ? g.inner : 1);
    lanes = kBlock / kWarp;
    while (lanes < kBlock && (lanes * terms_of_lane < terms || kBlock / lanes > g.channels)) lanes *= 2;
    blocks = ceil_div(g.channels, kBlock / lanes);
  }
};

// Where a thread of a block stands in it.
struct FinishPlace {
  int column, lane, step;  // step: from a lane to the next

  __device__ __forceinline__ FinishPlace(int lanes, bool along) {
    const int thread = static_cast<int>(threadIdx.x), columns = kBlock / lanes;
    column = along ? thread / lanes : thread % columns;
    lane = along ? thread % lanes : thread / columns;
    step = along ? 1 : columns;
  }
};

// The second pass over the partial results of each scale.
template <class F>
__global__ void __launch_bounds__(kBlock, finish_blocks_at_once<F>)
    reduce_finish_kernel(Geometry g, ReducePlan p, F f, int lanes, bool along, const typename F::Compute* partials) {
  __shared__ double of_thread[F::sums][kBlock];
  const FinishPlace place(lanes, along);
  const int lane = place.lane;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * (kBlock / lanes) + place.column;
  const int64_t inner = p.columns ? g.inner : 1;
  const int64_t terms = channel < g.channels ? p.parts * p.fold * inner : 0;
  Sums<double, F::sums> sums{};
#pragma unroll 4
  for (int64_t t = lane; t < terms; t += lanes) {
    const int64_t period = t / inner;  // part * fold + period within the row
    const int64_t at = (period * g.channels + channel) * inner + t % inner;
#pragma unroll
    for (int k = 0; k < F::sums; ++k) {
      if (k >= used_sums(f)) break;
      sums.v[k] = F::combine(sums.v[k], static_cast<double>(partials[k * p.partials() + at]));
      platform::count_read(sizeof(partials[0]));
    }
  }
#pragma unroll
  for (int k = 0; k < F::sums; ++k) of_thread[k][threadIdx.x] = sums.v[k];
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    __syncthreads();
    if (lane >= distance) continue;
#pragma unroll
    for (int k = 0; k < F::sums; ++k) {
      of_thread[k][threadIdx.x] =
          F::combine(of_thread[k][threadIdx.x], of_thread[k][threadIdx.x + distance * place.step]);
    }
  }
  if (lane != 0 || channel >= g.channels) return;
#pragma unroll
  for (int k = 0; k < F::sums; ++k) sums.v[k] = of_thread[k][threadIdx.x];
  f.finish(channel, sums);
}

// For an empty tensor every sum is 0 and still written.
template <int N, class F, class In, class Out>
cudaError_t launch_reduce(const Geometry& g, const F& f, const In& in, const Out& out, void* workspace,
                          cudaStream_t stream) {
  if (g.channels == 0) return cudaSuccess;
  if (!aligned(in) || !aligned(out)) return cudaErrorMisalignedAddress;
  auto* partials = static_cast<typename F::Compute*>(workspace);
  ReducePlan p{};
  if (g.numel() > 0) {
    p = plan_reduce(g, N);
    if (!p.direct(g) && !workspace) return cudaErrorInvalidValue;
    const int64_t blocks =
        p.columns ? p.parts * ceil_div(p.width, kBlock * N) : ceil_div(g.channels * p.parts, kBlock / p.team);
    const auto kernel = p.columns ? reduce_columns_kernel<N, F, In, Out> : reduce_runs_kernel<N, F, In, Out>;
    const cudaError_t error = launch(kernel, blocks, kBlock, stream, g.numel(), g, p, f, in, out, partials);
    if (error != cudaSuccess || p.direct(g)) return error;
  }
  const FinishPlan finish(g, p);
  return launch(reduce_finish_kernel<finish_of<F>>, finish.blocks, kBlock, stream, g, p,
                static_cast<const finish_of<F>&>(f), finish.lanes, finish.along, partials);
}

template <int N, class F>
int64_t reduce_workspace(const Geometry& g) {
  if (g.numel() == 0) return 0;
  const ReducePlan p = plan_reduce(g, N);
  return p.direct(g) ? 0 : finish_of<F>::sums * p.partials() * static_cast<int64_t>(sizeof(typename F::Compute));
}

// Pieces of which the first kernel hands each its total().
template <int N>
int64_t reduce_units(const Geometry& g) {
  if (g.numel() == 0) return 0;
  const ReducePlan p = plan_reduce(g, N);
  return p.parts * (p.columns ? ceil_div(p.width, kBlock * N) : g.channels);
}

// Functor: the sums of the rows of a matrix [channels, inner] of C, to one Out each.
template <class C, class Out = C>
struct RowSum {
  using Compute = C;
  static constexpr int sums = 1;
  Out* result;

  __device__ __forceinline__ int group(int64_t) const { return 0; }

  template <class T>
  __device__ __forceinline__ static T combine(T a, T b) {
    return a + b;
  }

  __device__ __forceinline__ void operator()(int, Sums<C, 1>& sum, C v) const { sum.v[0] = sum.v[0] + v; }

  __device__ __forceinline__ void finish(int64_t row, const Sums<double, 1>& sum) const {
    result[row] = static_cast<Out>(sum.v[0]);
  }
};

}  // namespace fastflat::cuda
