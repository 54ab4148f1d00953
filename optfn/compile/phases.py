"""What of a graph is a scalar and what a tensor, and in which order the two alternate."""

import operator
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.fx
from torch import Tensor
from torch.fx import Node

__all__ = ["Kind", "Phases", "is_write", "model_of", "phases_of"]

Kind = Literal["input", "free", "scalar", "tensor", "row", "pack"]


class Phases(NamedTuple):
    """Kind and phase of every node.

    Attributes:
        kind: ``"input"``, a placeholder; ``"free"``, made of nothing, or a view of an input: copied to wherever it is used;
            ``"scalar"`` and ``"tensor"``. What :mod:`optfn.compile.scalars` adds: ``"row"``, an entry of a vector of
            scalars; ``"pack"``, a vector of results of tensor nodes.
        phase: even for tensor nodes, odd for scalar ones; a node is computed after all phases below its own.
        model: nodes that stay together, as :func:`model_of` gives them.
    """

    kind: dict[Node, Kind]
    phase: dict[Node, int]
    model: set[Node]


def is_write(node: Node) -> bool:
    """Whether a node writes its second argument into its first, an input."""
    return node.target is torch.ops.aten.copy_.default


def phases_of(graph: torch.fx.Graph) -> Phases:
    """Tell scalars from tensors and put every node in its phase."""
    nodes = list(graph.nodes)
    calls = [n for n in nodes if n.op == "call_function"]
    results = {a for n in nodes if n.op == "output" for a in n.all_input_nodes}
    model = model_of(graph)
    kind: dict[Node, Kind] = {n: "input" for n in nodes if n.op == "placeholder"}
    small = {n: _entries(n) for n in kind if _is_small_input(n)}
    for n in calls:
        inputs = n.all_input_nodes
        modest = bool(inputs) and all(a in small for a in inputs) and _entries(n) <= sum(small[a] for a in inputs)
        if n in model:
            kind[n] = "tensor"
        elif n not in results and _is_view_or_new(n, kind) and all(kind[a] in ("input", "free") for a in inputs):
            kind[n] = "free"
        else:
            kind[n] = "scalar" if modest else "tensor"
        if (modest and kind[n] != "tensor") or getattr(n.meta["val"], "ndim", None) == 0:
            small[n] = _entries(n)
    return Phases(kind, _phases(calls, kind, model), model)


def model_of(graph: torch.fx.Graph) -> set[Node]:
    """Forward and backward pass of a model in the graph; empty where there is none.

    They are not taken apart: Inductor plans them as a whole. A graph has a model if most of it hangs together, products of matrices
    included; the model is what these products and the gradients that are sums need.
    """
    calls = [n for n in graph.nodes if n.op == "call_function"]
    products = [n for n in calls if _name(n) in _PRODUCTS]
    if not products:
        return set()
    tensors = [n for n in calls if not (isinstance(n.meta.get("val"), Tensor) and n.meta["val"].ndim == 0)]
    together = max(connected(tensors, lambda n: n.all_input_nodes), key=len)
    if 2 * len(together) <= len(tensors) or not any(n in together for n in products):
        return set()
    below: set[Node] = set()  # what depends on a product
    for n in calls:
        if n in products or any(a in below for a in n.all_input_nodes):
            below.add(n)
    ends = [n for n in tensors if n in below and (n in products or torch.Tag.reduction in getattr(n.target, "tags", ()))]
    model = set(ends)
    for n in reversed(calls):
        if n in model:
            model.update(a for a in n.all_input_nodes if a.op == "call_function")
    return model


_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "embedding", "embedding_dense_backward"}


def _name(n: Node) -> str:
    return getattr(getattr(n.target, "overloadpacket", None), "__name__", "")


def connected(nodes: list[Node], neighbours: Callable[[Node], Iterable[Any]]) -> list[list[Node]]:
    """The nodes in groups, each in order, such that neighbours are in one group; a neighbour may be anything that several share."""
    parent: dict[Any, Any] = {n: n for n in nodes}
    inside = set(nodes)

    def root(n: Any) -> Any:
        while parent[n] is not n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    for n in nodes:
        for a in neighbours(n):
            if a in inside or not isinstance(a, Node):
                parent[root(parent.setdefault(a, a))] = root(n)
    found: dict[Any, list[Node]] = {}
    for n in nodes:
        found.setdefault(root(n), []).append(n)
    return list(found.values())


def _phases(calls: list[Node], kind: dict[Node, Kind], model: set[Node]) -> dict[Node, int]:
    phase: dict[Node, int] = {}
    readers: dict[Node, list[Node]] = {}  # of an input, through views of it
    roots: dict[Node, set[Node]] = {n: {n} for n, k in kind.items() if k == "input"}
    for n in calls:
        below = {root for a in n.all_input_nodes for root in roots.get(a, ())}
        if kind[n] == "free":
            roots[n] = below
            continue
        for root in below:
            readers.setdefault(root, []).append(n)
        known = [phase[a] + (kind[a] != kind[n]) for a in n.all_input_nodes if a in phase]
        phase[n] = max(known, default=0 if kind[n] == "tensor" else 1)

    writes = [n for n in calls if is_write(n)]

    def after_readers(n: Node) -> int:
        """What is overwritten has been read."""
        target: Any = n.args[0]
        return max([phase[n], *(phase[r] + (kind[r] != kind[n]) for r in readers[target] if r is not n)])

    last = max((phase[n] for n in phase if kind[n] == "tensor"), default=0)
    last = max([last, *(after_readers(n) for n in writes if kind[n] == "tensor")])
    for n in reversed(calls):
        if kind[n] == "tensor" and n not in model:
            users = [u for u in n.users if u in phase]
            phase[n] = min((phase[u] - (kind[u] == "scalar") for u in users), default=last)
    for n in writes:
        if kind[n] == "scalar":
            phase[n] = after_readers(n)
    return phase


def _entries(n: Node) -> int:
    value = n.meta["val"]
    return sum(x.numel() for x in value) if isinstance(value, tuple | list) else value.numel()


def _is_small_input(n: Node) -> bool:
    """0-dim, or a vector of counts."""
    x = n.meta["val"]
    return isinstance(x, Tensor) and (x.ndim == 0 or (x.ndim == 1 and not x.is_floating_point() and not x.is_complex()))


def _is_view_or_new(n: Node, kind: dict[Node, Kind]) -> bool:
    if n.target is operator.getitem:
        return kind[n.all_input_nodes[0]] == "free"
    return not n.all_input_nodes or bool(getattr(n.target, "is_view", False))
