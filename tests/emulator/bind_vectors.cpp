// SPDX-License-Identifier: Apache-2.0
#include "bind_lists.h"
#include "cuda/vectors.h"

using namespace fastflat::cuda;

FASTFLAT_BIND(vectors, m) {
  py::class_<RowsCall>(m, "RowsCall").def(py::init([](int of_q, int of_w, int64_t rows, int64_t vectors, int64_t n) {
    return RowsCall{static_cast<Storage>(of_q), static_cast<Storage>(of_w), rows, vectors, n};
  }));
  m.def("vectors_dot_partials", &vectors_dot_partials);
  m.def("vectors_subtract_partials", &vectors_subtract_partials);
  m.def("vectors_dot",
        [](const RowsCall& call, Address q, Address w, Address partials, Address result, Address stream) {
          return launch_vectors_dot(call, at(q), at(w), at<double>(partials), at<double>(result), at(stream));
        });
  m.def("vectors_subtract",
        [](const RowsCall& call, Address w, Address q, Address c, Address partials, Address squares, Address stream) {
          return launch_vectors_subtract(call, at(w), at(q), at<double>(c), at<double>(partials), at<double>(squares),
                                         at(stream));
        });
  m.def("vectors_rademacher", [](int storage, Address state, int64_t elements, Address result, Address stream) {
    return launch_vectors_rademacher(static_cast<Storage>(storage), at<int64_t>(state), elements, at(result),
                                     at(stream));
  });
  m.def("vectors_quadratic",
        [](int of_v, int of_hv, const py::list& segments, Address partials, Address sums, Address stream) {
          return launch_vectors_quadratic(static_cast<Storage>(of_v), static_cast<Storage>(of_hv),
                                          list_of<form_of::streams>(segments), at<double>(partials), at<double>(sums),
                                          at(stream));
        });
}
