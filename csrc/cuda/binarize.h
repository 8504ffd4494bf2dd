// SPDX-License-Identifier: Apache-2.0
// Launchers of the binarize family. Tensors are dense, in storage order, aligned to 16 bytes; formulas and conventions:
// csrc/math/binarize.h and fastflat/_ops. The pair names the storage of x and of the result y; the cotangent of y has
// that of y, the tangent of x that of x. Importance h has the layout of x and, like alpha, k and ta [channels], the
// compute type (f64 for f64 data, else f32); null, it counts as 1. Every launcher returns a cudaError_t and does
// nothing for an empty tensor but write the quotients.
#pragma once

#include <cstdint>

#include "cuda/types.h"

namespace fastflat::cuda {

// The launchers of quotients take a workspace of this many bytes.
int64_t binarize_workspace(Pair pair, const Geometry& g, bool weighed);

// alpha = sum h|x| / sum h. Of the pair only the storage of x counts, so that alpha does not depend on that of y.
ErrorCode launch_binarize_alpha(Pair pair, const Geometry& g, const void* x, const void* h, void* alpha,
                                void* workspace, StreamHandle stream);
ErrorCode launch_binarize(Pair pair, const Geometry& g, const void* x, const void* alpha, void* y, StreamHandle stream);

// k = (sum(gy sign(x)) + ga) / sum h; gy and ga may be null, and their terms are then left out.
ErrorCode launch_binarize_k(Pair pair, const Geometry& g, const void* gy, const void* ga, const void* x, const void* h,
                            void* k, void* workspace, StreamHandle stream);
// gx; without k only its straight-through part.
ErrorCode launch_binarize_gx(Pair pair, const Geometry& g, double clip, const void* gy, const void* x, const void* h,
                             const void* alpha, const void* k, void* gx, StreamHandle stream);

// ta = sum(h sign(x) tx) / sum h. Of the pair only the storage of x counts.
ErrorCode launch_binarize_ta(Pair pair, const Geometry& g, const void* tx, const void* x, const void* h, void* ta,
                             void* workspace, StreamHandle stream);
// ty; without ta only its straight-through part.
ErrorCode launch_binarize_ty(Pair pair, const Geometry& g, double clip, const void* tx, const void* x,
                             const void* alpha, const void* ta, void* ty, StreamHandle stream);

}  // namespace fastflat::cuda
