// SPDX-License-Identifier: Apache-2.0
// Launchers of the fake_quantize family. Tensors are dense, in storage order, aligned to 16 bytes; formulas and
// conventions: csrc/math/fake_quantize.h and fastflat/_ops. The pair names the storage of x and of the result y.
// Every launcher returns a cudaError_t and does nothing for an empty tensor but write the sums.
#pragma once

#include <cstdint>

#include "cuda/types.h"

namespace fastflat::cuda {

struct Quantizer {
  const void* scale;       // [channels] in the compute type: f64 for f64 data, else f32
  const void* zero_point;  // the same, or null
  int64_t qmin, qmax;
  double eps, factor;
  int64_t rules;
};

ErrorCode launch_fake_quantize(Pair pair, const Geometry& g, const Quantizer& quantizer, const void* x, void* y,
                               StreamHandle stream);

// gx alone.
ErrorCode launch_fake_quantize_ste(Pair pair, const Geometry& g, const Quantizer& quantizer, const void* gy,
                                   const void* x, void* gx, StreamHandle stream);

// gx, gs and, with a zero-point, gz in one pass. The workspace has the bytes that the function below names.
ErrorCode launch_fake_quantize_bwd(Pair pair, const Geometry& g, const Quantizer& quantizer, const void* gy,
                                   const void* x, void* gx, void* gs, void* gz, void* workspace, StreamHandle stream);
int64_t fake_quantize_bwd_workspace(Pair pair, const Geometry& g);

// tx, ts, tz may be null. tx has the storage of the result or of x.
ErrorCode launch_fake_quantize_jvp(Pair pair, bool tangent_of_result, const Geometry& g, const Quantizer& quantizer,
                                   const void* tx, const void* ts, const void* tz, const void* x, void* ty,
                                   StreamHandle stream);

// y and the scale it was quantized with; `quantizer` brings no scale and no zero-point.
ErrorCode launch_fake_quantize_absmax(Pair pair, const Geometry& g, const Quantizer& quantizer, const void* x, void* y,
                                      void* scale, void* workspace, StreamHandle stream);
int64_t fake_quantize_absmax_workspace(Pair pair, const Geometry& g);

}  // namespace fastflat::cuda
