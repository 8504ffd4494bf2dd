// SPDX-License-Identifier: Apache-2.0
#include "bind.h"
#include "cuda/row_tangents.h"

using namespace fastflat::cuda;

FASTFLAT_BIND(row_tangents, m) {
  // launch(op, storage, (K, R, D), option, addresses of the tensors in the order of the struct, stream)
  m.def("row_tangents", [](const std::string& op, int storage, int64_t K, int64_t R, int64_t D, bool option,
                           const py::list& tensors, Address stream) {
    RowTangentsCall call{static_cast<Storage>(storage), K, R, D, option};
    const void** const inputs[] = {&call.x,    &call.g,      &call.along_weight, &call.along_bias, &call.normal,
                                   &call.grad, &call.weight, &call.of_row,       &call.mean,       &call.scale};
    void** const outputs[] = {&call.out, &call.new_mean, &call.new_scale};
    size_t next = 0;
    for (const void** input : inputs) *input = at(tensors[next++].cast<Address>());
    for (void** output : outputs) *output = at(tensors[next++].cast<Address>());
    if (op == "row_tangents_norm") return launch_row_tangents_norm(call, at(stream));
    if (op == "row_tangents_norm_bwd") return launch_row_tangents_norm_bwd(call, at(stream));
    if (op == "row_tangents_softmax") return launch_row_tangents_softmax(call, at(stream));
    return launch_row_tangents_softmax_bwd(call, at(stream));
  });
}
