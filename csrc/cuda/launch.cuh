// SPDX-License-Identifier: Apache-2.0
// The one place that launches, and what every kernel stands on: 16-byte access to any range of a dense tensor, and the
// map from storage offsets to scales. Compiled by nvcc for the device and by g++ against the emulator of
// tests/emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __CUDACC__
#include <cuda_runtime.h>
namespace fastflat::platform {  // the emulator has its own
__device__ __forceinline__ void count_read(size_t) {}
__device__ __forceinline__ void count_written(size_t) {}
__device__ __forceinline__ void count_parameter(size_t) {}

// Spelled out: left to itself the compiler splits some of them into four narrow ones.
__device__ __forceinline__ uint4 load_16(const void* from) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(from)));
  return v;
}
__device__ __forceinline__ void store_16(void* to, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
}  // namespace fastflat::platform
#else
#include "cuda_emulator.h"
#endif

#include "core/geometry.h"
#include "math/macros.h"

namespace fastflat::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kBlock = 256;  // threads of a block, unless a kernel says otherwise
// Blocks of kBlock threads a multiprocessor must hold: leaves 80 registers a thread. Left to itself ptxas stops at 64
// and spills on some architectures.
inline constexpr int kBlocksAtOnce = 3;
inline constexpr int kAccess = 16;               // bytes, the widest access there is on every supported GPU
inline constexpr int64_t kMaxGrid = 0x7fffffff;  // limit of gridDim.x
inline constexpr int64_t kSmall = int64_t(1) << 30;

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMaxGrid) return cudaErrorInvalidConfiguration;
#ifdef __CUDACC__
  kernel<<<dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), 0, stream>>>(arguments...);
  return cudaGetLastError();
#else
  return platform::launch(blocks, threads, stream, [&] { kernel(arguments...); });
#endif
}

FASTFLAT_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTFLAT_HD constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTFLAT_HD constexpr int64_t clamp(int64_t v, int64_t low, int64_t high) {
  return v < low ? low : v > high ? high : v;
}

// A tuple that device code can hold: std::tuple's members are host functions.
template <size_t I, class T>
struct Leaf {
  T value;
};
template <class Indices, class... T>
struct TupleOf;
template <size_t... I, class... T>
struct TupleOf<std::index_sequence<I...>, T...> : Leaf<I, T>... {};
template <class... T>
using Tuple = TupleOf<std::index_sequence_for<T...>, T...>;

template <size_t I, class T>
FASTFLAT_HD T& get(Leaf<I, T>& leaf) {
  return leaf.value;
}
template <size_t I, class T>
FASTFLAT_HD const T& get(const Leaf<I, T>& leaf) {
  return leaf.value;
}

template <class... T>
Tuple<T...> streams(T... pointers) {
  return {{pointers}...};
}

// An input that may be absent: a null pointer reads as zeros.
template <class T>
struct Optional {
  const T* pointer;
};

// N neighbouring elements; 16 bytes or a multiple.
template <class T, int N>
struct alignas(kAccess) Pack {
  static_assert(N * sizeof(T) % kAccess == 0);
  T v[N];
};

// Elements per pack so that the narrowest of the storage types still fills 16 bytes.
template <class... T>
inline constexpr int pack_width = [] {
  size_t narrowest = kAccess;
  ((narrowest = sizeof(T) < narrowest ? sizeof(T) : narrowest), ...);
  return static_cast<int>(kAccess / narrowest);
}();

// Elements [first, last) of a pack.
struct Lanes {
  int first, last;

  FASTFLAT_HD bool holds(int i) const { return i >= first && i < last; }
};

struct Range {
  int64_t begin, end;

  FASTFLAT_HD bool holds(int64_t offset) const { return offset >= begin && offset < end; }
  FASTFLAT_HD bool holds_all(int64_t offset, int count) const { return offset >= begin && offset + count <= end; }

  // Which of `count` elements from `offset` on are held, in 32 bits.
  FASTFLAT_HD Lanes lanes(int64_t offset, int count) const {
    return {static_cast<int>(clamp(begin - offset, 0, count)), static_cast<int>(clamp(end - offset, 0, count))};
  }
};

