"""Blocks, wrappers and aliases that torch.optim has none of, each against Optax in float64."""

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from optax_oracle import TOLERANCE, assert_close, exact, from_jax, run, run_optax, some_grads, some_params, to_jax

import optfn

STEPS = 25
SHAPES = {"w": (3, 4), "b": (4,), "c": (2, 3, 2), "s": ()}
NAN, INF = float("nan"), float("inf")


def nested(x):
    return {"layers": [{"w": x["w"], "b": x["b"]}, (x["c"],)], "s": x["s"]}


def params_of(dtype=torch.float64):
    return nested(some_params(dtype, SHAPES))


def grads_of(dtype=torch.float64, steps=STEPS):
    return [nested(g) for g in some_grads(steps, dtype, SHAPES)]


def compared(ours, theirs, params, grads, tolerance=1e-12):
    """Whole trajectories; the largest difference relative to 1 + abs."""
    expected, _ = run_optax(theirs, params, grads)
    steps, state = run(ours, params, grads)
    assert_close(steps, expected, tolerance)
    return state


MASK = nested({"w": True, "b": False, "c": True, "s": False})

# Name: ours, Optax's.
BLOCKS = {
    "centralize": (optfn.centralize(), optax.centralize()),
    "keep_params_nonnegative": (
        optfn.chain(optfn.scale(-3.0), optfn.keep_params_nonnegative()),
        optax.chain(optax.scale(-3.0), optax.keep_params_nonnegative()),
    ),
    "zero_nans": (optfn.zero_nans(), optax.zero_nans()),
    "set_to_zero": (optfn.set_to_zero(), optax.set_to_zero()),
    "scale_by_param_block_norm": (
        optfn.chain(optfn.scale_by_param_block_norm(), optfn.scale(-0.1)),
        optax.chain(optax.scale_by_param_block_norm(), optax.scale(-0.1)),
    ),
    "scale_by_param_block_norm: min_scale": (
        optfn.chain(optfn.scale_by_param_block_norm(2.0), optfn.scale(-0.1)),
        optax.chain(optax.scale_by_param_block_norm(2.0), optax.scale(-0.1)),
    ),
    "ema": (optfn.ema(0.9), optax.ema(0.9)),
    "ema: not debiased": (optfn.ema(0.7, debias=False), optax.ema(0.7, debias=False)),
    "ema: of the last alone": (optfn.ema(0.0), optax.ema(0.0)),
    "apply_every": (optfn.apply_every(), optax.apply_every()),
    "apply_every: 4": (
        optfn.chain(optfn.scale_by_adam(), optfn.scale(-0.1), optfn.apply_every(4)),
        optax.chain(optax.scale_by_adam(), optax.scale(-0.1), optax.apply_every(4)),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_that_of_optax(name):
    ours, theirs = BLOCKS[name]
    expected, _ = run_optax(theirs, params_of(), grads_of())
    for dtype, tolerance in TOLERANCE.items():
        steps, _ = run(ours, params_of(dtype), grads_of(dtype))
        assert {u.dtype for u in optfn.tree.leaves(steps)} == {dtype}
        assert_close(steps, expected, tolerance)


def test_ema_in_an_accumulator_of_its_own_dtype():
    state = compared(
        optfn.ema(0.9, accumulator_dtype=torch.float32),
        optax.ema(0.9, accumulator_dtype=jnp.float32),
        params_of(),
        grads_of(),
        1e-6,
    )
    assert {x.dtype for x in optfn.tree.leaves(optfn.tree.get(state, "ema"))} == {torch.float32}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_zero_nans_finds_what_optax_finds(value):
    g = nested({**some_grads(1, shapes=SHAPES)[0], "b": torch.tensor([1.0, value, 0.0, value]).double()})
    ours, theirs = optfn.zero_nans(), optax.zero_nans()
    updates, state = ours.update(g, ours.init(g))
    expected, found = theirs.update(to_jax(g), theirs.init(to_jax(g)))
    assert_close(updates, from_jax(expected), 0)
    assert_close(optfn.tree.get(state, "found_nan"), from_jax(found.found_nan), 0)
    _, state = ours.update({**g, "layers": [{"w": g["s"].expand(3, 4), "b": None}, g["layers"][1]]}, state)
    assert optfn.tree.get(state, "found_nan")["layers"][0]["b"].item() == (value != value)  # it sat the step out


def test_parameters_stay_nonnegative_in_every_dtype():
    tx = optfn.chain(optfn.sgd(0.3), optfn.keep_params_nonnegative())
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        params = optfn.tree.map(torch.abs, params_of(dtype))
        for step in run(tx, params, [optfn.tree.map(lambda g: 1e3 * g, g) for g in grads_of(dtype)])[0]:
            assert all((p >= 0).all() for p in optfn.tree.leaves(step["params"]))


def test_apply_every_keeps_what_a_leaf_that_sits_out_has_gathered():
    tx, one = optfn.apply_every(2), torch.ones(1)
    state = tx.init({"a": one, "b": one})
    seen = []
    for a, b in ((1.0, 10.0), (2.0, None), (3.0, None), (4.0, 20.0)):
        g = {"a": a * one, "b": None if b is None else b * one}
        updates, state = tx.update(g, state)
        seen.append([None if u is None else u.item() for u in updates.values()])
    assert seen == [[0, 0], [3, None], [0, None], [7, 30]]


# adaptive_grad_clip


def output_last(x):
    """From torch's layout to that of Optax's layers: convolutions are (height, width, in, out)."""
    return optfn.tree.map(lambda w: w.movedim((0, 1), (-1, -2)) if w.ndim > 1 else w, x)


@pytest.mark.parametrize(("clipping", "eps"), [(0.1, 1e-3), (1.0, 1e-3), (0.05, 3.0)])
def test_adaptive_grad_clip_is_that_of_optax_on_weights_of_its_layout(clipping, eps):
    shapes = {
        "linear": (3, 4),
        "conv": (2, 3, 2, 2),
        "conv3d": (2, 3, 1, 2, 2),
        "b": (4,),
        "s": (),
        "row": (1, 4),
        "column": (4, 1),
    }
    params, grads = some_params(shapes=shapes), some_grads(STEPS, shapes=shapes)
    expected, _ = run_optax(optax.adaptive_grad_clip(clipping, eps), output_last(params), [output_last(g) for g in grads])
    steps, _ = run(optfn.adaptive_grad_clip(clipping, eps), params, grads)
    assert_close([output_last(step) for step in steps], expected, 1e-12)


@pytest.mark.parametrize(
    ("axis", "shapes"),
    [
        (0, {"w": (3, 4), "b": (4,), "heads": (2, 3, 4)}),
        ((0, 1, 2), {"conv": (2, 2, 3, 4)}),
        ((1, -1), {"heads": (2, 3, 4)}),
    ],
)
def test_adaptive_grad_clip_over_an_axis_is_that_of_optax(axis, shapes):
    params, grads = some_params(shapes=shapes), some_grads(STEPS, shapes=shapes)
    compared(optfn.adaptive_grad_clip(0.1, axis=axis), optax.adaptive_grad_clip(0.1, axis=axis), params, grads)
    if axis != (1, -1):  # what Optax takes by itself
        compared(optfn.adaptive_grad_clip(0.1, axis=axis), optax.adaptive_grad_clip(0.1), params, grads)


def test_a_unit_of_a_convolution_over_a_line_is_an_output_channel():
    """Optax takes three dimensions for a linear layer of several heads."""
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    assert_close(optfn.unitwise_norm(x), x.flatten(1).norm(dim=1)[:, None, None].expand(2, 3, 4), 1e-14)


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 1)])
def test_unitwise_norm_of_a_complex_tensor_is_that_of_optax(axis):
    x = torch.randn(3, 4, dtype=torch.complex128)
    theirs = optax.transforms.unitwise_norm(jnp.asarray(x.T.numpy() if axis is None else x.numpy()), axis)
    assert_close(optfn.unitwise_norm(x), from_jax(theirs).T, 1e-12) if axis is None else assert_close(
        optfn.unitwise_norm(x, axis), from_jax(theirs), 1e-12
    )


