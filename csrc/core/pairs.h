// SPDX-License-Identifier: Apache-2.0
// Storage types and the pairs of them (data, result) that ops are compiled for; no torch, kernels include it too.
#pragma once

namespace fastflat {

enum Storage : int { f32, bf16, f16, f64, storages };
enum Pair : int { f32_f32, bf16_bf16, f16_f16, f64_f64, f32_bf16, f32_f16, pairs };

}  // namespace fastflat
