"""optfn.compile: the values of the eager step, in the buffers of its arguments, by one graph."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from steps import long_chain, matrices, step_of
from torch import Tensor
from torch.func import functional_call, grad_and_value

import optfn
from optfn.compile.backend import backend as regions_backend

# "optfn" traces by itself where it can; by Dynamo it is torch.compile's backend of that name.
BY_DYNAMO = regions_backend
BACKENDS = [
    "aot_eager",
    pytest.param("optfn", marks=pytest.mark.codegen),
    pytest.param(BY_DYNAMO, marks=pytest.mark.codegen, id="by_dynamo"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Graphs:
    """How many graphs Dynamo has made so far."""

    def __init__(self) -> None:
        self.before = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    @property
    def count(self) -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] - self.before


def copies(of: Any) -> Any:
    """The same tree in memory of its own, strides kept."""
    return optfn.tree.map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, of)


def same(got: Any, wanted: Any, **tolerance: float) -> None:
    assert optfn.tree.paths(got) == optfn.tree.paths(wanted)
    for path, x, y in zip(optfn.tree.paths(got), optfn.tree.flatten(got)[0], optfn.tree.flatten(wanted)[0], strict=True):
        if isinstance(y, Tensor):
            torch.testing.assert_close(x, y, msg=lambda text, path=path: f"{path}: {text}", **tolerance)
        else:
            assert x == y, path


def some_params(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "w": torch.randn(3, 2, dtype=dtype),
        "blocks": [torch.randn(4, dtype=dtype), torch.randn((), dtype=dtype)],
        "none": None,
    }


def some_grads(params: Any, n: int) -> list[Any]:
    return [optfn.tree.map(torch.randn_like, params) for _ in range(n)]


OPTIMIZERS = {
    "sgd": lambda: optfn.sgd(0.1),
    "sgd nesterov": lambda: optfn.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda: optfn.adam(0.1),
    "adam amsgrad": lambda: optfn.adam(0.1, amsgrad=True, weight_decay=0.1),
    "adamw": lambda: optfn.adamw(0.1, mask=matrices),
    "adagrad": lambda: optfn.adagrad(0.1, lr_decay=0.1),
    "rmsprop": lambda: optfn.rmsprop(0.1, momentum=0.9, centered=True),
    "chain": long_chain,
    "partition": lambda: optfn.partition(
        {"w": optfn.adam(0.1), "rest": optfn.freeze()}, lambda path, p: "w" if path == "w" else "rest"
    ),
    "injected": lambda: optfn.inject_hyperparams(optfn.adamw)(lr=optfn.linear_schedule(0.1, 0.0, 10), weight_decay=0.1),
    "accumulate": lambda: optfn.accumulate(optfn.adam(0.1), 3),
    "apply_if_finite": lambda: optfn.apply_if_finite(optfn.sgd(0.1, momentum=0.9)),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in OPTIMIZERS), ("adamw", torch.float64), ("chain", torch.float64)],
    ids=str,
)
def test_many_steps_are_the_eager_ones_in_the_same_buffers_by_one_graph(name: str, dtype: torch.dtype) -> None:
    tx, graphs = OPTIMIZERS[name](), Graphs()
    eager = step_of(tx)
    step = optfn.compile(eager, donate=("params", "state"), backend="aot_eager")
    params = some_params(dtype)
    state = tx.init(params)
    wanted = copies((params, state))
    held = optfn.tree.leaves((params, state))
    addresses = [x.data_ptr() for x in held]
    for grads in some_grads(params, 20):
        wanted = eager(*wanted, grads)
        params, state = step(params, state, grads)
        got = optfn.tree.leaves((params, state))
        assert all(x is y for x, y in zip(got, held, strict=True))
        assert [x.data_ptr() for x in got] == addresses
        same((params, state), wanted)
    assert graphs.count == 1


def test_a_tensor_that_changes_makes_no_new_graph() -> None:
    def eager(params: Any, state: Any, grads: Any, lr: Any) -> Any:
        updates, state = optfn.adam(lr).update(grads, state, params)
        return optfn.apply_updates(params, updates), state

    graphs = Graphs()
    step = optfn.compile(eager, donate=("params", "state"), backend="aot_eager")
    for dtype in (torch.float32, torch.float64):
        before = graphs.count
        params = some_params()
        state = optfn.adam().init(params)
        wanted = copies((params, state))
        for i, grads in enumerate(some_grads(params, 10)):
            lr = torch.tensor(0.1 / (i + 1), dtype=dtype)
            wanted = eager(*wanted, grads, lr)
            same(step(params, state, grads, lr), wanted)
        assert graphs.count == before + 1


def _positional_only(params, /, scale, *, shift):
    return params * scale + shift


class _Owner:
    def method(self, params, scale, shift):
        return _positional_only(params, scale, shift=shift)


CALLS: dict[str, tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = {
    "positional": (lambda params, scale, shift: params * scale + shift, "params", (2.0, 1.0), {}),
    "keywords": (lambda scale, params, shift: params * scale + shift, "params", (), {"shift": 1.0, "scale": 2.0}),
    "numbered": (lambda params, scale, shift: params * scale + shift, 0, (2.0, 1.0), {}),
    "number in a tuple": (lambda params, scale, shift: params * scale + shift, (0,), (2.0, 1.0), {}),
    "default": (lambda params, scale=2.0, shift=1.0: params * scale + shift, ["params"], (), {}),
    "a default passed over": (lambda params, scale=2.0, shift=3.0: params * scale + shift, 0, (), {"shift": 1.0}),
    "donated default left out": (lambda params, buffer=None: params * 2 + 1, ("buffer", "params"), (), {}),
    "positional only": (_positional_only, "params", (2.0,), {"shift": 1.0}),
    "keyword only": (lambda *, params, scale, shift: params * scale + shift, "params", (), {"scale": 2.0, "shift": 1.0}),
    "keyword only, numbered": (lambda *, scale, shift, params: params * scale + shift, 2, (), {"scale": 2.0, "shift": 1.0}),
    "variadic others": (lambda params, *more, **named: params * more[0] + named["shift"], 0, (2.0,), {"shift": 1.0}),
    "method": (_Owner().method, 0, (2.0, 1.0), {}),
    "partial": (functools.partial(_positional_only, shift=1.0), 0, (2.0,), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_found_however_they_are_passed(name: str) -> None:
    fn, donate, args, kwargs = CALLS[name]
    params = torch.tensor([1.0, 2.0])
    step = optfn.compile(fn, donate=donate, backend="aot_eager")
    by_name = "keyword" in name
    result = step(*args, params=params, **kwargs) if by_name else step(params, *args, **kwargs)
    assert result is params
    assert params.tolist() == [3.0, 5.0]


def test_without_donation_nothing_is_written_and_autograd_records() -> None:
    params = torch.tensor([1.0, 2.0], requires_grad=True)
    result = optfn.compile(lambda params: params.square(), backend="aot_eager")(params)
    result.sum().backward()
    assert params.tolist() == [1.0, 2.0]
    assert params.grad.tolist() == [2.0, 4.0]


def test_each_function_has_graphs_of_its_own() -> None:
    """More functions than Dynamo's recompile limit, made by one factory, each for one size that it must not take for dynamic."""

    def make(k: int) -> Callable[[Tensor], Tensor]:
        return lambda p: p * k

    shapes: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        shapes.extend(x.shape for x in inputs if isinstance(x, Tensor))
        return graph

    for k in range(2, 14):
        step = optfn.compile(make(k), donate=0, backend=backend)
        assert step(torch.ones(k)).tolist() == [k] * k
    assert [tuple(map(type, shape)) for shape in shapes] == [(int,)] * 12


