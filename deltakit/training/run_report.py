"""RUN/run.json and RUN/report.html: what a run tells of itself from its first step on."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltakit.formats.atomic import write_bytes
from deltakit.pages.run_page import run_page
from deltakit.run_record import RunRecord
from deltakit.training.build import Plan, Subject
from deltakit.training.environment import environment
from deltakit.training.folder import RunFolder
from deltakit.training.prepare import Say
from deltakit.training.report_page import try_page
from deltakit.training.watch import finite, metrics_of

_EVERY = 10.0  # seconds between two writings of the page, at least ...
_SHARE = 0.01  # ... and so long that writing it takes no larger part of the time


class RunReport(TrainerCallback):
    """Writes run.json when training starts, and the page whenever there is something to see.

    That is at evaluations, at an interruption and at the end. A page that cannot be written is said
    in a note; no run is lost for it.
    """

    def __init__(self, folder: RunFolder, subject: Subject, plan: Plan, say: Say) -> None:
        self.folder, self.subject, self.plan, self._say = folder, subject, plan, say
        self._due = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record what is known, and that training begins or goes on here."""
        path = self.folder.start
        resumed = state.global_step > 0 and path.is_file()
        earlier = json.loads(path.read_text(encoding="utf-8"))["sessions"] if resumed else []
        began = datetime.now(timezone.utc).isoformat(timespec="seconds")
        told = {
            **_described(self.subject, self.plan),
            "max_steps": state.max_steps,
            "sessions": [*earlier, {"step": state.global_step, "began": began}],
        }
        text = json.dumps(finite(told), indent=2, ensure_ascii=False, allow_nan=False)
        write_bytes(path, f"{text}\n".encode())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After an evaluation, show it."""
        if metrics_of(state.log_history[-1]) and time.monotonic() >= self._due:
            self.write()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show what there is, should nothing follow."""
        self.write()

    def write(self) -> None:
        """Write the page from what lies in the run's folder."""
        began, folder = time.monotonic(), self.folder
        try_page(folder.report, lambda: run_page(RunRecord.read(folder.path)), self._say)
        ended = time.monotonic()
        self._due = ended + max(_EVERY, (ended - began) / _SHARE)


def _described(subject: Subject, plan: Plan) -> dict[str, Any]:
    config, prepared = subject.config, subject.prepared
    names = ("task", "method", "preset", "model", "data")
    return {
        "version": 1,
        **{name: getattr(config, name) for name in names},
        "metric": prepared.metric,
        "metrics": list(prepared.problem.metric_names),
        "budget": {
            "given": config.budget,
            "resolved": plan.method.budget,
            "marks": plan.marks,
            "base_weights": subject.base.total_weights,
        },
        "base": {
            "model_id": prepared.located.model_id,
            "revision": prepared.located.revision,
            "total_weights": subject.base.total_weights,
        },
        "splits": dict(prepared.splits),
        "environment": environment(),
    }
