"""Momentum."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import is_zero, number
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, add_scaled

__all__ = ["TraceSlots", "trace"]


class TraceSlots(NamedTuple):
    """Slots of :func:`trace` for one tensor: ``trace``, the momentum buffer, with the tensor's shape."""

    trace: Tensor


def trace(
    decay: Scalar, nesterov: bool = False, accumulator_dtype: torch.dtype | None = None, *, dampening: Scalar = 0.0
) -> GradientTransformation:
    r"""Momentum: a decaying sum of the updates.

    .. math::
        b_1 = g_1, \qquad b_t = \mu\, b_{t-1} + (1 - \tau)\, g_t, \qquad
        u_t = \begin{cases} g_t + \mu\, b_t & \text{nesterov} \\ b_t & \text{else} \end{cases}

    Args:
        decay: :math:`\mu \ge 0`, below 1 for a sum that stays bounded.
        nesterov: whether to look one step ahead.
        accumulator_dtype: dtype of the buffer; the parameter's if None.
        dampening: :math:`\tau`; it does not act on the first update of a leaf, as in torch.

    The buffer has the parameter's shape. A sparse gradient is added into it; the update is then dense.

    Raises:
        ValueError: ``decay`` is negative or NaN.

    Reference:
        Sutskever et al., `On the importance of initialization and momentum in deep learning
        <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013, in the form of :class:`torch.optim.SGD`.

    Example:
        >>> tx = trace(0.9)
        >>> state = tx.init(torch.zeros(1))
        >>> for _ in range(2):
        ...     update, state = tx.update(torch.ones(1), state)
        >>> update
        tensor([1.9000])
    """
    mu, tau = number("momentum", decay, at_least=0), number("dampening", dampening)

    def init(p: Tensor) -> TraceSlots:
        return TraceSlots(torch.zeros_like(p, dtype=accumulator_dtype))

    def update(g: Tensor, slots: TraceSlots, p: Any, step: Tensor) -> tuple[Tensor, TraceSlots]:
        damped = g if is_zero(tau) else torch.where(step == 1, torch.ones_like(step), 1 - tau) * g
        buffer = add_scaled(damped, slots.trace, mu)
        return add_scaled(g, buffer, mu) if nesterov else buffer, TraceSlots(buffer)

    return leafwise(init, update, elementwise=True, sparse="dense")
