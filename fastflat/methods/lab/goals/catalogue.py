# SPDX-License-Identifier: Apache-2.0
"""The goals of the guide: what chooses, what is reported, which methods aim at it."""

from __future__ import annotations

import dataclasses

from fastflat.methods.lab.goals.parts import BASELINE, Combination
from fastflat.methods.lab.goals.training import RADII, ROUNDED, SEVERITIES


@dataclasses.dataclass(frozen=True)
class Reading:
    """A number that is reported: ``metric`` of trainings for ``condition``, ``label`` on the axis of the figure."""

    label: str
    condition: str
    metric: str


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a user may want of a low-bit network.

    Attributes:
        title: of its section.
        chosen: (condition, metric) on validation images that ranks the combinations; of the sharpness on training
            images, with another seed than those reported.
        readings: what is reported.
        methods: those that aim at it.
        axis: of the figure.
        direction: which values are better.
        most_passes: only combinations with at most so many passes a step are ranked.
        within: only combinations whose validation accuracy is at most so much below the baseline's are ranked.
        limits: what the numbers do not say.
    """

    title: str
    chosen: tuple[str, str]
    readings: tuple[Reading, ...]
    methods: tuple[str, ...]
    axis: str
    direction: str = "higher"
    most_passes: int | None = None
    within: float | None = None
    limits: str = ""

    def admits(self, combination: Combination) -> bool:
        """Whether a combination may be ranked, before its numbers are known."""
        return combination != BASELINE and (self.most_passes is None or combination.passes <= self.most_passes)


GOALS = {
    "width": Goal(
        "Accuracy at the width it is trained at",
        ("clean", "validation_accuracy"),
        tuple(
            Reading(f"{bits} bits", "clean" if bits == 3 else f"bits{bits}", "test_accuracy") for bits in (8, 4, 3, 2)
        ),
        ("csq", "saq", "mixed_precision", "noise_tempering", "bitat", "gadam", "pof"),
        "bits of weights and activations",
        limits=(
            "Chosen at 3 bits and trained anew at the other widths. Widths that differ by layer were not searched: see"
            " the methods that choose them."
        ),
    ),
    "rounding": Goal(
        "Accuracy with weights rounded after the training",
        ("clean", "validation_rounded"),
        tuple(Reading(f"{bits} bits", "clean", f"test_rounded_{bits}") for bits in ROUNDED),
        ("hero", "symreg"),
        "bits of all weights after the training",
        limits=(
            "The weights of all layers are rounded, each channel on the grid of its largest weight, in place of the"
            " quantizers that the network was trained with."
        ),
    ),
    "labels": Goal(
        "Wrong labels",
        ("noisy", "validation_accuracy"),
        (Reading("40 % wrong labels", "noisy", "test_accuracy"),),
        ("sam", "understanding_sam"),
        "training labels",
        limits="The labels of the validation images that choose are as wrong as those of the training; test labels are"
        " right.",
    ),
    "tail": Goal(
        "Rare classes",
        ("tail", "validation_accuracy"),
        (
            Reading("all classes", "tail", "test_accuracy"),
            Reading("rarest three", "tail", "test_tail_accuracy"),
        ),
        ("saddle_longtail",),
        "classes, after training on a long tail of 1 in 100",
    ),
    "corruptions": Goal(
        "Corrupted images",
        ("clean", "validation_corrupted"),
        tuple(Reading(f"severity {s}", "clean", f"test_corrupted_{s}") for s in SEVERITIES),
        ("dign",),
        "twelve corruptions",
    ),
    "attacks": Goal(
        "Attacked images",
        ("clean", "validation_robust"),
        tuple(Reading(f"{100 * r:g} %", "clean", f"test_robust_{100 * r:g}") for r in RADII),
        ("cure", "krylov", "hsat"),
        "radius of PGD, share of the range of a pixel",
        limits=(
            "An attack of ten steps finds an upper bound of the accuracy that is left. Training on attacked images was"
            " not searched: see the reports of cure, krylov and hsat."
        ),
    ),
    "sharpness": Goal(
        "A flat minimum",
        ("clean", "top_eigenvalue"),
        (Reading("top eigenvalue", "clean", "top_eigenvalue"),),
        ("sam", "hero", "gnp", "understanding_sam", "weight_margin", "pof"),
        "Hessian of the training loss",
        "lower",
        within=0.01,
        limits=(
            "Ranked are combinations that lose at most 1 point of validation accuracy. With equal passes methods of"
            " several passes make fewer steps, which moves the eigenvalue, too: the reports of sam and gnp compare at"
            " equal steps."
        ),
    ),
    "cost": Goal(
        "Accuracy at the cost of plain training",
        ("clean", "validation_accuracy"),
        (Reading("3 bits", "clean", "test_accuracy"),),
        ("large_scale", "rmt", "gadam", "symreg", "noise_tempering"),
        "combinations of one pass a step",
        most_passes=1,
        limits="Ranked are combinations of one forward-backward pass a step.",
    ),
}
