"""Curvature on a support: equality with the exact Hessian's submatrix, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.errors import ConfigError
from deltakit.training.curvature import (
    SupportHessian,
    distance_travelled,
    hessian_norm,
    largest_eigenvalue,
    norms_by_density,
)


class Quadratic(nn.Module):
    """Half of w H w for a given symmetric H."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, len(matrix), dtype=matrix.dtype))
        self.matrix = matrix

    def loss(self) -> torch.Tensor:
        return 0.5 * self.w @ self.matrix @ self.w


def _symmetric(size: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return (matrix + matrix.T) / 2 + shift * torch.eye(size, dtype=torch.float64)


def _net() -> tuple[nn.Sequential, Callable[[], torch.Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, labels = torch.randn(7, 4).double(), torch.randint(0, 3, (7,))
    return net, lambda: nn.functional.cross_entropy(net(x), labels)


def _exact(net: nn.Sequential, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The whole Hessian, one row per weight, in order of parameters."""
    parameters = list(net.parameters())
    gradient = torch.autograd.grad(loss(), parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in flat]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("shift", [0.0, 8.0, -8.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_quadratics_largest_eigenvalue(seed: int, shift: float) -> None:
    """Of the submatrix, whether it is the strongest or a negative one is."""
    model = Quadratic(_symmetric(12, seed, shift))
    indices = torch.tensor([1, 3, 4, 8, 11])
    hessian = SupportHessian(model, model.loss, {"w": indices})
    exact = torch.linalg.eigvalsh(model.matrix[indices][:, indices])
    found = largest_eigenvalue(hessian, iterations=3000, tolerance=1e-12)
    assert found == pytest.approx(float(exact[-1]), rel=1e-5)
    norm = hessian_norm(model, model.loss, {"w": indices}, iterations=3000, tolerance=1e-12)
    assert norm == pytest.approx(float(exact.abs().max()), rel=1e-5)


@pytest.mark.parametrize("differences", [False, True])
def test_products_are_those_of_the_exact_submatrix(differences: bool) -> None:
    net, loss = _net()
    support = {"2.weight": torch.tensor([0, 7, 14]), "0.bias": torch.tensor([2, 4])}
    starts = {"0.weight": 0, "0.bias": 20, "2.weight": 25, "2.bias": 40}
    rows = torch.cat([starts[name] + indices for name, indices in support.items()])
    exact = _exact(net, loss)[rows][:, rows]
    before = deepcopy(net.state_dict())
    for parameter in net.parameters():
        parameter.requires_grad = False
    hessian = SupportHessian(net, loss, support, differences=differences)
    products = torch.stack([hessian.product(unit) for unit in torch.eye(5).double()])
    torch.testing.assert_close(products, exact, rtol=1e-5, atol=1e-6 if differences else 1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())


class _Once(torch.autograd.Function):
    """x ** 3, whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def test_differences_step_in_where_backward_runs_once_only() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    hessian = SupportHessian(model, lambda: _Once.apply(model.w).sum(), {"w": torch.arange(3)})
    assert largest_eigenvalue(hessian, iterations=200, tolerance=1e-10) == pytest.approx(12.0)
    assert model.w.tolist() == [0.5, 1.0, 2.0]


def test_attention_differentiates_twice() -> None:
    """Fused kernels do not; the exact values do not depend on which is used."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 24).double()
    x = torch.randn(2, 2, 5, 8).double()

    def loss() -> torch.Tensor:
        q, k, v = layer(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v).square().mean()

    support = {"weight": torch.arange(0, 192, 7)}
    twice = SupportHessian(layer, loss, support)
    apart = SupportHessian(layer, loss, support, differences=True)
    vector = torch.randn(len(support["weight"])).double()
    product = twice.product(vector)
    assert not twice._differences
    torch.testing.assert_close(product, apart.product(vector), rtol=1e-4, atol=1e-8)


def test_the_norm_falls_with_density() -> None:
    """A submatrix is never stronger than the matrix, and random masks are nested by no means."""
    net, loss = _net()
    rows = norms_by_density(net, loss, [0.1, 0.5, 1.0], iterations=500)
    assert [density for density, _ in rows] == [0.1, 0.5, 1.0]
    exact = torch.linalg.eigvalsh(_exact(net, loss)).abs().max()
    assert rows[2][1] == pytest.approx(float(exact), rel=0.02)
    assert 0 < rows[0][1] < rows[1][1] < rows[2][1]


def test_distance_is_the_norm_of_the_delta() -> None:
    net, loss = _net()
    tuner = dk.SparseTuner(net, dk.RandomMask(budget=9), lr=0.1)
    assert distance_travelled(tuner) == 0.0
    loss().backward()
    tuner.step()
    values = [t.values for t in tuner.delta().tensors.values()]
    expected = sum(float((v**2).sum()) for v in values) ** 0.5
    assert distance_travelled(tuner) == pytest.approx(expected, rel=1e-9)


def test_bad_supports_are_refused() -> None:
    net, loss = _net()
    with pytest.raises(ConfigError, match="the model has no parameter 'nowhere'"):
        SupportHessian(net, loss, {"nowhere": torch.tensor([0])})
    with pytest.raises(ConfigError, match="expected at least one entry, found none"):
        SupportHessian(net, loss, {"0.bias": torch.tensor([], dtype=torch.int64)})
