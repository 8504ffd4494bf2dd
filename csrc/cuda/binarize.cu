// SPDX-License-Identifier: Apache-2.0
// Kernels of the binarize family on the skeletons of map.cuh and reduce.cuh: a reduction for the quotient of each
// scale, then a map that uses it.
#include "cuda/binarize.h"

#include "cuda/map.cuh"
#include "cuda/reduce.cuh"
#include "cuda/storage.cuh"
#include "math/binarize.h"

namespace fastflat::cuda {
namespace {

// (the first sum + more) / the second sum, which is that of importance; without one, over the count of elements.
template <class C, int K>
struct Quotient {
  using Compute = C;
  static constexpr int sums = K;
  static constexpr int column_blocks_at_once = 2;  // asked for: of itself ptxas takes few registers and spills
  double count;
  const C* more;
  C* result;

  __device__ __forceinline__ int group(int64_t) const { return 0; }

  template <class T>
  __device__ __forceinline__ static T combine(T a, T b) {
    return a + b;
  }

  template <class... H>
  __device__ __forceinline__ static void add(Sums<C, K>& sum, C term, H... h) {
    static_assert(sizeof...(H) == K - 1);
    sum.v[0] = sum.v[0] + term;
    ((sum.v[K - 1] = sum.v[K - 1] + h), ...);
  }

  __device__ __forceinline__ void finish(int64_t channel, const Sums<double, K>& sum) const {
    const double extra = more ? static_cast<double>(load_parameter(more, channel)) : 0.0;
    result[channel] = Binarize<C>::quotient(sum.v[0] + extra, K == 1 ? count : sum.v[K - 1]);
  }
};

template <class C>
__device__ __forceinline__ C weighed(C v) {
  return v;
}
template <class C>
__device__ __forceinline__ C weighed(C v, C h) {
  return h * v;
}

template <class C, int K>
struct Magnitudes : Quotient<C, K> {
  using Finish = Quotient<C, K>;

  template <class X, class... H>
  __device__ __forceinline__ void operator()(int, Sums<C, K>& sum, X x, H... h) const {
    this->add(sum, weighed(Binarize<C>::magnitude(load(x)), h...), h...);
  }
};

template <class C, int K>
struct Gradients : Quotient<C, K> {
  using Finish = Quotient<C, K>;

  template <class Y, class X, class... H>
  __device__ __forceinline__ void operator()(int, Sums<C, K>& sum, Y gy, X x, H... h) const {
    this->add(sum, load(gy) * Binarize<C>::sign(load(x)), h...);
  }
};

template <class C, int K>
struct Tangents : Quotient<C, K> {
  using Finish = Quotient<C, K>;

  template <class X, class... H>
  __device__ __forceinline__ void operator()(int, Sums<C, K>& sum, X tx, X x, H... h) const {
    this->add(sum, weighed(Binarize<C>::sign(load(x)) * load(tx), h...), h...);
  }
};

// The sum of importance alone.
template <class C>
struct Weights : Quotient<C, 2> {
  using Finish = Quotient<C, 2>;

  __device__ __forceinline__ void operator()(int, Sums<C, 2>& sum, C h) const { sum.v[1] = sum.v[1] + h; }
};

template <class C>
struct Forward {
  const C* alpha;

  __device__ __forceinline__ C group(int64_t channel) const { return load_parameter(alpha, channel); }

  template <class X, class Y>
  __device__ __forceinline__ void operator()(C a, X x, Y& y) const {
    y = store<Y>(Binarize<C>::forward(load(x), a));
  }
};

// Gradient and tangent: the straight-through part of v and, with `through`, the part of the scale, sign(x) times k or
// (h sign(x)) times k.
template <class C, bool through>
struct Linear {
  struct Group {
    C alpha, k;
  };
  Binarize<C> rule;
  const C* alpha;
  const C* k;

  __device__ __forceinline__ Group group(int64_t channel) const {
    return {load_parameter(alpha, channel), through ? load_parameter(k, channel) : C(0)};
  }

  template <class V, class X, class R>
  __device__ __forceinline__ void operator()(const Group& group, V v, X x, R& result) const {
    result = store<R>(of(group, load(v), load(x)));
  }
  template <class V, class X, class R>
  __device__ __forceinline__ void operator()(const Group& group, V v, X x, C h, R& result) const {
    result = store<R>(of(group, load(v), load(x), h));
  }

