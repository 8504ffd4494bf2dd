# SPDX-License-Identifier: Apache-2.0
"""Data-parallel training that sends less and keeps less: compressed gradients, low rank, sharded parameters."""

from fastflat.distributed.compression import Compression
from fastflat.distributed.hooks import CompressedAllReduce, compress_gradients, powersgd
from fastflat.distributed.sharding import shard

__all__ = ["CompressedAllReduce", "Compression", "compress_gradients", "powersgd", "shard"]
