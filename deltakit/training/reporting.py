"""Trackers of the Trainer (`report_to`): which there are, and where TensorBoard's files go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from deltakit.errors import ConfigError

_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml"}  # the others go by their names


def tracker_names() -> list[str]:
    """What the installed transformers can report to."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return sorted(INTEGRATION_TO_CALLBACK)


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose package is not installed."""
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    known: list[str] = get_available_reporting_integrations() if names else []  # type: ignore[no-untyped-call]
    for name in names:
        if name not in (*known, "flyte"):  # transformers does not look for flyte
            package = _PACKAGES.get(name, name)
            raise ConfigError(
                f"report_to {name} needs the package {package}, which is not installed; "
                f"pip install {package}"
            )


def keep_events_in(trainer: Any, folder: str | os.PathLike[str]) -> None:
    """Have a Trainer write TensorBoard's event files to a folder of their own.

    TENSORBOARD_LOGGING_DIR, which transformers reads, comes before that.
    """
    from transformers.integrations.integration_utils import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = os.fspath(folder)
