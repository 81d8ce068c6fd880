"""The house is in order: packages are listed, links exist, exports agree with what they promise."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

import deltakit

ROOT = Path(__file__).resolve().parents[1]
CODE = [ROOT / "deltakit", ROOT / "cli", ROOT / "formats"]


def listed_packages() -> set[str]:
    """`packages` of pyproject.toml (Python 3.10 has no tomllib, so read as text)."""
    found = re.search(
        r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )
    assert found is not None
    return set(re.findall(r'"([^"]+)"', found[1]))


def test_every_package_is_listed() -> None:
    """setuptools cannot find renamed packages by itself; an unlisted one is missing from wheels."""
    there = set()
    for folder in CODE:
        for marker in folder.rglob("__init__.py"):
            parts = marker.parent.relative_to(ROOT).parts
            there.add(".".join(parts if parts[0] == "deltakit" else ("deltakit", *parts)))
    assert listed_packages() == there


def test_every_folder_with_code_is_a_package() -> None:
    lonely = {
        path.parent
        for folder in CODE
        for path in folder.rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    }
    assert lonely == set()


@pytest.mark.parametrize("name", ["cli", "formats"])
def test_links_lead_to_the_root_folders(name: str) -> None:
    link = ROOT / "deltakit" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"  # noqa: PTH115  (the link as it is stored)


def test_no_module_is_imported_by_its_bare_name() -> None:
    """`import cli` would load the code a second time, under another name."""
    bare = []
    for path in [p for folder in [*CODE, ROOT / "tests"] for p in folder.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            bare += [f"{path}: {n}" for n in names if n.partition(".")[0] in ("cli", "formats")]
    assert bare == []


def typed_exports() -> dict[str, str]:
    """name -> module of the imports under TYPE_CHECKING in deltakit/__init__.py."""
    tree = ast.parse((ROOT / "deltakit" / "__init__.py").read_text())
    guards = [
        node
        for node in tree.body
        if isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    ]
    imports = [i for guard in guards for i in guard.body if isinstance(i, ast.ImportFrom)]
    return {a.asname or a.name: i.module or "" for i in imports for a in i.names}


def test_the_lazy_table_agrees_with_what_type_checkers_see() -> None:
    assert typed_exports() == deltakit._EXPORTS
    assert set(deltakit.__all__) == {"__version__", *deltakit._EXPORTS}


@pytest.mark.parametrize("name", sorted(deltakit._EXPORTS))
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    found = getattr(deltakit, name)
    assert found.__module__.startswith(deltakit._EXPORTS[name])
    assert found.__doc__


def test_no_module_has_the_name_of_a_public_function() -> None:
    """Importing `deltakit.merge` would turn `dk.merge` into that module."""
    modules = {path.stem for path in (ROOT / "deltakit").glob("*.py")}
    assert not modules & set(deltakit._EXPORTS)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'deltakit' has no attribute 'trunkate'"):
        _ = deltakit.trunkate


def test_make_needs_nothing_installed_by_hand() -> None:
    """The requirement files that the Makefile names are there, and torch is pinned."""
    makefile = (ROOT / "Makefile").read_text()
    for name in ("pyproject.toml", "constraints.txt"):
        assert name in makefile
        assert (ROOT / name).is_file()
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
