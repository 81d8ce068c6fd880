"""Headers that lie about themselves or about the body: a typed error, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attack_factory import Edit, forged, joined, refused, sealed, split
from golden_deltas import FOLDER

from deltakit.errors import FormatError, UnsupportedVersionError


def common(**cells: Any) -> Edit:
    return lambda header: header["common"].update(cells)


def header_with(**keys: Any) -> Edit:
    return lambda header: header.update(keys)


HUGE = 10**400
DECEITS: dict[str, tuple[str, Edit, str]] = {
    "newer version": ("v1-rice", header_with(version=3), "version 3 is newer .* upgrade"),
    "version 2 without an adapter": ("v1-rice", header_with(version=2), r"keys \['adapter'\]"),
    "version 1 with one": ("v1-rice", header_with(adapter={}), r"keys \['adapter'\]"),
    "no version": ("v1-rice", lambda h: h.pop("version"), "has no version"),
    "version of another type": ("v1-rice", header_with(version=1.0), "has no version"),
    "version true": ("v1-rice", header_with(version=True), "has no version"),
    "version zero": ("v1-rice", header_with(version=0), "has no version"),
    "unknown key": ("v1-rice", header_with(compression="zstd"), r"keys \['compression'\]"),
    "missing key": ("v1-rice", lambda h: h.pop("common"), r"keys \['common'\]"),
    "unknown column": ("v1-rice", common(scale=1), "the columns .* are not those of its version"),
    "missing column": ("v1-rice", lambda h: h["common"].pop("seed"), "the columns"),
    "columns of another order": ("v1-many", lambda h: h["columns"].reverse(), "the columns"),
    "columns no list": ("v1-rice", header_with(columns={"name": 1}), "the columns"),
    "name in common": ("v1-rice", common(name="w"), "do not fit"),
    "tensors no list": ("v1-rice", header_with(tensors={}), "do not fit"),
    "short row": ("v1-many", lambda h: h["tensors"][0].pop(), "row does not have"),
    "row no list": ("v1-rice", header_with(tensors=["w"]), "row does not have 1 cells"),
    "tensor twice": ("v1-rice", header_with(tensors=[["w"], ["w"]]), "'w' stands twice"),
    "tensors unsorted": ("v1-many", lambda h: h["tensors"].reverse(), "stands twice or out of"),
    "name no text": ("v1-rice", header_with(tensors=[[7]]), "name is no text"),
    "name a lone surrogate": ("v1-rice", header_with(tensors=[["\ud800"]]), "name is no text"),
    "huge shape": ("v1-rice", common(shape=[HUGE]), "shape cannot be"),
    "shape product": ("v1-rice", common(shape=[2**31, 2**31, 2]), "shape cannot be"),
    "shape of a million": ("v1-rice", common(shape=[2] * 10**5), "shape cannot be"),
    "negative shape": ("v1-rice", common(shape=[-1000]), "shape cannot be"),
    "shape of floats": ("v1-rice", common(shape=[1000.0]), "shape cannot be"),
    "shape of booleans": ("v1-rice", common(shape=[1000, True]), "shape cannot be"),
    "shape no list": ("v1-rice", common(shape=1000), "shape cannot be 1000"),
    "huge count": ("v1-rice", common(nnz=HUGE), "nnz cannot be 1000"),
    "more entries than elements": ("v1-rice", common(nnz=1001), "1001 entries in 1000 elements"),
    "lying count": ("v1-rice", common(nnz=32), "contradicts the sdelta header"),
    "lying huge count": ("v1-rice", common(nnz=2**60, shape=[2**61]), "contradicts"),
    "lying index bytes": ("v1-rice", common(index_bytes=5), "contradicts"),
    "huge index bytes": ("v1-rice", common(index_bytes=2**61), "contradicts"),
    "unknown dtype": ("v1-rice", common(dtype="F4"), "dtype cannot be 'F4'"),
    "dtype no text": ("v1-rice", common(dtype=["F32"]), r"dtype cannot be \['F32'\]"),
    "unknown trained dtype": ("v1-rice", common(trained_dtype="float32"), "trained_dtype cannot"),
    "unknown mode": ("v1-rice", common(mode="mul"), "mode cannot be 'mul'"),
    "mode of another type": ("v1-rice", common(mode=["add"]), "mode cannot be"),
    "adding integers": ("v1-rice", common(dtype="I32"), "add is not defined for int32"),
    "set values of another dtype": (
        "v1-rice",
        common(mode="set", dtype="I32"),
        "cannot be float32",
    ),
    "wide values": ("v1-float64", common(dtype="F32"), "values of a float32 tensor cannot be"),
    "unknown coding": ("v1-rice", common(coding="zstd"), "coding cannot be 'zstd'"),
    "coding no text": ("v1-rice", common(coding={}), "coding cannot be {}"),
    "seed beside indices": ("v1-rice", common(seed=1), "coding 'rice' with seed 1"),
    "seeded without seed": ("v1-seeded", common(seed=None), "coding 'seeded' with seed None"),
    "seed too large": ("v1-seeded", common(seed=2**64), "seed cannot be"),
    "negative seed": ("v1-seeded", common(seed=-1), "seed cannot be -1"),
    "dense but not full": ("v1-dense", common(shape=[7]), "a dense support has all 7 elements"),
    "order too wide": ("v1-order", common(order_bits=64), "order_bits cannot be 64"),
    "order of another width": ("v1-order", common(order_bits=11), "contradicts"),
    "digest too short": ("v1-rice", common(values_sha256="abc"), "cannot have the digest"),
    "digest missing": ("v1-rice", common(values_sha256=None), "cannot have the digest None"),
    "digest of nothing": ("v1-dense", common(indices_sha256="A" * 43), "0 bytes cannot have"),
    "digest of no order": ("v1-rice", common(order_sha256="A" * 43), "an order stream that is not"),
    "digest of no base": (
        "v1-rice",
        common(base_values_sha256="A" * 43),
        "base values that are not",
    ),
    "wrong digest": ("v1-rice", common(values_sha256="A" * 43), "differ from their digest"),
    "base values maybe": ("v1-rice", common(base_values=1), "base_values cannot be 1"),
    "fingerprint without base": ("v1-rice", common(sample="0" * 16), "without a base"),
    "fingerprint in capitals": ("v1-identity", common(sample="F" * 16), "sample cannot be"),
    "support without sample": ("v1-identity", common(sample=None), "sample cannot be None"),
    "base no object": ("v1-rice", header_with(base=[]), "base is not described"),
    "base with unknown keys": ("v1-rice", header_with(base={"sha": 1}), "base is not described"),
    "model id a number": ("v1-rice", header_with(base={"model_id": 7}), "must be strings"),
    "negative total": ("v1-rice", header_with(base={"total_weights": -1}), "is no count"),
    "fingerprint in two places": (
        "v1-identity",
        lambda h: h["base"]["fingerprints"].update(w=["0" * 16, None]),
        "do not fit the tensors",
    ),
    "broken fingerprint": (
        "v1-identity",
        lambda h: h["base"]["fingerprints"].update(v=["0" * 15, None]),
        "'v': no base fingerprint",
    ),
    "config no object": ("v1-rice", header_with(config=[]), "config is no JSON object"),
    "deep provenance": (
        "v1-rice",
        lambda h: h.update(provenance=json.loads('{"x":' + "[" * 90 + "]" * 90 + "}")),
        "nested deeper than 64",
    ),
    "extras no object": ("v1-extras", header_with(extras=[]), "extras are no JSON object"),
    "extra without digest": (
        "v1-bfloat16-extra",
        lambda h: h["extras"]["score.weight"].pop(),
        "must have a dtype, a shape and a digest",
    ),
    "extra of unknown dtype": (
        "v1-bfloat16-extra",
        lambda h: h["extras"].update({"score.weight": ["F4", [1], None]}),
        "dtype cannot be 'F4'",
    ),
    "extra of another shape": (
        "v1-bfloat16-extra",
        lambda h: h["extras"]["score.weight"].__setitem__(1, [2, 1]),
        "contradicts the sdelta header",
    ),
    "extra of another dtype": (
        "v1-bfloat16-extra",
        lambda h: h["extras"]["score.weight"].__setitem__(0, "F16"),
        "contradicts the sdelta header",
    ),
    "extra that is a tensor": (
        "v1-rice",
        header_with(extras={"w": ["F32", [0], None]}),
        "'w' is both a sparse tensor and an extra",
    ),
    "extra in a reserved name": (
        "v1-rice",
        header_with(extras={"sdelta.indices": ["U8", [31], "A" * 43]}),
        "this name is reserved",
    ),
    "extra that is not there": (
        "v1-rice",
        header_with(extras={"head": ["F32", [0], None]}),
        "contradicts the sdelta header",
    ),
}


@pytest.mark.parametrize("deceit", list(DECEITS))
def test_lies_in_the_header_are_refused(tmp_path: Path, deceit: str) -> None:
    """Each with a correct digest of the header."""
    name, edit, message = DECEITS[deceit]
    kind = UnsupportedVersionError if deceit == "newer version" else FormatError
    refused(forged(name, edit), tmp_path, message, kind)


INNER = split((FOLDER / "v1-empty.sdelta").read_bytes())[1]
TEXTS = {
    "deep nesting": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "deep objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "a number of 100000 digits": ("1" * 100_000, "an integer of 100000 digits"),
    "NaN": ('{"version":NaN}', "NaN is not JSON"),
    "infinity": ('{"version":-Infinity}', "-Infinity is not JSON"),
    "key twice": ('{"version":1,"version":1}', "the key 'version' stands twice"),
    "inner key twice": ('{"config":{"a":1,"a":2},"version":1}', "the key 'a' stands twice"),
    "not JSON": ("{version:1}", "not JSON at character 1"),
    "nothing": ("", "not JSON"),
    "a list": ("[]", "has no version"),
    "raw control character": ('{"version":"\x01"}', "not JSON"),
    "half a surrogate": (
        json.dumps(INNER | {"config": {"\ud800": 1}}),
        "config: '.ud800' holds a lone surrogate",
    ),
}


@pytest.mark.parametrize("text", list(TEXTS))
def test_texts_that_are_no_header_are_refused(tmp_path: Path, text: str) -> None:
    """Each with a correct digest."""
    inner, message = TEXTS[text]
    refused(joined({"__metadata__": {"sdelta": sealed(inner)}}, b""), tmp_path, message)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        json.dumps(INNER),
        json.dumps({"header": INNER}),
        sealed(json.dumps(INNER))[:-1],
        sealed(json.dumps(INNER)) + " ",
        sealed(json.dumps(INNER)).replace("sha256", "sha512"),
        " " + sealed(json.dumps(INNER)),
    ],
)
def test_a_header_without_its_digest_is_refused(tmp_path: Path, text: str) -> None:
    refused(joined({"__metadata__": {"sdelta": text}}, b""), tmp_path, "digest")


def outer_with(edit: Callable[[dict[str, Any]], object], added: bytes = b"") -> bytes:
    """The golden file v1-rice with `edit` done to its safetensors header alone."""
    data = (FOLDER / "v1-rice.sdelta").read_bytes()
    length = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + length])
    edit(outer)
    return joined(outer, data[8 + length :] + added)


VALUES, INDICES = "sdelta.values.float32", "sdelta.indices"
OUTSIDE: dict[str, tuple[Callable[[dict[str, Any]], object], bytes, str]] = {
    "overlapping ranges": (
        lambda o: o[INDICES].update(data_offsets=[120, 147]),
        b"",
        "overlaps the tensor before it",
    ),
    "the same range twice": (lambda o: o.update(x=o[VALUES]), b"", "overlaps"),
    "a hole": (lambda o: o[INDICES].update(data_offsets=[128, 155]), b"1234", "leaves a hole"),
    "a hole at the start": (
        lambda o: (
            o[VALUES].update(data_offsets=[4, 128]),
            o[INDICES].update(data_offsets=[128, 155]),
        ),
        b"1234",
        "leaves a hole",
    ),
    "a tensor that the header does not describe": (
        lambda o: o.update(x={"dtype": "U8", "shape": [4], "data_offsets": [151, 155]}),
        b"1234",
        "contradicts the sdelta header",
    ),
    "an empty tensor that the header does not describe": (
        lambda o: o.update(x={"dtype": "U8", "shape": [0], "data_offsets": [151, 151]}),
        b"",
        "contradicts the sdelta header",
    ),
    "another dtype": (lambda o: o[VALUES].update(dtype="I32"), b"", "contradicts"),
    "another shape": (lambda o: o[VALUES].update(shape=[1, 31]), b"", "contradicts"),
    "another name": (lambda o: o.update(x=o.pop(INDICES)), b"", "contradicts"),
    "a shape that overflows": (
        lambda o: o[VALUES].update(shape=[2**32, 2**32]),
        b"",
        "too many elements",
    ),
    "a size that does not fit": (lambda o: o[VALUES].update(shape=[30]), b"", "takes 120 bytes"),
    "reversed offsets": (
        lambda o: o[VALUES].update(data_offsets=[124, 0]),
        b"",
        "end before they start",
    ),
    "huge offsets": (lambda o: o[VALUES].update(data_offsets=[0, HUGE]), b"", "lists of integers"),
    "negative offsets": (lambda o: o[VALUES].update(data_offsets=[-4, 120]), b"", "lists of"),
    "true as an offset": (lambda o: o[VALUES].update(data_offsets=[0, True]), b"", "lists of"),
    "fractions": (lambda o: o[VALUES].update(shape=[31.0]), b"", "lists of integers"),
    "a field too many": (lambda o: o[VALUES].update(x=1), b"", "must have exactly"),
    "a field too few": (lambda o: o[VALUES].pop("shape"), b"", "must have exactly"),
    "a dtype that is no text": (lambda o: o[VALUES].update(dtype=4), b"", "dtype is no string"),
    "a tensor that is a list": (lambda o: o.update(x=[]), b"", "must have exactly"),
    "a second metadata key": (
        lambda o: o["__metadata__"].update(format="pt"),
        b"",
        "has 'sdelta' as its only metadata key",
    ),
    "metadata that is no string": (
        lambda o: o["__metadata__"].update(x=1),
        b"",
        "must map names to strings",
    ),
    "no metadata": (lambda o: o.pop("__metadata__"), b"", "not an .sdelta file"),
}


@pytest.mark.parametrize("deceit", list(OUTSIDE))
def test_lies_in_the_safetensors_header_are_refused(tmp_path: Path, deceit: str) -> None:
    edit, added, message = OUTSIDE[deceit]
    refused(outer_with(edit, added), tmp_path, message)


def test_keys_that_stand_twice_are_refused(tmp_path: Path) -> None:
    """Parsers disagree about which one counts."""
    data = (FOLDER / "v1-rice.sdelta").read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].decode().rstrip()
    for part in (
        '"sdelta.indices":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},',
        '"__metadata__":{},',
    ):
        at = text.index('"sdelta.values')
        twice = joined(text[:at] + part + text[at:], data[8 + length :])
        refused(twice, tmp_path, "stands twice in one JSON object")


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (2**64 - 1, "more than 100000000"),
        (100_000_001, "more than 100000000"),
        (100_000_000, "the header needs 100000008 bytes"),
        (0, "does not begin with"),
        (1, "not JSON"),
        (30, "not JSON"),
    ],
)
def test_lying_header_lengths_are_refused(tmp_path: Path, length: int, message: str) -> None:
    data = (FOLDER / "v1-rice.sdelta").read_bytes()
    refused(length.to_bytes(8, "little") + data[8:], tmp_path, message)
