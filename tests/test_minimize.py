"""The loop: minima that are known otherwise, every reason to stop, and what it must not do."""

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import optfn
from optfn import tree

STRONG_WOLFE = optfn.lbfgs(line_search_fn="strong_wolfe", tolerance_change=0.0, tolerance_grad=0.0)
EXACT = {"tolerance_change": 0.0, "tolerance_grad": 1e-10}


def rosenbrock(x: Any) -> Any:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quadratic(x: Tensor) -> Tensor:
    return (torch.arange(1.0, 4.0, dtype=x.dtype) * x.square()).sum() / 2


START = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("n", [2, 10])
def test_rosenbrock(n: int) -> None:
    start = torch.full((n,), -1.2, dtype=torch.float64)
    result = optfn.minimize(rosenbrock, start, STRONG_WOLFE, **EXACT)
    assert result.reason == "gradient"
    assert result.grad_norm <= 1e-10
    assert result.value == rosenbrock(result.params)
    torch.testing.assert_close(result.params, torch.ones_like(start), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("tx", "tolerance"),
    # A search compares values, and two of them are equal where the gradient is some 1e-8.
    [(STRONG_WOLFE, 1e-7), (optfn.lbfgs(tolerance_change=0.0, tolerance_grad=0.0), 1e-12)],
    ids=["strong_wolfe", "lr=1"],
)
def test_logistic_regression_ends_where_newton_does(tx: Any, tolerance: float) -> None:
    x, penalty = draw(60, 4), 0.05
    y = (x @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64) + 0.5 + draw(60, seed=1) > 0).double()
    design = torch.cat([x, torch.ones(60, 1, dtype=torch.float64)], 1)

    def loss(params: dict[str, Tensor]) -> Tensor:
        logits = x @ params["w"] + params["b"]
        misfit = torch.nn.functional.binary_cross_entropy_with_logits(logits, y)
        return misfit + penalty / 2 * (params["w"].square().sum() + params["b"].square())

    w = torch.zeros(5, dtype=torch.float64)
    for _ in range(30):
        rates = torch.sigmoid(design @ w)
        hessian = design.T @ (design * (rates * (1 - rates))[:, None]) / 60 + penalty * torch.eye(5, dtype=torch.float64)
        w = w - torch.linalg.solve(hessian, design.T @ (rates - y) / 60 + penalty * w)
    start = {"w": torch.zeros(4, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    result = optfn.minimize(loss, start, tx, tolerance_change=0.0, tolerance_grad=tolerance)
    assert result.reason == "gradient"
    # The loss is strongly convex, by the penalty: this is how far from the optimum such a gradient can be.
    error = (torch.cat([result.params["w"], result.params["b"][None]]) - w).norm()
    assert error <= 5**0.5 * result.grad_norm / penalty + 1e-14


@pytest.mark.parametrize(
    ("tx", "atol"),
    [(STRONG_WOLFE, 1e-9), (optfn.sgd(0.1, momentum=0.8), 1e-8), (optfn.adam(optfn.exponential_decay(0.1, 100, 0.5)), 1e-6)],
    ids=["lbfgs", "sgd", "adam"],
)
def test_least_squares_has_its_closed_form(tx: Any, atol: float) -> None:
    class Line(NamedTuple):
        slopes: Tensor
        offset: Tensor

    x, y = draw(20, 3), draw(20, seed=1)

    def loss(line: Line) -> Tensor:
        return (x @ line.slopes + line.offset - y).square().mean()

    best = torch.linalg.lstsq(torch.cat([x, torch.ones(20, 1, dtype=torch.float64)], 1), y[:, None]).solution[:, 0]
    start = Line(torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    result = optfn.minimize(loss, start, tx, max_steps=2000, tolerance_change=None, tolerance_grad=1e-9)
    assert isinstance(result.params, Line)
    torch.testing.assert_close(torch.cat([result.params.slopes, result.params.offset[None]]), best, rtol=0, atol=atol)


def test_reasons() -> None:
    def run(tx: Any = None, fun: Any = quadratic, start: Tensor = START, **options: Any) -> Any:
        return optfn.minimize(fun, start, tx or optfn.sgd(0.1), **options)

    result = run(tolerance_grad=1e-3, tolerance_change=None)
    assert (result.reason, result.grad_norm <= 1e-3) == ("gradient", True)
    before = run(tolerance_grad=None, tolerance_change=None, max_steps=result.steps - 1)
    assert (before.reason, before.steps, before.grad_norm > 1e-3) == ("max_steps", result.steps - 1, True)

    # The value stops changing long before the parameters do, and the other way round where it is 1e12 times as large.
    for scale in (1.0, 1e12):
        options: Any = {"tx": optfn.sgd(0.1 / scale), "fun": lambda x, scale=scale: scale * quadratic(x), "tolerance_grad": None}
        result = run(**options, tolerance_change=1e-7)
        assert result.reason == "change"
        steps = [run(**options, tolerance_change=None, max_steps=result.steps - i) for i in (2, 1, 0)]
        changes = [((a.params - b.params).abs().max(), (a.value - b.value).abs()) for a, b in itertools.pairwise(steps)]
        assert [moved <= 1e-7 or gained < 1e-7 for moved, gained in changes] == [False, True]
        assert (changes[1][0] <= 1e-7) == (scale > 1)

    assert (run(max_steps=0).reason, run(max_steps=0).evals) == ("max_steps", 1)
    result = run(max_evals=7)
    assert (result.reason, result.steps, result.evals) == ("max_evals", 6, 7)
    result = run(start=torch.zeros_like(START))
    assert (result.reason, result.steps, result.evals) == ("gradient", 0, 1)


def test_what_is_not_finite_ends_it_at_the_last_point_that_was() -> None:
    result = optfn.minimize(quadratic, START, optfn.sgd(1e30), tolerance_change=None)
    assert result.reason == "nonfinite"
    assert result.params.isfinite().all()
    assert result.value == quadratic(result.params)
    updates, _ = optfn.sgd(1e30).update(tree.value_and_grad(quadratic)(result.params)[1], result.state)
    assert not quadratic(result.params + updates).isfinite()
    assert result.evals == result.steps + 2

    def root(x: Tensor) -> Tensor:  # the value is finite where it ends, its gradient is not
        return x.clamp_min(0).sqrt().sum()

    result = optfn.minimize(root, torch.tensor([0.25]), optfn.sgd(0.25), tolerance_change=None)
    assert (result.reason, result.steps, result.params.item()) == ("nonfinite", 0, 0.25)
    result = optfn.minimize(quadratic, START * math.nan, optfn.sgd(0.1))
    assert (result.reason, result.steps, result.evals) == ("nonfinite", 0, 1)


@pytest.mark.parametrize("tx", [STRONG_WOLFE, optfn.adam(0.1)], ids=["lbfgs", "adam"])
def test_interrupted_it_goes_on_the_same_way(tx: Any) -> None:
    whole = optfn.minimize(rosenbrock, START, tx, max_steps=12)
    half = optfn.minimize(rosenbrock, START, tx, max_steps=5)
    again = optfn.minimize(rosenbrock, half.params, tx, state=half.state, max_steps=7)
    assert half.reason == again.reason == whole.reason == "max_steps"
    for x, y in zip(tree.leaves((again.params, again.state)), tree.leaves((whole.params, whole.state)), strict=True):
        assert torch.equal(x, y)


def test_a_point_is_evaluated_once() -> None:
    seen: list[tuple[float, ...]] = []

    def fun(x: Tensor) -> Tensor:
        seen.append(tuple(x.tolist()))
        return rosenbrock(x)

    def value_and_grad(x: Tensor) -> Any:
        seen.append(tuple(x.tolist()))
        return tree.value_and_grad(rosenbrock)(x)

    result = optfn.minimize(value_and_grad, START, STRONG_WOLFE, value_and_grad=True, tolerance_grad=1e-3)
    assert result.steps > 10
    assert len(seen) == len(set(seen)) == result.evals
    seen.clear()
    result = optfn.minimize(value_and_grad, START, optfn.adam(0.1), value_and_grad=True, max_steps=5)
    assert len(seen) == result.evals == 6


def test_what_an_update_is_given() -> None:
    seen: list[dict[str, Any]] = []

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        assert torch.equal(extra["grad"], updates)
        assert extra["value"] == quadratic(params) == extra["value_fn"](params)
        value, grads = extra["value_and_grad_fn"](params)
        assert torch.equal(grads, updates)
        assert value == extra["value"]
        seen.append(extra)
        return -0.1 * updates, state

    tx = optfn.chain(optfn.GradientTransformation(lambda params: (), update))
    optfn.minimize(quadratic, START, tx, max_steps=2)
    assert [extra.get("max_evals") for extra in seen] == [None, None]
    seen.clear()
    optfn.minimize(quadratic, START, tx, max_evals=6)
    assert [extra["max_evals"] for extra in seen] == [5, 2]  # 1 at the start; 2 in each update, 1 after it


def test_nothing_is_changed_and_nothing_recorded() -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    params = {"x": START.clone().requires_grad_(), "none": None}
    state = optfn.adam(0.1).init(params)
    given = [weight, *tree.leaves((params, state))]
    before = [(x._version, x.detach().clone()) for x in given]
    result = optfn.minimize(lambda p: (weight * p["x"].square()).sum(), params, optfn.adam(0.1), state=state, max_steps=20)
    for x, (version, value) in zip(given, before, strict=True):
        assert x._version == version
        assert torch.equal(x, value)
    assert result.params["none"] is None
    assert not any(x.requires_grad for x in tree.leaves((result.params, result.state, result.value, result.grad_norm)))
    assert weight.grad is None


def test_backward_may_give_the_gradient() -> None:
    """``value_and_grad`` by ``.backward()`` of a module, a parameter of which has no gradient."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    model.unused = torch.nn.Parameter(torch.ones(2))
    x, y = draw(16, 3), draw(16, 1, seed=1)

    def fun(params: dict[str, Tensor]) -> Any:
        leaves = {name: p.requires_grad_() for name, p in tree.map(Tensor.clone, params).items()}
        loss = (torch.func.functional_call(model, leaves, (x,)) - y).square().mean()
        loss.backward()
        return loss, {name: p.grad for name, p in leaves.items()}

    start = dict(model.named_parameters())
    result = optfn.minimize(fun, start, optfn.lbfgs(line_search_fn="strong_wolfe"), value_and_grad=True, max_steps=50)
    assert result.value < fun(tree.map(Tensor.detach, start))[0] / 2
    assert torch.equal(result.params["unused"], torch.ones(2))


def test_an_accumulator_needs_its_test_of_change_off() -> None:
    tx = optfn.accumulate(optfn.sgd(0.1), 2)
    assert optfn.minimize(quadratic, START, tx).steps == 1
    assert optfn.minimize(quadratic, START, tx, tolerance_change=None).reason == "gradient"


def test_complex_and_empty_leaves() -> None:
    params = {"z": torch.tensor([3 + 4j, -1j]), "empty": torch.zeros(0)}
    result = optfn.minimize(lambda p: (p["z"] - 2j).abs().square().sum() + p["empty"].sum(), params, STRONG_WOLFE)
    torch.testing.assert_close(result.params["z"], torch.tensor([2j, 2j]))
    first = optfn.minimize(lambda p: (p["z"] - 2j).abs().square().sum() + p["empty"].sum(), params, STRONG_WOLFE, max_steps=0)
    assert first.grad_norm == 6  # of real and imaginary part: 2 (3 + 2i), -6i


def test_errors() -> None:
    for options, message in (
        ({"max_steps": -1}, "max_steps must be >= 0, got -1"),
        ({"max_evals": -1}, "max_evals must be >= 0, got -1"),
        ({"tolerance_grad": math.nan}, "tolerance_grad must be >= 0, got nan"),
        ({"tolerance_change": -1e-9}, "tolerance_change must be >= 0, got -1e-09"),
    ):
        with pytest.raises(ValueError, match=message):
            optfn.minimize(quadratic, START, optfn.sgd(0.1), **options)
    with pytest.raises(ValueError, match=r"the value must be a 0-dim tensor, got shape \(3,\)"):
        optfn.minimize(lambda x: (x, x), START, optfn.sgd(0.1), value_and_grad=True)
    with pytest.raises(ValueError, match=r"must give a 0-dim tensor, got shape \(3,\): its mean or its sum, say"):
        optfn.minimize(lambda x: x, START, optfn.sgd(0.1))
