"""Images: read from files, bytes or arrays, and scaled as a model expects them.

Pillow is needed for everything but arrays of the model's own size (pip install
"deltakit-sparse[vision]").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import ConfigError, DataError, MissingFileError


def open_image(value: Any, where: str) -> Array:
    """An image as an array [height, width, channels]: uint8, or float32 from 0 to 1.

    value: a path; encoded bytes, alone or under "bytes" as `datasets` keeps them; an array [h, w]
    or [h, w, channels] of 1 or 3 channels, uint8 or floats. `where` names it in errors: DataError
    for what is no image, MissingFileError for a file that is not there.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or Path(value.get("path") or "")
    if isinstance(value, (str, Path, bytes)):
        return _decoded(value, where)
    array = np.asarray(value)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or not array.size:
        raise DataError(
            f"{where}: expected an image [height, width] or [height, width, 1 or 3], found shape "
            f"{list(array.shape)}"
        )
    if array.dtype == np.uint8:
        return array
    # an array outside of this range was scaled in a way that only its maker knows
    if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):
        raise DataError(f"{where}: expected an image of uint8, or of floats from 0 to 1")
    return array.astype(np.float32)


def _decoded(value: str | Path | bytes, where: str) -> Array:
    from PIL import UnidentifiedImageError

    pillow = _pillow()
    try:
        with pillow.open(BytesIO(value) if isinstance(value, bytes) else value) as image:
            grey = image.mode in ("1", "L", "LA")
            return _with_channels(np.asarray(image.convert("L" if grey else "RGB")))
    except FileNotFoundError:
        raise MissingFileError(f"{where}: {value!s} does not exist") from None
    except (UnidentifiedImageError, OSError):
        raise DataError(f"{where}: not an image that Pillow can read") from None


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError(
            'image files need Pillow; run pip install "deltakit-sparse[vision]"'
        ) from None
    return Image


def _with_channels(array: Array) -> Array:
    return array[:, :, None] if array.ndim == 2 else array


@dataclass(frozen=True, slots=True)
class ImageScaling:
    """The processor of a model whose folder describes none: its size, values from -1 to 1."""

    height: int
    width: int
    channels: int

    @classmethod
    def of(cls, config: Any) -> ImageScaling:
        """As the model's config.json says (image_size, num_channels); ConfigError without them."""
        size = getattr(config, "image_size", None)
        channels = getattr(config, "num_channels", None)
        if size is None or channels not in (1, 3):
            raise ConfigError(
                "the model has no preprocessor_config.json, and its config.json no image_size and "
                "num_channels of 1 or 3; add one of them"
            )
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return cls(int(height), int(width), channels)

    def __call__(self, image: Array) -> Array:
        """float32 [channels, height, width] of an image as `open_image` gives it."""
        image = self._resized(image)
        pixels = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image
        return np.ascontiguousarray(pixels.transpose(2, 0, 1) * 2 - 1)

    def _resized(self, image: Array) -> Array:
        if self.channels == 3:
            image = np.broadcast_to(image, (*image.shape[:2], 3))
        elif image.shape[2] == 3:
            # the luma of ITU-R 601, as Pillow has it
            grey = image @ np.array([[0.299], [0.587], [0.114]], np.float32)
            image = grey.round().astype(np.uint8) if image.dtype == np.uint8 else grey
        if image.shape[:2] == (self.height, self.width):
            return image
        pillow = _pillow()
        layers = [
            pillow.fromarray(np.ascontiguousarray(image[:, :, channel])).resize(
                (self.width, self.height), pillow.Resampling.BILINEAR
            )
            for channel in range(self.channels)
        ]
        return np.stack([np.asarray(layer) for layer in layers], axis=-1)


def pixel_values(processor: Any, image: Array) -> Array:
    """An image as the model's input, float32 [channels, height, width].

    processor: `ImageScaling`, or an image processor of transformers.
    """
    if isinstance(processor, ImageScaling):
        return processor(image)
    if image.shape[2] == 1:
        image = np.broadcast_to(image, (*image.shape[:2], 3))
    options: dict[str, Any] = {} if image.dtype == np.uint8 else {"do_rescale": False}
    made = processor(
        images=image, return_tensors="np", input_data_format="channels_last", **options
    )
    return np.asarray(made["pixel_values"][0], np.float32)
