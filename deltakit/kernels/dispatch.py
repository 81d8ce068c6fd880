"""Where the work on a tensor is done: by torch, or by Triton's kernels in this package.

Nothing here imports Triton: the modules of the kernels do, and they are imported once a tensor
asks for them. `DELTAKIT_KERNELS=torch` leaves everything to torch. `TRITON_INTERPRET=1`, Triton's
own switch, lets its interpreter run kernels on the CPU: CPU tensors then play a device's part,
which is how tests reach that path without one.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from functools import cache

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OLDEST = (8, 0)  # compute capability; what tests compile the kernels for


def runs_ahead(tensor: torch.Tensor) -> bool:
    """Whether work on the tensor is only queued, so that reading a number makes the host wait."""
    return tensor.device.type != "cpu" or INTERPRETED


def by_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton's kernels work on the tensor; torch's functions do everywhere."""
    if not (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")):
        return False
    return _has_triton() and _works(tensor.device)


@cache
def _has_triton() -> bool:
    if os.environ.get("DELTAKIT_KERNELS") == "torch":
        return False
    return importlib.util.find_spec("triton") is not None


@cache
def _works(device: torch.device) -> bool:
    """Whether a kernel runs on the device: tried once, since Triton wants a C compiler too."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
        return False
    try:
        from deltakit.kernels.turn import turned

        turned(torch.zeros(1, 1, device=device))
    except Exception as error:  # noqa: BLE001 - of Triton, a compiler or the driver
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(
            f"Triton's kernels do not run on {device} ({reason}); torch's functions take their "
            "place, which are slower",
            stacklevel=2,
        )
        return False
    return True
