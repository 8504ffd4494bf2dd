// SPDX-License-Identifier: Apache-2.0
#include <pybind11/stl.h>

#include "bind.h"
#include "cuda/tangents.h"

using namespace fastflat::cuda;

FASTFLAT_BIND(tangents, m) {
  m.def("tangents_combine", [](int storage, int kind, const Geometry& g, int64_t count, bool first, bool second,
                               const std::vector<Address>& a, Address out, Address stream) {
    const CombineCall call{static_cast<Storage>(storage),
                           kind,
                           g,
                           count,
                           first,
                           second,
                           at(a[0]),
                           at(a[1]),
                           at(a[2]),
                           at(a[3]),
                           at(a[4]),
                           at(a[5]),
                           at(a[6]),
                           at(a[7]),
                           at(a[8]),
                           at(a[9]),
                           at(out)};
    return launch_tangents_combine(call, at(stream));
  });
  py::class_<SumsCall>(m, "SumsCall")
      .def(py::init([](int storage, const Geometry& g, int64_t count, const std::vector<Address>& a) {
        return SumsCall{static_cast<Storage>(storage),
                        g,
                        count,
                        at(a[0]),
                        at(a[1]),
                        at(a[2]),
                        at(a[3]),
                        at(a[4]),
                        at(a[5]),
                        at(a[6]),
                        at(a[7])};
      }));
  m.def("tangents_sums_partials", &tangents_sums_partials);
  m.def("tangents_sums", [](const SumsCall& call, Address partials, Address stream) {
    return launch_tangents_sums(call, at(partials), at(stream));
  });
}
