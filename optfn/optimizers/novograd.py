"""NovoGrad: momentum of gradients that are divided by their norm, a tensor at a time."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, is_zero, number
from optfn.compose import chain, chosen, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import Extent, leafwise
from optfn.numerics import Scalar, add_scaled, compute_dtype, lerp, sqrt
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["NovogradSlots", "novograd", "scale_by_novograd"]


class NovogradSlots(NamedTuple):
    """Slots of :func:`scale_by_novograd` for one tensor.

    Attributes:
        mu: decaying sum of what the gradient was rescaled to, with the tensor's shape.
        nu: average of the squared norm of the gradient, 0-dim, in float32 at least.
    """

    mu: Tensor
    nu: Tensor


def scale_by_novograd(
    b1: Scalar = 0.9,
    b2: Scalar = 0.25,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    mask: Any = None,
) -> GradientTransformation:
    r"""Rescale updates by NovoGrad.

    .. math::
        \nu_t = \beta_2 \nu_{t-1} + (1 - \beta_2)\, \|g_t\|^2, \qquad \nu_1 = \|g_1\|^2, \qquad
        \mu_t = \beta_1 \mu_{t-1} + \frac{g_t}{\sqrt{\nu_t + \bar\epsilon} + \epsilon} + \lambda p_{t-1}, \qquad u_t = \mu_t

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``, decay of the sum.
        b2: :math:`\beta_2` in ``[0, 1)``, decay of the squared norm.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient.
        weight_decay: :math:`\lambda \ge 0`; the decay is part of the sum.
        mu_dtype: dtype of the sum; the parameter's if None.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.

    Raises:
        TypeError: from ``update``: ``params`` is missing, and there is a decay.
        ValueError: an argument out of range.

    Reference:
        Ginsburg et al., `Stochastic Gradient Methods with Layer-wise Adaptive Moments for Training of Deep Networks
        <https://arxiv.org/abs/1905.11286>`_, 2019, algorithm 1.

    Example:
        >>> tx = scale_by_novograd()
        >>> tx.update(torch.tensor([3.0, -4.0]), tx.init(torch.zeros(2)))[0]
        tensor([ 0.6000, -0.8000])
    """
    b1, b2 = number("b1", b1, at_least=0, below=1), number("b2", b2, at_least=0, below=1)
    eps, eps_root = number("eps", eps, at_least=0), number("eps_root", eps_root, at_least=0)
    decay = number("weight_decay", weight_decay, at_least=0)

    def init(p: Tensor) -> NovogradSlots:
        return NovogradSlots(torch.zeros_like(p, dtype=mu_dtype), p.new_zeros((), dtype=compute_dtype(p)))

    def update(
        g: Tensor, slots: NovogradSlots, p: Any, weight: Tensor, decays: bool, extents: tuple[Extent]
    ) -> tuple[Tensor, NovogradSlots]:
        nu = lerp(slots.nu, extents[0].norm.square(), weight)
        rescaled = g / (sqrt(nu, eps_root) + eps)
        mu = add_scaled(add_scaled(rescaled, p, decay) if decays else rescaled, slots.mu, b1)
        return mu, NovogradSlots(mu, nu)

    def at_step(step: Tensor) -> Tensor:
        return 1 - (step > 1).to(step.dtype) * b2  # 1 in the first step

    def decays(params: Any) -> list[Any]:
        found = chosen(mask, params)
        return [False] * len(found) if is_zero(decay) else found

    needs_params = not is_zero(decay)
    return leafwise(init, update, norms=lambda g, p: (g,), at_step=at_step, needs_params=needs_params, per_leaf=decays)


@alias
def novograd(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.25),
    eps: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    *,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""NovoGrad.

    .. math:: p_t = p_{t-1} - \gamma\, \mathrm{novograd}_\lambda(g_t, p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_novograd`; the paper's are (0.95, 0.98).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`; the decay is part of the momentum.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient.
        mu_dtype: dtype of the momentum; the parameter's if None.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_novograd`.

    Example:
        >>> tx = novograd(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """
    rule = scale_by_novograd(*betas, eps, eps_root, weight_decay, mu_dtype, mask=mask)
    return chain(negate_if(maximize), rule, scale_by_learning_rate(lr))
