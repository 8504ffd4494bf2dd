// SPDX-License-Identifier: Apache-2.0
#include "cuda/general_quantize.h"

#include "cuda/draws.cuh"
#include "cuda/map.cuh"
#include "cuda/reduce.cuh"
#include "cuda/storage.cuh"
#include "math/block_scale.h"
#include "math/convert.h"
#include "math/general_quantize.h"

namespace fastflat::cuda {
namespace {

// The rules of a call, uniform over it: formats, roundings and kinds of noise are switches at run time. `drawn` alone
// is compiled in, because drawing costs registers and instructions that the other half of the rules has no use for.
template <class X, bool drawn>
struct Rule {
  using Compute = compute_t<X>;
  using C = Compute;
  // Only rules without draws round every operation.
  static constexpr bool may_round = sizeof(X) == 2 && !drawn;
  static constexpr bool long_body = true;

  GeneralGrid<C> grid;
  const C* scale;
  const C* zero_point;
  const int64_t* state;
  const C* nu;
  const C* a;
  Noise noise;
  bool floats, normal, rounds, plain;
  uint32_t rounds_every;  // mask
  // Read by open().
  NoiseScale<C> scalars{};
  PhiloxState philox_state{};

  explicit Rule(const GeneralQuantizer& q)
      : grid(GeneralGrid<C>::make(q.qmin, q.qmax, q.eps, q.factor, q.rules)),
        scale(static_cast<const C*>(q.scale)),
        zero_point(static_cast<const C*>(q.zero_point)),
        state(q.state),
        nu(static_cast<const C*>(q.nu)),
        a(static_cast<const C*>(q.a)),
        noise(drawn ? noise_of(q.rules) : Noise::none),
        floats(GeneralGrid<C>::floats(q.rules)),
        normal(q.rules & rules::noise_normal),
        rounds(q.rules & (rules::compute_input | rules::through_chain)),
        plain(GeneralGrid<C>::is_plain(q.rules, q.zero_point)),
        rounds_every(mask_of<float>(q.rules & rules::compute_input)) {
    scalars.shift = q.rules & (rules::noise_uniform | rules::noise_temper) ? C(0.5) : C(0);
  }

  __device__ __forceinline__ void open() {
    if constexpr (drawn) {
      scalars.nu = nu ? load_parameter(nu, 0) : C(1);
      scalars.a = a ? load_parameter(a, 0) : C(0);
      philox_state = load_state(state);
    }
  }

  template <int N>
  __device__ __forceinline__ Draws<N> pack(int64_t offset) const {
    if constexpr (drawn) {
      return normal ? draw_normal<N>(philox_state, offset) : draw_uniform<N>(philox_state, offset);
    } else {
      return {};
    }
  }

  // A scale as it is stored, for kernels that hold many.
  struct Compact {
    C scale, zero_point;
  };

  __device__ __forceinline__ Compact compact(int64_t channel) const {
    return {load_parameter(scale, channel), zero_point ? load_parameter(zero_point, channel) : C(0)};
  }

  __device__ __forceinline__ GeneralGroup<C> expand(const Compact& of) const {
    if constexpr (may_round) {
      const RoundedTo<X> precision{rounds_every};
      return zero_point ? grid.group(of.scale, of.zero_point, precision) : grid.group(of.scale, precision);
    } else {
      return zero_point ? grid.group(of.scale, of.zero_point) : grid.group(of.scale);
    }
  }
  __device__ __forceinline__ const GeneralGroup<C>& expand(const GeneralGroup<C>& group) const { return group; }

  __device__ __forceinline__ GeneralGroup<C> group(int64_t channel) const { return expand(compact(channel)); }

  // f(precision) with what the operations of this call are rounded to.
  template <class F>
  __device__ __forceinline__ auto with_precision(const F& f) const {
    if constexpr (may_round) {
      if (rounds) return f(RoundedTo<X>{rounds_every});
    }
    return f(Exact{});
  }

  template <class Precision>
  __device__ __forceinline__ auto code(C x, float draw, const GeneralGroup<C>& group, Precision precision) const {
    return grid.code(x, static_cast<C>(draw), group, scalars, floats, drawn ? noise : Noise::none, precision);
  }

  // By packs the plain form serves: noise on an integer grid, or floats, which need the scale alone.
  __device__ __forceinline__ bool by_pack() const { return plain; }
  __device__ __forceinline__ GeneralGroup<C> pack_group(int64_t channel) const {
    GeneralGroup<C> group{};
    group.s = grid.base.group(load_parameter(scale, channel)).s;
    return group;
  }
  __device__ __forceinline__ auto plain_code(C x, float draw, const GeneralGroup<C>& group) const {
    const Noise kind = drawn ? (noise == Noise::additive ? Noise::additive : Noise::stochastic) : Noise::none;
    return grid.code_of_plain(x, static_cast<C>(draw), group, scalars, !drawn, kind);
  }
};

template <class X, bool drawn>
struct Forward : Rule<X, drawn> {
  using Rule<X, drawn>::Rule;
  using C = compute_t<X>;

