"""A pickle read as data: nothing is imported, nothing is called.

A pickle is a program for a small stack machine (PEP 307, PEP 3154). Here its opcodes build plain
values, and where the program asks for an object, a record of what it asked for. So a hostile pickle
can do no more than describe something that is refused. Memory is proportional to the pickle's size:
what it says about sizes is never believed, and memo slots are taken in order only.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from deltakit.errors import FormatError

_LONGEST = 9  # bytes of an int: torch's sizes are below 2**63
_MISMATCH = (IndexError, TypeError, ValueError, AttributeError, struct.error)


@dataclass(frozen=True, slots=True)
class Global:
    """A class, function or constant that the pickle names, such as torch.bfloat16."""

    name: str


@dataclass(slots=True, eq=False)
class Made:
    """An object that the pickle asks for: what makes it, the arguments, and its state if any."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True, slots=True)
class Persistent:
    """What stands outside of the pickle, by the description that the pickle gives of it."""

    description: Any


def read(data: bytes, what: str, allowed: Collection[str]) -> Any:
    """The value that the pickle `data` describes.

    what: names it in messages. allowed: full names of the classes, functions and constants that it
    may mention. Raises FormatError for any other name, for opcodes that neither torch.save nor
    torch.distributed.checkpoint writes, and for a program that does not add up.
    """
    machine = _Machine(data, what, allowed)
    try:
        return machine.run()
    except FormatError:
        raise
    except _MISMATCH as error:
        raise FormatError(
            f"{what}: no pickle, or a broken one, at byte {machine.at} of {len(data)} "
            f"({type(error).__name__})"
        ) from None


class _Machine:
    """The stack machine of a pickle, with records in place of objects."""

    __slots__ = ("allowed", "at", "data", "marked", "memo", "names", "stack", "what")

    def __init__(self, data: bytes, what: str, allowed: Collection[str]) -> None:
        self.data, self.what, self.allowed = data, what, allowed
        self.at = 0
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: list[Any] = []
        self.names: dict[str, Global] = {}

    def run(self) -> Any:
        data = self.data
        while (code := data[self.at]) != _STOP:
            self.at += 1
            _OPCODES[code](self)
        (value,) = self.stack
        if self.marked or self.at + 1 != len(data):
            raise ValueError("a mark is left, or it goes on behind its end")
        return value

    def refuse(self) -> None:
        raise FormatError(
            f"{self.what}: opcode 0x{self.data[self.at - 1]:02x} at byte {self.at - 1} is none that "
            "torch writes there; nothing of the pickle was run"
        )

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        end = self.at + size
        if end > len(self.data):
            raise ValueError("it ends too early")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def byte(self) -> int:
        value = self.data[self.at]
        self.at += 1
        return value

    def unsigned(self, size: int) -> int:
        start = self.at
        self.at += size  # beyond the end, the next opcode is missing
        return int.from_bytes(self.data[start : self.at], "little")

    def long(self, size: int) -> int:
        if size > _LONGEST:
            raise ValueError("an int is too long")
        return int.from_bytes(self.take(size), "little", signed=True)

    def text(self, size: int) -> str:
        return self.take(size).decode()  # lone surrogates are refused

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        text = self.take(end - self.at).decode("ascii")
        self.at += 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        """The last `count` values of the stack, in order, taken off it."""
        if len(self.stack) < count:
            raise IndexError
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, Made):  # hashing tuples would recurse
                raise TypeError
            target[key] = value

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError
        full = f"{module}.{name}"
        if full not in self.allowed:
            raise FormatError(
                f"{self.what}: asks for {full[:100]!r}, which deltakit does not run; nothing of it "
                "was run. Do not open this file with pickle or torch.load(weights_only=False)"
            )
        self.stack.append(self.names.setdefault(full, Global(full)))

    def make(self) -> None:
        args, maker = self.stack.pop(), self.stack.pop()
        if type(maker) is not Global or type(args) is not tuple:
            raise TypeError
        self.stack.append(Made(maker.name, args))

    def build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) is not Made or made.state is not None:
            raise TypeError
        made.state = state

    def put(self, slot: int) -> None:
        if slot != len(self.memo):
            raise ValueError("a memo slot is skipped")
        self.memo.append(self.stack[-1])


_STOP = pickle.STOP[0]
_Do = Callable[[_Machine], Any]
_KNOWN: dict[bytes, _Do] = {
    pickle.PROTO: lambda m: m.take(1),
    pickle.FRAME: lambda m: m.take(8),
    pickle.MARK: lambda m: m.mark(),
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(value=True),
    pickle.NEWFALSE: lambda m: m.push(value=False),
    pickle.BININT: lambda m: m.push(m.long(4)),
    pickle.BININT1: lambda m: m.stack.append(m.byte()),
    pickle.BININT2: lambda m: m.push(m.unsigned(2)),
    pickle.LONG1: lambda m: m.push(m.long(m.byte())),
    pickle.BINFLOAT: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.text(m.byte())),
    pickle.BINUNICODE: lambda m: m.push(m.text(m.unsigned(4))),
    pickle.EMPTY_TUPLE: lambda m: m.stack.append(()),
    pickle.TUPLE1: lambda m: m.push((m.stack.pop(),)),
    pickle.TUPLE2: lambda m: m.push(tuple(m.pop(2))),
    pickle.TUPLE3: lambda m: m.push(tuple(m.pop(3))),
    pickle.TUPLE: lambda m: m.push(tuple(m.since_mark())),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.APPEND: lambda m: m.append(m.pop(1)),
    pickle.APPENDS: lambda m: m.append(m.since_mark()),
    pickle.EMPTY_DICT: lambda m: m.stack.append({}),
    pickle.SETITEM: lambda m: m.set_items(m.pop(2)),
    pickle.SETITEMS: lambda m: m.set_items(m.since_mark()),
    pickle.GLOBAL: lambda m: m.name(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.name(*m.pop(2)),
    pickle.REDUCE: lambda m: m.make(),
    pickle.NEWOBJ: lambda m: m.make(),
    pickle.BUILD: lambda m: m.build(),
    pickle.BINPERSID: lambda m: m.push(Persistent(m.stack.pop())),
    pickle.BINPUT: lambda m: m.put(m.byte()),
    pickle.LONG_BINPUT: lambda m: m.put(m.unsigned(4)),
    pickle.MEMOIZE: lambda m: m.memo.append(m.stack[-1]),
    pickle.BINGET: lambda m: m.stack.append(m.memo[m.byte()]),
    pickle.LONG_BINGET: lambda m: m.stack.append(m.memo[m.unsigned(4)]),
}
_OPCODES = [_KNOWN.get(bytes([code]), _Machine.refuse) for code in range(256)]
