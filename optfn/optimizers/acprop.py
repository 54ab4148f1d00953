"""ACProp: the gradient, divided by how far gradients were from their average up to the step before."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, average_square, bias_correction, lerp, sqrt
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import decayed
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["AcpropSlots", "acprop", "scale_by_acprop"]


class AcpropSlots(NamedTuple):
    """Slots of :func:`scale_by_acprop` for one tensor, each with its shape.

    Attributes:
        mu: first moment.
        nu: second moment of the gradient about the first.
    """

    mu: Tensor
    nu: Tensor


def scale_by_acprop(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-16,
    eps_root: Scalar = 1e-16,
    *,
    momentum_update: bool = False,
) -> GradientTransformation:
    r"""Rescale updates by ACProp, whose denominator is one step behind.

    .. math::
        \mu_t &= \beta_1 \mu_{t-1} + (1 - \beta_1)\, g_t, \qquad
        \nu_t = \beta_2 \nu_{t-1} + (1 - \beta_2)\, (g_t - \mu_t)^2 + \bar\epsilon, \\
        u_1 &= g_1, \qquad
        u_t = \frac{g_t}{\sqrt{\nu_{t-1} / (1 - \beta_2^{t-1})} + \epsilon}

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``, decay of the first moment.
        b2: :math:`\beta_2` in ``[0, 1)``, decay of the second moment.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient; it adds up in :math:`\nu`.
        momentum_update: put :math:`\mu_t / (1 - \beta_1^t)` in the place of :math:`g_t` in :math:`u_t`, the authors' option.

    Moments have the parameter's shape and dtype. Optax has :math:`\mu_{t-1}` in the place of :math:`\mu_t` in :math:`\nu_t`: as
    :math:`g_t - \mu_t = \beta_1 (g_t - \mu_{t-1})`, its updates are :math:`\beta_1` times these, but for the first one.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Zhuang et al., `Momentum Centering and Asynchronous Update for Adaptive Gradient Methods
        <https://arxiv.org/abs/2110.05454>`_, 2021, algorithm 2, in the form of the authors' code without rectification.

    Example:
        >>> tx = scale_by_acprop(b1=0.5)
        >>> state = tx.init(torch.zeros(2))
        >>> for g in ([4.0, -0.1], [1.0, 0.1]):
        ...     update, state = tx.update(torch.tensor(g), state)
        ...     print(update)
        tensor([ 4.0000, -0.1000])
        tensor([0.5000, 2.0000])
    """
    b1, b2 = number("b1", b1, at_least=0, below=1), number("b2", b2, at_least=0, below=1)
    eps, eps_root = number("eps", eps, at_least=0), number("eps_root", eps_root, at_least=0)

    def init(p: Tensor) -> AcpropSlots:
        return AcpropSlots(torch.zeros_like(p), torch.zeros_like(p))

    def at_step(step: Tensor) -> tuple[Tensor, ...]:
        # In the first step, which has no nu, the divisor is the root of 0 nu + 1, plus 0.
        later = (step > 1).to(step.dtype)
        weight = bias_correction(b2, (step - 1).clamp_min(1))
        return bias_correction(b1, step), later / weight, 1 - later, later * eps

    def update(g: Tensor, slots: AcpropSlots, p: Any, step: Any) -> tuple[Tensor, AcpropSlots]:
        first, share, under, offset = step
        mu = lerp(slots.mu, g, 1 - b1)
        nu = average_square(slots.nu, g - mu, b2) + eps_root
        return (mu / first if momentum_update else g) / (sqrt(share * slots.nu, under) + offset), AcpropSlots(mu, nu)

    return leafwise(init, update, elementwise=True, at_step=at_step)


@alias
def acprop(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-16,
    weight_decay: Scalar = 0.0,
    *,
    eps_root: Scalar = 1e-16,
    momentum_update: bool = False,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""ACProp.

    .. math:: p_t = p_{t-1} - \gamma\, (\mathrm{acprop}(g_t) + \lambda p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_acprop`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: coefficient :math:`\lambda \ge 0` of decoupled decay.
        eps_root: :math:`\bar\epsilon \ge 0`.
        momentum_update: step along the average of the gradient, see :func:`scale_by_acprop`.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_acprop`.

    Example:
        >>> tx = acprop(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.5000])}
    """
    rule = scale_by_acprop(*betas, eps=eps, eps_root=eps_root, momentum_update=momentum_update)
    return chain(negate_if(maximize), *decayed(rule, weight_decay, True, mask), scale_by_learning_rate(lr))
