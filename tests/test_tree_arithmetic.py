"""Arithmetic on trees against optax.tree, on random nested trees, real and complex."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from optax_oracle import assert_close, counted, from_jax, to_jax

import optfn
from optfn import tree


class Pair(NamedTuple):
    first: Any
    second: Any


SHAPES = {"s": (), "rest": [(3,), Pair((2, 3), {"b": (2, 1, 2), "a": (1,)})]}


def some_tree(seed, dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)

    def made(shape):
        if isinstance(shape, dict):
            return {name: made(part) for name, part in shape.items()}
        if isinstance(shape, list | Pair):
            parts = [made(part) for part in shape]
            return Pair(*parts) if isinstance(shape, Pair) else parts
        return torch.randn(shape, dtype=dtype, generator=generator)

    return made(shapes)


X, Y, Z = (some_tree(seed) for seed in range(3))
C, D = (some_tree(seed, torch.complex128) for seed in range(2))
SQUARES = tree.map(torch.square, Y)
JAX_KEY = jax.random.PRNGKey(3)


def with_none(of):
    """The same tree beside a leaf that is not there."""
    return {"tree": of, "none": None}


# Name: function, trees, other arguments, and by what name Optax has these, if by another.
CASES = {
    "add": (lambda of, x, y: of.add(x, y), X, Y),
    "add: complex": (lambda of, x, y: of.add(x, y), C, D),
    "add: three": (lambda of, x, y, z: of.add(x, y, z), X, Y, Z),
    "sub": (lambda of, x, y: of.sub(x, y), X, Y),
    "mul": (lambda of, x, y: of.mul(x, y), C, D),
    "div": (lambda of, x, y: of.div(x, y), X, Y),
    "div: complex": (lambda of, x, y: of.div(x, y), C, D),
    "scale": (lambda of, x: of.scale(0.3, x), X),
    "scale: complex": (lambda of, x: of.scale(0.3 - 2j, x), C),
    "scale: complex, of real": (lambda of, x: of.scale(0.3 - 2j, x), X),
    "add_scale": (lambda of, x, y: of.add_scale(x, 0.3, y), X, Y),
    "add_scale: complex": (lambda of, x, y: of.add_scale(x, 0.3, y), C, D),
    "vdot": (lambda of, x, y: of.vdot(x, y), X, Y),
    "vdot: complex": (lambda of, x, y: of.vdot(x, y), C, D),
    "vdot: complex, real": (lambda of, x, y: of.vdot(x, y), C, Y),
    "sum": (lambda of, x: of.sum(x), X),
    "sum: complex": (lambda of, x: of.sum(x), C),
    "max": (lambda of, x: of.max(x), X),
    "min": (lambda of, x: of.min(x), X),
    **{
        f"norm: {order}, {squared}, {x is C}": (lambda of, x, order=order, squared=squared: of.norm(x, order, squared), x)
        for order in (None, 1, 2, float("inf"), "inf", "infinity")
        for squared in (False, True)
        for x in (X, C)
    },
    "clip": (lambda of, x: of.clip(x, -0.3, 0.7), X),
    "clip: below": (lambda of, x: of.clip(x, min_value=-0.3), X),
    "clip: above": (lambda of, x: of.clip(x, max_value=0.3), X),
    "clip: not": (lambda of, x: of.clip(x), X),
    "conj": (lambda of, x: of.conj(x), C),
    "conj: real": (lambda of, x: of.conj(x), X),
    "real": (lambda of, x: of.real(x), C),
    "real: real": (lambda of, x: of.real(x), X),
    "where": (lambda of, x, y: of.where(True, x, y), X, Y),
    "where: not": (lambda of, x, y: of.where(False, x, y), C, D),
    "zeros_like": (lambda of, x: of.zeros_like(x), C),
    "ones_like": (lambda of, x: of.ones_like(x), X),
    "full_like": (lambda of, x: of.full_like(x, 0.3), C),
    "batch_shape": (lambda of, x: of.batch_shape(x, (4, 2)), X),
    "batch_shape: none": (lambda of, x: of.batch_shape(x), X),
    "update_moment": (lambda of, x, y: of.update_moment(x, y, 0.9, 1), X, Y),
    "update_moment: second": (lambda of, x, y: of.update_moment(x, y, 0.9, 2), X, Y),
    "update_moment: third": (lambda of, x, y: of.update_moment(x, y, 0.9, 3), X, Y),
    "update_moment: complex": (lambda of, x, y: of.update_moment(x, y, 0.9, 2), C, D),
    "per_elem_norm": (lambda of, x, y: of.update_moment_per_elem_norm(x, y, 0.9, 3), X, Y),
    "per_elem_norm: complex": (lambda of, x, y: of.update_moment_per_elem_norm(x, y, 0.9, 2), C, SQUARES),
    "per_elem_norm: complex, odd": (lambda of, x, y: of.update_moment_per_elem_norm(x, y, 0.9, 3), C, SQUARES),
    "infinity_moment": (lambda of, x, y: of.update_infinity_moment(x, y, 0.9, 0.1), X, Y),
    "infinity_moment: complex": (lambda of, x, y: of.update_infinity_moment(x, y, 0.9, 0.1), C, SQUARES),
}


def real_sum(x):
    return tree.sum(tree.map(lambda leaf: (torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf).sum(), x))


def of_jax_sum(x):
    return sum(jnp.sum(leaf.real) + jnp.sum(leaf.imag) for leaf in jax.tree.leaves(x))


@functools.cache
def by_optax():
    """What Optax gives in every case, and the gradient of its sum with respect to the first tree: one program for all."""
    trees = {name: to_jax(tuple(trees)) for name, (_, *trees) in CASES.items()}

    def value(name, given):
        return jax.tree.map(jnp.asarray, CASES[name][0](optax.tree, *given))

    def gradient(name, given):
        first, *rest = given
        return jax.grad(lambda x: of_jax_sum(CASES[name][0](optax.tree, x, *rest)))(first)

    both = jax.jit(lambda trees: {name: (value(name, given), gradient(name, given)) for name, given in trees.items()})
    return from_jax(both(trees))


@pytest.mark.parametrize("name", CASES)
def test_is_optax(name):
    f, *trees = CASES[name]
    expected, gradient = by_optax()[name]
    found = f(tree, *trees)
    assert_close(found, expected, 1e-14)
    assert {x.dtype for x in tree.leaves(found)} == {x.dtype for x in tree.leaves(expected)}
    assert tree.flatten(found)[1] == tree.flatten(expected)[1]
    # None is passed over, and stays None.
    beside = f(tree, *map(with_none, trees))
    assert_close(beside, with_none(expected) if tree.flatten(found)[1].num_leaves > 1 else expected, 1e-14)
    # Batched.
    stacked = tree.map(lambda x: torch.stack([x, 2 * x]), tuple(trees))
    twice = [found, f(tree, *tree.scale(2, tuple(trees)))]
    assert_close(torch.vmap(functools.partial(f, tree))(*stacked), tree.map(lambda x, y: torch.stack([x, y]), *twice), 1e-14)
    # Differentiated; jax's gradient of a function of a complex variable is the conjugate of torch's.
    if "like" not in name:
        along = torch.func.grad(lambda first: real_sum(f(tree, first, *trees[1:])))
        assert_close(along(trees[0]), tree.conj(gradient), 1e-12)
        assert all(x.isfinite().all() for x in tree.leaves(along(tree.zeros_like(trees[0]))))


def test_all_is_one_graph():
    first = {name.split(":")[0]: name for name in reversed(CASES)}.values()  # of each function
    given = {name: tuple(CASES[name][1:]) for name in first}

    def every(given):
        return {name: CASES[name][0](tree, *trees) for name, trees in given.items()}

    compiled, graphs = counted(every)
    assert_close(compiled(given), every(given), 1e-14)
    assert len(graphs) == 1


def test_decay_and_scalars_may_be_tensors():
    decay = torch.tensor(0.9)  # in float32, as it comes; nothing is to be lost that it has
    assert_close(tree.update_moment(X, Y, decay, 2), tree.update_moment(X, Y, decay.item(), 2), 1e-15)
    assert_close(tree.update_infinity_moment(X, Y, decay, 0.1), tree.update_infinity_moment(X, Y, decay.item(), 0.1), 1e-15)
    assert_close(tree.bias_correction(X, decay, torch.tensor(3)), tree.bias_correction(X, decay.item(), 3), 1e-12)
    single, wide = tree.cast(X, torch.float32), torch.tensor(0.3, dtype=torch.float64)
    for found in (
        tree.scale(wide, single),
        tree.add_scale(single, wide, single),
        tree.clip(single, wide, 1.0),
        tree.full_like(single, wide),
        tree.update_moment(single, single, wide, 2),
        tree.update_infinity_moment(single, single, wide, wide),
        tree.bias_correction(single, wide, 3),
    ):
        assert {x.dtype for x in tree.leaves(found)} == {torch.float32}
    for f in (lambda h: tree.scale(h, X), lambda h: tree.add_scale(X, h, Y), lambda h: tree.update_moment(X, Y, h, 2)):
        torch.testing.assert_close(
            torch.vmap(lambda h, f=f: tree.sum(f(h)))(torch.stack([wide, 2 * wide])),
            torch.stack([tree.sum(f(0.3)), tree.sum(f(0.6))]),
            rtol=1e-12,
            atol=1e-12,
        )
        assert torch.autograd.gradcheck(lambda h, f=f: tree.sum(f(h)), wide.clone().requires_grad_())


@pytest.mark.parametrize("count", [1, 7, 10_000])
def test_bias_correction_is_optax(count):
    expected = from_jax(optax.tree.bias_correction(to_jax(X), jnp.float64(0.999), jnp.int64(count)))
    assert_close(tree.bias_correction(X, 0.999, count), expected, 1e-12)
    assert_close(tree.bias_correction(X, 0.999, torch.tensor(count)), expected, 1e-12)


def test_bias_correction_keeps_its_digits_in_float32():
    """Where Optax's, of a float32 decay, has four."""
    one = {"w": torch.tensor([1.0])}
    assert_close(tree.bias_correction(one, 0.999, 1), {"w": torch.tensor([1000.0], dtype=torch.float64)}, 1e-7)
    theirs = optax.tree.bias_correction({"w": jnp.ones(1, jnp.float32)}, jnp.float32(0.999), jnp.int32(1))["w"]
    assert abs(theirs[0] - 1000) > 1e-2


