// SPDX-License-Identifier: Apache-2.0
// A team of threads, some lanes of a warp or a whole block, has a row: it holds the primal values in registers and
// walks over the tangents. A row that does not fit is passed over twice for each of them.
#include "cuda/row_tangents.h"

#include "cuda/reduce.cuh"
#include "cuda/storage.cuh"
#include "math/row_tangents.h"

namespace fastflat::cuda {
namespace {

using namespace row_tangents;

// Packs of a row that a thread holds: F::held elements, half of them in double.
template <class F>
inline constexpr int held_packs = F::held / (sizeof(typename F::T) == 8 ? 2 : 1) / pack_width<typename F::T>;

// Blocks that fill any current GPU; with fewer, tangents are shared out among them, too.
constexpr int64_t kEnoughBlocks = 256;
// 128 registers a thread.
constexpr int kRowBlocksAtOnce = 2;

struct RowPlan {
  int team;        // threads of a row: a power of two up to a warp, or the block
  bool resident;   // a thread holds what it has of a row
  int64_t blocks;  // over rows
  int64_t share;   // tangents of a block
  int64_t groups;  // of tangents

  RowPlan(const RowTangentsCall& call, int pack, int held) {
    const int64_t packs = ceil_div(call.D, pack);
    team = 1;
    while (team < kWarp && team < packs) team *= 2;
    if (packs > static_cast<int64_t>(kWarp) * held) team = kBlock;
    resident = packs <= static_cast<int64_t>(team) * held;
    blocks = ceil_div(call.R, kBlock / team);
    share = ceil_div(call.K, clamp(ceil_div(kEnoughBlocks, blocks), 1, call.K));
    groups = ceil_div(call.K, share);
  }
};

// Where a pack lies.
struct Place {
  int64_t row, k, at;  // at: within the row
  int64_t of_row, of_tangent, of_channels;
  Range valid;
  bool wide;
};

template <class T, class P>
__device__ __forceinline__ Pack<T, pack_width<T>> fetch(const P* data, int64_t base, const Place& place) {
  return load_pack<pack_width<T>>(static_cast<const T*>(data) + (data ? base : 0), place.at,
                                  data ? place.valid : Range{0, 0}, place.wide);
}

template <class C>
__device__ __forceinline__ C number(const void* data, int64_t at, C absent = C(0)) {
  return data ? load_parameter(static_cast<const C*>(data), at) : absent;
}

// Adds up S numbers over a team. Buffers of two calls alternate: one barrier a call.
template <int S>
__device__ __forceinline__ void combine_row(Sums<double, S>& sums, int team, int& turn) {
  __shared__ double of_warp[2][kBlock / kWarp][S];
  for (int distance = (team < kWarp ? team : kWarp) / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int s = 0; s < S; ++s) sums.v[s] = sums.v[s] + __shfl_xor_sync(0xffffffffu, sums.v[s], distance);
  }
  if (team <= kWarp) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int s = 0; s < S; ++s) of_warp[turn][warp][s] = sums.v[s];
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < S; ++s) {
    double sum = of_warp[turn][0][s];
    for (int w = 1; w < kBlock / kWarp; ++w) sum = sum + of_warp[turn][w][s];
    sums.v[s] = sum;
  }
  turn ^= 1;
}

