"""Step sizes from the value of the loss: Polyak's, and MoMo, which has it for momentum and for Adam."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import coupled
from optfn.numerics import Scalar, average_square, bias_correction, lerp, ratio, sqrt
from optfn.optimizers.sgd import sgd
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.scaling import scale
from optfn.wrappers.hyperparams import with_learning_rate

__all__ = [
    "MomoAdamSlots",
    "MomoShared",
    "MomoSlots",
    "PolyakShared",
    "momo",
    "momo_adam",
    "polyak_sgd",
    "scale_by_momo",
    "scale_by_momo_adam",
    "scale_by_polyak",
]


_SMALLEST = torch.finfo(torch.float64).eps
"""A squared norm that counts as 0, in every dtype, as in Optax."""


class PolyakShared(NamedTuple):
    """What :func:`scale_by_polyak` keeps for all tensors together.

    Attributes:
        step_size: the last step size, 0-dim.
    """

    step_size: Tensor


class MomoSlots(NamedTuple):
    """Slots of :func:`scale_by_momo` for one tensor.

    Attributes:
        mu: first moment, with its shape.
    """

    mu: Tensor


class MomoAdamSlots(NamedTuple):
    """Slots of :func:`scale_by_momo_adam` for one tensor, each with its shape.

    Attributes:
        mu: first moment.
        nu: second moment.
    """

    mu: Tensor
    nu: Tensor


class MomoShared(NamedTuple):
    r"""What MoMo keeps for all tensors together, 0-dim.

    Attributes:
        loss: average of the losses, :math:`\bar f`.
        product: average of the products of gradients and parameters, :math:`\gamma`.
        lower_bound: of the loss, :math:`f_*`.
        step_size: the last step size, :math:`\tau`.
        count: the updates so far.
    """

    loss: Tensor
    product: Tensor
    lower_bound: Tensor
    step_size: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]


def scale_by_polyak(
    f_min: Scalar = 0.0, max_learning_rate: Scalar = 1.0, eps: Scalar = 0.0, variant: Literal["sps", "sps+"] = "sps"
) -> GradientTransformation:
    r"""Rescale updates by Polyak's step size, for which ``update`` needs the loss, ``value=``.

    .. math:: u_t = \min\Big(\frac{f(p_{t-1}) - f_*}{\|g_t\|^2 + \epsilon}, \eta\Big)\, g_t

    The norm is over all tensors together. Where :math:`\|g\|^2 + \epsilon` is at most 2e-16 the update is 0.

    Args:
        f_min: :math:`f_*`, a lower bound of the loss.
        max_learning_rate: :math:`\eta \ge 0`, the largest step size.
        eps: :math:`\epsilon \ge 0`, in the units of a squared gradient.
        variant: ``"sps+"`` takes 0 for a loss that is below ``f_min``.

    Raises:
        TypeError: from ``update``: ``value`` is missing.
        ValueError: an argument out of range.

    Reference:
        Loizou, Vaswani, Laradji and Lacoste-Julien, `Stochastic Polyak Step-size <https://arxiv.org/abs/2002.10542>`_, 2020,
        equation 6; Garrigos, Gower and Schaipp, `Function Value Learning <https://arxiv.org/abs/2307.14528>`_, 2023 (``"sps+"``).

    Example:
        >>> tx = scale_by_polyak()
        >>> p = torch.tensor([2.0])
        >>> tx.update(2 * p, tx.init(p), p, value=p.square().sum())[0]
        tensor([1.])
    """
    f_min, bound = number("f_min", f_min), number("max_learning_rate", max_learning_rate, at_least=0)
    eps = number("eps", eps, at_least=0)
    if variant not in ("sps", "sps+"):
        raise ValueError(f"variant must be 'sps' or 'sps+', got {variant!r}")

    def measure(g: Tensor, slots: Any, p: Any, step: Any, shared: PolyakShared) -> tuple[tuple[Tensor], Any]:
        return (g.square().sum(),), slots

    def decide(shared: PolyakShared, sums: tuple[Tensor, ...], value: Tensor) -> PolyakShared:
        size, gap = sums[0] + eps, value - f_min
        gap = gap.clamp_min(0) if variant == "sps+" else gap
        step_size = ratio(gap, torch.where(size <= _SMALLEST, 0, size))
        return PolyakShared(torch.clamp(step_size, max=bound))

    def update(g: Tensor, slots: Any, p: Any, step: Any, shared: PolyakShared) -> tuple[Tensor, Any]:
        return shared.step_size * g, slots

    start: Any = PolyakShared(0.0)  # type: ignore[arg-type]
    return coupled(lambda p: (), measure, decide, update, shared=start, elementwise=True, extra=("value",))


def _step_size(
    shared: MomoShared, sums: tuple[Tensor, ...], lr: Scalar, weight: Scalar, bound: Scalar, adapt: bool, decay: Scalar
) -> MomoShared:
    """The step size of MoMo, and the lower bound, from averages whose weights sum to ``weight``."""
    product, size, inner = sums
    grow = 1 + lr * decay
    gap = grow * (shared.loss - product) + inner
    # Given, it may change from step to step; estimated, it is that of the step before.
    lower_bound = shared.lower_bound if adapt else torch.zeros_like(shared.lower_bound) + bound
    if adapt:
        reset = (gap / (2 * grow * weight)).clamp_min(bound)
        lower_bound = torch.where(gap < grow * weight * lower_bound, reset, lower_bound)
    needed = ratio((gap - grow * weight * lower_bound).clamp_min(0), torch.where(size <= _SMALLEST, 0, size))
    step_size = needed.clamp(max=lr / weight)
    if adapt:
        lower_bound = ((shared.loss + inner - product - step_size * size / 2) / weight).clamp_min(bound)
    return MomoShared(shared.loss, product, lower_bound, step_size, shared.count + 1)


@alias
def scale_by_momo(
    lr: Scalar = 1.0, beta: Scalar = 0.9, lower_bound: Scalar = 0.0, weight_decay: Scalar = 0.0, adapt_lower_bound: bool = False
) -> GradientTransformation:
    r"""Rescale updates by MoMo: momentum with Polyak's step size, for which ``update`` needs the loss, ``value=``.

    .. math::
        \mu_t &= \beta \mu_{t-1} + (1 - \beta) g_t, \qquad
        \bar f_t = \beta \bar f_{t-1} + (1 - \beta) f_t, \qquad
        \gamma_t = \beta \gamma_{t-1} + (1 - \beta) \langle g_t, p_{t-1} \rangle, \\
        \tau_t &= \min\Big(\eta, \frac{\max\big((1 + \eta \lambda)(\bar f_t - f_* - \gamma_t)
        + \langle \mu_t, p_{t-1} \rangle, 0\big)}{\|\mu_t\|^2}\Big), \qquad
        u_t = \tau_t \mu_t + \tfrac{\eta \lambda}{1 + \eta \lambda} p_{t-1}

    The averages begin with the first gradient and loss. Products and norms are over all tensors together. Where
    :math:`\|\mu\|^2` is at most 2e-16 the step size is 0.

    Args:
        lr: :math:`\eta \ge 0`, the largest step size, a number or a 0-dim tensor.
        beta: :math:`\beta` in ``[0, 1)``.
        lower_bound: :math:`f_*`, of the loss.
        weight_decay: :math:`\lambda \ge 0`.
        adapt_lower_bound: estimate :math:`f_*`, from ``lower_bound`` up, as in section 4 of the paper.

    Raises:
        TypeError: from ``update``: ``params`` or ``value`` is missing.
        ValueError: an argument out of range.

    Reference:
        Schaipp, Ohana, Eickenberg, Defazio and Gower, `MoMo <https://arxiv.org/abs/2305.07583>`_, 2023, algorithm 1, section 4.

    Example:
        >>> tx = scale_by_momo()
        >>> p = torch.tensor([2.0])
        >>> tx.update(2 * p, tx.init(p), p, value=p.square().sum())[0]
        tensor([1.])
    """
    lr, beta = number("lr", lr, at_least=0), number("beta", beta, at_least=0, below=1)
    bound, decay = number("lower_bound", lower_bound), number("weight_decay", weight_decay, at_least=0)

    def init(p: Tensor) -> MomoSlots:
        return MomoSlots(torch.zeros_like(p))

    def measure(g: Tensor, slots: MomoSlots, p: Tensor, step: Tensor, shared: MomoShared) -> tuple[Any, MomoSlots]:
        mu = torch.where(step == 1, g, lerp(slots.mu, g, 1 - beta))
        return ((g * p).sum(), mu.square().sum(), (mu * p).sum()), MomoSlots(mu)

    def decide(shared: MomoShared, sums: tuple[Tensor, ...], value: Tensor) -> MomoShared:
        product, *others = sums
        first = shared.count == 0
        shared = shared._replace(loss=torch.where(first, value, lerp(shared.loss, value, 1 - beta)))
        product = torch.where(first, product, lerp(shared.product, product, 1 - beta))
        return _step_size(shared, (product, *others), lr, 1.0, bound, adapt_lower_bound, decay)

    def update(g: Tensor, slots: MomoSlots, p: Tensor, step: Tensor, shared: MomoShared) -> tuple[Tensor, MomoSlots]:
        return shared.step_size * slots.mu + lr * decay / (1 + lr * decay) * p, slots

    start: Any = MomoShared(0.0, 0.0, 1.0 * bound, 0.0, 0)  # type: ignore[arg-type]
    return coupled(init, measure, decide, update, shared=start, elementwise=True, needs_params=True, extra=("value",))


@alias
def scale_by_momo_adam(
    lr: Scalar = 1e-2,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    lower_bound: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    adapt_lower_bound: bool = False,
) -> GradientTransformation:
    r"""Rescale updates by MoMo-Adam: Adam with Polyak's step size, for which ``update`` needs the loss, ``value=``.

    .. math::
        \mu_t, \bar f_t, \gamma_t &\text{ as in } \mathrm{momo} \text{, from 0, with } \beta_1, \qquad
        \nu_t = \beta_2 \nu_{t-1} + (1 - \beta_2) g_t^2, \qquad D_t = \epsilon + \sqrt{\nu_t / (1 - \beta_2^t)}, \\
        \tau_t &= \min\Big(\frac{\eta}{1 - \beta_1^t}, \frac{\max\big((1 + \eta \lambda)(\bar f_t - (1 - \beta_1^t) f_*
        - \gamma_t) + \langle \mu_t, p_{t-1} \rangle, 0\big)}{\langle \mu_t, \mu_t / D_t \rangle}\Big), \qquad
        u_t = \tau_t \mu_t / D_t + \tfrac{\eta \lambda}{1 + \eta \lambda} p_{t-1}

    Products are over all tensors together. Where :math:`\langle \mu, \mu / D \rangle` is at most 2e-16 the step size is 0.

    Args:
        lr: :math:`\eta \ge 0`, the largest step size, a number or a 0-dim tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        lower_bound: :math:`f_*`, of the loss.
        weight_decay: :math:`\lambda \ge 0`.
        adapt_lower_bound: estimate :math:`f_*`, from ``lower_bound`` up, as in section 4 of the paper.

    Raises:
        TypeError: from ``update``: ``params`` or ``value`` is missing.
        ValueError: an argument out of range.

    Reference:
        Schaipp, Ohana, Eickenberg, Defazio and Gower, `MoMo <https://arxiv.org/abs/2305.07583>`_, 2023, algorithm 2, section 4.

    Example:
        >>> tx = scale_by_momo_adam(lr=0.1)
        >>> p = torch.tensor([2.0])
        >>> tx.update(2 * p, tx.init(p), p, value=p.square().sum())[0]
        tensor([0.1000])
    """
    lr, (b1, b2) = number("lr", lr, at_least=0), betas
    b1, b2 = number("betas[0]", b1, at_least=0, below=1), number("betas[1]", b2, at_least=0, below=1)
    bound, decay = number("lower_bound", lower_bound), number("weight_decay", weight_decay, at_least=0)
    eps = number("eps", eps, at_least=0)

    def init(p: Tensor) -> MomoAdamSlots:
        return MomoAdamSlots(torch.zeros_like(p), torch.zeros_like(p))

    def at_step(step: Tensor) -> Tensor:
        return bias_correction(b2, step)

    def measure(g: Tensor, slots: MomoAdamSlots, p: Tensor, weight: Tensor, shared: MomoShared) -> tuple[Any, MomoAdamSlots]:
        mu, nu = lerp(slots.mu, g, 1 - b1), average_square(slots.nu, g, b2)
        return ((g * p).sum(), (mu * mu / (sqrt(nu / weight) + eps)).sum(), (mu * p).sum()), MomoAdamSlots(mu, nu)

    def decide(shared: MomoShared, sums: tuple[Tensor, ...], value: Tensor) -> MomoShared:
        product, *others = sums
        shared = shared._replace(loss=lerp(shared.loss, value, 1 - b1))
        product = lerp(shared.product, product, 1 - b1)
        weight = bias_correction(b1, (shared.count + 1).to(product.dtype))
        return _step_size(shared, (product, *others), lr, weight, bound, adapt_lower_bound, decay)

    def update(g: Tensor, slots: MomoAdamSlots, p: Tensor, weight: Tensor, shared: MomoShared) -> tuple[Tensor, MomoAdamSlots]:
        direction = slots.mu / (sqrt(slots.nu / weight) + eps)
        return shared.step_size * direction + lr * decay / (1 + lr * decay) * p, slots

    start: Any = MomoShared(0.0, 0.0, 1.0 * bound, 0.0, 0)  # type: ignore[arg-type]
    return coupled(
        init,
        measure,
        decide,
        update,
        shared=start,
        elementwise=True,
        at_step=at_step,
        needs_params=True,
        extra=("value",),
    )


@alias
def polyak_sgd(
    lr: ScalarOrSchedule = 1.0,
    max_learning_rate: Scalar = 1.0,
    f_min: Scalar = 0.0,
    eps: Scalar = 0.0,
    variant: Literal["sps", "sps+"] = "sps",
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Gradient descent with Polyak's step size; ``update`` needs the loss, ``value=``.

    .. math:: p_t = p_{t-1} - \mathrm{polyak}(\gamma g_t)

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule: Optax's ``scaling``. It multiplies the gradient, so a
            larger one makes the step smaller where ``max_learning_rate`` does not act.
        max_learning_rate: see :func:`scale_by_polyak`, as all that follow.
        f_min: a lower bound of the loss.
        eps: added to the squared norm.
        variant: whether the step size may be negative.
        maximize: ascend instead, with ``value`` the negated objective.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_polyak`.

    Example:
        >>> tx = polyak_sgd()
        >>> p = torch.tensor([2.0])
        >>> tx.update(2 * p, tx.init(p), p, value=p.square().sum())[0]
        tensor([-1.])
    """
    return chain(sgd(lr, maximize=maximize), scale_by_polyak(f_min, max_learning_rate, eps, variant))


