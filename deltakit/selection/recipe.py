"""From names and plain settings to a method: each setting goes where a signature asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

from deltakit.errors import ConfigError
from deltakit.selection.heuristics import HEURISTICS
from deltakit.selection.methods import METHODS, Method


def make_method(name: str, budget: int, settings: Mapping[str, Any]) -> Method:
    """The registered method of that name. settings: any of `settings_of`; None means unset.

    A setting that the method does not take goes to its heuristic. Raises ConfigError for one that
    neither takes, and for a heuristic given to a method that has its own.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    own = _parameters(METHODS[name])
    mine = {key: value for key, value in given.items() if key in own and key != "heuristic"}
    if "heuristic" in own:
        heuristic = str(given.get("heuristic", own["heuristic"]))
        theirs = {k: v for k, v in given.items() if k in _parameters(HEURISTICS[heuristic])}
        mine["heuristic"] = HEURISTICS[heuristic](**{k: theirs[k] for k in theirs if k not in own})
    foreign = [key for key in given if key not in settings_of(name, given.get("heuristic"))]
    if foreign:
        with_ = f" with heuristic {given['heuristic']}" if given.get("heuristic") else ""
        raise ConfigError(f"setting {foreign[0]} does not apply to method {name}{with_}")
    missing = [key for key in own if own[key] is Parameter.empty and key not in {*mine, "budget"}]
    if missing:
        raise ConfigError(f"method {name} needs setting {missing[0]}; give --{missing[0]}")
    method: Method = METHODS[name](**mine, budget=budget)
    return method


def settings_of(name: str, heuristic: str | None = None) -> list[str]:
    """The settings that a method takes, those of its heuristic included; without the budget."""
    own = _parameters(METHODS[name])
    found = [key for key in own if key != "budget"]
    if "heuristic" in own:
        default = own["heuristic"]
        found += _parameters(HEURISTICS[heuristic or str(default)])
    return list(dict.fromkeys(found))


def _parameters(make: Callable[..., Any]) -> dict[str, Any]:
    return {name: p.default for name, p in signature(make).parameters.items()}
