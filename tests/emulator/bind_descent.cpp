// SPDX-License-Identifier: Apache-2.0
#include "bind_lists.h"
#include "cuda/descent.h"

using namespace fastflat::cuda;

FASTFLAT_BIND(descent, m) {
  constexpr int streams = descent_of::streams;
  m.def("descent_rows", [](Address hyper, Address group, Address steps, Address mix, Address of_gradients,
                           Address of_weights, int64_t count, int64_t rule, Address rows, Address stream) {
    const RowSources from{at<double>(hyper), at<int64_t>(group),       at<double>(steps),
                          at<double>(mix),   at<double>(of_gradients), at<double>(of_weights)};
    return launch_descent_rows(from, count, rule, at<double>(rows), at(stream));
  });
  m.def("descent_sgd", [](const py::list& tensors, Address rows, Address state, Address stream) {
    return launch_descent_sgd(list_of<streams>(tensors), at<double>(rows), at<int64_t>(state), at(stream));
  });
  m.def("descent_adam", [](const py::list& tensors, Address rows, bool padam, Address state, Address stream) {
    return launch_descent_adam(list_of<streams>(tensors), at<double>(rows), padam, at<int64_t>(state), at(stream));
  });
  m.def("descent_lamb", [](const py::list& tensors, Address rows, Address sums, Address state, Address stream) {
    return launch_descent_lamb(list_of<streams>(tensors), at<double>(rows), at<double>(sums), at<int64_t>(state),
                               at(stream));
  });
  m.def("descent_lamb_moments",
        [](const py::list& tensors, Address rows, Address partials, Address sums, Address stream) {
          return launch_descent_lamb_moments(list_of<streams>(tensors), at<double>(rows), at<double>(partials),
                                             at<double>(sums), at(stream));
        });
}
