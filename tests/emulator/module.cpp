// SPDX-License-Identifier: Apache-2.0
// Python face of the emulated kernels: the launchers of csrc/cuda over plain addresses. Test code, never in a wheel.
#include <pybind11/pybind11.h>

#include "cuda/fake_quantize.h"
#include "cuda/identity.h"
#include "cuda/reduce_plan.h"
#include "cuda_emulator.h"
#include "probes.h"

namespace py = pybind11;
using namespace fastflat;
using namespace fastflat::cuda;

namespace {

using Address = uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

py::dict take_counts() {
  auto& c = emulator::control;
  py::dict counts;
  counts["read"] = c.read;
  counts["written"] = c.written;
  counts["parameters"] = c.parameters;
  counts["launches"] = c.launches;
  counts["blocks"] = c.blocks;
  counts["stream"] = reinterpret_cast<Address>(c.stream);
  c.read = c.written = c.parameters = c.launches = c.blocks = 0;
  c.stream = nullptr;
  return counts;
}

}  // namespace

PYBIND11_MODULE(fastflat_emulator, m) {
  py::enum_<Pair>(m, "Pair")
      .value("f32_f32", f32_f32)
      .value("bf16_bf16", bf16_bf16)
      .value("f16_f16", f16_f16)
      .value("f64_f64", f64_f64)
      .value("f32_bf16", f32_bf16)
      .value("f32_f16", f32_f16);
  py::class_<Geometry>(m, "Geometry")
      .def(py::init([](int64_t outer, int64_t channels, int64_t inner) { return Geometry{outer, channels, inner}; }))
      .def_readonly("outer", &Geometry::outer)
      .def_readonly("channels", &Geometry::channels)
      .def_readonly("inner", &Geometry::inner);
  py::class_<Quantizer>(m, "Quantizer")
      .def(
          py::init([](Address scale, Address zero_point, int64_t qmin, int64_t qmax, double eps, double factor,
                      int64_t rules) { return Quantizer{at(scale), at(zero_point), qmin, qmax, eps, factor, rules}; }));

  m.def(
      "set_order", [](uint64_t seed) { emulator::control.seed = seed; },
      "Shuffles blocks and threads from here on; 0 is the natural order.");
  m.def(
      "set_edge_blocks", [](int64_t k) { emulator::control.edge_blocks = k; },
      "Runs only the first and last k blocks of every grid; 0 runs all.");
  m.def("take_counts", &take_counts, "Bytes and launches since the last call.");
  m.def("sanitized", [] {
#ifdef __SANITIZE_ADDRESS__
    return true;
#else
    return false;
#endif
  });

  m.def("identity", [](Address x, Address y, int64_t bytes, Address stream) {
    return launch_identity(at(x), at(y), bytes, at(stream));
  });
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

  m.def("reduce_plan", [](const Geometry& g, int pack) {
    const ReducePlan p = plan_reduce(g, pack);
    py::dict plan;
    plan["columns"] = p.columns;
    plan["team"] = p.team;
    plan["chunk"] = p.chunk;
    plan["width"] = p.width;
    plan["fold"] = p.fold;
    plan["rows"] = p.rows;
    plan["parts"] = p.parts;
    plan["direct"] = p.direct(g);
    return plan;
  });

  m.def(
      "probe", [](const std::string& name, Address data, int64_t n) { return probe(name, at<float>(data), n); },
      "Runs a deliberately right or wrong kernel of probes.cu.");
}
