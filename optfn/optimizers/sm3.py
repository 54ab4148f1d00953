"""SM3: Adagrad with one sum for each row, column, and so on, of a tensor."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, lerp, sqrt
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import decayed
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["Sm3Slots", "scale_by_sm3", "sm3"]


class Sm3Slots(NamedTuple):
    r"""Slots of :func:`scale_by_sm3` for one tensor of shape :math:`[n_1, \dots, n_k]`.

    Attributes:
        mu: average of what the gradient was rescaled to, with the tensor's shape.
        sums: the sums of each dimension, one after the other, of shape :math:`[n_1 + \dots + n_k]`; 0-dim for a 0-dim tensor.
    """

    mu: Tensor
    sums: Tensor


def scale_by_sm3(b1: Scalar = 0.9, b2: Scalar = 1.0, eps: Scalar = 1e-8) -> GradientTransformation:
    r"""Rescale updates by the root of sums of squared gradients that all entries of a row, or a column, share.

    .. math::
        \nu_t(i) &= \beta_2 \min_{r \ni i} s_{t-1}(r) + w\, g_t(i)^2, \qquad
        s_t(r) = \max_{i \in r} \nu_t(i), \\
        \mu_t &= \beta_1 \mu_{t-1} + (1 - \beta_1)\, g_t / \sqrt{\nu_t + \epsilon}, \qquad u_t = \mu_t

    where :math:`r` is a slice, one index of one dimension fixed, and :math:`w` is 1 for :math:`\beta_2 = 1`, else
    :math:`1 - \beta_2`. A tensor with fewer than two dimensions has a sum for each entry.

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``, decay of the average.
        b2: :math:`\beta_2` in ``[0, 1]``; below 1 the sums are averages.
        eps: :math:`\epsilon \ge 0`, in the units of the squared gradient.

    Slots have the parameter's dtype. Optax has none for 0-dim tensors.

    Raises:
        TypeError: from ``init`` and ``update``: a tensor is complex.
        ValueError: an argument out of range.

    Reference:
        Anil et al., `Memory-Efficient Adaptive Optimization <https://arxiv.org/abs/1901.11150>`_, 2019, algorithm SM3-II.

    Example:
        >>> tx = scale_by_sm3(b1=0.0)
        >>> state = tx.init(torch.zeros(2, 2))
        >>> update, state = tx.update(torch.tensor([[3.0, 1.0], [0.0, -2.0]]), state)
        >>> update
        tensor([[ 1.,  1.],
                [ 0., -1.]])
        >>> state.slots.sums  # of two rows and two columns
        tensor([9., 4., 9., 4.])
    """
    b1, b2 = number("b1", b1, at_least=0, below=1), number("b2", b2, at_least=0, at_most=1)
    eps = number("eps", eps, at_least=0)
    w: Any = torch.where(b2 == 1, torch.ones_like(b2), 1 - b2) if isinstance(b2, Tensor) else 1 if b2 == 1 else 1 - b2

    def init(p: Tensor) -> Sm3Slots:
        return Sm3Slots(torch.zeros_like(p), p.new_zeros(sum(p.shape)) if p.ndim else torch.zeros_like(p))

    def update(g: Tensor, slots: Sm3Slots, p: Any, step: Tensor) -> tuple[Tensor, Sm3Slots]:
        nu = b2 * _least(slots.sums, g.shape) + w * g.square()
        mu = lerp(slots.mu, g / sqrt(nu, eps), 1 - b1)
        return mu, Sm3Slots(mu, _largest(nu))

    return leafwise(init, update, complex_="error")


def _least(sums: Tensor, shape: torch.Size) -> Tensor:
    """For each entry of a tensor of this shape the least of the sums of its slices."""
    if len(shape) < 2:
        return sums
    parts = enumerate(sums.split(list(shape)))
    return functools.reduce(torch.minimum, (x.reshape([-1 if j == i else 1 for j in range(len(shape))]) for i, x in parts))


def _largest(nu: Tensor) -> Tensor:
    """The largest entry of each slice, those of the first dimension first."""
    if nu.ndim < 2 or nu.numel() == 0:
        return nu if nu.ndim < 2 else nu.new_zeros(sum(nu.shape))
    return torch.cat([nu.amax([j for j in range(nu.ndim) if j != i]) for i in range(nu.ndim)])


@alias
def sm3(
    lr: ScalarOrSchedule = 0.1,
    momentum: Scalar = 0.9,
    weight_decay: Scalar = 0.0,
    *,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""SM3.

    .. math:: p_t = p_{t-1} - \gamma\, (\mathrm{sm3}(g_t) + \lambda p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        momentum: :math:`\beta_1` of :func:`scale_by_sm3`, in ``[0, 1)``.
        weight_decay: coefficient :math:`\lambda \ge 0` of decoupled decay; Optax has none.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        TypeError: from ``init``: a parameter is complex.
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_sm3`.

    Example:
        >>> tx = sm3(lr=0.1, momentum=0.0)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """
    rule = scale_by_sm3(number("momentum", momentum, at_least=0, below=1))
    return chain(negate_if(maximize), *decayed(rule, weight_decay, True, mask), scale_by_learning_rate(lr))
