"""Line searches against Optax: every step size, every count of evaluations, every part of the state."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from optax_oracle import assert_close, from_jax, to_jax

import optfn
from optfn import tree

jax.config.update("jax_enable_x64", True)

GENERATOR = torch.Generator().manual_seed(0)
DATA = torch.randn(12, 4, dtype=torch.float64, generator=GENERATOR)
LABELS = (torch.randn(12, dtype=torch.float64, generator=GENERATOR) > 0).double()
CURVATURES = torch.tensor([1.0, 7.0, 40.0], dtype=torch.float64)


def rosenbrock(xp, p):
    x = xp.stack([p["x"], p["rest"]["y"]])
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def quadratic(xp, p):
    scales = CURVATURES if xp is torch else CURVATURES.numpy()
    return 0.5 * (scales * p["w"] ** 2).sum() + 3 * p["b"] ** 2 - p["b"]


def logistic(xp, p):
    x, y = (DATA, LABELS) if xp is torch else (DATA.numpy(), LABELS.numpy())
    margin = x @ p["w"] + p["b"]
    return xp.mean(xp.log1p(xp.exp(margin)) - y * margin) + 0.01 * (p["w"] ** 2).sum()


def walled(xp, p):
    """Not a number beyond 1."""
    return -xp.log(1 - p["x"] ** 2) + p["x"] * 0.5 + (p["y"] ** 2).sum()


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


PROBLEMS = {
    "rosenbrock": (rosenbrock, {"x": tensor(-1.2), "rest": {"y": tensor(1.0)}}),
    "quadratic": (quadratic, {"w": tensor([1.0, -2.0, 0.5]), "b": tensor(2.0)}),
    "logistic": (logistic, {"w": tensor([0.1, 0.2, -0.3, 0.4]), "b": tensor(0.0)}),
    "walled": (walled, {"x": tensor(0.9), "y": tensor([1.0, 2.0])}),
}
FRONTS = {
    "lbfgs": (
        (lambda: optfn.chain(optfn.scale_by_lbfgs(5), optfn.scale(-1.0))),
        (lambda: optax.chain(optax.scale_by_lbfgs(5), optax.scale(-1.0))),
    ),
    "sgd": (lambda: optfn.sgd(0.5), lambda: optax.sgd(0.5)),
    "adam": (
        lambda: optfn.chain(optfn.scale_by_adam(), optfn.scale(-0.3)),
        lambda: optax.chain(optax.scale_by_adam(), optax.scale(-0.3)),
    ),
    "uphill": (lambda: optfn.scale(0.1), lambda: optax.scale(0.1)),
}
ZOOM = "scale_by_zoom_linesearch"
BACKTRACKING = "scale_by_backtracking_linesearch"
# Which search and its arguments; the problem; what is in front; the steps.
CASES = [
    *((ZOOM, {"max_linesearch_steps": 20, "initial_guess_strategy": "one"}, problem, "lbfgs", 12) for problem in PROBLEMS),
    *((ZOOM, {"max_linesearch_steps": 15}, problem, front, 12) for problem in PROBLEMS for front in ("sgd", "adam")),
    (ZOOM, {"max_linesearch_steps": 15, "max_learning_rate": 0.1}, "rosenbrock", "lbfgs", 12),
    (ZOOM, {"max_linesearch_steps": 15, "max_learning_rate": 0.01}, "quadratic", "sgd", 6),
    (ZOOM, {"max_linesearch_steps": 15, "tol": 1e-2, "increase_factor": 3.0}, "logistic", "sgd", 12),
    (ZOOM, {"max_linesearch_steps": 15, "slope_rtol": 0.3, "curv_rtol": 0.4, "approx_dec_rtol": None}, "rosenbrock", "lbfgs", 12),
    (ZOOM, {"max_linesearch_steps": 30, "curv_rtol": 1e-3, "stepsize_precision": 1e-2}, "rosenbrock", "sgd", 8),
    (ZOOM, {"max_linesearch_steps": 4, "curv_rtol": 1e-6}, "rosenbrock", "sgd", 1),  # a step that increases the value,
    (ZOOM, {"max_linesearch_steps": 12, "curv_rtol": math.inf, "approx_dec_rtol": 1e-3}, "logistic", "adam", 8),
    (ZOOM, {"max_linesearch_steps": 6}, "quadratic", "uphill", 4),
    *(
        (BACKTRACKING, {"max_backtracking_steps": 15}, problem, front, 9)
        for problem in PROBLEMS
        for front in ("sgd", "adam", "lbfgs")
    ),
    (BACKTRACKING, {"max_backtracking_steps": 20, "slope_rtol": 0.4, "decrease_factor": 0.5}, "quadratic", "sgd", 12),
    (BACKTRACKING, {"max_backtracking_steps": 15, "increase_factor": math.inf, "max_learning_rate": 2.0}, "logistic", "sgd", 12),
    (BACKTRACKING, {"max_backtracking_steps": 15, "atol": 0.1, "rtol": 0.05, "store_grad": True}, "rosenbrock", "sgd", 12),
    (BACKTRACKING, {"max_backtracking_steps": 3, "increase_factor": 1.0}, "quadratic", "uphill", 4),
]


def like(ours, theirs):
    """The state of a search, or of L-BFGS, from Optax's, whose fields it has."""
    return type(ours)._make(
        (() if isinstance(x, tuple) and not x else like(x, y) if hasattr(x, "_fields") else from_jax(y))
        for x, y in zip(ours, theirs, strict=True)
    )


