"""TorchOptimizer in the places where a torch.optim.Optimizer is expected, beside the real one."""

import copy
import inspect
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from oracle import ORACLES, check, problem, sparse_problem
from torch import Tensor, optim
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import optfn
from optfn import tree
from optfn.interop import TorchOptimizer
from optfn.interop.torch_optimizer import PATTERNS

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)


def network(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).to(dtype)


def loss_of(model: torch.nn.Module) -> Tensor:
    x = X.to(next(model.parameters()).dtype)
    return (model(x).sum(1) - x.square().sum(1)).square().mean()


def train(model: torch.nn.Module, optimizer: optim.Optimizer, steps: int, scheduler: Any = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step(*([loss.item()] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))


def alike(ours: torch.nn.Module, theirs: torch.nn.Module, what: str = "") -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        check(p.detach(), q.detach(), f"{name} {what}")


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


def tensors(optimizer: optim.Optimizer) -> list[dict[str, Tensor]]:
    return [dict(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]


# Steps


DENSE = [cls for cls in ORACLES if cls is not optim.SparseAdam]


@pytest.mark.parametrize(
    ("cls", "compiled"), [*((cls, False) for cls in DENSE), (optim.AdamW, True)], ids=lambda x: getattr(x, "__name__", str(x))
)
def test_steps_are_torchs_with_gradients_that_are_none(cls: type[optim.Optimizer], compiled: bool) -> None:
    """Under more patterns of None than are compiled."""
    given = problem(torch.float64, absent=True)
    assert len({tuple(g is None for g in gradients.values()) for gradients in given.gradients}) > PATTERNS
    takes = getattr(ORACLES[cls], "takes", lambda p: True)
    leaves = {name: p for name, p in given.params.items() if takes(p)}
    make = ORACLES[cls].alias
    if "ns_coefficients" in inspect.signature(make).parameters:
        # As tensors they round differently in bfloat16 than the numbers that torch has.
        make = optfn.inject_hyperparams(make, static_args="ns_coefficients")
    loop = {"foreach": False} if "foreach" in inspect.signature(cls).parameters else {}
    sides = []
    for build in (
        lambda ps: TorchOptimizer(ps, make, lr=0.1, compile=compiled, backend="eager"),
        lambda ps: cls([p for _, p in ps], lr=0.1, **loop),
    ):
        params = {name: torch.nn.Parameter(p.clone()) for name, p in leaves.items()}
        sides.append((params, build(list(params.items()))))
    (ours, mine), (theirs, _) = sides
    before = {name: id(p) for name, p in ours.items()}
    for t, gradients in enumerate(given.gradients):
        for params, optimizer in sides:
            for name, p in params.items():
                g = gradients[name]
                p.grad = None if g is None else g.clone()
            optimizer.step()
        for name in params:
            check(ours[name].detach(), theirs[name].detach(), f"{name} after step {t + 1}")
    assert {name: id(p) for name, p in ours.items()} == before
    assert all(not x.requires_grad and x.grad_fn is None for of in tensors(mine) for x in of.values())
    torch._dynamo.reset()


def test_sparse_gradients() -> None:
    given = sparse_problem(torch.float64, absent=True, dense=False)
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in given.params.values()] for _ in range(2))
    pair = TorchOptimizer(ours, optfn.sparse_adam, lr=0.1), optim.SparseAdam(theirs, lr=0.1)
    for gradients in given.gradients:
        for params, optimizer in zip((ours, theirs), pair, strict=True):
            for p, g in zip(params, gradients.values(), strict=True):
                p.grad = None if g is None else g.clone()
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            check(p.detach(), q.detach(), "a parameter")