// A functor F has
//   T, Compute; static constexpr int primal_sums, sums, held
//   Primal primal(place), Tangent tangent(primal, place), Late late(place)        what a pack reads; the last for map()
//   void add_primal(primal, i, Sums<Compute, primal_sums>&)
//   Row row(r, means, D)                                                          of primal sums, those divided by D
//   Given given(r, k)                                                             what add() needs of a row
//   void add(given, primal, tangent, i, Sums<Compute, sums>&)
//   Final finish(row, given, Sums<double, sums>, D, place, bool writes)
//   Compute map(final, primal, tangent, late, i)
template <bool resident, class F>
__global__ void __launch_bounds__(kBlock, kRowBlocksAtOnce)
    row_tangents_kernel(F f, int64_t K, int64_t R, int64_t D, int team, int64_t row_blocks, int64_t share, bool wide) {
  using T = typename F::T;
  using C = typename F::Compute;
  constexpr int N = pack_width<T>, held = resident ? held_packs<F> : 1;
  const int64_t r =
      blockIdx.x % row_blocks * (kBlock / team) + static_cast<int>(threadIdx.x) / team;  // neighbours share channels
  const int64_t first = blockIdx.x / row_blocks * share, last = least(K, first + share);
  const int rank = static_cast<int>(threadIdx.x) % team;
  const bool busy = r < R;
  const int64_t row = busy ? r : 0;
  Place place{row, 0, static_cast<int64_t>(rank) * N, row * D, 0, 0, Range{0, busy ? D : 0}, wide};
  const int64_t begin = place.at, stride = static_cast<int64_t>(team) * N, end = place.valid.end;
  const double length = static_cast<double>(D > 0 ? D : 1);
  int turn = 0;

  typename F::Primal primal[held];
  if constexpr (resident) {
#pragma unroll
    for (int p = 0; p < held; ++p) {
      place.at = begin + p * stride;
      primal[p] = f.primal(place);
    }
  }
  Sums<double, F::primal_sums ? F::primal_sums : 1> of_primal{};
  if constexpr (F::primal_sums > 0) {
    const auto add = [&](const typename F::Primal& pack) {
      Sums<C, F::primal_sums> few{};
#pragma unroll
      for (int i = 0; i < N; ++i) f.add_primal(pack, i, few);
#pragma unroll
      for (int s = 0; s < F::primal_sums; ++s) of_primal.v[s] = of_primal.v[s] + static_cast<double>(few.v[s]);
    };
    if constexpr (resident) {
#pragma unroll
      for (int p = 0; p < held; ++p) add(primal[p]);
    } else {
      for (place.at = begin; place.at < end; place.at += stride) add(f.primal(place));
    }
    combine_row(of_primal, team, turn);
  }
  const auto of_row = f.row(row, of_primal, length);

  for (int64_t k = first; k < last; ++k) {
    place.k = k;
    place.of_tangent = (k * R + row) * D;
    place.of_channels = k * D;
    const auto given = f.given(row, k * R + row);
    Sums<double, F::sums> sums{};
    const auto add = [&](const typename F::Primal& pack, const typename F::Tangent& tangent) {
      Sums<C, F::sums> few{};
#pragma unroll
      for (int i = 0; i < N; ++i) f.add(given, pack, tangent, i, few);
#pragma unroll
      for (int s = 0; s < F::sums; ++s) sums.v[s] = sums.v[s] + static_cast<double>(few.v[s]);
    };
    const auto finish = [&](const auto& final, const typename F::Primal& pack, const typename F::Tangent& tangent) {
      const auto late = f.late(place);
      Pack<T, N> result;
#pragma unroll
      for (int i = 0; i < N; ++i) result.v[i] = store<T>(f.map(final, pack, tangent, late, i));
      store_pack(f.out + place.of_tangent, place.at, place.valid, result, wide);
    };
    if constexpr (resident) {
      typename F::Tangent tangent[held];
#pragma unroll
      for (int p = 0; p < held; ++p) {
        place.at = begin + p * stride;
        tangent[p] = f.tangent(primal[p], place);
      }
#pragma unroll
      for (int p = 0; p < held; ++p) add(primal[p], tangent[p]);
      combine_row(sums, team, turn);
      const auto final = f.finish(of_row, given, sums, length, k * R + row, busy && rank == 0);
#pragma unroll
      for (int p = 0; p < held; ++p) {
        place.at = begin + p * stride;
        if (place.at < end) finish(final, primal[p], tangent[p]);
      }
    } else {
      for (place.at = begin; place.at < end; place.at += stride) {
        const auto pack = f.primal(place);
        add(pack, f.tangent(pack, place));
      }
      combine_row(sums, team, turn);
      const auto final = f.finish(of_row, given, sums, length, k * R + row, busy && rank == 0);
      for (place.at = begin; place.at < end; place.at += stride) {
        const auto pack = f.primal(place);
        finish(final, pack, f.tangent(pack, place));
      }
    }
  }
}

template <class T_>
struct NormRows {
  using T = T_;
  using Compute = compute_t<T>;
  using Values = Pack<T, pack_width<T>>;
  static constexpr int primal_sums = 0, sums = 2, held = 16;

  const T *x, *normal, *weight, *along, *bias;
  const Compute* inv;
  T* out;
  Compute *mean, *scale;
  bool centered;

  struct Primal {
    Values normal, weight;
  };
  struct Tangent {
    Values x;
  };
  struct Late {
    Values along, bias;
  };
  using Final = Norm<Compute>;

