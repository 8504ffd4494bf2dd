// SPDX-License-Identifier: Apache-2.0
// Lists of tensors from Python: (addresses, storages, size, first, option) each.
#pragma once

#include "bind.h"
#include "cuda/multi.h"

template <int streams>
std::vector<cuda::ListTensor<streams>> list_of(const py::list& tensors) {
  std::vector<cuda::ListTensor<streams>> list;
  for (const py::handle& item : tensors) {
    const auto tensor = item.cast<py::tuple>();
    const auto addresses = tensor[0].cast<py::tuple>(), types = tensor[1].cast<py::tuple>();
    cuda::ListTensor<streams> t;
    for (int s = 0; s < streams; ++s) {
      t.at[s] = at(addresses[s].cast<Address>());
      t.storage[s] = static_cast<Storage>(types[s].cast<int>());
    }
    t.size = tensor[2].cast<int64_t>();
    t.first = tensor[3].cast<int64_t>();
    t.option = tensor[4].cast<int64_t>();
    list.push_back(t);
  }
  return list;
}
