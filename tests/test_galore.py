"""GaLore against Optax, and what it keeps."""

import sys
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import optax
import pytest
import torch
from optax.contrib import _galore
from optax_oracle import assert_close, exact, run, run_optax, some_grads, some_params

import optfn
from optfn import GaLoreDimensionNumbers, tree

SHAPES = {"wide": (3, 5), "tall": (6, 2), "square": (4, 4), "vector": (5,), "scalar": ()}
KERNELS = {"kernel": (4, 3, 2, 2), "heads": (2, 3, 4), "w": (3, 4), "b": (4,)}
NUMBERS = {"kernel": ((1, 2, 3), 0), "heads": ((0, 1), 2), "w": (1, 0)}
STEPS = 25
SCHEDULE = (optfn.linear_schedule(0.1, 0.02, 20), exact(optax.linear_schedule(0.1, 0.02, 20)))


def numbers(kind: Any) -> dict[str, Any]:
    return {k: kind(*NUMBERS[k]) if k in NUMBERS else None for k in KERNELS}


c = optax.contrib
PAIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "galore": (optfn.galore(0.1, 2, 10), c.galore(0.1, 2, 10), SHAPES),
    "galore.defaults": (optfn.galore(), c.galore(1e-2), SHAPES),
    "galore.options": (
        optfn.galore(SCHEDULE[0], 3, 4, 0.25, optfn.scale_by_lion(), 0.1, mask={k: k != "wide" for k in SHAPES}),
        c.galore(SCHEDULE[1], 3, 4, 0.25, optax.scale_by_lion(), 0.1, {k: k != "wide" for k in SHAPES}),
        SHAPES,
    ),
    "scale_by_galore": (optfn.scale_by_galore(1, 1, 2.0), _galore.scale_by_galore(1, 1, 2.0), SHAPES),
    "scale_by_galore.tree": (
        optfn.scale_by_galore(2, 5, weight_dimension_numbers=numbers(GaLoreDimensionNumbers)),
        _galore.scale_by_galore(2, 5, weight_dimension_numbers=numbers(c.GaLoreDimensionNumbers)),
        KERNELS,
    ),
    "scale_by_galore.function": (
        optfn.scale_by_galore(2, 5, weight_dimension_numbers=lambda path, p: numbers(GaLoreDimensionNumbers)[path]),
        _galore.scale_by_galore(2, 5, weight_dimension_numbers=lambda p: numbers(c.GaLoreDimensionNumbers)),
        KERNELS,
    ),
    "scale_by_galore.all": (
        optfn.scale_by_galore(2, 5, weight_dimension_numbers=GaLoreDimensionNumbers(-1, 0)),
        _galore.scale_by_galore(2, 5, weight_dimension_numbers=c.GaLoreDimensionNumbers(-1, 0)),
        SHAPES,
    ),
}


