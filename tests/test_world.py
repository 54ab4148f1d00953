# ruff: noqa: E501 -- a row's program is one string
"""A world that changes: whatever a step can read besides its tensors, changed between calls; eager and compiled stay equal.

A row is a user's program, a module of its own that is written to a file and imported, and what changes it. The program runs twice,
once with its step as it is and once with its step compiled: each call must give the same values, dtypes, containers and orders of
keys, or raise with the arguments as they were. What may raise instead of computing says so.
"""

import copy
import importlib
import itertools
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import interpreted
from torch import Tensor

import optfn
from optfn.compile import internals

Unsupported = torch._dynamo.exc.Unsupported


@dataclass(frozen=True)
class World:
    """A user's program.

    Attributes:
        before: the program's text. It may define ``step``; ``given(p, g)``, the arguments of a call; ``context()``, in which calls
            are made; ``call(step, *args)``, how they are made.
        after: what is executed in the program to change it.
        settings: the text of a second module, which the program imports under this name.
        may_raise: errors that the compiled step may raise where the eager one raises none.
        donate: what is donated.
        undo: what is executed at the end, where the program has changed more than itself.
        varies: whether the eager results must have changed at the end; False for rows where they must not.
    """

    before: str
    after: str
    settings: str = ""
    may_raise: tuple[type[Exception], ...] = ()
    donate: str = "p"
    undo: str = ""
    varies: bool = True


PRELUDE = """
import collections, contextlib, contextvars, copy, dataclasses, datetime, enum, functools, importlib, inspect, io, itertools, math
import operator, os, random, sys, threading, time, types, typing, uuid, weakref
import numpy as np
import optree
import torch
import optfn
from torch import Tensor, nn
context = contextlib.nullcontext
def given(p, g): return p, g
def call(step, *args): return step(*args)
"""
WORLDS: dict[str, World] = {}


def world(name: str, before: str, result: str, after: str, x: str = "", **options: Any) -> None:
    """A row whose step returns the expression ``result`` of ``p``, a tensor, of ``g``, a dict of tensors, and of ``x``.

    Args:
        x: the expression of a third argument, computed at each call; none by default.
    """
    before = PRELUDE + textwrap.dedent(before) + "\n"
    if x:
        before += f"def given(p, g): return p, g, {x}\n"
    if result:
        before += f"def step(p, g{', x' if x else ''}): return {result}\n"
    assert name not in WORLDS
    WORLDS[name] = World(before, textwrap.dedent(after), **options)


def numbers_of(kind: str, pairs: dict[str, tuple[str, str]], result: str, **options: Any) -> None:
    """A row for each pair of values, as a global and as an argument."""
    for name, (old, new) in pairs.items():
        world(f"{kind}: global, {name}", f"k = {old}", re.sub(r"\bx\b", "k", result), f"k = {new}", **options)
        world(f"{kind}: argument, {name}", f"k = {old}", result, f"k = {new}", x="k", **options)


# Globals

world("global: number", "k = 2.0", "p * k", "k = 3.0")
world("global: tensor bound anew", "k = torch.tensor(2.0)", "p * k", "k = torch.tensor(3.0)")
world("global: tensor of another dtype", "k = torch.ones(1)", "(p, p * k)", "k = torch.full((1,), 2.0, dtype=torch.float64)")
world("global: number to tensor", "k = 2.0", "(p, p * k)", "k = torch.full((1,), 3.0, dtype=torch.float64)")
world("global: number to None", "k = 2.0", "p if k is None else p * k", "k = None")
world("global: string", "k = 'a'", "p * len(k)", "k = 'bb'")
world("global: tuple", "k = (1.0, [2.0])", "p * k[1][0]", "k = (1.0, [3.0])")
world("global: list in a tuple", "k = (1.0, [2.0])", "p * k[1][0]", "k[1][0] = 3.0")
world("global: list item", "k = [2.0]", "p * k[0]", "k[0] = 3.0")
world("global: list longer", "k = [2.0]", "p * sum(k)", "k.append(3.0)")
world("global: dict item", "k = {'a': 2.0}", "p * k['a']", "k['a'] = 3.0")
world("global: dict longer", "k = {'a': 2.0}", "p * sum(k.values())", "k['b'] = 3.0")
world("global: dict reordered", "k = {'a': 2.0, 'b': 3.0}", "p * list(k.values())[0]", "k['a'] = k.pop('a')")
world("global: dict of dicts", "k = {'a': {'b': 2.0}}", "p * k['a']['b']", "k['a']['b'] = 3.0")
world("global: set", "k = {2.0}", "p * sum(k)", "k.add(3.0)")
world("global: key in a set", "k = {'a'}", "p * 2 if 'b' in k else p", "k.add('b')")
world("global: deque", "k = collections.deque([2.0])", "p * k[0]", "k.appendleft(3.0)")
world("global: ChainMap", "d = {'a': 2.0}\nk = collections.ChainMap(d)", "p * k['a']", "d['a'] = 3.0")
world("global: mapping proxy", "d = {'a': 2.0}\nk = types.MappingProxyType(d)", "p * k['a']", "d['a'] = 3.0")
world("global: namespace", "k = types.SimpleNamespace(a=2.0)", "p * k.a", "k.a = 3.0")
world("global: bytearray", "k = bytearray([2])", "p * k[0]", "k[0] = 3", may_raise=(Unsupported,))
world("global: function bound anew", "def f(p): return p * 2", "f(p)", "def f(p): return p * 3")
world("global: read by a function's function", "k = 2.0\ndef f(p): return p * k\ndef h(p): return f(p)", "h(p)", "k = 3.0")
world("global: deleted", "k = 2.0", "p * k", "del k")
world("global: one that hides a builtin", "", "p * len('ab')", "def len(x): return 3")
world("global: one that a step sets", "k = 2.0\ndef step(p, g):\n    global k\n    k += 1\n    return p * k", "", "k = 10.0")
world("global: by globals()", "k = 2.0", "p * globals()['k']", "k = 3.0")
world("global: by eval", "k = 2.0", "p * eval('k')", "k = 3.0", may_raise=(Unsupported,))
world("global: by sys.modules", "k = 2.0", "p * sys.modules[__name__].k", "k = 3.0")
world("global: in a comprehension", "k = 2.0", "sum([p * k for _ in range(2)])", "k = 3.0")
world("global: in a lambda of the step", "k = 2.0", "(lambda: p * k)()", "k = 3.0")
world(
    "global: in a class of the step",
    "k = 2.0\ndef step(p, g):\n    class C:\n        a = k\n    return p * C.a",
    "",
    "k = 3.0",
    may_raise=(Unsupported,),
)
world(
    "global: builtins changed",
    "import builtins\nbuiltins.rate_of_world = 2.0",
    "p * rate_of_world",
    "builtins.rate_of_world = 3.0",
    undo="del builtins.rate_of_world",
)

# Classes, objects and modules

OBJECT = "class A:\n    k = 2.0\n    def __init__(self): self.n = 2.0\n    def f(self, p): return p * self.n * self.k\na = A()\n"
world("class: attribute", OBJECT, "p * A.k", "A.k = 3.0")
world("class: attribute read by an instance", OBJECT, "p * a.k", "A.k = 3.0")
world("class: attribute that an instance hides", OBJECT, "p * a.k", "a.k = 3.0")
world("class: attribute of a base", OBJECT + "class B(A): pass", "p * B.k", "A.k = 3.0")
world("class: attribute of a metaclass", "class M(type): k = 2.0\nclass A(metaclass=M): pass", "p * A.k", "M.k = 3.0")
world("class: bound anew", OBJECT, "p * A.k", "class A: k = 3.0")
world("class: method replaced", OBJECT, "a.f(p)", "A.f = lambda self, p: p * 7")
world("class: classmethod", "class A:\n    k = 2.0\n    @classmethod\n    def f(cls, p): return p * cls.k", "A.f(p)", "A.k = 3.0")
world("class: staticmethod", "k = 2.0\nclass A:\n    @staticmethod\n    def f(p): return p * k", "A.f(p)", "k = 3.0")
world(
    "class: operator",
    "class A:\n    k = 2.0\n    def __radd__(self, p): return p * self.k\na = A()",
    "sum([p, a])",
    "A.k = 3.0",
    may_raise=(Unsupported,),
)
world("class: hash table by the class", OBJECT + "d = {A: 2.0}", "p * d[A]", "d[A] = 3.0")
world("class: named as one of the library", OBJECT + "A.__module__ = 'optfn.compose'", "p * A.k", "A.k = 3.0")
world("class: of instances, changed", OBJECT + "class B: k = 3.0", "p * a.k", "a.__class__ = B")
world("object: attribute", OBJECT, "p * a.n", "a.n = 3.0")
world("object: attribute by getattr", OBJECT, "p * getattr(a, 'm', 2.0)", "a.m = 3.0")
world("object: attribute by hasattr", OBJECT, "p * (3.0 if hasattr(a, 'm') else 2.0)", "a.m = 3.0")
world("object: attribute by vars", OBJECT, "p * vars(a)['n']", "a.n = 3.0", may_raise=(Unsupported,))
world(
    "object: attribute by attrgetter",
    OBJECT + "get = operator.attrgetter('n')",
    "p * get(a)",
    "a.n = 3.0",
    may_raise=(Unsupported,),
)
world(
    "object: item by itemgetter",
    "d = {'n': 2.0}\nget = operator.itemgetter('n')",
    "p * get(d)",
    "d['n'] = 3.0",
    may_raise=(Unsupported,),
)
world("object: method", OBJECT, "a.f(p)", "a.n = 3.0")
world("object: bound method", OBJECT + "f = a.f", "f(p)", "a.n = 3.0")
world(
    "object: step is a bound method",
    "class A:\n    n = 2.0\n    def step(self, p, g): return p * self.n\na = A()\nstep = a.step",
    "",
    "a.n = 3.0",
)
world(
    "object: step is a callable object",
    "class A:\n    n = 2.0\n    def __call__(self, p, g): return p * self.n\nstep = A()",
    "",
    "step.n = 3.0",
)
world("object: callable", "class A:\n    n = 2.0\n    def __call__(self, p): return p * self.n\na = A()", "a(p)", "a.n = 3.0")
world("object: property", "class A:\n    n = 2.0\n    @property\n    def k(self): return self.n\na = A()", "p * a.k", "a.n = 3.0")
world(
    "object: cached property",
    "class A:\n    n = 2.0\n    @functools.cached_property\n    def k(self): return self.n\na = A()",
    "p * a.k",
    "a.k = 3.0",
    may_raise=(Unsupported,),
)
world("object: slots", "class A:\n    __slots__ = ('k',)\na = A()\na.k = 2.0", "p * a.k", "a.k = 3.0")
world(
    "object: descriptor",
    "class D:\n    def __get__(self, of, owner=None): return self.n\nd = D()\nd.n = 2.0\nclass A: k = d\na = A()",
    "p * a.k",
    "d.n = 3.0",
)
world(
    "object: __getattr__",
    "class A:\n    def __getattr__(self, name): return d[name]\nd = {'k': 2.0}\na = A()",
    "p * a.k",
    "d['k'] = 3.0",
)
world("object: __getitem__", "class A:\n    n = 2.0\n    def __getitem__(self, i): return self.n\na = A()", "p * a[0]", "a.n = 3.0")
world("object: __len__", "class A:\n    n = 2\n    def __len__(self): return self.n\na = A()", "p * len(a)", "a.n = 3")
world("object: __bool__", "class A:\n    n = True\n    def __bool__(self): return self.n\na = A()", "p if a else -p", "a.n = False")
world("object: __iter__", "class A:\n    n = 2.0\n    def __iter__(self): yield self.n\na = A()", "p * sum(a)", "a.n = 3.0")
world(
    "object: __eq__",
    "class A:\n    n = True\n    def __eq__(self, x): return self.n\n    __hash__ = None\na = A()",
    "p if a == 1 else -p",
    "a.n = False",
)
world(
    "object: __enter__",
    "class A:\n    n = 2.0\n    def __enter__(self): return self.n\n    def __exit__(self, *_): pass\na = A()\ndef step(p, g):\n    with a as k:\n        return p * k",
    "",
    "a.n = 3.0",
    may_raise=(Unsupported,),
)
world("object: dataclass", "@dataclasses.dataclass\nclass A: k: float\na = A(2.0)", "p * a.k", "a.k = 3.0")
world(
    "object: frozen dataclass",
    "@dataclasses.dataclass(frozen=True)\nclass A: k: float\na = A(2.0)",
    "p * a.k",
    "object.__setattr__(a, 'k', 3.0)",
)
world("object: NamedTuple", "class A(typing.NamedTuple): k: float\na = A(2.0)", "p * a.k", "a = A(3.0)")
world("object: list in a NamedTuple", "class A(typing.NamedTuple): k: list\na = A([2.0])", "p * a.k[0]", "a.k[0] = 3.0")
world(
    "object: NamedTuple's method",
    "k = 2.0\nclass A(typing.NamedTuple):\n    n: float\n    def f(self): return self.n * k\na = A(2.0)",
    "p * a.f()",
    "k = 3.0",
)
world("object: float's subclass", "class F(float): k = 2.0\nf = F(1.0)", "p * f * f.k", "f.k = 3.0", may_raise=(Unsupported,))
world("object: str's subclass", "class S(str): k = 2.0\ns = S('a')", "p * s.k", "S.k = 3.0")
world("object: tuple's subclass", "class T(tuple): k = 2.0\nt = T((1.0,))", "p * t.k * t[0]", "T.k = 3.0")
world("object: weak reference", OBJECT + "r = weakref.ref(a)", "p * r().n", "a.n = 3.0", may_raise=(Unsupported,))
world("object: thread-local", "a = threading.local()\na.k = 2.0", "p * a.k", "a.k = 3.0")
world("enum: member", "class E(enum.Enum):\n    A = 2.0\n    B = 3.0\nk = E.A", "p * k.value", "k = E.B")
world("enum: member as an argument", "class E(enum.Enum):\n    A = 2.0\n    B = 3.0\nk = E.A", "p * x.value", "k = E.B", x="k")
world("enum: attribute of a member", "class E(enum.Enum): A = 1\nE.A.k = 2.0", "p * E.A.k", "E.A.k = 3.0")
world("enum: attribute of a member passed", "class E(enum.Enum): A = 1\nE.A.k = 2.0", "p * x.k", "E.A.k = 3.0", x="E.A")
world(
    "enum: method that reads a global",
    "k = 2.0\nclass E(enum.Enum):\n    A = 1\n    def f(self): return k",
    "p * E.A.f()",
    "k = 3.0",
)
world("enum: IntEnum as an argument", "class E(enum.IntEnum):\n    A = 2\n    B = 3\nk = E.A", "p * x", "k = E.B", x="k")

