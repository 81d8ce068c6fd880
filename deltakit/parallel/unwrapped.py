"""Keeping accelerate from wrapping a model whose gradients the engine averages itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def unwrapped(accelerator: Any) -> Iterator[None]:
    """Within it `accelerator.prepare` leaves out DistributedDataParallel.

    That would exchange the dense gradient of every weight with entries, and hold all of them.
    Mixed precision is prepared as ever.
    """
    accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)
    try:
        yield
    finally:
        del accelerator.prepare_model
