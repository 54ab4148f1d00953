"""What a function reads besides its arguments, and the proof that none of it changes unseen.

Whatever is not known here counts as changeable. A thing is known by what it is: a module by its own dict, a function by the globals
that it runs in and by its code, a class by what stands in it. A name is only looked up where the function would look it up.
"""

import _operator
import builtins
import collections
import dis
import functools
import inspect
import math
import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

import optree
import torch
from torch import Tensor

from optfn.compile import internals
from optfn.compile.internals import OpOverload, OpOverloadPacket
from optfn.compile.structure import is_named_tuple

__all__ = ["Bindings", "bindings", "is_plain_class", "same_number"]

_NOTHING: Any = object()

_NUMBERS = (bool, int, float, complex)
_IMMUTABLE = {
    *(type(None), type(...), *_NUMBERS, str, bytes, range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.finfo, torch.iinfo),
    *(OpOverload, OpOverloadPacket),
}
_TYPES = {
    *(*_NUMBERS, str, bytes, list, tuple, dict, set, frozenset, range, slice, enumerate, filter, map, reversed, zip),
    *(collections.OrderedDict, collections.defaultdict, functools.partial, ValueError, TypeError, RuntimeError, KeyError),
    *(torch.Tensor, torch.nn.Parameter, torch.Size, torch.device, torch.dtype, torch.finfo, torch.iinfo),
    *(torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.autocast),
}
_FUNCTIONS = {
    *(abs, all, any, callable, divmod, isinstance, issubclass, iter, len, max, min, next, pow, round, sorted, sum),
    *(functools.reduce, torch.is_tensor, torch.is_grad_enabled, torch.get_default_dtype),
}
# Packages and modules whose functions compute with nothing but their arguments and the state of torch that is guarded.
_PACKAGES = {
    "optfn": __file__.removesuffix(os.path.join("compile", "closure.py")),
    "optree": os.path.join(os.path.dirname(optree.__file__), ""),
    **dict.fromkeys(
        ("torch._functorch", "torch._jit_internal", "torch._tensor"), os.path.join(os.path.dirname(torch.__file__), "")
    ),
    **dict.fromkeys(("torch.functional", "torch.nn.functional"), os.path.join(os.path.dirname(torch.__file__), "")),
    **{module.__name__: module.__file__ or "" for module in (functools, operator)},
}

# What changes something, or looks where no name says.
_FORBIDDEN = {
    *("IMPORT_NAME", "IMPORT_FROM", "IMPORT_STAR", "LOAD_BUILD_CLASS", "LOAD_NAME", "LOAD_LOCALS", "LOAD_CLASSDEREF"),
    *("LOAD_FROM_DICT_OR_DEREF", "LOAD_FROM_DICT_OR_GLOBALS", "LOAD_SUPER_ATTR", "SETUP_ANNOTATIONS", "PRINT_EXPR"),
    *("STORE_NAME", "STORE_GLOBAL", "STORE_ATTR", "DELETE_NAME", "DELETE_GLOBAL", "DELETE_ATTR", "DELETE_DEREF"),
    *("GET_AWAITABLE", "GET_AITER", "GET_ANEXT", "BEFORE_ASYNC_WITH", "SEND", "MATCH_CLASS"),
}
_LOOKS_UP = {"format", "format_map", "func", "keywords"}  # what these find is not seen here
_OF_TENSORS = dict(vars(torch.Tensor))
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
_ALWAYS_IN_A_NAMED_TUPLE = {
    *("__slots__", "__doc__", "__module__", "__annotations__", "__orig_bases__", "__match_args__", "__new__", "__repr__"),
    *("_fields", "_field_defaults", "_make", "_replace", "__replace__", "_asdict", "__getnewargs__"),
    *(
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__classdictcell__",
        "__firstlineno__",
        "__static_attributes__",
    ),
}


class _ChangeableError(Exception):
    """Something that the function reads may change unseen."""


