// SPDX-License-Identifier: Apache-2.0
// A team of threads, some lanes of a warp or a whole block, has a row. It passes over the row once for its largest
// logit, once for the sum of exponentials and once for what follows from them; from the second time on the row comes
// from the caches.
#include "cuda/logits.h"

#include "cuda/reduce.cuh"
#include "cuda/storage.cuh"
#include "math/logits.h"

namespace fastflat::cuda {
namespace {

using namespace logits;

// Packs of a row from which on a block has it.
constexpr int64_t kPacksOfBlock = 129;

template <class C>
__device__ __forceinline__ C none() {
  using F = elementary::Format<C>;
  return bit_cast<C>(F::infinity | F::sign);
}
template <class C>
__device__ __forceinline__ C not_a_number() {
  return bit_cast<C>(elementary::Format<C>::nan);
}

// The threads of a row.
template <class T>
struct Team {
  static constexpr int N = pack_width<T>;
  using C = compute_t<T>;

  int64_t row, R, classes, begin, stride;
  int size;
  bool busy, leads, wide;
  mutable int turn = 0;

  __device__ __forceinline__ Team(int64_t rows, int64_t row_length, int team, bool wide_) : R(rows), wide(wide_) {
    const int rank = static_cast<int>(threadIdx.x) % team;
    row = static_cast<int64_t>(blockIdx.x) * (kBlock / team) + static_cast<int>(threadIdx.x) / team;
    busy = row < rows;
    classes = busy ? row_length : 0;
    row = busy ? row : 0;
    begin = static_cast<int64_t>(rank) * N;
    stride = static_cast<int64_t>(team) * N;
    size = team;
    leads = busy && rank == 0;
  }

  // body(place in the row) for each pack of the thread.
  template <class Body>
  __device__ __forceinline__ void walk(const Body& body) const {
    for (int64_t at = begin; at < classes; at += stride) body(at);
  }

  __device__ __forceinline__ Pack<T, N> load_at(const T* row_of, int64_t at) const {
    return load_pack<N>(row_of, at, Range{0, classes}, wide);
  }
  __device__ __forceinline__ void store_at(T* row_of, int64_t at, const Pack<T, N>& pack) const {
    store_pack(row_of, at, Range{0, classes}, pack, wide);
  }

  // The largest, or the sum, over the team. Buffers of two calls alternate: one barrier a call.
  template <bool largest>
  __device__ __forceinline__ double combined(double v) const {
    __shared__ double of_warp[2][kBlock / kWarp];
    const auto both = [](double a, double b) { return largest ? (a > b ? a : b) : a + b; };
    for (int distance = (size < kWarp ? size : kWarp) / 2; distance > 0; distance /= 2) {
      v = both(v, __shfl_xor_sync(0xffffffffu, v, distance));
    }
    if (size <= kWarp) return v;
    if (threadIdx.x % kWarp == 0) of_warp[turn][threadIdx.x / kWarp] = v;
    __syncthreads();
    v = of_warp[turn][0];
    for (int w = 1; w < kBlock / kWarp; ++w) v = both(v, of_warp[turn][w]);
    turn ^= 1;
    return v;
  }
};

// Logits as they are.
template <class T>
struct Plain {
  const T* row_of;

  template <int N>
  __device__ __forceinline__ void operator()(const Team<T>& team, int64_t at, compute_t<T> (&v)[N]) const {
    const auto pack = team.load_at(row_of, at);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = load(pack.v[i]);
  }
};

// As a re-balanced loss sees them.
template <class T>
struct Balanced {
  using C = compute_t<T>;
  const T* row_of;
  const C *mult, *add, *margin;
  C s;
  int64_t y;

