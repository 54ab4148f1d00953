"""Wrappers against Optax, torch's gradient accumulation, parameter averages, learning rates and sparse optimizers."""

import jax.numpy as jnp
import optax
import pytest
import torch
from optax_oracle import TOLERANCE, assert_close, counted, exact, from_jax, run, run_optax, some_grads, some_params, to_jax

import optfn

NAN, INF = float("nan"), float("inf")


def spoiled(g, value):
    """One entry of one leaf is not finite."""
    w = g["w"].clone()
    w[1, 0] = value
    return {**g, "w": w}


# accumulate


@pytest.mark.parametrize(
    ("k", "optax_k"),
    [
        (1, 1),
        (3, 3),
        # k of the steps taken so far: 1, 2, 3, 3 ...
        (lambda step: (step + 1).clamp(max=3), lambda step: jnp.minimum(step + 1, 3)),
    ],
    ids=["1", "3", "schedule"],
)
@pytest.mark.parametrize("mean", [True, False])
def test_accumulate_is_multi_steps(k, optax_k, mean):
    inner = optfn.chain(optfn.scale_by_adam(), optfn.add_decayed_weights(0.1), optfn.scale(-0.1))
    theirs = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-0.1))
    multi = optax.MultiSteps(theirs, optax_k, use_grad_mean=mean, accumulator_dtype=jnp.float64)
    expected, optax_state = run_optax(multi.gradient_transformation(), some_params(), some_grads(13))
    for dtype, tolerance in TOLERANCE.items():
        steps, state = run(optfn.accumulate(inner, k, use_grad_mean=mean), some_params(dtype), some_grads(13, dtype))
        assert_close(steps, expected, tolerance)
        assert state.mini_step == int(optax_state.mini_step)
        assert state.gradient_step == int(optax_state.gradient_step)
        assert {x.dtype for x in optfn.tree.leaves(steps)} == {dtype}
        assert {x.dtype for x in optfn.tree.leaves(state.accumulated)} == {dtype}


def test_accumulate_is_gradient_accumulation_of_torch():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(12)]
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    tx = optfn.accumulate(optfn.adamw(lr=0.05), 3)
    state = tx.init(params)
    for i, x in enumerate(batches):
        (model(x).square().mean() / 3).backward()
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        grads = torch.func.grad(lambda p, x=x: torch.func.functional_call(model, p, (x,)).square().mean())(params)
        updates, state = tx.update(grads, state, params)
        params = optfn.apply_updates(params, updates)
        assert_close(params, dict(model.named_parameters()), 1e-12)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_micro_batch_that_is_not_finite_is_as_if_it_had_not_been(value):
    """Whereas one NaN stays in Optax's accumulator for ever."""
    grads = some_grads(12)
    with_bad = [grads[0], spoiled(grads[0], value), *grads[1:7], spoiled(grads[0], value), spoiled(grads[1], value), *grads[7:]]
    tx = optfn.accumulate(optfn.adamw(lr=0.1), 3)
    steps, state = run(tx, some_params(), with_bad)
    expected, clean = run(tx, some_params(), grads)
    for i in (1, 8, 9):  # nothing moves there
        assert_close(steps[i]["updates"], optfn.tree.map(torch.zeros_like, some_params()), 0)
    assert_close([steps[i] for i in range(15) if i not in (1, 8, 9)], expected, 0)
    assert state.skipped == 3
    assert_close(state._replace(skipped=clean.skipped), clean, 0)


def test_accumulate_lets_everything_in_if_told_to():
    steps, state = run(optfn.accumulate(optfn.sgd(), 2, skip_nonfinite=False), some_params(), [spoiled(some_grads()[0], NAN)] * 2)
    assert steps[1]["params"]["w"].isnan().any()
    assert state.skipped == 0


