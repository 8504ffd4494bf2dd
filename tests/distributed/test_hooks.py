# SPDX-License-Identifier: Apache-2.0
"""Compressed gradients, low rank and shards over gloo, in two processes started by torchrun; and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastflat.distributed import Compression, compress_gradients, powersgd, shard
from tests.ranks import checks_of, needs_gloo, on_ranks

SCRIPT = Path(__file__).with_name("hooks_run.py")
NAMES = checks_of(SCRIPT)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str]]:
    return on_ranks(2, SCRIPT, NAMES, tmp_path_factory.mktemp("hooks"))


@needs_gloo
@pytest.mark.parametrize("name", NAMES)
def test_on_two_ranks(results, name):
    assert [of_rank[name] for of_rank in results] == ["passed", "passed"]


MODEL = torch.nn.Linear(2, 2)
BAD = (
    (lambda: compress_gradients(MODEL), RuntimeError, "compress_gradients: a process group must be initialised"),
    (
        lambda: powersgd(MODEL),
        RuntimeError,
        "powersgd: a process group must be initialised, got none; start with torch",
    ),
    (lambda: shard(MODEL), RuntimeError, "shard: a process group must be initialised"),
    (lambda: Compression("gzip"), ValueError, "method must be one of sign, qsgd, terngrad, topk, got 'gzip'"),
    (lambda: Compression("topk", share=0), ValueError, r"share must lie in \(0, 1\], got 0"),
    (lambda: Compression("topk", share=1.5), ValueError, r"share must lie in \(0, 1\], got 1.5"),
    (lambda: Compression("topk", levels=3), ValueError, "levels must be None with topk, got 3"),
    (lambda: Compression("qsgd", levels=0), ValueError, r"levels must lie in \[1, 127\], got 0"),
    (lambda: Compression("sign", levels=3), ValueError, "levels must be None unless method is qsgd, got 3"),
)


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[text for *_, text in BAD])
def test_bad_input_gets_one_line(call, kind, message):
    with pytest.raises(kind, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_a_torch_without_fsdp_is_named(monkeypatch):
    monkeypatch.setattr("fastflat.distributed.sharding.require_group", lambda caller: None)
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", None)
    with pytest.raises(RuntimeError, match=r"torch must have torch.distributed.fsdp.fully_shard \(2.6 or later\), got"):
        shard(MODEL)


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_there_and_back(workers):
    g = torch.randn(workers, 101).half()
    for method in ("sign", "qsgd", "terngrad", "topk"):
        how = Compression(method, bucket=None if method == "topk" else 10, share=0.1)
        sent = [how.encode(g[k], None, torch.tensor([k, 0])) for k in range(workers)]
        payloads = torch.stack([how.pack(s) for s in sent])
        assert payloads.shape[1] == sent[0].nbytes
        assert torch.equal(how.decode(how.unpack(sent[0], payloads)), how.decode(sent))
