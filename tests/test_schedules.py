"""Schedules against Optax, as functions of ints and tensors, traced, batched and differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from optax_oracle import assert_close, counted

import optfn

STEPS = range(-3, 25)


def joined(of):
    return of.join_schedules(
        [of.linear_schedule(0.0, 1.0, 4), of.constant_schedule(0.7), of.exponential_decay(0.7, 3, 0.8)], [4, 9]
    )


SCHEDULES = {
    "constant": lambda of: of.constant_schedule(0.3),
    "linear": lambda of: of.linear_schedule(0.3, -0.7, 7),
    "linear: later": lambda of: of.linear_schedule(0.3, 1.1, 7, transition_begin=5),
    "linear: no steps": lambda of: of.linear_schedule(0.3, 1.1, 0),
    "polynomial": lambda of: of.polynomial_schedule(1.0, 0.1, 2.5, 9),
    "polynomial: root, later": lambda of: of.polynomial_schedule(0.1, 1.0, 0.5, 9, 3),
    "exponential": lambda of: of.exponential_decay(0.3, 5, 0.7),
    "exponential: bounded below": lambda of: of.exponential_decay(0.3, 5, 0.7, 2, end_value=0.1),
    "exponential: bounded above": lambda of: of.exponential_decay(0.3, 5, 1.7, 2, end_value=0.9),
    "exponential: stairs": lambda of: of.exponential_decay(0.3, 5, 0.7, 2, staircase=True),
    "cosine": lambda of: of.cosine_decay_schedule(0.3, 9),
    "cosine: all numbers": lambda of: of.cosine_decay_schedule(0.3, 9, 0.2, 1.5),
    "piecewise": lambda of: of.piecewise_constant_schedule(0.3, {4: 0.5, 9: 3.0, 11: 0.0}),
    "piecewise: no boundary": lambda of: of.piecewise_constant_schedule(0.3),
    "warmup_constant": lambda of: of.warmup_constant_schedule(0.1, 0.9, 6),
    "warmup_cosine": lambda of: of.warmup_cosine_decay_schedule(0.1, 0.9, 6, 17),
    "warmup_cosine: all numbers": lambda of: of.warmup_cosine_decay_schedule(0.1, 0.9, 6, 17, 0.05, 1.3),
    "warmup_cosine: no warm-up": lambda of: of.warmup_cosine_decay_schedule(0.1, 0.9, 0, 17, 0.05),
    "warmup_exponential": lambda of: of.warmup_exponential_decay_schedule(0.1, 0.9, 6, 5, 0.7),
    "warmup_exponential: all": lambda of: of.warmup_exponential_decay_schedule(0.1, 0.9, 6, 5, 0.7, 2, True, 0.4),
    "warmup_exponential: no warm-up": lambda of: of.warmup_exponential_decay_schedule(0.1, 0.9, 0, 5, 1.7, end_value=2.0),
    "join": joined,
    "interpolate: linear": lambda of: of.piecewise_interpolate_schedule("linear", 0.3, {4: 0.5, 9: 3.0, 11: 0.0}),
    "interpolate: cosine": lambda of: of.piecewise_interpolate_schedule("cosine", 0.3, {9: 3.0, 4: 0.5}),
    "interpolate: a jump": lambda of: of.piecewise_interpolate_schedule("linear", 0.3, {0: 2.0, 4: 0.5}),
    "interpolate: no boundary": lambda of: of.piecewise_interpolate_schedule("cosine", 0.3),
    "linear_onecycle": lambda of: of.linear_onecycle_schedule(17, 0.9),
    "linear_onecycle: all numbers": lambda of: of.linear_onecycle_schedule(17, 0.9, 0.25, 0.7, 5.0, 20.0),
    "cosine_onecycle": lambda of: of.cosine_onecycle_schedule(17, 0.9),
    "cosine_onecycle: all numbers": lambda of: of.cosine_onecycle_schedule(17, 0.9, 0.25, 5.0, 20.0),
    "sgdr": lambda of: of.sgdr_schedule(
        [
            {"init_value": 0.1, "peak_value": 0.9, "warmup_steps": 2, "decay_steps": 7, "end_value": 0.05},
            {"init_value": 0.2, "peak_value": 0.5, "warmup_steps": 0, "decay_steps": 5},
            {"init_value": 0.0, "peak_value": 0.4, "warmup_steps": 3, "decay_steps": 6, "exponent": 1.3},
        ]
    ),
}

# Optax's interpolations take one step at a time. Before step 0 they are 0; ours are the first value.
INTERPOLATIONS = [name for name in SCHEDULES if "interpolate" in name or "onecycle" in name]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_optax(name):
    schedule = SCHEDULES[name](optfn)
    # Optax is in float64 for an int64 count; a bare constant is not shaped like the count there.
    optax_schedule = jax.vmap(SCHEDULES[name](optax)) if name in INTERPOLATIONS else SCHEDULES[name](optax)
    theirs = np.broadcast_to(optax_schedule(jnp.asarray(STEPS, jnp.int64)), (len(STEPS),))
    expected = torch.tensor(theirs, dtype=torch.float64)
    if name in INTERPOLATIONS:
        assert set(expected[:3].tolist()) == {0.0}
        expected[:3] = schedule(0)
    vectorised = schedule(torch.tensor(STEPS))
    assert vectorised.dtype == torch.float64
    assert_close(vectorised, expected, 1e-14)
    for step, value in zip(STEPS, expected, strict=True):
        assert_close(schedule(step), value, 1e-14)
        assert_close(schedule(torch.tensor(step, dtype=torch.int32)), value, 1e-14)
    assert_close(schedule(torch.tensor(STEPS).reshape(4, 7)), expected.reshape(4, 7), 1e-14)


def stable(of):
    return of.warmup_stable_decay_schedule(0.1, 0.9, 5, 7, 4, 0.2)


def test_warmup_stable_decay_is_its_closed_form():
    def closed_form(t):
        if t < 5:
            return 0.1 + 0.8 * max(t, 0) / 5
        return 0.9 - 0.7 * min(max((t - 12) / 4, 0), 1)

    assert_close(stable(optfn)(torch.tensor(STEPS)), torch.tensor([closed_form(t) for t in STEPS], dtype=torch.float64), 1e-14)
    without = optfn.warmup_stable_decay_schedule(0.1, 0.9, 0, 0, 4, 0.2)(torch.tensor([0, 1, 4, 9]))
    assert_close(without, torch.tensor([0.9, 0.725, 0.2, 0.2], dtype=torch.float64), 1e-14)


def test_a_warm_up_of_no_steps_is_at_the_peak():
    """Where Optax stays at the initial value for ever."""
    assert optfn.warmup_constant_schedule(0.1, 0.9, 0)(torch.arange(3)).tolist() == [0.9] * 3


OF_TORCH = {
    "one_cycle": lambda of: of.one_cycle_lr(0.9, 17),
    "one_cycle: three phases": lambda of: of.one_cycle_lr(0.9, 17, pct_start=0.4, anneal_strategy="linear", three_phase=True),
    "cosine_annealing": lambda of: of.cosine_annealing_lr(0.9, 6, 0.1),
    "warm_restarts": lambda of: of.cosine_annealing_warm_restarts(0.9, 5, 1, 0.1),
    "warm_restarts: longer": lambda of: of.cosine_annealing_warm_restarts(0.9, 2, 3, 0.1),
    "cyclic": lambda of: of.cyclic_lr(0.1, 0.9, 3, 4, "triangular2"),
    "cyclic: exp_range": lambda of: of.cyclic_lr(0.1, 0.9, 3, 4, "exp_range", 0.9),
    "multiplicative": lambda of: of.multiplicative_lr(0.9, lambda step: 0.5 + 1 / step, 9),
    "chained": lambda of: of.chained_scheduler([of.linear_schedule(0.1, 1.0, 5), of.exponential_decay(0.9, 3, 0.5)]),
}
ALL = {**SCHEDULES, **OF_TORCH, "warmup_stable_decay": stable}


@pytest.mark.parametrize("name", ALL)
def test_one_graph_for_all_steps(name):
    schedule = ALL[name](optfn)
    compiled, graphs = counted(schedule)
    values = torch.stack([compiled(torch.tensor(step)) for step in STEPS])
    assert len(graphs) == 1
    assert_close(values, torch.stack([schedule(torch.tensor(step)) for step in STEPS]), 0)


@pytest.mark.parametrize("name", ALL)
def test_vmap_over_steps(name):
    schedule = ALL[name](optfn)
    steps = torch.tensor(STEPS)
    assert_close(torch.vmap(schedule)(steps), schedule(steps), 0)


# A schedule as a function of its tensor arguments, and values for these.
OF_TENSORS = {
    "constant": (lambda a: optfn.constant_schedule(a), (0.3,)),
    "linear": (lambda a, b: optfn.linear_schedule(a, b, 7, 2), (0.3, -0.7)),
    "polynomial": (lambda a, b, p: optfn.polynomial_schedule(a, b, p, 9), (1.0, 0.1, 2.5)),
    "exponential": (lambda a, r, e: optfn.exponential_decay(a, 5, r, end_value=e), (0.3, 0.7, 0.1)),
    "exponential: grows": (lambda a, r, e: optfn.exponential_decay(a, 5, r, end_value=e), (0.3, 1.7, 0.9)),
    "cosine": (lambda a, b, e: optfn.cosine_decay_schedule(a, 9, b, e), (0.3, 0.2, 1.5)),
    "piecewise": (lambda a, s: optfn.piecewise_constant_schedule(a, {4: s, 9: s}), (0.3, 0.5)),
    "warmup_constant": (lambda a, b: optfn.warmup_constant_schedule(a, b, 6), (0.1, 0.9)),
    "warmup_cosine": (lambda a, b, e, p: optfn.warmup_cosine_decay_schedule(a, b, 6, 17, e, p), (0.1, 0.9, 0.05, 1.5)),
    "warmup_exponential": (
        lambda a, b, r, e: optfn.warmup_exponential_decay_schedule(a, b, 6, 5, r, 2, end_value=e),
        (0.1, 0.9, 0.7, 0.2),
    ),
    "interpolate": (lambda a, s, t: optfn.piecewise_interpolate_schedule("cosine", a, {4: s, 9: t}), (0.3, 0.5, 3.0)),
    "linear_onecycle": (lambda a, d, f: optfn.linear_onecycle_schedule(17, a, 0.3, 0.8, d, f), (0.9, 5.0, 20.0)),
    "cosine_onecycle": (lambda a, d, f: optfn.cosine_onecycle_schedule(17, a, 0.3, d, f), (0.9, 5.0, 20.0)),
    "one_cycle": (lambda a, d, f: optfn.one_cycle_lr(a, 17, div_factor=d, final_div_factor=f, three_phase=True), (0.9, 5.0, 20.0)),
    "cosine_annealing": (lambda a, e: optfn.cosine_annealing_lr(a, 6, e), (0.9, 0.1)),
    "warm_restarts": (lambda a, e: optfn.cosine_annealing_warm_restarts(a, 2, 2, e), (0.9, 0.1)),
    "cyclic": (lambda a, b, g: optfn.cyclic_lr(a, b, 3, 4, "exp_range", g), (0.1, 0.9, 0.95)),
    "multiplicative": (lambda a, f: optfn.multiplicative_lr(a, lambda step: f + 1 / step, 9), (0.9, 0.5)),
    "chained": (lambda a, b: optfn.chained_scheduler([optfn.constant_schedule(a), optfn.linear_schedule(1.0, b, 7)]), (0.9, 0.1)),
    "warmup_stable_decay": (lambda a, b, e: optfn.warmup_stable_decay_schedule(a, b, 5, 7, 4, e), (0.1, 0.9, 0.2)),
}
DIFFERENTIABLE = range(25)


@pytest.mark.parametrize("name", OF_TENSORS)
def test_tensor_arguments(name):
    """A tensor argument gives the value of the float, batches, and has the derivative of a finite difference."""
    make, numbers = OF_TENSORS[name]
    steps = torch.tensor(DIFFERENTIABLE)
    arguments = tuple(torch.tensor(x, dtype=torch.float64) for x in numbers)
    values = make(*arguments)(steps)
    assert_close(values, make(*numbers)(steps), 1e-14)
    assert torch.autograd.gradcheck(lambda *a: make(*a)(steps), [a.clone().requires_grad_() for a in arguments])
    batched = torch.vmap(lambda *a: make(*a)(steps))(*(torch.stack([a, 0.9 * a]) for a in arguments))
    assert_close(batched, torch.stack([values, make(*(0.9 * a for a in arguments))(steps)]), 1e-14)


@pytest.mark.parametrize("name", OF_TENSORS)
def test_tensor_arguments_in_a_graph(name):
    make, numbers = OF_TENSORS[name]

    def value_and_grads(step, *arguments):
        return torch.func.grad_and_value(lambda a: make(*a)(step))(arguments)

    arguments = tuple(torch.tensor(x, dtype=torch.float64) for x in numbers)
    compiled, graphs = counted(value_and_grads)
    for step in (torch.tensor(0), torch.tensor(6), torch.tensor(30)):
        assert_close(compiled(step, *arguments), value_and_grads(step, *arguments), 1e-14)
    assert len(graphs) == 1


ERRORS = {
    "transition_begin must be >= 0, got -1": lambda: optfn.linear_schedule(1.0, 0.0, 3, -1),
    "transition_begin must be >= 0, got -2": lambda: optfn.polynomial_schedule(1.0, 0.0, 2, 3, -2),
    "transition_steps must be > 0 and transition_begin >= 0, got 0 and 0": lambda: optfn.exponential_decay(1.0, 0, 0.5),
    "transition_steps must be > 0 and transition_begin >= 0, got 3 and -1": lambda: optfn.exponential_decay(1.0, 3, 0.5, -1),
    "decay_rate must be > 0, got 0": lambda: optfn.exponential_decay(1.0, 3, 0),
    "decay_steps must be > 0, got 0": lambda: optfn.cosine_decay_schedule(1.0, 0),
    "the factor at step 3 must be >= 0, got -0.5": lambda: optfn.piecewise_constant_schedule(1.0, {3: -0.5}),
    "2 schedules need 1 boundaries, got 0": lambda: optfn.join_schedules([optfn.constant_schedule(1.0)] * 2, []),
    "boundaries must ascend, got \\[3, 2\\]": lambda: optfn.join_schedules([optfn.constant_schedule(1.0)] * 3, [3, 2]),
    "the factor at step 4 must be >= 0, got -1.0": lambda: optfn.piecewise_interpolate_schedule("linear", 1.0, {4: -1.0}),
    "a piece is 'linear' or 'cosine', got 'cos'": lambda: optfn.piecewise_interpolate_schedule("cos", 1.0),
    "transition_steps must be > 0, got 0": lambda: optfn.linear_onecycle_schedule(0, 1.0),
    "transition_steps must be > 0, got -1": lambda: optfn.cosine_onecycle_schedule(-1, 1.0),
    "total_steps must be >= 1 and pct_start within \\[0, 1\\], got 0 and 0.3": lambda: optfn.one_cycle_lr(1.0, 0),
    "total_steps must be >= 1 and pct_start within \\[0, 1\\], got 9 and 1.1": lambda: optfn.one_cycle_lr(1.0, 9, pct_start=1.1),
    "anneal_strategy must be 'cos' or 'linear', got 'cosine'": lambda: optfn.one_cycle_lr(1.0, 9, anneal_strategy="cosine"),
    "t_max must be > 0, got 0": lambda: optfn.cosine_annealing_lr(1.0, 0),
    "t_0 must be >= 1 and t_mult a whole number >= 1, got 0 and 1": lambda: optfn.cosine_annealing_warm_restarts(1.0, 0),
    "t_0 must be >= 1 and t_mult a whole number >= 1, got 3 and 1.5": lambda: optfn.cosine_annealing_warm_restarts(1.0, 3, 1.5),
    "step sizes must be > 0, got 3 and 0": lambda: optfn.cyclic_lr(0.0, 1.0, 3, 0),
    "mode must be one of triangular, triangular2, exp_range .* got square and cycle": lambda: optfn.cyclic_lr(
        0.0, 1.0, mode="square"
    ),
    "scale_mode cycle or iterations, got triangular and steps": lambda: optfn.cyclic_lr(0.0, 1.0, scale_mode="steps"),
    "total_steps must be >= 0, got -1": lambda: optfn.multiplicative_lr(1.0, lambda step: 1.0, -1),
    "chained_scheduler takes at least one schedule": lambda: optfn.chained_scheduler([]),
    "decay_steps counts the warm-up: it must be > 5, got 5": lambda: optfn.warmup_cosine_decay_schedule(0.0, 1.0, 5, 5),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()
