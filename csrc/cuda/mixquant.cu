// SPDX-License-Identifier: Apache-2.0
// The candidates of an element are walked one after another, their parameters read again for each: they come from the
// first cache, and a thread holds one candidate in registers however many there are.
#include "cuda/mixquant.h"

#include "cuda/map.cuh"
#include "cuda/reduce.cuh"
#include "cuda/storage.cuh"
#include "math/convert.h"
#include "math/mixquant.h"

namespace fastflat::cuda {
namespace {

template <class C>
struct Mixed {
  using Compute = C;
  const C* scale;
  const C* qmin;
  const C* qmax;
  const C* weight;
  const C* factor;
  int64_t channels;
  int count;
  double eps;
  int64_t rules;

  Mixed(const Mixture& m, const Geometry& g)
      : scale(static_cast<const C*>(m.scale)),
        qmin(static_cast<const C*>(m.qmin)),
        qmax(static_cast<const C*>(m.qmax)),
        weight(static_cast<const C*>(m.weight)),
        factor(static_cast<const C*>(m.factor)),
        channels(g.channels),
        count(m.count),
        eps(m.eps),
        rules(m.rules) {}

  // The place of the element among the scales of every candidate.
  __device__ __forceinline__ int64_t group(int64_t channel) const { return channel; }

  // each(j, term, weight) for candidate j.
  template <class Each>
  __device__ __forceinline__ void one(int j, int64_t channel, C x, const Each& each) const {
    const auto c =
        Candidate<C>::make(load_parameter(qmin, j), load_parameter(qmax, j), load_parameter(weight, j), eps, rules);
    each(j, c.term(x, c.group(load_parameter(scale, j * channels + channel))), c.weight);
  }
};

template <class C>
struct Value : Mixed<C> {
  using Mixed<C>::Mixed;

  template <class X, class Y>
  __device__ __forceinline__ void operator()(int64_t channel, X x, Y& y) const {
    C sum = -C(0);
    for (int j = 0; j < this->count; ++j) {
      this->one(j, channel, load(x), [&](int, const auto& term, C w) { sum += weighted(term.value, w); });
    }
    y = store<Y>(sum);
  }
};

template <class C>
struct Tangent : Mixed<C> {
  static constexpr int blocks_at_once = 2;
  const C* ts;
  const C* tw;

  Tangent(const Mixture& m, const Geometry& g, const void* scale_tangent, const void* weight_tangent)
      : Mixed<C>(m, g), ts(static_cast<const C*>(scale_tangent)), tw(static_cast<const C*>(weight_tangent)) {}

  template <class T, class X, class Y>
  __device__ __forceinline__ void operator()(int64_t channel, T tx, X x, Y& y) const {
    C pass = 0, rest = -C(0);
    for (int candidate = 0; candidate < this->count; ++candidate) {
      this->one(candidate, channel, load(x), [&](int j, const auto& term, C w) {
        const C of_scale = ts ? load_parameter(ts, j * this->channels + channel) : C(0);
        const C of_weight = tw ? load_parameter(tw, j) : C(0);
        pass += term.pass;
        rest += weighted(term.by_scale, mixture_scale_tangent(of_scale, w, load_parameter(this->factor, j)));
        rest += weighted(term.value, of_weight);
      });
    }
    y = store<Y>(passed(load(tx), pass) + rest);
  }
};

// Sums of up to `most` candidates in registers: 2 j of the scale, 2 j + 1 of the weight.
template <class C, int most>
struct Gradient : Mixed<C> {
  static constexpr int sums = 2 * most;
  // The sums of all candidates stay in registers: fewer blocks at once leave room for them.
  static constexpr int blocks_at_once = 1, column_blocks_at_once = 1;
  C* gs;
  C* by_channel;  // [count, channels]: what each scale's elements add to the gradients of the weights

  Gradient(const Mixture& m, const Geometry& g, void* scale_gradient, void* weight_gradients)
      : Mixed<C>(m, g), gs(static_cast<C*>(scale_gradient)), by_channel(static_cast<C*>(weight_gradients)) {}

  template <class T>
  __device__ __forceinline__ static T combine(T a, T b) {
    return a + b;
  }

  template <class Y, class X>
  __device__ __forceinline__ void operator()(int64_t channel, Sums<C, sums>& sum, Y gy_, X x, X& gx) const {
    const C gy = load(gy_);
    C pass = 0;
#pragma unroll
    for (int j = 0; j < most; ++j) {
      if (j >= this->count) break;
      this->one(j, channel, load(x), [&](int, const auto& term, C) {
        pass += term.pass;
        sum.v[2 * j] += gy * term.by_scale;
        sum.v[2 * j + 1] += gy * term.value;
      });
    }
    gx = store<X>(passed(gy, pass));
  }

