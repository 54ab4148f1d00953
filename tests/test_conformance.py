"""The conformance grid: every public transformation (the rows, in ``grid``) times everything that the design promises of each.

A cell is green, or its row declares the error that the check must raise and the reason for it, which is printed (``-rx``).
"""

import ast
import functools
import inspect
import io
import itertools
import tokenize
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from grid import ROWS, Row
from interpreted import interpreted
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import optfn
from optfn import tree
from optfn.numerics import as_real

SHAPES: dict[str, tuple[int, ...]] = {"a": (2, 3), "b": (3,)}


class Sample(NamedTuple):
    """What a trajectory starts from: parameters, one tree of gradients a step, and the tensor hyperparameter."""

    params: Any
    grads: list[Any]
    h: Tensor | None


def sample(
    row: Row, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64, steps: int = 0, seed: int = 0
) -> Sample:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> dict[str, Tensor]:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return {name: torch.randn(shape, dtype=wide, generator=generator).to(dtype) for name, shape in shapes.items()}

    return Sample(draw(), [draw() for _ in range(steps or row.steps)], hyperparameter(row))


def hyperparameter(row: Row, dtype: torch.dtype = torch.float64) -> Tensor | None:
    return None if row.value is None else torch.tensor(row.value, dtype=dtype)


def as_given(row: Row, grads: Any) -> Any:
    """Gradients in the layout that the row takes."""

    def sparse(g: Tensor) -> Tensor:
        indices = torch.ones(g.shape).nonzero().T.to(g.device)
        return torch.sparse_coo_tensor(indices, g.reshape(-1), g.shape, is_coalesced=True, check_invariants=False)

    return tree.map(sparse, grads) if row.sparse else grads


def dense(tensors: Any) -> Any:
    return tree.map(lambda x: x.to_dense() if x.layout == torch.sparse_coo else x, tensors)


def step(row: Row, params: Any, grads: Any, state: Any, h: Any = None) -> tuple[Any, Any, Any]:
    """One step: the updates, the next state, the next parameters."""
    updates, state = row.build(h).update(as_given(row, grads), state, params, **row.extra)
    return dense(updates), state, optfn.apply_updates(params, updates)


def trajectory(row: Row, params: Any, grads: list[Any], h: Any = None) -> tuple[list[Any], Any, Any]:
    """The updates of every step, the last state, the last parameters."""
    state = row.place(row.build(h).init(params), h)
    updates: list[Any] = []
    for g in grads:
        u, state, params = step(row, params, g, state, h)
        updates.append(u)
    return updates, state, params


def assert_same(actual: Any, expected: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    """The same structure, dtypes, shapes and devices, and the same values (bit for bit without a tolerance)."""
    found, spec = tree.flatten(actual)
    wanted = tree.match(spec, expected, "expected", "actual")
    for path, x, y in zip(tree.paths(actual), found, wanted, strict=True):
        if not isinstance(x, Tensor):
            assert x is y, f"{path}: {x} and {y}"
        else:
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=False, msg=lambda m, path=path: f"{path}: {m}")


LIFTED = (optfn.LeafwiseState, optfn.CoupledState)


def without(of: Any, name: str) -> Any:
    """A tree without what its dicts hold under ``name``, and without the count of that leaf, the last one."""
    if isinstance(of, dict):
        return {key: without(x, name) for key, x in of.items() if key != name}
    if isinstance(of, LIFTED):
        return of._replace(step=of.step[:-1], slots=without(of.slots, name))
    if isinstance(of, tuple | list):
        parts = [without(x, name) for x in of]
        return type(of)(*parts) if hasattr(of, "_fields") else type(of)(parts)
    return of


def only(of: Any, name: str) -> dict[str, Any]:
    """What a state holds for the leaf ``name``, the last one: its slots and its count."""
    steps = {f"step {i}": s.step[-1] for i, s in enumerate(x for x in tree.subtrees(of) if isinstance(x, LIFTED))}
    return {**steps, **{path: x for path, x in tree.to_flat_dict(of).items() if path.split(".")[-1] == name}}


def memory(of: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree.leaves(of) if x.layout == torch.strided and x.numel()}


# The columns. Each is a function of a row that raises where the row does not conform.


