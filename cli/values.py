"""Types of values on the command line: what is read, what is refused, and how it is completed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from deltakit.budget import parse_budget
from deltakit.errors import BudgetError, ConfigError, nearest
from deltakit.hub.location import Location, is_location
from deltakit.shares import Shard

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]  # generic in newer releases of click only
    ChoiceType = click.Choice[str]
    FunctionType = click.types.FuncParamType[Any, Any]
    Items = list[CompletionItem[str]]
else:
    ParamType, ChoiceType, FunctionType = click.ParamType, click.Choice, click.types.FuncParamType
    Items = list

Known = Callable[[], Iterable[str]]  # names that may be given, asked for only when needed


class Budget(ParamType):
    """`100k`, `2.5m`, `5000` become an int; a share such as `0.1%` stays text, for the library."""

    name = "budget"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        """Refuse what is no budget as wrong usage."""
        try:
            count = parse_budget(value, total=100)
        except BudgetError as error:
            self.fail(str(error), param, ctx)
        return str(value).strip() if str(value).strip().endswith("%") else count


class ShardOf(ParamType):
    """`3/8`, job 3 of 8."""

    name = "shard"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Shard:
        """Refuse what is none as wrong usage."""
        try:
            return Shard.parse(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class Listed(ParamType):
    """A comma-separated list of another type: `25k,50k` or `0.5,0.5`."""

    def __init__(self, item: ParamType) -> None:
        self.item = item
        self.name = f"{item.name},..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Convert each item; an empty one is wrong usage."""
        items = value.split(",") if isinstance(value, str) else value
        return tuple(self.item.convert(item, param, ctx) for item in items)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        """Complete the last item."""
        before, comma, last = incomplete.rpartition(",")
        found = self.item.shell_complete(ctx, param, last)
        return [CompletionItem(f"{before}{comma}{item.value}", item.type) for item in found]


class Choice(ChoiceType):
    """One of a few names; a misspelt one is answered with the nearest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """`'magnitud' is not one of magnitude, order; nearest: magnitude`."""
        known = [str(choice) for choice in self.choices]
        return f"{value!r} is not one of {', '.join(known)}{nearest(str(value), known, 1)}"


class Name(ParamType):
    """A name that the library checks, and that a shell completes."""

    name = "text"

    def __init__(self, known: Known) -> None:
        self.known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Any text."""
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        """The known names that begin so."""
        return completed(self.known(), incomplete)


class LocalPath(click.Path):
    """A path on this machine; a location on the Hub is wrong usage.

    suffixes: of the files that a shell completes beside folders, all where there are none.
    """

    def __init__(self, *suffixes: str, folders_only: bool = False) -> None:
        super().__init__(path_type=Path)
        self.suffixes = suffixes
        self.folders_only = folders_only

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does it."""
        if is_location(value):
            self.fail(f"{value} is on the Hub, and a local path is needed here", param, ctx)
        return super().convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        """Leave it to the shell."""
        return paths(self.suffixes, self.folders_only)


class SourcePath(LocalPath):
    """A path on this machine or `hf://owner/repo[@revision][/file]`, which stays text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what is meant to be a location and is none as wrong usage."""
        if not is_location(value):
            return super().convert(value, param, ctx)
        try:
            return str(Location.parse(value))
        except ConfigError as error:
            self.fail(str(error), param, ctx)


def completed(names: Iterable[str], incomplete: str) -> Items:
    """The names that begin so, as completions."""
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def paths(suffixes: Iterable[str] = (), folders_only: bool = False) -> Items:
    """The one completion that tells a shell to complete paths: folders, and files of a suffix."""
    return [CompletionItem(" ".join(suffixes), "dir" if folders_only else "file")]


PATH = LocalPath()
FOLDER = LocalPath(folders_only=True)
CONFIG = LocalPath(".yaml", ".yml")
NEW_DELTA = LocalPath(".sdelta")
SOURCE = SourcePath()
DELTA = SourcePath(".sdelta")
BASE = SourcePath(".safetensors")
MODEL_OR_DELTA = SourcePath(".safetensors", ".sdelta")
BUDGET = Budget()
BUDGETS = Listed(BUDGET)
NUMBERS = Listed(click.FLOAT)
SHARD = ShardOf()
