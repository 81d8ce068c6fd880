"""The tasks of a `DeltaBank` that are ready to be written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from deltakit.dtypes import dtype
from deltakit.live.arrays import dtype_name, to_torch
from deltakit.live.coordinates import plain_tensors
from deltakit.live.ledger import Applied, Bits, Change
from deltakit.live.state import state_of
from deltakit.live.words import Words, word_tensor


@dataclass(frozen=True, eq=False)
class Loaded:
    """A task that is ready to be written: its new words, and the base's under them."""

    applied: Applied
    changes: Sequence[Change]
    base: Sequence[Words]

    @property
    def nbytes(self) -> int:
        """Bytes on the device: indices once, two words per entry."""
        old = sum(words.words.nbytes for words in self.base)
        return old + sum(change.write.nbytes for change in self.changes)

    @property
    def saved(self) -> dict[str, Bits]:
        """The base's bits by live name."""
        return {change.name: change.saved for change in self.changes}


@dataclass(frozen=True, slots=True, eq=False)
class ParameterEntries:
    """A task's change of one live parameter.

    module: the module that holds the parameter, under the name `parameter`. indices: int64 [n],
    sorted flat indices. values: float32 [n] (float64 for float64 models), new weight minus base.
    Both on the parameter's device.
    """

    module: torch.nn.Module
    parameter: str
    indices: torch.Tensor
    values: torch.Tensor


def load_task(model: torch.nn.Module, applied: Applied) -> Loaded:
    """Work out the words of a task that is located in a model, whatever is applied to it now."""
    changes = state_of(model).ledger.alone(plain_tensors(model), applied)
    base = [
        replace(c.write, words=word_tensor(c.saved.words, c.write.words.device)) for c in changes
    ]
    return Loaded(applied, changes, base)


def parameter_entries(model: torch.nn.Module, loaded: Loaded) -> list[ParameterEntries]:
    """What a task changes, parameter by parameter."""
    found = []
    for change in loaded.changes:
        path, _, leaf = change.name.rpartition(".")
        kind = dtype(dtype_name(change.write.tensor))
        new = change.write.words.view(change.write.dtype)
        old = to_torch(change.saved.words.view(kind.numpy)).to(new.device)
        wide = torch.float64 if new.dtype == torch.float64 else torch.float32
        values = new.to(wide) - old.to(wide)
        module = model.get_submodule(path)
        found.append(ParameterEntries(module, leaf, change.write.indices, values))
    return found
