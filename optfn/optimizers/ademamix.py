"""AdEMAMix: Adam with a second, slow average of the gradient; and its simplified form, which has one."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number, scalar_or_schedule
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, add_scaled, average_square, bias_correction, lerp, sqrt
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import decayed
from optfn.transforms.scaling import scale_by_learning_rate
from optfn.wrappers.hyperparams import with_schedules

__all__ = [
    "AdemamixSlots",
    "SimplifiedAdemamixSlots",
    "ademamix",
    "scale_by_ademamix",
    "scale_by_simplified_ademamix",
    "simplified_ademamix",
]


class AdemamixSlots(NamedTuple):
    """Slots of :func:`scale_by_ademamix` for one tensor, each with its shape.

    Attributes:
        m1: fast average of the gradient.
        m2: slow average of the gradient.
        nu: second moment.
    """

    m1: Tensor
    m2: Tensor
    nu: Tensor


def scale_by_ademamix(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 6.0,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Rescale updates by AdEMAMix.

    .. math::
        m^{(1)}_t &= \beta_1 m^{(1)}_{t-1} + (1 - \beta_1)\, g_t, \qquad
        m^{(2)}_t = \beta_3 m^{(2)}_{t-1} + (1 - \beta_3)\, g_t, \qquad
        \nu_t = \beta_2 \nu_{t-1} + (1 - \beta_2)\, g_t^2, \\
        u_t &= \frac{m^{(1)}_t / (1 - \beta_1^t) + \alpha\, m^{(2)}_t}{\sqrt{\nu_t / (1 - \beta_2^t) + \bar\epsilon} + \epsilon}

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``, decay of the fast average.
        b2: :math:`\beta_2` in ``[0, 1)``, decay of the second moment.
        b3: :math:`\beta_3` in ``[0, 1)``, decay of the slow average, which has no bias correction; or a schedule of it.
        alpha: :math:`\alpha \ge 0`, weight of the slow average; or a schedule of it. The paper warms both up over the whole run.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient.
        mu_dtype: dtype of both averages; the parameter's if None.

    Slots have the parameter's shape. Schedules see 0 in the first update; the state shows their values, ``b3`` and ``alpha``.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Pagliardini, Ablin and Grangier, `The AdEMAMix Optimizer: Better, Faster, Older <https://arxiv.org/abs/2409.03137>`_, 2024,
        algorithm 1.

    Example:
        >>> tx = scale_by_ademamix(alpha=optfn.linear_schedule(0.0, 5.0, 1000))
        >>> tx.update(torch.tensor([3.0, -0.1]), tx.init(torch.zeros(2)))[0]
        tensor([ 1.0000, -1.0000])
    """
    b1, b2 = number("b1", b1, at_least=0, below=1), number("b2", b2, at_least=0, below=1)
    eps, eps_root = number("eps", eps, at_least=0), number("eps_root", eps_root, at_least=0)

    def init(p: Tensor) -> AdemamixSlots:
        return AdemamixSlots(*(torch.zeros_like(p, dtype=dtype) for dtype in (mu_dtype, mu_dtype, None)))

    def rule(b3: Scalar, alpha: Scalar) -> GradientTransformation:
        b3, alpha = number("b3", b3, at_least=0, below=1), number("alpha", alpha, at_least=0)

        def update(g: Tensor, slots: AdemamixSlots, p: Any, corrections: Any) -> tuple[Tensor, AdemamixSlots]:
            first, second = corrections
            m1, m2 = lerp(slots.m1, g, 1 - b1), lerp(slots.m2, g, 1 - b3)
            nu = average_square(slots.nu, g, b2)
            return add_scaled(m1 / first, m2, alpha) / (sqrt(nu / second, eps_root) + eps), AdemamixSlots(m1, m2, nu)

        return leafwise(init, update, elementwise=True, at_step=lambda step: (bias_correction(b1, step), bias_correction(b2, step)))

    return with_schedules(rule, b3=scalar_or_schedule("b3", b3), alpha=scalar_or_schedule("alpha", alpha))


