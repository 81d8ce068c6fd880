"""Mixed batches: every row gives what it gives alone with its own delta, or is refused."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
from batched_lab import (
    ENCODER_DECODERS,
    GENERATING,
    MODELS,
    ROWS,
    TASKS,
    WORDS,
    as_task,
    delta_of,
    deltas_of,
    inputs_of,
    model_of,
    one_by_one,
)

import deltakit as dk
from deltakit.errors import BaseMismatchError, ConfigError, CoordinateError
from deltakit.mixed.batch import mixed_batch

# float32 and bfloat16: of the largest output; sums have another order there, and in bfloat16 the
# changed weight is not rounded with the rest of the product.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    found: torch.Tensor = model(**inputs).logits
    return found


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    bound = TOLERANCES[expected.dtype] * expected.abs().max()
    assert (found - expected).abs().max() <= bound


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_untouched(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "compute_bias" not in vars(module)


def real_tokens(name: str, inputs: dict[str, torch.Tensor], outputs: torch.Tensor) -> torch.Tensor:
    """Without what stands at padding, where a decoder computes nothing of use."""
    if outputs.ndim < 3 or name in ENCODER_DECODERS:
        return outputs
    return outputs[inputs["attention_mask"].bool()]


CASES = [
    (name, dtype)
    for name in MODELS
    for dtype in TOLERANCES
    if (name, dtype) != ("mixtral", torch.bfloat16)  # rounding decides between near experts there
]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_rows_are_what_they_are_alone(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    deltas, inputs = deltas_of(model, size=0.5), inputs_of(name, dtype=dtype)
    before = state_of(model)
    mixed = mixed_batch(model, deltas)
    with mixed.rows(ROWS):
        found = logits(model, **inputs)
    assert_untouched(model, before)
    expected = one_by_one(model, deltas, ROWS, inputs, logits)
    assert_near(*(real_tokens(name, inputs, each) for each in (found, expected)))
    with torch.no_grad():  # the deltas matter in every row but the base's
        base = logits(model, **inputs)
    changed = (base - expected).flatten(1).abs().amax(1) > 0.05 * expected.abs().max()
    assert changed.tolist() == [task is not None for task in ROWS]


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens_are_the_same(name: str, beams: int) -> None:
    model = model_of(name)
    deltas = deltas_of(model, size=0.6)
    inputs = inputs_of(name)

    def generate(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
        options = {"num_beams": beams, "num_return_sequences": beams, "do_sample": False}
        found: torch.Tensor = model.generate(
            **inputs, **options, max_new_tokens=6, min_new_tokens=6, pad_token_id=0
        )
        return found

    with mixed_batch(model, deltas).rows(ROWS):
        found = generate(model, **inputs)
    expected = one_by_one(model, deltas, ROWS, inputs, generate)
    assert found.tolist() == expected.tolist()
    assert found.tolist() != generate(model, **inputs).tolist()


@pytest.mark.parametrize("density", [0.01, 0.6])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_few_and_many_entries(name: str, density: float) -> None:
    """Tasks with few entries are gathered, those with many multiplied; a batch may hold both."""
    model = model_of(name)
    deltas = {"a": delta_of(model, 0, density), "b": delta_of(model, 1), "c": delta_of(model, 2)}
    inputs = inputs_of(name)
    with mixed_batch(model, deltas).rows(ROWS):
        found = logits(model, **inputs)
    expected = one_by_one(model, deltas, ROWS, inputs, logits)
    assert_near(*(real_tokens(name, inputs, each) for each in (found, expected)))


def test_blocks_of_tokens_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    deltas = deltas_of(model) | {"b": delta_of(model, 1, 0.6)}
    inputs, mixed = inputs_of("llama"), mixed_batch(model, deltas)
    with mixed.rows(ROWS):
        whole = logits(model, **inputs)
        monkeypatch.setattr("deltakit.mixed.linear.BUFFER", 40)
        parts = logits(model, **inputs)
    assert_near(*(real_tokens("llama", inputs, each) for each in (parts, whole)))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_set_mode_and_embeddings_bit_for_bit(dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(WORDS, 8)).to(dtype)
    deltas = {t: delta_of(model, n, 0.5) for n, t in enumerate("ab")}
    if dtype != torch.bfloat16:  # which NumPy's random numbers cannot be cast to by name
        deltas["c"] = delta_of(model, 3, 0.5, mode="set")
    tasks = [*deltas, None]
    ids = torch.randint(0, WORDS, (len(tasks), 20))
    with mixed_batch(model, deltas).rows(tasks):
        found = model(ids)
    for row, task in enumerate(tasks):
        with as_task(model, deltas, task):
            assert torch.equal(found[row], model(ids[row]))


def test_set_mode_in_every_layer() -> None:
    model = model_of("bert")
    deltas, inputs = deltas_of(model, mode="set"), inputs_of("bert")
    with mixed_batch(model, deltas).rows(ROWS):
        found = logits(model, **inputs)
    assert_near(found, one_by_one(model, deltas, ROWS, inputs, logits))


def test_only_biases_of_all_features() -> None:
    model = model_of("bert")
    names = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    deltas, inputs = deltas_of(model, density=1.0, tensors=names), inputs_of("bert")
    with mixed_batch(model, deltas).rows(ROWS):
        found = logits(model, **inputs)
    assert_near(found, one_by_one(model, deltas, ROWS, inputs, logits))


def test_heads_of_their_own() -> None:
    """Extras take a tensor's place whole; a task without them keeps the base's head."""
    model = model_of("bert")
    deltas, inputs = deltas_of(model), inputs_of("bert")
    head = {name: np.random.default_rng(5).normal(size=shape) for name, shape in
            (("classifier.weight", (2, 16)), ("classifier.bias", (2,)))}  # fmt: skip
    sparse = {n: t for n, t in deltas["a"].tensors.items() if n not in head}
    deltas["a"] = dk.SparseDelta(tensors=sparse, extras=head)
    with mixed_batch(model, deltas).rows(ROWS):
        found = logits(model, **inputs)
    assert_near(found, one_by_one(model, deltas, ROWS, inputs, logits))
    other = dk.SparseDelta(tensors={}, extras={"classifier.weight": np.zeros((3, 16))})
    with pytest.raises(CoordinateError, match=r"delta 'b'.*\[2, 16\].*found \[3, 16\]"):
        mixed_batch(model, {"b": other})


def test_position_ids_that_all_rows_share() -> None:
    class Positions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = torch.nn.Embedding(WORDS, 8), torch.nn.Embedding(9, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.words(ids) + self.places(torch.arange(ids.shape[1]))
            return found

    model = Positions()
    deltas = deltas_of(model, density=0.5)
    ids = torch.randint(0, WORDS, (len(ROWS), 7))
    mixed = mixed_batch(model, deltas)
    with mixed.rows(ROWS):
        found = model(ids)
    run = lambda model, ids: model(ids)
    assert torch.equal(found, one_by_one(model, deltas, ROWS, {"ids": ids}, run))
    with mixed.rows(ROWS), pytest.raises(ConfigError, match=r"5 ids.*rows or positions"):
        model(ids[:, :5])


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_quantised_linear_layers(scheme: str) -> None:
    """Codes are left alone: entries add what they add to the dequantised weights."""
    nn = pytest.importorskip("bitsandbytes").nn
    model = model_of("llama", torch.float32)
    plain = copy.deepcopy(model)
    deltas, inputs = deltas_of(model, size=0.05), inputs_of("llama")
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and name != "lm_head":
            new = (
                nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False,
                                has_fp16_weights=False)
                if scheme == "int8"
                else nn.Linear4bit(layer.in_features, layer.out_features, bias=False,
                                   quant_type=scheme)
            )  # fmt: skip
            new.load_state_dict(layer.state_dict())
            model.set_submodule(name, new.to("cpu"))
            dense = new(torch.eye(layer.in_features)).t() if scheme != "int8" else None
            if dense is not None:
                plain.get_submodule(name).weight.data.copy_(dense)
    before = state_of(model)
    with mixed_batch(model, deltas).rows(ROWS):
        found = logits(model, **inputs)
    assert_untouched(model, before)
    with torch.no_grad():
        base = logits(model, **inputs)
    expected = one_by_one(plain, deltas, ROWS, inputs, logits)
    parts = [real_tokens("llama", inputs, each) for each in (found, expected, base)]
    if scheme == "int8":  # activations are rounded too, so rows are compared only roughly
        assert (parts[0] - parts[1]).norm() < 0.2 * (parts[2] - parts[1]).norm()
    else:
        assert_near(parts[0], parts[1])
    assert (parts[2] - parts[1]).abs().max() > 0.01 * parts[1].abs().max()


def test_quantised_set_mode_needs_base_values() -> None:
    nn = pytest.importorskip("bitsandbytes").nn
    layer = torch.nn.Linear(64, 32, bias=False)
    model = torch.nn.Sequential(nn.Linear4bit(64, 32, bias=False))
    model[0].load_state_dict(layer.state_dict())
    model.to("cpu")
    delta = delta_of(torch.nn.Sequential(layer), 0, mode="set")
    with pytest.raises(ConfigError, match=r"'0.weight' is quantised.*without base values"):
        mixed_batch(model, {"a": delta})
    whole = dk.SparseDelta(tensors={}, extras={"0.weight": np.zeros((32, 64), np.float32)})
    with pytest.raises(ConfigError, match=r"'0.weight' is quantised.*no tensor of their own"):
        mixed_batch(model, {"a": whole})


def test_batches_of_another_size_are_refused() -> None:
    model = model_of("bert")
    mixed = mixed_batch(model, deltas_of(model))
    with mixed.rows(["a", "b"]), pytest.raises(ConfigError, match="5 rows, expected 2"):
        logits(model, **inputs_of("bert"))
    before = state_of(model)
    with pytest.raises(RuntimeError, match="of the caller"), mixed.rows(ROWS):
        raise RuntimeError("of the caller")
    assert_untouched(model, before)


def test_unknown_tasks_and_tensors_are_refused() -> None:
    model = model_of("bert")
    mixed = mixed_batch(model, deltas_of(model))
    for tasks, message in ((["d"], "no delta for task 'd'"), ([], "no rows")):
        with pytest.raises(ConfigError, match=message), mixed.rows(tasks):
            pass
    foreign = deltas_of(torch.nn.Linear(3, 3))
    with pytest.raises(CoordinateError, match="the model has no tensor"):
        mixed_batch(model, foreign)


def test_a_model_runs_one_mixed_batch_at_a_time() -> None:
    model = model_of("bert")
    mixed, again = (mixed_batch(model, deltas_of(model)) for _ in range(2))
    refused = []

    def enter() -> None:
        try:
            with again.rows(ROWS):
                pass
        except ConfigError as error:
            refused.append(str(error))

    with mixed.rows(ROWS):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "already" in refused[0]
    enter()
    assert len(refused) == 1


def test_another_base_is_refused() -> None:
    model = model_of("bert")
    delta = deltas_of(model)["a"]
    print_of = dk.Fingerprint(sample="0" * 16)
    base = dk.BaseIdentity(tensors=dict.fromkeys(delta.tensors, print_of))
    other = dk.SparseDelta(tensors=delta.tensors, base=base)
    with pytest.raises(BaseMismatchError, match=r"delta 'a'.*another base"):
        mixed_batch(model, {"a": other})
    mixed_batch(model, {"a": other}, allow_base_mismatch=True)


class Tied(torch.nn.Module):
    """Multiplies by its embedding's weight without calling a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(WORDS, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(self.words(ids), self.words.weight)


