"""Image classification and regression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltakit.errors import DataError
from deltakit.training.classification import LABEL_SETTINGS, LabelledProblem, read_labels
from deltakit.training.columns import choose_columns
from deltakit.training.data import Table
from deltakit.training.images import open_image, pixel_values
from deltakit.training.task import Example, Head, TaskSettings

_IMAGES = (("image",), ("images",), ("img",), ("pixel_values",))


def image_classification(
    tables: Mapping[str, Table], settings: TaskSettings, head: Head | None
) -> ImageProblem:
    """The problem posed by labelled images; labels are read as for sequence-classification.

    Images are files, encoded bytes or arrays, see `open_image`; paths in a column of text are
    relative to the data file. Raises DataError and ConfigError as `sequence_classification`, and
    DataError for what is no image.
    """
    settings.refuse_others("image-classification", "image_column", *LABEL_SETTINGS)
    first = next(iter(tables.values()))
    column = choose_columns(first, (settings.image_column,), _IMAGES)[0]
    labels, regression, label_note = read_labels(tables, settings, head)
    images = {split: _images(table, column) for split, table in tables.items()}
    notes = (f"image from {column}; {label_note}",)
    return ImageProblem(labels=labels, regression=regression, notes=notes, images=images)


def _images(table: Table, column: str) -> list[tuple[Any, str]]:
    folder = Path(table.origin).parent
    images = []
    for number, row in table.numbered():
        value, where = row.get(column), f"data {table.origin} row {number}"
        if value is None:
            raise DataError(f"{where}: expected an image in column {column!r}, found None")
        images.append((folder / value if isinstance(value, str) else value, where))
    return images


@dataclass(frozen=True, kw_only=True)
class ImageProblem(LabelledProblem):
    """Labelled images. images: split -> (image as the data has it, where that is)."""

    images: Mapping[str, Sequence[tuple[Any, str]]]

    inputs = "images"
    model_class = "AutoModelForImageClassification"

    def encode(self, processor: Any, longest: int) -> dict[str, Sequence[Example]]:
        """Every image as the processor scales it, read again whenever it is used."""
        encoded: dict[str, Sequence[Example]] = {}
        for split, images in self.images.items():
            for value, where in images:  # all that can be wrong is said before training starts
                open_image(value, where)
            encoded[split] = ImageExamples(processor, images, self.labels.values[split])
        return encoded


@dataclass(frozen=True, slots=True)
class ImageExamples(Sequence[Example]):
    """Examples that are read when asked for, so that memory holds one batch of images."""

    processor: Any
    images: Sequence[tuple[Any, str]]
    labels: Sequence[Any]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        pixels = pixel_values(self.processor, open_image(*self.images[at]))
        return {"pixel_values": pixels, "labels": self.labels[at]}
