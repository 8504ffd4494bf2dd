// SPDX-License-Identifier: Apache-2.0
// A thread owns N elements of w and walks down their planes, so that sums stay in registers and nothing of the planes'
// size is written but the two gradients. The number of planes is known at run time only: no skeleton has that many
// streams.
#include "cuda/bitplane.h"

#include "cuda/launch.cuh"
#include "cuda/storage.cuh"
#include "math/bitplane.h"
#include "math/convert.h"

namespace fastflat::cuda {
namespace {

constexpr int kWarps = kBlock / kWarp;
constexpr int64_t kMostPieces = 4096;  // blocks of the backward pass: several waves of the largest GPU

template <class P>
struct Planes {
  using C = compute_t<P>;
  const P* p;
  const P* q;
  const C* m;
  const C* scale;
  const C* beta;
  int64_t n;
  int planes;
  bool hard_w, hard_m;

  explicit Planes(const BitplaneArguments& a)
      : p(static_cast<const P*>(a.p)),
        q(static_cast<const P*>(a.q)),
        m(static_cast<const C*>(a.m)),
        scale(static_cast<const C*>(a.scale)),
        beta(static_cast<const C*>(a.beta)),
        n(a.n),
        planes(a.planes),
        hard_w(a.hard_w),
        hard_m(a.hard_m) {}

  __device__ __forceinline__ BitPlanes<C> form() const {
    return BitPlanes<C>::make(planes, load_parameter(scale, 0), load_parameter(beta, 0));
  }
};

// The N elements of a thread: neighbours, 16 bytes at a time, where each plane starts on a pack; else one from each
// row of kBlock, so that neighbouring threads still read neighbours.
template <int N>
struct Tile {
  int64_t n, base;
  bool wide;

  __device__ __forceinline__ Tile(int64_t n_, int64_t index) : n(n_), base(index * kBlock * N), wide(n_ % N == 0) {}

  template <class T>
  __device__ __forceinline__ Pack<T, N> load(const T* from, int64_t plane) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (wide) return load_pack<N>(from + plane * n, base + thread * N, Range{0, n});
    Pack<T, N> pack{};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t at = base + i * kBlock + thread;
      if (at >= n) continue;
      pack.v[i] = from[plane * n + at];
      platform::count_read(sizeof(T));
    }
    return pack;
  }

  template <class T>
  __device__ __forceinline__ void store(T* to, int64_t plane, const Pack<T, N>& pack) const {
    const int thread = static_cast<int>(threadIdx.x);
    if (wide) return store_pack(to + plane * n, base + thread * N, Range{0, n}, pack);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t at = base + i * kBlock + thread;
      if (at >= n) continue;
      to[plane * n + at] = pack.v[i];
      platform::count_written(sizeof(T));
    }
  }
};

template <int N, class P, class W>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce) bitplane_kernel(Planes<P> a, W* w) {
  using C = compute_t<P>;
  __shared__ Plane<C> plane[most_planes];
  const BitPlanes<C> form = a.form();
  if (static_cast<int>(threadIdx.x) < a.planes) {
    plane[threadIdx.x] = form.plane(static_cast<int>(threadIdx.x), load_parameter(a.m, threadIdx.x), a.hard_m);
  }
  __syncthreads();
  const Tile<N> tile(a.n, blockIdx.x);
  C sum[N]{};
  for (int b = 0; b < a.planes; ++b) {
    const auto p = tile.load(a.p, b), q = tile.load(a.q, b);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = form.add(sum[i], plane[b], load(p.v[i]), load(q.v[i]), a.hard_w);
  }
  Pack<W, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.v[i] = store<W>(form.weight(sum[i]));
  tile.store(w, 0, result);
}

