"""All that is used of torch's private interfaces, in one place."""

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.fx
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from optfn.compile.donation import copy

__all__ = [
    "Guards",
    "OpOverload",
    "OpOverloadPacket",
    "available",
    "compile_regions",
    "compile_with_inductor",
    "decompositions",
    "fake_mode",
    "fake_of",
    "is_pure",
    "no_modes",
    "prepare_model",
]

# Inductor of torch 2.11 fuses what reads other entries of a tensor (a row, a sum) with what writes that tensor, and reads what
# has been written.
KEEPS_ORDER: bool = torch.__version__ >= (2, 13)  # pyright: ignore[reportOperatorIssue]


_NEEDED = {
    "torch._C._dynamo.guards": ("GlobalStateGuard", "TensorGuards"),
    "torch._functorch.config": ("patch",),
    "torch._guards": ("TracingContext", "tracing"),
    "torch._inductor.async_compile": ("AsyncCompile",),
    "torch._inductor.compile_fx": ("compile_fx", "compile_fx_inner"),
    "torch._inductor.config": ("alignment_asserts", "patch", "scalar_asserts", "size_asserts"),
    "torch._inductor.decomposition": ("select_decomp_table",),
    "torch._inductor.fx_passes.joint_graph": ("joint_graph_passes",),
    "torch._inductor.lowering": ("clone", "fallback_handler", "register_lowering"),
    "torch._inductor.virtualized": ("V",),
    "torch._subclasses.fake_tensor": ("FakeTensor", "FakeTensorMode"),
    "torch.fx.experimental.symbolic_shapes": ("ShapeEnv",),
    "torch.utils._python_dispatch": ("TorchDispatchMode", "_disable_current_modes"),
}


@functools.cache
def available() -> bool:
    """Whether this torch has what is used here; if not, warn, once, and say what is missing."""
    for module, names in _NEEDED.items():
        try:
            missing = [name for name in names if not hasattr(importlib.import_module(module), name)]
        except ImportError:
            missing = ["the module"]
        if missing:
            warnings.warn(
                f"optfn.compile does not know torch {torch.__version__}, where {module} lacks {', '.join(missing)}: steps are "
                "compiled by torch.compile alone, which takes longer and is slower. A newer optfn may know this torch.",
                stacklevel=2,
            )
            return False
    return True


def is_pure(target: Any) -> bool:
    """Whether a graph's target is an operator whose result is a function of its arguments."""
    if not isinstance(target, OpOverload) or target._schema.is_mutable:  # pyright: ignore[reportPrivateUsage]
        return False
    return not {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output}.intersection(target.tags)


