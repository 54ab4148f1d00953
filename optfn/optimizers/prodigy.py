"""Adam whose learning rate is found from the distance to the start: Prodigy and D-Adaptation."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, chosen, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import coupled
from optfn.numerics import Scalar, average_square, bias_correction, lerp, ratio, sqrt
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.scaling import scale
from optfn.wrappers.hyperparams import with_learning_rate

__all__ = ["DAdaptSlots", "EstimateShared", "ProdigySlots", "dadapt_adamw", "prodigy", "scale_by_dadapt_adamw", "scale_by_prodigy"]


class ProdigySlots(NamedTuple):
    """Slots of :func:`scale_by_prodigy` for one tensor, each with its shape.

    Attributes:
        mu: first moment of the gradients, each times the estimate at its step.
        nu: second moment of them.
        grad_sum: weighted sum of the gradients.
        start: the parameter as it was at its first update.
    """

    mu: Tensor
    nu: Tensor
    grad_sum: Tensor
    start: Tensor


class DAdaptSlots(NamedTuple):
    """Slots of :func:`scale_by_dadapt_adamw` for one tensor, each with its shape.

    Attributes:
        mu: first moment of the gradients, each times its step size.
        nu: second moment.
        grad_sum: weighted sum of the gradients.
    """

    mu: Tensor
    nu: Tensor
    grad_sum: Tensor


class EstimateShared(NamedTuple):
    """What Prodigy and D-Adaptation keep for all tensors together, 0-dim.

    Attributes:
        estim_lr: the estimate of the distance to the solution, which the next step uses.
        numerator_weighted: the numerator of the estimate.
        last_estim_lr: the estimate that the last step used.
    """

    estim_lr: Tensor
    numerator_weighted: Tensor
    last_estim_lr: Tensor


@alias
def scale_by_prodigy(
    lr: Scalar = 1.0,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    beta3: Scalar | None = None,
    eps: Scalar = 1e-8,
    estim_lr0: Scalar = 1e-6,
    estim_lr_coef: Scalar = 1.0,
    weight_decay: Scalar = 0.0,
    safeguard_warmup: bool = False,
    *,
    mask: Any = None,
) -> GradientTransformation:
    r"""Rescale updates by Prodigy: Adam with the step size :math:`\gamma d_t`; :math:`d` estimates the distance to the solution.

    .. math::
        \eta_t &= \gamma\, d_t \sqrt{1 - \beta_2^t} / (1 - \beta_1^t), \\
        \mu_t &= \beta_1 \mu_{t-1} + (1 - \beta_1)\, d_t g_t, &
        \nu_t &= \beta_2 \nu_{t-1} + (1 - \beta_2)\, d_t^2 g_t^2, \\
        r_t &= \beta_3 r_{t-1} + \tfrac{d_t}{d_0} \eta_t \langle g_t, p_0 - p_{t-1} \rangle, &
        s_t &= \beta_3 s_{t-1} + \tfrac{d_t}{d_0} \eta_t g_t, \\
        d_{t+1} &= \max(d_t, c\, r_t / \|s_t\|_1), &
        u_t &= \eta_t \big( \mu_t / (\sqrt{\nu_t} + d_{t+1} \epsilon) + \lambda p_{t-1} \big)

    The products and norms are over all tensors together. Where all gradients have been 0 the estimate stays (Optax's is NaN then).

    Args:
        lr: :math:`\gamma \ge 0`, a number or a 0-dim tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``.
        beta3: :math:`\beta_3` in ``[0, 1)``; :math:`\sqrt{\beta_2}` if None.
        eps: :math:`\epsilon \ge 0`.
        estim_lr0: :math:`d_0 > 0`, less than the distance to the solution.
        estim_lr_coef: :math:`c > 0`, a factor of the estimates.
        weight_decay: :math:`\lambda \ge 0`.
        safeguard_warmup: leave :math:`\gamma` and the bias correction out of :math:`s_t`, for a learning rate that warms up.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.

    Raises:
        TypeError: from ``update``: ``params`` is missing.
        ValueError: an argument out of range.

    Reference:
        Mishchenko and Defazio, `Prodigy <https://arxiv.org/abs/2306.06101>`_, 2023, algorithm 4.

    Example:
        >>> tx = scale_by_prodigy(estim_lr0=0.1)
        >>> p = torch.tensor([1.0])
        >>> tx.update(torch.tensor([5.0]), tx.init(p), p)[0]
        tensor([0.1000])
    """
    lr, (b1, b2) = number("lr", lr, at_least=0), betas
    b1, b2 = number("betas[0]", b1, at_least=0, below=1), number("betas[1]", b2, at_least=0, below=1)
    b3 = b2**0.5 if beta3 is None else number("beta3", beta3, at_least=0, below=1)
    eps, weight_decay = number("eps", eps, at_least=0), number("weight_decay", weight_decay, at_least=0)
    d0, coef = number("estim_lr0", estim_lr0, above=0), number("estim_lr_coef", estim_lr_coef, above=0)

    def init(p: Tensor) -> ProdigySlots:
        return ProdigySlots(torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p), p.clone())

    def at_step(step: Tensor) -> tuple[Tensor, Tensor]:
        return lr * bias_correction(b2, step).sqrt() / bias_correction(b1, step), step == 1

    def measure(g: Tensor, slots: ProdigySlots, p: Tensor, step: Any, shared: EstimateShared) -> tuple[Any, ProdigySlots]:
        (size, first), d = step, shared.estim_lr
        start = torch.where(first, p, slots.start)
        mu, nu = lerp(slots.mu, d * g, 1 - b1), average_square(slots.nu, d * g, b2)
        grad_sum = b3 * slots.grad_sum + d / d0 * (d if safeguard_warmup else d * size) * g
        return (d * size * (g * (start - p)).sum(), grad_sum.abs().sum()), ProdigySlots(mu, nu, grad_sum, start)

    def decide(shared: EstimateShared, sums: tuple[Tensor, ...]) -> EstimateShared:
        d, (product, size) = shared.estim_lr, sums
        numerator = b3 * shared.numerator_weighted + d / d0 * product
        return EstimateShared(torch.maximum(d, coef * ratio(numerator, size)), numerator, d)

    def update(
        g: Tensor, slots: ProdigySlots, p: Tensor, step: Any, shared: EstimateShared, decays: bool
    ) -> tuple[Tensor, ProdigySlots]:
        size, _ = step
        direction = slots.mu / (sqrt(slots.nu) + shared.estim_lr * eps)
        return shared.last_estim_lr * size * (direction + weight_decay * p if decays else direction), slots

    start: Any = EstimateShared(1.0 * d0, 0.0, 0.0)  # type: ignore[arg-type]
    marks = partial(chosen, mask)
    return coupled(
        init, measure, decide, update, shared=start, elementwise=True, at_step=at_step, needs_params=True, per_leaf=marks
    )


@alias
def scale_by_dadapt_adamw(
    lr: Scalar = 1.0,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    estim_lr0: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    *,
    mask: Any = None,
) -> GradientTransformation:
    r"""Rescale updates by D-Adaptation: Adam with a step size :math:`\gamma d_t` that estimates the distance to the solution.

    .. math::
        \eta_t &= \gamma\, d_t \sqrt{1 - \beta_2^t} / (1 - \beta_1^t), \qquad \beta_3 = \sqrt{\beta_2}, \\
        r_t &= \beta_3 r_{t-1} + (1 - \beta_3)\, \eta_t \langle g_t, s_{t-1} / (\sqrt{\nu_{t-1}} + \epsilon) \rangle, &
        s_t &= \beta_3 s_{t-1} + (1 - \beta_3)\, \eta_t g_t, \\
        \mu_t &= \beta_1 \mu_{t-1} + (1 - \beta_1)\, \eta_t g_t, &
        \nu_t &= \beta_2 \nu_{t-1} + (1 - \beta_2)\, g_t^2, \\
        d_{t+1} &= \max\big(d_t, r_t / ((1 - \beta_3) \|s_t\|_1)\big), &
        u_t &= \mu_t / (\sqrt{\nu_t} + \epsilon) + \eta_t \lambda p_{t-1}

    The products and norms are over all tensors together. Where all gradients have been 0 the estimate stays (Optax's is NaN then).

    Args:
        lr: :math:`\gamma \ge 0`, a number or a 0-dim tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        estim_lr0: :math:`d_0 > 0`, less than the distance to the solution.
        weight_decay: :math:`\lambda \ge 0`.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.

    Raises:
        TypeError: from ``update``: ``params`` is missing.
        ValueError: an argument out of range.

    Reference:
        Defazio and Mishchenko, `Learning-Rate-Free Learning by D-Adaptation <https://arxiv.org/abs/2301.07733>`_, 2023,
        algorithm 5.

    Example:
        >>> tx = scale_by_dadapt_adamw(estim_lr0=0.1)
        >>> p = torch.tensor([1.0])
        >>> tx.update(torch.tensor([5.0]), tx.init(p), p)[0]
        tensor([0.1000])
    """
    lr, (b1, b2) = number("lr", lr, at_least=0), betas
    b1, b2 = number("betas[0]", b1, at_least=0, below=1), number("betas[1]", b2, at_least=0, below=1)
    b3, eps = b2**0.5, number("eps", eps, at_least=0)
    d0, weight_decay = number("estim_lr0", estim_lr0, above=0), number("weight_decay", weight_decay, at_least=0)

    def init(p: Tensor) -> DAdaptSlots:
        return DAdaptSlots(torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p))

    def at_step(step: Tensor) -> Tensor:
        return lr * bias_correction(b2, step).sqrt() / bias_correction(b1, step)

    def measure(g: Tensor, slots: DAdaptSlots, p: Tensor, size: Tensor, shared: EstimateShared) -> tuple[Any, DAdaptSlots]:
        eta = shared.estim_lr * size
        product = eta * (g * slots.grad_sum / (sqrt(slots.nu) + eps)).sum()
        mu, nu = lerp(slots.mu, eta * g, 1 - b1), average_square(slots.nu, g, b2)
        grad_sum = lerp(slots.grad_sum, eta * g, 1 - b3)
        return (product, grad_sum.abs().sum()), DAdaptSlots(mu, nu, grad_sum)

    def decide(shared: EstimateShared, sums: tuple[Tensor, ...]) -> EstimateShared:
        d, (product, size) = shared.estim_lr, sums
        numerator = b3 * shared.numerator_weighted + (1 - b3) * product
        return EstimateShared(torch.maximum(d, ratio(numerator, (1 - b3) * size)), numerator, d)

    def update(
        g: Tensor, slots: DAdaptSlots, p: Tensor, size: Tensor, shared: EstimateShared, decays: bool
    ) -> tuple[Tensor, DAdaptSlots]:
        direction = slots.mu / (sqrt(slots.nu) + eps)
        return direction + shared.last_estim_lr * size * weight_decay * p if decays else direction, slots

    start: Any = EstimateShared(1.0 * d0, 0.0, 0.0)  # type: ignore[arg-type]
    marks = partial(chosen, mask)
    return coupled(
        init, measure, decide, update, shared=start, elementwise=True, at_step=at_step, needs_params=True, per_leaf=marks
    )


@alias
def prodigy(
    lr: ScalarOrSchedule = 1.0,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    beta3: Scalar | None = None,
    eps: Scalar = 1e-8,
    estim_lr0: Scalar = 1e-6,
    estim_lr_coef: Scalar = 1.0,
    weight_decay: Scalar = 0.0,
    safeguard_warmup: bool = False,
    *,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Prodigy: AdamW whose learning rate is found.

    .. math:: p_t = p_{t-1} - \mathrm{prodigy}(g_t)

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule, whose largest value is best 1.
        betas: see :func:`scale_by_prodigy`, as all that follow.
        beta3: decay of the estimate's sums.
        eps: added to the root.
        estim_lr0: the first estimate.
        estim_lr_coef: a factor of the estimates.
        weight_decay: decoupled, times the step size that is found.
        safeguard_warmup: for a learning rate that warms up.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_prodigy`.

    Example:
        >>> tx = prodigy(estim_lr0=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """

    def rule(lr: Scalar) -> GradientTransformation:
        return scale_by_prodigy(lr, betas, beta3, eps, estim_lr0, estim_lr_coef, weight_decay, safeguard_warmup, mask=mask)

    return chain(negate_if(maximize), with_learning_rate(rule, lr), scale(-1.0))


@alias
def dadapt_adamw(
    lr: ScalarOrSchedule = 1.0,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    estim_lr0: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    *,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""D-Adaptation: AdamW whose learning rate is found.

    .. math:: p_t = p_{t-1} - \mathrm{dadapt}(g_t)

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule, whose largest value is best 1.
        betas: see :func:`scale_by_dadapt_adamw`, as all that follow.
        eps: added to the root.
        estim_lr0: the first estimate.
        weight_decay: decoupled, times the step size that is found.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_dadapt_adamw`.

    Example:
        >>> tx = dadapt_adamw(estim_lr0=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """

    def rule(lr: Scalar) -> GradientTransformation:
        return scale_by_dadapt_adamw(lr, betas, eps, estim_lr0, weight_decay, mask=mask)

    return chain(negate_if(maximize), with_learning_rate(rule, lr), scale(-1.0))
