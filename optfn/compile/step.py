"""A pure step, compiled, that writes into the buffers it is given."""

import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.fx import Graph, Node

from optfn import tree
from optfn.checks import check_step
from optfn.compile import backend as backend_of_regions
from optfn.compile import internals, rows
from optfn.compile.closure import Bindings, bindings
from optfn.compile.donation import Memory, check_memory, donated_arguments, replacements
from optfn.compile.donation import copy as copied
from optfn.compile.phases import model_of
from optfn.compile.regions import Program, split
from optfn.compile.trace import trace

__all__ = ["compile"]

_log = logging.getLogger(__name__)
_count = itertools.count()
_WAYS = 64  # to call one step, that are remembered


def compile(
    fn: Callable[..., Any], *, donate: str | int | Iterable[str | int] = (), backend: str | Callable[..., Any] = "optfn"
) -> Callable[..., Any]:
    """``torch.compile(fn, fullgraph=True)`` for a pure step, whose donated arguments give their memory to its results.

    The function stays pure; the compiled one returns the same values. A donated argument's tensors *are* tensors of the
    result: they are overwritten with the values that replace them, so that a step needs no second copy of the parameters
    and the state, and a module's own parameters, donated, are trained in place. What was donated must not be used again but as
    the result.

    Which result replaces an argument: the first part of the result that has the argument's tree structure and its shapes and
    dtypes, arguments in the order of ``fn``'s signature; where there is none, leaf by leaf the first of that shape and dtype.

    With ``donate`` the step records nothing for autograd (``torch.func`` transforms inside ``fn`` work as ever), and no
    tensor of the result shares memory with another or with an argument that is not donated.

    A call with a sparse COO tensor among its arguments, such as the gradient of an embedding, is not compiled, as torch.compile
    takes none: all of it runs eagerly, its dense leaves too. Donated, it still writes in place, and costs what the touched
    rows cost: of a tensor with a sparse argument's shape, what :func:`apply_updates` and :func:`sparse_masked` change (and
    ``index_put``, ``index_copy``, ``index_add`` of rows) is written where it lies, and no second table is made, unless
    the step itself reads the whole of the new one.

    How it is compiled: with the backend ``"optfn"`` a donated step is taken apart into regions, each distinct one is compiled once,
    by Inductor, and called as often as it occurs; so it compiles in the time of one layer, however deep the model is. A step
    that reads nothing that could change but its arguments (numbers, functions and transformations that it closes over cannot,
    but by being bound anew, which is noticed) is traced by running it once; any other by Dynamo, which takes longer and
    guards what it reads. So are calls in which numbers, or sizes of what is not donated, differ from those of the first.

    Args:
        fn: a pure function of trees of tensors.
        donate: the names or positions of the arguments to donate.
        backend: a backend of :func:`torch.compile`, ``"optfn"`` by default.

    Raises:
        ValueError: when made, if ``donate`` names no argument of ``fn``; when called, if a tensor that is donated appears
            twice among the arguments or shares memory with another, or no result has its shape and dtype.
        TypeError: when called, if a donated leaf is no dense tensor.

    An error leaves the arguments as they were.

    Example:
        >>> halve = optfn.compile(lambda params: {"w": params["w"] / 2}, donate="params", backend="aot_eager")
        >>> params = {"w": torch.tensor([2.0, 4.0])}
        >>> new = halve(params)
        >>> new["w"] is params["w"], params["w"]
        (True, tensor([1., 2.]))
    """
    check_step(fn)
    signature = inspect.signature(fn)
    donated = donated_arguments(signature, donate)
    regions = backend == "optfn" and internals.available()
    by_dynamo = _by_dynamo(fn, donated, backend_of_regions.backend if regions else "inductor" if backend == "optfn" else backend)
    calls = _Calls(fn, signature, [name for _, name in donated]) if donated and regions else None

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not donated):
            call = None if calls is None else calls.find(args, kwargs)
            if call is not None and call[0].program is not None:
                return call[0].run(call[1])
            bound = signature.bind(*args, **kwargs)
            if call is None:
                if donated:
                    check_memory(bound.arguments, {name for _, name in donated})
                if rows.holds_sparse(bound.arguments):
                    return _on_rows(fn, donated, bound)
                call = None if calls is None else calls.add(args, kwargs)
                if call is not None and call[0].program is not None:
                    return call[0].run(call[1])
            return by_dynamo(bound)

    run._calls = calls  # type: ignore[attr-defined]
    return run


def _on_rows(fn: Callable[..., Any], donated: list[tuple[int, str]], bound: inspect.BoundArguments) -> Any:
    """The step by itself, where an argument is sparse."""
    if not donated:
        return fn(*bound.args, **bound.kwargs)
    given = [(name, bound.arguments[name]) for _, name in donated if name in bound.arguments]
    held = tree.leaves([x for _, x in given])
    return rows.step_on_rows(fn, bound.args, bound.kwargs, held, lambda leaves, spec: replacements(leaves, spec, given))


