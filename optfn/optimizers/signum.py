"""Sign descent, without momentum (signSGD) and with it (Signum)."""

from typing import Any

import torch

from optfn.checks import alias
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import stateless_with_tree_map
from optfn.numerics import Scalar, sign
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import decayed
from optfn.transforms.momentum import trace
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["scale_by_sign", "sign_sgd", "signum"]


def scale_by_sign() -> GradientTransformation:
    """Replace updates by their sign, 0 where they are 0 and NaN where they are NaN.

    Reference:
        Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018, algorithm 1.

    Example:
        >>> scale_by_sign().update(torch.tensor([3.0, -0.1, 0.0]), ())[0]
        tensor([ 1., -1.,  0.])
    """
    return stateless_with_tree_map(lambda g, p: sign(g))


@alias
def sign_sgd(
    lr: ScalarOrSchedule = 1e-3, weight_decay: Scalar = 0.0, *, mask: Any = None, maximize: bool = False
) -> GradientTransformation:
    r"""Sign descent: every entry moves by the learning rate.

    .. math:: p_t = p_{t-1} - \gamma\, (\mathrm{sign}(g_t) + \lambda p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        weight_decay: coefficient :math:`\lambda \ge 0` of decoupled decay; Optax has none.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_sign`.

    Example:
        >>> tx = sign_sgd(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """
    return chain(negate_if(maximize), *decayed(scale_by_sign(), weight_decay, True, mask), scale_by_learning_rate(lr))


@alias
def signum(
    lr: ScalarOrSchedule = 1e-3,
    beta: Scalar = 0.9,
    weight_decay: Scalar = 0.0,
    *,
    accumulator_dtype: torch.dtype | None = None,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Sign descent with momentum.

    .. math:: p_t = p_{t-1} - \gamma\, (\mathrm{sign}(\mathrm{trace}_\beta(g_t)) + \lambda p_{t-1})

    A decaying sum has the sign of the moving average that the paper takes.

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        beta: :math:`\beta \ge 0`, decay of the sum, below 1 for one that stays bounded.
        weight_decay: coefficient :math:`\lambda \ge 0` of decoupled decay; Optax has none.
        accumulator_dtype: dtype of the sum; the parameter's if None.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018, algorithm 2.

    Example:
        >>> tx = signum(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """
    rule = chain(trace(beta, accumulator_dtype=accumulator_dtype), scale_by_sign())
    return chain(negate_if(maximize), *decayed(rule, weight_decay, True, mask), scale_by_learning_rate(lr))