def test_a_moment_stays_where_there_is_no_update():
    """Where Optax makes it None, so that the next update fails."""
    updates, moments = {"a": torch.ones(1), "b": None}, {"a": torch.zeros(1), "b": torch.tensor([3.0])}
    for found in (
        tree.update_moment(updates, moments, 0.5, 1),
        tree.update_moment_per_elem_norm(updates, moments, 0.5, 2),
        tree.update_infinity_moment(updates, moments, 0.5, 0.0),
    ):
        assert found["b"] is moments["b"]
        assert found["a"].any()
    assert optax.tree.update_moment({"b": None}, {"b": jnp.ones(1)}, 0.5, 1)["b"] is None


def test_the_wider_dtype():
    half, single, double = ({"w": torch.full((4000,), 0.1, dtype=d)} for d in (torch.bfloat16, torch.float32, torch.float64))
    assert tree.vdot(single, double).dtype == torch.float64
    assert tree.vdot(half, half).dtype == tree.sum(half).dtype == tree.norm(half, 1).dtype == torch.float32
    exact = half["w"].double()
    assert_close(tree.vdot(half, half), exact.square().sum(), 1e-6)
    assert_close(tree.norm(half, squared=True), exact.square().sum(), 1e-6)
    assert tree.max(half).dtype == torch.bfloat16
    assert tree.max({**half, "v": torch.ones(1)}).dtype == torch.float32
    assert tree.sum({"i": torch.tensor([1, 2])}).dtype == torch.int64
    assert tree.sum({"b": torch.tensor([True, True])}).item() == 2
    assert tree.update_moment(half, single, 0.9, 2)["w"].dtype == torch.float32
    assert tree.update_moment(single, double, 0.9, 2)["w"].dtype == torch.float64
    # One rounding, at the end.
    expected = 0.9 * half["w"].double() + 0.1 * half["w"].double().square()
    assert torch.equal(tree.update_moment(half, half, 0.9, 2)["w"], expected.to(torch.bfloat16))


