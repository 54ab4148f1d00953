"""A training run that changes from torch.optim to optfn, and back, in the middle, and stays on its curve."""

import copy
import re
from typing import Any

import pytest
import torch
from oracle import ORACLES, Oracle, Problem, TorchOptim, check, configurations, problem, sparse_problem
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import optfn
from optfn import tree
from optfn.interop import load_torch_state, to_torch_state_dict

BEFORE, AFTER = 5, 10
CASES = [
    pytest.param(cls, desc, id=f"{cls.__name__}: {desc or 'default'}")
    for cls in ORACLES
    for desc in configurations(cls)
    if ORACLES[cls].alias is not None
]


def two_runs(cls: type, absent: bool = False) -> tuple[Problem, list[dict[str, Tensor | None]]]:
    """A problem, with gradients for ``BEFORE + AFTER`` steps."""

    def make(seed: int) -> Problem:
        if cls is torch.optim.SparseAdam:
            return sparse_problem(torch.float64, absent=absent, dense=False, seed=seed)
        return problem(torch.float64, absent=absent, seed=seed)

    first, second = make(0), make(1)
    takes = getattr(ORACLES[cls], "takes", lambda p: True)
    names = [name for name, p in first.params.items() if takes(p)]

    def only(row: Any) -> Any:
        return {name: row[name] for name in names}

    return Problem(only(first.params), []), [only(row) for row in first.gradients + second.gradients][: BEFORE + AFTER]


def clones(gradients: dict[str, Tensor | None]) -> list[Tensor | None]:
    return [None if g is None else g.clone() for g in gradients.values()]


def advance(tx: Any, params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
    updates, state = tx.update(gradients, state, params)
    return optfn.apply_updates(params, updates), state


@pytest.mark.parametrize("absent", [False, True], ids=["all", "None"])
@pytest.mark.parametrize(("cls", "desc"), CASES)
def test_from_torch_and_back(cls: type[torch.optim.Optimizer], desc: str, absent: bool) -> None:
    kwargs, oracle = configurations(cls)[desc], ORACLES[cls]
    given, gradients = two_runs(cls, absent)
    theirs = TorchOptim(cls, kwargs, [p.clone() for p in given.params.values()])
    for g in gradients[:BEFORE]:
        theirs.step(clones(g))

    tx = oracle.transformation(kwargs)
    params = {name: p.clone() for name, p in zip(given.params, theirs.params, strict=True)}
    state = load_torch_state(tx, params, theirs.optimizer.state_dict())
    middle = BEFORE + AFTER // 2
    for t, g in enumerate(gradients[BEFORE:middle]):
        theirs.step(clones(g))
        params, state = advance(tx, params, state, g)
        for name, p in zip(params, theirs.params, strict=True):
            check(params[name], p, f"{name}, {t + 1} steps after torch")

    # torch's load_state_dict rounds what it is given to the dtype of the parameter, so the way back is compared with torch's own.
    original = theirs.optimizer.state_dict()
    back, again = (TorchOptim(cls, kwargs, [p.detach().clone() for p in ps]) for ps in (params.values(), theirs.params))
    mine = to_torch_state_dict(tx, state, params, back.optimizer)
    assert mine["param_groups"] == original["param_groups"]
    assert {i: {*kept} for i, kept in mine["state"].items()} == {i: {*kept} for i, kept in original["state"].items() if kept}
    for i, kept in mine["state"].items():
        for name, x in kept.items():
            want = original["state"][i][name]
            if not isinstance(want, Tensor):
                assert x == want, name
                continue
            want = want.to_dense()  # the momentum of a sparse gradient
            assert (x.dtype, x.device, x.shape) == (want.dtype, want.device, want.shape), name
    back.optimizer.load_state_dict(mine)
    again.optimizer.load_state_dict(copy.deepcopy(original))
    for t, g in enumerate(gradients[middle:]):
        for run in (theirs, back, again):
            run.step(clones(g))
        params, state = advance(tx, params, state, g)
        for name, p, q, r in zip(params, theirs.params, back.params, again.params, strict=True):
            check(q, r, f"{name}, {t + 1} steps after optfn")
            check(params[name], p, f"{name}, {middle - BEFORE + t + 1} steps after torch")


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x).sum(1) - x.square().sum(1)).square().mean().backward()
        optimizer.step()


