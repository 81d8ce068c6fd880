"""deltakit: train, inspect, truncate, merge and publish sparse fine-tuning deltas.

Everything public is exported here and loaded on first use, so that importing deltakit costs
nothing: `import deltakit` does not import torch, and neither do the torch-free functions.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deltakit.adapters.attach import attach as attach
    from deltakit.algebra import add as add
    from deltakit.algebra import intersect as intersect
    from deltakit.algebra import restrict as restrict
    from deltakit.algebra import scale as scale
    from deltakit.algebra import subtract as subtract
    from deltakit.analyses import distances as distances
    from deltakit.analyses import unmasking_history as unmasking_history
    from deltakit.comparing.compare import compare as compare
    from deltakit.conversion import convert as convert
    from deltakit.delta import BaseIdentity as BaseIdentity
    from deltakit.delta import Fingerprint as Fingerprint
    from deltakit.delta import SparseDelta as SparseDelta
    from deltakit.delta import TensorDelta as TensorDelta
    from deltakit.diffing.diff import diff as diff
    from deltakit.errors import DeltakitError as DeltakitError
    from deltakit.formats.sdelta import load as load
    from deltakit.formats.sdelta import save as save
    from deltakit.in_place.merge import merge_in_place as merge_in_place
    from deltakit.in_place.revert import revert as revert
    from deltakit.inspection import inspect as inspect
    from deltakit.live.apply import applied as applied
    from deltakit.live.apply import apply as apply
    from deltakit.live.bank import DeltaBank as DeltaBank
    from deltakit.live.state import guard as guard
    from deltakit.merging.merge import merge as merge
    from deltakit.patching.chain import compose as compose
    from deltakit.patching.following import chain_position as chain_position
    from deltakit.patching.states import state_digest as state_digest
    from deltakit.patching.stream import PatchStream as PatchStream
    from deltakit.publishing.pull import pull as pull
    from deltakit.publishing.push import push as push
    from deltakit.rebasing import rebase as rebase
    from deltakit.selection import ID3 as ID3
    from deltakit.selection import BernoulliMask as BernoulliMask
    from deltakit.selection import BlockMask as BlockMask
    from deltakit.selection import ColumnMask as ColumnMask
    from deltakit.selection import DropAndGrow as DropAndGrow
    from deltakit.selection import HeadMask as HeadMask
    from deltakit.selection import Increment as Increment
    from deltakit.selection import NMMask as NMMask
    from deltakit.selection import RandomMask as RandomMask
    from deltakit.selection import Repeat as Repeat
    from deltakit.selection import RowMask as RowMask
    from deltakit.selection import Static as Static
    from deltakit.selection import UserMask as UserMask
    from deltakit.sparse_arrays import WeightPatch as WeightPatch
    from deltakit.sparse_arrays import from_scipy as from_scipy
    from deltakit.sparse_arrays import from_torch as from_torch
    from deltakit.sparse_arrays import to_scipy as to_scipy
    from deltakit.sparse_arrays import to_torch as to_torch
    from deltakit.sparse_arrays import to_vllm as to_vllm
    from deltakit.stacking import stack as stack
    from deltakit.training.calibration import Batches as Batches
    from deltakit.training.functions import evaluate as evaluate
    from deltakit.training.functions import train as train
    from deltakit.training.lr_search import find_lr as find_lr
    from deltakit.training.trainer import SparseTrainer as SparseTrainer
    from deltakit.training.tuned_stack import tune_weights as tune_weights
    from deltakit.training.tuner import SparseTuner as SparseTuner
    from deltakit.truncation import truncate as truncate
    from deltakit.verification import verify as verify

_EXPORTS = {
    "BaseIdentity": "deltakit.delta",
    "Batches": "deltakit.training.calibration",
    "BernoulliMask": "deltakit.selection",
    "BlockMask": "deltakit.selection",
    "ColumnMask": "deltakit.selection",
    "DeltaBank": "deltakit.live.bank",
    "DeltakitError": "deltakit.errors",
    "DropAndGrow": "deltakit.selection",
    "Fingerprint": "deltakit.delta",
    "HeadMask": "deltakit.selection",
    "ID3": "deltakit.selection",
    "Increment": "deltakit.selection",
    "NMMask": "deltakit.selection",
    "PatchStream": "deltakit.patching.stream",
    "RandomMask": "deltakit.selection",
    "Repeat": "deltakit.selection",
    "RowMask": "deltakit.selection",
    "SparseDelta": "deltakit.delta",
    "SparseTrainer": "deltakit.training.trainer",
    "SparseTuner": "deltakit.training.tuner",
    "Static": "deltakit.selection",
    "TensorDelta": "deltakit.delta",
    "UserMask": "deltakit.selection",
    "WeightPatch": "deltakit.sparse_arrays",
    "add": "deltakit.algebra",
    "applied": "deltakit.live.apply",
    "apply": "deltakit.live.apply",
    "attach": "deltakit.adapters.attach",
    "chain_position": "deltakit.patching.following",
    "compare": "deltakit.comparing.compare",
    "compose": "deltakit.patching.chain",
    "convert": "deltakit.conversion",
    "diff": "deltakit.diffing.diff",
    "distances": "deltakit.analyses",
    "evaluate": "deltakit.training.functions",
    "find_lr": "deltakit.training.lr_search",
    "from_scipy": "deltakit.sparse_arrays",
    "from_torch": "deltakit.sparse_arrays",
    "guard": "deltakit.live.state",
    "inspect": "deltakit.inspection",
    "intersect": "deltakit.algebra",
    "load": "deltakit.formats.sdelta",
    "merge": "deltakit.merging.merge",
    "merge_in_place": "deltakit.in_place.merge",
    "pull": "deltakit.publishing.pull",
    "push": "deltakit.publishing.push",
    "rebase": "deltakit.rebasing",
    "restrict": "deltakit.algebra",
    "revert": "deltakit.in_place.revert",
    "save": "deltakit.formats.sdelta",
    "scale": "deltakit.algebra",
    "stack": "deltakit.stacking",
    "state_digest": "deltakit.patching.states",
    "subtract": "deltakit.algebra",
    "to_scipy": "deltakit.sparse_arrays",
    "to_torch": "deltakit.sparse_arrays",
    "to_vllm": "deltakit.sparse_arrays",
    "train": "deltakit.training.functions",
    "truncate": "deltakit.truncation",
    "tune_weights": "deltakit.training.tuned_stack",
    "unmasking_history": "deltakit.analyses",
    "verify": "deltakit.verification",
}

__all__ = ["__version__"]
__all__ += list(_EXPORTS)


def __getattr__(name: str) -> Any:
    try:
        module = _EXPORTS[name]
    except KeyError:
        raise AttributeError(f"module 'deltakit' has no attribute {name!r}") from None
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
