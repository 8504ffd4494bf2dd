// SPDX-License-Identifier: Apache-2.0
// Python face of the emulated kernels: the launchers of csrc/cuda over plain addresses. Test code, never in a wheel.
#include "bind.h"
#include "cuda/reduce_plan.h"
#include "cuda_emulator.h"
#include "probes.h"

using namespace fastflat::cuda;

std::vector<Binder>& binders() {
  static std::vector<Binder> all;
  return all;
}

namespace {

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

  for (const auto bind : binders()) bind(m);

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
