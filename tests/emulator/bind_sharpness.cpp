// SPDX-License-Identifier: Apache-2.0
#include "bind_lists.h"
#include "cuda/sharpness.h"

using namespace fastflat::cuda;

FASTFLAT_BIND(sharpness, m) {
  m.def("list_chunks", &list_chunks);
  m.def("sharpness_sums", [](const py::list& tensors, double eta, Address partials, Address sums, Address stream) {
    return launch_sharpness_sums(list_of<sums_of::streams>(tensors), eta, at<double>(partials), at<double>(sums),
                                 at(stream));
  });
  m.def("sharpness_scale", [](Address sums, int64_t tensors, Address rho, int64_t count, double eps, bool linf,
                              Address result, Address stream) {
    return launch_sharpness_scale(at<double>(sums), tensors, at<double>(rho), count, eps, linf, at<double>(result),
                                  at(stream));
  });
  m.def("sharpness_ascent", [](const py::list& tensors, Address scale, double eta, Address state, Address stream) {
    return launch_sharpness_ascent(list_of<ascent_of::streams>(tensors), at<double>(scale), eta, at<int64_t>(state),
                                   at(stream));
  });
}
