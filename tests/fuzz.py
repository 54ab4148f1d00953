"""A differential fuzzer: compiled steps against eager ones, over chains of everything public and trees of every kind.

    python tests/fuzz.py --minutes 20 --seed 7

A case is plain data, drawn from a seed: links of a chain as Python expressions, leaves, the None pattern of each step. Each step
starts eagerly from a copy of what the compiled step is given, so nothing adds up over steps. A case that fails is made smaller for
as long as it still fails, and printed as Python that runs.
"""

import argparse
import contextlib
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from interpreted import interpreted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import optfn

# Cases


@dataclass(frozen=True)
class Link:
    """A transformation as an expression, in which ``{0}`` and so on stand for those that it wraps."""

    text: str
    inner: tuple["Link", ...] = ()

    def __str__(self) -> str:
        return self.text.format(*self.inner)


@dataclass(frozen=True)
class Leaf:
    """A tensor: shape, dtype by name, and how it lies in memory."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"


@dataclass(frozen=True)
class Case:
    """A training loop.

    Attributes:
        seed: of the numbers.
        links: of the chain.
        leaves: of the parameters.
        tree: the container that holds them.
        absent: for each step the leaves that have no gradient.
        donate: what is donated.
        extra: what the loop hands over besides: "value", "number", "rate".
        updates: whether the step returns the updates too.
        sparse: the gradients of matrices are sparse.
    """

    seed: int
    links: tuple[Link, ...]
    leaves: tuple[Leaf, ...]
    tree: str = "dict"
    absent: tuple[tuple[int, ...], ...] = ((), ())
    donate: tuple[str, ...] = ("params", "state")
    extra: str = ""
    updates: bool = False
    sparse: bool = False

    def __str__(self) -> str:
        return (
            f"from fuzz import Case, Leaf, Link, check  # in tests/\n\n# optfn.chain({', '.join(map(str, self.links))})\n"
            f"check(\n    {self!r}\n)\n"
        )


class Pair(NamedTuple):
    first: Any
    second: Any


TREES: dict[str, Callable[[list[Any]], Any]] = {
    "dict": lambda x: {f"p{i}": v for i, v in enumerate(x)},
    "dict, unsorted": lambda x: {f"p{len(x) - i}": v for i, v in enumerate(x)},
    "list": list,
    "tuple": tuple,
    "namedtuple": lambda x: Pair(x[0], x[1:]),
    "nested": lambda x: {"a": [x[0], {"b": tuple(x[1:])}], "none": None},
    "bare": lambda x: x[0],
}

# What rounds: every operator in floating point may as well have rounded the other way.

_EXACT = frozenset(
    [
        "abs",
        "alias",
        "arange",
        "as_strided",
        "clamp",
        "clamp_max",
        "clamp_min",
        "clone",
        "copy",
        "copy_",
        "detach",
        "diagonal",
        "empty",
        "empty_like",
        "empty_strided",
        "eq",
        "expand",
        "eye",
        "fill_",
        "flip",
        "full",
        "full_like",
        "ge",
        "gt",
        "index",
        "index_put",
        "isfinite",
        "isinf",
        "isnan",
        "le",
        "lift_fresh",
        "lift_fresh_copy",
        "logical_and",
        "logical_not",
        "logical_or",
        "lt",
        "masked_fill",
        "maximum",
        "minimum",
        "amax",
        "amin",
        "max",
        "min",
        "ne",
        "neg",
        "new_empty",
        "new_full",
        "new_ones",
        "new_zeros",
        "ones",
        "ones_like",
        "permute",
        "select",
        "select_scatter",
        "sgn",
        "sign",
        "signbit",
        "slice",
        "slice_scatter",
        "split",
        "split_with_sizes",
        "squeeze",
        "stack",
        "cat",
        "t",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
        "view_as_complex",
        "view_as_real",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "where",
        "zero_",
        "zeros",
        "zeros_like",
        "scatter",
        "gather",
        "index_select",
        "item",
        "_local_scalar_dense",
        "resolve_conj",
        "resolve_neg",
        "_conj",
        "conj",
        "real",
        "imag",
        "narrow",
        "unfold",
        "repeat",
        "roll",
        "sort",
        "topk",
        "argsort",
        "_sparse_coo_tensor_with_dims_and_tensors",
        "_indices",
        "_values",
        "_coalesced_",
        "nonzero",
    ]
)


class Rounding(TorchDispatchMode):
    """Moves what each operator gives by as much as its rounding may be off: what long sums add up by as much as they may lose."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def moved(self, x: Any, size: float = 1.0) -> Any:
        if not isinstance(x, Tensor) or x.layout != torch.strided or not (x.is_floating_point() or x.is_complex()):
            return x
        eps = torch.finfo(x.dtype).eps * size
        if x.is_complex():
            noise = torch.view_as_complex(torch.empty(*x.shape, 2).uniform_(-eps, eps, generator=self.generator))
            return x + (noise * x.abs()).to(x.dtype)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (x * torch.empty(x.shape, dtype=wide).uniform_(1 - eps, 1 + eps, generator=self.generator)).to(x.dtype)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _EXACT or (name == "_to_copy" and not _narrows(args[0], kwargs.get("dtype"))):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            result = func(*args, **kwargs)
            return result.copy_(self.moved(result)) if isinstance(result, Tensor) else result
        args = [self.moved(x) for x in args]
        if name == "lerp" and isinstance(args[2], float):  # past the middle it computes with 1 - weight, which it rounds
            eps = torch.finfo(args[0].dtype).eps
            args[2] += torch.empty(()).uniform_(-eps, eps, generator=self.generator).item()
        result = func(*args, **kwargs)
        if isinstance(result, tuple | list):
            return type(result)(map(self.moved, result))
        longest = max((x.numel() for x in args if isinstance(x, Tensor)), default=1)
        terms = longest / max(result.numel(), 1) if isinstance(result, Tensor) else 1.0
        return self.moved(result, 1.0 + terms**0.5 if terms > 1 else 1.0)


def _narrows(x: Tensor, dtype: Any) -> bool:
    if dtype is None or not (dtype.is_floating_point or dtype.is_complex) or not (x.is_floating_point() or x.is_complex()):
        return dtype is not None and (dtype.is_floating_point or dtype.is_complex)
    return torch.finfo(dtype).eps > torch.finfo(x.dtype).eps


