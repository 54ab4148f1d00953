"""Blocks that multiply the updates: by a number, by a schedule, by the learning rate, by a norm of the parameters."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state, number, scalar_or_schedule
from optfn.core import GradientTransformation, stateless
from optfn.leafwise import Extent, begin_of, lifted, stateless_with_tree_map
from optfn.numerics import Scalar, as_scalar
from optfn.schedules import ScalarOrSchedule, Schedule, as_time
from optfn.sweep import Leaves, Sweep

__all__ = [
    "ScaleByLearningRateState",
    "ScaleByScheduleState",
    "normalize",
    "normalize_by_update_norm",
    "scale",
    "scale_by_learning_rate",
    "scale_by_param_block_norm",
    "scale_by_param_block_rms",
    "scale_by_schedule",
    "set_to_zero",
]


def scale(step_size: Scalar) -> GradientTransformation:
    """Multiply every update by a number.

    Args:
        step_size: any number, or a 0-dim tensor.

    Example:
        >>> scale(-0.5).update({"w": torch.tensor([2.0])}, ())[0]
        {'w': tensor([-1.])}
    """
    step_size = number("step_size", step_size)
    return stateless_with_tree_map(lambda g, p, factor: g * factor, once=lambda dtype: as_scalar(step_size, dtype), sparse="values")


def normalize() -> GradientTransformation:
    r"""Scale all updates together to a global norm of 1: :math:`u = g / \|g\|_2`, and 0 where all are 0.

    The norm is :func:`optfn.tree.global_norm`.

    Example:
        >>> normalize().update({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, ())[0]
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """

    def normalized(updates: Any, params: Any) -> Any:
        total = tree.global_norm(updates)
        return scale(1 / torch.where(total == 0, 1, total)).update(updates, ())[0]

    return stateless(normalized)


def set_to_zero() -> GradientTransformation:
    """Make every update zero. The leaves still step, with an update of 0; :func:`freeze` makes them sit the step out.

    Example:
        >>> set_to_zero().update({"w": torch.tensor([2.0, float("nan")])}, ())[0]
        {'w': tensor([0., 0.])}
    """
    return stateless_with_tree_map(lambda g, p: torch.zeros_like(g), sparse="values")


def scale_by_param_block_norm(min_scale: Scalar = 1e-3) -> GradientTransformation:
    r"""Multiply each update by the norm of its parameter: :math:`u \max(\epsilon, \|p\|_2)`.

    Args:
        min_scale: :math:`\epsilon \ge 0`, in the units of the parameters.

    Raises:
        TypeError: from ``update``: ``params`` is missing.
        ValueError: a negative ``min_scale``.

    Example:
        >>> scale_by_param_block_norm().update(torch.ones(2), (), torch.tensor([3.0, 4.0]))[0]
        tensor([5., 5.])
    """
    floor = number("min_scale", min_scale, at_least=0)

    def scaled(g: Tensor, p: Tensor, extents: tuple[Extent]) -> Tensor:
        return g * extents[0].norm.clamp_min(floor)

    return stateless_with_tree_map(scaled, elementwise=False, norms=lambda g, p: (p,), needs_params=True)


def scale_by_param_block_rms(min_scale: Scalar = 1e-3) -> GradientTransformation:
    r"""Multiply each update by the root mean square of its parameter: :math:`u \max(\epsilon, \mathrm{RMS}(p))`.

    Args:
        min_scale: :math:`\epsilon \ge 0`, in the units of the parameters.

    Raises:
        TypeError: from ``update``: ``params`` is missing.
        ValueError: a negative ``min_scale``.

    Reference:
        Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018, section 8 (relative step size).

    Example:
        >>> scale_by_param_block_rms().update(torch.ones(2), (), torch.tensor([1.0, 7.0]))[0]
        tensor([5., 5.])
    """
    floor = number("min_scale", min_scale, at_least=0)

    def scaled(g: Tensor, p: Tensor, extents: tuple[Extent]) -> Tensor:
        return g * extents[0].rms().clamp_min(floor)

    return stateless_with_tree_map(scaled, elementwise=False, norms=lambda g, p: (p,), needs_params=True)


def normalize_by_update_norm(scale_factor: Scalar = 1.0, eps: Scalar = 1e-6) -> GradientTransformation:
    r"""Divide all updates together by their global norm: :math:`c\, u / (\|u\| + \epsilon)`.

    Args:
        scale_factor: :math:`c`, the norm of the result.
        eps: :math:`\epsilon \ge 0`, in the units of the updates.

    Raises:
        ValueError: a negative ``eps``.

    Example:
        >>> normalize_by_update_norm().update({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, ())[0]
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    factor, eps = number("scale_factor", scale_factor), number("eps", eps, at_least=0)

    def normalized(updates: Any, params: Any) -> Any:
        return scale(factor / (tree.global_norm(updates) + eps)).update(updates, ())[0]

    return stateless(normalized)


class ScaleByScheduleState(NamedTuple):
    """The state of :func:`scale_by_schedule`.

    Attributes:
        count: the updates so far, a 0-dim int64 tensor.
        step_size: the schedule's value in the last update (before the first one, the value it will have), to read: a 0-dim
            float32 tensor.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    step_size: Tensor

    _derived = ("step_size",)


class ScaleByLearningRateState(NamedTuple):
    """The state of :func:`scale_by_learning_rate` with a schedule; with a number it keeps none.

    Attributes:
        count: the updates so far, a 0-dim int64 tensor.
        lr: the learning rate of the last update (before the first one, the one it will have), to read: a 0-dim float32 tensor.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    lr: Tensor

    _derived = ("lr",)


def scale_by_schedule(step_size_fn: Schedule) -> GradientTransformation:
    """Multiply every update by a schedule of this transformation's own step, which is 0 in the first update.

    Args:
        step_size_fn: ``step_size_fn(count) -> factor``, see :mod:`optfn.schedules`.

    Example:
        >>> tx = scale_by_schedule(optfn.linear_schedule(1.0, 0.0, 2))
        >>> state = tx.init(torch.ones(1))
        >>> for _ in range(3):
        ...     update, state = tx.update(torch.ones(1), state)
        ...     print(update)
        tensor([1.])
        tensor([0.5000])
        tensor([0.])
    """
    return _scheduled(step_size_fn, ScaleByScheduleState, 1)


def _scheduled(schedule: Schedule, kind: Any, sign: int) -> GradientTransformation:
    def value_at(count: Tensor) -> Tensor:
        return torch.as_tensor(schedule(as_time(count)), device=count.device)

    def shown(value: Tensor) -> Tensor:
        # In float32, for reading alone: Dynamo traces a step twice if it is handed a 0-dim float64 tensor (torch 2.13).
        return value.to(torch.float32, copy=True)

    def init(params: Any) -> Any:
        count = tree.new_count(params)
        return kind(count, shown(value_at(count)))

    def check(state: Any) -> None:
        check_state("scale_by_schedule" if kind is ScaleByScheduleState else "scale_by_learning_rate", state, kind)

    def begin(leaves: Leaves, state: Any) -> Sweep:
        value = value_at(state.count)
        scaled: Sweep = begin_of(scale(sign * value))(leaves, ())
        return scaled._replace(end=lambda: kind(state.count + 1, shown(value)))

    return lifted(init, begin, check=check, elementwise=True)


def scale_by_learning_rate(learning_rate: ScalarOrSchedule, *, flip_sign: bool = True) -> GradientTransformation:
    """Multiply every update by minus the learning rate: the last link of a chain that descends.

    Args:
        learning_rate: at least 0: a number, a 0-dim tensor, or a schedule of this transformation's own step. The rate that a
            schedule gave last is ``optfn.tree.get(state, "lr")``.
        flip_sign: False multiplies by plus the learning rate.

    Raises:
        ValueError: a negative or NaN number, a tensor of more than one element.

    Example:
        >>> scale_by_learning_rate(0.1).update({"w": torch.tensor([2.0])}, ())[0]
        {'w': tensor([-0.2000])}
    """
    lr: Any = scalar_or_schedule("lr", learning_rate, at_least=0)
    sign = -1 if flip_sign else 1
    if callable(lr):
        schedule: Any = lr
        return _scheduled(schedule, ScaleByLearningRateState, sign)
    return scale(sign * lr)
