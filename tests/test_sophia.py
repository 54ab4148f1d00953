"""Sophia and its estimator against Optax, and that an estimate is made when it is due."""

from typing import Any

import jax
import optax
import pytest
import torch
from optax.contrib._sophia import scale_by_sophia  # not among its public names
from optax_oracle import assert_close, exact, from_jax, some_grads, some_params, to_jax

import optfn
from optfn import tree

SHAPES = {"cube": (2, 3, 2), "matrix": (3, 2), "scalar": (), "vector": (5,)}
STEPS = 25
SCHEDULE = (optfn.linear_schedule(0.1, 0.02, 20), exact(optax.linear_schedule(0.1, 0.02, 20)))
SEED = 11

P = torch.ones(3)

c = optax.contrib


def is_matrix(path: str, p: torch.Tensor) -> bool:
    return p.ndim > 1


PAIRS: dict[str, tuple[Any, Any]] = {
    "scale_by_sophia": (optfn.scale_by_sophia(), scale_by_sophia()),
    "scale_by_sophia.options": (
        optfn.scale_by_sophia(
            0.8, 0.9, 1e-3, 0.5, 0.3, 3, optfn.hutchinson_estimator_diag_hessian(SEED), torch.float64
        ),
        scale_by_sophia(
            0.8, 0.9, 1e-3, 0.5, 0.3, 3, c.hutchinson_estimator_diag_hessian(jax.random.PRNGKey(SEED)), jax.numpy.float64
        ),
    ),
    "scale_by_sophia.unclipped": (
        optfn.scale_by_sophia(eps=1e-2, clip_threshold=None, update_interval=1),
        scale_by_sophia(eps=1e-2, clip_threshold=None, update_interval=1),
    ),
    "sophia": (optfn.sophia(0.1), c.sophia(0.1)),
    "sophia.options": (
        optfn.sophia(SCHEDULE[0], (0.9, 0.95), 1e-3, 0.1, gamma=2.0, clip_threshold=0.5, update_interval=4, mask=is_matrix),
        c.sophia(SCHEDULE[1], 0.9, 0.95, 1e-3, 0.1, lambda p: jax.tree.map(lambda x: x.ndim > 1, p), 2.0, 0.5, 4),
    ),
}  # fmt: skip


def loss(lib: Any, params: Any, shift: Any) -> Any:
    """Far from quadratic, with a Hessian that is bounded, and every leaf meets every other one."""
    return sum(lib.cos(x + shift).sum() for x in params.values()) + 0.1 * sum(lib.sin(x).sum() for x in params.values()) ** 2


def ours(tx: Any, params: Any) -> list[Any]:
    state, steps = tx.init(params), []
    for i, g in enumerate(some_grads(STEPS, shapes=SHAPES)):
        updates, state = tx.update(g, state, params, obj_fn=lambda p, i=i: loss(torch, p, 0.1 * i))
        params = optfn.apply_updates(params, updates)
        steps.append({"updates": updates, "params": params})
    return steps


def theirs(tx: Any, params: Any) -> list[Any]:
    params = to_jax(params)
    state, steps = tx.init(params), []

    @jax.jit
    def step(grads: Any, params: Any, state: Any, shift: Any) -> Any:
        return tx.update(grads, state, params, obj_fn=lambda p: loss(jax.numpy, p, shift))

    for i, g in enumerate(some_grads(STEPS, shapes=SHAPES)):
        updates, state = step(to_jax(g), params, state, 0.1 * i)
        params = optax.apply_updates(params, updates)
        steps.append(from_jax({"updates": updates, "params": params}))
    return steps