def test_nothing():
    for empty in ({}, {"a": None}, {"a": torch.ones(0, 3)}):
        assert tree.sum(empty) == tree.vdot(empty, empty) == tree.norm(empty) == tree.norm(empty, 1, True) == tree.size(empty) == 0
        assert tree.max(empty) == -float("inf")
        assert tree.min(empty) == float("inf")
        assert tree.allclose(empty, empty)
    assert tree.dtype({}) == tree.dtype({"a": None}) == torch.float32
    assert tree.max({"a": torch.ones(0, 3), "b": torch.tensor(-2.0)}) == -2
    assert_close(tree.random_like(optfn.random.key(0), {"a": None}), {"a": None}, 0)


def test_size():
    assert tree.size(with_none(X)) == optax.tree.size(to_jax(X)) == 15


def test_none_in_one_of_the_trees():
    x, y = {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1), "b": None}
    for f in (tree.add, tree.sub, tree.mul, tree.div, functools.partial(tree.where, True), lambda x, y: tree.add_scale(x, 2.0, y)):
        assert f(x, y)["b"] is None
        assert f(y, x)["b"] is None
        assert f(x, y)["a"] is not None
    assert tree.add(x, x, y)["b"] is None
    assert tree.vdot(x, y) == 1
    assert tree.cast_like(x, y)["b"] is x["b"]


