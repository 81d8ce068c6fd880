"""Keeping the libraries beneath from talking over deltakit's own notes."""

from __future__ import annotations

import huggingface_hub
import transformers


def quieten() -> None:
    """Keep the libraries' own progress bars and advice off stderr; errors are still told."""
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
