"""Algorithms of Optax against Optax itself, or, where that differs from its sources, against the formula written plainly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from optax import contrib
from optax_oracle import assert_close, exact, from_jax, run, some_grads, some_params, to_jax

import optfn

SHAPES = {"w": (3, 2), "b": (2,), "s": (), "t": (2, 3, 2)}
MASK = {"layer": [True, False], "rest": {"s": False, "t": True}}
STEPS = 25


def nested(flat):
    return {"layer": [flat["w"], flat["b"]], "rest": {"s": flat["s"], "t": flat["t"]}}


PARAMS = nested(some_params(shapes=SHAPES))
GRADS = [nested(g) for g in some_grads(STEPS, shapes=SHAPES)]


def in_optax(tx, params=PARAMS, grads=GRADS):
    """The updates and the parameters of every step; not jitted: what runs once is compiled in ten times the time it runs."""
    params, steps = to_jax(params), []
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(to_jax(g), state, params)
        params = optax.apply_updates(params, updates)
        steps.append(from_jax({"updates": updates, "params": params}))
    return steps


def both(make):
    """A schedule, ours and Optax's."""
    return make(optfn), exact(make(optax))


RATE, OPTAX_RATE = both(lambda module: module.cosine_decay_schedule(0.1, 20, 0.1))
BETA, OPTAX_BETA = both(lambda module: module.linear_schedule(0.9, 0.99, 15))
ALPHA, OPTAX_ALPHA = both(lambda module: module.linear_schedule(0.0, 5.0, 15))


def chained(tx, decay, rate, mask=None):
    """An Optax block as an alias with a decoupled decay that Optax's own does not have."""
    return optax.chain(tx, optax.add_decayed_weights(decay, mask), optax.scale_by_learning_rate(rate))


def counted_in_int64(tx):
    """An Optax rule that takes a root of its int32 count, which is a float32 one."""

    def init(params):
        return jax.tree.map(lambda x: x.astype(jnp.int64) if x.dtype == jnp.int32 else x, tx.init(params))

    return optax.GradientTransformation(init, tx.update)


def from_zero_mu(tx):
    """Yogi of Optax, but with a first moment that begins at 0."""

    def at_zero(state):
        return state._replace(mu=optax.tree.zeros_like(state.mu)) if hasattr(state, "mu") else state

    def init(params):
        state = tx.init(params)
        return at_zero(state) if hasattr(state, "_fields") else tuple(map(at_zero, state))

    return optax.GradientTransformation(init, tx.update)


