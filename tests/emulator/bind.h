// SPDX-License-Identifier: Apache-2.0
// What each bind_<family>.cpp starts from: FASTFLAT_BIND(family, m) { m.def(...); } adds launchers to the module.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "core/geometry.h"
#include "core/pairs.h"

namespace py = pybind11;
using namespace fastflat;

using Address = uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

using Binder = void (*)(py::module_&);
std::vector<Binder>& binders();

#define FASTFLAT_BIND(family, m)                                                                  \
  static void bind_##family(py::module_& m);                                                      \
  [[maybe_unused]] static const bool bound_##family = (binders().push_back(bind_##family), true); \
  static void bind_##family(py::module_& m)
