// SPDX-License-Identifier: Apache-2.0
#include "cuda/vectors.h"

#include "cuda/draws.cuh"
#include "cuda/multi.cuh"
#include "math/vectors.h"

namespace fastflat::cuda {
namespace {

constexpr int kFactors = 32;          // rows whose factors a block keeps at once
constexpr int kDraws = 64;            // Philox blocks that a block of threads draws
constexpr int64_t kDotBlocks = 2048;  // enough to fill any current GPU
constexpr int kDotSteps = 4;          // packs that a thread adds up, at least

// Vectors that a block takes: one, or as many as share its reading of the basis and stay in registers.
constexpr int many_vectors(int64_t bytes_of_q) { return bytes_of_q == 4 ? 8 : 4; }

// Rows of the basis beside them in a dot.
FASTFLAT_HD constexpr int rows_beside(int vectors) { return vectors == 1 ? 4 : 3; }

template <int V>
struct Vectors {
  static constexpr int count = V;
};

template <class Q, class F>
cudaError_t with_vectors(int64_t vectors, F&& f) {
  return vectors == 1 ? f(Vectors<1>{}) : f(Vectors<many_vectors(sizeof(Q))>{});
}

// f(Type<Q>, Type<W>)
template <class F>
cudaError_t with_rows(Storage of_q, Storage of_w, F&& f) {
  if (of_q == f32 && of_w == f32) return f(Type<float>{}, Type<float>{});
  if (of_q == bf16 && of_w == f32) return f(Type<BFloat16>{}, Type<float>{});
  if (of_q == f64 && of_w == f64) return f(Type<double>{}, Type<double>{});
  return cudaErrorInvalidValue;
}

int64_t pack_of_rows(const RowsCall& call) { return call.of_q == bf16 ? 8 : call.of_w == f64 ? 2 : 4; }
int64_t dot_tiles(const RowsCall& call) { return ceil_div(call.rows, rows_beside(call.vectors == 1 ? 1 : 2)); }
int64_t groups_of(const RowsCall& call) {
  return call.vectors == 1 ? 1 : ceil_div(call.vectors, many_vectors(storage_bytes(call.of_q)));
}

// How the dots cut a row: by the shape alone.
struct DotPlan {
  int64_t size, chunks;  // elements of a chunk, and how many there are

  explicit DotPlan(const RowsCall& call) {
    const int64_t step = kBlock * pack_of_rows(call);
    const int64_t tiles = dot_tiles(call) * groups_of(call);
    const int64_t wanted = clamp(ceil_div(call.n, step * kDotSteps), 1, ceil_div(kDotBlocks, tiles));
    size = ceil_div(ceil_div(call.n, wanted), step) * step;
    chunks = size == 0 ? 0 : ceil_div(call.n, size);
  }
};

// Whether the packs of every row lie on 16 bytes.
template <class T>
bool wide_rows(const void* rows, int64_t n) {
  return address(rows) % kAccess == 0 && n * sizeof(T) % kAccess == 0;
}

// Adds up S numbers over the threads of a block; write(s, sum) is called for each by a thread of its own. Where every
// thread got all of them, as from combine_team, 32 would not fit its registers.
template <int S, class Write>
__device__ __forceinline__ void total_of_block(const Sums<double, S>& sums, Write&& write) {
  static_assert(S <= kBlock);
  __shared__ double of_warp[kBlock / kWarp][S];
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int s = 0; s < S; ++s) {
    double sum = sums.v[s];
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      sum = sum + __shfl_xor_sync(0xffffffffu, sum, distance);
    }
    if (thread % kWarp == 0) of_warp[thread / kWarp][s] = sum;
  }
  __syncthreads();
  if (thread >= S) return;
  double sum = of_warp[0][thread];
  for (int warp = 1; warp < kBlock / kWarp; ++warp) sum = sum + of_warp[warp][thread];
  write(thread, sum);
}

// A number of `rows` rows with `vectors` vectors, and of each its chunks, which a second kernel adds up.
template <class Q, class W, int V>
__global__ void __launch_bounds__(kBlock, 2)
    rows_dot_kernel(const Q* q, const W* w, int64_t n, int64_t rows, int64_t vectors, int64_t size, int64_t chunks,
                    bool wide_q, bool wide_w, double* partials) {
  constexpr int N = pack_width<Q, W>, R = rows_beside(V);
  const int64_t groups = ceil_div(vectors, V), tiles = ceil_div(rows, R);
  // Neighbouring blocks share what they read.
  const int64_t k0 = blockIdx.x % groups * V, j0 = blockIdx.x / groups % tiles * R;
  const int64_t chunk = blockIdx.x / groups / tiles;
  const Range valid{chunk * size, least(n, (chunk + 1) * size)}, none{0, 0};
  Sums<double, R * V> sums{};
  for (int64_t at = valid.begin + static_cast<int>(threadIdx.x) * N; at < valid.end; at += kBlock * N) {
    Pack<Q, N> x[R];
#pragma unroll
    for (int j = 0; j < R; ++j) {
      x[j] = load_pack<N>(q + (j0 + j) * n, at, j0 + j < rows ? valid : none, wide_q);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (k0 + k >= vectors) continue;
      const auto y = load_pack<N>(w + (k0 + k) * n, at, valid, wide_w);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const double of_w = load(y.v[i]);
#pragma unroll
        for (int j = 0; j < R; ++j) {
          double& sum = sums.v[j * V + k];
          sum = sum + static_cast<double>(load(x[j].v[i])) * of_w;
        }
      }
    }
  }
  total_of_block(sums, [&](int s, double sum) {
    const int64_t j = j0 + s / V, k = k0 + s % V;
    if (j >= rows || k >= vectors) return;
    partials[(j * vectors + k) * chunks + chunk] = sum;
    platform::count_written(sizeof(sum));
  });
}

