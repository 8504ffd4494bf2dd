// SPDX-License-Identifier: Apache-2.0
// Storage types and the pairs of them (data, result) that ops are compiled for; no torch, kernels include it too.
#pragma once

#include <cstdint>

namespace fastflat {

enum Storage : int { f32, bf16, f16, f64, storages };
enum Pair : int { f32_f32, bf16_bf16, f16_f16, f64_f64, f32_bf16, f32_f16, pairs };

constexpr int64_t storage_bytes(Storage s) { return s == f64 ? 8 : s == f32 ? 4 : 2; }

}  // namespace fastflat