def test_a_modules_own_parameters_are_trained_in_place_as_torch_trains_them() -> None:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()

    ours, theirs = make(), make()
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.05, weight_decay=0.1)
    tx = optfn.adamw(lr=0.05, weight_decay=0.1)

    def step(params: Any, state: Any, x: Tensor, y: Tensor) -> Any:
        def loss(params: Any) -> Tensor:
            return (functional_call(ours, params, (x,)) - y).square().mean()

        grads, value = grad_and_value(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optfn.apply_updates(params, updates), state, value

    graphs = Graphs()
    step = optfn.compile(step, donate=("params", "state"), backend="aot_eager")
    params = dict(ours.named_parameters())
    state = tx.init(params)
    for _ in range(20):
        x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()
        new, state, value = step(params, state, x, y)
        assert all(new[name] is p for name, p in ours.named_parameters())
        reference.zero_grad()
        loss = (theirs(x) - y).square().mean()
        loss.backward()
        reference.step()
        same(value, loss.detach(), rtol=1e-12, atol=1e-12)
        same(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-12, atol=1e-12)
    assert graphs.count == 1
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in ours.parameters())
    assert not any(x.requires_grad for x in (value, *optfn.tree.leaves(state)))


def test_a_module_that_the_function_closes_over_is_read_before_it_is_written() -> None:
    model = torch.nn.Linear(2, 1)
    before, x = copies(dict(model.named_parameters())), torch.randn(5, 2)
    wanted = functional_call(model, before, (x,)).detach()
    new, output = optfn.compile(
        lambda params: (optfn.tree.map(lambda p: p + 1, params), model(x)), donate="params", backend="aot_eager"
    )(dict(model.named_parameters()))
    same(output, wanted)
    same(dict(model.state_dict()), optfn.tree.map(lambda p: p + 1, before))
    assert new["weight"] is model.weight


