"""Schedules against the classes of torch.optim.lr_scheduler and swa_utils, as docs/from-torch-optim.md translates them."""

import math
import warnings

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

import optfn

STEPS = 200
LR = 0.7
TOLERANCE = 1e-10

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # no optimizer steps here


def optimizer(lr=LR):
    return torch.optim.SGD([torch.zeros(1)], lr=lr, momentum=0.9)


def walk(scheduler, opt, read=lambda group: group["lr"], steps=STEPS):
    """What torch has in its parameter group at each step."""
    found = [float(read(opt.param_groups[0]))]
    for _ in range(steps - 1):
        scheduler.step()
        found.append(float(read(opt.param_groups[0])))
    return torch.tensor(found, dtype=torch.float64)


def values(schedule, steps=STEPS):
    return schedule(torch.arange(steps, dtype=torch.float64))  # the dtype that transformations hand over


def assert_within(ours, theirs, tolerance=TOLERANCE):
    assert theirs.isfinite().all()
    assert (theirs != theirs[0]).any(), "torch's values do not change, so they prove nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def wave(x):
    """Between 0.5 and 1, in Python numbers and in torch arithmetic."""
    return 0.75 + 0.25 * (torch.cos(x) if isinstance(x, torch.Tensor) else math.cos(x))


# Name: torch's scheduler of an optimizer, our schedule.
PAIRS = {
    "LambdaLR": (lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)), lambda step: LR * (1 / (1 + step))),
    "MultiplicativeLR": (lambda o: lr_scheduler.MultiplicativeLR(o, wave), optfn.multiplicative_lr(LR, wave, STEPS)),
    "StepLR": (lambda o: lr_scheduler.StepLR(o, 30), optfn.exponential_decay(LR, 30, 0.1, staircase=True)),
    "StepLR: grows": (lambda o: lr_scheduler.StepLR(o, 7, 1.01), optfn.exponential_decay(LR, 7, 1.01, staircase=True)),
    "MultiStepLR": (
        lambda o: lr_scheduler.MultiStepLR(o, [30, 80, 80, 120], 0.5),
        optfn.piecewise_constant_schedule(LR, {30: 0.5, 80: 0.5**2, 120: 0.5}),
    ),
    "ConstantLR": (lambda o: lr_scheduler.ConstantLR(o), optfn.piecewise_constant_schedule(LR / 3, {5: 3.0})),
    "ConstantLR: all numbers": (
        lambda o: lr_scheduler.ConstantLR(o, 0.4, 60),
        optfn.piecewise_constant_schedule(LR * 0.4, {60: 1 / 0.4}),
    ),
    "LinearLR": (lambda o: lr_scheduler.LinearLR(o), optfn.linear_schedule(LR / 3, LR, 5)),
    "LinearLR: all numbers": (lambda o: lr_scheduler.LinearLR(o, 0.9, 0.2, 130), optfn.linear_schedule(LR * 0.9, LR * 0.2, 130)),
    "LinearLR: to 0": (lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, 130), optfn.linear_schedule(LR, 0.0, 130)),
    "ExponentialLR": (lambda o: lr_scheduler.ExponentialLR(o, 0.97), optfn.exponential_decay(LR, 1, 0.97)),
    "PolynomialLR": (lambda o: lr_scheduler.PolynomialLR(o), optfn.polynomial_schedule(LR, 0.0, 1.0, 5)),
    "PolynomialLR: all numbers": (
        lambda o: lr_scheduler.PolynomialLR(o, 150, 2.5),
        optfn.polynomial_schedule(LR, 0.0, 2.5, 150),
    ),
    "CosineAnnealingLR": (lambda o: lr_scheduler.CosineAnnealingLR(o, 30), optfn.cosine_annealing_lr(LR, 30)),
    "CosineAnnealingLR: eta_min": (lambda o: lr_scheduler.CosineAnnealingLR(o, 7, 0.05), optfn.cosine_annealing_lr(LR, 7, 0.05)),
    "CosineAnnealingLR: upwards": (lambda o: lr_scheduler.CosineAnnealingLR(o, 7, 0.9), optfn.cosine_annealing_lr(LR, 7, 0.9)),
    "CosineAnnealingLR: one half wave": (
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS - 1, 0.05),
        optfn.cosine_decay_schedule(LR, STEPS - 1, 0.05 / LR),
    ),
    "CosineAnnealingWarmRestarts": (
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 13),
        optfn.cosine_annealing_warm_restarts(LR, 13),
    ),
    "CosineAnnealingWarmRestarts: twice as long": (
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10, 2, 0.05),
        optfn.cosine_annealing_warm_restarts(LR, 10, 2, 0.05),
    ),
    "CosineAnnealingWarmRestarts: from one step": (
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 1, 3, 0.05),
        optfn.cosine_annealing_warm_restarts(LR, 1, 3, 0.05),
    ),
    "CosineAnnealingWarmRestarts: as SGDR": (
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 50, 3, 0.05),
        optfn.sgdr_schedule(
            {"init_value": LR, "peak_value": LR, "warmup_steps": 0, "decay_steps": n, "end_value": 0.05} for n in (50, 150)
        ),
    ),
    "CyclicLR": (lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.9, 23), optfn.cyclic_lr(0.1, 0.9, 23)),
    "CyclicLR: down faster": (lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.9, 23, 9), optfn.cyclic_lr(0.1, 0.9, 23, 9)),
    "CyclicLR: triangular2": (
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.9, 11, 19, mode="triangular2"),
        optfn.cyclic_lr(0.1, 0.9, 11, 19, mode="triangular2"),
    ),
    "CyclicLR: exp_range": (
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.9, 11, mode="exp_range", gamma=0.99),
        optfn.cyclic_lr(0.1, 0.9, 11, mode="exp_range", gamma=0.99),
    ),
    "CyclicLR: function of the cycle": (
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.9, 11, scale_fn=wave),
        optfn.cyclic_lr(0.1, 0.9, 11, scale_fn=wave),
    ),
    "CyclicLR: function of the step": (
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.9, 11, scale_fn=wave, scale_mode="iterations"),
        optfn.cyclic_lr(0.1, 0.9, 11, scale_fn=wave, scale_mode="iterations"),
    ),
    **{
        f"OneCycleLR: {strategy}, {share}{', three phases' * three}": (
            lambda o, share=share, strategy=strategy, three=three: lr_scheduler.OneCycleLR(
                o, 0.9, STEPS, pct_start=share, anneal_strategy=strategy, three_phase=three, div_factor=10, final_div_factor=30
            ),
            optfn.one_cycle_lr(
                0.9, STEPS, pct_start=share, anneal_strategy=strategy, three_phase=three, div_factor=10, final_div_factor=30
            ),
        )
        for strategy in ("cos", "linear")
        for three in (False, True)
        for share in (0.3, 0.2513, 0.0, 0.5, 0.6, 1.0)
    },
    "OneCycleLR: defaults, epochs": (
        lambda o: lr_scheduler.OneCycleLR(o, 0.9, epochs=20, steps_per_epoch=STEPS // 20),
        optfn.one_cycle_lr(0.9, 20 * (STEPS // 20)),
    ),
    # Optax's cycles where their boundaries are torch's.
    "OneCycleLR: as Optax, cosine": (
        lambda o: lr_scheduler.OneCycleLR(o, 0.9, STEPS, pct_start=0.5),
        optfn.cosine_onecycle_schedule(STEPS - 1, 0.9, 99.5 / 199),
    ),
    "OneCycleLR: as Optax, linear": (
        lambda o: lr_scheduler.OneCycleLR(o, 0.9, STEPS, pct_start=0.25, anneal_strategy="linear", three_phase=True),
        optfn.linear_onecycle_schedule(STEPS - 1, 0.9, 49.5 / 199, 98.5 / 199),
    ),
    "SWALR": (lambda o: swa_utils.SWALR(o, 0.05, 40), optfn.cosine_decay_schedule(LR, 40, 0.05 / LR)),
    "SWALR: linear": (
        lambda o: swa_utils.SWALR(o, 0.05, 40, "linear"),
        optfn.linear_schedule(LR, 0.05, 40),
    ),
    "ChainedScheduler": (
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.LinearLR(o, 0.1, 1.0, 20), lr_scheduler.ExponentialLR(o, 0.99), lr_scheduler.MultiStepLR(o, [50], 0.5)]
        ),
        optfn.chained_scheduler(
            [
                optfn.linear_schedule(0.1, 1.0, 20),
                optfn.exponential_decay(LR, 1, 0.99),
                optfn.piecewise_constant_schedule(1.0, {50: 0.5}),
            ]
        ),
    ),
    "ChainedScheduler: warm-up of a half cosine": (
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(o, 0.1, 20), lr_scheduler.CosineAnnealingLR(o, STEPS - 1)]
        ),
        optfn.chained_scheduler([optfn.piecewise_constant_schedule(0.1, {20: 10.0}), optfn.cosine_decay_schedule(LR, STEPS - 1)]),
    ),
    "SequentialLR": (
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 20), lr_scheduler.CosineAnnealingLR(o, 100)], [20]
        ),
        optfn.join_schedules([optfn.linear_schedule(LR * 0.1, LR, 20), optfn.cosine_annealing_lr(LR, 100)], [20]),
    ),
    "SequentialLR: cut short": (
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.ExponentialLR(o, 0.9),
                lr_scheduler.StepLR(o, 6, 0.5),
                lr_scheduler.CosineAnnealingWarmRestarts(o, 9, 2),
                lr_scheduler.PolynomialLR(o, 50, 2.0),
            ],
            [7, 33, 100],
        ),
        optfn.join_schedules(
            [
                optfn.exponential_decay(LR, 1, 0.9),
                optfn.exponential_decay(LR, 6, 0.5, staircase=True),
                optfn.cosine_annealing_warm_restarts(LR, 9, 2),
                optfn.polynomial_schedule(LR, 0.0, 2.0, 50),
            ],
            [7, 33, 100],
        ),
    ),
    "SequentialLR: one left out, from step 0": (
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.ConstantLR(o, 0.1, 900),
                lr_scheduler.LinearLR(o, 0.5, 1.0, 9),
                lr_scheduler.StepLR(o, 5),
                lr_scheduler.ExponentialLR(o, 0.9),
            ],
            [0, 30, 30],
        ),
        optfn.join_schedules(
            [
                optfn.constant_schedule(9.0),
                optfn.linear_schedule(LR * 0.5, LR, 9),
                optfn.constant_schedule(9.0),
                optfn.exponential_decay(LR, 1, 0.9),
            ],
            [0, 30, 30],
        ),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_schedule_is_torch(name):
    make, schedule = PAIRS[name]
    opt = optimizer()
    assert_within(values(schedule), walk(make(opt), opt))


