"""Training an adapter's tensors instead of the base's: what differs for a `SparseTuner`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from deltakit.adapter import Adapter
from deltakit.adapters.initial import check_value
from deltakit.adapters.kinds import KINDS
from deltakit.delta import BaseIdentity, Fingerprint, SparseDelta, TensorDelta
from deltakit.dtypes import Array
from deltakit.errors import ConfigError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.live.arrays import dtype_name, to_numpy
from deltakit.selection.grasp import Grasp
from deltakit.selection.methods import Method, Start
from deltakit.selection.snip import Snip
from deltakit.training.target import Target

if TYPE_CHECKING:
    from deltakit.adapters.attach import Attached

Masked = Literal["initial", "zero"]


@dataclass(eq=False)
class AdapterTraining:
    """An attached adapter in training: its description and the identity of its base.

    adapter: what the delta records; other than `attached.adapter` once it is pruned. prints: of the
    base's tensors at which it stands.
    """

    attached: Attached
    adapter: Adapter
    prints: Mapping[str, Fingerprint]

    @classmethod
    def of(cls, attached: Attached, checkpoint: Checkpoint | None) -> AdapterTraining:
        """An adapter, put back to its initial values, at the base that it was attached to."""
        attached.reset()
        base = None if checkpoint is None else attached.identity(checkpoint)
        return cls(attached, attached.adapter, {} if base is None else base.tensors)

    @property
    def live_names(self) -> set[str]:
        """The live names of its parameters."""
        mine = {id(parameter) for parameter in self.attached.parameters.values()}
        model = self.attached.model
        return {name for name, parameter in model.named_parameters() if id(parameter) in mine}

    def check_method(self, method: Method) -> None:
        """Raise ConfigError for a method that misjudges this adapter before training.

        A product of factors of which one starts from zeros has no entry with both a weight and a
        gradient, so scores that multiply the two do not say what it can learn.
        """
        heuristic = getattr(method, "heuristic", None)
        score = getattr(heuristic, "heuristic", heuristic)  # of a calibrated one
        if self._zero_factors and isinstance(score, (Snip, Grasp)):
            raise ConfigError(
                f"{type(score).__name__.lower()} scores weight times gradient, and no entry of a "
                f"new adapter {self.adapter.kind} has both; choose by another heuristic or method "
                "(id3, random), or take a bottleneck adapter"
            )

    def check_support(self, start: Start, targets: Sequence[Target]) -> None:
        """Raise ConfigError for a fixed support under which the adapter would stay zero."""
        factors = self._zero_factors
        names = [targets[each.number].name for each in start.support if len(each.indices)]
        moving = any(self.adapter.split(name)[1] in factors for name in names)
        if factors and names and not moving and start.selector is None:
            raise ConfigError(
                f"no entry of {', '.join(factors)} is chosen, which start from zero, so adapter "
                f"{self.adapter.kind} would change nothing; share the budget among tensors "
                "(allocation proportional)"
            )

    @property
    def _zero_factors(self) -> list[str]:
        """The parameters by which all others are multiplied and that start from zeros."""
        rules = self.adapter.initial
        if not KINDS[self.adapter.kind].folds or any("computed" in r for r in rules.values()):
            return []
        zeros = [parameter for parameter, rule in rules.items() if rule.get("constant") == 0]
        return zeros if len(zeros) < len(rules) else []

    def check_earlier(self, delta: SparseDelta) -> None:
        """Raise ConfigError unless a delta to continue from is one of this very adapter."""
        if delta.adapter != self.adapter:
            theirs = "no adapter" if delta.adapter is None else f"adapter {delta.adapter.kind!r}"
            raise ConfigError(
                f"the delta to continue from has {theirs} of other configuration or seed than this "
                "run's; attach it with the settings and the seed that it records"
            )

    def prune(self, start: Start, targets: Sequence[Target]) -> Start:
        """Zero the adapter but for a support, whose entries start from their initial values.

        SparseAdapter (He et al. 2022): entries that the mask leaves out are zero and stay so.
        Raises ConfigError for a support that is not known before training.
        """
        if start.selector is not None or start.frozen:
            raise ConfigError(
                "masked zero needs a support that is chosen before training: methods random, "
                "super-tuning, pafi, static with a heuristic that measures, or snip and grasp with "
                "num_batches; this method chooses while it trains"
            )
        support = []
        for chosen in start.support:
            flat = targets[chosen.number].flat
            at = torch.from_numpy(chosen.indices).to(flat.device)
            values = flat[at].cpu()
            support.append(replace(chosen, values=_sum(values, chosen.values)))
        with torch.no_grad():
            for parameter in self.attached.parameters.values():
                parameter.zero_()
        zeros = {name: to_numpy(p) for name, p in self.attached.parameters.items()}
        old = self.attached.adapter
        self.adapter = replace(
            old,
            initial={parameter: {"constant": 0} for parameter in old.initial},
            check=check_value(old.kind, old.config, zeros),
        )
        return replace(start, support=support)

    def whole(self, tensors: Mapping[str, TensorDelta]) -> dict[str, TensorDelta]:
        """All tensors of the adapter, those without entries too."""
        nothing = np.zeros(0, np.int64)
        empty = {
            name: TensorDelta(
                name=name,
                shape=tuple(parameter.shape),
                dtype=dtype_name(parameter),
                mode="add",
                indices=nothing,
                values=np.zeros(0, np.float32),
            )
            for name, parameter in self.attached.parameters.items()
            if name not in tensors
        }
        return {**tensors, **empty}

    def base(self, identity: BaseIdentity) -> BaseIdentity:
        """An identity with the fingerprints of the base's own tensors."""
        return replace(identity, tensors={**identity.tensors, **self.prints})

    @property
    def extras(self) -> dict[str, Array]:
        """Initial values that no seed gives, by name among the extras."""
        return dict(self.attached.stored) if self.adapter is self.attached.adapter else {}


def _sum(initial: torch.Tensor, values: Any) -> torch.Tensor:
    """What an entry starts from: its initial value, and the method's own start beside it."""
    return initial if values is None else initial + values.to(initial)


def adapter_training(
    attached: Attached | None,
    checkpoint: Checkpoint | None,
    masked: Masked,
    earlier: SparseDelta | None,
) -> AdapterTraining | None:
    """The training of an attached adapter, from its initial values or on from an earlier delta.

    Raises ConfigError for what does not go together.
    """
    if attached is None:
        if masked != "initial":
            raise ConfigError(
                "masked zero is for adapters; the base's other weights stay as they are"
            )
        return None
    training = AdapterTraining.of(attached, checkpoint)
    if earlier is not None:
        if masked != "initial":
            raise ConfigError("masked zero starts anew and cannot go on from a delta")
        training.check_earlier(earlier)
    return training
