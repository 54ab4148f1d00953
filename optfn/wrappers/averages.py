"""Averages of the parameters along the way."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state, number, require
from optfn.core import GradientTransformation, added, transformation
from optfn.numerics import Scalar, compute_dtype, lerp
from optfn.schedules import as_time

__all__ = ["EmaParamsState", "ema_params", "incremental_update", "periodic_update"]


class EmaParamsState(NamedTuple):
    """The state of :func:`ema_params`.

    Attributes:
        count: how many times parameters have been averaged, a 0-dim int64 tensor.
        average: their average, with the structure of the parameters.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    average: Any


def ema_params(
    decay: Scalar | None = 0.999,
    *,
    avg_fn: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    average_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Keep an average of the parameters, as they are *after* the updates; the updates pass unchanged.

    .. math:: a_1 = p_1, \qquad a_t = \beta\, a_{t-1} + (1 - \beta)\, p_t \qquad [\mathrm{SWA:}\ \beta = 1 - 1/t]

    It belongs at the end of a chain, where the updates are what will be added. Every parameter is averaged, one whose
    update is None too. The average is ``optfn.tree.get(state, "average")``, a tree to evaluate a model with.

    Args:
        decay: :math:`\beta` in ``[0, 1]`` for an exponential moving average; None for the equal average of stochastic
            weight averaging.
        avg_fn: another average, ``avg_fn(average, p, n) -> average`` of one tensor, where ``n``, a 0-dim int64 tensor, is how many
            times parameters have been averaged already, at least 1; as :class:`torch.optim.swa_utils.AveragedModel` takes it.
            ``decay`` is not read then.
        average_dtype: dtype of the average; the parameter's if None.

    Raises:
        TypeError: from ``update``: ``params`` is missing.
        ValueError: ``decay`` out of range.

    Reference:
        Polyak and Juditsky, `Acceleration of Stochastic Approximation by Averaging <https://doi.org/10.1137/0330046>`_, 1992;
        Izmailov et al., `Averaging Weights Leads to Wider Optima <https://arxiv.org/abs/1803.05407>`_, 2018 (SWA); in the form
        of :class:`torch.optim.swa_utils.AveragedModel`, whose first update copies.

    Example:
        >>> tx = optfn.chain(optfn.sgd(lr=1.0), ema_params(0.5))
        >>> params = torch.tensor([0.0])
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(torch.tensor([-2.0]), state, params)
        ...     params = optfn.apply_updates(params, updates)
        >>> params, optfn.tree.get(state, "average")
        (tensor([4.]), tensor([3.]))
    """
    beta = None if decay is None else number("decay", decay, at_least=0, at_most=1)

    def init(params: Any) -> EmaParamsState:
        tree.checked(params, "ema_params: params")
        count = tree.new_count(params)
        return EmaParamsState(count, tree.map(lambda p: p.detach().clone(), tree.cast(params, average_dtype)))

    def update(updates: Any, state: EmaParamsState, params: Any = None, **extra: Any) -> tuple[Any, EmaParamsState]:
        check_state("ema_params", state, EmaParamsState)
        if state.average is not None:  # a bare tensor that a mask hides is None
            require("ema_params", params=params)
        count = state.count + 1

        def average(old: Tensor, p: Tensor) -> Tensor:
            # The first weight is 1: whatever the average began as, it becomes the parameters.
            time = as_time(count.to(old.device))
            weight = 1 / time if beta is None else torch.where(time == 1, torch.ones_like(time), 1 - beta)
            wide = compute_dtype(old, p)
            if avg_fn is None:
                return lerp(old.to(wide), p.to(wide), weight).to(old.dtype)
            averaged = state.count.to(old.device)
            new = avg_fn(old.to(wide), p.to(wide), averaged.clamp_min(1))
            return torch.where(averaged == 0, p.to(wide), new).to(old.dtype)

        return updates, EmaParamsState(count, tree.map_entries(average, state.average, added(params, updates)[0]))

    return transformation(init, update)


def incremental_update(new_tensors: Any, old_tensors: Any, step_size: Scalar) -> Any:
    r"""A step of an exponential moving average of parameters: :math:`\alpha\, p + (1 - \alpha)\, a`.

    Args:
        new_tensors: :math:`p`; where it is None the average stays.
        old_tensors: :math:`a`, a tree of the same structure, whose dtypes the result has.
        step_size: :math:`\alpha` in ``[0, 1]``.

    Raises:
        ValueError: ``step_size`` out of range; the structures differ.

    Reference:
        Polyak and Juditsky, `Acceleration of Stochastic Approximation by Averaging <https://doi.org/10.1137/0330046>`_, 1992.

    Example:
        >>> incremental_update({"w": torch.ones(2)}, {"w": torch.zeros(2)}, 0.25)
        {'w': tensor([0.2500, 0.2500])}
    """
    alpha = number("step_size", step_size, at_least=0, at_most=1)

    def average(old: Tensor, new: Any) -> Tensor:
        if new is None:
            return old
        wide = compute_dtype(old, new)
        return lerp(old.to(wide), new.to(wide), alpha).to(old.dtype)

    return tree.map_entries(average, old_tensors, new_tensors)


def periodic_update(new_tensors: Any, old_tensors: Any, steps: int | Tensor, update_period: int | Tensor) -> Any:
    """The new parameters at every ``update_period``-th step, the old ones at the others: a target network.

    Args:
        new_tensors: the parameters; where one is None the old one stays.
        old_tensors: a tree of the same structure, whose dtypes the result has.
        steps: how many steps were made; 0 takes the new ones.
        update_period: at least 1.

    Raises:
        ValueError: ``update_period`` is less than 1; the structures differ.

    Reference:
        Mnih et al., `Human-level control through deep reinforcement learning <https://doi.org/10.1038/nature14236>`_, 2015,
        algorithm 1.

    Example:
        >>> periodic_update({"w": torch.ones(1)}, {"w": torch.zeros(1)}, 4, 2), periodic_update(torch.ones(1), torch.zeros(1), 5, 2)
        ({'w': tensor([1.])}, tensor([0.]))
    """
    if not isinstance(update_period, Tensor) and update_period < 1:
        raise ValueError(f"update_period must be >= 1, got {update_period}")
    due = torch.as_tensor(steps % update_period == 0)

    def pick(old: Tensor, new: Any) -> Tensor:
        return old if new is None else torch.where(due.to(old.device), new.to(old.dtype), old)

    return tree.map_entries(pick, old_tensors, new_tensors)