def test_groups_have_their_own_options() -> None:
    """Of every kind: the learning rate, a tuple, a switch."""
    sides = []
    for make in (lambda groups: TorchOptimizer(groups, optfn.adamw, lr=0.1), lambda groups: optim.AdamW(groups, lr=0.1)):
        model = network()
        first, _, last = model
        optimizer = make(
            [
                {"params": first.parameters(), "lr": 0.01, "betas": (0.5, 0.9)},
                {"params": [last.weight], "amsgrad": True, "weight_decay": 0.3},
                {"params": [last.bias], "maximize": True, "eps": 0.1},
            ]
        )
        sides.append((model, optimizer))
    for t in range(10):
        for model, optimizer in sides:
            train(model, optimizer, 1)
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.param_groups[1]["betas"] = (0.7, 0.95)
        alike(sides[0][0], sides[1][0], f"after step {t + 1}")
    groups, theirs = (optimizer.param_groups for _, optimizer in sides)
    for mine, real in zip(groups, theirs, strict=True):
        own = {k: v for k, v in mine.items() if k not in ("params", "mask")}
        assert own == {k: real[k] for k in own}
        assert {*real} - {*mine} == {"foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}


def test_a_group_is_added_while_training() -> None:
    sides = []
    for make in (lambda ps: TorchOptimizer(ps, optfn.adam, lr=0.1), lambda ps: optim.Adam(ps, lr=0.1)):
        model = network()
        optimizer = make(model[0].parameters())
        train(model, optimizer, 3)
        optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.01})
        train(model, optimizer, 5)
        sides.append(model)
    alike(*sides)


def test_a_group_that_fails_is_not_added() -> None:
    model = network()
    optimizer = TorchOptimizer(model[0].parameters(), optfn.adam)
    with pytest.raises(ValueError, match=re.escape("b1 must be >= 0 and < 1, got 2.0")):
        optimizer.add_param_group({"params": model[2].parameters(), "betas": (2.0, 0.5)})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, 1)


def test_a_chain_of_ones_own_with_names() -> None:
    """The masks see the names; the numbers are those of the functional loop."""
    model, twin = network(), network()

    def decay_weights(path: str, p: Any) -> bool:
        return path.endswith("weight")

    def make(lr: float, max_norm: float = 0.1) -> optfn.GradientTransformation:
        return optfn.chain(optfn.clip_by_global_norm(max_norm), optfn.adamw(lr, weight_decay=0.5, mask=decay_weights))

    optimizer = TorchOptimizer(model.named_parameters(), make, lr=0.1)
    tx, params = make(0.1), {name: p.detach().clone() for name, p in twin.named_parameters()}
    state = tx.init(params)
    for _ in range(5):
        train(model, optimizer, 1)
        grads = torch.func.grad(
            lambda ps: torch.func.functional_call(twin, ps, (X,)).sum(1).sub(X.square().sum(1)).square().mean()
        )(params)
        updates, state = tx.update(grads, state, params)
        params = optfn.apply_updates(params, updates)
        for name, p in model.named_parameters():
            check(p.detach(), params[name], name)
    assert {*optimizer.param_groups[0]} == {"params", "param_names", "lr", "max_norm"}


def test_a_transformation_that_is_made_already() -> None:
    model, twin = network(), network()
    tx = optfn.chain(optfn.clip(10.0), optfn.inject_hyperparams(optfn.rmsprop)(lr=0.1, momentum=0.9))
    optimizer, real = TorchOptimizer(model.parameters(), tx), optim.RMSprop(twin.parameters(), lr=0.1, momentum=0.9)
    for it in (optimizer, real):
        it.param_groups[0]["lr"] = 0.02
    train(model, optimizer, 5)
    train(twin, real, 5)
    alike(model, twin)
    assert optimizer.defaults == {"lr": 0.1, "alpha": 0.99, "eps": 1e-8, "momentum": 0.9}
    assert float(tree.get(optimizer.states[0], "lr")) == 0.02


def test_a_tensor_as_learning_rate_is_read_at_each_step() -> None:
    model, twin = network(), network()
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer, real = TorchOptimizer(model.parameters(), optfn.sgd, lr=lr), optim.SGD(twin.parameters(), lr=0.1)
    for value in (0.1, 0.3):
        lr.fill_(value)
        real.param_groups[0]["lr"] = value
        train(model, optimizer, 2)
        train(twin, real, 2)
    alike(model, twin)


