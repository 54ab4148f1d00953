"""Compiled, donated steps on leaves that lie on several processes, against the eager ones."""

import contextlib
import warnings
from typing import Any

import pytest
import torch
from interpreted import interpreted
from meshes import LAYOUTS, distributed, full_grads, full_params, layout_of, whole
from processes import named_counts, on_processes
from test_processes import ALL, COUNTS, EXTRA, SEARCHES, STEPS, VALUES, big, difference, net
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import optfn

Step = Any

# What is handed a function runs as it is, see the page "More than one process"; dpsgd takes the gradients of examples.
ELSEWHERE = {*SEARCHES, "dpsgd"}


def compiled(tx: optfn.GradientTransformation) -> Step:
    """One step, donated; the function that was compiled is its ``__wrapped__``."""

    def step(params: Any, state: Any, grads: Any, extra: Any) -> Any:
        updates, state = tx.update(grads, state, params, **extra)
        return optfn.apply_updates(params, updates), state

    return optfn.compile(step, donate=("params", "state"))


def programs(step: Step) -> list[bool]:
    """Of each way in which a step was called, whether it has a program."""
    return [call.program is not None for call in step._calls.calls]


def apart(make: Any, lay: Any, steps: int = 4, *, name: str) -> tuple[float, list[bool]]:
    """How far compiled steps are from eager ones, and which programs there are."""
    tx = make()
    step = compiled(tx)
    params, eager = lay(full_params()), lay(full_params())
    state, expected = tx.init(params), tx.init(eager)
    mine, at = dict(params), optfn.tree.map(layout_of, (params, state))
    for k in range(steps):
        extra = {"value": torch.tensor(VALUES[k], dtype=torch.float64)} if name in EXTRA else {}
        eager, expected = step.__wrapped__(eager, expected, lay(full_grads(k)), extra)
        params, state = step(params, state, lay(full_grads(k)), extra)
        assert all(params[leaf] is mine[leaf] for leaf in mine), "a donated tensor is a tensor of the result"
        assert optfn.tree.map(layout_of, (params, state)) == at
    return difference(whole((eager, expected)), (params, state)), programs(step)


def all_apart(layout: str) -> dict[str, Any]:
    lay = distributed(layout)
    with torch.no_grad(), interpreted():
        return {name: apart(make, lay, name=name) for name, make in ALL.items() if name not in ELSEWHERE}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_transformation_compiled_is_the_eager_one(layout: str, request: pytest.FixtureRequest) -> None:
    if layout != "tp+fsdp" and not request.config.getoption("--table"):
        pytest.skip("one layout, which has all kinds of pieces, in every run; all of them with --table")
    for found in on_processes(all_apart, 4, layout, seconds=500):
        assert {name: x for name, (x, _) in found.items() if not x <= 1e-12} == {}
        assert {name for name, (_, made) in found.items() if made != [True]} == set()


def generated() -> dict[str, Any]:
    lay = distributed("fsdp")
    with torch.no_grad():
        return {name: apart(ALL[name], lay, 3, name=name) for name in ("clip", "muon")}


@pytest.mark.codegen
def test_generated_code() -> None:
    for found in on_processes(generated, 4, seconds=300):
        for difference_, made in found.values():
            assert difference_ <= 1e-12
            assert made == [True]


def cut_states() -> dict[str, tuple[float, list[bool]]]:
    """Plain parameters, of which only the state lies on several processes."""
    mesh = init_device_mesh("cpu", (4,))
    with torch.no_grad(), interpreted():
        return {
            name: apart(lambda name=name: optfn.distributed.shard_state(ALL[name](), mesh), dict, name=name)
            for name in ("adamw", "clip", "muon", "adafactor", "momo")
        }


def test_a_state_that_is_cut() -> None:
    for found in on_processes(cut_states, 4):
        assert all(x <= 1e-12 and made == [True] for x, made in found.values()), found


# What processes say to each other


def said(name: str, depth: int) -> dict[str, int]:
    """Collectives in one call of the program."""
    params = big(depth, init_device_mesh("cpu", (4,)))
    grads = big(depth, init_device_mesh("cpu", (4,)))
    tx = COUNTS[name][0]()
    state, step = tx.init(params), compiled(tx)
    for _ in range(2):
        params, state = step(params, state, grads, {})
    call, given = step._calls.find((params, state, grads, {}), {})
    assert call.program is not None
    with CommDebugMode() as mode:
        call.run(given)
    return named_counts(mode)


# A line search hands a function the parameters as they lie, so its step runs as it is, with a warning.
SAID = {name: counts for name, (_, counts) in COUNTS.items() if not name.startswith("zoom")}


