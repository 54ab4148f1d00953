"""Euclidean projections of trees onto sets, under Optax's names: the point of the set that is nearest, all leaves together.

Leaves are real tensors; those of halfspace, hyperplane, l2 ball, l2 sphere and vector may be complex. None leaves stay None.
Every projection traces, batches and differentiates in all of its tensors, also where it has a kink: there the derivative is that
of one side. Where several points are nearest, on a sphere around its centre, one of them is taken.

To keep parameters in a set, project them after each step: ``params = projection_simplex(optfn.apply_updates(params, updates))``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optfn import numerics
from optfn import tree as trees
from optfn.checks import number
from optfn.numerics import Scalar, ratio

__all__ = [
    "projection_box",
    "projection_halfspace",
    "projection_hypercube",
    "projection_hyperplane",
    "projection_l1_ball",
    "projection_l1_sphere",
    "projection_l2_ball",
    "projection_l2_sphere",
    "projection_linf_ball",
    "projection_non_negative",
    "projection_simplex",
    "projection_vector",
]


def projection_non_negative(tree: Any) -> Any:
    r"""Onto the non-negative orthant: :math:`p_i = \max(x_i, 0)`.

    Example:
        >>> projection_non_negative({"w": torch.tensor([-1.0, 2.0])})
        {'w': tensor([0., 2.])}
    """
    return trees.map(torch.relu, tree)


def projection_box(tree: Any, lower: Any, upper: Any) -> Any:
    r"""Onto a box: :math:`p_i = \min(\max(x_i, l_i), u_i)`.

    Args:
        tree: :math:`x`.
        lower: :math:`l`, a number, a 0-dim tensor, or a tree of the structure of ``tree`` of tensors or numbers.
        upper: :math:`u \ge l`, likewise.

    Raises:
        ValueError: the structures differ.

    Example:
        >>> projection_box({"w": torch.tensor([-1.0, 2.0])}, 0.0, {"w": torch.tensor([1.0, 3.0])})
        {'w': tensor([0., 2.])}
    """

    def held(x: Tensor, low: Any, high: Any) -> Tensor:
        low, high = (torch.as_tensor(b, dtype=x.dtype, device=x.device) for b in (low, high))
        return x.clamp(low, high)

    return trees.map(held, tree, _like(lower, tree), _like(upper, tree))


def projection_hypercube(tree: Any, scale: Any = 1) -> Any:
    r"""Onto a hypercube: :math:`0 \le p_i \le s`.

    Args:
        tree: what to project.
        scale: :math:`s \ge 0`, as the bounds of :func:`projection_box`.

    Example:
        >>> projection_hypercube({"w": torch.tensor([-1.0, 0.5, 2.0])})
        {'w': tensor([0.0000, 0.5000, 1.0000])}
    """
    return projection_box(tree, 0, scale)


def projection_simplex(tree: Any, scale: Scalar = 1) -> Any:
    r"""Onto a simplex: :math:`p \ge 0`, :math:`\sum_i p_i = s`.

    .. math:: p_i = \max(x_i - \theta, 0), \qquad \theta = \frac{\sum_{j \in S} x_j - s}{|S|}

    :math:`S` are the largest entries, as many as are above the :math:`\theta` that they give.

    Args:
        tree: :math:`x`.
        scale: :math:`s \ge 0`.

    Raises:
        ValueError: a negative ``scale``.

    Reference:
        Duchi, Shalev-Shwartz, Singer and Chandra, `Efficient Projections onto the l1-Ball
        <https://doi.org/10.1145/1390156.1390191>`_, 2008, figure 1.

    Example:
        >>> projection_simplex({"w": torch.tensor([2.5, 3.0]), "b": torch.tensor(0.5)})
        {'w': tensor([0.2500, 0.7500]), 'b': tensor(0.)}
    """
    s = number("scale", scale, at_least=0)
    return _together(lambda x: _simplex(x, s), tree)


def projection_l1_sphere(tree: Any, scale: Scalar = 1) -> Any:
    r"""Onto the l1 sphere: :math:`\|p\|_1 = s`.

    An entry that is 0 counts as positive: where :math:`\|x\|_1 < s` it moves away from 0 as the others do. In Optax it stays, and
    the result is not on the sphere.

    Args:
        tree: what to project.
        scale: :math:`s \ge 0`, the radius.

    Raises:
        ValueError: a negative ``scale``.

    Example:
        >>> projection_l1_sphere({"w": torch.tensor([0.5, 0.0]), "b": torch.tensor(-2.0)})
        {'w': tensor([0., 0.]), 'b': tensor(-1.)}
    """
    s = number("scale", scale, at_least=0)
    return _together(lambda x: _l1_sphere(x, s), tree)


def projection_l1_ball(tree: Any, scale: Scalar = 1) -> Any:
    r"""Onto the l1 ball: :math:`\|p\|_1 \le s`.

    Args:
        tree: what to project.
        scale: :math:`s \ge 0`, the radius.

    Raises:
        ValueError: a negative ``scale``.

    Reference:
        As :func:`projection_simplex`.

    Example:
        >>> projection_l1_ball({"w": torch.tensor([1.0, -1.5])}), projection_l1_ball({"w": torch.tensor([0.5, -0.25])})
        ({'w': tensor([ 0.2500, -0.7500])}, {'w': tensor([ 0.5000, -0.2500])})
    """
    s = number("scale", scale, at_least=0)
    return _together(lambda x: torch.where(x.abs().sum() <= s, x, _l1_sphere(x, s)), tree)


def projection_l2_sphere(tree: Any, scale: Scalar = 1) -> Any:
    r"""Onto the l2 sphere: :math:`p = s\, x / \|x\|_2`.

    Where :math:`x = 0` all entries become the same; its derivative is 0 there. In Optax they become NaN.

    Args:
        tree: :math:`x`.
        scale: :math:`s \ge 0`, the radius.

    Raises:
        ValueError: a negative ``scale``.

    Example:
        >>> projection_l2_sphere({"w": torch.tensor([3.0]), "b": torch.tensor(4.0)})
        {'w': tensor([0.6000]), 'b': tensor(0.8000)}
    """
    s, norm = number("scale", scale, at_least=0), trees.global_norm(tree)
    nowhere, same = norm == 0, s / max(trees.size(tree), 1) ** 0.5
    factor = s / torch.where(nowhere, 1, norm)
    return trees.where(nowhere, trees.full_like(tree, same), trees.scale(factor, tree))


def projection_l2_ball(tree: Any, scale: Scalar = 1) -> Any:
    r"""Onto the l2 ball: :math:`p = x \min(1, s / \|x\|_2)`.

    Args:
        tree: :math:`x`.
        scale: :math:`s \ge 0`, the radius.

    Raises:
        ValueError: a negative ``scale``.

    Example:
        >>> projection_l2_ball({"w": torch.tensor([3.0]), "b": torch.tensor(4.0)})
        {'w': tensor([0.6000]), 'b': tensor(0.8000)}
    """
    s, norm = number("scale", scale, at_least=0), trees.global_norm(tree)
    outside = norm > s
    return trees.scale(torch.where(outside, s / torch.where(outside, norm, 1), 1), tree)


def projection_linf_ball(tree: Any, scale: Scalar = 1) -> Any:
    r"""Onto the l-infinity ball: :math:`|p_i| \le s`.

    Args:
        tree: what to project.
        scale: :math:`s \ge 0`, the radius.

    Raises:
        ValueError: a negative ``scale``.

    Example:
        >>> projection_linf_ball({"w": torch.tensor([-3.0, 0.5])})
        {'w': tensor([-1.0000,  0.5000])}
    """
    s = number("scale", scale, at_least=0)
    return projection_box(tree, -s, s)


def projection_vector(x: Any, a: Any) -> Any:
    r"""Onto the line through a vector: :math:`p = \frac{\langle a, x \rangle}{\langle a, a \rangle}\, a`; 0 where :math:`a = 0`.

    Args:
        x: what to project.
        a: a tree of the structure of ``x``.

    Raises:
        ValueError: structures or shapes differ.

    Example:
        >>> projection_vector({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([2.0, 0.0])})
        {'w': tensor([1., 0.])}
    """
    return trees.scale(ratio(trees.vdot(a, x), trees.norm(a, squared=True)), a)


def projection_hyperplane(x: Any, a: Any, b: Scalar) -> Any:
    r"""Onto a hyperplane: :math:`\langle a, p \rangle = b`.

    .. math:: p = x + \frac{b - \langle a, x \rangle}{\langle a, a \rangle}\, a

    Args:
        x: what to project.
        a: a tree of the structure of ``x``; where it is 0 altogether ``x`` stays.
        b: a number or a 0-dim tensor.

    Raises:
        ValueError: structures or shapes differ.

    Example:
        >>> projection_hyperplane({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.0, 2.0])}, 6.0)
        {'w': tensor([1., 3.])}
    """
    return trees.add_scale(x, ratio(number("b", b) - trees.vdot(a, x), trees.norm(a, squared=True)), a)


def projection_halfspace(x: Any, a: Any, b: Scalar) -> Any:
    r"""Onto a halfspace: :math:`\langle a, p \rangle \le b`, its real part if it is complex.

    .. math:: p = x + \min\Bigl(0, \frac{b - \langle a, x \rangle}{\langle a, a \rangle}\Bigr)\, a

    Args:
        x: what to project.
        a: a tree of the structure of ``x``; where it is 0 altogether ``x`` stays.
        b: a number or a 0-dim tensor.

    Raises:
        ValueError: structures or shapes differ.

    Example:
        >>> projection_halfspace({"w": torch.tensor([1.0, 4.0])}, {"w": torch.tensor([0.0, 2.0])}, 6.0)
        {'w': tensor([1., 3.])}
    """
    return trees.add_scale(x, ratio(number("b", b) - trees.vdot(a, x).real, trees.norm(a, squared=True)).clamp_max(0), a)


def _simplex(x: Tensor, s: Scalar) -> Tensor:
    """Of one vector. Adding a number to all entries changes nothing, so the largest is made 0: sums lose nothing to it."""
    x = x - x.amax().detach()
    u = x.sort(descending=True).values
    count = torch.arange(1, len(u) + 1, dtype=x.dtype, device=x.device)
    above = s / count + u >= u.cumsum(0) / count
    # Which entries are in is decided by comparisons, so that the formula for theta gives all of the derivative.
    inside = x >= torch.where(above, u, torch.inf).amin()
    theta = (torch.where(inside, x, 0).sum() - s) / inside.sum()
    theta = torch.where(x.isfinite().all(), theta, torch.nan)  # an infinite entry has no projection
    return torch.where(inside | theta.isnan(), x - theta, 0).clamp_min(0)


def _l1_sphere(x: Tensor, s: Scalar) -> Tensor:
    sign = torch.where(x < 0, -1, 1).to(x.dtype)
    return sign * _simplex(sign * x, s)


def _together(f: Callable[[Tensor], Tensor], of: Any) -> Any:
    """``f`` of all entries of a tree as one vector, float32 at least."""
    found, spec = trees.flatten(of)
    for i, x in enumerate(found):
        if x is not None and not (x.is_floating_point() or x.is_complex()):
            raise TypeError(
                f"a projection takes floating-point tensors, got {x.dtype} at {trees.paths(of)[i]!r}: convert it, .float()"
            )
    if not trees.size(of):
        return of
    return trees.unflatten(spec, numerics.unravel(f(numerics.ravel(found)), found))


def _like(bound: Any, of: Any) -> Any:
    """A bound for each leaf, if there is one for all."""
    return trees.map(lambda x: bound, of) if isinstance(bound, int | float | Tensor) else bound
