// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "cuda/identity.h"

using namespace fastflat::cuda;

FASTFLAT_BIND(identity, m) {
  m.def("identity", [](Address x, Address y, int64_t bytes, Address stream) {
    return launch_identity(at(x), at(y), bytes, at(stream));
  });
}
