"""Weight decay."""

from typing import Any

from optfn.checks import is_zero, number
from optfn.compose import masked
from optfn.core import GradientTransformation, identity
from optfn.leafwise import stateless_with_tree_map
from optfn.numerics import Scalar, add_scaled

__all__ = ["add_decayed_weights", "decayed"]


def add_decayed_weights(weight_decay: Scalar = 0.0, mask: Any = None) -> GradientTransformation:
    r"""Add a multiple of the parameters: :math:`u + \lambda p`.

    Before the algorithm this is L2 regularisation, between the algorithm and the learning rate it is decoupled decay.

    Args:
        weight_decay: :math:`\lambda \ge 0`; the number 0 leaves the updates alone.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.

    Raises:
        TypeError: from ``update``: ``params`` is missing, or a gradient is sparse.
        ValueError: a negative ``weight_decay``.

    Reference:
        Loshchilov and Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2017.

    Example:
        >>> tx = add_decayed_weights(0.1, mask=lambda path, p: p.ndim >= 2)
        >>> params = {"w": torch.ones(1, 1), "b": torch.ones(1)}
        >>> tx.update({"w": torch.zeros(1, 1), "b": torch.zeros(1)}, tx.init(params), params)[0]
        {'w': tensor([[0.1000]]), 'b': tensor([0.])}
    """
    decay = number("weight_decay", weight_decay, at_least=0)
    if is_zero(decay):
        return identity()
    tx = stateless_with_tree_map(lambda g, p: add_scaled(g, p, decay), needs_params=True)
    return tx if mask is None else masked(tx, mask)


def decayed(rule: GradientTransformation, weight_decay: Scalar, decoupled: bool, mask: Any = None) -> tuple[Any, ...]:
    """The links of an alias that may decay either way: :func:`add_decayed_weights` before the rule, or after it, ``decoupled``.

    Example:
        >>> tx = optfn.chain(*decayed(optfn.scale(10.0), 0.1, decoupled=True))
        >>> tx.update(torch.ones(1), tx.init(torch.ones(1)), torch.ones(1))[0]
        tensor([10.1000])
    """
    decay = add_decayed_weights(weight_decay, mask)
    return (rule, decay) if decoupled else (decay, rule)
