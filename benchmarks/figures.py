# SPDX-License-Identifier: Apache-2.0
"""Tables and the figure of README and docs, drawn from committed results, each between two marks of its name.

python -m fastflat.benchmarks.figures README.md quantize benchmarks/results/quantize.json [quantize.svg]
python -m fastflat.benchmarks.figures docs/curvature.md curvature benchmarks/results/curvature.json

The names are those of TABLES.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import machine, report

#: Peers in the order and with the words of the table.
WORDS = {
    "mul": "two multiplications",
    "fastflat": "fastflat",
    "compile": "torch.compile",
    "eager": "eager Python",
    "builtin": "PyTorch's builtin",
    "torchao": "torchao",
    "brevitas": "Brevitas",
}


def chosen(result: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """The cases shown: fake_quantize in fp32, forward and backward on one thread, every size and granularity that was
    measured."""
    shown = {"family": "fake_quantize", "dtype": "fp32", "threads": 1, "passes": "both"}
    return [(c, p) for c, p in report.cases(result["rows"]) if c.items() >= shown.items()]


#: Sizes in the table of README; the record has more.
_SIZES = (2**12, 2**16, 2**20, 2**24)


def quantize(result: dict[str, Any]) -> str:
    """Microseconds of a forward and backward pass, and how many times longer the peers take."""
    peers = [p for p in WORDS if any(p in by_peer for _, by_peer in chosen(result))]
    others = [p for p in peers if p != "fastflat"]
    lines = ["| elements | scale | fastflat | " + " | ".join(WORDS[p] for p in others) + " |"]
    lines.append("|" + "---|" * (3 + len(others)))
    for case, by_peer in chosen(result):
        if case["elements"] not in _SIZES:
            continue
        ours = by_peer["fastflat"]["seconds"]
        cells = [report.elements(case["elements"]), case["granularity"], f"{ours * 1e6:.0f} us"]
        for peer in others:
            seconds = by_peer.get(peer, {}).get("seconds")
            cells.append("-" if seconds is None else f"{seconds / ours:.2f} x")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"Machine: {machine.line(result['machine'])}.", "", *lines])


#: Peers of the second table. "one by one": fastflat's own calls, composed.
FAMILY_WORDS = {"compile": "torch.compile", "eager": "eager Python", "each": "one by one", "composed": "one by one"}


def families(result: dict[str, Any]) -> str:
    """The largest fp32 case of each kind on one thread: time, in copies too, how many times longer the peers take, and
    the peak memory of a call."""
    shown, largest = {"dtype": "fp32", "threads": 1, "passes": "both"}, {}
    for case, by_peer in report.cases(result["rows"]):
        kind = (case["family"], case["granularity"])
        if case.items() >= shown.items() and case["elements"] >= largest.get(kind, ({"elements": 0},))[0]["elements"]:
            largest[kind] = case, by_peer
    columns = list(dict.fromkeys(FAMILY_WORDS.values()))
    lines = [f"| kernel | kind | elements | fastflat | in copies | {' | '.join(columns)} | peak memory, eager |"]
    lines.append("|" + "---|" * (6 + len(columns)))
    for (family, kind), (case, by_peer) in largest.items():
        ours = by_peer["fastflat"]
        cells = dict.fromkeys(columns, "-")
        for peer, words in FAMILY_WORDS.items():
            if by_peer.get(peer, {}).get("seconds") is not None:
                cells[words] = f"{by_peer[peer]['seconds'] / ours['seconds']:.2f} x"
        peaks = [by_peer.get(peer, {}).get("peak_bytes") for peer in ("fastflat", "eager")]
        memory = ", ".join("-" if peak is None else f"{peak / (4 * case['elements']):.1f} x" for peak in peaks)
        start = [f"`{family}`", kind, report.elements(case["elements"]), f"{ours['seconds'] * 1e3:.2f} ms"]
        lines.append("| " + " | ".join([*start, f"{ours['copies']:.1f}", *cells.values(), memory]) + " |")
    return "\n".join([f"Machine: {machine.line(result['machine'])}.", "", *lines])


#: Peers of the optimizers' table.
STEP_WORDS = {
    "fastflat-swap": "swap",
    "stock": "best of stock operations",
    "add-sub": "add and subtract",
    "loop": "popular loop",
    "pytorch-optimizer": "pytorch_optimizer",
}


def sharpness(result: dict[str, Any]) -> str:
    """Steps of two passes on one thread: time, in copies of the fp32 parameters too, how many times longer the others
    take, and the peak memory of a step; then what the network's own passes take."""
    lines = [f"| parameters | base | type | fastflat | in copies | {' | '.join(STEP_WORDS.values())} | peak memory |"]
    lines.append("|" + "---|" * (6 + len(STEP_WORDS)))
    of_one = [(c, p) for c, p in report.cases(result["rows"]) if c["threads"] == 1 and c["family"] == "sharpness"]
    beside = ""
    for case, by_peer in of_one:
        ours = by_peer["fastflat"]
        # A copy of bf16 moves half of what one of fp32 does.
        copies = ours["copies"] * (0.5 if case["dtype"] == "bf16" else 1)
        cells = []
        for peer in STEP_WORDS:
            seconds = by_peer.get(peer, {}).get("seconds")
            cells.append("-" if seconds is None else f"{seconds / ours['seconds']:.2f} x")
        start = [*case["granularity"].split(), case["dtype"], f"{ours['seconds'] * 1e3:.1f} ms", f"{copies:.1f}"]
        peak = f"{ours['peak_bytes'] / (4 * case['elements']):.2f} x"
        lines.append("| " + " | ".join([*start, *cells, peak]) + " |")
        if by_peer.get("passes", {}).get("seconds") is not None:
            beside = (
                f"Beside it stand the forward and backward passes, the same for all: of ResNet-18 with 32 images of"
                f" 64x64 the two take {by_peer['passes']['seconds'] * 1e3:.0f} ms."
            )
    machine_line = f"Machine: {machine.line(result['machine'])}."
    return "\n".join([machine_line, "", *lines, "", beside]).rstrip()


