// SPDX-License-Identifier: Apache-2.0
// What a kernel over a list of tensors knows of its tensors, and how it reads and writes them.
#pragma once

#include "cuda/draws.cuh"
#include "cuda/multi.h"
#include "math/convert.h"
#include "math/sharpness.h"

namespace fastflat {

// 32 bits of storage whose type is known at run time: for combinations of types that have no kernel of their own.
struct Any {
  uint32_t bits;
  Storage storage;
};

FASTFLAT_HD float load(Any v) {
  if (v.storage == f32) return bit_cast<float>(v.bits);
  const auto half = static_cast<uint16_t>(v.bits);
  return v.storage == bf16 ? to_float(BFloat16{half}) : to_float(Half{half});
}

}  // namespace fastflat

namespace fastflat::cuda {

// What a launch may take in arguments: 4 KB with every driver; the drivers that CUDA 13 needs take more.
#if defined(CUDART_VERSION) && CUDART_VERSION >= 13000
inline constexpr int kArgumentBytes = 32764;
#else
inline constexpr int kArgumentBytes = 4096;
#endif
inline constexpr int kOtherArguments = 192;  // of that, for functor and results

template <int streams>
struct ListTable {
  static constexpr int capacity = (kArgumentBytes - kOtherArguments) / (8 * streams + 32);

  void* at[streams][capacity];
  int64_t size[capacity];
  int64_t first[capacity];
  uint32_t block[capacity];    // the first block of the tensor
  int32_t index[capacity];     // its place in the list
  uint32_t storage[capacity];  // two bits a stream
  uint16_t wide[capacity];     // a bit a stream: packs of it lie on 16 bytes
  uint8_t head[capacity];      // elements by which the streams were moved back for that
  uint8_t option[capacity];
  int32_t count;
};

// How results of one pack are rounded to bfloat16: to nearest, or with the 16 random bits of each element.
struct Rounding {
  PhiloxWords words;
  bool random;

  __device__ __forceinline__ BFloat16 to_bfloat16(float v, int k) const {
    return random ? to_bfloat16_stochastic(v, uniform_bits(words, k)) : fastflat::to_bfloat16(v);
  }
};

template <class T>
inline constexpr bool may_be_random = std::is_same_v<T, BFloat16> || std::is_same_v<T, Any>;

// Elements of a pack of streams of these types.
template <class... T>
inline constexpr int list_width = (std::is_same_v<T, Any> || ...) ? pack_width<Half> : pack_width<T...>;

// What a block works on: some elements of one tensor.
template <int streams>
struct Piece {
  const ListTable<streams>& table;
  int slot;
  int64_t chunk;
  Range valid;

  __device__ __forceinline__ bool has(int stream) const { return table.at[stream][slot] != nullptr; }
  __device__ __forceinline__ bool same(int a, int b) const { return table.at[a][slot] == table.at[b][slot]; }
  __device__ __forceinline__ int32_t index() const { return table.index[slot]; }
  __device__ __forceinline__ int64_t option() const { return table.option[slot]; }
  __device__ __forceinline__ Storage storage(int stream) const {
    return static_cast<Storage>(table.storage[slot] >> (2 * stream) & 3);
  }

  template <class T, int N>
  __device__ __forceinline__ Pack<T, N> read(int stream, int64_t at) const {
    if constexpr (std::is_same_v<T, Any>) {
      return storage(stream) == f32 ? read_any<uint32_t, N>(stream, at) : read_any<uint16_t, N>(stream, at);
    } else {
      return load_pack<N>(pointer<const T>(stream), at, valid, wide(stream));
    }
  }

  template <class T, int N>
  __device__ __forceinline__ Pack<T, N> read_if(bool wanted, int stream, int64_t at) const {
    return wanted ? read<T, N>(stream, at) : Pack<T, N>{};
  }

  template <class T, int N>
  __device__ __forceinline__ void write(int stream, int64_t at, const Pack<T, N>& pack) const {
    if constexpr (std::is_same_v<T, Any>) {
      storage(stream) == f32 ? write_any<uint32_t>(stream, at, pack) : write_any<uint16_t>(stream, at, pack);
    } else {
      store_pack(pointer<T>(stream), at, valid, pack, wide(stream));
    }
  }

