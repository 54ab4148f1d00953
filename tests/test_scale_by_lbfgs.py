"""L-BFGS directions in Optax's form against Optax, and against the dense BFGS formula."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from optax_oracle import assert_close, from_jax, run, some_grads, some_params, to_jax

import optfn
from optfn import tree

SHAPES = {"outer": {"w": (3, 2), "b": (2,)}, "s": (), "t": (2, 2, 2)}
GENERATOR = torch.Generator().manual_seed(0)
DATA = torch.randn(20, 17, dtype=torch.float64, generator=GENERATOR)


def nested(flat):
    return {"outer": {"w": flat["w"], "b": flat["b"]}, "s": flat["s"], "t": flat["t"]}


FLAT = {"w": (3, 2), "b": (2,), "s": (), "t": (2, 2, 2)}
PARAMS = nested(some_params(shapes=FLAT))


def logistic(xp, leaves):
    """A strictly convex function of 17 numbers: logistic regression, with a decay."""
    w = xp.concatenate([xp.reshape(x, (-1,)) for x in leaves])
    data = DATA if xp is torch else DATA.numpy()
    margin = data @ w
    return xp.mean(xp.log1p(xp.exp(-margin))) + 0.05 * (w * w).sum()


def value(params):
    return logistic(torch, tree.leaves(params))


def value_in_jax(params):
    return logistic(jnp, jax.tree.leaves(params))


def follow(ours, theirs, steps=25):
    """Each on its own trajectory."""
    found, expected = PARAMS, to_jax(PARAMS)
    state, their_state = ours.init(found), theirs.init(expected)
    update, gradient = jax.jit(theirs.update), jax.jit(jax.grad(value_in_jax))
    for _ in range(steps):
        updates, state = ours.update(torch.func.grad(value)(found), state, found)
        their_updates, their_state = update(gradient(expected), their_state, expected)
        assert_close(updates, from_jax(their_updates), 1e-12)
        found, expected = optfn.apply_updates(found, updates), optax.apply_updates(expected, their_updates)
        assert_close(found, from_jax(expected), 1e-12)
    return state, their_state


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("memory_size", [1, 3, 10])
def test_trajectories_are_optaxs(memory_size, scaled):
    rate = 0.3
    ours = optfn.chain(optfn.scale_by_lbfgs(memory_size, scaled), optfn.scale(-rate))
    theirs = optax.chain(optax.scale_by_lbfgs(memory_size, scaled), optax.scale(-rate))
    (state, _), (their_state, _) = follow(ours, theirs)
    assert state._fields == their_state._fields
    assert state.count == 25
    for name in ("params", "updates", "diff_params_memory", "diff_updates_memory"):
        assert_close(getattr(state, name), from_jax(getattr(their_state, name)), 1e-12)
    weights = from_jax(their_state.weights_memory)
    assert_close(state.weights_memory / weights, torch.ones(memory_size), 1e-6)  # of pairs that are differences of 1e-9 and less


def test_gradients_from_elsewhere():
    """Of any sign of the curvature, and of one step that is 0: each update from the state and the parameters of Optax."""
    theirs, ours = optax.scale_by_lbfgs(4), optfn.scale_by_lbfgs(4)
    params, update = to_jax(PARAMS), jax.jit(theirs.update)
    state, kept = theirs.init(params), ours.init(PARAMS)
    for g in map(nested, some_grads(25, shapes=FLAT)):
        found, kept = ours.update(g, kept, from_jax(params))
        expected, state = update(to_jax(g), state, params)
        assert_close(found, from_jax(expected), 1e-12)
        params = jax.tree.map(lambda p, u: p - 0.01 * u, params, to_jax(g))


def test_arguments_and_defaults_are_optaxs():
    theirs, ours = (
        [(p.name, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (optax.scale_by_lbfgs, optfn.scale_by_lbfgs)
    )
    assert ours == theirs


def test_the_direction_is_that_of_the_dense_formula():
    """BFGS as equation 6.17 of Nocedal and Wright has it, which the recursion multiplies with no matrix."""
    hessian = torch.diag(torch.tensor([1.0, 3.0, 10.0, 30.0], dtype=torch.float64))
    tx, p = optfn.scale_by_lbfgs(memory_size=3), torch.ones(4, dtype=torch.float64)
    state, pairs = tx.init(p), []
    for k in range(6):
        g = hessian @ p
        u, state = tx.update(g, state, p)
        inverse = torch.eye(4, dtype=torch.float64) * (
            1 / g.norm().clamp_min(1) if k == 0 else pairs[-1][0] @ pairs[-1][1] / (pairs[-1][1] @ pairs[-1][1])
        )
        for s, y in pairs[-3:]:
            v = torch.eye(4, dtype=torch.float64) - torch.outer(y, s) / (y @ s)
            inverse = v.T @ inverse @ v + torch.outer(s, s) / (y @ s)
        assert_close(u, inverse @ g, 1e-12)
        new = p - 0.5 * u
        pairs.append((new - p, hessian @ new - g))
        p = new


def test_a_leaf_without_an_update_did_not_move():
    """It counts as zeros, keeps its part of the state, and the others go on."""
    tx = optfn.scale_by_lbfgs(3)
    params = {"a": torch.tensor([1.0, -2.0], dtype=torch.float64), "b": torch.tensor([3.0], dtype=torch.float64)}
    state = tx.init(params)
    for k in range(5):
        g = tree.map(lambda p: 2 * p, params)
        g = g | {"b": None} if k == 2 else g
        updates, new = tx.update(g, state, params)
        if k == 2:
            assert updates["b"] is None
            assert_close((new.params["b"], new.updates["b"]), (state.params["b"], state.updates["b"]), 0)
            assert new.diff_params_memory["b"][1] == new.diff_updates_memory["b"][1] == 0
        params, state = optfn.apply_updates(params, tree.map(lambda u: -0.5 * u, updates)), new
    idle = tx.update({"a": None, "b": None}, state, params)
    assert idle[0] == {"a": None, "b": None}
    assert idle[1] is state


def test_complex_leaves_are_their_parts():
    z = torch.randn(3, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    tx = optfn.chain(optfn.scale_by_lbfgs(2), optfn.scale(-0.5))
    parts = torch.view_as_real(z)
    state, real_state = tx.init(z), tx.init(parts)
    for _ in range(6):
        (u, state), (v, real_state) = tx.update(scale * z, state, z), tx.update(scale[:, None] * parts, real_state, parts)
        assert_close(u, torch.view_as_complex(v), 1e-13)
        z, parts = z + u, parts + v


def test_half_precision_is_computed_in_float32():
    tx = optfn.scale_by_lbfgs(3)
    for p in ({"w": torch.tensor([1.0, -2.0], dtype=torch.bfloat16)},):
        state, wide = tx.init(p), tx.init(tree.cast(p, torch.float32))
        assert state.weights_memory.dtype == torch.float32
        for _ in range(4):
            g = tree.map(lambda x: 2 * x, p)
            (u, state), (v, wide) = (
                tx.update(g, state, p),
                tx.update(tree.cast(g, torch.float32), wide, tree.cast(p, torch.float32)),
            )
            assert u["w"].dtype == torch.bfloat16
            assert_close(u, v, 2**-8)
            p = tree.map(lambda p, u: p - 0.5 * u, p, u)


def test_what_is_refused():
    p = {"w": torch.ones(2), "i": None}
    tx = optfn.scale_by_lbfgs()
    with pytest.raises(ValueError, match=r"^memory_size must be >= 1, got 0$"):
        optfn.scale_by_lbfgs(0)
    with pytest.raises(TypeError, match=r"^scale_by_lbfgs: 'w' must be a dense floating-point"):
        tx.init({"w": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(TypeError, match=r"^scale_by_lbfgs needs `params`"):
        tx.update(p, tx.init(p))
    with pytest.raises(TypeError, match=r"^scale_by_lbfgs needs the state that its own init makes"):
        tx.update(p, (), p)
    with pytest.raises(ValueError, match=r"^scale_by_lbfgs: 'w' must have an update like its parameter"):
        tx.update({"w": torch.ones(3), "i": None}, tx.init(p), p)
    with pytest.raises(ValueError, match=r"^scale_by_lbfgs: 'w' has shape \(1,\), and had another"):
        tx.update({"w": torch.ones(1), "i": None}, tx.init(p), {"w": torch.ones(1), "i": None})
    with pytest.raises(ValueError, match=r"^scale_by_lbfgs: 'i' has shape \(1,\), and had another"):
        tx.update(*(({"w": torch.ones(2), "i": torch.ones(1)}, tx.init(p))), {"w": torch.ones(2), "i": torch.ones(1)})
    with pytest.raises(ValueError, match=r"^scale_by_lbfgs: the leaves must be on one device"):
        tx.init({"w": torch.ones(1), "m": torch.ones(1, device="meta")})


def test_nothing_is_changed_and_nothing_shared():
    tx, (params, grads) = optfn.scale_by_lbfgs(2), (PARAMS, nested(some_grads(1, shapes=FLAT)[0]))
    _, state = tx.update(grads, tx.init(params), params)
    memory = {x.untyped_storage().data_ptr() for x in tree.leaves(state)}
    assert not memory & {x.untyped_storage().data_ptr() for x in tree.leaves((params, grads))}
    assert np.isfinite(float(run(tx, params, [grads])[0][0]["updates"]["s"]))
