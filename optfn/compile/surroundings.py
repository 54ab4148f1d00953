"""What Dynamo does not guard of what a function reads, looked at before each call that is left to it.

Dynamo guards what a function reads, but takes some things for constants (torch 2.13): what stands in a class, hooks of all
modules, and what some functions and attributes answer. The classes that a function can reach are looked at here; a function that
asks for one of the others is not compiled.
"""

import contextlib
import dis
import inspect
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from optfn.compile.closure import Bindings

__all__ = ["Surroundings"]

# Names of what Dynamo takes for constant, though it changes, or gives a value where torch raises. Whoever has one of them for
# something else loses speed.
_NOT_FOR_DYNAMO = {"one_hot", "getenv", "getrecursionlimit", "is_leaf", "_base", "_is_view", "is_neg", "is_conj"}
_OF_NO_USER = {*sys.stdlib_module_names, "numpy", "optfn", "torch"}
_DEPTH = 4  # of containers and attributes


class Surroundings:
    """The classes that a function can reach, and whether it may be compiled at all.

    Attributes:
        compiles: False for a function that asks for what Dynamo gets wrong.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.compiles = True
        self.bindings = Bindings()
        self.seen: dict[int, Any] = {}
        self.reach(fn, 0)

    def hold(self) -> bool:
        """Whether all classes are as they were."""
        return self.bindings.hold()

    def reach(self, x: Any, depth: int) -> None:
        """Anything that the function can get hold of."""
        if depth > _DEPTH or id(x) in self.seen:
            return
        self.seen[id(x)] = x
        if isinstance(x, types.MethodType):
            self.reach(x.__self__, depth)
            self.reach(x.__func__, depth)
        elif isinstance(x, types.FunctionType):
            if _owner(x.__globals__.get("__name__")) not in _OF_NO_USER:
                self.code(x.__code__, x)
            for cell in x.__closure__ or ():
                with contextlib.suppress(ValueError):  # a variable that is not bound
                    self.reach(cell.cell_contents, depth + 1)
        elif isinstance(x, torch.nn.Module):
            for module in x.modules():
                self.kind(type(module))
            for name, hooks in vars(torch.nn.modules.module).items():
                if name.startswith("_global_") and isinstance(hooks, dict):
                    self.look(lambda x: tuple(x.values()), hooks)
        elif isinstance(x, list | tuple | set | frozenset | dict):
            children: Any = x.values() if isinstance(x, dict) else x
            for child in children:
                self.reach(child, depth + 1)
        elif isinstance(x, random.Random) or type(x).__module__.startswith("numpy.random"):
            self.compiles = False
        elif isinstance(x, type):
            self.kind(x)
        elif not isinstance(x, types.ModuleType) and _owner(type(x).__module__) not in _OF_NO_USER:
            self.kind(type(x))
            for child in getattr(x, "__dict__", {}).values():
                self.reach(child, depth + 1)

    def kind(self, kind: type) -> None:
        """A class, those that it is made of, and its own class."""
        classes: list[Any] = [*inspect.getmro(kind), *inspect.getmro(type(kind))]
        for of in classes:
            if _owner(of.__module__) not in _OF_NO_USER and id(of) not in self.seen:
                self.seen[id(of)] = of
                self.look(lambda x: (*vars(x), *vars(x).values()), of)
                for f in vars(of).values():
                    f = getattr(f, "__func__", getattr(f, "fget", f))
                    self.reach(f if isinstance(f, types.FunctionType) else None, 0)

    def look(self, look: Callable[[Any], tuple[Any, ...]], x: Any) -> None:
        """Have the insides of a thing looked at."""
        self.bindings.looks.append((look, x, look(x)))

    def code(self, code: types.CodeType, f: types.FunctionType) -> None:
        """What a piece of code of ``f`` names."""
        names = {i.argval for i in dis.get_instructions(code) if isinstance(i.argval, str)}
        if names & _NOT_FOR_DYNAMO:
            self.compiles = False
        for name in names:
            x = f.__globals__.get(name)
            if isinstance(x, types.ModuleType):
                for attribute in names & {*vars(x)} if _owner(x.__name__) not in _OF_NO_USER else ():
                    self.reach(vars(x)[attribute], 1)
            else:
                self.reach(x, 1)
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                self.code(inner, f)


def _owner(name: Any) -> str:
    return str(name).partition(".")[0]
