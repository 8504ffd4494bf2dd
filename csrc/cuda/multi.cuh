// SPDX-License-Identifier: Apache-2.0
// Skeletons over lists of tensors, whatever their number, sizes and alignment: a map, and sums tensor by tensor. A list
// takes a few launches. What a launch knows of its tensors travels in its arguments, so that nothing is copied to the
// device beforehand and a CUDA graph keeps it.
//
// A functor has
//   static constexpr int streams, width           of each tensor; elements of a pack
//   void open(const Piece<streams>&)              reads once a thread the numbers of the tensor
//   auto read(const Piece<streams>&, int64_t at) const                      the inputs of the pack at `at`
//   void write(const Piece<streams>&, int64_t at, const Inputs&) const      its results, or of sums
//   void add(const Piece<streams>&, int64_t at, const Inputs&, Sums<double, sums>&) const
// and may have `blocks_at_once`, `sums`, a number other than 3, and `backwards`: it starts with the end of the list.
#pragma once

#include <vector>

#include "cuda/piece.cuh"
#include "cuda/reduce.cuh"
#include "cuda/storage.cuh"

namespace fastflat::cuda {

template <class F>
inline constexpr bool runs_backwards = [] {
  if constexpr (requires { F::backwards; }) {
    return F::backwards;
  } else {
    return false;
  }
}();

template <class F>
inline constexpr int sums_of_list = [] {
  if constexpr (requires { F::sums; }) {
    return F::sums;
  } else {
    return 3;
  }
}();

// body(at, inputs) for every pack of a piece that is this thread's; inputs of two are on their way at once if small.
template <class F, int streams, class Body>
__device__ __forceinline__ void walk(const F& f, const Piece<streams>& piece, Body&& body) {
  using In = decltype(f.read(piece, 0));
  constexpr int packs = sizeof(In) > 32 ? 1 : 2;
  constexpr int step = kBlock * F::width;
  const int64_t begin = piece.chunk * kListChunk;
  for (int64_t at = begin + static_cast<int>(threadIdx.x) * F::width; at < piece.valid.end; at += packs * step) {
    In in[packs];
#pragma unroll
    for (int v = 0; v < packs; ++v) in[v] = f.read(piece, at + v * step);
#pragma unroll
    for (int v = 0; v < packs; ++v) {
      if (at + v * step < piece.valid.end) body(at + v * step, in[v]);
    }
  }
}

template <class F>
__global__ void __launch_bounds__(kBlock, blocks_at_once<F>)
    list_map_kernel(const __grid_constant__ ListTable<F::streams> table, F f) {
  const auto piece = piece_of(table, blockIdx.x, runs_backwards<F>);
  f.open(piece);
  walk(f, piece, [&](int64_t at, const auto& in) { f.write(piece, at, in); });
}

struct Add {
  template <class T>
  __device__ __forceinline__ static T combine(T a, T b) {
    return a + b;
  }
};

// The sums of each chunk of 16384 elements, numbered through the list.
template <class F>
__global__ void __launch_bounds__(kBlock, blocks_at_once<F>)
    list_sums_kernel(const __grid_constant__ ListTable<F::streams> table, F f, double* partials) {
  const auto piece = piece_of(table, blockIdx.x, false);
  f.open(piece);
  constexpr int count = sums_of_list<F>;
  Sums<double, count> sums{};
  walk(f, piece, [&](int64_t at, const auto& in) { f.add(piece, at, in, sums); });
  combine_team<Add>(sums, kBlock);
  if (threadIdx.x != 0) return;
  double* const to = partials + count * (table.first[piece.slot] + piece.chunk);
#pragma unroll
  for (int k = 0; k < count; ++k) to[k] = sums.v[k];
  platform::count_written(sizeof(sums));
}

// Where the chunks of each tensor begin.
struct Spans {
  static constexpr int capacity = (kArgumentBytes - kOtherArguments) / 8 - 1;
  int64_t first[capacity + 1];
};

// The sums of a tensor from those of its chunks, a block a tensor.
template <int K>
__global__ void __launch_bounds__(kBlock)
    list_total_kernel(const __grid_constant__ Spans spans, const double* partials, double* result) {
  Sums<double, K> sums{};
  const int64_t end = spans.first[blockIdx.x + 1];
  for (int64_t chunk = spans.first[blockIdx.x] + threadIdx.x; chunk < end; chunk += kBlock) {
#pragma unroll
    for (int k = 0; k < K; ++k) sums.v[k] = sums.v[k] + partials[K * chunk + k];
    platform::count_read(sizeof(sums));
  }
  combine_team<Add>(sums, kBlock);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < K; ++k) result[K * static_cast<int64_t>(blockIdx.x) + k] = sums.v[k];
}

