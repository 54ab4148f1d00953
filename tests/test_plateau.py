"""Plateau reduction against torch.optim.lr_scheduler.ReduceLROnPlateau, and against Optax's."""

import itertools
import math

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
import torch
from optax_oracle import assert_close, counted, run, some_grads, some_params

import optfn

LR = 0.3
STEPS = 120
NAN, INF = float("nan"), float("inf")


def noise(seed, steps=STEPS):
    return torch.randn(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()


METRICS = {
    "falls, then stays": [max(1.0 - 0.05 * t, 0.2) for t in range(STEPS)],
    "rises, then stays": [min(0.05 * t, 2.0) for t in range(STEPS)],
    "constant": [1.0] * STEPS,
    "noise": noise(0),
    "falling noise": [2 * math.exp(-t / 30) + 0.1 * x for t, x in enumerate(noise(1))],
    "rising noise": [-2 * math.exp(-t / 30) + 0.1 * x for t, x in enumerate(noise(2))],
    "by less and less": [1 + 1 / (1 + t) for t in range(STEPS)],
    "below zero": [-1 - 0.01 * t for t in range(STEPS)],
    "NaN, inf": [NAN if t % 7 == 3 else INF if t % 11 == 5 else 1 / (1 + t // 4) for t in range(STEPS)],
}
# torch's arguments.
SETTINGS = [
    {"mode": mode, "threshold_mode": threshold_mode, "threshold": threshold, **rest}
    for mode, (threshold_mode, threshold), rest in itertools.product(
        ("min", "max"),
        (("rel", 1e-4), ("rel", 0.05), ("abs", 0.02), ("rel", 0.0)),
        (
            {},
            {"patience": 0, "factor": 0.5},
            {"patience": 3, "cooldown": 5, "factor": 0.9},
            {"patience": 2, "factor": 0.3, "min_lr": 0.01},
            {"patience": 2, "cooldown": 1, "factor": 0.5, "eps": 0.005},
        ),
    )
]


def ours(mode="min", factor=0.1, patience=10, threshold=1e-4, threshold_mode="rel", cooldown=0, min_lr=0, eps=1e-8):
    """torch's arguments, and its defaults, in ours."""
    tolerance = {"rtol": threshold} if threshold_mode == "rel" else {"rtol": 0.0, "atol": threshold}
    return optfn.reduce_on_plateau(
        factor, patience + 1, **tolerance, cooldown=cooldown, min_scale=min_lr / LR, mode=mode, eps=eps / LR
    )


def scales(tx, values):
    state, found = tx.init(torch.zeros(1)), []
    for value in values:
        updates, state = tx.update(torch.ones(1, dtype=torch.float64), state, value=value)
        assert updates.item() == state.scale.item()
        found.append(updates.item())
    return found, state


@pytest.mark.parametrize("metrics", METRICS)
def test_reduce_on_plateau_is_torch(metrics):
    fell = 0
    for settings in SETTINGS:
        opt = torch.optim.SGD([torch.zeros(1)], lr=LR)
        scheduler, expected = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, **settings), []
        for metric in METRICS[metrics]:
            scheduler.step(metric)
            expected.append(opt.param_groups[0]["lr"])
        found, state = scales(ours(**settings), METRICS[metrics])
        assert [LR * x for x in found] == pytest.approx(expected, rel=1e-13, abs=0), settings
        assert state.best_value.item() == scheduler.best
        assert state.plateau_count.item() == scheduler.num_bad_epochs
        assert state.cooldown_count.item() == scheduler.cooldown_counter
        fell += expected[-1] < LR
    assert fell >= len(SETTINGS) // 4, "hardly anything was reduced"


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"patience": 1, "factor": 0.5},
        {"patience": 3, "factor": 0.9, "cooldown": 4, "rtol": 0.05, "atol": 0.01},
        {"patience": 2, "factor": 0.3, "min_scale": 0.02, "rtol": 0.0, "atol": 0.1},
    ],
)
def test_reduce_on_plateau_is_optax(settings, size):
    theirs = optax.contrib.reduce_on_plateau(**settings, accumulation_size=size)
    params, update = jnp.zeros(1, jnp.float64), jax.jit(theirs.update)
    for metrics, values in METRICS.items():
        state, expected = theirs.init(params), []
        for value in values:
            updates, state = update(jnp.ones(1, jnp.float64), state, params, value=value)
            expected.append(updates.item())
        found, last = scales(optfn.reduce_on_plateau(**settings, accumulation_size=size), values)
        assert found == pytest.approx(expected, rel=1e-13, abs=0), metrics
        for name in ("best_value", "plateau_count", "cooldown_count", "count", "avg_value"):
            theirs_last = getattr(state, name).item()
            assert getattr(last, name).item() == pytest.approx(theirs_last, rel=1e-13, nan_ok=True), (metrics, name)