def test_none_in_accumulate():
    """None adds nothing; where it stands when the step is taken, the leaf sits out and keeps what it has."""
    tx = optfn.accumulate(optfn.trace(0.5), 2)
    params = {"a": torch.zeros(1), "b": torch.zeros(1), "c": None}
    state, seen = tx.init(params), []
    for a, b in ((1.0, 10.0), (3.0, None), (None, 20.0), (4.0, None), (None, None), (None, 40.0)):
        grads = {"a": a, "b": b, "c": None}
        updates, state = tx.update({k: None if x is None else torch.tensor([x]) for k, x in grads.items()}, state, params)
        seen.append([None if updates[name] is None else updates[name].item() for name in "abc"])
    assert seen == [
        [0.0, 0.0, None],
        [2.0, None, None],  # b keeps 10 / 2
        [None, 0.0, None],
        [0.5 * 2.0 + 4.0 / 2, None, None],  # b keeps (10 + 20) / 2
        [None, None, None],
        [None, (10.0 + 20.0 + 40.0) / 2, None],  # the first step of b's momentum
    ]
    assert optfn.tree.get(state, "inner_state").step.tolist() == [2, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_gathered_in_float32(dtype):
    tx = optfn.accumulate(optfn.scale(1.0), 256)
    params = {"w": torch.zeros(3, dtype=dtype)}
    state = tx.init(params)
    for _ in range(256):
        updates, state = tx.update({"w": torch.full((3,), 1.01, dtype=dtype)}, state, params)
    assert state.accumulated["w"].dtype == torch.float32
    # A sum in half precision stops growing long before.
    assert torch.equal(updates["w"], torch.full((3,), 1.01, dtype=dtype))


def test_every_k_is_checked():
    with pytest.raises(ValueError, match="every_k must be >= 1, got 0"):
        optfn.accumulate(optfn.sgd(), 0)


# apply_if_finite


SCHEDULED = (
    optfn.scale_by_schedule(optfn.polynomial_schedule(-0.1, 0.0, 1, 16)),
    optax.scale_by_schedule(exact(optax.polynomial_schedule(-0.1, 0.0, 1, 16))),
)
MOMENTUM = (optfn.chain(optfn.trace(0.9), optfn.scale(-0.1)), optax.chain(optax.trace(0.9), optax.scale(-0.1)))


# A bad gradient that is let through must not stay in the state, where we see it and Optax does not; with 5 none is.
@pytest.mark.parametrize(("most", "pair"), [(0, SCHEDULED), (1, SCHEDULED), (2, SCHEDULED), (5, SCHEDULED), (5, MOMENTUM)])
def test_apply_if_finite_is_optax(most, pair):
    grads = some_grads(14)
    for i, value in ((2, NAN), (5, INF), (6, -INF), (9, NAN), (10, NAN), (11, NAN)):
        grads[i] = spoiled(grads[i], value)
    inner, theirs = pair
    steps, state = run(optfn.apply_if_finite(inner, most), some_params(), grads)
    expected, optax_state = run_optax(optax.apply_if_finite(theirs, most), some_params(), grads)
    assert_close(steps, expected, 1e-12)
    for name in ("notfinite_count", "last_finite", "total_notfinite"):
        assert getattr(state, name) == getattr(optax_state, name).item(), name


def test_apply_if_finite_never_gives_up_by_default():
    good, bad = some_grads(2)[0], spoiled(some_grads()[0], NAN)
    steps, state = run(optfn.apply_if_finite(optfn.adam()), some_params(), [good, *[bad] * 20, good])
    expected, _ = run(optfn.adam(), some_params(), [good, good])
    assert_close([steps[0], steps[-1]], expected, 0)
    assert (state.total_notfinite, state.notfinite_count) == (20, 0)


def test_apply_if_finite_catches_an_overflow_inside():
    """The gradient is finite, the update is not: Optax lets it through."""
    g, params = {"w": torch.tensor([1e30, 1.0])}, {"w": torch.zeros(2)}
    ours, theirs = optfn.apply_if_finite(optfn.scale(1e30), 3), optax.apply_if_finite(optax.scale(jnp.float32(1e30)), 3)
    updates, state = ours.update(g, ours.init(params), params)
    assert torch.equal(updates["w"], torch.zeros(2))
    assert state.total_notfinite == 1
    jax_g = {"w": jnp.array([1e30, 1.0], jnp.float32)}
    assert from_jax(theirs.update(jax_g, theirs.init(jax_g))[0])["w"].isinf().any()


def test_apply_if_finite_takes_none_and_sparse():
    tx = optfn.apply_if_finite(optfn.sparse_masked(optfn.scale_by_adam(), dense="pass"))
    params = {"rows": torch.zeros(3, 2), "w": torch.zeros(2), "none": torch.zeros(1)}
    good = {"rows": rows([[1]], [[1.0, 2.0]], (3, 2)), "w": torch.ones(2), "none": None}
    state = tx.init(params)
    updates, state = tx.update({**good, "rows": good["rows"] * NAN}, state, params)
    assert torch.equal(updates["rows"].to_dense(), torch.zeros(3, 2))
    assert updates["none"] is None
    assert_close(state.inner_state, tx.init(params).inner_state, 0)
    updates, state = tx.update(good, state, params)
    assert updates["rows"].to_dense()[1].all()
    assert optfn.tree.get(state, "mu")["rows"][1].all()


# ema_params


@pytest.mark.parametrize("decay", [0.9, 0.0, 1.0, None])
@pytest.mark.parametrize(("dtype", "average_dtype"), [(torch.float64, None), (torch.float32, None), (torch.float32, torch.float64)])
def test_ema_params_is_averaged_model(decay, dtype, average_dtype):
    multi = None if decay is None else torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    # torch cannot average in another dtype than the model's: it is shown a copy in that.
    shown = torch.nn.ParameterDict(some_params(average_dtype or dtype))
    averaged = torch.optim.swa_utils.AveragedModel(shown, multi_avg_fn=multi)
    tx = optfn.chain(optfn.sgd(lr=0.3), optfn.ema_params(decay, average_dtype=average_dtype))
    params = some_params(dtype)
    state = tx.init(params)
    for g in some_grads(dtype=dtype):
        updates, state = tx.update(g, state, params)
        params = optfn.apply_updates(params, updates)
        shown.load_state_dict(params)
        averaged.update_parameters(shown)
        average = optfn.tree.get(state, "average")
        assert {x.dtype for x in average.values()} == {average_dtype or dtype}
        assert_close(average, dict(averaged.module), TOLERANCE[average_dtype or dtype])


def test_ema_params_of_bfloat16_in_float32():
    tx, params = optfn.ema_params(0.999, average_dtype=torch.float32), {"w": torch.full((3,), 1.0).bfloat16()}
    state, expected = tx.init(params), 1.0
    for step in range(20):
        updates = {"w": torch.full((3,), 0.25).bfloat16()}
        _, state = tx.update(updates, state, params)
        params = optfn.apply_updates(params, updates)
        p = params["w"][0].item()
        expected = p if step == 0 else 0.999 * expected + 0.001 * p
    assert_close(state.average["w"], torch.full((3,), expected), 1e-6)
    assert state.average["w"].dtype == torch.float32


def test_ema_params_averages_what_sits_out():
    """As AveragedModel does, which knows nothing of gradients; None params are not there."""
    tx = optfn.ema_params(0.5)
    params = {"w": torch.zeros(1), "b": None}
    state = tx.init(params)
    for value in (8.0, 4.0):
        updates, state = tx.update({"w": None, "b": None}, state, {"w": torch.tensor([value]), "b": None})
    assert updates == {"w": None, "b": None}
    assert (state.average["w"].item(), state.average["b"]) == (6.0, None)


def drifting(average, p, n):
    """An average whose weight falls more slowly than 1 / n, of one tensor and the number of values in it."""
    return average + (p - average) * 3 / (n + 3)


@pytest.mark.parametrize(
    ("avg_fn", "ours"),
    [
        (None, {"decay": None}),
        (torch.optim.swa_utils.get_swa_avg_fn(), {"decay": None}),
        (torch.optim.swa_utils.get_ema_avg_fn(0.9), {"decay": 0.9}),
        (torch.optim.swa_utils.get_swa_avg_fn(), {"avg_fn": torch.optim.swa_utils.get_swa_avg_fn()}),
        (torch.optim.swa_utils.get_ema_avg_fn(0.9), {"avg_fn": torch.optim.swa_utils.get_ema_avg_fn(0.9)}),
        (drifting, {"avg_fn": drifting}),
    ],
    ids=["default", "swa", "ema", "torch's swa", "torch's ema", "own"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_ema_params_is_averaged_model_with_avg_fn(avg_fn, ours, dtype):
    params, grads = some_params(dtype), some_grads(dtype=dtype)
    shown = torch.nn.ParameterDict(params)
    averaged = torch.optim.swa_utils.AveragedModel(shown, avg_fn=avg_fn)
    tx = optfn.chain(optfn.sgd(lr=0.3), optfn.ema_params(**ours))
    state = tx.init(params)
    compiled, graphs = counted(tx.update)
    for g in grads:
        updates, state = compiled(g, state, params)
        params = optfn.apply_updates(params, updates)
        shown.load_state_dict(params)
        averaged.update_parameters(shown)
        assert_close(optfn.tree.get(state, "average"), dict(averaged.module), TOLERANCE.get(dtype, 1e-12))
    assert optfn.tree.get(state, "count") == averaged.n_averaged
    assert len(graphs) == 1


@pytest.mark.parametrize("decay", [0.9, None])
def test_ema_params_of_buffers_and_from_some_step_on(decay):
    """AveragedModel with use_buffers, updated every third step: a pair of its own, given a state_dict and no updates."""
    multi = None if decay is None else torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    model = torch.nn.BatchNorm1d(3).double()
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=multi, use_buffers=True)
    tx, generator = optfn.ema_params(decay), torch.Generator().manual_seed(0)
    state = tx.init(model.state_dict())
    for step in range(12):
        x = torch.randn(5, 3, generator=generator, dtype=torch.float64) + step
        model(x).square().sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
        if step > 3 and step % 3 == 0:
            averaged.update_parameters(model)
            now = model.state_dict()
            _, state = tx.update(dict.fromkeys(now), state, now)
    assert_close(state.average, averaged.module.state_dict(), 1e-12)


# inject_hyperparams


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            optfn.inject_hyperparams(optfn.scale_by_adam)(b1=0.8, b2=0.95, eps=1e-6, eps_root=1e-6),
            optax.inject_hyperparams(optax.scale_by_adam)(b1=0.8, b2=0.95, eps=1e-6, eps_root=1e-6),
        ),
        (
            optfn.inject_hyperparams(optfn.add_decayed_weights)(optfn.linear_schedule(1.0, 0.0, 8)),
            optax.inject_hyperparams(optax.add_decayed_weights)(optax.linear_schedule(1.0, 0.0, 8)),
        ),
        (
            optfn.inject_hyperparams(optfn.clip_by_global_norm)(optfn.piecewise_constant_schedule(0.5, {3: 0.5, 6: 0.25})),
            optax.inject_hyperparams(optax.clip_by_global_norm)(optax.piecewise_constant_schedule(0.5, {3: 0.5, 6: 0.25})),
        ),
        (
            optfn.inject_hyperparams(optfn.trace, static_args="nesterov")(decay=optfn.linear_schedule(0.5, 1.0, 8), nesterov=True),
            optax.inject_hyperparams(optax.trace, static_args="nesterov")(decay=optax.linear_schedule(0.5, 1.0, 8), nesterov=True),
        ),
    ],
    ids=["adam", "scheduled decay", "scheduled norm", "scheduled momentum"],
)
def test_inject_hyperparams_is_optax(ours, theirs):
    expected, _ = run_optax(theirs, some_params(), some_grads())
    assert_close(run(ours, some_params(), some_grads())[0], expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_setting_lr_is_setting_it_in_a_param_group(dtype):
    leaves = optfn.tree.map(torch.nn.Parameter, some_params(dtype))
    optimizer = torch.optim.AdamW(leaves.values(), lr=0.1)
    params, grads = some_params(dtype), some_grads(dtype=dtype)
    tx = optfn.inject_hyperparams(optfn.adamw)(lr=0.1)
    state = tx.init(params)
    compiled, graphs = counted(tx.update)
    for step, g in enumerate(grads):
        lr = 0.1 * 0.8**step
        optimizer.param_groups[0]["lr"] = lr
        state = optfn.tree.set(state, lr=lr)
        assert optfn.tree.get(state, "lr").item() == lr
        if step == 5:
            optimizer.param_groups[0].update(betas=(0.5, 0.75), weight_decay=0.5)
            state = optfn.tree.set(state, betas=(0.5, 0.75), weight_decay=0.5)
        for name, p in leaves.items():
            p.grad = g[name].clone()
        optimizer.step()
        updates, state = compiled(g, state, params)
        params = optfn.apply_updates(params, updates)
        assert_close(params, leaves, TOLERANCE[dtype])
    assert len(graphs) == 1


def test_half_precision_params_keep_their_hyperparameters():
    """Where Optax makes b2=.999 a 1 in bfloat16, and the first step NaN."""
    params, g = {"w": torch.ones(3).bfloat16()}, {"w": torch.full((3,), 0.5).bfloat16()}
    tx = optfn.inject_hyperparams(optfn.adam)(lr=0.125)
    state = tx.init(params)
    assert optfn.tree.get(state, "betas")[1].item() == 0.999
    updates, _ = tx.update(g, state, params)
    assert torch.equal(updates["w"], torch.full((3,), -0.125).bfloat16())
    theirs = optax.inject_hyperparams(optax.adam)(0.125)
    jax_params = {"w": jnp.ones(3, jnp.bfloat16)}
    assert jnp.isnan(theirs.update({"w": jnp.full(3, 0.5, jnp.bfloat16)}, theirs.init(jax_params))[0]["w"]).all()


def test_what_is_injected():
    mask = {"w": True, "b": False, "s": False}
    tx = optfn.inject_hyperparams(optfn.adamw)(optfn.linear_schedule(1.0, 0.0, 4), eps=0, mask=mask, amsgrad=True)
    state = tx.init(some_params())
    assert {*state.hyperparams} == {"betas", "eps", "weight_decay"}
    assert [*state.scheduled] == ["lr"]
    assert all(x.dtype == torch.float64 and x.ndim == 0 for x in optfn.tree.leaves((state.hyperparams, state.scheduled)))
    assert [x.item() for x in state.hyperparams["betas"]] == [0.9, 0.999]
    plain = optfn.adamw(optfn.linear_schedule(1.0, 0.0, 4), eps=0, mask=mask, amsgrad=True)
    assert_close(run(tx, some_params(), some_grads())[0], run(plain, some_params(), some_grads())[0], 1e-14)
    # A default of 0 switches a part off and stays static, given or not; a tensor is there to be set.
    for options in ({}, {"momentum": 0.0}, {"momentum": 0}):
        assert "momentum" not in optfn.inject_hyperparams(optfn.sgd)(**options).init(some_params()).hyperparams
    assert "momentum" in optfn.inject_hyperparams(optfn.sgd)(momentum=torch.tensor(0.0)).init(some_params()).hyperparams
    assert "eps" not in optfn.inject_hyperparams(optfn.adam, static_args=["eps"])().init(some_params()).hyperparams
    kept = optfn.inject_hyperparams(optfn.sgd, hyperparam_dtype=torch.float32)().init(some_params())
    assert optfn.tree.get(kept, "lr").dtype == torch.float32


def test_betas_may_hold_an_int_and_a_tensor():
    betas = (0, torch.tensor(0.75, dtype=torch.float64))
    tx = optfn.inject_hyperparams(optfn.adam)(betas=betas)
    state = tx.init(some_params())
    assert [x.item() for x in optfn.tree.get(state, "betas")] == [0.0, 0.75]
    assert_close(run(tx, some_params(), some_grads())[0], run(optfn.adam(betas=(0.0, 0.75)), some_params(), some_grads())[0], 1e-14)


def test_a_scheduled_value_is_read_but_not_set():
    tx = optfn.inject_hyperparams(optfn.sgd)(lr=optfn.linear_schedule(1.0, 0.0, 4))
    state, seen = tx.init(some_params()), []
    for g in some_grads(5):
        seen.append(optfn.tree.get(state, "lr").item())
        _, state = tx.update(g, state, some_params())
    assert seen == [1.0, 1.0, 0.75, 0.5, 0.25]  # what the last update used; before the first what it will use
    with pytest.raises(ValueError, match="'lr' is computed at each step"):
        optfn.tree.set(state, lr=0.5)


def test_a_factory_of_ones_own():
    def mine(rate, steps: int, flip: bool = False, *, power=2.0):
        assert type(steps) is int
        assert type(flip) is bool
        assert isinstance(power, float | torch.Tensor)
        return optfn.chain(*[optfn.scale(rate**power)] * steps, optfn.scale(-1 if flip else 1))

    # An argument without a default is a number if it is given as one, so that an int has to be named.
    make = optfn.inject_hyperparams(mine, static_args="steps")
    tx = make(0.5, 3, flip=True)
    state = tx.init(torch.ones(2))
    assert {*state.hyperparams} == {"rate", "power"}
    assert_close(tx.update(torch.ones(2), state)[0], torch.full((2,), -(0.25**3)), 0)
    assert_close(tx.update(torch.ones(2), optfn.tree.set(state, rate=2.0, power=1.0))[0], torch.full((2,), -8.0), 0)
    with pytest.raises(TypeError, match="missing 2 required positional arguments: 'rate' and 'steps'"):
        make()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: optfn.inject_hyperparams(optfn.sgd, "learning_rate"), ValueError, "static_args names learning_rate"),
        (lambda: optfn.inject_hyperparams(optfn.chain), ValueError, "inject_hyperparams needs named arguments"),
        (lambda: optfn.inject_hyperparams(lambda **numbers: optfn.sgd()), ValueError, "inject_hyperparams needs named arguments"),
        (lambda: optfn.inject_hyperparams(optfn.adam)(lr=-1.0), ValueError, "lr must be >= 0, got -1.0"),
        (lambda: optfn.inject_hyperparams(optfn.adam)(momentum=0.9), TypeError, "adam has no argument 'momentum'"),
    ],
)
def test_inject_hyperparams_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# sparse_masked


