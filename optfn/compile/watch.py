"""What a function asks of tensors while it is traced, besides what operators give."""

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from optfn.compile import internals
from optfn.sharding import like

__all__ = ["NotTraceableError", "Watch"]


class NotTraceableError(Exception):
    """What a function does cannot be written down as a graph of pure calls on tensors; the message says why."""


class Watch(TorchFunctionMode):
    """Refuses what a trace cannot stand for.

    Traced tensors hold no numbers, no gradient, no attributes that somebody has set on a parameter, no memory. A function that
    asks for one of these would get an answer that is wrong, or that was right only once. The kinds of tensors are guarded, so they
    may be asked for; so may ``requires_grad`` of an argument, and whether it is a parameter.

    A refusal is an exception, and is kept too: the function may catch it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: str | None = None
        self.requires_grad: dict[int, tuple[Tensor, bool]] = {}  # an id is that of one tensor for as long as the tensor lives
        self.known: dict[Any, bool] = {}

    def argument(self, traced: Tensor, given: Tensor, piece_of: Any = None) -> Tensor:
        """The traced tensor that stands for a given one, or for one of which it is a piece, to hand to the function."""
        if piece_of is not None:
            traced, given = like(self.argument(traced, given), piece_of), piece_of
            traced.__class__ = _sharded_argument()
        else:
            traced.__class__ = _Argument
            traced._is_param = isinstance(given, torch.nn.Parameter)  # type: ignore[attr-defined]
        traced._watch = self  # type: ignore[attr-defined]
        # Not the given tensor: what was traced is a cycle, and keeps all that it knows until the collector comes by.
        self.requires_grad[id(traced)] = traced, given.requires_grad
        return traced

    def refuse(self, what: str) -> None:
        """Say that the function cannot be traced."""
        self.refused = self.refused or what
        raise NotTraceableError(what)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        allowed = self.known.get(func)
        if allowed is None:
            allowed = self.known[func] = internals.is_operator(func) or internals.is_read_off_kind(func)
        # The transforms of torch.func ask for more than the functions that they transform, of tensors of their own.
        if allowed or internals.is_of_transforms(sys._getframe(1)):  # pyright: ignore[reportPrivateUsage]
            return func(*args, **(kwargs or {}))
        if internals.is_requires_grad(func) and id(args[0]) in self.requires_grad:
            return self.requires_grad[id(args[0])][1]
        name = func.__self__.__name__ if getattr(func, "__name__", "") == "__get__" else getattr(func, "__name__", func)
        return self.refuse(f"{name} of a tensor is asked for")


def _attribute(self: Any, name: str) -> Any:
    """What a traced tensor is asked for that tensors do not have."""
    if name == "_is_param":
        return self._watch.refuse("whether a tensor that lies on several processes is a parameter is asked for")
    if name == "_watch" or str(sys._getframe(1).f_globals.get("__name__")).startswith("torch."):  # pyright: ignore[reportPrivateUsage]
        raise AttributeError(name)  # it looks for some of its own
    return self._watch.refuse(f"the attribute {name!r} of a tensor is asked for")


class _Argument(Tensor):
    """A traced tensor that knows when it is asked for an attribute that tensors do not have."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl  # pyright: ignore[reportPrivateUsage]
    __getattr__ = _attribute
    _watch: Watch


@functools.cache
def _sharded_argument() -> Any:
    """The same for a tensor that lies on several processes."""
    from torch.distributed.tensor import DTensor

    return type("_ShardedArgument", (DTensor,), {"__slots__": (), "__getattr__": _attribute})
