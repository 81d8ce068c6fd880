"""Selection: which entries are trained (scores, schedules, allocations, methods)."""

from deltakit.selection.id3 import ID3 as ID3
from deltakit.selection.methods import METHODS as METHODS
from deltakit.selection.random_mask import RandomMask as RandomMask
