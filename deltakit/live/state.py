"""What deltakit knows of a live model: its guard, and what is applied to it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from deltakit.live.guard import Guard
from deltakit.live.ledger import Ledger


@dataclass(eq=False)
class State:
    """Of one model. `mutex` is held while what shall be applied is worked out and written."""

    guard: Guard = field(default_factory=Guard)
    ledger: Ledger = field(default_factory=Ledger)
    mutex: threading.RLock = field(default_factory=threading.RLock)
    hooked: bool = False

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the mutex; refused to a thread in a forward pass, for which a change may wait."""
        self.guard.check_may_write()
        with self.mutex:
            yield


_STATES: weakref.WeakKeyDictionary[torch.nn.Module, State] = weakref.WeakKeyDictionary()
_CREATING = threading.Lock()


def state_of(model: torch.nn.Module) -> State:
    """The state of a model, which lives as long as the model."""
    with _CREATING:
        return _STATES.setdefault(model, State())


def guard(model: torch.nn.Module) -> Guard:
    """The guard of a model, from now on with every call of the model as a reader.

    Changes of weights by `dk.apply`, its handles and `dk.DeltaBank` then wait for forward passes of
    other threads, and these for them: each pass sees one state of the weights throughout.
    """
    state = state_of(model)
    with state.mutex:
        if not state.hooked:
            model.register_forward_pre_hook(state.guard.before_forward, prepend=True)
            model.register_forward_hook(state.guard.after_forward, always_call=True)
            state.hooked = True
    return state.guard
