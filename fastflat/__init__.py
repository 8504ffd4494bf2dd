# SPDX-License-Identifier: Apache-2.0
from fastflat import _ops
from fastflat._spec import QuantSpec
