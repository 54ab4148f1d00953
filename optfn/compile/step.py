"""A pure step, compiled, that writes into the buffers it is given."""

import functools
import inspect
import itertools
import threading
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor
from torch.fx import Graph, Node

from optfn import tree
from optfn.checks import check_step
from optfn.compile import backend as backend_of_regions
from optfn.compile import internals, rows
from optfn.compile.backend import EagerError
from optfn.compile.branches import is_collective
from optfn.compile.closure import Bindings, bindings, same_number
from optfn.compile.donation import Memory, check_memory, donated_arguments, replacements
from optfn.compile.donation import copy as copied
from optfn.compile.phases import model_of
from optfn.compile.pieces import Pieces
from optfn.compile.regions import Program, split
from optfn.compile.structure import Structure, UnknownContainerError
from optfn.compile.surroundings import Surroundings
from optfn.compile.trace import NotTraceableError, trace
from optfn.sharding import is_sharded, local, of_spec

__all__ = ["compile"]

_count = itertools.count()
_WAYS = 64  # to call one step, that are remembered
_REBINDINGS = 4  # of what a step closes over, for each of which it is compiled
_CONSTANTS = (bool, int, float, complex, str, bytes, range, type(None), torch.dtype, torch.device, torch.Size)


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

    Of tensors that lie on several processes (DTensors) the program sees the pieces of its process, which a donated step overwrites;
    what processes say to each other is part of it, in the order of the step. The first call of its kind runs as it is, so that
    what processes have to agree on is agreed on, the second is compiled. What cannot be, since the step itself calls operators
    of such tensors, runs as it is at every call, donated too, with a warning that says why. A step without ``donate`` runs as
    it is.

    At every call the result is that of ``fn`` at that call, whatever ``fn`` reads besides its arguments, or an error. The page
    "What compile promises" of the documentation says how that is kept, and at what cost.

    How it is compiled: with the backend ``"optfn"`` a donated step is taken apart into regions, each distinct one is compiled once,
    by Inductor, and called as often as it occurs; so it compiles in the time of one layer, however deep the model is. A step
    of which all that it reads is known and guarded is traced by running it once; any other by Dynamo, which takes longer. So are
    calls in which numbers, or sizes of what is not donated, differ from those of the first.

    Args:
        fn: a pure function of trees of tensors.
        donate: the names or positions of the arguments to donate.
        backend: a backend of :func:`torch.compile`, ``"optfn"`` by default.

    Raises:
        ValueError: when made, if ``donate`` names no argument of ``fn``; when called, if a tensor that is donated appears
            twice among the arguments or shares memory with another, or no result has its shape and dtype.
        TypeError: when called, if a donated leaf is no dense tensor.
        RuntimeError: when called with something to donate inside of another compiled step, or under a transform of
            :mod:`torch.func`.

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
        if donated and (torch.compiler.is_dynamo_compiling() or internals.is_transformed()):
            raise RuntimeError(_INSIDE)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not donated):
            call = None if calls is None else calls.find(args, kwargs)
            if call is not None and call[0].program is not None:
                return call[0].run(call[1])
            bound = signature.bind(*args, **kwargs)
            leaves = tree.leaves((args, kwargs))
            if call is None and donated:
                check_memory(bound.arguments, {name for _, name in donated})
            sharded = any(map(is_sharded, leaves))
            if sharded and calls is None:
                warnings.warn(_SHARDED, stacklevel=2)
                return _eagerly(fn, donated, bound, args, kwargs)
            if any(map(rows.is_sparse, leaves)) or (donated and (internals.function_modes() is None or any(map(_is_meta, leaves)))):
                return _eagerly(fn, donated, bound, args, kwargs)
            if any(map(_has_bits, leaves)):
                found = _without_bits(calls, (args, kwargs))
                return found[0] if found else _eagerly(fn, donated, bound, args, kwargs)
            if calls is not None and (call is None or call[0].met_only):
                call = calls.add(args, kwargs)
                if call is not None and call[0].program is not None:
                    return call[0].run(call[1])
            if sharded:
                why = "its arguments are of a kind that is not known" if call is None else call[0].why
                if why is not None:
                    warnings.warn(_AS_IT_IS.format(why), stacklevel=2)
                return _eagerly(fn, donated, bound, args, kwargs)
            if call is not None and call[0].eager:
                return _eagerly(fn, donated, bound, args, kwargs)
            # Dynamo takes -0.0 for 0.0 (torch 2.13), also in what stands in a container of another kind.
            special = [repr(x) for x in leaves if isinstance(x, float) and not x]
            if call is None and calls is not None:
                special.append(repr(tree.flatten((args, kwargs))[1]))
            try:
                return by_dynamo(args, kwargs, tuple(special))
            except EagerError:
                return _eagerly(fn, donated, bound, args, kwargs)

    run._calls = calls  # type: ignore[attr-defined]
    return run


