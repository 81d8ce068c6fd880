"""Notices when a model uses a weight other than by calling the layer that holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from deltakit.errors import ConfigError


class Watch(TorchFunctionMode):
    """Refuses functions that make tensors of a changed one while no layer of ours runs.

    Their results would be the base's for all rows: hooks see the calls of layers alone, and a model
    may take its layer's weight and multiply by it, as some tied output layers do. tensors: name ->
    tensor that some row changes. Looks at every call of a torch function, about 1 microsecond each.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._running = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, and see what it was given."""
        named = kwargs or {}
        result = func(*args, **named)
        if self._running or not isinstance(result, torch.Tensor):
            return result
        for value in (*args, *named.values()):
            if id(value) in self._names:
                raise ConfigError(
                    f"tensor {self._names[id(value)]!r} is used outside the layer that holds it "
                    f"({getattr(func, '__name__', func)}), where rows of one batch cannot have "
                    "their own; run the tasks one by one (dk.applied)"
                )
        return result

    def enter(self, *_: Any) -> None:
        """Forward pre-hook of a layer of ours."""
        self._running += 1

    def leave(self) -> None:
        """The layer has run."""
        self._running -= 1

    def restart(self) -> None:
        """No layer runs: the model is called anew, after an error perhaps."""
        self._running = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block a layer of ours runs."""
        self.enter()
        try:
            yield
        finally:
            self.leave()
