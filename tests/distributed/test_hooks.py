# SPDX-License-Identifier: Apache-2.0
"""Compressed gradients, low rank and shards over gloo, in two processes started by torchrun; and what is refused."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastflat.distributed import Compression, compress_gradients, powersgd, shard

SCRIPT = Path(__file__).with_name("hooks_run.py")
NAMES = [
    node.name
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.decorator_list
]
needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs a torch with gloo"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("hooks")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT, folder, *NAMES],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    file = folder / "results.json"
    assert file.is_file(), run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads(file.read_text())


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