// The sum of the chunks of each number, a block a number.
__global__ void __launch_bounds__(kBlock) rows_total_kernel(const double* partials, int64_t chunks, double* result) {
  Sums<double, 1> sum{};
  const double* const own = partials + blockIdx.x * chunks;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kBlock) {
    sum.v[0] = sum.v[0] + own[chunk];
    platform::count_read(sizeof(double));
  }
  combine_team<Add>(sum, kBlock);
  if (threadIdx.x == 0) result[blockIdx.x] = sum.v[0];
}

// A pack of each of V vectors a thread. The factors of some rows at a time pass through shared memory, where each is
// rounded once a block.
template <class Q, class W, int V>
__global__ void __launch_bounds__(kBlock, V > 1 ? 2 : kBlocksAtOnce)
    rows_subtract_kernel(W* w, const Q* q, const double* c, int64_t n, int64_t rows, int64_t vectors, int64_t tiles,
                         bool wide_q, bool wide_w, double* partials) {
  constexpr int N = pack_width<Q, W>;
  static_assert(kFactors * V <= kBlock);
  __shared__ W factors[kFactors][V];
  const int64_t groups = ceil_div(vectors, V);
  const int64_t k0 = blockIdx.x % groups * V, tile = blockIdx.x / groups;
  const int64_t at = (tile * kBlock + static_cast<int>(threadIdx.x)) * N;
  const Range valid{0, n};
  const Subtract subtract;
  Pack<W, N> left[V];
#pragma unroll
  for (int k = 0; k < V; ++k)
    left[k] = load_pack<N>(w + (k0 + k) * n, at, k0 + k < vectors ? valid : Range{0, 0}, wide_w);
  for (int64_t first = 0; first < rows; first += kFactors) {
    const int of_row = static_cast<int>(threadIdx.x) / V, of_vector = static_cast<int>(threadIdx.x) % V;
    __syncthreads();
    if (of_row < kFactors) {
      const bool held = first + of_row < rows && k0 + of_vector < vectors;
      factors[of_row][of_vector] =
          held ? static_cast<W>(load_parameter(c, (first + of_row) * vectors + k0 + of_vector)) : W(0);
    }
    __syncthreads();
    const int count = static_cast<int>(least(kFactors, rows - first));
#pragma unroll(V > 1 ? 2 : 4)
    for (int j = 0; j < count; ++j) {
      const auto x = load_pack<N>(q + (first + j) * n, at, valid, wide_q);
#pragma unroll
      for (int k = 0; k < V; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) left[k].v[i] = subtract(left[k].v[i], factors[j][k], static_cast<W>(load(x.v[i])));
      }
    }
  }
  Sums<double, V> squares{};
  const Lanes lanes = valid.lanes(at, N);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (k0 + k >= vectors) continue;
    store_pack(w + (k0 + k) * n, at, valid, left[k], wide_w);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const double v = lanes.holds(i) ? static_cast<double>(left[k].v[i]) : 0.0;
      squares.v[k] = squares.v[k] + v * v;
    }
  }
  total_of_block(squares, [&](int k, double sum) {
    if (k0 + k >= vectors) return;
    partials[(k0 + k) * tiles + tile] = sum;
    platform::count_written(sizeof(sum));
  });
}

// Some threads draw, then all of them write, neighbours side by side.
template <class Bits>
__global__ void __launch_bounds__(kBlock) signs_kernel(const int64_t* state, int64_t elements, Bits one, Bits* to) {
  constexpr int N = kAccess / sizeof(Bits), drawn = kDraws * signs_per_block;
  __shared__ uint32_t words[4 * kDraws];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kDraws) {
    const uint64_t block = static_cast<uint64_t>(blockIdx.x) * kDraws + thread;
    const PhiloxWords w = philox(load_state(state), block);
    words[4 * thread] = w.w0;
    words[4 * thread + 1] = w.w1;
    words[4 * thread + 2] = w.w2;
    words[4 * thread + 3] = w.w3;
  }
  __syncthreads();
  const Range all{0, elements};
  const int64_t base = static_cast<int64_t>(blockIdx.x) * drawn;
#pragma unroll
  for (int local = thread * N; local < drawn; local += kBlock * N) {
    if (base + local >= elements) return;
    Pack<Bits, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      pack.v[i] = signed_one(one, words[local / signs_per_word], local % signs_per_word + i);
    }
    store_pack(to, base + local, all, pack);
  }
}