  __device__ __forceinline__ C factor(int64_t c) const { return mult ? load_parameter(mult, c) : C(1); }
  __device__ __forceinline__ C value(C z, int64_t c) const {
    const C of_label = margin && c == y ? load_parameter(margin, c) : C(0);
    return balanced(s, z, factor(c), add ? load_parameter(add, c) : C(0), of_label);
  }
  template <int N>
  __device__ __forceinline__ void operator()(const Team<T>& team, int64_t at, C (&v)[N]) const {
    const auto pack = team.load_at(row_of, at);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = at + i < team.classes ? value(load(pack.v[i]), at + i) : C(0);
  }
};

// The largest but that of class `left_out`.
template <class T, class Logits>
__device__ __forceinline__ compute_t<T> largest_of(const Team<T>& team, const Logits& logits, int64_t left_out = -1) {
  using C = compute_t<T>;
  C most = none<C>();
  team.walk([&](int64_t at) {
    C v[Team<T>::N];
    logits(team, at, v);
#pragma unroll
    for (int i = 0; i < Team<T>::N; ++i) {
      if (at + i < team.classes && at + i != left_out) most = v[i] > most ? v[i] : most;
    }
  });
  return static_cast<C>(team.template combined<true>(static_cast<double>(most)));
}

template <class T, class Logits>
__device__ __forceinline__ Norm<compute_t<T>> norm_below(const Team<T>& team, const Logits& logits, compute_t<T> most) {
  using C = compute_t<T>;
  double sum = 0.0;
  team.walk([&](int64_t at) {
    C v[Team<T>::N], few = C(0);
    logits(team, at, v);
#pragma unroll
    for (int i = 0; i < Team<T>::N; ++i) {
      const C e = elementary::exp(v[i] - most);
      few = few + (at + i < team.classes ? e : C(0));
    }
    sum = sum + static_cast<double>(few);
  });
  return {most, elementary::log(static_cast<C>(team.template combined<false>(sum)))};
}

template <class T, class Logits>
__device__ __forceinline__ Norm<compute_t<T>> norm_of(const Team<T>& team, const Logits& logits) {
  return norm_below(team, logits, largest_of(team, logits));
}

template <class C>
__device__ __forceinline__ void keep(C* norm, int64_t row, const Norm<C>& v) {
  norm[2 * row] = v.most;
  norm[2 * row + 1] = v.log_sum;
  platform::count_written(2 * sizeof(C));
}
template <class C>
__device__ __forceinline__ Norm<C> kept(const C* norm, int64_t row) {
  return {load_parameter(norm, 2 * row), load_parameter(norm, 2 * row + 1)};
}

template <class T>
struct Divergence {
  using C = compute_t<T>;
  const T *z0, *z;
  const C* g;
  C *norm, *divergence;
  T *out0, *out;
  int64_t K, R, classes;
  C share;  // of a distribution in the mixture

  // Row of the i-th distribution, of z0 first, and where it lies in its tensor.
  __device__ __forceinline__ const T* row_of(int64_t i, int64_t row) const {
    return i ? z + ((i - 1) * R + row) * classes : z0 + row * classes;
  }
  __device__ __forceinline__ T* out_of(int64_t i, int64_t row) const {
    return i ? out + ((i - 1) * R + row) * classes : out0 + row * classes;
  }

  template <int N>
  __device__ __forceinline__ void log_p(const Team<T>& team, int64_t i, int64_t at, C (&v)[N]) const {
    const Norm<C> of = kept(norm, i * R + team.row);
    Plain<T>{row_of(i, team.row)}(team, at, v);
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] = of(v[n]);
  }
  // log M
  template <int N>
  __device__ __forceinline__ void mixture(const Team<T>& team, int64_t at, C (&sum)[N]) const {
#pragma unroll
    for (int n = 0; n < N; ++n) sum[n] = C(0);
    for (int64_t i = 0; i <= K; ++i) {
      C v[N];
      log_p(team, i, at, v);
#pragma unroll
      for (int n = 0; n < N; ++n) sum[n] = sum[n] + elementary::exp(v[n]);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) sum[n] = elementary::log(sum[n] * share);
  }
};

template <class C, int N>
__device__ __forceinline__ double divergences(const C (&log_p)[N], const C (&log_q)[N], int64_t at, int64_t classes) {
  C few = C(0);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const C term = divergence(elementary::exp(log_p[n]), log_p[n], log_q[n]);
    few = few + (at + n < classes ? term : C(0));
  }
  return static_cast<double>(few);
}

