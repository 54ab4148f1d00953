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

from optfn import tree

__all__ = ["compile"]


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

    With ``donate`` the step records nothing for autograd (``torch.func`` transforms inside ``fn`` work as ever).

    Args:
        fn: a pure function of trees of tensors.
        donate: the names or positions of the arguments to donate.
        backend: a backend of :func:`torch.compile`.

    Raises:
        ValueError: when made, if ``donate`` names no argument of ``fn``; when called, if a tensor that is donated appears
            twice among the arguments, or no result has its shape and dtype.
        TypeError: when called, if a donated leaf is no tensor.

    Example:
        >>> halve = optfn.compile(lambda params: {"w": params["w"] / 2}, donate="params", backend="aot_eager")
        >>> params = {"w": torch.tensor([2.0, 4.0])}
        >>> new = halve(params)
        >>> new["w"] is params["w"], params["w"]
        (True, tensor([1., 2.]))
    """
    signature = inspect.signature(fn)
    donated = _positions(signature, donate)

    def step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = fn(*args, **kwargs)
        if not donated:
            return result, []
        given = [(name, args[i] if i < len(args) else kwargs[name]) for i, name in donated]
        return _replace(result, given)

    compiled = torch.compile(step, fullgraph=True, backend=_protecting(backend) if donated else backend)
    checked: list[int] = []

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        if donated:
            bound = signature.bind(*args, **kwargs)
            args, kwargs = bound.args, bound.kwargs
            leaves = tree.flatten((args, kwargs))[0]
            identities = [id(x) for x in leaves]
            if identities != checked:
                _check_memory(signature, args, kwargs, [name for _, name in donated])
                checked[:] = identities
        try:
            if not donated:
                return compiled(args, kwargs)[0]
            with torch.no_grad():
                result, late = compiled(args, kwargs)
                for old, new in late:
                    old.copy_(new)
                return result
        except Exception:
            # What is wrong with the arguments is said best by the function itself, on copies.
            args, kwargs = tree.map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (args, kwargs))
            with torch.no_grad():
                step(args, kwargs)
            raise

    return run


def _positions(signature: inspect.Signature, donate: str | int | Iterable[str | int]) -> list[tuple[int, str]]:
    """Position and name of the donated arguments, in the order of the signature."""
    names = list(signature.parameters)
    chosen = [donate] if isinstance(donate, str | int) else list(donate)
    for which in chosen:
        if which not in names if isinstance(which, str) else not 0 <= which < len(names):
            raise ValueError(f"donate: the function has no argument {which!r}; its arguments are {', '.join(names)}")
    wanted = {which if isinstance(which, str) else names[which] for which in chosen}
    return [(i, name) for i, name in enumerate(names) if name in wanted]


def _check_memory(signature: inspect.Signature, args: Any, kwargs: Any, donated: list[str]) -> None:
    """Raise if the memory of a donated tensor is also another argument's, or is no memory of its own to write to."""
    owners: list[tuple[int, int, str, bool]] = []
    for name, argument in signature.bind(*args, **kwargs).arguments.items():
        for path, x in zip(tree.paths(argument), tree.flatten(argument)[0], strict=True):
            full = f"{name}.{path}" if path else name
            if not isinstance(x, Tensor):
                if name in donated and x is not None:
                    raise TypeError(f"donate: {full!r} must be a tensor, got {type(x).__name__}")
                continue
            if name in donated and any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
                raise ValueError(f"donate: {full!r} is expanded: its entries share memory; donate x.clone()")
            if x.layout == torch.strided and x.numel():
                span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
                owners.append((x.data_ptr(), x.data_ptr() + span * x.element_size(), full, name in donated))
    owners.sort()
    for (_, end, first, one), (begin, _, second, other) in itertools.pairwise(owners):
        if begin < end and (one or other):
            raise ValueError(f"donate: {first!r} and {second!r} share memory: a donated tensor may appear once; clone one of them")


def _replace(result: Any, given: list[tuple[str, Any]]) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Write the results into the donated tensors and put these in their place; what is left shares no memory with them.

    Returns:
        The result, and the pairs that are left to copy outside of the graph: torch 2.13 silently drops what a graph writes to
        a 0-dim float64 tensor on the CPU, which it takes for a Python number.
    """
    leaves, spec = tree.flatten(result)
    targets = _targets(result, given)
    # All values first, each in memory of its own: a result may be (a view of) a donated tensor.
    new: list[Any] = [x.clone() if isinstance(x, Tensor) and targets.get(i) is not x else x for i, x in enumerate(leaves)]
    late: list[tuple[Tensor, Tensor]] = []
    for i, old in targets.items():
        value = new[i]
        new[i] = old
        if value is old:
            continue
        if old.ndim == 0 and old.dtype == torch.float64 and old.device.type == "cpu":
            late.append((old, value))
        else:
            old.copy_(value)
    return tree.unflatten(spec, new), late


def _targets(result: Any, given: list[tuple[str, Any]]) -> dict[int, Any]:
    """Which donated tensor each leaf of the result is written to."""
    leaves, spec = tree.flatten(result)
    targets: dict[int, Any] = {}

    def fits(i: int, x: Any) -> bool:
        y = leaves[i]
        if x is None or not isinstance(y, Tensor):
            return x is None and y is None
        return i not in targets and x.shape == y.shape and x.dtype == y.dtype and x.device == y.device

    rest: list[tuple[str, Any]] = []
    for name, argument in given:
        wanted, structure = tree.flatten(argument)
        for part in tree.subtrees(tree.unflatten(spec, list(range(len(leaves))))):
            found, other = tree.flatten(part)
            if other == structure and all(fits(i, x) for i, x in zip(found, wanted, strict=True)):
                targets.update({i: x for i, x in zip(found, wanted, strict=True) if x is not None})
                break
        else:
            rest.append((name, argument))
    for name, argument in rest:
        for path, x in zip(tree.paths(argument), tree.flatten(argument)[0], strict=True):
            place = next((i for i in range(len(leaves)) if x is not None and fits(i, x)), None)
            if place is not None:
                targets[place] = x
            elif x is not None:
                full = f"{name}.{path}" if path else name
                raise ValueError(
                    f"donate: {full!r} is {x.dtype} of shape {tuple(x.shape)}, and no result of that kind is left to replace it; "
                    f"return its new value, or do not donate {name!r}"
                )
    return targets


@torch.library.custom_op("optfn::copy", mutates_args=())
def _opaque_copy(x: Tensor) -> Tensor:
    return x.clone()


@_opaque_copy.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _protecting(backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """A backend that keeps copies of tensors which the graph overwrites.

    Inductor takes a clone of an input for the input itself, also where the input is overwritten before the clone is used, as in
    ``a, b = b, a`` (seen in torch 2.13). Such clones are made by an operator it cannot see through.
    """

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nodes = list(graph.graph.nodes)
        overwritten = {_storage(n.args[0]) for n in nodes if n.op == "call_method" and n.target == "copy_"}
        for node in nodes:
            if node.target in ("clone", torch.clone) and _storage(node.args[0]) in overwritten:
                with graph.graph.inserting_before(node):
                    copy = graph.graph.call_function(torch.ops.optfn.copy.default, (node.args[0],))
                copy.meta = dict(node.meta)
                node.replace_all_uses_with(copy)
                graph.graph.erase_node(node)
        graph.recompile()
        return lookup_backend(backend)(graph, inputs)

    return compile_graph


def _storage(node: torch.fx.Node) -> int:
    """What tells apart the memory of tensors in a traced graph."""
    return node.meta["example_value"].untyped_storage()._cdata