def test_a_schedule_and_a_function_stay_out_of_the_groups() -> None:
    model, twin = network(), network()
    schedule = optfn.linear_schedule(0.1, 0.0, 10)
    optimizer = TorchOptimizer(model.parameters(), optfn.adamw, lr=schedule, mask=lambda path, p: p.ndim > 1)
    groups = [{"params": [p for p in twin.parameters() if p.ndim > 1]}, {"params": [twin[0].bias, twin[2].bias], "weight_decay": 0}]
    real = optim.AdamW(groups, lr=1.0)
    train(model, optimizer, 8)
    scheduler = schedulers.LambdaLR(real, lambda t: 0.1 * (1 - t / 10))
    train(twin, real, 8, scheduler)
    alike(model, twin)
    assert {*optimizer.param_groups[0]} == {"params", "betas", "eps", "weight_decay", "amsgrad", "maximize"}


# Schedulers

SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: schedulers.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 7], gamma=0.3),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, factor=0.3, total_iters=4),
    "LinearLR": lambda o: schedulers.LinearLR(o, start_factor=0.2, total_iters=6),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.CosineAnnealingLR(o, 10)], [4]
    ),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=10, power=2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 7, eta_min=0.001),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 3), schedulers.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.001, 0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4, T_mult=2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20),
}


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    found = {name for name, x in vars(schedulers).items() if inspect.isclass(x) and issubclass(x, schedulers.LRScheduler)}
    assert {*SCHEDULERS} == found - {"LRScheduler", "_LRScheduler"}


@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_torch_drives_it(name: str, algorithm: str) -> None:
    """Two groups; CyclicLR and OneCycleLR change the momentum, or the first beta, too."""
    options = {"lr": 0.05, **({"momentum": 0.9} if algorithm == "sgd" else {})}
    sides = []
    for make in (
        lambda groups: TorchOptimizer(groups, getattr(optfn, algorithm), **options),
        lambda groups: {"sgd": optim.SGD, "adamw": optim.AdamW}[algorithm](groups, **options),
    ):
        model = network()
        optimizer = make([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}])
        sides.append((model, optimizer, SCHEDULERS[name](optimizer)))
    (ours, mine, _), (theirs, real, _) = sides
    rates = []
    for t in range(18):
        for model, optimizer, scheduler in sides:
            train(model, optimizer, 1, scheduler)
        for a, b in zip(mine.param_groups, real.param_groups, strict=True):
            for option in ("lr", "momentum", "betas"):
                assert a.get(option) == b.get(option), f"{option} after step {t + 1}"
        alike(ours, theirs, f"after step {t + 1}")
        rates.append(mine.param_groups[0]["lr"])
    assert len({*rates}) > 1, "the scheduler did nothing"


def test_a_scheduler_changes_the_rate_of_a_compiled_step_without_a_new_graph() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, twin = network(), network()
    optimizer = TorchOptimizer(model.parameters(), optfn.adamw, lr=0.1, compile=True, backend=backend)
    real = optim.AdamW(twin.parameters(), lr=0.1)
    for of, it in ((model, optimizer), (twin, real)):
        train(of, it, 12, schedulers.OneCycleLR(it, 0.1, total_steps=20))
    alike(model, twin)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.codegen
def test_a_step_that_is_generated_code() -> None:
    model, twin = network(), network()
    optimizer = TorchOptimizer(model.parameters(), optfn.adam, lr=0.1, compile=True)
    state = tensors(optimizer)
    real = optim.Adam(twin.parameters(), lr=0.1)
    for of, it in ((model, optimizer), (twin, real)):
        train(of, it, 12, schedulers.CosineAnnealingLR(it, 20))
    alike(model, twin)
    for before, after in zip(state, tensors(optimizer), strict=True):
        assert all(before[name] is x for name, x in after.items()), "the state is not written in place"
    assert [int(of["inner_state.2.step"]) for of in tensors(optimizer)] == [12] * 4
    torch._dynamo.reset()


# The protocol


