"""Schedules: pure functions of the step, under Optax's names, or a lower-case one of torch.optim.lr_scheduler where Optax has none.

A schedule takes a step, an int or a tensor of any shape (0 is the first), and returns a tensor of that shape. The math
runs in float64 (float32 on a device that has none), and traces, batches and differentiates in tensor arguments.

Your own schedule is any such function in torch arithmetic, ``lambda step: 0.1 * 0.9**step``; transformations hand it the step as a
0-dim float64 tensor.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from optfn.numerics import Scalar, widened_scalar

__all__ = [
    "Schedule",
    "chained_scheduler",
    "constant_schedule",
    "cosine_annealing_lr",
    "cosine_annealing_warm_restarts",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "cyclic_lr",
    "exponential_decay",
    "join_schedules",
    "linear_onecycle_schedule",
    "linear_schedule",
    "multiplicative_lr",
    "one_cycle_lr",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule",
    "polynomial_schedule",
    "sgdr_schedule",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
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
        _check_factor(boundary, scale)

    def schedule(step: Any) -> Tensor:
        time = as_time(step)
        value = torch.zeros_like(time) + init_value
        for boundary, scale in scales.items():
            value = torch.where(time >= boundary, value * scale, value)
        return value

    return schedule


def piecewise_interpolate_schedule(
    interpolate_type: Literal["linear", "cosine"],
    init_value: Scalar,
    boundaries_and_scales: Mapping[int, Scalar] | None = None,
) -> Schedule:
    """From one value to the next in straight lines or half cosines; each value is the one before times a factor.

    Args:
        interpolate_type: ``"linear"`` or ``"cosine"``.
        init_value: the value at step 0.
        boundaries_and_scales: step, at which a piece ends, to factor.

    Raises:
        ValueError: a factor is negative, or the type is neither.

    Example:
        >>> piecewise_interpolate_schedule("linear", 1.0, {2: 3.0, 4: 0.0})(torch.arange(6))
        tensor([1.0000, 2.0000, 3.0000, 1.5000, 0.0000, 0.0000], dtype=torch.float64)
    """
    points: list[tuple[float, Scalar]] = [(0, init_value)]
    for boundary, scale in sorted((boundaries_and_scales or {}).items(), key=lambda item: item[0]):
        _check_factor(boundary, scale)
        points.append((boundary, points[-1][1] * scale))
    return _interpolated(interpolate_type, points)


def _check_factor(boundary: float, scale: Scalar) -> None:
    if not isinstance(scale, Tensor) and scale < 0:
        raise ValueError(f"the factor at step {boundary} must be >= 0, got {scale}")


def _interpolated(kind: str, points: Sequence[tuple[float, Scalar]]) -> Schedule:
    """Through points (step, value), and the last value ever after."""
    if kind not in ("linear", "cosine"):
        raise ValueError(f"a piece is 'linear' or 'cosine', got {kind!r}")

    def schedule(step: Any) -> Tensor:
        time = as_time(step)
        value = torch.zeros_like(time) + points[-1][1]
        for (begin, first), (end, last) in reversed(list(itertools.pairwise(points))):
            if end > begin:
                x = ((time - begin) / (end - begin)).clamp(0, 1)
                share = x if kind == "linear" else 0.5 * (1 - torch.cos(math.pi * x))
                value = torch.where(time <= end, first + (last - first) * share, value)
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


def warmup_exponential_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: int,
    transition_steps: int,
    decay_rate: Scalar,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: Scalar | None = None,
) -> Schedule:
    """A straight line up to ``peak_value``, then :func:`exponential_decay`, whose steps count from the end of the warm-up.

    Args:
        init_value: the value at step 0.
        peak_value: the value at ``warmup_steps``.
        warmup_steps: the length of the warm-up, in steps; 0 for none.
        transition_steps: the steps in which the value falls by the factor ``decay_rate``, more than 0.
        decay_rate: more than 0.
        transition_begin: how long the peak is held, in steps.
        staircase: as in :func:`exponential_decay`.
        end_value: as in :func:`exponential_decay`.

    Raises:
        ValueError: as :func:`exponential_decay`.

    Example:
        >>> warmup_exponential_decay_schedule(0.0, 1.0, 2, 1, 0.5)(torch.arange(5))
        tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    decay = exponential_decay(peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value)
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


