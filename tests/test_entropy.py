"""The entropy bound agrees with exact binomial coefficients."""

from __future__ import annotations

from math import comb, log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakit.entropy import support_bits


@given(st.integers(0, 4000), st.data())
def test_equals_the_exact_binomial(numel: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, numel))
    assert support_bits(numel, count) == pytest.approx(log2(comb(numel, count)), rel=1e-12)


@pytest.mark.parametrize(
    ("numel", "count"), [(10**6, 1000), (10**9, 5000), (2**40, 3000), (2**62, 1000)]
)
def test_stays_exact_where_log_factorials_cancel(numel: int, count: int) -> None:
    assert support_bits(numel, count) == pytest.approx(log2(comb(numel, count)), rel=1e-12)


def test_the_bound_at_one_per_mille_is_the_known_figure() -> None:
    """About 11.41 bits per index at a density of 0.1 %."""
    assert support_bits(10**9, 10**6) / 10**6 == pytest.approx(11.41, abs=0.005)
