"""Where a checkpoint holds what a live model has: the library's own conversion, read off exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    revert_weight_conversion,
)

import deltakit as dk
from deltakit.errors import CoordinateError, DeltaError
from deltakit.formats.checkpoint import Checkpoint
from deltakit.live.conversion import saved_regions
from deltakit.live.coordinates import coordinates

SHAPES = {
    "layers.0.q": (6, 4),
    "layers.0.k": (6, 4),
    "layers.0.v": (6, 4),
    "layers.0.turned": (2, 4, 6),
    "layers.0.woven": (3, 8),
    "layers.0.gate": (4, 6),
    "layers.0.up": (4, 6),
    "layers.0.experts.both": (3, 10, 4),
    "layers.0.experts.one": (1, 5, 4),
    "layers.0.old": (7,),
    "plain": (1, 5, 1),
}
CONVERSIONS: list[Any] = [
    WeightConverter("qkv", ["q", "k", "v"], operations=[Chunk(dim=0)]),
    WeightConverter("turn", "turned", operations=[Transpose(1, 2)]),
    WeightConverter("weave", "woven", operations=[Interleave(dim=1)]),
    WeightConverter("gate_up", ["gate", "up"], operations=[Interleave(dim=1), Chunk(dim=0)]),
    WeightConverter(
        ["experts.*.w1", "experts.*.w3"],
        "experts.both",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    ),
    WeightConverter("experts.*.w2", "experts.one", operations=[MergeModulelist(dim=0)]),
    WeightRenaming("new", "old"),
]


class _Model:
    """As much of a model as a conversion asks for."""

    config = None
    _weight_conversions = CONVERSIONS


def test_every_element_goes_where_the_library_puts_it() -> None:
    live, start = {}, {}
    count = 0
    for name, shape in SHAPES.items():
        live[name] = torch.arange(count, count + int(np.prod(shape))).view(shape)
        start[name], count = count, count + live[name].numel()
    regions = saved_regions(_Model(), live)
    saved = revert_weight_conversion(_Model(), dict(live))  # type: ignore[arg-type]
    assert regions.keys() == saved.keys() and len(saved) == 4 + 6 + 1 + 2
    for name, tensor in saved.items():
        expected = tensor.reshape(-1).numpy()
        found = np.full(tensor.numel(), -1)
        for region in regions[name]:
            whole = np.arange(live[region.live].numel())
            kept, indices = region.to_stored(whole)
            found[indices] = start[region.live] + kept
            back, origin = region.to_live(np.sort(indices))
            assert (expected[np.sort(indices)[back]] == start[region.live] + origin).all()
            every_other = whole[::2]
            kept, indices = region.to_stored(every_other)
            assert (expected[indices] == start[region.live] + every_other[kept]).all()
        assert (found == expected).all(), name


def _bert(folder: Path) -> tuple[BertForMaskedLM, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
    )
    model = BertForMaskedLM(config)
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
DECODER = "cls.predictions.decoder.weight"


def _embedding_delta(name: str, values: list[float], **options: Any) -> dk.SparseDelta:
    tensor = dk.TensorDelta(
        name=name,
        shape=(60, 8),
        dtype="float32",
        mode="add",
        indices=np.array([3, 100, 200]),
        values=np.array(values),
        **options,
    )
    return dk.SparseDelta(tensors={name: tensor})


def test_both_copies_of_a_tied_tensor_are_written(tmp_path: Path) -> None:
    _, tensors = _bert(tmp_path / "base")
    tensors[DECODER] = tensors[EMBEDDINGS].clone()
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    live = BertForMaskedLM.from_pretrained(tmp_path / "base").eval()
    tuner = dk.SparseTuner(live, dk.RandomMask(budget=50), lr=1e-2, target=EMBEDDINGS)
    live(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    tuner.step()
    delta = tuner.delta()
    assert list(delta.tensors) == [EMBEDDINGS, DECODER]
    assert (delta.tensors[DECODER].indices == delta.tensors[EMBEDDINGS].indices).all()
    dk.merge(tmp_path / "base", delta, tmp_path / "merged")
    merged = BertForMaskedLM.from_pretrained(tmp_path / "merged")
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    applied = BertForMaskedLM.from_pretrained(tmp_path / "base")
    dk.apply(applied, delta)
    for model in (merged, applied):
        ours = model.state_dict()
        assert all(torch.equal(t, ours[n]) for n, t in live.state_dict().items())
    first, second = (_embedding_delta(n, [1, 2, v]) for n, v in ((EMBEDDINGS, 3), (DECODER, 4)))
    both = dk.SparseDelta(tensors={**first.tensors, **second.tensors})
    with pytest.raises(DeltaError, match="copies of it get different entries"):
        dk.apply(applied, both)


def test_a_checkpoint_may_hold_the_other_name_of_a_tied_tensor(tmp_path: Path) -> None:
    _, tensors = _bert(tmp_path / "base")
    tensors[DECODER] = tensors.pop(EMBEDDINGS)
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    live = BertForMaskedLM.from_pretrained(tmp_path / "base")
    assert coordinates(live, Checkpoint(tmp_path / "base")).names[EMBEDDINGS] == DECODER
    dk.merge(tmp_path / "base", _embedding_delta(DECODER, [1, 2, 3]), tmp_path / "merged")
    dk.apply(live, _embedding_delta(DECODER, [1, 2, 3]))
    merged = BertForMaskedLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(t, merged[n]) for n, t in live.state_dict().items())


def test_unknown_names_are_answered_with_the_nearest(tmp_path: Path) -> None:
    _bert(tmp_path)
    bare = BertModel.from_pretrained(tmp_path)  # without the prefix of the checkpoint
    wrong = _embedding_delta("bert.embeddings.word_embedding.weight", [1, 2, 3])
    message = f"no tensor 'bert.embeddings.word_embedding.weight'; nearest: {EMBEDDINGS}"
    with pytest.raises(CoordinateError, match=message):
        dk.apply(bare, wrong)
    with pytest.raises(CoordinateError, match=message):
        dk.DeltaBank(bare, {"task": wrong})
    dk.save(wrong, tmp_path / "wrong.sdelta")
    with pytest.raises(CoordinateError, match=message):
        dk.DeltaBank(bare, {"task": tmp_path / "wrong.sdelta"})


def test_an_expert_that_the_checkpoint_lacks_is_missed(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=12,
        num_local_experts=2,
    )
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CoordinateError, match=r"lacks .*experts\.1\.w3"):
        coordinates(model, Checkpoint(tmp_path))


def test_weights_that_accelerate_keeps_in_host_memory_are_changed_there(tmp_path: Path) -> None:
    _bert(tmp_path)
    plain = BertModel.from_pretrained(tmp_path).eval()
    offloaded = BertModel.from_pretrained(tmp_path).eval()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    tokens = torch.tensor([[0, 1, 2, 12, 13, 25]])
    delta = _embedding_delta(EMBEDDINGS, [1, 2, 3])
    before = plain(input_ids=tokens).last_hidden_state
    with dk.applied(plain, delta):
        expected = plain(input_ids=tokens).last_hidden_state
    with dk.applied(offloaded, delta):
        assert torch.equal(offloaded(input_ids=tokens).last_hidden_state, expected)
    assert torch.equal(offloaded(input_ids=tokens).last_hidden_state, before)
    assert not torch.equal(before, expected)


def test_weights_on_disk_or_nowhere_are_refused(tmp_path: Path) -> None:
    _bert(tmp_path / "base")
    delta = _embedding_delta(EMBEDDINGS, [1, 2, 3])
    on_disk = BertModel.from_pretrained(tmp_path / "base").eval()
    disk_offload(on_disk, str(tmp_path / "weights"), execution_device=torch.device("cpu"))
    with torch.device("meta"):
        nowhere = BertModel(on_disk.config)
    nowhere.name_or_path = str(tmp_path / "base")
    for model in (on_disk, nowhere):
        with pytest.raises(CoordinateError, match="on the meta device: its weights are on disk"):
            dk.apply(model, delta)
