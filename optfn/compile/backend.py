"""The torch.compile backend "optfn": Inductor, region by region."""

import operator
import threading
from collections.abc import Callable
from typing import Any

import torch.fx
from torch import Tensor
from torch.fx import GraphModule

from optfn.compile import internals
from optfn.compile.donation import Memory
from optfn.compile.failing import strict
from optfn.compile.phases import is_write
from optfn.compile.regions import split

__all__ = ["EagerError", "backend"]


class EagerError(Exception):
    """A compiled step would be wrong for this call; nothing has been written."""


def backend(graph: GraphModule, inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None) -> Any:
    """A backend of :func:`torch.compile`: Inductor, with every region of a graph that occurs again compiled once.

    ``torch.compile(step, backend="optfn")`` gives what ``torch.compile(step)`` gives. A step of many layers compiles in the time of
    one, and scalars that many tensors read are computed once. Graphs of varying sizes, and those for autograd, go to Inductor
    whole.

    Args:
        graph: a graph of Dynamo's.
        inputs: its example inputs.
        mode: must be None: modes are Inductor's.
        options: Inductor's options, as torch.compile takes them.

    Example:
        >>> halved = torch.compile(lambda x: x / 2, backend=backend)
    """
    if mode is not None:
        raise ValueError(f"the backend 'optfn' has no modes, got {mode!r}; use options={{...}} with Inductor's options")
    return internals.compile_with_inductor(graph, inputs, _inner, options or {}, strict(internals.decompositions()))


def _inner(whole: Callable[..., Any], module: GraphModule, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    if not kwargs.get("is_inference") or not _splits(module, inputs):
        return whole(module, inputs, *args, **kwargs)
    given = [n for n in module.graph.nodes if n.op == "placeholder"]
    written = {n.all_input_nodes[0] for n in module.graph.nodes if is_write(n)}
    memory = Memory(inputs, [i for i, n in enumerate(given) if n in written])
    constants = _take_constants(module)
    with internals.no_modes():
        program = split(module.graph, internals.compile_regions)

    def run(values: list[Any]) -> Any:
        with lock:
            if written and not memory.apart(values):
                raise EagerError("what is written shares memory with another tensor that the step reads")
        values.extend(constants)
        return program(values)

    lock = threading.Lock()
    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _splits(module: GraphModule, inputs: Any) -> bool:
    """Whether a graph is what :func:`split` takes: pure calls on tensors of known sizes, then writes to its inputs."""
    known = all(isinstance(x, Tensor) and all(type(n) is int for n in (*x.shape, *x.stride())) for x in inputs)
    return known and all(_is_pure(n) for n in module.graph.nodes)


def _take_constants(module: GraphModule) -> list[Tensor]:
    """The tensors that a graph was made with, which are inputs of it from now on, the last ones."""
    found: list[Tensor] = []
    last = next((n for n in reversed(module.graph.nodes) if n.op == "placeholder"), None)
    for n in [n for n in module.graph.nodes if n.op == "get_attr"]:
        with module.graph.inserting_after(last) if last else module.graph.inserting_before():
            last = module.graph.placeholder(f"constant_{len(found)}")
        last.meta.update(n.meta)
        found.append(getattr(module, str(n.target)))
        n.replace_all_uses_with(last)
        module.graph.erase_node(n)
    return found


def _is_pure(n: torch.fx.Node) -> bool:
    if n.op == "get_attr":
        return type(getattr(n.graph.owning_module, str(n.target), None)) is Tensor and isinstance(n.meta.get("val"), Tensor)
    if n.op != "call_function":
        return n.op in ("placeholder", "output")
    if is_write(n):
        return n.all_input_nodes[0].op == "placeholder"
    return n.target is operator.getitem or internals.is_pure(n.target)
