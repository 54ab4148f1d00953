"""Adadelta."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, average_square, sqrt
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import add_decayed_weights
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["AdadeltaSlots", "adadelta", "scale_by_adadelta"]


class AdadeltaSlots(NamedTuple):
    """Slots of :func:`scale_by_adadelta` for one tensor, each with its shape.

    Attributes:
        e_g: average of the squared gradient.
        e_x: average of the squared update.
    """

    e_g: Tensor
    e_x: Tensor


def scale_by_adadelta(rho: Scalar = 0.9, eps: Scalar = 1e-6) -> GradientTransformation:
    r"""Rescale updates by Adadelta, in the units of the parameters.

    .. math::
        E[g^2]_t = \rho E[g^2]_{t-1} + (1 - \rho)\, g_t^2, \qquad
        u_t = \frac{\sqrt{E[x^2]_{t-1} + \epsilon}}{\sqrt{E[g^2]_t + \epsilon}}\, g_t, \qquad
        E[x^2]_t = \rho E[x^2]_{t-1} + (1 - \rho)\, u_t^2

    Args:
        rho: :math:`\rho` in ``[0, 1]``, decay of both averages.
        eps: :math:`\epsilon \ge 0`, in the units of the squared gradient and of the squared update.

    The averages have the parameter's shape and dtype.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Zeiler, `ADADELTA <https://arxiv.org/abs/1212.5701>`_, 2012, algorithm 1.

    Example:
        >>> tx = scale_by_adadelta(rho=0.75, eps=1e-6)
        >>> tx.update(torch.tensor([3.0, -0.1]), tx.init(torch.zeros(2)))[0]
        tensor([ 0.0020, -0.0020])
    """
    rho, eps = number("rho", rho, at_least=0, at_most=1), number("eps", eps, at_least=0)

    def init(p: Tensor) -> AdadeltaSlots:
        return AdadeltaSlots(torch.zeros_like(p), torch.zeros_like(p))

    def update(g: Tensor, slots: AdadeltaSlots, p: Any, step: Tensor) -> tuple[Tensor, AdadeltaSlots]:
        e_g = average_square(slots.e_g, g, rho)
        direction = sqrt(slots.e_x, eps) / sqrt(e_g, eps) * g
        return direction, AdadeltaSlots(e_g, average_square(slots.e_x, direction, rho))

    return leafwise(init, update, elementwise=True)


@alias
def adadelta(
    lr: ScalarOrSchedule = 1.0, rho: Scalar = 0.9, eps: Scalar = 1e-6, weight_decay: Scalar = 0.0, *, maximize: bool = False
) -> GradientTransformation:
    r"""Adadelta: :class:`torch.optim.Adadelta`.

    .. math:: g_t \leftarrow g_t + \lambda p_{t-1}, \qquad p_t = p_{t-1} - \gamma\, \mathrm{adadelta}(g_t)

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        rho: decay of the averages in ``[0, 1]``, see :func:`scale_by_adadelta`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: L2 coefficient :math:`\lambda \ge 0`.
        maximize: ascend instead.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_adadelta`.

    Example:
        >>> tx = adadelta(lr=10.0, rho=0.75)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9800])}
    """
    return chain(negate_if(maximize), add_decayed_weights(weight_decay), scale_by_adadelta(rho, eps), scale_by_learning_rate(lr))