template <class Bits>
cudaError_t launch_signs(Storage storage, const int64_t* state, int64_t elements, void* result, cudaStream_t stream) {
  const int64_t blocks = ceil_div(elements, kDraws * signs_per_block);
  return launch(signs_kernel<Bits>, blocks, kBlock, stream, state, elements, static_cast<Bits>(bits_of_one[storage]),
                output<Bits>(result));
}

// The products of a segment, formed and added in double.
template <class V, class H>
struct Form {
  static constexpr int streams = form_of::streams, width = list_width<V, H>, sums = 1;

  struct In {
    Pack<V, width> v;
    Pack<H, width> hv;
  };

  __device__ __forceinline__ void open(const Piece<streams>&) {}

  __device__ __forceinline__ In read(const Piece<streams>& piece, int64_t at) const {
    return {piece.template read<V, width>(form_of::v, at), piece.template read<H, width>(form_of::hv, at)};
  }

  __device__ __forceinline__ void add(const Piece<streams>& piece, int64_t at, const In& in,
                                      Sums<double, 1>& sums) const {
    const Lanes lanes = piece.valid.lanes(at, width);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (!lanes.holds(k)) continue;
      const double first = load(in.v.v[k]), second = load(in.hv.v[k]);
      sums.v[0] = sums.v[0] + first * second;
    }
  }
};

}  // namespace

int64_t vectors_dot_partials(const RowsCall& call) { return DotPlan(call).chunks * call.rows * call.vectors; }

int64_t vectors_subtract_partials(const RowsCall& call) {
  return ceil_div(call.n, kBlock * pack_of_rows(call)) * call.vectors;
}

ErrorCode launch_vectors_dot(const RowsCall& call, const void* q, const void* w, double* partials, double* result,
                             StreamHandle stream) {
  const int64_t numbers = call.rows * call.vectors;
  if (numbers == 0) return cudaSuccess;
  const DotPlan plan(call);
  const cudaError_t error = with_rows(call.of_q, call.of_w, [&](auto of_q, auto of_w) {
    using Q = type_of<decltype(of_q)>;
    using W = type_of<decltype(of_w)>;
    return with_vectors<Q>(call.vectors, [&](auto of_vectors) {
      constexpr int V = decltype(of_vectors)::count;
      const int64_t blocks = plan.chunks * dot_tiles(call) * groups_of(call);
      return launch(rows_dot_kernel<Q, W, V>, blocks, kBlock, native(stream), input<Q>(q), input<W>(w), call.n,
                    call.rows, call.vectors, plan.size, plan.chunks, wide_rows<Q>(q, call.n), wide_rows<W>(w, call.n),
                    partials);
    });
  });
  if (error != cudaSuccess) return error;
  return launch(rows_total_kernel, numbers, kBlock, native(stream), partials, plan.chunks, result);
}

ErrorCode launch_vectors_subtract(const RowsCall& call, void* w, const void* q, const double* c, double* partials,
                                  double* squares, StreamHandle stream) {
  if (call.vectors == 0) return cudaSuccess;
  const int64_t tiles = ceil_div(call.n, kBlock * pack_of_rows(call));
  const cudaError_t error = with_rows(call.of_q, call.of_w, [&](auto of_q, auto of_w) {
    using Q = type_of<decltype(of_q)>;
    using W = type_of<decltype(of_w)>;
    return with_vectors<Q>(call.vectors, [&](auto of_vectors) {
      constexpr int V = decltype(of_vectors)::count;
      return launch(rows_subtract_kernel<Q, W, V>, tiles * groups_of(call), kBlock, native(stream), output<W>(w),
                    input<Q>(q), c, call.n, call.rows, call.vectors, tiles, wide_rows<Q>(q, call.n),
                    wide_rows<W>(w, call.n), partials);
    });
  });
  if (error != cudaSuccess) return error;
  return launch(rows_total_kernel, call.vectors, kBlock, native(stream), partials, tiles, squares);
}

ErrorCode launch_vectors_rademacher(Storage storage, const int64_t* state, int64_t elements, void* result,
                                    StreamHandle stream) {
  if (storage == f64) return launch_signs<uint64_t>(storage, state, elements, result, native(stream));
  if (storage == f32) return launch_signs<uint32_t>(storage, state, elements, result, native(stream));
  return launch_signs<uint16_t>(storage, state, elements, result, native(stream));
}

ErrorCode launch_vectors_quadratic(Storage of_v, Storage of_hv, const std::vector<FormTensor>& list, double* partials,
                                   double* sums, StreamHandle stream) {
  std::vector<int32_t> members;
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i].size > 0) members.push_back(static_cast<int32_t>(i));
  }
  const cudaError_t error = with_rows(of_v, of_hv, [&](auto v, auto hv) {
    const Form<type_of<decltype(v)>, type_of<decltype(hv)>> form;
    return launch_list_sums(list, members, form, partials, native(stream));
  });
  return error != cudaSuccess ? error : launch_list_totals<1>(list, partials, sums, native(stream));
}

}  // namespace fastflat::cuda