@pytest.mark.parametrize("div_eps", [1e-6, 3.0])
def test_unitwise_clip_is_that_of_optax(div_eps):
    x, m = torch.randn(2, 6, 4, dtype=torch.float64).unbind()
    g, m = optfn.unitwise_norm(x), m.abs()
    theirs = optax.transforms.unitwise_clip(*map(to_jax, (g, m, x)), div_eps)
    assert_close(optfn.unitwise_clip(g, m, x, div_eps), from_jax(theirs), 1e-12)


# Gradients of each example


def examples(dtype=torch.float64):
    """Five examples, one of them all zero, one with a norm of 5 exactly."""
    g = {name: torch.randn(5, *shape, dtype=dtype) for name, shape in SHAPES.items()}
    for x in g.values():
        x[1:3] = 0
    g["b"][2, :2] = torch.tensor([3.0, 4.0])
    return nested(g)


BOUNDS = [0.0, 0.5, 5.0, 1e3, INF]


def test_per_example_global_norm_clip_is_that_of_optax():
    g, theirs = examples(), jax.jit(optax.per_example_global_norm_clip)
    for bound in BOUNDS:
        total, clipped = optfn.per_example_global_norm_clip(g, bound)
        expected, count = theirs(to_jax(g), bound)
        assert_close(total, from_jax(expected), 1e-12)
        assert clipped == int(count)
        assert clipped.dtype == torch.int64


@pytest.mark.parametrize("uniform", [True, False])
def test_per_example_layer_norm_clip_is_that_of_optax(uniform):
    g, theirs = examples(), jax.jit(optax.per_example_layer_norm_clip, static_argnums=2)
    for bound in BOUNDS:
        total, clipped = optfn.per_example_layer_norm_clip(g, bound, uniform)
        expected, count = theirs(to_jax(g), bound, uniform)
        assert_close(total, from_jax(expected), 1e-12)
        assert_close(clipped, from_jax(count), 0)


@pytest.mark.parametrize("clip", [optfn.per_example_global_norm_clip, optfn.per_example_layer_norm_clip])
def test_clipped_examples_of_other_kinds(clip):
    g = examples()
    without, _ = clip(g, 0.5)
    total, _ = clip({**g, "none": None}, 0.5)
    assert total["none"] is None
    assert_close(total["layers"], without["layers"], 0)
    assert clip({}, 0.5)[0] == {}
    assert clip({"w": torch.ones(0, 3)}, 0.5)[0]["w"].tolist() == [0, 0, 0]
    half, _ = clip(optfn.tree.cast(g, torch.bfloat16), 0.5)
    assert {x.dtype for x in optfn.tree.leaves(half)} == {torch.bfloat16}
    z = torch.randn(5, 3, dtype=torch.complex128)
    assert_close(clip([z], 0.5)[0][0], torch.view_as_complex(clip([torch.view_as_real(z)], 0.5)[0][0]), 1e-12)
    summed = torch.func.grad(lambda g: sum(x.sum() for x in optfn.tree.leaves(clip(g, 0.5)[0])))(g)
    assert all(x.isfinite().all() for x in optfn.tree.leaves(summed))


# Trust ratios

RATE = 0.05
OURS, THEIRS = optfn.cosine_decay_schedule(0.1, 20), exact(optax.cosine_decay_schedule(0.1, 20))

