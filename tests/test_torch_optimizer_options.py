"""What is changed in the groups of a TorchOptimizer, or put into its states, acts as with torch.optim, or is an error."""

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import check
from torch import Tensor, optim
from torch.optim import lr_scheduler as schedulers

import optfn
from optfn import tree
from optfn.interop import TorchOptimizer, load_torch_state

Changes = dict[int, dict[str, Any]]


def start(shapes: Any = ((3, 4), (4,), (1, 4))) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in shapes]


def gradients(params: list[torch.nn.Parameter], t: int) -> list[Tensor | None]:
    """The last parameter misses some of the steps."""
    generator = torch.Generator().manual_seed(t + 1)
    found = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in params]
    return [None if i == len(params) - 1 and t % 3 == 1 else g for i, g in enumerate(found)]


def side_by_side(ours: Any, theirs: Any, changes: Changes, steps: int = 12) -> None:
    """Two optimizers of equal parameters, whose groups are changed alike before some of the steps."""
    for t in range(steps):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0].update(changes.get(t, {}))
            params = optimizer.param_groups[0]["params"]
            for p, g in zip(params, gradients(params, t), strict=True):
                p.grad = g
            optimizer.step()
        for i, (p, q) in enumerate(zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)):
            check(p.detach(), q.detach(), f"parameter {i} after step {t + 1}")


CASES: list[tuple[type[optim.Optimizer], dict[str, Any], Changes]] = [
    (optim.SGD, {}, {3: {"weight_decay": 0.5}, 6: {"weight_decay": 0.0}, 9: {"weight_decay": 0.2}}),
    (optim.SGD, {}, {3: {"momentum": 0.9}, 6: {"momentum": 0.0}, 9: {"momentum": 0.8}}),
    (optim.SGD, {"momentum": 0.9}, {2: {"momentum": 0}, 4: {"momentum": 0.5}, 6: {"nesterov": True}, 9: {"nesterov": False}}),
    (optim.SGD, {"momentum": 0.9}, {3: {"dampening": 0.3}, 6: {"maximize": True}, 9: {"dampening": 0.0, "maximize": False}}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9}, {3: {"lr": 0.01}, 6: {"lr": 0.0}, 9: {"lr": 1}}),
    (optim.Adam, {}, {3: {"weight_decay": 0.5}, 6: {"maximize": True}, 9: {"weight_decay": 0.0}}),
    (optim.Adam, {}, {3: {"betas": (0.5, 0.9)}, 6: {"eps": 0.1}, 9: {"lr": 0.3, "eps": 0}}),
    (optim.Adam, {"amsgrad": True}, {3: {"amsgrad": False}, 6: {"amsgrad": True}, 9: {"betas": (0.0, 0.9)}}),
    (optim.Adam, {"weight_decay": 0.5}, {3: {"decoupled_weight_decay": True}, 6: {"decoupled_weight_decay": False}}),
    (optim.AdamW, {"amsgrad": True}, {3: {"weight_decay": 0.0}, 6: {"amsgrad": False}, 9: {"weight_decay": 0.5, "maximize": True}}),
    (optim.NAdam, {}, {3: {"momentum_decay": 0.1}, 6: {"weight_decay": 0.3}, 9: {"decoupled_weight_decay": True}}),
    (optim.RAdam, {}, {3: {"weight_decay": 0.3}, 6: {"decoupled_weight_decay": True}, 9: {"maximize": True}}),
    (optim.Adamax, {}, {3: {"weight_decay": 0.3}, 6: {"maximize": True}, 9: {"betas": (0.8, 0.9)}}),
    (optim.Adadelta, {}, {3: {"weight_decay": 0.3}, 6: {"rho": 0.5}, 9: {"maximize": True, "lr": 0.5}}),
    (optim.Adagrad, {"initial_accumulator_value": 0.1}, {3: {"lr_decay": 0.3}, 6: {"weight_decay": 0.3}, 9: {"maximize": True}}),
    (optim.RMSprop, {"momentum": 0.9, "centered": True}, {2: {"momentum": 0}, 4: {"centered": False}, 6: {"momentum": 0.5}}),
    (optim.RMSprop, {"centered": True}, {3: {"centered": False, "alpha": 0.5}, 6: {"centered": True}, 9: {"weight_decay": 0.3}}),
    (optim.Rprop, {}, {3: {"etas": (0.3, 1.5)}, 6: {"step_sizes": (1e-3, 0.1)}, 9: {"maximize": True}}),
    (optim.ASGD, {}, {3: {"lambd": 0.1}, 6: {"alpha": 0.5}, 9: {"weight_decay": 0.3, "maximize": True}}),
    (optim.Adafactor, {}, {3: {"weight_decay": 0.3}, 6: {"d": 2.0}, 9: {"maximize": True, "beta2_decay": -0.5}}),
]


