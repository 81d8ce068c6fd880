"""Proof that all processes start from the same: the model's weights, the support, the budget."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch

from deltakit.errors import TrainingError
from deltakit.parallel.ranks import Ranks
from deltakit.selection.methods import Chosen
from deltakit.training.entries import Entries
from deltakit.training.extra import Extra
from deltakit.training.target import Target

_SAMPLES = 1024  # weights per tensor that are compared


def check_agreement(ranks: Ranks, entries: Entries, extras: Sequence[Extra]) -> None:
    """Raise TrainingError on every rank where one starts from something else than rank 0."""
    support = [target.indices for target in entries.targets]
    _compare(
        ranks,
        {"targets": _targets(entries), "support": _support(support), "extras": _extras(extras)},
    )


def check_split_agreement(
    ranks: Ranks, budget: int, targets: Sequence[Target], support: Sequence[Chosen]
) -> None:
    """The same where each rank holds a part of the model only: of targets and what was chosen."""
    told = hashlib.sha256(f"{budget}".encode())
    for target in targets:
        told.update(_shape(target))
    chosen = [torch.from_numpy(each.indices) for each in support]
    _compare(ranks, {"targets": told.hexdigest()[:16], "support": _support(chosen)})


def _compare(ranks: Ranks, own: dict[str, str]) -> None:
    first, *others = (json.loads(told) for told in ranks.gathered_texts(json.dumps(own)))
    for rank, other in enumerate(others, 1):
        for what, digest in other.items():
            if digest != first[what]:
                raise TrainingError(
                    f"rank {rank} starts from other {what} than rank 0 (digest {digest}, "
                    f"expected {first[what]}); give all processes the same model, settings and seed"
                )


def _targets(entries: Entries) -> str:
    told = hashlib.sha256(f"{entries.budget}".encode())
    for target in entries.targets:
        told.update(_shape(target))
        stride = max(1, target.numel // _SAMPLES)
        places = torch.arange(0, target.numel, stride, device=target.parameter.device)
        told.update(_bits(target.read(places)))
    return told.hexdigest()[:16]


def _shape(target: Target) -> bytes:
    return f"{target.name} {target.shape} {target.parameter.dtype}".encode()


def _support(indices: Sequence[torch.Tensor]) -> str:
    told = hashlib.sha256()
    for each in indices:
        told.update(_bits(each))
    return told.hexdigest()[:16]


def _extras(extras: Sequence[Extra]) -> str:
    told = hashlib.sha256()
    for extra in extras:
        told.update(f"{extra.name} {tuple(extra.parameter.shape)}".encode())
        told.update(_bits(extra.parameter.detach()))
    return told.hexdigest()[:16]


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
