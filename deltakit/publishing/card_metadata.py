"""The metadata of a card: YAML that the Hub reads, by huggingface_hub's own classes.

Fields: "Model Cards" of the Hub's documentation (huggingface.co/docs/hub/model-cards); results are
a model-index, as Papers with Code has them.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from deltakit.publishing.card_facts import Facts, mapping

TAGS = ("deltakit", "sparse-fine-tuning")
_PIPELINES = {
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "causal-lm": "text-generation",
    "seq2seq-lm": "text-generation",  # text2text-generation is gone from the Hub
    "image-classification": "image-classification",
}
_METRICS = {"macro_f1": "f1", "matthews": "matthews_correlation", "token_accuracy": "accuracy"}
_SLUG = re.compile(r"[^\w.-]+", re.ASCII)


def metadata(facts: Facts, theirs: Container[str], more_tags: Sequence[str]) -> ModelCardData:
    """The metadata of a repository of deltas; what is not known is not there.

    theirs: keys that people wrote, which are left to them. more_tags: those that people added.
    Results are those of the main delta.
    """
    pipeline = _PIPELINES.get(facts.task or "")
    base = facts.base_on_hub
    adapter = facts.main.found.header.adapter
    tags = [*TAGS, *([] if adapter is None else [slug(adapter.kind)]), *more_tags]
    measured = [name for name in facts.main.metrics if name != "loss"]
    told: dict[str, Any] = {
        "base_model": None if base is None else base.repo,
        "base_model_relation": None if base is None else "adapter",
        "library_name": "deltakit",
        "pipeline_tag": pipeline,
        "datasets": None if facts.dataset is None else [facts.dataset],
        "metrics": list(dict.fromkeys(_type(name) for name in measured)) or None,
        "tags": tags,
    }
    results = _results(facts, pipeline)
    if results and "model-index" not in theirs:
        told |= {"model_name": facts.repo_id.rpartition("/")[2], "eval_results": results}
    return ModelCardData(**{key: value for key, value in told.items() if key not in theirs})


def slug(text: object) -> str:
    """A text as an identifier of the Hub: letters, digits, dots, dashes; at most 80 characters."""
    return _SLUG.sub("-", str(text)).strip("-.")[:80] or "unknown"


def _results(facts: Facts, pipeline: str | None) -> list[EvalResult]:
    """One result per metric; none without a task and data, which the Hub wants named."""
    data = facts.provenance.get("data") or facts.run.get("data")
    if pipeline is None or not isinstance(data, str):
        return []
    given = mapping(facts.run.get("splits")).get("how") == "given"
    split = facts.settings.get("validation_split") if given else None
    return [
        EvalResult(
            task_type=pipeline,
            dataset_type=facts.dataset or slug(_last(data)),
            dataset_name=facts.dataset or slug(_last(data)),
            dataset_split=slug(split) if isinstance(split, str) else None,
            metric_type=_type(name),
            metric_name=slug(name),
            metric_value=value,
        )
        for name, value in facts.main.metrics.items()
    ]


def _type(metric: str) -> str:
    return _METRICS.get(metric, slug(metric))


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
