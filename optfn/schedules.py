"""Schedules: pure functions of the step, under Optax's names.

A schedule takes a step, an int or a tensor of any shape (0 is the first), and returns a tensor of that shape. The math
runs in float64 (float32 on a device that has none), and traces, batches and differentiates in tensor arguments.

Your own schedule is any such function in torch arithmetic, ``lambda step: 0.1 * 0.9**step``; transformations hand it the step as a
0-dim float64 tensor.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from optfn.numerics import Scalar, widened_scalar

__all__ = [
    "Schedule",
    "constant_schedule",
    "cosine_decay_schedule",
    "exponential_decay",
    "join_schedules",
    "linear_schedule",
    "piecewise_constant_schedule",
    "polynomial_schedule",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_stable_decay_schedule",
]

Schedule: TypeAlias = Callable[[Any], Tensor]
"""``schedule(step) -> value``."""

ScalarOrSchedule: TypeAlias = float | Tensor | Schedule


def as_time(step: int | float | Tensor) -> Tensor:
    """The step as a floating-point tensor to compute with: float64, or float32 where the device has no float64.

    Example:
        >>> as_time(3)
        tensor(3., dtype=torch.float64)
    """
    if not isinstance(step, Tensor):
        return torch.tensor(step, dtype=torch.float64)
    return widened_scalar(step)


def constant_schedule(value: Scalar) -> Schedule:
    """The same value at every step.

    Example:
        >>> constant_schedule(0.1)(5)
        tensor(0.1000, dtype=torch.float64)
    """
    return lambda step: torch.zeros_like(as_time(step)) + value


def polynomial_schedule(
    init_value: Scalar, end_value: Scalar, power: Scalar, transition_steps: int, transition_begin: int = 0
) -> Schedule:
    r"""From one value to another along a power: :math:`(a - b)(1 - x)^p + b`, :math:`x = (t - t_0) / T` held within [0, 1].

    Args:
        init_value: :math:`a`, the value up to ``transition_begin``.
        end_value: :math:`b`, the value from ``transition_begin + transition_steps`` on.
        power: :math:`p > 0`.
        transition_steps: :math:`T`, in steps; 0 or less gives a constant ``init_value``, as in Optax.
        transition_begin: :math:`t_0 \ge 0`, in steps.

    Raises:
        ValueError: ``transition_begin`` is negative.

    Example:
        >>> polynomial_schedule(1.0, 0.0, 2.0, 4)(torch.arange(5))
        tensor([1.0000, 0.5625, 0.2500, 0.0625, 0.0000], dtype=torch.float64)
    """
    if transition_begin < 0:
        raise ValueError(f"transition_begin must be >= 0, got {transition_begin}")
    if transition_steps <= 0:
        return constant_schedule(init_value)

    def schedule(step: Any) -> Tensor:
        remaining = 1 - ((as_time(step) - transition_begin) / transition_steps).clamp(0, 1)
        return (init_value - end_value) * remaining**power + end_value

    return schedule


def linear_schedule(init_value: Scalar, end_value: Scalar, transition_steps: int, transition_begin: int = 0) -> Schedule:
    """From one value to another in a straight line: :func:`polynomial_schedule` with power 1.

    Example:
        >>> linear_schedule(0.0, 1.0, 4)(torch.arange(6))
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000, 1.0000], dtype=torch.float64)
    """
    return polynomial_schedule(init_value, end_value, 1, transition_steps, transition_begin)


def exponential_decay(
    init_value: Scalar,
    transition_steps: int,
    decay_rate: Scalar,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: Scalar | None = None,
) -> Schedule:
    r"""Exponential decay: :math:`a\, r^{(t - t_0) / T}` from :math:`t_0` on, :math:`a` before.

    Args:
        init_value: :math:`a`.
        transition_steps: :math:`T > 0`, the steps in which the value falls by the factor ``decay_rate``.
        decay_rate: :math:`r > 0`; 1 or less decays, above 1 grows.
        transition_begin: :math:`t_0 \ge 0`, in steps.
        staircase: whether the exponent is rounded down to whole numbers.
        end_value: a bound that the value stops at: from below where it decays, from above where it grows.

    Raises:
        ValueError: ``transition_steps`` or ``decay_rate`` is not positive, or ``transition_begin`` is negative.

    Example:
        >>> exponential_decay(1.0, 2, 0.25)(torch.arange(4))
        tensor([1.0000, 0.5000, 0.2500, 0.1250], dtype=torch.float64)
    """
    if transition_steps <= 0 or transition_begin < 0:
        raise ValueError(f"transition_steps must be > 0 and transition_begin >= 0, got {transition_steps} and {transition_begin}")
    if not isinstance(decay_rate, Tensor) and decay_rate <= 0:
        raise ValueError(f"decay_rate must be > 0, got {decay_rate}")

    def schedule(step: Any) -> Tensor:
        exponent = ((as_time(step) - transition_begin) / transition_steps).clamp_min(0)
        rate = torch.as_tensor(decay_rate, dtype=exponent.dtype, device=exponent.device)
        value = init_value * rate ** (exponent.floor() if staircase else exponent)
        if end_value is None:
            return value
        bound = torch.as_tensor(end_value, dtype=value.dtype, device=value.device)
        return torch.where(rate > 1, torch.minimum(value, bound), torch.maximum(value, bound))

    return schedule


def cosine_decay_schedule(init_value: Scalar, decay_steps: int, alpha: Scalar = 0.0, exponent: Scalar = 1.0) -> Schedule:
    r"""Half a cosine down: :math:`a\,((1 - \alpha)\,(\tfrac12(1 + \cos \pi x))^p + \alpha)`, :math:`x = t / T \le 1`.

    Args:
        init_value: :math:`a`.
        decay_steps: :math:`T > 0`, in steps.
        alpha: the share of ``init_value`` that is left at the end.
        exponent: :math:`p`.

    Raises:
        ValueError: ``decay_steps`` is not positive.

    Reference:
        Loshchilov and Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2016, equation 5 (one period).

    Example:
        >>> cosine_decay_schedule(1.0, 4)(torch.arange(5))
        tensor([1.0000, 0.8536, 0.5000, 0.1464, 0.0000], dtype=torch.float64)
    """
    if decay_steps <= 0:
        raise ValueError(f"decay_steps must be > 0, got {decay_steps}")

    def schedule(step: Any) -> Tensor:
        x = (as_time(step) / decay_steps).clamp_max(1)
        return init_value * ((1 - alpha) * (0.5 * (1 + torch.cos(math.pi * x))) ** exponent + alpha)

    return schedule


def piecewise_constant_schedule(init_value: Scalar, boundaries_and_scales: Mapping[int, Scalar] | None = None) -> Schedule:
    """A constant that is multiplied by a factor at each boundary, from the boundary's own step on.

    Args:
        init_value: the value before the first boundary.
        boundaries_and_scales: step to factor.

    Raises:
        ValueError: a factor is negative.

    Example:
        >>> piecewise_constant_schedule(1.0, {2: 0.5, 3: 0.5})(torch.arange(5))
        tensor([1.0000, 1.0000, 0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """
    scales = dict(boundaries_and_scales or {})
    for boundary, scale in scales.items():
        if not isinstance(scale, Tensor) and scale < 0:
            raise ValueError(f"the factor at step {boundary} must be >= 0, got {scale}")

    def schedule(step: Any) -> Tensor:
        time = as_time(step)
        value = torch.zeros_like(time) + init_value
        for boundary, scale in scales.items():
            value = torch.where(time >= boundary, value * scale, value)
        return value

    return schedule


def join_schedules(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after another; each counts its steps from its own boundary.

    Args:
        schedules: the schedules, in order.
        boundaries: the step at which each but the first begins, ascending, one fewer than schedules.

    Raises:
        ValueError: the numbers do not fit, or the boundaries do not ascend.

    Example:
        >>> join_schedules([linear_schedule(0.0, 1.0, 2), constant_schedule(5.0)], [2])(torch.arange(4))
        tensor([0.0000, 0.5000, 5.0000, 5.0000], dtype=torch.float64)
    """
    if len(schedules) != len(boundaries) + 1:
        raise ValueError(f"{len(schedules)} schedules need {len(schedules) - 1} boundaries, got {len(boundaries)}")
    if list(boundaries) != sorted(boundaries):
        raise ValueError(f"boundaries must ascend, got {list(boundaries)}")

    def schedule(step: Any) -> Tensor:
        time = as_time(step)
        value = schedules[0](step)
        for boundary, later in zip(boundaries, schedules[1:], strict=True):
            value = torch.where(time < boundary, value, later(step - boundary))
        return value

    return schedule


def warmup_constant_schedule(init_value: Scalar, peak_value: Scalar, warmup_steps: int) -> Schedule:
    """A straight line up to ``peak_value`` in ``warmup_steps`` steps, then constant.

    Example:
        >>> warmup_constant_schedule(0.0, 1.0, 2)(torch.arange(4))
        tensor([0.0000, 0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
    return linear_schedule(init_value, peak_value, warmup_steps) if warmup_steps > 0 else constant_schedule(peak_value)


def warmup_cosine_decay_schedule(
    init_value: Scalar, peak_value: Scalar, warmup_steps: int, decay_steps: int, end_value: Scalar = 0.0, exponent: Scalar = 1.0
) -> Schedule:
    """A straight line up to ``peak_value``, then half a cosine down to ``end_value``.

    Args:
        init_value: the value at step 0.
        peak_value: the value at ``warmup_steps``.
        warmup_steps: the length of the warm-up, in steps.
        decay_steps: the length of the whole, *warm-up included*, in steps; more than ``warmup_steps``.
        end_value: the value from ``decay_steps`` on.
        exponent: as in :func:`cosine_decay_schedule`.

    Raises:
        ValueError: ``decay_steps`` is not more than ``warmup_steps``.

    Example:
        >>> warmup_cosine_decay_schedule(0.0, 1.0, 2, 6)(torch.arange(7))
        tensor([0.0000, 0.5000, 1.0000, 0.8536, 0.5000, 0.1464, 0.0000],
               dtype=torch.float64)
    """
    if decay_steps <= warmup_steps:
        raise ValueError(f"decay_steps counts the warm-up: it must be > {warmup_steps}, got {decay_steps}")
    half_cosine = cosine_decay_schedule(1.0, decay_steps - warmup_steps, exponent=exponent)
    decay: Schedule = lambda step: (peak_value - end_value) * half_cosine(step) + end_value  # noqa: E731
    return join_schedules([linear_schedule(init_value, peak_value, warmup_steps), decay], [warmup_steps])


def warmup_stable_decay_schedule(
    init_value: Scalar, peak_value: Scalar, warmup_steps: int, stable_steps: int, decay_steps: int, end_value: Scalar = 0.0
) -> Schedule:
    """Warm-up, stable, decay: a straight line up, a constant, a straight line down.

    Args:
        init_value: the value at step 0.
        peak_value: the value from ``warmup_steps`` on.
        warmup_steps: the length of the warm-up, in steps.
        stable_steps: how long the peak is held, in steps.
        decay_steps: the length of the decay alone, in steps.
        end_value: the value from the end of the decay on.

    Reference:
        Hu et al., `MiniCPM <https://arxiv.org/abs/2404.06395>`_, 2024, section 4; with a linear decay as in Hägele et al.,
        `Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations <https://arxiv.org/abs/2405.18392>`_, 2024.

    Example:
        >>> warmup_stable_decay_schedule(0.0, 1.0, 2, 2, 2)(torch.arange(7))
        tensor([0.0000, 0.5000, 1.0000, 1.0000, 1.0000, 0.5000, 0.0000],
               dtype=torch.float64)
    """
    rise = warmup_constant_schedule(init_value, peak_value, warmup_steps)
    fall = linear_schedule(peak_value, end_value, decay_steps)
    return join_schedules([rise, fall], [warmup_steps + stable_steps])
