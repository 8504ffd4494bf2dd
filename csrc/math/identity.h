// SPDX-License-Identifier: Apache-2.0
// The template functor: it does nothing, so that a new op has something to be copied from.
#pragma once

#include "macros.h"

namespace fastflat {

struct Identity {
  template <class T>
  FASTFLAT_HD T operator()(T x) const {
    return x;
  }
};

}  // namespace fastflat