CLOSED = ["StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR", "CosineAnnealingLR"]


@pytest.mark.parametrize("name", [name for name in PAIRS if name.split(":")[0] in CLOSED])
def test_schedule_is_torch_closed_form(name):
    """torch computes each of these from the value before; the formula that it documents is what is meant, and what we compute."""
    make, schedule = PAIRS[name]
    scheduler, expected = make(optimizer()), []
    for step in range(STEPS):
        scheduler.last_epoch = step
        expected.append(scheduler._get_closed_form_lr()[0])
    assert_within(values(schedule), torch.tensor(expected, dtype=torch.float64), 1e-14)


def restarts(t, length, times):
    while t >= length:
        t, length = t - length, length * times
    return t / length


def triangle(t, up, down):
    t %= up + down
    return t / up if t <= up else (up + down - t) / down


# Of those that torch has no closed form of, or drifts from: a formula in Python numbers.
FORMULAS = {
    "CosineAnnealingWarmRestarts": lambda t: LR * (1 + math.cos(math.pi * restarts(t, 13, 1))) / 2,
    "CosineAnnealingWarmRestarts: twice as long": lambda t: 0.05 + (LR - 0.05) * (1 + math.cos(math.pi * restarts(t, 10, 2))) / 2,
    "CosineAnnealingWarmRestarts: from one step": lambda t: 0.05 + (LR - 0.05) * (1 + math.cos(math.pi * restarts(t, 1, 3))) / 2,
    "CyclicLR: down faster": lambda t: 0.1 + 0.8 * triangle(t, 23, 9),
    "CyclicLR: triangular2": lambda t: 0.1 + 0.8 * triangle(t, 11, 19) / 2 ** (t // 30),
    "CyclicLR: exp_range": lambda t: 0.1 + 0.8 * triangle(t, 11, 11) * 0.99**t,
    "MultiplicativeLR": lambda t: LR * math.prod(0.75 + 0.25 * math.cos(i) for i in range(1, t + 1)),
    "SWALR": lambda t: 0.05 + (LR - 0.05) * (1 + math.cos(math.pi * min(t / 40, 1))) / 2,
    "OneCycleLR: linear, 0.3": lambda t: 0.09 + 0.81 * t / 59 if t <= 59 else 0.9 + (0.003 - 0.9) * (t - 59) / 140,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_schedule_is_its_formula(name):
    expected = torch.tensor([FORMULAS[name](t) for t in range(STEPS)], dtype=torch.float64)
    assert_within(values(PAIRS[name][1]), expected, 1e-13)


@pytest.mark.parametrize(("t_0", "t_mult"), [(1, 2), (3, 2), (7, 3), (1, 10), (5, 7)])
def test_restarts_are_exact_after_many_steps(t_0, t_mult):
    schedule, end, length = optfn.cosine_annealing_warm_restarts(1.0, t_0, t_mult), t_0, t_0
    while end < 1e12:
        length *= t_mult
        around = schedule(torch.tensor([end - 1, end, end + 1]))
        before = 0.5 * (1 + math.cos(math.pi * (length // t_mult - 1) / (length // t_mult)))
        expected = torch.tensor([before, 1.0, 0.5 * (1 + math.cos(math.pi / length))], dtype=torch.float64)
        torch.testing.assert_close(around, expected, rtol=0, atol=1e-14)
        end += length


def test_between_epochs():
    """torch is told a fraction of an epoch: ``scheduler.step(epoch + i / batches)``."""
    opt = optimizer()
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(opt, 3, 2, 0.05)
    schedule = optfn.cosine_annealing_warm_restarts(LR, 3, 2, 0.05)
    for i in range(STEPS):
        scheduler.step(i / 7)
        assert schedule(torch.tensor(i / 7, dtype=torch.float64)).item() == pytest.approx(opt.param_groups[0]["lr"], abs=TOLERANCE)


def test_the_recursion_of_torch_drifts():
    """So what is meant is the formula: a schedule keeps it to the last digits after many steps, where torch's value does not."""
    opt, steps, half = optimizer(), 30_001, 10_000
    theirs = walk(lr_scheduler.CosineAnnealingLR(opt, half, 0.05), opt, steps=steps)
    exact = [0.05 + (LR - 0.05) * 0.5 * (1 + math.cos(math.pi * t / half)) for t in range(steps)]
    off = values(optfn.cosine_annealing_lr(LR, half, 0.05), steps) - torch.tensor(exact, dtype=torch.float64)
    assert off.abs().max() < 1e-15
    assert (theirs - torch.tensor(exact, dtype=torch.float64)).abs().max() > 1e-11


def test_a_cycle_is_over():
    """One step after the last torch goes on along the cosine, then raises an error; here the last value is held."""
    opt = optimizer()
    scheduler = lr_scheduler.OneCycleLR(opt, 0.9, 10)
    theirs = walk(scheduler, opt, steps=10)
    assert_within(values(optfn.one_cycle_lr(0.9, 10), 10), theirs)
    scheduler.step()
    assert opt.param_groups[0]["lr"] > theirs[-1]
    with pytest.raises(ValueError, match="Tried to step 11 times"):
        scheduler.step()
    assert values(optfn.one_cycle_lr(0.9, 10), 30)[10:].tolist() == [pytest.approx(theirs[-1].item())] * 20


def test_sequential_of_a_multiplicative_one():
    """torch multiplies what the scheduler before left, by the factor of step 0 too; ours begins at its own value."""
    opt = optimizer()
    parts = [lr_scheduler.ConstantLR(opt, 0.5, 900), lr_scheduler.MultiplicativeLR(opt, wave)]
    theirs = walk(lr_scheduler.SequentialLR(opt, parts, [20]), opt)
    begin = 0.5 * LR * wave(0)
    ours = optfn.join_schedules([optfn.constant_schedule(0.5 * LR), optfn.multiplicative_lr(begin, wave, STEPS)], [20])
    assert_within(values(ours), theirs)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_swalr_late_in_a_schedule(strategy):
    """As swa_utils' own example: one scheduler first, SWALR after it. The last value of the first is where SWALR begins."""
    opt, start = optimizer(), 120
    scheduler = lr_scheduler.CosineAnnealingLR(opt, 300)
    swa, theirs = swa_utils.SWALR(opt, 0.05, 30, strategy), []
    for step in range(STEPS):
        theirs.append(opt.param_groups[0]["lr"])
        (swa if step >= start else scheduler).step()
    first = optfn.cosine_decay_schedule(LR, 300)
    lr = first(start).item()
    last = optfn.cosine_decay_schedule(lr, 30, 0.05 / lr) if strategy == "cos" else optfn.linear_schedule(lr, 0.05, 30)
    assert_within(values(optfn.join_schedules([first, last], [start])), torch.tensor(theirs, dtype=torch.float64))


def test_swalr_of_no_epochs():
    opt = optimizer()
    theirs = walk(swa_utils.SWALR(opt, 0.05, 0), opt)
    torch.testing.assert_close(values(optfn.constant_schedule(0.05)), theirs, rtol=0, atol=TOLERANCE)


# Momentum, cycled against the learning rate


CYCLES = {"triangular": {}, "triangular2": {"mode": "triangular2"}, "exp_range": {"mode": "exp_range", "gamma": 0.99}}
ONE_CYCLES = {
    f"{strategy}{', three phases' * three}": {"pct_start": 0.27, "anneal_strategy": strategy, "three_phase": three}
    for strategy in ("cos", "linear")
    for three in (False, True)
}
MOMENTA = {
    **{
        f"CyclicLR: {name}": (
            lambda o, given=given: lr_scheduler.CyclicLR(o, 0.1, 0.9, 11, 7, base_momentum=0.6, max_momentum=0.95, **given),
            optfn.cyclic_lr(0.1, 0.9, 11, 7, **given),
            optfn.cyclic_lr(0.95, 0.6, 11, 7, **given),
        )
        for name, given in CYCLES.items()
    },
    **{
        f"OneCycleLR: {name}": (
            lambda o, given=given: lr_scheduler.OneCycleLR(o, 0.9, STEPS, base_momentum=0.6, max_momentum=0.95, **given),
            optfn.one_cycle_lr(0.9, STEPS, **given),
            optfn.one_cycle_lr(0.6, STEPS, div_factor=0.6 / 0.95, final_div_factor=1.0, **given),
        )
        for name, given in ONE_CYCLES.items()
    },
}


@pytest.mark.parametrize("name", MOMENTA)
def test_momentum_is_torch(name):
    make, _, momentum = MOMENTA[name]
    opt = optimizer()
    assert_within(values(momentum), walk(make(opt), opt, lambda group: group["momentum"]))


def with_b1(lr, b1):
    return optfn.adam(lr, betas=(b1, 0.99))


@pytest.mark.parametrize("name", MOMENTA)
@pytest.mark.parametrize("algorithm", ["sgd", "adam"])
def test_training_with_a_cycled_momentum(name, algorithm):
    """The whole way: SGD's momentum, Adam's first beta, as injected hyperparameters."""
    make, lr, momentum = MOMENTA[name]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, dtype=torch.float64, generator=generator)
    p = torch.nn.Parameter(start.clone())
    if algorithm == "sgd":
        opt, tx = torch.optim.SGD([p], momentum=0.5), optfn.inject_hyperparams(optfn.sgd)(lr, momentum=momentum)
    else:
        opt, tx = torch.optim.Adam([p], betas=(0.5, 0.99)), optfn.inject_hyperparams(with_b1)(lr, momentum)
    scheduler = make(opt)
    params, state = start, tx.init(start)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, if the scheduler is stepped out of order
        for _ in range(60):
            g = torch.randn(4, dtype=torch.float64, generator=generator)
            p.grad = g.clone()
            opt.step()
            scheduler.step()
            updates, state = tx.update(g, state, params)
            params = optfn.apply_updates(params, updates)
            # torch's step counts, as floats, and its bias corrections are of Python numbers: 1e-10 is the schedules' tolerance
            torch.testing.assert_close(params, p.detach(), rtol=TOLERANCE, atol=TOLERANCE)
