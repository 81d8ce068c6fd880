"""deltakit: train, inspect, truncate, merge and publish sparse fine-tuning deltas.

Everything public is exported here and loaded on first use, so that importing deltakit costs
nothing: `import deltakit` does not import torch, and neither do the torch-free functions.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deltakit.delta import BaseIdentity as BaseIdentity
    from deltakit.delta import Fingerprint as Fingerprint
    from deltakit.delta import SparseDelta as SparseDelta
    from deltakit.delta import TensorDelta as TensorDelta
    from deltakit.errors import DeltakitError as DeltakitError

_EXPORTS = {
    "BaseIdentity": "deltakit.delta",
    "DeltakitError": "deltakit.errors",
    "Fingerprint": "deltakit.delta",
    "SparseDelta": "deltakit.delta",
    "TensorDelta": "deltakit.delta",
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
