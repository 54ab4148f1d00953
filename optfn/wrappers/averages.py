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

__all__ = ["EmaParamsState", "ema_params"]


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

        return updates, EmaParamsState(count, tree.map(average, state.average, added(params, updates)[0]))

    return transformation(init, update)
