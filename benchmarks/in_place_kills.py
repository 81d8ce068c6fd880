"""Killing merges in place and reverts at random instants: the model must always come back whole.

    python benchmarks/in_place_kills.py [--kills 200] [--seed 0] [--folder DIR]

Every round sets a sharded model up (as the base, merged into once, or twice), starts a merge or a
revert in a process of its own and kills it with SIGKILL: in even rounds before or after a function
call that is chosen at random among all calls that the work makes, so that every state of the
journal comes up, and in odd rounds after a random time. Every third recovery is killed as well. Then
the next command runs, a merge of one more delta or a revert, and the bytes of all weight files
are compared with merges into new files: exactly before or exactly after the killed command.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from deltakit.delta import SparseDelta, TensorDelta
from deltakit.errors import MissingFileError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.identity import identify
from deltakit.in_place.merge import merge_in_place
from deltakit.in_place.revert import revert
from deltakit.merging.merge import merge

SHAPE = (300, 1000)
ENTRIES = 300
Action = Callable[[], object]


class Models:
    """A base of two shards, three deltas, and what every way of merging them must give."""

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self.folder, self.path = folder, folder / "model"
        self.base = folder / "base"
        self.base.mkdir()
        names = ["model-1.safetensors", "model-2.safetensors"]
        for tensor, name in zip("ab", names, strict=True):
            save_file({tensor: rng.standard_normal(SHAPE, np.float32)}, self.base / name)
        index = f'{{"weight_map": {{"a": "{names[0]}", "b": "{names[1]}"}}}}'
        (self.base / "model.safetensors.index.json").write_text(index)
        self.deltas = [self._delta(rng) for _ in range(3)]
        self.expected = {(): _weights(self.base)}
        for chosen in ((0,), (0, 1), (2,), (0, 2), (0, 1, 2)):
            out = folder / "merged"
            merge(self.base, [self.deltas[n] for n in chosen], out, force=True)
            self.expected[chosen] = _weights(out)

    def start(self, chosen: Sequence[int]) -> None:
        """Put the model up with these deltas merged in place, one after the other."""
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.base, self.path)
        for number in chosen:
            self.merge(number)

    def merge(self, number: int) -> None:
        """Merge one delta in place."""
        merge_in_place(self.path, self.deltas[number])

    def revert(self) -> None:
        """Take all back, or see that there is nothing to take back."""
        try:
            revert(self.path)
        except MissingFileError as error:
            if "no merge in place" not in str(error):
                raise

    def state(self) -> tuple[int, ...] | None:
        """Which deltas the model has, told by all its bytes; None for a model that is not whole."""
        found = _weights(self.path)
        return next((chosen for chosen, data in self.expected.items() if data == found), None)

    @property
    def has_journal(self) -> bool:
        """Whether a journal stands beside the weights."""
        return any(self.path.glob("*.undo"))

    def _delta(self, rng: np.random.Generator) -> SparseDelta:
        base = Checkpoint(self.base)
        tensors = {
            name: TensorDelta(
                name=name,
                shape=SHAPE,
                dtype="float32",
                mode="add",
                indices=np.sort(rng.choice(SHAPE[0] * SHAPE[1], ENTRIES, replace=False)),
                values=rng.standard_normal(ENTRIES),
            )
            for name in "ab"
        }
        identity = identify(base, {name: tensor.indices for name, tensor in tensors.items()})
        return SparseDelta(tensors=tensors, base=identity)


def _weights(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))


def calls(action: Action) -> int:
    """How often functions are entered or left while `action` runs."""
    count = 0

    def see(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += 1

    sys.setprofile(see)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def killed_at(action: Action, instant: int) -> bool:
    """Run `action` in a process that kills itself at its call number `instant`; whether it did."""
    child = os.fork()
    if child == 0:
        left = instant

        def see(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(see)
        _run(action)
    return _was_killed(child)


def killed_after(action: Action, seconds: float) -> bool:
    """Run `action` in a process and kill it after some time; whether it was still running."""
    child = os.fork()
    if child == 0:
        _run(action)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return _was_killed(child)


def _run(action: Action) -> None:
    status = 1
    try:
        action()
        status = 0
    finally:
        sys.setprofile(None)
        if status:
            traceback.print_exc()
        os._exit(status)


def _was_killed(child: int) -> bool:
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a process failed with {code} where it should have worked or been killed")
    return code != 0


def main() -> None:
    """Kill, and exit with 1 at the first model that is not whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    os.fsync = lambda handle: None  # what a killed process wrote is never lost, so only time is
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        found = kill_all(Models(folder, np.random.default_rng(0)), options.kills, options.seed)
    finally:
        shutil.rmtree(folder)
    print(f"{options.kills} kills, every model whole: " + ", ".join(f"{k} {n}" for k, n in found))


def kill_all(models: Models, kills: int, seed: int) -> list[tuple[str, int]]:
    """As many kills of processes that were at work; how often each outcome was seen."""
    chance = random.Random(seed)
    commands: dict[str, tuple[tuple[int, ...], tuple[int, ...], Action]] = {
        "first merge": ((), (0,), lambda: models.merge(0)),
        "second merge": ((0,), (0, 1), lambda: models.merge(1)),
        "revert": ((0, 1), (), models.revert),
    }
    instants, seconds = {}, {}
    for name, (before, after, action) in commands.items():
        models.start(before)
        instants[name] = calls(action)
        models.start(before)
        begun = time.perf_counter()
        action()
        seconds[name] = time.perf_counter() - begun
        if models.state() != after:
            raise SystemExit(f"a {name} that nobody killed went wrong")
    outcomes: Counter[str] = Counter()
    rounds = done = 0
    while done < kills:
        name = chance.choice(list(commands))
        before, after, action = commands[name]
        models.start(before)
        if rounds % 2:
            killed = killed_after(action, chance.uniform(0, seconds[name]))
        else:
            killed = killed_at(action, chance.randrange(instants[name]))
        done, rounds = done + killed, rounds + 1
        pending = models.has_journal and models.state() not in (before, after)
        outcomes["torn weights"] += pending
        follow_up = chance.choice(["merge", "revert"])
        following: Action = (lambda: models.merge(2)) if follow_up == "merge" else models.revert
        if chance.randrange(3) == 0:
            outcomes["recoveries killed"] += killed_at(following, chance.randrange(instants[name]))
            if follow_up == "merge":  # it may have been done, and must not be done twice
                following, follow_up = models.revert, "revert"
        following()
        found = models.state()
        allowed = [()] if follow_up == "revert" else [(*before, 2), (*after, 2)]
        if found not in allowed or (follow_up == "revert" and models.has_journal):
            raise SystemExit(
                f"round {rounds}: {name} killed, then {follow_up}: the model has {found}, "
                f"expected one of {allowed}"
            )
        outcomes[f"{name} then {follow_up}"] += 1
    return sorted(outcomes.items())


if __name__ == "__main__":
    main()