def fake_mode() -> Any:
    """A mode in which calls give fake tensors, which have no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_of(mode: Any, x: Tensor) -> Any:
    """A fake tensor with the metadata of ``x``."""
    with no_modes():
        return mode.from_tensor(x.detach(), static_shapes=True)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What Inductor takes operators apart into."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def compile_regions(graphs: list[tuple[torch.fx.Graph, list[Any]]]) -> list[Callable[[list[Any]], Sequence[Any]]]:
    """Generate code for graphs of ATen operators with these fake inputs.

    The C++ compiler works on one while the code of the next is generated; the largest is the first.

    Returns:
        Functions that empty the list of inputs that they are given.
    """
    from torch._inductor.async_compile import AsyncCompile

    _lower_copies()
    waiting: list[Callable[[], None]] = []
    wait = AsyncCompile.wait
    by_size = sorted(range(len(graphs)), key=lambda i: -len(graphs[i][0].nodes))
    with mock.patch.object(AsyncCompile, "wait", lambda self, scope: waiting.append(lambda: wait(self, scope))):
        made = {i: _compile_region(*graphs[i]) for i in by_size}
    for ready in waiting:
        ready()
    return [made[i] for i in range(len(graphs))]


def _compile_region(graph: torch.fx.Graph, fakes: list[Any]) -> Callable[[list[Any]], Sequence[Any]]:
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    _sum_by_rows(graph)
    module = torch.fx.GraphModule({}, graph)
    mode: Any = next(x.fake_mode for n in graph.nodes if isinstance(x := n.meta.get("val"), FakeTensor))
    if mode.shape_env is None:  # without one Inductor's cache is not used; tracing is faster without
        mode.shape_env = ShapeEnv()
    output: Any = next(n for n in graph.nodes if n.op == "output")
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
    # What is asserted of every input at every call has been guarded already.
    with tracing(TracingContext(mode)), config.patch(size_asserts=False, alignment_asserts=False, scalar_asserts=False):
        return compile_fx_inner(module, fakes, is_inference=True)


def compile_with_inductor(
    module: torch.fx.GraphModule, inputs: list[Any], inner: Callable[..., Any], options: dict[str, Any], table: dict[Any, Any]
) -> Any:
    """Inductor's own way from a graph of Dynamo's, with ``inner(compile, module, inputs, **kwargs)`` where it generates code.

    ``table`` is what operators are decomposed into.

    The cache of whole graphs is off: it would give back what plain Inductor made of the same graph.
    """
    import torch._functorch.config as functorch_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    _lower_copies()
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(module, inputs, functools.partial(inner, compile_fx_inner), options or None, table)


def _sum_by_rows(graph: torch.fx.Graph) -> None:
    """Let sums of all entries of large tensors be sums of sums of rows.

    Inductor's C++ keeps one long sum in memory, and waits for that at every step (torch 2.13: half the speed of memory). For rows
    that are not too long it keeps it in a register. Sums of rows are as exact.
    """
    aten = torch.ops.aten
    for n in list(graph.nodes):
        if n.target not in (aten.sum.default, aten.sum.dim_IntList) or n.meta["val"].ndim:
            continue
        x: Any = n.args[0]
        value: Tensor = x.meta["val"]
        row = next((r for r in (32768, 16384, 8192, 4096) if value.numel() % r == 0 and value.numel() >= 4 * r), None)
        if (
            row is None
            or value.device.type != "cpu"
            or value.dtype not in (torch.float32, torch.float64)
            or not value.is_contiguous()
        ):
            continue
        with graph.inserting_before(n):
            rows = graph.call_function(aten.view.default, (x, [-1, row]))
            sums = graph.call_function(aten.sum.dim_IntList, (rows, [1]))
        rows.meta["val"] = value.view(-1, row)
        sums.meta["val"] = value.new_empty(value.numel() // row)
        n.args = (sums, *n.args[1:])


@functools.cache
def _lower_copies() -> None:
    """Let Inductor, when it comes to generate code, fuse the copies with what computes and what uses them."""
    from torch._inductor import lowering

    op = torch.ops.optfn.copy.default
    call = lowering.fallback_handler(op, add_to_fallback_set=False)

    def lower(x: Any) -> Any:
        return call(x) if x.get_dtype().is_complex else lowering.clone(x)

    lowering.register_lowering(op, type_promotion_kind=None)(lower)
    assert copy  # its module defines the operator


def prepare_model(graph: torch.fx.Graph) -> None:
    """What Inductor changes in a graph that holds a model before it generates code: attention that it knows, for one."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V

    mode = next(n for n in graph.nodes if n.op == "placeholder").meta["val"].fake_mode
    with no_modes(), tracing(TracingContext(mode)), V.set_fake_mode(mode):
        joint_graph_passes(torch.fx.GraphModule({}, graph))


def no_modes() -> Any:
    """A context in which calls are what they are, whoever traces outside of it."""
    from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

    return _disable_current_modes()


class Guards:
    """Whether tensors have the types, dtypes, devices, shapes and strides of the first ones, and torch the same global state."""

    def __init__(self, tensors: list[Tensor]) -> None:
        from torch._C._dynamo.guards import GlobalStateGuard, TensorGuards

        sizes: Any = [list(x.shape) for x in tensors]
        strides: Any = [list(x.stride()) for x in tensors]
        self.count = len(tensors)
        self.tensors = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self.state = GlobalStateGuard()

    def fit(self, tensors: list[Tensor]) -> bool:
        """Whether these are such tensors."""
        return len(tensors) == self.count and self.state.check() and self.tensors.check(*tensors)
