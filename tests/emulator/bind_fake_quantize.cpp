// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "cuda/fake_quantize.h"

using namespace fastflat::cuda;

FASTFLAT_BIND(fake_quantize, m) {
  py::class_<Quantizer>(m, "Quantizer")
      .def(
          py::init([](Address scale, Address zero_point, int64_t qmin, int64_t qmax, double eps, double factor,
                      int64_t rules) { return Quantizer{at(scale), at(zero_point), qmin, qmax, eps, factor, rules}; }));

  m.def("fake_quantize", [](Pair pair, const Geometry& g, const Quantizer& q, Address x, Address y, Address stream) {
    return launch_fake_quantize(pair, g, q, at(x), at(y), at(stream));
  });
  m.def("fake_quantize_ste",
        [](Pair pair, const Geometry& g, const Quantizer& q, Address gy, Address x, Address gx, Address stream) {
          return launch_fake_quantize_ste(pair, g, q, at(gy), at(x), at(gx), at(stream));
        });
  m.def("fake_quantize_bwd", [](Pair pair, const Geometry& g, const Quantizer& q, Address gy, Address x, Address gx,
                                Address gs, Address gz, Address workspace, Address stream) {
    return launch_fake_quantize_bwd(pair, g, q, at(gy), at(x), at(gx), at(gs), at(gz), at(workspace), at(stream));
  });
  m.def("fake_quantize_bwd_workspace", &fake_quantize_bwd_workspace);
  m.def("fake_quantize_jvp", [](Pair pair, bool of_result, const Geometry& g, const Quantizer& q, Address tx,
                                Address ts, Address tz, Address x, Address y, Address stream) {
    return launch_fake_quantize_jvp(pair, of_result, g, q, at(tx), at(ts), at(tz), at(x), at(y), at(stream));
  });
  m.def("fake_quantize_absmax", [](Pair pair, const Geometry& g, const Quantizer& q, Address x, Address y,
                                   Address scale, Address workspace, Address stream) {
    return launch_fake_quantize_absmax(pair, g, q, at(x), at(y), at(scale), at(workspace), at(stream));
  });
  m.def("fake_quantize_absmax_workspace", &fake_quantize_absmax_workspace);
}
