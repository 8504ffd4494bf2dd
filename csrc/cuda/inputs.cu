// SPDX-License-Identifier: Apache-2.0
#include "cuda/inputs.h"

#include "cuda/draws.cuh"
#include "cuda/storage.cuh"
#include "math/inputs.h"

namespace fastflat::cuda {
namespace {

using namespace inputs;

__global__ void __launch_bounds__(kBlock)
    strengths_kernel(const int64_t* state, float* sigma, int64_t count, int64_t law, float most) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kBlock + static_cast<int>(threadIdx.x);
  if (index >= count) return;
  const int64_t seed = load_parameter(state, 0), offset = load_parameter(state, 1);
  sigma[index] = strength(stream_of(seed, offset, strength_stream), law, most, index);
  platform::count_written(sizeof(float));
}

template <class T>
struct Noise {
  const T* x;
  const int64_t* state;
  const float* sigma;
  T* noisy;
  int64_t K, n, samples, length;
  float keep;
  bool wide_in, wide_out;
};

// A thread reads a pack and writes it K times.
template <class T>
__global__ void __launch_bounds__(kBlock, kBlocksAtOnce) noise_kernel(Noise<T> f) {
  constexpr int N = pack_width<T>;
  using C = compute_t<T>;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kBlock + static_cast<int>(threadIdx.x)) * N;
  if (at >= f.n) return;
  const Range all{0, f.n};
  const auto in = load_pack<N>(f.x, at, all, f.wide_in);
  const int64_t seed = load_parameter(f.state, 0), offset = load_parameter(f.state, 1);
  const PhiloxState state = PhiloxState::make(seed, offset), of_mask = stream_of(seed, offset, mask_stream);
  const int64_t first = at / f.length, left = (first + 1) * f.length - at;
  const int64_t of_copy = draws_of_copy(f.n);
  for (int64_t k = 0; k < f.K; ++k) {
    const auto draw = draw_normal<N>(state, k * of_copy + at);
    Draws<N> kept{};
    if (f.keep < 1.0f) kept = draw_uniform<N>(of_mask, k * of_copy + at);
    int64_t sample = first, end = left;
    float factor = factor_of(load_parameter(f.sigma, k * f.samples + sample));
    Pack<T, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= end && sample + 1 < f.samples) {
        end += f.length;
        factor = factor_of(load_parameter(f.sigma, k * f.samples + ++sample));
      }
      const bool keeps = !(f.keep < 1.0f) || kept.v[i] < f.keep;
      out.v[i] = store<T>(noisy<C>(load(in.v[i]), factor, draw.v[i], keeps));
    }
    store_pack(f.noisy + k * f.n, at, all, out, f.wide_out);
  }
}

template <class T>
cudaError_t launch_noise(const NoiseCall& call, cudaStream_t stream) {
  constexpr int N = pack_width<T>;
  const int64_t n = call.samples * call.length;
  const bool wide_in = address(call.x) % kAccess == 0;
  const bool wide_out = address(call.noisy) % kAccess == 0 && n % N == 0;
  const Noise<T> f{input<T>(call.x), call.state, call.sigma,   output<T>(call.noisy),
                   call.K,           n,          call.samples, call.length,
                   call.keep,        wide_in,    wide_out};
  return launch(noise_kernel<T>, call.K ? ceil_div(n, int64_t{kBlock} * N) : 0, kBlock, stream, f);
}

}  // namespace

ErrorCode launch_inputs_noise(const NoiseCall& call, StreamHandle stream) {
  const int64_t count = call.K * call.samples;
  const cudaError_t error = launch(strengths_kernel, ceil_div(count, kBlock), kBlock, native(stream), call.state,
                                   call.sigma, count, call.law, call.most);
  if (error) return error;
  switch (call.storage) {
    case f32:
      return launch_noise<float>(call, native(stream));
    case bf16:
      return launch_noise<BFloat16>(call, native(stream));
    case f16:
      return launch_noise<Half>(call, native(stream));
    default:
      return launch_noise<double>(call, native(stream));
  }
}

}  // namespace fastflat::cuda
