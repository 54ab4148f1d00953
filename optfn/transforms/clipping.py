"""Clipping: of values, of the norm of everything, of each tensor, of each unit, of each example."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state, number
from optfn.core import GradientTransformation, stateless, transformation
from optfn.leafwise import Extent, stateless_with_tree_map
from optfn.numerics import Scalar, compute_dtype, widened_scalar
from optfn.sharding import Shares, is_sharded, local, with_dims
from optfn.transforms.scaling import scale

__all__ = [
    "ClipByGlobalNormState",
    "adaptive_grad_clip",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "unitwise_clip",
    "unitwise_norm",
]

Axis = int | tuple[int, ...] | None
"""Dimensions that a norm sums over."""


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

    def clipped(g: Tensor, p: Any, extents: tuple[Extent]) -> Tensor:
        return g / (extents[0].rms() / bound).clamp_min(1)

    return stateless_with_tree_map(clipped, elementwise=False, norms=lambda g, p: (g,))


def unitwise_norm(x: Tensor, axis: Axis = None) -> Tensor:
    """The 2-norm of each unit of a tensor, in every entry of that unit.

    A unit is what feeds one output of a layer. torch's layers have the output dimension first, so by default the norm is over
    all dimensions but the first, for linear, convolutional and attention weights alike. A tensor with no more than one dimension
    longer than 1 is one unit.

    Optax's layers have the output last, and its default follows that: ``axis=0`` for two or three dimensions, ``(0, 1, 2)`` for
    four, ``(0, 1, 2, 3)`` for five. Given here, they mean the same.

    Args:
        x: a tensor of any shape.
        axis: the dimension or dimensions to sum over.

    Returns:
        A tensor of the shape of ``x``, real, float32 or wider.

    Raises:
        ValueError: ``x`` has no such dimension.

    Example:
        >>> unitwise_norm(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[5., 5.],
                [2., 2.]])
    """
    if axis is None:
        vector = sum(size != 1 for size in x.shape) <= 1
        axis = tuple(range(0 if vector else 1, x.ndim))
    axis = axis if isinstance(axis, tuple) else (axis,)
    if not all(-x.ndim <= i < x.ndim for i in axis):
        raise ValueError(f"axis must be of the {x.ndim} dimensions of a tensor of shape {tuple(x.shape)}, got {axis}")
    return torch.linalg.vector_norm(x, dim=axis or None, keepdim=True, dtype=compute_dtype(x)).expand(x.shape)


def unitwise_clip(g_norm: Tensor, max_norm: Tensor, grad: Tensor, div_eps: Scalar = 1e-6) -> Tensor:
    r"""Scale a gradient so that each unit has at most its norm: :math:`g\, m / \max(\|g\|, \epsilon)` where :math:`\|g\| \ge m`.

    Args:
        g_norm: norms of the units, as :func:`unitwise_norm` gives them.
        max_norm: :math:`m`, the largest that they may be.
        grad: the gradient.
        div_eps: :math:`\epsilon > 0`, below which no norm is divided by.

    Raises:
        ValueError: the three tensors are not of one shape; ``div_eps`` is out of range.

    Example:
        >>> grad = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> unitwise_clip(unitwise_norm(grad), torch.full((2, 2), 2.5), grad)
        tensor([[1.5000, 2.0000],
                [0.0000, 2.0000]])
    """
    floor = number("div_eps", div_eps, above=0)
    if not g_norm.shape == max_norm.shape == grad.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (g_norm, max_norm, grad))
        raise ValueError(f"unitwise_clip: g_norm, max_norm and grad must be of one shape, got {shapes}")
    return torch.where(g_norm < max_norm, grad, grad * (max_norm / g_norm.clamp_min(floor)))


def adaptive_grad_clip(clipping: Scalar, eps: Scalar = 1e-3, axis: Axis = None) -> GradientTransformation:
    r"""Scale each unit's update so that its norm is at most a share of the norm of the unit's weights.

    .. math:: u_i = \begin{cases} \lambda\, m_i\, g_i / \|g_i\| & \|g_i\| \ge \lambda\, m_i \\ g_i & \text{else} \end{cases}, \qquad
        m_i = \max(\|p_i\|, \epsilon)

    A unit :math:`i` is what feeds one output. The default is torch's layout, the output dimension first; Optax's default has it
    last, and takes an ``axis`` here, see :func:`unitwise_norm`.

    Args:
        clipping: :math:`\lambda \ge 0`, the largest ratio of the norms.
        eps: :math:`\epsilon \ge 0`, in the units of the parameters, so that weights that are zero can move.
        axis: the dimension or dimensions that a unit's norm sums over, of every leaf; by default all but the first.

    Raises:
        TypeError: from ``update``: ``params`` is missing; a tensor is complex.
        ValueError: an argument out of range; from ``update``: a tensor without a dimension of ``axis``.

    Reference:
        Brock et al., `High-Performance Large-Scale Image Recognition Without Normalization
        <https://arxiv.org/abs/2102.06171>`_, 2021, equation 3.

    Example:
        >>> params = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
        >>> adaptive_grad_clip(0.5).update(torch.tensor([[30.0, 40.0], [0.0, 2.0]]), (), params)[0]
        tensor([[1.5000, 2.0000],
                [0.0000, 2.0000]])
    """
    ratio, floor = number("clipping", clipping, at_least=0), number("eps", eps, at_least=0)

    def clipped(g: Tensor, p: Tensor) -> Tensor:
        return unitwise_clip(unitwise_norm(g, axis), ratio * unitwise_norm(p, axis).clamp_min(floor), g)

    return stateless_with_tree_map(clipped, elementwise=False, needs_params=True, complex_="error")


def per_example_global_norm_clip(grads: Any, l2_norm_clip: Scalar) -> tuple[Any, Tensor]:
    r"""Clip each example's gradient by its global norm, and sum them: :math:`\sum_b g_b \min(1, c / \|g_b\|)`.

    Args:
        grads: a tree of tensors whose first dimension is that of the examples, as ``torch.func.vmap(torch.func.grad(loss))``
            gives them; None stays None.
        l2_norm_clip: :math:`c \ge 0`, in the units of the gradients.

    Returns:
        The sum, a tree, and how many examples were clipped, a 0-dim int64 tensor.

    Raises:
        ValueError: a tensor has no such dimension; a negative ``l2_norm_clip``.

    Reference:
        Abadi et al., `Deep Learning with Differential Privacy <https://arxiv.org/abs/1607.00133>`_, 2016, algorithm 1.

    Example:
        >>> per_example_global_norm_clip({"w": torch.tensor([[3.0, 4.0], [0.0, 0.5]])}, 1.0)
        ({'w': tensor([0.6000, 1.3000])}, tensor(1))
    """
    bound = number("l2_norm_clip", l2_norm_clip, at_least=0)
    leaves = _with_examples("per_example_global_norm_clip", grads)
    _check_examples_are_here("per_example_global_norm_clip", grads)
    norms = [_example_norms(local(g)) for g in leaves]
    if not norms:
        return grads, tree.new_count(grads)
    wide, shares = compute_dtype(*norms), Shares(leaves)
    stacked = torch.stack([x.to(norms[0].device, wide) for x in norms])
    if shares.group is None:
        total = torch.linalg.vector_norm(stacked, dim=0)
    else:
        parts = torch.tensor(shares.parts, dtype=torch.float64, device=stacked.device)[:, None]
        (squares,) = shares.totals((stacked.double().square() / parts).sum(0))  # of float32 no overflow
        total = squares.sqrt().to(wide)
    factors = _factors(total, bound)
    return tree.map(lambda g: with_dims(_weighted_sum(factors, local(g)), g, -1), grads), (factors < 1).sum()


def per_example_layer_norm_clip(grads: Any, global_l2_norm_clip: Scalar, uniform: bool = True) -> tuple[Any, Any]:
    r"""Clip each example's gradient leaf by leaf, and sum them; the norm over all leaves is then at most the bound.

    Args:
        grads: as in :func:`per_example_global_norm_clip`.
        global_l2_norm_clip: :math:`c \ge 0`, in the units of the gradients.
        uniform: whether each of :math:`k` leaves is held to :math:`c / \sqrt k`; else a leaf with :math:`n` of all :math:`N`
            parameters is held to :math:`c \sqrt{n / N}`.

    Returns:
        The sum, and how many examples were clipped in each leaf, two trees.

    Raises:
        ValueError: as :func:`per_example_global_norm_clip`.

    Reference:
        McMahan et al., `Learning Differentially Private Recurrent Language Models <https://arxiv.org/abs/1710.06963>`_, 2017,
        section 2 (flat and per-layer clipping).

    Example:
        >>> grads = {"w": torch.tensor([[3.0, 4.0], [0.0, 0.5]]), "b": torch.tensor([[2.0], [0.5]])}
        >>> per_example_layer_norm_clip(grads, 2**0.5)
        ({'w': tensor([0.6000, 1.3000]), 'b': tensor([1.5000])}, {'w': tensor(1), 'b': tensor(1)})
    """
    bound = number("global_l2_norm_clip", global_l2_norm_clip, at_least=0)
    leaves = _with_examples("per_example_layer_norm_clip", grads)
    total = sum(math.prod(g.shape[1:]) for g in leaves)

    def factors(g: Tensor) -> Tensor:
        share = 1 / len(leaves) if uniform else math.prod(g.shape[1:]) / max(total, 1)
        return _factors(_example_norms(g), bound * share**0.5)

    found = tree.map(factors, grads)
    return tree.map(_weighted_sum, found, grads), tree.map(lambda x: (x < 1).sum(), found)


def _with_examples(owner: str, grads: Any) -> list[Tensor]:
    """The leaves, which have a first dimension of one size."""
    leaves = tree.leaves(grads)
    for path, g in zip(tree.paths(grads), tree.flatten(grads)[0], strict=True):
        if g is not None and (g.ndim == 0 or g.shape[0] != leaves[0].shape[0]):
            count = leaves[0].shape[0] if leaves[0].ndim else "the number of examples"
            raise ValueError(f"{owner}: {path!r} must have a first dimension of {count}, the examples, got shape {tuple(g.shape)}")
    return leaves


def _check_examples_are_here(owner: str, grads: Any) -> None:
    for path, g in zip(tree.paths(grads), tree.flatten(grads)[0], strict=True):
        if is_sharded(g) and any(getattr(p, "dim", None) == 0 for p in g.placements):
            raise TypeError(
                f"{owner}: {path!r} is cut in its first dimension, that of the examples: all processes must have all of them"
            )


def _example_norms(g: Tensor) -> Tensor:
    x = g.unsqueeze(-1)  # so that there is a dimension to sum over
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), dtype=compute_dtype(x))


def _factors(norms: Tensor, bound: Scalar) -> Tensor:
    """What each example is multiplied with; a norm that is not above the bound stays out of the quotient."""
    above = norms > bound
    return torch.where(above, bound / torch.where(above, norms, 1), 1)


def _weighted_sum(factors: Tensor, g: Tensor) -> Tensor:
    wide = compute_dtype(g)
    return torch.tensordot(factors.to(g.device, wide), g.to(wide), 1).to(g.dtype)