template <int N, class P, class W>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce)
    bitplane_bwd_kernel(Planes<P> a, int64_t steps, const W* gw, P* gp, P* gq, compute_t<P>* partials) {
  using C = compute_t<P>;
  __shared__ Plane<C> plane[most_planes];
  __shared__ C sums[most_planes][kWarps];
  const BitPlanes<C> form = a.form();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  if (thread < a.planes) plane[thread] = form.plane(thread, load_parameter(a.m, thread), a.hard_m);
  if (thread < most_planes * kWarps) sums[thread / kWarps][thread % kWarps] = C(0);
  __syncthreads();
  for (int64_t step = 0; step < steps; ++step) {
    const Tile<N> tile(a.n, blockIdx.x * steps + step);
    if (tile.base >= a.n) break;
    const auto raw = tile.load(gw, 0);
    for (int b = 0; b < a.planes; ++b) {
      const auto p = tile.load(a.p, b), q = tile.load(a.q, b);
      Pack<P, N> of_p, of_q;
      C share = C(0);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const auto gradient = form.backward(plane[b], load(raw.v[i]), load(p.v[i]), load(q.v[i]), a.hard_w);
        of_p.v[i] = store<P>(gradient.p);
        of_q.v[i] = store<P>(gradient.q);
        share += gradient.share;
      }
      tile.store(gp, b, of_p);
      tile.store(gq, b, of_q);
      for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        share += __shfl_xor_sync(0xffffffffu, share, distance);
      }
      if (thread % kWarp == 0) sums[b][warp] += share;
    }
  }
  __syncthreads();
  if (thread >= a.planes) return;
  C total = sums[thread][0];
  for (int w = 1; w < kWarps; ++w) total += sums[thread][w];
  partials[thread * static_cast<int64_t>(gridDim.x) + blockIdx.x] = total;
  platform::count_written(sizeof(C));
}

// One block: a warp adds up the partial sums of a plane, one after another.
template <class P>
__global__ void __launch_bounds__(kBlock)
    bitplane_finish_kernel(Planes<P> a, int64_t pieces, const compute_t<P>* partials, compute_t<P>* gm,
                           compute_t<P>* gs) {
  using C = compute_t<P>;
  __shared__ double sums[most_planes];
  const BitPlanes<C> form = a.form();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  for (int b = thread / kWarp; b < a.planes; b += kWarps) {
    double sum = 0;
    for (int64_t piece = lane; piece < pieces; piece += kWarp) {
      sum += static_cast<double>(partials[b * pieces + piece]);
      platform::count_read(sizeof(C));
    }
    for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) sums[b] = sum;
  }
  __syncthreads();
  if (thread != 0) return;
  double total = 0;
  for (int b = 0; b < a.planes; ++b) {
    const Plane<C> plane = form.plane(b, load_parameter(a.m, b), a.hard_m);
    gm[b] = form.mask_gradient(plane, sums[b], a.hard_m);
    total += form.scale_share(plane, sums[b]);
  }
  *gs = form.scale_gradient(total);
}

template <int N, class P, class W>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce)
    bitplane_jvp_kernel(Planes<P> a, const P* tp, const P* tq, const compute_t<P>* tm, const compute_t<P>* ts, W* tw) {
  using C = compute_t<P>;
  __shared__ Plane<C> plane[most_planes];
  __shared__ C lift[most_planes];
  const BitPlanes<C> form = a.form();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < a.planes) {
    plane[thread] = form.plane(thread, load_parameter(a.m, thread), a.hard_m);
    lift[thread] = form.lift(plane[thread], tm ? load_parameter(tm, thread) : C(0), ts ? load_parameter(ts, 0) : C(0));
  }
  __syncthreads();
  const Tile<N> tile(a.n, blockIdx.x);
  C sum[N]{};
  for (int b = 0; b < a.planes; ++b) {
    const auto p = tile.load(a.p, b), q = tile.load(a.q, b);
    const Pack<P, N> dp = tp ? tile.load(tp, b) : Pack<P, N>{}, dq = tq ? tile.load(tq, b) : Pack<P, N>{};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum[i] = form.add_tangent(sum[i], plane[b], lift[b], load(dp.v[i]), load(dq.v[i]), load(p.v[i]), load(q.v[i]),
                                a.hard_w);
    }
  }
  Pack<W, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.v[i] = store<W>(sum[i]);
  tile.store(tw, 0, result);
}

