"""A pure step, compiled, that writes into the buffers it is given."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch._dynamo import lookup_backend

from optfn import rows, tree

__all__ = ["compile"]

_count = itertools.count()

# Inductor of torch 2.11 fuses what reads other entries of a tensor (a row, a sum) with what writes that tensor, and reads what
# has been written. There the results are copied after the graph: right, but one more pass over memory.
_WRITES_IN_GRAPH: bool = torch.__version__ >= (2, 13)  # pyright: ignore[reportOperatorIssue]


def compile(
    fn: Callable[..., Any], *, donate: str | int | Iterable[str | int] = (), backend: str | Callable[..., Any] = "inductor"
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

    Args:
        fn: a pure function of trees of tensors.
        donate: the names or positions of the arguments to donate.
        backend: a backend of :func:`torch.compile`.

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
    signature = inspect.signature(fn)
    donated = _donated(signature, donate)

    def step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = fn(*args, **kwargs)
        if not donated:
            return result, []
        given = [(name, args[i] if i < len(args) else kwargs[name]) for i, name in donated if i < len(args) or name in kwargs]
        return _replace(result, given)

    # Dynamo keeps its graphs, their number and the sizes seen with the code object, which all closures share: each gets its own.
    step.__code__ = step.__code__.replace(co_name=f"step_{next(_count)}")
    if donated and backend not in ("eager", "aot_eager"):
        _lower_copies()
    compiled = torch.compile(step, fullgraph=True, backend=_apart(backend) if donated else backend)

    def on_rows(bound: inspect.BoundArguments) -> Any:
        if not donated:
            return fn(*bound.args, **bound.kwargs)
        given = [(name, bound.arguments[name]) for _, name in donated if name in bound.arguments]
        return rows.step_on_rows(
            fn, bound.args, bound.kwargs, tree.leaves([x for _, x in given]), lambda leaves, spec: _targets(leaves, spec, given)
        )

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if donated:
            _check_memory(bound.arguments, {name for _, name in donated})
        if rows.holds_sparse(bound.arguments):
            return on_rows(bound)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not donated):
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


def _donated(signature: inspect.Signature, donate: str | int | Iterable[str | int]) -> list[tuple[int, str]]:
    """Position and name of the donated arguments, in the order of the signature."""
    names = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    chosen = [donate] if isinstance(donate, str | int) else list(donate)
    for which in chosen:
        if which not in names if isinstance(which, str) else not 0 <= which < len(names):
            raise ValueError(f"donate: the function has no argument {which!r}; its arguments are {', '.join(names)}")
    wanted = {which if isinstance(which, str) else names[which] for which in chosen}
    return [(i, name) for i, name in enumerate(names) if name in wanted]


def _error(step: Callable[..., Any], bound: inspect.BoundArguments) -> Exception | None:
    """What the step raises when it is run eagerly, on copies of its arguments."""

    def copy(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    try:
        step(*tree.map(copy, (bound.args, bound.kwargs)))
    except Exception as error:
        return error
    return None


def _check_memory(arguments: dict[str, Any], donated: set[str]) -> None:
    """Raise if a donated leaf is no tensor with memory of its own: one that no other argument has, and no two of its entries."""
    spans: list[tuple[int, int, bool, str, int]] = []
    seen: dict[int, tuple[bool, str, int]] = {}

    def shared(first: tuple[Any, ...], second: tuple[Any, ...]) -> ValueError:
        one, other = (_path(name, arguments[name], i) for *_, name, i in (first, second))
        return ValueError(f"donate: {one!r} and {other!r} share memory: a donated tensor may appear once; clone one of them")

    for name, argument in arguments.items():
        given = name in donated
        for i, x in enumerate(tree.flatten(argument)[0]):
            if x is None or (not given and (not isinstance(x, Tensor) or x.layout != torch.strided)):
                continue
            if not isinstance(x, Tensor) or x.layout != torch.strided:
                kind = x.layout if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"donate: {_path(name, argument, i)!r} must be a dense tensor, got {kind}")
            if given and not _distinct(x):
                raise ValueError(f"donate: {_path(name, argument, i)!r} is expanded: its entries share memory; donate x.clone()")
            owner = (given, name, i)
            earlier = seen.setdefault(id(x), owner)
            if earlier is not owner and (given or earlier[0]):
                raise shared(earlier, owner)
            if x.numel() and (begin := x.data_ptr()):
                extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
                spans.append((begin, begin + extent * x.element_size(), *owner))

    spans.sort()
    furthest: dict[bool, tuple[Any, ...]] = {}
    for span in spans:
        for given, before in furthest.items():
            if span[0] < before[1] and (given or span[2]):
                raise shared(before, span)
        if span[2] not in furthest or furthest[span[2]][1] < span[1]:
            furthest[span[2]] = span


def _path(name: str, argument: Any, i: int) -> str:
    return ".".join(filter(None, (name, tree.paths(argument)[i])))


def _distinct(x: Tensor) -> bool:
    """Whether every entry of a tensor has a place of its own in memory: each stride steps over what the smaller ones reach."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return x.numel() == 0
            extent += (size - 1) * stride
    return True