def sgdr_schedule(cosine_kwargs: Iterable[Mapping[str, Any]]) -> Schedule:
    """Warm restarts: one :func:`warmup_cosine_decay_schedule` after another.

    Args:
        cosine_kwargs: the arguments of each; the next begins after its ``decay_steps``.

    Reference:
        Loshchilov and Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2016, section 3.

    Example:
        >>> part = {"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 1}
        >>> sgdr_schedule([{**part, "decay_steps": 3}, {**part, "decay_steps": 2}])(torch.arange(6))
        tensor([0.0000, 1.0000, 0.5000, 0.0000, 1.0000, 0.0000], dtype=torch.float64)
    """
    parts = list(cosine_kwargs)
    ends = list(itertools.accumulate(part["decay_steps"] for part in parts))
    return join_schedules([warmup_cosine_decay_schedule(**part) for part in parts], ends[:-1])


def linear_onecycle_schedule(
    transition_steps: int,
    peak_value: Scalar,
    pct_start: float = 0.3,
    pct_final: float = 0.85,
    div_factor: Scalar = 25.0,
    final_div_factor: Scalar = 1e4,
) -> Schedule:
    """One cycle in straight lines, as Optax has it: up to the peak, back, and on down. torch's is :func:`one_cycle_lr`.

    Args:
        transition_steps: the length of the whole, in steps.
        peak_value: the value at ``int(pct_start * transition_steps)``.
        pct_start: the share of the steps that go up.
        pct_final: the share of the steps after which the value is the first one again.
        div_factor: the peak divided by the first value.
        final_div_factor: the first value divided by the last.

    Raises:
        ValueError: ``transition_steps`` is not positive.

    Reference:
        Smith and Topin, `Super-Convergence <https://arxiv.org/abs/1708.07120>`_, 2017.

    Example:
        >>> linear_onecycle_schedule(5, 1.0, 0.4, 0.8, div_factor=4.0, final_div_factor=5.0)(torch.arange(6))
        tensor([0.2500, 0.6250, 1.0000, 0.6250, 0.2500, 0.0500], dtype=torch.float64)
    """
    if transition_steps <= 0:
        raise ValueError(f"transition_steps must be > 0, got {transition_steps}")
    up, down = int(pct_start * transition_steps), int(pct_final * transition_steps)
    pieces = {up: div_factor, down: 1 / div_factor, transition_steps: 1 / final_div_factor}
    return piecewise_interpolate_schedule("linear", peak_value / div_factor, pieces)


def cosine_onecycle_schedule(
    transition_steps: int,
    peak_value: Scalar,
    pct_start: float = 0.3,
    div_factor: Scalar = 25.0,
    final_div_factor: Scalar = 1e4,
) -> Schedule:
    """One cycle in half cosines, as Optax has it: up to the peak, then down. torch's is :func:`one_cycle_lr`.

    Args:
        transition_steps: the length of the whole, in steps.
        peak_value: the value at ``int(pct_start * transition_steps)``.
        pct_start: the share of the steps that go up.
        div_factor: the peak divided by the first value.
        final_div_factor: the first value divided by the last.

    Raises:
        ValueError: ``transition_steps`` is not positive.

    Reference:
        Smith and Topin, `Super-Convergence <https://arxiv.org/abs/1708.07120>`_, 2017.

    Example:
        >>> cosine_onecycle_schedule(4, 1.0, 0.5, div_factor=2.0, final_div_factor=5.0)(torch.arange(5))
        tensor([0.5000, 0.7500, 1.0000, 0.5500, 0.1000], dtype=torch.float64)
    """
    if transition_steps <= 0:
        raise ValueError(f"transition_steps must be > 0, got {transition_steps}")
    pieces = {int(pct_start * transition_steps): div_factor, transition_steps: 1 / (div_factor * final_div_factor)}
    return piecewise_interpolate_schedule("cosine", peak_value / div_factor, pieces)


