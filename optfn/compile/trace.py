"""The ATen graph of a pure function, by running it once on tensors that hold no numbers."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
import torch.fx
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optfn import tree
from optfn.compile import internals
from optfn.compile.failing import strict
from optfn.compile.watch import NotTraceableError, Watch
from optfn.sharding import is_sharded

__all__ = ["NotTraceableError", "Traced", "trace"]


class Traced(NamedTuple):
    """What a function computes.

    Attributes:
        graph: placeholders, one for each input and one for each constant, calls of ATen operators, and the results;
            every node has its fake tensor in ``meta["val"]``.
        constants: tensors that the function made of Python values, or found elsewhere.
    """

    graph: torch.fx.Graph
    constants: list[Tensor]


def trace(fn: Callable[..., list[Any]], inputs: list[Tensor], homes: list[Any] | None = None) -> Traced:
    """Write down what ``fn`` computes of the inputs, equal calls once.

    :func:`torch.fx.experimental.proxy_tensor.make_fx` does the same in one and a half times the time, which counts where a step has
    ten thousand calls.

    Args:
        fn: a pure function of tensors to a list of tensors, and constants.
        inputs: dense tensors; shapes, dtypes, strides and devices are read, no numbers.
        homes: of each input the tensor of which it is this process's piece, which ``fn`` is handed; None where it is none.

    Raises:
        NotTraceableError: ``fn`` changes an argument, reads a number out of a tensor, draws random numbers, calls what is
            no operator, or asks for what a traced tensor does not have.
    """
    watch = Watch()
    recorder = _Recorder(watch)
    whole = homes or [None] * len(inputs)
    recorder.watches_pieces = any(home is not None for home in whole)

    def watched(*traced: Tensor) -> list[Any]:
        arguments = [watch.argument(x, given, home) for x, given, home in zip(traced, inputs, whole, strict=True)]
        with watch:
            return fn(*arguments)

    fakes = [internals.fake_of(recorder.mode, x) for x in inputs]
    for i, fake in enumerate(fakes):
        recorder.own(recorder.graph.placeholder(f"input_{i}"), fake)
    with torch.no_grad(), recorder.mode, recorder:
        results = torch.func.functionalize(watched)(*fakes)
    if watch.refused:
        raise NotTraceableError(watch.refused)
    node = recorder.graph.output(tuple(recorder.node(x) if isinstance(x, Tensor) else x for x in results))
    node.meta["val"] = results
    return Traced(recorder.graph, recorder.constants)


class _Recorder(TorchDispatchMode):
    """Writes each ATen call down, from beneath functionalize and the transforms of torch.func."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.mode = internals.fake_mode()
        self.graph = torch.fx.Graph()
        self.constants: list[Tensor] = []
        self.decompositions = strict(internals.decompositions())
        self.nodes: dict[int, torch.fx.Node] = {}
        self.known: dict[Any, Any] = {}
        self.held: list[Any] = []  # an id is that of one tensor for as long as the tensor lives
        self.watches_pieces = False

    def own(self, node: torch.fx.Node, x: Tensor) -> None:
        node.meta["val"] = x
        self.nodes[id(x)] = node
        self.held.append(x)

    def node(self, x: Tensor) -> torch.fx.Node:
        if id(x) not in self.nodes:
            last = next(n for n in reversed(self.graph.nodes) if n.op == "placeholder")
            with self.graph.inserting_after(last):
                node = self.graph.placeholder(f"constant_{len(self.constants)}")
            self.own(node, x)
            node.meta["val"] = internals.fake_of(self.mode, x)
            self.constants.append(x)
        return self.nodes[id(x)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.watches_pieces and any(map(is_sharded, tree.leaves((args, kwargs)))):
            self.watch.refuse(f"{func} of a tensor that lies on several processes is called, and not by a rule")
        if func in self.decompositions:
            with self:
                result = self.decompositions[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func.namespace == "aten":  # an operator that is made of others may give a view, of which Inductor would not know
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if torch.Tag.inplace_view in getattr(func, "tags", ()) and id(args[0]) in self.nodes:
            return self.reshaped(func, args, kwargs)
        if not internals.is_pure(func):
            self.watch.refuse(f"{func} is no pure operator")
        flat, spec = optree.tree_flatten((args, kwargs), none_is_leaf=True)  # type: ignore[arg-type]
        flat = [self.node(x) if isinstance(x, Tensor) else x for x in flat]
        key = (func, spec, *((type(x), repr(x) if isinstance(x, float) else x) for x in flat))  # 0.0 == -0.0
        if key in self.known and not internals.is_collective_operator(func) and func is not torch.ops.optfn.decides.default:
            # Autograd, where the function uses it, wants a tensor of its own for each call.
            return optree.tree_map(lambda x: self.alias(x) if isinstance(x, Tensor) else x, self.known[key])
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            self.watch.refuse(f"{func} raises {error!r}")  # whatever the function makes of that
            raise
        if isinstance(result, Tensor):
            self.own(self.call(func, spec, flat), result)
        elif isinstance(result, tuple | list):
            node = self.call(func, spec, flat)
            node.meta["val"] = result
            for i, x in enumerate(result):
                self.own(self.graph.call_function(operator.getitem, (node, i)), x)
        elif result is None:  # a check
            self.call(func, spec, flat).meta["val"] = None
        self.known[key] = result
        return result  # what is no tensor is no part of the graph: a device, a size

    def call(self, func: Any, spec: Any, flat: list[Any]) -> torch.fx.Node:
        args: Any = optree.tree_unflatten(spec, flat)
        return self.graph.call_function(func, args[0], args[1])

    def reshaped(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """The view for what makes a tensor a view of itself, as the product of a vector and a matrix does."""
        x, node = args[0], self.nodes[id(args[0])]
        node.meta["val"] = x.detach()
        view = getattr(getattr(torch.ops.aten, func.overloadpacket.__name__.removesuffix("_")), func._overloadname)
        result = func(*args, **kwargs)
        self.known = {key: y for key, y in self.known.items() if y is not x}
        self.own(self.graph.call_function(view, (node, *args[1:]), kwargs), x)
        return result

    def alias(self, x: Tensor) -> Tensor:
        y = x.detach()
        self.nodes[id(y)] = self.nodes[id(x)]
        self.held.append(y)
        return y