class Bindings:
    """What a function and those that it calls find outside of their arguments.

    Attributes:
        tensors: those that they can reach. Their numbers are read where they lie; their kinds are for the caller to guard.
        names: a dict, a name in it, and what the name stands for, or that it stands for nothing.
        cells: a variable of an enclosing function, and what it holds.
        looks: what gives the insides of a thing as a tuple, the thing, and the insides.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.names: list[tuple[dict[str, Any], str, Any]] = []
        self.cells: list[tuple[Any, Any]] = []
        self.looks: list[tuple[Callable[[Any], tuple[Any, ...]], Any, tuple[Any, ...]]] = []

    def hold(self) -> bool:
        """Whether all of it is as it was."""
        for names, name, value in self.names:
            now = names.get(name, _NOTHING)
            if now is not value and not same_number(now, value):
                return False
        try:
            for cell, value in self.cells:
                if cell.cell_contents is not value and not same_number(cell.cell_contents, value):
                    return False
        except ValueError:  # deleted
            return False
        for look, thing, inside in self.looks:
            found = look(thing)
            if len(found) != len(inside) or not all(map(operator.is_, found, inside)):
                return False
        return not any(map(_attributes, self.tensors))


def same_number(a: Any, b: Any) -> bool:
    """Whether two numbers cannot be told apart: by type, by sign of zero, and a NaN is itself.

    Example:
        >>> same_number(1, 1), same_number(1, True), same_number(0.0, -0.0), same_number(float("nan"), float("nan"))
        (True, False, False, True)
    """
    return type(a) is type(b) and type(a) in _NUMBERS and (a == b or a != a) and repr(a) == repr(b)


def bindings(fn: Callable[..., Any], classes: Iterable[type] = ()) -> Bindings | None:
    """What ``fn`` reads besides its arguments, if none of it can change unseen; None if something may.

    Numbers, functions and transformations of this library are guarded by identity, tensors are read where they lie. A module of
    neural networks, a list, a dict, an object with attributes can change in ways that cost more to guard than they save.

    Args:
        fn: the function.
        classes: the NamedTuples among its arguments.
    """
    try:
        found = _Reader()
        for kind in classes:
            found.named_tuple(kind)
        found.value(fn)
    except _ChangeableError as reason:
        internals.log.debug("%s is left to Dynamo: %s", fn, reason)
        return None
    return found.bindings


def is_plain_class(kind: type) -> bool:
    """Whether a class is a NamedTuple that has fields, and nothing else that a function could read.

    Example:
        >>> class Point(NamedTuple):
        ...     x: float
        >>> is_plain_class(Point)
        True
    """
    extra = {*vars(kind)} - _ALWAYS_IN_A_NAMED_TUPLE - {*getattr(kind, "_fields", ())}
    return is_named_tuple(kind) and type(kind) is type and not extra


@functools.cache
def _attribute_names() -> frozenset[str]:
    """Attributes of what does not change, or is the function's own: tensors, containers, numbers, and entries of our states."""
    public = vars(sys.modules[__name__.partition(".")[0]])  # of the package, which stands above this file
    fields = [name for kind in public.values() if isinstance(kind, type) for name in getattr(kind, "_fields", ())]
    names = {name for kind in (*_IMMUTABLE, *_TYPES) for name in dir(kind)} | {*fields}
    return frozenset(name for name in names if not name.startswith("__") and name not in _LOOKS_UP)


def _attributes(x: Any) -> dict[str, Any]:
    return x.__dict__


def _of_function(f: Any) -> tuple[Any, ...]:
    named = f.__kwdefaults__ or {}
    return (f.__code__, f.__defaults__, *named, *named.values(), *f.__dict__, *f.__dict__.values())


def _of_partial(f: Any) -> tuple[Any, ...]:
    return (f.func, f.args, *f.keywords, *f.keywords.values(), *f.__dict__)


def _of_mapping(x: Any) -> tuple[Any, ...]:
    return (*x, *x.values())


def _is_group(x: Any) -> bool:
    """Whether something is a group of processes, or a mesh of them."""
    meshes = sys.modules.get("torch.distributed.device_mesh")  # who has a mesh has imported it
    if meshes is None or not torch.distributed.is_available():
        return False
    return isinstance(x, meshes.DeviceMesh | torch.distributed.ProcessGroup)


