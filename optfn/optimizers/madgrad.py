"""MADGRAD: momentum and dual averaging with a cube root."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number, scalar_or_schedule
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, cbrt
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import add_decayed_weights
from optfn.wrappers.hyperparams import with_learning_rate

__all__ = ["MadgradSlots", "madgrad", "scale_by_madgrad"]


class MadgradSlots(NamedTuple):
    """Slots of :func:`scale_by_madgrad` for one tensor, each with its shape.

    Attributes:
        grad_sum_sq: weighted sum of the squared gradients.
        s: weighted sum of the gradients.
        x0: the parameter before its first step.
    """

    grad_sum_sq: Tensor
    s: Tensor
    x0: Tensor


def scale_by_madgrad(learning_rate: ScalarOrSchedule, momentum: Scalar = 0.9, eps: Scalar = 1e-6) -> GradientTransformation:
    r"""Replace updates by the steps of MADGRAD.

    .. math::
        \lambda_t &= (\gamma + \epsilon) \sqrt t, \qquad
        \nu_t = \nu_{t-1} + \lambda_t g_t^2, \qquad
        s_t = s_{t-1} + \lambda_t g_t, \\
        z_t &= p_0 - \frac{s_t}{\sqrt[3]{\nu_t} + \epsilon}, \qquad
        u_t = (1 - \beta) (z_t - p_{t-1})

    The learning rate and the sign are in :math:`u_t`: nothing that scales may follow.

    Args:
        learning_rate: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        momentum: :math:`\beta` in ``[0, 1)``.
        eps: :math:`\epsilon \ge 0`, in the units of the cube root, and added to the learning rate, as in the authors' code.

    Slots have the parameter's shape and dtype.

    Raises:
        TypeError: from ``update``: ``params`` is missing.
        ValueError: an argument out of range.

    Reference:
        Defazio and Jelassi, `Adaptivity without Compromise: A Momentumized, Adaptive, Dual Averaged Gradient Method for Stochastic
        Optimization <https://arxiv.org/abs/2101.11075>`_, 2021, algorithm 1, in the form of the authors' code.

    Example:
        >>> tx = scale_by_madgrad(1.0, momentum=0.0, eps=0.0)
        >>> tx.update(torch.tensor([8.0]), tx.init(torch.ones(1)), torch.ones(1))[0]
        tensor([-2.])
    """
    beta, eps = number("momentum", momentum, at_least=0, below=1), number("eps", eps, at_least=0)

    def init(p: Tensor) -> MadgradSlots:
        return MadgradSlots(torch.zeros_like(p), torch.zeros_like(p), p.detach().clone())

    def rule(lr: Scalar) -> GradientTransformation:
        lr = number("lr", lr, at_least=0, finite=True)

        def update(g: Tensor, slots: MadgradSlots, p: Tensor, step: Any) -> tuple[Tensor, MadgradSlots]:
            is_first, lamb = step
            x0 = torch.where(is_first, p, slots.x0)
            grad_sum_sq, s = slots.grad_sum_sq + lamb * g.square(), slots.s + lamb * g
            z = x0 - s / (cbrt(grad_sum_sq) + eps)
            return (1 - beta) * (z - p), MadgradSlots(grad_sum_sq, s, x0)

        def at_step(step: Tensor) -> tuple[Tensor, Tensor]:
            return step == 1, (lr + eps) * step.sqrt()

        return leafwise(init, update, elementwise=True, at_step=at_step, needs_params=True)

    return with_learning_rate(rule, scalar_or_schedule("lr", learning_rate, at_least=0))


@alias
def madgrad(
    lr: ScalarOrSchedule = 1e-2,
    momentum: Scalar = 0.9,
    weight_decay: Scalar = 0.0,
    eps: Scalar = 1e-6,
    *,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""MADGRAD.

    .. math:: g_t \leftarrow g_t + \lambda p_{t-1}, \qquad p_t = p_{t-1} + \mathrm{madgrad}_\gamma(g_t, p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        momentum: :math:`\beta` in ``[0, 1)``, see :func:`scale_by_madgrad`.
        weight_decay: L2 coefficient :math:`\lambda \ge 0`.
        eps: :math:`\epsilon \ge 0`.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_madgrad`.

    Example:
        >>> tx = madgrad(lr=1.0, momentum=0.0, eps=0.0)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([8.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([-1.])}
    """
    return chain(negate_if(maximize), add_decayed_weights(weight_decay, mask), scale_by_madgrad(lr, momentum, eps))