  __device__ __forceinline__ void finish(int64_t channel, const Sums<double, sums>& sum) const {
#pragma unroll
    for (int j = 0; j < most; ++j) {
      if (j >= this->count) break;
      const int64_t at = j * this->channels + channel;
      gs[at] = mixture_scale_gradient(static_cast<C>(sum.v[2 * j]), load_parameter(this->weight, j),
                                      load_parameter(this->factor, j));
      by_channel[at] = static_cast<C>(sum.v[2 * j + 1]);
    }
  }
};

// Calls f(number) with the least compiled number of candidates that holds `count`, as a constant.
template <class F>
auto with_most(int count, const F& f) {
  if (count <= 4) return f(std::integral_constant<int, 4>{});
  return f(std::integral_constant<int, most_candidates>{});
}

// How the workspace of the backward is cut.
struct Cut {
  int64_t partials;    // of the sums over elements
  int64_t by_channel;  // of the weights' gradients
  int64_t rows;        // of their row sums

  int64_t total() const { return partials + by_channel + rows; }
};

int64_t rounded(int64_t bytes) { return ceil_div(bytes, kAccess) * kAccess; }
Geometry rows_of(const Geometry& g, int count) { return {1, count, g.channels}; }

template <class X, class Y>
Cut cut_workspace(const Geometry& g, int count) {
  using C = compute_t<X>;
  const int64_t partials = with_most(
      count, [&](auto most) { return reduce_workspace<pack_width<X, Y>, Gradient<C, decltype(most)::value>>(g); });
  if (g.channels == 1) return {rounded(partials), 0, 0};
  return {rounded(partials), rounded(count * g.channels * static_cast<int64_t>(sizeof(C))),
          reduce_workspace<pack_width<C>, RowSum<C>>(rows_of(g, count))};
}

}  // namespace

ErrorCode launch_mixquant(Pair pair, const Geometry& g, const Mixture& mixture, const void* x, void* y,
                          StreamHandle stream) {
  return with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    return launch_map<pack_width<X, Y>>(g, Value<compute_t<X>>(mixture, g), streams(input<X>(x)), streams(output<Y>(y)),
                                        native(stream));
  });
}

ErrorCode launch_mixquant_bwd(Pair pair, const Geometry& g, const Mixture& mixture, const void* gy, const void* x,
                              void* gx, void* gs, void* gw, void* workspace, StreamHandle stream) {
  return with_types(pair, [&](auto data, auto result) -> cudaError_t {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    using C = compute_t<X>;
    const Cut cut = cut_workspace<X, Y>(g, mixture.count);
    char* const bytes = static_cast<char*>(workspace);
    C* const by_channel = g.channels == 1 ? output<C>(gw) : output<C>(bytes + cut.partials);
    const cudaError_t error = with_most(mixture.count, [&](auto most) {
      return launch_reduce<pack_width<X, Y>>(g, Gradient<C, decltype(most)::value>(mixture, g, gs, by_channel),
                                             streams(input<Y>(gy), input<X>(x)), streams(output<X>(gx)),
                                             cut.partials ? bytes : nullptr, native(stream));
    });
    if (error != cudaSuccess || g.channels == 1) return error;
    return launch_reduce<pack_width<C>>(rows_of(g, mixture.count), RowSum<C>{output<C>(gw)},
                                        streams(static_cast<const C*>(by_channel)), streams(),
                                        cut.rows ? bytes + cut.partials + cut.by_channel : nullptr, native(stream));
  });
}

int64_t mixquant_bwd_workspace(Pair pair, const Geometry& g, int count) {
  int64_t bytes = 0;
  with_types(pair, [&](auto data, auto result) {
    bytes = cut_workspace<type_of<decltype(data)>, type_of<decltype(result)>>(g, count).total();
    return cudaSuccess;
  });
  return bytes;
}

ErrorCode launch_mixquant_jvp(Pair pair, bool tangent_of_result, const Geometry& g, const Mixture& mixture,
                              const void* tx, const void* ts, const void* tw, const void* x, void* ty,
                              StreamHandle stream) {
  return with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    const auto run = [&](auto tangent) {
      using T = type_of<decltype(tangent)>;
      return launch_map<pack_width<X, Y>>(g, Tangent<compute_t<X>>(mixture, g, ts, tw),
                                          streams(Optional<T>{input<T>(tx)}, input<X>(x)), streams(output<Y>(ty)),
                                          native(stream));
    };
    return tangent_of_result ? run(result) : run(data);
  });
}

}  // namespace fastflat::cuda
