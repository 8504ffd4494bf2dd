// SPDX-License-Identifier: Apache-2.0
// Writing past the caches. Included inside the namespace of an instruction set, after <immintrin.h>.

// A line of 64 bytes past the caches, in the widest stores there are: `to` is aligned to their width.
#if defined(FASTFLAT_ISA_AVX512)
constexpr int64_t line_alignment = 64;
inline void stream_line(char* to, const char* from) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(FASTFLAT_ISA_AVX2)
constexpr int64_t line_alignment = 32;
inline void stream_line(char* to, const char* from) {
  for (int k = 0; k < 64; k += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + k), v);
  }
}
#elif defined(__SSE2__)
constexpr int64_t line_alignment = 16;
inline void stream_line(char* to, const char* from) {
  for (int k = 0; k < 64; k += 16) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + k), v);
  }
}
#endif

// memcpy past the caches.
__attribute__((noinline)) inline void copy_past_caches(void* to_, const void* from_, int64_t bytes) {
#if defined(__SSE2__)
  char* to = static_cast<char*>(to_);
  const char* from = static_cast<const char*>(from_);
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & (line_alignment - 1));
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) stream_line(to + i, from + i);
  std::memcpy(to + i, from + i, bytes - i);
#else
  std::memcpy(to_, from_, bytes);
#endif
}

// Makes what went past the caches visible to other threads.
inline void settle() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
