// SPDX-License-Identifier: Apache-2.0
// Compressed gradients as glue and loops see them; no torch. Buckets of `bucket` elements in storage order, the last
// one may be shorter; `error` and `units` have the arithmetic type.
#pragma once

#include <cstdint>

#include "core/pairs.h"

namespace fastflat {

struct CompressorCall {
  Storage storage = f32;  // of g, or of what is decoded
  int64_t numel = 0, bucket = 1, levels = 0, norm = 0, workers = 0;
  double clip = 0.0, factor = 1.0;
  bool add = false;
  const void* g = nullptr;
  void* error = nullptr;  // or null
  void* units = nullptr;  // [buckets], of decoding [workers, buckets]
  const int64_t* state = nullptr;
  uint8_t* codes = nullptr;  // ceil(numel width / 8) bytes for each worker
  void* out = nullptr;

  int64_t buckets() const { return (numel + bucket - 1) / bucket; }
};

// Sums over a part of a bucket; `most` is the largest |p| as an integer, NaN above all.
struct CompressorSums {
  double sum, squares, most;
};

// The largest k of a gradient: how many of each leading part of |p|, those that may be among them, and the results.
struct TopCall {
  Storage storage = f32;
  int64_t numel = 0;
  const void* g = nullptr;
  void* error = nullptr;  // or null; holds p after count()
  void* values = nullptr;
  int32_t* indices = nullptr;
};

struct Candidate {
  uint64_t key;
  int32_t index;
};

}  // namespace fastflat