  template <class Y>
  __device__ __forceinline__ void operator()(float draw, const GeneralGroup<C>& group, X x, Y& y) const {
    y = store<Y>(this->with_precision([&](auto precision) {
      return this->grid.forward(load(x), static_cast<C>(draw), group, this->scalars, this->floats,
                                drawn ? this->noise : Noise::none, precision);
    }));
  }

  template <int N, class Y>
  __device__ __forceinline__ void all(const Draws<N>& draws, const GeneralGroup<C>& group, const Pack<X, N>& x,
                                      Pack<Y, N>& y) const {
#pragma unroll
    for (int i = 0; i < N; ++i) y.v[i] = store<Y>(this->plain_code(load(x.v[i]), draws.v[i], group).d * group.s);
  }
};

// The gradients of an element.
template <class X, bool drawn>
struct Gradients : Rule<X, drawn> {
  using C = compute_t<X>;
  const C* delta;
  C delta_value = 0;

  explicit Gradients(const GeneralQuantizer& q) : Rule<X, drawn>(q), delta(static_cast<const C*>(q.delta)) {}

  __device__ __forceinline__ void open() {
    Rule<X, drawn>::open();
    if (delta) delta_value = load_parameter(delta, 0);
  }

  template <class Group>
  __device__ __forceinline__ auto of(float draw, const Group& given, C gy, C x) const {
    const GeneralGroup<C>& group = this->expand(given);
    return this->with_precision([&](auto precision) {
      return this->grid.backward(gy, x, this->code(x, draw, group, precision), group, delta_value,
                                 this->grid.chain != 0, precision);
    });
  }

  __device__ __forceinline__ bool by_pack() const { return this->plain && !delta; }
  __device__ __forceinline__ auto plainly(float draw, const GeneralGroup<C>& group, C gy, C x) const {
    return this->grid.backward(gy, x, this->plain_code(x, draw, group), group, C(0), false);
  }
};

template <class X, bool drawn>
struct DataGradient : Gradients<X, drawn> {
  using Gradients<X, drawn>::Gradients;

  template <class Y>
  __device__ __forceinline__ void operator()(float draw, const GeneralGroup<compute_t<X>>& group, Y gy, X x,
                                             X& gx) const {
    gx = store<X>(this->of(draw, group, load(gy), load(x)).x);
  }

  template <int N, class Y>
  __device__ __forceinline__ void all(const Draws<N>& draws, const GeneralGroup<compute_t<X>>& group,
                                      const Pack<Y, N>& gy, const Pack<X, N>& x, Pack<X, N>& gx) const {
#pragma unroll
    for (int i = 0; i < N; ++i) gx.v[i] = store<X>(this->plainly(draws.v[i], group, load(gy.v[i]), load(x.v[i])).x);
  }
};

// Where the sums of each scale go: gradients of scale and zero-point, of which each may be absent.
template <class C>
struct ScaleGradients {
  using Compute = C;
  static constexpr int sums = 2;
  IntegerGrid<C> base;
  const C* scales;
  C* gs;
  C* gz;

  template <class T>
  __device__ __forceinline__ static T combine(T a, T b) {
    return a + b;
  }

  __device__ __forceinline__ void finish(int64_t channel, const Sums<double, 2>& sum) const {
    if (gs) gs[channel] = base.scale_gradient(static_cast<C>(sum.v[0]));
    if (gz) gz[channel] = base.zero_gradient(static_cast<C>(sum.v[1]), base.group(load_parameter(scales, channel)));
  }
};

template <class X, bool drawn>
struct Backward : Gradients<X, drawn>, ScaleGradients<compute_t<X>> {
  using C = compute_t<X>;
  using Compute = C;
  using Finish = ScaleGradients<C>;
  static constexpr int sums = 3;
  // With draws, or in fp64: up to 128 registers a thread, for the 80 of three blocks are too few for ten rounds or for
  // masks and limits of two registers each, beside three sums.
  // Left to itself ptxas spills fp64 columns at 80, and at 128 those of mixed pairs with draws.
  static constexpr int blocks_at_once = drawn || sizeof(C) == 8 ? 2 : kBlocksAtOnce,
                       column_blocks_at_once = drawn ? 1 : 2;

  C* shares;  // of delta's gradient, one a unit

