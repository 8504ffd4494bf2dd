// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "cuda/bitplane.h"

using namespace fastflat::cuda;

FASTFLAT_BIND(bitplane, m) {
  py::class_<BitplaneArguments>(m, "BitplaneArguments")
      .def(py::init([](Address p, Address q, Address m, Address scale, Address beta, int64_t n, int planes, bool hard_w,
                       bool hard_m) {
        return BitplaneArguments{at(p), at(q), at(m), at(scale), at(beta), n, planes, hard_w, hard_m};
      }));
  m.def("bitplane", [](Pair pair, const BitplaneArguments& a, Address w, Address stream) {
    return launch_bitplane(pair, a, at(w), at(stream));
  });
  m.def("bitplane_bwd", [](Pair pair, const BitplaneArguments& a, Address gw, Address gp, Address gq, Address gm,
                           Address gs, Address workspace, Address stream) {
    return launch_bitplane_bwd(pair, a, at(gw), at(gp), at(gq), at(gm), at(gs), at(workspace), at(stream));
  });
  m.def("bitplane_bwd_workspace", &bitplane_bwd_workspace);
  m.def("bitplane_jvp", [](Pair pair, const BitplaneArguments& a, Address tp, Address tq, Address tm, Address ts,
                           Address tw, Address stream) {
    return launch_bitplane_jvp(pair, a, at(tp), at(tq), at(tm), at(ts), at(tw), at(stream));
  });
}
