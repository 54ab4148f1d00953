"""Layer-wise trust ratios: steps as long as the weights are, LARS, LAMB and Fromage."""

from typing import Any

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, masked, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import Extent, stateless_with_tree_map
from optfn.numerics import Scalar
from optfn.optimizers.adam import scale_by_adam
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import add_decayed_weights
from optfn.transforms.momentum import trace
from optfn.transforms.scaling import scale_by_learning_rate
from optfn.wrappers.hyperparams import with_learning_rate

__all__ = ["fromage", "lamb", "lars", "scale_by_trust_ratio"]


def scale_by_trust_ratio(min_norm: Scalar = 0.0, trust_coefficient: Scalar = 1.0, eps: Scalar = 0.0) -> GradientTransformation:
    r"""Scale each update by the norm of its parameter over its own norm.

    .. math:: u = \eta\, \frac{\max(\|p\|, m)}{\max(\|g\|, m) + \epsilon}\, g

    where both norms are positive; where one is 0 the update passes as it is.

    Args:
        min_norm: :math:`m \ge 0`, below which no norm counts as smaller.
        trust_coefficient: :math:`\eta \ge 0`.
        eps: :math:`\epsilon \ge 0`, in the units of the updates.

    Raises:
        TypeError: from ``update``: ``params`` is missing.
        ValueError: an argument out of range.

    Reference:
        You, Gitman and Ginsburg, `Large Batch Training of Convolutional Networks <https://arxiv.org/abs/1708.03888>`_, 2017,
        section 4.

    Example:
        >>> scale_by_trust_ratio().update(torch.tensor([0.3, 0.4]), (), torch.tensor([6.0, 8.0]))[0]
        tensor([6., 8.])
    """
    least, eps = number("min_norm", min_norm, at_least=0), number("eps", eps, at_least=0)
    eta = number("trust_coefficient", trust_coefficient, at_least=0)

    def scaled(g: Tensor, p: Tensor, extents: tuple[Extent, Extent]) -> Tensor:
        p_norm, g_norm = (extent.norm.clamp_min(least) for extent in extents)
        none = (p_norm == 0) | (g_norm == 0)
        return g * torch.where(none, 1, eta * p_norm / torch.where(none, 1, g_norm + eps))

    return stateless_with_tree_map(scaled, elementwise=False, norms=lambda g, p: (p, g), needs_params=True)


@alias
def lamb(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    *,
    eps_root: Scalar = 0.0,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""LAMB: Adam for large batches, each step as long as the weights of its layer.

    .. math:: r_t = \mathrm{adam}(g_t) + \lambda p_{t-1}, \qquad p_t = p_{t-1} - \gamma\, \frac{\|p_{t-1}\|}{\|r_t\|}\, r_t

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_adam`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        eps_root: :math:`\bar\epsilon \ge 0`, see :func:`scale_by_adam`.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        You et al., `Large Batch Optimization for Deep Learning: Training BERT in 76 minutes
        <https://arxiv.org/abs/1904.00962>`_, 2019, algorithm 2.

    Example:
        >>> tx = lamb(lr=0.1)
        >>> params = {"w": torch.tensor([3.0, 4.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0, 5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([2.6464, 3.6464])}
    """
    rule = scale_by_adam(*betas, eps=eps, eps_root=eps_root)
    decay = add_decayed_weights(weight_decay, mask)
    return chain(negate_if(maximize), rule, decay, scale_by_trust_ratio(), scale_by_learning_rate(lr))


@alias
def lars(
    lr: ScalarOrSchedule,
    weight_decay: Scalar = 0.0,
    weight_decay_mask: Any = True,
    trust_coefficient: Scalar = 0.001,
    eps: Scalar = 0.0,
    trust_ratio_mask: Any = True,
    momentum: Scalar = 0.9,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""LARS: SGD with momentum for large batches, each gradient made as long as a share of the weights of its layer.

    .. math::
        g_t \leftarrow g_t + \lambda p_{t-1}, \qquad
        v_t = \mu v_{t-1} + \gamma\, \eta\, \frac{\|p_{t-1}\|}{\|g_t\| + \epsilon}\, g_t, \qquad p_t = p_{t-1} - v_t

    The norm is that of the decayed gradient, as in Optax. The paper divides by :math:`\|g_t\| + \lambda \|p_{t-1}\|`, which is
    at least as large.

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        weight_decay: L2 coefficient :math:`\lambda \ge 0`.
        weight_decay_mask: True for the leaves that decay, as in :func:`masked`.
        trust_coefficient: :math:`\eta \ge 0`, the share.
        eps: :math:`\epsilon \ge 0`.
        trust_ratio_mask: True for the leaves whose gradient is scaled, as in :func:`masked`; biases and norms often are not.
        momentum: :math:`\mu \ge 0`; of the scaled steps, so that a change of the rate acts on new gradients alone.
        nesterov: Nesterov momentum.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        You, Gitman and Ginsburg, `Large Batch Training of Convolutional Networks <https://arxiv.org/abs/1708.03888>`_, 2017,
        algorithm 1.

    Example:
        >>> tx = lars(lr=1.0, trust_coefficient=0.1)
        >>> params = {"w": torch.tensor([6.0, 8.0])}
        >>> updates, state = tx.update({"w": torch.tensor([3.0, 4.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([5.4000, 7.2000])}
    """
    trust = scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps)
    return chain(
        negate_if(maximize),
        add_decayed_weights(weight_decay, None if weight_decay_mask is True else weight_decay_mask),
        trust if trust_ratio_mask is True else masked(trust, trust_ratio_mask),
        scale_by_learning_rate(lr),
        trace(momentum, nesterov),
    )


@alias
def fromage(lr: ScalarOrSchedule = 1e-2, min_norm: Scalar = 1e-6, *, maximize: bool = False) -> GradientTransformation:
    r"""Fromage: steps as long as a share of the weights, which are then drawn in so that they do not grow.

    .. math:: p_t = \frac{1}{\sqrt{1 + \gamma^2}} \left( p_{t-1} - \gamma\, \frac{\|p_{t-1}\|}{\|g_t\|}\, g_t \right)

    Args:
        lr: :math:`\gamma \ge 0`, the share: a number, a 0-dim tensor or a schedule.
        min_norm: the least that a norm counts for, at least 0, see :func:`scale_by_trust_ratio`.
        maximize: ascend instead.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Bernstein et al., `On the distance between two neural networks and the stability of learning
        <https://arxiv.org/abs/2002.03432>`_, 2020, algorithm 1.

    Example:
        >>> tx = fromage(lr=0.75)
        >>> params = {"w": torch.tensor([3.0, 4.0])}
        >>> updates, state = tx.update({"w": torch.tensor([0.0, 2.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([2.4000, 0.2000])}
    """
    return chain(negate_if(maximize), scale_by_trust_ratio(min_norm), with_learning_rate(_drawn_in, lr))


def _drawn_in(lr: Scalar) -> GradientTransformation:
    lr = number("lr", lr, at_least=0, finite=True)
    root = (1 + lr**2) ** 0.5
    loss = lr**2 / (root + root**2)  # 1 - 1 / root, with all its digits
    return stateless_with_tree_map(lambda u, p: -(lr / root) * u - loss * p, needs_params=True)
