// SPDX-License-Identifier: Apache-2.0
// CUDA's threads as fibres: one each, one block at a time on one OS thread. Barriers and shuffles suspend a fibre until
// its partners arrive, and report partners that never do.
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

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fastflat::emulator {

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

// All threads of block blockIdx, one after another between barriers; `shuffled` draws their order anew each time.
inline void run_block(unsigned threads, bool shuffled, std::mt19937_64& random) {
  while (machine.fibres.size() < threads) {
    auto& f = *machine.fibres.emplace_back(new Fibre);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = stack_bytes;
    makecontext(&f.context, fibre_main, 0);
  }
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned t : order) machine.fibres[t]->state = State::ready;
  do {
    if (shuffled) std::shuffle(order.begin(), order.end(), random);
    for (unsigned t : order) {
      if (machine.fibres[t]->state == State::ready) resume(t);
      if (machine.error) std::rethrow_exception(machine.error);
    }
  } while (release_shuffles(threads) || release_barrier(threads));
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
