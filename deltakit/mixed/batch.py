"""Mixed batches: one forward pass in which every row has the delta of its own task."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from deltakit.delta import SparseDelta
from deltakit.errors import ConfigError, nearest
from deltakit.formats.checkpoint import Checkpoint
from deltakit.mixed.changes import Change, changes_of
from deltakit.mixed.layers import Hook, is_model, plan, quantised_shapes
from deltakit.mixed.positions import METHOD
from deltakit.mixed.rows import Rows
from deltakit.mixed.watch import Watch

_entered: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_lock = threading.Lock()


def mixed_batch(
    model: torch.nn.Module,
    deltas: Mapping[str, SparseDelta],
    *,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    allow_base_mismatch: bool = False,
) -> MixedBatch:
    """Prepare a model for batches whose rows belong to different tasks.

    deltas: task -> its delta, in the base's coordinates; base: as for `apply`. The model's linear
    layers may be quantised by bitsandbytes: the base layer works as it is, and entries are added
    beside it. Raises CoordinateError for tensors and shapes that the model lacks, BaseMismatchError
    for a delta of another base, ConfigError for what rows of one batch cannot have of their own.
    """
    changes = changes_of(
        model, deltas, quantised_shapes(model), base, allow_base_mismatch=allow_base_mismatch
    )
    return MixedBatch(model, list(deltas), changes)


class MixedBatch:
    """A model, and what its tasks change, ready for mixed batches (see `mixed_batch`).

    Prepared against the weights that the model has at that time, none of which is ever written.
    A row's outputs are those that it would have alone with its delta applied, within rounding:
    linear layers compute W x + S x instead of (W + S) x, S being the change of the weights as the
    model's dtype rounds them (of a quantised weight: the delta's own values) and sums float32 or
    wider; embeddings get the very bits. What decides by comparing (a router, greedy generation) may
    decide otherwise at near ties, all the more in bfloat16. Rows must be independent in the model
    itself: no BatchNorm in training, no routing with a capacity.

    model: the module it was prepared for. tasks: names, in the order given.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tasks: Sequence[str],
        changes: Mapping[str, Mapping[int, Change]],
    ) -> None:
        self.model = model
        self.tasks = tuple(tasks)
        self._layers = plan(model, changes, len(self.tasks))
        self._changing = {name: frozenset(by_task) for name, by_task in changes.items()}

    @contextmanager
    def rows(self, tasks: Sequence[str | None]) -> Iterator[None]:
        """Within the block, row i of every batch belongs to tasks[i]; None is the base.

        Batches have len(tasks) rows, or k times as many where `generate` repeats each row k times
        (num_beams, num_return_sequences); copies belong to their row's task. Inference only: the
        block is under `torch.no_grad`. Raises ConfigError for unknown tasks, for batches of
        another size, when a layer is given activations whose rows cannot be told apart, and
        when the model is in such a block already (other threads included).
        """
        rows = Rows([self._number(task) for task in tasks])
        if not rows.tasks:
            raise ConfigError("no rows: name a task, or None for the base, for each row")
        with _alone(self.model), ExitStack() as stack, torch.no_grad():
            self._install(rows, stack)
            yield

    def _install(self, rows: Rows, stack: ExitStack) -> None:
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        chosen = {n for n, changing in self._changing.items() if changing & set(rows.tasks)}
        watch = stack.enter_context(Watch({name: tensors[name] for name in chosen}))
        for module in self.model.modules():
            if is_model(module) or module is self.model:
                enter = _entry(rows, watch)
                handle = module.register_forward_pre_hook(enter, with_kwargs=True)
                stack.callback(handle.remove)
        for module, hook in self._layers.hooks:
            stack.callback(module.register_forward_pre_hook(watch.enter).remove)
            handle = module.register_forward_hook(_bound(hook, rows, watch), with_kwargs=True)
            stack.callback(handle.remove)
        for positions in self._layers.positions:
            vars(positions.attention)[METHOD] = positions.method(rows, watch)
            stack.callback(vars(positions.attention).pop, METHOD)

    def _number(self, task: str | None) -> int:
        if task is None:
            return 0
        if task not in self.tasks:
            raise ConfigError(f"no delta for task {task!r}{nearest(task, self.tasks)}")
        return self.tasks.index(task) + 1


@contextmanager
def _alone(model: torch.nn.Module) -> Iterator[None]:
    """Keep others from mixing batches on the model for the length of the block."""
    modules = list(model.modules())
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in modules):
        raise ConfigError("the model is compiled, so hooks do not run; use the uncompiled model")
    with _lock:
        if model in _entered:
            raise ConfigError(
                "the model is running a mixed batch already; leave that block first, or use "
                "another copy of the model"
            )
        _entered.add(model)
    try:
        yield
    finally:
        with _lock:
            _entered.discard(model)


def _entry(rows: Rows, watch: Watch) -> Callable[..., None]:
    def enter(module: torch.nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        rows.enter(module, args, named)
        watch.restart()

    return enter


def _bound(hook: Hook, rows: Rows, watch: Watch) -> Callable[..., Any]:
    def run(_: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        result = hook(rows, args, named, output)
        watch.leave()
        return result

    return run