_SHARDED = (
    "optfn.compile: tensors among the arguments lie on several processes. Of such steps those that donate are compiled, with the "
    "backend 'optfn'; this one runs as it is"
)

_AS_IT_IS = (
    "optfn.compile: tensors among the arguments lie on several processes, and the step cannot be compiled for them, it runs as it "
    "is: {}"
)

_INSIDE = (
    "a step that donates was called inside of another compiled step, or under a transform of torch.func such as vmap or grad, "
    "where nothing can be overwritten: call the function that it was made of, step.__wrapped__, and donate in the outermost step"
)


def _eagerly(
    fn: Callable[..., Any], donated: list[tuple[int, str]], bound: inspect.BoundArguments, args: Any, kwargs: dict[str, Any]
) -> Any:
    """The step by itself: with sparse or meta tensors, or under a mode that looks at each call, or changes it."""
    if not donated:
        return fn(*args, **kwargs)
    given = [(name, bound.arguments[name]) for _, name in donated if name in bound.arguments]
    held = tree.leaves([x for _, x in given])
    return rows.step_on_rows(fn, args, kwargs, held, lambda leaves, spec: replacements(leaves, spec, given))


def _is_meta(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_meta


def _has_bits(x: Any) -> bool:
    """Whether a tensor is the negative or the conjugate of what lies in its memory."""
    return isinstance(x, Tensor) and x.layout == torch.strided and (x.is_neg() or x.is_conj())


def _without_bits(calls: "_Calls | None", given: tuple[Any, Any]) -> tuple[Any] | None:
    """A call with tensors whose memory holds their numbers: code that Inductor generates (torch 2.13) does not know better.

    Returns:
        Its result; None if the step is not traced here, as Dynamo would not notice a step that asks for the difference.
    """
    leaves, spec = tree.flatten(given)
    plain = {id(x): x.resolve_conj().resolve_neg() for x in leaves if _has_bits(x)}
    args, kwargs = tree.unflatten(spec, [plain.get(id(x), x) for x in leaves])
    call = None if calls is None else calls.find(args, kwargs) or calls.add(args, kwargs)
    if call is None or call[0].program is None:
        return None
    results, structure = tree.flatten(call[0].run(call[1]))
    originals = {id(plain[id(x)]): x for x in leaves if id(x) in plain}
    for i, x in enumerate(results):
        if id(x) in originals:
            results[i] = originals[id(x)].copy_(x)
    return (tree.unflatten(structure, results),)


def _by_dynamo(
    fn: Callable[..., Any], donated: list[tuple[int, str]], backend: str | Callable[..., Any]
) -> Callable[[tuple[Any, ...], dict[str, Any], tuple[str, ...]], Any]:
    """The step by torch.compile, as a function of the arguments, and of what tells calls apart that Dynamo does not.

    It raises an :class:`EagerError`, before anything is written, where Dynamo would get the step wrong.
    """
    in_graph = backend in ("eager", "aot_eager") or (backend is backend_of_regions.backend and internals.KEEPS_ORDER)

    def step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = fn(*args, **kwargs)
        if not donated:
            return result, []
        given = [(name, kwargs[name] if name in kwargs else args[i]) for i, name in donated if name in kwargs or i < len(args)]
        return _replace(result, given, in_graph)

    @functools.cache
    def surroundings() -> Surroundings:
        return Surroundings(fn)

    @functools.cache
    def compiled(special: tuple[str, ...]) -> Callable[..., Any]:
        # Dynamo keeps its graphs, their number and the sizes seen with the code object, which closures share: each gets its own.
        own = types.FunctionType(
            step.__code__.replace(co_name=f"step_{next(_count)}"), step.__globals__, None, None, step.__closure__
        )
        return torch.compile(own, fullgraph=True, backend=backend)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any], special: tuple[str, ...]) -> Any:
        if not surroundings().hold():
            surroundings.cache_clear()
            compiled.cache_clear()
        if not surroundings().compiles:
            raise EagerError
        try:
            with internals.guarded():
                result, late = compiled(special)(args, kwargs)
        except EagerError:
            raise
        except Exception as error:
            if _INSIDE in str(error):
                raise RuntimeError(_INSIDE) from None
            # What is wrong with the arguments is said best by the function itself, on copies.
            if (own := _error(step, args, kwargs)) is not None:
                raise own from None
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


