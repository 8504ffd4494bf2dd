# SPDX-License-Identifier: Apache-2.0
"""One training run: model, data, optimizer, and the epochs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastflat import methods, optim, quant
from fastflat.cli import _runs
from fastflat.cli._config import Config
from fastflat.data import Batches, Dataset
from fastflat.methods.lab import networks
from fastflat.quant.eager import BuiltinQuantizer, EagerQuantizer

_CLASSES = {"fastflat": quant.Quantizer, "python": EagerQuantizer, "torch": BuiltinQuantizer}

#: Classes of the optimizers, their options beside those of all.
_OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "sgd": (optim.SGD, {}),
    "adam": (optim.Adam, {}),
    "adamw": (optim.AdamW, {}),
    "padam": (optim.Padam, {}),
    "lars": (optim.LARS, {}),
    "lamb": (optim.LAMB, {}),
    "gadam": (optim.Gadam, {}),
    "gadamx": (optim.GadamX, {}),
    "sam": (optim.SAM, {}),
    "asam": (optim.SAM, {"adaptive": True, "eta": 0.01}),
    "gsam": (optim.GSAM, {}),
    "gnp": (optim.GNP, {}),
    "hero": (optim.HERO, {}),
    "saq": (optim.SAQ, {}),
}
#: Training images on which the sharpness is measured, and its radius: one for all, so that runs compare.
_SHARPNESS_IMAGES, _SHARPNESS_RADIUS = 500, 0.05
#: Share of the run after which the iterates of Gadam are averaged, once an epoch.
_AVERAGE_FROM = 0.5
#: Batches that set the statistics of batch normalisation of averaged weights, and the scales of the activations.
_STATISTICS_BATCHES = 50
_CALIBRATION = 8
_EVALUATION_BATCH = 500


class Diverged(ArithmeticError):
    """The loss is not finite."""


class Trainer:
    """An optimizer, by default SGD with momentum, and a cosine learning rate.

    Each trainer has its own random state, so that several can take turns in one process and each computes what it
    would alone.

    Attributes:
        history: a row of plain numbers for each epoch.
        done: epochs trained so far.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self.config, self.dataset = config, dataset
        self.device = torch.device(config.device)
        self.history: list[dict[str, float]] = []
        self.done = 0
        mean, std = dataset.statistics()
        mirror = config.mirror and dataset.mirrors
        there = {"mean": mean, "std": std, "device": self.device}
        self.train_batches = Batches(
            dataset.train_x, dataset.train_y, config.batch, shuffle=True, shift=config.shift, mirror=mirror, **there
        )
        self.test_batches = Batches(dataset.test_x, dataset.test_y, _EVALUATION_BATCH, **there)
        make = methods.get(config.method).hook if config.method is not None else None
        self.hook, self._steps = (methods.Hook if make is None else make)(), 0
        with torch.random.fork_rng(devices=_cuda_devices(self.device)):
            self.model = self._model()
            self.hook.prepare(self.model)
            self._random = self._random_state()
        groups = quant.param_groups(
            self.model, lr=config.lr, scale_lr=config.scale_lr, weight_decay=config.weight_decay
        )
        self.optimizer = self._optimizer(groups)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        with self._own_random_state():
            self.hook.start(self.model, self.optimizer, config.epochs * len(self.train_batches))

    def _optimizer(self, groups: list[dict[str, Any]]) -> optim.FusedOptimizer:
        config = self.config
        kind, options = _OPTIMIZERS[config.optimizer]
        options = {"lr": config.lr, **options}
        if config.radius is not None:
            options |= {"base": config.base, "rho": config.radius, "model": self.model}
        if (config.base if config.radius is not None else config.optimizer) in ("sgd", "lars"):
            options["momentum"] = config.momentum
        if kind in (optim.Gadam, optim.GadamX):
            steps = len(self.train_batches)
            options |= {"average_every": steps, "average_start": int(_AVERAGE_FROM * config.epochs * steps)}
        return kind(groups, **options)

    def _model(self) -> nn.Module:
        config, dataset = self.config, self.dataset
        model = networks.build(config.model, dataset.shape, len(dataset.classes), config.seed)
        if config.init is not None:
            _start_from(model, Path(config.init))
        model.to(self.device)
        if config.quantizer != "none":
            weights, activations = config.specs()
            first, last = networks.ends(model)
            skip = [{"first": first, "last": last}.get(name, name) for name in config.skip]
            quant.prepare(
                model,
                weights=weights,
                activations=activations,
                bits=config.layer_bits(),
                skip=skip,
                quantizer=_CLASSES[config.quantizer],
            )
            size = min(config.batch, len(dataset.train_x))
            x, y = dataset.train_x[: size * _CALIBRATION], dataset.train_y[: size * _CALIBRATION]
            plain = Batches(x, y, size, *dataset.statistics(), device=self.device)
            quant.calibrate(model, itertools.islice(plain, _CALIBRATION))
        return model

    def _rate(self, step: int) -> float:
        """Factor of the learning rate: linear over the first half epoch, then a half cosine to zero."""
        total, rise = self.config.epochs * len(self.train_batches), max(len(self.train_batches) // 2, 1)
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(step - rise, total - rise) / max(total - rise, 1)))

    def epoch(self, tick: Callable[[], object] = lambda: None) -> dict[str, float]:
        """Train for one epoch, measure the test split, and return the new row of ``history``; see :meth:`parts`."""
        for _ in self.parts(len(self.train_batches), tick):
            pass
        return self.history[-1]

    def parts(self, steps: int, tick: Callable[[], object] = lambda: None) -> Iterator[None]:
        """One epoch in parts of `steps` steps, after each of which the caller has the turn; then the test split is
        measured and a row added to ``history``. Its ``seconds`` are those of the training steps alone.

        ``tick`` is called after every step.

        Raises:
            Diverged: the loss is not finite; model and optimizer are then of no use.
        """
        rate = self.optimizer.param_groups[0]["lr"]
        batches, seconds, left = iter(self.train_batches), 0.0, len(self.train_batches)
        # Sums stay on the device: reading them waits for it.
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        while left > 0:
            with self._own_random_state():
                start = time.perf_counter()
                for x, y in itertools.islice(batches, steps):
                    sums += self._step(x, y)
                    tick()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                seconds += time.perf_counter() - start
            left -= steps
            yield
        loss, right, count = sums.tolist()
        if not math.isfinite(loss):
            raise Diverged(f"train: the loss is {loss} in epoch {self.done + 1}; try a smaller --lr")
        self.done += 1
        if self.done == self.config.epochs:
            self.hook.finish()
        test_loss, test_accuracy = self.evaluate()
        row = {
            "epoch": self.done,
            "lr": rate,
            "train_loss": loss / count,
            "train_accuracy": right / count,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "sharpness": self.sharpness(),
            "seconds": seconds,
        }
        averaged = self.averaged_accuracy() if self.done == self.config.epochs else None
        if averaged is not None:
            row["averaged_accuracy"] = averaged
        self.history.append(row)

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One step of the optimizer; (sum of losses, right answers, images) at the weights before it."""
        self.model.train()
        passes = []

        def closure() -> torch.Tensor:
            with self._autocast():
                loss, scores = self.hook.loss(self.model, x, y)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            passes.append((scores, loss))
            return loss

        self.hook.before(self._steps)
        self.optimizer.step(closure)
        self.hook.after(self._steps)
        self._steps += 1
        self.scheduler.step()
        scores, loss = passes[0]
        right = (scores.detach().argmax(1) == y).sum()
        return torch.stack([loss.detach().double() * len(y), right.double(), right.new_tensor(len(y)).double()])

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """(loss, accuracy) on the test split."""
        scores, y = self.scores()
        return float(F.cross_entropy(scores, y)), float((scores.argmax(1) == y).float().mean())

    def sharpness(self) -> float:
        """Rise of the loss on the first training images at radius 0.05, in evaluation mode."""
        count = min(_SHARPNESS_IMAGES, len(self.dataset.train_x))
        images, labels = self.dataset.train_x[:count], self.dataset.train_y[:count]
        ((x, y),) = Batches(images, labels, count, *self.dataset.statistics(), device=self.device)

        def loss() -> torch.Tensor:
            with self._autocast():
                return F.cross_entropy(self.model(x).float(), y)

        training = self.model.training
        self.model.eval()
        try:
            return optim.sharpness(self.model, loss, _SHARPNESS_RADIUS)[1]
        finally:
            self.model.train(training)

    @torch.no_grad()
    def class_accuracy(self) -> list[float]:
        """Accuracy of each class on the test split; NaN for a class that it lacks."""
        scores, y = self.scores()
        right = (scores.argmax(1) == y).double()
        return [float(right[y == c].mean()) for c in range(len(self.dataset.classes))]

    def accuracy_of(self, model: nn.Module) -> float:
        """Accuracy of another model on the test split."""
        scores, y = self.scores(model)
        return float((scores.argmax(1) == y).float().mean())

    def averaged_accuracy(self) -> float | None:
        """Accuracy of the averaged weights on the test split, with statistics of batch normalisation of their own; None
        where the optimizer keeps no average."""
        if not any(group["average_count"] for group in self.optimizer.param_groups):
            return None
        with self.optimizer.averaged():
            model = copy.deepcopy(self.model)
        with self._own_random_state():
            batches = (x for x, _ in self.train_batches)
            torch.optim.swa_utils.update_bn(itertools.islice(batches, _STATISTICS_BATCHES), model)
        return self.accuracy_of(model)

    def scores(self, model: nn.Module | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and labels of the test split, in evaluation mode."""
        model = self.model if model is None else model
        training = model.training
        model.eval()
        try:
            with self._autocast(), torch.no_grad():
                pairs = [(model(x).float(), y) for x, y in self.test_batches]
        finally:
            model.train(training)
        return torch.cat([s for s, _ in pairs]), torch.cat([y for _, y in pairs])

    def state(self) -> dict[str, Any]:
        """Everything that continues the run bit for bit, as plain values and tensors."""
        return {
            "format": _runs.FORMAT,
            "config": dataclasses.asdict(self.config),
            "checksum": self.dataset.checksum(),
            "epoch": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": self._random,
            "history": self.history,
            "hook": self.hook.state_dict(),
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: it belongs to another run or other data, or does not fit the model.
        """
        if Config.from_dict(state["config"], path) != self.config:
            raise ValueError(f"train: {path} must be of the run that config.json describes, got other options in it")
        if state["checksum"] != self.dataset.checksum():
            raise ValueError(f"train: data must be those of the run (checksum {state['checksum']}), got others")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self._random = [t.clone() for t in state["random"]]
            self.hook.load_state_dict(state["hook"])
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()[:100]
            raise ValueError(f"train: {path} must fit the model, got: {reason}") from None
        self.history = list(state["history"])
        self.done = state["epoch"]
        self._steps = self.done * len(self.train_batches)

    def _autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.amp)

    def _random_state(self) -> list[torch.Tensor]:
        cuda = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda]

    @contextlib.contextmanager
    def _own_random_state(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=_cuda_devices(self.device)):
            torch.set_rng_state(self._random[0])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(self._random[1], self.device)
            yield
            self._random = self._random_state()


def _cuda_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


def _start_from(model: nn.Module, run: Path) -> None:
    """Load the weights of another run (its folder) into a model that is not quantized."""
    trained = _runs.checkpoint(run)["model"]
    own = {key: value for key, value in trained.items() if "_quantizer." not in key}
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()[:100]
        raise ValueError(f"train: init must be a run of the same model and data shape, got: {reason}") from None
