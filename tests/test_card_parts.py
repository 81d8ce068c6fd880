"""Parts of networks told by names agree with roles told by the modules of live models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from deltakit.formats.checkpoint import Checkpoint
from deltakit.targets.parts import PARTS, part_of
from deltakit.targets.roles import ATTENTION, roles

OF_ROLE = {"mlp": "feed-forward", "embedding": "embeddings", "norm": "norms", "bias": "biases"}
OF_ROLE |= dict.fromkeys((*ATTENTION, "qkv"), "attention")


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (tiny_models.write_bert, AutoModelForSequenceClassification),
        (tiny_models.write_gpt2, AutoModelForCausalLM),
        (tiny_models.write_llama, AutoModelForCausalLM),
        (tiny_models.write_t5, AutoModelForSeq2SeqLM),
        (tiny_models.write_vit, AutoModel),
        (tiny_models.write_resnet, AutoModel),
    ],
)
def test_parts_are_roles(tmp_path: Path, write: Callable[[Path], Path], kind: type) -> None:
    model = kind.from_pretrained(write(tmp_path))
    found = roles(model)
    for name, parameter in model.named_parameters():
        assert part_of(name, parameter.ndim) == OF_ROLE.get(found[name].kind, "other"), name
    stored = Checkpoint(tmp_path).tensors.values()
    assert {part_of(info.name, len(info.shape)) for info in stored} <= set(PARTS)


def test_names_without_owners() -> None:
    assert part_of("w", 2) == part_of("", 0) == "other"
    assert part_of("bias", 1) == "biases"
