"""Selection: which entries are trained (scores, schedules, allocations, methods)."""

from deltakit.selection import bitfit as bitfit
from deltakit.selection import child_tuning_d as child_tuning_d
from deltakit.selection.calibrated import Calibrated as Calibrated
from deltakit.selection.child_tuning_f import ChildTuningF as ChildTuningF
from deltakit.selection.diff_pruning import DiffPruning as DiffPruning
from deltakit.selection.drop_and_grow import DropAndGrow as DropAndGrow
from deltakit.selection.fisher import Fisher as Fisher
from deltakit.selection.gradient import Gradient as Gradient
from deltakit.selection.grasp import Grasp as Grasp
from deltakit.selection.heuristics import HEURISTICS as HEURISTICS
from deltakit.selection.id3 import ID3 as ID3
from deltakit.selection.increment import Increment as Increment
from deltakit.selection.lt_sft import LotteryTicket as LotteryTicket
from deltakit.selection.magnitude import LargestMagnitude as LargestMagnitude
from deltakit.selection.magnitude import SmallestMagnitude as SmallestMagnitude
from deltakit.selection.methods import METHODS as METHODS
from deltakit.selection.random_mask import RandomMask as RandomMask
from deltakit.selection.repeat import Repeat as Repeat
from deltakit.selection.s_bitfit import SBitFit as SBitFit
from deltakit.selection.sam import SAM as SAM
from deltakit.selection.snip import Snip as Snip
from deltakit.selection.static import Static as Static
from deltakit.selection.threshold_mask import ThresholdMask as ThresholdMask
from deltakit.selection.u_bitfit import UBitFit as UBitFit
