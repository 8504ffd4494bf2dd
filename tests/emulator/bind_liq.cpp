// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "cuda/liq.h"

using namespace fastflat::cuda;

FASTFLAT_BIND(liq, m) {
  py::class_<LiqPoint>(m, "LiqPoint")
      .def(py::init([](Address mean, Address std, Address clip, int64_t levels, double eps) {
        return LiqPoint{at(mean), at(std), at(clip), levels, eps};
      }));

  m.def("liq_moments",
        [](Pair pair, const Geometry& g, Address w, Address mean, Address std, Address workspace, Address stream) {
          return launch_liq_moments(pair, g, at(w), at(mean), at(std), at(workspace), at(stream));
        });
  m.def("liq_moments_workspace", &liq_moments_workspace);
  m.def("liq", [](Pair pair, const Geometry& g, const LiqPoint& point, Address w, Address y, Address stream) {
    return launch_liq(pair, g, point, at(w), at(y), at(stream));
  });
  m.def("liq_bwd", [](Pair pair, const Geometry& g, const LiqPoint& point, Address gy, Address w, Address gw,
                      Address gclip, Address workspace, Address stream) {
    return launch_liq_bwd(pair, g, point, at(gy), at(w), at(gw), at(gclip), at(workspace), at(stream));
  });
  m.def("liq_bwd_workspace", &liq_bwd_workspace);
  m.def("liq_jvp",
        [](Pair pair, const Geometry& g, const LiqPoint& point, Address tw, Address tclip, Address w, Address ty,
           Address stream) { return launch_liq_jvp(pair, g, point, at(tw), at(tclip), at(w), at(ty), at(stream)); });
}
