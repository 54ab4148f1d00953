"""ADOPT: Adam, divided before it is averaged, by a second moment that is one step behind."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, is_zero, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation, identity
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, average_square, lerp, sqrt
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import decayed
from optfn.transforms.scaling import scale_by_learning_rate, scale_by_schedule

__all__ = ["AdoptSlots", "adopt", "scale_by_adopt"]


class AdoptSlots(NamedTuple):
    """Slots of :func:`scale_by_adopt` for one tensor, each with its shape.

    Attributes:
        mu: average of the rescaled gradient.
        nu: second moment.
    """

    mu: Tensor
    nu: Tensor


def scale_by_adopt(
    b1: Scalar = 0.9,
    b2: Scalar = 0.9999,
    eps: Scalar = 1e-6,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[Tensor], Any] = lambda count: count**0.25,
) -> GradientTransformation:
    r"""Rescale updates by ADOPT. The first update is 0.

    .. math::
        c_t &= \mathrm{clip}\!\left(\frac{g_t}{\max(\sqrt{\nu_{t-1}}, \epsilon)},\, \pm (t - 1)^{1/4}\right), \qquad
        \mu_t = \beta_1 \mu_{t-1} + (1 - \beta_1)\, c_t, \qquad u_t = \mu_t, \\
        \nu_t &= \beta_2 \nu_{t-1} + (1 - \beta_2)\, g_t^2, \qquad \nu_1 = g_1^2, \qquad \mu_1 = 0

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``, decay of the average.
        b2: :math:`\beta_2` in ``[0, 1)``, decay of the second moment.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        mu_dtype: dtype of the average; the parameter's if None.
        nesterov: take :math:`u_t = \beta_1 \mu_t + (1 - \beta_1)\, c_t`.
        use_clipping: False takes the ratio as it is.
        clip_value_fn: the bound, of how many updates the leaf has had before; called for all leaves at once, with a vector.

    Slots have the parameter's shape and dtype. The bound is that of the authors' code and of Optax; of other packages one has the
    root of :math:`t`, one the third root, and one does not clip.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Taniguchi et al., `ADOPT: Modified Adam Can Converge with Any β2 with the Optimal Rate
        <https://arxiv.org/abs/2411.02853>`_, 2024, algorithm 2.

    Example:
        >>> tx = scale_by_adopt(b1=0.0)
        >>> state = tx.init(torch.zeros(2))
        >>> for g in ([4.0, -2.0], [1.0, 8.0]):
        ...     update, state = tx.update(torch.tensor(g), state)
        ...     print(update)
        tensor([0., 0.])
        tensor([0.2500, 1.0000])
    """
    b1, b2 = number("b1", b1, at_least=0, below=1), number("b2", b2, at_least=0, below=1)
    eps = number("eps", eps, at_least=0)

    def init(p: Tensor) -> AdoptSlots:
        return AdoptSlots(torch.zeros_like(p, dtype=mu_dtype), torch.zeros_like(p))

    def at_step(step: Tensor) -> tuple[Any, ...]:
        later = (step > 1).to(step.dtype)
        return later * (1 - b1), later * b2, clip_value_fn(step - 1) if use_clipping else math.inf

    def update(g: Tensor, slots: AdoptSlots, p: Any, step: Any) -> tuple[Tensor, AdoptSlots]:
        weight, decay, bound = step
        c = (g / sqrt(slots.nu).clamp_min(eps)).clamp(-bound, bound)
        mu = lerp(slots.mu, c, weight)
        return lerp(mu, c, weight) if nesterov else mu, AdoptSlots(mu, average_square(slots.nu, g, decay))

    return leafwise(init, update, elementwise=True, at_step=at_step)


@alias
def adopt(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.9999),
    eps: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    *,
    mu_dtype: torch.dtype | None = None,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[Tensor], Any] = lambda count: count**0.25,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""ADOPT. The first step does not move the parameters.

    .. math:: p_1 = p_0, \qquad p_t = p_{t-1} - \gamma\, (\mathrm{adopt}(g_t) + \lambda p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_adopt`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: coefficient :math:`\lambda \ge 0` of decoupled decay, not in the first step, as in the authors' code; Optax
            has none.
        mu_dtype: dtype of the average; the parameter's if None.
        nesterov: look one step ahead.
        use_clipping: whether to clip, see :func:`scale_by_adopt`.
        clip_value_fn: the bound, of the number of updates before.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_adopt`.

    Example:
        >>> tx = adopt(lr=0.1, betas=(0.0, 0.9999))
        >>> params = {"w": torch.tensor([1.0])}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update({"w": torch.tensor([5.0])}, state, params)
        ...     params = optfn.apply_updates(params, updates)
        ...     print(params)
        {'w': tensor([1.])}
        {'w': tensor([0.9000])}
    """
    rule = scale_by_adopt(*betas, eps, mu_dtype, nesterov=nesterov, use_clipping=use_clipping, clip_value_fn=clip_value_fn)
    skipped = identity() if is_zero(weight_decay) else scale_by_schedule(torch.sign)  # 0 at 0, then 1
    return chain(negate_if(maximize), *decayed(rule, weight_decay, True, mask), skipped, scale_by_learning_rate(lr))
