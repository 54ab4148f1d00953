"""TorchOptimizer on two processes: a value is averaged over them, or refused; their parameters stay equal."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

import optfn
from optfn.interop import TorchOptimizer

pytestmark = [pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"), pytest.mark.timeout(300)]
SIZE = 2


def plateau(lr: float = 0.1) -> optfn.GradientTransformation:
    return optfn.chain(optfn.sgd(lr), optfn.reduce_on_plateau(factor=0.5, patience=1))


def started(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=SIZE)
    found = {}
    try:
        for test in (averaged, searched, without_value, means, refused):
            torch.manual_seed(0)
            found[test.__name__] = test(rank, torch.nn.Linear(3, 1).double())
        torch.save(found, f"{path}/{rank}")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What the functions below return on each of two processes."""
    path = tmp_path_factory.mktemp("two")
    multiprocessing.start_processes(started, (str(path),), nprocs=SIZE, join=True, start_method="spawn")
    return [torch.load(path / str(rank)) for rank in range(SIZE)]


def trained(rank: int, model: torch.nn.Module, source: Any, **options: Any) -> list[Any]:
    """Losses of the processes are not alike, and fall in one of them alone."""
    wrapped = DistributedDataParallel(model)
    optimizer = TorchOptimizer(wrapped.parameters(), source, **options)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3) + rank

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (wrapped(x) - (10.0 if rank else 0.0)).square().mean()
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
    return [p.detach().clone() for p in model.parameters()]


def averaged(rank: int, model: torch.nn.Module) -> list[Any]:
    return trained(rank, model, plateau, process_group=dist.group.WORLD)


def searched(rank: int, model: torch.nn.Module) -> list[Any]:
    return trained(
        rank, model, optfn.lbfgs, line_search_fn="strong_wolfe", max_iter=3, tolerance_grad=1e-3, process_group=dist.group.WORLD
    )


def without_value(rank: int, model: torch.nn.Module) -> list[Any]:
    return trained(rank, model, optfn.adam)


@pytest.mark.parametrize("test", ["averaged", "searched", "without_value"])
def test_parameters_stay_equal(on_two: Any, test: str) -> None:
    first, second = (found[test] for found in on_two)
    assert all(map(torch.equal, first, second))


def means(rank: int, model: torch.nn.Module) -> Any:
    seen: list[Any] = []

    def update(updates: Any, state: Any, params: Any = None, *, value: Any = None, **extra: Any) -> Any:
        seen.append(value)
        return updates, state

    tx = optfn.chain(optfn.GradientTransformation(lambda params: (), update), optfn.sgd(0.1))
    for group in (dist.group.WORLD, "self"):
        optimizer = TorchOptimizer(model.parameters(), tx, process_group=group)
        optimizer.step(value=1.0 + rank)
        optimizer.step(lambda: torch.tensor(3.0 * rank, dtype=torch.float64))
    TorchOptimizer(model.parameters(), tx).step(lambda: 1.0)
    return [None if x is None else float(x) for x in seen]


def test_what_value_is(on_two: Any) -> None:
    assert [found["means"] for found in on_two] == [[1.5, 1.5, 1.0, 0.0, None], [1.5, 1.5, 2.0, 3.0, None]]


def refused(rank: int, model: torch.nn.Module) -> list[str]:
    said: list[str] = []
    for source, how in ((plateau, {"value": 1.0}), (plateau, {"closure": lambda: 1.0}), (optfn.lbfgs, {"closure": lambda: 1.0})):
        optimizer = TorchOptimizer(model.parameters(), source)
        try:
            optimizer.step(**how)
        except (TypeError, ValueError) as error:
            said.append(" ".join([str(error), *getattr(error, "__notes__", [])]))
    return said


def test_a_value_of_one_process_is_refused(on_two: Any) -> None:
    first, second = (found["refused"] for found in on_two)
    assert first == second
    assert len(first) == 3
    for said in first:
        assert re.search(r"process_group=torch.distributed.group.WORLD", said)
