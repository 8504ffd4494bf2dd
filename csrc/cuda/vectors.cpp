// SPDX-License-Identifier: Apache-2.0
// The vector work of Krylov methods and stochastic estimators.
#include "cuda/vectors.h"

#include "core/vector_checks.h"
#include "cuda/device.h"

namespace fastflat::cuda {
namespace {

double* doubles(Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

Tensor vectors_dot(const Tensor& q, const Tensor& w) {
  constexpr auto op = "vectors_dot";
  const RowStorages storages = check_basis(op, q, w);
  const RowsCall call{storages.partner, storages.own, q.size(0), w.size(0), w.size(1)};
  const OnDevice device(w);
  Tensor result = empty_dense(w, {call.rows, call.vectors}, ScalarType::Double);
  if (result.numel() == 0) return result;
  Tensor partials = empty_dense(w, {vectors_dot_partials(call)}, ScalarType::Double);
  check_launch(op, launch_vectors_dot(call, q.const_data_ptr(), w.const_data_ptr(), doubles(partials), doubles(result),
                                      device.stream));
  return result;
}

Tensor vectors_subtract_(Tensor w, const Tensor& q, const Tensor& c) {
  constexpr auto op = "vectors_subtract_";
  const RowStorages storages = check_subtraction(op, w, q, c);
  const RowsCall call{storages.partner, storages.own, q.size(0), w.size(0), w.size(1)};
  const OnDevice device(w);
  Tensor squares = empty_dense(w, {call.vectors}, ScalarType::Double);
  Tensor partials = empty_dense(w, {vectors_subtract_partials(call)}, ScalarType::Double);
  check_launch(op, launch_vectors_subtract(call, w.mutable_data_ptr(), q.const_data_ptr(),
                                           static_cast<const double*>(c.const_data_ptr()), doubles(partials),
                                           doubles(squares), device.stream));
  return squares;
}

Tensor vectors_rademacher(const Tensor& state, int64_t k, int64_t n, ScalarType dtype) {
  constexpr auto op = "vectors_rademacher";
  const int64_t elements = check_signs(op, state, k, n);
  const Storage storage = storage_of(op, "dtype", dtype);
  const OnDevice device(state);
  Tensor result = empty_dense(state, {k, n}, dtype);
  check_launch(op, launch_vectors_rademacher(storage, static_cast<const int64_t*>(state.const_data_ptr()), elements,
                                             result.mutable_data_ptr(), device.stream));
  return result;
}

Tensor vectors_quadratic(const Tensor& v, const Tensor& hv, const Integers& starts) {
  constexpr auto op = "vectors_quadratic";
  const RowStorages storages = check_forms(op, v, hv, starts);
  const int64_t n = v.size(1), segments = static_cast<int64_t>(starts.size()) - 1;
  const int64_t of_v = storage_bytes(storages.partner), of_hv = storage_bytes(storages.own);
  const auto place = [](const Tensor& t, int64_t bytes) {
    return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) + bytes;
  };
  std::vector<FormTensor> list;
  list.reserve(v.size(0) * segments);
  int64_t chunks = 0;
  for (int64_t k = 0; k < v.size(0); ++k) {
    for (int64_t t = 0; t < segments; ++t) {
      FormTensor& segment = list.emplace_back();
      const int64_t at = k * n + starts[t];
      segment.set(form_of::v, place(v, at * of_v), storages.partner);
      segment.set(form_of::hv, place(hv, at * of_hv), storages.own);
      segment.size = starts[t + 1] - starts[t];
      segment.first = chunks;
      chunks += list_chunks(segment.size);
    }
  }
  const OnDevice device(hv);
  Tensor partials = empty_dense(hv, {chunks}, ScalarType::Double);
  Tensor result = empty_dense(hv, {v.size(0), segments}, ScalarType::Double);
  if (list.empty()) return result;
  check_launch(op, launch_vectors_quadratic(storages.partner, storages.own, list, doubles(partials), doubles(result),
                                            device.stream));
  return result;
}

}  // namespace
}  // namespace fastflat::cuda

STABLE_TORCH_LIBRARY_IMPL(fastflat, CUDA, m) {
  m.impl("vectors_dot", TORCH_BOX(&fastflat::cuda::vectors_dot));
  m.impl("vectors_subtract_", TORCH_BOX(&fastflat::cuda::vectors_subtract_));
  m.impl("vectors_rademacher", TORCH_BOX(&fastflat::cuda::vectors_rademacher));
  m.impl("vectors_quadratic", TORCH_BOX(&fastflat::cuda::vectors_quadratic));
}
