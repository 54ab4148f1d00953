"""All leaves as one vector, also where they lie on several processes, for what sums over all entries."""

from typing import Any

import torch
from torch import Tensor

from optfn import tree
from optfn.numerics import as_real, ravel, unravel
from optfn.sharding import Shares, has_dims_more, local, placed_as, with_dims

__all__ = ["Vectors"]


class Vectors:
    """All leaves as one vector; of those that lie on several processes the entries that are here.

    Args:
        owner: whose vectors they are, for messages.
        homes: the leaves; None where there is none.
        spec: their structure.

    Attributes:
        shares: what each process adds to sums over vectors.

    Example:
        >>> leaves, spec = optfn.tree.flatten({"w": torch.ones(2), "b": torch.tensor(3.0)})
        >>> vectors = Vectors("lbfgs", leaves, spec)
        >>> x = vectors.of(leaves)
        >>> vectors.shares.totals(vectors.counted(x).dot(x)), vectors.leaves(2 * x)
        ([tensor(11.)], {'w': tensor([2., 2.]), 'b': tensor(6.)})
    """

    def __init__(self, owner: str, homes: list[Any], spec: Any) -> None:
        self.owner, self.homes, self.spec = owner, homes, spec
        self.present = [h for h in homes if h is not None]
        self.shares = Shares(self.present)
        self.weights: Any = 1.0
        if self.shares.group is not None:
            sizes = [as_real(local(h)).numel() for h in self.present]
            parts = zip(self.present, sizes, self.shares.parts, strict=True)
            self.weights = torch.cat([local(h).new_full((n,), 1 / count, dtype=torch.float64) for h, n, count in parts])

    def counted(self, x: Tensor) -> Tensor:
        """A vector to sum over processes: an entry that several of them have counts once."""
        return x if self.shares.group is None else x * self.weights.to(x.dtype)

    def of(self, tensors: list[Any], like: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The entries of leaves, with the dtype and the length of ``like`` if it is given."""
        found = [x for x in tensors if x is not None]
        if len(devices := {x.device for x in found}) > 1:
            raise ValueError(f"{self.owner}: the leaves must be on one device, got {', '.join(sorted(map(str, devices)))}")
        if self.shares.group is not None:
            found = [local(placed_as(x, h)) for x, h in zip(found, self.present, strict=True)]
        vector = ravel(found, dtype if like is None else like.dtype)
        if like is not None and vector.shape != like.shape:
            said = f"the updates have {len(vector)} entries, the state is of {len(like)}"
            raise ValueError(f"{self.owner}: {said}; where some are None pass the params too")
        return vector

    def leaves(self, x: Tensor) -> Any:
        """The inverse: a tree laid out as the leaves."""
        return self.laid_out(unravel(x, [local(h) for h in self.homes]), x.ndim - 1)

    def laid_out(self, parts: list[Any], count: int) -> Any:
        """A tree of what has the shapes of the leaves, but for ``count`` dimensions in front."""
        return tree.unflatten(self.spec, [with_dims(part, h, count) for part, h in zip(parts, self.homes, strict=True)])

    def kept(self, x: Tensor) -> Any:
        """A vector, or rows of them, as the state has them."""
        if self.shares.group is None:
            return x
        return self.laid_out(unravel(x, [None if h is None else _wide(local(h), x.dtype) for h in self.homes]), x.ndim - 1)

    def read(self, kept: Any, dtype: torch.dtype | None = None, *, always: bool = False) -> Tensor:
        """The inverse; of rows in trees ``always``, also where no leaf lies on several processes."""
        if self.shares.group is None and not always:
            return kept
        found = tree.flatten(kept)[0]
        pairs = [(x, h) for x, h in zip(found, self.homes, strict=False) if h is not None]
        if len(found) != len(self.homes) or not all(has_dims_more(x, h, x.ndim - h.ndim) for x, h in pairs):
            raise ValueError(
                f"{self.owner}: the state does not lie on the processes as the leaves do: make it with tx.init(params)"
            )
        return torch.cat([as_real(local(x)).unsqueeze(-1).flatten(x.ndim - h.ndim).to(dtype) for x, h in pairs], -1)


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What has the shape of a tensor, and the dtype that its entries have in a vector."""
    return torch.empty_like(x, dtype=torch.promote_types(x.dtype, dtype), device="meta")
