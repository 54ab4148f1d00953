"""L-BFGS against torch.optim.LBFGS, the dense BFGS formula and the Wolfe conditions; and the loop around it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from oracle import INFOS, as_numbers, check
from torch import Tensor
from torch.optim import LBFGS
from torch.optim.lbfgs import _strong_wolfe as torch_strong_wolfe

import optfn
from optfn import tree
from optfn.optimizers.lbfgs import _strong_wolfe as strong_wolfe

# A smooth convex function of leaves of every kind. It is well conditioned, as L-BFGS carries rounding on from step to step: on
# Rosenbrock's function torch's own trajectories, from starts that differ by 1e-15, are 1e-9 apart after 50 iterations.


class Problem(NamedTuple):
    params: dict[str, Tensor]
    value: Callable[[dict[str, Tensor]], Tensor]


def problem(dtype: torch.dtype = torch.float64) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.promote_types(dtype, torch.float64), generator=generator).to(dtype)

    params = {"scalar": draw(), "matrix": draw(3, 2).t(), "vector": draw(3), "empty": draw(0, 2), "late": draw(2)}
    x, y, weights = draw(30, 2), draw(30, 3), {name: draw(*p.shape) for name, p in params.items()}

    def value(params: dict[str, Tensor]) -> Tensor:
        fit = x @ params["matrix"] + params["vector"] + params["scalar"] - y
        misfit = (1 + fit.abs().square()).sqrt().mean()
        return misfit + sum(((p - weights[name]).abs().square() * 0.3).sum() for name, p in params.items())

    return Problem(params, value)


CONFIGURATIONS = {entry.desc: entry.kwargs for entry in INFOS[LBFGS].optim_inputs_func(device="cpu")}
MORE = {
    "large lr, tolerances": {"lr": 1.5, "tolerance_grad": 1e-3, "tolerance_change": 1e-5},
    "strong_wolfe, lr": {"line_search_fn": "strong_wolfe", "lr": 0.1},
    "strong_wolfe, tolerances": {"line_search_fn": "strong_wolfe", "tolerance_grad": 1e-3, "tolerance_change": 1e-5},
}
LOOPS = {
    "": {},
    "short": {"max_iter": 3, "history_size": 2},
    "single": {"max_iter": 1, "max_eval": 10},
    "max_eval": {"max_eval": 4},
}

Pattern = Callable[[int], tuple[tuple[str, ...], tuple[str, ...]]]
PATTERNS: dict[str, Pattern] = {
    "": lambda t: ((), ()),
    "none": lambda t: (("late", "scalar"), ()),
    "none, changing": lambda t: (("late",) if t < 3 else ("matrix", "scalar") if t % 4 == 3 else (), ()),
    "sparse": lambda t: ((), ("vector", "matrix")),
}
"""In each step of torch's, the leaves that have no gradient, and those that have a sparse one."""


class Torch:
    """torch's class on the leaves of a problem; ``evals`` counts for itself."""

    def __init__(self, given: Problem, kwargs: dict[str, Any]) -> None:
        self.params = {name: p.detach().clone().requires_grad_() for name, p in given.params.items()}
        self.value, self.evals = given.value, 0
        self.optimizer = LBFGS(list(self.params.values()), **as_numbers(kwargs))

    @property
    def state(self) -> dict[str, Any]:
        return self.optimizer.state[next(iter(self.params.values()))]

    def step(self, absent: tuple[str, ...] = (), sparse: tuple[str, ...] = ()) -> None:
        def closure() -> Tensor:
            self.evals += 1
            self.optimizer.zero_grad()
            value = self.value(self.params)
            value.backward()
            for name, p in self.params.items():
                # torch's class takes no gradient that is not contiguous
                p.grad = None if name in absent else p.grad.to_sparse() if name in sparse else p.grad.contiguous()
            return value

        self.optimizer.step(closure)


