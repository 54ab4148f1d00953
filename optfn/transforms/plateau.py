"""Smaller steps once a metric has stopped to improve."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state, number, require
from optfn.core import GradientTransformation, transformation
from optfn.numerics import Scalar, widened_scalar
from optfn.transforms.scaling import scale

__all__ = ["ReduceOnPlateauState", "reduce_on_plateau"]


class ReduceOnPlateauState(NamedTuple):
    """The state of :func:`reduce_on_plateau`, 0-dim tensors; counts are int64, the others float64 (float32 where there is none).

    Attributes:
        scale: what updates are multiplied with.
        best_value: the best metric so far; an infinity before the first.
        plateau_count: metrics in a row that were no improvement.
        cooldown_count: metrics that will not be counted as bad.
        count: values gathered for the next metric.
        avg_value: their mean.
    """

    scale: Tensor
    best_value: Tensor
    plateau_count: Tensor
    cooldown_count: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    avg_value: Tensor


def reduce_on_plateau(
    factor: Scalar = 0.1,
    patience: int = 10,
    rtol: float = 1e-4,
    atol: float = 0.0,
    cooldown: int = 0,
    accumulation_size: int = 1,
    min_scale: Scalar = 0.0,
    *,
    mode: Literal["min", "max"] = "min",
    eps: float = 0.0,
) -> GradientTransformation:
    r"""Multiply updates by a scale that falls whenever a metric, given as ``value``, has not improved for some time.

    The scale begins at 1 and becomes :math:`\max(fs, s_{\min})` after ``patience`` metrics :math:`m` that are no improvement on
    the best one, :math:`m < (1 - r)\, m^* - a`, or :math:`m > (1 + r)\, m^* + a` where more is better. NaN is none. All is decided
    by tensors, within a compiled step too; through ``value`` nothing is differentiated.

    ``tx.update(grads, state, params, value=loss)``: the value is wanted in every step. One that is measured once an epoch of
    :math:`k` steps is given in each of them, with ``accumulation_size=k``.

    Args:
        factor: :math:`f` in ``(0, 1)``.
        patience: how many metrics in a row are no improvement before the scale falls, at least 1. Optax counts so; in
            :class:`torch.optim.lr_scheduler.ReduceLROnPlateau` one more is needed: its ``patience=p`` is ``p + 1`` here.
        rtol: :math:`r` in ``[0, 1]``; torch's ``threshold`` with ``threshold_mode="rel"``.
        atol: :math:`a \ge 0`, in the units of the metric; torch's ``threshold`` with ``threshold_mode="abs"`` and ``rtol=0``.
        cooldown: how many metrics after a fall do not count as bad.
        accumulation_size: how many values make one metric, their mean.
        min_scale: :math:`s_{\min} \ge 0`: torch's ``min_lr`` divided by the learning rate.
        mode: whether less (``"min"``) or more (``"max"``) is better.
        eps: the scale stays where it would fall by no more than this: torch's ``eps`` divided by the learning rate.

    Raises:
        TypeError: from ``update``: ``value`` is missing.
        ValueError: an argument out of range; from ``update``: ``value`` has more than one element.

    Example:
        >>> tx = reduce_on_plateau(factor=0.5, patience=2)
        >>> state = tx.init(torch.ones(1))
        >>> for loss in (3.0, 2.0, 2.0, 2.5):
        ...     update, state = tx.update(torch.ones(1), state, value=loss)
        >>> update, state.scale
        (tensor([0.5000]), tensor(0.5000, dtype=torch.float64))
    """
    factor, min_scale = number("factor", factor, above=0, below=1), number("min_scale", min_scale, at_least=0)
    rtol, atol, eps = number("rtol", rtol, at_least=0, at_most=1), number("atol", atol, at_least=0), number("eps", eps, at_least=0)
    patience, cooldown = number("patience", patience, at_least=1), number("cooldown", cooldown, at_least=0)
    accumulation_size = number("accumulation_size", accumulation_size, at_least=1)
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
    sign = 1 if mode == "min" else -1

    def init(params: Any) -> ReduceOnPlateauState:
        zero = tree.new_count(params)
        one = widened_scalar(torch.ones_like(zero))
        return ReduceOnPlateauState(one, one * sign * float("inf"), zero, zero.clone(), zero.clone(), torch.zeros_like(one))

    def decide(metric: Tensor, state: ReduceOnPlateauState) -> ReduceOnPlateauState:
        improved = sign * metric < sign * state.best_value * (1 - sign * rtol) - atol
        cooling = state.cooldown_count > 0
        bad = torch.where(improved | cooling, 0, state.plateau_count + 1)
        falls = bad >= patience
        lower = (state.scale * factor).clamp_min(min_scale)
        return ReduceOnPlateauState(
            scale=torch.where(falls & (state.scale - lower > eps), lower, state.scale),
            best_value=torch.where(improved, metric, state.best_value),
            plateau_count=torch.where(falls, 0, bad),
            cooldown_count=torch.where(falls, cooldown, (state.cooldown_count - 1).clamp_min(0)),
            count=torch.zeros_like(state.count),
            avg_value=torch.zeros_like(state.avg_value),
        )

    def update(
        updates: Any, state: ReduceOnPlateauState, params: Any = None, *, value: Any = None, **extra: Any
    ) -> tuple[Any, ReduceOnPlateauState]:
        require("reduce_on_plateau", value=value)
        check_state("reduce_on_plateau", state, ReduceOnPlateauState)
        like = state.avg_value
        given = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
        if given.numel() != 1:
            raise ValueError(f"reduce_on_plateau: value must be a number or have one element, got shape {tuple(given.shape)}")
        count = state.count + 1
        mean = like + (given.reshape(()) - like) / count
        due, waiting = count >= accumulation_size, state._replace(count=count, avg_value=mean)
        new = tree.map(lambda x, y: torch.where(due, x, y), decide(mean, state), waiting)
        return scale(new.scale).update(updates, ())[0], new

    return transformation(init, update, elementwise=True)
