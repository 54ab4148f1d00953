"""What generated code saves, and what it costs to make."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

__all__ = ["Work", "not_worth", "work_of"]

# Of two cores of a desktop, roughly: what is compared differs by far more than they do.
_BYTES_PER_SECOND = 1e10
_PRODUCTS_PER_SECOND = 2e10
_SECONDS_PER_CALL = 2e-6
# Calls of which code is generated whatever it saves: it takes some 20 ms for each.
_ALWAYS = 600
# The part of a step's time that is given up to generate less.
_GIVEN_UP = 0.04


class Work(NamedTuple):
    """The time of what is done together, in seconds.

    Attributes:
        called: each operator by itself.
        generated: as one piece of code, which reads and writes everything once.
        products: of both, what products of matrices and convolutions take.
        calls: how many operators.
    """

    called: float
    generated: float
    products: float
    calls: int


def work_of(nodes: Iterable[Node], moved: int) -> Work:
    """The work of nodes that are generated together.

    Args:
        nodes: calls.
        moved: bytes that go in and out of them all, at least.
    """
    called = products = 0.0
    calls = 0
    for n in nodes:
        target: Any = n.target
        if not isinstance(n.meta["val"], Tensor) or getattr(target, "is_view", False) or target is torch.ops.optfn.copy.default:
            continue
        calls += 1
        count = _products(n)
        products += count / _PRODUCTS_PER_SECOND
        if not count:
            called += _SECONDS_PER_CALL + sum(_bytes(a) for a in (n, *n.all_input_nodes)) / _BYTES_PER_SECOND
    return Work(called + products, moved / _BYTES_PER_SECOND + products, products, calls)


def not_worth(found: dict[Any, tuple[Work, int]]) -> set[Any]:
    """Of different pieces of work, each done so many times in a step, those that are as well called.

    What is nearly all products is called: these are calls in generated code too. Of the rest few pieces are generated, all of
    them. Of many, those are left out that save the least for what they cost, as long as all that is lost by it is a small part
    of the step.
    """

    def saved(key: Any) -> float:
        work, times = found[key]
        return times * max(work.called - work.generated, 0.0)

    step = sum(times * work.generated for work, times in found.values())
    called = {
        key for key, (work, _) in found.items() if work.products > 0.5 * work.generated and work.called < 1.05 * work.generated
    }
    rest = found.keys() - called
    left = sum(found[key][0].calls for key in rest)
    lost = 0.0
    for key in sorted(rest, key=lambda key: saved(key) / max(found[key][0].calls, 1)):
        lost += saved(key)
        if left <= _ALWAYS or lost > _GIVEN_UP * step:
            break
        left -= found[key][0].calls
        called.add(key)
    return called


def _products(n: Node) -> int:
    """Multiplications and additions of a product of matrices or a convolution."""
    name = getattr(getattr(n.target, "overloadpacket", None), "__name__", "")
    args: Any = n.args
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        factor = args[1 if name.startswith(("add", "badd")) else 0]
        return 2 * n.meta["val"].numel() * factor.meta["val"].shape[-1]
    if name == "convolution":
        return 2 * n.meta["val"].numel() * args[1].meta["val"][0].numel()
    return 0


def _bytes(n: Node) -> int:
    x = n.meta["val"]
    return x.numel() * x.element_size() if isinstance(x, Tensor) else 0