world("module: attribute", "import settings", "p * settings.k", "settings.k = 3.0", settings="k = 2.0")
world("module: attribute of a dict", "import settings", "p * settings.k['a']", "settings.k['a'] = 3.0", settings="k = {'a': 2.0}")
world(
    "module: function that reads an attribute",
    "import settings",
    "settings.f(p)",
    "settings.k = 3.0",
    settings="k = 2.0\ndef f(p): return p * k",
)
world(
    "module: function replaced",
    "import settings",
    "settings.f(p)",
    "settings.f = lambda p: p * 3",
    settings="def f(p): return p * 2",
)
world("module: class's attribute", "import settings", "p * settings.A.k", "settings.A.k = 3.0", settings="class A: k = 2.0")
world(
    "module: imported in the step",
    "def step(p, g):\n    import settings\n    return p * settings.k",
    "",
    "import settings\nsettings.k = 3.0",
    settings="k = 2.0",
)
world(
    "module: name imported in the step",
    "def step(p, g):\n    from settings import k\n    return p * k",
    "",
    "import settings\nsettings.k = 3.0",
    settings="k = 2.0",
)
world(
    "module: imported in a function",
    "def f():\n    from settings import k\n    return k",
    "p * f()",
    "import settings\nsettings.k = 3.0",
    settings="k = 2.0",
)
world(
    "module: imported by name",
    "",
    "p * importlib.import_module('settings').k",
    "import settings\nsettings.k = 3.0",
    settings="k = 2.0",
    may_raise=(Unsupported,),
)
world(
    "module: in a module",
    "import settings",
    "p * settings.sub.k",
    "settings.sub.k = 3.0",
    settings="import types\nsub = types.SimpleNamespace(k=2.0)",
)
world(
    "module: one bound in another",
    "import settings",
    "p * settings.sub.k",
    "settings.sub.k = 3.0",
    settings="import types\nsub = types.ModuleType('sub')\nsub.k = 2.0",
)
world(
    "module: __getattr__",
    "import settings",
    "p * settings.k",
    "settings.d['k'] = 3.0",
    settings="d = {'k': 2.0}\ndef __getattr__(name): return d[name]",
    may_raise=(Unsupported,),
)
world(
    "module: its class",
    "import settings\nclass M(types.ModuleType):\n    n = 2.0\n    @property\n    def k(self): return self.n\nsettings.__class__ = M",
    "p * settings.k",
    "settings.n = 3.0",
    may_raise=(Unsupported,),
)
world(
    "module: bound anew",
    "import settings\nother = types.ModuleType('settings')\nother.k = 3.0",
    "p * settings.k",
    "settings = other",
    settings="k = 2.0",
)
world("module: under an alias", "import settings as math", "p * math.pi", "math.pi = 3.0", settings="pi = 2.0")
world(
    "module: named as one of the library",
    "import settings\nsettings.__name__ = 'optfn.numerics'",
    "p * settings.k",
    "settings.k = 3.0",
    settings="k = 2.0",
)
world(
    "module: attribute set on torch",
    "torch.rate_of_world = 2.0",
    "p * torch.rate_of_world",
    "torch.rate_of_world = 3.0",
    undo="del torch.rate_of_world",
)
world(
    "module: attribute set on math",
    "math.rate_of_world = 2.0",
    "p * math.rate_of_world",
    "math.rate_of_world = 3.0",
    undo="del math.rate_of_world",
)
world(
    "module: method set on Tensor",
    "Tensor.rate_of_world = 2.0",
    "p * p.rate_of_world",
    "Tensor.rate_of_world = 3.0",
    may_raise=(Unsupported,),
    undo="del Tensor.rate_of_world",
)
world(
    "module: attribute set on one of torch's",
    "import torch.utils.data as d\nd.rate_of_world = 2.0",
    "p * d.rate_of_world",
    "d.rate_of_world = 3.0",
    undo="del d.rate_of_world",
)

# Cells

CELL = """
def make():
    k = 2.0
    def step(p, g): return {result}
    def change():
        nonlocal k
        {change}
    return step, change
step, change = make()
"""


def cell(name: str, result: str, change: str, old: str = "2.0", **options: Any) -> None:
    world(f"cell: {name}", CELL.format(result=result, change=change).replace("k = 2.0", f"k = {old}", 1), "", "change()", **options)


cell("number", "p * k", "k = 3.0")
cell("tensor", "p * k", "k = torch.tensor(3.0)", "torch.tensor(2.0)")
cell("tensor in place", "p * k", "k.fill_(3.0)", "torch.tensor(2.0)")
cell("list", "p * k[0]", "k[0] = 3.0", "[2.0]")
cell("dict", "p * k['a']", "k['a'] = 3.0", "{'a': 2.0}")
cell("object", "p * k.a", "k.a = 3.0", "types.SimpleNamespace(a=2.0)")
cell("function", "k(p)", "k = lambda p: p * 3", "lambda p: p * 2")
cell("deleted", "p * k", "del k")
cell("in a lambda", "(lambda: p * k)()", "k = 3.0")
world(
    "cell: two levels down",
    """
    def make():
        k = 2.0
        def inner(p): return p * k
        def middle(p): return inner(p)
        def step(p, g): return middle(p)
        def change():
            nonlocal k
            k = 3.0
        return step, change
    step, change = make()
    """,
    "",
    "change()",
)
world(
    "cell: written by cell_contents",
    "def make(k): return lambda p, g: p * k\nstep = make(2.0)",
    "",
    "step.__closure__[0].cell_contents = 3.0",
)
world(
    "cell: bound later",
    "def make():\n    def step(p, g): return p * k\n    def change():\n        nonlocal k\n        k = 3.0\n    k = 0.0\n    del k\n    return step, change\nstep, change = make()",
    "",
    "change()",
)
world(
    "cell: that the step writes",
    "def make():\n    n = 1.0\n    def step(p, g):\n        nonlocal n\n        n += 1\n        return p * n\n    return step\nstep = make()",
    "",
    "",
    may_raise=(Unsupported,),
)
world("cell: of a function that was made anew", "def make(k): return lambda p: p * k\nf = make(2.0)", "f(p)", "f = make(3.0)")
world(
    "cell: of a method",
    "def make():\n    k = 2.0\n    class A:\n        def f(self, p): return p * k\n    def change():\n        nonlocal k\n        k = 3.0\n    return A(), change\na, change = make()",
    "a.f(p)",
    "change()",
)

# Functions