def test_a_metric_of_an_epoch_is_given_in_each_of_its_steps():
    values, size = METRICS["falling noise"], 3
    once, _ = scales(optfn.reduce_on_plateau(patience=2), values)
    repeated, _ = scales(optfn.reduce_on_plateau(patience=2, accumulation_size=size), [v for v in values for _ in range(size)])
    assert repeated[size - 1 :: size] == once
    assert once[-1] < 1


def test_training_is_torch():
    """torch's scheduler, stepped before the optimizer, and ours as the last link of a chain."""
    params, grads = some_params(), some_grads(40)
    leaves = optfn.tree.map(torch.nn.Parameter, some_params())
    opt = torch.optim.Adam(leaves.values(), lr=LR)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=3)
    tx = optfn.chain(optfn.adam(lr=LR), ours(factor=0.5, patience=3))
    state = tx.init(params)
    compiled, graphs = counted(lambda g, s, p, value: tx.update(g, s, p, value=value))
    for g, metric in zip(grads, METRICS["falling noise"], strict=False):
        for name, p in leaves.items():
            p.grad = g[name].clone()
        scheduler.step(metric)
        opt.step()
        updates, state = compiled(g, state, params, torch.tensor(metric, dtype=torch.float64))
        params = optfn.apply_updates(params, updates)
        assert_close(params, leaves, 1e-12)
        assert optfn.tree.get(state, "scale").item() * LR == pytest.approx(opt.param_groups[0]["lr"])
    assert opt.param_groups[0]["lr"] < LR
    assert len(graphs) == 1


def test_many_runs_at_once():
    """Each run of a batch decides for itself."""
    tx, steps = optfn.reduce_on_plateau(patience=2, factor=0.5), 30
    values = torch.tensor([METRICS["falling noise"][:steps], METRICS["constant"][:steps]], dtype=torch.float64)
    state = torch.vmap(tx.init)(torch.zeros(2, 1))
    for t in range(steps):
        _, state = torch.vmap(lambda s, v: tx.update(torch.ones(1), s, value=v))(state, values[:, t])
    alone = [scales(tx, row.tolist())[1].scale.item() for row in values]
    assert state.scale.tolist() == alone
    assert alone[0] != alone[1]


def test_the_value_is_not_recorded():
    tx = optfn.reduce_on_plateau(patience=1)
    state = tx.init(torch.zeros(1))
    for _ in range(3):
        loss = torch.ones(1, requires_grad=True).square().sum()
        updates, state = tx.update(torch.ones(1), state, value=loss)
    assert not any(x.requires_grad for x in optfn.tree.leaves((updates, state)))


def test_the_value_passes_on():
    """Others in the chain are given it too."""
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    inner = optfn.GradientTransformation(lambda params: (), update)
    tx = optfn.chain(optfn.reduce_on_plateau(), inner)
    run_once = tx.update(torch.ones(1), tx.init(torch.ones(1)), value=2.0, other=3.0)
    assert run_once[0].item() == 1
    assert seen == [{"value": 2.0, "other": 3.0}]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"factor": 1.0}, "factor must be > 0 and < 1, got 1.0"),
        ({"factor": 0.0}, "factor must be > 0 and < 1, got 0.0"),
        ({"patience": 0}, "patience must be >= 1, got 0"),
        ({"rtol": 1.5}, "rtol must be >= 0 and <= 1, got 1.5"),
        ({"atol": -1.0}, "atol must be >= 0, got -1.0"),
        ({"cooldown": -1}, "cooldown must be >= 0, got -1"),
        ({"accumulation_size": 0}, "accumulation_size must be >= 1, got 0"),
        ({"min_scale": -0.1}, "min_scale must be >= 0, got -0.1"),
        ({"eps": -0.1}, "eps must be >= 0, got -0.1"),
        ({"mode": "least"}, "mode must be 'min' or 'max', got 'least'"),
    ],
)
def test_arguments_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        optfn.reduce_on_plateau(**kwargs)


def test_the_value_is_checked():
    tx = optfn.chain(optfn.sgd(), optfn.reduce_on_plateau())
    with pytest.raises(TypeError, match="reduce_on_plateau needs `value`"):
        run(tx, some_params(), some_grads(1))
    with pytest.raises(ValueError, match=r"value must be a number or have one element, got shape \(2,\)"):
        tx.update(torch.ones(1), tx.init(torch.ones(1)), value=torch.ones(2))
