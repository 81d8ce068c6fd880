"""Pages of deltas: their size, the time and memory that they take, and how soon they are drawn.

    python benchmarks/pages.py OUT [--rounds 5] [--folder DIR]

Deltas of 100,000 and 10 million entries on a model's tensors and on 1,000, and ten deltas to
compare. Pages are written by the command line, each in a fresh process whose wall time and peak
memory count. Headless Chromium opens each page several times: the median time from the navigation
to the second frame after the script, when all is laid out and painted. OUT gets the pages and their
screenshots. The bars: under 1 MB and under 2 s.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser_lab import Browser, find_browser, started

from deltakit.budget import format_bytes
from deltakit.cli.options import table
from deltakit.delta import SparseDelta, TensorDelta
from deltakit.formats.sdelta import save

SHAPE = (2048, 1024)
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
CHILD = """
import re, sys
from pathlib import Path
from deltakit.cli.main import main
main(sys.argv[1:], standalone_mode=False)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def write_delta(path: Path, tensors: int, entries: int, seed: int = 0) -> Path:
    """Random entries, log-normal changes of either sign, unmasked over 1,000 steps."""
    rng = np.random.default_rng(seed)
    made = {}
    for number in range(tensors):
        name = f"model.layers.{number // len(KINDS)}.{KINDS[number % len(KINDS)]}.weight"
        count = entries // tensors + (number < entries % tensors)
        values = rng.lognormal(-7, 1, count) * rng.choice([-1, 1], count)
        made[name] = TensorDelta(
            name=name,
            shape=SHAPE,
            dtype="bfloat16",
            mode="add",
            indices=np.sort(rng.choice(SHAPE[0] * SHAPE[1], count, replace=False)),
            values=values.astype(np.float32),
            order=rng.integers(0, 1000, count),
        )
    save(SparseDelta(tensors=made), path)
    return path


def inspected(tensors: int, entries: int) -> Callable[[Path], list[str]]:
    """Makes the delta in a folder and gives the command that writes its page."""

    def prepare(folder: Path) -> list[str]:
        return ["inspect", str(write_delta(folder / "delta.sdelta", tensors, entries))]

    return prepare


def compared(deltas: int, tensors: int, entries: int) -> Callable[[Path], list[str]]:
    """The same of several deltas to compare."""

    def prepare(folder: Path) -> list[str]:
        paths = [folder / f"delta-{seed}.sdelta" for seed in range(deltas)]
        for seed, path in enumerate(paths):
            write_delta(path, tensors, entries, seed)
        return ["compare", *map(str, paths)]

    return prepare


CASES = {
    "inspect-100k": inspected(168, 100_000),
    "inspect-10m": inspected(168, 10_000_000),
    "inspect-10m-1000-tensors": inspected(1000, 10_000_000),
    "compare-10x1000-tensors": compared(10, 1000, 100_000),
}


def write_page(command: list[str], page: Path) -> tuple[float, int]:
    """Seconds and peak bytes of a process that runs the command and writes the page."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "-q", *command, "--html", str(page), "--force"],
        check=True,
        capture_output=True,
        text=True,
    )
    return time.perf_counter() - start, 1024 * int(done.stdout.split()[-1])


def look(browser: Browser, page: Path, rounds: int) -> float:
    """Median milliseconds until the page is drawn; takes its screenshots."""
    browser.reset()
    drawn = median(browser.open(page) for _ in range(rounds))
    for width, scheme in ((1280, "light"), (1280, "dark"), (360, "light")):
        browser.reset()
        browser.resize(width, 900)
        browser.scheme(scheme)
        browser.open(page)
        browser.screenshot(page.with_name(f"{page.stem}-{width}-{scheme}.png"))
    return drawn


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    paths = find_browser()
    if paths is None:
        sys.exit("no chromium with chromedriver on the PATH")
    rows = [["page", "deltas", "page's size", "written in", "peak memory", "drawn in"]]
    with (
        tempfile.TemporaryDirectory(dir=given.folder) as folder,
        started(paths, Path(folder) / "browser") as browser,
    ):
        for name, prepare in CASES.items():
            deltas, page = Path(folder) / name, given.out.absolute() / f"{name}.html"
            deltas.mkdir()
            command = prepare(deltas)
            size = sum(path.stat().st_size for path in deltas.iterdir())
            seconds, peak = write_page(command, page)
            drawn = look(browser, page, given.rounds)
            told = [format_bytes(n) for n in (size, page.stat().st_size, peak)]
            rows.append([name, told[0], told[1], f"{seconds:.1f} s", told[2], f"{drawn:.0f} ms"])
    print(table(rows, right=range(1, 6)))


if __name__ == "__main__":
    main()