// The pack at `offset` (a multiple of N) of a 16-byte aligned array, or of any array where it is not `wide`; elements
// outside `valid` are not touched and 0.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from, int64_t offset, Range valid, bool wide = true) {
  Pack<T, N> pack{};
  if (wide && valid.holds_all(offset, N)) {
    constexpr int words = N * sizeof(T) / kAccess;
    uint4 raw[words];
#pragma unroll
    for (int w = 0; w < words; ++w) raw[w] = platform::load_16(reinterpret_cast<const uint4*>(from + offset) + w);
    memcpy(&pack, raw, sizeof(pack));
    platform::count_read(sizeof(pack));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!valid.holds(offset + i)) continue;
      pack.v[i] = from[offset + i];
      platform::count_read(sizeof(T));
    }
  }
  return pack;
}

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(Optional<T> from, int64_t offset, Range valid) {
  return load_pack<N>(from.pointer, offset, from.pointer ? valid : Range{0, 0});
}

template <int N, class T>
__device__ __forceinline__ void store_pack(T* to, int64_t offset, Range valid, const Pack<T, N>& pack,
                                           bool wide = true) {
  if (wide && valid.holds_all(offset, N)) {
    constexpr int words = N * sizeof(T) / kAccess;
    uint4 raw[words];
    memcpy(raw, &pack, sizeof(pack));
#pragma unroll
    for (int w = 0; w < words; ++w) platform::store_16(reinterpret_cast<uint4*>(to + offset) + w, raw[w]);
    platform::count_written(sizeof(pack));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!valid.holds(offset + i)) continue;
      to[offset + i] = pack.v[i];
      platform::count_written(sizeof(T));
    }
  }
}

// A per-scale value: small arrays that live in the caches, counted apart from the streams.
template <class T>
__device__ __forceinline__ T load_parameter(const T* from, int64_t index) {
  platform::count_parameter(sizeof(T));
  return from[index];
}

template <class P>
struct ElementOf;
template <class T>
struct ElementOf<const T*> {
  using type = T;
};
template <class T>
struct ElementOf<T*> {
  using type = T;
};
template <class T>
struct ElementOf<Optional<T>> {
  using type = T;
};
template <class P>
using element_t = typename ElementOf<P>::type;

// The packs that go with a tuple of pointers.
template <int N, class Pointers>
struct PacksOf;
template <int N, class Indices, class... P>
struct PacksOf<N, TupleOf<Indices, P...>> {
  using type = Tuple<Pack<element_t<P>, N>...>;
};
template <int N, class Pointers>
using packs_of = typename PacksOf<N, Pointers>::type;

template <int N, size_t... I, class... P>
__device__ __forceinline__ auto load_packs(const TupleOf<std::index_sequence<I...>, P...>& from, int64_t offset,
                                           Range valid) {
  return packs_of<N, TupleOf<std::index_sequence<I...>, P...>>{{load_pack<N>(get<I>(from), offset, valid)}...};
}

template <size_t... I, class... T, class Packs>
__device__ __forceinline__ void store_packs(const TupleOf<std::index_sequence<I...>, T*...>& to,
                                            [[maybe_unused]] int64_t offset, [[maybe_unused]] Range valid,
                                            [[maybe_unused]] const Packs& packs) {
  (store_pack(get<I>(to), offset, valid, get<I>(packs)), ...);
}

// What a functor may have beside the members that its skeleton names:
//   void open()                              reads once a thread what the functor keeps in device memory
//   auto pack<N>(int64_t offset) const       what the pack at a storage offset has to itself: v[k] of it leads the
//                                            arguments of its element k
//   auto compact(int64_t channel) const      the group in few registers, for kernels that hold many
//   static constexpr int blocks_at_once      instead of kBlocksAtOnce; column_blocks_at_once for the kernel that owns
//                                            columns, and finish_blocks_at_once for the second pass of sums, which have
//                                            no limit otherwise
//   static constexpr bool long_body          so many instructions an element that one copy of them serves packs within
//                                            a scale and packs across scales
//   bool by_pack() const                     whether packs within a scale may be done at once, in fewer instructions
//   auto pack_group(int64_t channel) const   the parameters for that
//   void all(own, group, sums, in..., out...) const      and how: operator() with packs in the place of elements
template <class F>
__device__ __forceinline__ void open(F& f) {
  if constexpr (requires { f.open(); }) f.open();
}

template <class F>
inline constexpr int blocks_at_once = [] {
  if constexpr (requires { F::blocks_at_once; }) {
    return F::blocks_at_once;
  } else {
    return kBlocksAtOnce;
  }
}();

template <class F>
inline constexpr int column_blocks_at_once = [] {
  if constexpr (requires { F::column_blocks_at_once; }) {
    return F::column_blocks_at_once;
  } else {
    return 0;
  }
}();

