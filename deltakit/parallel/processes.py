"""This process among those that torchrun or `accelerate launch` started, and joining them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from deltakit.errors import ConfigError


def count() -> int:
    """How many processes were launched together; ConfigError where WORLD_SIZE is no number."""
    return _number("WORLD_SIZE", 1)


def is_first() -> bool:
    """Whether this is the process that writes and speaks: rank 0, or the only one."""
    return _number("RANK", 0) == 0


@contextmanager
def joined() -> Iterator[None]:
    """Within it the processes launched together form torch.distributed's default group.

    Of one process, nothing. A group that is there already stays when this is left. Raises
    ConfigError where the environment lacks what a launcher tells of the meeting point.
    """
    import torch.distributed as dist

    if count() == 1 or dist.is_initialized():
        yield
        return
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {count()}, but {', '.join(missing)} is not set; launch by torchrun or "
            "accelerate, or unset WORLD_SIZE to train in one process"
        )
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())
    yield
    dist.destroy_process_group()  # not after an error: the others may be waiting in a collective


def wait() -> None:
    """Until all processes of the default group are here."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def refuse_several(what: str) -> None:
    """Raise ConfigError where this process was launched with others, which `what` has no use for."""
    if count() > 1:
        raise ConfigError(
            f"{what} runs in one process, found {count()}; launch it without torchrun"
        )


def share_of(batch_size: int) -> int:
    """This process's examples of a batch; ConfigError unless all have equally many."""
    if batch_size % count():
        raise ConfigError(
            f"setting batch_size: {batch_size} examples cannot be shared equally by {count()} "
            "processes; give a multiple"
        )
    return batch_size // count()


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(f"environment variable {name}: expected a whole number, found {value!r}")
    return int(value)
