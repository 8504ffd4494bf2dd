// SPDX-License-Identifier: Apache-2.0
// The glue of csrc/cuda, registered for CPU tensors. Every header comes first, under its own meaning of CUDA.
#include "core/checks.h"
#include "core/expand.h"
#include "core/lists.h"
#include "core/storage.h"
#include "core/tensor.h"
#include "core/vector_checks.h"
#include "cuda/device.h"
#include "cuda/scaled.h"

#define CUDA CPU
#include "cuda/binarize.cpp"
#include "cuda/bitplane.cpp"
#include "cuda/descent.cpp"
#include "cuda/fake_quantize.cpp"
#include "cuda/fake_quantize_list.cpp"
#include "cuda/general_quantize.cpp"
#include "cuda/identity.cpp"
#include "cuda/liq.cpp"
#include "cuda/mixquant.cpp"
#include "cuda/sharpness.cpp"
#include "cuda/vectors.cpp"