def test_closures_run_with_gradients_and_their_loss_reaches_the_transformation() -> None:
    seen = []

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.append(extra)
        return updates, state

    spy = optfn.GradientTransformation(lambda params: (), update)
    model, twin = network(), network()
    optimizer, real = TorchOptimizer(model.parameters(), optfn.chain(spy, optfn.sgd(0.1))), optim.SGD(twin.parameters(), lr=0.1)

    def closure(of: torch.nn.Module, it: optim.Optimizer) -> Callable[[], Tensor]:
        def run() -> Tensor:
            it.zero_grad()
            loss = loss_of(of)
            loss.backward()
            return loss

        return run

    for _ in range(3):
        loss, wanted = optimizer.step(closure(model, optimizer)), real.step(closure(twin, real))
        check(loss.detach(), wanted.detach(), "the loss")
        assert not seen[-1]["value"].requires_grad
        assert float(seen[-1]["value"]) == float(loss.detach())
        alike(model, twin)
    optimizer.step(other=1)
    assert seen[-1] == {"other": 1}
    assert optimizer.step(lambda: None) is None
    assert seen[-1] == {}


def test_hooks_run_where_torchs_do() -> None:
    logs = []
    for make in (lambda ps: TorchOptimizer(ps, optfn.sgd, lr=0.1), lambda ps: optim.SGD(ps, lr=0.1)):
        model, log = network(), []
        optimizer = make(model.parameters())
        start = model[0].weight.detach().clone()

        def note(name: str, log: Any = log, model: Any = model, start: Any = start) -> Callable[..., None]:
            return lambda *args: log.append((name, len(args), torch.equal(model[0].weight, start)))

        everywhere = [register_optimizer_step_pre_hook(note("all pre"))]
        everywhere.append(register_optimizer_step_post_hook(note("all post")))
        optimizer.register_step_pre_hook(note("pre"))
        optimizer.register_step_post_hook(note("post"))
        optimizer.register_state_dict_pre_hook(note("state pre"))
        optimizer.register_state_dict_post_hook(note("state post"))
        optimizer.register_load_state_dict_pre_hook(note("load pre"))
        optimizer.register_load_state_dict_post_hook(note("load post"))
        train(model, optimizer, 1)
        optimizer.load_state_dict(optimizer.state_dict())
        for handle in everywhere:
            handle.remove()
        logs.append(log)
    assert logs[0] == logs[1]
    assert len(logs[0]) == 8


def test_a_hook_may_change_what_is_loaded_and_sees_what_was() -> None:
    model = network(torch.bfloat16)
    optimizer = TorchOptimizer(
        model.parameters(), lambda lr=0.1: optfn.chain(optfn.scale_by_adam(mu_dtype=torch.float32), optfn.scale(-lr))
    )
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    doubled = saved["state"][0]["inner_state.0.slots.mu"] * 2

    def double(optimizer: Any, state_dict: Any) -> Any:
        state = {**state_dict["state"], 0: {**state_dict["state"][0], "inner_state.0.slots.mu": doubled}}
        return {**state_dict, "state": state}

    seen = []
    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(lambda it: seen.append(tensors(it)[0]["inner_state.0.slots.mu"]))
    optimizer.load_state_dict(saved)
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], doubled)
    assert torch.equal(tree.get(optimizer.states[0], "mu")[0], doubled)


def test_zero_grad() -> None:
    model = network()
    optimizer = TorchOptimizer(model.parameters(), optfn.sgd, lr=0.1)
    loss_of(model).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_scaler_skips_a_step_and_nothing_moves() -> None:
    sides = []
    for make in (lambda ps: TorchOptimizer(ps, optfn.adamw, lr=0.1), lambda ps: optim.AdamW(ps, lr=0.1)):
        model = network()
        sides.append((model, make(model.parameters()), torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)))
    scales = []
    for t in range(8):
        for model, optimizer, scaler in sides:
            optimizer.zero_grad()
            scaler.scale(loss_of(model) * (float("inf") if t in (0, 4) else 1)).backward()
            if t == 2:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            before = copy.deepcopy((list(model.parameters()), tensors(optimizer)))
            scaler.step(optimizer)
            scaler.update()
            if t in (0, 4):
                torch.testing.assert_close((list(model.parameters()), tensors(optimizer)), before, rtol=0, atol=0)
        alike(sides[0][0], sides[1][0], f"after step {t + 1}")
        assert sides[0][2].get_scale() == sides[1][2].get_scale()
        scales.append(sides[0][2].get_scale())
    assert len({*scales}) > 1
    assert int(tensors(sides[0][1])[0]["count"]) == 6


