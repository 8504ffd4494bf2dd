// SPDX-License-Identifier: Apache-2.0
// Runs a .cu file on the CPU: launch.cuh includes this header where nvcc is absent. One fibre per CUDA thread, one
// block at a time on one OS thread; barriers and shuffles suspend a fibre until its partners arrive, and report
// partners that never do. A seed shuffles blocks and threads, so that results which depend on their order change.
// One-dimensional grids and static shared memory: what the kernels use.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) [[gnu::may_alias]] uint4 {
  unsigned x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

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

enum class State { ready, barrier, shuffle, done };

inline constexpr size_t stack_bytes = size_t(1) << 17;
inline constexpr unsigned warp = 32;

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  void* sanitizer = nullptr;
  State state = State::done;
  std::source_location where;
  unsigned mask = 0, source = 0;  // of a shuffle: who takes part, and which lane this one reads
  alignas(16) char sent[16], received[16];
};

struct Machine {
  ucontext_t scheduler;
  void* sanitizer = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  std::vector<std::unique_ptr<Fibre>> fibres;
  Fibre* current = nullptr;
  std::function<void()> body;
  std::exception_ptr error;
};
inline Machine machine;

#ifdef __SANITIZE_ADDRESS__
inline void leave(void** mine, const void* bottom, size_t size) { __sanitizer_start_switch_fiber(mine, bottom, size); }
inline void arrive(void* mine, const void** from, size_t* size) { __sanitizer_finish_switch_fiber(mine, from, size); }
#else
inline void leave(void**, const void*, size_t) {}
inline void arrive(void*, const void**, size_t*) {}
#endif

inline void suspend(State state, const std::source_location& where) {
  Fibre& f = *machine.current;
  f.state = state;
  f.where = where;
  leave(&f.sanitizer, machine.bottom, machine.size);
  swapcontext(&f.context, &machine.scheduler);
  arrive(f.sanitizer, &machine.bottom, &machine.size);
}

inline void fibre_main() {
  arrive(nullptr, &machine.bottom, &machine.size);
  for (;;) {  // a fibre serves one thread of block after block
    try {
      machine.body();
    } catch (...) {
      machine.error = std::current_exception();
    }
    suspend(State::done, std::source_location::current());
  }
}

inline void resume(unsigned thread) {
  Fibre& f = *machine.fibres[thread];
  machine.current = &f;
  threadIdx.x = thread;
  leave(&machine.sanitizer, f.stack.get(), stack_bytes);
  swapcontext(&machine.scheduler, &f.context);
  arrive(machine.sanitizer, nullptr, nullptr);
}

[[noreturn]] inline void fail(const std::string& what, const std::source_location& where) {
  const std::string file = where.file_name();
  throw std::runtime_error("emulator: block " + std::to_string(blockIdx.x) + ": " + what + " at " +
                           file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line()));
}

inline bool release_barrier(unsigned threads) {
  unsigned waiting = 0;
  const Fibre* first = nullptr;
  for (unsigned t = 0; t < threads; ++t) {
    const Fibre& f = *machine.fibres[t];
    if (f.state != State::barrier) continue;
    ++waiting;
    if (!first) first = &f;
    if (f.where.line() != first->where.line()) fail("threads wait at different barriers, one", f.where);
  }
  if (waiting == 0) return false;
  if (waiting < threads) {
    fail(std::to_string(waiting) + " of " + std::to_string(threads) + " threads reached the barrier", first->where);
  }
  for (unsigned t = 0; t < threads; ++t) machine.fibres[t]->state = State::ready;
  return true;
}

inline bool release_shuffles(unsigned threads) {
  bool any = false;
  for (unsigned t = 0; t < threads; ++t) {
    const Fibre& asking = *machine.fibres[t];
    if (asking.state != State::shuffle) continue;
    const unsigned base = t / warp * warp;
    for (unsigned lane = 0; lane < warp; ++lane) {
      if (!(asking.mask >> lane & 1)) continue;
      const Fibre* partner = base + lane < threads ? machine.fibres[base + lane].get() : nullptr;
      if (!partner || partner->state != State::shuffle || partner->mask != asking.mask ||
          partner->where.line() != asking.where.line()) {
        fail("lane " + std::to_string(lane) + " never joined the shuffle", asking.where);
      }
      if (!(asking.mask >> partner->source & 1)) fail("a shuffle reads a lane outside its mask", asking.where);
    }
    const unsigned mask = asking.mask;
    for (unsigned lane = 0; lane < warp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Fibre& f = *machine.fibres[base + lane];
      std::memcpy(f.received, machine.fibres[base + f.source]->sent, sizeof(f.received));
      f.state = State::ready;
    }
    any = true;
  }
  return any;
}

inline void run_block(unsigned threads, std::mt19937_64& random) {
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned t : order) machine.fibres[t]->state = State::ready;
  do {
    if (control.seed) std::shuffle(order.begin(), order.end(), random);
    for (unsigned t : order) {
      if (machine.fibres[t]->state == State::ready) resume(t);
      if (machine.error) std::rethrow_exception(machine.error);
    }
  } while (release_shuffles(threads) || release_barrier(threads));
}

template <class Body>
cudaError_t launch(int64_t blocks, int threads, cudaStream_t stream, Body body) {
  if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024) return cudaErrorInvalidConfiguration;
  while (machine.fibres.size() < static_cast<size_t>(threads)) {
    auto& f = *machine.fibres.emplace_back(new Fibre);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = stack_bytes;
    makecontext(&f.context, fibre_main, 0);
  }
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
      run_block(static_cast<unsigned>(threads), random);
    }
  } catch (...) {
    machine.fibres.clear();  // some are stuck half-way
    throw;
  }
  return cudaSuccess;
}

template <class T>
T exchange(unsigned mask, T value, unsigned source, const std::source_location& where) {
  static_assert(sizeof(T) <= sizeof(Fibre::sent));
  Fibre& f = *machine.current;
  if (!(mask >> (threadIdx.x % warp) & 1)) fail("a lane outside the mask shuffles", where);
  std::memcpy(f.sent, &value, sizeof(value));
  f.mask = mask;
  f.source = source;
  suspend(State::shuffle, where);
  std::memcpy(&value, f.received, sizeof(value));
  return value;
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
