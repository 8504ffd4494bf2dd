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
  static constexpr bool long_body = true;
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

  // By packs the parameters of a candidate are read once for all elements, and the plain form serves.
  __device__ __forceinline__ bool by_pack() const { return rules == 0; }
  __device__ __forceinline__ int64_t pack_group(int64_t channel) const { return channel; }
  __device__ __forceinline__ Candidate<C, true> plain(int j) const {
    return Candidate<C, true>::make(load_parameter(qmin, j), load_parameter(qmax, j), load_parameter(weight, j), eps,
                                    0);
  }
};

template <class C>
struct Value : Mixed<C> {
  using Mixed<C>::Mixed;

  template <class X, class Y>
  __device__ __forceinline__ void operator()(int64_t channel, X x, Y& y) const {
    C sum = -C(0);
#pragma unroll 1
    for (int j = 0; j < this->count; ++j) {
      this->one(j, channel, load(x), [&](int, const auto& term, C w) { sum += weighted(term.value, w); });
    }
    y = store<Y>(sum);
  }

  template <class X, class Y, int N>
  __device__ __forceinline__ void all(int64_t channel, const Pack<X, N>& x, Pack<Y, N>& y) const {
    C sum[N];
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = -C(0);
#pragma unroll 1
    for (int j = 0; j < this->count; ++j) {
      const auto c = this->plain(j);
      const auto group = c.group(load_parameter(this->scale, j * this->channels + channel));
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += weighted(c.grid.forward(load(x.v[i]), group), c.weight);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) y.v[i] = store<Y>(sum[i]);
  }
};

template <class C>
struct Tangent : Mixed<C> {
  static constexpr int blocks_at_once = 2;
  bool by_pack() const = delete;
  const C* ts;
  const C* tw;

  Tangent(const Mixture& m, const Geometry& g, const void* scale_tangent, const void* weight_tangent)
      : Mixed<C>(m, g), ts(static_cast<const C*>(scale_tangent)), tw(static_cast<const C*>(weight_tangent)) {}

  template <class T, class X, class Y>
  __device__ __forceinline__ void operator()(int64_t channel, T tx, X x, Y& y) const {
    C pass = 0, rest = -C(0);
#pragma unroll 1
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

// Sums over the elements of a scale, one for each of up to `most` candidates.
template <class C, int most>
struct ScaleGradients : Mixed<C> {
  static constexpr int sums = most;
  static constexpr int finish_blocks_at_once = 4;  // left to itself ptxas spills at 40 registers on sm_100
  C* gs;

  ScaleGradients(const Mixture& m, const Geometry& g, void* scale_gradient)
      : Mixed<C>(m, g), gs(static_cast<C*>(scale_gradient)) {}

  __device__ __forceinline__ int used() const { return this->count; }

  template <class T>
  __device__ __forceinline__ static T combine(T a, T b) {
    return a + b;
  }

  __device__ __forceinline__ void finish(int64_t channel, const Sums<double, most>& sum) const {
#pragma unroll
    for (int j = 0; j < most; ++j) {
      if (j >= this->count) break;
      gs[j * this->channels + channel] = mixture_scale_gradient(
          static_cast<C>(sum.v[j]), load_parameter(this->weight, j), load_parameter(this->factor, j));
    }
  }
};

// Candidates of the backward that are written out one after another: more are a longer program, not a faster one.
inline constexpr int kAtOnce = 4;

// Sum j belongs to the scale of candidate j, sum most + j to its weight, which all scales share.
template <class C, int most>
struct Gradient : ScaleGradients<C, most> {
  using Finish = ScaleGradients<C, most>;
  static constexpr int sums = 2 * most;
  // The sums of all candidates stay in registers: fewer blocks at once leave room for them.
  static constexpr int blocks_at_once = 1, column_blocks_at_once = 1;
  C* shares;  // [count, units]: what each piece of the data adds to the gradients of the weights
  int64_t units;

  Gradient(const Mixture& m, const Geometry& g, void* scale_gradient, C* to, int64_t pieces)
      : Finish(m, g, scale_gradient), shares(to), units(pieces) {}

  template <class Y, class X>
  __device__ __forceinline__ void operator()(int64_t channel, Sums<C, sums>& sum, Y gy_, X x, X& gx) const {
    const C gy = load(gy_);
    C pass = 0;
#pragma unroll 1
    for (int first = 0; first < most; first += kAtOnce) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (first + k >= this->count) break;
        this->one(first + k, channel, load(x), [&](int, const auto& term, C) {
          pass += term.pass;
          // Registers have no index: every place asks whether it is meant.
#pragma unroll
          for (int j = k; j < most; j += kAtOnce) {
            if (j != first + k) continue;
            sum.v[j] += gy * term.by_scale;
            sum.v[most + j] += gy * term.value;
          }
        });
      }
    }
    gx = store<X>(passed(gy, pass));
  }

