"""A small model with all kinds of tensors that a fixed support trains, where one wants it."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltakit.parallel.ranks import Ranks
from deltakit.training.engine import Engine
from deltakit.training.entries import Entries
from deltakit.training.extra import make_extra
from deltakit.training.fixed_support import FixedSupport
from deltakit.training.gradient_path import GradientPath
from deltakit.training.optimizer import SparseAdamW
from deltakit.training.target import Target

TOKENS = torch.tensor([[1, 2, 3, 3, 29], [0, 7, 7, 2, 11], [5, 4, 3, 2, 1]])


class Net(nn.Module):
    """All that has a tap, tensors that have none, and a head."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 16, padding_idx=2)
        self.up = nn.Linear(16, 40)
        self.down = Conv1D(16, 40)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)
        nn.init.normal_(self.down.weight, std=0.2)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.down(self.up(self.embed(tokens)).relu_()))
        out: torch.Tensor = self.head(hidden)
        return out


def trainer(
    path: GradientPath,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks | None = None,
    device: str = "cpu",
) -> tuple[Net, SparseAdamW]:
    """A fixed support in every tensor but the head, which is an extra."""
    model = Net(dtype).to(device)
    live = dict(model.named_parameters())
    extras = [make_extra(n, p) for n, p in live.items() if n.startswith("head")]
    names = [name for name in live if not name.startswith("head")]
    targets = [Target(i, n, n, live[n]) for i, n in enumerate(names)]
    torch.manual_seed(1)
    chosen = [torch.randperm(t.numel)[: max(1, t.numel // 20)] for t in targets]
    entries = Entries(targets, sum(len(each) for each in chosen))
    for number, (target, indices) in enumerate(zip(targets, chosen, strict=True)):
        entries.add(target, indices, -number)  # ages that differ
    engine = Engine(entries, extras, None, model=model, max_grad_norm=0.05, ranks=ranks)
    if engine._fixed:
        engine._fixed.close()

    def choose(layer: nn.Module, target: Target) -> GradientPath:
        return "sampled" if isinstance(layer, nn.Embedding) else path

    engine._fixed = FixedSupport(model, entries, choose)
    optimizer = SparseAdamW(engine, lr=3e-2, extras_lr=1e-2, weight_decay=0.01)
    return model, optimizer


def train(model: Net, optimizer: SparseAdamW, steps: int, tokens: torch.Tensor = TOKENS) -> None:
    """Steps on one batch; tokens: int64 [rows, n], where the model is."""
    for _ in range(steps):
        logits = model(tokens).float()
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten() % 5).backward()
        optimizer.step()


def same(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same weights, bit for bit."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def merged(target: Target, entries: Entries, base: torch.Tensor) -> torch.Tensor:
    """What a tensor's flat base becomes by the arithmetic of merging."""
    made = base.detach().clone().view(-1)
    sums = (entries.base + (entries.values + 0.0)).detach()
    made[target.indices] = sums[target.slots].to(made.dtype)
    return made
