"""Rprop: resilient backpropagation."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, full_like
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import add_decayed_weights
from optfn.transforms.scaling import scale
from optfn.wrappers.hyperparams import with_learning_rate

__all__ = ["RpropSlots", "rprop", "scale_by_rprop"]


class RpropSlots(NamedTuple):
    """Slots of :func:`scale_by_rprop` for one tensor, each with its shape.

    Attributes:
        prev: the gradient before, 0 where it had turned.
        step_size: the step size of every entry.
    """

    prev: Tensor
    step_size: Tensor


def scale_by_rprop(
    learning_rate: Scalar = 1e-2,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step_size: Scalar = 1e-6,
    max_step_size: Scalar = 50.0,
) -> GradientTransformation:
    r"""Give every entry a step size that grows while its gradient keeps its sign, and shrinks when it turns.

    .. math::
        \delta_t = \mathrm{clamp}(\eta_t\, \delta_{t-1},\, \delta_{\min},\, \delta_{\max}), \qquad
        u_t = \mathrm{sign}(g_t)\, \delta_t

    :math:`\eta_t` is :math:`\eta^+`, 1 or :math:`\eta^-` as :math:`g_t g_{t-1}` is positive, zero or negative; where it is
    negative, :math:`g_t` counts as 0, here and in the next step.

    Args:
        learning_rate: :math:`\delta_0 \ge 0`, the step size before the first step of a leaf, in the units of the parameters;
            not used after that.
        eta_minus: :math:`\eta^-` in ``(0, 1)``.
        eta_plus: :math:`\eta^+ > 1`.
        min_step_size: :math:`\delta_{\min} \ge 0`.
        max_step_size: :math:`\delta_{\max} \ge 0`.

    Slots have the parameter's shape and dtype. (Optax's block of this name emits the update of the step before.)

    Raises:
        ValueError: an argument out of range.

    Reference:
        Riedmiller and Braun, `A direct adaptive method for faster backpropagation learning
        <https://doi.org/10.1109/ICNN.1993.298623>`_, 1993, without backtracking, as in :class:`torch.optim.Rprop`.

    Example:
        >>> tx = scale_by_rprop(0.5)
        >>> state = tx.init(torch.zeros(2))
        >>> for g in ([1.0, 1.0], [3.0, -1.0]):
        ...     update, state = tx.update(torch.tensor(g), state)
        >>> update
        tensor([0.6000, 0.0000])
    """
    start = number("lr", learning_rate, at_least=0, finite=True)
    minus, plus = number("etas[0]", eta_minus, above=0, below=1), number("etas[1]", eta_plus, above=1)
    smallest, largest = number("step_sizes[0]", min_step_size, at_least=0), number("step_sizes[1]", max_step_size, at_least=0)

    def init(p: Tensor) -> RpropSlots:
        return RpropSlots(torch.zeros_like(p), full_like(p, start))

    def update(g: Tensor, slots: RpropSlots, p: Any, step: Tensor) -> tuple[Tensor, RpropSlots]:
        size = torch.where(step == 1, full_like(g, start), slots.step_size)
        agreement = g * slots.prev
        size = torch.where(agreement > 0, size * plus, torch.where(agreement < 0, size * minus, size))
        size = size.clamp_min(smallest).clamp_max(largest)
        g = torch.where(agreement < 0, 0, g)
        return g.sign() * size, RpropSlots(g, size)

    return leafwise(init, update, elementwise=True)


@alias
def rprop(
    lr: ScalarOrSchedule = 1e-2,
    etas: tuple[Scalar, Scalar] = (0.5, 1.2),
    step_sizes: tuple[Scalar, Scalar] = (1e-6, 50.0),
    weight_decay: Scalar = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Rprop: :class:`torch.optim.Rprop`.

    .. math:: g_t \leftarrow g_t + \lambda p_{t-1}, \qquad p_t = p_{t-1} - \mathrm{rprop}(g_t)

    Args:
        lr: the first step size, at least 0: a number, a 0-dim tensor or a schedule, of which a leaf uses the value at its first
            step alone.
        etas: :math:`(\eta^-, \eta^+)` with :math:`0 < \eta^- < 1 < \eta^+`, see :func:`scale_by_rprop`.
        step_sizes: the smallest and the largest step size.
        weight_decay: L2 coefficient :math:`\lambda \ge 0`, which torch's class lacks.
        maximize: ascend instead.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_rprop`.

    Example:
        >>> tx = rprop(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """
    before = chain(negate_if(maximize), add_decayed_weights(weight_decay))
    return with_learning_rate(lambda lr: chain(before, scale_by_rprop(lr, *etas, *step_sizes), scale(-1.0)), lr)