ALIASES = {
    "trust ratio": (optfn.scale_by_trust_ratio(), optax.scale_by_trust_ratio()),
    "trust ratio: all numbers": (optfn.scale_by_trust_ratio(0.3, 0.7, 1e-2), optax.scale_by_trust_ratio(0.3, 0.7, 1e-2)),
    "lamb": (optfn.lamb(RATE), optax.lamb(RATE)),
    "lamb: all": (
        optfn.lamb(OURS, (0.8, 0.95), 1e-3, 0.2, eps_root=1e-4, mask=MASK),
        optax.lamb(THEIRS, 0.8, 0.95, 1e-3, 1e-4, 0.2, MASK),
    ),
    "lars": (optfn.lars(RATE), optax.lars(RATE)),
    "lars: all": (
        optfn.lars(OURS, 0.2, MASK, 0.1, 1e-3, MASK, 0.8, True),
        optax.lars(THEIRS, 0.2, MASK, 0.1, 1e-3, MASK, 0.8, True),
    ),
    "fromage": (optfn.fromage(RATE), optax.fromage(RATE)),
    "fromage: all": (optfn.fromage(OURS, 1.5), optax.fromage(THEIRS, 1.5)),
    "maximize": (
        optfn.chain(optfn.scale(-1.0), optfn.lars(RATE, 0.1, maximize=True)),
        optax.lars(RATE, 0.1),
    ),
}


@pytest.mark.parametrize("name", ALIASES)
def test_alias_is_that_of_optax(name):
    compared(*ALIASES[name], params_of(), grads_of())


# Noise

NOISY = {
    "add_noise": (optfn.add_noise(0.1, 0.55, 7), optax.add_noise(0.1, 0.55, 7)),
    "add_noise: a key": (
        optfn.add_noise(0.5, 0.0, optfn.random.split(optfn.random.key(-3))[1]),
        optax.add_noise(0.5, 0.0, jax.random.split(jax.random.key(-3))[1]),
    ),
    "noisy_sgd": (optfn.noisy_sgd(RATE, key=0), optax.noisy_sgd(RATE, key=0)),
    "noisy_sgd: all": (optfn.noisy_sgd(OURS, 0.3, 1.2, 2**40), optax.noisy_sgd(THEIRS, 0.3, 1.2, 2**40)),
}


@pytest.mark.parametrize("name", NOISY)
def test_noise_is_that_of_optax(name):
    compared(*NOISY[name], params_of(), grads_of())


def test_noise_of_complex_updates_is_that_of_optax():
    params = {"z": torch.zeros(3, dtype=torch.complex128), "w": torch.zeros(2, dtype=torch.float64)}
    grads = [optfn.tree.map(lambda x, i=i: x + i, params) for i in range(5)]
    key = jax.random.key(7)
    tx, state = optfn.add_noise(0.1, 0.5, 7), None
    for i, g in enumerate(grads):
        state = tx.init(params) if state is None else state
        updates, state = tx.update(g, state, params)
        key, now = jax.random.split(key)
        z = jax.random.normal(jax.random.split(now)[1], (3,), "complex128")
        assert_close(updates["z"], i + (0.1 / (i + 1) ** 0.5) ** 0.5 * from_jax(z), 1e-12)


def trajectory_of(tx, params, grads, state=None):
    state, seen = tx.init(params) if state is None else state, []
    for g in grads:
        updates, state = tx.update(g, state, params)
        seen.append(updates)
    return seen, state


def without_b(x):
    return {**x, "layers": [{**x["layers"][0], "b": None}, x["layers"][1]]}


@pytest.mark.parametrize("tx", [optfn.add_noise(0.1, 0.5, 7), optfn.noisy_sgd(0.1, key=7)])
def test_a_leaf_that_sits_out_changes_no_numbers(tx):
    params, grads = params_of(), grads_of(steps=4)
    expected, after = trajectory_of(tx, params, grads)
    for given in (params, without_b(params)):
        found, state = trajectory_of(tx, given, [without_b(g) for g in grads])
        assert_close(found, [without_b(u) for u in expected], 0)
        assert_close(state, after, 0)
    again, _ = trajectory_of(tx, params, grads[2:], trajectory_of(tx, params, grads[:2])[1])
    assert_close(again, expected[2:], 0)  # resumed


def test_noise_of_mapped_keys_differs():
    keys = optfn.random.split(optfn.random.key(7), 3)
    g = torch.zeros(4)

    def noise(key):
        tx = optfn.add_noise(1.0, 0.0, key)
        return tx.update(g, tx.init(g))[0]

    mapped = torch.vmap(noise)(keys)
    assert_close(mapped, torch.stack([noise(key) for key in keys]), 0)
    assert len({tuple(row) for row in mapped.tolist()}) == 3


def test_a_key_is_left_alone_by_inject_hyperparams():
    """A seed is an int, and no number to keep in the state."""
    for tx in (optfn.inject_hyperparams(optfn.noisy_sgd)(lr=RATE, key=7), optfn.inject_hyperparams(optfn.dpsgd)(RATE, 1.0, 0.1, 7)):
        assert "key" not in tx.init(torch.ones(1)).hyperparams
    tx = optfn.inject_hyperparams(optfn.add_noise)(0.1, 0.55, 7)
    assert_close(
        trajectory_of(tx, params_of(), grads_of(steps=3))[0],
        trajectory_of(NOISY["add_noise"][0], params_of(), grads_of(steps=3))[0],
        1e-14,
    )


# Differential privacy


