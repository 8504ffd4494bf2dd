# SPDX-License-Identifier: Apache-2.0
"""The report of one or several runs: one HTML file that needs nothing else."""

from __future__ import annotations

import dataclasses
import math
import platform
from pathlib import Path
from typing import Any

import torch

import fastflat
from fastflat.cli._trainer import Trainer
from fastflat.evaluate.ptq import BITS, rounded_weights
from fastflat.quant import LayerSummary, summary

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclasses.dataclass(frozen=True)
class Run:
    """What the report shows of a finished run."""

    label: str
    history: list[dict[str, float]]
    layers: list[LayerSummary]
    by_class: list[float]
    config: str
    post_training: dict[str, float]

    @classmethod
    def of(cls, trainer: Trainer) -> Run:
        config = trainer.config
        layers = summary(trainer.model) if config.quantizer != "none" else []
        swept = {str(n): trainer.accuracy_of(rounded_weights(trainer.model, n)) for n in BITS}
        return cls(config.label, trainer.history, layers, trainer.class_accuracy(), config.to_json(), swept)

    @property
    def last(self) -> dict[str, float]:
        return self.history[-1]

    @property
    def seconds(self) -> float:
        """Median over the epochs."""
        from fastflat.cli._figures import median

        return median([row["seconds"] for row in self.history])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; infinities (a weight that its grid holds exactly) become null."""
        rows = [dataclasses.asdict(row) for row in self.layers]
        for row in rows:
            if row["snr"] is not None and not math.isfinite(row["snr"]):
                row["snr"] = None
        by_class = [a if math.isfinite(a) else None for a in self.by_class]
        return {
            "label": self.label,
            "test_accuracy": self.last["test_accuracy"],
            "sharpness": self.last["sharpness"],
            "post_training_accuracy": self.post_training,
            "seconds_per_epoch": self.seconds,
            "history": self.history,
            "layers": rows,
            "class_accuracy": by_class,
        }


def html(title: str, lead: str, note: str, runs: list[Run], classes: tuple[str, ...]) -> str:
    """The page. Everything that is not our own SVG is escaped."""
    import jinja2

    from fastflat.cli import _figures

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False)
    histories = {run.label: run.history for run in runs}
    shown = []
    for run in runs:
        quantized = [row for row in run.layers if row.snr is not None]
        figures = {
            "layers_figure": _figures.layers(run.layers, run.label) if quantized else "",
            "codes_figure": _figures.codes(run.layers, run.label) if any(row.codes for row in quantized) else "",
        }
        shown.append({**{name: getattr(run, name) for name in _SHOWN}, **figures})
    return environment.from_string(_TEMPLATE.read_text()).render(
        title=title,
        lead=lead,
        note=note,
        runs=shown,
        classes=classes,
        bits=[str(n) for n in BITS],
        curves=_figures.curves(histories),
        times=_figures.times(histories) if len(runs) > 1 else "",
        versions=f"fastflat {fastflat.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    )


_SHOWN = ("label", "history", "layers", "by_class", "config", "last", "seconds", "post_training")
