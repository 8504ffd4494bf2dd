// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "cuda/binarize.h"

using namespace fastflat::cuda;

FASTFLAT_BIND(binarize, m) {
  m.def("binarize_workspace", &binarize_workspace);
  m.def("binarize_alpha",
        [](Pair pair, const Geometry& g, Address x, Address h, Address alpha, Address workspace, Address stream) {
          return launch_binarize_alpha(pair, g, at(x), at(h), at(alpha), at(workspace), at(stream));
        });
  m.def("binarize", [](Pair pair, const Geometry& g, Address x, Address alpha, Address y, Address stream) {
    return launch_binarize(pair, g, at(x), at(alpha), at(y), at(stream));
  });
  m.def("binarize_k", [](Pair pair, const Geometry& g, Address gy, Address ga, Address x, Address h, Address k,
                         Address workspace, Address stream) {
    return launch_binarize_k(pair, g, at(gy), at(ga), at(x), at(h), at(k), at(workspace), at(stream));
  });
  m.def("binarize_gx", [](Pair pair, const Geometry& g, double clip, Address gy, Address x, Address h, Address alpha,
                          Address k, Address gx, Address stream) {
    return launch_binarize_gx(pair, g, clip, at(gy), at(x), at(h), at(alpha), at(k), at(gx), at(stream));
  });
  m.def("binarize_ta", [](Pair pair, const Geometry& g, Address tx, Address x, Address h, Address ta, Address workspace,
                          Address stream) {
    return launch_binarize_ta(pair, g, at(tx), at(x), at(h), at(ta), at(workspace), at(stream));
  });
  m.def("binarize_ty", [](Pair pair, const Geometry& g, double clip, Address tx, Address x, Address alpha, Address ta,
                          Address ty, Address stream) {
    return launch_binarize_ty(pair, g, clip, at(tx), at(x), at(alpha), at(ta), at(ty), at(stream));
  });
}
