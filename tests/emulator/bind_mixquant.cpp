// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "cuda/mixquant.h"

using namespace fastflat::cuda;

FASTFLAT_BIND(mixquant, m) {
  py::class_<Mixture>(m, "Mixture")
      .def(py::init([](Address scale, Address qmin, Address qmax, Address weight, Address factor, int count, double eps,
                       int64_t rules) {
        return Mixture{at(scale), at(qmin), at(qmax), at(weight), at(factor), count, eps, rules};
      }));

  m.def("mixquant", [](Pair pair, const Geometry& g, const Mixture& mixture, Address x, Address y, Address stream) {
    return launch_mixquant(pair, g, mixture, at(x), at(y), at(stream));
  });
  m.def("mixquant_bwd", [](Pair pair, const Geometry& g, const Mixture& mixture, Address gy, Address x, Address gx,
                           Address gs, Address gw, Address workspace, Address stream) {
    return launch_mixquant_bwd(pair, g, mixture, at(gy), at(x), at(gx), at(gs), at(gw), at(workspace), at(stream));
  });
  m.def("mixquant_bwd_workspace", &mixquant_bwd_workspace);
  m.def("mixquant_jvp", [](Pair pair, bool of_result, const Geometry& g, const Mixture& mixture, Address tx, Address ts,
                           Address tw, Address x, Address y, Address stream) {
    return launch_mixquant_jvp(pair, of_result, g, mixture, at(tx), at(ts), at(tw), at(x), at(y), at(stream));
  });
}
