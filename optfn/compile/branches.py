"""What only one of two branches needs, computed when that branch is taken.

:func:`optfn.tree.cond` writes down both branches and selects: ``where(decides(pred), x, y)``. Here the calls that nothing but ``x``
needs become one call, made where ``pred`` holds, and those that nothing but ``y`` needs one that is made where it does not.
"""

import itertools
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from optfn.compile.internals import is_collective_operator, is_computed

__all__ = ["Branch", "is_collective", "take_branches"]

aten = torch.ops.aten
_count = itertools.count()


class Branch:
    """One of two graphs, chosen by the first argument; the others are handed to both.

    What it gives is in memory of its own.

    Attributes:
        graphs: the two.
    """

    def __init__(self, taken: Graph, otherwise: Graph) -> None:
        self.graphs = taken, otherwise
        self.sides = [GraphModule({}, graph).forward for graph in self.graphs]
        results: list[Any] = [next(n for n in graph.nodes if n.op == "output").args[0] for graph in (taken, otherwise)]
        self.own = [[_is_own(given, i) for i in range(len(given))] for given in results]
        self.__name__ = f"branch_{next(_count)}"  # by which two of them differ

    def __call__(self, pred: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the side that ``pred`` decides for gives."""
        side = 0 if pred else 1
        results = self.sides[side](*inputs)
        return tuple(x if own else x.clone() for x, own in zip(results, self.own[side], strict=True))

    def __repr__(self) -> str:
        return self.__name__


def is_collective(target: Any) -> bool:
    """Whether processes wait for each other in a call: all of them must make such calls, in one order."""
    if isinstance(target, Branch):
        return any(is_collective(n.target) for graph in target.graphs for n in graph.nodes)
    return is_collective_operator(target)


def take_branches(graph: Graph) -> None:
    """Let what :func:`optfn.tree.cond` selects between be computed only if it is taken."""
    place, ends = {n: i for i, n in enumerate(graph.nodes)}, _that_end(graph)
    while decides := next((n for n in graph.nodes if n.target is torch.ops.optfn.decides.default), None):
        selects = [n for n in decides.users if _selects(n, decides)]
        while selects:
            # One call can give all that is needed before the first of them is used.
            used = min((place[u] for n in selects[:1] for u in n.users), default=len(place))
            together = []
            for n in selects:
                if max(place[a] for a in n.all_input_nodes) > used:
                    break
                together.append(n)
                used = min([used, *(place[u] for u in n.users)])
            selects = selects[len(together) :]
            _take(graph, decides, together, place, ends)
        decides.replace_all_uses_with(decides.args[0])  # type: ignore[arg-type]
        graph.erase_node(decides)


def _selects(n: Node, decides: Node) -> bool:
    """Whether a node is one of two values of its own kind, as the predicate says."""
    if n.target is not aten.where.self or n.args[0] is not decides:
        return False
    sides = [a.meta["val"] for a in n.args[1:] if isinstance(a, Node)]
    value = n.meta["val"]
    return len(sides) == 2 and all((x.shape, x.dtype, x.device) == (value.shape, value.dtype, value.device) for x in sides)


def _take(graph: Graph, decides: Node, selects: list[Node], place: dict[Node, int], ends: set[Node]) -> None:
    alone = [_alone(decides, selects, side, place, ends) for side in (1, 2)]
    if not any(alone) or {*alone[0]}.intersection(alone[1]):
        return  # there is nothing to save
    results: list[list[Any]] = [[n.args[side] for n in selects] for side in (1, 2)]
    reads = [
        dict.fromkeys(a for a in (*given, *(a for n in nodes for a in n.all_input_nodes)) if a not in {*nodes})
        for nodes, given in zip(alone, results, strict=True)
    ]
    inputs = list(reads[0] | reads[1])
    sides = [_side(inputs, nodes, given) for nodes, given in zip(alone, results, strict=True)]
    with graph.inserting_after(max((a for n in selects for a in n.all_input_nodes), key=place.__getitem__)):
        after = branch = graph.call_function(Branch(*sides), (decides, *inputs))
    branch.meta["val"] = tuple(n.meta["val"] for n in selects)
    place[branch] = place[selects[0]]
    for i, n in enumerate(selects):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (branch, i))
        after.meta["val"] = n.meta["val"]
        place[after] = place[selects[0]]
        n.replace_all_uses_with(after)
    for n in (*selects, *reversed(alone[0]), *reversed(alone[1])):
        graph.erase_node(n)


def _alone(decides: Node, selects: list[Node], side: int, place: dict[Node, int], ends: set[Node]) -> list[Node]:
    """The calls that nothing needs but one side of the selections, and the checks of what they give.

    A call in which processes wait for each other is one of them only if it was written there: one that stands before the predicate
    is made whatever is taken, on a process that takes the step as it is too.
    """
    found: set[Node] = set()
    checks: set[Node] = set()
    waiting = [n.args[side] for n in selects]
    while waiting:
        n: Any = waiting.pop()
        needed = all(u in found or u in ends or _only(u, selects, n, side) for u in n.users)
        outside = is_collective(n.target) and place[n] < place[decides]
        if n.op == "call_function" and n not in found and needed and not outside:
            found.add(n)
            checks |= ends.intersection(n.users)
            waiting += n.all_input_nodes
    while checks:
        n = checks.pop()
        found.add(n)
        checks.update(n.users)
    return sorted(found, key=place.__getitem__)


def _only(u: Node, selects: list[Node], n: Node, side: int) -> bool:
    """Whether what uses a node is one of the selections, on that side alone."""
    return u in selects and [i for i, a in enumerate(u.args) if a is n] == [side]


def _that_end(graph: Graph) -> set[Node]:
    """The checks, and what leads to nothing else."""
    found: set[Node] = set()
    for n in reversed(graph.nodes):
        if n.op == "call_function" and n.target is not aten.copy_.default and all(u in found for u in n.users):
            found.add(n)
    return found


def _side(inputs: list[Node], nodes: list[Node], results: list[Any]) -> Graph:
    graph = Graph()
    env = {n: graph.placeholder(f"arg{i}") for i, n in enumerate(inputs)}
    for n, copy in env.items():
        copy.meta["val"] = n.meta["val"]
    for n in nodes:
        env[n] = graph.node_copy(n, env.__getitem__)
    graph.output(tuple(env[n] for n in results))
    take_branches(graph)  # within this one
    return graph


def _is_own(results: list[Any], i: int) -> bool:
    """Whether a result is in memory of its own: computed, no view, and not given twice."""
    n = results[i].args[0] if results[i].target is operator.getitem else results[i]
    return is_computed(n.target) and results[i] not in results[:i]
