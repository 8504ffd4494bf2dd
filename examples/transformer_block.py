# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face-style decoder block with torchao's quantizers, trained by a copied SAM loop, on Python source code.

The peers are torchao (`quantize_` with a `QATConfig`: int8 activations by token, int4 weights by groups of 32) and the
class `SAM` that projects copy into their trees. The network reads characters of the standard library, which is on every
machine; it is trained in floats first. The scales of torchao are constants in backward, so with its quantizers
accelerated every loss keeps its bits; an accelerated SAM has its norm summed in another order and agrees to rounding.

    pip install torchao==0.18.0
    python examples/transformer_block.py
"""

import dataclasses
import math
import sys
import sysconfig
from pathlib import Path

import comparison
import torch
from torch import nn
from torch.nn import functional as F

import fastflat

try:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
except ImportError as error:
    sys.exit(f"transformer_block: torchao must be installed, got: {error}; pip install torchao==0.18.0")

BATCH, LENGTH, SYMBOLS = 8, 128, 128


@dataclasses.dataclass
class Config:
    hidden_size: int = 256
    intermediate_size: int = 704
    num_attention_heads: int = 8
    num_hidden_layers: int = 2


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, width = config.num_attention_heads, config.hidden_size
        self.q_proj, self.k_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x, cos, sin):
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(SYMBOLS, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm, self.lm_head = nn.RMSNorm(config.hidden_size), nn.Linear(config.hidden_size, SYMBOLS, bias=False)
        half = config.hidden_size // config.num_attention_heads // 2
        angles = torch.outer(torch.arange(LENGTH), 10_000.0 ** (-torch.arange(half) / half)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.lm_head(self.norm(x))


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al., ICLR 2021) over another optimizer, in the form that projects copy."""

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, **kwargs):
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        taken = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        parts = [((p.abs() if group["adaptive"] else 1.0) * p.grad).norm() for p, group in taken]
        norm = torch.stack(parts).norm()
        for p, group in taken:
            self.state[p]["old_p"] = p.data.clone()
            p.add_((p.pow(2) if group["adaptive"] else 1.0) * p.grad * (group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()


def language_loss(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model, optimizer, batches):
    for tokens in batches:
        loss = language_loss(model, tokens)
        loss.backward()
        optimizer.first_step(zero_grad=True)
        language_loss(model, tokens).backward()
        optimizer.second_step(zero_grad=True)
        yield loss.item()


def sam(model, lr=3e-4):
    return SAM(model.parameters(), torch.optim.AdamW, lr=lr, rho=0.05, weight_decay=0.01)


def build(weights, quantize=True):
    model = Decoder(Config()).train()
    model.load_state_dict(weights)
    if quantize:
        activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        weights = IntxFakeQuantizeConfig(torch.int4, group_size=32)
        config = QATConfig(activation_config=activations, weight_config=weights, step="prepare")
        quantize_(model.layers, config)  # embedding and head stay in floats
    return model


@torch.no_grad()
def evaluate(model, tokens):
    """Bits a character."""
    model.eval()
    bits = sum(language_loss(model, part).item() for part in tokens.split(16)) / len(tokens.split(16)) / math.log(2)
    model.train()
    return bits


def windows(text, count, seed):
    """Random windows of a text: int64 `[count, LENGTH + 1]`."""
    starts = torch.randint(len(text) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(LENGTH + 1)]


def main():
    options = comparison.options(__doc__, steps=30)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = b"".join(path.read_bytes() for path in files)
    text = torch.frombuffer(bytearray(code), dtype=torch.uint8).long().clamp(max=SYMBOLS - 1)
    learned, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    test = windows(held_out, 16 if options.quick else 128, seed=3)

    pretrained = Decoder(Config())
    warm_up = windows(learned, BATCH * (4 if options.quick else 150), seed=1).split(BATCH)
    for _ in train(pretrained, sam(pretrained, lr=1e-3), warm_up):
        pass
    weights = pretrained.state_dict()
    batches = windows(learned, BATCH * options.steps, seed=2).split(BATCH)
    model = build(weights)
    optimizer = sam(model)

    accelerated = build(weights)
    report = fastflat.accelerate(accelerated)  # the added line
    print(report)

    both = build(weights)
    fastflat.accelerate(both)
    faster = sam(both)
    print(fastflat.integrations.accelerate_optimizer(faster))  # and the one for the optimizer

    removed = build(weights, quantize=False)
    comparison.compare(
        {
            "theirs": (model, train(model, optimizer, batches)),
            "fastflat": (accelerated, train(accelerated, sam(accelerated), batches)),
            "fastflat-sam": (both, train(both, faster, batches)),
            "fp32": (removed, train(removed, sam(removed), batches)),
        },
        lambda form: evaluate(form, test),
        options,
        measured="bits a character",
        optimizer="sam-loop",
        batch=BATCH,
    )


if __name__ == "__main__":
    main()
