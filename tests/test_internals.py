"""What Inductor is held to: values that are rounded on purpose stay rounded, and several threads compile at once."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import optfn
from optfn.compile.backend import backend as regions_backend

bfloat16, float16 = torch.bfloat16, torch.float16
LR = 0.01


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


# Rounding on purpose. Each takes a state and gradients, and gives the new state.


def kahan(p: Tensor, c: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """SGD of bfloat16 parameters; what an addition loses is added to the next one."""
    change = c.float() - LR * g.float()
    new = (p.float() + change).to(bfloat16)
    return new, (change - (new.float() - p.float())).to(bfloat16)


def halves(high: Tensor, low: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """SGD of a float32 tensor that is kept as a bfloat16 one, and the 16 bits that this lacks."""
    whole = ((high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32) - LR * g
    bits = whole.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(bfloat16), (bits - (upper << 16)).to(torch.int16)


def stochastic(p: Tensor, drawn: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    bits = (p.float() - LR * g).view(torch.int32)
    return ((bits + drawn) & -0x10000).view(torch.float32).to(bfloat16), (drawn * 5 + 1) & 0xFFFF


def lost(p: Tensor, error: Tensor, g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a narrow dtype loses of a float32 sum."""
    total = p - LR * g + error
    kept = total.to(dtype).to(p.dtype)
    return kept, total - kept


def twice(p: Tensor, q: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded to float32 and then to bfloat16, from one narrow dtype to another, and through integers."""
    wide = p.double() * 0.999 - LR * g
    return wide.float().to(bfloat16).float(), (wide.to(bfloat16).to(float16).float() + (q * 100).to(torch.int32) / 100) / 2


def narrow(p: Tensor, c: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Kahan's sum with no cast: torch rounds the result of every operator, and some of the numbers."""
    c = c - LR * g
    new = p + c
    return new, c - (new - p)


def many_operators(p: Tensor, c: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    c = c * 0.9 + g * (1 - 0.9) - 0.01
    scale = torch.tensor(1.1, dtype=torch.float64)
    p = (p * 0.999 - c / (c.square().sqrt() + 0.1)).add(c, alpha=-0.3) * scale + scale / 1000
    return torch.where(p > 1, p.tanh() * 1.3, p.clamp(-1.2, 2)) * p.sigmoid() + p.sum() * 1e-3, c / (1 + c.abs().amax()) ** 1.5


STEPS: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Tensor, ...]]]] = {
    "kahan": (kahan, lambda n: (torch.randn(n).to(bfloat16), torch.zeros(n, dtype=bfloat16), torch.randn(n).to(bfloat16))),
    "halves": (halves, lambda n: (torch.randn(n).to(bfloat16), torch.zeros(n, dtype=torch.int16), torch.randn(n))),
    "stochastic": (
        stochastic,
        lambda n: (torch.randn(n).to(bfloat16), torch.randint(1 << 16, (n,), dtype=torch.int32), torch.randn(n)),
    ),
    **{
        f"lost by {dtype}": (
            lambda p, c, g, dtype=dtype: lost(p, c, g, dtype),
            lambda n: (torch.randn(n), torch.zeros(n), torch.randn(n)),
        )
        for dtype in (bfloat16, float16, torch.float8_e4m3fn, torch.float8_e5m2)
    },
    **{
        f"{step.__name__} {dtype}": (
            step,
            lambda n, dtype=dtype: (torch.randn(n).to(dtype), torch.zeros(n, dtype=dtype), torch.randn(n).to(dtype)),
        )
        for step in (narrow, many_operators)
        for dtype in (bfloat16, float16)
    },
    "twice": (twice, lambda n: (torch.randn(n), torch.randn(n), torch.randn(n))),
}


def all_steps(state: dict[str, Any], grads: dict[str, Tensor]) -> dict[str, Any]:
    return {name: step(*state[name], grads[name]) for name, (step, _) in STEPS.items()}


