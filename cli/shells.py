"""The scripts by which bash, zsh and fish complete `deltakit`, and the answers that they read.

click finds what may follow. Its own scripts are replaced where they fall short: paths are completed
by suffix, and words such as `--method=n:m` whole, at which bash splits them.
"""

from __future__ import annotations

import os
from typing import Any

from click.shell_completion import (
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

_BASH = r"""# Completion of %(prog_name)s for bash 4.4 and newer.
%(complete_func)s() {
    local IFS=$'\n' type value suffix word=${COMP_WORDS[COMP_CWORD]}
    case $word in =|:) word="" ;; esac
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            plain) COMPREPLY+=("$value") ;;
            dir) compopt -o filenames; COMPREPLY=($(compgen -d -- "$word")) ;;
            file)
                compopt -o filenames
                if [[ -z $value ]]; then COMPREPLY=($(compgen -f -- "$word")); continue; fi
                COMPREPLY=($(compgen -d -- "$word"))
                IFS=' '
                for suffix in $value; do
                    IFS=$'\n' COMPREPLY+=($(compgen -f -X "!*$suffix" -- "$word"))
                done
                IFS=$'\n' ;;
        esac
    done < <(%(complete_var)s=bash_complete COMP_LINE="${COMP_LINE:0:COMP_POINT}" \
        COMP_WORDBREAKS="$COMP_WORDBREAKS" "$1")
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

_ZSH = r"""#compdef %(prog_name)s
# Completion of %(prog_name)s for zsh.
%(complete_func)s() {
    local -a response named described
    local type value about
    response=("${(@f)$(COMP_WORDS="${(F)words[1,CURRENT]}" COMP_CWORD=$((CURRENT-1)) \
        %(complete_var)s=zsh_complete ${words[1]})}")
    compset -P '--*='
    for type value about in "${response[@]}"; do
        case $type in
            plain) if [[ $about == _ ]]; then named+=("$value"); else described+=("$value:$about"); fi ;;
            dir) _files -/ ;;
            file) if [[ $value == _ ]]; then _files; else _files -g "$value"; fi ;;
        esac
    done
    (( $#described )) && _describe -V unsorted described
    (( $#named )) && compadd -V unsorted -a named
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""

_FISH = r"""# Completion of %(prog_name)s for fish.
function %(complete_func)s
    set -l token (commandline -ct | string replace -r '^--[^=]*=' '')
    for completion in (%(complete_var)s=fish_complete COMP_WORDS=(commandline -cp | string collect) \
        COMP_CWORD=(commandline -ct | string collect) %(prog_name)s)
        set -l told (string split -m 1 , -- $completion)
        switch $told[1]
            case plain
                echo $told[2]
            case dir
                __fish_complete_directories $token
            case file
                # Folders, and files that end so; behind a tab stands what a file is.
                set -l endings (string escape --style=regex -- (string split ' ' -- $told[2]))
                __fish_complete_path $token | string match -r "^[^\t]*(?:/|"(string join '|' -- \
                    $endings)")(?:\t.*)?\$"
        end
    end
end
complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""


def script(shell: str) -> str:
    """What `deltakit completion SHELL` prints."""
    from deltakit.cli.main import main

    return _CLASSES[shell](main, {}, "deltakit", "_DELTAKIT_COMPLETE").source()


class Bash(ShellComplete):
    """bash, told the line itself: its words are split at `=` and `:`, too."""

    name = "bash"
    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the one to complete, and that one."""
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)[1:]
        return (words, "") if line[-1:].isspace() else (words[:-1], words[-1] if words else "")

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        """Only what bash puts behind the last colon of a word."""
        items = super().get_completions(args, incomplete)
        before = incomplete.rpartition("=")[2] if incomplete.startswith("-") else incomplete
        cut = before.rfind(":") + 1 if ":" in os.environ.get("COMP_WORDBREAKS", "") else 0
        return [_with_value(item, item.value[cut:]) for item in items] if cut else items

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Kind and value."""
        return f"{item.type},{item.value}"


class Zsh(ZshComplete):
    """zsh, as click has it but for paths."""

    source_template = _ZSH

    def format_completion(self, item: CompletionItem[str]) -> str:
        """Three lines, none of them empty, as zsh drops those; suffixes as a pattern."""
        if item.type != "plain":
            suffixes = item.value.split()
            both = f"*({'|'.join(suffixes)})" if len(suffixes) > 1 else f"*{item.value}"
            item = _with_value(item, both if suffixes else "_")
        return super().format_completion(item)


class Fish(FishComplete):
    """fish, which replaces a word such as `--method=ti` as a whole."""

    source_template = _FISH

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        """With the name of the option before its values."""
        items = super().get_completions(args, incomplete)
        option, equals, _ = incomplete.partition("=")
        if not (equals and option.startswith("-")):
            return items
        return [_with_value(i, f"{option}={i.value}") if i.type == "plain" else i for i in items]


def _with_value(item: CompletionItem[str], value: str) -> CompletionItem[str]:
    return CompletionItem(value, item.type, item.help)


_CLASSES: dict[str, type[ShellComplete]] = {"bash": Bash, "zsh": Zsh, "fish": Fish}
for _name, _class in _CLASSES.items():
    add_completion_class(_class, _name)