def test_a_new_pattern_of_none_is_a_new_graph_and_right() -> None:
    tx, graphs = optfn.adamw(0.1), Graphs()
    eager = step_of(tx)
    step = optfn.compile(eager, donate=("params", "state"), backend="aot_eager")
    params = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    state = tx.init(params)
    wanted, held = copies((params, state)), optfn.tree.leaves((params, state))
    patterns = [(), ("a",), ("b",), (), ("a", "b"), ("a",), ()]
    for absent in patterns:
        grads = {name: None if name in absent else torch.randn_like(p) for name, p in params.items()}
        wanted = eager(*wanted, grads)
        params, state = step(params, state, grads)
        same((params, state), wanted)
        assert all(x is y for x, y in zip(optfn.tree.leaves((params, state)), held, strict=True))
    assert graphs.count == len({*patterns})


pad = torch.nn.functional.pad
# Three donated matrices to their three successors, and perhaps more.
ALIASING: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "swap": lambda a, b, c: (b, a, c),
    "rotation": lambda a, b, c: (b, c, a),
    "one passes": lambda a, b, c: (a, b + 1, c),
    "old values beside the new": lambda a, b, c: (a + 1, b * 2, c - a, a, b.t(), c[0], a.reshape(-1), a[1:, 1:]),
    "old values beside a swap": lambda a, b, c: (b, a, c.t(), a, b, c, a.t()),
    "new values beside themselves": lambda a, b, c: ((n := a + 1), (m := b + n), c + m + a + b, n, m.t()),
    "transposed": lambda a, b, c: (b.t(), a.t(), c.t()),
    "transposed and read": lambda a, b, c: (a.t(), b.t() + a, c + b),
    "transposed twice": lambda a, b, c: (
        b.t().contiguous().t(),
        a.t().contiguous(),
        c.reshape(2, 2, 4).movedim(0, 1).reshape(4, 4),
    ),
    "detach": lambda a, b, c: (b.detach(), a.detach(), c.clone()),
    "all of it": lambda a, b, c: (b[...], a[:], c[:, :]),
    "views": lambda a, b, c: (b.reshape(16).view(4, 4), a.flatten().unflatten(0, (4, 4)), c.unsqueeze(0).squeeze(0)),
    "times 1": lambda a, b, c: (b * 1.0, a * 1, c / 1),
    "plus 0": lambda a, b, c: (b + 0, a - 0.0, c**1),
    "by constant tensors": lambda a, b, c: (b * torch.ones_like(b), a + torch.zeros(4, 4), c / torch.ones(())),
    "expand": lambda a, b, c: (b[0].expand(4, 4), a[:, :1].expand(4, 4), c[0, 0].expand(4, 4)),
    "one result thrice": lambda a, b, c: ((s := a + b), s, s),
    "one argument thrice": lambda a, b, c: (b, b, b),
    "results that share memory": lambda a, b, c: ((s := b + c), s.t(), s.reshape(-1).view(4, 4), s, s[0]),
    "stack and unbind": lambda a, b, c: torch.stack([c, a, b]).unbind(),
    "cat and split": lambda a, b, c: torch.cat([b, c, a]).split(4),
    "cat and chunk": lambda a, b, c: torch.cat([b.t(), c.t(), a.t()], 1).chunk(3, 1),
    "cat and split beside the new": lambda a, b, c: (a + 1, b + 1, c + 1, *torch.cat([b, c, a]).split(4)),
    "conversions": lambda a, b, c: (b.double().float(), a.float(), c.bfloat16().float()),
    "integer view": lambda a, b, c: (b.view(torch.int32).view(torch.float32), a.view(torch.int32).view(torch.float32), c),
    "complex view": lambda a, b, c: (torch.view_as_real(torch.view_as_complex(b.contiguous().view(4, 2, 2))).reshape(4, 4), a, c),
    "where": lambda a, b, c: (torch.where(torch.ones(4, 4, dtype=torch.bool), b, a), torch.where(b == b, a, b), c),
    "scatter": lambda a, b, c: (
        torch.slice_scatter(a, b),
        torch.slice_scatter(b, a[:2], 0, 0, 2),
        torch.select_scatter(c, a[0], 0, 1),
    ),
    "in place on copies": lambda a, b, c: (a.clone().copy_(b), b.clone().copy_(a), torch.zeros_like(c).add_(c)),
    "pad and repeat": lambda a, b, c: (pad(b, (0, 0)), pad(a, (0, 0, 0, 0)), c.repeat(1, 1)),
    "roll": lambda a, b, c: (a.roll(1, 0), a.roll(1, 1), b.roll(1)),
    "flip": lambda a, b, c: (b.flip(0).flip(0), a.flip(0), c.flip(1)),
    "rows moved": lambda a, b, c: (torch.cat([a[1:], a[:1]]), torch.cat([b[:2], a[2:]]), torch.cat([b[1:], a[:1]])),
    "rows gathered": lambda a, b, c: (
        a[torch.tensor([3, 2, 1, 0])],
        b[:, torch.tensor([1, 1, 0, 0])],
        c.index_select(0, torch.arange(4)),
    ),
    "diagonals": lambda a, b, c: (b.diag().diag(), a.triu() + a.tril(-1), c.diagonal().expand(4, 4)),
    "products": lambda a, b, c: (b @ a, a @ b, c @ a + b),
    "along a dimension": lambda a, b, c: (a.cumsum(0), b.cumsum(1) + a, c.sort().values),
    "reductions": lambda a, b, c: (a - b.sum(), b - a.amax(0), c + c.mean(1, keepdim=True)),
    "interpolation": lambda a, b, c: (a.lerp(b, 1.0), b.lerp(a, 0.0), torch.lerp(c, a, torch.ones(()))),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"contiguous": lambda x: x, "transposed": lambda x: x.t()}