world("function: __defaults__", "def f(p, k=2.0): return p * k", "f(p)", "f.__defaults__ = (3.0,)")
world("function: a default's list", "def f(p, k=[2.0]): return p * k[0]", "f(p)", "f.__defaults__[0][0] = 3.0")
world("function: __kwdefaults__", "def f(p, *, k=2.0): return p * k", "f(p)", "f.__kwdefaults__ = {'k': 3.0}")
world("function: __kwdefaults__ in place", "def f(p, *, k=2.0): return p * k", "f(p)", "f.__kwdefaults__['k'] = 3.0")
world("function: __code__", "def f(p): return p * 2\ndef h(p): return p * 3", "f(p)", "f.__code__ = h.__code__")
world("function: the step's __defaults__", "def step(p, g, k=2.0): return p * k", "", "step.__defaults__ = (3.0,)")
world("function: the step's __kwdefaults__", "def step(p, g, *, k=2.0): return p * k", "", "step.__kwdefaults__ = {'k': 3.0}")
world("function: the step's __code__", "def step(p, g): return p * 2\ndef h(p, g): return p * 3", "", "step.__code__ = h.__code__")
world("function: attribute", "def f(p): return p * f.k\nf.k = 2.0", "f(p)", "f.k = 3.0")
world("function: the step's attribute", "def step(p, g): return p * step.k\nstep.k = 2.0", "", "step.k = 3.0")
world("function: attribute of one of the library's", "f = optfn.adam\nf.k = 2.0", "p * f.k", "f.k = 3.0", undo="del f.k")
world("function: partial", "def f(k, p): return p * k\nh = functools.partial(f, 2.0)", "h(p)", "h = functools.partial(f, 3.0)")
world("function: partial's keywords", "def f(p, k): return p * k\nh = functools.partial(f, k=2.0)", "h(p)", "h.keywords['k'] = 3.0")
world(
    "function: partial's state",
    "def f(p): return p * 2\ndef f3(p): return p * 3\nh = functools.partial(f)",
    "h(p)",
    "h.__setstate__((f3, (), {}, None))",
)
world("function: partial's list", "def f(p, k): return p * k[0]\nl = [2.0]\nh = functools.partial(f, k=l)", "h(p)", "l[0] = 3.0")
world(
    "function: the step is a partial",
    "def f(p, g, k): return p * k\nstep = functools.partial(f, k=2.0)",
    "",
    "step.keywords['k'] = 3.0",
)
world("function: partial of one of torch's", "h = functools.partial(torch.mul, other=2.0)", "h(p)", "h.keywords['other'] = 3.0")
world(
    "function: partialmethod",
    "l = [2.0]\nclass A:\n    def f(self, p, k): return p * k[0]\n    h = functools.partialmethod(f, k=l)\na = A()",
    "a.h(p)",
    "l[0] = 3.0",
    may_raise=(Unsupported,),
)
world("function: under torch's name", "k = 2.0\n@functools.wraps(torch.sin)\ndef f(p): return p * k", "f(p)", "k = 3.0")
world(
    "function: under the library's name",
    "l = [2.0]\ndef f(p): return p * l[0]\nf.__module__ = 'optfn.numerics'",
    "f(p)",
    "l[0] = 3.0",
)
world(
    "function: step under torch's name",
    "l = [2.0]\n@functools.wraps(torch.optim.Adam.step)\ndef f(p, g): return p * l[0]\ndef step(p, g): return f(p, g)",
    "",
    "l[0] = 3.0",
)
world("function: under operator's name", "k = 2.0\ndef f(p): return p * k\nf.__module__ = 'operator'", "f(p)", "k = 3.0")
world(
    "function: decorated",
    "n = [2.0]\ndef times(f):\n    @functools.wraps(f)\n    def g(*a): return f(*a) * n[0]\n    return g\n@times\ndef f(p): return p + 1",
    "f(p)",
    "n[0] = 3.0",
)
world(
    "function: decorated, counting",
    "def counted(f):\n    def g(*a):\n        g.calls += 1\n        return f(*a) * g.calls\n    g.calls = 0\n    return g\n@counted\ndef f(p): return p + 1",
    "f(p)",
    "",
    may_raise=(Unsupported,),
)
world(
    "function: cached",
    "k = 2.0\n@functools.lru_cache\ndef f(n): return k * n",
    "p * f(1)",
    "k = 3.0\nf.cache_clear()",
    may_raise=(Unsupported,),
)
world(
    "function: cached by a dict",
    "k, d = 2.0, {}\ndef f(n):\n    if n not in d: d[n] = k * n\n    return d[n]",
    "p * f(1)",
    "k = 3.0\nd.clear()",
)
world(
    "function: singledispatch",
    "@functools.singledispatch\ndef f(x): return 2.0\n",
    "p * f(1)",
    "f.register(int)(lambda x: 3.0)",
    may_raise=(Unsupported,),
)
world("function: recursive", "k = 2.0\ndef f(p, n): return p * k if n == 0 else f(p, n - 1)", "f(p, 2)", "k = 3.0")
world("function: yields", "k = 2.0\ndef f():\n    yield k", "p * next(f())", "k = 3.0")
world(
    "function: async",
    "k = 2.0\nasync def f(): return k\ndef run(c):\n    try: c.send(None)\n    except StopIteration as e: return e.value",
    "p * run(f())",
    "k = 3.0",
    may_raise=(Unsupported,),
)
world(
    "function: passed as an argument", "def make(k): return lambda p: p * k[0]\nl = [2.0]\nf = make(l)", "x(p)", "l[0] = 3.0", x="f"
)
world("function: another passed", "def make(k): return lambda p: p * k\nf = make(2.0)", "x(p)", "f = make(3.0)", x="f")
world("function: made for each call", "def make(k): return lambda p: p * k\nk = 2.0", "x(p)", "k = 3.0", x="make(k)")
world("function: passed, reads a global", "k = 2.0\ndef f(p): return p * k", "x(p)", "k = 3.0", x="f")
world(
    "function: passed, rebinding its cell",
    "def make():\n    k = 2.0\n    def change():\n        nonlocal k\n        k = 3.0\n    return (lambda p: p * k), change\nf, change = make()",
    "x(p)",
    "change()",
    x="f",
)
world("function: passed, with defaults", "def f(p, k=2.0): return p * k", "x(p)", "f.__defaults__ = (3.0,)", x="f")
world(
    "function: passed as partial",
    "def f(p, k): return p * k\nh = functools.partial(f, k=2.0)",
    "x(p)",
    "h.keywords['k'] = 3.0",
    x="h",
    may_raise=(TypeError, Unsupported),
)
world("function: method passed", OBJECT, "x(p)", "a.n = 3.0", x="a.f")
world("function: class passed", OBJECT, "p * x.k", "A.k = 3.0", x="A")
world(
    "function: module passed",
    "import settings",
    "p * x.k",
    "settings.k = 3.0",
    settings="k = 2.0",
    x="settings",
    may_raise=(Unsupported,),
)
world("function: object passed", OBJECT, "p * x.n", "a.n = 3.0", x="a")
world(
    "function: in a list that is passed",
    "def make(k): return lambda p: p * k\nl = [make(2.0)]",
    "x[0](p)",
    "l[0] = make(3.0)",
    x="l",
)
world("builtin method: get", "d = {'a': 2.0}\nget = d.get", "p * get('a')", "d['a'] = 3.0")
world("builtin method: get, passed", "d = {'a': 2.0}", "p * x('a')", "d['a'] = 3.0", x="d.get", may_raise=(Unsupported,))
world("builtin method: __getitem__", "d = [2.0]\nget = d.__getitem__", "p * get(0)", "d[0] = 3.0")
world("builtin method: pop", "d = [5.0, 4.0, 3.0, 2.0]\npop = d.pop", "p * pop()", "", may_raise=(Unsupported,))
world(
    "builtin method: popleft",
    "d = collections.deque([5.0, 4.0, 3.0, 2.0])\npop = d.popleft",
    "p * pop()",
    "",
    may_raise=(Unsupported,),
)
world("builtin method: count", "n = itertools.count().__next__", "p * n()", "", may_raise=(Unsupported,))
world("builtin method: of a string", "f = 'ab'.count", "p * f('a')", "f = 'aa'.count")
world("builtin method: of a tensor", "r = torch.tensor([2.0])\nf = r.item", "p * f()", "r.fill_(3.0)", may_raise=(Unsupported,))
world("builtin method: fill's result", "r = torch.tensor([2.0])\nf = r.add", "p * f(1.0)", "r.fill_(3.0)")
world(
    "builtin method: methodcaller",
    "d = {'a': 2.0}\nget = operator.methodcaller('get', 'a')",
    "p * get(d)",
    "d['a'] = 3.0",
    may_raise=(Unsupported,),
)
world("iterator: count", "n = itertools.count(1)", "p * next(n)", "", may_raise=(Unsupported,))
world("iterator: cycle", "n = itertools.cycle([2.0, 3.0, 4.0, 5.0])", "p * next(n)", "", may_raise=(Unsupported,))
world("iterator: of a list", "n = iter([2.0, 3.0, 4.0, 5.0])", "p * next(n)", "", may_raise=(Unsupported,))
world("iterator: generator", "n = (i + 1.0 for i in range(9))", "p * next(n)", "", may_raise=(Unsupported,))
world("iterator: map", "n = map(float, range(1, 9))", "p * next(n)", "", may_raise=(Unsupported,))
world("iterator: enumerate", "n = enumerate('abcdef', 1)", "p * next(n)[0]", "", may_raise=(Unsupported,))
world("iterator: range", "n = range(2)", "p * len(n)", "n = range(3)")
world("context variable", "v = contextvars.ContextVar('v', default=2.0)", "p * v.get()", "v.set(3.0)", may_raise=(Unsupported,))
world(
    "context variable: its get",
    "v = contextvars.ContextVar('v', default=2.0)\nget = v.get",
    "p * get()",
    "v.set(3.0)",
    may_raise=(Unsupported,),
)
world(
    "outside: environment",
    "os.environ['RATE_OF_WORLD'] = '2'",
    "p * float(os.environ['RATE_OF_WORLD'])",
    "os.environ['RATE_OF_WORLD'] = '3'",
    undo="del os.environ['RATE_OF_WORLD']",
)
world(
    "outside: getenv",
    "os.environ['RATE_OF_WORLD'] = '2'",
    "p * float(os.getenv('RATE_OF_WORLD'))",
    "os.environ['RATE_OF_WORLD'] = '3'",
    undo="del os.environ['RATE_OF_WORLD']",
)
world(
    "outside: file",
    "from pathlib import Path\nf = Path(__file__).with_name('rate')\nf.write_text('2')",
    "p * float(f.read_text())",
    "f.write_text('3')",
    may_raise=(Unsupported,),
)
world(
    "outside: file by open",
    "name = __file__ + '.rate'\nopen(name, 'w').write('2')",
    "p * float(open(name).read())",
    "open(name, 'w').write('3')",
    may_raise=(Unsupported,),
)
world("outside: stream", "f = io.StringIO('2345')", "p * float(f.read(1))", "", may_raise=(Unsupported,))
world("outside: random", "random.seed(0)", "p * random.random()", "")
world("outside: random's generator", "r = random.Random(0)", "p * r.random()", "", may_raise=(Unsupported,))
world("outside: numpy.random", "np.random.seed(0)", "p * np.random.rand()", "", may_raise=(Unsupported,))
world("outside: numpy's generator", "r = np.random.default_rng(0)", "p * r.random()", "", may_raise=(Unsupported,))
world(
    "outside: clock",
    "old = time.time\ntime.time = lambda: 2.0",
    "p * time.time()",
    "time.time = lambda: 3.0",
    undo="time.time = old",
)
for clock in (
    "time.time()",
    "time.perf_counter()",
    "time.monotonic()",
    "time.time_ns()",
    "time.process_time()",
    "datetime.datetime.now().timestamp()",
):
    world(
        f"outside: clock, {clock}",
        "start = 0.0",
        f"p * (torch.tensor({clock}, dtype=torch.float64) >= x)",
        f"start = {clock}",
        x="torch.tensor(start, dtype=torch.float64)",
        may_raise=(Unsupported,),
        varies=False,
    )
