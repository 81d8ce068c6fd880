"""The Python of docs/live.md works as it stands, block after block."""

from __future__ import annotations

import copy
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from batched_lab import delta_of, inputs_of, model_of

import deltakit as dk

PAGE = Path(__file__).parents[1] / "docs" / "live.md"
BLOCKS = re.findall(
    r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_of("gpt2")
    before = copy.deepcopy(model.state_dict())
    for seed, name in enumerate(["a", "b", "c", "news", "legal"]):
        dk.save(delta_of(model, seed), f"{name}.sdelta")
    trained = torch.nn.Linear(6, 5).bfloat16()
    served = copy.deepcopy(trained)
    known: dict[str, Any] = {
        "dk": dk,
        "torch": torch,
        "model": model,
        "trained": trained,
        "served": served,
    }
    known["inputs"] = inputs_of("gpt2", rows=3)
    for block in BLOCKS:
        step = "torch.nn.init.ones_(trained.bias)"  # where the page leaves a training step out
        (tmp_path / "block.py").write_text(block.replace("...  ", step, 1))
        known = runpy.run_path(str(tmp_path / "block.py"), known)
    assert len(BLOCKS) == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(served.bias, torch.ones(5, dtype=torch.bfloat16))