def one_cycle_lr(
    max_lr: Scalar,
    total_steps: int,
    *,
    pct_start: float = 0.3,
    anneal_strategy: Literal["cos", "linear"] = "cos",
    div_factor: Scalar = 25.0,
    final_div_factor: Scalar = 1e4,
    three_phase: bool = False,
) -> Schedule:
    r"""One cycle as torch has it: :class:`torch.optim.lr_scheduler.OneCycleLR`.

    Through :math:`c/d` at step 0, :math:`c` at :math:`sT - 1`, with three phases :math:`c/d` again at :math:`2(sT - 1)`,
    and :math:`c/(df)` at :math:`T - 1`, held from there on (torch raises an error after step :math:`T`).

    The momentum that torch cycles against it, from ``max_momentum`` to ``base_momentum`` and back, is
    ``one_cycle_lr(base_momentum, total_steps, div_factor=base_momentum / max_momentum, final_div_factor=1.0)``, with the same
    ``pct_start``, ``anneal_strategy`` and ``three_phase``.

    Args:
        max_lr: :math:`c`, the peak.
        total_steps: :math:`T \ge 1`, in steps.
        pct_start: :math:`s` in ``[0, 1]``, the share of the steps that go up.
        anneal_strategy: half cosines (``"cos"``) or straight lines (``"linear"``).
        div_factor: :math:`d`, the peak divided by the first value.
        final_div_factor: :math:`f`, the first value divided by the last.
        three_phase: back to the first value, as slowly as up, before the last phase.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Smith and Topin, `Super-Convergence <https://arxiv.org/abs/1708.07120>`_, 2017.

    Example:
        >>> one_cycle_lr(1.0, 6, pct_start=0.5, div_factor=2.0, final_div_factor=5.0)(torch.arange(7))
        tensor([0.5000, 0.7500, 1.0000, 0.7750, 0.3250, 0.1000, 0.1000],
               dtype=torch.float64)
    """
    if total_steps < 1 or not 0 <= pct_start <= 1:
        raise ValueError(f"total_steps must be >= 1 and pct_start within [0, 1], got {total_steps} and {pct_start}")
    if anneal_strategy not in ("cos", "linear"):
        raise ValueError(f"anneal_strategy must be 'cos' or 'linear', got {anneal_strategy!r}")
    first, up = max_lr / div_factor, pct_start * total_steps - 1
    points = [(0, first), (up, max_lr), *([(2 * up, first)] if three_phase else []), (total_steps - 1, first / final_div_factor)]
    return _interpolated("cosine" if anneal_strategy == "cos" else "linear", points)


