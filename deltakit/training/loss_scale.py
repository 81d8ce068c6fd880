"""Whether a model's loss takes note of how many labels a step has, over passes and processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


@torch.no_grad()
def divides_by_count(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether the loss is a sum divided by `num_items_in_batch`, rather than a mean.

    Many models of transformers accept the count and return the mean all the same; its Trainer
    then takes that for normalised and makes the gradient as many times too large as a step has
    passes or processes. So it is tried: without dropout, with two counts.
    """
    training = model.training
    model.eval()
    labels = max(1, inputs["labels"].numel())
    losses = [model(**inputs, num_items_in_batch=labels * times)["loss"] for times in (1, 2)]
    model.train(training)
    return not torch.equal(*losses)