world("outside: argv", "argv = sys.argv\nsys.argv = ['2']", "p * float(sys.argv[0])", "sys.argv = ['3']", undo="sys.argv = argv")
world(
    "outside: recursion limit",
    "old = sys.getrecursionlimit()",
    "p * (sys.getrecursionlimit() - old)",
    "sys.setrecursionlimit(old + 1)",
    may_raise=(Unsupported,),
    undo="sys.setrecursionlimit(old)",
)
world(
    "outside: caller's frame",
    "k = 2.0\ndef call(step, *args): level = k; return step(*args)",
    "p * [f.frame.f_locals['level'] for f in inspect.stack() if f.function == 'call'][0]",
    "k = 3.0",
    may_raise=(Unsupported,),
)

# Numbers and other constants

numbers_of(
    "number",
    {
        "zeros": ("0.0", "-0.0"),
        "zeros, the other way": ("-0.0", "0.0"),
        "nan": ("1.0", "math.nan"),
        "from nan": ("math.nan", "1.0"),
        "inf": ("1.0", "math.inf"),
        "infinities": ("-math.inf", "math.inf"),
    },
    "1 / (p * x)",
)
numbers_of(
    "kind",
    {
        "float, int": ("1.0", "1"),
        "int, float": ("1", "1.0"),
        "bool, int": ("True", "1"),
        "int, bool": ("1", "True"),
        "bool, float": ("True", "1.0"),
        "zero, false": ("0", "False"),
    },
    "(p, torch.full((1,), x))",
)
numbers_of("int", {"large": ("2**62", "2**62 + 1")}, "(p, torch.full((1,), x))")
numbers_of("int", {"beyond 64 bits": ("2**70", "2**71")}, "p * float(x)", may_raise=(Unsupported, OverflowError, RuntimeError))
numbers_of("complex", {"": ("1 + 2j", "1 + 3j"), "zeros": ("complex(0, 0.0)", "complex(0, -0.0)")}, "(p, torch.full((1,), x).imag)")
numbers_of("string", {"": ("'mean'", "'sum'")}, "p * getattr(p, x)()")
numbers_of("bytes", {"": ("b'a'", "b'aa'")}, "p * len(x)", may_raise=(Unsupported,))
numbers_of("dtype", {"": ("torch.float32", "torch.float64")}, "(p, p.to(x))")
numbers_of(
    "device",
    {"": ("torch.device('cpu')", "torch.device('meta')")},
    "(p, p.new_ones(2, device=x))",
    may_raise=(NotImplementedError,),
)
numbers_of("shape", {"": ("torch.Size([1])", "torch.Size([1, 1])")}, "(p, p.sum().expand(x))")
numbers_of("slice", {"": ("slice(0, 1)", "slice(1, 2)")}, "p * p[x]")
numbers_of("range", {"": ("range(2)", "range(3)")}, "p * len(x)", may_raise=(Unsupported,))
numbers_of(
    "None",
    {"to a number": ("None", "2.0"), "to a tensor": ("None", "torch.tensor(2.0)"), "to a flag": ("None", "False")},
    "p if x is None else p * (3.0 + x)",
)
numbers_of("Ellipsis", {"": ("...", "0")}, "p * p[x]", may_raise=(Unsupported,))
numbers_of(
    "Fraction",
    {"": ("__import__('fractions').Fraction(1, 2)", "__import__('fractions').Fraction(1, 3)")},
    "p * float(x)",
    may_raise=(Unsupported,),
)
numbers_of(
    "numpy number",
    {"": ("np.float64(2.0)", "np.float64(3.0)"), "dtype": ("np.float32(2.0)", "np.float64(2.5)")},
    "p * x",
    may_raise=(Unsupported, TypeError),
)
numbers_of(
    "numpy array", {"": ("np.array([2.0])", "np.array([3.0])")}, "(p, p * torch.as_tensor(x))", may_raise=(Unsupported, TypeError)
)
numbers_of("frozenset", {"": ("frozenset([1.0])", "frozenset([2.0])")}, "p * sum(x)", may_raise=(Unsupported,))
numbers_of("set", {"": ("{1.0}", "{2.0}")}, "p * sum(x)", may_raise=(Unsupported,))
world(
    "number: many, one after the other",
    "k = 0.5\ndef given(p, g):\n    global k\n    k += 1\n    return p, g, k\ndef step(p, g, x): return p * x",
    "",
    "",
)

# Trees of arguments

world(
    "tree: order of keys",
    "d = {'a': 2.0, 'b': 3.0}",
    "{**{n: v * p.sum() for n, v in x.items()}, 'first': next(iter(x.values())) * p}",
    "d = {'b': 3.0, 'a': 2.0}",
    x="{n: torch.tensor(v) for n, v in d.items()}",
)
world("tree: order of numbers' keys", "d = {'a': 2.0, 'b': 3.0}", "p * next(iter(x.values()))", "d = {'b': 3.0, 'a': 2.0}", x="d")
world(
    "tree: order of the gradients' keys",
    "names = 'ab'\ndef given(p, g): return p, {n: g[n] for n in names}",
    "p * next(v for v in g.values() if v is not None)",
    "names = 'ba'",
)
for kind in (
    "dict",
    "collections.OrderedDict",
    "functools.partial(collections.defaultdict, float)",
    "collections.Counter",
    "types.MappingProxyType",
):
    for other in ("dict", "collections.OrderedDict", "functools.partial(collections.defaultdict, list)"):
        if kind != other:
            world(
                f"tree: {kind} to {other}",
                f"d = {kind}",
                "(p, x)",
                f"d = {other}",
                x="d({'a': 2.0})" if "Mapping" in kind else "d({'a': torch.ones(1)})",
                may_raise=(Unsupported, TypeError) if "Counter" in kind or "Mapping" in kind else (),
            )
world(
    "tree: defaultdict's default",
    "d = collections.defaultdict(float, a=torch.ones(1))",
    "p * x.default_factory()",
    "d = collections.defaultdict(lambda: 3.0, a=torch.ones(1))",
    x="d.copy()",
    may_raise=(Unsupported,),
)
world(
    "tree: defaultdict's function changed",
    "k = 2.0\ndef f(): return k\nd = collections.defaultdict(f, a=torch.ones(1))",
    "p * x.default_factory()",
    "k = 3.0",
    x="d.copy()",
    may_raise=(Unsupported,),
)
for old, new in (("1", "'1'"), ("1", "True"), ("True", "1"), ("1", "1.0"), ("'a'", "'b'"), ("(1,)", "(2,)"), ("None", "'None'")):
    world(f"tree: key {old} to {new}", f"k = {old}", "(p, x)", f"k = {new}", x="{k: torch.ones(1)}")
world("tree: list to tuple", "k = list", "(p, x, len(x))", "k = tuple", x="k([torch.ones(1)])")
world("tree: longer", "k = 1", "p * sum(x)", "k = 2", x="[torch.ones(1)] * k")
world(
    "tree: NamedTuple's method that reads a global",
    "k = 2.0\nclass A(typing.NamedTuple):\n    a: Tensor\n    def f(self): return self.a * k",
    "p * x.f()",
    "k = 3.0",
    x="A(torch.ones(1))",
)
world(
    "tree: NamedTuple's property that reads a global",
    "k = 2.0\nclass A(typing.NamedTuple):\n    a: Tensor\n    @property\n    def f(self): return self.a * k",
    "p * x.f",
    "k = 3.0",
    x="A(torch.ones(1))",
)
world(
    "tree: NamedTuple's class attribute",
    "class A(typing.NamedTuple):\n    a: Tensor\nA.k = 2.0",
    "p * x.k",
    "A.k = 3.0",
    x="A(torch.ones(1))",
)
world(
    "tree: NamedTuple, another of the same fields",
    "class A(typing.NamedTuple):\n    a: Tensor\nclass B(typing.NamedTuple):\n    a: Tensor\nk = A",
    "(p, x)",
    "k = B",
    x="k(torch.ones(1))",
)
world(
    "tree: NamedTuple defined anew",
    "def make(k):\n    class A(typing.NamedTuple):\n        a: Tensor\n        def f(self): return self.a * k\n    return A\nA = make(2.0)",
    "p * x.f()",
    "A = make(3.0)",
    x="A(torch.ones(1))",
)
world(
    "tree: donated NamedTuple's method",
    "k = 2.0\nclass A(typing.NamedTuple):\n    a: Tensor\n    def f(self): return A(self.a * k)\ndef given(p, g): return A(p), g",
    "p.f()",
    "k = 3.0",
)
NODE = """
k = 2.0
@optree.register_pytree_node_class(namespace=optfn.tree.NAMESPACE)
class Node:
    def __init__(self, a, n=2.0): self.a, self.n = a, n
    def tree_flatten(self): return (self.a,), self.n
    @classmethod
    def tree_unflatten(cls, n, children): return cls(*children, n)
    def f(self): return self.a * self.n * k
n = 2.0
"""
world("tree: registered node's method", NODE, "p * x.f()", "k = 3.0", x="Node(torch.ones(1))", may_raise=(Unsupported,))
world("tree: registered node's metadata", NODE, "p * x.f()", "n = 3.0", x="Node(torch.ones(1), n)", may_raise=(Unsupported,))
world(
    "tree: registered node's metadata, zeros",
    NODE + "n = 0.0",
    "1 / (p * 0 * x.f() + x.n)",
    "n = -0.0",
    x="Node(torch.ones(1), n)",
    may_raise=(Unsupported,),
)
world(
    "tree: registered node's attribute",
    NODE + "node = Node(torch.ones(1))\nnode.m = 2.0",
    "p * x.m",
    "node.m = 3.0",
    x="node",
    may_raise=(Unsupported, AttributeError),
    varies=False,
)
DATACLASS = """
k = 2.0
@dataclasses.dataclass
class D:
    a: Tensor
    n: float = 2.0
    def f(self): return self.a * self.n * k
n = 2.0
"""
world("tree: dataclass as a leaf", DATACLASS, "p * x.f()", "k = 3.0", x="D(torch.ones(1))")
world("tree: dataclass as a leaf, a field", DATACLASS + "d = D(torch.ones(1))", "p * x.f()", "d.n = 3.0", x="d")
world("tree: dataclass as a leaf, another", DATACLASS, "p * x.f()", "n = 3.0", x="D(torch.ones(1), n)")
world("tree: dict's subclass", "class D(dict):\n    n = 2.0", "p * x['a'] * x.n", "D.n = 3.0", x="D(a=torch.ones(1))")
world("tree: list's subclass", "class D(list):\n    n = 2.0", "p * x[0] * x.n", "D.n = 3.0", x="D([torch.ones(1)])")

# Tensors that are closed over