#: Peers of the curvature table.
PRODUCT_WORDS = {
    "double-backward": "double backward",
    "pyhessian": "PyHessian",
    "curvlinops": "curvlinops",
    "func-vmap": "vmap(jvp(grad))",
    "compile": "the same compiled",
    "fastflat-bf16": "fastflat, bf16 tangents",
}
_MATRICES = {"hessian": "H V", "ggn": "G V", "forms": "v' H v"}


def curvature(result: dict[str, Any]) -> str:
    """Products of several vectors on one thread: milliseconds a vector, in gradients of the same batch too, how many
    times longer the others take, fastflat's error against fp64 and its peak memory in that of a gradient."""
    grouped: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["threads"] == 1 and row["k"] > 1:
            key = tuple(row[f] for f in ("mode", "network", "quantized", "parameters", "k"))
            grouped.setdefault(key, {})[row["peer"]] = row
    peers = {p: w for p, w in PRODUCT_WORDS.items() if any("seconds" in by.get(p, {}) for by in grouped.values())}
    head = ["", "network", "parameters", "K", "fastflat", "in gradients", *peers.values(), "error", "peak memory"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (mode, network, quantized, parameters, k), by_peer in grouped.items():
        ours = by_peer["fastflat"]
        cells = [_MATRICES[mode], f"{network}{', 4 bits' if quantized else ''}", f"{parameters:,}", f"{k}"]
        cells += [f"{ours['seconds'] / k * 1e3:.1f} ms", f"{ours['gradients']:.2f}"]
        for peer in peers:
            seconds = by_peer.get(peer, {}).get("seconds")
            cells.append("-" if seconds is None else f"{seconds / ours['seconds']:.2f} x")
        cells += [f"{ours['error']:.0e}", f"{ours['peak_bytes'] / ours['gradient_peak_bytes']:.1f} x"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"Machine: {machine.line(result['machine'])}.", "", *lines])


#: Networks of ``fastflat bench accelerate``: what they are, and whose quantizers they have.
ACCELERATED = {
    "torch.ao": ("ResNet-20", "torch.ao, fused observers"),
    "torch.ao-unfused": ("ResNet-20", "torch.ao FakeQuantize"),
    "brevitas": ("ResNet-20", "Brevitas"),
    "lsq": ("ResNet-20", "home-made LSQ"),
    "torchao": ("transformer block", "torchao"),
}