def _is_known(names: dict[str, Any]) -> bool:
    """Whether these are the globals of a module whose functions are known."""
    name: Any = names.get("__name__")
    module: Any = sys.modules.get(name) if isinstance(name, str) else None
    if module is None or vars(module) is not names:
        return False
    parts = name.split(".")
    place = next((x for i in range(len(parts), 0, -1) if (x := _PACKAGES.get(".".join(parts[:i])))), None)
    return place is not None and (module.__file__ or "").startswith(place)


class _Reader:
    """Walks from a function to everything that it can reach."""

    def __init__(self) -> None:
        self.bindings = Bindings()
        self.seen: dict[Any, Any] = {}  # an id is that of one thing for as long as the thing lives
        self.fields: set[str] = set()  # of NamedTuples of the user's

    def value(self, x: Any, *, ours: bool = False) -> None:
        """What the function may do anything with: hand on, call, ask for attributes.

        Args:
            x: the value.
            ours: whether it lies inside a known function, where lists and dicts are guarded by what they hold.
        """
        # What has been found inside of a known function is not yet found fit for the user's own.
        if type(x) in _IMMUTABLE or (id(x), ours) in self.seen:
            return
        self.seen[id(x), ours] = x
        kind: Any = type(x)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            self.tensor(x)
        elif kind is tuple or kind is frozenset or is_named_tuple(kind):
            if kind not in (tuple, frozenset):
                self.named_tuple(kind)
            self.values(x, ours)
        elif kind is types.FunctionType:
            self.function(x)
        elif kind is slice:
            self.values((x.start, x.stop, x.step), ours)
        elif kind is inspect.Signature:
            self.require(ours, "a signature")
        elif kind is functools.partial:
            self.look(_of_partial, x)
            self.values((x.func, x.args, *x.keywords.values()), ours)
            self.require(not x.__dict__, "an attribute of a partial")
        elif kind is type:
            self.require(x in _TYPES, f"the class {x.__qualname__}") if not is_named_tuple(x) else self.named_tuple(x)
        elif isinstance(x, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
            self.require(_is_known_builtin(x), f"the function {x.__name__}")
        elif ours and kind in (list, set):
            self.look(tuple, x)
            self.values(x, ours)
        elif ours and kind in (dict, collections.OrderedDict, types.MappingProxyType):
            self.look(_of_mapping, x)
            self.values(x.values(), ours)
        elif ours and _is_group(x):
            pass  # which processes are in it does not change
        elif x is typing.Any or kind is types.UnionType or typing.get_origin(x) in _TYPES:
            self.values(typing.get_args(x), ours)  # an annotation
        else:
            self.require(x in _TYPES if isinstance(x, type) else False, f"an object of {kind.__qualname__}")

    def values(self, xs: Iterable[Any], ours: bool) -> None:
        for x in xs:
            self.value(x, ours=ours)

    def require(self, held: bool, what: str) -> None:
        if not held:
            raise _ChangeableError(f"{what} may change")

    def look(self, look: Callable[[Any], tuple[Any, ...]], x: Any) -> None:
        self.bindings.looks.append((look, x, look(x)))

    def tensor(self, x: Tensor) -> None:
        self.require(x.layout == torch.strided and not x.is_meta and not _attributes(x), "a tensor with attributes of its own")
        self.bindings.tensors.append(x)

    def named_tuple(self, kind: type) -> None:
        if id(kind) in self.seen or _is_known_class(kind):
            return
        self.seen[id(kind)] = kind
        self.require(is_plain_class(kind), f"what stands in the class {kind.__qualname__}")
        self.fields.update(getattr(kind, "_fields", ()))
        self.look(lambda x: _of_mapping(vars(x)), kind)
        self.look(_of_function, getattr(kind, "__new__"))  # noqa: B009

    def function(self, f: types.FunctionType) -> None:
        known = _is_known(f.__globals__)
        self.values((*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values(), *f.__dict__.values()), known)
        if not known:
            self.look(_of_function, f)
            self.code(f.__code__, f, dict(zip(f.__code__.co_freevars, f.__closure__ or (), strict=True)))
            return
        for cell in f.__closure__ or ():
            try:
                self.value(cell.cell_contents, ours=True)
            except ValueError as unbound:
                raise _ChangeableError("a variable that is not bound yet may be") from unbound

    def code(self, code: types.CodeType, f: types.FunctionType, cells: dict[str, Any]) -> None:
        """All that a piece of code of ``f`` finds by name; ``cells`` are variables of functions around ``f``."""
        self.require(not code.co_flags & inspect.CO_COROUTINE, "a coroutine")
        instructions = list(dis.get_instructions(code))
        placed: set[int] = set()  # attributes that are asked of what is known
        for i, step in enumerate(instructions):
            self.require(step.opname not in _FORBIDDEN, f"with {step.opname}, something")
            attributes: list[str] = []
            for after in instructions[i + 1 :]:
                if after.opname not in _ATTRIBUTE:
                    break
                attributes.append(after.argval)
            if step.opname == "LOAD_GLOBAL":
                placed.update(range(i + 1, i + 1 + self.attribute(self.named(f, step.argval), attributes)))
            elif "DEREF" in step.opname and step.argval in cells:
                self.require(step.opname == "LOAD_DEREF", f"the variable {step.argval}")
                placed.update(range(i + 1, i + 1 + self.attribute(self.held(cells[step.argval], step.argval), attributes)))
            elif step.opname in _ATTRIBUTE and i not in placed:
                self.of_anything(step.argval)
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                shared = {*inner.co_freevars} - {*code.co_cellvars}
                self.code(inner, f, {name: cell for name, cell in cells.items() if name in shared})

    def of_anything(self, name: str) -> None:
        """An attribute of who knows what: a tensor, a container, a number, an entry of a NamedTuple."""
        kinds: Any = vars(torch.Tensor)
        value = kinds.get(name, _NOTHING)
        self.bindings.names.append((kinds, name, value))
        self.require(value is _OF_TENSORS.get(name, _NOTHING), f"the attribute {name} of tensors")
        self.require(name in _attribute_names() or name in self.fields, f"the attribute {name}")

    def named(self, f: types.FunctionType, name: str) -> Any:
        for names in (f.__globals__, f.__builtins__):  # pyright: ignore[reportAttributeAccessIssue]
            value = names.get(name, _NOTHING)
            self.bindings.names.append((names, name, value))
            if value is not _NOTHING:
                return value
        raise _ChangeableError(f"the name {name}, which stands for nothing, may change")

    def held(self, cell: Any, name: str) -> Any:
        try:
            value = cell.cell_contents
        except ValueError as unbound:
            raise _ChangeableError(f"the variable {name}, which is not bound, may change") from unbound
        self.bindings.cells.append((cell, value))
        return value

    def attribute(self, x: Any, attributes: list[str]) -> int:
        """A value of which the function asks these attributes, one of the other, before it does anything else with it.

        Returns:
            How many of them are of something known.
        """
        rest = list(attributes)
        while rest and (type(x) is types.ModuleType or rest[0] in getattr(type(x), "_fields", ())):
            name = rest.pop(0)
            if type(x) is types.ModuleType:
                names = vars(x)
                self.require(name in names, f"the attribute {name} of {x.__name__}")
                self.bindings.names.append((names, name, names[name]))
                x = names[name]
            else:
                self.named_tuple(type(x))
                x = getattr(x, name)
        self.require(not isinstance(x, types.ModuleType), "a module as a value")
        if isinstance(x, types.FunctionType):
            self.look(_of_function, x)
            self.require(not rest or rest[0] in x.__dict__, "an attribute of a function")
            rest = rest[1:]
        elif isinstance(x, type) and rest:
            self.require(x in _TYPES and hasattr(x, rest[0]), f"an attribute of {x.__qualname__}")
            rest = rest[1:]
        self.value(x)
        return len(attributes) - len(rest)


def _is_known_class(kind: type) -> bool:
    names = vars(sys.modules.get(kind.__module__, builtins))
    return _is_known(names) and names.get(kind.__qualname__) is kind


def _is_known_builtin(f: Any) -> bool:
    of = getattr(f, "__self__", None)
    if isinstance(of, types.ModuleType) or of is None:
        return of is math or of is _operator or f in _FUNCTIONS or internals.is_operator(f) or _is_method(f)
    return False  # a method of some object, which it may read or change


def _is_method(f: Any) -> bool:
    return getattr(f, "__objclass__", None) in _TYPES