@pytest.mark.parametrize("difference", [0.0, 1e-9, 1e-6, 1e-4, 1.0])
@pytest.mark.parametrize("tolerance", [{}, {"rtol": 1e-3}, {"rtol": 0.0, "atol": 1e-3}])
def test_allclose_is_optax(difference, tolerance):
    y = tree.map(lambda x: x.clone(), X)
    y["rest"][0][1] += difference
    expected = bool(optax.tree.allclose(to_jax(X), to_jax(y), **tolerance))
    assert bool(tree.allclose(X, y, **tolerance)) == expected
    assert bool(tree.allclose(with_none(X), with_none(y), **tolerance)) == expected


def test_allclose():
    nan, inf = ({"w": torch.tensor([value])} for value in (float("nan"), float("inf")))
    assert tree.allclose(inf, inf)
    assert not tree.allclose(inf, tree.scale(-1, inf))
    assert not tree.allclose({"w": torch.ones(1)}, inf)
    assert not tree.allclose(nan, nan)
    assert tree.allclose(nan, nan, equal_nan=True)
    assert tree.allclose({"w": torch.ones(1)}, {"w": torch.ones(1, dtype=torch.float64)})
    assert not tree.allclose({"w": torch.ones(1), "b": None}, {"w": torch.ones(1), "b": torch.ones(1)})
    assert torch.vmap(lambda x: tree.allclose({"w": x}, {"w": torch.ones(())}))(torch.tensor([1.0, 2.0])).tolist() == [True, False]


def test_dtypes_of_made_trees():
    for name, f in {
        "zeros_like": tree.zeros_like,
        "ones_like": tree.ones_like,
        "full_like": lambda x, d: tree.full_like(x, 3, d),
    }.items():
        found = f(X, torch.bfloat16)
        assert {x.dtype for x in tree.leaves(found)} == {torch.bfloat16}, name
    mixed = tree.cast_like(X, some_tree(4, torch.float32))
    assert {x.dtype for x in tree.leaves(mixed)} == {torch.float32}


