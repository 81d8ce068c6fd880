"""The base's identity, taken from a live model before training changes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deltakit.delta import BaseIdentity, SparseDelta, TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import BaseMismatchError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import fingerprint, sample_positions
from deltakit.live.coordinates import Coordinates, live_tensors
from deltakit.live.translation import stored_values
from deltakit.quantized.stand_in import StandIn, whole_parameters
from deltakit.training.target import Target


class LiveIdentity:
    """Sampled base values of every target, and where the base came from.

    model_id and revision default to what `from_pretrained` recorded in the model's config; of a
    local folder only the name is kept. Of quantised targets the base is the full-precision
    checkpoint; without one they have no identity.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        targets: Sequence[Target],
        where: Coordinates,
        checkpoint: Checkpoint | None,
        model_id: str | None,
        revision: str | None,
    ) -> None:
        config: Any = getattr(model, "config", None)
        self.model_id = _model_id(model_id or getattr(model, "name_or_path", None))
        self.revision = revision or getattr(config, "_commit_hash", None)
        live_weights = sum(p.numel() for p in whole_parameters(model).values())
        self.total_weights = checkpoint.total_weights if checkpoint else live_weights
        self._model, self._where, self._checkpoint = model, where, checkpoint
        codes = [t for t in targets if isinstance(t.parameter, StandIn)]
        self._codes = dict(shape for target in codes for shape in _stored_shapes(target, where))
        self._shapes = dict(shape for target in targets for shape in _stored_shapes(target, where))
        self.take_samples()

    def take_samples(self) -> None:
        """Sample the live weights, as they are now, for what the deltas start from."""
        live = live_tensors(self._model)
        self._samples = {
            name: stored_values(name, sample_positions(name, shape), self._where, live)
            for name, shape in self._shapes.items()
            if name not in self._codes
        }
        if self._checkpoint is not None:
            for name, shape in self._codes.items():
                self._samples[name] = _on_disk(
                    self._checkpoint, name, sample_positions(name, shape)
                )

    def of(
        self, base_values: Mapping[str, Array], tensors: Mapping[str, TensorDelta]
    ) -> BaseIdentity:
        """The identity of a delta's tensors.

        base_values: the base's values at their own indices, of all but quantised ones.
        """
        values = dict(base_values)
        if self._checkpoint is not None:
            for name in self._codes.keys() & tensors.keys():
                values[name] = _on_disk(self._checkpoint, name, tensors[name].indices)
        prints = {n: fingerprint(self._samples[n], values[n]) for n in tensors if n in values}
        return BaseIdentity(
            model_id=self.model_id,
            revision=self.revision,
            total_weights=self.total_weights,
            tensors=prints,
        )

    def check(self, delta: SparseDelta) -> None:
        """Raise BaseMismatchError when a delta was made for another base than this model."""
        recorded = delta.base.tensors if delta.base else {}
        for name, known in recorded.items():
            if name in self._samples:
                found = fingerprint(self._samples[name], None).sample
                if found != known.sample:
                    raise BaseMismatchError(
                        f"tensor {name!r}: the delta belongs to another base (digest of sampled "
                        f"values {known.sample}, this model has {found})"
                    )


def _on_disk(checkpoint: Checkpoint, name: str, positions: Array) -> Array:
    return checkpoint.gather(name, positions).view(checkpoint.info(name).kind.numpy)


def _model_id(name: str | None) -> str | None:
    return Path(name).resolve().name if name and Path(name).exists() else name or None


def _stored_shapes(target: Target, where: Coordinates) -> list[tuple[str, tuple[int, ...]]]:
    """The checkpoint's tensors that hold a target, with their shapes."""
    if target.name in where.regions:
        return [(region.stored, region.stored_shape) for region in where.regions[target.name]]
    return [(target.name, target.shape)]
