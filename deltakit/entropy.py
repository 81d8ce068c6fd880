"""How many bits a support must cost: the yardstick for index codings."""

from __future__ import annotations

from math import comb, log, log1p, log2


def support_bits(numel: int, count: int) -> float:
    """log2 C(numel, count): bits to name one of all supports of `count` entries among `numel`.

    Exact to about 1e-12 relative, for any size: the difference of two log-factorials is taken
    analytically by Stirling's series, because subtracting two values of lgamma loses every digit
    once numel is large.
    """
    count = min(count, numel - count)
    if count <= 0:
        return 0.0
    if count <= 256:
        return log2(comb(numel, count))
    rest = numel - count
    # ln(numel! / rest!), both at least 256
    falling = (numel + 0.5) * -log1p(-count / numel) + count * (log(rest) - 1.0)
    falling += _series(numel) - _series(rest)
    # ln count!
    factorial = count * (log(count) - 1.0) + 0.5 * log(6.283185307179586 * count) + _series(count)
    return (falling - factorial) / log(2.0)


def _series(n: int) -> float:
    """Stirling's correction to ln n!, to the order n^-5."""
    return 1 / (12 * n) - 1 / (360 * n**3) + 1 / (1260 * n**5)
