// SPDX-License-Identifier: Apache-2.0
// Launchers of the descent family. Tensors are dense, the streams of one in one layout; formulas: csrc/math/descent.h
// and fastflat/_ops. Rows and sums stay on the device. Every launcher returns a cudaError_t.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/multi.h"
#include "cuda/types.h"

namespace fastflat::cuda {

// Of one tensor: the weights before the ascent, which may be w itself; the new ones; their copy; the gradients of the
// second and the first pass; momentum or mean, squares, the largest of those; the average. What an op does not name or
// a tensor does not have is null. `first` counts random elements, in descent_lamb_moments_ chunks.
namespace descent_of {
enum Stream : int { source, w, out, g, f, m, v, x, a, streams };
}
using DescentTensor = ListTensor<descent_of::streams>;
using DescentList = std::vector<DescentTensor>;

// Device pointers of descent_rows_; the sums are null but for rule_lars.
struct RowSources {
  const double* hyper;
  const int64_t* group;
  double* steps;
  const double* mix;
  const double* of_gradients;
  const double* of_weights;
};

ErrorCode launch_descent_rows(const RowSources& from, int64_t count, int64_t rule, double* rows, StreamHandle stream);

// `state` may be null.
ErrorCode launch_descent_sgd(const DescentList& list, const double* rows, const int64_t* state, StreamHandle stream);
ErrorCode launch_descent_adam(const DescentList& list, const double* rows, bool padam, const int64_t* state,
                              StreamHandle stream);
ErrorCode launch_descent_lamb(const DescentList& list, const double* rows, const double* sums, const int64_t* state,
                              StreamHandle stream);

// `partials` has three doubles a chunk, `sums` three a tensor.
ErrorCode launch_descent_lamb_moments(const DescentList& list, const double* rows, double* partials, double* sums,
                                      StreamHandle stream);

}  // namespace fastflat::cuda