  __device__ __forceinline__ Primal primal(const Place& place) const {
    return {fetch<T>(normal, place.of_row, place), fetch<T>(weight, 0, place)};
  }
  __device__ __forceinline__ Tangent tangent(const Primal&, const Place& place) const {
    return {fetch<T>(x, place.of_tangent, place)};
  }
  __device__ __forceinline__ Late late(const Place& place) const {
    return {fetch<T>(along, place.of_channels, place), fetch<T>(bias, place.of_channels, place)};
  }
  __device__ __forceinline__ Compute row(int64_t r, const Sums<double, 1>&, double) const {
    return number<Compute>(inv, r);
  }
  __device__ __forceinline__ Nothing given(int64_t, int64_t) const { return {}; }
  __device__ __forceinline__ void add(Nothing, const Primal& primal, const Tangent& tangent, int i,
                                      Sums<Compute, 2>& few) const {
    const Compute v = load(tangent.x.v[i]);
    few.v[0] = few.v[0] + v;
    few.v[1] = few.v[1] + v * load(primal.normal.v[i]);
  }
  __device__ __forceinline__ Final finish(Compute inv_, Nothing, const Sums<double, 2>& all, double D, int64_t at,
                                          bool writes) const {
    const Final norm{centered ? static_cast<Compute>(all.v[0] / D) : Compute(0), static_cast<Compute>(all.v[1] / D),
                     inv_};
    if (writes) {
      mean[at] = norm.m;
      scale[at] = x ? norm.scale() : Compute(0);
      platform::count_written(2 * sizeof(Compute));
    }
    return norm;
  }
  __device__ __forceinline__ Compute map(const Final& norm, const Primal& primal, const Tangent& tangent,
                                         const Late& late, int i) const {
    const Compute n = load(primal.normal.v[i]);
    Compute v = Compute(0);
    if (x) {
      v = norm(static_cast<Compute>(load(tangent.x.v[i])), n);
      if (weight) v = v * load(primal.weight.v[i]);
    }
    if (along) v = x ? v + n * load(late.along.v[i]) : n * load(late.along.v[i]);
    if (bias) v = x || along ? v + load(late.bias.v[i]) : load(late.bias.v[i]);
    return v;
  }
};

template <class T_>
struct NormBackwardRows {
  using T = T_;
  using Compute = compute_t<T>;
  using Values = Pack<T, pack_width<T>>;
  static constexpr int primal_sums = 2, sums = 3, held = sizeof(T) == 8 ? 4 : 8;

  const T *g, *x, *along, *normal, *grad, *weight;
  const Compute *mean, *scale, *inv;
  T* out;
  bool centered;

  struct Primal {
    Values normal, grad, weight;
  };
  struct Tangent {
    Values x;
    Compute rh[pack_width<T>];
  };
  struct Row {
    Compute inv, h_mean, h_normal;
  };
  struct Given {
    Compute m, i;
  };
  using Final = NormBackward<Compute>;

  __device__ __forceinline__ Compute h(const Primal& primal, int i) const {
    const Compute v = load(primal.grad.v[i]);
    return weight ? v * load(primal.weight.v[i]) : v;
  }
  __device__ __forceinline__ Primal primal(const Place& place) const {
    return {fetch<T>(normal, place.of_row, place), fetch<T>(grad, place.of_row, place), fetch<T>(weight, 0, place)};
  }
  __device__ __forceinline__ Tangent tangent(const Primal& primal, const Place& place) const {
    Tangent tangent{fetch<T>(x, place.of_tangent, place), {}};
    const Values of_g = fetch<T>(g, place.of_tangent, place), of_weight = fetch<T>(along, place.of_channels, place);
#pragma unroll
    for (int i = 0; i < pack_width<T>; ++i) {
      Compute rh = load(of_g.v[i]);
      if (g && weight) rh = rh * load(primal.weight.v[i]);
      if (along)
        rh = g ? rh + load(primal.grad.v[i]) * load(of_weight.v[i]) : load(primal.grad.v[i]) * load(of_weight.v[i]);
      tangent.rh[i] = rh;
    }
    return tangent;
  }
  __device__ __forceinline__ Nothing late(const Place&) const { return {}; }
  __device__ __forceinline__ void add_primal(const Primal& primal, int i, Sums<Compute, 2>& few) const {
    const Compute v = h(primal, i);
    few.v[0] = few.v[0] + v;
    few.v[1] = few.v[1] + v * load(primal.normal.v[i]);
  }
  __device__ __forceinline__ Row row(int64_t r, const Sums<double, 2>& of_primal, double D) const {
    return {number<Compute>(inv, r), centered ? static_cast<Compute>(of_primal.v[0] / D) : Compute(0),
            static_cast<Compute>(of_primal.v[1] / D)};
  }
  __device__ __forceinline__ Given given(int64_t, int64_t at) const {
    return {number<Compute>(mean, at), number<Compute>(scale, at)};
  }
  __device__ __forceinline__ void add(const Given& given, const Primal& primal, const Tangent& tangent, int i,
                                      Sums<Compute, 3>& few) const {
    few.v[0] = few.v[0] + tangent.rh[i];
    few.v[1] = few.v[1] + tangent.rh[i] * load(primal.normal.v[i]);
    if (x || mean) few.v[2] = few.v[2] + (load(tangent.x.v[i]) - given.m) * h(primal, i);
  }
  __device__ __forceinline__ Final finish(const Row& row, const Given& given, const Sums<double, 3>& all, double D,
                                          int64_t, bool) const {
    return Final::make(row.inv, given.i, given.m, row.h_mean, row.h_normal,
                       centered ? static_cast<Compute>(all.v[0] / D) : Compute(0), static_cast<Compute>(all.v[1] / D),
                       static_cast<Compute>(all.v[2] / D));
  }
  __device__ __forceinline__ Compute map(const Final& f, const Primal& primal, const Tangent& tangent, Nothing,
                                         int i) const {
    Compute v = f.of_normal(static_cast<Compute>(load(primal.normal.v[i])));
    if (g || along) v = f.of_rh(tangent.rh[i]) + v;
    if (x || mean) v = v + f.of_x(static_cast<Compute>(load(tangent.x.v[i])));
    if (scale) v = v + f.of_h(h(primal, i));
    return v;
  }
};

