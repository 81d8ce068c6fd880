"""Selection: which entries are trained (scores, schedules, allocations, methods)."""

from deltakit.selection.drop_and_grow import DropAndGrow as DropAndGrow
from deltakit.selection.heuristics import HEURISTICS as HEURISTICS
from deltakit.selection.id3 import ID3 as ID3
from deltakit.selection.increment import Increment as Increment
from deltakit.selection.methods import METHODS as METHODS
from deltakit.selection.random_mask import RandomMask as RandomMask
from deltakit.selection.repeat import Repeat as Repeat
from deltakit.selection.static import Static as Static