template <class F>
inline constexpr int finish_blocks_at_once = [] {
  if constexpr (requires { F::finish_blocks_at_once; }) {
    return F::finish_blocks_at_once;
  } else {
    return 0;
  }
}();

template <class F>
inline constexpr bool long_body = [] {
  if constexpr (requires { F::long_body; }) {
    return F::long_body;
  } else {
    return false;
  }
}();

struct Nothing {};

template <int N, class F>
__device__ __forceinline__ auto pack_of(const F& f, [[maybe_unused]] int64_t offset) {
  if constexpr (requires { f.template pack<N>(offset); }) {
    return f.template pack<N>(offset);
  } else {
    return Nothing{};
  }
}

template <class F>
__device__ __forceinline__ auto compact_group(const F& f, int64_t channel) {
  if constexpr (requires { f.compact(channel); }) {
    return f.compact(channel);
  } else {
    return f.group(channel);
  }
}

// f(own.v[k], leading..., inputs of element k..., outputs of element k...), `own` by pack_of
template <class F, int N, size_t... I, class... In, size_t... O, class... Out, class Own, class... Leading>
__device__ __forceinline__ void apply(const F& f, int k, const TupleOf<std::index_sequence<I...>, Pack<In, N>...>& in,
                                      TupleOf<std::index_sequence<O...>, Pack<Out, N>...>& out, const Own& own,
                                      Leading&&... leading) {
  if constexpr (std::is_same_v<Own, Nothing>) {
    f(leading..., get<I>(in).v[k]..., get<O>(out).v[k]...);
  } else {
    f(own.v[k], leading..., get<I>(in).v[k]..., get<O>(out).v[k]...);
  }
}

template <class F>
__device__ __forceinline__ bool takes_packs(const F& f) {
  if constexpr (requires { f.by_pack(); }) {
    return f.by_pack();
  } else {
    return false;
  }
}

template <class F>
__device__ __forceinline__ auto pack_group(const F& f, [[maybe_unused]] int64_t channel) {
  if constexpr (requires { f.by_pack(); }) {
    return f.pack_group(channel);
  } else {
    return Nothing{};
  }
}

// f.all(own, leading..., inputs..., outputs...), `own` by pack_of; nothing for a functor that has no such member.
template <class F, int N, size_t... I, class... In, size_t... O, class... Out, class Own, class... Leading>
__device__ __forceinline__ void apply_all(const F& f, const TupleOf<std::index_sequence<I...>, Pack<In, N>...>& in,
                                          TupleOf<std::index_sequence<O...>, Pack<Out, N>...>& out, const Own& own,
                                          Leading&&... leading) {
  if constexpr (requires { f.by_pack(); }) {
    if constexpr (std::is_same_v<Own, Nothing>) {
      f.all(leading..., get<I>(in)..., get<O>(out)...);
    } else {
      f.all(own, leading..., get<I>(in)..., get<O>(out)...);
    }
  }
}

// Where an offset lies: its scale, and its place in the run of `inner` elements that share it.
struct Position {
  int64_t channel, within;

  __device__ __forceinline__ bool advance(const Geometry& g) {
    if (++within < g.inner) return false;
    within = 0;
    if (++channel == g.channels) channel = 0;
    return true;
  }
};

// Positions of the offsets base + 0 ... base + kSmall - 1: 64-bit divisions once, 32-bit ones from there. A single
// scale needs none, and `within` is not kept for it.
struct Locator {
  Geometry g;
  Position base;

  __device__ __forceinline__ Locator(const Geometry& geometry, int64_t offset) : g(geometry) {
    base = {0, 0};
    if (g.channels > 1) base = {(offset / g.inner) % g.channels, offset % g.inner};
  }

  __device__ __forceinline__ Position at(int64_t local) const {
    const int64_t t = base.within + local;
    const int64_t runs = g.inner < kSmall ? static_cast<uint32_t>(t) / static_cast<uint32_t>(g.inner) : t >= g.inner;
    const int64_t c = base.channel + runs;
    const int64_t channel = g.channels < kSmall ? static_cast<uint32_t>(c) % static_cast<uint32_t>(g.channels)
                                                : (c < g.channels ? c : c - g.channels);
    return {channel, t - runs * g.inner};
  }
};

inline uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }
template <class T>
uintptr_t address(Optional<T> pointer) {
  return address(pointer.pointer);
}

template <size_t... I, class... P>
bool aligned(const TupleOf<std::index_sequence<I...>, P...>& pointers) {
  return ((address(get<I>(pointers)) % kAccess == 0) && ...);
}

}  // namespace fastflat::cuda