# Where an error in a step grows a thousandfold in the next one, each step is compared from where Optax is.
FROM_THEIRS = {
    "lbfgs": lambda state, theirs: ((like(state[0][0], theirs[0][0]), *state[0][1:]), like(state[1], theirs[1])),
    "sgd": lambda state, theirs: (state[0], like(state[1], theirs[1])),
}


def parts(state):
    grad = None if isinstance(state.grad, tuple) else state.grad
    return {"rate": state.learning_rate, "value": state.value, "grad": grad, "info": state.info._asdict()}


@pytest.mark.parametrize(("search", "options", "problem", "front", "steps"), CASES, ids=lambda x: str(x)[:60])
def test_trajectories_are_optaxs(search, options, problem, front, steps):
    fun, params = PROBLEMS[problem]
    made, theirs_made = FRONTS[front]
    ours = optfn.chain(made(), getattr(optfn, search)(**options))
    theirs = optax.chain(theirs_made(), getattr(optax, search)(**options))
    expected = to_jax(params)
    state, their_state = ours.init(params), theirs.init(expected)
    assert_close(parts(state[1]), from_jax(parts(their_state[1])), 0)
    value_fn, value_fn_in_jax = (lambda p: fun(torch, p)), (lambda p: fun(jnp, p))

    @jax.jit
    def their_step(p, state):
        value, grad = jax.value_and_grad(value_fn_in_jax)(p)
        updates, state = theirs.update(grad, state, p, value=value, grad=grad, value_fn=value_fn_in_jax)
        return updates, optax.apply_updates(p, updates), state

    for _ in range(steps):
        if front in FROM_THEIRS:
            params, state = from_jax(expected), FROM_THEIRS[front](state, their_state)
        value, grad = tree.value_and_grad(value_fn)(params)
        updates, state = ours.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
        params = optfn.apply_updates(params, updates)
        their_updates, expected, their_state = their_step(expected, their_state)
        assert int(state[1].info.num_linesearch_steps) == int(their_state[1].info.num_linesearch_steps)
        assert_close(updates, from_jax(their_updates), 1e-12)
        assert_close(params, from_jax(expected), 1e-12)
        assert_close(parts(state[1]), from_jax(parts(their_state[1])), 1e-12)


def test_optax_lbfgs_is_the_chain():
    """The recipe of docs/from-optax.md, with the gradient that the search has found."""
    ours = optfn.chain(optfn.scale_by_lbfgs(), optfn.scale(-1.0), optfn.scale_by_zoom_linesearch(20, initial_guess_strategy="one"))
    theirs = optax.lbfgs()
    fun, params = PROBLEMS["rosenbrock"]
    value_fn, in_jax = (lambda p: fun(torch, p)), (lambda p: fun(jnp, p))
    found, known = optfn.value_and_grad_from_state(value_fn), optax.value_and_grad_from_state(in_jax)
    expected, state = to_jax(params), ours.init(params)
    their_state = theirs.init(expected)

    @jax.jit
    def their_step(p, state):
        value, grad = known(p, state=state)
        updates, state = theirs.update(grad, state, p, value=value, grad=grad, value_fn=in_jax)
        return optax.apply_updates(p, updates), state

    for _ in range(45):
        params, state = from_jax(expected), (like(state[0], their_state[0]), (), like(state[2], their_state[2]))
        value, grad = found(params, state=state)
        updates, state = ours.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
        expected, their_state = their_step(expected, their_state)
        assert_close(optfn.apply_updates(params, updates), from_jax(expected), 1e-12)
        assert_close(parts(state[2]), from_jax(parts(their_state[2])), 1e-12)
    assert value < 1e-8


