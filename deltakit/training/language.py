"""What the tasks of language models share: scoring tokens, writing texts, choosing options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from deltakit.dtypes import Array
from deltakit.errors import ConfigError, DataError
from deltakit.training.metrics import LANGUAGE, language_metrics
from deltakit.training.task import IGNORED, Example, Live, TaskSettings
from deltakit.training.text_metrics import score_texts

_CHOICE = ("accuracy", "accuracy_norm")


@dataclass(frozen=True)
class TextRows:
    """The rows of one split. prompts: texts, chats, or nothing for plain text.

    answers: per row the texts that are right, of which the first is learnt. options, right: per
    row the texts to choose from and the place of the right one; empty where there is no choice.
    """

    prompts: Sequence[Any]
    answers: Sequence[Sequence[str]]
    options: Sequence[Sequence[str]] = ()
    right: Sequence[int] = ()

    @classmethod
    def of_choices(
        cls, prompts: Sequence[str], options: Sequence[Sequence[str]], right: Sequence[int]
    ) -> TextRows:
        """Rows to choose from; the right option is the answer."""
        answers = [[texts[place]] for texts, place in zip(options, right, strict=True)]
        return cls(prompts, answers, options, right)


@dataclass(frozen=True)
class TextProblem(ABC):
    """Texts to write. form: what the rows are, for messages; rows: split -> its rows."""

    form: str
    rows: Mapping[str, TextRows]
    settings: TaskSettings
    notes: Sequence[str]

    inputs = "texts"
    model_class: ClassVar[str]
    first_label: ClassVar[int] = 0  # the first label that is predicted

    @property
    def metric_names(self) -> Sequence[str]:
        """Accuracy first where options are chosen from, else loss; generated ones come last."""
        chosen = _CHOICE if self._is_choice() else ()
        return (*chosen, *LANGUAGE, *self.settings.generate_metrics)

    @property
    def config_changes(self) -> Mapping[str, Any]:
        """None: the base's own head is used."""
        return {}

    @abstractmethod
    def encode_rows(self, tokenizer: Any, longest: int, rows: TextRows) -> list[Example]:
        """What is learnt of the rows: token ids and labels."""

    @abstractmethod
    def encode_options(
        self, tokenizer: Any, longest: int, prompts: Sequence[str], options: Sequence[str]
    ) -> list[Example]:
        """Prompts with one option each, without the end token; only the option counts."""

    @abstractmethod
    def encode_prompts(
        self, tokenizer: Any, longest: int, prompts: Sequence[Any]
    ) -> list[list[int]]:
        """Token ids of the prompts that the model writes on from."""

    def encode(self, processor: Any, longest: int) -> dict[str, list[Example]]:
        """Token ids and labels of every row.

        Raises DataError for a split in which no token counts, ConfigError for `max_new_tokens`
        that leave no room for a prompt.
        """
        if self.settings.generate_metrics:
            for rows in self.rows.values():  # only to say now what is wrong with them
                self.encode_prompts(processor, longest, rows.prompts)
        encoded = {s: self.encode_rows(processor, longest, rows) for s, rows in self.rows.items()}
        for split, examples in encoded.items():
            if not any(n != IGNORED for e in examples for n in e["labels"][self.first_label :]):
                raise DataError(f"{split} split: no token is left to learn from")
        return encoded

    def reduce(self, logits: Any, labels: Any) -> Any:
        """[batch, tokens, vocabulary], [batch, tokens] -> float64 [batch, 3]; see `token_sums`."""
        return token_sums(logits, labels)

    def metrics(self, reduced: Array, labels: Array) -> dict[str, float]:
        """Loss, perplexity and token accuracy over all tokens that count."""
        return language_metrics(reduced)

    def live_metrics(self, split: str, live: Live) -> dict[str, float]:
        """Accuracy among the options, and the scores of generated texts, where asked for."""
        rows = self.rows[split]
        found = self._choose(rows, live) if self._is_choice() else {}
        if self.settings.generate_metrics:
            found |= self._generate(rows, live)
        return found

    def tell(self, reduced: Array, label: Any) -> dict[str, Any]:
        """Summed negative log-likelihood, tokens predicted right, and tokens that count."""
        loss, right, count = reduced
        return {"loss_sum": float(loss), "right": int(right), "tokens": int(count)}

    def _is_choice(self) -> bool:
        return any(rows.right for rows in self.rows.values())

    def _choose(self, rows: TextRows, live: Live) -> dict[str, float]:
        """Accuracy of the likeliest option: by its log-likelihood, and by that per UTF-8 byte.

        As Brown et al., "Language Models are Few-Shot Learners" (2020), section 2.4, with bytes
        for tokens, so that tokenizers compare; the first of equals is chosen.
        """
        from deltakit.training.collate import Collator
        from deltakit.training.predict import predict

        counts = [len(options) for options in rows.options]
        options = [option for every in rows.options for option in every]
        prompts = [p for p, count in zip(rows.prompts, counts, strict=True) for _ in range(count)]
        examples = self.encode_options(live.processor, live.longest, prompts, options)
        scored = predict(
            live.model,
            self,
            examples,
            Collator.of(live.model, live.processor),
            batch_size=live.batch_size,
            mixed_precision=live.mixed_precision,
        )
        likelihood = -scored.reduced[:, 0]
        sizes = np.array([len(option.encode()) for option in options])
        starts = np.cumsum([0, *counts[:-1]])
        found = {}
        for name, values in zip(_CHOICE, (likelihood, likelihood / sizes), strict=True):
            best = [int(v.argmax()) for v in np.split(values, starts[1:])]
            found[name] = float(np.mean(np.equal(best, rows.right)))
        return found

    def _generate(self, rows: TextRows, live: Live) -> dict[str, float]:
        from deltakit.training.generation import generate_texts

        prompts = self.encode_prompts(live.processor, live.longest, rows.prompts)
        texts = generate_texts(live, prompts, self.settings.max_new_tokens)
        return score_texts(self.settings.generate_metrics, texts, rows.answers)


def token_sums(logits: Any, labels: Any) -> Any:
    """[batch, tokens, vocabulary], [batch, tokens] -> float64 [batch, 3].

    Per example the summed negative log-likelihood of the labels in nats, how many of them have the
    highest logit, and how many count.
    """
    counts = labels != IGNORED
    target = labels.where(counts, 0)
    scores = logits.float()
    chosen = scores.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    surprise = (scores.logsumexp(-1) - chosen).double() * counts
    right = (scores.argmax(-1) == target) & counts
    sums = surprise.new_empty(len(surprise), 3)
    sums[:, 0], sums[:, 1], sums[:, 2] = surprise.sum(1), right.sum(1), counts.sum(1)
    return sums


def without_end(tokenizer: Any, tokens: list[int]) -> list[int]:
    """Tokens less their end token; some tokenizers end every text by themselves."""
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return tokens[:-1] if tokens and tokens[-1] in ends and tokens[-1] is not None else tokens


def with_end(tokenizer: Any, tokens: list[int]) -> list[int]:
    """Tokens and the end token, where the tokenizer has one."""
    return tokens if tokenizer.eos_token_id is None else [*tokens, tokenizer.eos_token_id]


def room_for_prompt(longest: int, max_new_tokens: int) -> int:
    """Tokens left for a prompt before what is generated; ConfigError when there are none."""
    if max_new_tokens >= longest:
        raise ConfigError(
            f"setting max_new_tokens: {max_new_tokens} leave no room for a prompt within {longest} "
            "tokens (max_length, or what the model takes); lower it"
        )
    return longest - max_new_tokens