def of_examples(steps=STEPS, size=3):
    """Gradients of so many examples, one of them all zero in the first step."""
    several = [some_grads(steps, shapes={name: (size, *shape) for name, shape in SHAPES.items()})]
    grads = [nested(g) for g in several[0]]
    for x in optfn.tree.leaves(grads[0]):
        x[1] = 0
    return grads


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            optfn.differentially_private_aggregate(0.5, 1.1, 7),
            optax.contrib.differentially_private_aggregate(0.5, 1.1, 7),
        ),
        (
            optfn.differentially_private_aggregate(2.0, 0.0, optfn.random.key(1)),
            optax.contrib.differentially_private_aggregate(2.0, 0.0, jax.random.key(1)),
        ),
        (optfn.dpsgd(RATE, 0.5, 1.1, 7), optax.contrib.dpsgd(RATE, 0.5, 1.1, 7)),
        (optfn.dpsgd(OURS, 0.5, 0.1, 3, 0.9, True), optax.contrib.dpsgd(THEIRS, 0.5, 0.1, 3, 0.9, True)),
    ],
)
def test_private_steps_are_those_of_optax(ours, theirs):
    compared(ours, theirs, params_of(), of_examples())


def test_a_leaf_without_gradients_changes_no_private_numbers():
    tx = optfn.differentially_private_aggregate(1e3, 1.0, 7)
    params, grads = params_of(), of_examples(3)
    expected, after = trajectory_of(tx, params, grads)
    found, state = trajectory_of(tx, params, [without_b(g) for g in grads])
    assert_close(found, [without_b(u) for u in expected], 1e-14)
    assert_close(state, after, 0)


# Perturbed functions


def winner(x):
    """No derivative of its own is other than zero: a one in place of the largest entry of each row of w."""
    best = x["w"] == x["w"].amax(-1, keepdim=True)
    return {"best": best.to(x["w"].dtype), "cost": (x["w"].round() * x["b"].sign()).sum()}


def winner_of_jax(x):
    best = x["w"] == x["w"].max(-1, keepdims=True)
    return {"best": best.astype(x["w"].dtype), "cost": (x["w"].round() * jnp.sign(x["b"])).sum()}


def perturbed_pair(ours, theirs, **options):
    make = optfn.perturbations.make_perturbed_fun
    return make(winner, 50, noise=ours, **options), optax.perturbations.make_perturbed_fun(
        winner_of_jax, 50, noise=theirs, **options
    )


GUMBEL = (optfn.perturbations.Gumbel(), optax.perturbations.Gumbel())
NORMAL = (optfn.perturbations.Normal(), optax.perturbations.Normal())
KEY, THEIR_KEY = optfn.random.key(7), jax.random.key(7)


def weighed(values):
    return (values["best"] * torch.arange(12).reshape(3, 4)).sum() + values["cost"] ** 2


def weighed_of_jax(values):
    return (values["best"] * jnp.arange(12).reshape(3, 4)).sum() + values["cost"] ** 2


@pytest.mark.parametrize(
    ("pair", "options"), [(GUMBEL, {}), (NORMAL, {"sigma": 0.7}), (GUMBEL, {"sigma": 0.5, "use_baseline": False})]
)
def test_perturbed_values_and_derivatives_are_those_of_optax(pair, options):
    f, theirs = perturbed_pair(*pair, **options)
    x = some_params(shapes={"w": (3, 4), "b": (4,)})

    def loss(x):
        return weighed(f(KEY, x))

    def their_loss(x):
        values = theirs(THEIR_KEY, x)
        return weighed_of_jax(values), values

    expected, values = from_jax(jax.jit(jax.grad(their_loss, has_aux=True))(to_jax(x)))
    assert_close(f(KEY, x), values, 1e-12)
    found = torch.func.grad(loss)(x)
    # Relative to the whole: an entry is a sum of large numbers of both signs.
    size = max(y.abs().max().item() for y in optfn.tree.leaves(expected))
    assert_close(optfn.tree.map(lambda g: g / size, found), optfn.tree.map(lambda g: g / size, expected), 1e-12)

    marked = optfn.tree.map(lambda p: p.clone().requires_grad_(), x)
    by_autograd = torch.autograd.grad(loss(marked), optfn.tree.leaves(marked))
    assert_close(list(by_autograd), optfn.tree.leaves(found), 1e-12)
    v = optfn.tree.map(torch.cos, x)
    along = torch.func.jvp(loss, (x,), (v,))[1]
    assert_close(
        along / size, sum((a * b).sum() for a, b in zip(optfn.tree.leaves(found), optfn.tree.leaves(v), strict=True)) / size, 1e-12
    )


def test_second_derivatives_of_a_perturbed_function_are_those_of_optax():
    f = optfn.perturbations.make_perturbed_fun(lambda x: x.sign().prod(), 100, 0.8, NORMAL[0])
    theirs = optax.perturbations.make_perturbed_fun(lambda x: jnp.sign(x).prod(), 100, 0.8, NORMAL[1])
    x = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    found = torch.func.hessian(lambda x: f(KEY, x))(x)
    assert_close(found, from_jax(jax.jit(jax.hessian(lambda x: theirs(THEIR_KEY, x)))(jnp.asarray(x.numpy()))), 1e-12)
    assert found.abs().min() > 0.01
    by_autograd = torch.autograd.functional.hessian(lambda x: f(KEY, x), x)
    assert_close(by_autograd, found, 1e-12)


def test_a_perturbed_maximum_is_the_softmax():
    x = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    smooth = optfn.perturbations.make_perturbed_fun(lambda x: (x == x.max()).to(x.dtype), 20_000, 1.0)
    torch.testing.assert_close(smooth(KEY, x), x.softmax(0), rtol=0, atol=0.02)
    jacobian = torch.func.jacrev(lambda x: smooth(KEY, x))(x)
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda x: x.softmax(0))(x), rtol=0, atol=0.04)