@pytest.mark.codegen
@pytest.mark.parametrize("by", ["optfn", "dynamo"])
def test_what_is_rounded_on_purpose_stays_rounded(by: str) -> None:
    """A hundred steps give the bits of the eager ones, in vectors and in what is left over of them."""
    given = {name: make(1003) for name, (_, make) in STEPS.items()}
    state = {name: (p, c) for name, (p, c, _) in given.items()}
    expected = optfn.tree.map(torch.clone, state)
    grads = {name: g for name, (*_, g) in given.items()}
    step = optfn.compile(all_steps, donate="state", backend="optfn" if by == "optfn" else regions_backend)
    for _ in range(100):
        expected, state = all_steps(expected, grads), step(state, grads)
        grads = optfn.tree.map(lambda g: -0.9 * g.roll(1), grads)
    for name in STEPS:
        for x, y in zip(state[name], expected[name], strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y), (name, (x != y).float().mean())


def test_casts_are_kept_only_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx, config

    kept: list[bool] = []

    def compile_region(module: Any, inputs: Any, **_: Any) -> Any:
        kept.append(config.emulate_precision_casts)
        return lambda values: module(*values)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compile_region)
    for dtype in (torch.float32, torch.float64, bfloat16, float16):
        optfn.compile(lambda p: p * 2, donate="p")(torch.ones(3, dtype=dtype))
    assert kept == [False, False, True, True]
    assert not config.emulate_precision_casts


# Threads

THREADS = """
import threading, torch, optfn
from torch._inductor.async_compile import AsyncCompile
wait, own = AsyncCompile.wait, AsyncCompile.__dict__["wait"]
barrier = threading.Barrier({count} + 1)
failed = []

def shared(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optfn.apply_updates(params, updates), state

tx = optfn.adamw(0.1)
step = optfn.compile(shared, donate=("params", "state"))

def train(seed):
    draw = torch.Generator().manual_seed(seed)
    for n in (seed + 2, 5):
        params = {{"a": torch.randn(n, 3, generator=draw), "b": torch.randn(n, generator=draw)}}
        expected = optfn.tree.map(torch.clone, params), tx.init(params)
        state = tx.init(params)
        mine = step if n == 5 else optfn.compile(lambda p, s, g: shared(p, s, g), donate=(0, 1))
        for i in range(3):
            grads = optfn.tree.map(lambda p: torch.randn(p.shape, generator=draw), params)
            expected = shared(*expected, grads)
            params, state = mine(params, state, grads)
        for x, y in zip(optfn.tree.leaves((params, state)), optfn.tree.leaves(expected)):
            torch.testing.assert_close(x, y)

def plain():
    for n in range(2, 6):
        x = torch.randn(n, 7)
        torch.testing.assert_close(torch.compile(lambda x: (x.sin() * n).sum(1), dynamic=False)(x), (x.sin() * n).sum(1))

def run(work, *args):
    barrier.wait()
    try:
        work(*args)
        assert AsyncCompile.wait is wait and AsyncCompile.__dict__["wait"] is own
    except BaseException as error:
        failed.append(repr(error))

threads = [threading.Thread(target=run, args=(train, i)) for i in range({count})] + [threading.Thread(target=run, args=(plain,))]
for t in threads: t.start()
for t in threads: t.join()
assert not failed, failed
plain()
assert AsyncCompile.wait is wait
print("done")
"""


@pytest.mark.codegen
def test_threads_compile_at_once() -> None:
    """Four with steps of their own and one that they share, beside plain torch.compile, which works on afterwards."""
    program = THREADS.format(count=4)
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.endswith("done\n")


FORK = """
import os, torch, optfn

def compiled(k):
    p = torch.ones(5)
    assert optfn.compile(lambda p: p * k, donate="p")(p).tolist() == [k] * 5
    x = torch.randn(5)
    torch.testing.assert_close(torch.compile(lambda x: x.sin() * k, backend=backend)(x), x.sin() * k)

from optfn.compile.backend import backend
compiled(2)
child = os.fork()
if not child:
    compiled(3)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.codegen
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_compiles() -> None:
    """Torch's own compile waits forever there, for threads that the child does not have."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["7"]
