"""Laws of safetensors headers: what is rendered is parsed back, and the library agrees."""

from __future__ import annotations

import io
import json
from math import prod

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from deltakit.errors import FormatError
from deltakit.formats.safetensors_header import BITS, Entry, header_size, parse, read, render

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def contents(draw: st.DrawFn) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries of any dtype known to the library, without holes, and metadata."""
    entries, position = {}, 0
    for name in draw(
        st.lists(NAMES.filter(lambda n: n != "__metadata__"), unique=True, max_size=5)
    ):
        code = draw(st.sampled_from(list(BITS)))
        shape = (*draw(st.lists(st.integers(0, 4), max_size=2)), 8)  # whole bytes for 4 and 6 bits
        size = prod(shape) * BITS[code] // 8
        entries[name] = Entry(code, shape, position, position + size)
        position += size
    return entries, draw(st.dictionaries(NAMES, NAMES, max_size=2))


@given(contents())
def test_what_is_rendered_is_parsed_back(content: tuple[dict[str, Entry], dict[str, str]]) -> None:
    entries, metadata = content
    text = render(entries, metadata)
    size = max((entry.end for entry in entries.values()), default=0)
    header = parse(text, len(text) + size, "x")
    assert (dict(header.entries), dict(header.metadata)) == content
    assert (header.body_offset, header.body_size) == (len(text), size)
    assert len(text) % 8 == 0
    assert text[8:].isascii()
    assert render(dict(reversed(entries.items())), dict(reversed(metadata.items()))) == text
    with io.BytesIO(text + bytes(size)) as file:
        assert read(file, "x") == header
        assert file.tell() == len(text)


@given(contents())
def test_the_library_reads_what_is_rendered(
    content: tuple[dict[str, Entry], dict[str, str]],
) -> None:
    entries, metadata = content
    size = max((entry.end for entry in entries.values()), default=0)
    found = dict(safetensors.deserialize(render(entries, metadata) + bytes(size)))
    assert {name: (t["dtype"], tuple(t["shape"])) for name, t in found.items()} == {
        name: (entry.dtype, entry.shape) for name, entry in entries.items()
    }


def header_of(content: object) -> bytes:
    text = json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


def test_unknown_dtypes_are_passed_on() -> None:
    """Whoever copies a tensor need not know what is in it."""
    content = {"w": {"dtype": "F5_NEW", "shape": [3], "data_offsets": [0, 7]}}
    assert parse(header_of(content), len(header_of(content)) + 7, "x").entries["w"].nbytes == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}, "takes 1.5 bytes"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 2]}, "'w': F32 of shape .3. takes 12"),
        ({"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 2]}, "too many elements"),
        ({"dtype": "F32", "shape": None, "data_offsets": [0, 2]}, "must be lists of integers"),
        ({"dtype": "F32", "shape": [0], "data_offsets": [0, 0, 0]}, "must be lists of integers"),
        ({"dtype": "F32", "shape": [0]}, "must have exactly dtype, shape and data_offsets"),
        (
            {"dtype": "X", "shape": [1], "data_offsets": [0, 3]},
            "x is truncated: its tensors take 3",
        ),
        (
            {"dtype": "X", "shape": [1], "data_offsets": [0, 1]},
            "belong to no tensor: .* take 1 byte",
        ),
        (
            {"dtype": "X", "shape": [1], "data_offsets": [1, 2]},
            "leaves a hole: it starts at byte 1",
        ),
    ],
)
def test_entries_that_break_the_rules_are_refused(fields: object, message: str) -> None:
    text = header_of({"w": fields})
    with pytest.raises(FormatError, match=message):
        parse(text, len(text) + 2, "x")


def test_too_few_bytes_are_refused() -> None:
    text = header_of({})
    assert header_size(text[:8], len(text), "x") == len(text)
    with pytest.raises(FormatError, match="x: 9 bytes given, the header has 10"):
        parse(text[:9], 10, "x")
    with pytest.raises(FormatError, match="x: 7 bytes are too few"):
        header_size(text[:7], 7, "x")
    with pytest.raises(FormatError, match="the header needs 10 bytes, the file has 9"):
        header_size(text[:8], 9, "x")


def test_names_without_utf8_form_are_refused() -> None:
    text = header_of({"\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})
    with pytest.raises(FormatError, match="lone surrogate"):
        parse(text, len(text), "x")
