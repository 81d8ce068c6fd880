"""docs/cli.md, made from the commands themselves.

python -m deltakit.cli.reference > docs/cli.md
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import fields
from pathlib import PurePath

import click

from deltakit.cli.command import section_of
from deltakit.cli.main import COMMANDS, main
from deltakit.cli.settings_options import SettingType
from deltakit.cli.values import Listed, LocalPath, ParamType, SourcePath
from deltakit.training.config import TrainConfig, describe

EXIT_CODES = {
    "0": "done",
    "1": "an error, told in one line on stderr; or a check that found something wrong",
    "2": "wrong usage",
    "128 + N": "stopped by signal N, such as 130 for Ctrl-C; a run that stops so has saved itself",
}
ENVIRONMENT = {
    "NO_COLOR": "set to anything: no colours; it wins over the next two",
    "FORCE_COLOR": "`1`: colours where there is no terminal, too; so does CLICOLOR_FORCE",
    "CLICOLOR": "`0`: no colours",
    "DELTAKIT_DEBUG": "set to anything: errors come with their traceback",
    "HF_TOKEN": "the token for what is private on the Hub and for publishing; `hf auth login` keeps "
    "one instead",
    "HF_ENDPOINT": "the Hub's address, for a mirror or a Hub of your own",
    "HF_HOME": "the folder of Hugging Face's token and cache",
    "HF_HUB_CACHE": "the folder of downloads alone",
    "HF_HUB_OFFLINE": "`1`: only what the cache holds, nothing is asked of the network",
    "HF_HUB_DISABLE_PROGRESS_BARS": "`1`: no bars while downloading, as with `--quiet` and `--json`",
    "HF_HUB_DISABLE_XET": "`1`: downloads and uploads without Xet",
}
_TYPES = {"integer": "whole number", "float": "number", "boolean": "true or false"}
_CODE = re.compile(r"(hf://[^\s,;:)]*[^\s,;:).]|(?<![\w`-])--?[a-z][a-z-]*(?![\w`]))")


_INTRODUCTION = """\
Options may stand before or after what a command works on. Budgets and other counts take `100k`, `2.5m`
or, as a share, `0.1%`; lists have commas between. What a command reads may be a path or on the Hub:
`hf://owner/repo[@revision][/file]` ([the Hub](hub.md)). `-h` and `--help` tell what stands here.
"""


def cli_markdown() -> str:
    """All commands with their arguments, options and examples; exit codes; the environment."""
    commands = ((f"[`{n}`](#deltakit-{n})", entry.summary) for n, entry in COMMANDS.items())
    variables = ((f"`{name}`", about) for name, about in ENVIRONMENT.items())
    group = click.Context(main, info_name="deltakit")
    lines = ["# Command line", "", *_prose(main), "", _INTRODUCTION]
    lines += _rows(("command", ""), commands)
    lines += ["", "## Exit codes", "", *_rows(("code", "means"), EXIT_CODES.items())]
    lines += ["", "## Environment", "", *_rows(("variable", "what it does"), variables)]
    lines += ["", "## deltakit itself", "", *_options(group)]
    for name in COMMANDS:
        command = main.get_command(group, name)
        assert command is not None
        lines += ["", f"## deltakit {name}", "", *_command(click.Context(command, group, name))]
    return "\n".join(lines) + "\n"


def _command(context: click.Context) -> list[str]:
    """A command's usage, help, arguments and options, and what it is like to use it."""
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    settings = _all_settings(command)
    lines = ["```text", usage, "```", "", *_prose(command), "", *_arguments(context)]
    lines += _options(context, without=settings)
    if settings:
        told = "Every [setting](settings.md), each with the meaning and default told there:"
        lines += ["", told, ""]
        lines += [f"- [{group}]({_anchor(group)}): {names}" for group, names in _grouped(settings)]
    return lines


def _all_settings(command: click.Command) -> set[str]:
    """The settings among the options of a command that takes them all, as its CONFIG does."""
    if all(parameter.name != "config" for parameter in command.params):
        return set()
    return {p.name for p in command.params if p.name is not None and _is_setting(p)}