@pytest.mark.parametrize("name", [ZOOM, BACKTRACKING])
def test_arguments_and_defaults_are_optaxs(name):
    theirs, ours = ([(p.name, p.default) for p in inspect.signature(getattr(m, name)).parameters.values()] for m in (optax, optfn))
    assert ours == theirs
    kind = ZOOM.title().replace("_", "") if name == ZOOM else BACKTRACKING.title().replace("_", "")
    assert getattr(optfn, f"{kind}State")._fields == getattr(optax, f"{kind}State")._fields
    assert optfn.ZoomLinesearchInfo._fields == optax.ZoomLinesearchInfo._fields


SEARCHES = {
    ZOOM: optfn.scale_by_zoom_linesearch(6),
    BACKTRACKING: optfn.scale_by_backtracking_linesearch(6),
    "store_grad": optfn.scale_by_backtracking_linesearch(6, store_grad=True),
}


def one_step(tx, params, state):
    fun = lambda p: rosenbrock(torch, p)  # noqa: E731
    value, grad = tree.value_and_grad(fun)(params)
    updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=fun)
    return updates, state, optfn.apply_updates(params, updates)


STARTS = tensor([-1.2, 1.0, 0.5, -3.0, 1.1])


@pytest.mark.parametrize("name", SEARCHES)
def test_each_of_a_batch_has_its_own_search(name):
    tx = optfn.chain(optfn.scale_by_lbfgs(3), optfn.scale(-1.0), SEARCHES[name])
    batch = {"x": STARTS, "rest": {"y": STARTS.flip(0)}}
    state = torch.vmap(tx.init)(batch)
    singles = [tree.map(lambda x, i=i: x[i], batch) for i in range(len(STARTS))]
    alone = [(p, tx.init(p)) for p in singles]
    counts = set()
    for _ in range(3):
        _, state, batch = torch.vmap(lambda p, s: one_step(tx, p, s))(batch, state)
        alone = [(new, s) for p, s in alone for _, s, new in [one_step(tx, p, s)]]
        assert_close(batch, tree.map(lambda *x: torch.stack(x), *(p for p, _ in alone)), 1e-13)
        assert_close(state, tree.map(lambda *x: torch.stack(x), *(s for _, s in alone)), 1e-10)
        counts |= {*state[2].info.num_linesearch_steps.tolist()}
    assert len(counts) > 1


FEW_TRIALS = [
    optfn.scale_by_backtracking_linesearch(3),
    optfn.scale_by_backtracking_linesearch(3, store_grad=True),
    optfn.scale_by_zoom_linesearch(3),
]
"""A trial is as much of a graph again."""


@pytest.mark.parametrize("search", FEW_TRIALS, ids=["backtracking", "store_grad", "zoom"])
def test_a_step_compiles_to_one_graph(search):
    tx = optfn.chain(optfn.sgd(0.01), search)
    p = {"x": tensor(-1.2), "rest": {"y": tensor(1.0)}}
    state = tx.init(p)
    step = torch.compile(lambda p, s: one_step(tx, p, s), fullgraph=True, backend="eager")
    for _ in range(3):
        expected = one_step(tx, p, state)
        assert_close(step(p, state), expected, 1e-13)
        _, state, p = expected