@alias
def momo(
    lr: ScalarOrSchedule = 1.0,
    beta: Scalar = 0.9,
    lower_bound: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    adapt_lower_bound: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""MoMo: momentum whose step size is found from the loss, ``value=`` of ``update``.

    .. math:: p_t = p_{t-1} - \mathrm{momo}(g_t)

    Args:
        lr: :math:`\eta \ge 0`, the largest step size: a number, a 0-dim tensor or a schedule.
        beta: see :func:`scale_by_momo`, as all that follow.
        lower_bound: of the loss.
        weight_decay: decoupled.
        adapt_lower_bound: estimate the bound.
        maximize: ascend instead, with ``value`` the negated objective; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_momo`.

    Example:
        >>> tx = momo()
        >>> p = torch.tensor([2.0])
        >>> tx.update(2 * p, tx.init(p), p, value=p.square().sum())[0]
        tensor([-1.])
    """

    def rule(lr: Scalar) -> GradientTransformation:
        return scale_by_momo(lr, beta, lower_bound, weight_decay, adapt_lower_bound)

    return chain(negate_if(maximize), with_learning_rate(rule, lr), scale(-1.0))


@alias
def momo_adam(
    lr: ScalarOrSchedule = 1e-2,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    lower_bound: Scalar = 0.0,
    adapt_lower_bound: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""MoMo-Adam: AdamW whose step size is found from the loss, ``value=`` of ``update``.

    .. math:: p_t = p_{t-1} - \mathrm{momo\_adam}(g_t)

    Args:
        lr: :math:`\eta \ge 0`, the largest step size: a number, a 0-dim tensor or a schedule.
        betas: see :func:`scale_by_momo_adam`, as all that follow.
        eps: added to the root.
        weight_decay: decoupled.
        lower_bound: of the loss.
        adapt_lower_bound: estimate the bound.
        maximize: ascend instead, with ``value`` the negated objective; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_momo_adam`.

    Example:
        >>> tx = momo_adam(lr=0.1)
        >>> p = torch.tensor([2.0])
        >>> tx.update(2 * p, tx.init(p), p, value=p.square().sum())[0]
        tensor([-0.1000])
    """

    def rule(lr: Scalar) -> GradientTransformation:
        return scale_by_momo_adam(lr, betas, eps, lower_bound, weight_decay, adapt_lower_bound)

    return chain(negate_if(maximize), with_learning_rate(rule, lr), scale(-1.0))