# Checkpoints


def saved_and_loaded(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def resumed(
    optimizer: TorchOptimizer, model: torch.nn.Module, other: torch.nn.Module, load: Callable[[TorchOptimizer], None]
) -> None:
    """A fresh optimizer, once loaded, takes exactly the steps of the one that has run on."""
    other.load_state_dict(model.state_dict())
    new = TorchOptimizer(
        [{"params": other[0].parameters()}, {"params": other[2].parameters(), "lr": 9.0}], optfn.adamw, amsgrad=True
    )
    load(new)
    assert [group["lr"] for group in new.param_groups] == [group["lr"] for group in optimizer.param_groups]
    for of, it in ((model, optimizer), (other, new)):
        train(of, it, 5, schedulers.StepLR(it, 2))
    same(other, model)
    torch.testing.assert_close(tensors(new), tensors(optimizer), rtol=0, atol=0)


def running() -> tuple[torch.nn.Module, TorchOptimizer]:
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}]
    optimizer = TorchOptimizer(groups, optfn.adamw, lr=0.1, amsgrad=True, betas=(0.8, 0.9))
    train(model, optimizer, 4)
    return model, optimizer


def test_a_state_dict_goes_through_torch_save() -> None:
    model, optimizer = running()
    saved = saved_and_loaded(optimizer.state_dict())
    before = copy.deepcopy(saved)
    resumed(optimizer, model, network(), lambda new: new.load_state_dict(saved))
    torch.testing.assert_close(saved, before, rtol=0, atol=0)  # what was loaded is not what is trained


@pytest.mark.parametrize("flat", [False, True])
def test_the_state_dict_of_distributed_checkpoint(flat: bool, tmp_path: Path) -> None:
    model, optimizer = running()
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    given = get_optimizer_state_dict(model, optimizer, options=options)
    names = {name for name, _ in model.named_parameters()}
    assert {".".join(k.split(".")[1:3]) for k in given} == names if flat else {*given["state"]} == names
    dcp.save({"optimizer": given}, checkpoint_id=tmp_path, no_dist=True)
    other = network()

    def load(new: TorchOptimizer) -> None:
        target = {"optimizer": get_optimizer_state_dict(other, new, options=options)}
        dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(other, new, target["optimizer"], options=options)

    resumed(optimizer, model, other, load)


def test_making_a_checkpoint_does_not_take_a_step() -> None:
    """distributed.checkpoint steps an optimizer that has no state with gradients of zero."""
    model = network()
    optimizer = TorchOptimizer(model.parameters(), optfn.sgd, lr=0.1)
    before = copy.deepcopy(list(model.parameters()))
    get_optimizer_state_dict(model, optimizer)
    assert int(tensors(optimizer)[0]["count"]) == 0
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_its_own_way(copied: Callable[[Any], Any]) -> None:
    model, optimizer = running()
    other, new = copied((model, optimizer))
    train(model, optimizer, 5)
    train(other, new, 5)
    same(other, model)
    assert new.defaults == {**optimizer.defaults, "differentiable": False}


def test_a_closure_copies_but_does_not_pickle() -> None:
    model = network()
    optimizer = TorchOptimizer(model.parameters(), optfn.adam(0.1))
    train(model, optimizer, 2)
    other, new = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3)
    train(other, new, 3)
    same(other, model)
    with pytest.raises((pickle.PicklingError, AttributeError), match="local"):
        pickle.dumps(optimizer)