CLOSED = "r = torch.arange(1.0, 7.0)\n"
world("closed tensor: in place", CLOSED, "p * r.sum()", "r.fill_(3.0)")
world("closed tensor: entry", CLOSED, "p * r[0]", "r[0] = 3.0")
world("closed tensor: another size", CLOSED, "p * r.sum() / r.numel()", "r.data = torch.ones(100)")
world("closed tensor: smaller", "r = torch.ones(1000)", "p * r.sum()", "r.data = torch.ones(2)")
world("closed tensor: more dimensions", CLOSED, "p * r.sum(-1).sum() * r.ndim", "r.data = torch.ones(3, 2)")
world("closed tensor: another dtype", CLOSED, "p * r.sum()", "r.data = torch.ones(6, dtype=torch.float64)")
world("closed tensor: ints", CLOSED, "p * r.sum()", "r.data = torch.ones(6, dtype=torch.int32)")
world(
    "closed tensor: another stride",
    "r = torch.arange(6.0).reshape(2, 3)",
    "p * r[1].sum()",
    "r.data = torch.arange(6.0).reshape(3, 2).t()",
)
world("closed tensor: strides in place", CLOSED, "p * r.sum()", "r.as_strided_((3,), (2,))")
world("closed tensor: offset", CLOSED + "b = torch.arange(20.0)", "p * r.sum()", "r.set_(b.untyped_storage(), 9, (6,), (1,))")
world("closed tensor: resized", CLOSED, "p * r.numel()", "r.resize_(2)")
world("closed tensor: memory gone", CLOSED, "p * r.shape[0]", "r.set_()")
world("closed tensor: transposed in place", "r = torch.arange(6.0).reshape(2, 3)", "p * r[1].sum()", "r.t_()")
world("closed tensor: sparse", CLOSED, "p * r.sum()", "r = torch.eye(2).to_sparse()", may_raise=(Unsupported,))
world(
    "closed tensor: on another device",
    CLOSED,
    "(p, r * 2)",
    "r = torch.empty(6, device='meta')",
    may_raise=(NotImplementedError, RuntimeError),
)
world("closed tensor: expanded", CLOSED, "p * r.sum()", "r.data = torch.ones(1).expand(6)")
world("closed tensor: 0-dim float64", "r = torch.tensor(2.0, dtype=torch.float64)", "p * r", "r.fill_(3.0)")
world("closed tensor: 0-dim int", "r = torch.tensor(2)", "p * r", "r.fill_(3)")
world("closed tensor: an index", "r = torch.tensor(0)", "p * p[r]", "r.fill_(1)")
world("closed tensor: a view of another", "b = torch.zeros(4)\nr = b[1:3]", "p * r.sum()", "b.fill_(2.0)")
world(
    "closed tensor: shares memory with an argument",
    "b = torch.ones(8)\nr = b[:2]\ndef given(p, g): return b[2:2 + len(p)].copy_(p), g",
    "p * r.sum()",
    "r = b[2:4]",
    may_raise=(ValueError,),
)
world(
    "closed tensor: is the argument", "r = torch.ones(2)\nk = 2.0\ndef given(p, g): return r.fill_(k), g", "p * r.sum()", "k = 3.0"
)
world("closed tensor: in a list", "l = [torch.ones(1)]", "p * l[0]", "l[0] = torch.full((1,), 3.0)")
world("closed tensor: in a list, in place", "l = [torch.ones(1)]", "p * l[0]", "l[0].fill_(3.0)")
world("closed tensor: in a longer list", "l = [torch.ones(1)]", "p * sum(l)", "l.append(torch.ones(1))")
world("closed tensor: in a dict", "l = {'a': torch.ones(1)}", "p * l['a']", "l['a'] = torch.full((1,), 3.0)")
world("closed tensor: in a dict, another key", "l = {'a': torch.ones(1)}", "p * sum(l.values())", "l['b'] = torch.ones(1)")
world("closed tensor: in a dict, in place", "l = {'a': torch.ones(1)}", "(p, p * l['a'])", "l['a'].data = torch.ones(2, 1) * 3")
world("closed tensor: in a tuple", "l = (torch.ones(1),)", "p * l[0]", "l[0].fill_(3.0)")
world("closed tensor: in an object", "a = types.SimpleNamespace(r=torch.ones(1))", "p * a.r", "a.r = torch.full((1,), 3.0)")
world("closed tensor: requires_grad", CLOSED, "p * (2.0 if r.requires_grad else 3.0)", "r.requires_grad_()")
world(
    "closed tensor: grad",
    "r = nn.Parameter(torch.ones(2))\nr.grad = torch.ones(2)",
    "p * r.grad.sum()",
    "r.grad = torch.full((2,), 3.0)",
)
world(
    "closed tensor: grad in place",
    "r = nn.Parameter(torch.ones(2))\nr.grad = torch.ones(2)",
    "p * r.grad.sum()",
    "r.grad.fill_(3.0)",
)
world(
    "closed tensor: grad by backward",
    "r = nn.Parameter(torch.ones(2))\n(r * 2).sum().backward()",
    "p * r.grad.sum()",
    "r.grad = None\n(r * 3).sum().backward()",
)
world(
    "closed tensor: grad is None",
    "r = nn.Parameter(torch.ones(2))",
    "p if r.grad is None else p * r.grad.sum()",
    "r.grad = torch.full((2,), 3.0)",
)
world(
    "closed tensor: grad goes",
    "r = nn.Parameter(torch.ones(2))\nr.grad = torch.full((2,), 3.0)",
    "p if r.grad is None else p * r.grad.sum()",
    "r.grad = None",
)
world("closed tensor: is_leaf", "r = torch.ones(2, requires_grad=True)", "p * (2.0 if r.is_leaf else 3.0)", "r = r * 1")
world("closed tensor: _version", CLOSED, "p * r._version", "r.add_(0)", may_raise=(Unsupported,))
world("closed tensor: attribute", CLOSED + "r.k = 2.0", "p * r.k", "r.k = 3.0")
world("closed tensor: attribute of a parameter", "r = nn.Parameter(torch.ones(2))\nr.k = 2.0", "p * r.k", "r.k = 3.0")
world("closed tensor: attribute that is new", CLOSED, "p * getattr(r, 'k', 2.0)", "r.k = 3.0")
world("closed tensor: isinstance", CLOSED, "p * (2.0 if isinstance(r, nn.Parameter) else 3.0)", "r = nn.Parameter(r)")
world("closed tensor: type", CLOSED, "p * (2.0 if type(r) is Tensor else 3.0)", "r = nn.Parameter(r)")
world(
    "closed tensor: negative bit", "r = torch.ones(2)", "p * r.sum()", "r = torch.complex(torch.ones(2), torch.ones(2)).conj().imag"
)
world("closed tensor: conjugate bit", "r = torch.complex(torch.ones(2), torch.ones(2))", "p * r.sum().imag", "r = r.conj()")
SUBCLASS = "class T(Tensor):\n    k = 2.0\n    def times(self, p): return p * self.k\nr = torch.ones(2).as_subclass(T)\n"
world("closed tensor: of a user's class", SUBCLASS, "r.times(p)", "T.k = 3.0", may_raise=(Unsupported,))
world(
    "closed tensor: of another class",
    CLOSED + "class T(Tensor):\n    def sum(self): return torch.tensor(7.0)",
    "p * r.sum()",
    "r = torch.ones(2).as_subclass(T)",
    may_raise=(Unsupported,),
)
READS = {
    "numpy": "float(r.numpy().sum())",
    "asarray": "float(np.asarray(r).sum())",
    "array": "float(np.array(r)[0])",
    "from_numpy": "torch.from_numpy(r.numpy()).sum()",
    "tolist": "sum(r.tolist())",
    "item": "r[0].item()",
    "float": "float(r[0])",
    "int": "int(r[0])",
    "bool": "(2.0 if r[0] > 2 else 3.0)",
    "condition": "(2.0 if (r > 2).all() else 3.0)",
    "equal": "(2.0 if torch.equal(r, r.clamp(min=2)) else 3.0)",
    "allclose": "(2.0 if torch.allclose(r, r.clamp(min=2)) else 3.0)",
    "in": "(2.0 if 3.0 in r else 3.0)",
    "iteration": "sum(float(x) for x in r)",
    "nonzero": "float(len((r > 2).nonzero()))",
    "masked": "r[r > 1].sum()",
    "repr": "float(repr(r).count('3'))",
    "hash of numbers": "sum(ord(c) for c in str(r.tolist()))",
    "index": "[1.0, 2.0, 3.0, 4.0][int(r[0])]",
    "format": "float(f'{r[0]:.1f}')",
    "unbind": "r.unbind()[0]",
    "numpy in a list": "np.stack([r.numpy(), r.numpy()]).sum().item()",
    "dlpack": "torch.from_dlpack(r).sum()",
    "storage": "r.untyped_storage().tolist()[3]",
    "buffer": "float(memoryview(r.numpy())[0])",
    "deepcopy": "copy.deepcopy(r).sum()",
    "math": "math.sqrt(r[0])",
}
for name, read in READS.items():
    world(
        f"numbers of a closed tensor: {name}",
        "r = torch.tensor([1.0, 2.0])",
        f"p * {read}",
        "r.fill_(3.0)",
        may_raise=(Unsupported, TypeError, RuntimeError),
    )
    world(
        f"numbers of an argument: {name}",
        "k = torch.tensor([1.0, 2.0])",
        re.sub(r"\br\b", "x", f"p * {read}"),
        "k = torch.tensor([3.0, 3.0])",
        x="k.clone()",
        may_raise=(Unsupported, TypeError, RuntimeError),
    )
METADATA = {
    "data_ptr": ("(r.data_ptr() - b.data_ptr())", "b[1:4]"),
    "storage_offset": ("r.storage_offset()", "b[1:4]"),
    "stride": ("r.stride()[0]", "b[::2]"),
    "is_contiguous": ("(2.0 if r.is_contiguous() else 3.0)", "b[::2]"),
    "base": ("(2.0 if r._base is None else 3.0)", "b[1:4]"),
    "requires_grad": ("(2.0 if r.requires_grad else 3.0)", "b[:3].clone().requires_grad_()"),
    "is_leaf": ("(2.0 if r.is_leaf else 3.0)", "b[:3].clone().requires_grad_() * 1"),
    "grad_fn": ("(2.0 if r.grad_fn is None else 3.0)", "b[:3].clone().requires_grad_() * 1"),
    "version": ("(1.0 + r._version)", "b[:3].clone().add_(1)"),
    "isinstance": ("(2.0 if isinstance(r, nn.Parameter) else 3.0)", "nn.Parameter(b[:3].clone())"),
    "is_conj": ("(2.0 if r.is_conj() else 3.0)", "torch.ones(3, dtype=torch.complex64).conj()"),
    "is_neg": ("(2.0 if r.is_neg() else 3.0)", "torch.ones(3, dtype=torch.complex64).conj().imag"),
    "dtype": ("(2.0 if r.dtype is torch.float32 else 3.0)", "b[:3].double()"),
    "device": ("(2.0 if r.device.type == 'cpu' else 3.0)", "b[:3].to('meta')"),
    "layout": ("(2.0 if r.layout is torch.strided else 3.0)", "torch.eye(3).to_sparse()"),
    "storage size": ("r.untyped_storage().nbytes()", "b[:3].clone()"),
    "shared": ("(2.0 if r.is_shared() else 3.0)", "b[:3].clone().share_memory_()"),
    "inference": ("(2.0 if r.is_inference() else 3.0)", "torch.inference_mode()(torch.ones)(3)"),
    "attribute": ("getattr(r, 'k', 2.0)", "b[:3].clone()\nr.k = 3.0"),
    "grad": ("(2.0 if r.grad is None else r.grad.sum())", "nn.Parameter(b[:3].clone())\nr.grad = torch.ones(3)"),
    "class": ("(2.0 if type(r) is Tensor else 3.0)", "nn.Parameter(b[:3].clone())"),
    "identity": ("(2.0 if r is b0 else 3.0)", "b[1:4]"),
}
for name, (read, other) in METADATA.items():
    before = (
        "b = torch.arange(6.0)\nb0 = r = b[:3]\n"
        if name not in ("base", "storage size")
        else "b = torch.arange(6.0)\nr = b.clone()\n"
    )
    world(f"what a closed tensor is: {name}", before, f"p * {read}", f"r = {other}", may_raise=(Unsupported,))
    world(
        f"what an argument is: {name}",
        before,
        re.sub(r"\br\b", "x", f"p * {read}"),
        f"r = {other}",
        x="r",
        may_raise=(Unsupported, ValueError),
    )
