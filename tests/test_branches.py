"""optfn.tree.cond: what is not due is not computed, eagerly and compiled, and what is given is the same everywhere."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

import optfn
from optfn import tree


class BasisSlots(NamedTuple):
    basis: Tensor
    mu: Tensor


def in_eigenbasis(every: int = 3) -> optfn.GradientTransformation:
    """Momentum in a basis of singular vectors that is found anew at times."""

    def init(p: Tensor) -> BasisSlots:
        return BasisSlots(p.new_zeros(len(p), len(p)), torch.zeros_like(p))

    def update(g: Tensor, slots: BasisSlots, p: Any, due: Any) -> tuple[Tensor, BasisSlots]:
        basis = tree.cond(due, lambda: torch.linalg.svd(g)[0].contiguous(), lambda: slots.basis)
        mu = torch.lerp(slots.mu, basis.mT @ g, 0.1)
        return basis @ mu, BasisSlots(basis, mu)

    return optfn.leafwise(init, update, at_step=lambda step: (step - 1) % every == 0, complex_="error")


TX = optfn.chain(in_eigenbasis(), optfn.scale_by_learning_rate(0.1))


def step(params: Any, state: Any, grads: Any) -> Any:
    updates, state = TX.update(grads, state, params)
    return optfn.apply_updates(params, updates), state


def some(n: int = 3, size: int = 8) -> dict[str, Tensor]:
    return {f"w{i}": torch.randn(size, size + i, dtype=torch.float64) for i in range(n)}


def decompositions(call: Callable[..., Any], *args: Any) -> tuple[int, Any]:
    with profile() as found:
        result = call(*args)
    return sum(e.count for e in found.key_averages() if e.key == "aten::_linalg_svd"), result


@pytest.mark.codegen
@pytest.mark.parametrize("way", ["eager", "donated", "dynamo"])
def test_work_is_done_when_it_is_due(way: str) -> None:
    torch.manual_seed(0)
    params = some()
    state = TX.init(params)
    run: Any = {
        "eager": step,
        "donated": optfn.compile(step, donate=("params", "state")),
        "dynamo": torch.compile(step, backend="optfn", fullgraph=True),
    }[way]
    given, given_state = tree.map(torch.clone, (params, state))
    counts = []
    for i in range(7):
        grads = tree.map(torch.randn_like, params)
        params, state = step(params, state, grads)
        made, (given, given_state) = decompositions(run, given, given_state, grads)
        counts.append(made)
        for x, y in zip(tree.leaves((given, given_state)), tree.leaves((params, state)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, msg=f"step {i}")
    assert counts[1:] == [0, 0, 3, 0, 0, 3]


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    return optfn.compile(fn, donate="state")


@pytest.mark.codegen
def test_what_fails_in_a_branch_fails_only_there_and_before_anything_is_written() -> None:
    def fn(state: Any, matrix: Tensor) -> Any:
        inverse = tree.cond(state["step"] % 2 == 1, lambda: torch.linalg.inv(matrix), lambda: state["inverse"])
        return {"step": state["step"] + 1, "inverse": inverse}

    run = compiled(fn)
    state = {"step": torch.tensor(0), "inverse": torch.eye(2)}
    state = run(state, torch.zeros(2, 2))
    assert state["step"] == 1
    with pytest.raises(torch.linalg.LinAlgError):
        run(state, torch.zeros(2, 2))
    assert state["step"] == 1
    torch.testing.assert_close(state["inverse"], torch.eye(2))
    torch.testing.assert_close(run(state, 2 * torch.eye(2))["inverse"], torch.eye(2) / 2)


@pytest.mark.codegen
def test_a_value_that_is_kept_is_not_what_overwrites_it() -> None:
    """What a branch gives may be an argument as it was, also where that is overwritten by something else."""

    def fn(state: Any, x: Tensor) -> Any:
        kept = tree.cond(state["due"], lambda: x @ x, lambda: state["a"])
        return {"a": state["b"] + 1, "b": kept, "due": ~state["due"], "sum": kept.sum() + state["a"].sum()}

    run = compiled(fn)
    state = {"a": torch.ones(2, 2), "b": torch.zeros(2, 2), "due": torch.tensor(False), "sum": torch.tensor(0.0)}
    wanted = tree.map(torch.clone, state)
    for i in range(4):
        x = torch.full((2, 2), float(i))
        wanted = fn(wanted, x)
        state = run(state, x)
        for y, z in zip(tree.leaves(state), tree.leaves(wanted), strict=True):
            torch.testing.assert_close(y, z, msg=f"step {i}")


@pytest.mark.codegen
def test_branches_of_one_predicate_may_depend_on_each_other() -> None:
    def fn(state: Any, x: Tensor) -> Any:
        due = state["step"] % 2 == 0
        a, b = tree.cond(due, lambda: (x @ x, x.sum(0)), lambda: (state["a"], state["a"][0]))
        shared = (a * 2).sin()
        c = tree.cond(due, lambda: torch.linalg.qr(shared)[1], lambda: shared)
        d = tree.cond(c.sum() > 0, lambda: tree.cond(due, lambda: a @ c, lambda: c), lambda: a.mT)
        return {"step": state["step"] + 1, "a": a + d, "b": b, "c": c}

    run = compiled(fn)
    state = {"step": torch.tensor(0), "a": torch.ones(2, 2), "b": torch.ones(2), "c": torch.ones(2, 2)}
    wanted = tree.map(torch.clone, state)
    torch.manual_seed(0)
    for i in range(5):
        x = torch.randn(2, 2)
        wanted, state = fn(wanted, x), run(state, x)
        for y, z in zip(tree.leaves(state), tree.leaves(wanted), strict=True):
            torch.testing.assert_close(y, z, msg=f"step {i}")


def test_only_the_branch_that_is_taken_is_called() -> None:
    called: list[str] = []
    for pred in (True, False, torch.tensor(True), torch.tensor(False)):
        tree.cond(pred, lambda: called.append("true"), lambda: called.append("false"))
    assert called == ["true", "false", "true", "false"]


def test_mapped_over_the_predicate_each_entry_takes_its_own() -> None:
    due = torch.tensor([True, False, True])
    x = torch.arange(3.0)
    found = torch.func.vmap(lambda due, x: tree.cond(due, lambda: {"a": x + 1}, lambda: {"a": -x}))(due, x)
    torch.testing.assert_close(found["a"], torch.tensor([1.0, -1.0, 3.0]))
    due = torch.tensor(True)
    torch.testing.assert_close(torch.func.vmap(lambda x: tree.cond(due, lambda: x + 1, lambda: -x))(x), x + 1)


@pytest.mark.parametrize("due", [True, False])
def test_derivatives_are_those_of_the_branch_that_is_taken(due: bool) -> None:
    f: Any = lambda x, pred: tree.cond(pred, lambda: x**3, lambda: x**2).sum()  # noqa: E731
    x, pred = torch.tensor([2.0, 3.0]), torch.tensor(due)
    wanted = 3 * x**2 if due else 2 * x
    torch.testing.assert_close(torch.func.grad(f)(x, pred), wanted)
    torch.testing.assert_close(torch.func.jacfwd(f)(x, pred), wanted)
    torch.testing.assert_close(torch.compile(torch.func.grad(f), fullgraph=True, backend="aot_eager")(x, pred), wanted)


def test_an_exported_step_selects() -> None:
    class Step(torch.nn.Module):
        def forward(self, x: Tensor, pred: Tensor) -> Tensor:
            return tree.cond(pred, lambda: x + 1, lambda: -x)

    exported = torch.export.export(Step(), (torch.ones(2), torch.tensor(True)))
    assert all("optfn" not in str(n.target) for n in exported.graph.nodes)
    for pred in (True, False):
        torch.testing.assert_close(
            exported.module()(torch.ones(2), torch.tensor(pred)), torch.tensor([2.0, 2.0] if pred else [-1.0, -1.0])
        )


@pytest.mark.parametrize("read", [True, False])
def test_predicates_of_all_leaves_may_be_read_once(read: bool) -> None:
    """As a list; of a vector of them the rule is handed tensors, which torch.where takes."""
    seen = []

    def update(g: Tensor, slots: Any, p: Any, due: Any) -> Any:
        seen.append(due)
        return g, slots

    def at_step(step: Tensor) -> Any:
        due = step % 2 == 0
        return due.tolist() if read else due

    tx: Any = optfn.leafwise(lambda p: (), update, at_step=at_step)
    params = {"a": torch.ones(1), "b": torch.ones(1), "c": None}
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    assert [type(x) for x in seen] == [bool if read else Tensor] * 4
    assert seen == [False, False, True, True]


@pytest.mark.parametrize(
    ("pred", "match"),
    [(torch.ones(2, dtype=torch.bool), r"torch.bool of shape \(2,\)"), (torch.tensor(1), "torch.int64"), (1.0, "got float")],
)
def test_a_predicate_is_one_bool(pred: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        tree.cond(pred, lambda: 1, lambda: 2)


@pytest.mark.parametrize("other", [lambda x: x.sum(), lambda x: x.double()])
def test_branches_of_other_shapes_are_no_selection(other: Callable[[Tensor], Tensor]) -> None:
    """Compiled, a selection would make of both what neither is."""
    run = optfn.compile(lambda pred, x: tree.cond(pred, lambda: other(x), lambda: x), backend="aot_eager")
    with pytest.raises(Exception, match="cond: both functions must give tensors of one shape and dtype"):
        run(torch.tensor(True), torch.arange(3.0))
