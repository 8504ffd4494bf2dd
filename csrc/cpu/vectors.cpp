// SPDX-License-Identifier: Apache-2.0
// The vector work of Krylov methods and stochastic estimators.
#include "cpu/vectors.h"

#include <algorithm>
#include <vector>

#include "core/vector_checks.h"
#include "math/vectors.h"

namespace fastflat::cpu {
namespace {

// Elements that make a thread worth waking, and of a sum that is formed by itself.
constexpr int64_t grain = 32768;

double* doubles(Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

// How rows of n elements are cut for sums of `numbers` numbers: by the shape alone, so that the order of every sum is
// too. Pieces are whole tiles, at most 256 of them, and their sums take 8 MB at most.
struct RowsCut {
  int64_t pieces, size;

  RowsCut(int64_t n, int64_t numbers, int64_t tile) {
    const int64_t most =
        std::max<int64_t>(1, std::min<int64_t>(256, (int64_t{1} << 20) / std::max<int64_t>(numbers, 1)));
    const int64_t wanted = std::clamp<int64_t>((n + 2 * grain - 1) / (2 * grain), 1, most);
    const int64_t tiles = (n + tile - 1) / tile;
    size = std::max<int64_t>(1, (tiles + wanted - 1) / wanted) * tile;
    pieces = (n + size - 1) / size;
  }
};

// body(begin, end, numbers) for each piece, threads sharing them out; numbers of pieces are added up in their order.
template <class Body>
void sum_pieces(int64_t n, int64_t numbers, int64_t tile, double* result, const Body& body) {
  std::fill_n(result, numbers, 0.0);
  const RowsCut cut(n, numbers, tile);
  if (cut.pieces == 0) return;
  if (cut.pieces == 1) return body(0, n, result);
  std::vector<double> partial(cut.pieces * numbers, 0.0);
  torch::stable::parallel_for(0, cut.pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      body(p * cut.size, std::min(n, (p + 1) * cut.size), partial.data() + p * numbers);
    }
  });
  for (int64_t p = 0; p < cut.pieces; ++p) {
    for (int64_t i = 0; i < numbers; ++i) result[i] += partial[p * numbers + i];
  }
}

// Number of the loop for a basis and its vectors.
int loop_of(const RowStorages& storages) { return storages.own == f64 ? 2 : storages.partner == bf16; }

Tensor vectors_dot(const Tensor& q, const Tensor& w) {
  constexpr auto op = "vectors_dot";
  const RowStorages storages = check_basis(op, q, w);
  const DotCall call{q.const_data_ptr(), w.const_data_ptr(), q.size(0), w.size(0), w.size(1)};
  Tensor result = empty_dense(w, {call.rows, call.vectors}, ScalarType::Double);
  const auto loop = vectors_loops().dot[loop_of(storages)];
  const int64_t numbers = call.rows * call.vectors;
  if (numbers == 0) return result;
  sum_pieces(call.n, numbers, rows_tile(call.rows, call.vectors), doubles(result),
             [&](int64_t begin, int64_t end, double* sums) { loop(call, begin, end, sums); });
  return result;
}

Tensor vectors_subtract_(Tensor w, const Tensor& q, const Tensor& c) {
  constexpr auto op = "vectors_subtract_";
  const RowStorages storages = check_subtraction(op, w, q, c);
  const SubtractCall call{
      q.const_data_ptr(), w.mutable_data_ptr(), static_cast<const double*>(c.const_data_ptr()), q.size(0), w.size(0),
      w.size(1)};
  Tensor squares = empty_dense(w, {call.vectors}, ScalarType::Double);
  const auto loop = vectors_loops().subtract[loop_of(storages)];
  if (call.vectors == 0) return squares;
  sum_pieces(call.n, call.vectors, rows_tile(call.rows, call.vectors), doubles(squares),
             [&](int64_t begin, int64_t end, double* sums) { loop(call, begin, end, sums); });
  return squares;
}

Tensor vectors_rademacher(const Tensor& state, int64_t k, int64_t n, ScalarType dtype) {
  constexpr auto op = "vectors_rademacher";
  const int64_t elements = check_signs(op, state, k, n);
  const Storage storage = storage_of(op, "dtype", dtype);
  Tensor result = empty_dense(state, {k, n}, dtype);
  const SignsCall call{result.mutable_data_ptr(), bits_of_one[storage],
                       static_cast<const int64_t*>(state.const_data_ptr())};
  const auto loop = vectors_loops().signs[storage_bytes(storage) / 4];
  torch::stable::parallel_for(0, (elements + grain - 1) / grain, 1, [&](int64_t begin, int64_t end) {
    loop(call, begin * grain, std::min(elements, end * grain));
  });
  return result;
}

Tensor vectors_quadratic(const Tensor& v, const Tensor& hv, const Integers& starts) {
  constexpr auto op = "vectors_quadratic";
  const RowStorages storages = check_forms(op, v, hv, starts);
  const void *first = v.const_data_ptr(), *second = hv.const_data_ptr();
  const int64_t rows = v.size(0), n = v.size(1), segments = static_cast<int64_t>(starts.size()) - 1;
  Tensor result = empty_dense(hv, {rows, segments}, ScalarType::Double);
  struct Unit {
    int64_t number, begin, end;
  };
  std::vector<Unit> units;
  for (int64_t k = 0; k < rows; ++k) {
    for (int64_t t = 0; t < segments; ++t) {
      for (int64_t at = starts[t]; at < starts[t + 1]; at += grain) {
        units.push_back({k * segments + t, k * n + at, k * n + std::min(starts[t + 1], at + grain)});
      }
    }
  }
  std::vector<double> sums(units.size());
  const auto loop = vectors_loops().form[loop_of(storages)];
  const auto share = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = loop(first, second, units[i].begin, units[i].end);
  };
  const auto count = static_cast<int64_t>(units.size());
  if (rows * (starts.back() - starts.front()) <= grain) {
    share(0, count);
  } else {
    torch::stable::parallel_for(0, count, 1, share);
  }
  std::fill_n(doubles(result), rows * segments, 0.0);
  for (int64_t i = 0; i < count; ++i) doubles(result)[units[i].number] += sums[i];
  return result;
}

}  // namespace
}  // namespace fastflat::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflat, CPU, m) {
  m.impl("vectors_dot", TORCH_BOX(&fastflat::cpu::vectors_dot));
  m.impl("vectors_subtract_", TORCH_BOX(&fastflat::cpu::vectors_subtract_));
  m.impl("vectors_rademacher", TORCH_BOX(&fastflat::cpu::vectors_rademacher));
  m.impl("vectors_quadratic", TORCH_BOX(&fastflat::cpu::vectors_quadratic));
}
