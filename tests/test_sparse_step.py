"""Donated steps on sparse gradients: the values of the pure step, in the buffers of its arguments, and no table made on the way."""

import copy
import json
import pathlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from oracle import STEPS, TorchOptim, check, sparse_problem
from torch import Tensor, optim
from torch.profiler import ProfilerActivity, profile

import optfn

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # inside torch.optim


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def step_of(tx: optfn.GradientTransformation) -> Callable[..., Any]:
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optfn.apply_updates(params, updates), state

    return step


def donated(fn: Callable[..., Any], *names: str) -> Callable[..., Any]:
    return optfn.compile(fn, donate=names or ("params", "state"), backend="eager")


def copies(of: Any) -> Any:
    return optfn.tree.map(lambda x: x.clone() if isinstance(x, Tensor) else x, of)


def same(got: Any, wanted: Any, rtol: float = 0, atol: float = 0) -> None:
    assert optfn.tree.paths(got) == optfn.tree.paths(wanted)
    for path, x, y in zip(optfn.tree.paths(got), optfn.tree.flatten(got)[0], optfn.tree.flatten(wanted)[0], strict=True):
        if isinstance(y, Tensor):
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=lambda text, path=path: f"{path}: {text}")
        else:
            assert x == y, path


def sparse_names(path: str, p: Tensor) -> str:
    return "dense" if path in ("vector", "matrix") else "sparse"


def mixed(rows: optfn.GradientTransformation) -> optfn.GradientTransformation:
    return optfn.partition({"sparse": rows, "dense": optfn.adamw(0.1)}, sparse_names)


ALGORITHMS: dict[str, optfn.GradientTransformation] = {
    "sgd": optfn.sgd(0.1),
    "sgd with momentum": optfn.sgd(0.1, momentum=0.9),
    "adagrad": optfn.adagrad(0.1, lr_decay=0.1),
    "sparse_adam": mixed(optfn.sparse_adam(0.1, maximize=True)),
    "chain": mixed(
        optfn.sparse_masked(
            optfn.chain(optfn.scale(0.5), optfn.scale_by_adam(amsgrad=True), optfn.add_decayed_weights(0.1), optfn.scale(-0.1))
        )
    ),
    "scheduled": mixed(optfn.sparse_adam(optfn.linear_schedule(0.1, 0.0, 9))),
    "injected": mixed(optfn.inject_hyperparams(optfn.sparse_adam)(lr=0.1)),
    "averaged": optfn.chain(optfn.sgd(0.1), optfn.ema_params(0.9)),
}


