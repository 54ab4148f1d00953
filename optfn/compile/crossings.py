"""What a later phase reads of an earlier one: as little as can be.

A trust ratio, or a step size from sums over all leaves, parts a step in two: one pass makes the sums, another uses them. What both
need would be written to new memory by the first and read back by the second: three passes over memory, as new memory has to be
cleared too. There are two ways to have less:

1. *Write early.* A value that replaces an input is written to that input where it is computed, if nothing reads the old one later;
   later phases read it there.
2. *Compute anew.* What is made by elementwise calls of what a later phase reads anyway, or nearly, is computed there once more.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from optfn.compile.phases import Phases, connected, is_write

__all__ = ["read_less"]

# A value that is kept for a later phase is written, read back, and its memory is new.
_KEPT = 3.0
# What one elementwise call costs, as a part of what it costs to read its result from memory.
_CALL = 0.1


def read_less(graph: Graph, phases: Phases) -> None:
    """Let later phases read inputs in the place of what earlier ones would have to keep for them.

    Calls that a phase computes once more stand ahead of all its own, in a graph whose order is that of its phases alone.
    """
    rewriter = _Rewriter(graph, phases)
    rewriter.write_early()
    for phase in sorted({p for n, p in phases.phase.items() if phases.kind[n] == "tensor"})[1:]:
        nodes = [n for n in graph.nodes if phases.phase.get(n) == phase]
        for group in connected(nodes, rewriter.neighbours):
            rewriter.compute_anew(group, phase)


class _Rewriter:
    def __init__(self, graph: Graph, phases: Phases) -> None:
        self.graph = graph
        self.kind, self.phase, self.model = phases
        self.place: dict[Node, float] = {n: i for i, n in enumerate(graph.nodes)}
        self.writes = {n.all_input_nodes[0]: n for n in graph.nodes if is_write(n)}  # to each input
        self.early: dict[Node, Node] = {}  # of values: the write after which an input holds them
        self.given = {a for n in graph.nodes if n.op == "output" for a in n.all_input_nodes}

    def write_early(self) -> None:
        failed = max((p for n, p in self.phase.items() if self.kind[n] == "called"), default=0)
        readers: dict[Node, int] = {}  # of each input: the last phase that reads it
        for n, p in self.phase.items():
            for x in self.roots(n.all_input_nodes[1:] if is_write(n) else n.all_input_nodes):
                readers[x] = max(readers.get(x, 0), p)
        for x, write in self.writes.items():
            copy = value = write.all_input_nodes[-1]
            if copy.target is torch.ops.optfn.copy.default and len(copy.users) == 1:
                value = copy.all_input_nodes[0]
            if not self.kind[write] == self.kind[value] == "tensor" or value in self.model:
                continue
            now = self.phase[value]
            # From there on nothing may fail, and the old value is not read.
            if not failed < now < self.phase[write] or readers.get(x, 0) > now or _memory(x) != _memory(value):
                continue
            self.phase[write] = self.phase[copy] = now
            write.meta["val"] = x.meta["val"]
            self.early.setdefault(value, write)
            for user in [u for u in value.users if self.kind.get(u) == "tensor" and self.phase[u] > now]:
                user.replace_input_with(value, self.early[value])

    def roots(self, nodes: Iterable[Node]) -> set[Node]:
        """The inputs among nodes, or behind views."""
        found: set[Node] = set()
        for a in nodes:
            found |= {a} if self.kind[a] == "input" else self.roots(a.all_input_nodes) if self.kind[a] == "free" else set()
        return found

    def neighbours(self, n: Node) -> list[Any]:
        """What a node reads in its phase, and what it shares with others that read it."""
        return [a if self.phase[a] == self.phase[n] else ("kept", a) for a in n.all_input_nodes if self.kind[a] == "tensor"]

    def compute_anew(self, group: list[Node], phase: int) -> None:
        """Make what connected nodes of a phase read of earlier ones there, where that costs less than to keep it."""
        if self.model.intersection(group) or not all(map(_is_loop, group)):
            return  # what is no loop over entries, such as a product of matrices, reads from memory
        read = {a for n in group for a in n.all_input_nodes if self.phase.get(a) != phase}
        kept = sorted((a for a in read if self.kind[a] == "tensor" and not is_write(a)), key=self.place.__getitem__)
        free = self.roots(read) | read.difference(kept)
        anew: dict[Node, Node] = {}
        for value in kept:
            made = self.made_of(value, phase, self.place[group[0]], anew)
            if made is None or self.cost(made, free) >= _KEPT * _bytes(value):
                free.add(value)
                continue
            free |= made.reads
            with self.graph.inserting_before(group[0]):
                for n in made.calls:
                    anew[n] = self.graph.node_copy(n, lambda a: anew.get(a) or self.early.get(a, a))
                    self.kind[anew[n]], self.phase[anew[n]], self.place[anew[n]] = "tensor", phase, self.place[n]
            for n in group:
                n.replace_input_with(value, anew[value])

    def made_of(self, value: Node, phase: int, place: float, anew: dict[Node, Node]) -> "_Made | None":
        """The elementwise calls that make a value, and what they read; None if that is not there any more."""
        calls: set[Node] = set()
        reads: set[Node] = set()
        left = [value]
        while left:
            a = left.pop()
            if a in anew or a in calls or self.kind[a] == "scalar":
                continue
            inputs = self.roots([a])
            if any((w := self.writes.get(x)) and (self.phase[w], self.place[w]) < (phase, place) for x in inputs):
                return None
            if inputs or self.kind[a] == "free":
                reads |= inputs
            elif a in self.early:
                reads.add(self.early[a])
            elif self.kind[a] == "tensor" and a not in self.model and (a is value or a not in self.given) and _is_elementwise(a):
                calls.add(a)
                left += a.all_input_nodes
            else:
                reads.add(a)
        return _Made(sorted(calls, key=self.place.__getitem__), reads) if value in calls else None

    def cost(self, made: "_Made", free: set[Node]) -> float:
        """What it costs to make a value in one more phase, which reads what is free anyway."""

        def read(a: Node) -> float:
            later = any(self.phase.get(u, 0) > self.phase[a] for u in a.users) if self.kind[a] == "tensor" else True
            return (1.0 if later or is_write(a) or a in self.given else _KEPT) * _bytes(a)

        return sum(map(read, made.reads - free)) + _CALL * sum(map(_work, made.calls))


class _Made(NamedTuple):
    calls: list[Node]
    reads: set[Node]


def _is_elementwise(n: Node) -> bool:
    tags = getattr(n.target, "tags", ())
    pure = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    return isinstance(n.meta["val"], Tensor) and (pure or bool(getattr(n.target, "is_view", False)))


def _is_loop(n: Node) -> bool:
    """Whether generated code computes a node in one loop with others."""
    copies = is_write(n) or n.target is torch.ops.optfn.copy.default
    return copies or _is_elementwise(n) or torch.Tag.reduction in getattr(n.target, "tags", ())


def _bytes(n: Node) -> int:
    x = n.meta["val"]
    return x.numel() * x.element_size()


def _work(n: Node) -> int:
    return 0 if getattr(n.target, "is_view", False) else _bytes(n)


def _memory(n: Node) -> Any:
    x = n.meta["val"]
    return x.shape, x.stride(), x.dtype, x.device
