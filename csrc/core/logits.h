// SPDX-License-Identifier: Apache-2.0
// Rows of logits, as glue, loops and kernels of every device see them; no torch.
#pragma once

#include <cstdint>

#include "core/pairs.h"

namespace fastflat {

// R rows of C classes, beside them K times as many in z of a divergence, or K steps of a scan. Absent tensors are null.
struct LogitsCall {
  Storage storage = f32;
  int64_t K = 1, R = 0, C = 0;
  bool js = false;
  double s = 1.0;
  int64_t ignore_index = -100;
  // In the storage type: [R, C], and [K, R, C] where z0 is there.
  const void *z0 = nullptr, *z = nullptr;
  const int64_t* y = nullptr;
  // In the compute type: [C], [R] (g), [K] (t).
  const void *mult = nullptr, *add = nullptr, *margin = nullptr, *weight = nullptr, *g = nullptr, *t = nullptr;
  // Results of a forward pass that the backward pass reads, in the compute type.
  void *norm = nullptr, *divergence = nullptr;
  // Results: gradients in the storage type, losses and statistics in the compute type.
  void *out0 = nullptr, *out = nullptr, *of_row = nullptr;
};

enum LogitsOp : int {
  logits_divergence,
  logits_divergence_bwd,
  logits_loss,
  logits_loss_bwd,
  logits_stats,
  logits_scan,
  logits_ops
};

}  // namespace fastflat
