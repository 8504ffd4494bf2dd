// SPDX-License-Identifier: Apache-2.0
// Maps over contiguous elements as shared code: one copy of each loop, its last block through buffers. Included once
// per instruction set, inside its namespace, after <cstring>, core/pairs.h and math/convert.h.

// to[i] = value(from[i]), a block at a time, the last through buffers: the code of one loop.
template <class From, class To, class Value>
inline void in_blocks(const From* from, int64_t n, To* to, const Value& value) {
  constexpr int64_t block = 256;
  From last_from[block] = {};
  To last_to[block];
  for (int64_t i = 0; i < n; i += block) {
    const bool whole = i + block <= n;
    if (!whole) std::memcpy(last_from, from + i, (n - i) * sizeof(From));
    const From* const a = whole ? from + i : last_from;
    To* const b = whole ? to + i : last_to;
#pragma GCC ivdep
    for (int64_t k = 0; k < block; ++k) b[k] = value(a[k]);
    if (!whole) std::memcpy(to + i, last_to, (n - i) * sizeof(To));
  }
}

template <class S>
FASTFLAT_SHARED_CODE void widen(const void* from, int64_t at, int64_t n, float* to) {
  in_blocks(static_cast<const S*>(from) + at, n, to, [](S v) __attribute__((always_inline)) { return load(v); });
}
template <class S>
FASTFLAT_SHARED_CODE void narrow(const float* from, int64_t n, void* to, int64_t at) {
  in_blocks(from, n, static_cast<S*>(to) + at, [](float v) __attribute__((always_inline)) { return store<S>(v); });
}

// Elements in the type of the arithmetic, whatever they are kept in: data of 16 bits pass through buffers.

// Elements [at, at + n): where they lie, or widened in the buffer.
template <class C>
FASTFLAT_SHARED_CODE const C* fetch(Storage storage, const void* data, int64_t at, int64_t n, C* buffer) {
  if constexpr (sizeof(C) == 4) {
    if (storage == bf16) return widen<BFloat16>(data, at, n, buffer), buffer;
    if (storage == f16) return widen<Half>(data, at, n, buffer), buffer;
  }
  return static_cast<const C*>(data) + at;
}

// Where to write elements from `at` on before deliver(): their place, or the buffer.
template <class C>
C* target(Storage storage, void* data, int64_t at, C* buffer) {
  return storage == bf16 || storage == f16 ? buffer : static_cast<C*>(data) + at;
}
template <class C>
FASTFLAT_SHARED_CODE void deliver(Storage storage, const C* from, void* data, int64_t at, int64_t n) {
  if constexpr (sizeof(C) == 4) {
    if (storage == bf16) narrow<BFloat16>(from, n, data, at);
    if (storage == f16) narrow<Half>(from, n, data, at);
  }
}
