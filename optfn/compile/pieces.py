"""Tensors that lie on several processes, taken off at the boundary of a step: its program sees the pieces of this process.

The step itself is handed such tensors also while it is traced, and the lift takes their pieces. What processes say to each other
stays in the graph, in the order in which the step says it.
"""

from typing import Any

import torch
from torch import Tensor

from optfn.compile import internals
from optfn.sharding import is_debugging, is_sharded

__all__ = ["Pieces"]


class Pieces:
    """Which tensors of a call lie on several processes, and how.

    Args:
        tensors: those of the first call.

    Attributes:
        places: which of them do.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.places = [i for i, x in enumerate(tensors) if is_sharded(x)]
        given: list[Any] = [tensors[i] for i in self.places]
        self.specs = [x._spec for x in given]
        self.guards = internals.Guards(given) if given else None
        self.world = _world() if given else None
        self.debugging = bool(given) and is_debugging()

    def are_sums(self) -> bool:
        """Whether some are sums over processes that are still to be made."""
        return any(p.is_partial() for spec in self.specs for p in spec.placements)

    def join(self) -> None:
        """Hold for this group of all processes alone."""
        self.world = _world()

    def of(self, tensors: list[Any]) -> list[Tensor] | None:
        """The pieces of tensors that lie as those of the first call do, plain ones as they are; None if they lie otherwise."""
        if self.world is not None and _world() is not self.world:
            return None
        if self.guards is None:
            return tensors
        given = [tensors[i] for i in self.places]
        if not self.guards.fit(given) or [x._spec for x in given] != self.specs or is_debugging() != self.debugging:
            return None
        pieces = list(tensors)
        for i, x in zip(self.places, given, strict=True):
            pieces[i] = x._local_tensor
        return pieces


def _world() -> Any:
    return torch.distributed.group.WORLD