def integers() -> Tensor:
    """Small integers: every case is exact, in whatever order and precision it is computed."""
    return torch.randint(-8, 9, (4, 4)).float()


def check_aliasing(cases: dict[str, Callable[..., Any]], layout: str, backend: str) -> None:
    """All cases in one graph, two steps: the first from given values, the second from what the first left."""

    def eager(trees: Any) -> Any:
        return {name: tuple(fn(*trees[name])) for name, fn in cases.items()}

    def donated(trees: Any) -> Any:
        results = eager(trees)
        return {name: list(r[:3]) for name, r in results.items()}, {name: r[3:] for name, r in results.items()}

    step = optfn.compile(donated, donate="trees", backend=backend)
    trees = {name: [LAYOUTS[layout](integers()) for _ in range(3)] for name in cases}
    held = copies(trees)
    for _ in range(2):
        wanted = copies(eager(held))
        new, beside = step(trees)
        wrong = []
        for name, results in wanted.items():
            assert all(x is y for x, y in zip(new[name], trees[name], strict=True))
            got = [*new[name], *beside[name]]
            wrong += [(name, i) for i, (x, y) in enumerate(zip(got, results, strict=True)) if not torch.equal(x, y)]
            for x, y in zip(held[name], results, strict=False):
                x.copy_(y % 8)
            for x, y in zip(trees[name], held[name], strict=True):
                x.copy_(y)
            memory = [x.untyped_storage().data_ptr() for x in got]
            assert len({*memory}) == len(memory), f"{name}: results share memory"
        assert not wrong


