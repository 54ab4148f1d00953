"""Optimistic gradient descent: the next gradient is foreseen from the last two."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar
from optfn.optimizers.adam import scale_by_adam
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["OptimisticGradientSlots", "optimistic_adam_v2", "optimistic_gradient_descent", "scale_by_optimistic_gradient"]


class OptimisticGradientSlots(NamedTuple):
    """Slots of :func:`scale_by_optimistic_gradient` for one tensor: ``previous_gradient``, its last one, with its shape."""

    previous_gradient: Tensor


def scale_by_optimistic_gradient(alpha: Scalar = 1.0, beta: Scalar = 1.0) -> GradientTransformation:
    r"""Add to the gradient how it has changed: :math:`u_t = (\alpha + \beta)\, g_t - \beta\, g_{t-1}`, with :math:`g_0 = g_1`.

    Args:
        alpha: :math:`\alpha`, weight of the gradient.
        beta: :math:`\beta`, weight of its change.

    The slot has the parameter's shape and dtype.

    Reference:
        Mokhtari, Ozdaglar and Pattathil, `A Unified Analysis of Extra-gradient and Optimistic Gradient Methods for Saddle Point
        Problems <https://arxiv.org/abs/1901.08511>`_, 2019 (generalized OGDA).

    Example:
        >>> tx = scale_by_optimistic_gradient()
        >>> state = tx.init(torch.zeros(1))
        >>> for g in (1.0, 3.0):
        ...     update, state = tx.update(torch.tensor([g]), state)
        ...     print(update)
        tensor([1.])
        tensor([5.])
    """
    alpha, beta = number("alpha", alpha), number("beta", beta)

    def update(g: Tensor, slots: OptimisticGradientSlots, p: Any, is_first: Tensor) -> tuple[Tensor, OptimisticGradientSlots]:
        previous = torch.where(is_first, g, slots.previous_gradient)
        return alpha * g + beta * (g - previous), OptimisticGradientSlots(g.clone())

    def init(p: Tensor) -> OptimisticGradientSlots:
        return OptimisticGradientSlots(torch.zeros_like(p))

    return leafwise(init, update, elementwise=True, at_step=lambda step: step == 1)


@alias
def optimistic_gradient_descent(
    lr: ScalarOrSchedule = 1e-3, alpha: Scalar = 1.0, beta: Scalar = 1.0, *, maximize: bool = False
) -> GradientTransformation:
    r"""Optimistic gradient descent, which converges in games where gradient descent circles.

    .. math:: p_t = p_{t-1} - \gamma\, ((\alpha + \beta)\, g_t - \beta\, g_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        alpha: :math:`\alpha`, weight of the gradient.
        beta: :math:`\beta`, weight of its change.
        maximize: ascend instead.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_optimistic_gradient`.

    Example:
        >>> tx = optimistic_gradient_descent(lr=0.5)
        >>> x = torch.ones(2)
        >>> state = tx.init(x)
        >>> for _ in range(100):  # x[0] descends and x[1] ascends on x[0] x[1]
        ...     updates, state = tx.update(torch.stack([x[1], -x[0]]), state)
        ...     x = optfn.apply_updates(x, updates)
        >>> bool(x.norm() < 0.1)
        True
    """
    return chain(negate_if(maximize), scale_by_optimistic_gradient(alpha, beta), scale_by_learning_rate(lr))


@alias
def optimistic_adam_v2(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 1.0,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    nesterov: bool = True,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Adam, followed by an optimistic step.

    .. math::
        a_t = \mathrm{adam}(g_t), \qquad p_t = p_{t-1} - \gamma\, ((\alpha + \beta)\, a_t - \beta\, a_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_adam`.
        eps: :math:`\epsilon \ge 0`.
        alpha: :math:`\alpha`, weight of Adam's direction.
        beta: :math:`\beta`, weight of its change.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient.
        mu_dtype: dtype of the first moment; the parameter's if None.
        nesterov: look one step ahead, see :func:`scale_by_adam`.
        maximize: ascend instead.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Daskalakis et al., `Training GANs with Optimism <https://arxiv.org/abs/1711.00141>`_, 2018, algorithm 1.

    Example:
        >>> tx = optimistic_adam_v2(lr=0.1, nesterov=False)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """
    rule = scale_by_adam(*betas, eps=eps, eps_root=eps_root, mu_dtype=mu_dtype, nesterov=nesterov)
    return chain(negate_if(maximize), rule, scale_by_optimistic_gradient(alpha, beta), scale_by_learning_rate(lr))
