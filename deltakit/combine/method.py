"""What a stacking method is, the registry of all, and options by flavour and by name."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from deltakit.combine.tasks import Tasks, Vector
from deltakit.delta import TensorDelta
from deltakit.errors import ConfigError, nearest
from deltakit.registry import Registry

Flavours = Mapping[str, Mapping[str, Any]]  # flavour -> option -> value
FLAVOURS = ("paper", "mergekit", "peft")


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to make one delta of several; its fields are its options.

    scale: a factor of the whole result (lambda in the papers).
    The defaults are the paper's, applied to entries. `flavours` holds, for each peer that has the
    method, the options by which the peer's own numbers come out.
    """

    flavours: ClassVar[Flavours] = {}

    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), hint))

    @abstractmethod
    def stack(self, tasks: Tasks) -> Mapping[str, Vector | TensorDelta]:
        """Tensor name -> the combined changes, on the union of the supports.

        A Vector is multiplied by `scale` and becomes an `add` tensor without the entries that are
        zero; a TensorDelta stays as it is.
        """

    def options(self) -> dict[str, Any]:
        """All options with their values, as plain JSON."""
        return asdict(self)


METHODS: Registry[type[Method]] = Registry("stacking method")


def make_method(
    name: str, flavour: str = "paper", options: Mapping[str, Any] | None = None
) -> Method:
    """The method called `name` with the options of a flavour; `options` override it.

    Values may be text, as on a command line. Raises ConfigError for an unknown method, flavour or
    option, for a flavour that the method does not have, and for values that are not possible.
    """
    kind = METHODS[name]
    if flavour not in FLAVOURS:
        raise ConfigError(f"unknown flavour {flavour!r}; known: {', '.join(FLAVOURS)}")
    known = {"paper": {}, **kind.flavours}
    if flavour not in known:
        raise ConfigError(f"{name} has no flavour {flavour!r}; it has: {', '.join(known)}")
    given = options or {}
    takes = option_names(kind)
    for option in given:
        if option not in takes:
            raise ConfigError(
                f"{name} takes no option {option!r}{nearest(option, takes)}; "
                f"it takes: {', '.join(takes) or 'none'}"
            )
    return kind(**{**known[flavour], **given})


def option_names(kind: type[Method]) -> list[str]:
    """The names of a method's options."""
    return [field.name for field in fields(kind)]


def _hints(kind: type[Method]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {name: hints[name] for name in option_names(kind)}


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value as its type has it; ConfigError where that is not possible."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{name} cannot be {value!r}; it is {_or(get_args(hint))}")
        return value
    if hint is bool:
        made = {"true": True, "false": False}.get(str(value).lower())
        if made is None:
            raise ConfigError(f"{name} cannot be {value!r}; it is true or false")
        return made
    try:
        number = hint(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} cannot be {value!r}; it is a number") from None
    if not math.isfinite(number) or (not isinstance(value, str) and number != value):
        raise ConfigError(f"{name} cannot be {value!r}; it is a {_KINDS[hint]}")
    return number


_KINDS = {float: "finite number", int: "whole number"}


def _or(names: tuple[Any, ...]) -> str:
    return f"{', '.join(map(str, names[:-1]))} or {names[-1]}"
