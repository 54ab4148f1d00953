"""What a step costs that is not compiled, in counts: operations of torch a leaf, and temporaries alive at a time."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import optfn

Step = Callable[[Any, Any, Any], Any]


class Operations(TorchDispatchMode):
    """Counts the operations of torch, and the bytes of the storages that they made and that are still alive, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id_of(x) for x in tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = tensors(result)
        self.count += bool(made)  # a question about a dtype is no work
        for x in made:
            if id_of(x) not in given:  # a view makes nothing
                self.alive[id_of(x)] = StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def id_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def tree_of(leaves: int) -> dict[str, Tensor]:
    return {f"{i:02d}": torch.ones(64, 64) for i in range(leaves)}


def operations(run: Step, tx: optfn.GradientTransformation, leaves: int) -> Operations:
    params, grads = tree_of(leaves), tree_of(leaves)
    state = tx.init(params)
    with torch.no_grad(), Operations() as counted:
        kept = run(params, state, grads)
    del kept
    return counted


def a_leaf(run: Step, tx: optfn.GradientTransformation) -> int:
    """The operations that one leaf more makes."""
    few, many = (operations(run, tx, leaves).count for leaves in (10, 20))
    assert (many - few) % 10 == 0
    return (many - few) // 10


# What a leaf costs at most, the addition to the parameter among it.
COSTS = {
    "sgd": (optfn.sgd(lr=0.1), 2),
    "sgd, nesterov": (optfn.sgd(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1), 5),
    "adam": (optfn.adam(), 9),
    "adamw": (optfn.adamw(), 10),
    "adamw, scheduled": (optfn.adamw(optfn.linear_schedule(0.1, 0.0, 10)), 10),
    "adamw, amsgrad": (optfn.adamw(amsgrad=True), 11),
    "rmsprop": (optfn.rmsprop(), 8),
    "adagrad": (optfn.adagrad(), 7),
    "adadelta": (optfn.adadelta(), 14),
    "adamax": (optfn.adamax(), 9),
    "nadam": (optfn.nadam(), 18),
    "radam": (optfn.radam(), 12),
    "rprop": (optfn.rprop(), 20),
    "asgd": (optfn.asgd(), 9),
    "clipped": (optfn.chain(optfn.clip_by_global_norm(1.0), optfn.adamw()), 12),
}


def step(tx: optfn.GradientTransformation) -> Step:
    def run(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optfn.apply_updates(params, updates), state

    return run


@pytest.mark.parametrize("name", COSTS)
def test_operations_of_a_leaf(name: str, record_property: Callable[[str, object], None]) -> None:
    tx, most = COSTS[name]
    found = a_leaf(step(tx), tx)
    record_property("operations of a leaf, eager", f"{name:18} {found}")
    assert found <= most


# Operators that a step of a TorchOptimizer calls for a leaf at most, those that torch makes of others among them; the parts of
# the scalars, select and as_strided, and its copies into the state are not counted.
STEPS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "sgd": (optfn.sgd, {"lr": 0.1}, 2),
    "sgd, momentum": (optfn.sgd, {"lr": 0.1, "momentum": 0.9}, 3),
    "adam": (optfn.adam, {}, 9),
    "adamw": (optfn.adamw, {}, 10),
    "radam": (optfn.radam, {}, 12),
    "rmsprop": (optfn.rmsprop, {}, 8),
}


@pytest.mark.parametrize("name", STEPS)
def test_operators_of_a_leaf_in_a_torch_optimizer(name: str) -> None:
    """None of them makes a tensor of a Python number or casts one: that is half of what an operation on a small leaf takes."""
    factory, options, most = STEPS[name]

    def called(leaves: int) -> Counter[str]:
        params = [torch.nn.Parameter(torch.ones(4)) for _ in range(leaves)]
        for p in params:
            p.grad = torch.ones(4)
        optimizer = optfn.interop.TorchOptimizer(params, factory, **options)
        optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        return Counter({event.key: event.count for event in profile.key_averages() if event.key.startswith("aten::")})

    of_ten = called(20) - called(10)
    counted = {key.removeprefix("aten::"): count for key, count in of_ten.items()}
    assert not {*counted} & {"to", "_to_copy", "item", "_local_scalar_dense"}, counted
    assert sum(count for key, count in counted.items() if key not in ("select", "as_strided", "copy_")) <= most * 10, counted


def test_what_depends_on_the_step_alone_is_computed_once() -> None:
    """Whatever the number of leaves: the count, two bias corrections and the scalars that are made of them."""
    tx = optfn.adamw()
    assert operations(step(tx), tx, 10).count - 10 * COSTS["adamw"][1] <= 16


@pytest.mark.parametrize("name", [name for name in COSTS if name not in ("clipped", "adagrad")])  # these see the whole tree first
def test_temporaries_of_one_leaf_at_a_time(name: str, record_property: Callable[[str, object], None]) -> None:
    """Beyond what an update returns there are never more than four tensors of a leaf alive: no link makes a tree for the next."""
    tx, size = COSTS[name][0], 64 * 64 * 4

    def run(params: Any, state: Any, grads: Any) -> Any:
        nonlocal returned
        result = tx.update(grads, state, params)
        returned = sum({id_of(x): x.untyped_storage().nbytes() for x in tensors(result)}.values())
        return result

    for leaves in (1, 20):
        returned = 0
        peak = operations(run, tx, leaves).peak
        record_property("temporaries, in leaves", f"{name:18} {leaves:3} leaves: {(peak - returned) / size:.2f}")
        assert peak <= returned + 4.1 * size  # and the scalars