class Envelope:
    """What the eager step gives, and how far its results move when its operators round otherwise; computed when asked for."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step = step
        self.samples: list[list[Any]] = []

    def near(self, i: int, got: Tensor, wanted: Tensor) -> bool:
        """Whether leaf ``i`` may be what was got."""
        if _close(got, wanted, None):
            return True
        for count in (8, 40):
            while len(self.samples) < count:
                with Rounding(len(self.samples)):
                    result = self.step()
                self.samples.append(optfn.tree.flatten(result)[0])
            if _close(got, wanted, [s[i] for s in self.samples]):
                return True
        return False


def _close(got: Tensor, wanted: Tensor, samples: list[Tensor] | None) -> bool:
    """Entry by entry: equal up to the rounding of the result itself, or within twice what the samples span."""
    if wanted.layout != torch.strided:
        got, wanted = got.to_dense(), wanted.to_dense()
        samples = samples and [s.to_dense() for s in samples]
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return torch.equal(got, wanted) or (samples is not None and any(torch.equal(got, s) for s in samples))
    info = torch.finfo(wanted.dtype)

    def wide(x: Tensor) -> Tensor:
        x = x.detach().resolve_conj().resolve_neg()
        return (torch.view_as_real(x) if x.is_complex() else x).double()

    x, y = wide(got), wide(wanted)
    slack = 2 * info.eps * y.abs() + 4 * info.smallest_normal * info.eps
    equal = (x == y) | (x.isnan() & y.isnan())
    if samples is None:
        return bool((equal | ((x - y).abs() <= slack)).all())
    stacked = torch.stack([y, *map(wide, samples)])
    low, high = stacked.amin(0), stacked.amax(0)  # NaN where any sample is, as infinities are: there anything may come
    half = (high - low) / 2
    inside = (x >= low - half - slack) & (x <= high + half + slack)
    return bool((equal | inside | ~(high - low).isfinite()).all())


# A case, run


def tensor(leaf: Leaf, generator: torch.Generator, spread: bool = True) -> Tensor:
    """Numbers of several magnitudes, zeros among them, laid out as the leaf says."""
    dtype = getattr(torch, leaf.dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    x = torch.randn(leaf.shape, dtype=wide, generator=generator)
    if spread:
        x = x * 10.0 ** torch.randint(-2, 2, leaf.shape, generator=generator)
        x = x * (torch.rand(leaf.shape, generator=generator) > 0.1)
    return laid_out(x.to(dtype), leaf.layout)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed" and x.ndim > 1:
        return x.mT.contiguous().mT
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "offset":
        return torch.cat([x.new_zeros(3), x.reshape(-1), x.new_zeros(5)])[3 : 3 + x.numel()].view(x.shape)
    if layout == "sliced" and x.ndim:
        return torch.stack([x, x], -1)[..., 0]
    if layout == "conjugate" and x.is_complex():
        return x.conj().clone().conj()
    return x.clone(memory_format=torch.contiguous_format)


LAYOUTS = ("contiguous", "contiguous", "transposed", "channels_last", "offset", "sliced")


def copies(of: Any) -> Any:
    """The same numbers and strides, in memory of its own."""

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.layout != torch.strided:
            return x.clone()
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)

    return optfn.tree.map(copy, of)


class Smooth(NamedTuple):
    mu: Tensor


def smooth(g: Tensor, slots: Smooth, p: Any, step: Tensor) -> tuple[Tensor, Smooth]:
    mu = 0.9 * slots.mu + 0.1 * g
    return torch.tanh(mu * step), Smooth(mu)


class Total(NamedTuple):
    total: Any


def total(g: Tensor, slots: Any, p: Any, step: Tensor, shared: Total) -> tuple[tuple[Tensor], Any]:
    return (g.sum(),), slots


def average(shared: Total, sums: tuple[Tensor, ...]) -> Total:
    return Total(0.9 * shared.total + 0.1 * sums[0])


def share(g: Tensor, slots: Any, p: Any, step: Tensor, shared: Total) -> tuple[Tensor, Any]:
    return torch.tanh(g + shared.total), slots


COUPLED = {"Total": Total, "total": total, "average": average, "share": share}


def on_a_paraboloid(tx: optfn.GradientTransformation) -> optfn.GradientTransformation:
    """With a function that has the given gradient at the parameters, for what searches along a line."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        def value_fn(moved: Any) -> Tensor:
            # Of real views: the derivative of a sum of one complex entry has another stride than torch predicts.
            real = optfn.numerics.as_real
            away = optfn.tree.map(lambda p, q: None if q is None else real(q) - real(p.detach()), params, moved)
            seen = optfn.tree.map(lambda g, d: torch.zeros_like(d) if g is None else real(g.detach()), updates, away)
            return optfn.tree.vdot(seen, away) + optfn.tree.vdot(away, away)

        given = {"value": torch.zeros(()), "grad": updates, "value_fn": value_fn}
        return tx.update(updates, state, params, **{**extra, **given})

    return optfn.core.transformation(tx.init, update)


NAMES = {"optfn": optfn, "torch": torch, "Smooth": Smooth, "smooth": smooth, "on_a_paraboloid": on_a_paraboloid, **COUPLED}


def check(case: Case, quick: bool = False) -> None:
    """Run a case; raises AssertionError where a compiled step is not the eager one.

    Args:
        quick: regions are interpreted; no code is generated.
    """
    torch._dynamo.reset()
    with interpreted() if quick else contextlib.nullcontext():
        _run(case)


def step_of(tx: optfn.GradientTransformation, extra_is: str, updates_too: bool) -> Callable[..., Any]:
    """The step of a loop; it closes over nothing that could change, so that optfn traces it."""

    def step(params: Any, state: Any, grads: Any, extra: Any) -> Any:
        updates, state = tx.update(grads, state, params, value=extra if extra_is in ("value", "number") else 1.0)
        if extra_is == "rate":
            updates, _ = optfn.scale(extra).update(updates, (), params)
        moved = optfn.apply_updates(params, updates)
        return (moved, state, updates) if updates_too else (moved, state)

    return step