def _replace(result: Any, given: list[tuple[str, Any]]) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Write the results into the donated tensors and put these in their place; what is left shares no memory with them.

    Returns:
        The result, and the pairs that are left to copy outside of the graph: all before torch 2.13, and what torch 2.13 silently
        drops, writes to a 0-dim float64 tensor on the CPU, which it takes for a Python number.
    """
    leaves, spec = tree.flatten(result)
    targets = _targets(leaves, spec, given)
    # All values first, each in memory of its own: a result may be (a view of) a donated tensor.
    new: list[Any] = [_copy(x) if isinstance(x, Tensor) and targets.get(i) is not x else x for i, x in enumerate(leaves)]
    late: list[tuple[Tensor, Tensor]] = []
    for i, old in targets.items():
        value = new[i]
        new[i] = old
        if value is old:
            continue
        if not _WRITES_IN_GRAPH or (old.ndim == 0 and old.dtype == torch.float64 and old.device.type == "cpu"):
            late.append((old, value))
        else:
            old.copy_(value)
    return tree.unflatten(spec, new), late


def _targets(leaves: list[Any], spec: Any, given: list[tuple[str, Any]]) -> dict[int, Any]:
    """Which donated tensor each leaf of the result is written to."""
    parts: list[tuple[Any, int]] = [(spec, 0)]  # the result, what it is made of and so on, and where their leaves begin
    reached = 0
    while reached < len(parts):
        part, start = parts[reached]
        reached += 1
        for child in part.children():
            parts.append((child, start))
            start += child.num_leaves

    targets: dict[int, Any] = {}

    def fits(i: int, x: Any) -> bool:
        y = leaves[i]
        if x is None or not isinstance(y, Tensor):
            return x is None and y is None
        return i not in targets and x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and y.layout == torch.strided

    rest: list[tuple[str, Any]] = []
    for name, argument in given:
        wanted, structure = tree.flatten(argument)
        for part, start in parts:
            if part.num_leaves == len(wanted) and part == structure and all(fits(start + j, x) for j, x in enumerate(wanted)):
                targets.update({start + j: x for j, x in enumerate(wanted) if x is not None})
                break
        else:
            rest.append((name, argument))
    for name, argument in rest:
        for j, x in enumerate(tree.flatten(argument)[0]):
            place = next((i for i in range(len(leaves)) if x is not None and fits(i, x)), None)
            if place is not None:
                targets[place] = x
            elif x is not None:
                raise ValueError(
                    f"donate: {_path(name, argument, j)!r} is {x.dtype} of shape {tuple(x.shape)}, and no result of that kind is "
                    f"left to replace it; return its new value, or do not donate {name!r}"
                )
    return targets


@torch.library.custom_op("optfn::copy", mutates_args=())
def _copy(x: Tensor) -> Tensor:
    """A copy that is made before the graph writes to ``x``.

    Inductor takes for an input itself whatever it can see to equal it (a clone, a slice of everything, the half of a
    concatenation), also where the input is overwritten before that is used, as in ``a, b = b, a`` (seen in torch 2.13).
    It cannot see through this operator.
    """
    return x.clone()


@_copy.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@functools.cache
def _lower_copies() -> None:
    """Let Inductor, when it comes to generate code, fuse the copies with what computes and what uses them."""
    from torch._inductor import lowering

    op = torch.ops.optfn.copy.default
    call = lowering.fallback_handler(op, add_to_fallback_set=False)

    def lower(x: Any) -> Any:
        return call(x) if x.get_dtype().is_complex else lowering.clone(x)

    lowering.register_lowering(op, type_promotion_kind=None)(lower)


def _apart(backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """A backend that keeps the reads of donated tensors apart from the writes, by a copy, in a graph with complex numbers.

    Inductor has no code of its own for views that are complex, or of what is, and calls torch for them; it then does not see
    that such a view of an input changes when the input is written to (torch 2.13).
    """

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nodes = list(graph.graph.nodes)
        if any(isinstance(x := node.meta.get("example_value"), Tensor) and x.is_complex() for node in nodes):
            writes = [node for node in nodes if node.target == "copy_" and node.args[0].op == "placeholder"]
            first = next(node for node in nodes if node.op != "placeholder")
            for write in writes:
                x = write.args[0]
                users = [user for user in x.users if user.op != "output" and user is not write]
                with graph.graph.inserting_before(first):
                    copy = graph.graph.call_function(torch.ops.optfn.copy.default, (x,))
                copy.meta = dict(x.meta)
                for user in users:
                    user.replace_input_with(x, copy)
            graph.recompile()
        return lookup_backend(backend)(graph, inputs)

    return compile_graph
