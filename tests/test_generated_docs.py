"""Pages made from commands and registries are as they would be made now, and name all there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from deltakit.cli.main import COMMANDS, main
from deltakit.cli.reference import ENVIRONMENT, cli_markdown
from deltakit.combine import METHODS
from deltakit.combine.stacking_doc import stacking_markdown
from deltakit.formats.bridges import BRIDGES, Bridge

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GROUP = click.Context(main, info_name="deltakit")


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_the_page_of_commands_is_theirs() -> None:
    assert page("cli.md") == cli_markdown(), "run: python -m deltakit.cli.reference > docs/cli.md"


def test_the_page_of_stacking_methods_is_theirs() -> None:
    assert page("stacking.md") == stacking_markdown(), (
        "run: python -m deltakit.combine.stacking_doc > docs/stacking.md"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_and_example_is_told(name: str) -> None:
    command = main.get_command(GROUP, name)
    assert command is not None
    told = page("cli.md").partition(f"\n## deltakit {name}\n")[2].partition("\n## ")[0]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert all(f"`{flag}`" in told for flag in parameter.opts if flag[:2] == "--")
    lines = (command.help or "").partition("Examples:\n")[2].splitlines()
    assert all(line.strip() in told for line in lines)


def test_the_variables_are_ones_that_something_reads() -> None:
    from huggingface_hub import constants

    sources = [*(ROOT / "cli").glob("*.py"), Path(constants.__file__)]
    text = "".join(p.read_text(encoding="utf-8") for p in sources if p.name != "reference.py")
    hub = "".join(
        p.read_text(encoding="utf-8") for p in Path(constants.__file__).parent.glob("*.py")
    )
    assert [name for name in ENVIRONMENT if f'"{name}"' not in text + hub] == []


@pytest.mark.parametrize("module", ["deltakit.cli.reference", "deltakit.combine.stacking_doc"])
def test_making_a_page_needs_no_torch(module: str) -> None:
    code = f"import sys, runpy; runpy.run_module({module!r}, run_name='__main__'); "
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_stacking_method_has_its_section_and_every_option_its_default() -> None:
    told = page("stacking.md")
    for record in METHODS:
        section = told.partition(f"\n## {record.name}\n")[2].partition("\n## ")[0]
        for name, value in record.target().options().items():
            shown = str(value).lower() if isinstance(value, bool) else value
            assert f"| `{name}` | `{shown}` |" in section, (record.name, name)


def test_every_format_has_its_row() -> None:
    rows = {}
    for line in page("formats.md").splitlines():
        if line.startswith("| `"):
            name, reads, writes, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            rows[name.strip("`")] = (reads == "yes", writes == "yes")
    assert rows == {
        r.name: (r.target.read is not Bridge.read, r.target.write is not Bridge.write)
        for r in BRIDGES
    }