def rows(indices, values, shape, dtype=torch.float32):
    return torch.sparse_coo_tensor(torch.tensor(indices), torch.tensor(values, dtype=dtype), shape, check_invariants=True)


def sparse_grads(steps=12, dtype=torch.float64):
    """Rows of a 6 by 2 matrix; some occur twice, one gradient has none."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for step in range(steps):
        count = 0 if step == 4 else 1 + step % 4
        indices = torch.randint(6, (1, count), generator=generator)
        values = torch.randn(count, 2, generator=generator).to(dtype)
        made.append(torch.sparse_coo_tensor(indices, values, (6, 2), check_invariants=True))
    assert any(len(g._indices()[0].unique()) < len(g._indices()[0]) for g in made)
    return made


def by_rows(tx, params, grads):
    """The dense rule, of which only the rows that a gradient holds are taken; what has no rows, as counts, moves always."""
    state, steps = tx.init(params), []
    for g in grads:
        touched = torch.isin(torch.arange(len(params)), g._indices()[0])[:, None]
        updates, new = tx.update(g.to_dense(), state, params)

        def rows_of(x, old, touched=touched, shape=params.shape):
            return torch.where(touched, x, old) if x.shape == shape else x

        updates, state = rows_of(updates, torch.zeros_like(updates)), optfn.tree.map(rows_of, new, state)
        params = params + updates
        steps.append({"updates": updates, "params": params})
    return steps, state


ELEMENTWISE = {
    "adam": optfn.adam(lr=0.1),
    "adagrad": optfn.chain(optfn.scale_by_adagrad(), optfn.scale(-0.1)),
    "rmsprop": optfn.rmsprop(lr=0.1, centered=True, momentum=0.9),
    "chain": optfn.chain(optfn.clip(0.5), optfn.scale_by_adam(amsgrad=True), optfn.add_decayed_weights(0.1), optfn.scale(-0.1)),
    "scheduled": optfn.adam(lr=optfn.linear_schedule(0.1, 0.0, 9)),
    "injected": optfn.inject_hyperparams(optfn.adam)(lr=0.1),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_sparse_masked_is_the_dense_rule_on_the_touched_rows(name):
    params, grads = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(6, 2), sparse_grads()
    steps, state = run(optfn.sparse_masked(ELEMENTWISE[name]), params, grads)
    expected, expected_state = by_rows(ELEMENTWISE[name], params, grads)
    assert_close(steps, expected, 1e-12)
    assert_close(state, expected_state, 1e-12)
    for g, step in zip(grads, steps, strict=True):
        assert step["updates"].layout == torch.sparse_coo
        assert torch.equal(step["updates"].coalesce().indices(), g.coalesce().indices())


@pytest.mark.parametrize(
    ("tx", "make"),
    [
        (optfn.sparse_masked(optfn.chain(optfn.scale_by_adagrad(0.1), optfn.scale(-0.3))), "Adagrad"),
        (optfn.sparse_masked(optfn.chain(optfn.scale_by_adam(eps_hat=True), optfn.scale(-0.3))), "SparseAdam"),
    ],
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sparse_masked_is_torch(tx, make, dtype):
    arguments = {"lr": 0.3, "initial_accumulator_value": 0.1} if make == "Adagrad" else {"lr": 0.3}
    params = {"rows": torch.linspace(-1, 1, 12, dtype=dtype).reshape(6, 2)}
    p = torch.nn.Parameter(params["rows"].clone())
    optimizer, state = getattr(torch.optim, make)([p], **arguments), tx.init(params)
    for g in sparse_grads(dtype=dtype):
        p.grad = g.clone()
        optimizer.step()
        updates, state = tx.update({"rows": g}, state, params)
        params = optfn.apply_updates(params, updates)
        assert_close(params, {"rows": p}, TOLERANCE[dtype])


def test_sparse_entries_without_dense_dimensions():
    """Two sparse dimensions: single entries, not rows."""
    g = torch.sparse_coo_tensor(torch.tensor([[0, 2, 0], [1, 1, 1]]), torch.tensor([1.0, 2.0, 3.0]), (3, 2), check_invariants=True)
    tx = optfn.sparse_masked(optfn.scale_by_adam())
    updates, state = tx.update(g, tx.init(torch.zeros(3, 2)))
    expected = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    assert_close(updates, expected, 1e-6)
    assert_close(state.slots.mu, 0.1 * torch.tensor([[0.0, 4.0], [0.0, 0.0], [0.0, 2.0]]), 1e-6)


@pytest.mark.parametrize("dense", ["pass", "zeros_absent"])
def test_dense_gradients(dense):
    params = {"rows": torch.ones(6, 2, dtype=torch.float64), "w": torch.ones(3, dtype=torch.float64), "none": torch.ones(2)}
    dense_grads = [torch.tensor([step % 2, 1.0, -0.5 * (step % 3)], dtype=torch.float64) for step in range(12)]
    grads = [{"rows": g, "w": w, "none": None} for g, w in zip(sparse_grads(), dense_grads, strict=True)]
    inner = ELEMENTWISE["adam"]
    steps, state = run(optfn.sparse_masked(inner, dense=dense), params, grads)
    expected, _ = by_rows(inner, params["rows"], [g["rows"] for g in grads])
    assert_close([step["params"]["rows"] for step in steps], [step["params"] for step in expected], 1e-12)
    assert steps[-1]["params"]["none"] is params["none"]
    assert optfn.tree.get(state, "step").tolist() == [0, 12, 12]
    if dense == "pass":
        expected, _ = run(inner, params["w"], dense_grads)
    else:  # the entries that are not zero are the ones that a sparse gradient would hold
        expected, _ = run(optfn.sparse_masked(inner), params["w"], [w.to_sparse() for w in dense_grads])
    assert_close([step["params"]["w"] for step in steps], [step["params"] for step in expected], 1e-12)


def test_sparse_masked_tells_hyperparameters_from_parameters():
    """Two params in a tuple, as betas are, and a 0-dim one, as lr is."""
    g, tx = sparse_grads()[3], optfn.sparse_masked(optfn.inject_hyperparams(optfn.adam)(lr=0.1), dense="zeros_absent")
    for dense in (torch.tensor([2.0, 0.0], dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)):
        params = (torch.ones(6, 2, dtype=torch.float64), torch.ones_like(dense))
        updates, state = tx.update((g, dense), tx.init(params), params)
        assert_close(updates[0], by_rows(optfn.adam(lr=0.1), params[0], [g])[0][0]["updates"], 1e-12)
        assert_close(updates[1], -0.1 * dense.sign(), 1e-7)
        assert_close(state.hyperparams, tx.init(params).hyperparams, 0)
    updates, state = tx.update(dense, tx.init(dense), dense)
    assert_close(updates, torch.tensor(-0.1, dtype=torch.float64), 1e-7)
    assert_close(state.hyperparams, tx.init(dense).hyperparams, 0)


def test_sparse_masked_changes_nothing_it_is_given():
    tx = optfn.sparse_masked(optfn.adamw(lr=0.1))
    params, g = {"rows": torch.ones(6, 2, dtype=torch.float64), "bias": torch.ones(2)}, sparse_grads()[3]
    state = tx.init(params)
    tensors = [*optfn.tree.leaves((params, state)), g._values(), g._indices()]
    before = [(x._version, x.clone()) for x in tensors]
    tx.update({"rows": g, "bias": None}, state, params)
    assert all(x._version == version and torch.equal(x, old) for x, (version, old) in zip(tensors, before, strict=True))


def test_sparse_masked_errors():
    tx = optfn.sparse_masked(optfn.scale_by_adam())
    params = {"a": {"rows": torch.zeros(3, 2), "w": torch.zeros(2)}}
    g = {"a": {"rows": rows([[1]], [[1.0, 2.0]], (3, 2)), "w": torch.ones(2)}}
    with pytest.raises(TypeError, match=r"sparse_masked: 'a.w' has a gradient of layout torch.strided, a sparse COO one"):
        tx.update(g, tx.init(params), params)
    with pytest.raises(ValueError, match="sparse_masked takes an elementwise transformation, which clip_by_global_norm is not"):
        optfn.sparse_masked(optfn.clip_by_global_norm(1.0))
    with pytest.raises(ValueError, match="dense must be 'error', 'pass' or 'zeros_absent', got 'drop'"):
        optfn.sparse_masked(optfn.adam(), dense="drop")


def test_to_jax_and_back():
    """The bridge to the oracle loses nothing."""
    assert_close(from_jax(to_jax(some_params())), some_params(), 0)
