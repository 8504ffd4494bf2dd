# SPDX-License-Identifier: Apache-2.0
"""``fastflat allocate``: a bit-width for each layer of a trained network, from its curvature."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from fastflat.cli import _subject
from fastflat.cli._subject import Subject

_CHECKED = {
    "trace": "",
    "checked": "; crosses: where rounding this layer alone raised the loss of a batch by more",
}
_BUDGETS = ("average_bits", "size", "bops", "latency")


@click.command(context_settings={"max_content_width": 110})
@_subject.options
@click.option("--average-bits", type=float, help="Budget: mean bits of a weight.  [default: 4, without another budget]")
@click.option("--size", type=float, help="Budget: bytes of all weights.")
@click.option("--bops", type=float, help="Budget: bit operations of one example (multiply-adds x weight x input bits).")
@click.option(
    "--latency",
    type=click.Path(path_type=Path),
    help='JSON of measured times: {"layer": {"2": seconds, "4": seconds}}; needs --latency-budget.',
)
@click.option("--latency-budget", type=float, help="Budget: sum of the times of --latency, in its unit.")
@click.option("--widths", default="2,3,4,8", show_default=True, help="Widths to choose from.")
@click.option(
    "--activation-bits", type=click.IntRange(1, 16), help="Input bits for --bops.  [default: the run's, or 8]"
)
@click.option("--skip", multiple=True, help="Layers left in floats: patterns, first, last. Repeatable.")
@click.option(
    "--score", default="checked", show_default=True, type=click.Choice(("checked", "trace")),
    help="trace: half of tr(H)/n |Q(W) - W|^2. checked: also the measured rise where larger; of both choices"
    " the one with the smaller loss.",
)  # fmt: skip
@click.option(
    "--scales", default="mse", show_default=True, type=click.Choice(("mse", "absmax")),
    help="Scales of the rounded weights: of least squared error, or from the largest magnitude.",
)  # fmt: skip
@click.option(
    "--finetune", default=0, show_default=True, type=click.IntRange(0),
    help="Steps of Adam on the rounded weights, for the choice and for one width of no larger size.",
)  # fmt: skip
@click.option("--finetune-lr", default=1e-4, show_default=True, help="Learning rate of --finetune; falls to 0.")
@click.option("--rtol", default=0.1, show_default=True, help="Relative standard error of each trace.")
@click.option(
    "--route", default="auto", show_default=True, type=click.Choice(("auto", "sampled", "own", "joint")),
    help="How traces are found; auto takes the cheapest that is exact.",
)  # fmt: skip
def allocate(run: Path | None, model: str | None, **given: Any) -> None:
    """Choose the bits of each layer's weights for a budget, by what rounding costs in loss.

    RUN is the folder of a run of fastflat train. The score of a layer at a width is half of tr(H)/n |Q(W) - W|^2 with
    the trace of its Hessian block at the float weights (HAWQ-V2), the rise of the loss to second order. Rounding to few
    bits moves weights too far for that, so each layer is rounded alone and the loss of one batch taken: a larger rise
    takes the place of the score. The widths of least total score within the budget are found exactly, with the scores
    and with the rises, and of both the choice with the smaller loss is taken. Loss and accuracy after rounding, and
    after fine-tuning if asked for, are compared with those of one width for all layers at the same size.

    The folder of the results holds bits.json, which prepare(model, bits=...) takes, allocation.json and report.html.

    \b
    Examples:
      fastflat allocate runs/float --average-bits 4
      fastflat allocate runs/float --size 40000 --widths 2,3,4,5,6,8 --json allocation.json
      fastflat allocate --model crepe-tiny --average-bits 3 --widths 2,3,4,5,6 --finetune 100
    """
    _subject.check("allocate", run, model, given)
    kind, budget = _budget(given)
    widths = _widths(given["widths"])
    table = _latencies(given["latency"]) if kind == "latency" else {}
    if not given["rtol"] > 0:
        raise ValueError(f"allocate: --rtol must be above 0, got {given['rtol']}")
    if not (math.isfinite(given["finetune_lr"]) and given["finetune_lr"] > 0):
        raise ValueError(f"allocate: --finetune-lr must be above 0, got {given['finetune_lr']}")
    if given["threads"] is not None:
        torch.set_num_threads(given["threads"])
    subject = _subject.load("allocate", run, model)
    layers = _layers(subject.model, given["skip"])
    with_float = _with_float_weights(subject.model, layers)
    if given["finetune"] and any(hasattr(layer, "weight_quantizers") for layer in layers.values()):
        raise ValueError("allocate: --finetune must be 0 for a network with quantizers: train it with fastflat train")
    examples = subject.batches(given["batches"], given["batch"])
    activation_bits = given["activation_bits"] or subject.activation_bits or 8
    costs = _costs(kind, with_float, layers, widths, table, activation_bits, examples)
    found = _found(subject, with_float, layers, widths, examples, costs, kind, budget, given)
    folder = given["out"] or subject.folder
    results = json.dumps(found, indent=1) + "\n"
    files = {
        "bits.json": json.dumps(found["bits"], indent=1) + "\n",
        "allocation.json": results,
        "report.html": _report(subject, found),
    }
    _subject.write(folder, files, given["json_file"], results)
    for line in _text(found):
        click.echo(line)
    click.echo(f"bits: {folder / 'bits.json'}; report: {folder / 'report.html'}")


def _budget(given: dict[str, Any]) -> tuple[str, float]:
    """The kind of budget and its amount."""
    named = [kind for kind in _BUDGETS if given[kind] is not None]
    if len(named) > 1:
        got = " and ".join("--" + kind.replace("_", "-") for kind in named)
        raise ValueError(f"allocate: one budget must be given, got {got}")
    kind = named[0] if named else "average_bits"
    if (kind == "latency") != (given["latency_budget"] is not None):
        raise ValueError("allocate: --latency and --latency-budget must come together, got one of them")
    amount = given["latency_budget"] if kind == "latency" else given[kind] if named else 4.0
    option = "latency-budget" if kind == "latency" else kind.replace("_", "-")
    if not (math.isfinite(amount) and amount > 0):
        raise ValueError(f"allocate: --{option} must be a number above 0, got {amount}")
    return kind, float(amount)


def _widths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 1 <= int(part) <= 16 for part in parts):
        raise ValueError(f"allocate: --widths must be numbers from 1 to 16 with commas between, got {text!r}")
    return sorted({int(part) for part in parts})


def _latencies(path: Path) -> dict[str, dict[int, float]]:
    try:
        values = json.loads(path.read_text())
        return {name: {int(b): float(t) for b, t in of_layer.items()} for name, of_layer in values.items()}
    except OSError as error:
        raise ValueError(f"allocate: --latency must be a file that can be read, got {error}") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f'allocate: {path} must hold {{"layer": {{"bits": time}}}}, got: {error}') from None


def _layers(model: nn.Module, skip: tuple[str, ...]) -> dict[str, nn.Module]:
    """The layers whose weights are rounded, by name."""
    named = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    names = list(named)
    for pattern in skip:
        pattern = {"first": names[0], "last": names[-1]}.get(pattern, pattern)
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"allocate: --skip must match a layer of {', '.join(names)}, got {pattern!r}")
        named = {n: m for n, m in named.items() if n not in matched}
    if not named:
        raise ValueError("allocate: --skip must leave a layer, got patterns that match all")
    return named


def _with_float_weights(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    """A copy in which the weights of these layers are not quantized: what is rounded, and about which the loss is
    expanded. Quantized activations stay as they were trained."""
    model = copy.deepcopy(model).eval()
    for name in layers:
        layer = model.get_submodule(name)
        for quantizer in getattr(layer, "weight_quantizers", dict)().values():
            quantizer.enabled = False
    return model


def _costs(kind, model, layers, widths, table, activation_bits, examples) -> dict[str, dict[int, float]]:
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    if kind == "latency":
        for name in layers:
            lacking = [b for b in widths if b not in table.get(name, {})]
            if lacking:
                raise ValueError(
                    f"allocate: --latency must have times of {name!r} at each width, got none at {lacking[0]}"
                )
        return {name: {b: table[name][b] for b in widths} for name in layers}
    factor = _multiply_adds(model, list(layers), examples[0][0][:1]) if kind == "bops" else sizes
    each = activation_bits if kind == "bops" else 1
    return {name: {b: float(factor[name] * b * each) for b in widths} for name in layers}


@torch.no_grad()
def _multiply_adds(model: nn.Module, names: list[str], x: torch.Tensor) -> dict[str, int]:
    """Multiply-adds of each layer for one example: its weights times the places where they are applied."""
    found: dict[str, int] = {}

    def hook(name):
        def count(layer, _, output):
            places = output.numel() // layer.weight.shape[0]
            found[name] = found.get(name, 0) + places * layer.weight.numel()

        return count

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found.get(name, 0) for name in names}


def _found(subject, model, layers, widths, examples, costs, kind, budget, given) -> dict[str, Any]:
    """Everything that is measured, as plain values."""
    from fastflat import curvature, methods

    weights = {name: model.get_submodule(name).weight for name in layers}
    sizes = {name: w.numel() for name, w in weights.items()}
    limit = budget * sum(sizes.values()) if kind == "average_bits" else budget * 8 if kind == "size" else budget
    errors = methods.rounding_errors(weights, widths, scale=given["scales"])
    # Refused before the curvature is computed: a budget below the cheapest choice.
    methods.allocate_bits({name: dict.fromkeys(widths, 0.0) for name in layers}, costs, limit)
    operator = curvature.Hessian(model, subject.loss, examples, [f"{name}.weight" for name in layers])
    generator = torch.Generator(operator.device).manual_seed(given["seed"])
    traces = operator.layer_traces(
        given["rtol"], route=given["route"], generator=generator, progress=sys.stderr.isatty()
    )
    values = {name: float(traces[f"{name}.weight"].value) for name in layers}
    omega = methods.sensitivities(values, sizes, errors)
    predicted = {name: {b: score / 2 for b, score in of_layer.items()} for name, of_layer in omega.items()}
    scales, checked = given["scales"], given["score"] == "checked"
    rises = _rises(model, subject.loss, layers, widths, examples[0], scales) if checked else predicted
    scores = {name: {b: max(predicted[name][b], rises[name][b]) for b in widths} for name in layers}
    losses: dict[tuple[int, ...], float] = {}

    def loss_of(bits: dict[str, int]) -> float:
        key = tuple(bits[name] for name in layers)
        if key not in losses:
            losses[key] = _loss(_rounded(model, bits, scales), subject.loss, examples)
        return losses[key]

    def least(costs, limit):
        """The choice within a limit; of two the one with the smaller loss."""
        found = [
            methods.allocate_bits(score, costs, limit) for score in ((scores, predicted) if checked else (scores,))
        ]
        return min(found, key=lambda choice: loss_of(choice.bits)) if checked else found[0]

    chosen = least(costs, limit)
    bits = {name: chosen.bits[name] for name in layers}
    total = sum(sizes.values())
    known: dict[tuple[int, ...], tuple[float, float]] = {}

    def row(label: str, bits: dict[str, int]) -> dict[str, Any]:
        key = tuple(bits.values())
        if key not in known:
            known[key] = subject.evaluate(_rounded(model, bits, scales))
        loss, accuracy = known[key]
        return {
            "label": label,
            "bytes": sum(sizes[n] * b for n, b in bits.items()) / 8,
            "average_bits": sum(sizes[n] * b for n, b in bits.items()) / total,
            "cost": sum(costs[n][b] for n, b in bits.items()),
            "score": sum(scores[n][b] for n, b in bits.items()),
            "loss": loss,
            "accuracy": accuracy,
        }

    in_bits = {name: {b: float(sizes[name] * b) for b in widths} for name in layers}

    def chosen_at(average: float, label: str) -> dict[str, Any]:
        same = least(in_bits, total * average).bits
        return row(label, {name: same[name] for name in layers})

    compared = [[row(f"all {b}", dict.fromkeys(layers, b)), chosen_at(b, f"chosen, size of all {b}")] for b in widths]
    halves = [(a + b) / 2 for a, b in itertools.pairwise(widths)]
    float_loss, float_accuracy = subject.evaluate(model)
    finetuned = []
    if given["finetune"]:
        spent = sum(costs[n][b] for n, b in bits.items())
        even = [b for b in widths if sum(costs[n][b] for n in layers) <= max(spent, limit)]
        for label, own in (("chosen", bits), *((f"all {b}", dict.fromkeys(layers, b)) for b in even[-1:])):
            loss, accuracy = _finetuned(subject, model, own, scales, given)
            finetuned.append({**row(label, own), "label": f"{label}, fine-tuned", "loss": loss, "accuracy": accuracy})
    return {
        "network": subject.name,
        "measure": subject.measure,
        "budget": {"kind": kind, "amount": budget},
        "bits": bits,
        "gap": chosen.gap,
        "examples": sum(len(x) for x, _ in examples),
        "seed": given["seed"],
        "score": given["score"],
        "route": traces.route,
        "reason": traces.reason,
        "float_loss": float_loss,
        "float_accuracy": float_accuracy,
        "scales": scales,
        "chosen": row("chosen", bits),
        "finetuned": finetuned,
        "compared": compared,
        "between": [chosen_at(average, f"chosen, {average:g} bits each") for average in halves],
        "layers": [
            {
                "name": name,
                "parameters": sizes[name],
                "trace": dataclasses.asdict(traces[f"{name}.weight"]),
                "bits": bits[name],
                "scores": {str(b): s for b, s in scores[name].items()},
                "predicted": {str(b): s for b, s in predicted[name].items()},
            }
            for name in layers
        ],
    }


@torch.no_grad()
def _rises(model, loss, layers, widths, batch, scales) -> dict[str, dict[int, float]]:
    """How much the loss of a batch rises with each layer alone rounded to each width."""
    from tqdm import tqdm

    before = _loss(model, loss, [batch])
    found: dict[str, dict[int, float]] = {name: {} for name in layers}
    for name, b in tqdm(list(itertools.product(layers, widths)), desc="rounding", leave=False, disable=None):
        found[name][b] = _loss(_rounded(model, {name: b}, scales), loss, [batch]) - before
    return found


@torch.no_grad()
def _loss(model: nn.Module, loss, batches) -> float:
    """The mean over the examples of some batches."""
    losses = [(float(loss(model(x), y)), len(x)) for x, y in batches]
    return sum(value * rows for value, rows in losses) / sum(rows for _, rows in losses)


@torch.no_grad()
def _rounded(model: nn.Module, bits: dict[str, int], scales: str) -> nn.Module:
    """A copy with weights rounded, with one scale for each output channel."""
    from fastflat import methods

    model = copy.deepcopy(model)
    for name, b in bits.items():
        weight = model.get_submodule(name).weight
        weight.copy_(methods.rounded(weight, b, scale=scales))
    return model


def _finetuned(subject: Subject, model: nn.Module, bits: dict[str, int], scales: str, given) -> tuple[float, float]:
    """Loss and accuracy of a copy with quantized weights after some steps of Adam; batch norm stays as it is."""
    from tqdm import tqdm

    from fastflat import QuantSpec, optim, param_groups, prepare
    from fastflat.quant._initial import scale_from

    steps, lr = given["finetune"], given["finetune_lr"]
    others = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and n not in bits]
    model = prepare(copy.deepcopy(model), weights=QuantSpec.lsq(bits=8, axis=0), bits=bits, skip=tuple(others)).eval()
    for name, b in bits.items():
        layer = model.get_submodule(name)
        (quantizer,) = layer.weight_quantizers().values()
        spec = QuantSpec(bits=b, axis=0, mask="none")
        scale, _ = scale_from(layer.weight.detach(), spec, scales, name)
        with torch.no_grad():
            quantizer.scale.copy_(scale)
    optimizer = optim.Adam(param_groups(model, scale_lr=lr), lr=lr)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x, y in tqdm(subject.batches(steps, given["batch"]), desc="fine-tuning", leave=False, disable=None):
        optimizer.zero_grad()
        subject.loss(model(x), y).backward()
        optimizer.step()
        falling.step()
    return subject.evaluate(model)


def _tables(found: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    layers = [["layer", "parameters", "trace", "bits", "score"]]
    for row in found["layers"]:
        trace = _subject.with_error(row["trace"]["value"], row["trace"]["stderr"])
        score = f"{row['scores'][str(row['bits'])]:.3g}"
        layers.append([row["name"], str(row["parameters"]), trace, str(row["bits"]), score])
    rows = [["weights", "bytes", "bits each", "score", "test loss", found["measure"]]]
    total = sum(row["parameters"] for row in found["layers"])
    exact = {"label": "float", "bytes": 4 * total, "average_bits": 32, "score": 0}
    exact |= {"loss": found["float_loss"], "accuracy": found["float_accuracy"]}
    others = [*(row for pair in found["compared"] for row in pair), *found["between"]]
    for row in [exact, found["chosen"], *found["finetuned"], *sorted(others, key=lambda row: row["average_bits"])]:
        numbers = [f"{row['bytes']:.0f}", f"{row['average_bits']:.2f}", f"{row['score']:.3g}", f"{row['loss']:.4g}"]
        rows.append([row["label"], *numbers, f"{100 * row['accuracy']:.2f} %"])
    return layers, rows


def _text(found: dict[str, Any]) -> list[str]:
    layers, rows = _tables(found)
    how = f"traces over {found['examples']} examples by the {found['route']} route: {found['reason']}"
    return [found["network"], how, "", *_subject.aligned(layers), "", *_subject.aligned(rows), ""]


def _report(subject: Subject, found: dict[str, Any]) -> str:
    from fastflat.cli import _curvature_figures

    layers, rows = _tables(found)
    budget = f"{found['budget']['amount']:g} ({found['budget']['kind'].replace('_', ' ')})"
    parts = [
        {
            "title": "Sensitivity against bits",
            "figure": _curvature_figures.sensitivity(found["layers"]),
            "note": "Score of a layer at a width: half of tr(H) / n times the squared rounding error of its weights,"
            f" the rise of the loss to second order{_CHECKED[found['score']]}. Rings mark the widths of least total"
            f" score within the budget of {budget}.",
        },
        {
            "title": "Layers",
            "table": layers,
            "note": f"Traces over {found['examples']} examples, with standard errors, by the {found['route']} route:"
            f" {found['reason']}.",
        },
        {
            "title": "After rounding",
            "figure": _curvature_figures.accuracies(found),
            "table": rows,
            "note": f"{found['measure'].capitalize()} with weights rounded with one scale for each output channel"
            f" ({found['scales']}), and nothing trained afterwards unless a row says so.",
        },
    ]
    return _subject.page(f"Bit allocation of {found['network']}", subject.lead, parts)