def test_perturbed_functions_are_mapped_and_traced():
    f = optfn.perturbations.make_perturbed_fun(torch.sign, 20, 0.5)
    keys, xs = optfn.random.split(KEY, 3), torch.randn(3, 4, dtype=torch.float64)
    step = torch.func.grad(lambda x, key: f(key, x).square().sum())
    expected = torch.stack([step(x, key) for x, key in zip(xs, keys, strict=True)])
    assert_close(torch.vmap(step)(xs, keys), expected, 1e-12)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_close(compiled(xs[0], keys[0]), expected[0], 1e-12)


def test_none_in_a_perturbed_tree():
    f = optfn.perturbations.make_perturbed_fun(lambda x: {"y": x["a"].sign(), "none": x["none"]}, 20, 0.5)
    found = f(KEY, {"a": torch.ones(2), "none": None})
    assert found["none"] is None
    assert found["y"].shape == (2,)


# Sharpness-aware minimization


def nonzero(grads):
    """Optax divides by the norm, of what is all zero too."""
    return [optfn.tree.map(lambda x, i=i: x + 0.1 * (i + 1), g) for i, g in enumerate(grads)]


def uphill(rho, momentum=None):
    return (
        optfn.chain(optfn.normalize(), optfn.sgd(rho, momentum=momentum or 0.0)),
        optax.chain(optax.contrib.normalize(), optax.sgd(rho, momentum)),
    )


DOWN = (
    optfn.chain(optfn.scale_by_adam(), optfn.add_decayed_weights(0.1), optfn.scale(-0.05)),
    optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-0.05)),
)


@pytest.mark.parametrize(("period", "reset", "momentum"), [(2, True, None), (2, False, 0.9), (3, True, 0.9), (5, False, 0.9)])
def test_sam_is_that_of_optax(period, reset, momentum):
    adversaries = uphill(0.3, momentum)
    ours, theirs = (m(d, a, period, reset) for m, d, a in zip((optfn.sam, optax.contrib.sam), DOWN, adversaries, strict=True))
    compared(ours, theirs, params_of(), nonzero(grads_of()))


def bumpy(x):
    return sum((p**2 + p.cos()).sum() for p in optfn.tree.leaves(x))


def bumpy_of_jax(x):
    return sum((p**2 + jnp.cos(p)).sum() for p in jax.tree.leaves(x))


@pytest.mark.parametrize(("period", "reset"), [(1, True), (2, True), (4, False)])
def test_sam_in_one_update_is_that_of_optax(period, reset):
    adversaries = uphill(0.3, 0.9)
    ours, theirs = (
        m(d, a, period, reset, opaque_mode=True) for m, d, a in zip((optfn.sam, optax.contrib.sam), DOWN, adversaries, strict=True)
    )
    # Another gradient at each of the adversarial steps.
    grad_fn = torch.func.grad(lambda x, i: (i + 1) * bumpy(x))
    their_grad_fn = jax.grad(lambda x, i: (i + 1) * bumpy_of_jax(x))

    class Theirs:
        init = theirs.init

        @staticmethod
        def update(g, state, params):
            return theirs.update(g, state, params, grad_fn=their_grad_fn)

    expected, _ = run_optax(Theirs, params_of(), nonzero(grads_of(steps=10)))
    mine = optfn.core.transformation(ours.init, lambda g, state, params: ours.update(g, state, params, grad_fn=grad_fn))
    steps, _ = run(mine, params_of(), nonzero(grads_of(steps=10)))
    assert_close(steps, expected, 1e-12)


def test_both_modes_are_the_paper():
    """Algorithm 1 written out, with the gradients of one function."""
    grad, p = torch.func.grad(bumpy), params_of()
    plain, seen = p, []
    for _ in range(10):
        g = grad(plain)
        size = optfn.tree.global_norm(g)
        up = optfn.tree.map(lambda p, g, size=size: p + 0.2 * g / size, plain, g)
        plain = optfn.tree.map(lambda p, g: p - 0.1 * g, plain, grad(up))
        seen.append(plain)
    parts = optfn.sgd(0.1), optfn.chain(optfn.normalize(), optfn.sgd(0.2))
    for tx, calls in ((optfn.sam(*parts), 2), (optfn.sam(*parts, opaque_mode=True), 1)):
        params, state = p, tx.init(p)
        for wanted in seen:
            for _ in range(calls):
                updates, state = tx.update(grad(params), state, params, grad_fn=lambda x, i: grad(x))
                params = optfn.apply_updates(params, updates)
            assert_close(params, wanted, 1e-12)


def test_a_round_of_one_update_is_the_outer_transformation():
    """Optax steps from where the parameters were one update before: its cache is read before it is written."""
    steps, _ = run(optfn.sam(DOWN[0], uphill(0.3)[0], 1), params_of(), grads_of())
    expected, _ = run(DOWN[0], params_of(), grads_of())
    assert_close(steps, expected, 1e-12)
    wrong, _ = run_optax(optax.contrib.sam(DOWN[1], uphill(0.3)[1], 1), params_of(), nonzero(grads_of()))
    right, _ = run_optax(DOWN[1], params_of(), nonzero(grads_of()))
    with pytest.raises(AssertionError):
        assert_close(wrong, right, 1e-3)


def test_what_a_step_uphill_overflows_to_does_not_reach_the_outer_state():
    """Optax selects by products with 0 and 1, which of inf are NaN."""
    tx = optfn.sam(optfn.adam(0.1), optfn.sgd(0.1))
    params = {"w": torch.ones(2)}
    _, state = tx.update({"w": torch.tensor([INF, 1.0])}, tx.init(params), params)
    assert optfn.tree.get(state, "mu")["w"].tolist() == [0, 0]


def test_normalize_of_nothing_is_nothing():
    """Optax's is NaN."""
    zero = {"w": torch.zeros(2, dtype=torch.float64)}
    assert_close(optfn.normalize().update(zero, ())[0], zero, 0)
    compared(optfn.normalize(), optax.contrib.normalize(), params_of(), nonzero(grads_of()))