# Many cases to a graph, for speed, and some alone: next to others they may be scheduled otherwise. A graph with complex numbers is
# compiled in another way, so that case stands alone.
ALONE = ["swap", "cat and split beside the new", "complex view"]
GRAPHS = {"all that are real": [name for name in ALIASING if name != "complex view"], **{name: [name] for name in ALONE}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_results_that_are_arguments_or_views_of_them(graph: str, layout: str, backend: str) -> None:
    check_aliasing({name: ALIASING[name] for name in GRAPHS[graph]}, layout, backend)


@pytest.mark.codegen
def test_inductor_may_be_asked_for_by_name() -> None:
    """All of the graph at once, and the results copied after it."""
    check_aliasing({name: ALIASING[name] for name in ("swap", "complex view", "rows moved")}, "contiguous", "inductor")


ALL_DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.int32, torch.int64, torch.uint8, torch.bool),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_dtype_0_dim_and_empty(backend: str) -> None:
    """0-dim tensors among them, which torch 2.13 takes for numbers where they are float64 on the CPU."""

    def eager(params: Any) -> Any:
        new = optfn.tree.map(lambda x: ~x if x.dtype == torch.bool else x + 1, params)
        return {name: [(-x).conj() if x.is_complex() else x for x in xs] for name, xs in new.items()}, params

    step = optfn.compile(eager, donate="params", backend=backend)
    params = {str(d): [torch.zeros((), dtype=d), torch.ones(3, dtype=d), torch.ones(0, 2, dtype=d)] for d in ALL_DTYPES}
    wanted = copies(params)
    for _ in range(3):
        wanted, before = copies(eager(wanted))
        new, old = step(params)
        assert all(x is y for x, y in zip(optfn.tree.leaves(new), optfn.tree.leaves(params), strict=True))
        same(params, wanted)
        same(old, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.complex128], ids=str)
def test_adam_in_other_dtypes(dtype: torch.dtype) -> None:
    tx = optfn.adam(0.1)
    eager = step_of(tx)
    step = optfn.compile(eager, donate=("params", "state"), backend="aot_eager")
    params = some_params(dtype)
    state = tx.init(params)
    wanted = copies((params, state))
    for grads in some_grads(params, 5):
        wanted = eager(*wanted, grads)
        same(step(params, state, grads), wanted)


def test_strides_stay_and_slices_of_one_buffer_can_be_donated() -> None:
    flat = torch.arange(24.0)
    params = {"head": flat[:4], "matrix": flat[4:16].view(3, 4).t(), "rows": flat[16:].view(4, 2)[::2]}
    untouched = flat.view(-1, 2)[[9, 11]].clone()
    strides = {name: p.stride() for name, p in params.items()}
    wanted = optfn.tree.map(lambda p: p * 2 + 1, params)
    new = optfn.compile(lambda p: optfn.tree.map(lambda x: x * 2 + 1, p), donate="p", backend="aot_eager")(params)
    same(new, wanted)
    assert {name: p.stride() for name, p in new.items()} == strides
    assert all(new[name] is params[name] for name in params)
    assert torch.equal(flat.view(-1, 2)[[9, 11]], untouched)


