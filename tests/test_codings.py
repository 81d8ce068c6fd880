"""Laws of every index coding. A new coding adds one row to `SUPPORTS` and is held to all of them."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakit.dtypes import Array
from deltakit.entropy import support_bits
from deltakit.errors import FormatError
from deltakit.formats import bits, rice
from deltakit.formats.coding import Place
from deltakit.formats.codings import CODINGS, choose, decode
from deltakit.formats.seeded import seeded_support

Case = tuple[tuple[int, ...], list[int], int | None]  # shape, indices, seed


def seeded_case(shape: tuple[int, ...], count: int, seed: int = 7) -> Case:
    return shape, seeded_support(seed, "w", prod(shape), count).tolist(), seed


BIG = 2**33
SUPPORTS: dict[str, list[Case]] = {
    "seeded": [seeded_case((5, 8), n) for n in (0, 1, 13, 20, 21, 40)] + [seeded_case((BIG,), 9)],
    "dense": [((), [0], None), ((3, 2), [0, 1, 2, 3, 4, 5], None), ((0, 4), [], None)],
    "rows": [
        ((5, 3), [3, 4, 5, 12, 13, 14], None),
        ((2, 3, 2), [6, 7, 8, 9, 10, 11], None),
        ((BIG, 2), [0, 1, 2 * BIG - 2, 2 * BIG - 1], None),
        ((4, 1), [0, 3], None),
    ],
    "columns": [
        ((4, 5), [1, 4, 6, 9, 11, 14, 16, 19], None),
        ((2, 2, 3), [0, 3, 6, 9], None),
        ((2, BIG), [5, BIG - 1, BIG + 5, 2 * BIG - 1], None),
    ],
    "runs": [
        ((100,), list(range(10, 30)) + list(range(40, 41)) + list(range(60, 100)), None),
        ((BIG,), list(range(BIG - 7, BIG)), None),
        ((7, 3), list(range(2, 9)), None),
    ],
    "bitmap": [((), [0], None), ((9,), [0, 8], None), ((4, 4), [1, 2, 4, 7, 8, 11, 13, 14], None)],
    "rice": [
        ((), [], None),
        ((), [0], None),
        ((0,), [], None),
        ((1000,), [999], None),
        ((30, 40), [0, 1, 17, 200, 201, 900, 1199], None),
        ((2**31, 2**30), [0, 1, 2**40, 2**61 - 1], None),
        ((2**61, 2), [2**62 - 1], None),
    ],
}
CASES = [(name, case) for name, cases in SUPPORTS.items() for case in cases]
every_case = pytest.mark.parametrize(("name", "case"), CASES)


def written(name: str, case: Case) -> tuple[Array, Place, bytes]:
    """The indices of `case`, their place, and their bytes in coding `name`."""
    shape, listed, seed = case
    indices = np.array(listed, np.int64)
    place = Place("w", shape, len(indices), seed, "file: tensor 'w'")
    offer = CODINGS[name].offer(indices, place)
    assert offer is not None
    data = offer.encode()
    assert offer.size == len(data)
    assert offer.encode() == data
    return indices, place, data


def is_support(indices: Array, place: Place) -> bool:
    """Whether `indices` are what every reader may rely on."""
    listed = indices.tolist()
    rising = all(a < b for a, b in pairwise(listed))
    inside = not listed or (listed[0] >= 0 and listed[-1] < place.numel)
    return indices.dtype == np.int64 and len(listed) == place.count and rising and inside


def test_every_registered_coding_has_a_row() -> None:
    assert set(SUPPORTS) == set(CODINGS.names())


@every_case
def test_decoding_gives_the_indices_back(name: str, case: Case) -> None:
    indices, place, data = written(name, case)
    found = decode(name, data, place)
    assert found.tolist() == indices.tolist()
    assert is_support(found, place)


@every_case
def test_missing_and_added_bytes_are_refused(name: str, case: Case) -> None:
    _, place, data = written(name, case)
    for changed in [data[:n] for n in range(len(data))] + [data + b"\0", data + b"\x80"]:
        with pytest.raises(FormatError, match="file: tensor 'w'"):
            decode(name, changed, place)


@every_case
def test_flipped_bits_give_an_error_or_a_valid_support(name: str, case: Case) -> None:
    _, place, data = written(name, case)
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found = decode(name, bytes(changed), place)
        except FormatError:
            continue
        assert is_support(found, place)
        assert found.tolist() != case[1], "two encodings of one support"


@every_case
@pytest.mark.parametrize("change", [-1, 1, 5, 2**40])
def test_a_wrong_count_gives_an_error_or_a_valid_support(
    name: str, case: Case, change: int
) -> None:
    """2^40 entries are refused before memory is taken for them."""
    _, place, data = written(name, case)
    count = place.count + change
    if not 0 <= count <= place.numel or (name in ("seeded", "dense", "rice") and count > 2**39):
        return  # the header forbids it: values bound the count that these may be given
    wrong = Place(place.name, place.shape, count, place.seed, place.where)
    tracemalloc.start()
    try:
        assert is_support(decode(name, data, wrong), wrong)
    except FormatError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**20


@every_case
def test_a_smaller_tensor_gives_an_error_or_a_valid_support(name: str, case: Case) -> None:
    _, place, data = written(name, case)
    for axis in range(len(place.shape)):
        shape = tuple(n - (i == axis) for i, n in enumerate(place.shape))
        wrong = Place(place.name, shape, place.count, place.seed, place.where)
        if min(shape) < 0 or wrong.numel < place.count:
            continue
        try:
            assert is_support(decode(name, data, wrong), wrong)
        except FormatError:
            continue


@st.composite
def supports(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int]]:
    """Any shape of up to 2^62 elements, and a support of up to 80 of them, clustered or not."""
    shape = draw(
        st.one_of(
            st.lists(st.integers(0, 12), max_size=3).map(tuple),
            st.tuples(st.integers(1, 2**31), st.integers(1, 2**31)),
        )
    )
    numel = prod(shape)
    if not numel:
        return shape, []
    near = draw(st.integers(0, numel - 1))
    element = st.one_of(
        st.integers(0, numel - 1), st.integers(near, min(numel - 1, near + 60)), st.just(numel - 1)
    )
    return shape, sorted(draw(st.sets(element, max_size=min(80, numel))))


@given(supports())
def test_all_codings_that_offer_agree_and_the_smallest_is_chosen(
    case: tuple[tuple[int, ...], list[int]],
) -> None:
    shape, listed = case
    indices, place = np.array(listed, np.int64), Place("w", shape, len(listed))
    sizes = {}
    for record in CODINGS:
        if record.name == "bitmap" and place.numel > 2**20:
            continue  # it would take the bytes it offers
        offer = record.target.offer(indices, place)
        if offer is not None:
            data = offer.encode()
            sizes[record.name] = len(data)
            assert offer.size == len(data)
            assert record.target.decode(data, place).tolist() == listed
    name, chosen = choose(indices, place)
    assert chosen.size == min(sizes.values())
    assert sizes[name] == chosen.size


@given(st.lists(st.integers(0, 2**62 - 1), unique=True, max_size=30).map(sorted))
def test_rice_is_what_the_specification_says(listed: list[int]) -> None:
    """Against the definition, written with strings of bits."""
    if not listed:
        return
    data = rice.offer_set(np.array(listed, np.int64)).encode()
    b = data[0]
    gaps = [s - last - 1 for s, last in zip(listed, [-1, *listed], strict=False)]
    unary = "".join("0" * (g >> b) + "1" for g in gaps)
    remainders = "".join(f"{g & (2**b - 1):0{b}b}" for g in gaps) if b else ""
    assert data == bytes([b]) + to_bytes(unary) + to_bytes(remainders)
    costs = {c: sum((g >> c) + 1 + c for g in gaps) for c in range(63)}
    assert costs[b] == min(costs.values())


@given(st.integers(1, 63), st.data())
def test_bit_fields_are_what_the_specification_says(width: int, data: st.DataObject) -> None:
    fields = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=40))
    packed = bits.pack(np.array(fields, np.int64), width)
    assert packed == to_bytes("".join(f"{field:0{width}b}" for field in fields))
    assert bits.unpack(packed, len(fields), width, "x").tolist() == fields


def test_bit_fields_of_several_blocks() -> None:
    fields = np.arange(8 * 8192 * 2 + 3, dtype=np.int64) % 8191
    assert np.array_equal(bits.unpack(bits.pack(fields, 13), len(fields), 13, "x"), fields)


def test_bits_behind_the_last_field_are_refused() -> None:
    with pytest.raises(FormatError, match="x: the padding bits behind the last field are not zero"):
        bits.unpack(b"\xff\xc1", 2, 5, "x")
    with pytest.raises(FormatError, match="x: 2 fields of 5 bits take 2 bytes, found 3"):
        bits.unpack(b"\xff\xc0\x00", 2, 5, "x")


def to_bytes(text: str) -> bytes:
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


@pytest.mark.parametrize("density", [1e-5, 3e-5, 1e-4, 1e-3, 5e-3, 1e-2, 3e-2, 6e-2, 1e-1])
def test_indices_cost_at_most_a_fortieth_more_than_entropy(density: float) -> None:
    """Uniform supports; 6 % lies where a power of two fits the gaps worst."""
    count = 100_000
    numel = round(count / density)
    indices = uniform(np.random.default_rng(0), numel, count)
    _, offer = choose(indices, Place("w", (numel,), count))
    assert 8 * offer.size <= 1.025 * support_bits(numel, count)


def uniform(rng: np.random.Generator, numel: int, count: int) -> Array:
    drawn = np.unique(rng.integers(0, numel, count + count // 5 + 100))
    return np.sort(rng.permutation(drawn)[:count])


@pytest.mark.parametrize(
    ("shape", "data", "message"),
    [
        ((10,), b"\x3f\x80", "2 bytes cannot hold 1 Rice coded indices"),  # parameter 63
        ((10,), b"\x00\x00\x08", "beyond the last of 10 elements"),  # quotient 12
        ((10,), b"\x00\x0c", "holds more than 1 entries"),
        ((10,), b"\x00\x00", "holds 0 entries, expected 1"),
        ((10,), b"\x00\x80\x00", "goes on behind its last entry"),
        ((10,), b"\x04\x80\x0f", "padding bits"),
        ((10,), b"\x04\x80\xf0", "beyond the last of 10 elements"),
        ((10,), b"\x3e\x80" + b"\xff" * 7 + b"\xfc", "beyond the last of 10 elements"),
    ],
)
def test_broken_rice_streams_say_what_is_wrong(
    shape: tuple[int, ...], data: bytes, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        decode("rice", data, Place("w", shape, 1, where="file: tensor 'w'"))


def test_sums_beyond_int64_are_refused() -> None:
    """Three remainders of almost 2^62 would wrap around to an index in range."""
    count, b = 5, 62
    fields = bits.pack(np.array([2**62 - 1] * 4 + [3], np.int64), b)
    data = bytes([b]) + b"\xf8" + fields
    with pytest.raises(FormatError, match="beyond the last"):
        decode("rice", data, Place("w", (2**62,), count, where="f"))


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_empty_slices_of_an_enormous_tensor_take_no_memory(name: str) -> None:
    with pytest.raises(FormatError, match="0 entries of shape"):
        decode(name, b"", Place("w", (2**30, 2**30), 0, where="f"))


def test_unknown_codings_are_refused() -> None:
    with pytest.raises(FormatError, match="unknown index coding 'ricee'; nearest: rice"):
        decode("ricee", b"", Place("w", (3,), 0, where="f"))


def test_a_seed_that_does_not_generate_the_indices_is_refused() -> None:
    indices = seeded_support(7, "w", 100, 10)
    assert choose(indices, Place("w", (100,), 10, seed=7))[0] == "seeded"
    with pytest.raises(FormatError, match="seed 8 does not generate these 10 indices"):
        choose(indices, Place("w", (100,), 10, seed=8, where="tensor 'w'"))
