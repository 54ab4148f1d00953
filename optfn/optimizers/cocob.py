"""COCOB: descent without a learning rate, by betting on coins."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import add_decayed_weights
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["CocobSlots", "cocob", "scale_by_cocob"]


class CocobSlots(NamedTuple):
    """Slots of :func:`scale_by_cocob` for one tensor, each with its shape.

    Attributes:
        x0: the parameter before its first step.
        theta: minus the sum of the gradients.
        scale: the largest absolute gradient.
        total: sum of the absolute gradients.
        reward: what has been won.
    """

    x0: Tensor
    theta: Tensor
    scale: Tensor
    total: Tensor
    reward: Tensor


def scale_by_cocob(alpha: Scalar = 100.0, eps: Scalar = 1e-8) -> GradientTransformation:
    r"""Replace updates by the steps of COCOB.

    .. math::
        L_t &= \max(L_{t-1}, |g_t|, \epsilon), \qquad
        G_t = G_{t-1} + |g_t|, \qquad
        R_t = \max(R_{t-1} - g_t (p_{t-1} - p_0), 0), \qquad
        \theta_t = \theta_{t-1} - g_t, \\
        u_t &= p_0 + \frac{\theta_t}{L_t \max(G_t + L_t, \alpha L_t)} (L_t + R_t) - p_{t-1}

    The sign is in :math:`u_t`: nothing that scales may follow.

    Args:
        alpha: :math:`\alpha > 0`: the larger, the smaller the first steps.
        eps: :math:`\epsilon > 0`, in the units of the gradient.

    Slots have the parameter's shape and dtype.

    Raises:
        TypeError: from ``update``: ``params`` is missing.
        ValueError: an argument out of range.

    Reference:
        Orabona and Tommasi, `Training Deep Networks without Learning Rates Through Coin Betting
        <https://arxiv.org/abs/1705.07795>`_, 2017, algorithm 2.

    Example:
        >>> tx = scale_by_cocob(alpha=10.0)
        >>> tx.update(torch.tensor([3.0, -0.1]), tx.init(torch.zeros(2)), torch.zeros(2))[0]
        tensor([-0.1000,  0.1000])
    """
    alpha, eps = number("alpha", alpha, above=0), number("eps", eps, above=0)

    def init(p: Tensor) -> CocobSlots:
        return CocobSlots(p.detach().clone(), *(torch.zeros_like(p) for _ in range(4)))

    def update(g: Tensor, slots: CocobSlots, p: Tensor, is_first: Tensor) -> tuple[Tensor, CocobSlots]:
        x0 = torch.where(is_first, p, slots.x0)
        scale = torch.maximum(slots.scale, g.abs()).clamp_min(eps)
        total = slots.total + g.abs()
        reward = (slots.reward - g * (p - x0)).clamp_min(0)
        theta = slots.theta - g
        bet = theta / (scale * torch.maximum(total + scale, alpha * scale)) * (scale + reward)
        return x0 + bet - p, CocobSlots(x0, theta, scale, total, reward)

    return leafwise(init, update, elementwise=True, at_step=lambda step: step == 1, needs_params=True)


@alias
def cocob(
    lr: ScalarOrSchedule = 1.0,
    alpha: Scalar = 100.0,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""COCOB, which finds its step sizes by itself.

    .. math:: p_t = p_{t-1} + \mathrm{cocob}(\gamma\, (g_t + \lambda p_{t-1}))

    Args:
        lr: :math:`\gamma \ge 0`, which multiplies the gradients, a number, a 0-dim tensor or a schedule. A constant has no effect,
            as the steps are invariant to the scale of the gradients; what changes weighs them.
        alpha: :math:`\alpha > 0`, see :func:`scale_by_cocob`.
        eps: :math:`\epsilon > 0`.
        weight_decay: L2 coefficient :math:`\lambda \ge 0`.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_cocob`.

    Example:
        >>> tx = cocob(alpha=10.0)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """
    decay, rate = add_decayed_weights(weight_decay, mask), scale_by_learning_rate(lr, flip_sign=False)
    return chain(negate_if(maximize), decay, rate, scale_by_cocob(alpha, eps))