  Backward(const GeneralQuantizer& q, void* gs, void* gz, C* shares_of_delta)
      : Gradients<X, drawn>(q),
        ScaleGradients<C>{this->grid.base, this->scale, static_cast<C*>(gs), static_cast<C*>(gz)},
        shares(shares_of_delta) {}

  template <class Group, class Y>
  __device__ __forceinline__ void operator()(float draw, const Group& group, Sums<C, 3>& sum, Y gy, X x, X& gx) const {
    const auto gradient = this->of(draw, group, load(gy), load(x));
    gx = store<X>(gradient.x);
    sum.v[0] = sum.v[0] + gradient.scale;
    sum.v[1] = sum.v[1] + gradient.outside;
    sum.v[2] = sum.v[2] + gradient.delta;
  }

  // Without a zero-point and without delta there is one sum.
  template <int N, class Y>
  __device__ __forceinline__ void all(const Draws<N>& draws, const GeneralGroup<C>& group, Sums<C, 3>& sum,
                                      const Pack<Y, N>& gy, const Pack<X, N>& x, Pack<X, N>& gx) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const auto gradient = this->plainly(draws.v[i], group, load(gy.v[i]), load(x.v[i]));
      gx.v[i] = store<X>(gradient.x);
      sum.v[0] = sum.v[0] + gradient.scale;
    }
  }

  __device__ __forceinline__ void total(int64_t unit, const Sums<C, 3>& sum) const {
    if (!shares) return;
    shares[unit] = sum.v[2];
    platform::count_written(sizeof(C));
  }
};

template <class X, bool drawn>
struct Tangent : Rule<X, drawn> {
  static constexpr bool long_body = !drawn;  // with draws the one copy spills
  bool by_pack() const = delete;
  using C = compute_t<X>;
  struct Group {
    GeneralGroup<C> of;
    C ts, tz;
  };
  const C* ts;
  const C* tz;

  Tangent(const GeneralQuantizer& q, const void* scale_tangent, const void* zero_tangent)
      : Rule<X, drawn>(q), ts(static_cast<const C*>(scale_tangent)), tz(static_cast<const C*>(zero_tangent)) {}

  __device__ __forceinline__ Group group(int64_t channel) const {
    return {Rule<X, drawn>::group(channel), ts ? load_parameter(ts, channel) : C(0),
            tz ? load_parameter(tz, channel) : C(0)};
  }

  template <class T, class Y>
  __device__ __forceinline__ void operator()(float draw, const Group& group, T tx, X x, Y& y) const {
    y = store<Y>(this->with_precision([&](auto precision) {
      return this->grid.tangent(load(tx), group.ts, group.tz, this->code(load(x), draw, group.of, precision), group.of);
    }));
  }
};

// The largest magnitude of the elements of a scale, as that scale.
template <class C>
struct BlockScale {
  using Compute = C;
  static constexpr int sums = 1;
  GeneralGrid<C> grid;
  int64_t rules;
  const C* outer;
  C* result;

  BlockScale(const GeneralQuantizer& q, const void* outer_, void* scale)
      : grid(GeneralGrid<C>::make(q.qmin, q.qmax, q.eps, 1.0, q.rules)),
        rules(q.rules),
        outer(static_cast<const C*>(outer_)),
        result(static_cast<C*>(scale)) {}

  __device__ __forceinline__ int group(int64_t) const { return 0; }

  template <class T>
  __device__ __forceinline__ static T combine(T a, T b) {
    return larger_magnitude(a, b);
  }

  template <class X>
  __device__ __forceinline__ void operator()(int, Sums<C, 1>& sum, X x) const {
    sum.v[0] = combine(sum.v[0], C(std::fabs(load(x))));
  }

  __device__ __forceinline__ void finish(int64_t channel, const Sums<double, 1>& sum) const {
    const C over = outer ? load_parameter(outer, 0) : C(1);
    result[channel] = block_scale(static_cast<C>(sum.v[0]), over, grid.base.qmax, grid.format, rules);
  }
};

// Calls f(Type<X>, Type<Y>, drawn) with the last as a constant.
template <class F>
cudaError_t with_kinds(Pair pair, const GeneralQuantizer& q, F&& f) {
  const bool drawn = noise_of(q.rules) != Noise::none;
  if (drawn && !q.state) return cudaErrorInvalidValue;
  return with_types(pair, [&](auto data, auto result) {
    return drawn ? f(data, result, std::true_type{}) : f(data, result, std::false_type{});
  });
}

// Parts of the backward's workspace, in bytes: partial sums, shares of delta's gradient, partial sums of those.
struct Workspace {
  int64_t partials, shares, totals;
};

