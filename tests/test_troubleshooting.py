"""docs/troubleshooting.md cannot rot: every message stands in the source, and some are provoked."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from conftest import write_base
from hub_server import HubServer
from page_lab import DOCS, pattern, stands_in_source
from safetensors.numpy import save_file
from train_lab import deltakit

import deltakit as dk
from deltakit.cli.explain import Failure, explained
from deltakit.cli.main import main

PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
HEADINGS = [line.removeprefix("### ") for line in PAGE.splitlines() if line.startswith("### ")]
# A message may hold backticks itself, and a heading several messages: `one`, `another`.
MESSAGES = [m for h in HEADINGS for m in h.removeprefix("`").removesuffix("`").split("`, `")]
SYSTEM = {"permission denied: …", "no space left on device"}  # the operating system's


def test_there_are_many_and_each_is_answered() -> None:
    assert len(MESSAGES) >= 30
    assert len(set(MESSAGES)) == len(MESSAGES)
    for heading, after in re.findall(r"^### (.*)\n(.*)$", PAGE, re.MULTILINE):
        assert after.strip(), heading  # text, or the heading of a message with the same answer


@pytest.mark.parametrize("message", [m for m in MESSAGES if m not in SYSTEM])
def test_the_message_stands_in_the_source(message: str) -> None:
    assert len(message.replace("…", "").strip()) >= 10
    assert stands_in_source(message)


# What provokes the messages. Each gives the arguments of the command that is refused.


def other_base(base: Path, delta: Path) -> list[object]:
    return ["verify", delta, "--base", write_base(base.with_name("other.safetensors"), seed=1)]


def other_dtype(base: Path, delta: Path) -> list[object]:
    half = base.with_name("half.safetensors")
    shapes = {"w": (20, 30), "b": (20,), "e": (0,)}
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, half)
    return ["merge", half, delta]


def merged_in_place(base: Path, delta: Path) -> list[object]:
    assert deltakit("merge", base, delta, "--in-place").exit_code == 0
    return ["merge", base, delta, "-o", base.with_name("out.safetensors")]


def output_exists(base: Path, delta: Path) -> list[object]:
    return ["merge", base, delta, "-o", shutil.copy(base, base.with_name("out.safetensors"))]


def two_bases(base: Path, delta: Path) -> list[object]:
    return ["merge", base, shutil.copy(base, base.with_name("b.safetensors")), delta]


def no_delta(base: Path, delta: Path) -> list[object]:
    return ["merge", base]


def local_base_left_out(base: Path, delta: Path) -> list[object]:
    loaded = dk.load(delta)
    dk.save(dk.SparseDelta(tensors=loaded.tensors, base=dk.BaseIdentity(model_id="base")), delta)
    return ["merge", delta]


def nothing_to_revert(base: Path, delta: Path) -> list[object]:
    return ["revert", base]


def missing(base: Path, delta: Path) -> list[object]:
    return ["merge", base, "no.sdelta"]


def truncated(base: Path, delta: Path) -> list[object]:
    delta.write_bytes(delta.read_bytes()[:200])
    return ["inspect", delta]


def damaged_body(base: Path, delta: Path) -> list[object]:
    content = bytearray(delta.read_bytes())
    content[-1] ^= 1
    delta.write_bytes(content)
    return ["verify", delta]


def damaged_header(base: Path, delta: Path) -> list[object]:
    delta.write_bytes(delta.read_bytes().replace(b"news", b"nEws", 1))
    return ["inspect", delta]


def no_delta_file(base: Path, delta: Path) -> list[object]:
    return ["inspect", base]


def pickled(base: Path, delta: Path) -> list[object]:
    file = base.with_name("pytorch_model.bin")
    file.write_bytes(b"PK\x03\x04" + bytes(100))
    return ["diff", base, file, "-o", base.with_name("d.sdelta")]


def heads_differ(base: Path, delta: Path) -> list[object]:
    loaded, files = dk.load(delta), []
    for number in range(2):
        head = {"head.weight": np.full((2, 2), number, np.float32)}
        files.append(delta.with_name(f"{number}.sdelta"))
        dk.save(dk.SparseDelta(tensors=loaded.tensors, base=loaded.base, extras=head), files[-1])
    return ["stack", *files]


def bases_differ(base: Path, delta: Path) -> list[object]:
    other = write_base(base.with_name("other.safetensors"), seed=1)
    tuned = write_base(base.with_name("tuned.safetensors"), seed=2)
    made = delta.with_name("theirs.sdelta")
    assert deltakit("diff", other, tuned, "-o", made, "--budget", 50).exit_code == 0
    return ["stack", delta, made]


def too_few_weights(base: Path, delta: Path) -> list[object]:
    return ["merge", base, delta, "--weights", "1,1"]


def no_base_values(base: Path, delta: Path) -> list[object]:
    tuned = write_base(base.with_name("tuned.safetensors"), seed=2)
    made = delta.with_name("d.sdelta")
    assert deltakit("diff", base, tuned, "-o", made, "--no-base-values").exit_code == 0
    return ["truncate", made, "--budget", 10]


def offline(base: Path, delta: Path) -> list[object]:
    return ["inspect", "hf://org/deltakit-test-no-such-delta"]


def unknown_setting(base: Path, delta: Path) -> list[object]:
    config = base.with_name("c.yaml")
    config.write_text("budgets: 10k\n")
    return ["train", config]


def foreign_setting(base: Path, delta: Path) -> list[object]:
    given = {"model": "m", "data": "d", "task": "causal-lm", "budget": 10, "output-dir": "r"}
    flags = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    return ["train", *flags, "--method", "random", "--exp", 1]


def code_of_its_own(base: Path, delta: Path) -> list[object]:
    folder = base.with_name("m")
    folder.mkdir()
    told = {"model_type": "none", "auto_map": {"AutoConfig": "code.C"}, "architectures": ["M"]}
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "code.py").write_text("raise SystemExit('this code ran')")
    data = base.with_name("data.jsonl")
    data.write_text('{"text": "a", "label": "b"}\n')
    flags = ["--data", data, "--task", "sequence-classification", "--split", "train"]
    return ["evaluate", "--model", folder, *flags]


PROVOKED: dict[str, Callable[[Path, Path], list[object]]] = {
    "is not the base of the delta: tensor … has other": other_base,
    "is not the base of the delta: tensor … is …, expected": other_dtype,
    "it carries … merged in place": merged_in_place,
    "exists; give another output or --force": output_exists,
    "a merge takes one base, found": two_bases,
    "no delta given": no_delta,
    "no base given (": local_base_left_out,
    "has no merge in place to be taken back": nothing_to_revert,
    "no such file or folder": missing,
    "it is truncated or no safetensors": truncated,
    "bytes differ from their digest": damaged_body,
    "the sdelta header differs from its digest": damaged_header,
    "not an .sdelta file": no_delta_file,
    "deltakit never unpickles": pickled,
    "choose one with head": heads_differ,
    "belong to different bases": bases_differ,
    "weights for … deltas; give one for each": too_few_weights,
    "is in set mode without base values, so the size": no_base_values,
    "offline mode is on (HF_HUB_OFFLINE) and the cache": offline,
    "unknown setting": unknown_setting,
    "does not apply to method": foreign_setting,
    "it needs code of its own": code_of_its_own,
}


@pytest.mark.parametrize("part", PROVOKED)
def test_the_command_line_says_it(
    part: str, tmp_path: Path, delta_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (message,) = (m for m in MESSAGES if part in m)
    refused = deltakit(*PROVOKED[part](tmp_path / "base.safetensors", delta_file))
    assert refused.exit_code == 1, refused.output
    told = refused.stderr.splitlines()[-1]
    assert told.startswith("Error: ")
    assert pattern(message).search(told), told


def test_the_command_line_says_what_torch_lacks() -> None:
    (message,) = (m for m in MESSAGES if m.startswith("out of memory"))
    with pytest.raises(Failure) as told, explained(click.Context(main)):
        torch.empty(2**50)
    assert pattern(message).search(told.value.message)


def test_the_hub_says_it(hub: HubServer) -> None:
    """Who is not known, not allowed, or not logged in."""
    for status, part in ((401, "accept your token (401)"), (429, "too many requests (429)")):
        (message,) = (m for m in MESSAGES if part in m)
        hub.fail("GET /api/models/", status, times=9)
        refused = deltakit("inspect", "hf://org/news")
        hub.faults.clear()
        assert pattern(message).search(refused.stderr), refused.stderr
    (message,) = (m for m in MESSAGES if "the Hub shows no repository" in m)
    assert pattern(message).search(deltakit("inspect", "hf://org/none").stderr)
