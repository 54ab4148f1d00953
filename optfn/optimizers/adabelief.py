"""AdaBelief: Adam, divided by how far gradients are from their average."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, add_scaled, average_square, bias_correction, lerp, sqrt
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import decayed
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["BeliefSlots", "adabelief", "scale_by_belief"]


class BeliefSlots(NamedTuple):
    """Slots of :func:`scale_by_belief` for one tensor, each with its shape.

    Attributes:
        mu: first moment.
        nu: second moment of the gradient about the first.
    """

    mu: Tensor
    nu: Tensor


def scale_by_belief(
    b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-16, eps_root: Scalar = 1e-16, *, nesterov: bool = False
) -> GradientTransformation:
    r"""Rescale updates by AdaBelief.

    .. math::
        \mu_t &= \beta_1 \mu_{t-1} + (1 - \beta_1)\, g_t, \qquad
        \nu_t = \beta_2 \nu_{t-1} + (1 - \beta_2)\, (g_t - \mu_t)^2 + \bar\epsilon, \\
        \hat\mu_t &= \mu_t / (1 - \beta_1^t), \qquad
        \hat\nu_t = \nu_t / (1 - \beta_2^t), \qquad
        u_t = \hat\mu_t / (\sqrt{\hat\nu_t} + \epsilon)

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``, decay of the first moment.
        b2: :math:`\beta_2` in ``[0, 1)``, decay of the second moment.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient; it adds up in :math:`\nu`.
        nesterov: look one step ahead, as in :func:`scale_by_adam`.

    Moments have the parameter's shape and dtype.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Zhuang et al., `AdaBelief Optimizer <https://arxiv.org/abs/2010.07468>`_, 2020, algorithm 2.

    Example:
        >>> tx = scale_by_belief(b1=0.5)
        >>> tx.update(torch.tensor([3.0, -0.1]), tx.init(torch.zeros(2)))[0]
        tensor([ 2.0000, -2.0000])
    """
    b1, b2 = number("b1", b1, at_least=0, below=1), number("b2", b2, at_least=0, below=1)
    eps, eps_root = number("eps", eps, at_least=0), number("eps_root", eps_root, at_least=0)

    def init(p: Tensor) -> BeliefSlots:
        return BeliefSlots(torch.zeros_like(p), torch.zeros_like(p))

    def at_step(step: Tensor) -> tuple[Tensor, ...]:
        return bias_correction(b1, step), bias_correction(b1, step + 1), bias_correction(b2, step)

    def update(g: Tensor, slots: BeliefSlots, p: Any, corrections: Any) -> tuple[Tensor, BeliefSlots]:
        now, ahead, second = corrections
        mu = lerp(slots.mu, g, 1 - b1)
        nu = average_square(slots.nu, g - mu, b2) + eps_root
        mu_hat = add_scaled(b1 * mu / ahead, g / now, 1 - b1) if nesterov else mu / now
        return mu_hat / (sqrt(nu / second) + eps), BeliefSlots(mu, nu)

    return leafwise(init, update, elementwise=True, at_step=at_step)


@alias
def adabelief(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-16,
    weight_decay: Scalar = 0.0,
    *,
    eps_root: Scalar = 1e-16,
    nesterov: bool = False,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""AdaBelief.

    .. math:: p_t = p_{t-1} - \gamma\, (\mathrm{belief}(g_t) + \lambda p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_belief`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: coefficient :math:`\lambda \ge 0` of decoupled decay, the authors' default form; Optax has none.
        eps_root: :math:`\bar\epsilon \ge 0`.
        nesterov: look one step ahead.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_belief`.

    Example:
        >>> tx = adabelief(lr=0.1, betas=(0.5, 0.999))
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.8000])}
    """
    rule = scale_by_belief(*betas, eps=eps, eps_root=eps_root, nesterov=nesterov)
    return chain(negate_if(maximize), *decayed(rule, weight_decay, True, mask), scale_by_learning_rate(lr))
