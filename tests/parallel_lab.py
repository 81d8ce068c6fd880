"""Functions run by several processes at once, joined by torch.distributed over gloo."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_START = """
import pickle, sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
rank, size, folder, tests = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
sys.path.insert(0, tests)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
with open(f"{folder}/task", "rb") as stream:
    function, arguments = pickle.load(stream)
result = function(*arguments)
with open(f"{folder}/result-{rank}", "wb") as stream:
    pickle.dump(result, stream)
dist.barrier()
dist.destroy_process_group()
"""


def together(size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each of `size` ranks; it lives in a helper module.

    folder: an empty place for their meeting. AssertionError with the ranks' stderr if one fails.
    """
    folder.mkdir(parents=True)
    (folder / "task").write_bytes(pickle.dumps((function, arguments)))
    tests = str(Path(__file__).parent)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _START, str(rank), str(size), str(folder), tests],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    told = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n\n".join(told)
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(size)]