def _error(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """What the step raises when it is run eagerly, on copies of its arguments."""

    def copy(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    try:
        step(*tree.map(copy, (args, kwargs)))
    except Exception as error:
        return error
    return None


class _Call:
    """One way in which a step is called: a structure, constants, and tensors of certain kinds.

    Attributes:
        program: what computes the step; None where that is left to Dynamo.
        eager: whether even Dynamo would get it wrong.
        met_only: whether the next call is the one to compile, as tensors lie on several processes.
        why: why there is no program.
        outside: the tensors that the step can find besides its arguments.
        held: those that the program reads, and constants.
    """

    program: Program | None = None
    eager = False
    met_only = False
    why: str | None = None

    def __init__(self, structure: Structure, leaves: list[Any], spec: Any, donated: set[int]) -> None:
        self.structure, self.spec = structure, spec
        first: dict[int, int] = {}
        self.places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and first.setdefault(id(x), i) == i]
        self.again = [(i, first[id(x)]) for i, x in enumerate(leaves) if isinstance(x, Tensor) and first[id(x)] != i]
        self.constants = [(i, x) for i, x in enumerate(leaves) if not isinstance(x, Tensor)]
        tensors = [leaves[i] for i in self.places]
        self.whole = len(tensors) == len(leaves)
        self.donated = [j for j, x in enumerate(tensors) if id(x) in donated]
        self.kinds = [(x.shape, x.dtype) for x in leaves if isinstance(x, Tensor)]
        self.donated_kinds = [(x.shape, x.dtype) for x in leaves if id(x) in donated]
        self.bindings = Bindings()
        self.outside: list[Tensor] = []
        self.held: list[Tensor] = []
        self.pieces = Pieces(tensors)
        pieces: Any = self.pieces.of(tensors)
        self.guards = internals.Guards(pieces)
        self.memory = Memory(pieces, self.donated)

    def tensors(self, given: Any) -> "_Given | None":
        """The tensors of a call's arguments, each once, if the call is made in this way, but for what the step finds outside."""
        leaves = self.structure.match(given)
        if leaves is None:
            return None
        if not self.whole:
            if any(leaves[i] is not x and not _equal(leaves[i], x) for i, x in self.constants):
                return None
            if any(leaves[i] is not leaves[j] for i, j in self.again):
                return None
            leaves = [leaves[i] for i in self.places]
        pieces = self.pieces.of(leaves)
        return None if pieces is None or not self.guards.fit([*pieces, *self.outside]) else _Given(leaves, pieces)

    def holds(self) -> bool:
        """Whether the step finds outside of its arguments what it found when it was traced, or is Dynamo's."""
        return self.program is None or self.bindings.hold()

    def apart(self, given: "_Given") -> bool:
        """Whether the donated tensors have memory of their own."""
        return self.memory.apart([*given.pieces, *self.held] if self.held else given.pieces)

    def varies(self, other: "_Call") -> bool:
        """Whether another call has the same donated tensors, but sizes or constants that are not the same."""
        same = self.spec == other.spec and self.donated_kinds == other.donated_kinds
        return same and (self.kinds != other.kinds or list(map(repr, self.constants)) != list(map(repr, other.constants)))

    def record(
        self, fn: Callable[..., Any], signature: inspect.Signature, names: list[str], leaves: list[Any], bindings: Bindings
    ) -> None:
        """Trace and compile the step."""
        result_structure: Any = None
        targets: dict[int, int] = {}
        specs: dict[int, Any] = {}
        given_tensors = [leaves[i] for i in self.places]
        tensors: Any = self.pieces.of(given_tensors)

        def flat(*inputs: Tensor) -> list[Any]:
            nonlocal result_structure
            given = list(leaves)
            for i, x in zip(self.places, inputs, strict=True):
                given[i] = x
            for i, j in self.again:
                given[i] = given[j]
            args, kwargs = self.structure.unflatten(given)
            arguments = signature.bind(*args, **kwargs).arguments
            result = fn(*args, **kwargs)
            after = self.structure.match((args, kwargs))
            if after is None or any(x is not y for x, y in zip(given, after, strict=True)):
                raise NotTraceableError("the function changes a container that it is given")
            if any(isinstance(x, torch.Size) for x in tree.subtrees(result)):
                raise NotTraceableError("a size among the results would come back as a tuple")
            results, result_structure = tree.flatten(result)
            if odd := [x for x in results if not (isinstance(x, Tensor) or type(x) in _CONSTANTS)]:
                raise NotTraceableError(f"a {type(odd[0]).__name__} among the results is made anew at each call")
            number = {id(x): j for j, x in enumerate(inputs)}
            found = replacements(results, result_structure, [(name, arguments[name]) for name in names if name in arguments])
            targets.update({i: number[id(x)] for i, x in found.items() if x is not None})
            specs.update({i: x._spec for i, x in enumerate(results) if is_sharded(x)})
            return [local(x) for x in results]

        traced = trace(flat, tensors, [x if is_sharded(x) else None for x in given_tensors])
        if model_of(traced.graph):
            internals.prepare_model(traced.graph)
        outside = list({id(x): x for x in bindings.tensors}.values())
        if {*map(id, outside)} & {*map(id, tensors)}:
            self.eager = True  # the step can tell that they are one, and Dynamo would not look again
            return
        if any(map(_has_bits, traced.constants)):
            return
        memory = Memory([*tensors, *traced.constants], self.donated)
        if not memory.apart([*tensors, *traced.constants]):
            self.eager = True
            return
        self.memory, self.held, self.outside, self.bindings = memory, traced.constants, outside, bindings
        self.guards = internals.Guards([*tensors, *outside])
        if any(is_collective(n.target) for n in traced.graph.nodes):
            self.pieces.join()
        self.counted = [j for j in self.donated if not tensors[j].is_inference()]
        sharded = {*self.pieces.places}
        self.counted_whole = [j for j in self.donated if j in sharded and not given_tensors[j].is_inference()]
        self.results = _write(traced.graph, targets)
        self.specs = [(i, specs[i]) for i, r in enumerate(self.results) if i in specs and not isinstance(r, int)]
        self.result_structure = result_structure
        self.program = split(traced.graph, internals.compile_regions)

    def run(self, given: "_Given") -> Any:
        assert self.program is not None
        tensors, pieces = given
        found = self.program([*pieces, *self.held])
        # The kernels write to memory, of which autograd knows nothing.
        torch.autograd.graph.increment_version([pieces[j] for j in self.counted])
        if self.counted_whole:
            torch.autograd.graph.increment_version([tensors[j] for j in self.counted_whole])
        results = [tensors[r] if isinstance(r, int) else found[r[0]] for r in self.results]
        for i, spec in self.specs:
            results[i] = of_spec(results[i], spec)
        return self.result_structure.unflatten(results)


class _Given(NamedTuple):
    """The tensors of a call, each once, and of those that lie on several processes the pieces; the same list where none does."""

    tensors: list[Tensor]
    pieces: list[Tensor]


def _is_plain(x: Any) -> bool:
    """Whether a leaf is a tensor like any other, or one whose piece is, or a constant."""
    x = x._local_tensor if is_sharded(x) else x
    return (type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided) or type(x) in _CONSTANTS


def _equal(x: Any, constant: Any) -> bool:
    """Whether a leaf that is no tensor cannot be told from what it was."""
    return type(x) is type(constant) and (same_number(x, constant) if isinstance(x, int | float | complex) else x == constant)


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
    return internals.is_computed(n.target) and not n.meta["val"].is_complex()


class _Calls:
    """The ways in which a step has been called."""

    def __init__(self, fn: Callable[..., Any], signature: inspect.Signature, names: list[str]) -> None:
        self.fn, self.signature, self.names = fn, signature, names
        self.calls: list[_Call] = []
        self.lock = threading.RLock()

    def find(self, args: Any, kwargs: Any) -> tuple[_Call, _Given] | None:
        """The way in which this call is made, and its tensors, if it is known and the donated tensors have memory of their own."""
        with self.lock:
            for i, call in enumerate(self.calls):
                tensors = call.tensors((args, kwargs))
                if tensors is not None and call.holds():
                    if i:
                        self.calls.insert(0, self.calls.pop(i))
                    return (call, tensors) if call.apart(tensors) else None
            return None

    def add(self, args: Any, kwargs: Any) -> tuple[_Call, _Given] | None:
        """Learn a way to call the step; None if it is none that can be guarded here."""
        given: Any = (args, kwargs)
        arguments = self.signature.bind(*args, **kwargs).arguments
        donated = {id(x) for name in self.names if name in arguments for x in tree.leaves(arguments[name])}
        with self.lock, internals.compiling():
            found = self.find(args, kwargs)
            if found is not None and not found[0].met_only:  # another thread has learnt it while this one waited
                return found
            leaves: list[Any] = []
            try:
                structure = Structure(given, leaves)
            except UnknownContainerError:
                return None
            if not (any(isinstance(x, Tensor) for x in leaves) and all(map(_is_plain, leaves))):
                return None
            if found is not None:
                call = found[0]
            else:
                call = _Call(structure, leaves, optree.tree_structure(given, namespace=tree.NAMESPACE), donated)
                self.calls = [call, *self.calls][:_WAYS]
            call.met_only = bool(call.pieces.places) and found is None
            if not call.met_only:
                call.why = self._learn(call, given, leaves)
            tensors = [leaves[i] for i in call.places]
            made = _Given(tensors, call.pieces.of(tensors) or [])
            call.apart(made)
            return call, made

    def _learn(self, call: _Call, given: Any, leaves: list[Any]) -> str | None:
        """Compile the step for a call; or why not."""
        known = bindings(self.fn, call.structure.classes)
        if known is None:
            return "it reads something besides its arguments that may change unseen"
        if call.pieces.are_sums():
            return "some are sums over processes that are still to be made, gradients perhaps"
        # Sizes or numbers that change from call to call are Dynamo's: it makes one graph for all of them.
        if any(call.varies(other) for other in self.calls):
            return "sizes of what is not donated, or numbers, differ from those of an earlier call: give numbers as 0-dim tensors"
        if self._rebinds(given):
            return "something that it closes over is bound anew between calls"
        try:
            call.record(self.fn, self.signature, self.names, leaves, known)
        except Exception as error:  # Dynamo can do more, or says why not
            internals.log.debug("%s is left to Dynamo", self.fn, exc_info=True)
            moved = "setup_context" in str(error)  # of torch's function that moves such tensors
            return "a tensor lies otherwise than what it meets, gradients than parameters perhaps" if moved else str(error)
        return None if call.program is not None else "tensors that it reads share memory, or are negative or conjugate in name only"

    def _rebinds(self, given: Any) -> bool:
        """Whether calls like this one have been traced too often, for other things that the step found outside of its arguments."""
        alike = sum(call.program is not None and call.tensors(given) is not None for call in self.calls)
        if alike < _REBINDINGS:
            return False
        warnings.warn(
            f"{getattr(self.fn, '__qualname__', self.fn)!r} was compiled {alike} times for the same arguments, as something that "
            "it closes over is bound anew between calls. Pass it as an argument, a number as a 0-dim tensor: it is compiled once. "
            "From now on torch.compile guards it.",
            stacklevel=6,
        )
        return True
