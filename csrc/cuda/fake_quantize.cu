// SPDX-License-Identifier: Apache-2.0
#include "cuda/fake_quantize.h"

#include "cuda/map.cuh"
#include "cuda/reduce.cuh"
#include "cuda/resident.cuh"
#include "cuda/storage.cuh"
#include "math/convert.h"
#include "math/fake_quantize.h"

namespace fastflat::cuda {
namespace {

template <class C, GridForm form = GridForm::full>
struct Quantize {
  using Compute = C;
  IntegerGrid<C, form> grid;
  const C* scale;
  const C* zero_point;

  explicit Quantize(const Quantizer& q)
      : grid(IntegerGrid<C, form>::make(q.qmin, q.qmax, q.eps, q.factor, q.rules)),
        scale(static_cast<const C*>(q.scale)),
        zero_point(static_cast<const C*>(q.zero_point)) {}

  __device__ __forceinline__ QuantGroup<C> group(int64_t channel) const {
    const C s = load_parameter(scale, channel);
    if constexpr (form == GridForm::plain) return grid.group(s);
    return zero_point ? grid.group(s, load_parameter(zero_point, channel)) : grid.group(s);
  }
};

template <class C, GridForm form = GridForm::full>
struct Forward : Quantize<C, form> {
  using Quantize<C, form>::Quantize;

  template <class X, class Y>
  __device__ __forceinline__ void operator()(const QuantGroup<C>& group, X x, Y& y) const {
    y = store<Y>(this->grid.forward(load(x), group));
  }
};

template <class C, GridForm form = GridForm::full>
struct StraightThrough : Quantize<C, form> {
  using Quantize<C, form>::Quantize;

  template <class Y, class X>
  __device__ __forceinline__ void operator()(const QuantGroup<C>& group, Y gy, X x, X& gx) const {
    gx = store<X>(this->grid.backward(load(gy), load(x), group).x);
  }
};

template <class C, GridForm form = GridForm::full>
struct Backward : Quantize<C, form> {
  // Only a zero-point has use for the second.
  static constexpr int sums = form == GridForm::plain ? 1 : 2;
  static constexpr int column_blocks_at_once = form == GridForm::plain ? 0 : 2;
  C* gs;
  C* gz;

  Backward(const Quantizer& q, void* scale_gradient, void* zero_gradient)
      : Quantize<C, form>(q), gs(static_cast<C*>(scale_gradient)), gz(static_cast<C*>(zero_gradient)) {}

  template <class T>
  __device__ __forceinline__ static T combine(T a, T b) {
    return a + b;
  }

  template <class Y, class X>
  __device__ __forceinline__ void operator()(const QuantGroup<C>& group, Sums<C, sums>& sum, Y gy, X x, X& gx) const {
    const auto gradient = this->grid.backward(load(gy), load(x), group);
    gx = store<X>(gradient.x);
    sum.v[0] = combine(sum.v[0], gradient.scale);
    if constexpr (sums > 1) sum.v[1] = combine(sum.v[1], gradient.outside);
  }

  __device__ __forceinline__ void finish(int64_t channel, const Sums<double, sums>& sum) const {
    gs[channel] = this->grid.scale_gradient(static_cast<C>(sum.v[0]));
    if constexpr (sums > 1) {
      if (gz) gz[channel] = this->grid.zero_gradient(static_cast<C>(sum.v[1]), this->group(channel));
    }
  }
};

template <class C>
struct Tangent : Quantize<C> {
  struct Group {
    QuantGroup<C> of;
    C ts, tz;
  };
  const C* ts;
  const C* tz;

  Tangent(const Quantizer& q, const void* scale_tangent, const void* zero_tangent)
      : Quantize<C>(q), ts(static_cast<const C*>(scale_tangent)), tz(static_cast<const C*>(zero_tangent)) {}

  __device__ __forceinline__ Group group(int64_t channel) const {
    return {Quantize<C>::group(channel), ts ? load_parameter(ts, channel) : C(0),
            tz ? load_parameter(tz, channel) : C(0)};
  }

  template <class T, class X, class Y>
  __device__ __forceinline__ void operator()(const Group& group, T tx, X x, Y& y) const {
    y = store<Y>(this->grid.tangent(load(tx), group.ts, group.tz, load(x), group.of));
  }
};

// The largest magnitude of a run, as its scale; alone (reduce) or followed by the quantization (resident).
template <class C, GridForm form = GridForm::full>
struct AbsMax : Forward<C, form> {
  static constexpr int sums = 1;
  C* result;

  AbsMax(const Quantizer& q, void* scale) : Forward<C, form>(q), result(static_cast<C*>(scale)) {}

  template <class T>
  __device__ __forceinline__ static T combine(T a, T b) {
    return larger_magnitude(a, b);
  }

  template <class X>
  __device__ __forceinline__ C measure(X x) const {
    return std::fabs(load(x));
  }

  __device__ __forceinline__ int group(int64_t) const { return 0; }
  __device__ __forceinline__ QuantGroup<C> group(int64_t, C absmax) const {
    return this->grid.group(absmax_scale(absmax, this->grid.qmax));
  }

