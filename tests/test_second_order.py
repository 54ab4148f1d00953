"""Second derivatives against Optax, and against the whole Hessian."""

import warnings
from typing import Any

import optax
import pytest
import torch
from optax_oracle import assert_close, from_jax, to_jax

from optfn import second_order, tree

PARAMS = {
    "a": {"w": torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))},
    "b": [torch.tensor(0.3).double()],
}
INPUTS = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
V = torch.linspace(-1, 1, 7, dtype=torch.float64)


def loss(params: Any, inputs: Any, targets: Any) -> Any:
    """In torch and in jax alike."""
    out = inputs @ params["a"]["w"] + params["b"][0] ** 3
    return ((out - targets) ** 4).sum() * params["b"][0]


def theirs(name: str, *given: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return from_jax(getattr(optax.second_order, name)(loss, *map(to_jax, given)))


def test_products_with_the_hessian() -> None:
    assert_close(second_order.hvp(loss, V, PARAMS, INPUTS, TARGETS), theirs("hvp", V, PARAMS, INPUTS, TARGETS), 1e-12)


def test_diagonals() -> None:
    for name in ("hessian_diag", "fisher_diag"):
        assert_close(getattr(second_order, name)(loss, PARAMS, INPUTS, TARGETS), theirs(name, PARAMS, INPUTS, TARGETS), 1e-12)


def test_the_order_of_entries_is_that_of_leaves() -> None:
    flat, spec = tree.flatten(PARAMS)
    shapes = [x.shape for x in flat]

    def of_vector(v: torch.Tensor) -> torch.Tensor:
        parts = v.split([s.numel() for s in shapes])
        return loss(tree.unflatten(spec, [x.reshape(s) for x, s in zip(parts, shapes, strict=True)]), INPUTS, TARGETS)

    hessian = torch.func.hessian(of_vector)(torch.cat([x.reshape(-1) for x in flat]))
    product = tree.leaves(second_order.hvp(loss, V, PARAMS, INPUTS, TARGETS))
    assert_close(torch.cat([x.reshape(-1) for x in product]), hessian @ V, 1e-12)
    assert_close(second_order.hessian_diag(loss, PARAMS, INPUTS, TARGETS), hessian.diagonal(), 1e-12)


def test_errors_and_nothing() -> None:
    with pytest.raises(ValueError, match=r"v must have the 7 entries of params, got shape \(3,\)"):
        second_order.hvp(loss, V[:3], PARAMS, INPUTS, TARGETS)
    assert second_order.hessian_diag(lambda p, x, y: torch.zeros(()), {}, None, None).shape == (0,)
