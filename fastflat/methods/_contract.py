# SPDX-License-Identifier: Apache-2.0
"""What a file of a published method holds: :class:`Method`, its checks, and its experiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastflat.methods._hook import Hook

RELATIONS = ("equal", "at most", "at least")
DIRECTIONS = ("higher", "lower")
FIGURES = ("dots", "lines")


@dataclasses.dataclass(frozen=True)
class Check:
    """A number that a published equation gives, beside ours.

    Attributes:
        name: what is compared.
        want, got: the numbers.
        tolerance: absolute; 0 for what must agree bit for bit.
        source: equation or section of the paper, or the identity.
        relation: ``"equal"`` within the tolerance, ``"at most"`` or ``"at least"`` want, up to the tolerance.
    """

    name: str
    want: float
    got: float
    tolerance: float
    source: str
    relation: str = "equal"

    def __post_init__(self) -> None:
        if self.relation not in RELATIONS:
            raise ValueError(f"methods: relation must be one of {', '.join(RELATIONS)}, got {self.relation!r}")
        if not self.tolerance >= 0:
            raise ValueError(f"methods: tolerance must be at least 0, got {self.tolerance}")

    @property
    def passed(self) -> bool:
        """Whether they agree; NaN never does."""
        off = float(self.got) - float(self.want)
        if self.relation == "at most":
            return off <= self.tolerance
        return off >= -self.tolerance if self.relation == "at least" else abs(off) <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Settings:
    """The size of an experiment, the same for all its arms.

    Attributes:
        passes: forward-backward passes that an arm may use; an arm of two passes a step makes half the steps.
        seeds: how many runs of each arm; a verdict takes at least three.
        images, test_images: of the data, where the experiment reads a set of images.
        batch: examples in a batch.
        tune: whether each arm first chooses from the grid, one run a point; else it takes the grid's first point.
        choice: the point of the grid; the runner sets it for each arm.
        steps: ``passes`` over the passes a step of the arm; the runner sets it.
    """

    passes: int
    seeds: int = 3
    images: int | None = None
    test_images: int | None = None
    batch: int = 64
    tune: bool = True
    choice: Mapping[str, float] = dataclasses.field(default_factory=dict)
    steps: int = 0


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: for tables; lower case, as ``"sgd"``.
        run: ``(seed, settings) -> metrics``, plain numbers by name. It makes ``settings.steps`` steps with
            ``settings.choice``, and holds ``seconds_per_step``, and the experiment's ``tuned_on``, measured on examples
            that neither training nor the other metrics see. :func:`fastflat.methods.lab.fit` gives the first.
        passes: forward-backward passes that a step costs, a double backward counted as two.
    """

    name: str
    run: Callable[[int, Settings], dict[str, float]]
    passes: float = 1.0


@dataclasses.dataclass(frozen=True)
class Claim:
    """``metric`` of ``arm`` is ``direction`` than that of ``baseline``, by more than ``margin``.

    It holds where the mean over seeds of the difference (same seed, same data and start) in that direction exceeds
    ``margin`` by more than two of its standard errors. A negative margin says "not worse by more than that".
    """

    metric: str
    arm: str
    baseline: str
    direction: str = "higher"
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"methods: direction must be one of {', '.join(DIRECTIONS)}, got {self.direction!r}")


@dataclasses.dataclass(frozen=True)
class Figure:
    """What the report draws: ``"dots"``, a panel for each metric with the arms below each other; ``"lines"``, a line
    for each arm over the metrics.

    Attributes:
        metrics: names of metrics, in order.
        labels: what stands for each, on the axis or over its panel; by default the names.
        xlabel, ylabel: of the axes; ``ylabel`` is what is measured.
    """

    kind: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    xlabel: str = ""
    ylabel: str = ""

    def __post_init__(self) -> None:
        if self.kind not in FIGURES:
            raise ValueError(f"methods: figure kind must be one of {', '.join(FIGURES)}, got {self.kind!r}")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained to test a claim. Reproduced: all claims hold; partly: some; not: none.

    Attributes:
        summary: data, network and question in a sentence.
        arms: the first is the baseline of the costs.
        claims: what is tested.
        full, quick: settings; the quick ones show that it works, within two minutes, and prove nothing.
        figure: what the report draws.
        grid: values by name, such as ``{"lr": (0.1, 0.03, 0.3)}``: each arm alike takes the point of the highest
            ``tuned_on``, and tries more where that lies at an end (``lab.study.further``); a single dictionary for all
            arms, so that baselines are tuned as the method is.
        tuned_on: the metric, on validation examples, that chooses.
        tried: what else was tried where a claim does not show, and what stands against it; the report prints it.
    """

    summary: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    full: Settings
    quick: Settings
    figure: Figure
    grid: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    tuned_on: str = "validation_accuracy"
    tried: str = ""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names) or len(names) < 2:
            raise ValueError(f"methods: arms must be two or more of different names, got {names}")
        for claim in self.claims:
            for name in (claim.arm, claim.baseline):
                if name not in names:
                    raise ValueError(f"methods: a claim must name arms of {names}, got {name!r}")


@dataclasses.dataclass(frozen=True)
class Method:
    """A published method. Every file of ``fastflat/methods`` that implements one has it as ``METHOD``.

    Attributes:
        name: that of the file.
        number: in the order of the list of methods.
        title, authors, year, arxiv: of the paper.
        claim: what it claims and which part the experiment tests, one sentence.
        kernels: families of ops (``fastflat/_ops``) and ``"curvature"`` that it computes with.
        check: gives the numbers of the paper's equations beside ours, in a few seconds.
        experiment: what tests the claim.
        recipe: options of ``fastflat train`` that ``--method`` sets where the user does not.
        hook: makes what an ordinary training loop lacks for it, where options are not enough.
    """

    name: str
    number: int
    title: str
    authors: str
    year: int
    arxiv: str
    claim: str
    kernels: tuple[str, ...]
    check: Callable[[], Iterable[Check]]
    experiment: Experiment
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hook: Callable[[], Hook] | None = None
