// SPDX-License-Identifier: Apache-2.0
// Draws of runs of elements, many counters side by side so that the generator vectorises. Included once per
// instruction set, inside its namespace; no torch, no threads. The values are those of math/noise.h.

// Counters drawn at once: two vectors of AVX2, one of AVX-512.
constexpr int noise_blocks = 16;

struct NoiseWords {
  uint32_t w0[noise_blocks], w1[noise_blocks], w2[noise_blocks], w3[noise_blocks];
};

// The words of consecutive blocks.
inline __attribute__((always_inline)) void draw_words(const PhiloxState& state, uint64_t block, NoiseWords& out) {
  for (int i = 0; i < noise_blocks; ++i) {
    const PhiloxWords w = philox(state, block + static_cast<uint64_t>(i));
    out.w0[i] = w.w0;
    out.w1[i] = w.w1;
    out.w2[i] = w.w2;
    out.w3[i] = w.w3;
  }
}

struct UniformFill {
  static constexpr int per_block = uniform_per_block;

  static inline __attribute__((always_inline)) void blocks(const PhiloxState& state, uint64_t block,
                                                           float* __restrict out) {
    NoiseWords words;
    draw_words(state, block, words);
    for (int i = 0; i < noise_blocks; ++i) {
      out[8 * i + 0] = uniform_value(words.w0[i] & 0xffffu);
      out[8 * i + 1] = uniform_value(words.w0[i] >> 16);
      out[8 * i + 2] = uniform_value(words.w1[i] & 0xffffu);
      out[8 * i + 3] = uniform_value(words.w1[i] >> 16);
      out[8 * i + 4] = uniform_value(words.w2[i] & 0xffffu);
      out[8 * i + 5] = uniform_value(words.w2[i] >> 16);
      out[8 * i + 6] = uniform_value(words.w3[i] & 0xffffu);
      out[8 * i + 7] = uniform_value(words.w3[i] >> 16);
    }
  }
};

struct NormalFill {
  static constexpr int per_block = normal_per_block;

  static inline __attribute__((always_inline)) void blocks(const PhiloxState& state, uint64_t block,
                                                           float* __restrict out) {
    NoiseWords words;
    draw_words(state, block, words);
    for (int i = 0; i < noise_blocks; ++i) {
      const NormalPair a = normal_pair(words.w0[i], words.w1[i]);
      const NormalPair b = normal_pair(words.w2[i], words.w3[i]);
      out[4 * i + 0] = a.even;
      out[4 * i + 1] = a.odd;
      out[4 * i + 2] = b.even;
      out[4 * i + 3] = b.odd;
    }
  }
};

// Draws of the elements [first, first + count) to `out`; first is a multiple of 8.
template <class Fill>
inline void fill_noise(const PhiloxState& state, uint64_t first, int64_t count, float* __restrict out) {
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