# Name: ours, Optax's.
PAIRS = {
    "lion: block": (optfn.scale_by_lion(), optax.scale_by_lion()),
    "lion: betas": (optfn.scale_by_lion(0.7, 0.6), optax.scale_by_lion(0.7, 0.6)),
    "lion: smooth": (
        optfn.scale_by_lion(mode="smooth", smooth_beta=3.0),
        optax.scale_by_lion(mode="smooth", smooth_beta=3.0),
    ),
    "lion: refined": (optfn.scale_by_lion(0.1, mode="refined"), optax.scale_by_lion(0.1, mode="refined")),
    "lion": (optfn.lion(0.1), optax.lion(0.1)),
    "lion: schedule, decay, mask": (
        optfn.lion(RATE, (0.8, 0.9), 0.2, mask=MASK),
        optax.lion(OPTAX_RATE, 0.8, 0.9, weight_decay=0.2, mask=MASK),
    ),
    "sign": (optfn.scale_by_sign(), optax.scale_by_sign()),
    "sign_sgd": (optfn.sign_sgd(RATE), optax.sign_sgd(OPTAX_RATE)),
    "sign_sgd: decay": (optfn.sign_sgd(0.1, 0.2, mask=MASK), chained(optax.scale_by_sign(), 0.2, 0.1, MASK)),
    "signum": (optfn.signum(0.1), optax.signum(0.1)),
    "signum: beta, schedule": (optfn.signum(RATE, 0.6), optax.signum(OPTAX_RATE, 0.6)),
    "yogi: block": (optfn.scale_by_yogi(), from_zero_mu(optax.scale_by_yogi())),
    "yogi: all numbers": (
        optfn.scale_by_yogi(0.8, 0.9, 1e-2, 1e-3, 0.1),
        from_zero_mu(optax.scale_by_yogi(0.8, 0.9, 1e-2, 1e-3, 0.1)),
    ),
    "yogi: from zero, as it is": (
        optfn.scale_by_yogi(b2=0.9, initial_accumulator_value=0.0),
        optax.scale_by_yogi(b2=0.9, initial_accumulator_value=0.0),
    ),
    "yogi": (optfn.yogi(RATE, (0.8, 0.99), 1e-2), from_zero_mu(optax.yogi(OPTAX_RATE, 0.8, 0.99, 1e-2))),
    "belief: block": (optfn.scale_by_belief(), optax.scale_by_belief()),
    "belief: all numbers": (optfn.scale_by_belief(0.8, 0.9, 1e-2, 1e-3), optax.scale_by_belief(0.8, 0.9, 1e-2, 1e-3)),
    "belief: nesterov": (optfn.scale_by_belief(b2=0.9, nesterov=True), optax.scale_by_belief(b2=0.9, nesterov=True)),
    "adabelief": (optfn.adabelief(0.1), optax.adabelief(0.1)),
    "adabelief: schedule, nesterov": (
        optfn.adabelief(RATE, (0.8, 0.9), 1e-3, eps_root=1e-4, nesterov=True),
        optax.adabelief(OPTAX_RATE, 0.8, 0.9, 1e-3, 1e-4, nesterov=True),
    ),
    "adabelief: decay": (optfn.adabelief(0.1, weight_decay=0.2, mask=MASK), chained(optax.scale_by_belief(), 0.2, 0.1, MASK)),
    "amsgrad: block": (optfn.scale_by_amsgrad(), optax.scale_by_amsgrad()),
    "amsgrad: all numbers": (optfn.scale_by_amsgrad(0.8, 0.9, 1e-3, 1e-4), optax.scale_by_amsgrad(0.8, 0.9, 1e-3, 1e-4)),
    "amsgrad: uncorrected": (
        optfn.scale_by_amsgrad(b2=0.9, bias_correction_mu=False, bias_correction_nu=False),
        optax.scale_by_amsgrad(b2=0.9, bias_correction_mu=False, bias_correction_nu=False),
    ),
    "amsgrad": (optfn.amsgrad(0.1), optax.amsgrad(0.1)),
    "amsgrad: schedule, uncorrected mu": (
        optfn.amsgrad(RATE, (0.8, 0.9), 1e-3, eps_root=1e-4, bias_correction_mu=False),
        optax.amsgrad(OPTAX_RATE, 0.8, 0.9, 1e-3, 1e-4, bias_correction_mu=False),
    ),
    "amsgrad: uncorrected nu": (
        optfn.amsgrad(0.1, (0.8, 0.9), bias_correction_nu=False),
        optax.amsgrad(0.1, 0.8, 0.9, bias_correction_nu=False),
    ),
    "nadamw": (optfn.nadamw(0.1), optax.nadamw(0.1)),
    "nadamw: all": (
        optfn.nadamw(RATE, (0.8, 0.9), 1e-3, 0.2, eps_root=1e-4, mask=MASK),
        optax.nadamw(OPTAX_RATE, 0.8, 0.9, 1e-3, 1e-4, weight_decay=0.2, mask=MASK),
    ),
    "adamaxw": (optfn.adamaxw(0.1), optax.adamaxw(0.1)),
    "adamaxw: all": (
        optfn.adamaxw(RATE, (0.8, 0.9), 1e-3, 0.2, mask=MASK),
        optax.adamaxw(OPTAX_RATE, 0.8, 0.9, 1e-3, 0.2, mask=MASK),
    ),
    "rss": (optfn.scale_by_rss(), optax.scale_by_rss()),
    "rss: from zero, without eps": (optfn.scale_by_rss(0.0, 0.0), optax.scale_by_rss(0.0, 0.0)),
    # An eps above the rounding errors of nu - mu^2, which would otherwise be all that is compared.
    "stddev": (optfn.scale_by_stddev(eps=1e-2), optax.scale_by_stddev(eps=1e-2)),
    "stddev: all": (optfn.scale_by_stddev(0.8, 1e-2, 0.5, False, True), optax.scale_by_stddev(0.8, 1e-2, 0.5, False, True)),
    "optimistic: block": (optfn.scale_by_optimistic_gradient(), optax.scale_by_optimistic_gradient()),
    "optimistic: numbers": (optfn.scale_by_optimistic_gradient(0.7, 0.3), optax.scale_by_optimistic_gradient(0.7, 0.3)),
    "optimistic_gradient_descent": (
        optfn.optimistic_gradient_descent(RATE, 0.7, 0.3),
        optax.optimistic_gradient_descent(OPTAX_RATE, 0.7, 0.3),
    ),
    "optimistic_adam_v2": (optfn.optimistic_adam_v2(0.1), optax.optimistic_adam_v2(0.1)),
    "optimistic_adam_v2: all": (
        optfn.optimistic_adam_v2(RATE, (0.8, 0.9), 1e-3, alpha=0.7, beta=0.3, eps_root=1e-4, nesterov=False),
        optax.optimistic_adam_v2(OPTAX_RATE, alpha=0.7, beta=0.3, b1=0.8, b2=0.9, eps=1e-3, eps_root=1e-4, nesterov=False),
    ),
    "ademamix: block": (optfn.scale_by_ademamix(), contrib.scale_by_ademamix()),
    "ademamix: all numbers": (
        optfn.scale_by_ademamix(0.8, 0.9, 0.95, 3.0, 1e-3, 1e-4),
        contrib.scale_by_ademamix(0.8, 0.9, 0.95, 3.0, 1e-3, 1e-4),
    ),
    "ademamix": (optfn.ademamix(0.1), contrib.ademamix(0.1)),
    "ademamix: schedules, decay, mask": (
        optfn.ademamix(RATE, (0.8, 0.9, BETA), 1e-3, 0.2, alpha=ALPHA, eps_root=1e-4, mask=MASK),
        contrib.ademamix(OPTAX_RATE, 0.8, 0.9, OPTAX_BETA, OPTAX_ALPHA, 1e-3, 1e-4, weight_decay=0.2, mask=MASK),
    ),
    "simplified_ademamix: block": (optfn.scale_by_simplified_ademamix(), contrib.scale_by_simplified_ademamix()),
    "simplified_ademamix: all numbers": (
        optfn.scale_by_simplified_ademamix(0.8, 0.9, 3.0, 1e-3, 1e-4),
        contrib.scale_by_simplified_ademamix(0.8, 0.9, 3.0, 1e-3, 1e-4),
    ),
    "simplified_ademamix": (optfn.simplified_ademamix(0.1), contrib.simplified_ademamix(0.1)),
    "simplified_ademamix: schedules, decay, mask": (
        optfn.simplified_ademamix(RATE, (0.8, 0.9), 1e-3, 0.2, alpha=ALPHA, eps_root=1e-4, mask=MASK),
        contrib.simplified_ademamix(OPTAX_RATE, 0.8, 0.9, OPTAX_ALPHA, 1e-3, 1e-4, weight_decay=0.2, mask=MASK),
    ),
    "adopt: block": (optfn.scale_by_adopt(), contrib.scale_by_adopt()),
    "adopt: nesterov": (optfn.scale_by_adopt(0.8, 0.9, 1e-2, nesterov=True), contrib.scale_by_adopt(0.8, 0.9, 1e-2, nesterov=True)),
    "adopt: unclipped": (
        optfn.scale_by_adopt(b2=0.9, use_clipping=False),
        contrib.scale_by_adopt(b2=0.9, use_clipping=False),
    ),
    "adopt": (optfn.adopt(0.1), contrib.adopt(0.1)),
    "adopt: another bound, schedule": (
        optfn.adopt(RATE, (0.8, 0.9), 1e-3, nesterov=True, clip_value_fn=lambda count: 0.1 * count),
        contrib.adopt(OPTAX_RATE, 0.8, 0.9, 1e-3, nesterov=True, clip_value_fn=lambda count: 0.1 * count),
    ),
    "adopt: a constant bound": (
        optfn.adopt(0.1, clip_value_fn=lambda count: 0.5),
        contrib.adopt(0.1, clip_value_fn=lambda count: 0.5),
    ),
    "adopt: alias, unclipped": (
        optfn.adopt(0.1, (0.8, 0.9), use_clipping=False),
        contrib.adopt(0.1, 0.8, 0.9, use_clipping=False),
    ),
    "novograd: block": (optfn.scale_by_novograd(), optax.scale_by_novograd()),
    "novograd: all numbers": (
        optfn.scale_by_novograd(0.8, 0.9, 1e-3, 1e-4, 0.2),
        optax.scale_by_novograd(0.8, 0.9, 1e-3, 1e-4, 0.2),
    ),
    "novograd": (optfn.novograd(0.1), optax.novograd(0.1)),
    "novograd: schedule, decay": (
        optfn.novograd(RATE, (0.8, 0.9), 1e-3, 0.2, eps_root=1e-4),
        optax.novograd(OPTAX_RATE, 0.8, 0.9, 1e-3, 1e-4, 0.2),
    ),
    "madgrad: block": (optfn.scale_by_madgrad(0.1), counted_in_int64(contrib.scale_by_madgrad(0.1))),
    "madgrad: block, schedule": (
        optfn.scale_by_madgrad(RATE, 0.5, 1e-3),
        counted_in_int64(contrib.scale_by_madgrad(OPTAX_RATE, 0.5, 1e-3)),
    ),
    "madgrad": (optfn.madgrad(0.1), counted_in_int64(contrib.madgrad(0.1))),
    "madgrad: schedule, decay": (
        optfn.madgrad(RATE, 0.0, 0.2, 1e-3),
        counted_in_int64(contrib.madgrad(OPTAX_RATE, 0.0, 0.2, 1e-3)),
    ),
    "cocob: block": (optfn.scale_by_cocob(), contrib.scale_by_cocob()),
    "cocob: all numbers": (optfn.scale_by_cocob(2.0, 0.5), contrib.scale_by_cocob(2.0, 0.5)),
    "cocob": (optfn.cocob(), contrib.cocob()),
    "cocob: schedule, decay, mask": (
        optfn.cocob(RATE, 2.0, 1e-3, 0.2, mask=MASK),
        contrib.cocob(OPTAX_RATE, 2.0, 1e-3, 0.2, mask=MASK),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_trajectory_is_optax(name):
    ours, theirs = PAIRS[name]
    assert_close(run(ours, PARAMS, GRADS)[0], in_optax(theirs), 1e-12)


SM3 = {
    "block": (optfn.scale_by_sm3(), optax.scale_by_sm3()),
    "averages": (optfn.scale_by_sm3(0.8, 0.9, 1e-3), optax.scale_by_sm3(0.8, 0.9, 1e-3)),
    "alias": (optfn.sm3(0.1, 0.7), optax.sm3(0.1, 0.7)),
    "decay": (optfn.sm3(0.1, 0.0, 0.2), chained(optax.scale_by_sm3(0.0), 0.2, 0.1)),
}


@pytest.mark.parametrize("name", SM3)
def test_trajectory_of_sm3_is_optax(name):
    """On what has dimensions: for a 0-dim leaf Optax raises an error."""
    shapes = {"b": (2,), "w": (3, 2), "t": (2, 3, 2), "deep": (2, 1, 2, 2)}
    params, grads = some_params(shapes=shapes), some_grads(STEPS, shapes=shapes)
    ours, theirs = SM3[name]
    assert_close(run(ours, params, grads)[0], in_optax(theirs, params, grads), 1e-12)


def test_sm3_of_a_scalar_is_of_one_entry():
    theirs = optax.scale_by_sm3()
    with pytest.raises(IndexError):
        theirs.update(jnp.ones(()), theirs.init(jnp.ones(())))
    shapes = {"s": ()}
    params, grads = some_params(shapes=shapes), some_grads(STEPS, shapes=shapes)
    expected, _ = run(
        optfn.sm3(0.1), optfn.tree.map(lambda x: x[None], params), [optfn.tree.map(lambda x: x[None], g) for g in grads]
    )
    found, _ = run(optfn.sm3(0.1), params, grads)
    assert_close(found, optfn.tree.map(lambda x: x[0], expected), 0)


@pytest.mark.parametrize("b2", [1.0, 0.9])
def test_sm3_takes_a_tensor_for_the_number(b2):
    found, _ = run(optfn.scale_by_sm3(b2=torch.tensor(b2, dtype=torch.float64)), PARAMS, GRADS)
    assert_close(found, run(optfn.scale_by_sm3(b2=b2), PARAMS, GRADS)[0], 1e-15)


DTYPES = {
    "lion": (optfn.scale_by_lion(mode="smooth", mu_dtype=torch.float32), {"mu": torch.float32, "": torch.float64}),
    "signum": (optfn.signum(accumulator_dtype=torch.float32), {"trace": torch.float32}),
    "amsgrad": (optfn.amsgrad(mu_dtype=torch.float32), {"mu": torch.float32, "nu": torch.float64}),
    "nadamw": (optfn.nadamw(mu_dtype=torch.float32), {"mu": torch.float32, "nu": torch.float64}),
    "optimistic": (optfn.optimistic_adam_v2(mu_dtype=torch.float32), {"mu": torch.float32, "nu": torch.float64}),
    "ademamix": (optfn.ademamix(mu_dtype=torch.float32), {"m1": torch.float32, "m2": torch.float32, "nu": torch.float64}),
    "adopt": (optfn.adopt(mu_dtype=torch.float32), {"mu": torch.float32, "nu": torch.float64}),
    "novograd": (optfn.novograd(mu_dtype=torch.float32), {"mu": torch.float32, "nu": torch.float64}),
}


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_of_a_slot(name):
    tx, dtypes = DTYPES[name]
    _, state = run(tx, PARAMS, GRADS[:3])
    for slot, dtype in dtypes.items():
        if slot:
            assert {x.dtype for x in optfn.tree.leaves(optfn.tree.get(state, slot))} == {dtype}, slot


# What is not Optax's: the authors' formulas, written plainly.


def plain(rule):
    """The updates and parameters that a function of the gradients so far, the parameter and the step gives, leaf by leaf."""

    def run_leaf(p, grads):
        p, state, steps = p.numpy().copy(), {}, []
        for t, g in enumerate(grads, 1):
            new = rule(g.numpy(), p, t, state)
            steps.append({"updates": torch.as_tensor(new - p), "params": torch.as_tensor(new)})
            p = new
        return steps

    leaves, spec = optfn.tree.flatten(PARAMS)
    columns = zip(*(optfn.tree.flatten(g)[0] for g in GRADS), strict=True)
    runs = [run_leaf(p, grads) for p, grads in zip(leaves, columns, strict=True)]
    return [
        {name: optfn.tree.unflatten(spec, [steps[i][name] for steps in runs]) for name in ("updates", "params")}
        for i in range(STEPS)
    ]


def adan_formula(lr, betas, eps, decay, no_prox, look_ahead=None):
    """Algorithm 1 of Adan with the decays of the authors' code; ``look_ahead`` is the weight of the change, theirs if None."""
    b1, b2, b3 = betas
    weight = b2 if look_ahead is None else look_ahead

    def rule(g, p, t, s):
        d = g - s.get("g", g)
        s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
        s["v"] = b2 * s.get("v", 0) + (1 - b2) * d
        s["n"] = b3 * s.get("n", 0) + (1 - b3) * (g + weight * d) ** 2
        s["g"] = g
        eta = lr / (np.sqrt(s["n"] / (1 - b3**t)) + eps)
        step = eta * (s["m"] / (1 - b1**t) + weight * s["v"] / (1 - b2**t))
        return (1 - lr * decay) * p - step if no_prox else (p - step) / (1 + lr * decay)

    return rule


@pytest.mark.parametrize("no_prox", [True, False])
@pytest.mark.parametrize(("betas", "eps", "decay"), [((0.98, 0.92, 0.99), 1e-8, 0.0), ((0.9, 0.7, 0.95), 1e-3, 0.3)])
def test_adan_is_the_authors(betas, eps, decay, no_prox):
    found, _ = run(optfn.adan(0.1, betas, eps, decay, no_prox=no_prox), PARAMS, GRADS)
    assert_close(found, plain(adan_formula(0.1, betas, eps, decay, no_prox)), 1e-12)


def test_adan_of_optax_has_the_papers_weight_with_the_codes_decays():
    """The paper's beta is 1 - beta of the code: with the decay 0.92 the weight of the change is 0.92, Optax has 0.08."""
    numbers = (0.1, (0.98, 0.92, 0.99), 1e-8)
    theirs = in_optax(optax.adan(0.1, eps_root=0.0))
    assert_close(theirs, plain(adan_formula(*numbers, 0.0, True, look_ahead=1 - 0.92)), 1e-12)
    ours, _ = run(optfn.adan(*numbers), PARAMS, GRADS)
    with pytest.raises(AssertionError):
        assert_close(ours, theirs, 1e-2)


def test_adan_is_optax_where_both_weights_are_one_half():
    found, _ = run(optfn.adan(RATE, (0.9, 0.5, 0.8), 1e-3, 0.2, eps_root=1e-4, no_prox=True, mask=MASK), PARAMS, GRADS)
    theirs = optax.adan(OPTAX_RATE, 0.9, 0.5, 0.8, 1e-3, 1e-4, weight_decay=0.2, mask=MASK)
    assert_close(found, in_optax(theirs), 1e-12)
    block = optfn.scale_by_adan(0.9, 0.5, 0.8, 1e-3, 1e-4)
    theirs = optax.scale_by_adan(0.9, 0.5, 0.8, 1e-3, 1e-4)
    assert_close(run(block, PARAMS, GRADS)[0], in_optax(theirs), 1e-12)


def test_proximal_decay_of_adan_leaves_alone_what_is_masked():
    masked, _ = run(optfn.adan(RATE, weight_decay=0.5, mask=MASK), PARAMS, GRADS)
    all_, none = (run(optfn.adan(RATE, weight_decay=decay), PARAMS, GRADS)[0] for decay in (0.5, 0.0))
    for m, a, n in zip(masked, all_, none, strict=True):
        expected = optfn.tree.map(lambda on, x, y: x if on else y, MASK, a["params"], n["params"])
        assert_close(m["params"], expected, 0)


def acprop_formula(lr, b1, b2, eps, eps_root, decay=0.0, momentum_update=False):
    def rule(g, p, t, s):
        s["mu"] = b1 * s.get("mu", 0) + (1 - b1) * g
        direction = s["mu"] / (1 - b1**t) if momentum_update else g
        if t > 1:
            direction = direction / (np.sqrt(s["nu"] / (1 - b2 ** (t - 1))) + eps)
        s["nu"] = b2 * s.get("nu", 0) + (1 - b2) * (g - s["mu"]) ** 2 + eps_root
        return p - lr * (direction + decay * p)

    return rule


@pytest.mark.parametrize("momentum_update", [True, False])
@pytest.mark.parametrize("numbers", [(0.9, 0.999, 1e-16, 1e-16, 0.0), (0.8, 0.9, 1e-3, 1e-4, 0.2)])
def test_acprop_is_the_authors(numbers, momentum_update):
    b1, b2, eps, eps_root, decay = numbers
    tx = optfn.acprop(0.1, (b1, b2), eps, decay, eps_root=eps_root, momentum_update=momentum_update)
    assert_close(run(tx, PARAMS, GRADS)[0], plain(acprop_formula(0.1, *numbers, momentum_update)), 1e-12)


def test_acprop_of_optax_is_smaller_by_a_factor():
    """It has the average of the step before in the variance, where the authors, and its own page, have the new one."""
    b1, eps_root = 0.8, 1e-4
    theirs = in_optax(contrib.scale_by_acprop(b1, 0.99, 0.0, eps_root / b1**2))
    ours, _ = run(optfn.scale_by_acprop(b1, 0.99, 0.0, eps_root), PARAMS, GRADS)
    assert_close(ours[0]["updates"], theirs[0]["updates"], 1e-12)
    for x, y in zip(ours[1:], theirs[1:], strict=True):
        assert_close(optfn.tree.map(lambda u: b1 * u, x["updates"]), y["updates"], 1e-12)


def test_yogi_stays_where_the_gradient_is_zero():
    """Optax, whose first moment begins at 1e-6, does not."""
    zeros = [optfn.tree.map(torch.zeros_like, g) for g in GRADS[:3]]
    found, _ = run(optfn.yogi(0.1), PARAMS, zeros)
    assert_close(found[-1]["params"], PARAMS, 0)
    theirs = in_optax(optax.yogi(0.1), grads=zeros)
    assert max((x - y).abs().max() for x, y in zip(*map(optfn.tree.leaves, (theirs[-1]["params"], PARAMS)), strict=True)) > 1e-5


def test_adopt_decays_from_the_second_step_on():
    found, _ = run(optfn.adopt(0.1, weight_decay=0.2, mask=MASK), PARAMS, GRADS)
    theirs = in_optax(chained(contrib.scale_by_adopt(), lambda count: 0.2 * (count > 0), 0.1, MASK))
    assert_close(found, theirs, 1e-12)
    assert_close(found[0]["params"], PARAMS, 0)


def test_madgrad_and_cocob_start_from_the_parameters_of_the_first_update():
    """Not from those that the state was made of, as where weights are loaded in between."""
    others = optfn.tree.map(lambda p: p + 1, PARAMS)
    for tx in (optfn.madgrad(0.1), optfn.cocob(alpha=2.0)):
        state, params, steps = tx.init(others), PARAMS, []
        for g in GRADS:
            updates, state = tx.update(g, state, params)
            params = optfn.apply_updates(params, updates)
            steps.append({"updates": updates, "params": params})
        assert_close(steps, run(tx, PARAMS, GRADS)[0], 0)


def test_cocob_does_not_depend_on_the_scale_of_the_gradients():
    found, _ = run(optfn.cocob(eps=1e-30), PARAMS, [optfn.tree.map(lambda x: 100 * x, g) for g in GRADS])
    assert_close(found, run(optfn.cocob(eps=1e-30), PARAMS, GRADS)[0], 1e-12)


@pytest.mark.parametrize("tx", [optfn.lion(), optfn.signum(), optfn.sign_sgd()])
def test_a_sign_does_not_hide_nan(tx):
    params = torch.ones(2)
    updates, _ = tx.update(torch.tensor([float("nan"), 1.0]), tx.init(params), params)
    assert updates.isnan().tolist() == [True, False]


MAXIMIZED = {
    "lion": optfn.lion,
    "sign_sgd": optfn.sign_sgd,
    "signum": optfn.signum,
    "yogi": optfn.yogi,
    "adabelief": optfn.adabelief,
    "amsgrad": optfn.amsgrad,
    "nadamw": optfn.nadamw,
    "adamaxw": optfn.adamaxw,
    "optimistic_gradient_descent": optfn.optimistic_gradient_descent,
    "optimistic_adam_v2": optfn.optimistic_adam_v2,
    "acprop": optfn.acprop,
    "ademamix": optfn.ademamix,
    "simplified_ademamix": optfn.simplified_ademamix,
    "adopt": optfn.adopt,
    "adan": optfn.adan,
    "novograd": optfn.novograd,
    "sm3": optfn.sm3,
    "madgrad": optfn.madgrad,
    "cocob": optfn.cocob,
}


@pytest.mark.parametrize("name", MAXIMIZED)
def test_ascent_is_descent_of_the_negated_gradients(name):
    make = MAXIMIZED[name]
    decay = {"weight_decay": 0.1} if "weight_decay" in make.__annotations__ else {}
    found, _ = run(make(0.1, maximize=True, **decay), PARAMS, GRADS[:5])
    expected, _ = run(make(0.1, **decay), PARAMS, [optfn.tree.map(torch.neg, g) for g in GRADS[:5]])
    assert_close(found, expected, 0)


ERRORS = [
    (lambda: optfn.scale_by_lion(1.0), "b1 must be >= 0 and < 1, got 1.0"),
    (lambda: optfn.scale_by_lion(mode="soft"), "mode must be 'hard', 'smooth' or 'refined', got 'soft'"),
    (lambda: optfn.lion(weight_decay=-0.1), "weight_decay must be >= 0, got -0.1"),
    (lambda: optfn.signum(beta=-0.1), "momentum must be >= 0, got -0.1"),
    (lambda: optfn.scale_by_yogi(initial_accumulator_value=-1.0), "initial_accumulator_value must be >= 0, got -1.0"),
    (lambda: optfn.scale_by_belief(eps_root=-1.0), "eps_root must be >= 0, got -1.0"),
    (lambda: optfn.scale_by_amsgrad(b2=1.0), "b2 must be >= 0 and < 1, got 1.0"),
    (lambda: optfn.scale_by_rss(-0.1), "initial_accumulator_value must be >= 0, got -0.1"),
    (lambda: optfn.scale_by_stddev(1.1), "decay must be >= 0 and <= 1, got 1.1"),
    (lambda: optfn.scale_by_optimistic_gradient(float("nan")), "alpha must be a number, got nan"),
    (lambda: optfn.scale_by_acprop(b2=1.0), "b2 must be >= 0 and < 1, got 1.0"),
    (lambda: optfn.scale_by_ademamix(b3=1.0), "b3 must be >= 0 and < 1, got 1.0"),
    (lambda: optfn.scale_by_ademamix(alpha=-1.0), "alpha must be >= 0, got -1.0"),
    (lambda: optfn.scale_by_simplified_ademamix(alpha=-1.0), "alpha must be >= 0, got -1.0"),
    (lambda: optfn.scale_by_adopt(eps=-1.0), "eps must be >= 0, got -1.0"),
    (lambda: optfn.adopt(weight_decay=-0.1), "weight_decay must be >= 0, got -0.1"),
    (lambda: optfn.scale_by_adan(b3=1.0), "b3 must be >= 0 and < 1, got 1.0"),
    (lambda: optfn.adan(-0.1), "lr must be >= 0, got -0.1"),
    (lambda: optfn.adan(weight_decay=-0.1), "weight_decay must be >= 0, got -0.1"),
    (lambda: optfn.adan(betas=(0.9, 0.99)), r"betas must be 3 numbers, as in betas=\(0.98, 0.92, 0.99\), got \(0.9, 0.99\)"),
    (lambda: optfn.scale_by_novograd(weight_decay=-0.1), "weight_decay must be >= 0, got -0.1"),
    (lambda: optfn.scale_by_sm3(b2=1.1), "b2 must be >= 0 and <= 1, got 1.1"),
    (lambda: optfn.sm3(momentum=1.0), "momentum must be >= 0 and < 1, got 1.0"),
    (lambda: optfn.scale_by_madgrad(-0.1), "lr must be >= 0, got -0.1"),
    (lambda: optfn.madgrad(momentum=1.0), "momentum must be >= 0 and < 1, got 1.0"),
    (lambda: optfn.scale_by_cocob(alpha=0.0), "alpha must be > 0, got 0.0"),
    (lambda: optfn.scale_by_cocob(eps=0.0), "eps must be > 0, got 0.0"),
]


@pytest.mark.parametrize(("make", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_numbers_are_checked_when_a_pair_is_made(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize("maximize", [False, True])
def test_a_mask_says_which_leaves_decay_in_novograds_sum(maximize):
    """By the sums of the rule without a decay, and the parameters' own."""
    lr, b1, decay = 0.1, 0.8, 0.2
    tx = optfn.novograd(lr, (b1, 0.9), weight_decay=decay, mask=MASK, maximize=maximize)
    plain = optfn.novograd(lr, (b1, 0.9), maximize=maximize)
    params, state, other = PARAMS, tx.init(PARAMS), plain.init(PARAMS)
    summed = optfn.tree.zeros_like(PARAMS)
    for g in GRADS[:5]:
        updates, state = tx.update(g, state, params)
        wanted, other = plain.update(g, other, params)
        summed = optfn.tree.map(lambda e, p, decays: b1 * e + (decay * p if decays else 0), summed, params, MASK)
        assert_close(updates, optfn.tree.map(lambda u, e: u - lr * e, wanted, summed), 1e-12)
        params = optfn.apply_updates(params, updates)
    unchanged, _ = run(optfn.novograd(lr, mask=MASK), PARAMS, GRADS[:2])
    assert_close(unchanged, run(optfn.novograd(lr), PARAMS, GRADS[:2])[0], 0)


def test_a_mask_says_which_gradients_of_madgrad_have_a_decay():
    steps, _ = run(optfn.madgrad(0.1, weight_decay=0.2, mask=MASK), PARAMS, GRADS[:5])
    by_hand = optfn.chain(optfn.add_decayed_weights(0.2, MASK), optfn.madgrad(0.1))
    assert_close(steps, run(by_hand, PARAMS, GRADS[:5])[0], 1e-12)
    assert not torch.equal(
        steps[-1]["params"]["rest"]["s"], run(optfn.madgrad(0.1, weight_decay=0.2), PARAMS, GRADS[:5])[0][-1]["params"]["rest"]["s"]
    )


@pytest.mark.parametrize("make", [optfn.madgrad, optfn.cocob, lambda: optfn.novograd(weight_decay=0.1)])
def test_what_reads_parameters_says_so(make):
    tx, g = make(), torch.ones(2)
    with pytest.raises(TypeError, match="needs `params`"):
        tx.update(g, tx.init(g))


def test_schedules_of_a_rule_are_in_its_state():
    tx = optfn.ademamix(betas=(0.9, 0.999, BETA), alpha=ALPHA)
    _, state = run(tx, PARAMS, GRADS[:4])
    assert optfn.tree.get(state, "alpha").item() == pytest.approx(1.0)
    assert optfn.tree.get(state, "b3").item() == pytest.approx(0.9 + 0.09 * 3 / 15)
