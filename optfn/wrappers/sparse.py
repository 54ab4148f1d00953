"""Elementwise transformations on the entries that a sparse gradient holds."""

from typing import Any, Literal

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import rule_name
from optfn.core import GradientTransformation, check_transformation, is_elementwise, transformation
from optfn.leafwise import aligned

__all__ = ["sparse_masked"]


def sparse_masked(
    inner: GradientTransformation, *, dense: Literal["error", "pass", "zeros_absent"] = "error"
) -> GradientTransformation:
    """Run an elementwise transformation on the entries that a sparse COO gradient holds, and on no others.

    The parts of the inner state that are shaped like the parameters, and the parameters, are gathered at the gradient's
    indices, the inner transformation runs on these values, the new state is scattered back, and the update is
    sparse with the same indices. Entries that occur twice are summed first. What is not shaped like the
    parameters, step counts above all, moves as in any step, for a gradient without entries too.

    Args:
        inner: an elementwise transformation: :func:`scale_by_adam`, :func:`adagrad`, a chain of such.
        dense: what to do with a dense gradient: an ``"error"``; ``"pass"`` it to ``inner`` as it is; or take its exact zeros as
            absent entries, ``"zeros_absent"``: there the state stays, and the update is 0.

    Returns:
        A transformation with the state of ``inner``.

    Raises:
        ValueError: ``inner`` is not elementwise.
        TypeError: from ``update``: a dense gradient, unless the option says otherwise.

    Example:
        >>> tx = sparse_masked(optfn.rmsprop(lr=0.1, alpha=0.75))
        >>> params = torch.ones(4)
        >>> grads = torch.sparse_coo_tensor([[2]], [5.0], (4,), check_invariants=True)
        >>> update, state = tx.update(grads, tx.init(params), params)
        >>> optfn.apply_updates(params, update)
        tensor([1.0000, 1.0000, 0.8000, 1.0000])
    """
    check_transformation(inner, "sparse_masked", "sparse_masked(tx)")
    if not is_elementwise(inner):
        raise ValueError(f"sparse_masked takes an elementwise transformation, which {rule_name(inner.update)} is not")
    if dense not in ("error", "pass", "zeros_absent"):
        raise ValueError(f"dense must be 'error', 'pass' or 'zeros_absent', got {dense!r}")

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        leaves = aligned(updates, params)
        grads, spec = leaves.grads, leaves.spec
        updates = tree.unflatten(spec, grads)
        if dense == "pass" and all(g is None or g.layout == torch.strided for g in grads):
            return inner.update(updates, state, params, **extra)
        chosen = tree.unflatten(spec, [None if g is None else _select(g, dense, updates, i) for i, g in enumerate(grads)])
        values = tree.map(lambda at: at.values, chosen)
        whole: list[Tensor] = []

        def gather(x: Tensor, at: _Everything | None) -> Tensor:
            whole.append(x)
            return at.gather(x) if at is not None and at.shape == x.shape else x

        seen = tree.map_params(gather, state, updates, chosen)
        before = iter(whole.copy())
        owners = None if params is None else tree.map(gather, params, chosen)
        new_values, new = inner.update(values, seen, owners, **extra)

        def scatter(x: Tensor, at: _Everything | None) -> Tensor:
            old = next(before)
            if at is None:
                return old
            return at.scatter(old, x) if at.shape == old.shape else x

        return tree.map(lambda u, at: at.restore(u), new_values, chosen), tree.map_params(scatter, new, values, chosen)

    return transformation(inner.init, update, elementwise=True)


class _Everything:
    """All entries of a tensor: what is gathered there, and how it goes back."""

    def __init__(self, g: Tensor) -> None:
        self.values, self.shape = g, g.shape

    def gather(self, x: Tensor) -> Tensor:
        return x

    def scatter(self, old: Tensor, new: Tensor) -> Tensor:
        return new

    def restore(self, update: Tensor) -> Tensor:
        return update


class _Nonzero(_Everything):
    """The entries of a dense gradient that are not exactly zero; all are computed, these are kept."""

    def scatter(self, old: Tensor, new: Tensor) -> Tensor:
        return torch.where(self.values != 0, new, old)

    def restore(self, update: Tensor) -> Tensor:
        return torch.where(self.values != 0, update, 0)


class _Entries(_Everything):
    """The entries that a sparse COO gradient holds."""

    def __init__(self, g: Tensor) -> None:
        g = g.coalesce()
        super().__init__(g.values())
        self.indices, self.shape = g.indices(), g.shape

    def gather(self, x: Tensor) -> Tensor:
        if len(self.indices) == 1:  # rows, as an embedding's gradient has: faster so than by an index
            return x.index_select(0, self.indices[0])
        # A 0-dim tensor has one entry, and no index.
        return x[tuple(self.indices)] if x.ndim else x.expand_as(self.values)

    def scatter(self, old: Tensor, new: Tensor) -> Tensor:
        if not old.ndim:
            return new[0] if len(new) else old
        return old.index_put(tuple(self.indices), new)

    def restore(self, update: Tensor) -> Tensor:
        return torch.sparse_coo_tensor(self.indices, update, self.shape, is_coalesced=True, check_invariants=False)


def _select(g: Tensor, dense: str, updates: Any, i: int) -> _Everything:
    if g.layout == torch.sparse_coo:
        return _Entries(g)
    if dense == "error" or g.layout != torch.strided:
        raise TypeError(
            f"sparse_masked: {tree.paths(updates)[i]!r} has a gradient of layout {g.layout}, a sparse COO one is wanted; "
            "for dense gradients choose dense='pass' or dense='zeros_absent'"
        )
    return _Nonzero(g) if dense == "zeros_absent" else _Everything(g)