@pytest.mark.parametrize(
    ("dtype", "absent"),
    [(torch.float64, True), *((dtype, False) for dtype in (torch.float32, torch.bfloat16, torch.complex128))],
    ids=["float64, some None", "float32", "bfloat16", "complex128"],
)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_many_steps_are_the_pure_ones_in_the_same_buffers(name: str, dtype: torch.dtype, absent: bool) -> None:
    """Sparse and dense leaves; entries that change in place and number, occur twice, or are none; a step without gradients."""
    given, tx = sparse_problem(dtype, absent=absent), ALGORITHMS[name]
    eager = step_of(tx)
    step, params = donated(eager), copies(given.params)
    state = tx.init(params)
    wanted = copies((params, state))
    held = optfn.tree.leaves((params, state))
    addresses = [x.data_ptr() for x in held]
    for grads in given.gradients:
        if dtype == torch.bfloat16:  # entries that occur twice are summed in float32 in place, one by one in bfloat16 out of place
            grads = optfn.tree.map(lambda g: g.coalesce() if g.is_sparse else g, grads)
        before = copies(grads)
        wanted = eager(*wanted, grads)
        params, state = step(params, state, grads)
        got = optfn.tree.leaves((params, state))
        assert all(x is y for x, y in zip(got, held, strict=True))
        assert [x.data_ptr() for x in got] == addresses
        same((params, state), wanted)
        same(grads, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("alias", "cls", "kwargs"),
    [
        (optfn.sparse_adam, optim.SparseAdam, {"lr": 0.1, "betas": (0.8, 0.9)}),
        (optfn.sgd, optim.SGD, {"lr": 0.1, "maximize": True}),
        (optfn.adagrad, optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    ],
)
def test_donated_steps_are_torchs(alias: Any, cls: Any, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    given, tx = sparse_problem(dtype, absent=True, dense=False), alias(**kwargs)
    reference = TorchOptim(cls, kwargs, [p.clone() for p in given.params.values()])
    step, params = donated(step_of(tx)), copies(given.params)
    state = tx.init(params)
    for t, grads in enumerate(given.gradients):
        reference.step([None if g is None else g.clone() for g in grads.values()])
        params, state = step(params, state, grads)
        for (name, p), theirs in zip(params.items(), reference.params, strict=True):
            check(p, theirs, f"{name} after step {t + 1}")


def test_an_embedding_is_trained_in_place_as_torch_trains_it() -> None:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Embedding(20, 4, sparse=True), torch.nn.Linear(4, 1)).double()

    ours, theirs = make(), make()
    references = [optim.SparseAdam([*theirs[0].parameters()], lr=0.1), optim.AdamW([*theirs[1].parameters()], lr=0.1)]
    tx = optfn.partition(
        {"rows": optfn.sparse_adam(0.1), "rest": optfn.adamw(0.1)}, lambda path, p: "rows" if path == "0.weight" else "rest"
    )
    params = dict(ours.named_parameters())
    state, step = tx.init(params), donated(step_of(tx))
    for _ in range(STEPS):
        tokens = torch.randint(20, (3, 2))
        for model in (ours, theirs):
            model.zero_grad()
            model(tokens).square().mean().backward()
        new, state = step(params, state, {name: p.grad for name, p in params.items()})
        assert all(new[name] is p for name, p in ours.named_parameters())
        for reference in references:
            reference.step()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            check(p.detach(), q.detach(), name)
    assert all(p.requires_grad and p.is_leaf for p in ours.parameters())
    assert not any(x.requires_grad for x in optfn.tree.leaves(state))


def peak(call: Callable[[], Any], file: pathlib.Path) -> int:
    """The most bytes that torch's allocator holds at a time during a call, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    profiled.export_chrome_trace(str(file))
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


@pytest.mark.parametrize("name", ["sgd", "adagrad", "sparse_adam", "injected", "mixed"])
def test_a_donated_step_allocates_no_table(name: str, tmp_path: pathlib.Path) -> None:
    rows = {"injected": optfn.inject_hyperparams(optfn.sparse_adam)(lr=0.1), "mixed": optfn.sparse_adam(0.1)}.get(name)
    tx = ALGORITHMS[name] if rows is None else rows
    params = {"table": torch.randn(20_000, 8)}
    grads: dict[str, Any] = {"table": torch.sparse_coo_tensor(torch.randint(20_000, (1, 30)), torch.randn(30, 8), (20_000, 8))}
    if name == "mixed":
        params["vector"], grads["vector"] = torch.randn(8), torch.randn(8)
        tx = mixed(tx)
    elif name == "sparse_adam":
        tx = optfn.sparse_adam(0.1)
    state = tx.init(params)
    tables, size = sum(x.shape == (20_000, 8) for x in optfn.tree.leaves((params, state))), params["table"].nbytes
    with torch.no_grad():
        assert peak(lambda: step_of(tx)(params, state, grads), tmp_path / "pure.json") >= tables * size
    step = donated(step_of(tx))
    assert peak(lambda: step(params, state, grads), tmp_path / "donated.json") < size / 10


AT, ROWS = torch.tensor([4, 1]), torch.tensor([[8.0, -3.0], [5.0, 2.0]])
ENTRIES = (torch.tensor([0, 3, 3]), torch.tensor([1, 0, 1]))


def _in_place_later(a: Tensor, b: Tensor, g: Tensor) -> Any:
    values, index = ROWS.clone(), AT.clone()
    new = a.index_copy(0, index, values)
    values.add_(1)
    index.fill_(0)
    summed = b + (g := g.coalesce())
    g.values().zero_()
    return new, summed


def _in_place_on_the_new(a: Tensor, b: Tensor, g: Tensor) -> Any:
    new, other = a + g, b + g
    new.mul_(2)
    other[0].fill_(7.0)
    return new + g, other


def _read_as_memory(a: Tensor, b: Tensor, g: Tensor) -> Any:
    new = a + g
    total = sum(map(sum, new.tolist())) + float(new.numpy().sum()) + copy.deepcopy(new).sum().item() + new.data.sum().item()
    return new, b - g, total, torch.from_dlpack(b - g).sum(), (a + g).untyped_storage().nbytes(), (a + g).data_ptr() != 0


def _decides(a: Tensor, b: Tensor, g: Tensor) -> Any:
    new = a + g
    return (new, b) if new[1].sum() > 0 else (new * 2, b + 1)


def _says(a: Tensor, b: Tensor, g: Tensor) -> Any:
    assert all(isinstance(x, Tensor) and x.layout == torch.strided and not x.requires_grad for x in (a, b, a + g))
    new = a + g
    return (
        new,
        b,
        [new.shape, new.dtype, new.device, new.stride() == new.data.stride(), new.is_complex(), new.numel(), len(new), repr(new)],
    )


# Two donated tables and a sparse gradient to their successors, and perhaps more.
STEPS_OF_TWO: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "rows added": lambda a, b, g: (a + g, b - g),
    "rows added, scaled": lambda a, b, g: (torch.add(a, g, alpha=0.5), torch.sub(b, g, alpha=3)),
    "rows replaced": lambda a, b, g: (a.index_copy(0, AT, ROWS), b.index_put((AT,), ROWS)),
    "rows added by index": lambda a, b, g: (a.index_add(0, AT, ROWS, alpha=2), b.index_put((AT,), ROWS, accumulate=True)),
    "entries": lambda a, b, g: (
        a.index_put(ENTRIES, ROWS.flatten()[:3]),
        b.index_put(ENTRIES, ROWS.flatten()[:3], accumulate=True),
    ),
    "no rows": lambda a, b, g: (a.index_copy(0, AT[:0], ROWS[:0]), b + g * 0),
    "several writes": lambda a, b, g: (
        (a + g - g * 0.25).index_copy(0, AT, ROWS) + g,
        b.index_copy(0, AT, ROWS).index_add(0, AT, ROWS),
    ),
    "passed on": lambda a, b, g: (a, b + g),
    "swapped": lambda a, b, g: (b, a),
    "swapped views": lambda a, b, g: (b[...], a.detach(), b.view_as(b)),
    "swapped, then written": lambda a, b, g: (b + g, a + g),
    "old beside new": lambda a, b, g: (a + g, b - g, a, b, a.t(), b[1:3]),
    "new beside new": lambda a, b, g: (n := a + g, b, n, n.t(), n),
    "one for both": lambda a, b, g: (n := a + g, n, n),
    "one for the other": lambda a, b, g: (b, n := a + g, n[1]),
    "old rows read later": lambda a, b, g: (a + g, b + g, (a * b).sum(), a[AT] + b[AT]),
    "new table read": lambda a, b, g: (n := a + g, m := b - g, n.sum(), (n @ m.t())[0], torch.cat([n, m, a])),
    "new table read, then written": lambda a, b, g: (n := a + g, b + n.mean(), n + g),
    "rows of each other": lambda a, b, g: (a.index_copy(0, AT, b[:2]), b.index_add(0, AT, a[:2])),
    "rows of the new": lambda a, b, g: (n := a + g, b.index_copy(0, AT, n[2:4]), b.index_copy(0, torch.arange(5), n)),
    "changed in place later": _in_place_later,
    "changed in place": _in_place_on_the_new,
    "memory": _read_as_memory,
    "decides": _decides,
    "metadata": _says,
    "dense": lambda a, b, g: (a * 2 + b, b + g.to_dense()),
    "dense and rows": lambda a, b, g: (a * 2, b + g),
    "another dtype between": lambda a, b, g: ((a.double() + g.double()).float(), b.bfloat16().float()),
    # What is no plain write of rows.
    "along the other dimension": lambda a, b, g: (a.index_copy(1, AT[1:], b[:, :1]), b.index_add(1, AT[1:], a[:, 1:])),
    "negative indices": lambda a, b, g: (a.index_put((AT - 5,), ROWS), b.index_put((AT - 5,), ROWS, accumulate=True)),
    "broadcast values": lambda a, b, g: (a.index_put((AT,), ROWS[0]), b.index_put((AT, AT[1:]), torch.tensor(2.0))),
    "by a mask": lambda a, b, g: (a.index_put((a > 0,), torch.tensor(9.0)), b.index_put((b[:, 0] > 0,), torch.tensor(3.0))),
    "columns": lambda a, b, g: (torch.ops.aten.index_put(a, (None, AT[1:]), torch.ones(())), b),
    "no sparse dimension": lambda a, b, g: (a + torch.sparse_coo_tensor(torch.zeros(0, 1), b[None], b.shape), b),
    "numbers and tensors": lambda a, b, g: (a + 1, b - a),
    # Transforms.
    "vmap": lambda a, b, g: (
        a.index_add(0, AT, torch.vmap(lambda row: row * 2)(ROWS)),
        torch.vmap(lambda row, r: row + r.sum())(b + g, a),
    ),
    "grad": lambda a, b, g: (
        torch.func.grad(lambda a: (a.index_add(0, AT, ROWS) * b).square().sum())(a),
        b + torch.func.grad(lambda s: (a.index_add(0, AT, s * ROWS)).square().sum())(torch.tensor(2.0)),
    ),
    "grad of the new": lambda a, b, g: (n := a + g, torch.func.grad(lambda n: (n.square() * b).sum())(n)),
    "jvp": lambda a, b, g: (torch.func.jvp(lambda v: a.index_copy(0, AT, v), (ROWS,), (ROWS,))[1], b + g),
}


@pytest.mark.parametrize(
    "layout",
    [lambda x: x, lambda x: x.t().contiguous().t(), lambda x: x.repeat(2, 1)[::2]],
    ids=["contiguous", "transposed", "strided"],
)
@pytest.mark.parametrize("name", STEPS_OF_TWO)
def test_every_pure_step_is_right(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    fn = STEPS_OF_TWO[name]
    step = donated(lambda a, b, g: fn(a, b, g), "a", "b")
    tables = layout(torch.arange(10.0).view(5, 2) - 4), layout(torch.arange(10.0).view(5, 2).square() - 7)
    for indices in ([[3, 0, 3]], [[1]], torch.zeros(1, 0)):
        indices = torch.as_tensor(indices, dtype=torch.int64)
        rows = torch.randint(-8, 8, (indices.shape[1], 2)).float()  # whole numbers, so that all sums are exact
        g = torch.sparse_coo_tensor(indices, rows, (5, 2), check_invariants=True)
        wanted = fn(*copies(tables), g.clone())
        got = step(*tables, g)
        assert got[0] is tables[0]
        assert got[1] is tables[1]
        same(list(got), list(wanted))
        tensors = [x for x in optfn.tree.leaves([*got, [g._values(), g._indices()]]) if isinstance(x, Tensor) and x.numel()]
        assert all(type(x) is Tensor for x in tensors)
        assert len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors), "results share memory"


def test_dense_tensors_beside_a_table() -> None:
    """They are the arguments themselves, and are read before they are written."""

    seen: list[Any] = []

    def fn(p: dict[str, Tensor], g: Tensor) -> Any:
        seen.append(p["u"])
        return {"rows": p["rows"] + g, "u": p["v"], "v": p["u"][:], "w": p["w"].lerp(p["u"], 0.5)}, p["u"], p["w"].mean()

    g = torch.sparse_coo_tensor([[2, 2]], torch.randn(2, 2), (6, 2))
    p = {"rows": torch.randn(6, 2), **{name: torch.randn(3) for name in "uvw"}}
    held, wanted = dict(p), fn(copies(p), g)
    got = donated(fn, "p")(p, g)
    same(got, wanted)
    assert all(got[0][name] is x for name, x in held.items())
    assert seen[-1] is held["u"]


def test_a_sparse_result_replaces_no_table() -> None:
    """The updates have the structure, the shapes and the dtypes of the params, and come first."""
    tx = optfn.sparse_adam(0.1)

    def fn(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return updates, grads, optfn.apply_updates(params, updates), state

    params, grads = {"w": torch.randn(6, 2)}, {"w": torch.sparse_coo_tensor([[2, 2]], torch.randn(2, 2), (6, 2))}
    state = tx.init(params)
    wanted = fn(params, state, grads)
    got = donated(fn)(params, state, grads)
    same(got, wanted)
    assert got[2]["w"] is params["w"]
    assert got[1]["w"]._values().data_ptr() != grads["w"]._values().data_ptr()


def test_a_bare_tensor_is_a_tree() -> None:
    tx = optfn.sparse_adam(0.1)
    params, g = torch.randn(6, 2), torch.sparse_coo_tensor([[2, 4]], torch.randn(2, 2), (6, 2))
    state = tx.init(params)
    wanted = step_of(tx)(params, state, g)
    new, state = donated(step_of(tx))(params, state, g)
    assert new is params
    same((new, state), wanted)


def test_without_donation_a_sparse_step_is_the_function() -> None:
    params = torch.ones(3, 2, requires_grad=True)
    g = torch.sparse_coo_tensor([[2]], torch.ones(1, 2), (3, 2))
    new = optfn.compile(lambda p, g: p * 2 + g, backend="eager")(params, g)
    new.sum().backward()
    assert params.tolist() == [[1.0, 1.0]] * 3
    assert params.grad.tolist() == [[2.0, 2.0]] * 3


def _fails_late(a: Tensor, b: Tensor, g: Tensor) -> Any:
    new = a + g, b.index_copy(0, AT, ROWS)
    raise LookupError(f"after {len(new)} writes")


FAILING: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "by itself": (_fails_late, LookupError, "after 2 writes"),
    "index too large": (lambda a, b, g: (a + g, b.index_copy(0, AT + 1, ROWS)), IndexError, "out of (bounds|range)"),
    "index too small": (lambda a, b, g: (a + g, b.index_add(0, AT - 2, ROWS)), (IndexError, RuntimeError), "out of (bounds|range)"),
    "shape of the rows": (lambda a, b, g: (a + g, b.index_copy(0, AT, ROWS[:, :1])), (IndexError, RuntimeError), "shape|dim"),
    "dtype of the rows": (lambda a, b, g: (a + g, b.index_copy(0, AT, ROWS.double())), RuntimeError, "same dtype"),
    "factor of the rows": (lambda a, b, g: (a + g, torch.add(b, g, alpha=1j)), RuntimeError, "alpha|complex"),
    "no successor": (lambda a, b, g: (a + g, b[0]), ValueError, r"'b' is torch.float32 of shape \(5, 2\), and no result"),
    "only a sparse one": (lambda a, b, g: (a + g, g), ValueError, r"'b' is torch.float32 of shape \(5, 2\), and no result"),
}


@pytest.mark.parametrize("name", FAILING)
def test_an_error_leaves_the_arguments_as_they_were(name: str) -> None:
    fn, kind, message = FAILING[name]
    step = donated(lambda a, b, g: fn(a, b, g), "a", "b")
    tables = torch.randn(5, 2), torch.randn(5, 2)
    g = torch.sparse_coo_tensor([[3, 0]], torch.randn(2, 2), (5, 2))
    before, versions = copies((tables, g)), [x._version for x in (*tables, g._values())]
    for _ in range(2):
        with pytest.raises(kind, match=message):
            step(*tables, g)
    same((tables, g), before)
    assert [x._version for x in (*tables, g._values())] == versions


def test_errors_of_the_library_are_those_of_the_pure_step() -> None:
    tx = optfn.adam(0.1)
    params, grads = {"w": torch.ones(3, 2)}, {"w": torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2))}
    state = tx.init(params)
    with pytest.raises(TypeError, match=r"'w' has a sparse gradient.* optfn.sparse_masked") as wanted:
        step_of(tx)(params, state, grads)
    with pytest.raises(TypeError, match=re.escape(str(wanted.value))):
        donated(step_of(tx))(params, state, grads)


def test_tied_weights_are_an_error() -> None:
    table = torch.ones(3, 2)
    g = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2))
    step = donated(partial(optfn.apply_updates), "params")
    with pytest.raises(ValueError, match=r"'params.a' and 'params.b' share memory"):
        step({"a": table, "b": table}, {"a": g, "b": g})
    assert table.tolist() == [[1.0, 1.0]] * 3


def test_what_a_step_hides_is_an_error_to_read() -> None:
    """Not silently what the table has become."""
    kept: list[Any] = []

    def fn(params: Tensor, g: Tensor) -> Tensor:
        kept.extend([params + g, read := params + g])
        read.sum()
        return params + g

    params, g = torch.zeros(3, 2), torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2))
    donated(fn, "params")(params, g)
    with pytest.raises(RuntimeError, match="is read after the step; return it, or keep a clone of it"):
        kept[0].sum()
    assert kept[1].sum() == 2


def test_rows_of_the_gradient_may_lie_in_the_table() -> None:
    table = torch.arange(6.0).view(3, 2)
    g = torch.sparse_coo_tensor(torch.tensor([[2, 0]]), table[:2], (3, 2), check_invariants=True)
    wanted = table + g
    new = donated(lambda params, g: params + g, "params")(table, g)
    same(new, wanted)


def test_inference_mode() -> None:
    tx = optfn.sparse_adam(0.1)
    params, g = torch.randn(6, 2), torch.sparse_coo_tensor([[2, 4]], torch.randn(2, 2), (6, 2))
    state = tx.init(params)
    wanted = step_of(tx)(params, state, g)
    with torch.inference_mode():
        got = donated(step_of(tx))(params, state, g)
    same(got, wanted)
    assert got[0] is params
