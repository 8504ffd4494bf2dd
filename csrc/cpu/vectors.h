// SPDX-License-Identifier: Apache-2.0
// What the glue (vectors.cpp) and the loops (vectors_loops.cpp) agree on: rows of n elements each.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/isa.h"

namespace fastflat::cpu {

// Elements of a row that are walked at once, by the shape alone: long runs of memory, while those of the vectors stay
// in a core's cache.
inline int64_t rows_tile(int64_t rows, int64_t vectors) {
  if (rows <= 4) return 4096;
  return std::max<int64_t>(4096, (32768 / std::max<int64_t>(vectors, 1)) & ~int64_t{63});
}

struct DotCall {
  const void *q, *w;  // [rows, n], [vectors, n]
  int64_t rows, vectors, n;
};

struct SubtractCall {
  const void* q;
  void* w;
  const double* c;  // [rows, vectors]
  int64_t rows, vectors, n;
};

struct SignsCall {
  void* to;
  uint64_t one;  // its bits
  const int64_t* state;
};

struct VectorsLoops {
  // Elements [begin, end) of every row; for q and w in fp32, q in bf16 beside it, both in fp64. Adds to `result`,
  // [rows, vectors].
  void (*dot[3])(const DotCall&, int64_t begin, int64_t end, double* result);
  // Adds the squares of what is left to `squares`, [vectors].
  void (*subtract[3])(const SubtractCall&, int64_t begin, int64_t end, double* squares);
  double (*form[3])(const void* v, const void* hv, int64_t begin, int64_t end);
  // Of 2, 4 and 8 bytes a number; begin is a multiple of 2048.
  void (*signs[3])(const SignsCall&, int64_t begin, int64_t end);
};

FASTFLAT_LOOPS(VectorsLoops, vectors_loops)

}  // namespace fastflat::cpu
