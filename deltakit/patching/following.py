"""A live model that follows a chain of patches: where it stands, and which patch may come next.

Unlike other deltas, which are applied to a base and taken back, a patch moves the base itself on.
The position of a model is known once a patch has been applied: the first one is accepted where the
digest of all the model's weights is the one that the patch starts from. For every further patch the
bits at its own entries show, before anything is written, that the digest after it is the one that
the trainer had. What else has changed in the model meanwhile shows at sampled positions of the
patch's tensors, and for certain only where all weights are read again, by
`chain_position(model, verify=True)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch

from deltakit.delta import SparseDelta
from deltakit.dtypes import dtype
from deltakit.errors import BaseMismatchError, ConfigError
from deltakit.identity import without_support
from deltakit.live.apply import Handle
from deltakit.live.arrays import dtype_name
from deltakit.live.base_check import check_live_base
from deltakit.live.coordinates import Coordinates, plain_tensors
from deltakit.live.ledger import Applied
from deltakit.live.locator import Locator
from deltakit.live.offload import check_resident
from deltakit.live.state import state_of
from deltakit.live.translation import stored_values, to_model
from deltakit.live.words import Words, make_words, read_words, write_all
from deltakit.merging.inputs import Input
from deltakit.patching.chain import Link, Position, compose, link_of
from deltakit.patching.digests import TensorKeys, hexadecimal
from deltakit.patching.states import flat_model, state_digest, total_digest

_POSITIONS: WeakKeyDictionary[torch.nn.Module, Position] = WeakKeyDictionary()
_Live = Mapping[str, torch.Tensor]


def chain_position(model: torch.nn.Module, *, verify: bool = False) -> Position | None:
    """The step and digest that patches have brought `model` to; None before the first one.

    verify: read all weights, in seconds for a billion of them, and raise BaseMismatchError where
    their digest is not that of the position, because something else has changed them.
    """
    position = _POSITIONS.get(model)
    if position is None or not verify:
        return position
    found = state_digest(model)
    if found != position.digest:
        raise BaseMismatchError(
            f"the model should be at {position}, but its weights have digest {found}: something "
            "else has changed them; load the weights of that step again"
        )
    return position


@dataclass(eq=False)
class PatchHandle(Handle):
    """A patch that moved a model on; `revert` moves it back, the last patch first.

    It keeps the bits that the patch overwrote, O(entries); dropping it frees them. A patch has
    weight 1 and no place in which others could stand.
    """

    _saved: Sequence[Words] = ()
    _link: Link | None = None

    def _become(self, mine: list[Applied]) -> None:
        model = self._locator.model
        if mine:
            raise ConfigError("a weight patch keeps weight 1 and its place; revert it instead")
        if not self._applied:
            return
        with self._state.mutex:
            _require_bare(model)
            before, after = (self._link.before, self._link.after) if self._link else (None, None)
            if _POSITIONS.get(model) != after:
                raise BaseMismatchError(
                    f"the model is at {_POSITIONS.get(model) or 'no known step'}, so the patch to "
                    f"{after or 'it'} cannot be taken back; revert later patches first"
                )
            _write(model, self._saved, before)
            self._applied, self._saved = [], ()


def follow(locator: Locator, inputs: Sequence[Input]) -> PatchHandle:
    """Apply a patch, or consecutive ones as one, to the model of `locator`.

    Raises BaseMismatchError for a patch from another step or state, ConfigError for weights and
    other deltas beside it or applied to the model, CoordinateError as `apply`. With
    allow_base_mismatch it is written whatever the model is, whose position is forgotten then.
    """
    model, patch = locator.model, _joined(inputs)
    with state_of(model).mutex:
        _require_bare(model)
        live, where = plain_tensors(model), locator.where
        moved = to_model(patch.tensors, where, live)
        found = Applied(patch, 1.0, {where.live[name]: parts for name, parts in moved.items()}, {})
        _require_fit(found, live)
        link = None if locator.allow_base_mismatch else _accepted(locator, patch, live)
        entries = [(name, part) for name, parts in found.tensors.items() for part in parts]
        saved = [
            make_words(n, live[n], p.indices, read_words(n, live[n], p.indices)) for n, p in entries
        ]
        words = [make_words(n, live[n], p.indices, p.values) for n, p in entries]
        _write(model, words, None if link is None else link.after)
    return PatchHandle(locator, [found], saved, link)


def _joined(inputs: Sequence[Input]) -> SparseDelta:
    deltas = [each.delta for each in inputs]
    if any(each.weight != 1 for each in inputs) or not all(link_of(each) for each in deltas):
        raise ConfigError(
            "a weight patch applies with weight 1 and not together with other deltas; apply it first"
        )
    return compose(deltas)


def _require_bare(model: torch.nn.Module) -> None:
    if state_of(model).ledger.applied:
        raise ConfigError(
            "other deltas are applied to the model, and a weight patch moves the weights below "
            "them; revert them first and apply them afterwards"
        )


def _require_fit(patch: Applied, live: _Live) -> None:
    for name, parts in patch.tensors.items():
        check_resident(name, live[name])
        found = dtype_name(live[name])
        if any(part.dtype != found for part in parts):
            raise BaseMismatchError(
                f"tensor {name!r} is {found} in the model and {parts[0].dtype} in the patch; a "
                "chain of patches is followed in the trainer's dtype"
            )


def _write(model: torch.nn.Module, words: Sequence[Words], position: Position | None) -> None:
    with state_of(model).guard.writing():
        _POSITIONS.pop(model, None)  # while it is in between, it has none
        write_all(words)
        if position is not None:
            _POSITIONS[model] = position


def _accepted(locator: Locator, patch: SparseDelta, live: _Live) -> Link:
    """The patch's link, when the model may take it.

    Reads the bits at the patch's entries and at sampled positions, and all weights where the
    position of the model is not known.
    """
    model, where, link = locator.model, locator.where, link_of(patch)
    assert link is not None
    at = _POSITIONS.get(model) or _joining(model, patch, link, where)
    if at.step != link.before.step:
        raise BaseMismatchError(
            f"the model is at step {at.step}: expected a patch from step {at.step}, found one from "
            f"step {link.before.step} to {link.after.step}{_reason(at, link)}"
        )
    if at.digest != link.before.digest:
        raise BaseMismatchError(
            f"the patch starts from {link.before}, the model is at {at}: they belong to different "
            "runs"
        )
    found = hexadecimal(int(at.digest, 16) + _gained(patch, where, live))
    if found != link.after.digest:
        raise BaseMismatchError(
            f"the patch leads to {link.after}, but applied to this model it would give digest "
            f"{found}: the model's weights or the patch have been changed since step {at.step}"
        )
    sampled = replace(patch, base=without_support(patch.base))
    check_live_base(sampled, lambda name, i: stored_values(name, i, where, live), None)
    return link


def _joining(
    model: torch.nn.Module, patch: SparseDelta, link: Link, where: Coordinates
) -> Position:
    """The position of a model that has had no patch yet, by all its weights."""
    tensors = flat_model(where, model)
    found = total_digest(tensors)
    if found == link.before.digest:
        return link.before
    weights = sum(len(tensor.words) for tensor in tensors.values())
    expected = weights if patch.base is None else patch.base.total_weights
    reason = "load the weights of that step first"
    if found == link.after.digest:
        reason = "it is applied already"
    elif weights != expected:
        reason = f"the model has {weights} weights, the patched state {expected}"
    raise BaseMismatchError(
        f"the patch starts from {link.before}, but the model's weights have digest {found}; {reason}"
    )


def _reason(at: Position, link: Link) -> str:
    if link.after.step <= at.step:
        return ", which is applied already"
    missing = range(at.step, link.before.step)
    return f"; apply those from step {missing[0]} to {missing[-1] + 1} first" if missing else ""


def _gained(patch: SparseDelta, where: Coordinates, live: _Live) -> int:
    """What applying the patch adds to the digest of the model's own weights."""
    total = 0
    for name, tensor in patch.tensors.items():
        kind = dtype(tensor.dtype)
        old = stored_values(name, tensor.indices, where, live).view(kind.words)
        keys = TensorKeys(name, tensor.shape, kind)
        total += keys.change(tensor.indices, old, tensor.values)
    return total
