"""Structured supports: whole rows, whole columns, runs. A few integers stand for many entries."""

from __future__ import annotations

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import FormatError
from deltakit.formats.coding import Offer, Place
from deltakit.formats.rice import decode_set, offer_set


class Rows:
    """Whole slices along the first axis: the set of their coordinates, Rice coded."""

    @staticmethod
    def offer(indices: Array, place: Place) -> Offer | None:
        """Unions of whole rows of tensors with two axes or more."""
        if not len(indices) or len(place.shape) < 2:
            return None
        length = place.numel // place.shape[0]
        if len(indices) % length:
            return None
        first, last = indices[::length], indices[length - 1 :: length]
        if (first % length).any() or (last - first != length - 1).any():
            return None
        return offer_set(first // length)

    @staticmethod
    def decode(data: bytes, place: Place) -> Array:
        """See `Coding.decode`."""
        count = _slices(place, axis=0)
        rows = decode_set(data, count, place.shape[0], place.where)
        length = place.numel // place.shape[0]
        return np.asarray(rows[:, None] * length + np.arange(length)).reshape(-1)


class Columns:
    """Whole slices along the last axis: the set of their coordinates, Rice coded."""

    @staticmethod
    def offer(indices: Array, place: Place) -> Offer | None:
        """Unions of whole columns of tensors with two axes or more."""
        if not len(indices) or len(place.shape) < 2:
            return None
        width = place.shape[-1]
        height = place.numel // width
        if len(indices) % height:
            return None
        columns = indices[: len(indices) // height]
        if columns[-1] >= width or indices[-1] != columns[-1] + place.numel - width:
            return None
        if not np.array_equal(indices, _of_columns(columns, height, width)):
            return None
        return offer_set(columns)

    @staticmethod
    def decode(data: bytes, place: Place) -> Array:
        """See `Coding.decode`."""
        count = _slices(place, axis=-1)
        columns = decode_set(data, count, place.shape[-1], place.where)
        return _of_columns(columns, place.numel // place.shape[-1], place.shape[-1])


class Runs:
    """Maximal runs of neighbours: the number of runs, then all starts and ends, Rice coded."""

    @staticmethod
    def offer(indices: Array, place: Place) -> Offer | None:
        """Supports with fewer than one run in two entries."""
        if not len(indices):
            return None
        breaks = np.flatnonzero(np.diff(indices) != 1)
        runs = len(breaks) + 1
        if 2 * runs >= len(indices):
            return None
        bounds = np.empty(2 * runs, np.int64)
        bounds[0], bounds[-1] = indices[0], indices[-1] + 1
        bounds[1:-1:2] = indices[breaks] + 1
        bounds[2::2] = indices[breaks + 1]
        return offer_set(bounds, prefix=runs.to_bytes(8, "little"))

    @staticmethod
    def decode(data: bytes, place: Place) -> Array:
        """See `Coding.decode`."""
        runs = int.from_bytes(data[:8], "little")
        if len(data) < 8 or not 0 < runs <= place.count:
            raise FormatError(f"{place.where}: {place.count} entries cannot form {runs} runs")
        # An end may equal the number of elements, hence one more value than elements.
        bounds = decode_set(data[8:], 2 * runs, place.numel + 1, place.where)
        starts, lengths = bounds[::2], bounds[1::2] - bounds[::2]
        if lengths.sum() != place.count:
            raise FormatError(
                f"{place.where}: the runs hold {lengths.sum()} entries, expected {place.count}"
            )
        before = np.cumsum(lengths) - lengths
        return np.repeat(starts - before, lengths) + np.arange(place.count)


def _of_columns(columns: Array, height: int, width: int) -> Array:
    """Flat indices of whole columns of a [height, width] matrix."""
    return np.asarray(np.arange(height)[:, None] * width + columns).reshape(-1)


def _slices(place: Place, axis: int) -> int:
    """How many whole slices along `axis` make up the support."""
    if len(place.shape) < 2 or not place.numel or not place.count:
        raise FormatError(
            f"{place.where}: {place.count} entries of shape {list(place.shape)} cannot be whole "
            "rows or columns"
        )
    length = place.numel // place.shape[axis]
    if place.count % length:
        raise FormatError(
            f"{place.where}: {place.count} entries are no whole slices of {length} elements"
        )
    return place.count // length
