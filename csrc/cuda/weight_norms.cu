// SPDX-License-Identifier: Apache-2.0
#include "cuda/weight_norms.h"

#include "cuda/map.cuh"
#include "cuda/storage.cuh"
#include "math/weight_norms.h"

namespace fastflat::cuda {
namespace {

template <class T>
struct SaturateMap {
  using C = compute_t<T>;
  const C* alpha;

  __device__ __forceinline__ weight_norms::Saturate<C> group(int64_t) const { return {load_parameter(alpha, 0)}; }
  __device__ __forceinline__ void operator()(const weight_norms::Saturate<C>& rule, T w, T& y) const {
    y = store<T>(rule(static_cast<C>(load(w))));
  }
};

}  // namespace

ErrorCode launch_weight_norms_saturate(const WeightNormsCall& call, StreamHandle stream) {
  const auto run = [&](auto type) {
    using T = type_of<decltype(type)>;
    const SaturateMap<T> f{input<compute_t<T>>(call.alpha)};
    return launch_map<pack_width<T>>({1, 1, call.numel()}, f, streams(input<T>(call.w)), streams(output<T>(call.out)),
                                     native(stream));
  };
  switch (call.storage) {
    case f32:
      return run(Type<float>{});
    case bf16:
      return run(Type<BFloat16>{});
    case f16:
      return run(Type<Half>{});
    default:
      return run(Type<double>{});
  }
}

}  // namespace fastflat::cuda