  template <class... H>
  __device__ __forceinline__ C of(const Group& group, C v, C x, H... h) const {
    const C straight = rule.passed(v, x, group.alpha);
    if constexpr (through) {
      return straight + weighed(rule.sign(x), h...) * group.k;
    } else {
      return straight;
    }
  }
};

template <template <class, int> class F, int N, class C, class... In>
cudaError_t launch_quotient(const Geometry& g, const void* more, void* result, const void* h, void* workspace,
                            StreamHandle stream, const In*... in) {
  const double count = static_cast<double>(g.outer) * static_cast<double>(g.inner);
  if (h) {
    return launch_reduce<N>(g, F<C, 2>{{count, input<C>(more), output<C>(result)}}, streams(in..., input<C>(h)),
                            streams(), workspace, native(stream));
  }
  return launch_reduce<N>(g, F<C, 1>{{count, input<C>(more), output<C>(result)}}, streams(in...), streams(), workspace,
                          native(stream));
}

}  // namespace

int64_t binarize_workspace(Pair pair, const Geometry& g, bool weighed) {
  int64_t bytes = 0;
  with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using C = compute_t<X>;
    constexpr int one = pack_width<X>, both = pack_width<X, type_of<decltype(result)>>;
    const auto most = [](int64_t a, int64_t b) { return a < b ? b : a; };
    bytes = weighed ? most(reduce_workspace<one, Quotient<C, 2>>(g), reduce_workspace<both, Quotient<C, 2>>(g))
                    : most(reduce_workspace<one, Quotient<C, 1>>(g), reduce_workspace<both, Quotient<C, 1>>(g));
    return cudaSuccess;
  });
  return bytes;
}

ErrorCode launch_binarize_alpha(Pair pair, const Geometry& g, const void* x, const void* h, void* alpha,
                                void* workspace, StreamHandle stream) {
  return with_types(pair, [&](auto data, auto) {
    using X = type_of<decltype(data)>;
    return launch_quotient<Magnitudes, pack_width<X>, compute_t<X>>(g, nullptr, alpha, h, workspace, stream,
                                                                    input<X>(x));
  });
}

ErrorCode launch_binarize(Pair pair, const Geometry& g, const void* x, const void* alpha, void* y,
                          StreamHandle stream) {
  return with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    using C = compute_t<X>;
    return launch_map<pack_width<X, Y>>(g, Forward<C>{input<C>(alpha)}, streams(input<X>(x)), streams(output<Y>(y)),
                                        native(stream));
  });
}

ErrorCode launch_binarize_k(Pair pair, const Geometry& g, const void* gy, const void* ga, const void* x, const void* h,
                            void* k, void* workspace, StreamHandle stream) {
  return with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    using C = compute_t<X>;
    constexpr int pack = pack_width<X, Y>;
    if (gy) {
      return launch_quotient<Gradients, pack, C>(g, ga, k, h, workspace, stream, input<Y>(gy), input<X>(x));
    }
    const double count = static_cast<double>(g.outer) * static_cast<double>(g.inner);
    // Without h nothing is left to sum: of an empty tensor every scale is still finished.
    return h ? launch_reduce<pack>(g, Weights<C>{{count, input<C>(ga), output<C>(k)}}, streams(input<C>(h)), streams(),
                                   workspace, native(stream))
             : launch_reduce<pack>({0, g.channels, g.inner}, Gradients<C, 1>{{count, input<C>(ga), output<C>(k)}},
                                   streams(input<Y>(gy), input<X>(x)), streams(), workspace, native(stream));
  });
}

ErrorCode launch_binarize_gx(Pair pair, const Geometry& g, double clip, const void* gy, const void* x, const void* h,
                             const void* alpha, const void* k, void* gx, StreamHandle stream) {
  return with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    using C = compute_t<X>;
    constexpr int pack = pack_width<X, Y>;
    const Binarize<C> rule{static_cast<C>(clip)};
    const auto run = [&](auto through, auto in) {
      const Linear<C, decltype(through)::value> f{rule, input<C>(alpha), input<C>(k)};
      return launch_map<pack>(g, f, in, streams(output<X>(gx)), native(stream));
    };
    const auto plain = streams(input<Y>(gy), input<X>(x));
    if (!k) return run(std::false_type{}, plain);
    return h ? run(std::true_type{}, streams(input<Y>(gy), input<X>(x), input<C>(h))) : run(std::true_type{}, plain);
  });
}

ErrorCode launch_binarize_ta(Pair pair, const Geometry& g, const void* tx, const void* x, const void* h, void* ta,
                             void* workspace, StreamHandle stream) {
  return with_types(pair, [&](auto data, auto) {
    using X = type_of<decltype(data)>;
    return launch_quotient<Tangents, pack_width<X>, compute_t<X>>(g, nullptr, ta, h, workspace, stream, input<X>(tx),
                                                                  input<X>(x));
  });
}

ErrorCode launch_binarize_ty(Pair pair, const Geometry& g, double clip, const void* tx, const void* x,
                             const void* alpha, const void* ta, void* ty, StreamHandle stream) {
  return with_types(pair, [&](auto data, auto result) {
    using X = type_of<decltype(data)>;
    using Y = type_of<decltype(result)>;
    using C = compute_t<X>;
    const auto run = [&](auto through) {
      const Linear<C, decltype(through)::value> f{{static_cast<C>(clip)}, input<C>(alpha), input<C>(ta)};
      return launch_map<pack_width<X, Y>>(g, f, streams(input<X>(tx), input<X>(x)), streams(output<Y>(ty)),
                                          native(stream));
    };
    return ta ? run(std::true_type{}) : run(std::false_type{});
  });
}

}  // namespace fastflat::cuda