  // Results in the type of a stream.
  template <class T, class C, int N>
  __device__ __forceinline__ void write_rounded(int stream, int64_t at, const C (&values)[N],
                                                [[maybe_unused]] const Rounding& rounding) const {
    Pack<T, N> pack;
    [[maybe_unused]] const Storage to = storage(stream);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if constexpr (std::is_same_v<T, Any>) {
        const float v = values[k];
        pack.v[k] = {to == f32    ? bit_cast<uint32_t>(v)
                     : to == bf16 ? rounding.to_bfloat16(v, k).bits
                                  : uint32_t{to_half(v).bits},
                     to};
      } else if constexpr (std::is_same_v<T, BFloat16>) {
        pack.v[k] = rounding.to_bfloat16(values[k], k);
      } else {
        pack.v[k] = store<T>(values[k]);
      }
    }
    write(stream, at, pack);
  }

  // The random bits of the pack at `at`; a tensor that was moved has packs across two Philox blocks.
  __device__ __forceinline__ PhiloxWords draw(const PhiloxState& state, int64_t at) const {
    const int64_t index = table.first[slot] + at - table.head[slot];
    const int skip = static_cast<int>(index & 7);
    PhiloxWords low = philox(state, static_cast<uint64_t>(index >> 3));
    if (skip == 0) return low;
    const PhiloxWords high = philox(state, static_cast<uint64_t>((index >> 3) + 1));
    const auto bits = [&](int k) { return k < 8 ? uniform_bits(low, k) : uniform_bits(high, k - 8); };
    const auto word = [&](int k) { return bits(skip + k) | bits(skip + k + 1) << 16; };
    return {word(0), word(2), word(4), word(6)};
  }

 private:
  template <class T>
  __device__ __forceinline__ T* pointer(int stream) const {
    return static_cast<T*>(table.at[stream][slot]);
  }
  __device__ __forceinline__ bool wide(int stream) const { return table.wide[slot] >> stream & 1; }

  template <class Raw, int N>
  __device__ __forceinline__ Pack<Any, N> read_any(int stream, int64_t at) const {
    const auto raw = load_pack<N>(pointer<const Raw>(stream), at, valid, wide(stream));
    Pack<Any, N> pack;
#pragma unroll
    for (int k = 0; k < N; ++k) pack.v[k] = {raw.v[k], storage(stream)};
    return pack;
  }
  template <class Raw, int N>
  __device__ __forceinline__ void write_any(int stream, int64_t at, const Pack<Any, N>& pack) const {
    Pack<Raw, N> raw;
#pragma unroll
    for (int k = 0; k < N; ++k) raw.v[k] = static_cast<Raw>(pack.v[k].bits);
    store_pack(pointer<Raw>(stream), at, valid, raw, wide(stream));
  }
};

// The piece of a block: its tensor by bisection, the same way for all threads.
template <int streams>
__device__ __forceinline__ Piece<streams> piece_of(const ListTable<streams>& table, uint32_t block, bool backwards) {
  int slot = 0;
  for (int above = table.count; above - slot > 1;) {
    const int middle = (slot + above) / 2;
    (table.block[middle] <= block ? slot : above) = middle;
  }
  const int64_t end = table.head[slot] + table.size[slot];
  int64_t chunk = block - table.block[slot];
  if (backwards) chunk = list_chunks(end) - 1 - chunk;
  const int64_t begin = chunk * kListChunk;
  const int64_t first = begin < table.head[slot] ? table.head[slot] : begin;
  return {table, slot, chunk, {first, least(begin + kListChunk, end)}};
}

// What a functor that rounds to bfloat16 is made of: the state of the draws, or null.
struct Rounds {
  const int64_t* state;
  PhiloxState philox;

  explicit Rounds(const int64_t* from) : state(from), philox{} {}

  __device__ __forceinline__ void open_draws() {
    if (state) philox = load_state(state);
  }

  // For results of these types.
  template <class... T, int streams>
  __device__ __forceinline__ Rounding rounding(const Piece<streams>& piece, int64_t at) const {
    Rounding r{{}, false};
    if constexpr ((may_be_random<T> || ...)) {
      r.random = state != nullptr;
      if (r.random) r.words = piece.draw(philox, at);
    }
    return r;
  }
};

}  // namespace fastflat::cuda
