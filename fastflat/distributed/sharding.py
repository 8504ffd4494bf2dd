# SPDX-License-Identifier: Apache-2.0
"""Parameters, gradients and optimizer states in shards (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fastflat.distributed.hooks import require_group

__all__ = ["shard"]


def shard(model: nn.Module, blocks: Iterable[str] | None = None, **options: Any) -> nn.Module:
    """Each rank keeps a share of every parameter, and gathers a block's whole ones while it computes with them.

    Make the optimizer afterwards: its states are sharded with the parameters. ``torch.distributed.fsdp.fully_shard``
    of each block and then of the model (ZeRO stage 3, Rajbhandari et al., arXiv 1910.02054).

    Args:
        model: changed in place.
        blocks: names of submodules to gather at once, as ``("layers.0", "layers.1")``; None for the model's children
            that have parameters.
        **options: of ``fully_shard``: ``mesh``, ``mp_policy``, ``reshard_after_forward``, ``offload_policy``.

    Returns:
        The model.

    Raises:
        RuntimeError: no process group, or a torch without ``fully_shard``.
        ValueError: a name of no submodule; nothing is sharded then.
    """
    require_group("shard")
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        import torch

        raise RuntimeError(
            "fastflat.distributed.shard: torch must have torch.distributed.fsdp.fully_shard (2.6 or later), got"
            f" {torch.__version__}"
        ) from None
    modules = dict(model.named_modules())
    if blocks is None:
        blocks = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    blocks = list(blocks)
    for name in blocks:
        if not name or name not in modules:
            raise ValueError(f"fastflat.distributed.shard: blocks must name submodules of the model, got {name!r}")
    for name in blocks:
        fully_shard(modules[name], **options)
    fully_shard(model, **options)
    return model
