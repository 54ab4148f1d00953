"""All leaves as one vector."""

from typing import Any

import torch
from torch import Tensor

from optfn import tree
from optfn.core import GradientTransformation, check_transformation, in_form, transformation
from optfn.leafwise import aligned
from optfn.numerics import ravel, unravel

__all__ = ["flatten"]


def flatten(inner: GradientTransformation) -> GradientTransformation:
    """Run a transformation on one vector of all entries of all leaves.

    Its state has one vector in the place of a tree. The vector has the widest real dtype of the parameters, float32 at least;
    complex entries are there as real and imaginary part. The updates come out in the dtypes of the gradients, where Optax leaves
    all of them in the widest. Leaves must be on one device.

    The entries of a leaf whose update is None are shown to ``inner`` as zeros: what it does with all entries together counts them.
    Its update is None, and its entries of the state stay as they are; the step count, of which there is one, moves. Pass ``params``
    where some are None. A function among the extra arguments of an update, such as ``value_fn``, is one of the tree, as
    everywhere; gradients that it gives, or that are an extra argument, ``inner`` is shown as a vector.

    Args:
        inner: the transformation.

    Leaves that lie on several processes are refused: the pieces that a process has are no piece of one vector.

    Raises:
        TypeError: ``inner`` is no transformation; from ``init``: a leaf lies on several processes.
        ValueError: from ``update``: structures or shapes differ.

    Example:
        >>> tx = flatten(optfn.scale_by_adam())
        >>> params = {"w": torch.zeros(2, 2), "b": torch.zeros(())}
        >>> optfn.tree.get(tx.init(params), "mu")
        tensor([0., 0., 0., 0., 0.])
    """
    check_transformation(inner, "flatten", "flatten(tx)")

    def init(params: Any) -> Any:
        found, _ = tree.checked(params, "flatten: params")
        tree.check_here("flatten", params, "run the transformation without it, which keeps each piece where it lies")
        return inner.init(ravel(found))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        leaves = aligned(updates, params)
        pairs = list(zip(leaves.grads, leaves.owners, strict=True))
        shown = [torch.zeros_like(p) if g is None and p is not None else g for g, p in pairs]
        owners = None if params is None else ravel(leaves.owners)

        def raveled(of: Any) -> Tensor:
            pairs = zip(tree.flatten(of)[0], leaves.owners, strict=True)
            return ravel([None if p is None else torch.zeros_like(p) if x is None else x for x, p in pairs])

        def whole(x: Any) -> Any:
            vector = isinstance(x, Tensor) and owners is not None and x.shape == owners.shape
            return tree.unflatten(leaves.spec, unravel(x, leaves.owners)) if vector else x

        if owners is not None:
            extra = in_form(extra, params, raveled, whole)
        new, new_state = inner.update(ravel(shown), state, owners, **extra)
        if any(g is None and p is not None for g, p in pairs):
            present = [None if x is None else torch.full_like(x, g is not None) for x, g in zip(shown, leaves.grads, strict=True)]
            new_state = _kept(ravel(present) != 0, new_state, state)
        directions = [None if g is None else u for g, u in zip(leaves.grads, unravel(new, shown), strict=True)]
        return tree.unflatten(leaves.spec, directions), new_state

    return transformation(init, update)


def _kept(present: Tensor, new: Any, old: Any) -> Any:
    """The new state, and the old one in the entries of its vectors that are not present."""
    before: list[Tensor] = []
    tree.map_params(lambda x: before.append(x), old, present)
    entries = iter(before)
    return tree.map_params(lambda x: torch.where(present, x, next(entries)), new, present)
