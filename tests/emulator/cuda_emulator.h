// SPDX-License-Identifier: Apache-2.0
// Runs a .cu file on the CPU: launch.cuh includes this header where nvcc is absent. A seed shuffles blocks and threads,
// so that results which depend on their order change; accesses to global memory are counted. One-dimensional grids and
// static shared memory: what the kernels use.
#pragma once

#include "fibres.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) [[gnu::may_alias]] uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t {  // the values of CUDA's own enumeration
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorMisalignedAddress = 716,
};

namespace fastflat::emulator {

// What a test sets, and what it reads back.
struct Control {
  uint64_t seed = 0;                              // 0: natural order
  int64_t edge_blocks = 0;                        // k > 0: only the first and last k blocks of a grid run
  int64_t read = 0, written = 0, parameters = 0;  // bytes of global memory, as the kernels' accessors count them
  int64_t launches = 0, blocks = 0;
  cudaStream_t stream = nullptr;  // of the last launch
};
inline Control control;

inline void count_read(size_t bytes) { control.read += static_cast<int64_t>(bytes); }
inline void count_written(size_t bytes) { control.written += static_cast<int64_t>(bytes); }
inline void count_parameter(size_t bytes) { control.parameters += static_cast<int64_t>(bytes); }
inline uint4 load_16(const void* from) { return *static_cast<const uint4*>(from); }
inline void store_16(void* to, uint4 v) { *static_cast<uint4*>(to) = v; }

template <class Body>
cudaError_t launch(int64_t blocks, int threads, cudaStream_t stream, Body body) {
  if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024) return cudaErrorInvalidConfiguration;
  std::vector<unsigned> order;
  const int64_t edge = control.edge_blocks ? control.edge_blocks : blocks;
  for (int64_t b = 0; b < blocks; ++b) {
    if (b < edge || b >= blocks - edge) order.push_back(static_cast<unsigned>(b));
  }
  std::mt19937_64 random(control.seed);
  if (control.seed) std::shuffle(order.begin(), order.end(), random);
  machine.body = body;
  machine.error = nullptr;
  control.stream = stream;
  ++control.launches;
  control.blocks += blocks;
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  try {
    for (unsigned b : order) {
      blockIdx.x = b;
      run_block(static_cast<unsigned>(threads), control.seed != 0, random);
    }
  } catch (...) {
    machine.fibres.clear();  // some are stuck half-way
    throw;
  }
  return cudaSuccess;
}

}  // namespace fastflat::emulator

namespace fastflat::platform {
using namespace fastflat::emulator;
}

inline void __syncthreads(const std::source_location& where = std::source_location::current()) {
  fastflat::emulator::suspend(fastflat::emulator::State::barrier, where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with,
                  const std::source_location& where = std::source_location::current()) {
  const unsigned lane = threadIdx.x % fastflat::emulator::warp;
  return fastflat::emulator::exchange(mask, value, lane ^ static_cast<unsigned>(with), where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, const std::source_location& where = std::source_location::current()) {
  return fastflat::emulator::exchange(mask, value, static_cast<unsigned>(lane) % fastflat::emulator::warp, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int by,
                   const std::source_location& where = std::source_location::current()) {
  const unsigned lane = threadIdx.x % fastflat::emulator::warp, from = lane + static_cast<unsigned>(by);
  return fastflat::emulator::exchange(mask, value, from < fastflat::emulator::warp ? from : lane, where);
}

// Fibres yield nowhere else, so a plain read-modify-write is atomic.
template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}
