"""Images: every source gives the same pixels, and a model gets them as it was trained on them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import bright_images
from transformers import ViTImageProcessorPil

from deltakit.errors import ConfigError, DataError, DeltakitError
from deltakit.training.collate import Collator
from deltakit.training.data import Table, read_splits, table_of
from deltakit.training.images import ImageScaling, open_image, pixel_values
from deltakit.training.splits import hold_out
from deltakit.training.task import TaskSettings
from deltakit.training.tasks import TASKS

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = np.stack([GREY, GREY[::-1], GREY.T], axis=-1)


def _png(array: Any) -> bytes:
    stream = BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("array", [GREY, COLOUR])
def test_every_form_of_an_image_is_the_same_array(array: Any, tmp_path: Path) -> None:
    """Files, bytes, what `datasets` keeps, arrays and nested lists of floats."""
    path = tmp_path / "a.png"
    path.write_bytes(_png(array))
    expected = array.reshape(8, 8, -1)
    forms = [path, str(path), _png(array), {"bytes": _png(array), "path": None}]
    for form in (*forms, {"bytes": None, "path": str(path)}, array):
        found = open_image(form, "here")
        assert found.dtype == np.uint8
        assert np.array_equal(found, expected)
    floats = open_image((array / 255).tolist(), "here")
    assert floats.dtype == np.float32
    assert np.array_equal(np.rint(floats * 255).astype(np.uint8), expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"no image", "here: not an image that Pillow can read"),
        ("gone.png", "here: gone.png does not exist"),
        (np.zeros((2, 2, 4), np.uint8), r"here: expected an image .* found shape \[2, 2, 4\]"),
        (np.zeros((0, 2), np.uint8), r"found shape \[0, 2, 1\]"),
        (np.full((2, 2), 16), "here: expected an image of uint8, or of floats from 0 to 1"),
        (np.full((2, 2), 1.5), "here: expected an image of uint8, or of floats from 0 to 1"),
        (np.full((2, 2), np.nan), "here: expected an image of uint8, or of floats from 0 to 1"),
    ],
)
def test_what_is_no_image(value: Any, message: str) -> None:
    """Arrays of unknown scale are not guessed at."""
    with pytest.raises(DeltakitError, match=message):
        open_image(value, "here")


def test_scaling_of_the_model_s_own_size_is_exact() -> None:
    """0 to -1, 255 to 1, channels first; floats and bytes agree."""
    scaling = ImageScaling(8, 8, 3)
    found = scaling(open_image(COLOUR, "here"))
    assert found.dtype == np.float32
    assert found.shape == (3, 8, 8)
    assert np.array_equal(found, COLOUR.transpose(2, 0, 1).astype(np.float32) / 255 * 2 - 1)
    assert np.allclose(scaling(open_image(COLOUR / 255, "here")), found, atol=1e-6)


def test_scaling_changes_size_and_channels() -> None:
    """As Pillow does, for grey and colour either way."""
    image = Image.fromarray(COLOUR)
    grey = np.asarray(image.convert("L"))[None] / 255 * 2 - 1
    found = ImageScaling(8, 8, 1)(open_image(COLOUR, "here"))
    assert np.abs(found - grey).max() <= 2 / 255 + 1e-6  # Pillow rounds by integers
    spread = ImageScaling(8, 8, 3)(open_image(GREY, "here"))
    assert np.array_equal(spread[0], spread[2])
    large = np.asarray(image.resize((6, 4), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    expected = large.astype(np.float32) / 255 * 2 - 1
    assert np.array_equal(ImageScaling(4, 6, 3)(open_image(COLOUR, "here")), expected)
    assert ImageScaling(4, 6, 1)(open_image(GREY / 255, "here")).shape == (1, 4, 6)


def test_scaling_comes_from_the_configuration() -> None:
    """A number or two; without them there is nothing to go by."""
    sizes = SimpleNamespace(image_size=[4, 6], num_channels=3)
    assert ImageScaling.of(sizes) == ImageScaling(4, 6, 3)
    assert ImageScaling.of(SimpleNamespace(image_size=8, num_channels=1)) == ImageScaling(8, 8, 1)
    with pytest.raises(ConfigError, match=r"no preprocessor_config\.json"):
        ImageScaling.of(SimpleNamespace(num_channels=3))


def test_processor_of_the_model_gets_any_image() -> None:
    """Grey or colour, bytes or floats: the processor's own scaling, once."""
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    expected = COLOUR.transpose(2, 0, 1) / 255 * 2 - 1
    for image in (COLOUR, COLOUR / 255):
        found = pixel_values(processor, open_image(image, "here"))
        assert found.dtype == np.float32
        assert np.allclose(found, expected, atol=1e-6)
    assert pixel_values(processor, open_image(GREY, "here")).shape == (3, 8, 8)


def _write(folder: Path, images: Any, labels: Any) -> None:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / f"kind {label}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(_png(image))