def gradient(model: torch.nn.Module, params: dict[str, Tensor]) -> dict[str, Tensor]:
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return (torch.func.functional_call(model, params, (x,)).sum(1) - x.square().sum(1)).square().mean()

    return torch.func.grad(loss)(params)


def on_the_curve(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tx: Any, params: Any, state: Any) -> None:
    """Ten steps on both sides."""
    for t in range(10):
        train(model, optimizer, 1)
        params, state = advance(tx, params, state, gradient(model, params))
        for name, p in model.named_parameters():
            check(params[name], p.detach(), f"{name} after {t + 1} steps")


def taken(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("form", ["param_names", "checkpoint", "flat checkpoint"])
def test_names_decide_where_there_are_names(form: str) -> None:
    """Groups that split weights and biases put torch's parameters in another order than the module's."""
    model = network()
    named = dict(model.named_parameters())
    groups = [{"params": [(k, p) for k, p in named.items() if p.ndim == d]} for d in (1, 2)]
    optimizer = torch.optim.AdamW(groups, lr=0.03)
    train(model, optimizer, 7)
    if form == "param_names":
        state_dict = optimizer.state_dict()
    else:
        options = StateDictOptions(flatten_optimizer_state_dict=form == "flat checkpoint")
        state_dict = get_optimizer_state_dict(model, optimizer, options=options)
    params = taken(model)
    tx = optfn.adamw(lr=0.03)
    state = load_torch_state(tx, params, state_dict)
    assert tree.get(state, "step").tolist() == [7] * 4
    for name, p in named.items():
        torch.testing.assert_close(tree.get(state, "mu")[name], optimizer.state[p]["exp_avg"], rtol=0, atol=0)
    if form == "param_names":
        back = to_torch_state_dict(tx, state, params, optimizer)
        for i, kept in optimizer.state_dict()["state"].items():
            torch.testing.assert_close(back["state"][i], kept, rtol=0, atol=0)
    on_the_curve(model, optimizer, tx, params, state)


def test_order_is_that_of_the_module_not_that_of_sorted_keys() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    train(model, optimizer, 3)
    params = taken(model)
    assert list(params) != sorted(params)
    on_the_curve(model, optimizer, optfn.adam(lr=0.03), params, load_torch_state(optfn.adam(), params, optimizer.state_dict()))


def test_a_schedule_goes_on_where_it_was() -> None:
    model = network()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1.0, momentum=0.5)
    schedule = optfn.linear_schedule(0.02, 0.001, 15)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: float(schedule(t)))
    for _ in range(6):
        train(model, optimizer, 1)
        scheduler.step()
    params = taken(model)
    tx = optfn.rmsprop(lr=schedule, momentum=0.5)
    state = load_torch_state(tx, params, optimizer.state_dict())
    assert int(tree.get(state, "count")) == 6
    for t in range(10):
        train(model, optimizer, 1)
        scheduler.step()
        params, state = advance(tx, params, state, gradient(model, params))
        for name, p in model.named_parameters():
            check(params[name], p.detach(), f"{name} after {t + 1} steps")


def test_a_schedule_over_sgd_needs_the_step() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 4)
    tx = optfn.sgd(lr=optfn.linear_schedule(0.1, 0.0, 10), momentum=0.9)
    with pytest.raises(ValueError, match=re.escape("no step count for '3.count': give load_torch_state(..., step=...)")):
        load_torch_state(tx, taken(model), optimizer.state_dict())
    assert int(tree.get(load_torch_state(tx, taken(model), optimizer.state_dict(), step=4), "3.count")) == 4


