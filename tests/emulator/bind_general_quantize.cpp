// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "cuda/general_quantize.h"

using namespace fastflat::cuda;

FASTFLAT_BIND(general_quantize, m) {
  py::class_<GeneralQuantizer>(m, "GeneralQuantizer")
      .def(py::init([](Address scale, Address zero_point, Address state, Address nu, Address a, Address delta,
                       int64_t qmin, int64_t qmax, double eps, double factor, int64_t rules) {
        return GeneralQuantizer{
            at(scale), at(zero_point), at<int64_t>(state), at(nu), at(a), at(delta), qmin, qmax, eps, factor, rules};
      }));

  m.def("general_quantize",
        [](Pair pair, const Geometry& g, const GeneralQuantizer& q, Address x, Address y, Address stream) {
          return launch_general_quantize(pair, g, q, at(x), at(y), at(stream));
        });
  m.def("general_quantize_gx",
        [](Pair pair, const Geometry& g, const GeneralQuantizer& q, Address gy, Address x, Address gx, Address stream) {
          return launch_general_quantize_gx(pair, g, q, at(gy), at(x), at(gx), at(stream));
        });
  m.def("general_quantize_bwd", [](Pair pair, const Geometry& g, const GeneralQuantizer& q, Address gy, Address x,
                                   Address gx, Address gs, Address gz, Address gd, Address workspace, Address stream) {
    return launch_general_quantize_bwd(pair, g, q, at(gy), at(x), at(gx), at(gs), at(gz), at(gd), at(workspace),
                                       at(stream));
  });
  m.def("general_quantize_bwd_workspace", &general_quantize_bwd_workspace);
  m.def("general_quantize_jvp", [](Pair pair, bool of_result, const Geometry& g, const GeneralQuantizer& q, Address tx,
                                   Address ts, Address tz, Address x, Address y, Address stream) {
    return launch_general_quantize_jvp(pair, of_result, g, q, at(tx), at(ts), at(tz), at(x), at(y), at(stream));
  });
  m.def("general_quantize_scale", [](Pair pair, const Geometry& g, const GeneralQuantizer& q, Address outer, Address x,
                                     Address scale, Address workspace, Address stream) {
    return launch_general_quantize_scale(pair, g, q, at(outer), at(x), at(scale), at(workspace), at(stream));
  });
  m.def("general_quantize_scale_workspace", &general_quantize_scale_workspace);
}