template <class T>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce) kl_kernel(Divergence<T> f, int team_size, bool wide) {
  using C = compute_t<T>;
  constexpr int N = pack_width<T>;
  const Team<T> team(f.R, f.classes, team_size, wide);
  const Plain<T> first{f.row_of(0, team.row)};
  const Norm<C> of_first = norm_of(team, first);
  if (team.leads) keep(f.norm, team.row, of_first);
  for (int64_t k = 0; k < f.K; ++k) {
    const Plain<T> second{f.row_of(k + 1, team.row)};
    const Norm<C> of_second = norm_of(team, second);
    double sum = 0.0;
    team.walk([&](int64_t at) {
      C log_p[N], log_q[N];
      first(team, at, log_p);
      second(team, at, log_q);
#pragma unroll
      for (int n = 0; n < N; ++n) log_p[n] = of_first(log_p[n]), log_q[n] = of_second(log_q[n]);
      sum = sum + divergences(log_p, log_q, at, team.classes);
    });
    sum = team.template combined<false>(sum);
    if (!team.leads) continue;
    keep(f.norm, (k + 1) * f.R + team.row, of_second);
    f.divergence[k * f.R + team.row] = static_cast<C>(sum);
    platform::count_written(sizeof(C));
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce) kl_bwd_kernel(Divergence<T> f, int team_size, bool wide) {
  using C = compute_t<T>;
  constexpr int N = pack_width<T>;
  const Team<T> team(f.R, f.classes, team_size, wide);
  if (!team.busy) return;
  const C g = load_parameter(f.g, team.row);
  team.walk([&](int64_t at) {
    C log_p[N], p[N], sum[N];
    f.log_p(team, 0, at, log_p);
#pragma unroll
    for (int n = 0; n < N; ++n) p[n] = elementary::exp(log_p[n]), sum[n] = C(0);
    for (int64_t k = 0; k < f.K; ++k) {
      const C all = load_parameter(f.divergence, k * f.R + team.row);
      C log_q[N];
      f.log_p(team, k + 1, at, log_q);
      Pack<T, N> result;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        result.v[n] = store<T>(gradient_to_second(g, p[n], elementary::exp(log_q[n])));
        sum[n] = sum[n] + gradient_to_first(g, p[n], log_p[n], log_q[n], all);
      }
      team.store_at(f.out_of(k + 1, team.row), at, result);
    }
    Pack<T, N> result;
#pragma unroll
    for (int n = 0; n < N; ++n) result.v[n] = store<T>(sum[n]);
    team.store_at(f.out_of(0, team.row), at, result);
  });
}

// Of all K + 1 distributions of all rows.
template <class T>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce) norms_kernel(Divergence<T> f, int team_size, bool wide) {
  const Team<T> team((f.K + 1) * f.R, f.classes, team_size, wide);
  const auto norm = norm_of(team, Plain<T>{f.row_of(team.row / f.R, team.row % f.R)});
  if (team.leads) keep(f.norm, team.row, norm);
}

// Values of a mixture that a thread holds.
template <class T>
constexpr int kHeld = sizeof(T) == 8 ? 8 : 16;

template <bool resident, class T>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce) js_kernel(Divergence<T> f, int team_size, bool wide) {
  using C = compute_t<T>;
  constexpr int N = pack_width<T>, packs = resident ? kHeld<T> / N : 1;
  const Team<T> team(f.R, f.classes, team_size, wide);
  C held[packs][N];
  if constexpr (resident) {
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      const int64_t at = team.begin + p * team.stride;
      if (at < team.classes) f.mixture(team, at, held[p]);
    }
  }
  for (int64_t i = 0; i <= f.K; ++i) {
    double sum = 0.0;
    const auto add = [&](int64_t at, const C(&log_m)[N]) {
      C log_p[N];
      f.log_p(team, i, at, log_p);
      sum = sum + divergences(log_p, log_m, at, team.classes);
    };
    if constexpr (resident) {
#pragma unroll
      for (int p = 0; p < packs; ++p) {
        const int64_t at = team.begin + p * team.stride;
        if (at < team.classes) add(at, held[p]);
      }
    } else {
      team.walk([&](int64_t at) {
        f.mixture(team, at, held[0]);
        add(at, held[0]);
      });
    }
    sum = team.template combined<false>(sum);
    if (!team.leads) continue;
    f.divergence[i * f.R + team.row] = static_cast<C>(sum);
    platform::count_written(sizeof(C));
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce) js_bwd_kernel(Divergence<T> f, int team_size, bool wide) {
  using C = compute_t<T>;
  constexpr int N = pack_width<T>;
  const Team<T> team(f.R, f.classes, team_size, wide);
  if (!team.busy) return;
  const C g = load_parameter(f.g, team.row);
  team.walk([&](int64_t at) {
    C log_m[N];
    f.mixture(team, at, log_m);
    for (int64_t i = 0; i <= f.K; ++i) {
      const C all = load_parameter(f.divergence, i * f.R + team.row);
      C log_p[N];
      f.log_p(team, i, at, log_p);
      Pack<T, N> result;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        result.v[n] = store<T>(gradient_to_first(g, elementary::exp(log_p[n]), log_p[n], log_m[n], all));
      }
      team.store_at(f.out_of(i, team.row), at, result);
    }
  });
}

