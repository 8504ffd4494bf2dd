// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "cuda/logits.h"

using namespace fastflat::cuda;

FASTFLAT_BIND(logits, m) {
  // launch(op, storage, (K, R, C), js, s, ignore_index, addresses of the tensors in the order of the struct, stream)
  m.def("logits", [](const std::string& op, int storage, int64_t K, int64_t R, int64_t C, bool js, double s,
                     int64_t ignore_index, const py::list& tensors, Address stream) {
    LogitsCall call{static_cast<Storage>(storage), K, R, C, js, s, ignore_index};
    size_t next = 0;
    const auto take = [&] { return at(tensors[next++].cast<Address>()); };
    call.z0 = take(), call.z = take();
    call.y = static_cast<const int64_t*>(take());
    for (const void** input : {&call.mult, &call.add, &call.margin, &call.weight, &call.g}) *input = take();
    for (void** output : {&call.norm, &call.divergence, &call.out0, &call.out, &call.of_row}) *output = take();
    if (op == "logits_divergence") return launch_logits_divergence(call, at(stream));
    if (op == "logits_divergence_bwd") return launch_logits_divergence_bwd(call, at(stream));
    if (op == "logits_loss") return launch_logits_loss(call, at(stream));
    if (op == "logits_loss_bwd") return launch_logits_loss_bwd(call, at(stream));
    return launch_logits_stats(call, at(stream));
  });
}