DONATED = {
    "requires_grad": ("p.requires_grad", "p.requires_grad_()"),
    "is a parameter": ("isinstance(p, nn.Parameter)", "nn.Parameter(p)"),
    "is a leaf": ("p.is_leaf", "p.requires_grad_() * 1"),
    "has an attribute": ("hasattr(p, 'decays')", "nn.Parameter(p)\n    p.decays = True"),
    "has a grad": ("p.grad is None", "nn.Parameter(p)\n    p.grad = torch.ones_like(p)"),
    "is contiguous": ("p.is_contiguous()", "torch.stack([p, p], 1)[:, 0]"),
    "is a view": ("p._base is None", "torch.cat([p, p])[:len(p)]"),
    "offset": ("p.storage_offset() == 0", "torch.cat([p, p])[len(p):]"),
    "version": ("p._version == 0", "p.add_(0)"),
}
for name, (read, other) in DONATED.items():
    world(
        f"what the donated argument is: {name}",
        "def given(p, g): return p, g",
        f"p * 2 if {read} else p * 3",
        f"def given(p, g):\n    p = {other}\n    return p, g",
        may_raise=(Unsupported,),
    )
world(
    "donated argument: mask by requires_grad",
    "tx = optfn.add_decayed_weights(0.5, mask=lambda path, p: p.requires_grad)\ndef given(p, g): return nn.Parameter(p), g",
    "optfn.apply_updates(p, tx.update(p * 2, tx.init(p), p)[0])",
    "tx = optfn.add_decayed_weights(0.5, mask=lambda path, p: not p.requires_grad)",
)
world(
    "donated argument: grad of a parameter",
    "k = 2.0\ndef given(p, g):\n    p = nn.Parameter(p)\n    p.grad = torch.full_like(p, k)\n    return p, g",
    "p - p.grad",
    "k = 3.0",
)
world(
    "donated argument: attribute of a parameter",
    "k = 2.0\ndef given(p, g):\n    p = nn.Parameter(p)\n    p.rate = k\n    return p, g",
    "p * p.rate",
    "k = 3.0",
)
world(
    "donated argument: negative bit",
    "def given(p, g): return p, g",
    "p * 2 + 1",
    "def given(p, g): return torch.complex(p, p).conj().imag, g",
    may_raise=(ValueError, TypeError),
)
world(
    "argument: negative bit",
    "k = torch.complex(torch.ones(1), torch.ones(1)).imag",
    "p * x",
    "k = torch.complex(torch.ones(1), torch.ones(1)).conj().imag",
    x="k",
)
world("argument: conjugate bit", "k = torch.complex(torch.ones(1), torch.ones(1))", "p * x.imag", "k = k.conj()", x="k")
world(
    "argument: the same tensor twice",
    "a, b = torch.ones(1), torch.full((1,), 2.0)\nk = [a, b]",
    "p * x[0] + x[1]",
    "k = [b, b]",
    x="k",
)
world(
    "argument: no longer the same tensor twice",
    "a, b = torch.ones(1), torch.full((1,), 2.0)\nk = [a, a]",
    "p * x[0] + x[1]",
    "k = [a, b]",
    x="k",
)
world(
    "argument: identity of two",
    "a, b = torch.ones(1), torch.ones(1)\nk = [a, b]",
    "p * (2.0 if x[0] is x[1] else 3.0)",
    "k = [b, b]",
    x="k",
    may_raise=(Unsupported,),
)
world(
    "argument: meta",
    "k = torch.ones(1)",
    "(p, x * 2)",
    "k = torch.ones(1, device='meta')",
    x="k",
    may_raise=(Unsupported, ValueError, TypeError, RuntimeError),
)
world(
    "argument: parameter in a module",
    "m = nn.Linear(2, 2, bias=False)\nm.weight.data.fill_(1.0)",
    "p * x",
    "m.weight.data.fill_(2.0)",
    x="m.weight[0, 0]",
)
world(
    "argument: an error half-way",
    "i = torch.tensor(0)\ndef given(p, g): return {'a': p, 'b': p + 1}, g, i\ndef step(p, g, x): return {'a': p['a'] + 1, 'b': p['b'][x] + p['b']}",
    "",
    "i = torch.tensor(9)",
    may_raise=(RuntimeError, IndexError),
)

# What torch holds

world(
    "torch: grad mode",
    "context = torch.no_grad",
    "p * (2.0 if torch.is_grad_enabled() else 3.0)",
    "context = torch.enable_grad",
    donate="",
)
world("torch: grad mode in a donated step", "", "(p, torch.is_grad_enabled())", "context = torch.inference_mode", varies=False)
world("torch: inference mode", "", "p * (2.0 if torch.is_inference_mode_enabled() else 3.0)", "context = torch.inference_mode")
world(
    "torch: default dtype",
    "",
    "(p * 2, torch.ones(2), torch.tensor(1.0))",
    "torch.set_default_dtype(torch.float64)",
    undo="torch.set_default_dtype(torch.float32)",
)
world(
    "torch: default dtype, read",
    "",
    "p.to(torch.get_default_dtype()) * 2",
    "torch.set_default_dtype(torch.float64)",
    donate="",
    undo="torch.set_default_dtype(torch.float32)",
)
world("torch: default device, as a context", "", "(p * 2, torch.ones(2))", "context = lambda: torch.device('meta')")
world(
    "torch: default device, before",
    "context = lambda: torch.device('meta')",
    "(p * 2, torch.ones(2))",
    "context = contextlib.nullcontext",
)
world(
    "torch: default device, set",
    "",
    "(p * 2, torch.ones(2))",
    "torch.set_default_device('meta')\ndef given(p, g): return p, g",
    undo="torch.set_default_device(None)",
)
world(
    "torch: default device, read",
    "",
    "p * len(torch.get_default_device().type)",
    "context = lambda: torch.device('meta')",
    may_raise=(Unsupported,),
)
world(
    "torch: autocast",
    "",
    "(p, torch.ones(2, 2) @ torch.ones(2, 2))",
    "context = lambda: torch.autocast('cpu', dtype=torch.bfloat16)",
)
world(
    "torch: autocast's dtype",
    "context = lambda: torch.autocast('cpu', dtype=torch.float16)",
    "(p, torch.ones(2, 2) @ torch.ones(2, 2))",
    "context = lambda: torch.autocast('cpu', dtype=torch.bfloat16)",
)
world(
    "torch: autocast, read",
    "",
    "p * (2.0 if torch.is_autocast_enabled('cpu') else 3.0)",
    "context = lambda: torch.autocast('cpu', dtype=torch.bfloat16)",
)
world(
    "torch: threads",
    "threads = torch.get_num_threads()\ntorch.set_num_threads(1)",
    "p * torch.get_num_threads()",
    "torch.set_num_threads(2)",
    may_raise=(Unsupported,),
    undo="torch.set_num_threads(threads)",
)
world(
    "torch: deterministic algorithms",
    "",
    "p * (2.0 if torch.are_deterministic_algorithms_enabled() else 3.0)",
    "torch.use_deterministic_algorithms(True)",
    undo="torch.use_deterministic_algorithms(False)",
)
world(
    "torch: precision of products",
    "torch.set_float32_matmul_precision('highest')",
    "p * len(torch.get_float32_matmul_precision())",
    "torch.set_float32_matmul_precision('high')",
    may_raise=(Unsupported,),
    undo="torch.set_float32_matmul_precision('highest')",
)
world(
    "torch: a backend's flag",
    "",
    "p * (2.0 if torch.backends.mkldnn.enabled else 3.0)",
    "context = lambda: torch.backends.mkldnn.flags(enabled=False)",
    may_raise=(Unsupported,),
)
world("torch: rand", "torch.manual_seed(0)", "p * torch.rand(1)", "torch.manual_seed(1)", may_raise=(Unsupported, RuntimeError))
world("torch: rand goes on", "torch.manual_seed(0)", "p * torch.rand(1)", "", may_raise=(Unsupported, RuntimeError))
world(
    "torch: a generator of the user's",
    "r = torch.Generator().manual_seed(0)",
    "p * torch.rand(1, generator=r)",
    "r.manual_seed(1)",
    may_raise=(Unsupported, RuntimeError),
)
world(
    "torch: seed, read",
    "torch.manual_seed(2)",
    "p * torch.initial_seed()",
    "torch.manual_seed(3)",
    may_raise=(Unsupported, RuntimeError),
)
world(
    "torch: dropout",
    "torch.manual_seed(0)",
    "nn.functional.dropout(p, 0.5) + p",
    "torch.manual_seed(5)",
    may_raise=(Unsupported, RuntimeError),
)
world(
    "torch: bernoulli",
    "torch.manual_seed(0)",
    "p + torch.bernoulli(p * 0 + 0.5)",
    "torch.manual_seed(5)",
    may_raise=(Unsupported, RuntimeError),
)
world(
    "torch: random numbers in a rule",
    "torch.manual_seed(0)\ntx = optfn.stateless_with_tree_map(lambda g, p: g + torch.randn_like(g))",
    "optfn.apply_updates(p, tx.update(p, (), p)[0])",
    "torch.manual_seed(1)",
    may_raise=(Unsupported, RuntimeError),
)
FUNCTION_MODE = """
from torch.overrides import TorchFunctionMode
class Mode(TorchFunctionMode):
    k = 2.0
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out + self.k if getattr(func, '__name__', '') in ('sin', 'mul') else out
"""
DISPATCH_MODE = """
from torch.utils._python_dispatch import TorchDispatchMode
class Mode(TorchDispatchMode):
    k = 2.0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out + self.k if func is torch.ops.aten.sin.default else out
"""
for name, mode in (("function", FUNCTION_MODE), ("dispatch", DISPATCH_MODE)):
    world(f"torch: a {name} mode", mode, "torch.sin(p)", "context = Mode", may_raise=(Unsupported, RuntimeError, TypeError))
    world(
        f"torch: a {name} mode goes",
        mode + "context = Mode",
        "torch.sin(p)",
        "context = contextlib.nullcontext",
        may_raise=(Unsupported, RuntimeError, TypeError),
    )
    world(
        f"torch: a {name} mode's attribute",
        mode + "context = Mode",
        "torch.sin(p)",
        "Mode.k = 3.0",
        may_raise=(Unsupported, RuntimeError, TypeError),
    )
    world(
        f"torch: a {name} mode in the step",
        mode + "def step(p, g):\n    with Mode(): return torch.sin(p)",
        "",
        "Mode.k = 3.0",
        may_raise=(Unsupported, RuntimeError, TypeError),
    )