COLUMNS: dict[str, Callable[[Row], None]] = {}


def column(check: Callable[[Row], None]) -> Callable[[Row], None]:
    COLUMNS[check.__name__.rstrip("_")] = check
    return check


@column
def pure(row: Row) -> None:
    params, grads, h = sample(row)
    tx = row.build(h)

    def unchanged(*given: Any) -> Callable[[], None]:
        tensors = tree.leaves(given)
        before = [(x._version, x.to_dense().clone() if x.is_sparse else x.clone()) for x in tensors]

        def check() -> None:
            for x, (version, value) in zip(tensors, before, strict=True):
                assert x._version == version, "an argument was written to"
                assert torch.equal(x.to_dense() if x.is_sparse else x, value), "an argument has another value"

        return check

    check = unchanged(params, h)
    state = tx.init(params)
    check()
    for g in grads:
        own = [x for x in tree.leaves(state) if x.numel()]
        assert len(memory(state)) == len(own), "two parts of the state share memory, so it cannot be donated"
        given = as_given(row, g)
        assert not memory(state) & (memory(params) | memory(given) | memory([h])), "the state shares memory with an argument"
        check = unchanged(params, given, state, h)
        updates, new = tx.update(given, state, params, **row.extra)
        check()
        check = unchanged(params, updates)
        params = optfn.apply_updates(params, updates)
        check()
        state = new


@functools.cache
def compiled(row: Row) -> tuple[list[Any], list[Any], int]:
    """Six steps eagerly and compiled, with a tensor hyperparameter that changes; and the number of graphs."""
    torch._dynamo.reset()
    params, grads, h = sample(row, steps=6)
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph  # what Dynamo has written down, as it is: to compile it too takes as long again, and "donated" does

    def run(f: Callable[..., Any]) -> list[Any]:
        p, results = params, []
        state = row.build(h).init(p)
        for i, g in enumerate(grads):
            rate = None if h is None else h * (1 - 0.01 * i)
            g = as_given(row, g)
            updates, state, p = f(p, g, row.place(state, rate), rate)
            results.append((updates, state, p))
        return results

    def once(p: Any, g: Any, state: Any, rate: Any) -> Any:
        updates, state = row.build(rate).update(g, state, p, **row.extra)
        return dense(updates), state, optfn.apply_updates(p, updates)

    return run(once), run(torch.compile(once, fullgraph=True, backend=counting)), graphs


@column
def fullgraph(row: Row) -> None:
    eager, found, _ = compiled(row)
    assert_same(found, eager, rtol=1e-14, atol=1e-15)


@column
def one_graph(row: Row) -> None:
    graphs = compiled(row)[2]
    assert graphs == 1, f"{graphs} graphs"


@column
def donated(row: Row) -> None:
    """As optfn.compile takes a step apart, each part run as it is."""
    params, grads, h = sample(row, steps=4)
    tx = row.build(h)

    def step(params: Any, state: Any, grads: Any, extra: Any) -> Any:
        updates, state = tx.update(grads, state, params, **extra)
        return optfn.apply_updates(params, updates), state, dense(updates)

    copies = tree.map(lambda x: x.detach().clone(), (params, tx.init(params)))
    with interpreted():
        compiled = optfn.compile(step, donate=("params", "state"))
        state = tx.init(params)
        for g in grads:
            *copies, expected = step(*copies, as_given(row, g), row.extra)
            params, state, updates = compiled(params, state, as_given(row, g), row.extra)
            assert_same((params, state, updates), (*copies, expected), rtol=1e-14, atol=1e-15)
        assert row.sparse or compiled._calls.calls[0].program is not None, "the step was not traced"