def transformation(kwargs: dict[str, Any]) -> optfn.GradientTransformation:
    return optfn.lbfgs(**{name: x for name, x in kwargs.items() if name not in ("max_iter", "max_eval")})


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["float64", "complex128"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("desc", {**CONFIGURATIONS, **MORE})
def test_trajectory(desc: str, loop: str, pattern: str, dtype: torch.dtype) -> None:
    """Steps of torch's class, each a call of ``minimize``, compared after every one."""
    if pattern == "none, changing" and "max_iter" not in LOOPS[loop]:
        pytest.skip("near an optimum differences of gradients are rounding, and a new function makes steps of them")
    given, kwargs = problem(dtype), {**CONFIGURATIONS, **MORE}[desc] | LOOPS[loop]
    reference, tx, params, state = Torch(given, kwargs), transformation(kwargs), given.params, None
    max_iter = kwargs.get("max_iter", 20)
    tolerances = {name: x for name, x in kwargs.items() if name.startswith("tolerance")}
    # In the 12th step of that pattern a last digit of the start decides which of two points 2e-12 apart torch itself takes.
    for t in range(6 if max_iter == 20 else 11 if pattern == "none, changing" else 12):
        absent, sparse = PATTERNS[pattern](t)

        def fun(params: Any, absent: Any = absent, sparse: Any = sparse) -> Any:
            value, grads = tree.value_and_grad(given.value)(params)
            return value, {name: None if name in absent else g.to_sparse() if name in sparse else g for name, g in grads.items()}

        limits = {"max_steps": max_iter, "max_evals": kwargs.get("max_eval", max_iter * 5 // 4)}
        result = optfn.minimize(fun, params, tx, state=state, value_and_grad=True, **limits, **tolerances)
        params, state = result.params, result.state
        reference.step(absent, sparse)
        for name, p in reference.params.items():
            check(params[name], p.detach(), f"{name} after step {t + 1}")
        assert state.n_iter.item() == reference.state.get("n_iter", 0), f"step {t + 1}"
    assert state.n_iter > 3
    assert state.pairs > 1


# Functions that L-BFGS finds hard, from one iteration to the next: both are given the same point every time.


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()


def waves(x: Tensor) -> Tensor:
    return (torch.sin(3 * x + 1) + 0.1 * x.square()).sum() + torch.cos(x.sum())


@pytest.mark.parametrize("history_size", [1, 3, 100])
@pytest.mark.parametrize("fun", [rosenbrock, waves])
@pytest.mark.parametrize("desc", CONFIGURATIONS)
def test_iterations(desc: str, fun: Any, history_size: int) -> None:
    kwargs = {**CONFIGURATIONS[desc], "history_size": history_size}
    x = torch.linspace(-1.2, 1.0, 6, dtype=torch.float64).requires_grad_()
    optimizer = LBFGS([x], **as_numbers(kwargs), max_iter=1, max_eval=26)
    tx = optfn.lbfgs(**kwargs, max_ls=25)
    state, evals = tx.init(x.detach()), 0

    def counted(p: Tensor) -> Any:
        nonlocal evals
        evals += 1
        return tree.value_and_grad(fun)(p)

    for t in range(60):
        p = x.detach().clone()
        value, g = counted(p)
        updates, state = tx.update(g, state, p, value=value, value_and_grad_fn=counted)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = fun(x)
            value.backward()
            return value

        optimizer.step(closure)
        check(p + updates, x.detach(), f"iteration {t + 1}")
        assert evals == optimizer.state[x]["func_evals"]
    assert state.n_iter == optimizer.state[x]["n_iter"]
    assert state.pairs > 3


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
@pytest.mark.parametrize("history_size", [1, 2, 5])
def test_direction_is_that_of_the_dense_formula(history_size: int, line_search_fn: Any) -> None:
    """Nocedal and Wright, equation 6.17, from a scaled identity over the pairs that are kept."""
    n, lr = 5, 0.7
    p = torch.linspace(-1.2, 1.0, n, dtype=torch.float64)
    tx = optfn.lbfgs(lr, history_size=history_size, line_search_fn=line_search_fn)
    state, pairs, last = tx.init(p), [], None
    identity = torch.eye(n, dtype=torch.float64)
    for _ in range(12):
        value, g = tree.value_and_grad(rosenbrock)(p)
        if last is not None:
            step, before = last
            y = g - before
            pairs = [*pairs, (step, y)][-history_size:] if y @ step > 1e-10 else pairs
        inverse = identity * (pairs[-1][0] @ pairs[-1][1] / pairs[-1][1].square().sum() if pairs else 1)
        for s, y in pairs:
            half = identity - torch.outer(s, y) / (s @ y)
            inverse = half @ inverse @ half.T + torch.outer(s, s) / (s @ y)
        updates, state = tx.update(g, state, p, value=value, value_fn=rosenbrock)
        direction = -inverse @ g
        if line_search_fn is None:
            t = lr * min(1.0, 1 / g.abs().sum().item()) if last is None else lr
            torch.testing.assert_close(updates, t * direction, rtol=1e-10, atol=0)
        else:  # the direction, whatever the length
            torch.testing.assert_close(updates / updates.norm(), direction / direction.norm(), rtol=1e-9, atol=1e-12)
        last, p = (updates, g), p + updates
    assert len(pairs) == history_size
    assert state.pairs > 2 * history_size  # the ring has gone round


class Number(float):
    """A number with a tensor's ``sqrt``: torch rounds once more where it divides a number by a tensor, by way of the reciprocal."""

    def sqrt(self) -> "Number":
        return Number(math.sqrt(self))


for operator in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow"):
    plain = getattr(float, f"__{operator}__")
    setattr(Number, f"__{operator}__", lambda self, other, plain=plain: Number(plain(self, float(other))))


class Gradient(NamedTuple):
    """The gradient along a line, with what torch's search asks of it."""

    slope: float

    def clone(self, **kwargs: Any) -> "Gradient":
        return self

    def dot(self, d: Any) -> Number:
        return Number(self.slope)


@pytest.mark.parametrize("max_ls", [1, 2, 4, 25])
@pytest.mark.parametrize("first", [1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("seed", range(12))
def test_search_is_torchs_bit_for_bit(seed: int, first: float, max_ls: int) -> None:
    """Along lines with many minima, from steps of very different lengths: the same step after the same trials."""
    generator = torch.Generator().manual_seed(seed)
    a, b, w, v = (torch.rand(4, dtype=torch.float64, generator=generator) * torch.tensor([1.0, 3.0, 20.0, 2.0])).tolist()

    def along(t: float) -> tuple[float, float]:
        x = 0.3 + t if t else 0.3
        f = a * math.sin(w * x) + 0.01 * b * x * x + math.log1p((v * x - 3) ** 2)
        return f, a * w * math.cos(w * x) + 0.02 * b * x + 2 * v * (v * x - 3) / (1 + (v * x - 3) ** 2)

    sign = -math.copysign(1.0, along(0.0)[1])  # downhill
    ours: list[float] = []
    theirs: list[float] = []

    def trial(t: float) -> tuple[float, float]:
        ours.append(t)
        f, df = along(sign * t)
        return f, sign * df

    def objective(x: Any, t: float, d: Tensor) -> tuple[float, Gradient]:
        theirs.append(t)
        f, df = along(sign * t)
        return f, Gradient(sign * df)

    f, df = along(0.0)
    found = strong_wolfe(trial, first, (0.0, f, sign * df), 1e-9, max_ls)
    expected = torch_strong_wolfe(objective, None, first, torch.ones(1), f, Gradient(sign * df), Number(sign * df), max_ls=max_ls)
    assert ours == theirs
    assert (found, len(ours)) == (expected[2], expected[3])


def test_the_searches_end_where_the_wolfe_conditions_hold() -> None:
    tx, p = optfn.lbfgs(line_search_fn="strong_wolfe"), torch.linspace(-1.2, 1.0, 6, dtype=torch.float64)
    state, held = tx.init(p), 0
    for _ in range(40):
        value, g = tree.value_and_grad(rosenbrock)(p)
        if g.abs().max() < 1e-4:
            break
        updates, state = tx.update(g, state, p, value=value, value_fn=rosenbrock)
        new_value, new_g = tree.value_and_grad(rosenbrock)(p + updates)
        assert new_value <= value + 1e-4 * (g @ updates)
        assert (new_g @ updates).abs() <= 0.9 * (g @ updates).abs()
        p, held = p + updates, held + 1
    assert held > 20


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_search_draws_back_from_what_is_not_finite(bad: float) -> None:
    def fun(x: Tensor) -> Tensor:
        return torch.where(x.abs() < 1, -(1 - x.square()).clamp_min(1e-9).log(), bad).sum() + x.sum()

    result = optfn.minimize(fun, torch.tensor([0.9], dtype=torch.float64), optfn.lbfgs(100.0, line_search_fn="strong_wolfe"))
    # The derivative, 2 x / (1 - x^2) + 1, is 0 where x^2 - 2 x - 1 is.
    assert result.reason in ("gradient", "change")
    torch.testing.assert_close(result.params, torch.tensor([1 - 2**0.5], dtype=torch.float64), rtol=0, atol=1e-5)


# What an update takes, and what it refuses


def test_arguments_of_the_search() -> None:
    tx, p = optfn.lbfgs(line_search_fn="strong_wolfe"), torch.linspace(-1.2, 1.0, 6, dtype=torch.float64)
    value, g = tree.value_and_grad(rosenbrock)(p)
    state = tx.init(p)
    expected, _ = tx.update(g, state, p, value=value, value_fn=rosenbrock)
    found, _ = tx.update(g, state, p, value=value.item(), value_and_grad_fn=tree.value_and_grad(rosenbrock), grad=g)
    assert torch.equal(found, expected)
    for missing in ("params", "value", "value_fn"):
        given = {"params": p, "value": value, "value_fn": rosenbrock}
        del given[missing]
        with pytest.raises(TypeError, match=f"^lbfgs needs `{missing}`"):
            tx.update(g, state, **given)

    # A chain that halves the gradient first: the direction is half as long, the slope is that of the function.
    chained = optfn.chain(optfn.scale(0.5), tx)
    seen: list[Tensor] = []

    def watched(x: Tensor) -> Any:
        seen.append(x)
        return tree.value_and_grad(rosenbrock)(x)

    updates, _ = chained.update(g, chained.init(p), p, value=value, grad=g, value_and_grad_fn=watched)
    new_value, new_g = tree.value_and_grad(rosenbrock)(p + updates)
    assert new_value <= value + 1e-4 * (g @ updates)
    assert (new_g @ updates).abs() <= 0.9 * (g @ updates).abs()
    assert any(torch.equal(x, p + updates) for x in seen)
    seen.clear()
    tx.update(g, state, p, value=value, value_and_grad_fn=watched, max_evals=1)
    assert len(seen) <= 2


def test_a_search_is_pure_and_records_nothing() -> None:
    p = {"w": torch.linspace(-1.2, 1.0, 6, dtype=torch.float64).requires_grad_()}
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    tx = optfn.lbfgs(line_search_fn="strong_wolfe")
    state = tx.init(p)
    value, grads = tree.value_and_grad(lambda p: weight * rosenbrock(p["w"]))(p)
    given = [*tree.leaves((p, state, grads)), value]
    versions = [x._version for x in given]
    with torch.no_grad():
        updates, new = tx.update(grads, state, p, value=value, value_fn=lambda p: weight * rosenbrock(p["w"]))
    assert not any(x.requires_grad for x in tree.leaves((updates, new)))
    assert [x._version for x in given] == versions
    assert weight.grad is None


def test_a_search_is_neither_compiled_nor_mapped() -> None:
    tx, p = optfn.lbfgs(line_search_fn="strong_wolfe"), torch.linspace(-1.2, 1.0, 6, dtype=torch.float64)

    def step(p: Tensor, state: Any) -> Any:
        value, g = tree.value_and_grad(rosenbrock)(p)
        return tx.update(g, state, p, value=value, value_fn=rosenbrock)

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.UserError, match="data-dependent"):
        torch.compile(step, fullgraph=True, backend="eager")(p, tx.init(p))
    batch = torch.stack([p, 2 * p])
    with pytest.raises(RuntimeError, match="item"):
        torch.vmap(step)(batch, torch.vmap(tx.init)(batch))
    # What it evaluates may be compiled.
    fast = torch.compile(tree.value_and_grad(rosenbrock), fullgraph=True, backend="aot_eager")
    tx_and_loop = {"tx": tx, "max_steps": 10}
    found = optfn.minimize(fast, p, value_and_grad=True, **tx_and_loop)
    torch.testing.assert_close(found.params, optfn.minimize(rosenbrock, p, **tx_and_loop).params, rtol=1e-10, atol=1e-10)


def test_where_torch_stops_updates_are_zero() -> None:
    p = torch.tensor([1.0, -2.0], dtype=torch.float64)
    tx = optfn.lbfgs(tolerance_grad=1e-3, tolerance_change=1e-5)
    state = tx.init(p)
    _, state = tx.update(p, state)
    updates, new = tx.update(torch.tensor([1e-3, -1e-4], dtype=torch.float64), state)  # within tolerance_grad
    assert not updates.any()
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(new), tree.leaves(state), strict=True))
    g = torch.tensor([2e-3, 0.0], dtype=torch.float64)  # g'd = -4e-6, above -tolerance_change
    updates, new = tx.update(g, tx.init(p))
    assert not updates.any()
    assert new.n_iter == 1
    updates, _ = tx.update(2 * g, tx.init(p))  # -1.6e-5 is not
    assert updates.any()


def test_none_is_zeros() -> None:
    params = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(2, 1, dtype=torch.float64)}
    tx = optfn.lbfgs(lr=0.1)
    full = [{"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0], [1.0]])}, {"a": torch.tensor([0.5, 1.0]), "b": None}]
    full = [tree.cast(g, torch.float64) for g in full]
    zeros = {**full[1], "b": torch.zeros(2, 1, dtype=torch.float64)}
    _, state = tx.update(full[0], tx.init(params), params)
    found, expected = tx.update(full[1], state, params), tx.update(zeros, state, params)
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(found), tree.leaves(expected), strict=True))
    assert found[0]["b"].any()  # what is remembered of it moves it
    with pytest.raises(ValueError, match="have 2 entries, the state is of 4; where some are None pass the params too"):
        tx.update(full[1], state)


def test_on_some_of_the_leaves() -> None:
    given = problem()
    tx = optfn.partition(
        {"quasi": optfn.lbfgs(lr=0.5, tolerance_change=0.0), "plain": optfn.sgd(lr=0.1)},
        lambda path, p: "quasi" if path in ("matrix", "vector") else "plain",
    )
    result = optfn.minimize(given.value, given.params, tx, max_steps=500, tolerance_change=None, tolerance_grad=1e-6)
    best = optfn.minimize(given.value, given.params, optfn.lbfgs(tolerance_change=0.0), tolerance_change=0.0, tolerance_grad=1e-10)
    assert result.reason == "gradient"
    for name, p in best.params.items():
        torch.testing.assert_close(result.params[name], p, rtol=0, atol=1e-5)
    assert tree.get(result.state, "last_grad").shape == (9,)


def test_lr_in_the_state_and_as_a_schedule() -> None:
    given = problem()
    loop = {"max_steps": 15, "tolerance_change": None}
    expected = optfn.minimize(given.value, given.params, optfn.lbfgs(lr=0.25), **loop).params
    injected = optfn.inject_hyperparams(optfn.lbfgs)(lr=0.5)
    state = tree.set(injected.init(given.params), lr=0.25)
    for tx, start in ((injected, state), (optfn.lbfgs(lr=lambda n: 0.25 + 0 * n), None)):
        found = optfn.minimize(given.value, given.params, tx, state=start, **loop).params
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# torch's error inputs: where each is raised here, or why it is none.
VALUES_NOT_OBJECTS = "params are a tree of values: the same tensor twice is two leaves"
NOT_AN_ERROR = {
    "invalid param type": "a bare tensor is a tree",
    "a param group cannot have duplicate parameters": VALUES_NOT_OBJECTS,
    "duplicate parameters should not occur across param groups either": VALUES_NOT_OBJECTS,
}
ERRORS = {
    "Tensor lr must be 1-element": (ValueError, r"^lr must be a number or .* of one element, got shape \(2,\)"),
    "all optimizer params should be with/without names": (TypeError, r"params at '0\.0' must be a tensor or None, got str"),
    "all optimizer param groups should be with/without names.": (TypeError, r"params at '0\.lr' must be .*, got float"),
}
ERROR_TABLE = [entry.optimizer_error_input for entry in INFOS[LBFGS].optim_error_inputs_func(device="cpu", dtype=torch.float64)]


@pytest.mark.parametrize("given", ERROR_TABLE, ids=lambda given: given.desc)
def test_errors_of_torch(given: Any) -> None:
    def run() -> Any:
        tx = optfn.lbfgs(**given.kwargs)
        params = {"w": torch.ones(2)} if given.params is None else given.params
        state = tx.init(params)
        return params, tx.update(tree.map(torch.ones_like, params), state, params)[0]

    if given.desc in ERRORS:
        kind, message = ERRORS[given.desc]
        with pytest.raises(kind, match=message):
            run()
        return
    assert given.desc in NOT_AN_ERROR, "torch's table has an error that neither table here has"
    params, updates = run()
    assert all((u < 0).all() for u in tree.leaves(updates))
    assert tree.flatten(updates)[1] == tree.flatten(params)[1]


def test_errors() -> None:
    for kwargs, message in (
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"lr": math.nan}, "lr must be >= 0, got nan"),
        ({"tolerance_grad": -1.0}, "tolerance_grad must be >= 0"),
        ({"tolerance_change": -1.0}, "tolerance_change must be >= 0"),
        ({"history_size": 0}, "history_size must be >= 1, got 0"),
        ({"max_ls": 0}, "max_ls must be >= 1, got 0"),
        ({"line_search_fn": "weak_wolfe"}, "line_search_fn must be None or 'strong_wolfe', got 'weak_wolfe'"),
    ):
        with pytest.raises(ValueError, match=message):
            optfn.lbfgs(**kwargs)
    tx, params = optfn.lbfgs(), {"w": torch.ones(2)}
    state = tx.init(params)
    for bad in ({"w": torch.ones(2, dtype=torch.int64)}, {"w": torch.ones(2), "i": torch.ones(1, dtype=torch.int64)}):
        with pytest.raises(TypeError, match=r"^lbfgs: '[wi]' must be a dense floating-point"):
            tx.init(bad)
    for grads, kind, message in (
        ({"w": torch.ones(2, dtype=torch.int64)}, TypeError, "^lbfgs: 'w' must have a floating-point or complex gradient"),
        ({"w": torch.ones(3)}, ValueError, r"^lbfgs: 'w' must have an update like its parameter, .*\(2,\), got .*\(3,\)"),
        ({"v": torch.ones(2)}, ValueError, "'v'"),
    ):
        with pytest.raises(kind, match=message):
            tx.update(grads, state, params)
    with pytest.raises(ValueError, match="the leaves must be on one device, got cpu, meta"):
        tx.init({"w": torch.ones(2), "m": torch.ones(2, device="meta")})
    assert tx.update({}, tx.init({}), {})[0] == {}


def test_counts(record_property: Callable[[str, object], None]) -> None:
    record_property(
        "torch.optim parity",
        f"     LBFGS: {len(CONFIGURATIONS):2} configurations in 2 dtypes, "
        f"{len(LOOPS)} loops, {len(PATTERNS)} patterns of gradients; "
        f"{len(ERROR_TABLE):2} errors, {len(ERRORS)} of them ours too, {len(NOT_AN_ERROR)} not applicable",
    )
    assert len(CONFIGURATIONS) == 5
    assert len(ERROR_TABLE) == len(ERRORS) + len(NOT_AN_ERROR) == 6
