"""The pair that everything is: ``GradientTransformation``, and how its updates reach the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree

__all__ = ["GradientTransformation", "apply_updates", "identity", "is_elementwise", "stateless", "transformation"]


class GradientTransformation(NamedTuple):
    """An immutable pair of pure functions: an optimizer, or a part of one.

    Attributes:
        init: ``init(params) -> state``. The state is a tree of tensors; it shares no memory with ``params``.
        update: ``update(updates, state, params=None, **extra) -> (updates, state)``. The first transformation of a
            chain is handed the gradients; the updates of the last one are *added* to the parameters by
            :func:`apply_updates`. Extra arguments reach every transformation; what one does not use it passes on.

    None as an update means that this leaf sits the step out: its part of the state and its parameter stay as they are.

    Example:
        >>> init, update = optfn.sgd(lr=0.5)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> updates, state = update({"w": torch.tensor([2.0, 0.0])}, init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0., 2.])}
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


def transformation(
    init: Callable[[Any], Any], update: Callable[..., tuple[Any, Any]], *, elementwise: bool = False
) -> GradientTransformation:
    """The pair of ``init`` and ``update``, with a mark if it is elementwise.

    Args:
        init: ``init(params) -> state``.
        update: ``update(updates, state, params=None, **extra) -> (updates, state)``.
        elementwise: whether an entry of an update depends on no other entry of the tensors, so that the pair may run on
            some of the entries alone, as :func:`sparse_masked` does.
    """
    update.elementwise = elementwise  # type: ignore[attr-defined]
    return GradientTransformation(init, update)


def is_elementwise(tx: GradientTransformation) -> bool:
    """Whether a transformation treats every entry by itself, so that it may run on some of them alone.

    Example:
        >>> is_elementwise(optfn.adam()), is_elementwise(optfn.clip_by_global_norm(1.0))
        (True, False)
    """
    return getattr(tx.update, "elementwise", False)


def identity() -> GradientTransformation:
    """The transformation that changes nothing and keeps no state.

    Example:
        >>> tx = identity()
        >>> tx.update(torch.ones(2), tx.init(torch.ones(2)))
        (tensor([1., 1.]), ())
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return updates, state

    update.begin = lambda leaves, state: (lambda i, g, p: g, lambda: state)  # type: ignore[attr-defined]  # optfn.leafwise.lifted
    return transformation(lambda params: (), update, elementwise=True)


def stateless(f: Callable[[Any, Any], Any]) -> GradientTransformation:
    """A transformation without state from a function of whole trees.

    For a function of one tensor use :func:`stateless_with_tree_map`, which knows None, complex and half-precision leaves.

    Args:
        f: ``f(updates, params) -> updates``; ``params`` is None where none are given.

    Example:
        >>> tx = stateless(lambda updates, params: optfn.tree.map(torch.sign, updates))
        >>> tx.update({"w": torch.tensor([-3.0, 2.0])}, ())
        ({'w': tensor([-1.,  1.])}, ())
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return f(updates, params), state

    update.__qualname__ = getattr(f, "__qualname__", update.__qualname__)
    return transformation(lambda params: (), update)


def apply_updates(params: Any, updates: Any) -> Any:
    """Add updates to parameters: ``p + u``, in the wider of the two dtypes, returned in the parameter's.

    Args:
        params: a tree of tensors.
        updates: a tree of the same structure; None leaves the parameter as it is, a sparse COO tensor changes its rows.

    Returns:
        A new tree with the dtypes of ``params``; a parameter whose update is None is the same tensor.

    Raises:
        ValueError: structure or shape differs; names the leaf.

    Example:
        >>> apply_updates({"w": torch.ones(2), "b": torch.ones(1)}, {"w": torch.tensor([1.0, -1.0]), "b": None})
        {'w': tensor([2., 0.]), 'b': tensor([1.])}
    """
    found, spec = tree.checked(params, "params", empty=True)
    changes = tree.match(spec, updates, "updates", "params")

    def add(i: int, p: Tensor | None, u: Any) -> Tensor | None:
        if p is None or u is None:
            return p
        if not isinstance(u, Tensor) or u.shape != p.shape:
            what = f"shape {tuple(u.shape)}" if isinstance(u, Tensor) else type(u).__name__
            raise ValueError(f"the update of {tree.paths(params)[i]!r} must be a tensor of shape {tuple(p.shape)}, got {what}")
        if p.dtype == u.dtype:
            return p + u
        wide = torch.promote_types(p.dtype, u.dtype)
        return (p.to(wide) + u.to(wide)).to(p.dtype)

    return tree.unflatten(spec, [add(i, p, u) for i, (p, u) in enumerate(zip(found, changes, strict=True))])
