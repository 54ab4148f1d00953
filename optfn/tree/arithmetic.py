"""Arithmetic on trees, under Optax's names: of leaves side by side, and of all entries together.

Every function traces, batches and differentiates in its tensors; where a derivative is not defined it is finite. Names such as
``sum`` and ``max`` are functions of trees here, and no builtins.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from optfn import numerics, random
from optfn.numerics import Scalar, compute_dtype, widened_scalar
from optfn.sharding import cut, drawn, entrywise, is_sharded, joint_extremes, joint_sums, like, local, placed_as
from optfn.tree.structure import flatten, global_norm, leaves, map, map_entries, match, paths

__all__ = [
    "add",
    "add_scale",
    "allclose",
    "batch_shape",
    "bias_correction",
    "cast_like",
    "clip",
    "conj",
    "div",
    "dtype",
    "full_like",
    "max",
    "min",
    "mul",
    "norm",
    "ones_like",
    "random_like",
    "real",
    "scale",
    "size",
    "split_key_like",
    "sub",
    "sum",
    "update_infinity_moment",
    "update_moment",
    "update_moment_per_elem_norm",
    "vdot",
    "where",
    "zeros_like",
]


# Leaves side by side


def add(tree_x: Any, tree_y: Any, *other_trees: Any) -> Any:
    """The sum of two or more trees.

    Where one of them has None, so has the result: to leave a parameter as it is there, use :func:`apply_updates`.

    Raises:
        ValueError: the structures differ.

    Example:
        >>> add({"w": torch.ones(2), "b": None}, {"w": torch.ones(2), "b": None})
        {'w': tensor([2., 2.]), 'b': None}
    """
    return functools.reduce(lambda x, y: _each(torch.add, x, y), other_trees, _each(torch.add, tree_x, tree_y))


def sub(tree_x: Any, tree_y: Any) -> Any:
    """The difference of two trees.

    Example:
        >>> sub({"w": torch.ones(2)}, {"w": torch.tensor([0.0, 3.0])})
        {'w': tensor([ 1., -2.])}
    """
    return _each(torch.sub, tree_x, tree_y)


def mul(tree_x: Any, tree_y: Any) -> Any:
    """The product of two trees, entry by entry.

    Example:
        >>> mul({"w": torch.tensor([2.0, 3.0])}, {"w": torch.tensor([4.0, 5.0])})
        {'w': tensor([ 8., 15.])}
    """
    return _each(torch.mul, tree_x, tree_y)


def div(tree_x: Any, tree_y: Any) -> Any:
    """The quotient of two trees, entry by entry.

    Example:
        >>> div({"w": torch.tensor([2.0, 3.0])}, {"w": torch.tensor([4.0, 6.0])})
        {'w': tensor([0.5000, 0.5000])}
    """
    return _each(torch.div, tree_x, tree_y)


def scale(scalar: complex | Tensor, tree: Any) -> Any:
    """A tree times a number.

    Args:
        scalar: a number or a 0-dim tensor, which changes no leaf's dtype, unless it is complex and the leaf real.
        tree: tensors.

    Example:
        >>> scale(0.5, {"w": torch.tensor([2.0, 3.0])})
        {'w': tensor([1.0000, 1.5000])}
    """
    return map_entries(lambda x: _of_kind(scalar * x, x.dtype), tree)


def add_scale(tree_x: Any, scalar: complex | Tensor, tree_y: Any) -> Any:
    """One tree plus a number times another.

    Args:
        tree_x: tensors.
        scalar: as in :func:`scale`.
        tree_y: tensors, a tree of the structure of ``tree_x``.

    Example:
        >>> add_scale({"w": torch.ones(2)}, 0.5, {"w": torch.tensor([2.0, 4.0])})
        {'w': tensor([2., 3.])}
    """
    return _each(lambda x, y: _of_kind(x + scalar * y, torch.promote_types(x.dtype, y.dtype)), tree_x, tree_y)


def where(condition: bool | Tensor, tree_x: Any, tree_y: Any) -> Any:
    """The entries of one tree where a condition holds, those of another where it does not.

    Args:
        condition: a bool, or a bool tensor that broadcasts with every leaf.
        tree_x: the entries where it holds.
        tree_y: the entries where it does not.

    Example:
        >>> where(torch.tensor(False), {"w": torch.ones(2)}, {"w": torch.zeros(2)})
        {'w': tensor([0., 0.])}
    """
    return _each(lambda x, y: torch.where(torch.as_tensor(condition, device=x.device), x, y), tree_x, tree_y)


def clip(tree: Any, min_value: Scalar | None = None, max_value: Scalar | None = None) -> Any:
    """A tree with every entry held within bounds.

    Args:
        tree: real tensors.
        min_value: the lower bound, a number or a tensor that broadcasts with every leaf; None is no bound.
        max_value: the upper bound.

    Example:
        >>> clip({"w": torch.tensor([-2.0, 0.5, 3.0])}, -1.0, 1.0)
        {'w': tensor([-1.0000,  0.5000,  1.0000])}
    """

    def held(x: Tensor) -> Tensor:
        low, high = (
            None if b is None else torch.as_tensor(b, dtype=x.dtype if x.is_floating_point() else None, device=x.device)
            for b in (min_value, max_value)
        )
        return x if low is None and high is None else x.clamp(low, high)

    return map_entries(held, tree)


def conj(tree: Any) -> Any:
    """The complex conjugate; real leaves as they are.

    Example:
        >>> conj({"w": torch.tensor([1 + 2j])})
        {'w': tensor([1.-2.j])}
    """
    return map(lambda x: x.conj().resolve_conj(), tree)


def real(tree: Any) -> Any:
    """The real part; real leaves as they are.

    Example:
        >>> real({"w": torch.tensor([1 + 2j])})
        {'w': tensor([1.])}
    """
    return map(torch.real, tree)


def batch_shape(tree: Any, shape: Sequence[int] = ()) -> Any:
    """A tree with dimensions of these sizes before those of each leaf, in which the leaf is repeated, without a copy.

    Example:
        >>> batch_shape({"w": torch.tensor([1.0, 2.0])}, (2,))
        {'w': tensor([[1., 2.],
                      [1., 2.]])}
    """
    return map(lambda x: x.expand((*shape, *x.shape)), tree)


# Trees like another


def zeros_like(tree: Any, dtype: torch.dtype | None = None) -> Any:
    """A tree of zeros.

    Args:
        tree: gives structure, shapes and devices.
        dtype: the dtype of all leaves; that of each if None.

    Example:
        >>> zeros_like({"w": torch.ones(2)})
        {'w': tensor([0., 0.])}
    """
    return map(lambda x: torch.zeros_like(x, dtype=dtype), tree)


def ones_like(tree: Any, dtype: torch.dtype | None = None) -> Any:
    """A tree of ones; arguments as in :func:`zeros_like`.

    Example:
        >>> ones_like({"w": torch.zeros(2)})
        {'w': tensor([1., 1.])}
    """
    return map(lambda x: torch.ones_like(x, dtype=dtype), tree)


def full_like(tree: Any, fill_value: Scalar, dtype: torch.dtype | None = None) -> Any:
    """A tree that holds one number everywhere.

    Args:
        tree: gives structure, shapes and devices.
        fill_value: a number or a 0-dim tensor.
        dtype: as in :func:`zeros_like`.

    Example:
        >>> full_like({"w": torch.zeros(2)}, 0.5)
        {'w': tensor([0.5000, 0.5000])}
    """
    return map(lambda x: numerics.full_like(torch.zeros_like(x, dtype=dtype), fill_value), tree)


def cast_like(tree: Any, other_tree: Any) -> Any:
    """A tree in the dtypes of another; a leaf that is None there keeps its own.

    Example:
        >>> cast_like({"w": torch.ones(2)}, {"w": torch.ones(2, dtype=torch.bfloat16)})
        {'w': tensor([1., 1.], dtype=torch.bfloat16)}
    """
    return map(lambda x, like: x if like is None else x.to(like.dtype), tree, other_tree)


def split_key_like(rng_key: Tensor, target_tree: Any) -> Any:
    """A tree with a key of its own in the place of each leaf.

    Args:
        rng_key: a key of :mod:`optfn.random`, not to be used again.
        target_tree: gives the structure; a leaf that is None takes no key.

    Example:
        >>> split_key_like(optfn.random.key(7), {"w": torch.ones(2), "b": None})
        {'w': tensor([3625411723, 1954958720]), 'b': None}
    """
    keys = iter(random.split(rng_key, len(leaves(target_tree))).unbind())
    return map(lambda x: next(keys), target_tree)


def random_like(
    rng_key: Tensor,
    target_tree: Any,
    sampler: Callable[[Tensor, Sequence[int], torch.dtype], Tensor] = random.normal,
    dtype: torch.dtype | None = None,
) -> Any:
    """A tree of random numbers: those of Optax for the same key.

    Args:
        rng_key: a key of :mod:`optfn.random`, not to be used again.
        target_tree: gives structure and shapes; the numbers are where the key is, and lie on several processes as a leaf does.
        sampler: ``sampler(key, shape, dtype)``, such as :func:`optfn.random.uniform`.
        dtype: as in :func:`zeros_like`.

    Example:
        >>> random_like(optfn.random.key(7), {"w": torch.zeros(2), "b": torch.zeros(())})
        {'w': tensor([0.4541, 0.9392]), 'b': tensor(1.1140)}
    """

    def numbers(x: Tensor, key: Tensor) -> Tensor:
        if not is_sharded(x):
            return sampler(key, x.shape, dtype or x.dtype)
        if getattr(sampler, "__module__", None) != random.__name__:
            return cut(sampler(key, x.shape, dtype or x.dtype), x)
        return like(drawn(sampler, key, local(x), x, dtype or x.dtype), x)

    return map(numbers, target_tree, split_key_like(rng_key, target_tree))


# All entries together


def vdot(tree_x: Any, tree_y: Any) -> Tensor:
    r"""The inner product of two trees, :math:`\sum_i \bar x_i y_i`, as a 0-dim tensor of the widest of their dtypes.

    Of half-precision leaves it is taken in float32. Nothing but None gives 0.

    Raises:
        ValueError: the structures or the shapes differ.

    Example:
        >>> vdot({"a": torch.tensor([1.0, 2.0]), "b": None}, {"a": torch.tensor([3.0, 4.0]), "b": None})
        tensor(11.)
    """
    found, spec = flatten(tree_x)
    for path, x, y in zip(paths(tree_x), found, match(spec, tree_y, "tree 2", "tree 1"), strict=True):
        if x is not None and y is not None and x.shape != y.shape:
            raise ValueError(f"vdot: {path!r} must have one shape in both trees, got {tuple(x.shape)} and {tuple(y.shape)}")
    return _summed(lambda x, y: (_wide(x).conj() * _wide(y)).sum(), tree_x, tree_y)


def sum(tree: Any) -> Tensor:
    """The sum of all entries, as a 0-dim tensor of the widest dtype, float32 at least (int64 of integers); 0 where there are none.

    Example:
        >>> sum({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)})
        tensor(6.)
    """
    return _summed(lambda x: _wide(x).sum(), tree)


def max(tree: Any) -> Tensor:
    """The largest entry, as a 0-dim tensor of the widest dtype; minus infinity where there are none.

    Example:
        >>> max({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)})
        tensor(3.)
    """
    return _extreme(tree, largest=True)


def min(tree: Any) -> Tensor:
    """The smallest entry, as a 0-dim tensor of the widest dtype; infinity where there are none.

    Example:
        >>> min({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)})
        tensor(1.)
    """
    return _extreme(tree, largest=False)


def norm(
    tree: Any,
    ord: float | Literal["inf", "infinity"] | None = None,  # noqa: A002
    squared: bool = False,
) -> Tensor:
    """The vector norm of all entries together, or its square.

    Derivatives are as in :func:`global_norm`, 0 where all entries are 0; that has other orders too.

    Args:
        tree: tensors, real or complex.
        ord: 1, 2 or infinity; None is 2.
        squared: whether to give the square, which of order 2 is the sum of the squares itself.

    Raises:
        ValueError: another order.

    Example:
        >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor(4.0)}), norm(torch.tensor([3.0, 4.0]), squared=True)
        (tensor(5.), tensor(25.))
    """
    order: Any = 2 if ord is None else math.inf if ord in ("inf", "infinity") else ord
    if order not in (1, 2, math.inf):
        raise ValueError(f"ord must be None, 1, 2 or inf, got {ord!r}; optfn.tree.global_norm(tree, order) takes any other number")
    if order == 2 and squared:
        return _summed(lambda x: numerics.as_real(_wide(x)).square().sum(), tree)
    found = global_norm(tree, float(order))
    return found.square() if squared else found


def size(tree: Any) -> int:
    """The number of entries.

    Example:
        >>> size({"a": torch.ones(2, 3), "b": torch.tensor(0.0), "c": None})
        7
    """
    return functools.reduce(lambda count, x: count + x.numel(), leaves(tree), 0)


def allclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Tensor:
    """Whether two trees are close, ``|a - b| <= atol + rtol * |b|`` for each entry, as a 0-dim bool tensor; None is to None alone.

    Args:
        a: a tree of tensors.
        b: another, of the same structure, in any dtypes.
        rtol: at least 0.
        atol: at least 0, in the units of the leaves.
        equal_nan: whether a NaN is close to a NaN.

    Example:
        >>> allclose({"w": torch.ones(2)}, {"w": torch.ones(2) + 1e-9}), allclose({"w": torch.ones(2)}, {"w": None})
        (tensor(True), tensor(False))
    """
    found, spec = flatten(a)
    pairs = list(zip(found, match(spec, b, "b", "a"), strict=True))
    if any((x is None) != (y is None) for x, y in pairs):
        return torch.tensor(False)

    def close(x: Tensor, y: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(wide), y.to(wide)
        near = (x == y) | (((x - y).abs() <= atol + rtol * y.abs()) & y.isfinite())  # torch.isclose cannot be batched
        return (near | (x.isnan() & y.isnan()) if equal_nan else near).all()

    parts = _stacked([close(x, y) for x, y in pairs if x is not None])
    return torch.tensor(True) if parts is None else parts.all()


def dtype(tree: Any, mixed_dtype_handler: Literal["promote", "highest", "lowest"] | None = None) -> torch.dtype:
    """The dtype of a tree; torch's default one where it has no leaves.

    Args:
        tree: tensors.
        mixed_dtype_handler: what to give for several dtypes: an error if None; what they are all promoted to; the highest or the
            lowest of them, where any two are promoted to one of the two.

    Raises:
        ValueError: several dtypes and no handler, or two of which none is the higher; another handler.

    Example:
        >>> params = {"a": torch.ones(1, dtype=torch.float16), "b": torch.ones(1)}
        >>> dtype(params, "promote"), dtype(params, "lowest")
        (torch.float32, torch.float16)
    """
    if mixed_dtype_handler not in (None, "promote", "highest", "lowest"):
        raise ValueError(f"mixed_dtype_handler must be None, 'promote', 'highest' or 'lowest', got {mixed_dtype_handler!r}")
    kinds = [x.dtype for x in leaves(tree)]
    if not kinds:
        return torch.get_default_dtype()

    def chosen(x: torch.dtype, y: torch.dtype) -> torch.dtype:
        wide = torch.promote_types(x, y)
        if mixed_dtype_handler == "promote" or x == y:
            return wide
        if mixed_dtype_handler is None or wide not in (x, y):
            places = zip(paths(tree), flatten(tree)[0], strict=True)
            where = ", ".join(f"{leaf.dtype} at {path!r}" for path, leaf in places if leaf is not None)
            wanted = "one dtype" if mixed_dtype_handler is None else f"a {mixed_dtype_handler} dtype"
            raise ValueError(f"the tree does not have {wanted}: {where}")
        return wide if mixed_dtype_handler == "highest" else (y if wide == x else x)

    return functools.reduce(chosen, kinds)


# Moments


def update_moment(updates: Any, moments: Any, decay: Scalar, order: int) -> Any:
    r"""A step of an exponential moving average of powers: :math:`(1 - \beta)\, g^k + \beta\, m`.

    Where an update is None its moment stays. The result has the wider of the two dtypes; the math of half-precision leaves is in
    float32.

    Args:
        updates: :math:`g`.
        moments: :math:`m`, a tree of that structure.
        decay: :math:`\beta` in ``[0, 1]``.
        order: :math:`k`.

    Example:
        >>> update_moment({"w": torch.tensor([2.0])}, {"w": torch.tensor([1.0])}, 0.75, order=2)
        {'w': tensor([1.7500])}
    """
    return _averaged(lambda g: g**order, updates, moments, decay)


def update_moment_per_elem_norm(updates: Any, moments: Any, decay: Scalar, order: int) -> Any:
    r"""As :func:`update_moment`, of the powers of absolute values, :math:`|g|^k`, where an update is complex.

    Example:
        >>> update_moment_per_elem_norm({"w": torch.tensor([3 + 4j])}, {"w": torch.tensor([1.0])}, 0.75, order=2)
        {'w': tensor([7.])}
    """
    return _averaged(lambda g: g.abs() ** order if g.is_complex() else g**order, updates, moments, decay)


def update_infinity_moment(updates: Any, moments: Any, decay: Scalar, eps: Scalar) -> Any:
    r"""A step of an exponentially weighted infinity norm: :math:`\max(|g| + \epsilon, \beta\, m)`.

    Args:
        updates: :math:`g`; where it is None the moment stays.
        moments: :math:`m`.
        decay: :math:`\beta` in ``[0, 1]``.
        eps: :math:`\epsilon \ge 0`, in the units of the updates.

    Example:
        >>> update_infinity_moment({"w": torch.tensor([-1.0, 3.0])}, {"w": torch.tensor([4.0, 4.0])}, 0.5, 0.0)
        {'w': tensor([2., 3.])}
    """

    def updated(m: Tensor, g: Any) -> Tensor:
        if g is None:
            return m
        size, old = _of_kind(_wide(g).abs() + eps, _wide(g).dtype), _of_kind(decay * _wide(m), _wide(m).dtype)
        return torch.maximum(size, old).to(torch.promote_types(numerics.real_dtype(g.dtype), m.dtype))

    return map_entries(updated, moments, updates)


def bias_correction(moment: Any, decay: Scalar, count: int | Tensor) -> Any:
    r"""Moments that began at zero, corrected: :math:`m / (1 - \beta^t)`, without loss of digits where :math:`\beta^t` is near 1.

    Args:
        moment: :math:`m`, an exponential moving average.
        decay: its :math:`\beta` in ``[0, 1)``.
        count: :math:`t \ge 1`, how many values are in it.

    Example:
        >>> bias_correction({"w": torch.tensor([0.1, 0.2])}, 0.9, 1)
        {'w': tensor([1., 2.])}
    """

    def corrected(m: Tensor) -> Tensor:
        time = widened_scalar(torch.as_tensor(count, device=m.device))
        return _of_kind(m / numerics.bias_correction(decay, time), m.dtype)

    return map(corrected, moment)


# Helpers


def _each(f: Callable[..., Tensor], tree: Any, *rest: Any) -> Any:
    """``f`` of the leaves of several trees, None where one of them has None."""

    def one(x: Tensor, *others: Any) -> Tensor | None:
        return None if any(y is None for y in others) else entrywise(f, x, *others)

    return map(one, tree, *rest)


def _summed(f: Callable[..., Tensor], tree: Any, *rest: Any) -> Tensor:
    """The total of what ``f`` gives for each leaf, a sum over its entries; None passes over."""
    found, spec = flatten(tree)
    others = [match(spec, other, f"tree {i + 2}", "tree 1") for i, other in enumerate(rest)]
    rows = [row for row in zip(found, *others, strict=True) if all(x is not None for x in row)]
    parts = [f(*(local(placed_as(x, row[0])) for x in row)) for row in rows]
    stacked = _stacked(joint_sums(parts, [row[0] for row in rows]))
    return torch.zeros(()) if stacked is None else stacked.sum()


def _extreme(tree: Any, *, largest: bool) -> Tensor:
    worst = -math.inf if largest else math.inf
    found = [x for x in leaves(tree) if x.numel()]

    def of(x: Tensor) -> Tensor:
        if not x.numel():  # a piece without entries
            return x.new_full((), worst if x.is_floating_point() else getattr(torch.iinfo(x.dtype), "min" if largest else "max"))
        return x.amax() if largest else x.amin()

    parts = _stacked(joint_extremes([of(local(x)) for x in found], found, largest=largest))
    return torch.tensor(worst) if parts is None else parts.amax() if largest else parts.amin()


def _of_kind(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``, that of a leaf, where the arithmetic of 0-dim tensors has left it for a wider one of the same kind."""
    inexact = dtype.is_floating_point or dtype.is_complex
    return x.to(dtype) if inexact and x.dtype != dtype and x.is_complex() == dtype.is_complex else x


def _wide(x: Tensor) -> Tensor:
    """Half precision in float32, anything else as it is."""
    return x.to(compute_dtype(x)) if x.is_floating_point() or x.is_complex() else x


def _stacked(parts: list[Tensor]) -> Tensor | None:
    """0-dim tensors as a vector of the widest of their dtypes on the first one's device; None where there are none."""
    if not parts:
        return None
    wide = functools.reduce(torch.promote_types, (x.dtype for x in parts))
    return torch.stack([x.to(device=parts[0].device, dtype=wide) for x in parts])


def _averaged(power: Callable[[Tensor], Tensor], updates: Any, moments: Any, decay: Scalar) -> Any:
    weight = 1 - (widened_scalar(decay) if isinstance(decay, Tensor) else decay)

    def updated(m: Tensor, g: Any) -> Tensor:
        if g is None:
            return m
        new = power(_wide(g))
        wide = torch.promote_types(numerics.real_dtype(g.dtype) if not new.is_complex() else g.dtype, m.dtype)
        return _of_kind(numerics.lerp(_wide(m), new, weight), wide)

    return map_entries(updated, moments, updates)