def _grouped(settings: set[str]) -> Iterable[tuple[str, str]]:
    described = {name: about for name, about in describe().items() if name in settings}
    for group in dict.fromkeys(about.group for about in described.values()):
        names = (name for name, about in described.items() if about.group == group)
        yield group, ", ".join(f"`--{name.replace('_', '-')}`" for name in names)


def _anchor(group: str) -> str:
    return f"settings.md#{group.lower().replace(' ', '-')}"


def _prose(command: click.Command) -> list[str]:
    """A command's help as Markdown: paragraphs of one line, examples as blocks of commands."""
    lines: list[str] = []
    for paragraph in (command.help or "").split("\n\n"):
        kept = paragraph.strip(" \n").startswith("\b")  # click's mark of text not to be wrapped
        rows = [row for row in paragraph.split("\n") if row.strip() not in ("", "\b")]
        if kept and rows[0].strip() == "Examples:":
            rows = rows[1:]
        if kept:
            lines += ["", "```bash", *textwrap.dedent("\n".join(rows)).split("\n"), "```"]
        else:
            lines += ["", _plain(" ".join(row.strip() for row in rows))]
    return lines[1:]


def _arguments(context: click.Context) -> list[str]:
    rows = []
    for parameter in context.command.params:
        if isinstance(parameter, click.Argument):
            name = parameter.make_metavar(context)
            needed = "required" if parameter.required else "may be left out"
            name = name if parameter.required else name.strip("[]")
            rows.append((f"`{name}`", f"{_kind(parameter)}, {needed}"))
    return [*_rows(("argument", "value"), rows), ""] if rows else []


def _options(context: click.Context, without: Iterable[str] = ()) -> list[str]:
    """A table for each section of the help."""
    sections: dict[str, list[tuple[str, ...]]] = {}
    for option in context.command.params:
        if option.name in without or not isinstance(option, click.Option):
            continue
        flags = "`, `".join([*option.opts, *option.secondary_opts])
        kind = _kind(option) + ", required" * option.required + ", repeatable" * option.multiple
        told = (f"`{flags}`", kind, _default(option, context), _plain(option.help or ""))
        sections.setdefault(section_of(option), []).append(told)
    lines = []
    for title, rows in sections.items():
        lines += [f"**{title}**", "", *_rows(("option", "value", "default", ""), rows), ""]
    return lines[:-1] if len(sections) > 1 else lines[2:-1]


def _kind(parameter: click.Parameter) -> str:
    """What an option or an argument takes, in words or as its placeholder."""
    kind = parameter.type
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return ""
    if isinstance(kind, click.Choice):
        return " or ".join(f"`{choice}`" for choice in kind.choices)
    if isinstance(kind, click.IntRange | click.FloatRange):
        return f"{_word(kind)}, {kind.min} or more"
    if isinstance(parameter, click.Option) and parameter.metavar is not None:
        return f"`{parameter.metavar}`".replace("|", "` or `")
    return f"{_word(kind.item)}, ..." if isinstance(kind, Listed) else _word(kind)


def _word(kind: ParamType) -> str:
    if isinstance(kind, LocalPath):
        return "path or `hf://` location" if isinstance(kind, SourcePath) else "path"
    name = kind.name.removesuffix(" range")
    return _TYPES.get(name, name)


def _default(option: click.Option, context: click.Context) -> str:
    if option.is_flag:
        return "on" if option.default is True else ""
    default = option.get_default(context)
    if _is_setting(option):
        default = {field.name: field.default for field in fields(TrainConfig)}[option.name or ""]
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    shown = isinstance(default, str | int | float | PurePath) and default != ""
    return f"`{default}`" if shown else ""


def _is_setting(parameter: click.Parameter) -> bool:
    """Whether an option was made from the declaration of a setting."""
    return isinstance(parameter.type, SettingType)


def _plain(text: str) -> str:
    """Text with nothing in it that Markdown would take for markup; flags and locations as code."""
    parts = _CODE.split(text)
    parts[::2] = [re.sub(r"([*<|\[\]`])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"`{part}`" for part in parts[1::2]]
    return "".join(parts)


def _rows(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(heads)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


if __name__ == "__main__":
    sys.stdout.write(cli_markdown())