def all_said() -> dict[Any, dict[str, int]]:
    with torch.no_grad(), interpreted():
        return {(name, depth): said(name, depth) for name in SAID for depth in (2, 4)}


@pytest.mark.slow
def test_programs_say_what_the_steps_say() -> None:
    for found in on_processes(all_said, 4, seconds=300):
        assert found == {(name, depth): counts for name, counts in SAID.items() for depth in (2, 4)}


def in_order() -> list[str]:
    """The calls of a program in which sums and wholes depend on nothing of each other, and processes have different work."""
    mesh = init_device_mesh("cpu", (4,))
    params = {name: distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)]) for name in ("clipped", "muon", "other")}
    tx = optfn.partition(
        {
            "clipped": optfn.chain(optfn.clip_by_global_norm(1.0), optfn.sgd(0.1)),
            "muon": optfn.muon(ns_dtype=None),
            "other": optfn.chain(optfn.muon(ns_dtype=None), optfn.clip_by_global_norm(1.0)),
        },
        lambda path, p: path,
    )
    state, step = tx.init(params), compiled(tx)
    with interpreted():
        for _ in range(2):
            params, state = step(params, state, optfn.tree.map(torch.clone, params), {})
        with torch.no_grad():
            call, given = step._calls.find((params, state, optfn.tree.map(torch.clone, params), {}), {})
    said: list[str] = []

    class Listen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "_c10d_functional" and "wait" not in str(func):
                said.append(str(func))
            return func(*args, **(kwargs or {}))

    with Listen():
        call.run(given)
    return said


def test_processes_wait_for_each_other_in_one_order() -> None:
    first, *others = on_processes(in_order, 4)
    assert len(first) == 6  # two sums, and twice there and back
    assert all(other == first for other in others)


# Other calls


def changed() -> None:
    """What a step can ask of such tensors is guarded; an error leaves them as they were."""
    mesh = init_device_mesh("cpu", (4,))
    step = compiled(optfn.add_decayed_weights(0.5, mask=lambda path, p: p.requires_grad))

    def called(placements: list[Any], recorded: bool) -> Tensor:
        params = {"w": distribute_tensor(torch.ones(4, 8), mesh, placements).requires_grad_(recorded)}
        grads = {"w": distribute_tensor(torch.ones(4, 8), mesh, placements)}
        new, _ = step(params, step_state, grads, {})
        assert new["w"] is params["w"]
        assert params["w"].placements == tuple(placements)
        return params["w"].detach().full_tensor()[0, 0]

    step_state = optfn.add_decayed_weights(0.5, mask=lambda path, p: True).init({"w": torch.ones(2)})
    with interpreted():
        for _ in range(3):
            for placements in ([Shard(0)], [Shard(1)]):
                for recorded in (True, False):
                    assert called(placements, recorded) == (2.5 if recorded else 2.0)
    assert len(programs(step)) == 4

    params = {name: distribute_tensor(torch.ones(4, 8), mesh, [Shard(0)]) for name in "ab"}
    both = {"a": params["a"], "b": params["a"]}
    grads = optfn.tree.map(torch.clone, params)
    with pytest.raises(ValueError, match=r"'params.a' and 'params.b' share memory"):
        step(both, step_state, grads, {})
    aliased = {"a": params["a"], "b": DTensor.from_local(params["a"].to_local(), mesh, [Shard(0)])}
    with pytest.raises(ValueError, match=r"'params.a' and 'params.b' share memory"):
        step(aliased, step_state, grads, {})
    assert params["a"].full_tensor().eq(1).all()


def test_what_is_guarded() -> None:
    on_processes(changed, 4)


def of_sums() -> None:
    """Gradients that are sums still to be made, as torch's own backward passes give them, are summed at every call."""
    from torch.distributed.tensor import Partial, Replicate

    mesh = init_device_mesh("cpu", (2,))
    rank = torch.distributed.get_rank()
    params = {"w": distribute_tensor(torch.ones(3), mesh, [Replicate()])}
    tx = optfn.sgd(0.1)
    state, step = tx.init(params), compiled(tx)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(3):
            grads = {"w": DTensor.from_local(torch.full((3,), float(rank + 1)), mesh, [Partial()], run_check=False)}
            params, state = step(params, state, grads, {})
            torch.testing.assert_close(params["w"].to_local(), torch.full((3,), 1 - 0.3 * (k + 1)))
    assert programs(step) == [False]