# Schedule-free


def rising(step):
    """A warm-up, in both libraries."""
    return 0.1 * ((step + 1) / 8).clip(max=1)


def of_one_step_before(schedule):
    """Optax counts from 1 for the weights, but the base transformation's schedule from 0."""
    return exact(lambda count: schedule(count - 1.0))


SCHEDULE_FREE = {
    "sgd": (optfn.schedule_free_sgd(), optax.contrib.schedule_free_sgd()),
    "sgd: all": (
        optfn.schedule_free_sgd(0.3, 0.8, 0.1, weight_lr_power=1.0),
        optax.contrib.schedule_free_sgd(0.3, None, 0.8, 0.1, 1.0),
    ),
    "adamw": (optfn.schedule_free_adamw(), optax.contrib.schedule_free_adamw()),
    "adamw: all": (
        optfn.schedule_free_adamw(0.3, (0.8, 0.95), 1e-3, 0.1, weight_lr_power=0.5),
        optax.contrib.schedule_free_adamw(0.3, None, 0.8, 0.95, 1e-3, 0.1, 0.5),
    ),
    "another base": (
        optfn.schedule_free(optfn.chain(optfn.scale_by_rms(), optfn.scale(-0.05)), 0.05, 0.7, 3.0),
        optax.contrib.schedule_free(optax.chain(optax.scale_by_rms(), optax.scale(-0.05)), 0.05, 0.7, 3.0),
    ),
    "a warm-up": (
        optfn.schedule_free(optfn.sgd(rising), rising, weight_lr_power=1.5),
        optax.contrib.schedule_free(optax.sgd(exact(rising)), of_one_step_before(rising), weight_lr_power=1.5),
    ),
    "a rate that falls, and one of 0": (
        optfn.schedule_free(optfn.sgd(lambda t: 0.1 * (t % 7)), lambda t: 0.1 * (t % 7)),
        optax.contrib.schedule_free(optax.sgd(exact(lambda t: 0.1 * (t % 7))), of_one_step_before(lambda t: 0.1 * (t % 7))),
    ),
    "warmup_steps": (
        optfn.schedule_free_sgd(0.1, warmup_steps=8),
        optax.contrib.schedule_free(optax.sgd(exact(rising)), of_one_step_before(rising)),
    ),
    "warmup_steps of adamw": (
        optfn.schedule_free_adamw(optfn.constant_schedule(0.1), warmup_steps=8),
        optax.contrib.schedule_free(
            optax.chain(
                optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True), optax.scale_by_learning_rate(exact(rising))
            ),
            of_one_step_before(rising),
        ),
    ),
}


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_is_that_of_optax(name):
    ours, theirs = SCHEDULE_FREE[name]
    params, grads = params_of(), grads_of()
    expected, their_state = run_optax(theirs, params, grads)
    steps, state = run(ours, params, grads)
    assert_close(steps, expected, 1e-12)
    assert_close(state.z, from_jax(their_state.z), 1e-12)
    averages = optax.contrib.schedule_free_eval_params(their_state, to_jax(steps[-1]["params"]))
    assert_close(optfn.schedule_free_eval_params(state, steps[-1]["params"]), from_jax(averages), 1e-12)


def test_z_in_a_dtype_of_its_own():
    ours, theirs = (
        optfn.schedule_free_sgd(0.3, state_dtype=torch.float32),
        optax.contrib.schedule_free_sgd(0.3, state_dtype=jnp.float32),
    )
    state = compared(ours, theirs, params_of(), grads_of(), 1e-6)
    assert {z.dtype for z in optfn.tree.leaves(state.z)} == {torch.float32}


@pytest.mark.parametrize("warmup", [0, 6])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_schedule_free_adamw_is_the_code_of_its_authors(warmup, decay):
    """Their AdamWScheduleFree: y and z change in place, by one formula each; and the equations of the paper for x."""
    lr0, b1, b2, eps = 0.05, 0.9, 0.98, 1e-6
    params, grads = some_params(), some_grads(STEPS)
    tx = optfn.schedule_free_adamw(lr0, (b1, b2), eps, decay, warmup_steps=warmup)
    steps, state = run(tx, params, grads)
    for name in params:
        y, z, x = (params[name].clone() for _ in range(3))
        v, lr_max, weight_sum = torch.zeros_like(y), 0.0, 0.0
        for k, g in enumerate(grads):
            lr = lr0 * min((k + 1) / warmup, 1) if warmup else lr0
            lr_max = max(lr, lr_max)
            weight_sum += lr_max**2
            c = lr_max**2 / weight_sum
            v = b2 * v + (1 - b2) * g[name] ** 2
            direction = g[name] / ((v / (1 - b2 ** (k + 1))).sqrt() + eps) + decay * y
            y = torch.lerp(y, z, c) + direction * lr * (b1 * (1 - c) - 1)
            z = z - lr * direction
            x = (1 - c) * x + c * z
            assert_close(steps[k]["params"][name], y, 1e-12)
        assert_close(optfn.schedule_free_eval_params(state, steps[-1]["params"])[name], x, 1e-11)  # y - z, divided by b1


def test_weights_are_of_the_rate_that_the_base_steps_with():
    """Those of Optax are of the next one."""
    ours, theirs = (
        optfn.schedule_free(optfn.sgd(rising), rising),
        optax.contrib.schedule_free(optax.sgd(exact(rising)), exact(rising)),
    )
    steps, state = run(ours, params_of(), grads_of())
    expected, _ = run_optax(theirs, params_of(), grads_of())
    with pytest.raises(AssertionError):
        assert_close(steps, expected, 1e-3)
    rates = [min((t + 1) / 8, 1) * 0.1 for t in range(STEPS)]
    assert_close(state.weight_sum, torch.tensor(sum(r**2 for r in rates), dtype=torch.float64), 1e-14)


