"""What a function reads besides its arguments, and whether that can change."""

import dis
import enum
import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from optfn.compile.internals import OpOverload, OpOverloadPacket

__all__ = ["Bindings", "bindings"]

_CONSTANT = (
    *(type(None), type(...), bool, int, float, complex, str, bytes, range, type, enum.Enum, types.ModuleType),
    *(types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.finfo, torch.iinfo),
    *(OpOverload, OpOverloadPacket),
)
# Functions of these packages read nothing that changes what they compute; what is made by optfn never changes.
_KNOWN = ("torch", "optfn", "optree", "math", "operator", "functools", "itertools", "collections", "typing", "builtins")


class Bindings:
    """The names that a function and those that it calls find outside of their arguments, and what they stood for."""

    def __init__(self) -> None:
        self.cells: list[tuple[Any, Any]] = []
        self.globals: list[tuple[dict[str, Any], str, Any]] = []

    def hold(self) -> bool:
        """Whether every name still stands for the same object."""
        for cell, value in self.cells:
            if cell.cell_contents is not value:
                return False
        return all(names.get(name) is value for names, name, value in self.globals)


def bindings(fn: Callable[..., Any]) -> Bindings | None:
    """What ``fn`` reads besides its arguments, if none of it can change but by being bound anew.

    Numbers, functions, and transformations of this library cannot change; tensors are read where they lie. A module, a list, a
    dict, an object with attributes can: then the answer is None.
    """
    found, seen = Bindings(), {id(None): None}

    def fixed(value: Any, ours: bool) -> bool:
        if isinstance(value, _CONSTANT) or type(value) in (torch.Tensor, torch.nn.Parameter) or id(value) in seen:
            return True
        seen[id(value)] = value
        if isinstance(value, tuple | frozenset) or (ours and isinstance(value, list | set)):
            return all(fixed(x, ours) for x in value)
        if ours and isinstance(value, dict):
            return all(fixed(x, ours) for x in value.values())
        if isinstance(value, functools.partial):
            return all(fixed(x, ours) for x in (value.func, value.args, *value.keywords.values()))
        return isinstance(value, types.FunctionType) and function(value)

    def function(value: types.FunctionType) -> bool:
        known = (value.__module__ or "").split(".")[0] in _KNOWN
        inside: list[Any] = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        for cell in value.__closure__ or ():
            try:
                inside.append(cell.cell_contents)
            except ValueError:  # not bound yet
                return False
            if not known:
                found.cells.append((cell, cell.cell_contents))
        if not known:
            for name in _global_names(value.__code__):
                if name in value.__globals__:
                    inside.append(value.__globals__[name])
                    if not isinstance(inside[-1], types.ModuleType):
                        found.globals.append((value.__globals__, name, inside[-1]))
        return all(fixed(x, known) for x in inside)

    return found if fixed(fn, False) else None


def _global_names(code: types.CodeType) -> set[str]:
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_global_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))