@alias
def ademamix(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Scalar, Scalar, ScalarOrSchedule] = (0.9, 0.999, 0.9999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    alpha: ScalarOrSchedule = 5.0,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""AdEMAMix.

    .. math:: p_t = p_{t-1} - \gamma\, (\mathrm{ademamix}(g_t) + \lambda p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2, \beta_3)`, each in ``[0, 1)``, the last one or a schedule, see :func:`scale_by_ademamix`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: coefficient :math:`\lambda \ge 0` of decoupled decay.
        alpha: :math:`\alpha \ge 0`, weight of the slow average, or a schedule of it.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient.
        mu_dtype: dtype of both averages; the parameter's if None.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_ademamix`.

    Example:
        >>> tx = ademamix(lr=0.1, alpha=0.0)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """
    rule = scale_by_ademamix(*betas, alpha=alpha, eps=eps, eps_root=eps_root, mu_dtype=mu_dtype)
    return chain(negate_if(maximize), *decayed(rule, weight_decay, True, mask), scale_by_learning_rate(lr))


class SimplifiedAdemamixSlots(NamedTuple):
    """Slots of :func:`scale_by_simplified_ademamix` for one tensor, each with its shape.

    Attributes:
        m: decaying sum of the gradient.
        nu: second moment.
    """

    m: Tensor
    nu: Tensor


def scale_by_simplified_ademamix(
    b1: Scalar = 0.99, b2: Scalar = 0.95, alpha: ScalarOrSchedule = 0.0, eps: Scalar = 1e-8, eps_root: Scalar = 0.0
) -> GradientTransformation:
    r"""Rescale updates by simplified AdEMAMix, which mixes the gradient itself with one slow sum of it.

    .. math::
        m_t = \beta_1 m_{t-1} + g_t, \qquad
        \nu_t = \beta_2 \nu_{t-1} + (1 - \beta_2)\, g_t^2, \qquad
        u_t = \frac{m_t + \alpha g_t}{\sqrt{\nu_t / (1 - \beta_2^t) + \bar\epsilon} + \epsilon}

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``, decay of the sum.
        b2: :math:`\beta_2` in ``[0, 1)``, decay of the second moment.
        alpha: :math:`\alpha \ge 0`, weight of the gradient; or a schedule of it, which sees 0 in the first update.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient.

    Slots have the parameter's shape and dtype. The sum is about :math:`1 / (1 - \beta_1)` times as large as Adam's average.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Morwani et al., `Connections between Schedule-Free Optimizers, AdEMAMix, and Accelerated SGD Variants
        <https://arxiv.org/abs/2502.02431>`_, 2025.

    Example:
        >>> tx = scale_by_simplified_ademamix(alpha=1.0)
        >>> tx.update(torch.tensor([3.0, -0.1]), tx.init(torch.zeros(2)))[0]
        tensor([ 2.0000, -2.0000])
    """
    b1, b2 = number("b1", b1, at_least=0, below=1), number("b2", b2, at_least=0, below=1)
    eps, eps_root = number("eps", eps, at_least=0), number("eps_root", eps_root, at_least=0)

    def rule(alpha: Scalar) -> GradientTransformation:
        alpha = number("alpha", alpha, at_least=0)

        def init(p: Tensor) -> SimplifiedAdemamixSlots:
            return SimplifiedAdemamixSlots(torch.zeros_like(p), torch.zeros_like(p))

        def update(g: Tensor, slots: SimplifiedAdemamixSlots, p: Any, second: Tensor) -> tuple[Tensor, SimplifiedAdemamixSlots]:
            m, nu = add_scaled(g, slots.m, b1), average_square(slots.nu, g, b2)
            return add_scaled(m, g, alpha) / (sqrt(nu / second, eps_root) + eps), SimplifiedAdemamixSlots(m, nu)

        return leafwise(init, update, elementwise=True, at_step=lambda step: bias_correction(b2, step))

    return with_schedules(rule, alpha=scalar_or_schedule("alpha", alpha))


@alias
def simplified_ademamix(
    lr: ScalarOrSchedule = 1e-5,
    betas: tuple[Scalar, Scalar] = (0.99, 0.95),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    alpha: ScalarOrSchedule = 0.0,
    eps_root: Scalar = 0.0,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Simplified AdEMAMix.

    .. math:: p_t = p_{t-1} - \gamma\, (\mathrm{simplified\_ademamix}(g_t) + \lambda p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule; as large as Adam's times :math:`1 - \beta_1`.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_simplified_ademamix`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: coefficient :math:`\lambda \ge 0` of decoupled decay.
        alpha: :math:`\alpha \ge 0`, weight of the gradient, or a schedule of it.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_simplified_ademamix`.

    Example:
        >>> tx = simplified_ademamix(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """
    rule = scale_by_simplified_ademamix(*betas, alpha, eps, eps_root)
    return chain(negate_if(maximize), *decayed(rule, weight_decay, True, mask), scale_by_learning_rate(lr))