def test_the_groups_values_go_into_injected_hyperparameters_and_back() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, betas=(0.8, 0.99), weight_decay=0.1)
    train(model, optimizer, 4)
    params = taken(model)
    tx = optfn.inject_hyperparams(optfn.adamw)(lr=1.0)  # every value comes from the group
    state = load_torch_state(tx, params, optimizer.state_dict())
    assert {k: tree.map(float, v) for k, v in tree.get(state, "hyperparams").items()} == {
        "lr": 0.03,
        "betas": (0.8, 0.99),
        "eps": 1e-8,
        "weight_decay": 0.1,
    }
    other = torch.optim.AdamW(network().parameters(), lr=9.0)
    other.load_state_dict(to_torch_state_dict(tx, tree.set(state, lr=0.01), params, other))
    group = other.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.8, 0.99), 0.1)
    on_the_curve(model, optimizer, tx, params, state)


def test_groups_become_a_partition() -> None:
    model = network()
    named = dict(model.named_parameters())
    groups = [{"params": [(k, p) for k, p in named.items() if p.ndim == d], "lr": 0.01 * d} for d in (1, 2)]
    optimizer = torch.optim.Adam(groups)
    train(model, optimizer, 4)
    params = taken(model)
    inject = optfn.inject_hyperparams(optfn.adam)
    tx = optfn.partition({1: inject(), 2: inject()}, lambda path, p: p.ndim)
    state = load_torch_state(tx, params, optimizer.state_dict())
    assert [float(tree.get(state, f"inner_states.{d}.hyperparams.lr")) for d in (1, 2)] == [0.01, 0.02]
    back = to_torch_state_dict(tx, state, params, optimizer)
    assert [group["lr"] for group in back["param_groups"]] == [0.01, 0.02]
    on_the_curve(model, optimizer, tx, params, state)
    with pytest.raises(ValueError, match=r"the groups have several values for 'hyperparams.lr', 0.01, 0.02: use optfn.partition"):
        load_torch_state(inject(), params, optimizer.state_dict())


def test_none_is_no_parameter_and_nothing_is_shared() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([p])
    p.grad = torch.ones(2)
    optimizer.step()
    state = load_torch_state(optfn.adam(), {"b": None, "a": p.detach()}, optimizer.state_dict())
    assert tree.get(state, "step").tolist() == [1, 0]
    before = optimizer.state[p]["exp_avg"].clone()
    tree.get(state, "mu")["a"].zero_()
    assert torch.equal(optimizer.state[p]["exp_avg"], before)


def wrong(change: str) -> tuple[Any, Any, Any]:
    params = {"w": torch.ones(2, 3), "b": torch.ones(2)}
    leaves = [torch.nn.Parameter(p.clone()) for p in params.values()]
    optimizer = torch.optim.Adam(list(zip(params, leaves, strict=True)), amsgrad=change == "amsgrad")
    for p in leaves:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state_dict = optimizer.state_dict()
    if change == "count":
        params["c"] = torch.ones(1)
    if change == "shape":
        params["b"] = torch.ones(3)
    if change == "unknown":
        state_dict["state"][0]["extra"] = torch.ones(1)
    if change == "key":
        state_dict["state"][7] = {}
    if change == "names":
        params = {"w": params["w"], "bias": params["b"]}
    tx = {"lacks": optfn.adam(amsgrad=True), "twice": optfn.chain(optfn.scale_by_adam(), optfn.adam())}.get(change, optfn.adam())
    return tx, params, state_dict


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ("count", ValueError, "torch's optimizer has 2 parameters, params has 3"),
        ("shape", ValueError, r"torch's 'exp_avg' of 'b' must have shape \(3,\), got \(2,\)"),
        ("unknown", ValueError, "torch's state of 'w' has 'extra', for which the transformation has no place"),
        ("amsgrad", ValueError, "torch's state of 'b' has 'max_exp_avg_sq', for which the transformation has no place"),
        (
            "lacks",
            ValueError,
            "torch's state of 'b' has no 'max_exp_avg_sq' for '2.slots.nu_max', it has 'exp_avg', 'exp_avg_sq', 's",
        ),
        ("twice", ValueError, "torch's 'exp_avg' of 'b' has two places here, '0.slots.mu' and '1.2.slots.mu'"),
        ("key", ValueError, "the state dict has state for 7, which no group has"),
        ("names", KeyError, "only torch's optimizer has 'b'; only params has 'bias'"),
    ],
)
def test_what_does_not_fit_is_named(change: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        load_torch_state(*wrong(change))


def test_a_flat_checkpoint_of_something_else_is_an_error() -> None:
    with pytest.raises(
        KeyError, match=r"'state.v.exp_avg' is neither 'state.' nor 'param_groups.' and the path of a parameter: 'w'"
    ):
        load_torch_state(optfn.adam(), {"w": torch.ones(1)}, {"state.v.exp_avg": torch.ones(1)})


def test_a_state_of_another_transformation_does_not_go_back() -> None:
    params = {"w": torch.ones(1)}
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=r"the state must have the structure of tx.init\(params\)"):
        to_torch_state_dict(optfn.adam(), optfn.sgd(momentum=0.9).init(params), params, optimizer)