def test_half_precision_parameters_keep_wide_moments_through_a_checkpoint() -> None:
    def make(lr: float = 0.1) -> optfn.GradientTransformation:
        wide = {"mu_dtype": torch.float32, "nu_dtype": torch.float32}
        return optfn.chain(optfn.scale_by_adam(**wide), optfn.scale_by_learning_rate(lr))

    model, other = network(torch.bfloat16), network(torch.bfloat16)
    optimizer, new = TorchOptimizer(model.parameters(), make), TorchOptimizer(other.parameters(), make)
    train(model, optimizer, 3)
    other.load_state_dict(model.state_dict())
    new.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    torch.testing.assert_close(tensors(new), tensors(optimizer), rtol=0, atol=0)
    assert tensors(new)[0]["inner_state.0.slots.mu"].dtype == torch.float32
    assert tensors(new)[0]["count"].dtype == torch.int64


def test_a_parameter_without_state_gets_a_fresh_one() -> None:
    _, optimizer = running()
    saved = optimizer.state_dict()
    del saved["state"][3]
    new = TorchOptimizer([{"params": g["params"]} for g in optimizer.param_groups], optfn.adamw)
    new.load_state_dict(saved)
    assert [int(of["inner_state.1.step"]) for of in tensors(new)] == [4, 4, 4, 0]
    assert [int(of["count"]) for of in tensors(new)] == [4] * 4


def spoiled(change: str, saved: dict[str, Any]) -> dict[str, Any]:
    saved = copy.deepcopy(saved)
    first = saved["state"][0]
    if change == "lacks":
        del first["inner_state.1.slots.mu"]
    if change == "torch":
        saved["state"][0] = {"exp_avg": first["count"]}
    if change == "shape":
        first["inner_state.1.slots.nu"] = torch.ones(3)
    if change == "groups":
        saved["param_groups"].pop()
    if change == "size":
        saved["param_groups"][0]["params"].append(9)
    return saved


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ("lacks", KeyError, "the state of parameter '0' does not fit: missing 'inner_state.1.slots.mu'"),
        ("torch", KeyError, "unexpected 'exp_avg'"),
        ("shape", ValueError, r"'inner_state.1.slots.nu' of parameter '0' must have shape \(4, 3\), got \(3,\)"),
        ("groups", ValueError, "loaded state dict has a different number of parameter groups"),
        ("size", ValueError, "doesn't match the size of optimizer's group"),
    ],
)
def test_what_does_not_fit_is_an_error_and_changes_nothing(change: str, error: type[Exception], match: str) -> None:
    model, optimizer = running()
    saved = spoiled(change, optimizer.state_dict())
    before = copy.deepcopy(tensors(optimizer)), list(optimizer.param_groups)
    with pytest.raises(error, match=match):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(tensors(optimizer), before[0], rtol=0, atol=0)
    assert optimizer.param_groups == before[1]
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    train(model, optimizer, 1)


def test_loading_into_a_compiled_optimizer_keeps_its_graph() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, twin = network(), network()
    optimizer = TorchOptimizer(model.parameters(), optfn.adam, lr=0.1, compile=True, backend=backend)
    eager = TorchOptimizer(twin.parameters(), optfn.adam, lr=0.1)
    train(model, optimizer, 2)
    train(twin, eager, 2)
    optimizer.load_state_dict(saved_and_loaded(eager.state_dict()))
    train(model, optimizer, 2)
    train(twin, eager, 2)
    alike(model, twin)
    assert len(graphs) == 1
    torch._dynamo.reset()


# What other code does to an optimizer


def test_state_that_other_code_replaces_is_used() -> None:
    """As a trainer does that moves the state to a device."""
    model, twin = network(), network()
    optimizer, other = (TorchOptimizer(of.parameters(), optfn.adam, lr=0.1) for of in (model, twin))
    train(model, optimizer, 3)
    train(twin, other, 3)
    for p, of in optimizer.state.items():
        optimizer.state[p] = {name: x.clone() for name, x in of.items()}
    train(model, optimizer, 1)
    train(twin, other, 1)
    same(model, twin)
    optimizer.state[model[0].weight]["inner_state.2.slots.mu"] = torch.zeros(4, 3, dtype=torch.float64)
    assert not tree.get(optimizer.states[0], "mu")[0].any()
    optimizer.state[model[0].bias]["inner_state.2.slots.mu"].zero_()
    assert not tree.get(optimizer.states[0], "mu")[1].any()
    optimizer.state.clear()
    assert tree.get(optimizer.states[0], "step").tolist() == [0] * 4


