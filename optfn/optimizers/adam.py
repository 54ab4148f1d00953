"""Adam and its variants: AdamW, NAdamW, AMSGrad, and the epsilon-hat form."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, is_zero, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, add_scaled, as_scalar, average_square, bias_correction, lerp, sqrt
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import decayed
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["AdamSlots", "adam", "adamw", "amsgrad", "nadamw", "scale_by_adam", "scale_by_amsgrad"]


class AdamSlots(NamedTuple):
    """Slots of :func:`scale_by_adam` for one tensor, each with its shape.

    Attributes:
        mu: first moment.
        nu: second moment.
        nu_max: largest second moment so far; ``()`` without AMSGrad.
    """

    mu: Tensor
    nu: Tensor
    nu_max: Tensor | tuple[()] = ()


def scale_by_adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    nu_dtype: torch.dtype | None = None,
    nesterov: bool = False,
    amsgrad: bool | Literal["debiased"] = False,
    eps_hat: bool = False,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
) -> GradientTransformation:
    r"""Rescale updates by Adam.

    .. math::
        \mu_t &= \beta_1 \mu_{t-1} + (1 - \beta_1)\, g_t, &
        \nu_t &= \beta_2 \nu_{t-1} + (1 - \beta_2)\, g_t^2, \\
        \hat\mu_t &= \mu_t / (1 - \beta_1^t), &
        \hat\nu_t &= \nu_t / (1 - \beta_2^t), \qquad
        u_t = \hat\mu_t / (\sqrt{\hat\nu_t + \bar\epsilon} + \epsilon)

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``, decay of the first moment.
        b2: :math:`\beta_2` in ``[0, 1)``, decay of the second moment.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient.
        mu_dtype: dtype of the first moment; the parameter's if None.
        nu_dtype: dtype of the second moment; the parameter's if None. In float16 the square of a gradient below 2e-4 is 0: float16
            parameters want float32 here.
        nesterov: use :math:`\beta_1 \hat\mu_{t+1} + (1 - \beta_1) g_t / (1 - \beta_1^t)` for :math:`\hat\mu_t`, where
            :math:`\hat\mu_{t+1} = \mu_t / (1 - \beta_1^{t+1})`, as in Optax.
        amsgrad: divide by the largest :math:`\nu` so far: True takes the maximum before the bias correction, as torch
            does; ``"debiased"`` takes it after, as Optax does.
        eps_hat: the form of the end of the paper's section 2, where :math:`\epsilon` is not bias-corrected with the second
            moment: :math:`u_t = \sqrt{1 - \beta_2^t}\, \hat\mu_t / (\sqrt{\nu_t} + \epsilon)`.
        bias_correction_mu: False takes :math:`\hat\mu_t = \mu_t`.
        bias_correction_nu: False takes :math:`\hat\nu_t = \nu_t`.

    Moments have the parameter's shape and dtype. A step is differentiable, also where the gradient is 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2014, algorithm 1; Reddi, Kale and Kumar, `On the Convergence
        of Adam and Beyond <https://arxiv.org/abs/1904.09237>`_, 2018, algorithm 2 (AMSGrad); Dozat, `Incorporating
        Nesterov Momentum into Adam <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016.

    Example:
        >>> tx = scale_by_adam()
        >>> updates, state = tx.update({"w": torch.tensor([3.0, -0.1])}, tx.init({"w": torch.zeros(2)}))
        >>> updates
        {'w': tensor([ 1.0000, -1.0000])}
    """
    b1, b2 = number("b1", b1, at_least=0, below=1), number("b2", b2, at_least=0, below=1)
    eps, eps_root = number("eps", eps, at_least=0), number("eps_root", eps_root, at_least=0)
    d1, d2 = b1 if bias_correction_mu else 0, b2 if bias_correction_nu else 0  # a correction for a decay of 0 is 1
    if amsgrad not in (False, True, "debiased"):
        raise ValueError(f"amsgrad must be False, True or 'debiased', got {amsgrad!r}")

    def init(p: Tensor) -> AdamSlots:
        nu = torch.zeros_like(p, dtype=nu_dtype)
        return AdamSlots(torch.zeros_like(p, dtype=mu_dtype), nu, nu.clone() if amsgrad else ())

    def at_step(step: Tensor) -> tuple[Any, ...]:
        # Both corrections go into scalars, as at the end of section 2 of the paper.
        first, second = bias_correction(d1, step), bias_correction(d2, step)
        size = first / second.sqrt()
        offset, under = eps * (size if eps_hat else first), eps_root if is_zero(eps_root) else eps_root * second
        ahead = b1 * first / bias_correction(d1, step + 1) if nesterov else None
        return as_scalar(b2, step.dtype), second if amsgrad else None, size, offset, under, ahead

    def update(g: Tensor, slots: AdamSlots, p: Any, step: Any) -> tuple[Tensor, AdamSlots]:
        keep, correction, size, offset, under, ahead = step
        mu, nu = lerp(slots.mu, g, 1 - b1), average_square(slots.nu, g, b2, keep)
        nu_max: Any = slots.nu_max
        first, second = add_scaled(ahead * mu, g, 1 - b1) if nesterov else mu, nu
        if amsgrad:
            nu_max = torch.maximum(nu_max, nu / correction if amsgrad == "debiased" else nu)
            second = nu_max * correction if amsgrad == "debiased" else nu_max
        return first / torch.addcmul(offset, size, sqrt(second, under)), AdamSlots(mu, nu, nu_max)

    return leafwise(init, update, elementwise=True, at_step=at_step)


def scale_by_amsgrad(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
) -> GradientTransformation:
    r"""Rescale updates by AMSGrad in Optax's form: :func:`scale_by_adam` with ``amsgrad="debiased"``.

    .. math::
        \nu^{\max}_t = \max(\nu^{\max}_{t-1}, \hat\nu_t), \qquad
        u_t = \hat\mu_t / (\sqrt{\nu^{\max}_t + \bar\epsilon} + \epsilon)

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``, decay of the first moment.
        b2: :math:`\beta_2` in ``[0, 1)``, decay of the second moment.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient.
        mu_dtype: dtype of the first moment; the parameter's if None.
        bias_correction_mu: False takes :math:`\hat\mu_t = \mu_t`, as the paper does.
        bias_correction_nu: False takes :math:`\hat\nu_t = \nu_t`, as the paper does.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Reddi, Kale and Kumar, `On the Convergence of Adam and Beyond <https://arxiv.org/abs/1904.09237>`_, 2018, algorithm 2.

    Example:
        >>> tx = scale_by_amsgrad()
        >>> tx.update(torch.tensor([3.0, -0.1]), tx.init(torch.zeros(2)))[0]
        tensor([ 1.0000, -1.0000])
    """
    return scale_by_adam(
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        amsgrad="debiased",
        bias_correction_mu=bias_correction_mu,
        bias_correction_nu=bias_correction_nu,
    )


@alias
def adam(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
    mask: Any = None,
) -> GradientTransformation:
    r"""Adam: :class:`torch.optim.Adam`.

    .. math::
        g_t \leftarrow g_t + \lambda p_{t-1}, \qquad p_t = p_{t-1} - \gamma\, \mathrm{adam}(g_t)

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_adam`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        amsgrad: divide by the largest second moment so far.
        maximize: ascend instead; the decay still pulls to 0.
        decoupled_weight_decay: decay as :func:`adamw` does, not by L2.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_adam`.

    Example:
        >>> tx = adam(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """
    rule = scale_by_adam(*betas, eps=eps, amsgrad=amsgrad)
    return chain(negate_if(maximize), *decayed(rule, weight_decay, decoupled_weight_decay, mask), scale_by_learning_rate(lr))


@alias
def adamw(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-2,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    mask: Any = None,
) -> GradientTransformation:
    r"""Adam with decoupled weight decay: :class:`torch.optim.AdamW`.

    .. math:: p_t = p_{t-1} - \gamma\, (\mathrm{adam}(g_t) + \lambda p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_adam`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        amsgrad: divide by the largest second moment so far.
        maximize: ascend instead; the decay still pulls to 0.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Loshchilov and Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2017, algorithm 2.

    Example:
        >>> tx = adamw(lr=0.1, weight_decay=0.5)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.8500])}
    """
    return adam(lr, betas, eps, weight_decay, amsgrad, maximize=maximize, decoupled_weight_decay=True, mask=mask)


@alias
def nadamw(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-4,
    *,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""AdamW with Nesterov's look-ahead, Optax's ``nadamw``: unlike :func:`nadam` it has no schedule of the momentum.

    .. math:: p_t = p_{t-1} - \gamma\, (\mathrm{adam}_{\mathrm{nesterov}}(g_t) + \lambda p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_adam`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient.
        mu_dtype: dtype of the first moment; the parameter's if None.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Dozat, `Incorporating Nesterov Momentum into Adam <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016;
        Loshchilov and Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2017.

    Example:
        >>> tx = nadamw(lr=0.1, betas=(0.0, 0.999), weight_decay=0.5)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.8500])}
    """
    rule = scale_by_adam(*betas, eps, eps_root, mu_dtype, nesterov=True)
    return chain(negate_if(maximize), *decayed(rule, weight_decay, True, mask), scale_by_learning_rate(lr))


@alias
def amsgrad(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    *,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    maximize: bool = False,
) -> GradientTransformation:
    r"""AMSGrad in Optax's form: the maximum is of corrected second moments.

    .. math:: p_t = p_{t-1} - \gamma\, \mathrm{amsgrad}(g_t)

    ``adam(amsgrad=True)`` and ``adamw(amsgrad=True)`` are torch's form, where the correction comes after the maximum, and decay.

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_amsgrad`.
        eps: :math:`\epsilon \ge 0`.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient.
        mu_dtype: dtype of the first moment; the parameter's if None.
        bias_correction_mu: whether to correct the first moment.
        bias_correction_nu: whether to correct the second moment.
        maximize: ascend instead.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_amsgrad`.

    Example:
        >>> tx = amsgrad(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """
    rule = scale_by_amsgrad(*betas, eps, eps_root, mu_dtype, bias_correction_mu, bias_correction_nu)
    return chain(negate_if(maximize), rule, scale_by_learning_rate(lr))