template <class T>
struct Loss {
  using C = compute_t<T>;
  const T* z;
  const int64_t* y;
  const C *mult, *add, *margin, *class_weight, *g;
  C *norm, *loss, *weight;
  T* gz;
  C s;
  int64_t R, classes, ignore_index;

  __device__ __forceinline__ Balanced<T> logits(const Team<T>& team) const {
    return {z + team.row * classes, mult, add, margin, s, team.busy ? load_parameter(y, team.row) : -1};
  }
};

template <class T>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce) loss_kernel(Loss<T> f, int team_size, bool wide) {
  using C = compute_t<T>;
  const Team<T> team(f.R, f.classes, team_size, wide);
  const Balanced<T> logits = f.logits(team);
  const Norm<C> norm = norm_of(team, logits);
  if (!team.leads) return;
  keep(f.norm, team.row, norm);
  const bool known = logits.y >= 0 && logits.y < f.classes;
  C weight = C(0), value = C(0);
  if (logits.y != f.ignore_index) {
    weight = value = not_a_number<C>();
    if (known) {
      weight = f.class_weight ? load_parameter(f.class_weight, logits.y) : C(1);
      value = weight * logits::loss(norm, logits.value(load(load_parameter(logits.row_of, logits.y)), logits.y));
    }
  }
  f.loss[team.row] = value;
  f.weight[team.row] = weight;
  platform::count_written(2 * sizeof(C));
}

template <class T>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce) loss_bwd_kernel(Loss<T> f, int team_size, bool wide) {
  using C = compute_t<T>;
  constexpr int N = pack_width<T>;
  const Team<T> team(f.R, f.classes, team_size, wide);
  if (!team.busy) return;
  const Balanced<T> logits = f.logits(team);
  const Norm<C> norm = kept(f.norm, team.row);
  const C g = load_parameter(f.g, team.row);
  team.walk([&](int64_t at) {
    C a[N];
    logits(team, at, a);
    Pack<T, N> result;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const C factor = at + n < team.classes ? logits.factor(at + n) : C(0);
      const C p = norm.probability(a[n]);
      result.v[n] = store<T>(gradient_of_loss(g, f.s, factor, p, at + n == logits.y ? C(1) : C(0)));
    }
    team.store_at(f.gz + team.row * f.classes, at, result);
  });
}

template <class T>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce) stats_kernel(Loss<T> f, int team_size, bool wide) {
  using C = compute_t<T>;
  const Team<T> team(f.R, f.classes, team_size, wide);
  const Plain<T> logits{f.z + team.row * f.classes};
  const int64_t y = team.busy ? load_parameter(f.y, team.row) : -1;
  const bool known = y >= 0 && y < team.classes;
  const C other = largest_of(team, logits, y);
  const C of_label = known ? static_cast<C>(load(load_parameter(logits.row_of, y))) : not_a_number<C>();
  const Norm<C> norm = norm_below(team, logits, of_label > other ? of_label : other);
  if (!team.leads) return;
  keep(f.norm, team.row, norm);
  Stats<C> stats = Stats<C>::make(norm, of_label, other);
  if (y == f.ignore_index) stats.loss = stats.p = stats.gap = C(0);
  f.loss[team.row] = stats.loss;
  f.loss[f.R + team.row] = stats.p;
  f.loss[2 * f.R + team.row] = stats.gap;
  f.loss[3 * f.R + team.row] = stats.curvature;
  platform::count_written(4 * sizeof(C));
}

