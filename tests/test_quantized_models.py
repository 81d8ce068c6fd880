"""Laws of merging into models that transformers has quantised."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from merge_reference import adding, only
from quantized_lab import dequantize
from safetensors.torch import load_file
from tiny_models import write_gpt2, write_llama

from deltakit.errors import BaseMismatchError, CoordinateError
from deltakit.merging.merge import merge


@pytest.mark.parametrize("scheme", ["nf4-double", "fp4", "int8"])
def test_folders_of_transformers(tmp_path: Path, scheme: str) -> None:
    """A model that transformers saved quantised is merged into, and read back as predicted."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if scheme == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=scheme[:3],
            bnb_4bit_use_double_quant=scheme.endswith("double"),
        )
    )
    plain, base, out = (tmp_path / name for name in ("plain", "base", "out"))
    model = AutoModelForCausalLM.from_pretrained(
        write_llama(plain), quantization_config=settings, dtype=torch.bfloat16
    )
    model.save_pretrained(base)
    name = "model.layers.1.mlp.down_proj.weight"
    delta = adding(name, np.zeros((16, 32), ml_dtypes.bfloat16), np.random.default_rng(1), 20)
    with pytest.raises(BaseMismatchError, match=f"bitsandbytes {scheme[:3]}"):
        merge(base, only(delta), out)
    report = merge(base, only(delta), out, requantize=True)
    before, after = (load_file(each / "model.safetensors") for each in (base, out))
    weight, merged = dequantize(dict(before), name), dequantize(dict(after), name)
    assert report.survival is not None
    moved = (weight != merged).reshape(-1)
    assert report.survival.survived == int(moved[torch.from_numpy(delta.indices)].sum()) > 0
    read = AutoModelForCausalLM.from_pretrained(out)
    layer = read.model.layers[1].mlp.down_proj
    assert torch.equal(dequantize(dict(layer.state_dict(prefix="w."))), merged)
    assert torch.isfinite(read(torch.arange(6)[None]).logits).all()


def test_transposed_layers_are_refused(tmp_path: Path) -> None:
    """transformers quantises Conv1D weights transposed; of a square one the shape does not tell."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain, base = tmp_path / "plain", tmp_path / "base"
    settings = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(write_gpt2(plain), quantization_config=settings)
    model.save_pretrained(base)
    zeros = np.zeros((16, 16), np.float32)
    delta = adding("transformer.h.0.attn.c_proj.weight", zeros, np.random.default_rng(0), 5)
    with pytest.raises(CoordinateError, match="quantised transposed"):
        merge(base, only(delta), tmp_path / "out", requantize=True)