def _run(case: Case) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    make = TREES[case.tree]
    params = make([tensor(leaf, generator, spread=False) for leaf in case.leaves])
    tx = optfn.chain(*(eval(str(link), dict(NAMES)) for link in case.links))
    state = tx.init(params)

    eager = step_of(tx, case.extra, case.updates)
    compiled = optfn.compile(eager, donate=case.donate)
    for step, absent in enumerate(case.absent):
        grads = make([_gradient(case, i, leaf, generator, absent) for i, leaf in enumerate(case.leaves)])
        extra: Any = 1.0 + step if case.extra == "number" else torch.tensor(1.0 / (1 + step))
        given = {"params": params, "state": state, "grads": grads, "extra": extra}
        before = copies(tuple(given.values()))
        with torch.no_grad():
            wanted = eager(*copies(before))
        held = {
            name: [(x, x._version, _place(x)) for x in optfn.tree.leaves(of) if isinstance(x, Tensor)] for name, of in given.items()
        }
        outside = [(x, _outside(x)) for x in optfn.tree.leaves((params, grads)) if x.layout == torch.strided]
        with torch.no_grad():
            got = compiled(params, state, grads, extra)
        _compare(got, wanted, Envelope(lambda before=before: eager(*copies(before))), f"step {step}")
        for (name, tensors), copied in zip(held.items(), before, strict=True):
            old = [x for x in optfn.tree.leaves(copied) if isinstance(x, Tensor)]
            if name in case.donate:
                results = [x for x in optfn.tree.leaves(got[("params", "state").index(name)]) if isinstance(x, Tensor)]
                for (x, version, place), result, y in zip(tensors, results, old, strict=True):
                    assert result is x, f"step {step}: a donated tensor of {name} is not the result"
                    assert _place(x) == place, f"step {step}: a donated tensor of {name} lies elsewhere"
                    assert x._version > version or _identical(x, y), f"step {step}: the version of what was written is what it was"
            else:
                for (x, version, place), y in zip(tensors, old, strict=True):
                    assert x._version == version, f"step {step}: {name} was written to"
                    assert _place(x) == place, f"step {step}: {name} lies elsewhere"
                    assert _identical(x, y), f"step {step}: {name} has changed"
        for x, around in outside:
            assert torch.equal(around.nan_to_num(), _outside(x).nan_to_num()), f"step {step}: memory beside a tensor was written to"
        params, state = got[0], got[1]


def _gradient(case: Case, i: int, leaf: Leaf, generator: torch.Generator, absent: tuple[int, ...]) -> Any:
    g = tensor(leaf, generator)
    if i in absent:
        return None
    if case.sparse and g.ndim == 2:
        return (g * (g.real.sum(1, keepdim=True) > 0)).to_sparse(1)
    return g


def _place(x: Tensor) -> Any:
    return (x.data_ptr(), x.stride(), x.storage_offset()) if x.layout == torch.strided else x.layout


def _outside(x: Tensor) -> Tensor:
    """What lies in the same memory beside a tensor's entries."""
    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).clone()
    if x.numel():
        whole.as_strided(x.shape, x.stride(), x.storage_offset()).zero_()
    return whole


def _identical(x: Tensor, y: Tensor) -> bool:
    if x.layout != torch.strided:
        x, y = x.to_dense(), y.to_dense()
    return torch.equal(x.nan_to_num(), y.nan_to_num())


def _compare(got: Any, wanted: Any, envelope: Envelope, where: str) -> None:
    assert optfn.tree.paths(got) == optfn.tree.paths(wanted), f"{where}: another structure"
    leaves = zip(optfn.tree.paths(wanted), optfn.tree.flatten(got)[0], optfn.tree.flatten(wanted)[0], strict=True)
    for i, (path, x, y) in enumerate(leaves):
        if not isinstance(y, Tensor):
            assert x == y, f"{where}, {path}: {x!r}, eager {y!r}"
            continue
        kind = (x.shape, x.dtype, x.device, x.layout)
        assert kind == (y.shape, y.dtype, y.device, y.layout), f"{where}, {path}: {kind}, eager {(y.shape, y.dtype)}"
        if not envelope.near(i, x, y):
            off = (_wide(x) - _wide(y)).abs()
            raise AssertionError(f"{where}, {path}: off by up to {off.max().item():.3g} in {int((off > 0).sum())} of {off.numel()}")


def _wide(x: Tensor) -> Tensor:
    x = x.to_dense() if x.layout != torch.strided else x
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


# Drawing


class Draw:
    """A case drawn from a seed."""

    def __init__(self, seed: int, small: bool = False) -> None:
        self.random = random.Random(seed)
        self.seed, self.small = seed, small

    def one(self, *of: Any) -> Any:
        return self.random.choice(of)

    def number(self, low: float, high: float) -> float:
        return round(self.random.uniform(low, high), 3)

    def flag(self) -> bool:
        return self.random.random() < 0.5

    def maybe(self, chance: float) -> bool:
        return self.random.random() < chance

    def mask(self) -> str:
        return self.one(
            "lambda path, p: p.ndim > 1",
            "lambda path, p: p.numel() % 2 == 1",
            "lambda path, p: '1' not in path",
            "lambda path, p: True",
            "True",
        )

    def schedule(self) -> str:
        name = self.one(*SCHEDULES)
        return SCHEDULES[name](self)

    def rate(self) -> str:
        return (
            self.schedule()
            if self.maybe(0.25)
            else self.one(str(self.number(0.001, 0.5)), f"torch.tensor({self.number(0.001, 0.5)})")
        )

    def link(self, depth: int = 2) -> Link:
        names = [n for n in LINKS if depth or n not in WRAPPERS]
        name = self.one(*names)
        return Link(*LINKS[name](self, depth))

    def inner(self, depth: int) -> tuple[Link, ...]:
        return (self.link(depth - 1),)

    def leaf(self, dtype: str) -> Leaf:
        shapes = [(), (0,), (0, 3), (1,), (1, 1), (3,), (17,), (4, 4), (5, 3), (2, 9), (3, 1), (2, 3, 4), (2, 3, 2, 2), (33, 16)]
        large = [(70_000,), (260, 256), (64, 4096), (8, 16, 33, 33), (300, 1024)]
        shape = self.one(*large) if self.maybe(0.04 if self.small else 0.12) else self.one(*shapes)
        return Leaf(shape, dtype, self.one(*LAYOUTS))

    def case(self) -> Case:
        count = self.random.randint(1, 2 if self.small else 4)
        kind = self.one(
            "float32", "float32", "float32", "float64", "float16", "bfloat16", "complex64", "complex128", "mixed", "half"
        )
        dtypes = {"mixed": ("float32", "float64", "bfloat16"), "half": ("float32", "bfloat16", "float16")}.get(kind, (kind,))
        leaves = tuple(self.leaf(self.one(*dtypes)) for _ in range(count))
        steps = self.random.randint(2, 2 if self.small else 4)
        absent: list[tuple[int, ...]] = [()] * steps
        if self.maybe(0.4):
            absent = [tuple(i for i in range(count) if self.maybe(0.3)) for _ in range(steps)]
        donate = self.one(*[("params", "state")] * 12, ("params",), ("state",), ("state", "params"), ())
        links = tuple(self.link() for _ in range(self.random.randint(1, 2 if self.small else 4)))
        return Case(
            seed=self.seed,
            links=links,
            leaves=leaves,
            tree=self.one(*TREES),
            absent=tuple(absent),
            donate=donate if not self.small or donate else ("params", "state"),
            extra=self.one("", "", "", "value", "rate", "number"),
            updates=self.maybe(0.3),
            sparse=self.maybe(0.04),
        )


Args = tuple[str, tuple[Link, ...]]


def _call(name: str, *arguments: Callable[[Draw], str]) -> Callable[[Draw, int], Args]:
    """A transformation without an inner one; each argument is left out by chance."""

    def draw(d: Draw, depth: int) -> Args:
        return f"optfn.{name}({', '.join(a(d) for a in arguments if a.__name__ == 'needed' or d.maybe(0.6))})", ()

    return draw


