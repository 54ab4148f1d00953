"""Donation: which result takes the place of which argument, and which tensors may be donated."""

import bisect
import inspect
import itertools
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from optfn import tree
from optfn.sharding import is_sharded, same_layout

__all__ = ["Memory", "check_memory", "copy", "donated_arguments", "replacements"]


def donated_arguments(signature: inspect.Signature, donate: str | int | Iterable[str | int]) -> list[tuple[int, str]]:
    """Position and name of the donated arguments, in the order of the signature; an argument by name alone has no position."""
    names = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    chosen = [donate] if isinstance(donate, str | int) else list(donate)
    for which in chosen:
        if which not in names if isinstance(which, str) else not 0 <= which < len(names):
            raise ValueError(f"donate: the function has no argument {which!r}; its arguments are {', '.join(names)}")
    wanted = {which if isinstance(which, str) else names[which] for which in chosen}
    by_name = {p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    return [(sys.maxsize if name in by_name else i, name) for i, name in enumerate(names) if name in wanted]


def check_memory(arguments: dict[str, Any], donated: set[str]) -> None:
    """Raise if a donated leaf is no tensor with memory of its own: one that no other argument has, and no two of its entries."""
    spans: list[tuple[int, int, bool, str, int]] = []
    seen: dict[int, tuple[bool, str, int]] = {}

    def shared(first: tuple[Any, ...], second: tuple[Any, ...]) -> ValueError:
        one, other = (_path(name, arguments[name], i) for *_, name, i in (first, second))
        return ValueError(f"donate: {one!r} and {other!r} share memory: a donated tensor may appear once; clone one of them")

    for name, argument in arguments.items():
        given = name in donated
        leaves: list[Any] = [x._local_tensor if is_sharded(x) else x for x in tree.flatten(argument)[0]]
        for i, x in enumerate(leaves):
            if x is None or (not given and (not isinstance(x, Tensor) or x.layout != torch.strided)):
                continue
            if not isinstance(x, Tensor) or x.layout != torch.strided:
                kind = x.layout if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"donate: {_path(name, argument, i)!r} must be a dense tensor, got {kind}")
            if given and not _distinct(x):
                raise ValueError(f"donate: {_path(name, argument, i)!r} is expanded: its entries share memory; donate x.clone()")
            owner = (given, name, i)
            earlier = seen.setdefault(id(x), owner)
            if earlier is not owner and (given or earlier[0]):
                raise shared(earlier, owner)
            if x.numel() and (begin := x.data_ptr()):
                extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
                spans.append((begin, begin + extent * x.element_size(), *owner))

    spans.sort()
    furthest: dict[bool, tuple[Any, ...]] = {}
    for span in spans:
        for given, before in furthest.items():
            if span[0] < before[1] and (given or span[2]):
                raise shared(before, span)
        if span[2] not in furthest or furthest[span[2]][1] < span[1]:
            furthest[span[2]] = span


def _path(name: str, argument: Any, i: int) -> str:
    return ".".join(filter(None, (name, tree.paths(argument)[i])))


def _distinct(x: Tensor) -> bool:
    """Whether every entry of a tensor has a place of its own in memory: each stride steps over what the smaller ones reach."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return x.numel() == 0
            extent += (size - 1) * stride
    return True


def replacements(leaves: list[Any], spec: Any, given: list[tuple[str, Any]]) -> dict[int, Any]:
    """Which donated tensor each leaf of the result is written to."""
    parts: list[tuple[Any, int]] = [(spec, 0)]  # the result, what it is made of and so on, and where their leaves begin
    reached = 0
    while reached < len(parts):
        part, start = parts[reached]
        reached += 1
        for child in part.children():
            parts.append((child, start))
            start += child.num_leaves

    targets: dict[int, Any] = {}

    def fits(i: int, x: Any) -> bool:
        y = leaves[i]
        if x is None or not isinstance(y, Tensor):
            return x is None and y is None
        alike = x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and y.layout == torch.strided
        return i not in targets and alike and same_layout(x, y)

    rest: list[tuple[str, Any]] = []
    for name, argument in given:
        wanted, structure = tree.flatten(argument)
        for part, start in parts:
            if part.num_leaves == len(wanted) and part == structure and all(fits(start + j, x) for j, x in enumerate(wanted)):
                targets.update({start + j: x for j, x in enumerate(wanted) if x is not None})
                break
        else:
            rest.append((name, argument))
    for name, argument in rest:
        for j, x in enumerate(tree.flatten(argument)[0]):
            place = next((i for i in range(len(leaves)) if x is not None and fits(i, x)), None)
            if place is not None:
                targets[place] = x
            elif x is not None:
                raise ValueError(
                    f"donate: {_path(name, argument, j)!r} is {x.dtype} of shape {tuple(x.shape)}, and no result of that kind is "
                    f"left to replace it; return its new value, or do not donate {name!r}"
                )
    return targets


@torch.library.custom_op("optfn::copy", mutates_args=())
def copy(x: Tensor) -> Tensor:
    """A copy that is made before the graph writes to ``x``.

    Inductor takes for an input itself whatever it can see to equal it (a clone, a slice of everything, the half of a
    concatenation), also where the input is overwritten before that is used, as in ``a, b = b, a`` (seen in torch 2.13).
    It cannot see through this operator until it generates code, where it is a clone and costs nothing.
    """
    return x.clone()


@copy.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Memory:
    """Where tensors of known sizes lie, and whether any that is donated shares memory with another.

    Most calls are made with the tensors of the call before, or with new gradients beside the same parameters: only what has moved
    is looked at.
    """

    def __init__(self, tensors: list[Tensor], donated: list[int]) -> None:
        extents = [1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) for x in tensors]
        self.lengths = [n * x.element_size() if x.numel() else 0 for n, x in zip(extents, tensors, strict=True)]
        self.donated = [i for i in donated if self.lengths[i]]
        self.others = [i for i in range(len(tensors)) if self.lengths[i] and i not in {*donated}]
        self.starts: tuple[int, ...] = ()
        self.order: list[tuple[int, int]] = []  # where donated tensors begin and end

    def apart(self, tensors: list[Tensor]) -> bool:
        """Whether each donated tensor has memory of its own."""
        starts = tuple(map(Tensor.data_ptr, tensors))
        if starts == self.starts:
            return True
        before = self.starts or (None,) * len(starts)
        self.starts = ()
        moved = any(starts[i] != before[i] for i in self.donated)
        if moved:
            self.order = sorted((starts[i], starts[i] + self.lengths[i]) for i in self.donated)
            if any(end > begin for (_, end), (begin, _) in itertools.pairwise(self.order)):
                return False
        for i in self.others:
            if moved or starts[i] != before[i]:
                # The last donated tensor that begins before this one ends.
                at = bisect.bisect_left(self.order, (starts[i] + self.lengths[i],)) - 1
                if at >= 0 and self.order[at][1] > starts[i]:
                    return False
        self.starts = starts
        return True
