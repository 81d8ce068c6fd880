"""Forward passes and changes of weights that wait for each other.

Any number of forward passes run at once; a change waits until they are done, and those that come
later wait for it. `guard(model)` makes every call of the model such a pass:

    dk.guard(model)
    bank.activate("task")        # between passes, never inside one
    with dk.guard(model).reading():
        model.generate(...)      # many passes, all with the same weights

It costs two short critical sections per call of the model, some microseconds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deltakit.errors import ConfigError


class Guard:
    """A readers-writer lock of one model: readers are forward passes, the writer changes weights.

    A thread that reads may read again without waiting (`generate` calls the model many times); a
    waiting writer holds up new readers, so that it gets its turn. Calls of parts of a model are not
    seen by the hooks of `guard`: put them into a `reading` block.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers: dict[int, int] = {}  # thread -> how deep it reads
        self._writing = False
        self._waiting = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Weights stay as they are in here."""
        self.start_reading()
        try:
            yield
        finally:
            self.stop_reading()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Nobody reads in here."""
        self.start_writing()
        try:
            yield
        finally:
            self.stop_writing()

    def start_reading(self) -> None:
        """Wait for changes under way and asked for, unless this thread reads already."""
        me = threading.get_ident()
        with self._changed:
            if me not in self._readers:
                self._changed.wait_for(lambda: not self._writing and not self._waiting)
            self._readers[me] = self._readers.get(me, 0) + 1

    def stop_reading(self) -> None:
        """The end of the last `start_reading` of this thread."""
        me = threading.get_ident()
        with self._changed:
            self._readers[me] -= 1
            if not self._readers[me]:
                del self._readers[me]
                self._changed.notify_all()

    def start_writing(self) -> None:
        """Wait for all readers; ConfigError when this thread is one, which would wait for itself."""
        self.check_may_write()
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._writing and not self._readers)
                self._writing = True
            finally:
                self._waiting -= 1

    def check_may_write(self) -> None:
        """Raise ConfigError when this thread reads, before it waits for anything."""
        with self._changed:
            if threading.get_ident() in self._readers:
                raise ConfigError(
                    "this thread is in a forward pass or a reading block of the model, which hold "
                    "its weights as they are; change them outside"
                )

    def stop_writing(self, *, keep_reading: bool = False) -> None:
        """Let readers in; with `keep_reading` this thread becomes one before any other writes."""
        with self._changed:
            self._writing = False
            if keep_reading:
                self._readers[threading.get_ident()] = 1
            self._changed.notify_all()

    def before_forward(self, module: torch.nn.Module, inputs: Any) -> None:
        """A forward pre-hook."""
        self.start_reading()

    def after_forward(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        """A forward hook, called after failures too."""
        self.stop_reading()
