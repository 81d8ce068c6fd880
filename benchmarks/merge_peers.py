"""Merging and stacking 1.1B parameters against `cp` and mergekit, every contestant a whole process.

    python benchmarks/merge_peers.py [--mergekit ENV/bin/mergekit-yaml] [--rounds 3] [--layers 22]

Makes a bfloat16 checkpoint of TinyLlama's shapes (2.2 GB) and two deltas of 0.1 % of its weights in
a temporary folder, and times, in rounds of one each: `cp`, `cp` followed by an fsync of the copy,
`deltakit merge` of one delta, `deltakit merge --method ties` of both (stacked and merged at once),
and mergekit's task arithmetic and TIES on the same fine-tuned models, written out whole before.
Peak memory is the largest resident size that the process and its children reached together.
mergekit needs an environment of its own (`python -m venv ENV; ENV/bin/pip install mergekit`), since
it pins versions of libraries; without --mergekit it is left out. Takes 12 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
from random_delta import random_delta

from deltakit.budget import format_bytes
from deltakit.formats import sdelta
from deltakit.formats.atomic import sync
from deltakit.formats.checkpoint import Checkpoint
from deltakit.formats.safetensors_header import Entry, render
from deltakit.merging.merge import merge

HIDDEN, INNER, KEYS, VOCABULARY = 2048, 5632, 256, 32_000
SHARE = 1e-3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a Llama of TinyLlama's width."""
    block = {
        "input_layernorm.weight": (HIDDEN,),
        "mlp.down_proj.weight": (HIDDEN, INNER),
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.k_proj.weight": (KEYS, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.v_proj.weight": (KEYS, HIDDEN),
    }
    ends = {
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    named = {f"model.layers.{n}.{k}": shape for n in range(layers) for k, shape in block.items()}
    return {**named, **ends}


def write_base(folder: Path, layers: int, rng: np.random.Generator) -> None:
    """Random bfloat16 weights as a model folder."""
    folder.mkdir()
    entries, start = {}, 0
    for name, shape in shapes(layers).items():
        entries[name] = Entry("BF16", shape, start, start + 2 * int(np.prod(shape)))
        start = entries[name].end
    with (folder / "model.safetensors").open("wb") as file:
        file.write(render(entries, {"format": "pt"}))
        for entry in entries.values():
            values = rng.standard_normal(entry.shape, np.float32) * np.float32(0.02)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    config = {**CONFIG, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))


def mergekit_config(folder: Path, method: str, tuned: list[Path]) -> Path:
    """A YAML file by which mergekit merges `tuned` onto the base."""
    own = "{weight: 1.0, density: 0.5}" if method == "ties" else "{weight: 1.0}"
    models = "".join(f"  - {{model: {path}, parameters: {own}}}\n" for path in tuned)
    text = f"models:\n{models}merge_method: {method}\nbase_model: {folder / 'base'}\n"
    path = folder / f"{method}.yaml"
    path.write_text(text + "parameters: {normalize: false}\ndtype: bfloat16\n")
    return path


def resident(pid: int) -> int:
    """Bytes resident now in a process and its children; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = re.search(r"VmRSS:\s+(\d+) kB", status)
    return (int(own[1]) * 1024 if own else 0) + sum(resident(int(child)) for child in children)


def watched(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command."""
    peak, over = 0, threading.Event()
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.01):
            peak = max(peak, resident(child.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = child.communicate()
    taken = time.perf_counter() - start
    over.set()
    watcher.join()
    if child.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{errors.decode()}")
    return taken, peak


def contestants(folder: Path, mergekit: str | None) -> dict[str, tuple[list[str], Path]]:
    """Name -> command and what it writes."""
    base, a, b = folder / "base", folder / "a.sdelta", folder / "b.sdelta"
    copy, out, peer = folder / "copy.safetensors", folder / "out", folder / "peer"
    weights = str(base / "model.safetensors")
    ours = [sys.executable, "-m", "deltakit", "merge", str(base)]
    rows = {
        "cp": (["cp", weights, str(copy)], copy),
        "cp and sync": (["cp", weights, str(copy)], copy),
        "merge": ([*ours, str(a), "-o", str(out)], out),
        "ties": (
            [*ours, str(a), str(b), "--method", "ties", "--density", "0.5", "-o", str(out)],
            out,
        ),
    }
    if mergekit:
        tuned = [folder / "tuned-a", folder / "tuned-b"]
        one = mergekit_config(folder, "task_arithmetic", tuned[:1])
        two = mergekit_config(folder, "ties", tuned)
        rows["mergekit task arithmetic"] = ([mergekit, str(one), str(peer)], peer)
        rows["mergekit ties"] = ([mergekit, str(two), str(peer)], peer)
    return rows


def prepare(folder: Path, layers: int, *, whole: bool) -> None:
    """The base, the deltas, and the fine-tuned models if mergekit is to read them."""
    rng = np.random.default_rng(0)
    write_base(folder / "base", layers, rng)
    base = Checkpoint(folder / "base")
    shares = {name: round(info.numel * SHARE) for name, info in base.tensors.items()}
    entries = 0
    for name in ("a", "b"):
        delta = random_delta(base, shares, rng, 0.02)
        entries = delta.nnz
        sdelta.save(delta, folder / f"{name}.sdelta")
        if whole:
            merge(folder / "base", folder / f"{name}.sdelta", folder / f"tuned-{name}")
    size = format_bytes((folder / "base" / "model.safetensors").stat().st_size)
    print(f"base {size}, {base.total_weights:,} weights; deltas of {entries:,} entries", flush=True)


def measure(folder: Path, mergekit: str | None, rounds: int) -> None:
    """Time all in rounds and print."""
    rows = contestants(folder, mergekit)
    times: dict[str, list[float]] = {name: [] for name in rows}
    peaks = dict.fromkeys(rows, 0)
    for _ in range(rounds):
        for name, (command, written) in rows.items():
            os.sync()
            taken, peak = watched(command)
            if name == "cp and sync":
                start = time.perf_counter()
                sync(written)
                taken += time.perf_counter() - start
            times[name].append(taken)
            peaks[name] = max(peaks[name], peak)
            shutil.rmtree(written) if written.is_dir() else written.unlink()
    unit = median(times["cp and sync"])
    for name, taken in times.items():
        spread = f"(from {min(taken):.2f} to {max(taken):.2f})"
        print(
            f"{name:>26}: {median(taken):7.2f} s {spread:>22}, {median(taken) / unit:6.2f} x cp and"
            f" sync, peak {format_bytes(peaks[name])}"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        prepare(folder, options.layers, whole=options.mergekit is not None)
        measure(folder, options.mergekit, options.rounds)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