template <class T_>
struct SoftmaxRows {
  using T = T_;
  using Compute = compute_t<T>;
  using Values = Pack<T, pack_width<T>>;
  static constexpr int primal_sums = 0, sums = 1, held = 16;

  const T *t, *p;
  const Compute* scale;
  T* out;
  bool log;

  struct Primal {
    Compute q[pack_width<T>];
  };
  struct Tangent {
    Values t;
  };
  using Final = Softmax<Compute>;

  __device__ __forceinline__ Primal primal(const Place& place) const {
    const Values values = fetch<T>(p, place.of_row, place);
    Primal primal;
#pragma unroll
    for (int i = 0; i < pack_width<T>; ++i) {
      const Compute v = load(values.v[i]);
      primal.q[i] = log ? elementary::exp(v) : v;
    }
    return primal;
  }
  __device__ __forceinline__ Tangent tangent(const Primal&, const Place& place) const {
    return {fetch<T>(t, place.of_tangent, place)};
  }
  __device__ __forceinline__ Nothing late(const Place&) const { return {}; }
  __device__ __forceinline__ Compute row(int64_t r, const Sums<double, 1>&, double) const {
    return number<Compute>(scale, r, Compute(1));
  }
  __device__ __forceinline__ Nothing given(int64_t, int64_t) const { return {}; }
  __device__ __forceinline__ void add(Nothing, const Primal& primal, const Tangent& tangent, int i,
                                      Sums<Compute, 1>& few) const {
    few.v[0] = few.v[0] + load(tangent.t.v[i]) * primal.q[i];
  }
  __device__ __forceinline__ Final finish(Compute of_row, Nothing, const Sums<double, 1>& all, double, int64_t,
                                          bool) const {
    return {of_row, static_cast<Compute>(all.v[0])};
  }
  __device__ __forceinline__ Compute map(const Final& f, const Primal& primal, const Tangent& tangent, Nothing,
                                         int i) const {
    return f(static_cast<Compute>(load(tangent.t.v[i])), primal.q[i]);
  }
};

template <class T_>
struct SoftmaxBackwardRows {
  using T = T_;
  using Compute = compute_t<T>;
  using Values = Pack<T, pack_width<T>>;
  static constexpr int primal_sums = 1, sums = 2, held = 8;

  const T *g, *along, *p, *grad;
  T* out;

  struct Primal {
    Values p, grad;
  };
  struct Tangent {
    Values g, along;
  };
  using Final = SoftmaxBackward<Compute>;

