"""A graph of tensor calls as a few distinct regions, each generated once and called as often as it occurs.

An update does the same to many leaves, and the leaves of a deep model are the same few over and over. The graph is taken apart so
that this shows:

1. *Scalars* (counts, bias corrections, norms, a rate) are computed apart from *tensors*. Compiled with the tensors, a scalar that
   every leaf reads is computed anew for every vector of every leaf, and makes the search for what to fuse quadratic.
2. Scalars and tensors alternate in *phases*: the norms of all gradients, the factor that they give, the updates. A tensor node is
   put in the latest phase that its users allow: put early, values would be written out to be read back. What would still have to
   be is written early to where it belongs, or computed twice (:mod:`optfn.compile.crossings`).
3. The tensor nodes of a phase fall into connected components, one a leaf where a rule is elementwise. Equal ones are dealt into
   equal *regions*, and each distinct region is compiled once.
4. What may fail is called, not generated, and all of it before anything is written (:mod:`optfn.compile.failing`).
5. Scalars of which each leaf has its own (:mod:`optfn.compile.scalars`) are one vector; a region is handed its part of it.

No math is changed: each region holds nodes of the graph.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from optfn.compile.branches import take_branches
from optfn.compile.costs import Work, not_worth, work_of
from optfn.compile.crossings import read_less
from optfn.compile.failing import check_indices
from optfn.compile.internals import KEEPS_ORDER, is_computed
from optfn.compile.phases import Phases, connected, is_write, phases_of
from optfn.compile.rewrites import keep_digits, round_every_result, sum_by_rows
from optfn.compile.scalars import together

__all__ = ["Program", "split"]

aten = torch.ops.aten
Step = Callable[[list[Any]], None]
Compiled = Callable[[list[Any]], Sequence[Any]]
CompileRegions = Callable[[list[tuple[Graph, list[Any]]]], list[Compiled]]

# Bytes that one call should move at least: it costs some 10 microseconds, in which two cores move half of this.
_CALL_BYTES = 1 << 20
# Leaves that a region should hold at most: generating code takes a tenth of a second a leaf, and longer the more there are.
_REGION_LEAVES = 48


class Program(NamedTuple):
    """What to run: steps on numbered values.

    Attributes:
        steps: functions of the list of all values, which they read and add to; and the values that nothing reads after that.
        size: how many values there are; the inputs come first.
        results: the number of each result, or a constant in a tuple.
        regions: for how many distinct regions code was generated.
        calls: how many calls of them a step makes.
    """

    steps: list[tuple[Step, list[int]]]
    size: int
    results: list[Any]
    regions: int
    calls: int

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """The results. ``inputs`` is emptied, so that values are freed when they have been used."""
        values: list[Any] = [*inputs, *[None] * (self.size - len(inputs))]
        inputs.clear()
        for step, done in self.steps:
            step(values)
            for i in done:
                values[i] = None
        return [r[0] if isinstance(r, tuple) else values[r] for r in self.results]


class _Component(NamedTuple):
    """Connected nodes of one phase.

    Attributes:
        nodes: in the order of the graph.
        results: those of the nodes that others read.
        packed: those that a vector of results holds.
        late: writes that are made after the region has been computed, each of one of its results.
        inputs: what the nodes read, in order of use.
        key: equal for components that do the same to inputs of the same kind.
    """

    nodes: list[Node]
    results: list[Node]
    packed: list[Node]
    late: list[Node]
    inputs: list[Node]
    key: Any


def split(graph: Graph, compile_regions: CompileRegions) -> Program:
    """Compile a graph region by region.

    Args:
        graph: a graph of ATen operators with fake tensors in ``meta["val"]``; it may write to its inputs by ``copy_``, as the last
            thing that it does to them.
        compile_regions: makes functions of the list of inputs from such graphs and their fake inputs.
    """
    for n in graph.nodes:
        n.meta.setdefault("val", None)  # a check gives nothing
    check_indices(graph)
    take_branches(graph)
    phases = phases_of(graph)
    read_less(graph, phases)
    return _Splitter(*together(graph, phases)).program(compile_regions)


class _Splitter:
    def __init__(self, graph: Graph, phases: Phases) -> None:
        self.kind, self.phase, self.model = phases
        nodes = list(graph.nodes)
        self.final: list[Any] = list(next(n for n in nodes if n.op == "output").args[0])
        self.given = {a for a in self.final if isinstance(a, Node)}
        self.live = self.needed(nodes)
        self.slots = {n: i for i, n in enumerate(n for n in nodes if n.op == "placeholder")}
        self.size = len(self.slots)
        self.slots.update({n: self.slots[n.all_input_nodes[0]] for n in nodes if is_write(n)})  # what is read after it
        self.by_phase: dict[int, list[Node]] = collections.defaultdict(list)
        for n in nodes:
            if n in self.live and self.kind.get(n) in ("called", "tensor", "scalar"):
                self.by_phase[self.phase[n]].append(n)
        self.packs = [n for n in nodes if self.kind.get(n) == "pack" and n in self.live]
        self.pack_of = {a: n for n in self.packs for a in n.all_input_nodes}
        self.regions: dict[Any, tuple[int, _Region]] = {}
        self.compiled: list[Compiled] = []
        self.steps: list[tuple[Step, list[int]]] = []  # and the values that each reads
        self.calls = 0

    def needed(self, nodes: list[Node]) -> set[Node]:
        live = set(self.given)
        for n in reversed(nodes):
            if n in live or (n.op == "call_function" and (is_write(n) or self.kind[n] == "called")):
                live.add(n)
                live.update(n.all_input_nodes)
        return live

    def program(self, compile_regions: CompileRegions) -> Program:
        found: dict[int, list[list[Node]]] = {p: self.components(nodes, p) for p, nodes in self.by_phase.items()}
        described = {p: [self.describe(nodes) for nodes in groups] for p, groups in found.items()}
        called = self.as_well_called(
            [c for components in described.values() for c in components if self.kind[c.nodes[0]] == "tensor"]
        )
        turns = 0
        for p in sorted(found):
            components = described[p]
            buckets = [(components, self.kind[components[0].nodes[0]] == "called")]
            if self.kind[components[0].nodes[0]] == "tensor":
                calls = [c for c in components if c.key in called]
                # What writes late is in no region with what writes in it.
                kinds = [[c for c in components if c.key not in called and bool(c.late) is late] for late in (False, True)]
                buckets = [(bucket, False) for found in kinds if found for bucket in _deal(found)]
                buckets += [(calls, True)] if calls else []
                turns += 1
                if turns % 2 == 0:  # there and back: what was read last is still in the cache
                    buckets.reverse()
            vectors: dict[Node, list[tuple[list[Node], int]]] = {}  # parts of each pack: its members, and their slot
            rows: dict[Node, list[tuple[list[int], int]]] = {}  # parts of each vector that a region is handed
            regions = [_Region(self, bucket, called=by_hand) for bucket, by_hand in buckets]
            for region in regions:
                for vector, entries in region.rows.items():
                    rows.setdefault(vector, []).append((entries, self.slot()))
            self.unpack(rows)
            taken = {vector: iter(parts) for vector, parts in rows.items()}
            for region in regions:
                slots = [next(taken[a])[1] if which == "row" else self.slots[a] for which, a in region.inputs]
                outs = [self.slots.setdefault(n, self.slot()) for n in region.results]
                for pack, members in region.packs.items():
                    outs.append(self.slot())
                    vectors.setdefault(pack, []).append((members, outs[-1]))
                self.call(region, slots, outs)
                self.write([n for c in region.components for n in c.late])
            for pack, parts in vectors.items():
                self.pack(pack, parts)
        results = [self.slots[a] if isinstance(a, Node) else (a,) for a in self.final]
        self.forget([r for r in results if isinstance(r, int)])
        regions = [region for _, region in self.regions.values()]
        graphs = [region.graph() for region in regions if not region.called]
        for region_graph, _ in graphs:
            round_every_result(region_graph)
            sum_by_rows(region_graph)
            keep_digits(region_graph)
        generated = iter(compile_regions(graphs))
        self.compiled += [_in_order(region.graph()[0]) if region.called else next(generated) for region in regions]
        return Program(self.steps, self.size, results, sum(not region.called for region in regions), self.calls)

    def as_well_called(self, components: list[_Component]) -> set[Any]:
        """The keys of components whose code is not worth to be generated."""
        found: dict[Any, tuple[Work, int]] = {}
        for c in components:
            if not self.model.intersection(c.nodes):
                work, times = found.get(c.key, (None, 0))
                found[c.key] = work or work_of(c.nodes, _bytes(c)), times + 1
        # Inductor cannot make an empty complex tensor of parts that it has found to be constant.
        return not_worth(found) | {c.key for c in components if any(map(_is_empty_complex, c.nodes))}

    def forget(self, kept: list[int]) -> None:
        """Of the values that steps read, leave those that are read for the last time."""
        seen = {*kept}
        for i, (step, reads) in reversed([*enumerate(self.steps)]):
            self.steps[i] = step, [value for value in {*reads} if value not in seen]
            seen.update(reads)

    def slot(self) -> int:
        self.size += 1
        return self.size - 1

    def components(self, nodes: list[Node], phase: int) -> list[list[Node]]:
        """Connected tensor nodes; all other nodes of a phase are one component."""
        if self.kind[nodes[0]] != "tensor":
            return [nodes]
        written = {n.all_input_nodes[0] for n in nodes if is_write(n)}

        def neighbours(n: Node) -> list[Any]:
            # What is read and written in one phase stays in the order of the graph.
            shared = [("written", a) for a in written.intersection(self.roots(n))]
            return [*n.all_input_nodes, *shared, *(["model"] if n in self.model else [])]

        return connected(nodes, neighbours)

    def roots(self, n: Node) -> set[Node]:
        """The inputs that a node reads, itself or through views."""
        found: set[Node] = set()
        for a in n.all_input_nodes:
            if self.kind[a] == "input":
                found.add(a)
            elif self.kind[a] == "free":
                found |= self.roots(a)
        return found

    def describe(self, nodes: list[Node]) -> _Component:
        late = [n for n in nodes if is_write(n)] if self.mixes(nodes) else []
        nodes = [n for n in nodes if n not in late]
        inside = {n: i for i, n in enumerate(nodes)}
        inputs: dict[Node, int] = {}

        def name(a: Any) -> Any:
            if isinstance(a, Node):
                if a in inside:
                    return ("node", inside[a])
                if self.kind[a] == "free":
                    return ("free", str(a.target), name(a.args), name(a.kwargs))
                x = a.meta["val"]
                return ("input", inputs.setdefault(a, len(inputs)), self.kind[a] == "row", _metadata(x))
            if isinstance(a, tuple | list):
                return tuple(map(name, a))
            if isinstance(a, dict):
                return tuple((k, name(v)) for k, v in a.items())
            return (type(a).__name__, repr(a))

        results, packed, key = [], [], []
        for n in nodes:
            users = [u for u in n.users if u in self.live and u not in inside]
            given = not is_write(n) and (n in self.given or any(self.kind.get(u) != "pack" for u in users))
            if given:
                results.append(n)
            if n in self.pack_of:
                packed.append(n)
            key.append((str(n.target), name(n.args), name(n.kwargs), given, n in self.pack_of))
        return _Component(nodes, results, packed, late, list(inputs), tuple(key))

    def mixes(self, nodes: list[Node]) -> bool:
        """Whether Inductor may get reads and writes of an input in the wrong order in these nodes."""
        if any(_is_complex(a) for n in nodes for a in (n, *n.all_input_nodes)):
            return True  # it calls torch for views that are complex, and does not see that they change with the input
        written = {n.all_input_nodes[0] for n in nodes if is_write(n)}
        readers = [(n, a) for n in nodes if not is_write(n) for a in written.intersection(self.roots(n))]
        return not KEEPS_ORDER and not all(_is_entry_by_entry(n, a) for n, a in readers)

    def call(self, region: "_Region", slots: list[int], outs: list[int]) -> None:
        i, compiled = self.regions.setdefault(region.key, (len(self.regions), region))[0], self.compiled
        self.calls += 1

        def step(values: list[Any]) -> None:
            for out, x in zip(outs, compiled[i]([values[slot] for slot in slots]), strict=True):
                values[out] = x

        self.steps.append((step, slots))

    def write(self, late: list[Node]) -> None:
        pairs = [(self.slots[n.all_input_nodes[0]], self.slots[n.all_input_nodes[1]]) for n in late]

        def step(values: list[Any]) -> None:
            for old, new in pairs:
                values[old].copy_(values[new])

        if pairs:
            self.steps.append((step, [i for pair in pairs for i in pair]))

    def pack(self, vector: Node, parts: list[tuple[list[Node], int]]) -> None:
        """A vector of results, in the order of the graph, from the parts that the regions give."""
        members: list[Node] = [n for part, _ in parts for n in part]
        where = {n: i for i, n in enumerate(members)}
        order = _permutation([where[n] for n in vector.all_input_nodes], vector)
        slots, out = [slot for _, slot in parts], self.slots.setdefault(vector, self.slot())

        def step(values: list[Any]) -> None:
            x = torch.cat([values[i] for i in slots]) if len(slots) > 1 else values[slots[0]]
            values[out] = x if order is None else x.index_select(0, order)

        self.steps.append((step, slots))

    def unpack(self, rows: dict[Node, list[tuple[list[int], int]]]) -> None:
        """The parts of vectors that the regions are handed."""
        for vector, parts in rows.items():
            source, outs = self.slots[vector], [slot for _, slot in parts]
            entries, sizes = [i for part, _ in parts for i in part], [len(part) for part, _ in parts]
            order = _permutation(entries, vector)

            def step(values: list[Any], source: int = source, order: Any = order, sizes: Any = sizes, outs: Any = outs) -> None:
                x = values[source] if order is None else values[source].index_select(0, order)
                for out, part in zip(outs, x.split(sizes), strict=True):
                    values[out] = part

            self.steps.append((step, [source]))


class _Region:
    """Components that are compiled, and called, together.

    Attributes:
        inputs: what the region is handed: nodes, and parts of vectors (``"row"``).
        rows: the entries of each vector that it reads.
        results: nodes whose values it gives, before the vectors ``packs``.
        called: no code is generated: its nodes are called one after the other.
    """

    def __init__(self, splitter: _Splitter, components: list[_Component], *, called: bool) -> None:
        self.kind, self.components, self.called = splitter.kind, components, called
        self.results = [n for c in components for n in c.results]
        self.packs: dict[Node, list[Node]] = {}
        for c in components:
            for n in c.packed:
                self.packs.setdefault(splitter.pack_of[n], []).append(n)
        self.inputs: list[tuple[str, Node]] = []
        self.rows: dict[Node, list[int]] = {}
        self.place: dict[Node, tuple[int, int]] = {}  # of each node that is read: which input, which entry of it
        key: list[Any] = []
        for c in components:
            places: list[tuple[int, int]] = []
            for a in c.inputs:
                if a not in self.place:
                    self.place[a] = self.read(a)
                places.append(self.place[a])
            key.append((c.key, tuple(places)))
        self.key = (self.called, tuple(key), tuple(len(self.rows[a]) if which == "row" else 0 for which, a in self.inputs))

    def read(self, a: Node) -> tuple[int, int]:
        if self.kind[a] != "row":
            self.inputs.append(("node", a))
            return len(self.inputs) - 1, 0
        vector: Any = a.args[0]
        entry: Any = a.args[2]
        if vector not in self.rows:
            self.rows[vector] = []
            self.inputs.append(("row", vector))
        self.rows[vector].append(entry)
        return self.inputs.index(("row", vector)), len(self.rows[vector]) - 1

    def graph(self) -> tuple[Graph, list[Any]]:
        graph, fakes, env = Graph(), [], {}
        for which, a in self.inputs:
            value = a.meta["val"]
            fakes.append(value.new_empty(len(self.rows[a])) if which == "row" else value)
            env[which, a] = graph.placeholder(f"arg{len(fakes)}")
            env[which, a].meta["val"] = fakes[-1]

        def find(a: Node) -> Node:
            if a in env:
                return env[a]
            if self.kind[a] == "row":
                which, entry = self.place[a]
                source = env[self.inputs[which]]
                env[a] = graph.call_function(aten.select.int, (source, 0, entry))
                env[a].meta["val"] = a.meta["val"]
                return env[a]
            if ("node", a) in env:
                return env["node", a]
            env[a] = graph.node_copy(a, find)  # free
            return env[a]

        for c in self.components:
            for n in c.nodes:
                env[n] = graph.node_copy(n, find)
        results = [env[n] for n in self.results]
        for vector, members in self.packs.items():
            entries = [graph.call_function(aten.unsqueeze.default, (env[n], 0)) for n in members]
            for entry in entries:
                entry.meta["val"] = vector.meta["val"].new_empty(1)
            node = graph.call_function(aten.cat.default, (entries,))
            node.meta["val"] = vector.meta["val"].new_empty(len(members))
            results.append(node)
        graph.output(tuple(results))
        return graph, fakes


def _in_order(graph: Graph) -> Compiled:
    """The calls of a graph, one after the other. What they give has the strides that generated code expects."""
    for n in list(graph.nodes):
        # What has just been computed is in memory of its own.
        if n.target is torch.ops.optfn.copy.default and is_computed(n.args[0].target) and all(map(is_write, n.users)):
            n.replace_all_uses_with(n.args[0])
            graph.erase_node(n)
    run = torch.fx.GraphModule({}, graph).forward
    output: Any = next(n for n in graph.nodes if n.op == "output")
    expected = [(x.shape, x.stride(), x.dtype) for x in (n.meta["val"] for n in output.args[0])]

    def call(inputs: list[Any]) -> list[Tensor]:
        results = list(run(*inputs))
        for i, (shape, strides, dtype) in enumerate(expected):
            x = results[i]
            if (x.shape, x.dtype) != (shape, dtype):
                raise RuntimeError(f"a result of {output.args[0][i].target} is {x.dtype} {[*x.shape]}, not {dtype} {[*shape]}")
            if x.stride() != strides:
                results[i] = x.new_empty_strided(shape, strides).copy_(x)
        return results

    return call


def _is_complex(n: Node) -> bool:
    return isinstance(x := n.meta["val"], Tensor) and x.is_complex()


def _is_empty_complex(n: Node) -> bool:
    return any(_is_complex(a) and a.meta["val"].numel() == 0 for a in (n, *n.all_input_nodes))


def _is_entry_by_entry(n: Node, a: Node) -> bool:
    """Whether each entry of a result needs the entry of the input at that place alone."""
    known = torch.Tag.pointwise in getattr(n.target, "tags", ()) or n.target is torch.ops.optfn.copy.default
    return known and a in n.all_input_nodes and n.meta["val"].shape == a.meta["val"].shape


def _metadata(x: Any) -> Any:
    return (tuple(x.shape), tuple(x.stride()), x.dtype, x.device) if isinstance(x, Tensor) else repr(x)


def _permutation(entries: list[int], vector: Node) -> Tensor | None:
    """The entries as an index; None where they are the whole vector in order."""
    if entries == list(range(len(vector.meta["val"]))):
        return None
    return torch.tensor(entries, device=vector.meta["val"].device)


def _bytes(c: _Component) -> int:
    """What a component moves to and from memory, at least."""
    tensors = [a.meta["val"] for a in c.inputs] + [n.meta["val"] for n in c.results]
    tensors += [n.meta["val"] for n in c.nodes if is_write(n)]
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


def _deal(components: list[_Component]) -> list[list[_Component]]:
    """Components in equal buckets, and what is left over in one more, so that few distinct ones have to be compiled."""
    classes: dict[Any, list[_Component]] = {}
    for c in components:
        classes.setdefault(c.key, []).append(c)
    counts = [len(members) for members in classes.values()]

    def distinct(rounds: int) -> int:
        return sum(count // rounds + count % rounds for count in counts)

    calls = range(1, max(counts) + 1)
    few = range(1, max(1, min(max(counts), sum(map(_bytes, components)) // _CALL_BYTES)) + 1)
    rounds = min(few, key=distinct)
    if distinct(rounds) > _REGION_LEAVES:
        rounds = min(calls, key=distinct)
    dealt: list[list[_Component]] = [[] for _ in range(rounds)]
    rest: list[_Component] = []
    for members in classes.values():
        share = len(members) // rounds
        for i, bucket in enumerate(dealt):
            bucket += members[i * share : (i + 1) * share]
        rest += members[rounds * share :]
    parts = [bucket[i : i + _REGION_LEAVES] for bucket in (*dealt, rest) for i in range(0, len(bucket), _REGION_LEAVES)]
    return [part for part in parts if part]