def _by_dynamo(
    fn: Callable[..., Any], donated: list[tuple[int, str]], backend: str | Callable[..., Any]
) -> Callable[[inspect.BoundArguments], Any]:
    """The step by torch.compile."""
    in_graph = backend in ("eager", "aot_eager") or (backend is backend_of_regions.backend and internals.KEEPS_ORDER)

    def step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = fn(*args, **kwargs)
        if not donated:
            return result, []
        given = [(name, args[i] if i < len(args) else kwargs[name]) for i, name in donated if i < len(args) or name in kwargs]
        return _replace(result, given, in_graph)

    # Dynamo keeps its graphs, their number and the sizes seen with the code object, which all closures share: each gets its own.
    step.__code__ = step.__code__.replace(co_name=f"step_{next(_count)}")
    compiled = torch.compile(step, fullgraph=True, backend=backend)

    def run(bound: inspect.BoundArguments) -> Any:
        try:
            result, late = compiled(bound.args, bound.kwargs)
        except Exception:
            # What is wrong with the arguments is said best by the function itself, on copies.
            if (error := _error(step, bound)) is not None:
                raise error from None
            raise
        for old, new in late:
            old.copy_(new)
        return result

    return run


def _replace(result: Any, given: list[tuple[str, Any]], in_graph: bool) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Write the results into the donated tensors and put these in their place; what is left shares no memory with them.

    Returns:
        The result, and the pairs that are left to copy outside of the graph: all for a backend that may mix up reads and writes,
        and what torch 2.13 silently drops, writes to a 0-dim float64 tensor on the CPU, which Dynamo takes for a Python number.
    """
    leaves, spec = tree.flatten(result)
    targets = replacements(leaves, spec, given)
    # All values first, each in memory of its own: a result may be (a view of) a donated tensor.
    new: list[Any] = [copied(x) if isinstance(x, Tensor) and targets.get(i) is not x else x for i, x in enumerate(leaves)]
    late: list[tuple[Tensor, Tensor]] = []
    for i, old in targets.items():
        value = new[i]
        new[i] = old
        if value is old:
            continue
        if not in_graph or (old.ndim == 0 and old.dtype == torch.float64 and old.device.type == "cpu"):
            late.append((old, value))
        else:
            old.copy_(value)
    return tree.unflatten(spec, new), late


def _error(step: Callable[..., Any], bound: inspect.BoundArguments) -> Exception | None:
    """What the step raises when it is run eagerly, on copies of its arguments."""

    def copy(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    try:
        step(*tree.map(copy, (bound.args, bound.kwargs)))
    except Exception as error:
        return error
    return None


class _Call:
    """One way in which a step is called: a structure, constants, and tensors of certain kinds.

    Attributes:
        program: what computes the step; None where that is left to Dynamo.
    """

    program: Program | None = None

    def __init__(self, spec: Any, leaves: list[Any], donated: set[int]) -> None:
        self.spec = spec
        self.constants = [(i, x) for i, x in enumerate(leaves) if not isinstance(x, Tensor)]
        self.places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        tensors = [leaves[i] for i in self.places]
        self.donated = [j for j, x in enumerate(tensors) if id(x) in donated]
        self.guards = internals.Guards(tensors)
        self.kinds = [(x.shape, x.dtype) for x in tensors]
        self.held: list[Tensor] = []  # tensors that the function finds outside of its arguments
        self.memory = Memory(tensors, self.donated)

    def tensors(self, given: Any) -> list[Tensor] | None:
        """The tensors of a call's arguments, if it is made in this way."""
        try:
            # An eighth of the time that optree takes to find the structure, for which it sorts the keys of every dict.
            leaves = self.spec.flatten_up_to(given)
        except (TypeError, ValueError):
            return None
        if self.constants:
            if any(type(leaves[i]) is not type(x) or leaves[i] != x for i, x in self.constants):
                return None
            leaves = [leaves[i] for i in self.places]
        return leaves if self.guards.fit(leaves) else None

    def varies(self, other: "_Call") -> bool:
        """Whether another call has the same donated tensors, but sizes or constants that are not the same."""
        same = self.spec == other.spec and [self.kinds[j] for j in self.donated] == [other.kinds[j] for j in other.donated]
        return same and (self.kinds != other.kinds or self.constants != other.constants)

    def record(self, fn: Callable[..., Any], signature: inspect.Signature, names: list[str], leaves: list[Any]) -> None:
        """Trace and compile the step."""
        structure: Any = None
        targets: dict[int, int] = {}

        def flat(*inputs: Tensor) -> list[Any]:
            nonlocal structure
            given = list(leaves)
            for i, x in zip(self.places, inputs, strict=True):
                given[i] = x
            args, kwargs = optree.tree_unflatten(self.spec, given)
            results, structure = tree.flatten(fn(*args, **kwargs))
            arguments = signature.bind(*args, **kwargs).arguments
            number = {id(x): j for j, x in enumerate(inputs)}
            found = replacements(results, structure, [(name, arguments[name]) for name in names if name in arguments])
            targets.update({i: number[id(x)] for i, x in found.items() if x is not None})
            return results

        traced = trace(flat, [leaves[i] for i in self.places])
        if model_of(traced.graph):
            internals.prepare_model(traced.graph)
        self.held = traced.constants
        tensors = [leaves[i] for i in self.places]
        self.memory = Memory([*tensors, *self.held], self.donated)
        if not self.memory.apart([*tensors, *self.held]):
            return
        self.results = _write(traced.graph, targets)
        self.structure = structure
        self.program = split(traced.graph, internals.compile_regions)

    def run(self, tensors: list[Tensor]) -> Any:
        assert self.program is not None
        found = self.program([*tensors, *self.held])
        # The kernels write to memory, of which autograd knows nothing.
        torch.autograd.graph.increment_version([tensors[j] for j in self.donated])
        return self.structure.unflatten([tensors[r] if isinstance(r, int) else found[r[0]] for r in self.results])


