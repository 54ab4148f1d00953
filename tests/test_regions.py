"""How a step is taken apart: the same values whatever the graph, and as few distinct regions as there are distinct leaves."""

import json
import math
import os
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import failing_steps
import pytest
import torch
from interpreted import interpreted
from steps import long_chain, step_of
from torch import Tensor
from torch.func import grad
from torch.nn import functional

import optfn
from optfn.compile import costs, internals, regions
from optfn.compile.rewrites import sum_by_rows
from optfn.compile.trace import trace


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def copies(of: Any) -> Any:
    return optfn.tree.map(lambda x: x.detach().clone(), of)


def same(got: Any, wanted: Any) -> None:
    for path, x, y in zip(optfn.tree.paths(wanted), optfn.tree.leaves(got), optfn.tree.leaves(wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, msg=lambda text, path=path: f"{path}: {text}")


# Random programs


def square(x: Tensor) -> Tensor:
    """A symmetric matrix, far from singular, that depends on a tensor."""
    row = x.flatten()[:1].tanh() + torch.arange(3.0, dtype=x.dtype)
    return row[:, None] * row + torch.diag(torch.tensor([3.0, 4.0, 5.0], dtype=x.dtype))


def place(x: Tensor) -> Tensor:
    """An index, or a divisor, of one entry that depends on a tensor."""
    return (x.flatten()[:1].tanh() * 5).long() % 3


def rows(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same where there are at least three rows."""
    return lambda x: fn(x) if x.ndim and len(x) >= 3 else x


UNARY: tuple[Callable[[Tensor], Tensor], ...] = (
    *(torch.sin, torch.neg, torch.abs, lambda x: x + 1, lambda x: x * 0.5, lambda x: x.clone()),
    *(torch.sum, torch.linalg.vector_norm, torch.amax, lambda x: x.sum(-1) if x.ndim else x),
    *(lambda x: x.t() if x.ndim == 2 else x, lambda x: x.flip(0) if x.ndim else x, lambda x: x[0] if x.ndim else x),
    *(lambda x: x[..., None].expand(*x.shape, 3)[..., 1], lambda x: x.cumsum(0) if x.ndim else x),
    *(torch.zeros_like, lambda x: x.clone().mul_(2).add_(x), lambda x: x.reshape(-1).view(x.shape)),
    # Several results, of which all or some are used, here or in several places.
    *(lambda x: torch.stack(torch.var_mean(x, correction=0)).sum(), lambda x: torch.var_mean(x, correction=0)[1]),
    *map(rows, (lambda x: x.sort(-1)[0] / x.sort(-1)[1].double().add(1).norm(), lambda x: x.topk(2, 0)[0][1])),
    *map(rows, (lambda x: x.max(0)[0] * x.max(0)[1].sum(), lambda x: x.unbind()[2] - x.unbind()[0].norm())),
    *map(rows, (lambda x: sum(part.norm() for part in x.split(2)) + x,)),
    *(lambda x: torch.linalg.qr(square(x))[1].abs().sum(), lambda x: torch.linalg.eigh(square(x))[0]),
    *(lambda x: torch.linalg.slogdet(square(x))[1] * torch.linalg.slogdet(square(x))[0], lambda x: torch.linalg.svd(square(x))[1]),
    # What may fail.
    *(
        lambda x: torch.linalg.inv(square(x)),
        lambda x: torch.linalg.cholesky(square(x)),
        lambda x: x.put(place(x) * 0, x.sum()[None]),
    ),
    *map(rows, (lambda x: x[place(x)], lambda x: x.index_select(0, place(x)), lambda x: x.index_add(0, place(x), x[:1]))),
    lambda x: (x.tanh() * 8).long().div(place(x).sum() + 1, rounding_mode="floor").double(),
)
BINARY: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    *(torch.add, torch.mul, torch.sub, lambda x, y: torch.where(x > y, x, y), lambda x, y: x.lerp(y, 0.3)),
    *(lambda x, y: x * y.sum(), lambda x, y: x + y.flatten()[0], lambda x, y: torch.stack([x.sum(), y.sum()]).norm() + x),
)
SHAPES = ((3, 3), (3, 3), (3, 3), (3,), (3,), (), (), ())


def program_of(calls: Any, chosen: Any) -> Callable[[list[Tensor]], Any]:
    """A pure function of tensors of ``SHAPES`` to tensors of these shapes, and two more results."""

    def fn(tensors: list[Tensor]) -> Any:
        values = [*tensors, torch.arange(3.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)]
        entries = values[3].unbind()
        values += [x * 0.9 - 1 for x in entries]
        for which, i, j in calls:
            x, y = values[i % len(values)], values[j % len(values)]
            if which < len(UNARY):
                values.append(UNARY[which](x))
            else:
                y = y if y.shape == x.shape else y.sum()
                values.append(BINARY[which - len(UNARY)](x, y))
        new = []
        for shape, i in zip(SHAPES, chosen, strict=False):
            fitting = [v for v in values if v.shape == shape]
            new.append(fitting[-1 - i % len(fitting)])
        return new, [values[i % len(values)] for i in chosen[len(SHAPES) :]]

    return fn


@pytest.mark.parametrize("seed", range(200))
def test_any_program_taken_apart_gives_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views, swaps, values read after they have been replaced, scalars of tensors of scalars; generated, called or both."""
    monkeypatch.setattr(costs, "_ALWAYS", (600, 0, 10)[seed % 3])
    monkeypatch.setattr(costs, "_GIVEN_UP", float("inf"))
    draw = random.Random(seed).randrange
    calls = tuple((draw(len(UNARY) + len(BINARY)), draw(60), draw(60)) for _ in range(draw(1, 25)))
    fn = program_of(calls, tuple(draw(60) for _ in range(len(SHAPES) + 2)))
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    with interpreted():
        step = optfn.compile(fn, donate="tensors")
        for _ in range(2):
            expected = copies(fn(copies(tensors)))
            new, more = step(tensors)
            same((new, more), expected)
            assert all(x is y for x, y in zip(new, tensors, strict=True))
            tensors = [x.copy_(torch.tanh(x)) for x in new]
    assert step._calls.calls[0].program is not None


# Operators with several results, and those that may fail


def convolved(p, x):
    """A train step: two convolutions, normalised and pooled, with clipping and AdamW."""

    def loss(params):
        hidden = functional.conv2d(x["images"], params["first"])
        hidden = torch.max_pool2d(functional.batch_norm(hidden, None, None, training=True).relu(), 2)
        return functional.cross_entropy(functional.conv2d(hidden, params["second"], params["bias"]).mean((2, 3)), x["targets"])

    tx = optfn.chain(optfn.clip_by_global_norm(1.0), optfn.adamw())
    updates, state = tx.update(grad(loss)(p["params"]), p["state"], p["params"])
    return {"params": optfn.apply_updates(p["params"], updates), "state": state}


def convolution() -> tuple[Any, Any]:
    shapes = {"first": (4, 3, 3, 3), "bias": (5,), "second": (5, 4, 2, 2)}
    params = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    x = {"images": torch.randn(2, 3, 10, 10, dtype=torch.float64), "targets": torch.tensor([4, 0])}
    return {"params": params, "state": optfn.chain(optfn.clip_by_global_norm(1.0), optfn.adamw()).init(params)}, x


def by_items(fn: Callable[[Tensor], Any], use: Callable[..., Any]) -> Callable[[Any, Tensor], Any]:
    """A step on two tensors, with the results of one operator."""

    def step(p: list[Tensor], g: Tensor) -> Any:
        return [p[0] - use(p[0], *fn(g)), p[1] * 2]

    return step


SEVERAL: dict[str, Callable[[Any, Tensor], Any]] = {
    "sort": by_items(torch.sort, lambda p, v, i: v / i.double().norm()),
    "topk": by_items(lambda g: g.topk(2), lambda p, v, i: p.scatter(1, i, v / v.norm())),
    "max": by_items(lambda g: g.max(0), lambda p, v, i: v / i.double().norm()),
    "var_mean": by_items(lambda g: torch.var_mean(g, -1), lambda p, v, m: v / m.norm()),
    "0-dim items": by_items(torch.var_mean, lambda p, v, m: p * m + v.sin() / (1 + p.norm())),
    "slogdet": by_items(torch.linalg.slogdet, lambda p, s, d: s * d),
    "layer norm": by_items(lambda g: torch.native_layer_norm(g, (6,), None, None, 1e-5), lambda p, y, m, r: y / m.norm()),
    "batch norm": by_items(
        lambda g: torch.native_batch_norm(g, None, None, None, None, True, 0.1, 1e-5), lambda p, y, m, r: y / m.norm() + r.norm()
    ),
    "svd": by_items(torch.linalg.svd, lambda p, u, s, v: u @ v * s.sum() / s.norm()),
    "qr": by_items(torch.linalg.qr, lambda p, q, r: q @ r / r.norm()),
    "eigh": by_items(lambda g: torch.linalg.eigh(g + g.T), lambda p, d, q: q @ (q * d / d.norm()).T),
    "unbind": by_items(lambda g: g.sin().unbind(), lambda p, *rows: sum(row / row.norm() for row in rows)),
    "split": by_items(lambda g: g.sin().split(2), lambda p, *parts: torch.cat([part / part.norm() for part in parts])),
    "results that are donated": lambda p, g: torch.linalg.qr(p[0] @ g),
    "scalars in rows": lambda p, g: [
        x * row.sum()
        for x, row in zip(p, torch.stack([p[0].sum(), g.sum(), p[1].sum(), g.amax()]).view(2, 2).unbind(1), strict=True)
    ],
}


@pytest.mark.parametrize("name", SEVERAL)
def test_what_one_operator_gives_stays_together(name: str) -> None:
    step, g = SEVERAL[name], torch.randn(6, 6, dtype=torch.float64)
    p = [torch.randn(6, 6, dtype=torch.float64) for _ in range(2)]
    expected = copies(step(copies(p), g))
    with interpreted():
        compiled = optfn.compile(step, donate="p")
        same(list(compiled(p, g)), list(expected))
    assert compiled._calls.calls[0].program is not None


def test_a_train_step_with_convolutions() -> None:
    p, x = convolution()
    with interpreted() as graphs:
        compiled = optfn.compile(convolved, donate="p")
        for _ in range(3):
            expected = convolved(copies(p), x)
            same(compiled(p, x), expected)
    assert len(graphs) == 3  # the model, the scalars and the updates


@pytest.mark.codegen
def test_code_for_several_results() -> None:
    p, x = convolution()
    g = torch.randn(6, 6, dtype=torch.float64)
    pair = [torch.randn(6, 6, dtype=torch.float64) for _ in range(2)]

    def step(p: Any, x: Any) -> Any:
        return convolved(p["model"], x), SEVERAL["sort"](p["pair"], g), SEVERAL["unbind"](p["pair"], g)[0]

    held = {"model": p, "pair": pair}
    expected = step(copies(held), x)
    compiled = optfn.compile(step, donate="p")
    got = compiled(held, x)
    for value, wanted in zip(optfn.tree.leaves(got), optfn.tree.leaves(expected), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.codegen
def test_after_an_error_arguments_are_as_they_were() -> None:
    """Generated code with two threads, in a process of its own: it would end by an exception in one of them."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(Path(__file__).with_name("failing_steps.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert done.returncode == 0, done.stderr[-2000:]
    assert found.keys() == failing_steps.cases().keys()
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


CHECKS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]] = {
    "masked_scatter": (lambda p, x: p.masked_scatter(p < 9, x), torch.zeros(4), torch.zeros(3)),
    "assertion": (lambda p, x: (torch._assert_async(x.sum() > 0, "no sum"), p + x)[1], torch.ones(4), torch.zeros(4)),
    "not used": (lambda p, x: (p[x], p + 1)[1], torch.tensor([3]), torch.tensor([4])),
    "index_fill": (lambda p, x: p.index_fill(0, x, 2.0), torch.tensor([-4]), torch.tensor([-5])),
    "take": (lambda p, x: p + p.take(x).sum(), torch.tensor([-4]), torch.tensor([4])),
    "mask": (lambda p, x: p.index_put((x > 0,), torch.ones(2)), torch.tensor([1, 1, 0, 0]), torch.tensor([1, 1, 1, 0])),
    "index of an index": (lambda p, x: p + p[x[x]], torch.tensor([0, 3, 1, 2]), torch.tensor([0, 1, 1, 4])),
}


@pytest.mark.parametrize("name", CHECKS)
def test_what_eager_calls_refuse_is_refused(name: str) -> None:
    """Also where the code that takes the place of the call would give some value, or nothing needs it."""
    step, good, bad = CHECKS[name]
    with interpreted():
        compiled = optfn.compile(step, donate="p")
        p = torch.arange(4.0)
        expected = step(p.clone(), good)
        assert torch.equal(compiled(p, good), expected)
        with pytest.raises((IndexError, RuntimeError)):
            step(expected.clone(), bad)
        with pytest.raises((IndexError, RuntimeError)):
            compiled(p, bad)
    assert torch.equal(p, expected)


@pytest.mark.parametrize("find", ["sort", "argmax", "arange", "pool"])
def test_an_index_that_cannot_be_wrong_is_not_checked(find: str) -> None:
    """It would have to be known before anything that needs it is computed."""

    def step(p: Tensor, g: Tensor) -> Tensor:
        if find == "pool":
            return p - grad(lambda g: (torch.max_pool2d(g[None], 2) * 2).sum())(g)
        i = {
            "sort": lambda: g.argsort(-1),
            "argmax": lambda: g.argmax(-1)[:, None],
            "arange": lambda: torch.arange(36).view(6, 6) % 6,
        }
        return p + g.gather(-1, i[find]())

    p, g = torch.randn(6, 6), torch.randn(6, 6)
    expected = step(p, g)
    checks: list[Any] = []
    with interpreted() as graphs, pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "_in_order", lambda graph: checks.append(graph))
        assert torch.equal(optfn.compile(step, donate="p")(p, g), expected)
    assert len(graphs) == 1
    assert not checks


# How much is compiled and called


def gpt(layers: int, width: int = 8) -> dict[str, Tensor]:
    """The parameters of a small GPT, by the names of a module."""
    of_layer = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.out.weight": (width, width),
        "attn.out.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.up.weight": (4 * width, width),
        "mlp.up.bias": (4 * width,),
        "mlp.down.weight": (width, 4 * width),
        "mlp.down.bias": (width,),
    }
    shapes = {f"blocks.{i}.{name}": shape for i in range(layers) for name, shape in of_layer.items()}
    shapes |= {"token.weight": (40, width), "position.weight": (16, width), "ln.weight": (width,), "ln.bias": (width,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


# Regions of tensors: a layer and what is in no layer, for the norms and for the updates; and one of scalars.
CHAINS = {
    "sgd": (lambda: optfn.sgd(0.1, momentum=0.9), 3),
    "adamw": (lambda: optfn.adamw(), 3),
    "clip": (lambda: optfn.chain(optfn.clip_by_global_norm(1.0), optfn.adamw()), 5),
    "long": (long_chain, 5),
}


@pytest.mark.parametrize("layers", [6, 12])
@pytest.mark.parametrize("name", CHAINS)
def test_a_deeper_model_has_the_same_regions(name: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are different leaves, and a call for each layer in each phase, and for the rest."""
    monkeypatch.setattr(regions, "_CALL_BYTES", 1)  # so that a small layer is worth a call of its own
    make, expected = CHAINS[name]
    tx, params = make(), gpt(layers)
    state, step = tx.init(params), step_of(tx)
    wanted = step(*copies((params, state)), params)
    with interpreted() as graphs:
        compiled = optfn.compile(step, donate=("params", "state"))
        got = compiled(params, state, copies(params))
    program = compiled._calls.calls[0].program
    assert program.regions == len(graphs) == expected
    assert program.calls == (expected // 2) * (layers + 1) + 1
    assert max(len(list(graph.nodes)) for graph in graphs) < 40 * 12
    for x, y in zip(optfn.tree.leaves(got), optfn.tree.leaves(wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_values_between_regions_are_freed_when_they_have_been_read() -> None:
    """What the regions of one phase hand to those of the next is not held until the step is over."""

    def by_norm(updates: Any, params: Any) -> Any:
        return optfn.tree.map(lambda u: u.sin() / u.sin().norm(), updates)

    params = {str(i): torch.randn(8, 8) for i in range(4)}
    tx = optfn.chain(optfn.scale_by_adam(), optfn.stateless(by_norm))
    with interpreted():
        compiled = optfn.compile(step_of(tx), donate=("params", "state"))
        compiled(params, tx.init(params), copies(params))
    call = compiled._calls.calls[0]
    assert call.program.calls > 2
    tensors = optfn.tree.leaves(((params, tx.init(params), copies(params)), {}))
    values = [*tensors, *call.held, *[None] * (call.program.size - len(tensors) - len(call.held))]
    held = []
    for step, done in call.program.steps:
        step(values)
        held.append(sum(x is not None for x in values[len(tensors) :]))
        for i in done:
            values[i] = None
    assert max(held) > 0
    assert not any(isinstance(x, Tensor) for i, x in enumerate(values) if i not in call.program.results and i >= len(tensors))


LOSS = {"value": torch.tensor(0.7)}
TWO_PASSES: dict[str, tuple[optfn.GradientTransformation, dict[str, Tensor]]] = {
    "lamb": (optfn.lamb(0.1, weight_decay=0.1), {}),
    "fromage": (optfn.fromage(0.1), {}),
    "adafactor": (optfn.adafactor(0.1), {}),
    "dog": (optfn.dog(), {}),
    "prodigy": (optfn.prodigy(), {}),
    "momo": (optfn.momo(0.1, weight_decay=0.1), LOSS),
    "momo_adam": (optfn.momo_adam(0.1), LOSS),
    "clipped after Adam": (optfn.chain(optfn.scale_by_adam(), optfn.clip_by_global_norm(0.1), optfn.scale(-0.1)), {}),
}


@pytest.mark.parametrize("name", TWO_PASSES)
def test_what_two_passes_need_is_not_kept_between_them(name: str) -> None:
    """No region gives a tensor of a leaf's size: it is written where it belongs, or made again. Each leaf is gone over twice."""
    tx, extra = TWO_PASSES[name]
    params = {str(i): torch.randn(40, 50, dtype=torch.float64) for i in range(3)}

    def step(params: Any, state: Any, grads: Any, extra: Any) -> Any:
        updates, state = tx.update(grads, state, params, **extra)
        return optfn.apply_updates(params, updates), state

    state = tx.init(params)
    wanted = copies((params, state))
    with interpreted() as graphs:
        compiled = optfn.compile(step, donate=("params", "state"))
        for _ in range(3):
            grads = optfn.tree.map(torch.randn_like, params)
            wanted = step(*wanted, grads, extra)
            params, state = compiled(params, state, grads, extra)
            same((params, state), wanted)
    given = [n.meta["val"].numel() for graph in graphs for n in graph.nodes if n.op == "output" for n in n.all_input_nodes]
    assert max(given) <= 50
    assert sum(any(is_large_write(n) for n in graph.nodes) for graph in graphs) <= 2


def is_large_write(n: torch.fx.Node) -> bool:
    return n.target is torch.ops.aten.copy_.default and n.all_input_nodes[0].meta["val"].numel() >= 2000


def test_what_is_read_later_is_written_later() -> None:
    """The new ``a`` is there before the sum; the old one is needed after it."""

    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        new = a * b.sin() + 1
        return new, b + a.cos() * new.sum()

    with interpreted():
        a, b = torch.randn(2, 40, 50, dtype=torch.float64).unbind()
        a, b = a.clone(), b.clone()
        wanted = fn(a.clone(), b.clone())
        same(optfn.compile(fn, donate=("a", "b"))(a, b), wanted)


def test_what_fails_between_two_passes_leaves_the_arguments() -> None:
    def fn(a: Tensor) -> Tensor:
        new = a * 2
        return new / torch.linalg.inv(torch.eye(2, dtype=a.dtype) * (new.sum() > 0)).sum()

    with interpreted():
        step = optfn.compile(fn, donate="a")
        a = torch.ones(40, 50, dtype=torch.float64)
        same(step(a), fn(torch.ones_like(a)))
        a = -torch.ones(40, 50, dtype=torch.float64)
        with pytest.raises(RuntimeError):
            step(a)
        assert torch.equal(a, -torch.ones_like(a))


def test_what_is_dear_is_made_once() -> None:
    """Random numbers that two passes need are kept: to make them again takes longer."""
    tx = optfn.chain(optfn.add_noise(0.1, 0.5, 0), optfn.clip_by_global_norm(0.1))
    params = {str(i): torch.randn(40, 50) for i in range(2)}
    with interpreted() as graphs:
        optfn.compile(step_of(tx), donate=("params", "state"))(copies(params), tx.init(params), copies(params))
    assert (
        sum(any(n.target is torch.ops.aten.log.default and n.meta["val"].ndim == 2 for n in graph.nodes) for graph in graphs) == 1
    )


def test_small_leaves_share_calls() -> None:
    params = {str(i): torch.randn(100, 50) for i in range(20)}
    tx = optfn.adamw()
    with interpreted():
        compiled = optfn.compile(step_of(tx), donate=("params", "state"))
        compiled(params, tx.init(params), copies(params))
    assert compiled._calls.calls[0].program.calls <= 3


def test_products_of_many_shapes_are_called() -> None:
    """No code is generated for what is products of matrices, in one place each; what moves memory is generated as ever."""
    params = {str(i): torch.randn(200 + 2 * i, 180) for i in range(6)}
    for make, called in ((lambda: optfn.muon(0.02, ns_steps=2, ns_dtype=torch.float32), True), (lambda: optfn.adamw(), False)):
        tx = make()
        state, step = tx.init(params), step_of(tx)
        wanted = step(*copies((params, state)), params)
        with interpreted() as graphs:
            got = optfn.compile(step, donate=("params", "state"))(copies(params), state, params)
        generated = [n.target for graph in graphs for n in graph.nodes]
        assert torch.ops.aten.mm.default not in generated
        assert called or torch.ops.aten.mul.Tensor in generated
        for x, y in zip(optfn.tree.leaves(got), optfn.tree.leaves(wanted), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_scalars_of_many_leaves_are_one_vector() -> None:
    """The counts, corrections and norms of 76 leaves, in one region of a few nodes."""
    params = gpt(6)
    tx = CHAINS["clip"][0]()
    with interpreted() as graphs:
        optfn.compile(step_of(tx), donate=("params", "state"))(params, tx.init(params), copies(params))
    (scalars,) = [g for g in graphs if all(n.meta["val"].ndim < 2 for n in g.nodes if n.op == "placeholder") and len(g.nodes) < 60]
    assert any(n.target is torch.ops.aten.exp.default for n in scalars.nodes)
    others = [n for g in graphs if g is not scalars for n in g.nodes]
    assert not any(n.target is torch.ops.aten.exp.default for n in others)


def test_a_hundred_steps_with_another_rate_each_are_compiled_once() -> None:
    def eager(params: Any, state: Any, grads: Any, lr: Tensor) -> Any:
        updates, state = optfn.chain(optfn.clip_by_global_norm(1.0), optfn.adamw(lr)).update(grads, state, params)
        return optfn.apply_updates(params, updates), state

    params = {"w": torch.randn(5, 3, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
    state = optfn.chain(optfn.clip_by_global_norm(1.0), optfn.adamw()).init(params)
    wanted = copies((params, state))
    with interpreted() as graphs:
        step = optfn.compile(eager, donate=("params", "state"))
        for i in range(100):
            lr, grads = torch.tensor(0.1 / (1 + i), dtype=torch.float64), copies(wanted[0])
            wanted = eager(*wanted, grads, lr)
            params, state = step(params, state, grads, lr)
            if i == 0:
                compiled = len(graphs)
    assert len(graphs) == compiled
    same((params, state), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


# Who traces


def test_a_binding_that_changes_is_seen() -> None:
    scale = 2.0

    def double(p: Tensor) -> Tensor:
        return p * scale

    with interpreted() as graphs:
        step = optfn.compile(lambda p: double(p) + 1, donate="p")
        assert step(torch.ones(2)).tolist() == [3.0, 3.0]
        scale = 10.0
        assert step(torch.ones(2)).tolist() == [11.0, 11.0]
        assert step(torch.ones(2)).tolist() == [11.0, 11.0]
    assert len(graphs) == 2


def test_a_tensor_that_the_function_finds_is_read_at_every_step() -> None:
    rate = torch.tensor(0.1)
    with interpreted() as graphs:
        step = optfn.compile(lambda p, g: p - rate * g, donate="p")
        for value in (0.5, 0.25, 2.0):
            rate.fill_(value)
            assert step(torch.ones(2), torch.ones(2)).tolist() == [1 - value] * 2
    assert len(graphs) == 1


class Settings:
    scale = 2.0


settings_list = [2.0]
CHANGING: dict[str, Callable[[], tuple[Callable[[Tensor], Tensor], Callable[[], None]]]] = {
    "an object": lambda: (lambda s: (lambda p: p * s.scale, lambda: setattr(s, "scale", 3.0)))(Settings()),
    "a list": lambda: (lambda s: (lambda p: p * s[0], lambda: s.__setitem__(0, 3.0)))([2.0]),
    "a dict": lambda: (lambda s: (lambda p: p * s["a"], lambda: s.update(a=3.0)))({"a": 2.0}),
    "a global list": lambda: (lambda p: p * settings_list[0], lambda: settings_list.__setitem__(0, 3.0)),
    "a list behind a function": lambda: (lambda s: (lambda g: (lambda p: g(p), lambda: s.__setitem__(0, 3.0)))(lambda p: p * s[0]))(
        [2.0]
    ),
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_may_change_unseen_is_left_to_dynamo(name: str) -> None:
    fn, change = CHANGING[name]()
    with interpreted():
        step = optfn.compile(fn, donate=0)
        assert step(torch.ones(2)).tolist() == [2.0, 2.0]
        assert step._calls.calls[0].program is None
        change()
        assert step(torch.ones(2)).tolist() == [3.0, 3.0]


def test_numbers_and_sizes_that_vary_are_left_to_dynamo() -> None:
    with interpreted():
        step = optfn.compile(lambda p, x, k: p + x.sum() * k, donate="p")
        for k, n in ((1.0, 3), (2.0, 3), (2.0, 4), (3.5, 5), (1.0, 3)):
            assert step(torch.zeros(2), torch.ones(n), k).tolist() == [k * n] * 2
    assert [call.program is not None for call in step._calls.calls].count(True) == 1


def test_global_state_is_that_of_the_call() -> None:
    """What is traced under autocast is not used without, and the other way round."""
    p, x = torch.zeros(2, 2), torch.full((2, 2), 1 + 2**-10)
    step = optfn.compile(lambda p, x: p + (x @ x).float(), donate="p")
    with interpreted():
        plain = step(p, x).clone()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = step(p.zero_(), x).clone()
        assert torch.equal(step(p.zero_(), x), plain)
    assert len(step._calls.calls) == 2
    assert torch.equal(plain, x @ x)
    assert torch.equal(rounded, torch.full((2, 2), 2.0))


def test_donated_tensors_are_known_to_have_changed() -> None:
    """Autograd notices that a saved tensor was overwritten, as it does after any write in place."""
    p = torch.ones(2, requires_grad=True)
    with interpreted():
        loss = p.square().sum()
        optfn.compile(lambda p: p * 2, donate="p")(p)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_moved_tensors_are_looked_at() -> None:
    buffer = torch.zeros(12)
    with interpreted():
        step = optfn.compile(lambda p, x: (p + x.sum(), x.sum()), donate="p")
        for p, x in ((buffer[:3], buffer[3:6]), (buffer[6:9], buffer[:3]), (buffer[6:9], buffer[9:])):
            step(p, x)
        for x in (buffer[7:10], buffer[4:7], buffer[6:9]):
            before = buffer.clone()
            with pytest.raises(ValueError, match=r"'[px]' and '[px]' share memory"):
                step(buffer[6:9], x)
            assert torch.equal(buffer, before)
        assert step._calls.calls[0].program is not None


# The backend, and torches that it does not know

INSTALLED = pytest.mark.skipif(
    not entry_points(group="torch_dynamo_backends", name="optfn"), reason="a package that is not installed has no entry point"
)


@INSTALLED
def test_the_backend_is_found_by_name() -> None:
    assert "optfn" in torch._dynamo.list_backends(exclude_tags=())
    with interpreted() as graphs:
        step = torch.compile(lambda x, y: (x.sin() * y.norm(), y * 2), backend="optfn", fullgraph=True)
        x, y = torch.randn(3), torch.randn(3)
        with torch.no_grad():
            same(step(x, y), (x.sin() * y.norm(), y * 2))
    assert graphs
    with pytest.raises(Exception, match="the backend 'optfn' has no modes, got 'max-autotune'"):
        torch.compile(torch.sin, backend="optfn", mode="max-autotune")(torch.ones(1))


@INSTALLED
@pytest.mark.codegen
def test_the_backend_records_for_autograd() -> None:
    model = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, backend="optfn", fullgraph=True)(x).square().sum().backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.codegen
def test_an_unknown_torch_is_named_once_and_steps_still_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(internals._NEEDED, "torch._guards", ("no_such_name",))
    internals.available.cache_clear()
    with pytest.warns(UserWarning, match=f"does not know torch {re.escape(torch.__version__)}, where torch._guards lacks no_such"):
        step = optfn.compile(lambda a, b: (b, a + 1), donate=(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optfn.compile(lambda p: p, donate=0)
    a, b = torch.zeros(2), torch.ones(2)
    for _ in range(2):
        expected = (b.clone(), a + 1)
        assert step(a, b)[0] is a
        same((a, b), expected)
    monkeypatch.undo()
    internals.available.cache_clear()


LONG = (
    (4096,),
    (1 << 18,),
    (100_003,),
    (300, 1024),
    (700, 768),
    (64, 3072),
    (64, 64, 3, 3),
    (7, 9, 4096),
    (1000, 1001),
    (30, 4099),
)


def many_sums(x: Tensor) -> dict[str, Tensor]:
    """Sums, means and norms over no, one, several and all dimensions, of all dtypes."""
    wide, every, fine = torch.float64, tuple(range(x.ndim)), x + 2**-18
    found = {
        "all": [x.sum(), x.sum(()), x.sum(every), x.sum(every, keepdim=True)],
        "as float64": [fine.sum(dtype=wide), fine.sum(every, dtype=wide), fine.mean(dtype=wide), fine.double().sum()],
        "mean": [x.mean(), x.mean(every), x.mean(every, keepdim=True), x.mean(0)],
        "some": [x.sum(0), x.sum(-1, keepdim=True), fine.sum((0, -1) if x.ndim > 1 else 0, dtype=wide)],
        "norm": [torch.linalg.vector_norm(x, p) for p in (0, 1, 2, math.inf, -math.inf)],
        "norm of dimensions": [torch.linalg.vector_norm(x, 2, every), torch.linalg.vector_norm(x, 2, 0)],
        "other dtypes": [(x > 0).sum(), (10 * x).int().sum(), (10 * x).int().sum(dtype=torch.float32), torch.complex(x, -x).sum()],
        "narrow": [x.bfloat16().sum(), x.bfloat16().sum(dtype=torch.float32), x.sum(dtype=torch.bfloat16), x.bfloat16().mean()],
        "layout": [x.mT.sum() if x.ndim > 1 else x[::2].sum(), x.flip(0)[..., 1:].sum(), x[:1].expand(x.shape).sum()],
        "rounded": [
            x.var(),
            x.std(-1),
            *(torch.linalg.vector_norm(x, p) for p in (1.5, 3)),
            torch.linalg.vector_norm(fine, dtype=wide),
        ],
    }
    return {f"{kind} {i}": y for kind, values in found.items() for i, y in enumerate(values)}


def eighths(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers whose sums are exact, in whatever order they are added up."""
    return torch.randint(8, shape).to(dtype) / 8


def check_sums(got: dict[str, Tensor], x: Tensor) -> None:
    """Equal to torch's. To those of float64: norms, as torch's own are off by up to 1e-4 (of order 1.5), and sums in bfloat16, as
    torch's depend on the number of threads, whose sums it rounds."""
    exact = many_sums(x.double())
    narrow = {"narrow 0": exact["all 0"], "narrow 2": exact["all 0"], "narrow 3": exact["mean 0"]}
    for name, y in many_sums(x).items():
        wanted, rtol = y, 0.0
        if name in narrow:
            wanted, rtol = narrow[name].to(y.dtype), 2**-7
        elif name.startswith(("rounded", "norm")):
            wanted, rtol = exact[name].to(y.dtype), 1e-5 if x.dtype == torch.float32 else 1e-11
        torch.testing.assert_close(got[name], wanted, rtol=rtol, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("shape", [*LONG, (5,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_rows_are_the_sums(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The same values, shapes and dtypes, and no long sum of a wide dtype is left; small tensors are left alone."""
    x = eighths(shape, dtype)
    traced = trace(lambda x: [*many_sums(x).values()], [x])
    before = str(traced.graph)
    sum_by_rows(traced.graph)
    assert (str(traced.graph) == before) is (x.numel() < 4096)
    traced.graph.lint()
    results = torch.fx.GraphModule({}, traced.graph)(x, *traced.constants)
    check_sums(dict(zip(many_sums(x), results, strict=True)), x)
    for n in traced.graph.nodes:
        if n.target in (torch.ops.aten.sum.default, torch.ops.aten.sum.dim_IntList) and n.meta["val"].numel() == 1:
            value = n.args[0].meta["val"]
            assert value.numel() < 4096 or not value.is_floating_point() or n.meta["val"].dtype == torch.bfloat16


@pytest.mark.codegen
@pytest.mark.parametrize("shape", [(100_003,), (64, 3072), (64, 64, 3, 3)], ids=str)
def test_generated_sums_are_the_eager_ones(shape: tuple[int, ...]) -> None:
    x = eighths(shape, torch.float32)
    step = optfn.compile(lambda p, x: (p + 1, many_sums(x)), donate="p")
    check_sums(step(torch.zeros(()), x)[1], x)
    assert step._calls.calls[0].program is not None


@pytest.mark.codegen
def test_generated_sums_are_as_exact_as_torchs() -> None:
    """Of equal numbers, where roundings do not cancel, of a large one among small ones, of sorted ones."""
    draw = torch.Generator().manual_seed(0)

    def entries(shape: tuple[int, ...]) -> list[Tensor]:
        size = math.prod(shape)
        uniform = torch.rand(size, generator=draw)
        large = uniform.index_fill(0, torch.tensor(size // 2), 1e6)
        return [x.view(shape) for x in (torch.full((size,), 0.1), large, uniform.sort().values, torch.randn(size, generator=draw))]

    xs = [x for shape in LONG for x in entries(shape)]
    step = optfn.compile(lambda p, xs: (p + 1, [(x.sum(), (x * 0.7).mean()) for x in xs]), donate="p")
    _, found = step(torch.zeros(()), xs)
    for x, (total, mean) in zip(xs, found, strict=True):
        wide, half = x.double(), (x * 0.7).double()
        assert (total - wide.sum()).abs() <= 5e-6 * wide.abs().sum()
        assert (mean - half.mean()).abs() <= 5e-6 * half.abs().mean()


def test_equal_calls_are_one_and_others_are_not() -> None:
    def fn(x: Tensor, v: Tensor) -> Any:
        zeros = x.abs() * 0.0, x.abs() * -0.0, x.abs() * False
        products = v @ x, v @ x, (v @ x).sin() + (v @ x).sin()
        return x.clone(), [1 / y for y in zeros[:2]], zeros[2], *products

    x, v = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    expected = copies(fn(x, v))
    with interpreted() as graphs:
        step = optfn.compile(fn, donate="x")
        same(step(x, v), expected)
    assert step._calls.calls[0].program is not None
    targets = [n.target for g in graphs for n in g.nodes]
    assert targets.count(torch.ops.aten.abs.default) == 1


MADE_OF_VIEWS = (lambda p: p.roll(1), lambda p: p.flip(0), lambda p: p.reshape(4, -1).roll(1, 0).reshape(-1))


@pytest.mark.codegen
def test_operators_that_are_made_of_views() -> None:
    """A decomposition may call operators that are made of others; what they read is overwritten only after that."""
    params = [torch.arange(4096.0) for _ in MADE_OF_VIEWS]
    expected = [make(p) for make, p in zip(MADE_OF_VIEWS, params, strict=True)]
    step = optfn.compile(lambda params: [make(p) for make, p in zip(MADE_OF_VIEWS, params, strict=True)], donate="params")
    step(params)
    same(params, expected)


@pytest.mark.codegen
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_generated_functions_keep_their_digits_near_0(dtype: torch.dtype) -> None:
    """Those that a difference of nearly equal numbers would spoil, against float64, or, of float64, as torch has them."""
    exponents = torch.logspace(-12, 0.5, 400, dtype=torch.float64)
    x = torch.cat(
        [-exponents, exponents, torch.tensor([0.0, -0.0, 90.0, 1000.0, -1000.0, math.inf, -math.inf], dtype=torch.float64)]
    ).to(dtype)

    def functions(x: Tensor) -> list[Tensor]:
        inside = x.clamp(-0.99, 0.99)
        return [x.expm1(), inside.atanh(), x.tanh(), x.sinh(), x.asinh(), inside.log1p(), torch.sigmoid(x)]

    step = optfn.compile(lambda p, x: (p + 1, functions(x)), donate="p")
    _, found = step(torch.zeros(()), x)
    assert step._calls.calls[0].program is not None
    for y, wanted in zip(found, functions(x.double()), strict=True):
        torch.testing.assert_close(y.double(), wanted.to(dtype).double(), rtol=8 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.codegen
@pytest.mark.parametrize("leaves", [1, 2, 20])
def test_compiled_bias_corrections_are_exact(leaves: int) -> None:
    tx = optfn.scale_by_adam()
    params = {f"{i}": torch.full((3,), 2.0) for i in range(leaves)}

    def step(state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state)
        return state, updates

    _, updates = optfn.compile(step, donate="state")(tx.init(params), params)
    for u in optfn.tree.leaves(updates):
        torch.testing.assert_close(u, torch.ones(3), rtol=3e-7, atol=0)


@pytest.mark.codegen
def test_an_empty_complex_leaf_is_called() -> None:
    first = optfn.prodigy(betas=(0.191, 0.632), safeguard_warmup=True)
    tx = optfn.chain(first, optfn.prodigy(eps=0.033, weight_decay=0.188, maximize=True))
    params = {"a": torch.randn(3, 1, dtype=torch.complex128), "b": torch.zeros(0, 3, dtype=torch.complex128)}

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optfn.apply_updates(params, updates), state

    wanted = step(params, tx.init(params), params)[0]
    found = optfn.compile(step, donate=("params", "state"))(copies(params), tx.init(params), copies(params))[0]
    torch.testing.assert_close(found, wanted)


@pytest.mark.codegen
def test_a_graph_that_was_made_with_constants_is_taken_apart_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As random numbers are, whose counters are constants: whole, Inductor takes a minute for them."""
    module, taken = sys.modules["optfn.compile.backend"], []
    monkeypatch.setattr(module, "split", lambda *args: taken.append(1) or regions.split(*args))

    def fn(x: Tensor, y: Tensor) -> Tensor:
        return (x * torch.tensor([1.0, 2.0]) + torch.tensor([3, 4])).sin() + y

    run = torch.compile(fn, backend="optfn", fullgraph=True)
    for _ in range(2):
        x, y = torch.randn(2), torch.randn(3, 2)
        torch.testing.assert_close(run(x, y), fn(x, y))
    assert taken == [1]
