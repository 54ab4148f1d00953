"""Adamax: Adam with the infinity norm; and with decoupled decay."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, bias_correction, lerp
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import add_decayed_weights, decayed
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["AdamaxSlots", "adamax", "adamaxw", "scale_by_adamax"]


class AdamaxSlots(NamedTuple):
    """Slots of :func:`scale_by_adamax` for one tensor, each with its shape.

    Attributes:
        mu: first moment.
        nu: exponentially weighted infinity norm of the gradients.
    """

    mu: Tensor
    nu: Tensor


def scale_by_adamax(b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8) -> GradientTransformation:
    r"""Rescale updates by Adamax.

    .. math::
        \mu_t = \beta_1 \mu_{t-1} + (1 - \beta_1)\, g_t, \qquad
        \nu_t = \max(\beta_2 \nu_{t-1},\, |g_t| + \epsilon), \qquad
        u_t = \frac{\mu_t}{(1 - \beta_1^t)\, \nu_t}

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``, decay of the first moment.
        b2: :math:`\beta_2` in ``[0, 1)``, decay of the norm.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.

    Slots have the parameter's shape and dtype.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2014, algorithm 2, with torch's :math:`\epsilon`.

    Example:
        >>> tx = scale_by_adamax()
        >>> tx.update(torch.tensor([3.0, -0.1]), tx.init(torch.zeros(2)))[0]
        tensor([ 1., -1.])
    """
    b1, b2 = number("b1", b1, at_least=0, below=1), number("b2", b2, at_least=0, below=1)
    eps = number("eps", eps, at_least=0)

    def init(p: Tensor) -> AdamaxSlots:
        return AdamaxSlots(torch.zeros_like(p), torch.zeros_like(p))

    def update(g: Tensor, slots: AdamaxSlots, p: Any, correction: Tensor) -> tuple[Tensor, AdamaxSlots]:
        mu = lerp(slots.mu, g, 1 - b1)
        nu = torch.maximum(b2 * slots.nu, g.abs() + eps)
        return mu / (correction * nu), AdamaxSlots(mu, nu)

    return leafwise(init, update, elementwise=True, at_step=lambda step: bias_correction(b1, step))


@alias
def adamax(
    lr: ScalarOrSchedule = 2e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Adamax: :class:`torch.optim.Adamax`.

    .. math:: g_t \leftarrow g_t + \lambda p_{t-1}, \qquad p_t = p_{t-1} - \gamma\, \mathrm{adamax}(g_t)

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_adamax`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: L2 coefficient :math:`\lambda \ge 0`.
        maximize: ascend instead.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_adamax`.

    Example:
        >>> tx = adamax(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """
    return chain(
        negate_if(maximize), add_decayed_weights(weight_decay), scale_by_adamax(*betas, eps=eps), scale_by_learning_rate(lr)
    )


@alias
def adamaxw(
    lr: ScalarOrSchedule = 2e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-4,
    *,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Adamax with decoupled weight decay.

    .. math:: p_t = p_{t-1} - \gamma\, (\mathrm{adamax}(g_t) + \lambda p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_adamax`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_adamax`; Loshchilov and Hutter, `Decoupled Weight Decay Regularization
        <https://arxiv.org/abs/1711.05101>`_, 2017.

    Example:
        >>> tx = adamaxw(lr=0.1, weight_decay=0.5)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.8500])}
    """
    rule = scale_by_adamax(*betas, eps=eps)
    return chain(negate_if(maximize), *decayed(rule, weight_decay, True, mask), scale_by_learning_rate(lr))
