"""Curvature and distance against density: random masks on the small ViT of `vision_digits.py`.

    python benchmarks/density.py [--plot OUT.png]

Figure 4 of Xu and Zhang (2024), on a model that is made in a minute: the norm of the Hessian
restricted to random masks (training loss of digits 5 to 9, with the head trained alone), and how
far the best rate of each density, by validation accuracy, then moves the weights. One seed.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import ViTModel
from transformers.utils import logging
from vision_digits import BATCH, RATES, digits, pretrain, scores, split, tuned

from deltakit.training.curvature import norms_by_density
from deltakit.training.density_report import plot_density

TRIED = {  # density -> rates
    1e-4: RATES["random 0.01%"],
    1e-3: RATES["random 0.1%"],
    1e-2: RATES["random 1%"],
    1e-1: (3e-3, 1e-2, 3e-2),
    1.0: (3e-4, 1e-3, 3e-3),
}
HEAD_RATE = 1e-1


def moved(model: Any, base: Path) -> float:
    """The l2 norm of the change of the encoder's weights."""
    before = ViTModel.from_pretrained(base, add_pooling_layer=False).state_dict()
    after = model.vit.state_dict()
    return math.sqrt(sum(float((after[n] - w).square().sum()) for n, w in before.items()))


def main() -> None:
    """Print one line per density."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        pretrain(base)
        training, validation, _ = split(digits(5, 9))
        start, _ = tuned(base, "head only", HEAD_RATE, HEAD_RATE, 0, training)
        names = [name for name, _ in start.named_parameters() if name.startswith("vit.")]
        total = sum(start.get_parameter(name).numel() for name in names)
        images, labels = training[0][: 4 * BATCH], training[1][: 4 * BATCH]
        start.eval()
        found = norms_by_density(
            start, lambda: cross_entropy(start(pixel_values=images).logits, labels), TRIED,
            names=names, iterations=100,
        )  # fmt: skip
        norms = [{"density": density, "norm": norm} for density, norm in found]
        distances = []
        print("| density | Hessian norm | best rate | distance | validation |")
        print("| --- | --- | --- | --- | --- |")
        for (density, rates), (_, norm) in zip(TRIED.items(), found, strict=True):
            method = f"random {round(density * total)}"
            tried = {r: tuned(base, method, r, HEAD_RATE, 0, training)[0] for r in rates}
            told = {r: scores(model, validation) for r, model in tried.items()}
            rate = max(told, key=lambda r: (told[r][0], -told[r][1]))
            distance = moved(tried[rate], base)
            distances.append({"density": density, "distance": distance})
            cells = (f"{norm:.3g}", f"{rate:g}", f"{distance:.2f}", f"{told[rate][0]:.1%}")
            print(f"| {density:.2%} | {' | '.join(cells)} |", flush=True)
        if args.plot:
            plot_density(norms, distances, args.plot)


if __name__ == "__main__":
    main()
