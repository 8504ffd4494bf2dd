// SPDX-License-Identifier: Apache-2.0
// Draws of runs of elements, many counters side by side so that the generator vectorises. Included once per
// instruction set, inside its namespace; no torch, no threads. The values are those of math/noise.h.

// Counters drawn at once: four vectors of 64-bit lanes, enough to hide the latency of a round.
constexpr int noise_blocks = 16;

// The words of consecutive blocks, four a block.
struct NoiseWords {
  alignas(32) uint32_t of[4 * noise_blocks];
};

#if (defined(FASTFLAT_ISA_AVX2) || defined(FASTFLAT_ISA_AVX512)) && !defined(__clang__)
// g++ shuffles around the widening multiplication. In 64-bit lanes it is one instruction that ignores the high
// halves, so that they may hold anything until the words are stored.
typedef uint64_t Lanes __attribute__((vector_size(32)));
typedef int32_t Halves __attribute__((vector_size(32)));

inline __attribute__((always_inline)) Lanes widening_product(Lanes a, Lanes b) {
  return reinterpret_cast<Lanes>(__builtin_ia32_pmuludq256(reinterpret_cast<Halves>(a), reinterpret_cast<Halves>(b)));
}

inline __attribute__((always_inline)) void draw_words(const PhiloxState& state, uint64_t block, NoiseWords& out) {
  constexpr int vectors = noise_blocks / 4;
  Lanes c0[vectors], c1[vectors], c2[vectors], c3[vectors];
  for (int v = 0; v < vectors; ++v) {
    c0[v] = Lanes{0, 1, 2, 3} + (block + static_cast<uint64_t>(4 * v));
    c1[v] = c0[v] >> 32;
    c2[v] = Lanes{} + state.offset_low;
    c3[v] = Lanes{} + state.offset_high;
  }
  const Lanes m0 = Lanes{} + philox_multiplier0, m1 = Lanes{} + philox_multiplier1;
  uint32_t key0 = state.seed_low, key1 = state.seed_high;
#pragma GCC unroll 10
  for (int round = 0; round < philox_rounds; ++round) {
    const Lanes k0 = Lanes{} + key0, k1 = Lanes{} + key1;
    for (int v = 0; v < vectors; ++v) {
      const Lanes p0 = widening_product(c0[v], m0), p1 = widening_product(c2[v], m1);
      c0[v] = (p1 >> 32) ^ c1[v] ^ k0;
      c1[v] = p1;
      c2[v] = (p0 >> 32) ^ c3[v] ^ k1;
      c3[v] = p0;
    }
    key0 += philox_step0;
    key1 += philox_step1;
  }
  for (int v = 0; v < vectors; ++v) {
    // Words 0 and 1 of a block side by side, words 2 and 3 likewise; then the blocks one after the other.
    const Lanes low = Lanes{} + 0xffffffffu;
    const Lanes first = (c0[v] & low) | (c1[v] << 32), second = (c2[v] & low) | (c3[v] << 32);
    const Lanes blocks[2] = {__builtin_shuffle(first, second, Lanes{0, 4, 1, 5}),
                             __builtin_shuffle(first, second, Lanes{2, 6, 3, 7})};
    std::memcpy(out.of + 16 * v, blocks, sizeof(blocks));
  }
}
#else
inline __attribute__((always_inline)) void draw_words(const PhiloxState& state, uint64_t block, NoiseWords& out) {
  for (int i = 0; i < noise_blocks; ++i) {
    const PhiloxWords w = philox(state, block + static_cast<uint64_t>(i));
    out.of[4 * i + 0] = w.w0;
    out.of[4 * i + 1] = w.w1;
    out.of[4 * i + 2] = w.w2;
    out.of[4 * i + 3] = w.w3;
  }
}
#endif

struct UniformFill {
  static constexpr int per_block = uniform_per_block;

  static inline __attribute__((always_inline)) void blocks(const PhiloxState& state, uint64_t block,
                                                           float* __restrict out) {
    NoiseWords words;
    draw_words(state, block, words);
    uint16_t bits[8 * noise_blocks];
    std::memcpy(bits, words.of, sizeof(bits));
    for (int i = 0; i < 8 * noise_blocks; ++i) out[i] = uniform_value(bits[i]);
  }
};

struct NormalFill {
  static constexpr int per_block = normal_per_block;

  static inline __attribute__((always_inline)) void blocks(const PhiloxState& state, uint64_t block,
                                                           float* __restrict out) {
    NoiseWords words;
    draw_words(state, block, words);
    float even[2 * noise_blocks], odd[2 * noise_blocks];
    for (int i = 0; i < 2 * noise_blocks; ++i) {
      const NormalPair pair = normal_pair(words.of[2 * i], words.of[2 * i + 1]);
      even[i] = pair.even;
      odd[i] = pair.odd;
    }
    for (int i = 0; i < 2 * noise_blocks; ++i) {
      out[2 * i] = even[i];
      out[2 * i + 1] = odd[i];
    }
  }
};

// Draws of the elements [first, first + count) to `out`; first is a multiple of 8.
template <class Fill>
__attribute__((noinline)) void fill_noise(const PhiloxState& state, uint64_t first, int64_t count,
                                          float* __restrict out) {
  constexpr int64_t unit = noise_blocks * Fill::per_block;
  uint64_t block = first / Fill::per_block;
  for (; count >= unit; count -= unit, out += unit, block += noise_blocks) Fill::blocks(state, block, out);
  if (count > 0) {
    float rest[unit];
    Fill::blocks(state, block, rest);
    std::memcpy(out, rest, count * sizeof(float));
  }
}

inline void fill_uniform(const PhiloxState& state, uint64_t first, int64_t count, float* __restrict out) {
  fill_noise<UniformFill>(state, first, count, out);
}

inline void fill_normal(const PhiloxState& state, uint64_t first, int64_t count, float* __restrict out) {
  fill_noise<NormalFill>(state, first, count, out);
}
