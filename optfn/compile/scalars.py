"""Scalars of which each leaf has its own, computed as one vector.

The lift keeps one count a leaf, and a rule computes with the count of its leaf: hundreds of chains of 0-dim nodes that
do the same to the entries of one vector. Written as calls on the vector they are a handful. The norms of all leaves,
which tensor nodes give one by one, are stacked to a vector for the same end.
"""

import operator
from typing import Any

import torch
import torch.fx
from torch.fx import Graph, Node

from optfn.compile.phases import Phases

__all__ = ["together"]

aten = torch.ops.aten


def together(graph: Graph, phases: Phases) -> tuple[Graph, Phases]:
    """The same graph in the order of its phases, with one node for scalar nodes that do the same to the entries of one vector.

    An elementwise operator gives the same for a vector as for each entry; a node is left alone where it would not, because the
    dtypes of 0-dim tensors and of vectors are promoted differently.
    """
    return _Rewriter(graph, phases).run()


class _Rewriter:
    def __init__(self, graph: Graph, old: Phases) -> None:
        self.nodes = list(graph.nodes)
        self.old = old
        self.graph = Graph()
        self.new = Phases({}, {}, set())
        self.copies: dict[Node, Node] = {}  # of old nodes
        self.rows: dict[Node, tuple[Node, int]] = {}  # old 0-dim nodes: which entry of which new vector they are
        self.slices: dict[Node, tuple[Node, int]] = {}  # the same for old vectors of one entry
        self.known: dict[Any, Node] = {}

    def run(self) -> tuple[Graph, Phases]:
        kind, phase, _ = self.old
        for n in self.nodes:
            if n.op == "placeholder" or kind.get(n) == "free":
                self.copies[n] = self.graph.node_copy(n, self.copies.__getitem__)
                self.new.kind[self.copies[n]] = kind[n]
        by_phase: dict[int, list[Node]] = {}
        for n in self.nodes:
            if n in phase:
                by_phase.setdefault(phase[n], []).append(n)
        for p in sorted(by_phase):
            for n in by_phase[p]:
                if kind[n] == "scalar":
                    self.scalar(n)
                else:
                    self.copy(n)
            self.pack([n for n in by_phase[p] if kind[n] == "tensor" and self.feeds_scalars(n)], p)
        for n in self.nodes:
            if n.op == "output":
                self.graph.output(torch.fx.map_arg(n.args[0], self.entry))
        return self.graph, self.new

    def add(self, node: Node, kind: Any, phase: int) -> Node:
        self.new.kind[node], self.new.phase[node] = kind, phase
        return node

    def call(self, target: Any, args: Any, kwargs: Any, value: Any, kind: Any, phase: int) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        return self.add(node, kind, phase)

    def copy(self, n: Node) -> None:
        read = self.row if self.old.kind[n] == "tensor" else self.entry
        self.copies[n] = self.add(self.graph.node_copy(n, read), self.old.kind[n], self.old.phase[n])
        if n in self.old.model:
            self.new.model.add(self.copies[n])

    def feeds_scalars(self, n: Node) -> bool:
        return any(self.old.kind.get(u) == "scalar" for u in n.users) and getattr(n.meta["val"], "ndim", None) == 0

    def pack(self, found: list[Node], phase: int) -> None:
        """Results of tensor nodes as one vector."""
        kinds: dict[Any, list[Node]] = {}
        for n in found:
            kinds.setdefault((n.meta["val"].dtype, n.meta["val"].device), []).append(n)
        for members in kinds.values():
            if len(members) > 1:
                value = members[0].meta["val"].new_empty(len(members))
                vector = self.call(aten.stack.default, ([self.copies[n] for n in members],), {}, value, "pack", phase + 1)
                self.rows.update({n: (vector, i) for i, n in enumerate(members)})

    def row(self, n: Node) -> Node:
        """What a tensor node reads for an old node."""
        if n in self.copies or n in self.slices:
            return self.entry(n)
        vector, i = self.rows[n]
        if (vector, i) not in self.known:
            value = vector.meta["val"].new_empty(())
            self.known[vector, i] = self.call(aten.select.int, (vector, 0, i), {}, value, "row", self.new.phase[vector] + 1)
        return self.known[vector, i]

    def entry(self, n: Node) -> Node:
        """What a scalar node, or the output, reads for an old node."""
        if n not in self.copies:
            (vector, i), several = (self.rows[n], False) if n in self.rows else (self.slices[n], True)
            key = (vector, i, several)
            if key not in self.known:
                value, phase = vector.meta["val"], self.new.phase.get(vector, 1)
                node = self.call(aten.select.int, (vector, 0, i), {}, value.new_empty(()), "scalar", phase)
                if several:
                    node = self.call(aten.unsqueeze.default, (node, 0), {}, value.new_empty(1), "scalar", phase)
                self.known[key] = node
            return self.known[key]
        return self.copies[n]

    def scalar(self, n: Node) -> None:
        args: Any = n.args
        if self.takes_apart(n) and all(u.target is operator.getitem for u in n.users):
            return
        if n.target is operator.getitem and self.takes_apart(args[0]):
            self.rows[n] = (self.copies[args[0].args[0]], args[1])
        elif n.target is aten.unsqueeze.default and args[0] in self.rows:
            self.slices[n] = self.rows[args[0]]
        elif n.target is aten.cat.default and (vector := self.whole(args[0])) is not None:
            self.copies[n] = vector
        elif (vector := self.vector(n)) is not None:
            self.rows[n] = vector
        else:
            self.copy(n)

    def takes_apart(self, n: Node) -> bool:
        """Whether a node gives the entries of a vector."""
        args: Any = n.args
        return n.target is aten.unbind.int and args[0] in self.copies and args[0].meta["val"].ndim == 1

    def whole(self, parts: list[Node]) -> Node | None:
        """The vector of which these are all entries, in order."""
        found = [self.slices.get(a) for a in parts]
        vector = found[0][0] if found[0] else None
        if vector is None or len(parts) != len(vector.meta["val"]) or found != [(vector, i) for i in range(len(parts))]:
            return None
        return vector

    def vector(self, n: Node) -> tuple[Node, int] | None:
        """An elementwise node on entries of vectors, as one on the vectors."""
        inputs = n.all_input_nodes
        found = [self.rows[a] for a in inputs if a in self.rows]
        if not found or torch.Tag.pointwise not in getattr(n.target, "tags", ()) or n.meta["val"].ndim:
            return None
        i, size = found[0][1], len(found[0][0].meta["val"])
        if any(j != i or len(v.meta["val"]) != size for v, j in found):
            return None

        def whole(a: Node) -> Node:
            return self.rows[a][0] if a in self.rows else self.entry(a)

        args, kwargs = torch.fx.map_arg(n.args, whole), torch.fx.map_arg(n.kwargs, whole)
        key = (n.target, repr(args), repr(kwargs))
        if key not in self.known:
            values = torch.fx.map_arg((args, kwargs), lambda a: a.meta["val"])
            with n.meta["val"].fake_mode:
                target: Any = n.target
                value = target(*values[0], **values[1])
            if value.dtype != n.meta["val"].dtype:
                return None
            self.known[key] = self.call(n.target, args, kwargs, value, "scalar", self.old.phase[n])
        return self.known[key], i
