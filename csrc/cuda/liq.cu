// SPDX-License-Identifier: Apache-2.0
#include "cuda/liq.h"

#include <cmath>

#include "cuda/map.cuh"
#include "cuda/reduce.cuh"
#include "cuda/storage.cuh"
#include "math/convert.h"
#include "math/liq.h"

namespace fastflat::cuda {
namespace {

// The rule of a call and the moments of a channel.
template <class C>
struct Rule {
  using Compute = C;
  Liq<C> liq;
  const C* mean;
  const C* std;
  const C* clip;

  explicit Rule(const LiqPoint& p)
      : liq(Liq<C>::make(p.levels, C(1), p.eps)),
        mean(static_cast<const C*>(p.mean)),
        std(static_cast<const C*>(p.std)),
        clip(static_cast<const C*>(p.clip)) {}

  __device__ __forceinline__ void open() { liq.clip = liq.held(load_parameter(clip, 0)); }

  struct Group {
    C mean, s;  // s is held
  };

  __device__ __forceinline__ Group group(int64_t channel) const {
    return {load_parameter(mean, channel), liq.held(load_parameter(std, channel))};
  }
};

template <class C>
struct Forward : Rule<C> {
  using Rule<C>::Rule;

  template <class X, class Y>
  __device__ __forceinline__ void operator()(const typename Rule<C>::Group& group, X w, Y& y) const {
    y = store<Y>(this->liq.forward(load(w), group.mean, group.s));
  }
};

template <class C>
struct Tangent : Rule<C> {
  const C* tclip;
  C by_clip = 0;

  Tangent(const LiqPoint& p, const void* of_clip) : Rule<C>(p), tclip(static_cast<const C*>(of_clip)) {}

  __device__ __forceinline__ void open() {
    Rule<C>::open();
    if (tclip) by_clip = load_parameter(tclip, 0);
  }

  template <class X, class Y>
  __device__ __forceinline__ void operator()(const typename Rule<C>::Group& group, X tw, X w, Y& y) const {
    y = store<Y>(this->liq.tangent(load(tw), by_clip, load(w), group.mean, group.s));
  }
};

// What sums of one value a scale have in common.
template <class C>
struct Sum {
  using Compute = C;
  static constexpr int sums = 1;

  template <class T>
  __device__ __forceinline__ static T combine(T a, T b) {
    return a + b;
  }
};

// Where the sum of each channel goes: it is the result, or its share of it.
template <class C>
struct Shares : Sum<C> {
  double* shares;
  C* result;

  Shares(double* to, void* total) : shares(to), result(static_cast<C*>(total)) {}

  __device__ __forceinline__ void finish(int64_t channel, const Sums<double, 1>& sum) const {
    if (!shares) {
      *result = static_cast<C>(sum.v[0]);
      return;
    }
    shares[channel] = sum.v[0];
    platform::count_written(sizeof(double));
  }
};

template <class C>
struct Backward : Rule<C>, Shares<C> {
  using Compute = C;
  using Finish = Shares<C>;

  Backward(const LiqPoint& p, double* to, void* total) : Rule<C>(p), Shares<C>(to, total) {}

  template <class X, class Y>
  __device__ __forceinline__ void operator()(const typename Rule<C>::Group& group, Sums<C, 1>& sum, Y gy, X w,
                                             X& gw) const {
    const auto gradient = this->liq.backward(load(gy), load(w), group.mean, group.s);
    gw = store<X>(gradient.w);
    sum.v[0] = sum.v[0] + gradient.clip;
  }
};

// The mean of each channel, once in double for the second pass.
template <class C>
struct ToMean : Sum<double> {
  double count;
  double* about;
  C* mean;

  ToMean(double n, double* wide, void* to) : count(n), about(wide), mean(static_cast<C*>(to)) {}

  __device__ __forceinline__ void finish(int64_t channel, const Sums<double, 1>& sum) const {
    const double value = sum.v[0] / count;
    about[channel] = value;
    mean[channel] = static_cast<C>(value);
  }
};

template <class C>
struct Mean : ToMean<C> {
  using Finish = ToMean<C>;
  using ToMean<C>::ToMean;

  __device__ __forceinline__ int group(int64_t) const { return 0; }

  template <class X>
  __device__ __forceinline__ void operator()(int, Sums<double, 1>& sum, X w) const {
    sum.v[0] = sum.v[0] + static_cast<double>(load(w));
  }
};

template <class C>
struct ToDeviation : Sum<double> {
  double count;
  C* std;

  ToDeviation(double n, void* to) : count(n), std(static_cast<C*>(to)) {}

  __device__ __forceinline__ void finish(int64_t channel, const Sums<double, 1>& sum) const {
    std[channel] = static_cast<C>(sqrt(sum.v[0] / count));
  }
};

template <class C>
struct Deviation : ToDeviation<C> {
  using Finish = ToDeviation<C>;
  const double* about;