def accelerate(result: dict[str, Any]) -> str:
    """A training step on one thread: with another library's quantizers, with those accelerated, and without any."""
    grouped: dict[str, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["threads"] == 1:
            grouped.setdefault(row["network"], {})[row["peer"]] = row
    head = ("network", "quantizers", "batch", "theirs", "accelerated", "none at all", "speed-up", "of the cap")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for network, by_peer in grouped.items():
        ours = by_peer["fastflat"]
        if "seconds" not in ours:
            continue
        cells = [*ACCELERATED[network], f"{ours['batch']}"]
        cells += [f"{by_peer[p]['seconds'] * 1e3:.0f} ms" for p in ("theirs", "fastflat", "fp32")]
        lines.append("| " + " | ".join([*cells, f"{ours['speedup']:.2f} x", f"{ours['of_cap']:.0%}"]) + " |")
    return "\n".join([f"Machine: {machine.line(result['machine'])}.", "", *lines])


#: Peers of training steps.
TRAINING_WORDS = {
    "fastflat": "fastflat",
    "fastflat-list": "weights in one call",
    "eager": "eager Python",
    "builtin": "PyTorch's builtin",
    "torchao": "torchao",
    "brevitas": "Brevitas",
}


def training(result: dict[str, Any]) -> str:
    """Training steps of a run on one thread: what each maker's quantizers add to the step without any."""
    grouped: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["family"] == "step" and row["threads"] == 1 and row["optimizer"] == "sgd":
            grouped.setdefault((row["network"], row["mode"], row["batch"]), {})[row["peer"]] = row
    peers = {p: w for p, w in TRAINING_WORDS.items() if any("seconds" in by.get(p, {}) for by in grouped.values())}
    head = ("network", "mode", "batch", "without quantizers", *peers.values())
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (network, mode, batch), by_peer in grouped.items():
        floor = by_peer["fp32"]["seconds"]
        cells = [network, mode, f"{batch}", f"{floor * 1e3:.0f} ms"]
        for peer in peers:
            seconds = by_peer.get(peer, {}).get("seconds")
            cells.append("-" if seconds is None else f"{seconds / floor - 1:+.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"Machine: {machine.line(result['machine'])}.", "", *lines])


#: Peers of the table of a GPU's kernels; "eager" of vectors and rows of tangents are the calls without our kernels.
GPU_WORDS = {"eager": "eager Python", "builtin": "PyTorch's builtin", "torchao": "torchao", "brevitas": "Brevitas"}


def gpu_kernels(result: dict[str, Any]) -> str:
    """Kernels on a GPU: the time of a call in a CUDA graph, the rate of its least bytes beside that of a copy, how many
    times longer the peers take, and the time as launched from Python."""
    lines = [f"| kernel | kind | time | GB/s | of a copy's | {' | '.join(GPU_WORDS.values())} | launched |"]
    lines.append("|" + "---|" * (6 + len(GPU_WORDS)))
    for case, by_peer in report.cases(result["rows"]):
        ours = by_peer.get("fastflat", {})
        if ours.get("timing") != "graph" or case["passes"] == "step":
            continue
        cells = [f"`{case['family']}`", case["granularity"], f"{ours['seconds'] * 1e6:.0f} us"]
        cells += [f"{ours['bandwidth'] / 1e9:.0f}", f"{ours['of_copy_bandwidth']:.0%}"]
        for peer in GPU_WORDS:
            times = report.ratio(by_peer, peer, "fastflat")
            cells.append(times if times == "-" else f"{times} x")
        lines.append("| " + " | ".join([*cells, f"{ours['launched_seconds'] * 1e6:.0f} us"]) + " |")
    return "\n".join([f"Machine: {machine.line(result['machine'])}.", "", *lines])


#: Optimizers of training steps on a GPU.
OPTIMIZER_WORDS = {"sgd": "SGD", "sam-loop": "SAM, popular loop", "sam": "SAM, fastflat"}


def gpu_training(result: dict[str, Any]) -> str:
    """Training steps on a GPU: without quantizers and with ours, and how many times longer those of others take."""
    grouped: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        grouped.setdefault((row["network"], row["optimizer"], row["batch"]), {})[row["peer"]] = row
    head = ("network", "optimizer", "batch", "no quantizers", "fastflat", *GPU_WORDS.values())
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (network, optimizer, batch), by_peer in grouped.items():
        cells = [network, OPTIMIZER_WORDS[optimizer], f"{batch}"]
        cells += [f"{by_peer[peer]['seconds'] * 1e3:.1f} ms" for peer in ("fp32", "fastflat")]
        for peer in GPU_WORDS:
            seconds = by_peer.get(peer, {}).get("seconds")
            cells.append("-" if seconds is None else f"{seconds / by_peer['fastflat']['seconds']:.2f} x")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"Machine: {machine.line(result['machine'])}.", "", *lines])


#: Tables by the name that their marks have in a page.
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "quantize": quantize,
    "families": families,
    "sharpness": sharpness,
    "curvature": curvature,
    "curvature-default": curvature,
    "accelerate": accelerate,
    "training": training,
    "gpu-kernels": gpu_kernels,
    "gpu-kernels-bf16": gpu_kernels,
    "gpu-training": gpu_training,
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Time of a forward and backward pass in copies of the tensor, by size, one line for each peer."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastflat"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for peer, words in WORDS.items():
        points = [
            (case["elements"], by_peer[peer]["copies"])
            for case, by_peer in chosen(result)
            if case["granularity"] == "channel" and by_peer.get(peer, {}).get("copies") is not None
        ]
        if points:
            style = {"linewidth": 2.5} if peer == "fastflat" else {"linewidth": 1.2, "linestyle": "--"}
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=words, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("elements, fp32, one scale per channel")
    axes.set_ylabel("forward + backward, in copies")
    axes.legend(fontsize=8)
    axes.grid(visible=True, which="both", alpha=0.2)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, format="svg", metadata={"Date": None})
    part.replace(path)


def insert(text: str, name: str, source: str, table: str) -> str:
    """`text` with the table between the two marks of the name."""
    start, end = f"<!-- {name}: drawn from", f"<!-- {name}: end -->"
    before, rest = text.split(start, 1)
    _, after = rest.split(end, 1)
    return f"{before}{start} {source} -->\n{table}\n{end}{after}"


def main(page: str, name: str, source: str, figure: str = "") -> None:
    target, result = Path(page), report.read(Path(source))
    report.write_text(target, insert(target.read_text(), name, source, TABLES[name](result)))
    if figure:
        draw(result, Path(figure))


if __name__ == "__main__":
    main(*sys.argv[1:])
