"""Lion: the sign of an interpolated momentum."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, lerp, sign
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import decayed
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["LionSlots", "lion", "scale_by_lion"]


class LionSlots(NamedTuple):
    """Slots of :func:`scale_by_lion` for one tensor: ``mu``, the average of its gradient, with its shape."""

    mu: Tensor


def scale_by_lion(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: torch.dtype | None = None,
    *,
    mode: Literal["hard", "smooth", "refined"] = "hard",
    smooth_beta: Scalar = 1.0,
) -> GradientTransformation:
    r"""Replace updates by the sign of a mean of the gradient and its average.

    .. math::
        c_t = \beta_1 \mu_{t-1} + (1 - \beta_1)\, g_t, \qquad
        u_t = \mathrm{sign}(c_t), \qquad
        \mu_t = \beta_2 \mu_{t-1} + (1 - \beta_2)\, g_t

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``, the weight of the average in :math:`c_t`.
        b2: :math:`\beta_2` in ``[0, 1)``, decay of the average.
        mu_dtype: dtype of the average; the parameter's if None.
        mode: ``"hard"`` for the sign; ``"smooth"`` for :math:`\tanh(s\, c_t)`; ``"refined"`` for :math:`c_t` held within
            ``[-1, 1]``. The last two are Optax's, and have a derivative.
        smooth_beta: :math:`s`, in the inverse units of the gradient.

    The average has the parameter's shape. An entry that is NaN stays NaN.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Chen et al., `Symbolic Discovery of Optimization Algorithms <https://arxiv.org/abs/2302.06675>`_, 2023, program 1 and
        algorithm 2.

    Example:
        >>> tx = scale_by_lion()
        >>> tx.update(torch.tensor([3.0, -0.1]), tx.init(torch.zeros(2)))[0]
        tensor([ 1., -1.])
    """
    b1, b2 = number("b1", b1, at_least=0, below=1), number("b2", b2, at_least=0, below=1)
    smooth_beta = number("smooth_beta", smooth_beta)
    if mode not in ("hard", "smooth", "refined"):
        raise ValueError(f"mode must be 'hard', 'smooth' or 'refined', got {mode!r}")

    def squashed(c: Tensor) -> Tensor:
        if mode == "hard":
            return sign(c)
        return torch.tanh(smooth_beta * c) if mode == "smooth" else c.clamp(-1, 1)

    def update(g: Tensor, slots: LionSlots, p: Any, step: Tensor) -> tuple[Tensor, LionSlots]:
        c = lerp(slots.mu, g, 1 - b1)
        return squashed(c), LionSlots(lerp(slots.mu, g, 1 - b2))

    return leafwise(lambda p: LionSlots(torch.zeros_like(p, dtype=mu_dtype)), update, elementwise=True)


@alias
def lion(
    lr: ScalarOrSchedule = 1e-4,
    betas: tuple[Scalar, Scalar] = (0.9, 0.99),
    weight_decay: Scalar = 1e-3,
    *,
    mu_dtype: torch.dtype | None = None,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Lion, with decoupled weight decay.

    .. math:: p_t = p_{t-1} - \gamma\, (\mathrm{lion}(g_t) + \lambda p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule; 3 to 10 times smaller than AdamW's.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_lion`.
        weight_decay: :math:`\lambda \ge 0`; 3 to 10 times larger than AdamW's.
        mu_dtype: dtype of the average; the parameter's if None.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_lion`. The default of ``lr`` is the authors', that of ``weight_decay`` Optax's.

    Example:
        >>> tx = lion(lr=0.1, weight_decay=0.5)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.8500])}
    """
    rule = scale_by_lion(*betas, mu_dtype)
    return chain(negate_if(maximize), *decayed(rule, weight_decay, True, mask), scale_by_learning_rate(lr))