AROUND = {
    "chain": lambda tx: optfn.chain(optfn.identity(), tx),
    "named_chain": lambda tx: optfn.named_chain(("clip", optfn.clip(1e9)), ("free", tx)),
    "apply_if_finite": optfn.apply_if_finite,
    "accumulate": lambda tx: optfn.accumulate(optfn.chain(tx), 1),
    "masked": lambda tx: optfn.masked(tx, True),
    "partition": lambda tx: optfn.partition(
        {"one": tx, "two": optfn.schedule_free_sgd(0.3)}, lambda path, p: "two" if path == "s" else "one"
    ),
    "inject": lambda tx: optfn.inject_hyperparams(lambda lr: optfn.schedule_free_sgd(lr))(lr=0.3),
    "flatten": lambda tx: optfn.chain(optfn.identity(), optfn.flatten(tx)),
}


@pytest.mark.parametrize("name", AROUND)
def test_averages_are_found_in_any_state(name):
    """Optax's function wants the bare state."""
    bare = optfn.schedule_free_sgd(0.3)
    steps, state = run(bare, params_of(), grads_of())
    expected = optfn.schedule_free_eval_params(state, steps[-1]["params"])
    around, state = run(AROUND[name](bare), params_of(), grads_of())
    assert_close(around, steps, 1e-14)
    assert_close(optfn.schedule_free_eval_params(state, around[-1]["params"]), expected, 1e-12)
    with pytest.raises(AttributeError):
        optax.contrib.schedule_free_eval_params((optax.contrib.schedule_free_sgd().init(1.0),), 1.0)


@pytest.mark.parametrize("p", [torch.ones(3, 1), torch.tensor(2.0), torch.ones(2, 2, dtype=torch.complex64), torch.ones(3)])
def test_averages_of_one_vector(p):
    """Its shape is not that of the one tensor that it is of."""
    averages = []
    for tx in (optfn.schedule_free_sgd(0.3), optfn.flatten(optfn.schedule_free_sgd(0.3))):
        steps, state = run(tx, p, [p, 3 * p, -p])
        averages.append(optfn.schedule_free_eval_params(state, steps[-1]["params"]))
    assert_close(averages[1], averages[0], 1e-6)


def test_a_vector_of_some_parameters_names_what_to_give():
    """Which ones a partition has shown to flatten is not in its state."""
    free = optfn.schedule_free_sgd(0.3)
    label = lambda path, p: path if path == "w" else "rest"  # noqa: E731
    for rest, sizes in ((optfn.adam(), r"\(6,\)"), (free, r"\(6,\)"), (optfn.flatten(free), r"\(3,\) and \(6,\)")):
        tx = optfn.partition({"w": optfn.flatten(free), "rest": rest}, label)
        steps, state = run(tx, some_params(), some_grads(3))
        params = steps[-1]["params"]
        with pytest.raises(ValueError, match=f"within flatten, .* z has shape {sizes}, params have 9 entries. Give one such state"):
            optfn.schedule_free_eval_params(state, params)
        alone, expected = run(free, some_params(), some_grads(3))
        expected = optfn.schedule_free_eval_params(expected, alone[-1]["params"])
        part = {"w": params["w"], "b": None, "s": None}
        assert_close(optfn.schedule_free_eval_params(state.inner_states["w"], part), {**part, "w": expected["w"]}, 1e-12)


def test_a_schedule_free_within_mechanize_has_no_averages():
    """Its z takes steps as they are, its parameters take scaled ones."""
    tx = optfn.mechanize(optfn.chain(optfn.schedule_free_sgd(0.3)), s_init=0.1)
    steps, state = run(tx, some_params(), some_grads(3))
    with pytest.raises(TypeError, match="schedule_free ran within mechanize, which scales its steps, but not those of z"):
        optfn.schedule_free_eval_params(state, steps[-1]["params"])
    around, state = run(optfn.schedule_free(optfn.mechanize(optfn.sgd(1.0)), 1.0, b1=1.0), some_params(), some_grads(3))
    assert_close(optfn.schedule_free_eval_params(state, around[-1]["params"]), around[-1]["params"], 1e-12)  # with b1 = 1 it is y


def test_parameters_that_are_not_schedule_free_are_as_they_are():
    tx = optfn.partition(
        {"free": optfn.schedule_free_sgd(0.3), "rest": optfn.adam()}, lambda path, p: "free" if p.ndim == 2 else "rest"
    )
    steps, state = run(tx, some_params(shapes=SHAPES), some_grads(shapes=SHAPES))
    params = steps[-1]["params"]
    found = optfn.schedule_free_eval_params(state, params)
    assert [name for name in params if not torch.equal(found[name], params[name])] == ["w"]


def test_the_b1_that_is_given_acts_on_a_state_of_another():
    """As with Optax; and the state says which one the last step had, where that of Optax keeps the first."""
    p, q = params_of(), to_jax(params_of())
    state, their_state = optfn.schedule_free_sgd(0.3).init(p), optax.contrib.schedule_free_sgd(0.3).init(q)
    for b1, g in zip([0.9, 0.9, 0.6, 0.6, 0.8], grads_of(), strict=False):
        updates, state = optfn.schedule_free_sgd(0.3, b1).update(g, state, p)
        p = optfn.apply_updates(p, updates)
        updates, their_state = optax.contrib.schedule_free_sgd(0.3, b1=b1).update(to_jax(g), their_state, q)
        q = optax.apply_updates(q, updates)
        assert state.b1 == b1
        assert_close(p, from_jax(q), 1e-12)


def updated(tx, params=None):
    return tx.update(torch.ones(1), tx.init(torch.ones(1)), params)