def in_branches() -> None:
    """A sum that stands before a branch is made by all, also where only one process takes the branch that reads it."""
    mesh = init_device_mesh("cpu", (2,))

    def step(params: Any, grads: Any, log: Tensor, flag: Tensor) -> Any:
        norm, total = optfn.tree.norm(grads), optfn.tree.sum(params)
        log = optfn.tree.cond(flag, lambda: norm, lambda: log)
        return optfn.tree.map_entries(lambda p, g: p - g * total.abs(), params, grads), log

    fast = optfn.compile(step, donate=("params", "log"))
    mine = torch.distributed.get_rank() == 0
    params = {"w": distribute_tensor(torch.ones(4), mesh, [Shard(0)])}
    eager, log, wanted = optfn.tree.map(torch.clone, params), torch.zeros(()), torch.zeros(())
    with torch.no_grad(), interpreted():
        for k in range(4):
            grads = {"w": distribute_tensor(torch.full((4,), 0.1 * (k + 1)), mesh, [Shard(0)])}
            eager, wanted = step(eager, grads, wanted, torch.tensor(mine))
            params, log = fast(params, grads, log, torch.tensor(mine))
            assert difference(whole((eager, wanted)), (params, log)) <= 1e-6
    assert programs(fast) == [True]


def of_branches_and_sums() -> None:
    of_sums()
    in_branches()


def test_sums_and_branches_are_those_of_the_eager_step() -> None:
    on_processes(of_branches_and_sums, 2)


def by_itself() -> None:
    """A step that calls operators of such tensors itself, and one with a model in it: as they are, donated, with a reason."""
    mesh = init_device_mesh("cpu", (4,))

    def halve(p: Any) -> Any:
        return p / 2

    step = optfn.compile(halve, donate="p")
    p = distribute_tensor(torch.ones(8), mesh, [Shard(0)])
    step(p)
    for k in range(2, 4):
        with pytest.warns(UserWarning, match=r"it runs as it is: aten.div.* of a tensor that lies on several processes is called"):
            assert step(p) is p
        assert p.full_tensor().eq(0.5**k).all()

    with pytest.warns(UserWarning, match="Of such steps those that donate are compiled"):
        assert optfn.compile(halve)(p).full_tensor().eq(0.5**4).all()

    swap = optfn.compile(lambda a, b: (b, a), donate=("a", "b"))
    a, b = (distribute_tensor(torch.full((8,), x), mesh, [Shard(0)]) for x in (1.0, 2.0))
    with interpreted():
        for k in range(1, 4):
            swap(a, b)
            assert (a.full_tensor().eq(2).all(), b.full_tensor().eq(1).all()) == (k % 2 == 1, k % 2 == 1)

    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model)
    tx = optfn.adamw(0.1)

    def train(params: Any, state: Any, x: Tensor) -> Any:
        with torch.enable_grad():
            model(x).square().mean().backward()
        updates, state = tx.update({name: p.grad for name, p in params.items()}, state, params)
        return optfn.apply_updates(params, updates), state

    step = optfn.compile(train, donate=("params", "state"))
    params = dict(model.named_parameters())
    state = tx.init(params)
    for k in range(2):
        model.zero_grad()
        with pytest.warns(UserWarning, match="it runs as it is: it reads something") if k else contextlib.nullcontext():
            new, state = step(params, state, torch.ones(2, 7, dtype=torch.float64))
        assert all(new[name] is p for name, p in params.items())
    assert optfn.tree.leaves(state)[0].tolist() == [2] * 4


def test_what_is_not_compiled_says_why() -> None:
    on_processes(by_itself, 4)


def optimizers() -> float:
    """The same model, trained by one that compiles its steps and one that does not."""
    from torch.distributed.fsdp import fully_shard

    found = []
    with interpreted(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="optfn")
        for compile_ in (False, True):
            model = net()
            for layer in (model.first, model.last, model):
                fully_shard(layer)
            factory = lambda lr: optfn.chain(optfn.clip_by_global_norm(0.1), optfn.adamw(lr))  # noqa: E731
            optimizer = optfn.interop.TorchOptimizer(model.named_parameters(), factory, lr=0.1, compile=compile_)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
            generator = torch.Generator().manual_seed(torch.distributed.get_rank())
            for _ in range(STEPS):
                optimizer.zero_grad()
                model(torch.randn(4, 7, generator=generator, dtype=torch.float64)).square().mean().backward()
                optimizer.step()
                scheduler.step()
            found.append(whole(optfn.tree.map(torch.detach, dict(model.named_parameters()))))
    return difference(*found)


def test_a_torch_optimizer_that_compiles() -> None:
    assert max(on_processes(optimizers, 4)) <= 1e-12
