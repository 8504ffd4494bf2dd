// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "cuda/weight_norms.h"

using namespace fastflat::cuda;

FASTFLAT_BIND(weight_norms, m) {
  // launch(storage, elements, w, alpha, y, stream)
  m.def("weight_norms_saturate", [](int storage, int64_t n, Address w, Address alpha, Address y, Address stream) {
    WeightNormsCall call{static_cast<Storage>(storage), 1, n};
    call.w = at(w);
    call.alpha = at(alpha);
    call.out = at(y);
    return launch_weight_norms_saturate(call, at(stream));
  });
}