def needed(f: Callable[[Draw], str]) -> Callable[[Draw], str]:
    def needed(d: Draw) -> str:
        return f(d)

    return needed


def _of(name: str, low: float, high: float) -> Callable[[Draw], str]:
    return lambda d: f"{name}={d.number(low, high)}"


def _choice(name: str, *values: Any) -> Callable[[Draw], str]:
    return lambda d: f"{name}={d.one(*values)!r}"


def _dtype(name: str) -> Callable[[Draw], str]:
    return lambda d: f"{name}={d.one('torch.float32', 'torch.float64', 'None')}"


def _rate(d: Draw) -> str:
    return f"lr={d.rate()}"


def _betas(d: Draw) -> str:
    return f"betas=({d.number(0, 0.99)}, {d.number(0.5, 0.999)})"


_eps, _decay, _max = _of("eps", 1e-3, 0.1), _of("weight_decay", 0, 0.5), _choice("maximize", True, False)
_matrices = "optfn.masked({}, lambda path, p: p.ndim == 2 and p.numel() > 0)"


def _numbers(d: Draw) -> str:
    return f"weight_dimension_numbers=optfn.MuonDimensionNumbers({d.one('0, 1', '-1, 0')})"


def _on_matrices(draw: Callable[[Draw, int], Args]) -> Callable[[Draw, int], Args]:
    def masked(d: Draw, depth: int) -> Args:
        text, inner = draw(d, depth)
        return _matrices.format(text), inner

    return masked


def _sgd(d: Draw, depth: int) -> Args:
    if d.maybe(0.3):
        return f"optfn.sgd({_rate(d)}, momentum={d.number(0.1, 0.99)}, nesterov=True, {_decay(d)})", ()
    return _call("sgd", _rate, _of("momentum", 0.1, 0.99), _of("dampening", 0, 0.9), _decay, _max)(d, depth)


def _inject(d: Draw, depth: int) -> Args:
    if d.flag():
        return f"optfn.inject_hyperparams(optfn.{d.one('adam', 'adamw', 'rmsprop', 'sgd')})({_rate(d)})", ()
    return "optfn.inject_hyperparams(lambda lr: optfn.chain(optfn.scale(lr), {0}))" + f"({_rate(d)})", d.inner(depth)


def _partition(d: Draw, depth: int) -> Args:
    labels = d.one("lambda path, p: 'a' if p.ndim > 1 else 'b'", "lambda path, p: 'a' if '0' in path else 'b'")
    return f"optfn.partition({{{{'a': {{0}}, 'b': {{1}}}}}}, {labels})", (*d.inner(depth), *d.inner(depth))


def _often(*counts: int) -> Callable[[Draw], str]:
    return lambda d: f"update_interval={d.one(*counts)}"


def _with_a_loss(name: str, *arguments: Callable[[Draw], str]) -> Callable[[Draw, int], Args]:
    """For what asks for the loss as a function of the parameters: its Hessian is diagonal."""
    call = _call(name, *arguments)
    loss = "sum(2 - optfn.numerics.as_real(x).cos().sum() for x in optfn.tree.leaves(p))"
    update = f"lambda u, s, p=None, **extra: tx.update(u, s, p, obj_fn=lambda p: {loss}, **extra)"
    return lambda d, depth: (f"(lambda tx: optfn.core.transformation(tx.init, {update}))({call(d, depth)[0]})", ())


def _of_low_rank(name: str, *arguments: Callable[[Draw], str]) -> Callable[[Draw, int], Args]:
    return _call(name, *arguments, lambda d: f"rank={d.one(1, 2, 64)}", lambda d: f"update_proj_gap={d.one(1, 2, 9)}")


def _of_examples(name: str, *arguments: Callable[[Draw], str]) -> Callable[[Draw, int], Args]:
    """For what takes gradients of examples: the gradient, and a tenth of it."""
    numbers = (_of("l2_norm_clip", 0.1, 2), _of("noise_multiplier", 0, 1), _choice("key", 0, 7))
    call = _call(name, *arguments, *map(needed, numbers))
    examples = "lambda updates, params: optfn.tree.map(lambda g: torch.stack([g, g / 10]), updates)"
    return lambda d, depth: (f"optfn.chain(optfn.stateless({examples}), {call(d, depth)[0]})", ())


def _searching(name: str, *arguments: Callable[[Draw], str]) -> Callable[[Draw, int], Args]:
    call = _call(name, *arguments)
    return lambda d, depth: (f"on_a_paraboloid(optfn.chain(optfn.scale(-0.5), {call(d, depth)[0]}))", ())


