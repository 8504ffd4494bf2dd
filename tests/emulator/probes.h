// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

// Small kernels, right and deliberately wrong, that show what the emulator runs and what it catches.
int probe(const std::string& name, float* data, int64_t n);
