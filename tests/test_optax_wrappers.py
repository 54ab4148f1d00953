"""Optax's wrappers that run, hold back, look on, look ahead: against it, along trajectories; and what differs on purpose."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from optax_oracle import assert_close, counted, from_jax, run, run_optax, some_grads, some_params, to_jax

import optfn
from optfn import tree

SHAPES = {"w": (3, 2), "b": (2,), "s": (), "t": (2, 1, 2)}
STEPS = 25
FROZEN = {"w": True, "b": False, "s": False, "t": True}
LABELS = {"w": "slow", "b": "fast", "s": "fast", "t": "slow"}
NAN = float("nan")


def params_and_grads(dtype=torch.float64):
    return some_params(dtype, SHAPES), some_grads(STEPS, dtype, SHAPES)


def adamw(of):
    """With state, in three links, and reading the parameters."""
    return of.chain(of.scale_by_adam(0.8, 0.95), of.add_decayed_weights(0.1), of.scale(-0.1))


def momentum(of):
    return of.chain(of.trace(0.9, nesterov=True), of.scale(-0.3))


def late(step):
    return step >= 7


def some(step):
    return step % 3 != 1


# Wrapped by ours, wrapped by Optax's.
PAIRS = {
    "conditionally_transform": lambda of: of.chain(of.conditionally_transform(adamw(of), some), of.scale(-0.1)),
    "conditionally_transform: late": lambda of: of.chain(of.scale(-0.1), of.conditionally_transform(momentum(of), late)),
    "conditionally_mask": lambda of: of.conditionally_mask(adamw(of), some),
    "conditionally_mask: late": lambda of: of.conditionally_mask(momentum(of), late),
    "flatten": lambda of: of.flatten(adamw(of)),
    "flatten: norm": lambda of: of.flatten(of.chain(of.clip_by_global_norm(0.3), of.clip_by_block_rms(0.01), momentum(of))),
    "multi_transform": lambda of: of.multi_transform({"slow": momentum(of), "fast": adamw(of)}, LABELS),
    "in one another": lambda of: of.conditionally_mask(of.flatten(of.conditionally_transform(adamw(of), late)), some),
}


@pytest.mark.parametrize("name", PAIRS)
def test_trajectory_is_optax(name):
    params, grads = params_and_grads()
    expected, _ = run_optax(PAIRS[name](optax), params, grads)
    steps, _ = run(PAIRS[name](optfn), params, grads)
    assert_close(steps, expected, 1e-12)


@pytest.mark.parametrize("mask", [FROZEN, True, False])
def test_selective_transform_is_optax(mask):
    params, grads = params_and_grads()
    theirs = optax.selective_transform(adamw(optax), freeze_mask=mask if isinstance(mask, dict) else dict.fromkeys(params, mask))
    expected, _ = run_optax(theirs, params, grads)
    tx = optfn.selective_transform(adamw(optfn), freeze_mask=mask)
    steps, state = [], tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optfn.apply_updates(params, updates) if mask is not True else params
        steps.append(params)
    assert_close(steps, [step["params"] for step in expected], 1e-12)
    # Nothing is computed for what is frozen, and nothing kept; Optax's update of it is 0, ours None.
    frozen = [name for name in params if mask is True or (mask and mask[name])]
    assert [name for name in params if updates[name] is None] == frozen
    assert {name for path in tree.to_flat_dict(state) for name in params if path.endswith(f"mu.{name}")} == {*params} - {*frozen}


def test_selective_transform_takes_functions_and_checks_masks():
    params, grads = params_and_grads()
    by_name = optfn.selective_transform(adamw(optfn), freeze_mask=lambda path, p: FROZEN[path])
    by_tree = optfn.selective_transform(adamw(optfn), freeze_mask=FROZEN)
    assert_close(run(by_name, params, grads)[0], run(by_tree, params, grads)[0], 0)
    with pytest.raises(TypeError, match="mask: 'b' must be a bool, got int"):
        optfn.selective_transform(adamw(optfn), freeze_mask={**FROZEN, "b": 0}).init(params)
    with pytest.raises(TypeError, match="selective_transform takes transformations"):
        optfn.selective_transform(optfn.adam, freeze_mask=FROZEN)


# lookahead

SETTINGS = {
    "1": (1, 0.5, False),
    "5": (5, 0.3, False),
    "5, reset": (5, 0.3, True),
    "4, all the way": (4, 1.0, True),
    "not at all": (3, 0.0, False),
}


def looked_ahead(setting):
    """Fast and slow parameters after every step, by Optax."""
    params, grads = params_and_grads()
    tx = optax.lookahead(adamw(optax), *SETTINGS[setting])
    pair, update = optax.LookaheadParams.init_synced(to_jax(params)), jax.jit(tx.update)
    state, steps = tx.init(pair), []
    for g in grads:
        updates, state = update(to_jax(g), state, pair)
        pair = optax.apply_updates(pair, updates)
        steps.append({"fast": from_jax(pair.fast), "slow": from_jax(pair.slow)})
    return steps, state


@pytest.mark.parametrize("setting", SETTINGS)
def test_lookahead_is_optax(setting):
    expected, optax_state = looked_ahead(setting)
    params, grads = params_and_grads()
    tx = optfn.lookahead(adamw(optfn), *SETTINGS[setting])
    # With the slow parameters in the state.
    state, steps, fast = tx.init(params), [], params
    for g in grads:
        updates, state = tx.update(g, state, fast)
        fast = optfn.apply_updates(fast, updates)
        steps.append({"fast": fast, "slow": tree.get(state, "slow")})
    assert_close(steps, expected, 1e-12)
    assert state.steps_since_sync == int(optax_state.steps_since_sync)
    # With both in the parameters.
    pair = optfn.LookaheadParams.init_synced(params)
    state, steps = tx.init(pair), []
    assert state.slow == ()
    for g in grads:
        updates, state = tx.update(g, state, pair)
        pair = optfn.apply_updates(pair, updates)
        steps.append({"fast": pair.fast, "slow": pair.slow})
    assert_close(steps, expected, 1e-12)
    assert_close(state.fast_state[0].slots.mu, from_jax(optax_state.fast_state[0].mu), 1e-12)
    assert set(state.fast_state[0].step.tolist()) == {int(optax_state.fast_state[0].count)}


def test_lookahead_resets_what_is_not_finite():
    """Where Optax multiplies it by 0."""
    params, grads = params_and_grads()
    grads[1] = tree.scale(NAN, grads[1])
    tx, theirs = optfn.lookahead(momentum(optfn), 2, 0.0, True), optax.lookahead(momentum(optax), 2, 0.0, True)
    _, state = run(tx, params, grads[:2])
    assert not any(x.any() for x in tree.leaves(tree.get(state, "trace")))
    pair = optax.LookaheadParams.init_synced(to_jax(params))
    optax_state = theirs.init(pair)
    for g in grads[:2]:
        _, optax_state = theirs.update(to_jax(g), optax_state, pair)
    assert jnp.isnan(optax_state.fast_state[0].trace["w"]).all()


def test_lookahead_and_none():
    params, grads = params_and_grads()
    tx = optfn.lookahead(adamw(optfn), 2, 0.5)
    steps, state = run(tx, params, [{**g, "w": None} for g in grads])
    assert steps[-1]["params"]["w"] is params["w"]
    assert torch.equal(state.slow["w"], params["w"])
    alone, _ = run(
        tx,
        *(tree.map(lambda x: x, {k: v for k, v in x.items() if k != "w"}) for x in [params]),
        [{k: v for k, v in g.items() if k != "w"} for g in grads],
    )
    assert_close({k: v for k, v in steps[-1]["params"].items() if k != "w"}, alone[-1]["params"], 0)


def test_lookahead_errors():
    params, _ = params_and_grads()
    tx, pair = optfn.lookahead(optfn.sgd(), 2, 0.5), optfn.LookaheadParams.init_synced(params)
    with pytest.raises(TypeError, match=r"lookahead needs `params`"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="the state was made without LookaheadParams: give update the fast parameters alone too"):
        tx.update(params, tx.init(params), pair)
    with pytest.raises(TypeError, match="the state was made of LookaheadParams: give update them too"):
        tx.update(params, tx.init(pair), params)
    with pytest.raises(ValueError, match="sync_period must be >= 1, got 0"):
        optfn.lookahead(optfn.sgd(), 0, 0.5)
    with pytest.raises(ValueError, match=r"slow_step_size must be >= 0, got -0.5"):
        optfn.lookahead(optfn.sgd(), 2, -0.5)


# conditionally_transform, conditionally_mask


@pytest.mark.parametrize("name", ["conditionally_transform", "conditionally_mask"])
def test_a_condition_of_extra_arguments(name):
    params, grads = params_and_grads()

    def runs(of, loss):
        return getattr(of, name)(adamw(of), lambda step, value, **extra: (value < loss) & (step > 3), forward_extra_args=True)

    ours, theirs = runs(optfn, 0.5), runs(optax, 0.5)
    state, optax_state, update = ours.init(params), theirs.init(to_jax(params)), jax.jit(theirs.update)
    for i, g in enumerate(grads):
        value = (i % 5) / 5
        updates, state = ours.update(g, state, params, value=torch.tensor(value))
        expected, optax_state = update(to_jax(g), optax_state, to_jax(params), value=jnp.float32(value))
        assert_close(updates, from_jax(expected), 1e-12)
    assert state.step == int(optax_state.step) == STEPS
    assert state.inner_state[0].step.tolist() == [int(optax_state.inner_state[0].count)] * 4


def test_conditions_take_none_and_sparse():
    params = {"rows": torch.zeros(3, 2), "none": torch.zeros(1)}
    g = {"rows": torch.sparse_coo_tensor([[1]], [[1.0, 2.0]], (3, 2), check_invariants=True), "none": None}
    tx = optfn.conditionally_mask(optfn.sparse_masked(optfn.scale_by_adam()), lambda step: step == 1)
    updates, state = tx.update(g, tx.init(params), params)
    assert updates["none"] is None
    assert not updates["rows"].to_dense().any()
    updates, state = tx.update(g, state, params)
    assert updates["rows"].to_dense()[1].all()
    assert state.inner_state.step.tolist() == [0, 1]
    # What the inner transformation freezes has an update of 0 then.
    tx = optfn.conditionally_transform(optfn.freeze({"a": True, "b": False}), lambda step: step == 1)
    g = {"a": torch.ones(1), "b": torch.ones(1)}
    first, state = tx.update(g, tx.init(g), g)
    assert_close(first, g, 0)
    assert_close(tx.update(g, state, g)[0], {"a": torch.zeros(1), "b": torch.ones(1)}, 0)


@pytest.mark.parametrize("make", [optfn.conditionally_transform, optfn.conditionally_mask])
def test_a_condition_is_a_bool(make):
    tx = make(optfn.sgd(), lambda step: step)
    with pytest.raises(TypeError, match=r"should_transform_fn must give a bool, got torch.int64 of shape \(\)"):
        tx.update(torch.ones(1), tx.init(torch.ones(1)))
    always = make(optfn.scale(3.0), lambda step: True)
    assert always.update(torch.ones(1), always.init(torch.ones(1)))[0] == 3


# flatten


def test_flatten_keeps_dtypes():
    """Where Optax gives all updates in the widest."""
    params = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.float64), "c": torch.ones(2, dtype=torch.bfloat16)}
    tx, theirs = optfn.flatten(optfn.scale_by_adam()), optax.flatten(optax.scale_by_adam())
    state = tx.init(params)
    assert tree.get(state, "mu").dtype == torch.float64
    updates, state = tx.update(params, state, params)
    assert {name: u.dtype for name, u in updates.items()} == {name: p.dtype for name, p in params.items()}
    jax_params = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.float64)}
    assert theirs.update(jax_params, theirs.init(jax_params))[0]["a"].dtype == jnp.float64
    halves = {"w": torch.ones(3, dtype=torch.bfloat16)}
    assert tree.get(tx.init(halves), "mu").dtype == torch.float32


def test_flatten_takes_complex_none_and_nothing():
    params = {"c": torch.tensor([1 + 2j, 3 - 1j]), "r": torch.ones(()), "n": None}
    g = tree.map(lambda x: 0.5 * x, params)
    tx = optfn.flatten(optfn.scale_by_adam())
    updates, state = tx.update(g, tx.init(params), params)
    expected, _ = optfn.scale_by_adam().update(g, optfn.scale_by_adam().init(params), params)
    assert_close(updates, expected, 1e-6)
    # A leaf without an update: its entries of the state stay.
    absent, after = tx.update({**g, "c": None}, state, params)
    assert absent["c"] is None
    assert torch.equal(after.slots.mu[:4], state.slots.mu[:4])
    assert not torch.equal(after.slots.mu[4:], state.slots.mu[4:])
    assert_close(absent["r"], torch.tensor(1.0), 1e-6)
    for nothing in ({}, {"a": None}):
        updates, _ = tx.update(nothing, tx.init(nothing), nothing)
        assert updates == nothing


# snapshot, monitor, measure_with_ema


def norms(of):
    return lambda updates: {"size": of.tree.norm(updates), "largest": of.tree.max(updates)}


def looking_on(of):
    double = torch.float64 if of is optfn else jnp.float64  # of a bool the average is float32 by default
    return of.chain(
        momentum(of),
        of.snapshot("seen", norms(of)),
        of.monitor(
            {
                "norm": of.tree.norm,
                "average": of.measure_with_ema(norms(of), 0.9),
                "raw": of.measure_with_ema(lambda updates: of.tree.norm(updates) > 0.3, 0.8, False, double),
                "all": lambda updates: updates,
            }
        ),
        of.clip_by_global_norm(0.3),
    )


def test_measurements_are_optax():
    params, grads = params_and_grads()
    tx, theirs = looking_on(optfn), looking_on(optax)
    state, optax_state, update = tx.init(params), theirs.init(to_jax(params)), jax.jit(theirs.update)
    assert_close(tree.get(state, "seen"), from_jax(optax.tree.get(optax_state, "seen")), 1e-12)
    spec, compiled = tree.flatten(state)[1], counted(tx.update)
    for g in grads:
        updates, state = compiled[0](g, state, params)
        expected, optax_state = update(to_jax(g), optax_state, to_jax(params))
        assert_close(updates, from_jax(expected), 1e-12)
        for name in ("seen", "norm", "average", "raw", "all"):
            part = next(s for s in optax_state if name in getattr(s, "measurement", getattr(s, "measurements", ())))
            measured = getattr(part, "measurement", None) or part.measurements
            assert_close(tree.get(state, name), from_jax(jax.tree.map(jnp.asarray, measured[name])), 1e-12)
    # One structure from the first step on, and so one graph.
    assert tree.flatten(state)[1] == spec
    assert len(compiled[1]) == 1


def test_before_the_first_update_a_monitor_has_zeros():
    params, _ = params_and_grads()
    state = optfn.monitor({"norm": tree.norm, "average": optfn.measure_with_ema(tree.norm, 0.9)}).init(params)
    assert_close(state.measurements, {"norm": torch.tensor(0.0), "average": torch.tensor(0.0)}, 0)
    assert optax.monitor({"norm": optax.tree.norm}).init(to_jax(params)).measurements == {}


def test_what_is_measured_is_the_state_s_own():
    g = {"w": torch.ones(2)}
    for tx in (optfn.snapshot("all", lambda updates: updates), optfn.monitor({"all": lambda updates: updates})):
        state = tx.init(g)
        assert tree.get(state, "all")["w"].data_ptr() != g["w"].data_ptr()
        updates, state = tx.update(g, state)
        assert updates["w"] is g["w"]
        assert tree.get(state, "all")["w"].data_ptr() != g["w"].data_ptr()


def test_measure_with_ema_in_another_dtype():
    tx = optfn.measure_with_ema(tree.norm, 0.9, accumulator_dtype=torch.float64)
    state = tx.init({"w": torch.ones(2)})
    for _ in range(3):
        found, state = tx.update({"w": torch.ones(2)}, state)
        assert state.ema.dtype == torch.float64
    assert_close(found, torch.tensor(2.0).sqrt(), 1e-6)
    with pytest.raises(ValueError, match=r"decay must be >= 0 and < 1, got 1.0"):
        optfn.measure_with_ema(tree.norm, 1.0)


# accumulate


@pytest.mark.parametrize("bound", [1e-3, 0.5, 1e3])
def test_accumulate_skips_large_updates_as_optax(bound):
    params, grads = params_and_grads()
    large = functools.partial(optfn.skip_large_updates, max_squared_norm=bound)
    theirs = functools.partial(optax.skip_large_updates, max_squared_norm=bound)
    tx = optfn.accumulate(adamw(optfn), 3, should_skip_update_fn=large)
    multi = optax.MultiSteps(adamw(optax), 3, should_skip_update_fn=theirs, accumulator_dtype=jnp.float64)
    expected, optax_state = run_optax(multi.gradient_transformation(), params, grads)
    steps, state = run(tx, params, grads)
    assert_close(steps, expected, 1e-12)
    assert_close(state.skip_state, from_jax(optax_state.skip_state), 1e-12)
    assert (state.mini_step, state.gradient_step) == (int(optax_state.mini_step), int(optax_state.gradient_step))
    assert state.skipped == sum(bool(large(g, 0, None)[0]) for g in grads)


@pytest.mark.parametrize("own", [True, False])
def test_accumulate_skips_what_is_not_finite_as_optax(own):
    params, grads = params_and_grads()
    for i in (2, 3, 11):
        grads[i] = {**grads[i], "b": grads[i]["b"] * NAN}
    tx = optfn.accumulate(adamw(optfn), 4, skip_nonfinite=own, should_skip_update_fn=optfn.skip_not_finite)
    multi = optax.MultiSteps(adamw(optax), 4, should_skip_update_fn=optax.skip_not_finite, accumulator_dtype=jnp.float64)
    expected, optax_state = run_optax(multi.gradient_transformation(), params, grads)
    steps, state = run(tx, params, grads)
    assert_close(steps, expected, 1e-12)
    assert_close(state.skip_state, from_jax(optax_state.skip_state), 0)
    assert state.skipped == 3


@pytest.mark.parametrize("value", [1.0, NAN, float("inf")])
def test_skip_functions_are_optax(value):
    g = {"w": torch.tensor([value, 2.0], dtype=torch.float64), "b": [torch.tensor(-value, dtype=torch.float64)]}
    found, expected = optfn.skip_not_finite({**g, "none": None}, None, None), optax.skip_not_finite(to_jax(g), None, None)
    assert_close(found, from_jax(expected), 0)
    for bound in (5.0, 6.0, 7.0):
        found = optfn.skip_large_updates({**g, "none": None}, None, None, bound)
        assert_close(found, from_jax(optax.skip_large_updates(to_jax(g), None, None, bound)), 0)


def test_should_skip_update_fn_gives_a_bool():
    tx = optfn.accumulate(optfn.sgd(), 2, should_skip_update_fn=lambda updates, step, params: (step, ()))
    with pytest.raises(ValueError, match=r"should_skip_update_fn must give a bool, got torch.int64 of shape \(\)"):
        tx.init(torch.ones(1))


# inject_stateful_hyperparams


class ByValue:
    """A rate that falls with every loss: a schedule with a state, in torch's arithmetic or in jax's."""

    def __init__(self, zero):
        self.zero = zero

    def init(self):
        return {"sum": self.zero, "count": 0 * self.zero}

    def update(self, state, *, value, **extra):
        return {"sum": state["sum"] + value, "count": state["count"] + 1}

    def __call__(self, state, *, value=0.0, **extra):
        return 0.1 / (1 + state["sum"] + value)


def test_a_stateful_schedule_is_optax():
    params, grads = params_and_grads()
    mine, theirs = ByValue(torch.tensor(0.0, dtype=torch.float64)), ByValue(jnp.float64(0.0))
    decay = lambda step: 0.1 * 0.9**step  # noqa: E731
    tx = optfn.inject_stateful_hyperparams(lambda lr=0.1, wd=0.1: optfn.chain(optfn.add_decayed_weights(wd), optfn.scale(-1 * lr)))(
        lr=mine, wd=optfn.WrappedSchedule(decay)
    )
    with pytest.warns(DeprecationWarning, match="use inject_hyperparams"):
        made = optax.inject_stateful_hyperparams(lambda lr, wd: optax.chain(optax.add_decayed_weights(wd), optax.scale(-1 * lr)))
    optax_tx = made(lr=theirs, wd=optax.schedules.WrappedSchedule(lambda step: 0.1 * jnp.float64(0.9) ** step))
    state, optax_state, update = tx.init(params), optax_tx.init(to_jax(params)), jax.jit(optax_tx.update)
    assert tree.get(state, "lr").item() == 0.1
    compiled, graphs = counted(tx.update)
    for i, g in enumerate(grads):
        updates, state = compiled(g, state, params, value=torch.tensor(0.1 * i, dtype=torch.float64))
        expected, optax_state = update(to_jax(g), optax_state, to_jax(params), value=jnp.float64(0.1 * i))
        assert_close(updates, from_jax(expected), 1e-12)
        for name in ("lr", "wd"):
            assert_close(tree.get(state, name), from_jax(optax_state.hyperparams[name]), 1e-12)
    assert_close(state.hyperparams_states[0], from_jax(optax_state.hyperparams_states["lr"]), 1e-12)
    assert state.hyperparams_states[1].count == STEPS
    assert len(graphs) <= 2  # Dynamo gives up the first attempt where a 0-dim float64 tensor comes in


def test_a_stateful_schedule_saves_and_donates():
    params, grads = params_and_grads()
    tx = optfn.inject_hyperparams(optfn.sgd)(lr=ByValue(torch.tensor(0.0)))
    state = tx.init(params)
    assert len({x.data_ptr() for x in tree.leaves(state)}) == len(tree.leaves(state))
    for g in grads[:3]:
        _, state = tx.update(g, state, params, value=1.0)
    again = tree.from_flat_dict(tree.to_flat_dict(state), like=tx.init(params))
    assert_close(again, state, 0)
    assert tree.get(state, "lr").item() == pytest.approx(0.1 / 4)
    with pytest.raises(ValueError, match="'lr' is computed at each step"):
        tree.set(state, lr=0.5)


# incremental_update, periodic_update


@pytest.mark.parametrize("step_size", [0.0, 0.25, 1.0])
def test_incremental_update_is_optax(step_size):
    new, old = params_and_grads()[0], some_grads(2, shapes=SHAPES)[0]
    expected = from_jax(optax.incremental_update(to_jax(new), to_jax(old), step_size))
    assert_close(optfn.incremental_update(new, old, step_size), expected, 1e-14)
    assert_close(optfn.incremental_update(new, old, torch.tensor(step_size)), expected, 1e-14)
    # The old one's dtype; None leaves it as it is, where Optax makes it None.
    wide = optfn.incremental_update(
        {"w": torch.ones(2, dtype=torch.bfloat16), "b": None}, {"w": torch.zeros(2), "b": torch.ones(1)}, 0.1
    )
    assert_close(wide, {"w": torch.full((2,), 0.1), "b": torch.ones(1)}, 1e-7)
    assert wide["w"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"step_size must be >= 0 and <= 1, got 1.5"):
        optfn.incremental_update(new, old, 1.5)


def test_periodic_update_is_optax():
    new, old = params_and_grads()[0], some_grads(2, shapes=SHAPES)[0]
    for steps in range(7):
        expected = from_jax(optax.periodic_update(to_jax(new), to_jax(old), steps, 3))
        assert_close(optfn.periodic_update(new, old, steps, 3), expected, 0)
        assert_close(optfn.periodic_update(new, old, torch.tensor(steps), torch.tensor(3)), expected, 0)
    assert optfn.periodic_update({"b": None}, {"b": torch.ones(1)}, 0, 3)["b"] == 1
    with pytest.raises(ValueError, match="update_period must be >= 1, got 0"):
        optfn.periodic_update(new, old, 1, 0)


def test_averages_trace_and_batch():
    new, old = params_and_grads()[0], some_grads(2, shapes=SHAPES)[0]

    def both(step_size, steps):
        return optfn.incremental_update(new, old, step_size), optfn.periodic_update(new, old, steps, 2)

    given = (torch.tensor([0.25, 0.5], dtype=torch.float64), torch.tensor([1, 2]))
    expected = tree.map(lambda *x: torch.stack(x), *(both(a, n) for a, n in zip(*given, strict=True)))
    assert_close(torch.vmap(both)(*given), expected, 1e-14)
    compiled, graphs = counted(both)
    for a, n in zip(*given, strict=True):
        assert_close(compiled(a, n), both(a, n), 1e-14)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda n: optfn.sam(optfn.sgd(0.1), optfn.sgd(0.1), sync_period=n),
        lambda n: optfn.lookahead(optfn.sgd(0.1), n, 0.5),
        lambda n: optfn.mechanize(optfn.sgd(0.1), num_betas=n),
        lambda n: optfn.schedule_free_sgd(0.1, warmup_steps=n),
        lambda n: optfn.galore(0.1, update_proj_gap=n),
        lambda n: optfn.galore(0.1, rank=n),
        lambda n: optfn.sophia(0.1, update_interval=n),
    ],
)
def test_a_number_of_steps_is_an_int(make):
    with pytest.raises(TypeError, match="must be an int, got float"):
        make(2.5)


@pytest.mark.parametrize("make", [optfn.schedule_free_sgd, optfn.schedule_free_adamw])
def test_schedule_free_learning_in_a_torch_optimizer(make):
    w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    opt = optfn.interop.TorchOptimizer([w], make, lr=0.1)
    tx, p = make(lr=0.1), {"w": w.detach().clone()}
    state = tx.init(p)
    for _ in range(3):
        w.grad = w.detach().clone()
        opt.step()
        updates, state = tx.update(p, state, p)
        p = optfn.apply_updates(p, updates)
        torch.testing.assert_close(w.detach(), p["w"])


def test_an_injected_b1_of_schedule_free_learning_acts():
    tx = optfn.inject_hyperparams(optfn.schedule_free_sgd)(lr=0.1, b1=optfn.linear_schedule(0.9, 0.1, 4))
    p = {"w": torch.ones(2)}
    state = tx.init(p)
    for b1 in (0.9, 0.7, 0.5):
        _, state = tx.update(p, state, p)
        assert optfn.tree.get(state.inner_state, "b1").item() == pytest.approx(b1)


@pytest.mark.parametrize("tx", [optfn.galore(), optfn.sam(optfn.sgd(0.1), optfn.sgd(0.1))], ids=["galore", "sam"])
def test_sparse_gradients_are_refused_by_name(tx):
    p = {"w": torch.ones(2, 2)}
    with pytest.raises(TypeError, match="'w' has a sparse gradient"):
        tx.update({"w": torch.ones(2, 2).to_sparse()}, tx.init(p), p)