LINKS: dict[str, Callable[[Draw, int], Args]] = {
    "sgd": _sgd,
    "adam": _call("adam", _rate, _betas, _eps, _decay, _choice("amsgrad", True), _max, _choice("decoupled_weight_decay", True)),
    "adamw": _call("adamw", _rate, _betas, _eps, _decay, _choice("amsgrad", True), _max, lambda d: f"mask={d.mask()}"),
    "adagrad": _call("adagrad", _rate, _of("lr_decay", 0, 0.5), _decay, _of("initial_accumulator_value", 0, 0.5), _eps, _max),
    "rmsprop": _call(
        "rmsprop", _rate, _of("alpha", 0.5, 0.99), _eps, _decay, _of("momentum", 0.1, 0.9), _choice("centered", True), _max
    ),
    "adadelta": _call("adadelta", _rate, _of("rho", 0.5, 0.99), _eps, _decay, _max),
    "adamax": _call("adamax", _rate, _betas, _eps, _decay, _max),
    "nadam": _call(
        "nadam", _rate, _betas, _eps, _decay, _of("momentum_decay", 0, 0.1), _choice("decoupled_weight_decay", True), _max
    ),
    "radam": _call("radam", _rate, _betas, _eps, _decay, _choice("decoupled_weight_decay", True), _max),
    "rprop": _call("rprop", _rate, lambda d: f"etas=({d.number(0.1, 0.9)}, {d.number(1.1, 2)})", _decay, _max),
    "asgd": _call("asgd", _rate, _of("lambd", 0, 0.1), _of("alpha", 0.3, 0.9), lambda d: f"t0={d.one(1, 2, 100)}", _decay, _max),
    "adafactor": _call("adafactor", _rate, _of("beta2_decay", -0.9, -0.5), _of("d", 1, 2), _decay, _max),
    "muon": _on_matrices(
        _call(
            "muon", _rate, _decay, _of("momentum", 0.5, 0.95), _choice("nesterov", False), needed(lambda d: "ns_dtype=None"), _max
        )
    ),
    "sparse_adam": _call("sparse_adam", _rate, _betas, _eps, _max),
    "lbfgs": _call("lbfgs", _rate, lambda d: f"history_size={d.one(1, 2, 5)}"),
    "scale_by_backtracking_linesearch": _searching(
        "scale_by_backtracking_linesearch",
        needed(lambda d: f"{d.one(1, 4)}"),
        _of("decrease_factor", 0.3, 0.8),
        _choice("store_grad", True),
    ),
    "scale_by_zoom_linesearch": _searching(
        "scale_by_zoom_linesearch", needed(lambda d: f"{d.one(1, 4)}"), _of("curv_rtol", 0.1, 0.9), _choice("approx_dec_rtol", None)
    ),
    "scale_by_lbfgs": _call("scale_by_lbfgs", lambda d: f"memory_size={d.one(1, 2, 5)}", _choice("scale_init_precond", False)),
    "hutchinson_estimator_diag_hessian": _with_a_loss("hutchinson_estimator_diag_hessian", _choice("random_seed", 7)),
    "scale_by_sophia": _with_a_loss("scale_by_sophia", _of("b1", 0, 0.99), _of("gamma", 0.1, 10), _often(1, 2)),
    "sophia": _with_a_loss("sophia", _rate, _betas, _decay, _often(1, 2)),
    "scale_by_galore": _of_low_rank("scale_by_galore"),
    "galore": _of_low_rank("galore", _rate, _decay, _max),
    "scale_by_adadelta": _call("scale_by_adadelta", _of("rho", 0.5, 0.99), _eps),
    "scale_by_adamax": _call("scale_by_adamax", _of("b1", 0, 0.99), _of("b2", 0.5, 0.999), _eps),
    "scale_by_nadam": _call("scale_by_nadam", _of("b1", 0, 0.99), _of("b2", 0.5, 0.999), _eps),
    "scale_by_radam": _call("scale_by_radam", _of("b2", 0.5, 0.999), _eps, _of("threshold", 4, 6), _choice("eps_hat", True)),
    "scale_by_rprop": _call("scale_by_rprop", _of("learning_rate", 0.01, 0.5), _of("eta_plus", 1.1, 2)),
    "scale_by_asgd": _call("scale_by_asgd", _of("learning_rate", 0.01, 0.5), _of("lambd", 0, 0.5)),
    "scale_by_factored_rms": _call("scale_by_factored_rms", _of("beta2_decay", -0.9, -0.5)),
    "scale_by_param_block_rms": _call("scale_by_param_block_rms", _of("min_scale", 0.001, 1)),
    "scale_by_relative_step": _call("scale_by_relative_step", _of("learning_rate", 0.001, 0.5)),
    "scale_by_muon": _on_matrices(
        _call(
            "scale_by_muon",
            *(lambda d: f"ns_steps={d.one(1, 2, 5)}", _of("beta", 0.5, 0.95), _dtype("mu_dtype"), _choice("nesterov", False)),
            *(_choice("adaptive", True), _choice("preconditioning", "aol", "schatten"), _choice("bias_correction_mu", False)),
            *(_choice("eps_floor", True), _numbers),
        )
    ),
    "scale_by_shape": _on_matrices(
        _call("scale_by_shape", _choice("adjust_lr_fn", None, "match_rms_adamw"), _of("consistent_rms", 0.1, 1), _numbers)
    ),
    "scale_by_adam": _call(
        "scale_by_adam",
        *(_of("b1", 0, 0.99), _of("b2", 0.5, 0.999), _eps, _of("eps_root", 0, 0.01), _dtype("mu_dtype"), _dtype("nu_dtype")),
        *(_choice("nesterov", True), _choice("amsgrad", True, "debiased"), _choice("eps_hat", True)),
    ),
    "scale_by_adagrad": _call("scale_by_adagrad", _of("initial_accumulator_value", 0, 0.5), _eps, _choice("eps_in_sqrt", True)),
    "scale_by_rms": _call(
        "scale_by_rms",
        _of("decay", 0.5, 0.99),
        _eps,
        _choice("eps_in_sqrt", False),
        _choice("bias_correction", True),
        _choice("centered", True),
    ),
    "trace": _call(
        "trace", needed(_of("decay", 0, 0.99)), _choice("nesterov", True), _dtype("accumulator_dtype"), _of("dampening", 0, 0.9)
    ),
    "scale": _call("scale", needed(_of("step_size", -1, 1))),
    "scale_by_schedule": _call("scale_by_schedule", needed(Draw.schedule)),
    "scale_by_learning_rate": _call("scale_by_learning_rate", needed(Draw.rate), _choice("flip_sign", False)),
    "add_decayed_weights": _call("add_decayed_weights", needed(_of("weight_decay", 0, 0.5)), lambda d: f"mask={d.mask()}"),
    "clip": _call("clip", needed(_of("max_delta", 0.01, 2))),
    "clip_by_global_norm": _call(
        "clip_by_global_norm",
        *(
            needed(_of("max_norm", 0.01, 5)),
            _of("eps", 0, 1e-3),
            _choice("order", 1.0, 2.0, 3.0, float("inf")),
            _choice("keep_norm", True),
        ),
    ),
    "clip_by_block_rms": _call("clip_by_block_rms", needed(_of("threshold", 0.01, 2))),
    "reduce_on_plateau": _call(
        "reduce_on_plateau",
        _of("factor", 0.1, 0.9),
        lambda d: f"patience={d.one(1, 2)}",
        _choice("cooldown", 0, 1),
        _choice("mode", "min", "max"),
    ),
    "identity": _call("identity"),
    "freeze": lambda d, depth: (f"optfn.freeze({d.mask()})", ()),
    "stateless": lambda d, depth: ("optfn.stateless(lambda updates, params: optfn.tree.map(lambda u: u / 3 - 1, updates))", ()),
    "stateless_with_tree_map": lambda d, depth: ("optfn.stateless_with_tree_map(lambda g, p: torch.tanh(g))", ()),
    "leafwise": lambda d, depth: ("optfn.leafwise(lambda p: Smooth(torch.zeros_like(p)), smooth)", ()),
    "lion": _call("lion", _rate, _betas, _decay, _max),
    "sign_sgd": _call("sign_sgd", _rate, _decay, _max),
    "signum": _call("signum", _rate, _decay, _max),
    "yogi": _call("yogi", _rate, _betas, _eps, _decay, _max),
    "adabelief": _call("adabelief", _rate, _betas, _eps, _decay, _max),
    "amsgrad": _call("amsgrad", _rate, _betas, _eps, _max),
    "nadamw": _call("nadamw", _rate, _betas, _eps, _decay, _max),
    "adamaxw": _call("adamaxw", _rate, _betas, _eps, _decay, _max),
    "optimistic_gradient_descent": _call("optimistic_gradient_descent", _rate),
    "optimistic_adam_v2": _call("optimistic_adam_v2", _rate, _betas, _eps),
    "acprop": _call("acprop", _rate, _betas, _eps, _decay, _max),
    "ademamix": _call("ademamix", _rate, _eps, _decay, _max),
    "simplified_ademamix": _call("simplified_ademamix", _rate, _betas, _eps, _decay, _max),
    "adopt": _call("adopt", _rate, _betas, _eps, _decay, _max),
    "adan": _call("adan", _rate, _eps, _decay, _max),
    "novograd": _call("novograd", _rate, _betas, _eps, _decay, _max),
    "sm3": _call("sm3", _rate, _max),
    "madgrad": _call("madgrad", _rate, _eps, _decay, _max),
    "cocob": _call("cocob", _rate, _decay, _max),
    "dog": _call("dog", _rate, lambda d: f"init_step=('distance', {d.number(0.01, 1)})", _eps, _decay, _max),
    "dowg": _call("dowg", _rate, _of("init_estim_sq_dist", 0.01, 1), _eps, _decay, _max),
    "polyak_sgd": _call("polyak_sgd", _rate, _of("max_learning_rate", 0.1, 1), _of("f_min", 0, 1), _eps),
    "momo": _call("momo", _rate, _of("beta", 0.1, 0.99), _of("lower_bound", 0, 1), _decay, _choice("adapt_lower_bound", True)),
    "momo_adam": _call("momo_adam", _rate, _betas, _eps, _decay, _choice("adapt_lower_bound", True)),
    "prodigy": _call("prodigy", _rate, _betas, _eps, _of("estim_lr0", 0.01, 1), _decay, _choice("safeguard_warmup", True), _max),
    "dadapt_adamw": _call("dadapt_adamw", _rate, _betas, _eps, _of("estim_lr0", 0.01, 1), _decay, _max),
    "scale_by_lion": _call("scale_by_lion", _of("b1", 0, 0.99), _of("b2", 0.5, 0.999)),
    "scale_by_sign": _call("scale_by_sign"),
    "scale_by_yogi": _call("scale_by_yogi", _of("b1", 0, 0.99), _of("b2", 0.5, 0.999), _eps),
    "scale_by_belief": _call("scale_by_belief", _of("b1", 0, 0.99), _of("b2", 0.5, 0.999), _eps),
    "scale_by_amsgrad": _call("scale_by_amsgrad", _of("b1", 0, 0.99), _of("b2", 0.5, 0.999), _eps),
    "scale_by_rss": _call("scale_by_rss", _of("initial_accumulator_value", 0.01, 1), _eps),
    "scale_by_stddev": _call("scale_by_stddev", _of("decay", 0.5, 0.99), _eps),
    "scale_by_optimistic_gradient": _call("scale_by_optimistic_gradient", _of("alpha", 0, 2), _of("beta", 0, 2)),
    "scale_by_acprop": _call("scale_by_acprop", _of("b1", 0, 0.99), _of("b2", 0.5, 0.999), _eps),
    "scale_by_ademamix": _call("scale_by_ademamix", _of("b1", 0, 0.99), _of("b2", 0.5, 0.999), _eps),
    "scale_by_simplified_ademamix": _call("scale_by_simplified_ademamix", _of("b1", 0, 0.99), _of("b2", 0.5, 0.999), _eps),
    "scale_by_adopt": _call("scale_by_adopt", _of("b1", 0, 0.99), _of("b2", 0.5, 0.999), _eps),
    "scale_by_adan": _call("scale_by_adan", _of("b1", 0, 0.99), _of("b2", 0, 0.99), _of("b3", 0.5, 0.999), _eps),
    "scale_by_novograd": _call("scale_by_novograd", _of("b1", 0, 0.99), _of("b2", 0.5, 0.999), _eps),
    "scale_by_sm3": _call("scale_by_sm3", _of("b1", 0, 0.99)),
    "scale_by_madgrad": _call("scale_by_madgrad", needed(_of("learning_rate", 0.01, 1)), _eps),
    "scale_by_cocob": _call("scale_by_cocob"),
    "scale_by_distance_over_gradients": _call("scale_by_distance_over_gradients", _of("reps_rel", 0.01, 1), _eps),
    "scale_by_dog": _call("scale_by_dog", needed(lambda d: f"init_step=('heuristic', {d.number(0.01, 1)})"), _eps),
    "scale_by_dowg": _call("scale_by_dowg", _of("init_estim_sq_dist", 0.01, 1), _eps),
    "scale_by_polyak": _call("scale_by_polyak", _of("f_min", 0, 1), _eps, _choice("variant", "sps+")),
    "scale_by_momo": _call("scale_by_momo", _of("lr", 0.01, 1), _of("beta", 0.1, 0.99), _decay),
    "scale_by_momo_adam": _call("scale_by_momo_adam", _of("lr", 0.01, 1), _betas, _eps, _decay),
    "scale_by_prodigy": _call("scale_by_prodigy", _of("lr", 0.01, 1), _betas, _eps, _of("estim_lr0", 0.01, 1), _decay),
    "scale_by_dadapt_adamw": _call("scale_by_dadapt_adamw", _of("lr", 0.01, 1), _betas, _eps, _of("estim_lr0", 0.01, 1), _decay),
    "normalize_by_update_norm": _call("normalize_by_update_norm", _of("scale_factor", 0.1, 2), _eps),
    "coupled": lambda d, depth: ("optfn.coupled(lambda p: (), total, average, share, shared=Total(1.0))", ()),
    "lamb": _call("lamb", _rate, _betas, _eps, _decay, _max, lambda d: f"mask={d.mask()}"),
    "lars": _call("lars", needed(_rate), _decay, _of("trust_coefficient", 0.001, 0.5), _eps, _choice("nesterov", True), _max),
    "fromage": _call("fromage", _rate, _of("min_norm", 1e-3, 0.1), _max),
    "noisy_sgd": _call("noisy_sgd", _rate, _of("eta", 0, 0.1), _of("gamma", 0, 1), needed(_choice("key", 0, 7)), _max),
    "dpsgd": _of_examples("dpsgd", needed(_rate)),
    "differentially_private_aggregate": _of_examples("differentially_private_aggregate"),
    "add_noise": _call("add_noise", needed(_of("eta", 0, 0.1)), needed(_of("gamma", 0, 1)), needed(_choice("key", 0, 7))),
    "schedule_free_sgd": _call("schedule_free_sgd", _rate, _of("b1", 0.1, 0.99), _decay, _choice("warmup_steps", 2), _max),
    "schedule_free_adamw": _call("schedule_free_adamw", _rate, _eps, _decay, _choice("warmup_steps", 2), _dtype("state_dtype")),
    "centralize": _call("centralize"),
    "keep_params_nonnegative": _call("keep_params_nonnegative"),
    "zero_nans": _call("zero_nans"),
    "set_to_zero": _call("set_to_zero"),
    "normalize": _call("normalize"),
    "scale_by_param_block_norm": _call("scale_by_param_block_norm", _of("min_scale", 0.001, 1)),
    "scale_by_trust_ratio": _call(
        "scale_by_trust_ratio", _of("min_norm", 0.001, 1), _of("trust_coefficient", 0.001, 1), _of("eps", 1e-3, 0.1)
    ),
    "adaptive_grad_clip": _call("adaptive_grad_clip", needed(_of("clipping", 0.01, 1)), _of("eps", 1e-3, 0.1)),
    "ema": _call("ema", needed(_of("decay", 0, 0.99)), _choice("debias", False), _dtype("accumulator_dtype")),
    "apply_every": _call("apply_every", lambda d: f"k={d.one(1, 2, 3)}"),
    "ema_params": _call("ema_params", _of("decay", 0.1, 0.99), _dtype("average_dtype")),
    "selective_transform": lambda d, depth: (f"optfn.selective_transform(optfn.adam({_rate(d)}), freeze_mask={d.mask()})", ()),
    "snapshot": lambda d, depth: ("optfn.snapshot('norm', optfn.tree.norm)", ()),
    "monitor": lambda d, depth: (
        "optfn.monitor({{'norm': optfn.tree.norm, 'size': lambda updates: optfn.tree.norm(updates, 1)}})",
        (),
    ),
    "measure_with_ema": lambda d, depth: (
        f"optfn.monitor({{{{'norm': optfn.measure_with_ema(optfn.tree.norm, {d.number(0, 0.9)}, debias={d.flag()})}}}})",
        (),
    ),
    # What wraps
    "chain": lambda d, depth: ("optfn.chain({0}, {1})", (*d.inner(depth), *d.inner(depth))),
    "named_chain": lambda d, depth: ("optfn.named_chain(('a', {0}), ('b', {1}))", (*d.inner(depth), *d.inner(depth))),
    "masked": lambda d, depth: (f"optfn.masked({{0}}, {d.mask()})", d.inner(depth)),
    "partition": _partition,
    "multi_transform": _partition,
    "maximize": lambda d, depth: ("optfn.maximize({0})", d.inner(depth)),
    "sparse_masked": lambda d, depth: ("optfn.sparse_masked({0}, dense='zeros_absent')", d.inner(depth)),
    "inject_hyperparams": _inject,
    "sam": lambda d, depth: (f"optfn.sam({{0}}, {{1}}, {d.one(1, 2, 3)}, {d.flag()})", (*d.inner(depth), *d.inner(depth))),
    "schedule_free": lambda d, depth: (f"optfn.schedule_free({{0}}, {d.rate()}, {d.number(0.1, 0.99)})", d.inner(depth)),
    "apply_if_finite": lambda d, depth: (f"optfn.apply_if_finite({{0}}, {d.one(None, 2)})", d.inner(depth)),
    "inject_stateful_hyperparams": lambda d, depth: (
        f"optfn.inject_stateful_hyperparams(optfn.sgd)(lr=optfn.WrappedSchedule({d.schedule()}))",
        (),
    ),
    "conditionally_transform": lambda d, depth: ("optfn.conditionally_transform({0}, lambda step: step % 2 == 0)", d.inner(depth)),
    "conditionally_mask": lambda d, depth: ("optfn.conditionally_mask({0}, lambda step: step % 2 == 0)", d.inner(depth)),
    "lookahead": lambda d, depth: (
        f"optfn.lookahead({{0}}, {d.one(1, 2, 3)}, {d.number(0, 1)}, reset_state={d.flag()})",
        d.inner(depth),
    ),
    "flatten": lambda d, depth: ("optfn.flatten({0})", d.inner(depth)),
    "mechanize": lambda d, depth: (
        f"optfn.mechanize({{0}}, eps=1e-2, s_init={d.number(0.01, 1)}, num_betas={d.one(1, 6)})",
        d.inner(depth),
    ),
    "accumulate": lambda d, depth: (f"optfn.accumulate({{0}}, {d.one(1, 2, 3)}, use_grad_mean={d.flag()})", d.inner(depth)),
}
WRAPPERS = set(list(LINKS)[list(LINKS).index("chain") :])

