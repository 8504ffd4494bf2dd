# SPDX-License-Identifier: Apache-2.0
"""Other libraries' quantizers, computed by fastflat: :func:`accelerate` and :func:`restore`, and adapters for one's
own."""

from fastflat.integrations import brevitas, torch_ao
from fastflat.integrations._accelerate import Entry, Report, accelerate, restore
from fastflat.integrations._adapter import Adapter, register, registered, unregister

__all__ = ["Adapter", "Entry", "Report", "accelerate", "register", "registered", "restore", "unregister"]

for _adapter in (torch_ao.FakeQuantize(), brevitas.Weights(), brevitas.Activations()):
    register(_adapter)
