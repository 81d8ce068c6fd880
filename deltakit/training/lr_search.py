"""`find_lr`: a short measured sweep for the learning rate of the entries, on the task itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from deltakit.errors import ConfigError, TrainingError
from deltakit.figures import can_draw, drawn
from deltakit.formats.atomic import write_bytes
from deltakit.selection.scene import Calibration
from deltakit.training.lr_trial import MakeTuner, Support, Trial, density_of, run_trial

SMALLEST, LARGEST = 1e-8, 10.0  # rates outside are not tried


@dataclass(frozen=True)
class LrSearch:
    """What a sweep found.

    rate: for the run. reason: why, in one line. trials: rising by rate. steps: optimizer steps of
    each trial; total_steps: of the run. center: where the sweep began. support: what the best
    trial trained (live parameter name -> flat indices), for `training.curvature`.
    """

    rate: float
    reason: str
    trials: tuple[Trial, ...]
    steps: int
    total_steps: int
    center: float
    support: Support

    def rows(self) -> list[list[str]]:
        """Rate, mean training loss of the last quarter, held-out loss; a heading first."""
        rows = [["rate", "training loss", "held-out loss"]]
        for trial in self.trials:
            end = trial.losses[-max(1, len(trial.losses) // 4) :]
            told = [f"{mean(end):.4f}", f"{trial.loss:.4f}"] if trial.held_out else ["diverged", ""]
            rows.append([f"{trial.rate:.2e}", *told])
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the support."""
        found = {name: getattr(self, name) for name in ("rate", "reason", "steps", "total_steps")}
        trials = [asdict(t) | {"loss": t.loss if t.held_out else None} for t in self.trials]
        return {**found, "center": self.center, "trials": trials}

    def save(self, path: str | PathLike[str]) -> None:
        """Write `as_dict` as JSON, atomically."""
        write_bytes(path, (json.dumps(self.as_dict(), indent=2) + "\n").encode())

    def plot(self, path: str | PathLike[str]) -> bool:
        """Draw loss against rate as PNG; False without matplotlib."""
        if not can_draw():
            return False
        kept = [trial for trial in self.trials if trial.held_out]
        with drawn(Path(path), 6, 4) as [axes]:
            axes.plot([t.rate for t in kept], [t.loss for t in kept], "o-")
            axes.axvline(self.rate, linestyle="--", color="gray")
            axes.set(xscale="log", xlabel="learning rate")
            axes.set_ylabel(f"held-out loss (nats), {self.steps} steps")
            axes.set_title(f"chosen: {self.rate:.2e}")
        return True


def find_lr(
    make_tuner: MakeTuner,
    data: Calibration,
    *,
    total_steps: int,
    steps: int | None = None,
    accumulation_steps: int = 1,
    held_out: int = 8,
    seed: int = 0,
    say: Callable[[Trial], None] = lambda trial: None,
) -> LrSearch:
    """Measure the held-out loss that short trainings reach at several rates, and choose one.

    make_tuner: (rate, steps) -> a new `SparseTuner` on the model at its start, whose `total_steps`
    is `steps`, so that a support that grows does so within the trial. data: `dk.Batches`, or any
    `Calibration`. total_steps: optimizer steps of the run to come. steps: per trial; by
    default an eighth of the run, at least 32 and at most 64, never more than the run. held_out:
    batches that are measured on; each trial trains on the same others. say: told every trial.

    Afterwards weights, extras, buffers, modes and random generators are what they were, bit for
    bit; only extras of a delta that a tuner continues from keep that delta's values.

    The rates start from 1e-6 / density of the entries, at most 0.1, which the tables of Xu and
    Zhang (2024) follow and which is too small for small models by orders of magnitude: so they go
    up in tens until the loss turns, go down if it never fell, and then twice into the logarithmic
    middles beside the best.
    The choice is the smallest rate whose loss is within one standard error of the best (paired by
    batch: rates beyond it buy nothing measurable and are nearer to divergence), times
    sqrt(steps / total_steps), because the best rate falls with the length of training. Measured
    with random masks: on the demo's task the best is about 0.1 for 16 steps, 0.09 for 32 and 0.02
    for 192; on the docstrings with MiniLM 0.04 for 32 and 0.01 to 0.02 for 285.

    Raises TrainingError when every rate diverges.
    """
    if total_steps < 1:
        raise ConfigError(f"find_lr: total_steps must be at least 1, found {total_steps}")
    steps = min(total_steps, min(64, max(32, total_steps // 8)) if steps is None else steps)
    stream = data.batches(seed)
    measured = list(islice(stream, held_out))
    plan = [list(islice(stream, accumulation_steps)) for _ in range(steps)]
    trials: dict[float, tuple[Trial, Support]] = {}

    def loss_at(rate: float) -> float:
        if rate not in trials:
            trials[rate] = run_trial(make_tuner, rate, plan, measured, data.loss, seed=seed)
            say(trials[rate][0])
        return trials[rate][0].loss

    center = min(1e-6 / density_of(make_tuner, steps), 0.1)
    walk(center, loss_at)
    ordered = tuple(trials[rate][0] for rate in sorted(trials))
    best, chosen = choose(ordered)
    rate = float(f"{chosen.rate * math.sqrt(steps / total_steps):.3g}")
    reason = (
        f"{rate:.2e} = {chosen.rate:.2e} x sqrt({steps}/{total_steps} steps); held-out loss "
        f"{chosen.loss:.4f}, lowest {best.loss:.4f} at {best.rate:.2e}, of {len(ordered)} rates"
    )
    return LrSearch(rate, reason, ordered, steps, total_steps, center, trials[best.rate][1])


def walk(center: float, loss_at: Callable[[float], float]) -> None:
    """Visit rates until the best is known within a factor of 10 ** (1 / 4).

    First in tens, upwards at least twice and for as long as that is the best, then downwards for
    as long as that is; then twice the logarithmic middles between the best and its neighbours. A
    rate that diverged has an infinite loss, which ends the way up.
    """
    losses: dict[int, float] = {}  # by quarters of a decade from the center

    def visit(quarter: int) -> None:
        rate = center * 10 ** (quarter / 4)
        losses[quarter] = loss_at(rate) if SMALLEST <= rate <= LARGEST else math.inf

    def best() -> int:
        return min(losses, key=lambda quarter: (losses[quarter], quarter))

    visit(0)
    while math.isfinite(losses[max(losses)]) and (max(losses) < 8 or best() == max(losses)):
        visit(max(losses) + 4)
    while best() == min(losses) and center * 10 ** (min(losses) / 4 - 1) >= SMALLEST:
        visit(min(losses) - 4)
    for width in (2, 1):
        middle = best()
        for quarter in (middle - width, middle + width):
            visit(quarter)


def choose(trials: Sequence[Trial]) -> tuple[Trial, Trial]:
    """The trial of least loss, and the one of the smallest rate that is as good within noise.

    Noise is one standard error of the batchwise differences from the best. Raises TrainingError
    when all diverged.
    """
    kept = [trial for trial in trials if trial.held_out]
    if not kept:
        raise TrainingError(
            f"training diverged at every rate from {trials[0].rate:.1e} to {trials[-1].rate:.1e}; "
            "look for broken inputs, or give the rate yourself"
        )
    best = min(kept, key=lambda trial: (trial.loss, trial.rate))
    return best, next(trial for trial in kept if _as_good(trial, best))


def _as_good(trial: Trial, best: Trial) -> bool:
    pairs = zip(trial.held_out, best.held_out, strict=True)
    differences = [a - b for a, b in pairs]
    noise = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return mean(differences) <= noise