class Point(NamedTuple):
    x: Any
    y: Any


def test_results_of_any_structure_and_kind() -> None:
    def eager(params: Any, batch: Any) -> Any:
        new = Point([params.x[0] + 1], {"b": params.y["b"] * 2, "a": None})
        return {
            "new": new,
            "name": "step",
            "n": 3,
            "flag": True,
            "loss": params.x[0].sum(),
            "nothing": None,
            "e": (),
            "batch": batch,
        }

    params = Point([torch.ones(2)], {"b": torch.ones(3), "a": None})
    batch = torch.ones(4)
    wanted = eager(copies(params), batch)
    result = optfn.compile(eager, donate="params", backend="aot_eager")(params, batch)
    same(result, wanted)
    assert type(result["new"]) is Point
    assert list(result) == list(wanted)
    assert list(result["new"].y) == ["b", "a"]
    assert result["new"].x[0] is params.x[0]
    assert result["batch"] is not batch
    assert result["batch"].data_ptr() != batch.data_ptr()


# What is donated, the result by name, and which of its parts each donated leaf must become.
PLACES: dict[str, tuple[Callable[..., Any], Any, Callable[[Any], Any]]] = {
    "a part before leaves": (lambda p: (p["x"] + 1, {"x": p["x"] + 2}), {"x": torch.ones(2)}, lambda r: {"x": r[1]["x"]}),
    "the larger part": (
        lambda p: ([{"x": p["x"] + 1}], {"x": p["x"] + 2}),
        {"x": torch.ones(2)},
        lambda r: {"x": r[1]["x"]},
    ),
    "the first part": (lambda p: ({"x": p["x"] + 1}, {"x": p["x"] + 2}), {"x": torch.ones(2)}, lambda r: r[0]),
    "the first part of these shapes": (
        lambda p: ({"x": p["x"].sum()}, {"x": p["x"] + 2}),
        {"x": torch.ones(2)},
        lambda r: r[1],
    ),
    "another container": (
        lambda p: [p["a"] + 1, p["b"] + 2],
        {"a": torch.ones(2), "b": torch.ones(2)},
        lambda r: dict(zip("ab", r, strict=True)),
    ),
    "leaf by leaf": (
        lambda p: {"v": p["b"] + 1, "u": p["a"] + 2, "loss": p["a"].sum()},
        {"a": torch.ones(2), "b": torch.ones(3)},
        lambda r: {"a": r["u"], "b": r["v"]},
    ),
    "leaf by leaf past None": (
        lambda p: (p["b"] + 1, None),
        {"a": None, "b": torch.ones(3)},
        lambda r: {"a": None, "b": r[0]},
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_which_result_replaces_an_argument(name: str) -> None:
    fn, params, place = PLACES[name]
    params = copies(params)
    wanted = fn(copies(params))
    result = optfn.compile(fn, donate="p", backend="aot_eager")(params)
    same(result, wanted)
    for x, y in zip(optfn.tree.flatten(params)[0], optfn.tree.flatten(place(result))[0], strict=True):
        assert x is y


def test_arguments_take_their_places_in_the_order_of_the_signature() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    first, second = optfn.compile(lambda a, b: (b + 1, a + 1), donate=("b", "a"), backend="aot_eager")(a, b)
    assert first is a
    assert second is b
    assert (first.tolist(), second.tolist()) == ([2.0, 2.0], [1.0, 1.0])


@pytest.mark.parametrize(
    ("donate", "message"),
    [
        ("state", "donate: the function has no argument 'state'; its arguments are params, x"),
        (("params", "state"), "no argument 'state'"),
        (2, "no argument 2"),
        (-1, "no argument -1"),
        ("more", "no argument 'more'"),
    ],
)
def test_donate_must_name_an_argument(donate: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        optfn.compile(lambda params, x, *more: params, donate=donate)


buffer = torch.arange(12.0)
ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "twice in one argument": (({"a": (t := torch.ones(2)), "b": t}, None), ValueError, "'p.a' and 'p.b' share memory"),
    "twice, empty": (({"a": (t := torch.ones(0)), "b": t}, None), ValueError, "'p.a' and 'p.b' share memory"),
    "in another argument": (({"a": (t := torch.ones(2))}, [t]), ValueError, "'p.a' and 'x.0' share memory"),
    "a view in another": (({"a": (t := torch.ones(2))}, t[1:]), ValueError, "'p.a' and 'x' share memory"),
    "overlapping": (({"a": buffer[:4], "b": buffer[3:7]}, None), ValueError, "'p.a' and 'p.b' share memory"),
    "overlapping, behind a third": ((buffer[8:], [buffer, buffer[:3]]), ValueError, "'x.0' and 'p' share memory"),
    "expanded": (({"a": torch.ones(1).expand(3)}, None), ValueError, "'p.a' is expanded: its entries share memory"),
    "windows": (({"a": buffer.unfold(0, 3, 1)}, None), ValueError, "'p.a' is expanded: its entries share memory"),
    "a number": (({"a": torch.ones(2), "b": 3.0}, None), TypeError, "'p.b' must be a dense tensor, got float"),
    "a module": ((torch.nn.Linear(1, 1), None), TypeError, "'p' must be a dense tensor, got Linear"),
    "sparse": (({"a": torch.eye(2).to_sparse()}, None), TypeError, "'p.a' must be a dense tensor, got torch.sparse_coo"),
    "no such shape": (({"drop": torch.ones(5)}, None), ValueError, "'p.drop' is torch.float32 of shape (5,), and no result"),
    "no such dtype": (({"double": torch.ones(5)}, None), ValueError, "'p.double' is torch.float32 of shape (5,), and no result"),
    "too few": (({"a": torch.ones(5), "drop": torch.ones(5)}, None), ValueError, "'p.drop' is torch.float32 of shape (5,), and no"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_donated_is_an_error_that_changes_nothing(name: str) -> None:
    def fn(p: Any, x: Any) -> Any:
        if not isinstance(p, dict):
            return p + 1
        return {k: v.double() if k == "double" else v + 1 for k, v in p.items() if k != "drop"}

    (p, x), kind, message = ERRORS[name]
    tensors = [t for t in optfn.tree.leaves((p, x)) if isinstance(t, Tensor)]
    before, versions = copies(tensors), [t._version for t in tensors]
    step = optfn.compile(fn, donate="p", backend="aot_eager")
    for _ in range(2):
        with pytest.raises(kind, match=re.escape(message)):
            step(p, x)
    assert [t._version for t in tensors] == versions
    assert all(torch.equal(t.to_dense(), b.to_dense()) for t, b in zip(tensors, before, strict=True))
    good = torch.ones(3)
    assert step({"a": good}, None)["a"] is good
    assert good.tolist() == [2.0] * 3


def test_what_is_not_donated_may_appear_twice() -> None:
    p, x = torch.ones(2), torch.ones(3)
    step = optfn.compile(lambda p, x, y: p + x.sum() + y[0].sum() + y[1].sum(), donate="p", backend="aot_eager")
    for _ in range(2):
        expected = p + 8
        assert step(p, x, [x, x[1:]]) is p
        assert torch.equal(p, expected)


def test_memory_is_looked_at_in_every_call() -> None:
    """The same tensors may have come to share memory since."""
    a, b = torch.ones(2), torch.ones(2)
    step = optfn.compile(lambda a, b: (a + 1, b + 1), donate=(0, 1), backend="aot_eager")
    step(a, b)
    b.data = a.data
    with pytest.raises(ValueError, match="'a' and 'b' share memory"):
        step(a, b)


BAD_GRADS = {
    "structure": {"v": torch.ones(3)},
    "shape": {"w": torch.ones(4)},
    "integer": {"w": torch.ones(3, dtype=torch.int64)},
    "container": [torch.ones(3)],
    "sparse": {"w": torch.eye(3).to_sparse()},
}


@pytest.mark.parametrize(("name", "donate"), [("structure", ()), *((name, ("params", "state")) for name in BAD_GRADS)])
def test_errors_of_the_library_are_those_of_the_eager_step(name: str, donate: Any) -> None:
    tx, grads = optfn.adam(0.1), BAD_GRADS[name]
    eager = step_of(tx)
    params = {"w": torch.ones(3)}
    state = tx.init(params)
    before = copies((params, state))
    with pytest.raises((TypeError, ValueError)) as wanted:
        eager(params, state, grads)
    step = optfn.compile(eager, donate=donate, backend="aot_eager")
    for _ in range(2):
        with pytest.raises(wanted.type) as got:
            step(params, state, grads)
        assert type(got.value) is wanted.type
        assert str(got.value) == str(wanted.value)
        same((params, state), before, rtol=0, atol=0)
    good = {"w": torch.ones(3)}
    wanted_step = eager(*before, good)
    same(step(params, state, good), wanted_step)


def test_what_does_not_compile_is_torchs_error() -> None:
    def fn(p: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return p + 1

    p = torch.ones(2)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        optfn.compile(fn, donate="p", backend="aot_eager")(p)
    assert p.tolist() == [1.0, 1.0]


def test_a_call_that_does_not_fit_the_signature() -> None:
    step = optfn.compile(lambda params, x: params + x, donate="params", backend="aot_eager")
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        step(torch.ones(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_any_size(backend: str) -> None:
    tx, graphs = optfn.adam(0.1), Graphs()

    def eager(params: Any, state: Any, x: Tensor) -> Any:
        grads, value = grad_and_value(lambda p: (x @ p["w"]).square().mean())(params)
        updates, state = tx.update(grads, state, params)
        return optfn.apply_updates(params, updates), state, value, x * 2

    step = optfn.compile(eager, donate=("params", "state"), backend=backend)
    params = {"w": torch.randn(3)}
    state = tx.init(params)
    wanted = copies((params, state))
    for n in (4, 7, 5, 12, 4, 9):
        x = torch.randn(n, 3)
        *wanted, value, doubled = eager(*wanted, x)
        same(step(params, state, x), (*wanted, value, doubled), rtol=1e-5, atol=1e-6)
    assert graphs.count == 2


def allocated(step: Callable[..., Any], *args: Any) -> list[int]:
    """The sizes of the buffers that the code generated for a step allocates."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    with config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(step, *args)
    assert codes
    shapes = re.findall(r"= empty_strided_\w+\(\(([^)]*)\)", "\n".join(codes))
    return [torch.Size(int(n) for n in shape.replace(" ", "").split(",") if n).numel() for shape in shapes]


@pytest.mark.codegen
def test_a_donated_step_allocates_no_parameter() -> None:
    tx = optfn.adamw(0.1, mask=matrices)
    shapes = {"0.w": (64, 48), "0.b": (64,), "1.w": (64, 64), "1.b": (64,), "2.w": (8, 64), "2.b": (32,)}
    params = {name: torch.randn(shape) for name, shape in shapes.items()}
    state, (grads,) = tx.init(params), some_grads(params, 1)
    wanted = step_of(tx)(params, state, grads)
    plain = allocated(optfn.compile(step_of(tx)), params, state, grads)
    assert sum(n >= 32 for n in plain) >= 3 * len(shapes)
    donated = allocated(optfn.compile(step_of(tx), donate=("params", "state")), params, state, grads)
    assert max(donated, default=0) <= len(shapes)
    same((params, state), wanted)