SCHEDULES: dict[str, Callable[[Draw], str]] = {
    "constant_schedule": lambda d: f"optfn.constant_schedule({d.number(0.01, 1)})",
    "linear_schedule": lambda d: f"optfn.linear_schedule({d.number(0.01, 1)}, {d.number(0, 1)}, {d.one(1, 3, 10)})",
    "cosine_decay_schedule": lambda d: f"optfn.cosine_decay_schedule({d.number(0.01, 1)}, {d.one(1, 3, 10)}, {d.number(0, 0.5)})",
    "cosine_annealing_lr": lambda d: f"optfn.cosine_annealing_lr({d.number(0.01, 1)}, {d.one(2, 10)})",
    "cosine_annealing_warm_restarts": lambda d: (
        f"optfn.cosine_annealing_warm_restarts({d.number(0.01, 1)}, {d.one(1, 2)}, {d.one(1, 2)})"
    ),
    "cosine_onecycle_schedule": lambda d: f"optfn.cosine_onecycle_schedule({d.one(5, 10)}, {d.number(0.01, 1)})",
    "linear_onecycle_schedule": lambda d: f"optfn.linear_onecycle_schedule({d.one(5, 10)}, {d.number(0.01, 1)})",
    "one_cycle_lr": lambda d: (
        f"optfn.one_cycle_lr({d.number(0.01, 1)}, {d.one(5, 10)}, anneal_strategy={d.one('cos', 'linear')!r})"
    ),
    "cyclic_lr": lambda d: (
        f"optfn.cyclic_lr(0.01, 0.5, {d.one(1, 3)}, mode={d.one('triangular', 'triangular2', 'exp_range')!r}, gamma=0.9)"
    ),
    "exponential_decay": lambda d: f"optfn.exponential_decay({d.number(0.01, 1)}, {d.one(1, 5)}, 0.9, staircase={d.flag()})",
    "piecewise_constant_schedule": lambda d: f"optfn.piecewise_constant_schedule({d.number(0.01, 1)}, {{{{1: 0.5, 3: 0.1}}}})",
    "piecewise_interpolate_schedule": lambda d: (
        f"optfn.piecewise_interpolate_schedule({d.one('linear', 'cosine')!r}, {d.number(0.01, 1)}, {{{{2: 0.5, 3: 0.1}}}})"
    ),
    "polynomial_schedule": lambda d: f"optfn.polynomial_schedule({d.number(0.01, 1)}, 0.01, {d.number(1, 3)}, {d.one(3, 5)})",
    "sgdr_schedule": lambda d: "optfn.sgdr_schedule([dict(init_value=0.1, peak_value=0.5, warmup_steps=1, decay_steps=2)] * 2)",
    "multiplicative_lr": lambda d: f"optfn.multiplicative_lr({d.number(0.01, 1)}, lambda t: 0.9, 5)",
    "warmup_constant_schedule": lambda d: f"optfn.warmup_constant_schedule(0.0, {d.number(0.01, 1)}, {d.one(1, 3)})",
    "warmup_cosine_decay_schedule": lambda d: f"optfn.warmup_cosine_decay_schedule(0.0, {d.number(0.01, 1)}, 2, {d.one(3, 10)})",
    "warmup_exponential_decay_schedule": lambda d: f"optfn.warmup_exponential_decay_schedule(0.0, {d.number(0.01, 1)}, 2, 3, 0.5)",
    "warmup_stable_decay_schedule": lambda d: f"optfn.warmup_stable_decay_schedule(0.0, {d.number(0.01, 1)}, 1, 2, 3)",
    "join_schedules": lambda d: "optfn.join_schedules([optfn.linear_schedule(0.1, 0.5, 3), optfn.constant_schedule(0.2)], [2])",
    "chained_scheduler": lambda d: (
        "optfn.chained_scheduler([optfn.linear_schedule(0.5, 1.0, 3), optfn.exponential_decay(0.9, 1, 0.9)])"
    ),
}