world(
    "torch: a function replaced",
    "def f(x): return x * 7\nold = nn.functional.softplus",
    "nn.functional.softplus(p)",
    "nn.functional.softplus = f",
    undo="nn.functional.softplus = old",
)

# Modules

MODULE = (
    "m = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Dropout(0.0))\nm.eval()\nfor q in m.parameters(): q.data.fill_(0.5)\n"
)
world("nn.Module: parameter in place", MODULE, "p * m(torch.ones(1, 1)).sum()", "m[0].weight.data.fill_(2.0)")
world(
    "nn.Module: parameter bound anew",
    MODULE,
    "p * m(torch.ones(1, 1)).sum()",
    "m[0].weight = nn.Parameter(torch.full((1, 1), 2.0))",
)
world(
    "nn.Module: parameter's data bound anew", MODULE, "p * m(torch.ones(1, 1)).sum()", "m[0].weight.data = torch.full((1, 1), 2.0)"
)
world("nn.Module: buffer", MODULE, "p * m(torch.ones(1, 1)).sum()", "m[1].running_mean.fill_(3.0)")
world("nn.Module: buffer bound anew", MODULE, "p * m(torch.ones(1, 1)).sum()", "m[1].running_mean = torch.full((1,), 3.0)")
world("nn.Module: training", MODULE, "p * (2.0 if m.training else 3.0)", "m.train()")
world("nn.Module: training of batch norm", MODULE, "p * m(torch.tensor([[1.0], [2.0]]))[0].sum()", "m.train()")
world("nn.Module: a number in it", MODULE, "p * m(torch.ones(1, 1)).sum()", "m[1].eps = 1.0")
world("nn.Module: a part replaced", MODULE, "p * m(torch.ones(1, 1)).sum()", "m[2] = nn.Tanh()")
world("nn.Module: longer", MODULE, "p * m(torch.ones(1, 1)).sum()", "m.append(nn.Tanh())")
world("nn.Module: a hook", MODULE, "p * m(torch.ones(1, 1)).sum()", "m.register_forward_hook(lambda m, x, y: y * 2)")
world(
    "nn.Module: a hook before", MODULE, "p * m(torch.ones(1, 1)).sum()", "m[0].register_forward_pre_hook(lambda m, x: (x[0] * 2,))"
)
world(
    "nn.Module: a hook that reads a global",
    "k = 2.0\n" + MODULE + "m.register_forward_hook(lambda m, x, y: y * k)",
    "p * m(torch.ones(1, 1)).sum()",
    "k = 3.0",
)
world(
    "nn.Module: a hook for all modules",
    MODULE,
    "p * m(torch.ones(1, 1)).sum()",
    "h = nn.modules.module.register_module_forward_hook(lambda m, x, y: y * 2)",
    undo="h.remove()",
)
world("nn.Module: forward replaced", MODULE, "p * m(torch.ones(1, 1)).sum()", "m[0].forward = lambda x: x * 5")
world(
    "nn.Module: of the user's",
    "class M(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.k = 2.0\n    def forward(self, p): return p * self.k\nm = M()",
    "m(p)",
    "m.k = 3.0",
)
world(
    "nn.Module: bound anew",
    "def make(k):\n    m = nn.Linear(1, 1)\n    for q in m.parameters(): q.data.fill_(k)\n    return m\nm = make(2.0)",
    "p * m(torch.ones(1))",
    "m = make(3.0)",
)
world(
    "nn.Module: its parameters donated",
    "m = nn.Linear(1, 1)\nfor q in m.parameters(): q.data.fill_(2.0)\ndef given(p, g): return dict(m.named_parameters()), g\ndef step(p, g):\n    y = torch.func.functional_call(m, p, (torch.ones(1, 1),))\n    return {n: x * y.sum() for n, x in p.items()}",
    "",
    "for q in m.parameters(): q.data.fill_(0.5)",
)
world(
    "nn.Module: functional_call reads the buffers",
    MODULE + "params = dict(m.named_parameters())",
    "p * torch.func.functional_call(m, params, (torch.ones(1, 1),)).sum()",
    "m[1].running_mean.fill_(3.0)",
)
world(
    "nn.Module: loss by torch.func.grad",
    "m = nn.Linear(1, 1)\nfor q in m.parameters(): q.data.fill_(2.0)\nt = torch.ones(1)",
    "p - torch.func.grad(lambda p: (m(p[:1]) - t).square().sum())(p)",
    "t.fill_(5.0)",
)
world("nn.Module: ParameterList", "m = nn.ParameterList([torch.ones(1)])", "p * m[0]", "m[0] = torch.full((1,), 3.0)")
world(
    "nn.Module: passed",
    "m = nn.Linear(1, 1)\nfor q in m.parameters(): q.data.fill_(2.0)",
    "p * x(torch.ones(1))",
    "m.weight.data.fill_(3.0)",
    x="m",
    may_raise=(TypeError, Unsupported),
)

# Transformations made of a user's functions

UPDATE = "optfn.apply_updates(p, tx.update(p + 1, tx.init(p), p)[0])"
TREE = "class S(typing.NamedTuple): a: Tensor\ndef given(p, g): return {'w': p, 'b': p + 1}, g\ndef step(p, g):\n    updates, state = tx.update(optfn.tree.map(lambda x: x + 1, p), tx.init(p), p)\n    return optfn.apply_updates(p, updates), state\n"
MADE = {
    "a mask": "optfn.add_decayed_weights(0.5, mask=lambda path, p: K)",
    "a mask of an alias": "optfn.adamw(0.1, mask=lambda path, p: K)",
    "masked": "optfn.masked(optfn.scale(2.0), lambda path, p: K)",
    "freeze": "optfn.freeze(lambda path, p: K)",
    "labels": "optfn.partition({'w': optfn.scale(2.0), 'b': optfn.scale(3.0)}, lambda path, p: path if K else {'w': 'b', 'b': 'w'}[path])",
    "a schedule": "optfn.scale_by_schedule(lambda t: 2.0 if K else 3.0)",
    "a rate": "optfn.sgd(lambda t: 2.0 if K else 3.0)",
    "a chain": "optfn.chain(optfn.trace(0.9), optfn.scale_by_schedule(lambda t: 2.0 if K else 3.0), optfn.scale(2.0))",
    "joined schedules": "optfn.sgd(optfn.join_schedules([lambda t: 2.0 if K else 3.0, optfn.constant_schedule(1.0)], [5]))",
    "leafwise": "optfn.leafwise(lambda p: S(p), lambda g, s, p, t: (g * s.a * (2.0 if K else 3.0), s))",
    "leafwise's init": "optfn.leafwise(lambda p: S(torch.full_like(p, 2.0 if K else 3.0)), lambda g, s, p, t: (g * s.a, s))",
    "stateless": "optfn.stateless(lambda u, p: optfn.tree.map(lambda x: x * (2.0 if K else 3.0), u))",
    "stateless_with_tree_map": "optfn.stateless_with_tree_map(lambda g, p: g * (2.0 if K else 3.0))",
    "a pair of the user's": "optfn.GradientTransformation(lambda p: (), lambda u, s, p=None, **_: (optfn.tree.map(lambda x: x * (2.0 if K else 3.0), u), s))",
    "injected": "optfn.inject_hyperparams(lambda lr: optfn.scale(lr * (2.0 if K else 3.0)))(lr=0.1)",
    "an injected schedule": "optfn.inject_hyperparams(optfn.sgd)(lr=lambda t: 2.0 if K else 3.0)",
    "accumulated": "optfn.accumulate(optfn.stateless_with_tree_map(lambda g, p: g * (2.0 if K else 3.0)), 1)",
    "finite": "optfn.apply_if_finite(optfn.stateless_with_tree_map(lambda g, p: g * (2.0 if K else 3.0)))",
}
HELD = {
    "a global": ("k = True", "k", "k = False"),
    "a list": ("l = [True]", "l[0]", "l[0] = False"),
    "an attribute": ("a = types.SimpleNamespace(k=True)", "a.k", "a.k = False"),
    "a function's default": ("def h(k=True): return k", "h()", "h.__defaults__ = (False,)"),
}
for name, tx in MADE.items():
    for where in HELD if name in ("a mask", "a schedule", "leafwise") else ["a global"]:
        start, read, after = HELD[where]
        world(f"made of functions: {name} reads {where}", f"{start}\ntx = {tx.replace('K', read)}\n{TREE}", "", after)
