"""Yogi: Adam with a second moment that changes additively."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, bias_correction, full_like, lerp, sqrt
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import decayed
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["YogiSlots", "scale_by_yogi", "yogi"]


class YogiSlots(NamedTuple):
    """Slots of :func:`scale_by_yogi` for one tensor, each with its shape.

    Attributes:
        mu: first moment.
        nu: second moment.
    """

    mu: Tensor
    nu: Tensor


def scale_by_yogi(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-3,
    eps_root: Scalar = 0.0,
    initial_accumulator_value: Scalar = 1e-6,
) -> GradientTransformation:
    r"""Rescale updates by Yogi.

    .. math::
        \mu_t = \beta_1 \mu_{t-1} + (1 - \beta_1)\, g_t, \qquad
        \nu_t = \nu_{t-1} - (1 - \beta_2)\, \mathrm{sign}(\nu_{t-1} - g_t^2)\, g_t^2, \qquad
        u_t = \hat\mu_t / (\sqrt{\hat\nu_t + \bar\epsilon} + \epsilon)

    with :math:`\hat\mu_t = \mu_t / (1 - \beta_1^t)` and :math:`\hat\nu_t = \nu_t / (1 - \beta_2^t)`.

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``, decay of the first moment.
        b2: :math:`\beta_2` in ``[0, 1)``: how fast the second moment changes is :math:`1 - \beta_2`.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient.
        initial_accumulator_value: :math:`\nu_0 \ge 0`.

    Moments have the parameter's shape and dtype. The first one begins at 0, as in the paper. Optax begins it at
    ``initial_accumulator_value`` too, and so moves parameters whose gradient is 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Zaheer et al., `Adaptive Methods for Nonconvex Optimization
        <https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization>`_, 2018, algorithm 2, with the bias
        corrections of Adam, as in Optax.

    Example:
        >>> tx = scale_by_yogi(eps=0.0, initial_accumulator_value=0.0)
        >>> tx.update(torch.tensor([3.0, -0.1]), tx.init(torch.zeros(2)))[0]
        tensor([ 1.0000, -1.0000])
    """
    b1, b2 = number("b1", b1, at_least=0, below=1), number("b2", b2, at_least=0, below=1)
    eps, eps_root = number("eps", eps, at_least=0), number("eps_root", eps_root, at_least=0)
    start = number("initial_accumulator_value", initial_accumulator_value, at_least=0)

    def init(p: Tensor) -> YogiSlots:
        return YogiSlots(torch.zeros_like(p), full_like(p, start))

    def update(g: Tensor, slots: YogiSlots, p: Any, corrections: Any) -> tuple[Tensor, YogiSlots]:
        first, second = corrections
        square = g.square()
        mu = lerp(slots.mu, g, 1 - b1)
        nu = slots.nu - (1 - b2) * (slots.nu - square).sign() * square
        return mu / first / (sqrt(nu / second, eps_root) + eps), YogiSlots(mu, nu)

    def at_step(step: Tensor) -> tuple[Tensor, Tensor]:
        return bias_correction(b1, step), bias_correction(b2, step)

    return leafwise(init, update, elementwise=True, at_step=at_step)


@alias
def yogi(
    lr: ScalarOrSchedule = 1e-2,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-3,
    weight_decay: Scalar = 0.0,
    *,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Yogi.

    .. math:: p_t = p_{t-1} - \gamma\, (\mathrm{yogi}(g_t) + \lambda p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_yogi`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: coefficient :math:`\lambda \ge 0` of decoupled decay; Optax has none.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_yogi`.

    Example:
        >>> tx = yogi(lr=0.1, eps=0.0)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """
    rule = scale_by_yogi(*betas, eps=eps)
    return chain(negate_if(maximize), *decayed(rule, weight_decay, True, mask), scale_by_learning_rate(lr))
