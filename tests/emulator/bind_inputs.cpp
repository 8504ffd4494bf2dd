// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "cuda/inputs.h"

using namespace fastflat::cuda;

FASTFLAT_BIND(inputs, m) {
  // launch(storage, (K, samples, length), law, most, keep, (x, state, noisy, sigma), stream)
  m.def("inputs_noise", [](int storage, int64_t K, int64_t samples, int64_t length, int64_t law, float most, float keep,
                           Address x, Address state, Address noisy, Address sigma, Address stream) {
    return launch_inputs_noise({static_cast<Storage>(storage), K, samples, length, law, most, keep, at(x),
                                at<const int64_t>(state), at(noisy), at<float>(sigma)},
                               at(stream));
  });
}