@pytest.fixture
def _same_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optax decomposes in float32, also what is float64; and singular vectors may have either sign, here the same for both."""

    def svd(x: Any, full_matrices: bool) -> Any:
        u, s, vh = jnp.linalg.svd(x, full_matrices=full_matrices)
        turned = lambda u: u * jnp.sign(jnp.take_along_axis(u, jnp.abs(u).argmax(0, keepdims=True), 0))  # noqa: E731
        return turned(u), s, turned(vh.T).T

    found = sys.modules["optfn.optimizers.galore"]._singular_vectors

    def singular_vectors(g: torch.Tensor, rank: int) -> torch.Tensor:
        u = found(g, rank)
        return u * u.gather(-2, u.abs().argmax(-2, keepdim=True)).sign()

    monkeypatch.setattr(
        _galore, "jnp", SimpleNamespace(**{**vars(jnp), "float32": jnp.float64, "linalg": SimpleNamespace(svd=svd)})
    )
    monkeypatch.setattr(sys.modules["optfn.optimizers.galore"], "_singular_vectors", singular_vectors)


@pytest.mark.usefixtures("_same_vectors")
@pytest.mark.parametrize("name", PAIRS)
def test_trajectory_is_optaxs(name: str) -> None:
    mine, yours, shapes = PAIRS[name]
    params, grads = some_params(shapes=shapes), some_grads(STEPS, shapes=shapes)
    # A gradient of 0 has no singular vectors: any will do, and each library has its own.
    grads[1] = tree.map(lambda g: 0.1 * g, grads[2])
    for step, (a, b) in enumerate(zip(run(mine, params, grads)[0], run_optax(yours, params, grads)[0], strict=True)):
        try:
            assert_close(a, b, 1e-12)
        except AssertionError as error:
            raise AssertionError(f"step {step}") from error


def test_of_full_rank_it_is_the_base_in_another_basis() -> None:
    """With no more of a rule than a factor nothing is lost; with momentum neither, as long as the basis stays."""
    params, grads = some_params(shapes=SHAPES), some_grads(6, shapes=SHAPES)
    grads[0] = grads[2]
    found, _ = run(optfn.scale_by_galore(8, 100, base_optimizer=optfn.trace(0.9)), params, grads)
    wanted, _ = run(optfn.trace(0.9), params, grads)
    # A tall matrix is seen in the span of the first one, which is not all of its columns' space.
    for a, b in zip(found, wanted, strict=True):
        for name in ("square", "vector", "scalar"):
            torch.testing.assert_close(a["updates"][name], b["updates"][name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0]["updates"], wanted[0]["updates"], rtol=1e-12, atol=1e-12)


def test_a_matrix_has_the_best_approximation_of_that_rank() -> None:
    """Eckart and Young: what is left out has the norm of the singular values that are."""
    g = torch.randn(7, 4, dtype=torch.float64)
    tx = optfn.scale_by_galore(2, base_optimizer=optfn.identity())
    u, _ = tx.update(g, tx.init(g))
    torch.testing.assert_close(torch.linalg.matrix_norm(g - u), torch.linalg.svdvals(g)[2:].norm())


def test_state_is_small_and_none_leaves_keep_theirs() -> None:
    params = {"w": torch.randn(64, 32), "b": torch.randn(64), "n": None, "v": torch.randn(16, 16)}
    tx = optfn.galore(rank=4)
    state = tx.init(params)
    mu = tree.get(state, "mu")
    assert tree.map(lambda x: tuple(x.shape), mu) == {"w": (4, 32), "b": (64,), "n": (), "v": (4, 16)}
    before = tree.get(state, "projector")["v"]
    updates, state = tx.update({"w": torch.randn(64, 32), "b": torch.randn(64), "n": None, "v": None}, state, params)
    assert updates["v"] is None
    assert torch.equal(tree.get(state, "projector")["v"], before)
    # It takes its subspace from the first gradient that it has, whenever that comes.
    _, state = tx.update(params, state, params)
    assert tree.get(state, "projector")["v"].any()


def test_a_gradient_that_is_not_finite_is_no_error() -> None:
    """apply_if_finite drops what it gives, and keeps the state from before."""
    tx, g = optfn.apply_if_finite(optfn.galore(0.1, 1), 5), torch.tensor([[float("nan"), 1.0], [2.0, 3.0]])
    state = tx.init(g)
    updates, state = tx.update(g, state, torch.zeros(2, 2))
    assert not updates.any()
    assert not tree.get(state, "projector").any()
    bare = optfn.scale_by_galore(1, base_optimizer=optfn.identity())
    assert bare.update(g, bare.init(g))[0].isnan().any()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: optfn.galore(rank=0), ValueError, "must be >= 1, got 0"),
        (lambda: optfn.galore(update_proj_gap=0), ValueError, "must be >= 1, got 0"),
        (lambda: optfn.galore(base_optimizer=optfn.adam), TypeError, "takes transformations"),
        (lambda: optfn.galore().init(torch.zeros(2, 2, dtype=torch.complex64)), TypeError, "complex"),
        (
            lambda: optfn.galore(weight_dimension_numbers=GaLoreDimensionNumbers(0, 2)).init(torch.zeros(2, 2)),
            ValueError,
            "are no rows and columns",
        ),
        (lambda: optfn.galore(weight_dimension_numbers={"w": 3}).init({"w": torch.zeros(2, 2)}), TypeError, "'w' must have"),
        (lambda: run(optfn.galore(base_optimizer=optfn.adamw()), torch.eye(2), [torch.eye(2)]), TypeError, "params"),
    ],
)  # fmt: skip
def test_errors(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