def test_parameters_that_other_code_replaces_are_trained() -> None:
    """As a trainer does that shards a model: the new one takes the old one's place, and its state with it."""
    model = network()
    optimizer = TorchOptimizer(model.parameters(), optfn.adam, lr=0.1)
    train(model, optimizer, 3)
    old = model[0].weight
    new = model[0].weight = torch.nn.Parameter(old.detach().clone())
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = optimizer.state.pop(old)
    train(model, optimizer, 1)
    assert not torch.equal(new, old)
    assert [int(of["inner_state.2.step"]) for of in tensors(optimizer)] == [4] * 4


def test_a_state_may_hold_what_it_was_given() -> None:
    """A pure rule may keep the gradient, the parameter, another slot as they are; what is written in place is not theirs."""

    class Slots(NamedTuple):
        last: Tensor
        before: Tensor
        param: Tensor

    def update(g: Tensor, slots: Slots, p: Tensor, step: Tensor) -> tuple[Tensor, Slots]:
        return -0.1 * (g + slots.last + slots.before) + 0.01 * slots.param, Slots(g, slots.last, p)

    def make() -> optfn.GradientTransformation:
        return optfn.leafwise(lambda p: Slots(*(torch.zeros_like(p) for _ in range(3))), update, needs_params=True)

    model, twin = network(), network()
    optimizer, tx = TorchOptimizer(model.parameters(), make()), make()
    params = [p.detach().clone() for p in twin.parameters()]
    state = tx.init(params)
    for _ in range(5):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        updates, state = tx.update(grads, state, params)
        params = optfn.apply_updates(params, updates)
    for p, q in zip(model.parameters(), params, strict=True):
        check(p.detach(), q, "a parameter")


def test_an_empty_group() -> None:
    model = network()
    optimizer = TorchOptimizer([{"params": model.parameters()}, {"params": []}], optfn.adam, lr=0.1)
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.states[1] == ()


# Errors


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: TorchOptimizer([parameter()], "adam"),
            TypeError,
            "tx must be a transformation or a function that returns one, got str",
        ),
        (
            lambda: TorchOptimizer([parameter()], optfn.adam(), lr=1.0),
            TypeError,
            "no arguments 'lr'; it has none, being made already",
        ),
        (
            lambda: TorchOptimizer([parameter()], optfn.sgd, rl=1.0),
            TypeError,
            "tx has no arguments 'rl'; it has 'dampening', 'lr', 'max",
        ),
        (lambda: TorchOptimizer([], optfn.sgd), ValueError, "optimizer got an empty parameter list"),
        (lambda: TorchOptimizer(parameter(), optfn.sgd), TypeError, "should be an iterable of Tensors or dicts"),
        (lambda: TorchOptimizer([parameter()], optfn.sgd, lr=-1.0), ValueError, "lr must be >= 0, got -1.0"),
        (lambda: TorchOptimizer([parameter() * 2], optfn.sgd), ValueError, "can't optimize a non-leaf Tensor"),
        (
            lambda: TorchOptimizer([("a", parameter()), ("a", parameter())], optfn.sgd),
            ValueError,
            "names of a group's parameters must",
        ),
    ],
)
def test_errors(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_an_error_in_a_step_leaves_everything_as_it_was() -> None:
    model = network()
    optimizer = TorchOptimizer(model.parameters(), optfn.sparse_adam, lr=0.1)
    before = copy.deepcopy((list(model.parameters()), tensors(optimizer)))
    with pytest.raises(TypeError, match="'0' has a gradient of layout"):
        train(model, optimizer, 1)
    torch.testing.assert_close((list(model.parameters()), tensors(optimizer)), before, rtol=0, atol=0)
