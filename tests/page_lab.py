"""Documentation pages as tests run them: commands and Python in order, against what is shown.

    ```bash    commands of deltakit, one a line; a backslash at its end joins the next
    ```python  one script; the page's scripts share their names
    ```yaml    the file that its first line names: `# settings.yaml`
    ```text    what the last of these printed: whole lines, `...` for lines left out

Numbers with a point, sizes, shares, times and digests depend on the machine and compare by their
form; after the line `<!-- numbers vary -->` all numbers do. A command whose output begins with
`Error: ` is one that the page shows to be refused. Other blocks are not run.
"""

from __future__ import annotations

import ast
import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from train_lab import deltakit

DOCS = Path(__file__).parents[1] / "docs"
VARY = "<!-- numbers vary -->"
_FENCE = re.compile(rf"^({VARY}\n\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_VARYING = {
    r"\b[0-9a-f]{12,64}\b": "digest",
    r"[-+]?\d+\.\d+(e[-+]\d+)?|\b\d+e[-+]\d+": "#",
    r"(\d+|#) (B|kB|MB|GB)\b": "# bytes",
    r"(\d+|#) ?%": "# %",
    r"\b\d+:\d\d\b": "time",
}


class Block(NamedTuple):
    """A fenced block: its language, its lines, and whether all numbers in it vary."""

    kind: str
    text: str
    vary: bool


def blocks(page: str) -> list[Block]:
    """The fenced blocks of docs/`page` that name a language, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [Block(kind, inside, bool(vary)) for vary, kind, inside in _FENCE.findall(text)]


def run_page(page: str) -> None:
    """Run all blocks of a page in the working directory."""
    module, printed = ModuleType("page"), ""
    todo = blocks(page)
    for number, (block, after) in enumerate(zip(todo, [*todo[1:], None], strict=True)):
        if block.kind == "bash":
            printed = commands(block.text, after)
        elif block.kind == "python":
            script = Path(f"block-{number}.py")
            script.write_text(block.text)
            with redirect_stdout(io.StringIO()) as out:
                SourceFileLoader("page", str(script)).exec_module(module)
            printed = out.getvalue()
        elif block.kind == "yaml":
            Path(block.text.split()[1]).write_text(block.text)
        elif block.kind == "text":
            compare(block, printed)


def commands(lines: str, after: Block | None = None) -> str:
    """Run commands, one a line; what the last one prints, notes included.

    after: the block that follows, which may show that the last one is refused.
    """
    printed, todo = "", lines.replace("\\\n", " ").splitlines()
    refused = after is not None and after.kind == "text" and "\nError: " in f"\n{after.text}"
    for number, line in enumerate(todo, 1):
        program, *arguments = shlex.split(line)
        assert program == "deltakit", line
        result = deltakit(*arguments)
        expected = 1 if refused and number == len(todo) else 0
        assert result.exit_code == expected, f"{line}\n{result.output}"
        printed = result.output
    return printed


def compare(shown: Block, printed: str) -> None:
    """Fail unless the lines shown are those printed, in order, `...` standing for any number."""
    left, skipping = iter(_lines(printed, shown.vary)), False
    for wanted in _lines(shown.text, shown.vary):
        if wanted == "...":
            skipping = True
            continue
        found = next((line for line in left if line == wanted or not skipping), None)
        assert found == wanted, f"shown: {wanted}\nfound: {found}\nin:\n{printed}"
        skipping = False
    assert skipping or next(left, None) is None, f"more was printed:\n{printed}"


def pattern(message: str) -> re.Pattern[str]:
    """The fixed parts of a message, in order, anything standing for each `…`."""
    parts = (re.escape(part.strip()) for part in message.split("…"))
    return re.compile(".*?".join(part for part in parts if part), re.DOTALL)


def stands_in_source(message: str) -> bool:
    """Whether one string of the source holds all fixed parts of a message, in order."""
    return any(pattern(message).search(text) for text in _texts())


@cache
def _texts() -> list[str]:
    """All strings of the source, each with a NUL where a variable stands."""
    folders = (DOCS.parent / name for name in ("deltakit", "cli", "formats"))
    found = []
    for file in (file for folder in folders for file in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                values = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                found.append("".join(map(str, values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def _lines(text: str, vary: bool) -> Iterator[str]:
    for line in text.splitlines():
        for pattern, form in _VARYING.items():
            line = re.sub(pattern, form, line)
        line = re.sub(r"[\d,]*\d", "#", line) if vary else line
        yield " ".join(line.split())