bool on_packs(const BitplaneArguments& a, const void* x, const void* y = nullptr, const void* z = nullptr) {
  return (address(a.p) | address(a.q) | address(x) | address(y) | address(z)) % kAccess == 0;
}

// How the backward pass is cut: a function of shape and types alone, and so is the order of its sums.
struct Pieces {
  int64_t count, steps;

  Pieces(int64_t n, int pack) {
    const int64_t tiles = ceil_div(n, static_cast<int64_t>(kBlock) * pack);
    steps = ceil_div(tiles, kMostPieces);
    count = tiles == 0 ? 0 : ceil_div(tiles, steps);
  }
};

}  // namespace

ErrorCode launch_bitplane(Pair pair, const BitplaneArguments& a, void* w, StreamHandle stream) {
  if (!on_packs(a, w)) return cudaErrorMisalignedAddress;
  return with_types(pair, [&](auto planes, auto weight) {
    using P = type_of<decltype(planes)>;
    using W = type_of<decltype(weight)>;
    constexpr int pack = pack_width<P, W>;
    return launch(bitplane_kernel<pack, P, W>, ceil_div(a.n, kBlock * pack), kBlock, native(stream), Planes<P>(a),
                  static_cast<W*>(w));
  });
}

ErrorCode launch_bitplane_bwd(Pair pair, const BitplaneArguments& a, const void* gw, void* gp, void* gq, void* gm,
                              void* gs, void* workspace, StreamHandle stream) {
  if (!on_packs(a, gw, gp, gq)) return cudaErrorMisalignedAddress;
  return with_types(pair, [&](auto planes, auto weight) {
    using P = type_of<decltype(planes)>;
    using W = type_of<decltype(weight)>;
    using C = compute_t<P>;
    constexpr int pack = pack_width<P, W>;
    const Planes<P> arguments(a);
    const Pieces pieces(a.n, pack);
    C* partials = static_cast<C*>(workspace);
    const cudaError_t error =
        launch(bitplane_bwd_kernel<pack, P, W>, pieces.count, kBlock, native(stream), arguments, pieces.steps,
               static_cast<const W*>(gw), static_cast<P*>(gp), static_cast<P*>(gq), partials);
    if (error != cudaSuccess) return error;
    return launch(bitplane_finish_kernel<P>, 1, kBlock, native(stream), arguments, pieces.count,
                  static_cast<const C*>(partials), static_cast<C*>(gm), static_cast<C*>(gs));
  });
}

int64_t bitplane_bwd_workspace(Pair pair, const BitplaneArguments& a) {
  int64_t bytes = 0;
  with_types(pair, [&](auto planes, auto weight) {
    using P = type_of<decltype(planes)>;
    const Pieces pieces(a.n, pack_width<P, type_of<decltype(weight)>>);
    bytes = pieces.count * a.planes * static_cast<int64_t>(sizeof(compute_t<P>));
    return cudaSuccess;
  });
  return bytes;
}

ErrorCode launch_bitplane_jvp(Pair pair, const BitplaneArguments& a, const void* tp, const void* tq, const void* tm,
                              const void* ts, void* tw, StreamHandle stream) {
  if (!on_packs(a, tp, tq, tw)) return cudaErrorMisalignedAddress;
  return with_types(pair, [&](auto planes, auto weight) {
    using P = type_of<decltype(planes)>;
    using W = type_of<decltype(weight)>;
    using C = compute_t<P>;
    constexpr int pack = pack_width<P, W>;
    return launch(bitplane_jvp_kernel<pack, P, W>, ceil_div(a.n, kBlock * pack), kBlock, native(stream), Planes<P>(a),
                  static_cast<const P*>(tp), static_cast<const P*>(tq), static_cast<const C*>(tm),
                  static_cast<const C*>(ts), static_cast<W*>(tw));
  });
}

}  // namespace fastflat::cuda
