// SPDX-License-Identifier: Apache-2.0
// Launchers of the general_quantize family. Tensors are dense, in storage order, aligned to 16 bytes; formulas and
// conventions: csrc/math/general_quantize.h and fastflat/_ops. The pair names the storage of x and of the result y.
// Every launcher returns a cudaError_t and does nothing for an empty tensor but write the sums.
#pragma once

#include <cstdint>

#include "cuda/types.h"

namespace fastflat::cuda {

// Device pointers to values in the compute type (f64 for f64 data, else f32); all but `scale` may be null.
struct GeneralQuantizer {
  const void* scale;       // [channels]
  const void* zero_point;  // [channels]
  const int64_t* state;    // seed and offset of the draws; rules that draw must have it
  const void* nu;          // scalars; without them 1,
  const void* a;           // 0
  const void* delta;       // and 0
  int64_t qmin, qmax;
  double eps, factor;
  int64_t rules;
};

ErrorCode launch_general_quantize(Pair pair, const Geometry& g, const GeneralQuantizer& quantizer, const void* x,
                                  void* y, StreamHandle stream);

// gx alone.
ErrorCode launch_general_quantize_gx(Pair pair, const Geometry& g, const GeneralQuantizer& quantizer, const void* gy,
                                     const void* x, void* gx, StreamHandle stream);

// gx and those of gs, gz (one value a scale) and gd (one value) that are not null, in one pass. The workspace has the
// bytes that the function below names, which depend on whether gd is asked for.
ErrorCode launch_general_quantize_bwd(Pair pair, const Geometry& g, const GeneralQuantizer& quantizer, const void* gy,
                                      const void* x, void* gx, void* gs, void* gz, void* gd, void* workspace,
                                      StreamHandle stream);
int64_t general_quantize_bwd_workspace(Pair pair, const Geometry& g, bool need_delta);

// tx, ts, tz may be null. tx has the storage of the result or of x.
ErrorCode launch_general_quantize_jvp(Pair pair, bool tangent_of_result, const Geometry& g,
                                      const GeneralQuantizer& quantizer, const void* tx, const void* ts, const void* tz,
                                      const void* x, void* ty, StreamHandle stream);

// Scales [channels] from the largest magnitudes of their elements by the rules scale_* (math/block_scale.h). `outer` is
// a value in the compute type or null. Of the quantizer, scale is where they go.
ErrorCode launch_general_quantize_scale(Pair pair, const Geometry& g, const GeneralQuantizer& quantizer,
                                        const void* outer, const void* x, void* scale, void* workspace,
                                        StreamHandle stream);
int64_t general_quantize_scale_workspace(Pair pair, const Geometry& g);

}  // namespace fastflat::cuda
