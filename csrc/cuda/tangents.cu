// SPDX-License-Identifier: Apache-2.0
// A thread keeps what it reads of the primals in registers and walks through the tangents.
#include "cuda/tangents.h"

#include "cuda/reduce.cuh"
#include "cuda/storage.cuh"
#include "math/tangents.h"

namespace fastflat::cuda {
namespace {

constexpr int64_t kCombineBlocks = 1024;  // fewer leave parts of a GPU idle: then blocks share out the tangents, too
constexpr int64_t kLeastTangents = 4;     // of a block that shares them

__device__ __forceinline__ int64_t elements(const Geometry& g) { return g.outer * g.channels * g.inner; }

template <class C>
__device__ __forceinline__ TangentFactors<C> factors_of(int kind, C p, C g) {
  switch (kind) {
    case sigmoid_output:
      return SigmoidFactors{}(p, g);
    case tanh_output:
      return TanhFactors{}(p, g);
    case silu_input:
      return SiluFactors{}(p, g);
    case gelu_input:
      return GeluFactors{}(p, g);
    case gelu_tanh_input:
      return GeluTanhFactors{}(p, g);
    default:
      return ReluFactors{}(p, g);
  }
}

// A sum of terms, of which the first is taken as it is.
template <class C>
struct TermSum {
  C value{};
  bool started = false;

  __device__ __forceinline__ void add(C term) {
    value = started ? value + term : term;
    started = true;
  }
};

// `first` and `second`: p0 and p1 where they are numbers of channels.
template <class T, class C = compute_t<T>>
__global__ void __launch_bounds__(kBlock, 2)
    combine_kernel(const T* t0, const T* p0, const T* t1, const T* p1, const T* f0, const C* r0, const T* f1,
                   const C* r1, const C* shift, const T* mask, const C* first, const C* second, T* out, int kind,
                   Geometry g, int64_t count, int64_t splits, bool wide_primals, bool wide_tangents) {
  constexpr int N = kAccess / sizeof(T);
  const int64_t n = elements(g), tile = blockIdx.x / splits * (kBlock * N);
  const int local = static_cast<int>(threadIdx.x) * N;
  const int64_t at = tile + local;
  if (at >= n) return;
  const Range all{0, n};
  const Position start = g.channels > 1 ? Locator(g, tile).at(local) : Position{0, 0};
  const bool one_channel = g.channels == 1 || g.inner % N == 0;
  const auto primal = [&](const T* from) __attribute__((always_inline)) {
    return load_pack<N>(from, at, from ? all : Range{0, 0}, wide_primals);
  };
  const auto tangent = [&](const T* of, int64_t k) __attribute__((always_inline)) {
    return load_pack<N>(of ? of + k * n : of, at, of ? all : Range{0, 0}, wide_tangents);
  };
  C a0[N], a1[N];
  {
    const Pack<T, N> of_p0 = primal(p0), of_p1 = primal(p1);
    Position position = start;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      a0[i] = load(of_p0.v[i]);
      a1[i] = load(of_p1.v[i]);
      if (first) a0[i] = load_parameter(first, position.channel);
      if (second) a1[i] = load_parameter(second, position.channel);
      if (kind != given) {
        const TangentFactors<C> f = factors_of(kind, a0[i], a1[i]);
        a0[i] = f.first;
        a1[i] = f.second;
      }
      if (!one_channel) position.advance(g);
    }
  }
  const bool by_first = p0 || first, by_second = p1 || second;
  const Pack<T, N> of_f0 = primal(f0), of_f1 = primal(f1), of_mask = primal(mask);
  const int64_t share = ceil_div(count, splits), from = blockIdx.x % splits * share;
  const int64_t until = least(count, from + share);
  for (int64_t k = from; k < until; ++k) {
    const Pack<T, N> of_t0 = tangent(t0, k);
    const Pack<T, N> of_t1 = tangent(t1, k);
    const int64_t row = k * g.channels;
    Position position = start;
    Pack<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int64_t number = row + position.channel;
      TermSum<C> sum;
      if (t0) sum.add(by_first ? a0[i] * load(of_t0.v[i]) : load(of_t0.v[i]));
      if (t1) sum.add(by_second ? a1[i] * load(of_t1.v[i]) : load(of_t1.v[i]));
      if (r0) sum.add(load(of_f0.v[i]) * load_parameter(r0, number));
      if (r1) sum.add(load(of_f1.v[i]) * load_parameter(r1, number));
      if (shift) sum.add(load_parameter(shift, number));
      if (mask) sum.value = sum.value * load(of_mask.v[i]);
      result.v[i] = store<T>(sum.value);
      if (!one_channel) position.advance(g);
    }
    store_pack(out + k * n, at, all, result, wide_tangents);
  }
}

