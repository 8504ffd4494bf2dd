// SPDX-License-Identifier: Apache-2.0
#include "probes.h"

#include "cuda/launch.cuh"

namespace {

__global__ void reverse_block(float* data, int64_t n, bool wait) {
  __shared__ float held[fastflat::cuda::kBlock];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) held[threadIdx.x] = data[i];
  if (wait) __syncthreads();
  if (i < n) data[i] = held[blockDim.x - 1 - threadIdx.x];
}

__global__ void count_threads(float* data) { atomicAdd(data, 1.0f); }

__global__ void warp_sums(float* data) {
  float v = data[threadIdx.x];
  for (int by = 16; by > 0; by /= 2) v += __shfl_down_sync(0xffffffffu, v, by);
  data[threadIdx.x] = __shfl_sync(0xffffffffu, v, 0);
}

__global__ void half_a_warp(float* data) {
  const unsigned low = 0x0000ffffu;
  if (threadIdx.x % 32 < 16) data[threadIdx.x] += __shfl_xor_sync(low, data[threadIdx.x], 1);
}

__global__ void lost_at_barrier(float*) {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void two_barriers(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lost_in_shuffle(float* data) {
  if (threadIdx.x % 32 != 5) data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void lane_outside_mask(float* data) {
  if (threadIdx.x % 32 < 16) data[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
}

__global__ void one_past_the_end(float* data, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i <= n) data[i] = 1.0f;
}

__global__ void int_overflow(float* data, int64_t n) {
  const int wide = static_cast<int>(n) * 0x40000000;
  data[0] = static_cast<float>(wide + static_cast<int>(threadIdx.x));
}

}  // namespace

int probe(const std::string& name, float* data, int64_t n) {
  using fastflat::cuda::kBlock;
  using fastflat::cuda::launch;
  const int64_t blocks = fastflat::cuda::ceil_div(n, kBlock);
  if (name == "reverse_block") return launch(reverse_block, blocks, kBlock, nullptr, data, n, true);
  if (name == "race") return launch(reverse_block, blocks, kBlock, nullptr, data, n, false);
  if (name == "count_threads") return launch(count_threads, blocks, kBlock, nullptr, data);
  if (name == "warp_sums") return launch(warp_sums, 1, kBlock, nullptr, data);
  if (name == "half_a_warp") return launch(half_a_warp, 1, kBlock, nullptr, data);
  if (name == "lost_at_barrier") return launch(lost_at_barrier, 1, kBlock, nullptr, data);
  if (name == "two_barriers") return launch(two_barriers, 1, kBlock, nullptr, data);
  if (name == "lost_in_shuffle") return launch(lost_in_shuffle, 1, kBlock, nullptr, data);
  if (name == "lane_outside_mask") return launch(lane_outside_mask, 1, kBlock, nullptr, data);
  if (name == "one_past_the_end") return launch(one_past_the_end, blocks, kBlock, nullptr, data, n);
  if (name == "int_overflow") return launch(int_overflow, 1, kBlock, nullptr, data, n);
  if (name == "too_many_threads") return launch(count_threads, 1, 2048, nullptr, data);
  if (name == "too_many_blocks") return launch(count_threads, int64_t(1) << 31, kBlock, nullptr, data);
  return -1;
}
