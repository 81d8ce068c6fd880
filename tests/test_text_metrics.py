"""Scores of written texts: worked out by hand, or taken from the reference scorers."""

from __future__ import annotations

import pytest

from deltakit.training.bleu import corpus_bleu, tokens_13a
from deltakit.training.text_metrics import (
    TEXT_METRICS,
    exact_match,
    extract_answer,
    qa_f1,
    rouge_l,
    same_answer,
    score_texts,
)


@pytest.mark.parametrize(
    ("texts", "references", "expected"),
    [
        # the last column is what sacrebleu 2.6.0 prints for the same texts
        (
            ["The cat sat on the mat.", "There is 1,000 dogs & cats!"],
            [["The cat sat on a mat.", "A cat was on the mat."], ["There are 1,000 dogs & cats."]],
            61.67004253507798,
        ),
        (["the cat ran off to town"], [["the cat sat in the big town"]], 15.207218222740094),
        (["the cat"], [["the dog sat here now"]], 0.0),
        (["", ""], [["a"], ["b"]], 0.0),
        (["the cat sat on the mat"], [["the cat sat on the mat"]], 100.0),
    ],
)
def test_bleu(texts: list[str], references: list[list[str]], expected: float) -> None:
    """Of the corpus, several references, smoothed, with the penalty for short texts."""
    assert corpus_bleu(texts, references) == pytest.approx(expected, abs=1e-9)


def test_bleu_of_a_corpus_is_no_mean() -> None:
    """Counts are summed first."""
    texts, known = ["a b c d e", "x"], [["a b c d e"], ["y"]]
    apart = [corpus_bleu([t], [k]) for t, k in zip(texts, known, strict=True)]
    assert apart == [pytest.approx(100.0), 0.0]
    together = 100 * (5 / 6 * 1 * 1 * 1) ** 0.25
    assert corpus_bleu(texts, known) == pytest.approx(together)


def test_tokens_of_bleu() -> None:
    """Punctuation stands alone, but for points and commas within numbers."""
    assert tokens_13a('It\'s 3.5 &amp; 1,000, "no".') == [
        *("It's", "3.5", "&", "1,000", ",", '"', "no", '"', ".")
    ]
    assert tokens_13a("1980-90 well-known") == ["1980", "-", "90", "well-known"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} or \boxed{\frac{1}{2}} .", r"\frac{1}{2}"),
        ("it has 3. Answer: Paris, of course\nand 7", "Paris, of course"),
        ("8 and 4 make\n#### 12", "12"),
        ("first 3, then 1,234.5 in 2 days, -7", "-7"),
        ("10-5", "5"),
        (" Paris ", "Paris"),
    ],
)
def test_answers_are_found(text: str, answer: str) -> None:
    """Boxed first, then marked, then the last number, then the whole text."""
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("that makes $1,000.", "#### 1000.0", True),
        ("Answer: 12 apples", "12", True),
        ("0.5", "1/2", True),
        ("50%", "50", True),
        ("13", "12", False),
        ("none", "12", False),
        ("1/0", "0", False),
        ("answer: The Paris!", "paris", True),
        ("London", "paris", False),
    ],
)
def test_answers_are_compared_by_value(text: str, reference: str, same: bool) -> None:
    """Numbers as numbers, others without case, punctuation and articles."""
    assert same_answer(text, reference) == float(same)


def test_qa_f1() -> None:
    """2 of 3 words found, 2 of 2 expected; articles and punctuation do not count."""
    assert qa_f1("the big red cat", "A Red, cat.") == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert qa_f1("the", "a") == 1.0
    assert qa_f1("", "cat") == 0.0
    assert qa_f1("cat cat", "cat dog") == pytest.approx(0.5)


def test_rouge_l() -> None:
    """police killed the gunman: 3 words of 4 and 4 in common order (Lin, 2004, section 3.1)."""
    reference = "police killed the gunman"
    assert rouge_l("police kill the gunman", reference) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", reference) == pytest.approx(2 / 4)
    assert rouge_l("", "") == 0.0


def test_exact_match_is_strict() -> None:
    """But for white space around."""
    assert exact_match(" yes\n", "yes") == 1.0
    assert exact_match("Yes", "yes") == 0.0


def test_the_best_reference_counts() -> None:
    """Per text, and the mean over texts."""
    found = score_texts(
        [n for n in TEXT_METRICS if n != "bleu"], ["red cat", "x"], [["dog", "red cat"], ["y"]]
    )
    assert found == {"exact_match": 0.5, "answer": 0.5, "qa_f1": 0.5, "rouge_l": 0.5}