def test_folders_of_classes_and_splits(tmp_path: Path) -> None:
    """Classes are sub-folders; splits too, when all are named for one."""
    images, labels = bright_images(8)
    _write(tmp_path / "one", images, labels)
    _write(tmp_path / "two/train", images[:6], labels[:6])
    _write(tmp_path / "two/val", images[6:], labels[6:])
    one, two = read_splits(str(tmp_path / "one")), read_splits(str(tmp_path / "two"))
    assert {split: len(table.rows) for split, table in one.items()} == {"train": 8}
    assert {s: len(t.rows) for s, t in two.items()} == {"train": 6, "validation": 2}
    for row in one["train"].rows:
        number = int(row["image"].stem)
        assert row["label"] == f"kind {labels[number]}"
        assert np.array_equal(open_image(row["image"], "here")[..., 0], images[number])


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    """Beside classes that are no split."""
    images, _ = bright_images(2)
    for name, image in zip(("train", "plane"), images, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(_png(image))
    rows = read_splits(str(tmp_path))["train"].rows
    assert [row["label"] for row in rows] == ["plane", "train"]


def test_arrays_in_a_file(tmp_path: Path) -> None:
    """One row per item, labels as plain numbers; pickles are refused."""
    images, labels = bright_images(5)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    rows = read_splits(str(tmp_path / "a.npz"))["train"].rows
    assert [row["labels"] for row in rows] == labels.tolist()
    assert all(np.array_equal(r["images"], i) for r, i in zip(rows, images, strict=True))
    np.savez(tmp_path / "b.npz", images=images, labels=labels[:-1])
    with pytest.raises(DataError, match="expected arrays of one length"):
        read_splits(str(tmp_path / "b.npz"))
    np.savez(tmp_path / "c.npz", images=np.array([{}, {}], dtype=object))
    with pytest.raises(DataError, match=r"c\.npz: not arrays without pickles"):
        read_splits(str(tmp_path / "c.npz"))


def test_images_are_held_out_by_their_content(tmp_path: Path) -> None:
    """The same ones from another folder, in another order, and however large they are."""
    images, _ = bright_images(20)
    held = []
    for folder, order in (("a", range(20)), ("b", range(19, -1, -1))):
        path = tmp_path / folder
        path.mkdir()
        for place, number in enumerate(order):
            (path / f"{place}.png").write_bytes(_png(images[number]))
        rows = [{"image": path / f"{place}.png", "label": 0} for place in range(20)]
        kept = hold_out(table_of(rows, folder), 0.2)[1].rows
        held.append({open_image(row["image"], "here").tobytes() for row in kept})
    assert held[0] == held[1]
    large = np.zeros((2, 64, 64), np.uint8)
    large[1, 30, 30] = 1  # beyond what str() shows of an array
    rows = [{"image": image, "label": 0} for image in large]
    assert len(hold_out(table_of(rows, "large"), 0.5)[1].rows) == 1


def _problem(table: Table, **settings: Any) -> Any:
    return TASKS["image-classification"]({"train": table}, TaskSettings(**settings), None)


def test_examples_become_batches() -> None:
    """float32 [batch, channels, height, width] and a vector of labels, read when asked for."""
    images, labels = bright_images(6)
    rows = [{"img": i, "label": int(n)} for i, n in zip(images, labels, strict=True)]
    examples = _problem(table_of(rows, "rows")).encode(ImageScaling(8, 8, 1), 0)["train"]
    batch = Collator(0, {"pixel_values", "labels"})(examples[2:5])
    assert batch["pixel_values"].shape == (3, 1, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == labels[2:5].tolist()
    half = Collator(0, {"pixel_values"}, torch.bfloat16)(examples[:2])
    assert half["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"image": None, "label": 0}], {}, "row 1: expected an image in column 'image', found No"),
        ([{"picture": 0, "label": 0}], {}, "expected a column image or images or img or pixel_va"),
        ([{"image": b"", "label": 0}], {"text_column": "image"}, "text_column does not apply"),
    ],
)
def test_mistakes_in_images(rows: Any, settings: dict[str, Any], message: str) -> None:
    """One line each."""
    with pytest.raises(DeltakitError, match=message):
        _problem(table_of(rows, "rows"), **settings)


def test_paths_are_relative_to_the_data_file(tmp_path: Path) -> None:
    """A bad image is named with its row before training starts."""
    (tmp_path / "a.png").write_bytes(_png(GREY))
    rows = [{"image": "a.png", "label": 0}, {"image": "b.png", "label": 1}]
    scaling = ImageScaling(8, 8, 1)
    origin = str(tmp_path / "rows.jsonl")
    assert len(_problem(table_of(rows[:1], origin)).encode(scaling, 0)["train"]) == 1
    with pytest.raises(DeltakitError, match=r"row 2: .*b\.png does not exist"):
        _problem(table_of(rows, origin)).encode(scaling, 0)
