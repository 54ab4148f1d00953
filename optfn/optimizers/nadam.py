"""NAdam: Adam with Nesterov momentum, and a schedule of it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, as_scalar, average_square, bias_correction, lerp, sqrt, widened_scalar
from optfn.schedules import ScalarOrSchedule, as_time
from optfn.transforms.decay import decayed
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["NAdamSlots", "nadam", "scale_by_nadam"]


class NAdamSlots(NamedTuple):
    """Slots of :func:`scale_by_nadam` for one tensor.

    Attributes:
        mu: first moment, with the tensor's shape.
        nu: second moment, with the tensor's shape.
        mu_product: product of the momentum coefficients so far, a 0-dim float32 tensor, as in torch, whatever the leaf's dtype.
    """

    mu: Tensor
    nu: Tensor
    mu_product: Tensor


def scale_by_nadam(
    b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8, momentum_decay: Scalar = 4e-3
) -> GradientTransformation:
    r"""Rescale updates by NAdam.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \qquad
        \nu_t = \beta_2 \nu_{t-1} + (1 - \beta_2)\, g_t^2, \qquad
        \mu_t = \beta_1 (1 - \tfrac12\, 0.96^{t \psi}), \\
        u_t &= \left( \frac{(1 - \mu_t)\, g_t}{1 - \prod_{i \le t} \mu_i} +
        \frac{\mu_{t+1}\, m_t}{1 - \prod_{i \le t+1} \mu_i} \right) \Big/ \left( \sqrt{\nu_t / (1 - \beta_2^t)} + \epsilon \right)

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``, decay of the first moment, and where the momentum coefficient tends to.
        b2: :math:`\beta_2` in ``[0, 1)``, decay of the second moment.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        momentum_decay: :math:`\psi \ge 0`, per step.

    Moments have the parameter's shape and dtype. Without the schedule of the momentum this is
    ``scale_by_adam(nesterov=True)``, Optax's ``nadam``.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Dozat, `Incorporating Nesterov Momentum into Adam <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016,
        algorithm 2; the momentum schedule is of its section 3; in the form of :class:`torch.optim.NAdam`.

    Example:
        >>> tx = scale_by_nadam()
        >>> tx.update(torch.tensor([3.0, -0.1]), tx.init(torch.zeros(2)))[0]
        tensor([ 1.0565, -1.0565])
    """
    b1, b2 = number("b1", b1, at_least=0, below=1), number("b2", b2, at_least=0, below=1)
    eps, psi = number("eps", eps, at_least=0), number("momentum_decay", momentum_decay, at_least=0)

    def momentum(t: Tensor) -> Tensor:
        return b1 * (1 - 0.5 * 0.96 ** (t * psi))

    def init(p: Tensor) -> NAdamSlots:
        return NAdamSlots(torch.zeros_like(p), torch.zeros_like(p), torch.ones((), device=p.device))

    def at_step(step: Tensor) -> tuple[Scalar, ...]:
        now, then, root = momentum(as_time(step)), momentum(as_time(step) + 1), bias_correction(b2, step).sqrt()
        return as_scalar(b2, step.dtype), now.float(), then, root * (1 - now), root * then, eps * root

    def update(g: Tensor, slots: NAdamSlots, p: Any, step: Any) -> tuple[Tensor, NAdamSlots]:
        keep, now, then, first, second, offset = step
        kept = slots.mu_product.float() * now  # in float32
        product, mu, nu = widened_scalar(kept), lerp(slots.mu, g, 1 - b1), average_square(slots.nu, g, b2, keep)
        direction = torch.addcmul(first / (1 - product) * g, mu, second / (1 - product * then))
        return direction / (sqrt(nu) + offset), NAdamSlots(mu, nu, kept)

    return leafwise(init, update, elementwise=True, at_step=at_step)


@alias
def nadam(
    lr: ScalarOrSchedule = 2e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    momentum_decay: Scalar = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""NAdam: :class:`torch.optim.NAdam`.

    .. math:: g_t \leftarrow g_t + \lambda p_{t-1}, \qquad p_t = p_{t-1} - \gamma\, \mathrm{nadam}(g_t)

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_nadam`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        momentum_decay: :math:`\psi \ge 0`.
        decoupled_weight_decay: decay as :func:`adamw` does, not by L2.
        maximize: ascend instead.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_nadam`.

    Example:
        >>> tx = nadam(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.8944])}
    """
    rule = scale_by_nadam(*betas, eps=eps, momentum_decay=momentum_decay)
    return chain(negate_if(maximize), *decayed(rule, weight_decay, decoupled_weight_decay), scale_by_learning_rate(lr))
