"""Many tasks on one live model: exact bits after any switches, and forward passes that see one task."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from live_models import is_equal, make_model, random_delta, weights_of

import deltakit as dk
from deltakit.errors import BaseMismatchError, ConfigError

TASKS = [f"task {number}" for number in range(8)]


def _deltas(model: torch.nn.Module) -> dict[str, dk.SparseDelta]:
    return {task: random_delta(model, seed) for seed, task in enumerate(TASKS)}


def test_a_thousand_random_swaps_of_eight_overlapping_deltas_leave_exact_bits() -> None:
    model = make_model()
    base = weights_of(model)
    deltas = _deltas(model)
    states = {}
    for task, delta in deltas.items():
        with dk.applied(model, delta):
            states[task] = weights_of(model)
    bank = dk.DeltaBank(model, deltas)
    rng = np.random.default_rng(0)
    for number in range(1000):
        if number % 10 == 9:
            bank.deactivate()
            assert bank.active is None and is_equal(model, base)
        task = TASKS[rng.integers(8)]
        bank.activate(task)
        assert bank.active == task and is_equal(model, states[task])
    bank.deactivate()
    assert all(torch.equal(t, base[n]) for n, t in model.state_dict().items())


def test_the_budget_bounds_what_is_ready_and_changes_no_bit(tmp_path: Path) -> None:
    model = make_model(torch.float32)
    paths = {}
    for task, delta in _deltas(model).items():
        paths[task] = tmp_path / f"{task}.sdelta"
        dk.save(delta, paths[task])
    unbounded, base = dk.DeltaBank(model, paths), weights_of(model)
    states = {}
    for task in TASKS:
        unbounded.activate(task)
        states[task] = weights_of(model)
    unbounded.deactivate()
    one = sum(e.indices.nbytes + 2 * e.values.nbytes for e in unbounded.entries(TASKS[0]))
    for budget, ready in ((0, 1), (one, 1), (3 * one, 3)):
        bank = dk.DeltaBank(model, paths, device_budget=budget)
        for task in [*TASKS, *reversed(TASKS)]:
            bank.activate(task)
            assert is_equal(model, states[task])
            assert len(bank._ready) <= max(ready, 2)  # the one before was active while it was read
        bank.deactivate()
        assert is_equal(model, base)


def test_tasks_stand_beside_applied_deltas_as_if_merged_together() -> None:
    model = make_model()
    base = weights_of(model)
    deltas = _deltas(model)
    bank = dk.DeltaBank(model, deltas)
    other = random_delta(model, 99)
    bank.activate(TASKS[1])
    handle = dk.apply(model, other, [0.5])
    bank.activate(TASKS[2])
    both = weights_of(model)
    bank.deactivate()
    handle.revert()
    assert is_equal(model, base)
    with dk.applied(model, [deltas[TASKS[2]], other], [1, 0.5]):
        assert is_equal(model, both)
    bank.activate(TASKS[3])
    bank.deactivate()
    assert is_equal(model, base)


def test_entries_are_the_change_of_the_weights() -> None:
    model = make_model()
    bank = dk.DeltaBank(model, _deltas(model))
    base = weights_of(model)
    bank.activate(TASKS[0])  # what is active does not matter
    found = bank.entries(TASKS[4])
    bank.activate(TASKS[4])
    assert len(found) == 3
    for entries in found:
        parameter = entries.module.get_parameter(entries.parameter).detach()
        name = next(
            n
            for n, p in model.named_parameters()
            if p is getattr(entries.module, entries.parameter)
        )
        before = base[name].reshape(-1)[entries.indices].float()
        assert torch.equal(parameter.reshape(-1)[entries.indices].float(), before + entries.values)
        assert entries.values.dtype == torch.float32
        assert torch.equal(entries.indices, entries.indices.sort().values)


def test_the_bank_says_what_it_cannot_do() -> None:
    model = make_model()
    bank = dk.DeltaBank(model, _deltas(model))
    assert bank.names() == TASKS
    with pytest.raises(ConfigError, match="no task 'task9'; nearest: task"):
        bank.activate("task9")
    with pytest.raises(ConfigError, match="has a task 'task 1' already"):
        bank.add("task 1", random_delta(model, 1))
    bank.add("stranger", random_delta(make_model(seed=1), 1))
    bank.activate(TASKS[0])
    before = weights_of(model)
    with pytest.raises(BaseMismatchError):
        bank.activate("stranger")
    assert bank.active == TASKS[0] and is_equal(model, before)
    with pytest.raises(ConfigError, match="'task 0' is active; deactivate it before removing"):
        bank.remove(TASKS[0])
    with pytest.raises(ConfigError, match="'task 0' is active; deactivate it before batches"):
        bank.batched([TASKS[1]])
    bank.remove("stranger")
    assert bank.names() == TASKS


def test_rows_of_a_batch_get_the_outputs_of_their_tasks() -> None:
    model = make_model(torch.float32)
    bank = dk.DeltaBank(model, _deltas(model))
    rows: list[str | None] = ["task 3", None, "task 1", "task 3"]
    inputs = torch.randn(4, 30)
    with bank.batched(rows):
        together = model(inputs)
    for row, task in enumerate(rows):
        bank.deactivate() if task is None else bank.activate(task)
        alone = model(inputs[row : row + 1])[0]
        bank.deactivate()
        torch.testing.assert_close(together[row], alone)


def _run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_forward_passes_of_other_threads_see_one_task_throughout() -> None:
    model = make_model(torch.float32)
    bank = dk.DeltaBank(model, {task: random_delta(model, n) for n, task in enumerate("abc")})
    inputs = torch.randn(3, 30)
    allowed = []
    for task in [*bank.names(), None]:
        bank.deactivate() if task is None else bank.activate(task)
        allowed.append(model(inputs).detach())
    dk.guard(model)
    assert dk.guard(model) is dk.guard(model)  # and the hooks are there once
    stop, wrong, seen = threading.Event(), [], set()

    def read() -> None:
        while not stop.is_set():
            output = model(inputs)
            which = [n for n, known in enumerate(allowed) if torch.equal(output, known)]
            if len(which) == 1:
                seen.add(which[0])
            else:
                wrong.append(output)

    def write() -> None:
        rng = np.random.default_rng(0)
        for _ in range(300):
            number = rng.integers(4)
            bank.deactivate() if number == 3 else bank.activate("abc"[number])
        stop.set()

    _run([*(threading.Thread(target=read) for _ in range(3)), threading.Thread(target=write)])
    assert not wrong and seen


def test_threads_that_want_different_tasks_each_get_theirs() -> None:
    model = make_model(torch.float32)
    bank = dk.DeltaBank(model, {task: random_delta(model, n) for n, task in enumerate("abc")})
    inputs = torch.randn(3, 30)
    expected = {}
    for task in bank.names():
        with bank.using(task):
            expected[task] = model(inputs).detach()
    dk.guard(model)
    wrong = []

    def work(task: str) -> None:
        for _ in range(100):
            with bank.using(task), bank.using(task):  # the inner one waits for nobody
                if not torch.equal(model(inputs), expected[task]):
                    wrong.append(task)

    _run([threading.Thread(target=work, args=(task,)) for task in "aabbc"])
    assert not wrong


def test_a_thread_does_not_wait_for_itself() -> None:
    model = make_model(torch.float32)
    bank = dk.DeltaBank(model, {task: random_delta(model, n) for n, task in enumerate("ab")})
    guard = dk.guard(model)
    with guard.reading():
        model(torch.randn(1, 30))  # reads again
        for change in (lambda: bank.activate("a"), lambda: dk.apply(model, random_delta(model, 3))):
            with pytest.raises(ConfigError, match="change them outside"):
                change()
    with bank.using("a"), pytest.raises(ConfigError, match="change them outside"):
        bank.using("b").__enter__()
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 31))  # a failed pass reads no longer
    bank.activate("b")
    bank.deactivate()