@pytest.mark.parametrize(("cls", "options", "changes"), CASES, ids=lambda x: x.__name__ if isinstance(x, type) else None)
def test_a_change_acts_as_in_torch(cls: Any, options: dict[str, Any], changes: Changes) -> None:
    ours = TorchOptimizer(start(), getattr(optfn, cls.__name__.lower()), **options)
    side_by_side(ours, cls(start(), **options, foreach=False), changes)


def test_a_change_acts_on_a_compiled_step() -> None:
    changes = {2: {"momentum": 0.9}, 4: {"nesterov": True, "lr": 0.01}, 6: {"nesterov": False, "momentum": 0, "weight_decay": 0.1}}
    ours = TorchOptimizer(start(), optfn.sgd, lr=0.1, compile=True, backend="eager")
    side_by_side(ours, optim.SGD(start(), lr=0.1), changes, 8)
    torch._dynamo.reset()


@pytest.mark.parametrize("cls", list({cls: None for cls, _, _ in CASES}), ids=lambda x: x.__name__)
def test_a_group_shows_every_option_of_torch(cls: Any) -> None:
    ours = TorchOptimizer(start(), getattr(optfn, cls.__name__.lower()))
    group, wanted = ours.param_groups[0], cls(start()).param_groups[0]
    shown = {name: x for name, x in wanted.items() if name in group and name != "params"}
    assert {name: group[name] for name in shown} == shown
    assert {*wanted} - {*group} <= {"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}
    assert {name: ours.defaults[name] for name in shown} == shown


def test_zeros_that_are_given_are_zeros_that_are_left_out() -> None:
    sgd = optfn.inject_hyperparams(optfn.sgd)
    for make in (optfn.sgd, sgd):
        make(momentum=0.9, nesterov=True, dampening=0.0)
        tx, sparse = make(momentum=0.0, weight_decay=0.0), torch.sparse_coo_tensor([[1]], [2.0], (3,), check_invariants=True)
        updates, _ = tx.update(sparse, tx.init(torch.zeros(3)), torch.zeros(3))
        assert updates.is_sparse
    assert tree.paths(sgd(momentum=0.0, weight_decay=0.0).init(torch.zeros(1))) == tree.paths(sgd().init(torch.zeros(1)))
    state = sgd(weight_decay=torch.tensor(0.0)).init(torch.zeros(1))
    assert tree.get(state, "weight_decay") == 0


def test_an_option_from_0_in_the_middle_begins_fresh_and_goes_on_where_it_was() -> None:
    """RMSprop's own step ends in a KeyError there."""
    ours = TorchOptimizer(start(), optfn.rmsprop, lr=0.1)
    params = ours.param_groups[0]["params"]
    for t in range(3):
        ours.param_groups[0]["momentum"] = 0.9 * (t > 0)
        for p, g in zip(params, gradients(params, 0), strict=True):
            p.grad = g
        ours.step()
    state = ours.states[0]
    assert [x.tolist() for x, path in zip(tree.leaves(state), tree.paths(state), strict=True) if path.endswith("step")] == [
        [3, 3, 3],
        [2, 2, 2],
    ]


def error_of(change: Callable[[TorchOptimizer], Any], *args: Any, **options: Any) -> Any:
    """The change, after a step; then a step that must leave everything as it was."""
    params = start()
    optimizer = TorchOptimizer(params, *args, **options)
    for p, g in zip(params, gradients(params, 0), strict=True):
        p.grad = g
    optimizer.step()
    change(optimizer)
    before = copy.deepcopy([x for of in optimizer.state.values() for x in of.values()])
    values = [p.detach().clone() for p in params]
    try:
        optimizer.step()
    except (ValueError, TypeError, KeyError) as error:
        torch.testing.assert_close([x for of in optimizer.state.values() for x in of.values()], before, rtol=0, atol=0)
        assert all(map(torch.equal, params, values))
        with pytest.raises(type(error), match=re.escape(str(error))):
            optimizer.step()
        raise
    return optimizer


def put(**options: Any) -> Callable[[TorchOptimizer], None]:
    return lambda optimizer: optimizer.param_groups[0].update(options)


def adam_of(lr: float = 0.1) -> optfn.GradientTransformation:
    return optfn.chain(optfn.clip(1.0), optfn.adam(lr))


@pytest.mark.parametrize(
    ("source", "options", "change", "match"),
    [
        (optfn.adam, {}, {"betas": (0.9,)}, "'betas' must be 2 numbers, got (0.9,)"),
        (optfn.adam, {}, {"lr": None}, "'lr' must be a number, got None"),
        (optfn.sgd, {}, {"nesterov": True}, "nesterov needs momentum > 0"),
        (optfn.sgd, {}, {"weight_decay": -1.0}, "weight_decay must be >= 0, got -1.0"),
        (optfn.sgd, {}, {"betas": (0.9, 0.99)}, "tx has no arguments 'betas', which a group has been given"),
        (adam_of, {}, {"weight_decay": 0.1}, "tx has no arguments 'weight_decay'"),
        (optfn.adam(0.1), {}, {"lr": 0.5}, "What is to change must be an argument of a function"),
        (optfn.adagrad, {}, {"initial_accumulator_value": 0.5}, "'initial_accumulator_value' cannot be changed here"),
        (optfn.lbfgs, {}, {"history_size": 5}, "would have another shape or dtype, and it has begun"),
    ],
)
def test_a_change_that_cannot_be_is_an_error_of_the_next_step(source: Any, options: Any, change: Any, match: str) -> None:
    global start
    with pytest.raises(ValueError, match=re.escape(match)):
        error_of(put(**change), source, **options)


def test_before_the_first_step_everything_can_be_changed() -> None:
    params = start()
    optimizer = TorchOptimizer(params, optfn.adagrad, lr=0.1)
    optimizer.param_groups[0]["initial_accumulator_value"] = 0.5
    side_by_side(optimizer, optim.Adagrad(start(), lr=0.1, initial_accumulator_value=0.5), {}, 3)


def test_notes_of_a_users_own_in_a_group() -> None:
    optimizer = error_of(put(name="first", lr_scale=0.5, fused=True), optfn.adam(0.1))
    assert optimizer.param_groups[0]["name"] == "first"


def test_options_of_torch_that_the_function_lacks_are_refused_in_a_group() -> None:
    with pytest.raises(TypeError, match="tx has no arguments 'weight_decay', which a group has been given; it has 'lr'"):
        TorchOptimizer([{"params": start(), "weight_decay": 0.1}], adam_of)
    TorchOptimizer([{"params": start(), "weight_decay": 0.0}], adam_of)  # as it is told


def test_an_argument_that_is_not_what_is_in_the_state_is_refused() -> None:
    def make(lr: float = 0.1) -> optfn.GradientTransformation:
        return optfn.inject_hyperparams(optfn.sgd)(lr=lr / 10)

    with pytest.raises(
        ValueError, match=re.escape("the argument 'lr' is 0.1, but the hyperparameter of that name in the state is 0.01")
    ):
        TorchOptimizer(start(), make)


def test_a_scheduler_without_a_learning_rate_says_what_to_give() -> None:
    chained = optfn.chain(optfn.clip(1.0), optfn.adam(optfn.linear_schedule(0.1, 0.0, 10)))
    for optimizer in (
        TorchOptimizer(start(), chained),
        TorchOptimizer(start(), optfn.adam, lr=optfn.linear_schedule(0.1, 0.0, 10)),
        copy.deepcopy(TorchOptimizer(start(), chained)),
    ):
        optimizer.load_state_dict(optimizer.state_dict())
        with pytest.raises(KeyError, match="this optimizer has no 'lr' that could change: give TorchOptimizer a function"):
            schedulers.StepLR(optimizer, 1)
        assert type(optimizer.state_dict()["param_groups"][0]) is dict


@pytest.mark.parametrize("cls", [optim.SGD, optim.RMSprop])
@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
def test_a_momentum_that_is_cycled_from_its_default(cls: Any, scheduler: str) -> None:
    sides = []
    for optimizer in (TorchOptimizer(start(), getattr(optfn, cls.__name__.lower())), cls(start())):
        if scheduler == "OneCycleLR":
            cycle: Any = schedulers.OneCycleLR(optimizer, 0.1, total_steps=20)
        else:
            cycle = schedulers.CyclicLR(optimizer, 0.01, 0.1, step_size_up=4)
        sides.append((optimizer, cycle))
    (ours, mine), (theirs, real) = sides
    for _ in range(6):
        side_by_side(ours, theirs, {}, 2)
        mine.step()
        real.step()
        assert ours.param_groups[0]["momentum"] == theirs.param_groups[0]["momentum"] > 0


# States


def test_a_state_that_is_put_there_is_used() -> None:
    real, ours = optim.Adam(start(), lr=0.02), TorchOptimizer(start(), optfn.adam, lr=0.5)
    side_by_side(optim.Adam(start(), lr=0.02), real, {}, 5)
    params = real.param_groups[0]["params"]
    for p, q in zip(ours.param_groups[0]["params"], params, strict=True):
        p.data.copy_(q)
    tx = optfn.inject_hyperparams(optfn.adam)()
    ours.states[0] = load_torch_state(tx, params, real.state_dict())
    assert ours.param_groups[0]["lr"] == 0.02
    side_by_side(ours, real, {2: {"lr": 0.1}}, 5)
    with pytest.raises(ValueError, match="the new state must have the structure of the state of the group"):
        ours.states[0] = tx.init([torch.ones(1)])
    with pytest.raises(IndexError):
        ours.states[1] = tx.init(params)


LOADED = [
    (optim.Adam, optfn.adam, {"amsgrad": True, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    (optim.AdamW, optfn.adamw, {}),
    (optim.SGD, optfn.sgd, {"momentum": 0.9, "nesterov": True}),
    (optim.SGD, optfn.sgd, {}),
    (optim.RMSprop, optfn.rmsprop, {"centered": True, "momentum": 0.5}),
    (optim.NAdam, optfn.nadam, {}),
    (optim.ASGD, optfn.asgd, {}),
    (optim.Adafactor, optfn.adafactor, {}),
    (optim.Rprop, optfn.rprop, {}),
]


@pytest.mark.parametrize("named", [False, True], ids=["", "named"])
@pytest.mark.parametrize(("cls", "alias", "options"), LOADED, ids=lambda x: getattr(x, "__name__", None))
def test_a_state_dict_of_torch_is_loaded(cls: Any, alias: Any, options: dict[str, Any], named: bool) -> None:
    """With the options that are in it, whatever they were here; into a dict, whose leaves have another order, too."""

    def given(params: list[torch.nn.Parameter]) -> Any:
        return zip("cab", params, strict=True) if named else params

    real, ours = cls(given(start()), **options), TorchOptimizer(given(start()), alias)
    side_by_side(cls(start(), **options), real, {}, 5)
    for p, q in zip(ours.param_groups[0]["params"], real.param_groups[0]["params"], strict=True):
        p.data.copy_(q)
    saved = real.state_dict()
    before = copy.deepcopy(saved)
    ours.load_state_dict(saved)
    torch.testing.assert_close(saved["state"], before["state"], rtol=0, atol=0)
    side_by_side(ours, real, {3: {"lr": 0.03}}, 6)
    assert not {"foreach", "fused", "capturable", "differentiable"} & {*ours.param_groups[0]}


def test_adams_state_goes_on_in_adamw() -> None:
    adam, adamw, ours = optim.Adam(start()), optim.AdamW(start()), TorchOptimizer(start(), optfn.adamw)
    side_by_side(optim.Adam(start()), adam, {}, 4)
    for other in (adamw, ours):
        for p, q in zip(other.param_groups[0]["params"], adam.param_groups[0]["params"], strict=True):
            p.data.copy_(q)
        other.load_state_dict(adam.state_dict())
    side_by_side(ours, adamw, {1: {"weight_decay": 0.5}}, 5)


def test_another_algorithms_state_is_refused() -> None:
    theirs, ours = optim.Adam(start()), TorchOptimizer(start(), optfn.rmsprop)
    side_by_side(optim.Adam(start()), theirs, {}, 2)
    with pytest.raises(ValueError, match="torch's state of '0' has no 'square_avg'"):
        ours.load_state_dict(theirs.state_dict())
    side_by_side(ours, optim.RMSprop(start()), {}, 3)


# L-BFGS


def valley(xs: list[Tensor]) -> Tensor:
    """Long, and so smooth that rounding does not decide where an iteration goes."""
    x = torch.cat([x.flatten() for x in xs])
    return (torch.arange(1, len(x) + 1) ** 2 * x.square() + 0.1 * x**4).sum() + (x[1:] * x[:-1]).sum()


def closure_of(optimizer: Any, calls: list[float]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = valley(optimizer.param_groups[0]["params"])
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    return closure


@pytest.mark.parametrize("change", [{}, {"lr": 0.2, "max_iter": 3}, {"max_eval": 2}], ids=["", "lr", "max_eval"])
@pytest.mark.parametrize(
    "options",
    [
        {"line_search_fn": "strong_wolfe", "max_iter": 4},
        {"line_search_fn": "strong_wolfe", "max_iter": 3, "history_size": 2, "lr": 0.3},
        {"lr": 0.1},
        {"lr": 0.1, "max_iter": 1},
        {"lr": 0.1, "max_iter": 7, "max_eval": 3, "tolerance_grad": 1e-3},
    ],
    ids=str,
)
def test_a_step_of_lbfgs_is_torchs(options: dict[str, Any], change: dict[str, Any]) -> None:
    """Parameters, what step returns, every evaluation and their number."""
    sides = [
        (make(start(((2, 2), (3,)))), [])
        for make in (lambda ps: TorchOptimizer(ps, optfn.lbfgs, **options), lambda ps: optim.LBFGS(ps, **options))
    ]
    for t in range(4):
        if t == 2:
            for optimizer, _ in sides:
                optimizer.param_groups[0].update(change)
        losses = [optimizer.step(closure_of(optimizer, calls)) for optimizer, calls in sides]
        (ours, mine), (theirs, real) = sides
        check(losses[0].detach(), losses[1].detach(), "the loss")
        assert len(mine) == len(real)
        for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-6)
    assert losses[0] < mine[0]


def test_lbfgs_goes_on_from_torch_and_from_its_checkpoint() -> None:
    options = {"line_search_fn": "strong_wolfe", "max_iter": 5}
    theirs = optim.LBFGS(start(((2, 2), (3,))), **options)
    for _ in range(2):
        theirs.step(closure_of(theirs, []))
    params = theirs.param_groups[0]["params"]
    ours, again = (
        (ps := copy.deepcopy(params)) and TorchOptimizer(ps, optfn.lbfgs, line_search_fn="strong_wolfe") for _ in range(2)
    )
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["max_iter"] == 5
    again.load_state_dict(ours.state_dict())
    for optimizer in (ours, again, theirs):
        optimizer.step(closure_of(optimizer, []))
    for p, q, r in zip(*(o.param_groups[0]["params"] for o in (ours, theirs, again)), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)
        assert torch.equal(p, r)


def test_what_a_step_of_lbfgs_needs() -> None:
    optimizer = TorchOptimizer(start(), optfn.lbfgs, line_search_fn="strong_wolfe")
    with pytest.raises(ValueError, match=re.escape("call step(closure)")):
        optimizer.step()
    several = TorchOptimizer([{"params": [p]} for p in start()], optfn.lbfgs)
    with pytest.raises(ValueError, match="one group is all it can have"):
        several.step(lambda: None)
    with pytest.raises(TypeError, match="tx has no arguments 'max_iter'"):
        TorchOptimizer(start(), optfn.adam, max_iter=3)


# Memory


@pytest.mark.parametrize("use", ["made", "stepped", "loaded", "changed", "lbfgs", "tree"])
def test_nothing_waits_for_the_garbage_collector(use: str) -> None:
    gc.collect()
    gc.disable()
    try:
        params = start()
        optimizer: Any = TorchOptimizer(params, optfn.lbfgs if use == "lbfgs" else optfn.adam)
        for p, g in zip(params, gradients(params, 0), strict=True):
            p.grad = g
        for _ in range(2 if use != "made" else 0):
            optimizer.step()
        if use == "tree":
            state = tree.set(optimizer.states[0], lr=0.1)
            tree.map_params(lambda x: x, state, params)
            assert tree.get(state, "lr") == 0.1
            del state
        if use == "loaded":
            optimizer.load_state_dict(optimizer.state_dict())
        if use == "changed":
            optimizer.param_groups[0]["amsgrad"] = True
            optimizer.step()
            optimizer.states[0] = optimizer.states[0]
        refs = [weakref.ref(x) for x in (optimizer, *params, *(x for of in optimizer.state.values() for x in of.values()))]
        del optimizer, params, p, g
        assert [ref() for ref in refs if ref() is not None] == []
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert [x for x in gc.garbage if isinstance(x, Tensor) or "optfn" in str(getattr(x, "__module__", ""))] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_a_changed_optimizer_pickles() -> None:
    ours = TorchOptimizer(start(), optfn.adam)
    side_by_side(ours, optim.Adam(start()), {2: {"amsgrad": False, "maximize": True}}, 4)
    again = pickle.loads(pickle.dumps(ours))
    side_by_side(again, ours, {2: {"weight_decay": 0.1}}, 4)


def test_groups_may_be_put_in_taken_away_and_moved_by_hand() -> None:
    """As torch's may: what stays goes on with its state."""

    def trained(make: Any) -> list[Tensor]:
        params = [torch.nn.Parameter(torch.full((2,), float(i + 1), dtype=torch.float64)) for i in range(3)]
        optimizer = make([{"params": [params[0]], "lr": 0.1}, {"params": [params[1]], "lr": 0.2}])

        def step() -> None:
            for p in params:
                p.grad = p.detach() ** 2
            optimizer.step()

        step()
        step()
        optimizer.param_groups.reverse()
        step()
        first = optimizer.param_groups.pop()
        step()
        optimizer.param_groups.append(first)
        step()
        optimizer.add_param_group({"params": [params[2]], "lr": 0.3})
        step()
        return params

    ours = trained(lambda groups: optfn.interop.TorchOptimizer(groups, optfn.adam, lr=0.5))
    theirs = trained(lambda groups: torch.optim.Adam(groups, lr=0.5))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_parameters_that_share_memory_are_refused() -> None:
    base = torch.ones(6)
    for pair in ((base, base.view(2, 3)), (base[:4], base[3:])):
        with pytest.raises(ValueError, match=r"share memory: give each tensor once"):
            optfn.interop.TorchOptimizer([torch.nn.Parameter(p) for p in pair], optfn.sgd, lr=0.1)