// Whether packs of each of `count` arrays of n elements lie on 16 bytes; an absent one does.
template <class T>
bool on_packs(const void* from, int64_t n, int64_t count) {
  return address(from) % kAccess == 0 && (count == 1 || n * sizeof(T) % kAccess == 0);
}

// Tangents whose sums a thread forms at once.
template <class T>
inline constexpr int sums_at_once = sizeof(T) == 2 ? 2 : 4;

template <class T>
struct SumsArguments {
  const T *t0, *p0, *t1, *p1, *mask;
  T* mapped;
  bool wide_primals, wide_tangents;
};

struct Plus {
  template <class C>
  __device__ __forceinline__ static C combine(C a, C b) {
    return a + b;
  }
};

// Packs of the primals at `at`, then of each tangent k0 + v < count: add(v, i, term of the dot, t0).
template <int N, int V, class T, class Add>
__device__ __forceinline__ void walk_tangents(const SumsArguments<T>& a, int64_t n, int64_t k0, int64_t count,
                                              int64_t at, Range valid, const Add& add) {
  const Range none{0, 0};
  const Pack<T, N> p0 = load_pack<N>(a.p0, at, a.p0 ? valid : none, a.wide_primals);
  const Pack<T, N> p1 = load_pack<N>(a.p1, at, a.p1 ? valid : none, a.wide_primals);
  const Pack<T, N> mask = load_pack<N>(a.mask, at, a.mask ? valid : none, a.wide_primals);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (k0 + v >= count) continue;
    const int64_t row = (k0 + v) * n;
    const Pack<T, N> t0 = load_pack<N>(a.t0 + row, at, valid, a.wide_tangents);
    const Pack<T, N> t1 = load_pack<N>(a.t1 ? a.t1 + row : a.t1, at, a.t1 ? valid : none, a.wide_tangents);
    Pack<T, N> mapped;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const auto t = load(t0.v[i]);
      auto dot = t * load(p0.v[i]);
      if (a.t1) dot = dot + load(t1.v[i]) * load(p1.v[i]);
      add(v, i, dot, t);
      mapped.v[i] = store<T>(t * load(mask.v[i]));
    }
    if (a.mask) store_pack(a.mapped + row, at, valid, mapped, a.wide_tangents);
  }
}

// Long runs of one channel, or few: as reduce_runs_kernel has it, with V tangents. Neighbouring blocks share what they
// read. Partial sums are [count, parts, channels].
template <class T, int V, class C = compute_t<T>>
__global__ void __launch_bounds__(kBlock, 2)
    sums_of_runs_kernel(SumsArguments<T> a, Geometry g, ReducePlan p, int64_t count, C* dots, C* totals) {
  constexpr int N = kAccess / sizeof(T);
  const int64_t groups = ceil_div(count, V), k0 = blockIdx.x % groups * V;
  const int64_t unit = blockIdx.x / groups * (kBlock / p.team) + static_cast<int>(threadIdx.x) / p.team;
  const int rank = static_cast<int>(threadIdx.x) % p.team;
  const int64_t part = unit / g.channels, channel = unit % g.channels;
  const bool busy = part < p.parts;
  Sums<C, 2 * V> sums{};
  if (busy) {
    const int64_t first = part / p.chunks_per_run * p.rows, last = least(first + p.rows, g.outer);
    const int64_t skip = part % p.chunks_per_run * p.chunk;
    for (int64_t row = first; row < last; ++row) {
      const int64_t run = (row * g.channels + channel) * g.inner;
      const Range piece{run + skip, least(run + skip + p.chunk, run + g.inner)};
      for (int64_t at = (piece.begin / N + rank) * N; at < piece.end; at += static_cast<int64_t>(p.team) * N) {
        walk_tangents<N, V>(a, elements(g), k0, count, at, piece, [&](int v, int, C dot, C t) {
          sums.v[v] = sums.v[v] + dot;
          sums.v[V + v] = sums.v[V + v] + t;
        });
      }
    }
  }
  combine_team<Plus>(sums, p.team);
  if (!busy || rank != 0) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (k0 + v >= count) continue;
    const int64_t to = ((k0 + v) * p.parts + part) * g.channels + channel;
    if (dots) dots[to] = sums.v[v];
    if (totals) totals[to] = sums.v[V + v];
    platform::count_written(sizeof(C) * ((dots != nullptr) + (totals != nullptr)));
  }
}