def fits(case: Case) -> bool:
    """Whether the eager loop runs: some rules take no complex numbers, no leaf of a shape, or no mixture."""
    try:
        quiet = replace(case, donate=())
        with _Eagerly():
            _run(quiet)
    except Exception:
        return False
    return True


class _Eagerly:
    """optfn.compile that compiles nothing."""

    def __enter__(self) -> None:
        self.compile = optfn.compile
        optfn.compile = lambda fn, **_: fn  # type: ignore[assignment]

    def __exit__(self, *_: Any) -> None:
        optfn.compile = self.compile


def draw(seed: int, small: bool = False) -> Case:
    """The case of a seed: the first one drawn that runs eagerly."""
    d = Draw(seed, small)
    while not fits(case := d.case()):
        pass
    return case


# Shrinking


def smaller(case: Case) -> Iterator[Case]:
    """Cases with less in them, those that lose most first."""

    def without(of: tuple[Any, ...], i: int) -> tuple[Any, ...]:
        return of[:i] + of[i + 1 :]

    for i, link in enumerate(case.links):
        if len(case.links) > 1:
            yield replace(case, links=without(case.links, i))
        for inner in link.inner:
            yield replace(case, links=(*case.links[:i], inner, *case.links[i + 1 :]))
        for shrunk in _smaller_link(link):
            yield replace(case, links=(*case.links[:i], shrunk, *case.links[i + 1 :]))
    for i in range(len(case.leaves)):
        if len(case.leaves) > 1:
            absent = tuple(tuple(j - (j > i) for j in step if j != i) for step in case.absent)
            yield replace(case, leaves=without(case.leaves, i), absent=absent)
    for i in range(len(case.absent)):
        if len(case.absent) > 1:
            yield replace(case, absent=without(case.absent, i))
    if any(case.absent):
        yield replace(case, absent=tuple(() for _ in case.absent))
    yield from (replace(case, **{name: value}) for name, value in SIMPLE.items() if getattr(case, name) != value)
    for i, leaf in enumerate(case.leaves):
        for simple in _smaller_leaf(leaf):
            yield replace(case, leaves=(*case.leaves[:i], simple, *case.leaves[i + 1 :]))


