// SPDX-License-Identifier: Apache-2.0
// Everything from outside csrc/math that the loops need.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/isa.h"
