"""Random masks on a small vision transformer: digits 5 to 9 after digits 0 to 4.

    python benchmarks/vision_digits.py [--json OUT.json]

The images are scikit-learn's digits (8 by 8 pixels, 1,797 of them); nothing is downloaded, and no
pretrained transformer is: a ViT is trained from scratch, densely, to tell the digits 0 to 4 apart.
That encoder is the base. It is then fine-tuned to tell 5 to 9 apart, with a new head that every
method trains densely: random masks at 1 %, 0.1 % and 0.01 % of the base's weights, all weights, or
none of them (head only). The digits 5 to 9 are split into training, validation and test images
(60, 20, 20 %), the same for all. A method's learning rate is the one of the best validation
accuracy (then lowest loss) with seed 0; its test accuracy is then given for three seeds, which draw
head, mask and order. Every method's head learns at the rate chosen for the head alone. One thread;
a few minutes on a core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.utils import logging

import deltakit as dk
from deltakit.budget import parse_budget

SEEDS = (0, 1, 2)
BATCH, EPOCHS, PRETRAINING_EPOCHS = 32, 15, 20
RATES = {
    "head only": (3e-2, 1e-1, 3e-1),
    "random 1%": (1e-2, 3e-2, 1e-1),
    "random 0.1%": (3e-2, 1e-1, 3e-1),
    "random 0.01%": (1e-1, 3e-1, 1.0),
    "full": (3e-4, 1e-3, 3e-3),
}
Batch = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[float], None]  # one optimizer step at a share of the learning rate


def digits(low: int, high: int) -> Batch:
    """Images float32 [n, 1, 8, 8] from -1 to 1 and labels from 0, of the digits in [low, high]."""
    found = load_digits()
    labels = torch.tensor(found.target)
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    kept = (labels >= low) & (labels <= high)
    return images[kept], labels[kept] - low


def split(data: Batch) -> tuple[Batch, Batch, Batch]:
    """Training, validation and test images: 60, 20 and 20 %, shuffled once with seed 0."""
    images, labels = data
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    first, second = int(0.6 * len(order)), int(0.8 * len(order))
    parts = (order[:first], order[first:second], order[second:])
    train, validation, test = ((images[part], labels[part]) for part in parts)
    return train, validation, test


def batches(data: Batch, epochs: int, seed: int) -> Iterator[tuple[float, Batch]]:
    """Shuffled batches, each with the share of the learning rate left by linear decay."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    starts = range(0, len(labels), BATCH)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for number, start in enumerate(starts):
            part = order[start : start + BATCH]
            done = (epoch * len(starts) + number) / (epochs * len(starts))
            yield 1 - done, (images[part], labels[part])


def train(model: torch.nn.Module, step: Step, data: Batch, epochs: int, seed: int) -> None:
    """Run `step` after each batch's backward pass."""
    model.train()
    for share, (images, labels) in batches(data, epochs, seed):
        cross_entropy(model(pixel_values=images).logits, labels).backward()
        step(share)


def adam(parameters: Any, rate: float) -> Step:
    """AdamW without decay."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    return stepper(optimizer, optimizer.step)


def stepper(optimizer: torch.optim.Optimizer, update: Callable[[], Any]) -> Step:
    """A step that scales the optimizer's learning rates, updates and clears gradients."""
    rates = [group["lr"] for group in optimizer.param_groups]

    def step(share: float) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = share * rate
        update()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def scores(model: torch.nn.Module, data: Batch) -> tuple[float, float]:
    """Accuracy and mean cross-entropy."""
    model.eval()
    logits = model(pixel_values=data[0]).logits
    right = (logits.argmax(1) == data[1]).double().mean()
    return float(right), float(cross_entropy(logits, data[1]))


def pretrain(folder: Path) -> dict[str, float]:
    """Train an encoder on the digits 0 to 4 and write it to `folder`; its own test accuracy."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        num_labels=5,
    )
    model = ViTForImageClassification(config)
    data, _, test = split(digits(0, 4))
    train(model, adam(model.parameters(), 1e-3), data, PRETRAINING_EPOCHS, seed=0)
    encoder = ViTModel(config, add_pooling_layer=False)
    encoder.load_state_dict(model.vit.state_dict())
    encoder.save_pretrained(folder)
    weights = sum(parameter.numel() for parameter in encoder.parameters())
    return {"accuracy": scores(model, test)[0], "weights": weights}


def tuned(
    base: Path, method: str, rate: float, head_rate: float, seed: int, data: Batch
) -> tuple[Any, int]:
    """A model fine-tuned from the base, and the number of its base's weights that were free."""
    torch.manual_seed(seed)
    model = ViTForImageClassification.from_pretrained(base, num_labels=5)
    head = list(model.classifier.parameters())
    body = list(model.vit.parameters())
    free = sum(parameter.numel() for parameter in body)
    if method == "full":
        groups = [{"params": body}, {"params": head, "lr": head_rate}]
        step = adam(groups, rate)
    elif method == "head only":
        for parameter in body:
            parameter.requires_grad = False
        free, step = 0, adam(head, rate)
    else:
        free = parse_budget(method.removeprefix("random "), free)
        mask = dk.RandomMask(budget=free, seed=seed)
        tuner = dk.SparseTuner(model, mask, lr=rate, extras_lr=head_rate, base=base)
        step = stepper(tuner.optimizer, tuner.step)
    train(model, step, data, EPOCHS, seed)
    return model, free


def row(
    base: Path, method: str, head_rate: float, data: tuple[Batch, Batch, Batch]
) -> dict[str, Any]:
    """One line of the table."""
    training, validation, test = data
    tried = {}
    for rate in RATES[method]:
        model, free = tuned(base, method, rate, head_rate, SEEDS[0], training)
        tried[rate] = (scores(model, validation), model)
    rate = max(tried, key=lambda r: (tried[r][0][0], -tried[r][0][1]))
    models = [tried[rate][1]]
    models += [tuned(base, method, rate, head_rate, s, training)[0] for s in SEEDS[1:]]
    return {
        "method": method,
        "weights": free,
        "lr": rate,
        "validation": {f"{r:g}": found[0][0] for r, found in tried.items()},
        "test": [scores(model, test)[0] for model in models],
    }


def main() -> None:
    """Print the table; with --json also write everything measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        base = pretrain(Path(folder))
        print(f"base: {base['weights']:,} weights, {base['accuracy']:.1%} of digits 0 to 4\n")
        data = split(digits(5, 9))
        print(
            "| method | weights | lr | seeds | mean | sd |\n| --- | --- | --- | --- | --- | --- |"
        )
        rows = []
        for method in RATES:
            found = row(Path(folder), method, rows[0]["lr"] if rows else 0.0, data)
            rows.append(found)
            test = [100 * value for value in found["test"]]
            each = " ".join(f"{value:.1f}" for value in test)
            print(
                f"| {method} | {found['weights']:,} | {found['lr']:g} | {each} | {mean(test):.1f} "
                f"| {stdev(test):.1f} |",
                flush=True,
            )
    seconds = round(time.monotonic() - started, 1)
    counts = dict(
        zip(("train", "validation", "test"), (len(part[1]) for part in data), strict=True)
    )
    print(f"\n{counts} images of digits 5 to 9; {seconds} s")
    if args.json:
        told = {"base": base, "images": counts, "rows": rows, "seconds": seconds}
        args.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