def test_every_oracle_is_a_line_of_the_table() -> None:
    """What the parity tests compare under a name is what goes across under it."""
    from optfn.interop.torch_state import TABLE

    for cls, oracle in ORACLES.items():
        assert isinstance(oracle, Oracle)
        known = {(ours, theirs) for slots in TABLE.values() for ours, theirs in slots.names.items()}
        for theirs, ours in oracle.states.items():
            assert (ours, theirs) in known or ours == theirs, f"{cls.__name__}: {theirs}"


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("history", [3, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_lbfgs_from_torch_and_back(search: str | None, history: int, dtype: torch.dtype) -> None:
    """The parameters are not in sorted order, so torch's vectors are in another order than ours."""
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(n, dtype=dtype, generator=generator) for name, n in (("w", 4), ("a", 3))}
    targets = {name: torch.randn(p.shape, dtype=dtype, generator=generator) for name, p in params.items()}

    def fun(params: Any) -> Tensor:
        distances = [((p - targets[name]).abs().square() * torch.arange(1, len(p) + 1)).sum() for name, p in params.items()]
        return torch.stack(distances).sum() + 0.1 * torch.stack(distances).prod()

    def run(optimizer: torch.optim.Optimizer, theirs: dict[str, Tensor], steps: int) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            value = fun(theirs)
            value.backward()
            return value

        for _ in range(steps):
            optimizer.step(closure)

    def torch_lbfgs(of: dict[str, Tensor]) -> tuple[torch.optim.LBFGS, dict[str, Tensor]]:
        own = {name: p.detach().clone().requires_grad_() for name, p in of.items()}
        options = {"lr": 0.1 if search is None else 1.0, "max_iter": 2, "history_size": history}
        return torch.optim.LBFGS([*own.values()], line_search_fn=search, tolerance_change=0, tolerance_grad=0, **options), own

    optimizer, theirs = torch_lbfgs(params)
    run(optimizer, theirs, 3)
    rate = 0.1 if search is None else 1.0
    tx = optfn.lbfgs(rate, history_size=history, line_search_fn=search, tolerance_change=0, tolerance_grad=0)
    ours = {name: p.detach().clone() for name, p in theirs.items()}
    state = load_torch_state(tx, ours, optimizer.state_dict())
    for _ in range(2):
        run(optimizer, theirs, 1)
        result = optfn.minimize(fun, ours, tx, state=state, max_steps=2, max_evals=2)
        ours, state = result.params, result.state
        for name, p in theirs.items():
            check(ours[name], p.detach(), name)
    again, back = torch_lbfgs(ours)
    again.load_state_dict(to_torch_state_dict(tx, state, ours, again))
    run(optimizer, theirs, 2)
    run(again, back, 2)
    for name, p in theirs.items():
        check(back[name].detach(), p.detach(), name)
        assert (p - params[name]).abs().max() > 1e-3
