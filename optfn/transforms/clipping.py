"""Clipping: of values, of the norm of everything, of each tensor's root mean square."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state, number
from optfn.core import GradientTransformation, stateless, transformation
from optfn.leafwise import stateless_with_tree_map
from optfn.numerics import Scalar, rms, widened_scalar
from optfn.transforms.scaling import scale

__all__ = ["ClipByGlobalNormState", "clip", "clip_by_block_rms", "clip_by_global_norm"]


def clip(max_delta: Scalar) -> GradientTransformation:
    r"""Hold every entry within :math:`[-\delta, \delta]`; of a complex one, real and imaginary part.

    Args:
        max_delta: :math:`\delta \ge 0`, in the units of the updates.

    Example:
        >>> clip(1.0).update({"w": torch.tensor([-3.0, 0.5])}, ())[0]
        {'w': tensor([-1.0000,  0.5000])}
    """
    bound = number("max_delta", max_delta, at_least=0)
    return stateless_with_tree_map(lambda g, p: g.clamp(-bound, bound))


class ClipByGlobalNormState(NamedTuple):
    """The state of :func:`clip_by_global_norm` with ``keep_norm``.

    Attributes:
        norm: the norm of the last updates, before they were clipped; 0-dim, float64 (float32 where there is none).
        total_notfinite: how many updates had a norm that is inf or NaN, a 0-dim int64 tensor.
    """

    norm: Tensor
    total_notfinite: Tensor


def clip_by_global_norm(
    max_norm: Scalar, *, eps: float = 0.0, order: float = 2.0, keep_norm: bool = False
) -> GradientTransformation:
    r"""Scale all updates together so that their global norm is at most ``max_norm``: :math:`u \min(1, c / (\|u\|_p + \epsilon))`.

    The norm is :func:`optfn.tree.global_norm`: sparse updates count, None does not, and a norm that is not finite makes
    every update NaN or 0, as in torch. With ``error_if_nonfinite`` :func:`torch.nn.utils.clip_grad_norm_` raises an error,
    for which it waits for the device at every step. Here the answer is a value: with ``keep_norm`` the state has the norm, and
    the number of those that were not finite, ``optfn.tree.get(state, "total_notfinite")``, to look at when it suits.
    :func:`apply_if_finite` skips such steps.

    Args:
        max_norm: :math:`c \ge 0`, in the units of the updates.
        eps: :math:`\epsilon \ge 0`; 0 is Optax's form, ``1e-6`` that of :func:`torch.nn.utils.clip_grad_norm_`.
        order: :math:`p`, torch's ``norm_type``: 2, 1, ``float("inf")``, any other number.
        keep_norm: keep the norm in a :class:`ClipByGlobalNormState`; without it there is no state.

    Raises:
        ValueError: an argument out of range or NaN.

    Reference:
        Pascanu, Mikolov and Bengio, `On the difficulty of training Recurrent Neural Networks
        <https://arxiv.org/abs/1211.5063>`_, 2012, algorithm 1.

    Example:
        >>> tx = clip_by_global_norm(1.0, keep_norm=True)
        >>> updates = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
        >>> updates, state = tx.update(updates, tx.init(updates))
        >>> updates, state.norm
        ({'a': tensor([0.6000]), 'b': tensor([0.8000])}, tensor(5., dtype=torch.float64))
    """
    bound, eps, order = number("max_norm", max_norm, at_least=0), number("eps", eps, at_least=0), number("order", order)

    def clipped(updates: Any) -> tuple[Any, Tensor]:
        total = tree.global_norm(updates, order)
        size = total + eps
        # A size of 0 stays out of the quotient: 0/0 and its derivative are NaN where max_norm is 0.
        factor = torch.where(size == 0, 1, bound / torch.where(size == 0, 1, size)).clamp(max=1)
        return scale(factor).update(updates, ())[0], total

    def init(params: Any) -> ClipByGlobalNormState:
        zero = tree.new_count(params)
        return ClipByGlobalNormState(widened_scalar(zero), zero)

    def update(updates: Any, state: ClipByGlobalNormState, params: Any = None, **extra: Any) -> tuple[Any, ClipByGlobalNormState]:
        check_state("clip_by_global_norm", state, ClipByGlobalNormState)
        updates, total = clipped(updates)
        norm = widened_scalar(total).to(state.norm.device)
        return updates, ClipByGlobalNormState(norm, state.total_notfinite + ~norm.isfinite())

    return transformation(init, update) if keep_norm else stateless(lambda updates, params: clipped(updates)[0])


def clip_by_block_rms(threshold: Scalar) -> GradientTransformation:
    r"""Scale each tensor so that its root mean square is at most the threshold: :math:`u / \max(1, \mathrm{RMS}(u) / d)`.

    Args:
        threshold: :math:`d > 0`, in the units of the updates.

    Reference:
        Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018, section 6 (update clipping).

    Example:
        >>> clip_by_block_rms(1.0).update({"w": torch.tensor([2.0, 2.0])}, ())[0]
        {'w': tensor([1., 1.])}
    """
    bound = number("threshold", threshold, above=0)

    def clipped(g: Tensor, p: Any) -> Tensor:
        return g / (rms(g) / bound).clamp_min(1)

    return stateless_with_tree_map(clipped, elementwise=False)