// Channels that alternate along memory: a thread owns N neighbouring columns and walks down its share of the rows, as
// in reduce_columns_kernel. Partial sums are [count, parts, width].
template <class T, int V, class C = compute_t<T>>
__global__ void __launch_bounds__(kBlock, 2)
    sums_of_columns_kernel(SumsArguments<T> a, Geometry g, ReducePlan p, int64_t count, C* dots, C* totals) {
  constexpr int N = kAccess / sizeof(T);
  const int64_t groups = ceil_div(count, V), k0 = blockIdx.x % groups * V;
  const int64_t column_blocks = ceil_div(p.width, kBlock * N), part = blockIdx.x / groups / column_blocks;
  const int64_t column = (blockIdx.x / groups % column_blocks * kBlock + static_cast<int>(threadIdx.x)) * N;
  if (column >= p.width) return;
  const Range all{0, elements(g)};
  Pack<C, N> dot[V]{}, total[V]{};
  for (int64_t row = part * p.rows; row < (part + 1) * p.rows; ++row) {
    const int64_t at = row * p.width + column;
    if (at >= all.end) break;
    walk_tangents<N, V>(a, all.end, k0, count, at, all, [&](int v, int i, C term, C t) {
      dot[v].v[i] = dot[v].v[i] + term;
      total[v].v[i] = total[v].v[i] + t;
    });
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (k0 + v >= count) continue;
    const int64_t to = ((k0 + v) * p.parts + part) * p.width + column;
    const Range own{to, to + N};
    if (dots) store_pack(dots, to, own, dot[v]);
    if (totals) store_pack(totals, to, own, total[v]);
  }
}

// The numbers of one channel and tangent from their partial sums, in fp64.
template <class C>
__global__ void __launch_bounds__(kBlock)
    sums_finish_kernel(Geometry g, ReducePlan p, int lanes, bool along, int64_t blocks, const C* partials, C* result) {
  __shared__ double of_thread[kBlock];
  const FinishPlace place(lanes, along);
  const int lane = place.lane;
  const int64_t k = blockIdx.x / blocks, channel = blockIdx.x % blocks * (kBlock / lanes) + place.column;
  const int64_t inner = p.columns ? g.inner : 1;
  const int64_t terms = channel < g.channels ? p.parts * p.fold * inner : 0;
  double sum = 0;
#pragma unroll 4
  for (int64_t t = lane; t < terms; t += lanes) {
    const int64_t at = (t / inner * g.channels + channel) * inner + t % inner;
    sum = sum + static_cast<double>(partials[k * p.partials() + at]);
    platform::count_read(sizeof(C));
  }
  of_thread[threadIdx.x] = sum;
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    __syncthreads();
    if (lane < distance)
      of_thread[threadIdx.x] = of_thread[threadIdx.x] + of_thread[threadIdx.x + distance * place.step];
  }
  if (lane == 0 && channel < g.channels) result[k * g.channels + channel] = static_cast<C>(of_thread[threadIdx.x]);
}

template <class T, int V, class C = compute_t<T>>
cudaError_t launch_sums(const SumsCall& call, const ReducePlan& p, C* dots, C* totals, cudaStream_t stream) {
  const Geometry& g = call.geometry;
  constexpr int N = kAccess / sizeof(T);
  bool wide_primals = true, wide_tangents = true;
  for (const void* primal : {call.p0, call.p1, call.mask}) wide_primals &= on_packs<T>(primal, g.numel(), 1);
  for (const void* tangent : {call.t0, call.t1, static_cast<const void*>(call.mask ? call.mapped : nullptr)}) {
    wide_tangents &= on_packs<T>(tangent, g.numel(), call.count);
  }
  const SumsArguments<T> a{input<T>(call.t0),   input<T>(call.p0),      input<T>(call.t1), input<T>(call.p1),
                           input<T>(call.mask), output<T>(call.mapped), wide_primals,      wide_tangents};
  const int64_t units =
      p.columns ? p.parts * ceil_div(p.width, kBlock * N) : ceil_div(g.channels * p.parts, kBlock / p.team);
  const auto kernel = p.columns ? sums_of_columns_kernel<T, V> : sums_of_runs_kernel<T, V>;
  return launch(kernel, units * ceil_div(call.count, V), kBlock, stream, a, g, p, call.count, dots, totals);
}

