"""Clipping: of values, of the norm of everything, of each tensor's root mean square."""

from typing import Any

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import number
from optfn.core import GradientTransformation, stateless
from optfn.leafwise import stateless_with_tree_map
from optfn.numerics import Scalar, rms
from optfn.transforms.scaling import scale

__all__ = ["clip", "clip_by_block_rms", "clip_by_global_norm"]


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


def clip_by_global_norm(max_norm: Scalar, *, eps: float = 0.0) -> GradientTransformation:
    r"""Scale all updates together so that their global norm is at most ``max_norm``: :math:`u \min(1, c / (\|u\| + \epsilon))`.

    Args:
        max_norm: :math:`c \ge 0`, in the units of the updates.
        eps: :math:`\epsilon \ge 0`; 0 is Optax's form, ``1e-6`` that of :func:`torch.nn.utils.clip_grad_norm_`.

    The norm is :func:`optfn.tree.global_norm`: sparse updates count, None does not, and a norm that is not finite makes
    every update NaN or 0, as in torch (wrap in :func:`apply_if_finite` to skip such a step).

    Reference:
        Pascanu, Mikolov and Bengio, `On the difficulty of training Recurrent Neural Networks
        <https://arxiv.org/abs/1211.5063>`_, 2012, algorithm 1.

    Example:
        >>> clip_by_global_norm(1.0).update({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, ())[0]
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    bound, eps = number("max_norm", max_norm, at_least=0), number("eps", eps, at_least=0)

    def clipped(updates: Any, params: Any) -> Any:
        total = tree.global_norm(updates)
        # A norm of 0 stays out of the quotient: 0/0 and its derivative are NaN where max_norm is 0.
        factor = torch.where(total == 0, 1, bound / torch.where(total == 0, 1, total + eps)).clamp(max=1)
        return scale(factor).update(updates, ())[0]

    return stateless(clipped)


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
