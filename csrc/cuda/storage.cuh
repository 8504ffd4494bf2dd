// SPDX-License-Identifier: Apache-2.0
// From the storage types that a launcher is told at run time to those that kernels are compiled for.
#pragma once

#include "core/pairs.h"
#include "cuda/launch.cuh"
#include "cuda/types.h"
#include "math/convert.h"

namespace fastflat::cuda {

template <class T>
struct Type {
  using type = T;
};
template <class Tag>
using type_of = typename Tag::type;

// Calls f(Type<X>, Type<Y>) for the storage types of data and result.
template <class F>
cudaError_t with_types(Pair pair, F&& f) {
  switch (pair) {
    case f32_f32:
      return f(Type<float>{}, Type<float>{});
    case bf16_bf16:
      return f(Type<BFloat16>{}, Type<BFloat16>{});
    case f16_f16:
      return f(Type<Half>{}, Type<Half>{});
    case f64_f64:
      return f(Type<double>{}, Type<double>{});
    case f32_bf16:
      return f(Type<float>{}, Type<BFloat16>{});
    case f32_f16:
      return f(Type<float>{}, Type<Half>{});
    default:
      return cudaErrorInvalidValue;
  }
}

template <class T>
const T* input(const void* pointer) {
  return static_cast<const T*>(pointer);
}
template <class T>
T* output(void* pointer) {
  return static_cast<T*>(pointer);
}
inline cudaStream_t native(StreamHandle stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace fastflat::cuda