// A bit for each stream whose packs lie on 16 bytes when it is moved back by `head` elements.
template <int streams>
unsigned wide_streams(const ListTensor<streams>& t, int head) {
  unsigned wide = 0;
  for (int s = 0; s < streams; ++s) {
    if (!t.at[s] || (address(t.at[s]) - head * storage_bytes(t.storage[s])) % kAccess == 0) wide |= 1u << s;
  }
  return wide;
}

// By how many elements to move a tensor of a map, so that most of its streams are wide.
template <int width, int streams>
int head_of(const ListTensor<streams>& t) {
  constexpr unsigned all = (1u << streams) - 1;
  const auto count = [](unsigned bits) {
    int n = 0;
    for (; bits; bits &= bits - 1) ++n;
    return n;
  };
  int best = 0;
  unsigned found = wide_streams(t, 0);
  for (int head = 1; head < width && found != all; ++head) {
    const unsigned other = wide_streams(t, head);
    if (count(other) > count(found)) best = head, found = other;
  }
  return best;
}

template <int streams>
using List = std::vector<ListTensor<streams>>;

// Launches `kernel` over the tensors of a list that are named, as many at a time as a table holds.
template <class F, bool may_move, class Kernel, class... Rest>
cudaError_t launch_list(Kernel kernel, const List<F::streams>& list, const std::vector<int32_t>& members,
                        cudaStream_t stream, const F& f, const Rest&... rest) {
  using Table = ListTable<F::streams>;
  static_assert(sizeof(Table) + sizeof(F) + (sizeof(Rest) + ... + 0) + 16 <= kArgumentBytes);
  Table table;
  table.count = 0;
  int64_t blocks = 0;
  const auto flush = [&]() -> cudaError_t {
    const cudaError_t error = launch(kernel, blocks, kBlock, stream, table, f, rest...);
    table.count = 0;
    blocks = 0;
    return error;
  };
  for (size_t i = 0; i < members.size(); ++i) {
    const int32_t index = members[runs_backwards<F> ? members.size() - 1 - i : i];
    const ListTensor<F::streams>& t = list[index];
    const int head = may_move ? head_of<F::width>(t) : 0;
    const int64_t chunks = list_chunks(head + t.size);
    if (table.count == Table::capacity || blocks + chunks > kMaxGrid) {
      const cudaError_t error = flush();
      if (error != cudaSuccess) return error;
    }
    const int slot = table.count++;
    table.size[slot] = t.size;
    table.first[slot] = t.first;
    table.block[slot] = static_cast<uint32_t>(blocks);
    table.index[slot] = index;
    table.storage[slot] = 0;
    table.wide[slot] = static_cast<uint16_t>(wide_streams(t, head));
    table.head[slot] = static_cast<uint8_t>(head);
    table.option[slot] = static_cast<uint8_t>(t.option);
    for (int s = 0; s < F::streams; ++s) {
      table.storage[slot] |= static_cast<uint32_t>(t.storage[s]) << (2 * s);
      const uintptr_t moved = t.at[s] ? address(t.at[s]) - head * storage_bytes(t.storage[s]) : 0;
      table.at[s][slot] = reinterpret_cast<void*>(moved);
    }
    blocks += chunks;
  }
  return flush();
}

// Combinations of storage types that have kernels of their own, and all others.
enum Combination : int {
  all_f32 = f32,
  all_bf16 = bf16,
  all_f16 = f16,
  all_f64 = f64,
  master_bf16,  // weights fp32, gradients and copies 16 bits
  master_f16,
  any_storage,
  combinations
};