@pytest.mark.parametrize("name", SEARCHES)
def test_the_step_size_is_a_constant_to_a_derivative(name):
    tx = SEARCHES[name]
    params = {"x": tensor(-1.2), "rest": {"y": tensor(1.0)}}
    fun = lambda p: rosenbrock(torch, p)  # noqa: E731
    value, grad = tree.value_and_grad(fun)(params)
    state = tx.init(params)

    def first(scale):
        updates = tree.map(lambda g: -scale * g, grad)
        new, after = tx.update(updates, state, params, value=value, grad=grad, value_fn=fun)
        return new["x"], after.learning_rate

    slope, rate = torch.func.grad(first, has_aux=True)(tensor(1e-3))
    assert_close(slope, -rate * grad["x"], 1e-13)


def test_arguments_of_the_function_are_found_by_name():
    def fun(params, x, *, y):
        return 0.5 * (x @ params - y) ** 2

    for tx in (optfn.scale_by_backtracking_linesearch(15), optfn.scale_by_zoom_linesearch(15)):
        solver, params = optfn.chain(optfn.sgd(1.0), tx), tensor([1.0, 2.0, 3.0])
        state, data = solver.init(params), {"x": tensor([3.0, 2.0, 1.0]), "y": tensor(0.0)}
        value, grad = tree.value_and_grad(functools.partial(fun, **data))(params)
        updates, _ = solver.update(grad, state, params, value=value, grad=grad, value_fn=fun, **data, other=1)
        assert fun(params + updates, **data) < value


def test_minimize_drives_them():
    """Its evaluations are used: one for each trial, and the first."""
    tx = optfn.chain(optfn.scale_by_lbfgs(), optfn.scale(-1.0), optfn.scale_by_zoom_linesearch(20, initial_guess_strategy="one"))
    result = optfn.minimize(lambda p: rosenbrock(torch, p), PROBLEMS["rosenbrock"][1], tx)
    assert result.reason in ("gradient", "change")
    assert_close(result.params["x"], tensor(1.0), 1e-7)
    assert result.evals < 2 * result.steps


def test_a_search_that_fails_begins_anew():
    """Optax's step size stays at 0 once it is 0: a search from 0 goes nowhere."""

    def fun(xp, p):
        return xp.log(p)

    params = tensor(1e-30)
    for ours, theirs in (
        (optfn.scale_by_backtracking_linesearch(2), optax.scale_by_backtracking_linesearch(2)),
        (optfn.scale_by_zoom_linesearch(2), optax.scale_by_zoom_linesearch(2)),
    ):
        value_fn, in_jax = (lambda p: fun(torch, p)), (lambda p: fun(jnp, p))
        state, their_state = ours.init(params), theirs.init(to_jax(params))
        for start, down, found, stuck in ((tensor(1.0), -100.0, 0.0, 0.0), (tensor(2.0), -0.5, None, 0.0)):
            value, grad = tree.value_and_grad(value_fn)(start)
            updates, state = ours.update(tensor(down), state, start, value=value, grad=grad, value_fn=value_fn)
            _, their_state = theirs.update(
                jnp.asarray(down), their_state, to_jax(start), value=to_jax(value), grad=to_jax(grad), value_fn=in_jax
            )
            assert float(their_state.learning_rate) == stuck
            assert float(updates) == 0 if found == 0 else float(updates) < 0
        assert math.isfinite(float(state.value))


def test_leaves_without_updates_stay():
    params = {"x": tensor(-1.2), "rest": {"y": tensor(1.0)}, "n": None}
    fun = lambda p: rosenbrock(torch, p)  # noqa: E731
    value, grad = tree.value_and_grad(fun)(params)
    for tx in SEARCHES.values():
        updates, state = tx.update(
            {"x": -0.001 * grad["x"], "rest": {"y": None}, "n": None}, tx.init(params), params, value=value, grad=grad, value_fn=fun
        )
        assert updates["rest"]["y"] is None
        assert updates["n"] is None
        new = optfn.apply_updates(params, updates)
        assert fun(new) < value
        assert_close(state.value, fun(new), 1e-15)


def test_complex_parameters_are_their_parts():
    z = torch.randn(3, dtype=torch.complex128, generator=torch.Generator().manual_seed(2))
    fun = lambda z: ((z - 1j).abs() ** 4).sum()  # noqa: E731
    real = lambda x: fun(torch.view_as_complex(x))  # noqa: E731
    for tx in SEARCHES.values():
        value, grad = tree.value_and_grad(fun)(z)
        u, state = tx.update(-grad, tx.init(z), z, value=value, grad=grad, value_fn=fun)
        x = torch.view_as_real(z)
        value, grad = tree.value_and_grad(real)(x)
        v, expected = tx.update(-grad, tx.init(x), x, value=value, grad=grad, value_fn=real)
        assert_close(torch.view_as_real(u), v, 1e-13)
        assert_close(state.info, expected.info, 1e-13)


