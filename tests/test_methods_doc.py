"""docs/methods.md cannot rot: what it calls built in or through peft is registered, and all is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deltakit.adapters.bottleneck_config import ACTIVATIONS
from deltakit.adapters.kinds import KINDS
from deltakit.adapters.peft_kinds import REFUSED
from deltakit.combine import METHODS as STACKING
from deltakit.selection import HEURISTICS, METHODS

PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
STATUSES = ("built in", "through peft", "as a delta", "out of scope")
FLAGS = {"method": METHODS, "heuristic": HEURISTICS, "adapter": KINDS, "stacking": STACKING}


def rows() -> list[list[str]]:
    """The cells of every row of the tables of methods."""
    tables = PAGE.partition("## Bottleneck adapters")[0]
    lines = [line for line in tables.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] not in ("method", "---")]


def named(text: str) -> dict[str, set[str]]:
    """Registry -> names that flags in the text give."""
    found: dict[str, set[str]] = {family: set() for family in FLAGS}
    for stack, flag, name in re.findall(
        r"(stack )?--(method|heuristic|adapter) ([a-z0-9:-]+)", text
    ):
        found["stacking" if stack else flag].add(name)
    return found


@pytest.mark.parametrize("family", FLAGS)
def test_the_page_names_all_that_is_registered_and_nothing_else(family: str) -> None:
    assert named(PAGE)[family] == set(FLAGS[family].names())


def test_every_method_has_its_place() -> None:
    assert len(rows()) > 120
    for row in rows():
        status = row[-1].partition(":")[0]
        assert status in STATUSES, row
        if status in ("built in", "through peft"):
            assert any(named(row[-1]).values()), row
    assert len({tuple(row[:2]) for row in rows()}) == len(rows())


def test_what_goes_through_peft_is_peft_s() -> None:
    for row in rows():
        kinds = [KINDS[kind] for kind in named(row[-1])["adapter"]]
        if row[-1].startswith("through peft"):
            assert kinds and all(kind.peft for kind in kinds), row
    told = {
        kind
        for row in rows()
        if row[-1].startswith("through")
        for kind in named(row[-1])["adapter"]
    }
    assert told == {record.name for record in KINDS if record.target.peft}


def test_what_is_refused_of_peft_is_told() -> None:
    told = PAGE.partition("peft's other types")[2].partition("\n\n")[0]
    assert set(REFUSED) <= set(re.findall(r"`([a-z0-9-]+)`", told))


def test_the_options_of_bottlenecks_are_as_the_page_says() -> None:
    """Its table of defaults is that of the kinds."""
    table = PAGE.partition("| | houlsby |")[2]
    for option in ("reduction_factor", "activation", "scaling", "residual", "initial"):
        line = next(line for line in table.splitlines() if line.startswith(f"| `{option}`"))
        defaults = [KINDS[kind].fields[option] for kind in ("houlsby", "pfeiffer", "parallel")]
        shown = [
            str(d).lower() if isinstance(d, bool) else f"{d:g}" if isinstance(d, float) else str(d)
            for d in defaults
        ]
        assert [cell.strip() for cell in line.strip("|").split("|")[1:]] == shown, option
    assert all(activation in PAGE for activation in ACTIVATIONS)