@column
def vmap(row: Row) -> None:
    batch = [sample(row, seed=i) for i in range(3)]
    params, grads = (tree.map(lambda *x: torch.stack(x), *(s[i] for s in batch)) for i in (0, 1))
    tx = row.build(batch[0].h)

    def init_and_steps(p: Any, *gs: Any) -> Any:
        return trajectory(row, p, list(gs), batch[0].h)[:2]

    # Once through the whole trajectory, once with init and update mapped apart, as in a training loop.
    alone = [init_and_steps(s.params, *s.grads) for s in batch]
    expected = tree.map(lambda *x: torch.stack(x), *alone)
    assert_same(torch.vmap(init_and_steps)(params, *grads), expected, rtol=1e-14, atol=1e-15)
    state = torch.vmap(tx.init)(params)
    p, updates = params, []
    for g in grads:
        u, state = torch.vmap(lambda g, s, p: tx.update(as_given(row, g), s, p, **row.extra))(g, state, p)
        p = torch.vmap(optfn.apply_updates)(p, u)
        updates.append(u)
    assert_same((updates, state), expected, rtol=1e-14, atol=1e-15)


@column
def vmap_lr(row: Row) -> None:
    params, grads, h = sample(row)
    h = h if h is not None else torch.tensor(0.1)
    hs = torch.stack([h, h * 0.9, h * 0.5])

    def last(h: Tensor) -> Any:
        return trajectory(row, params, grads, h)[1:]

    expected = tree.map(lambda *x: torch.stack(x), *(last(x) for x in hs))
    assert_same(torch.vmap(last)(hs), expected, rtol=1e-14, atol=1e-15)
    first = [tree.map(lambda x, i=i: x[i], expected) for i in (0, 2)]
    assert any(not torch.equal(x, y) for x, y in zip(*map(tree.leaves, first), strict=True)), "nothing depends on h"


def loss_of(row: Row) -> Callable[..., Tensor]:
    """A scalar in which every float64 output of three steps has a weight of its own."""

    def loss(params: Any, grads: list[Any], h: Any = None) -> Tensor:
        # A scheduled rate is in the state in float32, to be read; differences of it would be rounding.
        outputs = [x for x in tree.leaves(trajectory(row, params, grads, h)) if x.dtype == torch.float64]
        weights = itertools.count(1)
        return torch.stack([(x * torch.cos(torch.arange(x.numel()) + next(weights)).reshape(x.shape)).sum() for x in outputs]).sum()

    return loss


def arguments(row: Row, zero: bool = False) -> tuple[Any, ...]:
    params, grads, h = sample(row)
    if zero:
        # All of one leaf, one entry of the other, in every step.
        grads = [{"a": torch.zeros_like(g["a"]), "b": g["b"] * torch.tensor([0.0, 1.0, 1.0])} for g in grads]
    return (params, grads) if h is None else (params, grads, h)


def gradient(row: Row, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return torch.func.grad(loss_of(row), argnums=tuple(range(len(args))))(*args)


def tangents(args: tuple[Any, ...]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    return tree.map(lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator), args)


def dot(x: Any, y: Any) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(tree.leaves(x), tree.leaves(y), strict=True)]).sum()