ERRORS = [
    (lambda: optfn.ema(1.0), ValueError, "decay must be >= 0 and < 1, got 1.0"),
    (lambda: optfn.apply_every(0), ValueError, "k must be >= 1, got 0"),
    (lambda: optfn.apply_every(2.0), TypeError, "k must be an int, got float"),
    (lambda: optfn.scale_by_param_block_norm(-0.1), ValueError, "min_scale must be >= 0, got -0.1"),
    (lambda: optfn.adaptive_grad_clip(-0.1), ValueError, "clipping must be >= 0, got -0.1"),
    (lambda: optfn.adaptive_grad_clip(0.1, -0.1), ValueError, "eps must be >= 0, got -0.1"),
    (
        lambda: optfn.unitwise_norm(torch.ones(3), 1),
        ValueError,
        r"axis must be of the 1 dimensions of a tensor of shape \(3,\), got \(1,\)",
    ),
    (
        lambda: optfn.unitwise_clip(torch.ones(2), torch.ones(2), torch.ones(3)),
        ValueError,
        r"unitwise_clip: g_norm, max_norm and grad must be of one shape, got \(2,\), \(2,\), \(3,\)",
    ),
    (lambda: optfn.unitwise_clip(*[torch.ones(2)] * 3, 0.0), ValueError, "div_eps must be > 0, got 0.0"),
    (
        lambda: optfn.per_example_global_norm_clip({"a": torch.ones(2, 3), "b": torch.ones(3)}, 1.0),
        ValueError,
        r"per_example_global_norm_clip: 'b' must have a first dimension of 2, the examples, got shape \(3,\)",
    ),
    (
        lambda: optfn.per_example_layer_norm_clip([torch.ones(())], 1.0),
        ValueError,
        r"per_example_layer_norm_clip: '0' must have a first dimension of the number of examples, the examples, got shape \(\)",
    ),
    (lambda: optfn.per_example_global_norm_clip([torch.ones(1)], -1.0), ValueError, "l2_norm_clip must be >= 0, got -1.0"),
    (lambda: optfn.scale_by_trust_ratio(-1.0), ValueError, "min_norm must be >= 0, got -1.0"),
    (lambda: optfn.scale_by_trust_ratio(eps=-1.0), ValueError, "eps must be >= 0, got -1.0"),
    (lambda: optfn.lars(0.1, trust_coefficient=-1.0), ValueError, "trust_coefficient must be >= 0, got -1.0"),
    (lambda: optfn.fromage(-0.1), ValueError, "lr must be >= 0, got -0.1"),
    (lambda: optfn.add_noise(-1.0, 0.5, 7), ValueError, "eta must be >= 0, got -1.0"),
    (lambda: optfn.add_noise(1.0, -0.5, 7), ValueError, "gamma must be >= 0, got -0.5"),
    (lambda: optfn.add_noise(1.0, 0.5), TypeError, r"add_noise needs `key`: an integer seed, or a key, optfn.random.key\(seed\)"),
    (lambda: optfn.noisy_sgd(1.0), TypeError, "add_noise needs `key`"),
    (lambda: optfn.add_noise(1.0, 0.5, 1.5), TypeError, "a key is an int64 tensor of two words"),
    (lambda: optfn.dpsgd(0.1, 1.0, 1.0), TypeError, "differentially_private_aggregate needs `key`"),
    (lambda: optfn.dpsgd(0.1, -1.0, 1.0, 7), ValueError, "l2_norm_clip must be >= 0, got -1.0"),
    (lambda: optfn.dpsgd(0.1, 1.0, -1.0, 7), ValueError, "noise_multiplier must be >= 0, got -1.0"),
    (lambda: optfn.perturbations.make_perturbed_fun(torch.sign, 0), ValueError, "num_samples must be >= 1, got 0"),
    (lambda: optfn.perturbations.make_perturbed_fun(torch.sign, sigma=0.0), ValueError, "sigma must be > 0, got 0.0"),
    (lambda: optfn.sam(optfn.adam(), optfn.adam, 2), TypeError, "sam takes transformations"),
    (lambda: optfn.sam(optfn.adam(), optfn.adam(), 0), ValueError, "sync_period must be >= 1, got 0"),
    (lambda: updated(optfn.sam(optfn.adam(), optfn.adam())), TypeError, "sam needs `params`"),
    (
        lambda: updated(optfn.sam(optfn.adam(), optfn.adam(), opaque_mode=True), torch.ones(1)),
        TypeError,
        r"sam needs `grad_fn`: call update\(updates, state, grad_fn=...\)",
    ),
    (lambda: optfn.schedule_free(optfn.adam, 0.1), TypeError, "schedule_free takes transformations"),
    (lambda: optfn.schedule_free(optfn.adam(), -0.1), ValueError, "learning_rate must be >= 0, got -0.1"),
    (lambda: optfn.schedule_free_sgd(b1=0.0), ValueError, "b1 must be > 0 and <= 1, got 0.0"),
    (lambda: optfn.schedule_free_sgd(-0.1, warmup_steps=3), ValueError, "lr must be >= 0, got -0.1"),
    (lambda: optfn.schedule_free_adamw(warmup_steps=-1), ValueError, "warmup_steps must be >= 0, got -1"),
    (lambda: updated(optfn.schedule_free_sgd()), TypeError, "schedule_free needs `params`"),
    (
        lambda: optfn.schedule_free_eval_params(optfn.adam().init(torch.ones(1)), torch.ones(1)),
        TypeError,
        "schedule_free_eval_params needs a state with that of schedule_free inside, got tuple",
    ),
    (lambda: optfn.keep_params_nonnegative().update(torch.ones(1), ()), TypeError, "keep_params_nonnegative needs `params`"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
