"""English prose from Python's own standard library: docstrings, comments, help topics, messages.

Shared by `make_demo_tasks.py` and `pretrain_tiny.py`. Everything read here is installed with the
running interpreter under the PSF licence (LICENSE.txt beside the library). Files that carry a
copyright line of somebody else than the Python Software Foundation are left out.
"""

import ast
import hashlib
import importlib
import inspect
import io
import re
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

STDLIB = Path(sysconfig.get_paths()["stdlib"])
NOT_OURS = {"site-packages", "dist-packages", "__pycache__", "_bundled", "data", "bad_coding"}
NOT_ENGLISH = {"encodings", "pydoc_data", "cjkencodings", "antigravity.py", "this.py"}
COPYRIGHT = re.compile(r"^.*(?:copyright|©).*\d{4}.*$", re.IGNORECASE | re.MULTILINE)
TOPIC_MARKUP = re.compile(r'[*"`]+(?=\w)|(?<=[\w)])[*"`]+')


@dataclass(frozen=True)
class Text:
    """One paragraph and where it comes from."""

    text: str  # white space collapsed
    kind: str  # "docstring", "comment", "error" or "topic"
    module: str  # dotted name of the module, or of the help topic
    owner: str = ""  # of a docstring: "module", "class" or "function"; of an error: its type


def digest(text: str) -> int:
    """64-bit hash of a text's letters and digits: equal for texts that differ in punctuation."""
    letters = re.sub(r"[^a-z0-9]+", "", text.lower())
    return int.from_bytes(hashlib.sha256(letters.encode()).digest()[:8], "big")


def held_out(text: str) -> bool:
    """Whether a text is kept for validation: one in eight, decided by its hash alone."""
    return digest(text) % 8 == 0


def paragraphs(block: str) -> Iterator[str]:
    """Split a docstring or comment at blank lines; keep the pieces that read like prose."""
    for piece in re.split(r"\n\s*\n", block):
        text = " ".join(piece.split())
        words = re.findall(r"[A-Za-z]{2,}", text)
        letters = sum(c.isalpha() or c == " " for c in text)
        if len(words) >= 4 and letters >= 0.75 * len(text) and text.isascii() and ">>>" not in text:
            yield text


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """(line, owner kind, docstring) of a module and everything in it."""
    kinds = {
        ast.Module: "module",
        ast.ClassDef: "class",
        ast.FunctionDef: "function",
        ast.AsyncFunctionDef: "function",
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                yield getattr(node, "lineno", 0), kinds[type(node)], doc


def comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each run of whole-line comments."""
    block: list[str] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or not token.line.lstrip().startswith("#"):
            continue
        if block and token.start[0] != last + 1:
            yield last, "\n".join(block)
            block = []
        block.append(token.string.lstrip("#!:- "))
        last = token.start[0]
    if block:
        yield last, "\n".join(block)


def errors(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """(line, exception type, message) of each `raise Type("message ...")`."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        called, message = node.exc.func, node.exc.args[0]
        if isinstance(message, ast.BinOp) and isinstance(message.op, ast.Mod):
            message = message.left
        if isinstance(message, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "%s" for p in message.values]
            message = ast.Constant("".join(str(p) for p in parts))
        text = message.value if isinstance(message, ast.Constant) else None
        if isinstance(called, ast.Name) and isinstance(text, str):
            yield node.lineno, called.id, text


def from_source(path: Path) -> list[Text]:
    """Every paragraph of one source file, in the order of its lines."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        found = [(line, "comment", "", text) for line, text in comments(source)]
    except (UnicodeDecodeError, SyntaxError, ValueError, tokenize.TokenError):
        return []  # the test suite keeps broken files on purpose
    if any("Python Software Foundation" not in line for line in COPYRIGHT.findall(source)):
        return []
    found += [(line, "docstring", owner, text) for line, owner, text in docstrings(tree)]
    found += [(line, "error", name, text) for line, name, text in errors(tree)]
    module = ".".join(path.relative_to(STDLIB).with_suffix("").parts).removesuffix(".__init__")
    return [
        Text(text, kind, module, owner)
        for _, kind, owner, block in sorted(found)
        for text in paragraphs(block)
    ]


def from_extensions() -> list[Text]:
    """Docstrings of the modules written in C, which have no source file to parse."""
    texts: list[Text] = []
    built = {path.name.split(".")[0] for path in (STDLIB / "lib-dynload").glob("*.so")}
    for name in sorted(sys.stdlib_module_names & (built | set(sys.builtin_module_names))):
        try:
            module = importlib.import_module(name)
        except ImportError:  # an optional module whose C library is missing here
            continue
        things: list[tuple[str, object]] = [("module", module)]
        for _, thing in sorted(vars(module).items(), key=lambda item: item[0]):
            if inspect.isclass(thing) and thing.__module__ in (name, "builtins"):
                things.append(("class", thing))
                members = sorted(vars(thing).items(), key=lambda item: item[0])
                things += [("function", m) for n, m in members if callable(m)]
            elif inspect.isroutine(thing):
                things.append(("function", thing))
        for owner, thing in things:
            doc = inspect.getdoc(thing) if owner != "module" else thing.__doc__
            texts += [Text(t, "docstring", name.lstrip("_"), owner) for t in paragraphs(doc or "")]
    return texts


def from_topics() -> list[Text]:
    """The chapters of the language reference that `help()` shows, without their markup."""
    return [
        Text(text, "topic", name)
        for name in sorted(topics)
        for text in paragraphs(TOPIC_MARKUP.sub("", topics[name]))
    ]


def library() -> list[Text]:
    """Every paragraph once, in a fixed order: sources by path, then extensions, then topics."""
    paths = sorted(
        path
        for path in STDLIB.rglob("*.py")
        if not (NOT_OURS | NOT_ENGLISH).intersection(path.relative_to(STDLIB).parts)
    )
    texts = [text for path in paths for text in from_source(path)]
    texts += from_extensions() + from_topics()
    once: dict[int, Text] = {}
    for text in texts:
        once.setdefault(digest(text.text), text)
    return list(once.values())
