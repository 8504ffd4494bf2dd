# SPDX-License-Identifier: Apache-2.0
"""``fastflat bench curvature``: peers compute the same products, what cannot be computed is named, rows and table."""

from __future__ import annotations

import json

import pytest
import torch

from fastflat import cli
from fastflat.cli import bench

EXACT = ("fastflat", "double-backward", "func-vmap", "func-loop", "linearize")
CPU = torch.device("cpu")


@pytest.fixture
def cases(monkeypatch):
    """The cases' module, with networks that take no time."""
    module, networks = bench.package("product_cases"), bench.package("networks")
    tiny = {
        "convnet": module.Network(lambda: networks.ConvNet(1, (3, 4)), (5, 1, 8, 8)),
        "transformer": module.Network(lambda: networks.Transformer(8, 2, 1), (3, 4, 8)),
        "mlp": module.Network(lambda: networks.mlp(6, 5, 10), (7, 6)),
    }
    monkeypatch.setattr(module, "NETWORKS", tiny)
    return module


@pytest.mark.parametrize("mode", ["hessian", "ggn", "forms"])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("network", ["convnet", "transformer", "mlp"])
def test_peers_compute_the_same(benchmarks, cases, network, quantized, mode):
    products = bench.package("products")
    data = cases.ProductCase(network, quantized, 3, mode).data(CPU)
    wanted = products.exact(data)
    assert wanted.shape == ((1, 1) if mode == "forms" else data.v.shape)
    # In float32 a quantizer may round otherwise than in float64.
    tolerance = 0.2 if quantized else 1e-4
    if mode == "forms" and quantized:
        # A single number may move by more than the norm of a product: among peers of one precision.
        wanted, tolerance = products.prepared("double-backward", data)[1].double(), 1e-3
    found = 0
    for peer in EXACT:
        try:
            _, got = products.prepared(peer, data)
        except benchmarks.peers.Unsupported:
            continue
        found += 1
        assert float((got.double() - wanted).norm() / wanted.norm()) < tolerance, peer
    assert found >= 2


def test_command_writes_every_row(capsys, tmp_path, monkeypatch, benchmarks, cases, own_memory):
    monkeypatch.setattr(benchmarks.measure, "QUICK", benchmarks.measure.Effort(0.0, (2, 2), 0.0))
    target = tmp_path / "products.json"
    names = ("--networks", "mlp", "--k", "1,2", "--threads", "1", "--quick", "--peers", "fastflat,double-backward")
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "curvature", *names, "--json", str(target)])
    assert not end.value.code
    rows = json.loads(target.read_text())["rows"]
    assert len(rows) == 3 * 2 * 2 * 2
    for row in rows:
        assert ("unsupported" in row) == (row["peer"] == "double-backward" and row["mode"] == "ggn")
        if "seconds" in row:
            assert row["gradients"] == pytest.approx(row["seconds"] / row["k"] / row["gradient_seconds"])
            assert row["error"] < 0.2
    out = capsys.readouterr().out
    assert ["hessian", "mlp", "plain"] in [line.split()[:3] for line in out.splitlines()]
    assert "double-backward: no form of some cases: ValueError: double backward gives the Hessian" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--networks", "vgg"), "--networks must be of mlp, convnet, small, transformer, resnet18, got 'vgg'"),
        (("--forms", "pruned"), "--forms must be of plain, quantized, got 'pruned'"),
        (("--matrices", "fisher"), "--matrices must be of hessian, ggn, forms, got 'fisher'"),
        (("--k", "0"), "--k must be numbers from 1 to 1024, got '0'"),
    ],
)
def test_bad_options(capsys, arguments, said):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "curvature", *arguments])
    assert end.value.code == 2
    assert capsys.readouterr().err.strip().endswith(said)
