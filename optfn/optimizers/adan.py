"""Adan: Adam with averages of the gradient and of its change."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, is_zero, number, scalar_or_schedule
from optfn.compose import chain, masked, negate_if
from optfn.core import GradientTransformation, identity
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, add_scaled, average_square, bias_correction, lerp, sqrt
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import decayed
from optfn.transforms.scaling import scale, scale_by_learning_rate
from optfn.wrappers.hyperparams import with_learning_rate

__all__ = ["AdanSlots", "adan", "scale_by_adan"]


class AdanSlots(NamedTuple):
    """Slots of :func:`scale_by_adan` for one tensor, each with its shape.

    Attributes:
        m: average of the gradient.
        v: average of its change.
        n: average of the square of the gradient, corrected by its change.
        g: the last gradient.
    """

    m: Tensor
    v: Tensor
    n: Tensor
    g: Tensor


def scale_by_adan(
    b1: Scalar = 0.98, b2: Scalar = 0.92, b3: Scalar = 0.99, eps: Scalar = 1e-8, eps_root: Scalar = 0.0
) -> GradientTransformation:
    r"""Rescale updates by Adan.

    .. math::
        d_t &= g_t - g_{t-1}, \qquad d_1 = 0, \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, d_t, \\
        n_t &= \beta_3 n_{t-1} + (1 - \beta_3)\, (g_t + \beta_2 d_t)^2, \qquad
        u_t = \frac{\hat m_t + \beta_2 \hat v_t}{\sqrt{\hat n_t + \bar\epsilon} + \epsilon}

    where :math:`\hat m_t = m_t / (1 - \beta_1^t)`, and :math:`\hat v_t` and :math:`\hat n_t` likewise.

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``, decay of the average of the gradient.
        b2: :math:`\beta_2` in ``[0, 1)``, decay of the average of its change, and the weight of the change.
        b3: :math:`\beta_3` in ``[0, 1)``, decay of the average of the square.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient.

    Slots have the parameter's shape and dtype. The paper writes :math:`1 - \beta` for what is :math:`\beta` here and in the
    authors' code. Optax has the decays of the code and the paper's :math:`1 - \beta_2` for the weight of the change: 0.08 in place
    of 0.92.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Xie et al., `Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models
        <https://arxiv.org/abs/2208.06677>`_, 2022, algorithm 1, in the form of the authors' code.

    Example:
        >>> tx = scale_by_adan()
        >>> tx.update(torch.tensor([3.0, -0.1]), tx.init(torch.zeros(2)))[0]
        tensor([ 1., -1.])
    """
    b1, b2, b3 = (number(f"b{i}", b, at_least=0, below=1) for i, b in enumerate((b1, b2, b3), 1))
    eps, eps_root = number("eps", eps, at_least=0), number("eps_root", eps_root, at_least=0)

    def init(p: Tensor) -> AdanSlots:
        return AdanSlots(*(torch.zeros_like(p) for _ in range(4)))

    def at_step(step: Tensor) -> tuple[Tensor, ...]:
        return step > 1, *(bias_correction(b, step) for b in (b1, b2, b3))

    def update(g: Tensor, slots: AdanSlots, p: Any, step: Any) -> tuple[Tensor, AdanSlots]:
        later, first, second, third = step
        d = torch.where(later, g - slots.g, 0)
        m, v = lerp(slots.m, g, 1 - b1), lerp(slots.v, d, 1 - b2)
        n = average_square(slots.n, add_scaled(g, d, b2), b3)
        return (m / first + b2 * v / second) / (sqrt(n / third, eps_root) + eps), AdanSlots(m, v, n, g.clone())

    return leafwise(init, update, elementwise=True, at_step=at_step)


@alias
def adan(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Scalar, Scalar, Scalar] = (0.98, 0.92, 0.99),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    eps_root: Scalar = 0.0,
    no_prox: bool = False,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Adan.

    .. math:: p_t = \frac{p_{t-1} - \gamma\, \mathrm{adan}(g_t)}{1 + \gamma \lambda}

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2, \beta_3)`, each in ``[0, 1)``, see :func:`scale_by_adan`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient; 1e-8 is the default of Optax, which the authors'
            code does not have.
        no_prox: decay as :func:`adamw` does, :math:`p_t = p_{t-1} - \gamma\, (\mathrm{adan}(g_t) + \lambda p_{t-1})`: the authors'
            option, and Optax's form.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_adan`.

    Example:
        >>> tx = adan(lr=0.1, weight_decay=5.0)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.6000])}
    """
    rule, decay = scale_by_adan(*betas, eps=eps, eps_root=eps_root), number("weight_decay", weight_decay, at_least=0)
    rate = scalar_or_schedule("lr", lr, at_least=0)
    # The proximal step is that of adamw, -lr (u + decay p), divided by 1 + lr decay where there is a decay.
    shrink = with_learning_rate(lambda lr: scale(1 / (1 + lr * decay)), rate)
    proximal = identity() if no_prox or is_zero(decay) else shrink if mask is None else masked(shrink, mask)
    return chain(negate_if(maximize), *decayed(rule, decay, True, mask), proximal, scale_by_learning_rate(rate))