class Routed(torch.nn.Module):
    """Runs a layer on the tokens of even number only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(inputs.flatten(0, 1)[::2])
        return found


CANNOT = {
    "weight used elsewhere": (Tied(), torch.ones(4, 3, dtype=torch.int64), "used outside"),
    "tokens picked out": (Routed(), torch.ones(4, 3, 8), "cannot be told apart"),
    "recurrent": (torch.nn.LSTM(8, 8, batch_first=True), torch.ones(4, 3, 8), "LSTM"),
    "batch second": (
        torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2)),
        torch.ones(4, 3, 8),
        "batch_first=False",
    ),
}


@pytest.mark.parametrize("what", CANNOT)
def test_what_cannot_have_rows_of_its_own_is_refused(what: str) -> None:
    model, inputs, message = CANNOT[what]
    with pytest.raises(ConfigError, match=message):
        mixed = mixed_batch(model, deltas_of(model))
        with mixed.rows(["a", "b", "c", None]):
            model(inputs)


def test_attention_in_one_module() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.mixing(x, x, x)[0]
            return found

    model = Attention().double().eval()
    deltas, inputs = deltas_of(model, density=0.3), torch.randn(len(ROWS), 6, 8).double()
    with mixed_batch(model, deltas).rows(ROWS):
        found = model(inputs)
    run = lambda model, x: model(x)
    assert_near(found, one_by_one(model, deltas, ROWS, {"x": inputs}, run))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of the compiler itself
def test_compiled_models_are_refused() -> None:
    model = model_of("bert")
    mixed = mixed_batch(model, deltas_of(model))
    model.compile()
    with pytest.raises(ConfigError, match="compiled"), mixed.rows(ROWS):
        pass
    assert set(TASKS) == set(mixed.tasks)