// Streams by what decides about the kernel, a bit each: weights, gradients, copies.
struct Roles {
  unsigned weights, gradients, copies;
};

template <int streams>
Combination combination_of(const ListTensor<streams>& t, const Roles& roles) {
  constexpr int absent = storages, differing = storages + 1;
  const auto storage = [&](unsigned role) {
    int found = absent;
    for (int s = 0; s < streams; ++s) {
      if (!(role >> s & 1) || !t.at[s]) continue;
      found = found == absent || found == t.storage[s] ? static_cast<int>(t.storage[s]) : differing;
    }
    return found;
  };
  const int w = storage(roles.weights), g = storage(roles.gradients), r = storage(roles.copies);
  const auto is = [](int found, Storage wanted) { return found == absent || found == wanted; };
  for (const Storage s : {f32, bf16, f16, f64}) {
    if (is(w, s) && is(g, s) && is(r, s)) return static_cast<Combination>(s);
  }
  if (is(w, f32) && is(g, bf16) && is(r, bf16)) return master_bf16;
  if (is(w, f32) && is(g, f16) && is(r, f16)) return master_f16;
  return any_storage;
}

// f(Type<weight>, Type<gradient>, Type<copy>)
template <class F>
cudaError_t with_combination(Combination combination, F&& f) {
  switch (combination) {
    case all_f32:
      return f(Type<float>{}, Type<float>{}, Type<float>{});
    case all_bf16:
      return f(Type<BFloat16>{}, Type<BFloat16>{}, Type<BFloat16>{});
    case all_f16:
      return f(Type<Half>{}, Type<Half>{}, Type<Half>{});
    case all_f64:
      return f(Type<double>{}, Type<double>{}, Type<double>{});
    case master_bf16:
      return f(Type<float>{}, Type<BFloat16>{}, Type<BFloat16>{});
    case master_f16:
      return f(Type<float>{}, Type<Half>{}, Type<Half>{});
    default:
      return f(Type<Any>{}, Type<Any>{}, Type<Any>{});
  }
}

// body(Type<weight>, Type<gradient>, Type<copy>, numbers of the tensors) for each combination that the list has. Empty
// tensors are left out.
template <int streams, class Body>
cudaError_t for_each_combination(const List<streams>& list, const Roles& roles, Body&& body) {
  std::vector<int32_t> members[combinations];
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i].size > 0) members[combination_of(list[i], roles)].push_back(static_cast<int32_t>(i));
  }
  for (int c = 0; c < combinations; ++c) {
    if (members[c].empty()) continue;
    const cudaError_t error = with_combination(static_cast<Combination>(c),
                                               [&](auto w, auto g, auto r) { return body(w, g, r, members[c]); });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class F>
cudaError_t launch_list_map(const List<F::streams>& list, const std::vector<int32_t>& members, const F& f,
                            cudaStream_t stream) {
  return launch_list<F, true>(list_map_kernel<F>, list, members, stream, f);
}

// Their chunks' sums to `partials`. Not moved: the order of a sum is that of the elements.
template <class F>
cudaError_t launch_list_sums(const List<F::streams>& list, const std::vector<int32_t>& members, const F& f,
                             double* partials, cudaStream_t stream) {
  return launch_list<F, false>(list_sums_kernel<F>, list, members, stream, f, partials);
}

// The sums of all tensors to `result` [T, K]; their `first` are chunks in the order of the list.
template <int K = 3, int streams>
cudaError_t launch_list_totals(const List<streams>& list, const double* partials, double* result, cudaStream_t stream) {
  Spans spans;
  for (size_t begin = 0; begin < list.size(); begin += Spans::capacity) {
    const auto count = static_cast<size_t>(least(Spans::capacity, static_cast<int64_t>(list.size() - begin)));
    for (size_t i = 0; i < count; ++i) spans.first[i] = list[begin + i].first;
    const ListTensor<streams>& last = list[begin + count - 1];
    spans.first[count] = last.first + list_chunks(last.size);
    const cudaError_t error =
        launch(list_total_kernel<K>, static_cast<int64_t>(count), kBlock, stream, spans, partials, result + K * begin);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fastflat::cuda