@pytest.fixture
def _signs_of_default_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 64-bit numbers switched on, as here, JAX draws other signs than without: it compares 64 bits with 1/2, not 32."""

    def rademacher(key: Any, shape: Any, dtype: Any) -> Any:
        return (2 * jax.random.bernoulli(key, jax.numpy.float32(0.5), shape) - 1).astype(dtype)

    monkeypatch.setattr(jax.random, "rademacher", rademacher)


@pytest.mark.usefixtures("_signs_of_default_jax")
@pytest.mark.parametrize("name", PAIRS)
def test_trajectory_is_optaxs(name: str) -> None:
    params = some_params(shapes=SHAPES)
    mine, yours = PAIRS[name]
    for step, (a, b) in enumerate(zip(ours(mine, params), theirs(yours, params), strict=True)):
        try:
            assert_close(a, b, 1e-12)
        except AssertionError as error:
            raise AssertionError(f"step {step}") from error


def test_a_mean_of_estimates_is_the_diagonal() -> None:
    """Entry i of an estimate is that of the diagonal and a sum of others with random signs."""
    matrix = torch.tensor([[3.0, 1.0, 0.5], [1.0, -2.0, 0.2], [0.5, 0.2, 1.0]], dtype=torch.float64)
    p = torch.zeros(3, dtype=torch.float64)
    tx = optfn.hutchinson_estimator_diag_hessian(3)
    state, total = tx.init(p), torch.zeros_like(p)
    for _ in range(400):
        estimate, state = tx.update(p, state, p, obj_fn=lambda x: x @ matrix @ x / 2)
        total += estimate
    deviation = (matrix.square().sum(1) - matrix.diag().square()).sqrt() / 20
    assert ((total / 400 - matrix.diag()).abs() < 4 * deviation).all()


def test_none_leaves_sit_out_and_need_no_curvature() -> None:
    params = {"a": torch.tensor([1.0, 2.0]), "b": None, "c": torch.tensor([3.0])}
    tx = optfn.sophia(0.1, update_interval=1)
    f = lambda p: (p["a"] ** 2).sum() + (p["c"] ** 2).sum()  # noqa: E731
    updates, state = tx.update({"a": torch.ones(2), "b": None, "c": None}, tx.init(params), params, obj_fn=f)
    assert updates["b"] is None
    assert updates["c"] is None
    curvature = tree.get(state, "curvature").slots.ema
    torch.testing.assert_close(curvature["a"], torch.tensor([0.02, 0.02]))
    assert not curvature["c"].any()


def test_uphill_is_downhill_of_the_negated_objective() -> None:
    params, seen = some_params(shapes=SHAPES), []
    for sign in (1.0, -1.0):
        tx = optfn.sophia(0.1, weight_decay=0.1, update_interval=2, maximize=sign < 0)
        grads = tree.scale(sign, some_grads(4, shapes=SHAPES))
        state, p = tx.init(params), params
        for g in grads:
            updates, state = tx.update(g, state, p, obj_fn=lambda p: loss(torch, p, 0.3))
            p = optfn.apply_updates(p, updates)
        seen.append(p)
    assert_close(seen[0], seen[1], 0)


def test_an_estimate_is_made_only_when_it_is_due() -> None:
    calls = []

    def f(p: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls))
        return p.square().sum()

    tx, p = optfn.scale_by_sophia(update_interval=4), torch.ones(3)
    state, made = tx.init(p), []
    for _ in range(9):
        _, state = tx.update(2 * p, state, p, obj_fn=f)
        made.append(len(calls))
    assert made == [1, 1, 1, 1, 2, 2, 2, 2, 3]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: optfn.sophia(update_interval=0), ValueError, "update_interval must be >= 1"),
        (lambda: optfn.sophia(eps=0.0), ValueError, "eps"),
        (lambda: optfn.sophia(hessian_diagonal_fn=optfn.adam), TypeError, "takes transformations"),
        (lambda: (t := optfn.sophia()).update(torch.ones(1), t.init(torch.ones(1)), torch.ones(1)), TypeError, "obj_fn"),
        (lambda: (t := optfn.sophia()).update(torch.ones(1), t.init(torch.ones(1))), TypeError, "params"),
        *(
            (
                lambda fun=fun: (t := optfn.sophia()).update(P, t.init(P), P, obj_fn=fun),
                error,
                f"must give a 0-dim tensor, got {got}",
            )
            for fun, error, got in (
                (torch.square, ValueError, r"shape \(3,\): its mean or its sum, say"),
                (lambda p: None, TypeError, "NoneType"),
                (lambda p: 1.0, TypeError, "float"),
            )
        ),
    ],
)
def test_errors(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_nothing_to_do_is_no_error() -> None:
    tx, p = optfn.sophia(), {"w": torch.ones(2, 2)}
    assert tx.update({}, tx.init({}), {}, obj_fn=lambda p: torch.tensor(0.0))[0] == {}
    hidden = optfn.masked(optfn.sophia(), lambda path, x: False)
    assert hidden.update(p, hidden.init(p), p, obj_fn=lambda p: torch.zeros(()))[0]["w"] is p["w"]
