"""Adagrad."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, is_zero, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, full_like, sqrt
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import add_decayed_weights
from optfn.transforms.scaling import scale_by_learning_rate
from optfn.wrappers.sparse import sparse_masked

__all__ = ["AdagradSlots", "adagrad", "scale_by_adagrad", "scale_by_rss"]


class AdagradSlots(NamedTuple):
    """Slots of :func:`scale_by_adagrad` for one tensor: ``sum``, of the squared gradients, with the tensor's shape."""

    sum: Tensor


def scale_by_adagrad(
    initial_accumulator_value: Scalar = 0.0, eps: Scalar = 1e-10, lr_decay: Scalar = 0.0, *, eps_in_sqrt: bool = False
) -> GradientTransformation:
    r"""Rescale updates by the root of the sum of all squared gradients.

    .. math:: s_t = s_{t-1} + g_t^2, \qquad u_t = \frac{g_t}{(\sqrt{s_t} + \epsilon)\,(1 + (t - 1)\, \eta)}

    Args:
        initial_accumulator_value: :math:`s_0 \ge 0`.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient (of its square with ``eps_in_sqrt``).
        lr_decay: :math:`\eta \ge 0`, per step.
        eps_in_sqrt: divide by :math:`\sqrt{s_t + \epsilon}`, as :func:`scale_by_rss` does.

    The sum has the parameter's shape and dtype.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Duchi, Hazan and Singer, `Adaptive Subgradient Methods for Online Learning and Stochastic Optimization
        <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011, figure 1 (diagonal); in the form of :class:`torch.optim.Adagrad`.

    Example:
        >>> tx = scale_by_adagrad()
        >>> tx.update(torch.tensor([3.0, -0.1]), tx.init(torch.zeros(2)))[0]
        tensor([ 1., -1.])
    """
    start = number("initial_accumulator_value", initial_accumulator_value, at_least=0)
    eps, eta = number("eps", eps, at_least=0), number("lr_decay", lr_decay, at_least=0)

    def init(p: Tensor) -> AdagradSlots:
        return AdagradSlots(full_like(p, start))

    def update(g: Tensor, slots: AdagradSlots, p: Any, step: Tensor) -> tuple[Tensor, AdagradSlots]:
        total = torch.addcmul(slots.sum, g, g)
        root = sqrt(total, eps) if eps_in_sqrt else sqrt(total) + eps
        return g / (root if is_zero(eta) else root * (1 + (step - 1) * eta)), AdagradSlots(total)

    return leafwise(init, update, elementwise=True)


def scale_by_rss(initial_accumulator_value: Scalar = 0.1, eps: Scalar = 1e-7) -> GradientTransformation:
    r"""Rescale updates by the root of the sum of all squared gradients: :func:`scale_by_adagrad` in Optax's form.

    .. math:: s_t = s_{t-1} + g_t^2, \qquad u_t = g_t / \sqrt{s_t + \epsilon}

    Args:
        initial_accumulator_value: :math:`s_0 \ge 0`.
        eps: :math:`\epsilon \ge 0`, in the units of the squared gradient.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_adagrad`.

    Example:
        >>> tx = scale_by_rss(initial_accumulator_value=7.0)
        >>> tx.update(torch.tensor([3.0]), tx.init(torch.zeros(1)))[0]
        tensor([0.7500])
    """
    return scale_by_adagrad(initial_accumulator_value, eps, eps_in_sqrt=True)


@alias
def adagrad(
    lr: ScalarOrSchedule = 1e-2,
    lr_decay: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    initial_accumulator_value: Scalar = 0.0,
    eps: Scalar = 1e-10,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Adagrad: :class:`torch.optim.Adagrad`.

    .. math:: g_t \leftarrow g_t + \lambda p_{t-1}, \qquad p_t = p_{t-1} - \gamma\, \mathrm{adagrad}(g_t)

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        lr_decay: :math:`\eta \ge 0`: step :math:`t` is divided by :math:`1 + (t - 1)\eta`.
        weight_decay: L2 coefficient :math:`\lambda \ge 0`.
        initial_accumulator_value: where the sum of squares begins, at least 0.
        eps: :math:`\epsilon \ge 0`.
        maximize: ascend instead.

    Gradients may be sparse without weight decay; only their rows are then touched, and the updates are sparse.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_adagrad`.

    Example:
        >>> tx = adagrad(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """
    return chain(
        negate_if(maximize),
        add_decayed_weights(weight_decay),
        sparse_masked(scale_by_adagrad(initial_accumulator_value, eps, lr_decay), dense="pass"),
        scale_by_learning_rate(lr),
    )
