"""How a step is taken apart: the same values whatever the graph, and as few distinct regions as there are distinct leaves."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreted import interpreted
from torch import Tensor

import optfn


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def copies(of: Any) -> Any:
    return optfn.tree.map(lambda x: x.detach().clone(), of)


def same(got: Any, wanted: Any) -> None:
    for path, x, y in zip(optfn.tree.paths(wanted), optfn.tree.leaves(got), optfn.tree.leaves(wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, msg=lambda text, path=path: f"{path}: {text}")


# Random programs

UNARY: tuple[Callable[[Tensor], Tensor], ...] = (
    *(torch.sin, torch.neg, torch.abs, lambda x: x + 1, lambda x: x * 0.5, lambda x: x.clone()),
    *(torch.sum, torch.linalg.vector_norm, torch.amax, lambda x: x.sum(-1) if x.ndim else x),
    *(lambda x: x.t() if x.ndim == 2 else x, lambda x: x.flip(0) if x.ndim else x, lambda x: x[0] if x.ndim else x),
    *(lambda x: x[..., None].expand(*x.shape, 3)[..., 1], lambda x: x.cumsum(0) if x.ndim else x),
    *(torch.zeros_like, lambda x: x.clone().mul_(2).add_(x), lambda x: x.reshape(-1).view(x.shape)),
)
BINARY: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    *(torch.add, torch.mul, torch.sub, lambda x, y: torch.where(x > y, x, y), lambda x, y: x.lerp(y, 0.3)),
    *(lambda x, y: x * y.sum(), lambda x, y: x + y.flatten()[0], lambda x, y: torch.stack([x.sum(), y.sum()]).norm() + x),
)
SHAPES = ((3, 3), (3, 3), (3, 3), (3,), (3,), (), (), ())


def program_of(calls: Any, chosen: Any) -> Callable[[list[Tensor]], Any]:
    """A pure function of tensors of ``SHAPES`` to tensors of these shapes, and two more results."""

    def fn(tensors: list[Tensor]) -> Any:
        values = [*tensors, torch.arange(3.0, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)]
        entries = values[3].unbind()
        values += [x * 0.9 - 1 for x in entries]
        for which, i, j in calls:
            x, y = values[i % len(values)], values[j % len(values)]
            if which < len(UNARY):
                values.append(UNARY[which](x))
            else:
                y = y if y.shape == x.shape else y.sum()
                values.append(BINARY[which - len(UNARY)](x, y))
        new = []
        for shape, i in zip(SHAPES, chosen, strict=False):
            fitting = [v for v in values if v.shape == shape]
            new.append(fitting[-1 - i % len(fitting)])
        return new, [values[i % len(values)] for i in chosen[len(SHAPES) :]]

    return fn


@pytest.mark.parametrize("seed", range(200))
def test_any_program_taken_apart_gives_the_same(seed: int) -> None:
    """Views, swaps, values that are read after they have been replaced, scalars of tensors of scalars."""
    draw = random.Random(seed).randrange
    calls = tuple((draw(len(UNARY) + len(BINARY)), draw(60), draw(60)) for _ in range(draw(1, 25)))
    fn = program_of(calls, tuple(draw(60) for _ in range(len(SHAPES) + 2)))
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    with interpreted():
        step = optfn.compile(fn, donate="tensors")
        for _ in range(2):
            expected = copies(fn(copies(tensors)))
            new, more = step(tensors)
            same((new, more), expected)
            assert all(x is y for x, y in zip(new, tensors, strict=True))
            tensors = [x.copy_(torch.tanh(x)) for x in new]
    assert step._calls.calls[0].program is not None
