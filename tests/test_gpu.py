"""A donated step on a GPU: the numbers of the CPU, nothing that waits for the device, and a CUDA graph of it."""

from typing import Any

import pytest
import torch
from steps import long_chain, step_of
from torch import Tensor

import optfn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


CHAINS = {"sgd": lambda: optfn.sgd(0.1, momentum=0.9), "adamw": lambda: optfn.adamw(0.1), "long": long_chain}


def on(device: str, of: Any) -> Any:
    return optfn.tree.map(lambda x: x.to(device, copy=True), of)


def some_params() -> dict[str, Tensor]:
    return {str(i): torch.randn(shape, dtype=torch.float64) for i, shape in enumerate([(64, 32), (32,), (64, 32), (32,), ()])}


@pytest.mark.parametrize("name", CHAINS)
def test_the_numbers_are_those_of_the_cpu_and_nothing_waits(name: str) -> None:
    tx = CHAINS[name]()
    wanted = some_params(), tx.init(some_params())
    params, state = on("cuda", wanted)
    assert all(x.is_cuda for x in optfn.tree.leaves(state)), "a count on the CPU would wait for the device, or make it wait"
    held = optfn.tree.leaves((params, state))
    step = optfn.compile(step_of(tx), donate=("params", "state"))
    for i in range(5):
        grads = some_params()
        wanted = step_of(tx)(*wanted, grads)
        grads = on("cuda", grads)
        torch.cuda.set_sync_debug_mode("error" if i else "default")  # the first call compiles
        params, state = step(params, state, grads)
        torch.cuda.set_sync_debug_mode("default")
    for x, y, z in zip(optfn.tree.leaves((params, state)), held, optfn.tree.leaves(wanted), strict=True):
        assert x is y
        torch.testing.assert_close(x.cpu(), z, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CHAINS)
def test_a_donated_step_is_captured_in_a_cuda_graph(name: str) -> None:
    tx = CHAINS[name]()
    start, grads = some_params(), some_params()
    wanted = start, tx.init(start)
    (params, state), on_device = on("cuda", wanted), on("cuda", grads)
    step = optfn.compile(step_of(tx), donate=("params", "state"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            params, state = step(params, state, on_device)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(params, state, on_device)
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        wanted = step_of(tx)(*wanted, grads)
    for x, y in zip(optfn.tree.leaves((params, state)), optfn.tree.leaves(wanted), strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-10, atol=1e-12)
