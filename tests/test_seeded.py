"""Seeded supports: known answers, so that they stay the same on every platform for ever."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakit.errors import DeltaError
from deltakit.formats.seeded import philox_words, seeded_support

ONES = 2**64 - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as the paper defines it (Salmon et al. 2011), in plain integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c[2], 2**64)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) & ONES, (k[1] + 0xBB67AE8584CAA73B) & ONES]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # kat_vectors of Random123
        (
            [0, 0, 0, 0],
            [0, 0],
            [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B],
        ),
        (
            [ONES, ONES, ONES, ONES],
            [ONES, ONES],
            [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0],
        ),
        (
            [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89],
            [0x452821E638D01377, 0xBE5466CF34E90C6C],
            [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6],
        ),
    ],
)
def test_known_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    """Of the definition above and of NumPy, which counts up before each block."""
    assert philox(counter, key) == answer
    whole = (sum(word << 64 * i for i, word in enumerate(counter)) - 1) % 2**256
    before = np.array([whole >> 64 * i & ONES for i in range(4)], np.uint64)
    generator = np.random.Philox(counter=before, key=np.array(key, np.uint64))
    assert generator.random_raw(4).tolist() == answer


@pytest.mark.parametrize("stream", ["", "support"])
def test_words_are_those_of_the_specification(stream: str) -> None:
    text = f"sdelta philox4x64-10\0{stream}\x0042\0encoder.é.weight".encode()
    digest = hashlib.sha256(text).digest()
    key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")]
    expected = [word for block in (1, 2, 3) for word in philox([block, 0, 0, 0], key)]
    assert philox_words(42, "encoder.é.weight", 10, stream).tolist() == expected[:10]


@pytest.mark.parametrize(
    ("seed", "name", "numel", "count", "expected"),
    [
        (0, "w", 100, 5, [5, 18, 80, 90, 91]),
        (
            2**64 - 1,
            "model.layers.0.mlp.up_proj.weight",
            2**40,
            4,
            [122863755199, 556635321504, 622968015828, 958045133190],
        ),
        (1, "w", 10, 8, [0, 1, 2, 3, 4, 5, 6, 8]),
    ],
)
def test_golden_supports(seed: int, name: str, numel: int, count: int, expected: list[int]) -> None:
    assert seeded_support(seed, name, numel, count).tolist() == expected


@given(st.integers(0, ONES), st.integers(1, 300), st.data())
def test_supports_are_the_first_distinct_draws(seed: int, numel: int, data: st.DataObject) -> None:
    """Against the definition, one draw at a time."""
    count = data.draw(st.integers(0, numel))
    wanted = min(count, numel - count)
    width = (numel - 1).bit_length()
    drawn: dict[int, None] = {}
    if wanted:
        for word in philox_words(seed, "w", 40 * numel + 400, "support").tolist():
            index = word >> (64 - width)
            if index < numel and len(drawn) < wanted:
                drawn[index] = None
    assert len(drawn) == wanted
    complement = 2 * count > numel
    expected = [i for i in range(numel) if (i in drawn) != complement]
    assert seeded_support(seed, "w", numel, count).tolist() == expected


def test_every_element_is_equally_likely() -> None:
    """Chi-square over 10 elements, 4000 supports of 3: far above chance would be above 30."""
    hits = np.zeros(10)
    for seed in range(4000):
        hits[seeded_support(seed, "w", 10, 3)] += 1
    chi_square = ((hits - 1200) ** 2 / (1200 * 0.7)).sum()
    assert chi_square < 30


def test_other_names_and_other_seeds_give_other_supports() -> None:
    made = {
        tuple(seeded_support(seed, name, 10**6, 20).tolist())
        for seed in range(5)
        for name in ("a", "b", "layers.1", "layers.11")
    }
    assert len(made) == 20


def test_half_of_a_large_tensor() -> None:
    """The longest chase after distinct draws."""
    found = seeded_support(3, "w", 200_001, 100_000)
    assert len(found) == 100_000
    assert (np.diff(found) > 0).all()
    assert found[0] >= 0
    assert found[-1] < 200_001


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(DeltaError, match="cannot draw 5 of 4 elements"):
        seeded_support(0, "w", 4, 5)
    for seed in (-1, 2**64):
        with pytest.raises(DeltaError, match=f"seed {seed} is not within"):
            philox_words(seed, "w", 1)
    with pytest.raises(DeltaError, match="NUL"):
        philox_words(0, "w", 1, "a\0b")