def cosine_annealing_lr(init_value: Scalar, t_max: float, eta_min: Scalar = 0.0) -> Schedule:
    r"""A cosine that goes down and up for ever: :class:`torch.optim.lr_scheduler.CosineAnnealingLR`.

    .. math:: \eta + (a - \eta)\, \tfrac12 (1 + \cos(\pi t / T))

    torch computes each value from the one before; this is the closed form that its documentation gives, from which torch's
    rounding drifts away. :func:`cosine_decay_schedule` stays at the end of the first half wave.

    Args:
        init_value: :math:`a`, the value at steps :math:`0, 2T, 4T, \ldots`
        t_max: :math:`T > 0`, in steps.
        eta_min: :math:`\eta`, the value at steps :math:`T, 3T, \ldots`

    Raises:
        ValueError: ``t_max`` is not positive.

    Reference:
        Loshchilov and Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2016, equation 5, without restarts.

    Example:
        >>> cosine_annealing_lr(1.0, 2)(torch.arange(5))
        tensor([1.0000, 0.5000, 0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    if t_max <= 0:
        raise ValueError(f"t_max must be > 0, got {t_max}")
    return lambda step: eta_min + (init_value - eta_min) * 0.5 * (1 + torch.cos(math.pi * (as_time(step) / t_max)))


def cosine_annealing_warm_restarts(init_value: Scalar, t_0: int, t_mult: int = 1, eta_min: Scalar = 0.0) -> Schedule:
    r"""Half cosines down, one after the other: :class:`torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`.

    .. math:: \eta + (a - \eta)\, \tfrac12 (1 + \cos(\pi\, t_i / T_i)), \qquad T_{i+1} = m\, T_i

    where :math:`t_i` are the steps since the last restart. :func:`sgdr_schedule` takes each period's own numbers.

    Args:
        init_value: :math:`a`, the value at every restart.
        t_0: :math:`T_0 \ge 1`, the length of the first period, in steps.
        t_mult: :math:`m \ge 1`, an int: how many times as long as the one before a period is.
        eta_min: :math:`\eta`, which a period ends just above.

    Raises:
        ValueError: ``t_0`` or ``t_mult`` is less than 1, or ``t_mult`` is no int.

    Reference:
        Loshchilov and Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2016, equation 5.

    Example:
        >>> cosine_annealing_warm_restarts(1.0, 2, 2)(torch.arange(7))
        tensor([1.0000, 0.5000, 1.0000, 0.8536, 0.5000, 0.1464, 1.0000],
               dtype=torch.float64)
    """
    if t_0 < 1 or t_mult < 1 or t_mult != int(t_mult):
        raise ValueError(f"t_0 must be >= 1 and t_mult a whole number >= 1, got {t_0} and {t_mult}")

    def period(time: Tensor) -> tuple[Tensor, Tensor]:
        """Where the period that a time is in began, and its length."""
        if t_mult == 1:
            return t_0 * (time / t_0).floor(), torch.full_like(time, t_0)
        # The logarithm counts the periods before this one; made to round down, it is right or one too low.
        count = (torch.log(time / t_0 * (t_mult - 1) + 1) / math.log(t_mult) - 1e-6).floor().clamp_min(0)
        length = (t_0 * t_mult**count).round()
        begin = (length - t_0) / (t_mult - 1)
        later = time >= begin + length
        return torch.where(later, begin + length, begin), torch.where(later, length * t_mult, length)

    def schedule(step: Any) -> Tensor:
        time = as_time(step).clamp_min(0)
        begin, length = period(time)
        return eta_min + (init_value - eta_min) * 0.5 * (1 + torch.cos(math.pi * ((time - begin) / length)))

    return schedule


def cyclic_lr(
    base_lr: Scalar,
    max_lr: Scalar,
    step_size_up: float = 2000,
    step_size_down: float | None = None,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: Scalar = 1.0,
    scale_fn: Schedule | None = None,
    scale_mode: Literal["cycle", "iterations"] = "cycle",
) -> Schedule:
    r"""A triangle wave: :class:`torch.optim.lr_scheduler.CyclicLR`.

    .. math:: b + (c - b)\, h_t\, s, \qquad s = 1,\ 2^{1 - k} \text{ or } \gamma^t

    where :math:`h_t` goes from 0 to 1 and back in cycle :math:`k = 1, 2, \ldots`

    The momentum that torch cycles against it is the same function with the ends changed round:
    ``cyclic_lr(max_momentum, base_momentum, ...)``.

    Args:
        base_lr: :math:`b`, the value that every cycle begins with.
        max_lr: :math:`c`, the peak of the first cycle (without ``scale_fn``, up to a power of :math:`\gamma`).
        step_size_up: the steps from base to peak, above 0.
        step_size_down: the steps back; as many if None.
        mode: :math:`s`: ``"triangular"``, ``"triangular2"``, which halves it every cycle, or ``"exp_range"``.
        gamma: :math:`\gamma` of ``"exp_range"``.
        scale_fn: :math:`s` itself, a function in torch arithmetic; ``mode`` is not read then.
        scale_mode: what ``scale_fn`` is a function of: the ``"cycle"`` :math:`k`, or the step (``"iterations"``).

    Raises:
        ValueError: a step size is not positive, or a mode is unknown.

    Reference:
        Smith, `Cyclical Learning Rates for Training Neural Networks <https://arxiv.org/abs/1506.01186>`_, 2015, section 3.

    Example:
        >>> cyclic_lr(0.0, 1.0, 2, mode="triangular2")(torch.arange(8))
        tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.0000, 0.2500, 0.5000, 0.2500],
               dtype=torch.float64)
    """
    up, down = step_size_up, step_size_up if step_size_down is None else step_size_down
    if up <= 0 or down <= 0:
        raise ValueError(f"step sizes must be > 0, got {up} and {down}")
    scales: dict[str, tuple[str, Any]] = {
        "triangular": ("cycle", torch.ones_like),
        "triangular2": ("cycle", lambda cycle: 2 ** (1 - cycle)),
        "exp_range": ("iterations", lambda time: torch.as_tensor(gamma, dtype=time.dtype, device=time.device) ** time),
    }
    if (scale_fn is None and mode not in scales) or scale_mode not in ("cycle", "iterations"):
        raise ValueError(f"mode must be one of {', '.join(scales)} and scale_mode cycle or iterations, got {mode} and {scale_mode}")
    of, scale = scales[mode] if scale_fn is None else (scale_mode, scale_fn)

    def schedule(step: Any) -> Tensor:
        time = as_time(step)
        cycle = 1 + (time / (up + down)).floor()
        within = time - (cycle - 1) * (up + down)
        height = torch.where(within <= up, within / up, (up + down - within) / down)
        return base_lr + (max_lr - base_lr) * height * scale(cycle if of == "cycle" else time)

    return schedule


def multiplicative_lr(init_value: Scalar, lr_lambda: Callable[[int], Any], total_steps: int) -> Schedule:
    r"""A product of a factor for every step: :class:`torch.optim.lr_scheduler.MultiplicativeLR`.

    .. math:: a \prod_{i=1}^{t} f(i)

    The products are made once, when the schedule is: a function of the step cannot walk there.

    Args:
        init_value: :math:`a`.
        lr_lambda: :math:`f`, a function of an int.
        total_steps: how many factors to multiply; from there on the value stays.

    Raises:
        ValueError: ``total_steps`` is negative.

    Example:
        >>> multiplicative_lr(1.0, lambda step: 1 / step, 3)(torch.arange(5))
        tensor([1.0000, 1.0000, 0.5000, 0.1667, 0.1667], dtype=torch.float64)
    """
    if total_steps < 0:
        raise ValueError(f"total_steps must be >= 0, got {total_steps}")
    products = torch.stack([as_time(1), *(as_time(lr_lambda(step)) for step in range(1, total_steps + 1))]).cumprod(0)

    def schedule(step: Any) -> Tensor:
        time = as_time(step)
        # Dynamo would make a Python number of a 0-dim index in brackets.
        index = time.clamp(0, total_steps).long().reshape(-1)
        return init_value * products.to(time.device).index_select(0, index).reshape(time.shape)

    return schedule


def chained_scheduler(schedules: Sequence[Schedule]) -> Schedule:
    """The product of schedules, each of the same step: :class:`torch.optim.lr_scheduler.ChainedScheduler`.

    Args:
        schedules: at least one. One of them has the size of the value, the others are factors, that begin at 1 perhaps.

    Raises:
        ValueError: there is none.

    Example:
        >>> decay, warmup = exponential_decay(0.1, 1, 0.5), linear_schedule(0.5, 1.0, 2)
        >>> chained_scheduler([decay, warmup])(torch.arange(4))
        tensor([0.0500, 0.0375, 0.0250, 0.0125], dtype=torch.float64)
    """
    if not schedules:
        raise ValueError("chained_scheduler takes at least one schedule")

    def schedule(step: Any) -> Tensor:
        value = torch.ones_like(as_time(step))
        for part in schedules:
            value = value * part(step)
        return value

    return schedule
