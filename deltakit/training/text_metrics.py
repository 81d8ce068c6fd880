"""Scores of texts that a model wrote against references; several references per text may be right.

Every score is a mean over the texts, from 0 to 1, but for BLEU, which is of the corpus and goes
from 0 to 100 as everywhere.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

from deltakit.training.bleu import corpus_bleu

Score = Callable[[Sequence[str], Sequence[Sequence[str]]], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MARKED = re.compile(r"(?:answer:|####)[ \t]*([^\n]*)", re.IGNORECASE)
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)(?:/\d+)?")


def score_texts(
    names: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """The named scores of texts, each with one reference or more."""
    return {name: TEXT_METRICS[name](texts, references) for name in names}


def _mean_of_best(score: Callable[[str, str], float]) -> Score:
    def mean(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        pairs = zip(texts, references, strict=True)
        return sum(max(score(text, r) for r in known) for text, known in pairs) / len(texts)

    return mean


def exact_match(text: str, reference: str) -> float:
    """1 where the texts are equal but for white space around them."""
    return float(text.strip() == reference.strip())


def same_answer(text: str, reference: str) -> float:
    """1 where the answers in both texts agree: as numbers where the reference's is one.

    A number is compared by its value (1,000 = 1000.0 = $1000), other answers without regard to
    case, punctuation and articles.
    """
    found, expected = extract_answer(text), extract_answer(reference)
    number = _value(expected)
    if number is None:
        return float(_plain(found) == _plain(expected))
    numbers = _NUMBER.findall(found)
    return float(bool(numbers) and _value(numbers[-1]) == number)


def extract_answer(text: str) -> str:
    r"""The last \boxed{...}, else what follows the last "answer:" or "####" on its line, else
    the last number, else the whole text.
    """
    boxed = _boxed(text)
    if boxed is not None:
        return boxed.strip()
    marked = _MARKED.findall(text)
    if marked:
        return str(marked[-1]).strip()
    numbers = _NUMBER.findall(text)
    return str(numbers[-1]) if numbers else text.strip()


def _boxed(text: str) -> str | None:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    first = start + len(r"\boxed{")
    depth = 1
    for at in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[first:at]
    return None


def _value(text: str) -> Fraction | None:
    digits = text.strip().strip("$%").rstrip(".").replace(",", "")
    try:
        return Fraction(digits)
    except (ValueError, ZeroDivisionError):
        return None


def qa_f1(text: str, reference: str) -> float:
    """Token F1 after SQuAD's normalisation (Rajpurkar et al., 2016); empty only matches empty."""
    found, expected = _plain(text).split(), _plain(reference).split()
    return _f1((Counter(found) & Counter(expected)).total(), len(found), len(expected))


def _plain(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin, "ROUGE", 2004), without stemming."""
    found, expected = (re.findall("[a-z0-9]+", side.lower()) for side in (text, reference))
    return _f1(_common(found, expected), len(found), len(expected)) if found or expected else 0.0


def _common(left: list[str], right: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for at, other in enumerate(right, start=1):
            above = row[at]
            row[at] = diagonal + 1 if word == other else max(above, row[at - 1])
            diagonal = above
    return row[-1]


def _f1(common: int, found: int, expected: int) -> float:
    if not found or not expected:
        return float(found == expected)
    return 2 * common / (found + expected)


TEXT_METRICS: dict[str, Score] = {
    "exact_match": _mean_of_best(exact_match),
    "answer": _mean_of_best(same_answer),
    "qa_f1": _mean_of_best(qa_f1),
    "bleu": corpus_bleu,
    "rouge_l": _mean_of_best(rouge_l),
}
