"""`DeltaBank`: many tasks for one live model, each one switch away."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from deltakit.adapters.refusal import refuse_adapters
from deltakit.delta import SparseDelta
from deltakit.errors import ConfigError, nearest
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.sdelta import SdeltaFile
from deltakit.live.apply import switch
from deltakit.live.bank_tasks import Loaded, ParameterEntries, load_task, parameter_entries
from deltakit.live.locator import Locator
from deltakit.live.state import state_of
from deltakit.live.words import write_all
from deltakit.merging.inputs import Given, Input, read_inputs

if TYPE_CHECKING:
    from deltakit.mixed.batch import MixedBatch


class DeltaBank:
    """Switches a live model between tasks in O(entries), to the bits that merging would give.

    deltas: task -> `.sdelta` file or delta. Files are opened and their names checked at once, and
    their entries read when a task is first wanted; tasks that are ready stay on the model's device
    up to device_budget bytes (no limit by default), the least recently used leaving first. A task
    costs an index of 8 bytes and two weights per entry there.

    The base's weights must not be changed by others while the bank is in use: the bits that it
    restores are those it saw when a task became ready. Deltas applied by `dk.apply` may stand
    beside the active task; switching is slower then. Methods are safe from any thread, and wait for
    forward passes where the model has a `dk.guard`. Raises what `dk.apply` raises, and DeltaError for
    deltas of adapters.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        deltas: Mapping[str, Given],
        *,
        device_budget: int | None = None,
        base: str | os.PathLike[str] | Checkpoint | None = None,
        allow_base_mismatch: bool = False,
    ) -> None:
        self.model = model
        self.device_budget = device_budget
        self._locator = Locator(model, base, allow_base_mismatch)
        self._given: dict[str, Given] = {}
        self._ready: OrderedDict[str, Loaded] = OrderedDict()
        self._active: str | None = None
        self._mixed: MixedBatch | None = None
        for name, delta in deltas.items():
            self.add(name, delta)

    @property
    def active(self) -> str | None:
        """The task whose weights the model has, or None for the base."""
        return self._active

    def names(self) -> list[str]:
        """All tasks, in the order in which they were added."""
        return list(self._given)

    def add(self, task: str, delta: Given) -> None:
        """Add a task. Raises ConfigError when there is one of this name."""
        if task in self._given:
            raise ConfigError(f"the bank has a task {task!r} already; remove it first")
        if not isinstance(delta, SparseDelta):
            delta = Path(delta).absolute()
            with SdeltaFile(delta) as file:
                names, adapter = [*file.tensors, *file.extras], file.adapter
        else:
            names, adapter = [*delta.tensors, *delta.extras], delta.adapter
        refuse_adapters([adapter], "switching by DeltaBank", "dk.apply and its swap attach them")
        self._locator.check_names(names)
        self._given[task] = delta

    def remove(self, task: str) -> None:
        """Forget a task. Raises ConfigError when it is active or unknown."""
        self._check(task)
        with state_of(self.model).changing():
            if task == self._active:
                raise ConfigError(f"task {task!r} is active; deactivate it before removing it")
            self._ready.pop(task, None)
            del self._given[task]
            self._mixed = None

    def activate(self, task: str) -> None:
        """Give the model the weights of a task, instead of those of the active one."""
        self._check(task)
        with state_of(self.model).changing():
            if task != self._active:
                self._switch(self._load(task))
                self._active = task

    def deactivate(self) -> None:
        """Give the model the base's weights back, bit for bit."""
        with state_of(self.model).changing():
            if self._active is not None:
                self._switch(None)
                self._active = None

    @contextmanager
    def using(self, task: str) -> Iterator[None]:
        """Activate a task and keep it active for the block, which reads the model's guard.

        Threads that want the same task run at once; those that want another wait for their turn.
        """
        self._check(task)
        guard = state_of(self.model).guard
        while True:
            with guard.reading():
                if self._active == task:
                    yield
                    return
            self.activate(task)

    def prepare(self, task: str) -> None:
        """Read a task and have it ready on the device, so that activating it only writes."""
        self._check(task)
        with state_of(self.model).changing():
            self._load(task)

    def entries(self, task: str) -> list[ParameterEntries]:
        """What a task changes, parameter by parameter, whatever is active."""
        self._check(task)
        with state_of(self.model).changing():
            return parameter_entries(self.model, self._load(task))

    def batched(self, tasks: Sequence[str | None]) -> AbstractContextManager[None]:
        """A block in which row i of every batch belongs to tasks[i]; see `deltakit.mixed.batch`.

        Raises ConfigError while a task is active.
        """
        from deltakit.mixed.batch import mixed_batch

        with state_of(self.model).changing():
            if self._active is not None:
                raise ConfigError(f"task {self._active!r} is active; deactivate it before batches")
            wanted = dict.fromkeys(task for task in tasks if task is not None)
            for task in wanted:
                self._check(task)
            if self._mixed is None or not wanted.keys() <= set(self._mixed.tasks):
                self._mixed = mixed_batch(
                    self.model,
                    {task: self._read(task).delta for task in wanted},
                    base=self._locator.checkpoint,
                    allow_base_mismatch=self._locator.allow_base_mismatch,
                )
            return self._mixed.rows(tasks)

    def _check(self, task: str) -> None:
        if task not in self._given:
            raise ConfigError(f"the bank has no task {task!r}{nearest(task, self.names())}")

    def _read(self, task: str) -> Input:
        (given,) = read_inputs(self._given[task])
        return given

    def _load(self, task: str) -> Loaded:
        if task not in self._ready:
            applied = self._locator.locate(self._read(task))
            self._ready[task] = load_task(self.model, applied)
        self._ready.move_to_end(task)
        self._make_room(task)
        return self._ready[task]

    def _make_room(self, task: str) -> None:
        """Let tasks go until what is ready fits the budget; the active and the wanted one stay."""
        if self.device_budget is None:
            return
        held = sum(each.nbytes for each in self._ready.values())
        for name in list(self._ready):
            if held > self.device_budget and name not in (task, self._active):
                held -= self._ready.pop(name).nbytes

    def _switch(self, new: Loaded | None) -> None:
        """Restore the active task's entries and write the new one's.

        Where other deltas are applied too, what they make of it is worked out by the ledger.
        """
        state = state_of(self.model)
        old = None if self._active is None else self._ready[self._active]
        mine = [] if old is None else [old.applied]
        if len(state.ledger.applied) > len(mine):
            switch(self.model, mine, [] if new is None else [new.applied])
            return
        with state.guard.writing():
            if old is not None:
                write_all(old.base)
            if new is not None:
                write_all([change.write for change in new.changes])
            state.ledger.saved = {} if new is None else new.saved
            state.ledger.applied = [] if new is None else [new.applied]