template <class C, int N>
Workspace workspace_of(const Geometry& g, bool need_delta) {
  const auto whole = [](int64_t bytes) { return ceil_div(bytes, kAccess) * kAccess; };
  Workspace w{whole(reduce_workspace<N, ScaleGradients<C>>(g)), 0, 0};
  if (!need_delta) return w;
  const int64_t units = reduce_units<N>(g);
  w.shares = whole(units * static_cast<int64_t>(sizeof(C)));
  w.totals = reduce_workspace<pack_width<C>, RowSum<C>>({1, 1, units});
  return w;
}

}  // namespace

ErrorCode launch_general_quantize(Pair pair, const Geometry& g, const GeneralQuantizer& quantizer, const void* x,
                                  void* y, StreamHandle stream) {
  return with_kinds(pair, quantizer, [&](auto data, auto result, auto drawn) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    return launch_map<pack_width<X, Y>>(g, Forward<X, decltype(drawn)::value>(quantizer), streams(input<X>(x)),
                                        streams(output<Y>(y)), native(stream));
  });
}

ErrorCode launch_general_quantize_gx(Pair pair, const Geometry& g, const GeneralQuantizer& quantizer, const void* gy,
                                     const void* x, void* gx, StreamHandle stream) {
  return with_kinds(pair, quantizer, [&](auto data, auto result, auto drawn) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    return launch_map<pack_width<X, Y>>(g, DataGradient<X, decltype(drawn)::value>(quantizer),
                                        streams(input<Y>(gy), input<X>(x)), streams(output<X>(gx)), native(stream));
  });
}

ErrorCode launch_general_quantize_bwd(Pair pair, const Geometry& g, const GeneralQuantizer& quantizer, const void* gy,
                                      const void* x, void* gx, void* gs, void* gz, void* gd, void* workspace,
                                      StreamHandle stream) {
  return with_kinds(pair, quantizer, [&](auto data, auto result, auto drawn) -> cudaError_t {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    using C = compute_t<X>;
    constexpr int pack = pack_width<X, Y>;
    const Workspace parts = workspace_of<C, pack>(g, gd != nullptr);
    auto* const memory = static_cast<char*>(workspace);
    auto* const shares = gd ? output<C>(memory + parts.partials) : nullptr;
    const cudaError_t error =
        launch_reduce<pack>(g, Backward<X, decltype(drawn)::value>(quantizer, gs, gz, shares),
                            streams(input<Y>(gy), input<X>(x)), streams(output<X>(gx)), workspace, native(stream));
    if (error != cudaSuccess || !gd) return error;
    return launch_reduce<pack_width<C>>({1, 1, reduce_units<pack>(g)}, RowSum<C>{output<C>(gd)},
                                        streams(input<C>(shares)), streams(), memory + parts.partials + parts.shares,
                                        native(stream));
  });
}

int64_t general_quantize_bwd_workspace(Pair pair, const Geometry& g, bool need_delta) {
  int64_t bytes = 0;
  with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    const Workspace parts = workspace_of<compute_t<X>, pack_width<X, Y>>(g, need_delta);
    bytes = parts.partials + parts.shares + parts.totals;
    return cudaSuccess;
  });
  return bytes;
}

ErrorCode launch_general_quantize_jvp(Pair pair, bool tangent_of_result, const Geometry& g,
                                      const GeneralQuantizer& quantizer, const void* tx, const void* ts, const void* tz,
                                      const void* x, void* ty, StreamHandle stream) {
  return with_kinds(pair, quantizer, [&](auto data, auto result, auto drawn) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    const auto run = [&](auto tangent) {
      using T = type_of<decltype(tangent)>;
      return launch_map<pack_width<X, Y>>(g, Tangent<X, decltype(drawn)::value>(quantizer, ts, tz),
                                          streams(Optional<T>{input<T>(tx)}, input<X>(x)), streams(output<Y>(ty)),
                                          native(stream));
    };
    return tangent_of_result ? run(result) : run(data);
  });
}

ErrorCode launch_general_quantize_scale(Pair pair, const Geometry& g, const GeneralQuantizer& quantizer,
                                        const void* outer, const void* x, void* scale, void* workspace,
                                        StreamHandle stream) {
  return with_types(pair, [&](auto data, auto) {
    using X = type_of<decltype(data)>;
    return launch_reduce<pack_width<X>>(g, BlockScale<compute_t<X>>(quantizer, outer, scale), streams(input<X>(x)),
                                        streams(), workspace, native(stream));
  });
}

int64_t general_quantize_scale_workspace(Pair pair, const Geometry& g) {
  int64_t bytes = 0;
  with_types(pair, [&](auto data, auto) {
    using X = type_of<decltype(data)>;
    bytes = reduce_workspace<pack_width<X>, BlockScale<compute_t<X>>>(g);
    return cudaSuccess;
  });
  return bytes;
}

}  // namespace fastflat::cuda
