"""The tables of docs/scaling.md, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import scaling_arithmetic as cost
from scaling_shapes import MODELS, Model

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
DENSITY = 0.001  # of the memory tables
RANKS = (8, 64, 512)
DENSITIES = (0.0001, 0.001, 0.01)
BANDWIDTH = 2e9  # bytes per second, read and written together
SPLIT = ("70B", 64)  # which memory is told term by term
Method = Callable[[Model, int], cost.Memory]


def entries(model: Model, density: float = DENSITY) -> int:
    """The budget at a density."""
    return round(density * model.weights)


METHODS: dict[str, tuple[Method, Method]] = {
    "full AdamW": (cost.full_parallel, cost.full_sharded),
    "LoRA r16": (cost.lora_parallel, cost.lora_sharded),
    "ID3 selecting": (
        lambda model, n: cost.selecting_parallel(model, n, entries(model)),
        lambda model, n: cost.selecting_sharded(model, n, entries(model)),
    ),
    "fixed support": (
        lambda model, n: cost.fixed_parallel(model, n, entries(model)),
        lambda model, n: cost.fixed_sharded(model, n, entries(model)),
    ),
}


def giga(size: float) -> str:
    """Gigabytes with three digits, or more where they are whole."""
    number = size / 1e9
    digits = 0 if number >= 100 else 1 if number >= 10 else 2 if number >= 0.1 else 3
    return f"{number:,.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> str:
    """A Markdown table whose first columns are texts and whose others are numbers."""
    marks = ["---:" if column >= texts else "---" for column in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, marks, *rows])


def shapes() -> str:
    """The four models."""
    rows = [
        [
            size,
            m.name,
            f"{m.weights:,}",
            f"{len(m.tensors):,}",
            giga(2 * m.largest),
            giga(2 * m.unit),
        ]
        for size, m in MODELS.items()
    ]
    head = ["", "shape", "weights", "tensors", "largest live tensor, GB", "largest layer, GB"]
    return table(head, rows, texts=2)


def memory() -> str:
    """GB per rank by model, method and number of ranks."""
    rows = []
    for size, model in MODELS.items():
        for name, (parallel, sharded) in METHODS.items():
            told = [giga(sharded(model, n).peak) for n in RANKS]
            rows.append([f"{size}, {name}", giga(parallel(model, RANKS[0]).peak), *told])
    head = ["GB", "data parallel", *(f"FSDP2, n = {n}" for n in RANKS)]
    return table(head, rows)


def memory_split() -> str:
    """One model's memory term by term."""
    size, n = SPLIT
    rows = []
    for name, pair in METHODS.items():
        for how, method in zip(("data parallel", f"FSDP2, n = {n}"), pair, strict=True):
            found = method(MODELS[size], n)
            above = max(found.backward, found.update, key=lambda part: sum(part.values()))
            told = [f"{name}, {how}", _terms(found.held), _terms(above), giga(found.peak)]
            rows.append(told)
    return table([size, "held all the time", "and at the peak", "together"], rows, texts=3)


def _terms(found: Mapping[str, float]) -> str:
    return " + ".join(f"{term} {giga(size)}" for term, size in found.items()) or "nothing"


def activations() -> str:
    """Per 1,024 tokens of a rank's batch."""
    rows = [[size, giga(cost.activations(model, 1024))] for size, model in MODELS.items()]
    return table(["", "GB per 1,024 tokens"], rows)


def exchange() -> str:
    """GB that a rank sends per step, on 64 ranks."""
    sent = {size: cost.sent_per_step(m, 64, entries(m)) for size, m in MODELS.items()}
    rows = [[name, *(giga(each[name]) for each in sent.values())] for name in sent["8B"]]
    return table(["GB", *MODELS], rows)


def files() -> str:
    """Sizes of deltas and of checkpoints of a run."""
    rows = []
    for density in DENSITIES:
        bits = f"{cost.entropy_bits(density):.2f}, {cost.rice_bits(density):.2f}"
        for size, model in MODELS.items():
            k, tensors = entries(model, density), len(model.tensors)
            forms = ((4, False), (2, False), (2, True))
            told = [
                giga(cost.delta_bytes(k, density, tensors, value=value, seeded=seeded))
                for value, seeded in forms
            ]
            saved = giga(cost.checkpoint_bytes(k))
            rows.append([f"{100 * density:g} % of {size}", f"{k:,}", bits, *told, saved])
    head = ["d", "entries", "bits per index: entropy, stored", "float32 values", "bfloat16"]
    return table([*head, "bfloat16, random mask", "training state"], rows)


def merging() -> str:
    """Seconds of merges at a given bandwidth."""
    rows = []
    for size, model in MODELS.items():
        new = cost.merge_to_new_file(model)
        told = [giga(2 * model.weights), duration(new.seconds(BANDWIDTH))]
        for density in (0.00001, *DENSITIES):
            found = cost.merge_in_place(model, entries(model, density))
            told.append(duration(found.seconds(BANDWIDTH)))
        rows.append([size, *told])
    head = ["", "base, GB", "new files", "in place, 0.001 %", "0.01 %", "0.1 %", "1 %"]
    return table(head, rows)


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min"


TABLES = {
    "shapes": shapes,
    "memory": memory,
    "split": memory_split,
    "activations": activations,
    "exchange": exchange,
    "files": files,
    "merging": merging,
}


def filled(page: str) -> str:
    """The page with every table between its marks made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n\n", "\n\n<!-- end -->"
        if page.count(begin) != 1:
            raise SystemExit(f"{PAGE.name}: table {name!r} has {page.count(begin)} places")
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = before + begin + make() + end + after
    return page
