"""`deltakit completion`: the script by which a shell completes what is typed."""

from __future__ import annotations

import click

from deltakit.cli.command import Command
from deltakit.cli.values import Choice


@click.command(cls=Command)
@click.argument("shell", type=Choice(["bash", "zsh", "fish"]), metavar="bash|zsh|fish")
def command(shell: str) -> None:
    """Let a shell complete what is typed.

    Prints a script that completes commands, options, names of methods, heuristics, tasks, presets
    and formats, and the files that each place takes. Try it in the shell at hand, or keep it: in
    bash and zsh the first line below goes into ~/.bashrc or ~/.zshrc (after compinit), in fish the
    last one is run once. Do it again after an upgrade of deltakit where a script was kept in a file.

    \b
    Examples:
      eval "$(deltakit completion bash)"
      deltakit completion zsh > ~/.zfunc/_deltakit
      deltakit completion fish > ~/.config/fish/completions/deltakit.fish
    """
    from deltakit.cli.shells import script

    click.echo(script(shell), nl=False)
