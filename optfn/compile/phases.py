"""What of a graph is a scalar, what a tensor and what is called, and in which order the three alternate."""

import operator
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.fx
from torch import Tensor
from torch.fx import Node

from optfn.compile.branches import is_collective
from optfn.compile.failing import called_first

__all__ = ["Kind", "Phases", "is_write", "model_of", "phases_of"]

Kind = Literal["input", "free", "called", "tensor", "scalar", "row", "pack"]
_TURNS = ("called", "tensor", "scalar")


class Phases(NamedTuple):
    """Kind and phase of every node.

    Attributes:
        kind: ``"input"``, a placeholder; ``"free"``, made of nothing, or a view of an input: copied to wherever it is used;
            ``"called"``, what is ATen's own, because it may fail; ``"scalar"`` and ``"tensor"``. What
            :mod:`optfn.compile.scalars` adds: ``"row"``, an entry of a vector of scalars; ``"pack"``, a vector of results
            of tensor nodes.
        phase: the kinds take turns: called, tensor, scalar, and again. A node is computed after all phases below its own; what an
            operator with several results gives is in its phase. All that may fail comes before the first write. Calls in which
            processes wait for each other stay in the order of the graph, which is the same on all of them.
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
    called = called_first(graph)
    model = model_of(graph) - called
    model.update(n for n in calls if n.target is operator.getitem and n.args[0] in model)
    kind: dict[Node, Kind] = {n: "input" for n in nodes if n.op == "placeholder"}
    small = {n: _entries(n) for n in kind if _is_small_input(n)}
    for n in calls:
        inputs = n.all_input_nodes
        modest = bool(inputs) and all(a in small for a in inputs) and _entries(n) <= sum(small[a] for a in inputs)
        if n not in results and _is_view_or_new(n, kind) and all(kind[a] in ("input", "free") for a in inputs):
            kind[n] = "free"
        elif n in called:
            kind[n] = "called"
        elif n in model:
            kind[n] = "tensor"
        elif _is_item(n, kind):
            kind[n] = kind[inputs[0]]
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
    if not products or any(is_collective(n.target) for n in calls):
        return set()  # a model that lies on several processes calls operators of its own, and is not traced
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


def _after(phase: int, kind: Kind) -> int:
    """The first phase of a kind that is not before this one."""
    return phase + (_TURNS.index(kind) - phase) % len(_TURNS)


def _before(phase: int, kind: Kind) -> int:
    """The last phase of a kind that is not after this one."""
    return phase - (phase - _TURNS.index(kind)) % len(_TURNS)


def _phases(calls: list[Node], kind: dict[Node, Kind], model: set[Node]) -> dict[Node, int]:
    phase: dict[Node, int] = {}
    one_by_one = [n for n in calls if is_collective(n.target)]
    before: dict[Node, Node] = dict(zip(one_by_one[1:], one_by_one, strict=False))
    readers: dict[Node, list[Node]] = {}  # of an input, through views of it
    roots: dict[Node, set[Node]] = {n: {n} for n, k in kind.items() if k == "input"}
    for n in calls:
        below = {root for a in n.all_input_nodes for root in roots.get(a, ())}
        if kind[n] == "free":
            roots[n] = below
            continue
        for root in below:
            readers.setdefault(root, []).append(n)
        phase[n] = _earliest(n, kind, phase, before)
    together = _keep_together(calls, kind, phase, model)
    for n in calls:
        if n in phase and n not in together:
            phase[n] = _earliest(n, kind, phase, before)

    writes = [n for n in calls if is_write(n)]
    failed = max((phase[n] for n in phase if kind[n] == "called"), default=0)

    def after_readers(n: Node) -> int:
        """What is overwritten has been read, and nothing fails any more."""
        target: Any = n.args[0]
        return max([_after(failed, kind[n]), phase[n], *(_after(phase[r], kind[n]) for r in readers[target] if r is not n)])

    last = max((phase[n] for n in phase if kind[n] == "tensor"), default=_after(0, "tensor"))
    last = max([last, *(after_readers(n) for n in writes if kind[n] == "tensor")])
    scalars = {phase[n] for n in phase if kind[n] == "scalar"}
    computed: set[Node] = set()  # what depends on a tensor that is computed
    for n in calls:
        if kind[n] == "tensor" or not computed.isdisjoint(n.all_input_nodes):
            computed.add(n)
    for n in reversed(calls):
        if n not in phase or n in model or _is_item(n, kind):
            continue
        items = [u for u in n.users if _is_item(u, kind)]
        users = [u for of in (n, *items) for u in of.users if u in phase and u not in items]
        if kind[n] == "tensor":
            phase[n] = min((_before(phase[u], "tensor") for u in users), default=last)
        elif n in computed and kind[n] == "scalar" and not is_write(n):
            latest = min((_before(phase[u], "scalar") for u in users), default=phase[n])
            phase[n] = max(p for p in scalars if p <= max(latest, phase[n]))
        phase.update(dict.fromkeys(items, phase[n]))
    for n in writes:
        phase[n] = after_readers(n)
    return phase


def _is_item(n: Node, kind: dict[Node, Kind]) -> bool:
    """Whether a node is one result of an operator that has several; it stays with that operator."""
    return n.target is operator.getitem and kind[n.all_input_nodes[0]] != "free"


def _earliest(n: Node, kind: dict[Node, Kind], phase: dict[Node, int], before: dict[Node, Node]) -> int:
    return _after(max((phase[a] for a in (*n.all_input_nodes, before.get(n)) if a in phase), default=0), kind[n])


def _keep_together(calls: list[Node], kind: dict[Node, Kind], phase: dict[Node, int], model: set[Node]) -> set[Node]:
    """Put the nodes of a model in its last phase, but for those that a call in between needs.

    Returns:
        The nodes of the model, and what they need.
    """
    last = max((phase[n] for n in model if n in phase), default=0)
    needed: set[Node] = set()
    for n in reversed(calls):
        if n in model or n in needed:
            users = [u for u in n.users if u in needed and u in phase]
            if n in model and n in phase:
                phase[n] = min([last, *(_before(phase[u], "tensor") for u in users)])
                phase.update({u: phase[n] for u in n.users if _is_item(u, kind)})
            needed.add(n)
            needed.update(a for a in n.all_input_nodes if a in kind)
    return needed


def _entries(n: Node) -> int:
    value = n.meta["val"]
    values = value if isinstance(value, tuple | list) else [value]
    return sum(x.numel() for x in values if isinstance(x, Tensor))


def _is_small_input(n: Node) -> bool:
    """0-dim, or a vector of counts."""
    x = n.meta["val"]
    return isinstance(x, Tensor) and (x.ndim == 0 or (x.ndim == 1 and not x.is_floating_point() and not x.is_complex()))


def _is_view_or_new(n: Node, kind: dict[Node, Kind]) -> bool:
    if n.target is operator.getitem:
        return kind[n.all_input_nodes[0]] == "free"
    return not n.all_input_nodes or bool(getattr(n.target, "is_view", False))
