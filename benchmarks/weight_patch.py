"""Weight patches of a bfloat16 model whose step changes about 1 % of the bits: seconds and bytes.

    python benchmarks/weight_patch.py [--weights 1.1b] [--changed 0.01] [--folder DIR]

A Llama-shaped state dict of random weights stands in for the model and random changes of their last
bit for the step, so that numbers of other densities can be had. Beside the patch are measured, in
the same run, torch.save of the whole state and a raw file of int32 indices and bfloat16 values, the
form that RL frameworks exchange. Memory is three states: the model, the stream's copy, the follower.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

import deltakit as dk
from deltakit.budget import format_bytes, parse_budget
from deltakit.formats.sdelta import encode
from deltakit.formats.seeded import seeded_support

T = TypeVar("T")
VOCABULARY, WIDTH, INNER, KEYS = 32_000, 2048, 5632, 256  # TinyLlama-1.1B: 22 layers


def llama_state(weights: int) -> dict[str, torch.Tensor]:
    """As many layers of TinyLlama-1.1B as make about `weights`, bfloat16, scaled normal values."""
    layer = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (KEYS, WIDTH),
        "self_attn.v_proj": (KEYS, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    each = sum(int(np.prod(shape)) for shape in layer.values())
    for number in range(max(1, round((weights - 2 * VOCABULARY * WIDTH) / each))):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}
    generator = torch.Generator().manual_seed(0)
    some = torch.empty(2**20).normal_(0, 0.02, generator=generator).bfloat16()
    state = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), some.numel()):
            flat[start : start + some.numel()] = some[: flat.numel() - start]
        state[name] = tensor
    return state


def change(state: dict[str, torch.Tensor], share: float, seed: int) -> None:
    """Flip the last bit of a random share of each tensor."""
    for name, tensor in state.items():
        count = round(share * tensor.numel())
        bits = tensor.view(-1).view(torch.int16).numpy()
        bits[seeded_support(seed, name, tensor.numel(), count)] ^= 1


class Follower(torch.nn.Module):
    """A model that holds copies of a state's tensors under their names."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, leaf = name.split(".")
            module: torch.nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, torch.nn.Parameter(tensor.clone(), requires_grad=False))


def timed(what: str, work: Callable[[], T]) -> T:
    """The result of `work`; prints how long it took, by the clock and on the processors."""
    wall, used = time.perf_counter(), time.process_time()
    result = work()
    wall, used = time.perf_counter() - wall, time.process_time() - used
    print(f"{what:<34} {wall:6.2f} s   {used:6.2f} s of processor time", flush=True)
    return result


def write(path: Path, *parts: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def save_whole(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(state, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def peak_memory() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def measure(weights: int, share: float, folder: Path) -> None:
    state = llama_state(weights)
    total = sum(tensor.numel() for tensor in state.values())
    print(f"{total:,} weights in {len(state)} tensors, {format_bytes(2 * total)} in bfloat16")
    stream = timed("stream: copy and digest, once", lambda: dk.PatchStream(state))
    server = Follower(state)
    change(state, share, 1)
    patch = timed("diff: stream.step", lambda: stream.step(state))
    print(f"{patch.nnz:,} entries, {patch.nnz / total:.2%} of the weights")
    data = timed("encode", lambda: encode(patch))
    timed("write and fsync", lambda: write(folder / "patch.sdelta", data))
    loaded = timed("load", lambda: dk.load(folder / "patch.sdelta"))
    timed("apply the first, with full digest", lambda: dk.apply(server, loaded))
    change(state, share, 2)
    second = timed("diff: the second step", lambda: stream.step(state))
    timed("apply the second", lambda: dk.apply(server, second))
    timed("verify all weights", lambda: dk.chain_position(server, verify=True))
    for name, tensor in server.named_parameters():
        assert torch.equal(tensor.view(torch.int16), state[name].view(torch.int16)), name
    both = timed("compose two steps", lambda: dk.compose([loaded, second]))
    print(f"{both.nnz:,} entries after two steps")
    raw = [part for t in patch.tensors.values() for part in (t.indices.astype("<i4"), t.values)]
    timed("raw int32 + bfloat16, write", lambda: write(folder / "raw", *(p.tobytes() for p in raw)))
    timed("torch.save of all, fsync", lambda: save_whole(state, folder / "state.pt"))
    for what, name in (("patch", "patch.sdelta"), ("raw", "raw"), ("whole state", "state.pt")):
        size = (folder / name).stat().st_size
        print(f"{what:<12} {format_bytes(size):>10}   {size / patch.nnz:8.2f} bytes per entry")
    print(f"peak memory {format_bytes(peak_memory())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="1.1b")
    parser.add_argument("--changed", type=float, default=0.01, help="share of the weights per step")
    parser.add_argument("--folder", type=Path, help="where the files go, a temporary folder if not")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        measure(parse_budget(given.weights), given.changed, Path(folder))


if __name__ == "__main__":
    main()