SIMPLE: dict[str, Any] = {"tree": "bare", "donate": ("params", "state"), "extra": "", "updates": False, "sparse": False}


def _smaller_link(link: Link) -> Iterator[Link]:
    for i, inner in enumerate(link.inner):
        for shrunk in (*inner.inner, *_smaller_link(inner)):
            yield Link(link.text, (*link.inner[:i], shrunk, *link.inner[i + 1 :]))
    name, bracket, arguments = link.text.partition("(")
    parts = arguments.removesuffix(")").split(", ")
    if bracket and "(" not in arguments and not link.inner:
        for i in range(len(parts)):
            yield Link(f"{name}({', '.join(parts[:i] + parts[i + 1 :])})")


def _smaller_leaf(leaf: Leaf) -> Iterator[Leaf]:
    for shape in ((), (1,), (3,), (3, 2), leaf.shape[1:], leaf.shape[:-1]):
        if len(shape) <= len(leaf.shape) and torch.Size(shape).numel() < max(torch.Size(leaf.shape).numel(), 1):
            yield replace(leaf, shape=shape)
    for name, value in (("dtype", "float32"), ("layout", "contiguous")):
        if getattr(leaf, name) != value:
            yield replace(leaf, **{name: value})


def failure(case: Case, quick: bool = False) -> Exception | None:
    """What is wrong; None where nothing is."""
    try:
        check(case, quick)
    except Exception as error:
        return error
    return None


def shrunk(case: Case, quick: bool = False, seconds: float = 240.0) -> Case:
    """A case that fails and has no smaller one that does, or the smallest found in the time."""
    kind = type(failure(case, quick))
    end, again = time.monotonic() + seconds, True
    while again and time.monotonic() < end:
        again = False
        for candidate in smaller(case):
            if time.monotonic() > end:
                break
            if fits(candidate) and type(failure(candidate, quick)) is kind:
                case, again = candidate, True
                break
    return case


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long")
    parser.add_argument("--cases", type=int, default=0, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--small", action="store_true", help="smaller cases, of which more fit into the time")
    parser.add_argument("--quick", action="store_true", help="interpret regions: no code is generated")
    parser.add_argument("--keep", action="store_true", help="print failing cases as they are, not made smaller")
    options = parser.parse_args(arguments)
    end, seed, failed = time.monotonic() + 60 * options.minutes, options.seed, 0
    warnings.filterwarnings("ignore", "apply_updates: every update is None")  # some cases are so
    used: Counter[str] = Counter()
    while time.monotonic() < end and (not options.cases or seed < options.seed + options.cases):
        case = draw(seed, options.small)
        started = time.monotonic()
        if (error := failure(case, options.quick)) is not None:
            failed += 1
            print(f"\nseed {seed} fails: {error!r}", flush=True)
            small = case if options.keep else shrunk(case, options.quick)
            print(small, *traceback.format_exception(failure(small, options.quick)), sep="\n", flush=True)
        used.update(name for name in LINKS if any(f"optfn.{name}(" in str(link) for link in case.links))
        print(f"seed {seed}: {'failed' if error else 'same'}, {time.monotonic() - started:.1f} s", flush=True)
        seed += 1
    print(
        f"\n{seed - options.seed} cases from seed {options.seed}, {failed} failed; never used: {sorted(LINKS.keys() - used.keys())}"
    )
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
