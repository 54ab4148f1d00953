"""Stochastic gradient descent, with momentum."""

from optfn.checks import alias, is_zero
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation, identity
from optfn.numerics import Scalar
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import add_decayed_weights
from optfn.transforms.momentum import trace
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["sgd"]


@alias
def sgd(
    lr: ScalarOrSchedule = 1e-3,
    momentum: Scalar = 0.0,
    dampening: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Stochastic gradient descent: :class:`torch.optim.SGD`.

    .. math::
        g_t \leftarrow g_t + \lambda p_{t-1}, \qquad p_t = p_{t-1} - \gamma\, \mathrm{trace}_{\mu,\tau}(g_t)

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        momentum: :math:`\mu \ge 0`; the number 0 leaves :func:`trace` out.
        dampening: :math:`\tau`, see :func:`trace`.
        weight_decay: L2 coefficient :math:`\lambda \ge 0`.
        nesterov: Nesterov momentum; needs ``momentum > 0`` and ``dampening == 0``.
        maximize: ascend instead.

    Gradients may be sparse without weight decay; without momentum the updates are then sparse too.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> tx = sgd(lr=0.1, momentum=0.9)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([2.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.8000])}
    """
    if nesterov and (is_zero(momentum) or not is_zero(dampening)):
        raise ValueError(f"nesterov needs momentum > 0 and dampening == 0, got {momentum} and {dampening}")
    return chain(
        negate_if(maximize),
        add_decayed_weights(weight_decay),
        identity() if is_zero(momentum) else trace(momentum, nesterov, dampening=dampening),
        scale_by_learning_rate(lr),
    )