def test_what_a_search_says(capsys):
    params = tensor(1.0)
    for tx in (optfn.scale_by_backtracking_linesearch(2, verbose=True), optfn.scale_by_zoom_linesearch(2, verbose=True)):
        for direction, said in ((-1.0, ""), (1.0, "no step met the conditions: value 1.0, slope 2.0")):
            tx.update(direction * params, tx.init(params), params, value=tensor(1.0), grad=2 * params, value_fn=lambda p: p**2)
            text = capsys.readouterr().out
            assert said in text
            assert bool(said) == bool(text)


def test_value_and_grad_from_state():
    params, calls = tensor([1.0, 2.0]), []

    def fun(p, scale=1.0):
        calls.append(p)
        return scale * (p**2).sum()

    value_and_grad = optfn.value_and_grad_from_state(fun)
    tx = optfn.chain(optfn.sgd(1.0), optfn.scale_by_backtracking_linesearch(15, store_grad=True))
    state = tx.init(params)
    value, grad = value_and_grad(params, state=state, scale=3.0)
    assert (float(value), grad.tolist()) == (15.0, [6.0, 12.0])
    assert len(calls) == 1
    value, grad = value_and_grad(params, state=state)
    updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=fun)
    before, params = len(calls), optfn.apply_updates(params, updates)
    value, grad = value_and_grad(params, state=state)
    assert len(calls) == before
    assert_close((value, grad), (fun(params), 2 * params), 1e-15)
    mapped = torch.vmap(lambda p, s: value_and_grad(p, state=s), in_dims=(0, None))(params[None], state)
    assert_close(mapped, (value[None], grad[None]), 1e-15)
    with pytest.raises(ValueError, match="keeps no gradient: make the line search with store_grad=True"):
        value_and_grad(params, state=optfn.scale_by_backtracking_linesearch(2).init(params))
    with pytest.raises(ValueError, match="nothing is called 'value'"):
        value_and_grad(params, state=optfn.adam().init(params))


def test_what_is_refused():
    p = tensor(1.0)
    for tx in SEARCHES.values():
        given = {"value": p, "grad": p, "value_fn": lambda p: p}
        for name in given:
            with pytest.raises(TypeError, match=rf"^scale_by_\w+_linesearch needs `{name}`"):
                tx.update(p, tx.init(p), p, **{k: x for k, x in given.items() if k != name})
        with pytest.raises(TypeError, match="needs the state that its own init makes"):
            tx.update(p, (), p, **given)
        with pytest.raises(ValueError, match="takes a value that is a 0-dim tensor, got shape"):
            tx.update(p, tx.init(p), p, **{**given, "value": torch.ones(2)})
    for make, message in (
        (lambda: optfn.scale_by_zoom_linesearch(0), "max_linesearch_steps must be an int >= 1, got 0"),
        (lambda: optfn.scale_by_zoom_linesearch(5, initial_guess_strategy="two"), "initial_guess_strategy must be 'one' or 'keep'"),
        (lambda: optfn.scale_by_zoom_linesearch(5, increase_factor=1.0), "increase_factor must be > 1"),
        (lambda: optfn.scale_by_backtracking_linesearch(-1), "max_backtracking_steps must be an int >= 0, got -1"),
        (lambda: optfn.scale_by_backtracking_linesearch(5, decrease_factor=1.0), "decrease_factor must be > 0 and < 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_nothing_is_recorded_and_nothing_changed():
    params = {"x": tensor(-1.2).requires_grad_(), "rest": {"y": tensor(1.0)}}
    before = tree.map(lambda x: x.detach().clone(), params)
    for tx in SEARCHES.values():
        _, state, _ = one_step(optfn.chain(optfn.sgd(0.01), tx), params, optfn.chain(optfn.sgd(0.01), tx).init(params))
        assert not any(x.requires_grad for x in tree.leaves(state))
        assert_close(params, before, 0)
    assert np.all([x._version == 0 for x in tree.leaves(before)])
