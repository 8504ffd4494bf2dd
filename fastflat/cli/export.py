# SPDX-License-Identifier: Apache-2.0
"""``fastflat export``: a network as a file of integer codes for other programs."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from fastflat import QuantSpec, calibrate, prepare
from fastflat import export as exporting
from fastflat.cli import _subject
from fastflat.cli._subject import PRETRAINED
from fastflat.export import TARGETS
from fastflat.quant import LAYERS, QuantLayer, quantizers


@click.command(context_settings={"max_content_width": 110})
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--model", type=click.Choice(PRETRAINED), help="A pretrained network in place of a run.")
@click.option("--to", "target", required=True, type=click.Choice(tuple(TARGETS)), help="Kind of file.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file.")
@click.option(
    "--bits", "bits_file", type=click.Path(path_type=Path),
    help="Of a float network: JSON of bits by layer, as fastflat allocate writes it; other layers stay in floats.",
)  # fmt: skip
@click.option(
    "--weight-bits", type=click.IntRange(1, 16), help="Of a float network: bits of all weights.  [default: 8]"
)
@click.option(
    "--activation-bits", type=click.IntRange(0, 16),
    help="Of a float network: bits of the layers' inputs; 0 leaves them in floats.  [default: 8]",
)  # fmt: skip
@click.option("--opset", default=21, show_default=True, help="ONNX opset; 21 has 4-bit types, 25 has 2-bit ones.")
@click.option("--check", is_flag=True, help="Load the file and compare it with the network on a batch.")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(2), help="Examples in a batch.")
@click.option("--batches", default=4, show_default=True, type=click.IntRange(1), help="Batches that set scales.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
def export(run: Path | None, model: str | None, target: str, out: Path, **given: Any) -> None:
    """Write a trained network to a file of integer codes that other programs run.

    RUN is the folder of a run of fastflat train. A quantized network goes out as it was trained. A float one is rounded
    first: weights per output channel with scales of least squared error, inputs on affine grids with scales from
    training examples.

    onnx (.onnx) has QuantizeLinear and DequantizeLinear on 4-, 8- and 16-bit integers; torch (.pt2) is a program of
    torch.export that needs PyTorch alone; torchao (.pt) holds its integer tensors; safetensors (.safetensors) codes and
    scales, beside a JSON of bits. fastflat.export.load reads each.

    \b
    Examples:
      fastflat export runs/flat --to onnx --out flat.onnx --check
      fastflat export runs/float --bits runs/float/allocate/bits.json --to safetensors --out float.safetensors
      fastflat export --model crepe-tiny --weight-bits 4 --to torch --out crepe.pt2 --check
    """
    _subject.check("export", run, model, {"json_file": None, "out": None})
    if out.suffix != TARGETS[target]:
        raise ValueError(f"export: --out must end in {TARGETS[target]} for --to {target}, got {out}")
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise ValueError(f"export: --out must name a file in an existing folder, got {out}")
    bits = None if given["bits_file"] is None else _bits(given["bits_file"])
    if given["threads"] is not None:
        torch.set_num_threads(given["threads"])
    subject = _subject.load("export", run, model)
    network = subject.model.cpu().eval()
    examples = [x.cpu() for x, _ in subject.batches(given["batches"], given["batch"])]
    if any(True for _ in quantizers(network)):
        named = [f"--{n.replace('_', '-')}" for n in ("weight_bits", "activation_bits") if given[n] is not None]
        if bits is not None or named:
            got = " and ".join([*(["--bits"] if bits is not None else []), *named])
            raise ValueError(f"export: bits must be left to a network that was trained with them, got {got}")
    else:
        network = _rounded(network, bits, given["weight_bits"], given["activation_bits"], examples)
    written = exporting.save(network, out, examples[0], opset=given["opset"])
    sizes = ", ".join(f"{path} ({path.stat().st_size} bytes)" for path in written)
    click.echo(f"{subject.name}: {sizes}")
    if given["check"]:
        _check(network, out, target, examples[0])


def _bits(path: Path) -> dict[str, dict[str, int]]:
    """Bits by layer; a number alone is that of the weights, as fastflat allocate chooses them."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"export: --bits must be a file that can be read, got {error}") from None
    except ValueError as error:
        raise ValueError(f"export: {path} must hold JSON, got: {error}") from None
    if not isinstance(values, dict) or not values:
        raise ValueError(f'export: {path} must hold {{"layer": bits}}, got {type(values).__name__}')
    return {name: value if isinstance(value, dict) else {"weights": value} for name, value in values.items()}


def _rounded(model, bits, weight_bits: int | None, activation_bits: int | None, examples: list[Tensor]) -> nn.Module:
    """A float network with quantizers."""
    weights = QuantSpec(bits=8 if weight_bits is None else weight_bits, axis=0)
    width = 8 if activation_bits is None else activation_bits
    activations = QuantSpec(bits=width, signed=False, symmetric=False) if width else None
    skip = ()
    if bits is not None:
        skip = tuple(name for name, m in model.named_modules() if type(m) in LAYERS and name not in bits)
    prepare(model, weights=weights, activations=activations, bits=bits, skip=skip)
    for layer in model.modules():
        if isinstance(layer, QuantLayer):
            for name, quantizer in layer.weight_quantizers().items():
                quantizer.initialise_from(getattr(layer, name), "mse")
    return model if activations is None else calibrate(model, examples)


@torch.no_grad()
def _check(network: nn.Module, out: Path, target: str, x: Tensor) -> None:
    blank = None
    if target in ("torchao", "safetensors"):
        blank = copy.deepcopy(network)
        for p in blank.parameters():
            p.zero_()
    loaded = exporting.load(out, blank)
    found = exporting.compare(network, loaded, x)
    codes = "equal" if found.codes_equal else "DIFFERENT"
    line = f"check on {len(x)} examples: codes of weights {codes}; largest difference of outputs {found.output:.3g}"
    if found.code_steps is not None:
        line += f"; of activations {found.code_steps} codes, {found.code_share:.2%} of them differ"
    click.echo(line)
    if not found.codes_equal:
        sys.exit(1)
