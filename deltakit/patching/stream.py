"""Weight patches of a model in training: what each step changed, in a chain that can be checked.

    stream = PatchStream(model, start=0)        # remembers all bits of the state
    ...                                         # a training step
    save(stream.step(model), "patch-1.sdelta")  # step 0 -> 1

    apply(server_model, load("patch-1.sdelta")) # refuses a missing, repeated or foreign patch

In bfloat16 a small update rarely changes the bits of a weight, so a step of reinforcement learning
changes about 1 % of them (PULSE, arXiv 2602.03839, 2026). Patches hold the new bits themselves, so
whoever follows them has the trained weights exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from deltakit.delta import BaseIdentity, SparseDelta
from deltakit.errors import ConfigError, CoordinateError
from deltakit.patching.chain import Link, Position
from deltakit.patching.digests import hexadecimal
from deltakit.patching.states import (
    Difference,
    FlatTensor,
    State,
    differences,
    differing,
    flat_tensors,
    ties,
    total_digest,
)


def diff_states(
    before: State,
    after: State,
    *,
    step: int | None = None,
    keep_base: bool = True,
    names: Mapping[str, str] | None = None,
) -> SparseDelta:
    """The `set` delta that turns one state of a model into another, bit for bit.

    before, after: state dicts, modules or checkpoints that hold the same tensors, wherever their
    memory is. Any bit counts, NaN payloads and signed zeros too. Names are those of the checkpoint
    for a module, and `names` (name in a state dict -> name in the checkpoint) for state dicts.
    step: makes it the patch step -> step + 1, which `apply` checks; that reads all weights once
    more for their digest, which a `PatchStream` does only at its start.
    keep_base: whether the bits before stay beside, which weights, stacking and truncation need.

    Raises CoordinateError for other tensors or shapes, DeltaError for other dtypes, ConfigError for
    a negative step.
    """
    _require_step(step or 0)
    old, new = (flat_tensors(side, names) for side in _alike_tied(before, after))
    found = differences(old, new, keep_base=keep_base)
    if step is None:
        return _delta(found, old, {})
    total = total_digest(old)
    return _patch(found, old, Link(Position(step, total), _moved(step + 1, total, found)))


class PatchStream:
    """Makes the patches of a model in training, one step after the other.

    state: the model or its state dict before the first step (or a checkpoint of it). start: the
    step that it is at; a trainer that was restarted goes on with the chain by giving the step it
    was restarted from. names, keep_base: as for `diff_states`. on_host: keep the copy of the last state in
    host memory, where device weights are brought for comparison; False keeps it on their device.

    The copy takes as much memory as the state. `position` is the step and digest reached.
    """

    def __init__(
        self,
        state: State,
        *,
        start: int = 0,
        names: Mapping[str, str] | None = None,
        keep_base: bool = False,
        on_host: bool = True,
    ) -> None:
        _require_step(start)
        self._names, self._keep_base = names, keep_base
        tensors = flat_tensors(state, names).items()
        self._last = {name: tensor.copied(on_host) for name, tensor in tensors}
        self.position = Position(start, total_digest(self._last))

    def step(self, state: State) -> SparseDelta:
        """The patch from the last state to this one, which becomes the last.

        Costs one comparison of all weights; the rest is in proportion to what has changed. On an
        error the stream stays at the last state. Raises as `diff_states`.
        """
        new = flat_tensors(state, self._names)
        found = differences(self._last, new, keep_base=self._keep_base)
        after = _moved(self.position.step + 1, self.position.digest, found)
        patch = _patch(found, self._last, Link(self.position, after))
        for tensor in patch.tensors.values():
            self._last[tensor.name].put(tensor.indices, tensor.values)
        self.position = after
        return patch


def _alike_tied(before: State, after: State) -> tuple[State, State]:
    """State dicts without the names that are tied in either: a copy of a state dict has lost ties.

    Raises CoordinateError where the other one holds something else under such a name.
    """
    tied = ties(before) | ties(after)
    sides = []
    for state in (before, after):
        if isinstance(state, Mapping):
            for name, first in tied.items():
                _require_tied(state, name, first)
            state = {name: tensor for name, tensor in state.items() if name not in tied}
        sides.append(state)
    return sides[0], sides[1]


def _require_tied(state: Mapping[str, torch.Tensor], name: str, first: str) -> None:
    if name not in state or first not in state or state[name] is state[first]:
        return
    one, other = (flat_tensors({"": state[each]})[""] for each in (name, first))
    if one.shape != other.shape or one.kind != other.kind or len(differing(one, other)[0]):
        raise CoordinateError(
            f"tensors {name!r} and {first!r} share their memory in one state and differ in the other"
        )


def _require_step(step: int) -> None:
    if step < 0:
        raise ConfigError(f"step {step} cannot be: steps count from 0")


def _moved(step: int, digest: str, found: Sequence[Difference]) -> Position:
    return Position(step, hexadecimal(int(digest, 16) + sum(each.gained for each in found)))


def _patch(
    found: Sequence[Difference], before: Mapping[str, FlatTensor], link: Link
) -> SparseDelta:
    return _delta(found, before, {"chain": link.as_json()})


def _delta(
    found: Sequence[Difference],
    before: Mapping[str, FlatTensor],
    provenance: Mapping[str, object],
) -> SparseDelta:
    identity = BaseIdentity(
        total_weights=sum(len(tensor.words) for tensor in before.values()),
        tensors={each.tensor.name: each.before for each in found},
    )
    return SparseDelta(
        tensors={each.tensor.name: each.tensor for each in found},
        base=identity,
        provenance={"operation": "diff", "mode": "set", **provenance},
    )