KINDS = {
    "one": [torch.float32],
    "same": [torch.float64, torch.float64],
    "two": [torch.float16, torch.float32],
    "three": [torch.bfloat16, torch.float64, torch.float32],
    "unlike": [torch.float16, torch.bfloat16],
    "integers": [torch.int32, torch.int8],
}


@pytest.mark.parametrize("handler", [None, "promote", "highest", "lowest"])
@pytest.mark.parametrize("kinds", KINDS)
def test_dtype_is_optax(kinds, handler):
    of = [torch.ones(2, dtype=kind) for kind in KINDS[kinds]]
    theirs = [jnp.ones(2, str(kind).split(".")[1]) for kind in KINDS[kinds]]
    try:
        expected = str(np.dtype(optax.tree.dtype(theirs, handler)))
    except ValueError:
        with pytest.raises(ValueError, match=r"the tree does not have (one|a highest|a lowest) dtype: torch.* at '0', .* at '1'"):
            tree.dtype(of, handler)
    else:
        assert str(tree.dtype([*of, None], handler)) == f"torch.{expected}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_random_like_is_optax(dtype):
    target, key = some_tree(5, dtype), optfn.random.key(3)
    expected = from_jax(optax.tree.random_like(JAX_KEY, jax.tree.map(jnp.asarray, tree.map(lambda x: x.numpy(), target))))
    assert_close(tree.random_like(key, with_none(target))["tree"], expected, 1e-6 if dtype == torch.float32 else 1e-14)
    found = tree.random_like(key, target, optfn.random.uniform, torch.float64)
    expected = from_jax(optax.tree.random_like(JAX_KEY, to_jax(target), jax.random.uniform, jnp.float64))
    assert_close(found, expected, 0)
    keys = from_jax(optax.tree.split_key_like(JAX_KEY, to_jax(target)))
    assert_close(tree.split_key_like(key, target), tree.map(lambda x: x.to(torch.int64), keys), 0)


def test_get_all_with_path_is_optax():
    ours = optfn.named_chain(("first", optfn.scale_by_adam()), ("second", optfn.scale_by_rms(centered=True)))
    theirs = optax.named_chain(("first", optax.scale_by_adam()), ("second", optax.scale_by_stddev()))
    state, expected = ours.init(X), theirs.init(to_jax(X))
    found = tree.get_all_with_path(state, "nu")
    assert [path for path, _ in found] == ["first.slots.nu", "second.slots.nu"]
    assert len(optax.tree.get_all_with_path(expected, "nu")) == 2
    assert found[0][1] is state["first"].slots.nu
    only = tree.get_all_with_path(state, "nu", lambda path, part: path.startswith("second") and "s" in part)
    assert [path for path, _ in only] == ["second.slots.nu"]
    assert tree.get_all_with_path(state, "nothing") == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tree.add({"a": torch.ones(1)}, {"b": torch.ones(1)}),
            "tree 2 must have the structure of tree 1: 'a' is only in tree 1",
        ),
        (lambda: tree.vdot({"a": torch.ones(2)}, {"a": torch.ones(1)}), r"vdot: 'a' must have one shape in both trees, got \(2,\)"),
        (lambda: tree.norm(X, 3), "ord must be None, 1, 2 or inf, got 3"),
        (lambda: tree.dtype(X, "widest"), "mixed_dtype_handler must be None, 'promote', 'highest' or 'lowest', got 'widest'"),
        (lambda: tree.allclose({"a": torch.ones(1)}, []), "b must have the structure of a: 'a' is only in a"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_name_of_optax_is_here():
    missing = {name for name in dir(optax.tree) if not name.startswith("_")} - {*tree.__all__}
    assert missing == {"unwrap_random_key_data"}  # keys are plain tensors