ReducePlan plan_of(const SumsCall& call) {
  return plan_reduce(call.geometry, static_cast<int>(kAccess / storage_bytes(call.storage)));
}

}  // namespace

ErrorCode launch_tangents_combine(const CombineCall& call, StreamHandle stream) {
  const Geometry& g = call.geometry;
  if (g.numel() == 0 || call.count == 0) return cudaSuccess;
  return with_types(static_cast<Pair>(call.storage), [&](auto of_t, auto) {
    using T = type_of<decltype(of_t)>;
    using C = compute_t<T>;
    bool wide_primals = true, wide_tangents = true;
    const auto primal = [&](const void* from) {
      wide_primals &= on_packs<T>(from, g.numel(), 1);
      return input<T>(from);
    };
    const auto tangent = [&](const void* from) {
      wide_tangents &= on_packs<T>(from, g.numel(), call.count);
      return input<T>(from);
    };
    const T* const p0 = primal(call.first_of_channel ? nullptr : call.p0);
    const T* const p1 = primal(call.second_of_channel ? nullptr : call.p1);
    const T *const f0 = primal(call.f0), *const f1 = primal(call.f1), *const mask = primal(call.mask);
    const T *const t0 = tangent(call.t0), *const t1 = tangent(call.t1);
    tangent(call.out);
    const C* const first = input<C>(call.first_of_channel ? call.p0 : nullptr);
    const C* const second = input<C>(call.second_of_channel ? call.p1 : nullptr);
    const int64_t tiles = ceil_div(g.numel(), kBlock * (kAccess / sizeof(T)));
    const int64_t wanted = clamp(ceil_div(kCombineBlocks, tiles), 1, ceil_div(call.count, kLeastTangents));
    const int64_t splits = ceil_div(call.count, ceil_div(call.count, wanted));
    return launch(combine_kernel<T>, tiles * splits, kBlock, native(stream), t0, p0, t1, p1, f0, input<C>(call.r0), f1,
                  input<C>(call.r1), input<C>(call.shift), mask, first, second, output<T>(call.out), call.kind, g,
                  call.count, splits, wide_primals, wide_tangents);
  });
}

int64_t tangents_sums_partials(const SumsCall& call) {
  if (call.geometry.numel() == 0) return 0;
  const ReducePlan p = plan_of(call);
  return p.direct(call.geometry) ? 0 : call.count * p.partials();
}

ErrorCode launch_tangents_sums(const SumsCall& call, void* partials, StreamHandle stream) {
  const Geometry& g = call.geometry;
  if (call.count == 0 || g.channels == 0) return cudaSuccess;
  return with_types(static_cast<Pair>(call.storage), [&](auto of_t, auto) -> cudaError_t {
    using T = type_of<decltype(of_t)>;
    using C = compute_t<T>;
    C *const dots = output<C>(call.dots), *const totals = output<C>(call.totals);
    C* const of_dots = output<C>(partials);
    C* const of_totals = of_dots + tangents_sums_partials(call);
    ReducePlan p{};
    if (g.numel() > 0) {
      p = plan_of(call);
      const bool direct = p.direct(g);
      C *const first = dots && !direct ? of_dots : dots, *const second = totals && !direct ? of_totals : totals;
      const auto launch_all = call.count == 1 ? launch_sums<T, 1> : launch_sums<T, sums_at_once<T>>;
      const cudaError_t error = launch_all(call, p, first, second, native(stream));
      if (error != cudaSuccess || direct) return error;
    }
    const FinishPlan plan(g, p);
    const auto finish = [&](const C* from, C* to) -> cudaError_t {
      if (!to) return cudaSuccess;
      return launch(sums_finish_kernel<C>, call.count * plan.blocks, kBlock, native(stream), g, p, plan.lanes,
                    plan.along, plan.blocks, from, to);
    };
    const cudaError_t error = finish(of_dots, dots);
    return error != cudaSuccess ? error : finish(of_totals, totals);
  });
}

}  // namespace fastflat::cuda