@column
def grad(row: Row) -> None:
    """Of three steps with respect to params, gradients and the hyperparameter: right by central differences."""
    args = arguments(row)
    loss, found, directions = loss_of(row), gradient(row, args), tangents(args)
    for i, name in enumerate(("params", "grads", "h")[: len(args)]):

        def along(t: float, i: int = i) -> Tensor:
            return loss(*args[:i], tree.map(lambda x, v: x + t * v, args[i], directions[i]), *args[i + 1 :])

        # Fourth-order differences: the error is far below the tolerance also where the third derivative is not small.
        d = 1e-4
        expected = (8 * (along(d) - along(-d)) - (along(2 * d) - along(-2 * d))) / (12 * d)
        torch.testing.assert_close(dot(found[i], directions[i]), expected, rtol=1e-7, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
        assert expected.abs() > 1e-3, f"nothing depends on {name}"


@column
def grad_at_zero(row: Row) -> None:
    """Finite where a gradient is exactly zero."""
    for x in tree.leaves(gradient(row, arguments(row, zero=True))):
        assert x.isfinite().all()


@column
def jvp(row: Row) -> None:
    for zero in (False, True):
        args = arguments(row, zero)
        directions = tangents(args)
        found = torch.func.jvp(loss_of(row), args, directions)[1]
        torch.testing.assert_close(found, dot(gradient(row, args), directions), rtol=1e-11, atol=1e-11)


@column
def none(row: Row) -> None:
    """A leaf without a gradient keeps its slots, its step and its parameter; the others are as in a tree without it."""
    params, grads, h = sample(row, {**SHAPES, "c": (3,)})
    absent = [{**g, "c": None} for g in grads]
    found = trajectory(row, params, absent, h)
    assert_same(without(found, "c"), trajectory(row, without(params, "c"), without(grads, "c"), h))
    assert all(u["c"] is None for u in found[0])
    assert torch.equal(found[2]["c"], params["c"])
    # After steps of its own, too.
    _, state, p = trajectory(row, params, grads, h)
    updates, new, q = step(row, p, absent[0], state, h)
    assert updates["c"] is None
    assert torch.equal(q["c"], p["c"])
    for path, old in only(state, "c").items():
        assert torch.equal(only(new, "c")[path], old), f"{path} has changed"


@column
def none_param(row: Row) -> None:
    params, grads, h = sample(row)
    found = trajectory(row, {**params, "c": None}, [{**g, "c": None} for g in grads], h)
    assert_same(without(found, "c"), trajectory(row, params, grads, h))
    assert found[2]["c"] is None
    assert not [path for path in tree.to_flat_dict(found[1]) if path.endswith(".c")], "something is kept for nothing"


@column
def complex_(row: Row) -> None:
    """Real and imaginary part, each as if it were a real tensor."""
    for dtype in (torch.complex64, torch.complex128):
        params, grads, h = sample(row, dtype=dtype)
        found = trajectory(row, params, grads, h)
        real = trajectory(row, tree.map(as_real, params), tree.map(as_real, grads), h)
        assert_same(tree.map(as_real, found), real, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
        assert {x.dtype for x in tree.leaves((found[0], found[2]))} <= {dtype}


def half(row: Row, dtype: torch.dtype) -> None:
    params, grads, h = sample(row, dtype=dtype)
    _, state, params = trajectory(row, params, grads, h)
    own = {id(x): kept for name, kept in row.wide.items() for x in tree.leaves(tree.get(state, name))}
    assert bool(own) == bool(row.wide)

    def check_dtype(x: Tensor) -> None:
        assert x.dtype == own.get(id(x), dtype), f"a slot is {x.dtype}"

    tree.map_params(check_dtype, state, params)

    # One more step against float32 from the same numbers. What is no chain rounds once, at its end. In a chain at most
    # four links round, each by eps / 2, and none more than doubles what the one before left.
    chained = any(type(part) is tuple and part for part in tree.subtrees(state))
    bound = 4 * torch.finfo(dtype).eps
    wide_state = tree.map_params(lambda x: x.float() if x.dtype == dtype else x, state, params)
    for grad_dtype, param_dtype in itertools.product((dtype, torch.float32), repeat=2):
        p, g = tree.cast(params, param_dtype), tree.cast(grads[0], grad_dtype)
        s = state if param_dtype == dtype else wide_state
        updates, new, moved = step(row, p, g, s, h)
        wide = step(row, tree.cast(params, torch.float32), tree.cast(g, torch.float32), wide_state, h)
        assert {x.dtype for x in tree.leaves(updates)} <= {grad_dtype}
        assert {x.dtype for x in tree.leaves(moved)} == {param_dtype}
        assert [x.dtype for x in tree.leaves(new)] == [x.dtype for x in tree.leaves(s)], "the state's dtypes have changed"
        for x, y in zip(tree.leaves((updates, new)), tree.leaves(wide[:2]), strict=True):
            atol = bound * y.abs().max().item() if chained and x.is_floating_point() else 0
            torch.testing.assert_close(x, y.to(x.dtype), rtol=0, atol=atol)
        for x, u, q in zip(*(tree.flatten(t)[0] for t in (p, updates, moved)), strict=True):
            assert torch.equal(q, x if u is None else (x.double() + u.double()).to(x.dtype))


@column
def bf16(row: Row) -> None:
    half(row, torch.bfloat16)


@column
def fp16(row: Row) -> None:
    half(row, torch.float16)


@column
def float64(row: Row) -> None:
    """Nothing is rounded to float32 on the way, whatever the hyperparameter's dtype; and float32 stays float32."""
    params, grads, h = sample(row)
    updates, state, _ = found = trajectory(row, params, grads, h)
    slots: list[Tensor] = []
    tree.map_params(lambda x: slots.append(x), state, params)
    for x in tree.leaves(updates) + [x for x in slots if not row.wide]:
        assert x.dtype == torch.float64
        assert not torch.equal(x, x.float().double()) or not x.any(), "rounded to float32"
    eps = torch.finfo(torch.float32).eps
    narrow = trajectory(row, tree.cast(params, torch.float32), tree.cast(grads, torch.float32), h)
    assert {x.dtype for x in tree.leaves((narrow[0], narrow[2]))} <= {torch.float32}
    for x, y in zip(tree.leaves(narrow), tree.leaves(found), strict=True):
        torch.testing.assert_close(x.to(y.dtype), y, rtol=64 * eps, atol=64 * eps)
    if h is not None:
        mixed = trajectory(row, params, grads, h.float())
        assert [x.dtype for x in tree.leaves(mixed)] == [x.dtype for x in tree.leaves(found)]


@column
def scalar_leaf(row: Row) -> None:
    """A 0-dim leaf does what one of shape [1] does."""
    params, grads, h = sample(row, {**SHAPES, "c": (1,)})
    flat = [{**x, "c": x["c"].reshape(())} for x in (params, *grads)]
    found, expected = trajectory(row, flat[0], flat[1:], h), trajectory(row, params, grads, h)
    assert_same(tree.map(lambda x, y: x.reshape(y.shape), found, expected), expected)
    for x, y in zip(only(found, "c").values(), only(trajectory(row, flat[0], flat[1:], h), "c").values(), strict=True):
        assert x.shape == y.shape == ()


@column
def empty_leaf(row: Row) -> None:
    params, grads, h = sample(row, {**SHAPES, "c": (0, 3)})
    found = trajectory(row, params, grads, h)
    assert_same(without(found, "c"), trajectory(row, without(params, "c"), without(grads, "c"), h))
    assert found[2]["c"].shape == (0, 3)


@column
def meta(row: Row) -> None:
    """Shapes and dtypes without values: what a checkpoint loader or a sharding plan asks for."""
    given = sample(row, dtype=torch.float32)
    found = trajectory(row, *tree.map(lambda x: x.to("meta"), tuple(given)))
    expected = trajectory(row, *given)
    for x in tree.leaves(found):
        assert x.is_meta
    assert_same(found, tree.map(lambda x: x.to("meta"), expected))


def traceable(row: Row) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]:
    """A step, arguments to trace it with, and other ones that a graph with values baked in would get wrong."""

    def arguments(seed: int, rate: float) -> tuple[Any, ...]:
        params, grads, h = sample(row, seed=seed)
        h = torch.tensor(rate) if h is None else h * rate
        state = row.place(row.build(h).init(params), h)
        for g in grads[1:]:
            _, state, params = step(row, params, g, state, h)
        return params, as_given(row, grads[0]), state, h

    def once(p: Any, g: Any, state: Any, rate: Any) -> Any:
        updates, state = row.build(rate).update(g, state, p, **row.extra)
        return dense(updates), state, optfn.apply_updates(p, updates)

    return once, arguments(0, 1.0), arguments(1, 0.9)


@column
def export(row: Row) -> None:
    once, example, other = traceable(row)

    class Step(torch.nn.Module):
        def forward(self, p: Any, g: Any, state: Any, rate: Any) -> Any:
            return once(p, g, state, rate)

    program = torch.export.export(Step(), example, strict=False)
    assert_same(program.module()(*other), once(*other), rtol=1e-14, atol=1e-15)


@column
def fx(row: Row) -> None:
    once, example, other = traceable(row)
    assert_same(make_fx(once)(*example)(*other), once(*other), rtol=1e-14, atol=1e-15)


@column
def state_round_trip(row: Row) -> None:
    """Saved and loaded, a state is the same, and the trajectory goes on bit for bit."""
    given, grads, h = sample(row, dtype=torch.float32)
    _, state, params = trajectory(row, given, grads, h)
    flat = tree.to_flat_dict(state)
    file = io.BytesIO()
    torch.save(flat, file)
    file.seek(0)
    for loaded in (torch.load(file, weights_only=True), safetensors.torch.load(safetensors.torch.save(flat))):
        again = tree.from_flat_dict(loaded, like=row.build(h).init(given))
        assert tree.flatten(again)[1] == tree.flatten(state)[1]
        assert_same(again, state)
        for g in grads:
            assert_same(step(row, params, g, again, h), step(row, params, g, state, h))


@column
def extra(row: Row) -> None:
    """Extra keyword arguments are accepted, and passed on to what is inside."""
    params, grads, h = sample(row)
    tx = row.build(h)
    g, state = as_given(row, grads[0]), tx.init(params)
    found, _ = tx.update(g, state, params, **{"value": torch.tensor(1.0), **row.extra}, unheard_of="of")
    assert_same(dense(found), dense(tx.update(g, state, params, **row.extra)[0]))
    if row.around is not None:
        seen: list[Any] = []

        def update(updates: Any, state: Any, params: Any = None, **given: Any) -> Any:
            seen.append(given)
            return updates, state

        inner = optfn.core.transformation(lambda params: (), update, elementwise=True)
        tx = row.around(inner)
        tx.update(g, tx.init(params), params, value=3.0)
        assert seen == [{"value": 3.0}]


class Pair(NamedTuple):
    first: Any
    second: Any


def same_in(row: Row, shape: Callable[[Any], Any], shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
    """The same trajectory with the leaves in another container, in the same order."""
    params, grads, h = sample(row, shapes)
    found = trajectory(row, shape(params), [shape(g) for g in grads], h)
    expected = trajectory(row, params, grads, h)
    for x, y in zip(found, expected, strict=True):
        assert_same(tree.leaves(x), tree.leaves(y))
    assert tree.flatten(found[2])[1] == tree.flatten(shape(params))[1]
    assert all(tree.flatten(u)[1] == tree.flatten(shape(params))[1] for u in found[0])


@column
def list_params(row: Row) -> None:
    same_in(row, lambda x: [x["a"], x["b"]])


@column
def nested_params(row: Row) -> None:
    same_in(row, lambda x: {"inner": [{"w": x["a"]}, (x["b"],)]})


@column
def namedtuple_params(row: Row) -> None:
    same_in(row, lambda x: Pair(x["a"], x["b"]))


@column
def bare_params(row: Row) -> None:
    same_in(row, lambda x: x["a"], {"a": (2, 3)})


@column
def records(row: Row) -> None:
    """For autograd, exactly when grad mode is on and something requires grad; under no_grad no graph grows."""
    params, grads, h = sample(row)

    def marked(x: Any, on: bool) -> Any:
        return tree.map(lambda x: x.detach().clone().requires_grad_(on), x)

    def requires_grad(x: Any) -> bool:
        return any(x.requires_grad for x in tree.leaves(x))

    def recorded(x: Any) -> bool:
        # An update that passes as it came may require grad without a graph behind it.
        return any(x.grad_fn is not None for x in tree.leaves(x))

    for which in itertools.product((False, True), repeat=3):
        args = [marked(x, on) for x, on in zip((params, grads, h), which, strict=True)]
        updates, state, moved = trajectory(row, *args)
        of_params, of_grads, of_h = which
        assert any(which) or not requires_grad((updates, state, moved))
        assert not of_params or requires_grad(moved)
        assert not of_grads or requires_grad(updates), "the updates do not require grad, but the gradients do"
        assert not of_h or h is None or requires_grad((state, updates))
        with torch.no_grad():
            assert not recorded(trajectory(row, *args))
    assert not requires_grad(row.build(h).init(marked(params, True)))


# The grid


@pytest.mark.parametrize(("row", "name"), [pytest.param(row, name, id=f"{row.name}-{name}") for row in ROWS for name in COLUMNS])
def test_grid(row: Row, name: str) -> None:
    if name not in row.but:
        COLUMNS[name](row)
        return
    reason, error, match = row.but[name]
    with pytest.raises(error, match=match):
        COLUMNS[name](row)
    pytest.xfail(reason)


def test_declarations_name_columns() -> None:
    assert not [f"{row.name}-{name}" for row in ROWS for name in row.but if name not in COLUMNS]


def test_every_public_transformation_has_a_row() -> None:
    public = {
        name
        for module in (optfn, optfn.distributed)
        for name in module.__all__
        if inspect.isfunction(f := getattr(module, name))
        and "GradientTransformation" in str(typing.get_type_hints(f).get("return"))
    } - {"shard_state"}  # which needs a group of processes: tests/test_zero.py
    assert {"adamw", "inject_hyperparams", "chain"} <= public, "the search itself is broken"
    assert public == {row.name.split(".")[0] for row in ROWS}
    assert len({row.name for row in ROWS}) == len(ROWS)


# The house


PACKAGE = Path(optfn.__file__).parent
FILES = {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in sorted(PACKAGE.rglob("*.py"))}
GROUPS = [
    {"numerics", "sharding", "random", "tree", "checks", "sweep", "vectors"},
    {"core", "microbatching", "projections", "second_order"},
    {"leafwise", "matrices"},
    {"schedules"},
    {"compose"},
    {"transforms"},
    {"wrappers"},
    {"optimizers"},
    {"compile", "distributed", "minimize", "perturbations"},
    {"interop"},
]


def group_of(module: str) -> int:
    return next(i for i, group in enumerate(GROUPS) if module.split(".")[0] in group)


def imports_of(file: Path) -> list[tuple[str, str]]:
    """Every import of the house's own in a file, anywhere in it: the module, dotted from the package, and the name taken."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "optfn"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import"
            if node.module == "optfn":
                found += [(f"optfn.{alias.name}", "") for alias in node.names]
            elif node.module and node.module.startswith("optfn."):
                found += [(node.module, alias.name) for alias in node.names]
    return [(module.removeprefix("optfn").lstrip("."), name) for module, name in found]


@pytest.mark.parametrize("module", [name for name in FILES if name != "__init__"])
def test_imports_run_downward(module: str) -> None:
    """From earlier groups, or from the own one; of another algorithm's file only what is public."""
    assert module.endswith("__init__") or group_of(module) >= 0
    for source, name in imports_of(FILES[module]):
        assert source, f"{module} imports the package itself"
        assert group_of(source) <= group_of(module), f"{module} imports {source}"
        if group_of(source) == group_of(module) and module.startswith("optimizers."):
            assert name in optfn.__all__, f"{module} takes {name} of {source}: a helper belongs to numerics or tree"


def test_imports_have_no_cycles() -> None:
    edges = {module: {source for source, _ in imports_of(file)} for module, file in FILES.items() if module != "__init__"}
    done: set[str] = set()
    while ready := {m for m, sources in edges.items() if m not in done and sources & edges.keys() <= done}:
        done |= ready
    assert done == edges.keys(), f"a cycle: {sorted(edges.keys() - done)}"


def lines_of_code(source: str) -> int:
    """Lines with code on them: no docstrings, no comments or blank lines, no imports, no decorators; a signature is one line."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            skipped |= {decorator.lineno for decorator in node.decorator_list} | {*range(node.lineno + 1, node.body[0].lineno)}
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if docstring or isinstance(node, ast.Import | ast.ImportFrom):
            skipped |= {*range(node.lineno, node.end_lineno + 1)}
    no_code = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in no_code]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - skipped)


def test_lines_of_code() -> None:
    source = '"""Doc."""\n\nimport ast\n\n# Why.\n@cache\ndef f(\n    x,\n):\n    """Doc.\n\n    More."""\n    return x\n'
    assert lines_of_code(source) == 2


LONGER = {
    "optimizers.lbfgs": 240,  # a line search besides the rules, and one vector in place of leaves
    "optimizers.galore": 70,  # a projection there and back around another transformation
    "optimizers.sam": 60,  # two modes: a round in one update, or spread over several
}


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("optimizers.") and name != "optimizers.__init__"])
def test_an_algorithm_is_short(module: str) -> None:
    """At most 40 lines of code for a rule and its alias; a rule with two aliases, or none, counts as its aliases do."""
    source = FILES[module].read_text()
    public = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name in optfn.__all__]
    rules = [name for name in public if name.startswith("scale_by_")]
    lines, pairs = lines_of_code(source), max(len(rules), len(public) - len(rules))
    assert lines <= LONGER.get(module, 40 * pairs), f"{lines} lines for {pairs}"