world(
    "made of functions: an average reads a list",
    "l = [2.0]\ntx = optfn.ema_params(avg_fn=lambda a, p, n: a * l[0])\nstate = tx.update(torch.ones(2), tx.init(torch.ones(2)), torch.ones(2))[1]",
    "(p, tx.update(torch.ones(2), state, torch.ones(2)))",
    "l[0] = 3.0",
)
world(
    "made of functions: mask bound anew",
    f"def mask(path, p): return True\ntx = optfn.masked(optfn.scale(2.0), lambda path, p: mask(path, p))\n{TREE}",
    "",
    "def mask(path, p): return path == 'w'",
)
world(
    "made of functions: schedule bound anew",
    f"def rate(t): return 2.0\ntx = optfn.sgd(lambda t: rate(t))\n{TREE}",
    "",
    "def rate(t): return 3.0",
)
world(
    "made of functions: a mask's dict",
    f"mask = {{'w': True, 'b': True}}\ntx = optfn.masked(optfn.scale(2.0), mask)\n{TREE}",
    "",
    "mask['b'] = False",
)
world(
    "made of functions: labels' dict",
    f"labels = {{'w': 'a', 'b': 'b'}}\ntx = optfn.partition({{'a': optfn.scale(2.0), 'b': optfn.scale(3.0)}}, labels)\n{TREE}",
    "",
    "labels.update(w='b', b='a')",
)
world(
    "made of functions: parts' dict",
    f"parts = {{'a': optfn.scale(2.0), 'b': optfn.scale(3.0)}}\ntx = optfn.partition(parts, {{'w': 'a', 'b': 'b'}})\n{TREE}",
    "",
    "parts.update(a=optfn.scale(7.0))",
    varies=False,
)
world(
    "made of functions: betas in a list",
    "betas = [0.9, 0.99]\ntx = optfn.adam(0.1, betas=betas)",
    UPDATE,
    "betas[0] = 0.1",
    varies=False,
)
world("made of functions: a tensor's rate", "lr = torch.tensor(0.1)\ntx = optfn.adam(lr)", UPDATE, "lr.fill_(0.5)", varies=False)
world(
    "made of functions: a tensor's rate of another dtype",
    "lr = torch.tensor(0.1)\ntx = optfn.adam(lr)",
    UPDATE,
    "lr.data = torch.tensor(0.5, dtype=torch.float64)",
    varies=False,
)
world("made of functions: bound anew", "tx = optfn.sgd(0.1)", UPDATE, "tx = optfn.sgd(0.5)")
world("made of functions: to another kind", "tx = optfn.sgd(0.1)", UPDATE, "tx = optfn.adam(0.5)")
world("made of functions: in a list", "l = [optfn.sgd(0.1)]", UPDATE.replace("tx", "l[0]"), "l[0] = optfn.sgd(0.5)")
world("made of functions: in a dict", "l = {'a': optfn.sgd(0.1)}", UPDATE.replace("tx", "l['a']"), "l['a'] = optfn.sgd(0.5)")
world(
    "made of functions: in an object",
    "a = types.SimpleNamespace(tx=optfn.sgd(0.1))",
    UPDATE.replace("tx", "a.tx"),
    "a.tx = optfn.sgd(0.5)",
)
world(
    "made of functions: in a module",
    "import settings",
    UPDATE.replace("tx", "settings.tx"),
    "settings.tx = optfn.sgd(0.5)",
    settings="import optfn\ntx = optfn.sgd(0.1)",
)
world("made of functions: made in the step", "lr = 0.1", UPDATE.replace("tx", "optfn.sgd(lr)"), "lr = 0.5")
world(
    "made of functions: only its update",
    "init, update = optfn.sgd(0.1)",
    "optfn.apply_updates(p, update(p + 1, init(p), p)[0])",
    "init, update = optfn.sgd(0.5)",
)
world("made of functions: passed", "tx = optfn.sgd(0.1)", UPDATE.replace("tx", "x"), "tx = optfn.sgd(0.5)", x="tx")
world(
    "made of functions: passed, reads a list",
    "l = [0.1]\ntx = optfn.sgd(lambda t: l[0])",
    UPDATE.replace("tx", "x"),
    "l[0] = 0.5",
    x="tx",
)
world(
    "made of functions: the library's own function replaced",
    "import optfn.core as core\nold = core.apply_updates",
    "core.apply_updates(p, p)",
    "core.apply_updates = lambda p, u: p * 7",
    undo="core.apply_updates = old",
)
world(
    "made of functions: map of the user's function",
    "k = 2.0\ndef f(x): return x * k",
    "optfn.tree.map(f, {'a': p})['a']",
    "k = 3.0",
)
world(
    "made of functions: a numpy schedule",
    "table = np.array([2.0, 3.0])\ntx = optfn.sgd(lambda t: float(table[0]))",
    UPDATE,
    "table[0] = 5.0",
    may_raise=(Unsupported,),
)
world(
    "made of functions: memory shared with numpy",
    "table = np.array([2.0], dtype=np.float32)\nr = torch.from_numpy(table)",
    "p * r",
    "table[0] = 5.0",
)
world(
    "made of functions: array closed over",
    "table = np.array([2.0])",
    "(p, p * torch.from_numpy(table))",
    "table[0] = 5.0",
    may_raise=(Unsupported,),
)
world("made of functions: tensor of a list", "l = [2.0, 3.0]", "p * torch.tensor(l).sum()", "l[0] = 5.0")
world(
    "made of functions: state closed over",
    "tx = optfn.sgd(0.1, momentum=0.9)\nstate = tx.init(torch.ones(2))",
    "optfn.apply_updates(p, p + optfn.tree.leaves(state)[-1].sum())",
    "state = optfn.tree.map(lambda x: x + 1, state)",
)

# The columns: calls with 2 entries or another number, with both gradients or one None, and where the world changes. What a step has
# found in the first call must not serve the last one, whether or not calls of other kinds come between.

CHANGE = "change"
_count = itertools.count()
COLUMNS: dict[str, tuple[Any, ...]] = {
    "first": ((2, True), CHANGE, (2, True)),
    "others": ((2, True), CHANGE, (3, True), (2, False), (2, True)),
}
# The second takes twice the time: each fifth row has it.
CELLS = [(name, "first") for name in WORLDS] + [(name, "others") for name in list(WORLDS)[::5]]


def imported(name: str, text: str, folder: Path) -> Any:
    """A module of this name and text."""
    (folder / f"{name}.py").write_text(text)
    importlib.invalidate_caches()
    return importlib.import_module(name)


def snapshot(of: Any) -> Any:
    """The same containers, with tensors that nobody else writes to."""
    if isinstance(of, Tensor):
        return of.detach().clone()
    if isinstance(of, dict):
        new = copy.copy(of)
        for key, x in of.items():
            new[key] = snapshot(x)
        return new
    if isinstance(of, tuple | list):
        return type(of)(*map(snapshot, of)) if hasattr(of, "_fields") else type(of)(map(snapshot, of))
    return of


def outcomes(of: World, column: str, folder: Path, compiled: bool) -> list[Any]:
    """What each call gives: a result, or an error. What a call must not write to is looked at here."""
    # Names of their own: Dynamo takes a module of the same name for the same module.
    number = next(_count)

    def text(source: str) -> str:
        return re.sub(r"\bsettings\b", f"settings_{number}", source)

    imported(f"settings_{number}", of.settings, folder)
    program = imported(f"program_{number}", text(of.before), folder)
    step = optfn.compile(program.step, donate=of.donate or ()) if compiled else program.step
    found: list[Any] = []
    try:
        for action in COLUMNS[column]:
            if action == CHANGE:
                exec(text(of.after), program.__dict__)
                continue
            n, both = action
            kind: Any = {"dtype": torch.float32, "device": "cpu"}
            p = torch.arange(1, n + 1, **kind)
            args = program.given(p, {"a": torch.full((n,), 2.0, **kind), "b": torch.full((n,), 3.0, **kind) if both else None})
            before = snapshot(args)
            try:
                with torch.no_grad(), program.context():
                    found.append(snapshot(program.call(step, *args)))
            except Exception as error:
                found.append(error)
                same(args, before)
            else:
                same(args[1:], before[1:])
    finally:
        exec(text(of.undo), program.__dict__)
    return found


def same(got: Any, wanted: Any) -> None:
    """The same kinds of containers, orders of keys, dtypes, shapes, devices and numbers."""
    if isinstance(wanted, Tensor):
        assert isinstance(got, Tensor)
        assert (got.layout, got.device, got.dtype, got.shape) == (wanted.layout, wanted.device, wanted.dtype, wanted.shape)
        if wanted.layout == torch.strided and not wanted.is_meta:
            torch.testing.assert_close(
                got.detach(), wanted.detach(), rtol=1e-6 * wanted.is_floating_point(), atol=0, equal_nan=True
            )
            if wanted.is_floating_point():  # zeros and infinities too
                assert torch.equal(got.signbit(), wanted.signbit())
        return
    assert type(got).__qualname__ == type(wanted).__qualname__  # the two programs have classes of their own
    if isinstance(wanted, dict):
        assert [(type(k), k) for k in got] == [(type(k), k) for k in wanted]
        if isinstance(wanted, defaultdict):
            assert repr(got.default_factory).split(" at ")[0] == repr(wanted.default_factory).split(" at ")[0]
        for k in wanted:
            same(got[k], wanted[k])
    elif isinstance(wanted, tuple | list):
        assert len(got) == len(wanted)
        for x, y in zip(got, wanted, strict=True):
            same(x, y)
    elif isinstance(wanted, int | float | complex | str | bytes):
        assert repr(got) == repr(wanted)


def differ(a: Any, b: Any) -> bool:
    try:
        same(a, b)
    except AssertionError:
        return True
    return False


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without code generation: regions are interpreted, and graphs of Dynamo's are run as they are."""
    monkeypatch.setattr(internals, "compile_with_inductor", lambda graph, *_: graph)
    with interpreted():
        yield


# What Dynamo of torch 2.13 answers with an error of its own; nothing has been written then, which ``outcomes`` looks at.
REFUSED = {
    "global: by globals()",
    "what the donated argument is: version",
    "torch: inference mode",
    "builtin method: fill's result",
    "outside: random",
    "outside: numpy.random",
    "made of functions: a numpy schedule",
}


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(("name", "column"), CELLS)
def test_a_compiled_step_is_the_eager_one(name: str, column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = WORLDS[name]
    monkeypatch.syspath_prepend(str(tmp_path))
    eager = outcomes(of, column, tmp_path, compiled=False)
    assert not of.varies or differ(eager[0], eager[-1]), "the row tests nothing: the eager step has not changed"
    for got, wanted in zip(outcomes(of, column, tmp_path, compiled=True), eager, strict=True):
        if isinstance(got, torch._dynamo.exc.TorchDynamoException) and name in REFUSED:
            continue
        if isinstance(got, Exception):
            if not isinstance(got, (*of.may_raise, *([type(wanted)] if isinstance(wanted, Exception) else []))):
                raise got
        else:
            assert not isinstance(wanted, Exception), f"the eager step raises {wanted!r}"
            same(got, wanted)


# Who traces: what most people write must not cost what Dynamo takes.

USUAL = {
    "adam": "tx = optfn.adam(0.1)\n",
    "clipped": "tx = optfn.chain(optfn.clip_by_global_norm(1.0), optfn.adamw(0.1, mask=lambda path, p: p.ndim > 1))\n",
    "scheduled": "tx = optfn.sgd(optfn.warmup_cosine_decay_schedule(0.0, 0.1, 3, 10), momentum=0.9)\n",
    "parts": "tx = optfn.partition({'w': optfn.adam(0.1), 'b': optfn.freeze()}, lambda path, p: path)\n",
    "injected": "tx = optfn.inject_hyperparams(optfn.adamw)(lr=0.1)\n",
    "a rule of the user's": "class S(typing.NamedTuple): a: Tensor\n"
    "tx = optfn.leafwise(lambda p: S(torch.zeros_like(p)), lambda g, s, p, t: (torch.tanh(s.a + g), S(s.a + g)))\n",
    "a rate that is closed over": "lr = torch.tensor(0.1)\ntx = optfn.chain(optfn.scale_by_adam(), optfn.scale_by_learning_rate(lr))\n",
    "numbers that are closed over": "decay, tx = 0.9, optfn.adam(0.1)\n",
}
STEP = """
def given(p, g):
    params = {"w": p[:, None] * p, "b": p}
    return params, tx.init(params), optfn.tree.map(torch.ones_like, params)
def step(p, state, g):
    updates, state = tx.update(g, state, p)
    return optfn.apply_updates(p, updates), state
"""


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("name", USUAL)
def test_the_usual_steps_are_traced_without_dynamo(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    program = imported(f"usual_{next(_count)}", PRELUDE + USUAL[name] + STEP, tmp_path)
    step = optfn.compile(program.step, donate=("p", "state"))
    for n in (2, 3, 2):
        args = program.given(torch.arange(1.0, n + 1), None)
        wanted = program.step(*snapshot(args))
        same(step(*args), wanted)
    assert all(call.program is not None for call in step._calls.calls)