  template <class Y, class X, int N>
  __device__ __forceinline__ void all(int64_t channel, Sums<C, sums>& sum, const Pack<Y, N>& gy, const Pack<X, N>& x,
                                      Pack<X, N>& gx) const {
    C pass[N]{};
#pragma unroll 1
    for (int candidate = 0; candidate < this->count; ++candidate) {
      const auto c = this->plain(candidate);
      const auto group = c.group(load_parameter(this->scale, candidate * this->channels + channel));
      C of_scale = 0, of_weight = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const auto term = c.term(load(x.v[i]), group);
        pass[i] += term.pass;
        of_scale += load(gy.v[i]) * term.by_scale;
        of_weight += load(gy.v[i]) * term.value;
      }
      // Registers have no index: every sum asks whether it is meant.
#pragma unroll
      for (int j = 0; j < most; ++j) {
        if (j != candidate) continue;
        sum.v[j] += of_scale;
        sum.v[most + j] += of_weight;
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) gx.v[i] = store<X>(passed(load(gy.v[i]), pass[i]));
  }

  __device__ __forceinline__ void total(int64_t unit, const Sums<C, sums>& sum) const {
#pragma unroll
    for (int j = 0; j < most; ++j) {
      if (j >= this->count) break;
      shares[j * units + unit] = sum.v[most + j];
      platform::count_written(sizeof(C));
    }
  }
};

// Calls f(number) with the least compiled number of candidates that holds `count`, as a constant.
template <class F>
auto with_most(int count, const F& f) {
  if (count <= kAtOnce) return f(std::integral_constant<int, kAtOnce>{});
  return f(std::integral_constant<int, most_candidates>{});
}

// Parts of the backward's workspace, in bytes: partial sums, shares of the weights' gradients, partial sums of those.
struct Workspace {
  int64_t partials, shares, totals;
};

template <class X, class Y>
Workspace workspace_of(const Geometry& g, int count) {
  using C = compute_t<X>;
  constexpr int pack = pack_width<X, Y>;
  const auto whole = [](int64_t bytes) { return ceil_div(bytes, kAccess) * kAccess; };
  const int64_t units = reduce_units<pack>(g);
  const int64_t partials =
      with_most(count, [&](auto most) { return reduce_workspace<pack, Gradient<C, decltype(most)::value>>(g); });
  return {whole(partials), whole(count * units * static_cast<int64_t>(sizeof(C))),
          reduce_workspace<pack_width<C>, RowSum<C>>({1, count, units})};
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
    constexpr int pack = pack_width<X, Y>;
    const int count = mixture.count;
    const Workspace parts = workspace_of<X, Y>(g, count);
    const int64_t units = reduce_units<pack>(g);
    auto* const memory = static_cast<char*>(workspace);
    auto* const shares = output<C>(memory + parts.partials);
    const cudaError_t error = with_most(count, [&](auto most) {
      return launch_reduce<pack>(g, Gradient<C, decltype(most)::value>(mixture, g, gs, shares, units),
                                 streams(input<Y>(gy), input<X>(x)), streams(output<X>(gx)), memory, native(stream));
    });
    if (error != cudaSuccess) return error;
    return launch_reduce<pack_width<C>>({1, count, units}, RowSum<C>{output<C>(gw)}, streams(input<C>(shares)),
                                        streams(), memory + parts.partials + parts.shares, native(stream));
  });
}

int64_t mixquant_bwd_workspace(Pair pair, const Geometry& g, int count) {
  int64_t bytes = 0;
  with_types(pair, [&](auto data, auto result) {
    const Workspace parts = workspace_of<type_of<decltype(data)>, type_of<decltype(result)>>(g, count);
    bytes = parts.partials + parts.shares + parts.totals;
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