// How rows meet threads: by their length, and by where the tensors lie.
template <class T>
struct RowsPlan {
  int team = 1;
  bool wide;

  explicit RowsPlan(const LogitsCall& call) {
    constexpr int N = pack_width<T>;
    const int64_t packs = ceil_div(call.C, N);
    while (team < kWarp && team < packs) team *= 2;
    if (packs >= kPacksOfBlock) team = kBlock;
    wide = call.C % N == 0;
    const void* const tensors[] = {call.z0, call.z, call.out0, call.out};
    for (const void* tensor : tensors) wide &= address(tensor) % kAccess == 0;
  }
  int64_t blocks(int64_t rows) const { return ceil_div(rows, kBlock / team); }
};

template <class T>
Divergence<T> divergence_of(const LogitsCall& call) {
  using C = compute_t<T>;
  return {input<T>(call.z0),
          input<T>(call.z),
          input<C>(call.g),
          output<C>(call.norm),
          output<C>(call.divergence),
          output<T>(call.out0),
          output<T>(call.out),
          call.K,
          call.R,
          call.C,
          static_cast<C>(1.0 / static_cast<double>(call.K + 1))};
}

template <class T>
Loss<T> loss_of(const LogitsCall& call) {
  using C = compute_t<T>;
  return {input<T>(call.z),
          call.y,
          input<C>(call.mult),
          input<C>(call.add),
          input<C>(call.margin),
          input<C>(call.weight),
          input<C>(call.g),
          output<C>(call.norm),
          output<C>(call.of_row),
          output<C>(call.out),
          output<T>(call.out),
          static_cast<C>(call.s),
          call.R,
          call.C,
          call.ignore_index};
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

template <class T, class Kernel, class F>
cudaError_t launch_rows(Kernel kernel, const F& f, const RowsPlan<T>& plan, int64_t rows, StreamHandle stream) {
  return launch(kernel, plan.blocks(rows), kBlock, native(stream), f, plan.team, plan.wide);
}

}  // namespace

ErrorCode launch_logits_divergence(const LogitsCall& call, StreamHandle stream) {
  return with_storage(call.storage, [&](auto type) {
    using T = type_of<decltype(type)>;
    const auto f = divergence_of<T>(call);
    const RowsPlan<T> plan(call);
    if (!call.js) return launch_rows<T>(kl_kernel<T>, f, plan, call.R, stream);
    const cudaError_t error = launch_rows<T>(norms_kernel<T>, f, plan, (call.K + 1) * call.R, stream);
    if (error) return error;
    const bool resident = call.C <= static_cast<int64_t>(plan.team) * kHeld<T>;
    return launch_rows<T>(resident ? js_kernel<true, T> : js_kernel<false, T>, f, plan, call.R, stream);
  });
}

ErrorCode launch_logits_divergence_bwd(const LogitsCall& call, StreamHandle stream) {
  return with_storage(call.storage, [&](auto type) {
    using T = type_of<decltype(type)>;
    const auto kernel = call.js ? js_bwd_kernel<T> : kl_bwd_kernel<T>;
    return launch_rows<T>(kernel, divergence_of<T>(call), RowsPlan<T>(call), call.R, stream);
  });
}

ErrorCode launch_logits_loss(const LogitsCall& call, StreamHandle stream) {
  return with_storage(call.storage, [&](auto type) {
    using T = type_of<decltype(type)>;
    return launch_rows<T>(loss_kernel<T>, loss_of<T>(call), RowsPlan<T>(call), call.R, stream);
  });
}

ErrorCode launch_logits_loss_bwd(const LogitsCall& call, StreamHandle stream) {
  return with_storage(call.storage, [&](auto type) {
    using T = type_of<decltype(type)>;
    return launch_rows<T>(loss_bwd_kernel<T>, loss_of<T>(call), RowsPlan<T>(call), call.R, stream);
  });
}

ErrorCode launch_logits_stats(const LogitsCall& call, StreamHandle stream) {
  return with_storage(call.storage, [&](auto type) {
    using T = type_of<decltype(type)>;
    return launch_rows<T>(stats_kernel<T>, loss_of<T>(call), RowsPlan<T>(call), call.R, stream);
  });
}

}  // namespace fastflat::cuda
