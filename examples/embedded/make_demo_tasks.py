"""Make the two text-classification tasks of `deltakit demo` from Python's standard library.

    python examples/embedded/make_demo_tasks.py --output deltakit/demo_data/tasks

family: which part of the library a docstring paragraph comes from (6 classes).
kind: what a paragraph is: the docstring of a function, of a class, a comment, or the message of an
exception (4 classes).

Each task has as many texts of every class as its rarest class allows. A text belongs to the
validation split if its hash says so (`stdlib_text.held_out`), which the pretraining script
respects too; no text is in both splits. Takes about a minute.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from stdlib_text import Text, digest, held_out, library

WORDS = range(5, 37)  # length of a text
SIZES = {"family": (340, 80), "kind": (500, 120)}  # texts a class: (train, validation)
FAMILIES = {
    "network": "http urllib socket ssl ftplib smtplib imaplib poplib nntplib telnetlib xmlrpc"
    " socketserver wsgiref cgi asyncore asynchat smtpd email mailbox mimetypes html",
    "concurrency": "asyncio threading multiprocessing concurrent queue selectors subprocess"
    " signal sched contextvars thread",
    "graphics": "tkinter idlelib turtle turtledemo curses",
    "numbers": "decimal _pydecimal statistics datetime math cmath random fractions calendar"
    " numbers zoneinfo _strptime colorsys heapq bisect",
    "packaging": "distutils importlib zipimport venv ensurepip pkgutil site sysconfig"
    " modulefinder runpy compileall py_compile",
    "files": "io _pyio os posix pathlib shutil zipfile tarfile gzip bz2 lzma tempfile glob fnmatch"
    " posixpath ntpath genericpath filecmp fileinput stat zlib csv configparser plistlib dbm"
    " shelve pickle json sqlite3",
}
FAMILY_OF = {module: family for family, modules in FAMILIES.items() for module in modules.split()}


def family(text: Text) -> str | None:
    """The family of the first known part of a docstring's module name, tests included."""
    if text.kind != "docstring":
        return None
    parts = [part.removeprefix("test_") for part in text.module.split(".")]
    return next((FAMILY_OF[part] for part in parts if part in FAMILY_OF), None)


def kind(text: Text) -> str | None:
    """What the text is; None for help topics and docstrings of modules."""
    if text.kind == "docstring":
        return text.owner if text.owner in ("function", "class") else None
    return text.kind if text.kind in ("comment", "error") else None


def split(texts: list[Text], task: str) -> dict[str, list[dict[str, str]]]:
    """Rows of {"text", "label"} by split, in the order of the texts' hashes."""
    label_of = {"family": family, "kind": kind}[task]
    sizes = dict(zip(("train", "validation"), SIZES[task], strict=True))
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in sizes}
    taken: dict[tuple[str, str], int] = defaultdict(int)
    for text in sorted(texts, key=lambda t: digest(t.text)):
        label = label_of(text)
        part = "validation" if held_out(text.text) else "train"
        if label and len(text.text.split()) in WORDS and taken[part, label] < sizes[part]:
            taken[part, label] += 1
            rows[part].append({"text": text.text, "label": label})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo's two tasks.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    output = parser.parse_args().output
    texts = library()
    for task in SIZES:
        (output / task).mkdir(parents=True, exist_ok=True)
        for name, rows in split(texts, task).items():
            lines = [json.dumps(row) + "\n" for row in rows]
            (output / task / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"{task}/{name}.jsonl: {len(rows)} texts")


if __name__ == "__main__":
    main()
