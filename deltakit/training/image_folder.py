"""Folders of images: one sub-folder per class, or one per split with the classes in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltakit.training.readers import SPLIT_WORDS, Row

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def image_rows(folder: Path) -> dict[str, list[Row]]:
    """The rows {"image": path, "label": name of its class} of every split, sorted by path.

    Sub-folders are splits when all of them are named for one (train, validation, test and the
    like), otherwise classes of the split "train". Empty where there are no images.
    """
    folders = _folders(folder)
    if not folders or any(f.name.lower() not in SPLIT_WORDS for f in folders):
        splits = {"train": _classes(folder)}
    else:
        splits = {}
        for found in folders:
            splits.setdefault(SPLIT_WORDS[found.name.lower()], []).extend(_classes(found))
    return {split: rows for split, rows in splits.items() if rows}


def _classes(folder: Path) -> list[Row]:
    rows: list[dict[str, Any]] = []
    for kind in _folders(folder):
        images = sorted(f for f in kind.rglob("*") if f.suffix.lower() in _SUFFIXES)
        rows += [{"image": image, "label": kind.name} for image in images]
    return list(rows)


def _folders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
