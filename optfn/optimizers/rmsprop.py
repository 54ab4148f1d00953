"""RMSprop, plain and centered."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, is_zero, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation, identity
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, as_scalar, average_square, debias, full_like, lerp, sqrt
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import add_decayed_weights
from optfn.transforms.momentum import trace
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["RmsSlots", "rmsprop", "scale_by_rms", "scale_by_stddev"]


class RmsSlots(NamedTuple):
    """Slots of :func:`scale_by_rms` for one tensor, each with its shape.

    Attributes:
        nu: average of the squared gradient.
        mu: average of the gradient; ``()`` unless centered.
    """

    nu: Tensor
    mu: Tensor | tuple[()] = ()


def scale_by_rms(
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    centered: bool = False,
) -> GradientTransformation:
    r"""Rescale updates by the root of a moving average of the squared gradient.

    .. math::
        \nu_t = \alpha\, \nu_{t-1} + (1 - \alpha)\, g_t^2, \qquad
        \mu_t = \alpha\, \mu_{t-1} + (1 - \alpha)\, g_t, \qquad
        u_t = g_t / \sqrt{\nu_t\, [- \mu_t^2] + \epsilon}

    Args:
        decay: :math:`\alpha` in ``[0, 1]``.
        eps: :math:`\epsilon \ge 0`, in the units of the squared gradient (of the gradient without ``eps_in_sqrt``).
        initial_scale: :math:`\nu_0 \ge 0`.
        eps_in_sqrt: whether :math:`\epsilon` is under the root, as in Optax; False is torch's form,
            :math:`\sqrt{\cdot} + \epsilon`.
        bias_correction: whether the averages are divided by :math:`1 - \alpha^t`.
        centered: whether :math:`\mu_t^2` is subtracted, as in :func:`scale_by_stddev`.

    The averages have the parameter's shape and dtype.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Tieleman and Hinton, `Lecture 6.5, rmsprop <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_,
        2012; Graves, `Generating Sequences With Recurrent Neural Networks <https://arxiv.org/abs/1308.0850>`_, 2013,
        equations 38 to 41 (centered).

    Example:
        >>> tx = scale_by_rms(decay=0.75)
        >>> tx.update(torch.tensor([3.0, -0.1]), tx.init(torch.zeros(2)))[0]
        tensor([ 2.0000, -2.0000])
    """
    alpha, eps = number("decay", decay, at_least=0, at_most=1), number("eps", eps, at_least=0)
    start = number("initial_scale", initial_scale, at_least=0)

    def init(p: Tensor) -> RmsSlots:
        return RmsSlots(full_like(p, start), torch.zeros_like(p) if centered else ())

    def at_step(step: Tensor) -> tuple[Scalar, ...]:
        return step, as_scalar(alpha, step.dtype), as_scalar(eps, step.dtype)

    def update(g: Tensor, slots: RmsSlots, p: Any, scalars: Any) -> tuple[Tensor, RmsSlots]:
        step, keep, offset = scalars
        nu, mu = average_square(slots.nu, g, alpha, keep), slots.mu
        variance = debias(nu, alpha, step) if bias_correction else nu
        if isinstance(mu, Tensor):
            mu = lerp(mu, g, 1 - alpha)
            variance = variance - (debias(mu, alpha, step) if bias_correction else mu).square()
        root = sqrt(variance, offset) if eps_in_sqrt else sqrt(variance) + offset
        return g / root, RmsSlots(nu, mu)

    return leafwise(init, update, elementwise=True, at_step=at_step)


def scale_by_stddev(
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> GradientTransformation:
    r"""Rescale updates by an estimate of the gradient's standard deviation: :func:`scale_by_rms` with ``centered=True``.

    .. math:: u_t = g_t / \sqrt{\nu_t - \mu_t^2 + \epsilon}

    Args:
        decay: :math:`\alpha` in ``[0, 1]``, of :math:`\nu_t`, average of the squared gradient, and :math:`\mu_t`, of the gradient.
        eps: :math:`\epsilon \ge 0`, in the units of the squared gradient (of the gradient without ``eps_in_sqrt``).
        initial_scale: :math:`\nu_0 \ge 0`.
        eps_in_sqrt: whether :math:`\epsilon` is under the root.
        bias_correction: whether the averages are divided by :math:`1 - \alpha^t`.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Graves, `Generating Sequences With Recurrent Neural Networks <https://arxiv.org/abs/1308.0850>`_, 2013, equations 38 to 41.

    Example:
        >>> tx = scale_by_stddev(decay=0.5)
        >>> tx.update(torch.tensor([3.0, -0.1]), tx.init(torch.zeros(2)))[0]
        tensor([ 2.0000, -2.0000])
    """
    return scale_by_rms(decay, eps, initial_scale, eps_in_sqrt, bias_correction, centered=True)


@alias
def rmsprop(
    lr: ScalarOrSchedule = 1e-2,
    alpha: Scalar = 0.99,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    momentum: Scalar = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""RMSprop: :class:`torch.optim.RMSprop`.

    .. math::
        g_t \leftarrow g_t + \lambda p_{t-1}, \qquad
        p_t = p_{t-1} - \gamma\, \mathrm{trace}_m(\mathrm{rms}(g_t))

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        alpha: decay of the averages in ``[0, 1]``.
        eps: :math:`\epsilon \ge 0`, outside the root.
        weight_decay: L2 coefficient :math:`\lambda \ge 0`.
        momentum: :math:`m \ge 0`, of the rescaled gradient; the number 0 leaves :func:`trace` out.
        centered: whether to divide by an estimate of the standard deviation.
        maximize: ascend instead.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_rms`.

    Example:
        >>> tx = rmsprop(lr=0.1, alpha=0.75)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.8000])}
    """
    rule = scale_by_rms(alpha, eps, eps_in_sqrt=False, centered=centered)
    velocity = identity() if is_zero(momentum) else trace(momentum)
    return chain(negate_if(maximize), add_decayed_weights(weight_decay), rule, velocity, scale_by_learning_rate(lr))
