// SPDX-License-Identifier: Apache-2.0
// Launchers of the vectors family. Rows of n contiguous elements; formulas: csrc/math/vectors.h and fastflat/_ops.
// Every launcher returns a cudaError_t.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/multi.h"
#include "cuda/types.h"

namespace fastflat::cuda {

// A basis q of `rows` rows beside `vectors` vectors w.
struct RowsCall {
  Storage of_q, of_w;
  int64_t rows, vectors, n;
};

// Doubles of the workspace of each.
int64_t vectors_dot_partials(const RowsCall& call);
int64_t vectors_subtract_partials(const RowsCall& call);

// [rows, vectors]
ErrorCode launch_vectors_dot(const RowsCall& call, const void* q, const void* w, double* partials, double* result,
                             StreamHandle stream);

// `c` is [rows, vectors], `squares` [vectors].
ErrorCode launch_vectors_subtract(const RowsCall& call, void* w, const void* q, const double* c, double* partials,
                                  double* squares, StreamHandle stream);

ErrorCode launch_vectors_rademacher(Storage storage, const int64_t* state, int64_t elements, void* result,
                                    StreamHandle stream);

// A segment of a row of v and hv; `first` counts chunks.
namespace form_of {
enum Stream : int { v, hv, streams };
}
using FormTensor = ListTensor<form_of::streams>;

// A sum a segment, all of them in the same two storage types; `partials` has a double a chunk.
ErrorCode launch_vectors_quadratic(Storage of_v, Storage of_hv, const std::vector<FormTensor>& list, double* partials,
                                   double* sums, StreamHandle stream);

}  // namespace fastflat::cuda
