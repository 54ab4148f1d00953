"""How a step is taken apart: the same values whatever the graph, and as few distinct regions as there are distinct leaves."""

import math
import random
import re
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from interpreted import interpreted
from steps import long_chain, step_of
from torch import Tensor

import optfn
from optfn.compile import internals, regions
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

UNARY: tuple[Callable[[Tensor], Tensor], ...] = (
    *(torch.sin, torch.neg, torch.abs, lambda x: x + 1, lambda x: x * 0.5, lambda x: x.clone()),
    *(torch.sum, torch.linalg.vector_norm, torch.amax, lambda x: x.sum(-1) if x.ndim else x),
    *(lambda x: x.t() if x.ndim == 2 else x, lambda x: x.flip(0) if x.ndim else x, lambda x: x[0] if x.ndim else x),
    *(lambda x: x[..., None].expand(*x.shape, 3)[..., 1], lambda x: x.cumsum(0) if x.ndim else x),
    *(torch.zeros_like, lambda x: x.clone().mul_(2).add_(x), lambda x: x.reshape(-1).view(x.shape)),
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
def test_any_program_taken_apart_gives_the_same(seed: int) -> None:
    """Views, swaps, values that are read after they have been replaced, scalars of tensors of scalars."""
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


@pytest.mark.parametrize("layers", [6, 12, 24])
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


def test_small_leaves_share_calls() -> None:
    params = {str(i): torch.randn(100, 50) for i in range(20)}
    tx = optfn.adamw()
    with interpreted():
        compiled = optfn.compile(step_of(tx), donate=("params", "state"))
        compiled(params, tx.init(params), copies(params))
    assert compiled._calls.calls[0].program.calls <= 3


def test_scalars_of_many_leaves_are_one_vector() -> None:
    """The counts, corrections and norms of 76 leaves, in one region of a few nodes."""
    params = gpt(6)
    tx = CHAINS["clip"][0]()
    with interpreted() as graphs:
        optfn.compile(step_of(tx), donate=("params", "state"))(params, tx.init(params), copies(params))
    (scalars,) = [g for g in graphs if all(n.meta["val"].ndim < 2 for n in g.nodes if n.op == "placeholder") and len(g.nodes) < 40]
    assert any(n.target is torch.ops.aten.expm1.default for n in scalars.nodes)
    others = [n for g in graphs if g is not scalars for n in g.nodes]
    assert not any(n.target is torch.ops.aten.expm1.default for n in others)


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
    """Equal to torch's; norms to float64's, as torch's own are off by up to 1e-4 (of order 1.5)."""
    exact = many_sums(x.double())
    for name, y in many_sums(x).items():
        rounded = name.startswith(("rounded", "norm"))
        wanted, rtol = (exact[name].to(y.dtype), 1e-5 if x.dtype == torch.float32 else 1e-11) if rounded else (y, 0)
        torch.testing.assert_close(got[name], wanted, rtol=rtol, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("shape", [*LONG, (5,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_rows_are_the_sums(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The same values, shapes and dtypes, and no long sum of a wide dtype is left; small tensors are left alone."""
    x = eighths(shape, dtype)
    traced = trace(lambda x: [*many_sums(x).values()], [x])
    before = str(traced.graph)
    internals._sum_by_rows(traced.graph)
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
