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


@pytest.mark.parametrize("bound", BOUNDS)
def test_per_example_global_norm_clip_is_that_of_optax(bound):
    g = examples()
    total, clipped = optfn.per_example_global_norm_clip(g, bound)
    expected, count = optax.per_example_global_norm_clip(to_jax(g), bound)
    assert_close(total, from_jax(expected), 1e-12)
    assert clipped == int(count)
    assert clipped.dtype == torch.int64


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("uniform", [True, False])
def test_per_example_layer_norm_clip_is_that_of_optax(bound, uniform):
    g = examples()
    total, clipped = optfn.per_example_layer_norm_clip(g, bound, uniform)
    expected, count = optax.per_example_layer_norm_clip(to_jax(g), bound, uniform)
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
    (lambda: optfn.keep_params_nonnegative().update(torch.ones(1), ()), TypeError, "keep_params_nonnegative needs `params`"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