  using Forward<C, form>::operator();
  template <class X>
  __device__ __forceinline__ void operator()(int, Sums<C, 1>& sum, X x) const {
    sum.v[0] = combine(sum.v[0], measure(x));
  }

  __device__ __forceinline__ void finish(int64_t channel, const Sums<double, 1>& sum) const {
    result[channel] = absmax_scale(static_cast<C>(sum.v[0]), this->grid.qmax);
  }
};

template <GridForm form>
using Form = std::integral_constant<GridForm, form>;

// Calls f with the form that a call's rules allow. All bits are the same; fp64 and mixed pairs, which are rare, have
// the full one alone.
template <class X, class Y, class F>
cudaError_t with_form(const Quantizer& q, const F& f) {
  if constexpr (std::is_same_v<X, Y> && !std::is_same_v<X, double>) {
    if (IntegerGrid<compute_t<X>>::is_plain(q.rules, q.zero_point)) return f(Form<GridForm::plain>{});
  }
  return f(Form<GridForm::full>{});
}

}  // namespace

ErrorCode launch_fake_quantize(Pair pair, const Geometry& g, const Quantizer& quantizer, const void* x, void* y,
                               StreamHandle stream) {
  return with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    return with_form<X, Y>(quantizer, [&](auto form) {
      return launch_map<pack_width<X, Y>>(g, Forward<compute_t<X>, form>(quantizer), streams(input<X>(x)),
                                          streams(output<Y>(y)), native(stream));
    });
  });
}

ErrorCode launch_fake_quantize_ste(Pair pair, const Geometry& g, const Quantizer& quantizer, const void* gy,
                                   const void* x, void* gx, StreamHandle stream) {
  return with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    return with_form<X, Y>(quantizer, [&](auto form) {
      return launch_map<pack_width<X, Y>>(g, StraightThrough<compute_t<X>, form>(quantizer),
                                          streams(input<Y>(gy), input<X>(x)), streams(output<X>(gx)), native(stream));
    });
  });
}

ErrorCode launch_fake_quantize_bwd(Pair pair, const Geometry& g, const Quantizer& quantizer, const void* gy,
                                   const void* x, void* gx, void* gs, void* gz, void* workspace, StreamHandle stream) {
  return with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    return with_form<X, Y>(quantizer, [&](auto form) {
      return launch_reduce<pack_width<X, Y>>(g, Backward<compute_t<X>, form>(quantizer, gs, gz),
                                             streams(input<Y>(gy), input<X>(x)), streams(output<X>(gx)), workspace,
                                             native(stream));
    });
  });
}

int64_t fake_quantize_bwd_workspace(Pair pair, const Geometry& g) {
  int64_t bytes = 0;
  with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    bytes = reduce_workspace<pack_width<X, Y>, Backward<compute_t<X>>>(g);
    return cudaSuccess;
  });
  return bytes;
}

ErrorCode launch_fake_quantize_jvp(Pair pair, bool tangent_of_result, const Geometry& g, const Quantizer& quantizer,
                                   const void* tx, const void* ts, const void* tz, const void* x, void* ty,
                                   StreamHandle stream) {
  return with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    const auto run = [&](auto tangent) {
      using T = type_of<decltype(tangent)>;
      return launch_map<pack_width<X, Y>>(g, Tangent<compute_t<X>>(quantizer, ts, tz),
                                          streams(Optional<T>{input<T>(tx)}, input<X>(x)), streams(output<Y>(ty)),
                                          native(stream));
    };
    return tangent_of_result ? run(result) : run(data);
  });
}

ErrorCode launch_fake_quantize_absmax(Pair pair, const Geometry& g, const Quantizer& quantizer, const void* x, void* y,
                                      void* scale, void* workspace, StreamHandle stream) {
  Quantizer dynamic = quantizer;
  dynamic.scale = scale;
  dynamic.zero_point = nullptr;
  return with_types(pair, [&](auto data, auto result) -> cudaError_t {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    using C = compute_t<X>;
    constexpr int pack = pack_width<X, Y>;
    const int team = resident_team<X, pack>(g);
    if (team == 0) {
      const cudaError_t error = launch_reduce<pack_width<X>>(g, AbsMax<C>(dynamic, scale), streams(input<X>(x)),
                                                             streams(), workspace, native(stream));
      if (error != cudaSuccess) return error;
    }
    return with_form<X, Y>(dynamic, [&](auto form) {
      if (team) {
        return launch_resident<pack>(g, team, AbsMax<C, form>(dynamic, scale), input<X>(x), output<Y>(y),
                                     native(stream));
      }
      return launch_map<pack>(g, Forward<C, form>(dynamic), streams(input<X>(x)), streams(output<Y>(y)),
                              native(stream));
    });
  });
}

int64_t fake_quantize_absmax_workspace(Pair pair, const Geometry& g) {
  int64_t bytes = 0;
  with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    if (!resident_team<X, pack_width<X, type_of<decltype(result)>>>(g)) {
      bytes = reduce_workspace<pack_width<X>, AbsMax<compute_t<X>>>(g);
    }
    return cudaSuccess;
  });
  return bytes;
}

}  // namespace fastflat::cuda