  __device__ __forceinline__ Primal primal(const Place& place) const {
    return {fetch<T>(p, place.of_row, place), fetch<T>(grad, place.of_row, place)};
  }
  __device__ __forceinline__ Tangent tangent(const Primal&, const Place& place) const {
    return {fetch<T>(g, place.of_tangent, place), fetch<T>(along, place.of_tangent, place)};
  }
  __device__ __forceinline__ Nothing late(const Place&) const { return {}; }
  __device__ __forceinline__ void add_primal(const Primal& primal, int i, Sums<Compute, 1>& few) const {
    few.v[0] = few.v[0] + load(primal.grad.v[i]) * load(primal.p.v[i]);
  }
  __device__ __forceinline__ Compute row(int64_t, const Sums<double, 1>& of_primal, double) const {
    return static_cast<Compute>(of_primal.v[0]);
  }
  __device__ __forceinline__ Nothing given(int64_t, int64_t) const { return {}; }
  __device__ __forceinline__ void add(Nothing, const Primal& primal, const Tangent& tangent, int i,
                                      Sums<Compute, 2>& few) const {
    few.v[0] = few.v[0] + load(tangent.along.v[i]) * load(primal.grad.v[i]);
    few.v[1] = few.v[1] + load(tangent.g.v[i]) * load(primal.p.v[i]);
  }
  __device__ __forceinline__ Final finish(Compute of_row, Nothing, const Sums<double, 2>& all, double, int64_t,
                                          bool) const {
    return {of_row, static_cast<Compute>(all.v[0]), static_cast<Compute>(all.v[1])};
  }
  __device__ __forceinline__ Compute map(const Final& f, const Primal& primal, const Tangent& tangent, Nothing,
                                         int i) const {
    const Compute of_p = load(primal.p.v[i]), of_grad = load(primal.grad.v[i]);
    const Compute by_g = f.of_g(static_cast<Compute>(load(tangent.g.v[i])), of_p);
    if (!along) return by_g;
    const Compute by_p = f.of_along(static_cast<Compute>(load(tangent.along.v[i])), of_p, of_grad);
    return g ? by_p + by_g : by_p;
  }
};

template <class F>
cudaError_t launch_rows(const RowTangentsCall& call, const F& f, cudaStream_t stream) {
  using T = typename F::T;
  if (call.K == 0 || call.R == 0) return cudaSuccess;
  constexpr int N = pack_width<T>;
  const RowPlan plan(call, N, held_packs<F>);
  bool wide = call.D % N == 0;
  for (const void* data : {call.x, call.g, call.along_weight, call.along_bias, call.normal, call.grad, call.weight,
                           static_cast<const void*>(call.out)}) {
    wide &= address(data) % kAccess == 0;
  }
  const auto kernel = plan.resident ? row_tangents_kernel<true, F> : row_tangents_kernel<false, F>;
  return launch(kernel, plan.blocks * plan.groups, kBlock, stream, f, call.K, call.R, call.D, plan.team, plan.blocks,
                plan.share, wide);
}

// f(Type<T>)
template <class F>
cudaError_t with_storage(Storage storage, F&& f) {
  switch (storage) {
    case f32:
      return f(Type<float>{});
    case bf16:
      return f(Type<BFloat16>{});
    case f16:
      return f(Type<Half>{});
    default:
      return f(Type<double>{});
  }
}

}  // namespace

ErrorCode launch_row_tangents_norm(const RowTangentsCall& call, StreamHandle stream) {
  return with_storage(call.storage, [&](auto type) {
    using T = type_of<decltype(type)>;
    using C = compute_t<T>;
    const NormRows<T> f{input<T>(call.x),          input<T>(call.normal),
                        input<T>(call.weight),     input<T>(call.along_weight),
                        input<T>(call.along_bias), input<C>(call.of_row),
                        output<T>(call.out),       output<C>(call.new_mean),
                        output<C>(call.new_scale), call.option};
    return launch_rows(call, f, native(stream));
  });
}

ErrorCode launch_row_tangents_norm_bwd(const RowTangentsCall& call, StreamHandle stream) {
  return with_storage(call.storage, [&](auto type) {
    using T = type_of<decltype(type)>;
    using C = compute_t<T>;
    const NormBackwardRows<T> f{input<T>(call.g),      input<T>(call.x),     input<T>(call.along_weight),
                                input<T>(call.normal), input<T>(call.grad),  input<T>(call.weight),
                                input<C>(call.mean),   input<C>(call.scale), input<C>(call.of_row),
                                output<T>(call.out),   call.option};
    return launch_rows(call, f, native(stream));
  });
}

ErrorCode launch_row_tangents_softmax(const RowTangentsCall& call, StreamHandle stream) {
  return with_storage(call.storage, [&](auto type) {
    using T = type_of<decltype(type)>;
    const SoftmaxRows<T> f{input<T>(call.x), input<T>(call.normal), input<compute_t<T>>(call.of_row),
                           output<T>(call.out), call.option};
    return launch_rows(call, f, native(stream));
  });
}

ErrorCode launch_row_tangents_softmax_bwd(const RowTangentsCall& call, StreamHandle stream) {
  return with_storage(call.storage, [&](auto type) {
    using T = type_of<decltype(type)>;
    const SoftmaxBackwardRows<T> f{input<T>(call.g), input<T>(call.x), input<T>(call.normal), input<T>(call.grad),
                                   output<T>(call.out)};
    return launch_rows(call, f, native(stream));
  });
}

}  // namespace fastflat::cuda