def _write(graph: Graph, targets: dict[int, int]) -> list[Any]:
    """Let a graph write its results into the inputs that they replace.

    Returns:
        For each result the number of the input that it is written to, or in a tuple its number among those that stay results.
    """
    output: Any = next(n for n in graph.nodes if n.op == "output")
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    kept: list[Any] = []
    places: list[Any] = []
    writes: list[tuple[Node, Node]] = []

    def call(target: Any, *args: Node) -> Node:
        node = graph.call_function(target, args)
        value = args[-1].meta["val"]
        with value.fake_mode:
            node.meta["val"] = torch.empty_like(value)
        return node

    with graph.inserting_before(output):
        for i, value in enumerate(output.args[0]):
            if i in targets:
                places.append(targets[i])
                if value is not inputs[targets[i]]:
                    writes.append((inputs[targets[i]], call(torch.ops.optfn.copy.default, value)))
                continue
            # In memory of its own: no input, no view, no second result.
            if isinstance(value, Node) and (value in kept or not _is_new(value)):
                value = call(torch.ops.optfn.copy.default, value)
            places.append((len(kept),))
            kept.append(value)
        for old, new in writes:
            call(torch.ops.aten.copy_.default, old, new)
    output.args = (tuple(kept),)
    return places


def _is_new(n: Node) -> bool:
    return isinstance(n.target, internals.OpOverload) and not n.target.is_view and not n.meta["val"].is_complex()


class _Calls:
    """The ways in which a step has been called."""

    def __init__(self, fn: Callable[..., Any], signature: inspect.Signature, names: list[str]) -> None:
        self.fn, self.signature, self.names = fn, signature, names
        self.calls: list[_Call] = []
        self.bindings: Bindings | None = None

    def find(self, args: Any, kwargs: Any) -> tuple[_Call, list[Tensor]] | None:
        """The way in which this call is made, and its tensors, if it is known and the donated tensors have memory of their own."""
        for i, call in enumerate(self.calls):
            tensors = call.tensors((args, kwargs))
            if tensors is not None:
                if self.bindings is not None and not self.bindings.hold():
                    self.calls.clear()
                    return None
                if i:
                    self.calls.insert(0, self.calls.pop(i))
                return (call, tensors) if call.memory.apart([*tensors, *call.held] if call.held else tensors) else None
        return None

    def add(self, args: Any, kwargs: Any) -> tuple[_Call, list[Tensor]] | None:
        given: Any = (args, kwargs)
        # None is a part of the structure: the tensors among the leaves are where they always are.
        leaves, spec = optree.tree_flatten(given, namespace=tree.NAMESPACE)
        tensors: Any = [x for x in leaves if isinstance(x, Tensor)]
        plain = (torch.Tensor, torch.nn.Parameter)
        known = all(isinstance(x, Tensor | int | float | complex | str | bytes) or inspect.isfunction(x) for x in leaves)
        if not (tensors and known and all(type(x) in plain and x.layout == torch.strided and not x.is_meta for x in tensors)):
            return None
        arguments = self.signature.bind(*args, **kwargs).arguments
        donated = {id(x) for name in self.names if name in arguments for x in tree.leaves(arguments[name])}
        call = _Call(spec, leaves, donated)
        self.bindings = bindings(self.fn)
        # Sizes or numbers that change from call to call are Dynamo's: it makes one graph for all of them.
        if self.bindings is not None and not any(call.varies(other) for other in self.calls):
            try:
                call.record(self.fn, self.signature, self.names, leaves)
            except Exception:  # Dynamo can do more, or says why not
                _log.debug("%s is left to Dynamo", self.fn, exc_info=True)
        call.memory.apart([*tensors, *call.held])
        self.calls = [call, *self.calls][:_WAYS]
        return call, tensors
