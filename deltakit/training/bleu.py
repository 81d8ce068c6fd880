"""Corpus BLEU, equal to sacrebleu's default (13a tokens, lower case kept, exponential smoothing).

Papineni et al., "BLEU" (2002), equations 1 to 3; smoothing method 3 of Chen and Cherry, "A
Systematic Comparison of Smoothing Techniques for Sentence-Level BLEU" (2014), as in mteval-v13a.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from math import exp, log

_ORDERS = range(1, 5)
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_SPACING = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),  # all punctuation but . , - '
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # . and , stay within numbers only
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def corpus_bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of all texts together, from 0 to 100; several references per text are allowed."""
    right, total = dict.fromkeys(_ORDERS, 0), dict.fromkeys(_ORDERS, 0)
    length = reference_length = 0
    for text, answers in zip(texts, references, strict=True):
        words, known = tokens_13a(text), [tokens_13a(answer) for answer in answers]
        length += len(words)
        reference_length += min(map(len, known), key=lambda n: (abs(n - len(words)), n))
        for order in _ORDERS:
            found, allowed = _ngrams(words, order), Counter[tuple[str, ...]]()
            for other in known:
                allowed |= _ngrams(other, order)
            right[order] += (found & allowed).total()
            total[order] += found.total()
    if not right[1] or not total[4]:
        return 0.0
    logs, halvings = 0.0, 0
    for order in _ORDERS:
        halvings += right[order] == 0
        hits = right[order] or 0.5**halvings
        logs += log(hits / total[order])
    brevity = min(0.0, 1 - reference_length / length)
    return 100 * exp(brevity + logs / len(_ORDERS))


def tokens_13a(text: str) -> list[str]:
    """Tokens of a line as mteval-v13a makes them."""
    line = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        line = line.replace(entity, character)
    line = f" {line} "
    for pattern, spaced in _SPACING:
        line = pattern.sub(spaced, line)
    return line.split()


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[at : at + order]) for at in range(len(words) - order + 1))