  Deviation(double n, const double* means, void* to) : ToDeviation<C>(n, to), about(means) {}

  __device__ __forceinline__ double group(int64_t channel) const { return load_parameter(about, channel); }

  template <class X>
  __device__ __forceinline__ void operator()(double mean, Sums<double, 1>& sum, X w) const {
    const double d = static_cast<double>(load(w)) - mean;
    sum.v[0] = sum.v[0] + d * d;
  }
};

// One double a channel, the first part of both workspaces, in bytes.
int64_t wide_channels(const Geometry& g) {
  return ceil_div(g.channels * static_cast<int64_t>(sizeof(double)), kAccess) * kAccess;
}

// Parts of the backward's workspace, in bytes: shares of the channels, partial sums, partial sums of the shares.
struct Workspace {
  int64_t shares, partials, totals;
};

template <class C, int N>
Workspace workspace_of(const Geometry& g) {
  Workspace w{0, reduce_workspace<N, Backward<C>>(g), 0};
  if (g.channels == 1) return w;
  w.shares = wide_channels(g);
  w.partials = ceil_div(w.partials, kAccess) * kAccess;
  w.totals = reduce_workspace<pack_width<double>, RowSum<double, C>>({1, 1, g.channels});
  return w;
}

}  // namespace

ErrorCode launch_liq_moments(Pair pair, const Geometry& g, const void* w, void* mean, void* std, void* workspace,
                             StreamHandle stream) {
  return with_types(pair, [&](auto data, auto) -> cudaError_t {
    using X = type_of<decltype(data)>;
    using C = compute_t<X>;
    constexpr int pack = pack_width<X>;
    const int64_t count = g.outer * g.inner;
    const auto at_least_1 = [](int64_t n) { return static_cast<double>(n < 1 ? 1 : n); };
    auto* const about = output<double>(workspace);
    auto* const partials = output<char>(workspace) + wide_channels(g);
    const auto in = streams(input<X>(w));
    const cudaError_t error =
        launch_reduce<pack>(g, Mean<C>(at_least_1(count), about, mean), in, streams(), partials, native(stream));
    if (error != cudaSuccess) return error;
    return launch_reduce<pack>(g, Deviation<C>(at_least_1(count - 1), about, std), in, streams(), partials,
                               native(stream));
  });
}

int64_t liq_moments_workspace(Pair pair, const Geometry& g) {
  int64_t bytes = 0;
  with_types(pair, [&](auto data, auto) {
    using X = type_of<decltype(data)>;
    bytes = wide_channels(g) + reduce_workspace<pack_width<X>, Mean<compute_t<X>>>(g);
    return cudaSuccess;
  });
  return bytes;
}

ErrorCode launch_liq(Pair pair, const Geometry& g, const LiqPoint& point, const void* w, void* y, StreamHandle stream) {
  return with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    return launch_map<pack_width<X, Y>>(g, Forward<compute_t<X>>(point), streams(input<X>(w)), streams(output<Y>(y)),
                                        native(stream));
  });
}

ErrorCode launch_liq_bwd(Pair pair, const Geometry& g, const LiqPoint& point, const void* gy, const void* w, void* gw,
                         void* gclip, void* workspace, StreamHandle stream) {
  return with_types(pair, [&](auto data, auto result) -> cudaError_t {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    using C = compute_t<X>;
    constexpr int pack = pack_width<X, Y>;
    const Workspace parts = workspace_of<C, pack>(g);
    auto* const shares = g.channels == 1 ? nullptr : output<double>(workspace);
    auto* const partials = output<char>(workspace) + parts.shares;
    const cudaError_t error =
        launch_reduce<pack>(g, Backward<C>(point, shares, gclip), streams(input<Y>(gy), input<X>(w)),
                            streams(output<X>(gw)), partials, native(stream));
    if (error != cudaSuccess || !shares) return error;
    return launch_reduce<pack_width<double>>({1, 1, g.channels}, RowSum<double, C>{output<C>(gclip)},
                                             streams(input<double>(shares)), streams(), partials + parts.partials,
                                             native(stream));
  });
}

int64_t liq_bwd_workspace(Pair pair, const Geometry& g) {
  int64_t bytes = 0;
  with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    const Workspace parts = workspace_of<compute_t<X>, pack_width<X, Y>>(g);
    bytes = parts.shares + parts.partials + parts.totals;
    return cudaSuccess;
  });
  return bytes;
}

ErrorCode launch_liq_jvp(Pair pair, const Geometry& g, const LiqPoint& point, const void* tw, const void* tclip,
                         const void* w, void* ty, StreamHandle stream) {
  return with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    return launch_map<pack_width<X, Y>>(g, Tangent<compute_t<X>>(point, tclip),
                                        streams(Optional<X>{input<X>(tw)}, input<X>(w)), streams(output<Y>(ty)),
                                        native(stream));
  });
}

}  // namespace fastflat::cuda
