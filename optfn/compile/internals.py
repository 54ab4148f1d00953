"""All that is used of torch's private interfaces, in one place."""

import contextlib
import contextvars
import functools
import importlib
import logging
import os
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

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
    "compiling",
    "decompositions",
    "deferring",
    "fake_mode",
    "fake_of",
    "function_modes",
    "guarded",
    "is_collective_operator",
    "is_narrow",
    "is_of_transforms",
    "is_operator",
    "is_pure",
    "is_read_off_kind",
    "is_requires_grad",
    "is_transformed",
    "log",
    "no_modes",
    "prepare_model",
]

log = logging.getLogger("optfn.compile")

aten = torch.ops.aten

# Inductor of torch 2.11 fuses what reads other entries of a tensor (a row, a sum) with what writes that tensor, and reads what
# has been written.
KEEPS_ORDER: bool = torch.__version__ >= (2, 13)  # pyright: ignore[reportOperatorIssue]


_NEEDED = {
    "torch._C": (
        "TensorBase",
        "_VariableFunctions",
        "_len_torch_dispatch_stack",
        "_len_torch_function_stack",
        "_get_function_stack_at",
    ),
    "torch._C._dynamo.guards": ("GlobalStateGuard", "TensorGuards"),
    "torch._C._functorch": ("peek_interpreter_stack",),
    "torch._dynamo.config": ("patch", "skip_nnmodule_hook_guards"),
    "torch._dynamo.convert_frame": ("compile_lock",),
    "torch._functorch": ("eager_transforms", "vmap"),
    "torch._functorch.config": ("patch",),
    "torch._guards": ("TracingContext", "tracing"),
    "torch._inductor.async_compile": ("AsyncCompile",),
    "torch._inductor.compile_fx": ("compile_fx", "compile_fx_inner"),
    "torch._inductor.config": (
        *(
            "_pre_fusion_custom_pass",
            "alignment_asserts",
            "compile_threads",
            "emulate_precision_casts",
            "patch",
            "scalar_asserts",
            "size_asserts",
        ),
    ),
    "torch._inductor.custom_graph_pass": ("CustomSchedulerPass",),
    "torch._inductor.decomposition": ("select_decomp_table",),
    "torch._inductor.fx_passes.joint_graph": ("joint_graph_passes",),
    "torch._inductor.lowering": ("clone", "fallback_handler", "register_lowering"),
    "torch._inductor.virtualized": ("V",),
    "torch._subclasses.fake_tensor": ("FakeTensor", "FakeTensorMode"),
    "torch.fx.experimental.symbolic_shapes": ("ShapeEnv",),
    "torch.utils._device": ("DeviceContext",),
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


# They give nothing, and raise or do nothing else.
_CHECKS = ("aten::_assert_async", "aten::_assert_tensor_metadata", "aten::_linalg_check_errors")


def is_pure(target: Any) -> bool:
    """Whether a graph's target is an operator whose result is a function of its arguments."""
    if not isinstance(target, OpOverload):
        return False
    schema = target._schema  # pyright: ignore[reportPrivateUsage]
    if schema.is_mutable or not (schema.returns or schema.name in _CHECKS):
        return False  # what gives nothing is called for what it does
    return not {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output}.intersection(target.tags)


def is_computed(target: Any) -> bool:
    """Whether what a graph's target gives is in memory of its own."""
    return isinstance(target, OpOverload) and not target.is_view


def fake_mode() -> Any:
    """A mode in which calls give fake tensors, which have no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_of(mode: Any, x: Tensor) -> Any:
    """A fake tensor with the metadata of ``x``."""
    with no_modes():
        return mode.from_tensor(x.detach(), static_shapes=True)


_NARROW = (torch.bfloat16, torch.float16)


def is_narrow(x: Any) -> bool:
    """Whether a tensor has half precision."""
    return isinstance(x, Tensor) and x.dtype in _NARROW


@functools.cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """What Inductor takes operators apart into; elementwise ones in float32, as torch computes them."""
    from torch._inductor.decomposition import select_decomp_table

    def elementwise(op: Any) -> bool:
        return isinstance(op, OpOverload) and torch.Tag.pointwise in op.tags

    return {op: _in_float32(call) if elementwise(op) else call for op, call in select_decomp_table().items()}


def _in_float32(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def wide(*args: Any, **kwargs: Any) -> Any:
        dtypes = {x.dtype for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()}
        if len(dtypes) != 1 or not dtypes.issubset(_NARROW):
            return call(*args, **kwargs)

        def widen(x: Any) -> Any:
            return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

        result = call(*map(widen, args), **{name: widen(x) for name, x in kwargs.items()})
        return result.to(dtypes.pop()) if isinstance(result, Tensor) and result.dtype == torch.float32 else result

    return wide


def compiling() -> contextlib.AbstractContextManager[Any]:
    """The lock that torch.compile holds while it traces and compiles; a thread that holds it may take it again."""
    from torch._dynamo.convert_frame import compile_lock

    return compile_lock


def compile_regions(graphs: list[tuple[torch.fx.Graph, list[Any]]]) -> list[Callable[[list[Any]], Sequence[Any]]]:
    """Generate code for graphs of ATen operators with these fake inputs.

    The C++ compiler works on one while the code of the next is generated; the largest is the first.

    Returns:
        Functions that empty the list of inputs that they are given.
    """
    by_size = sorted(range(len(graphs)), key=lambda i: -len(graphs[i][0].nodes))
    waits: list[Callable[[], None]] = []
    with compiling(), _own_threads():
        _lower_copies()
        before = _waits.set(waits)
        try:
            made = {i: _compile_region(*graphs[i]) for i in by_size}
        finally:
            _waits.reset(before)
        for wait in waits:
            wait()
    return [made[i] for i in range(len(graphs))]


# What is left to wait for, in the thread that compiles regions.
_waits: contextvars.ContextVar[list[Callable[[], None]] | None] = contextvars.ContextVar("waits", default=None)


@functools.cache
def deferring(async_compile: type) -> type:
    """The class by which a module of Inductor's waits for the C++ compiler when it is loaded, such that it waits later.

    The modules of regions ask for it themselves, so that nothing of torch is patched, and other threads wait as ever.
    """

    class Deferring(async_compile):  # pyright: ignore[reportUntypedBaseClass]
        def wait(self, scope: dict[str, Any]) -> None:
            waits, wait = _waits.get(), functools.partial(super().wait, scope)
            if waits is None:
                wait()
            else:
                waits.append(wait)

    return Deferring


@functools.cache
def _deferring_pass() -> Any:
    from torch._inductor.custom_graph_pass import CustomSchedulerPass
    from torch._inductor.virtualized import V

    class DeferringPass(CustomSchedulerPass):
        """Nothing is done to the graph, but a line is written at the head of its module."""

        def __call__(self, nodes: list[Any]) -> list[Any]:
            V.graph.wrapper_code.add_import_once(
                f"from {__name__} import deferring as _deferring; AsyncCompile = _deferring(AsyncCompile)"
            )
            return nodes

        def uuid(self) -> str:
            return "optfn 1"  # a part of the key under which Inductor keeps the code

    return DeferringPass()


_PROCESS = os.getpid()
_SHIFTS = {
    getattr(getattr(torch.ops.aten, name), overload)
    for name in ("bitwise_right_shift", "__rshift__")
    for overload in getattr(torch.ops.aten, name).overloads()
}


def _own_threads() -> Any:
    """In a forked process, a context in which the C++ compiler is not left to threads that only the first process has."""
    from torch._inductor import config

    return config.patch(compile_threads=1) if os.getpid() != _PROCESS else contextlib.nullcontext()


def _compile_region(graph: torch.fx.Graph, fakes: list[Any]) -> Callable[[list[Any]], Sequence[Any]]:
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    module = torch.fx.GraphModule({}, graph)
    mode: Any = next(x.fake_mode for n in graph.nodes if isinstance(x := n.meta.get("val"), FakeTensor))
    if mode.shape_env is None:  # without one Inductor's cache is not used; tracing is faster without
        mode.shape_env = ShapeEnv()
    output: Any = next(n for n in graph.nodes if n.op == "output")
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
    options: dict[str, Any] = {
        # What is asserted of every input at every call has been guarded already.
        **dict.fromkeys(("size_asserts", "alignment_asserts", "scalar_asserts"), False),
        # Else Inductor takes for a value that was made narrow and wide again the value itself.
        "emulate_precision_casts": any(is_narrow(n.meta.get("val")) for n in graph.nodes) or config.emulate_precision_casts,
    }
    if any(n.target in _SHIFTS for n in graph.nodes):
        # A generator of random numbers uses each word several times, round after round. Inductor looks at every way through the
        # rounds since the last value that it names: thirty operations back it takes half a minute, eight back a second.
        options["realize_opcount_threshold"] = 8
    if config._pre_fusion_custom_pass is None:  # pyright: ignore[reportPrivateUsage]
        options["_pre_fusion_custom_pass"] = _deferring_pass()
    with tracing(TracingContext(mode)), config.patch(options):
        return compile_fx_inner(module, fakes, is_inference=True)


def compile_with_inductor(
    module: torch.fx.GraphModule, inputs: list[Any], inner: Callable[..., Any], options: dict[str, Any], table: dict[Any, Any]
) -> Any:
    """Inductor's own way from a graph of Dynamo's, with ``inner(compile, module, inputs, **kwargs)`` where it generates code.

    ``table`` is what operators are decomposed into.

    The cache of whole graphs is off: it would give back what plain Inductor made of the same graph.
    """
    import torch._functorch.config as functorch_config
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    _lower_copies()
    given = options.get("emulate_precision_casts", config.emulate_precision_casts)

    def whole(module: torch.fx.GraphModule, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_inference"):
            return compile_fx_inner(module, inputs, *args, **kwargs)
        for n in module.graph.nodes:
            n.meta.pop("low_precision_pointwise_barrier", None)
        with config.patch(emulate_precision_casts=given):  # a model that is trained is Inductor's alone
            return compile_fx_inner(module, inputs, *args, **kwargs)

    # Random numbers are torch's own, as in the step itself.
    changes = {"emulate_precision_casts": True, "fallback_random": True}
    with functorch_config.patch(enable_autograd_cache=False), config.patch(changes), _own_threads():
        return compile_fx(module, inputs, functools.partial(inner, whole), options or None, table)


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


def guarded() -> Any:
    """A context in which Dynamo guards the hooks of modules too."""
    from torch._dynamo import config

    return config.patch(skip_nnmodule_hook_guards=False)


def no_modes() -> Any:
    """A context in which calls are what they are, whoever traces outside of it."""
    from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

    return _disable_current_modes()


# Methods of tensors and functions of torch that look at more than numbers and kinds, or change more than numbers.
_NO_OPERATORS = {
    *(
        "_is_view",
        "_version",
        "apply_",
        "as_subclass",
        "const_data_ptr",
        "data",
        "data_ptr",
        "from_file",
        "from_numpy",
        "frombuffer",
    ),
    *(
        "_from_blob",
        "one_hot",
        "is_conj",
        "is_leaf",
        "is_neg",
        "is_pinned",
        "is_set_to",
        "is_shared",
        "map2_",
        "map_",
        "names",
        "new",
        "numpy",
        "output_nr",
    ),
    *("pin_memory", "record_stream", "rename", "rename_", "requires_grad_", "resize_", "resize_as_", "retain_grad", "set_"),
    *("set_data", "storage_offset", "tolist", "type", "untyped_storage", "_view_func", "_view_func_unsafe", "_use_count"),
    *("_rev_view_func_unsafe", "_fix_weakref", "align_to", "align_as", "refine_names", "_reduce_ex_internal"),
}
_METHODS_IN_PYTHON = (
    *("__abs__", "__floordiv__", "__ipow__", "__iter__", "__itruediv__", "__len__", "__neg__", "__pos__", "__pow__", "__rdiv__"),
    *("__reversed__", "__rfloordiv__", "__rlshift__", "__rmatmul__", "__rmod__", "__rpow__", "__rrshift__", "__rsub__"),
    *("__rtruediv__", "detach", "istft", "lu", "norm", "split", "stft", "unflatten"),
)
_KINDS = (
    *("shape", "dtype", "layout", "device", "ndim", "nbytes", "itemsize", "T", "H", "mT", "mH", "real", "imag"),
    *("is_cpu", "is_cuda", "is_mps", "is_xpu", "is_meta", "is_sparse", "is_sparse_csr", "is_quantized", "is_nested"),
)


@functools.cache
def _operators() -> frozenset[Any]:
    from torch._C import TensorBase, _fft, _linalg, _nn, _special, _VariableFunctions  # pyright: ignore

    kinds = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
    owners: tuple[Any, ...] = (TensorBase, _fft, _linalg, _nn, _special, _VariableFunctions)
    found = [f for of in owners for name in dir(of) if name not in _NO_OPERATORS and isinstance(f := getattr(of, name), kinds)]
    own = [f for f in found if getattr(f, "__objclass__", TensorBase) is TensorBase]  # not what every Python object has
    methods = [getattr(Tensor, name) for name in _METHODS_IN_PYTHON if hasattr(Tensor, name)]
    return frozenset([*own, *methods, torch.autograd.grad, torch._C._set_grad_enabled])  # pyright: ignore


def is_operator(f: Any) -> bool:
    """Whether a function of torch does nothing that its calls of operators, which a trace writes down, do not show."""
    names = getattr(f, "__globals__", None)
    if names is not None and any(names is vars(module) for module in (torch.functional, torch.nn.functional)):
        return True
    return f in _operators() or f is torch.ops.optfn.decides.default or is_collective_operator(f)


def is_collective_operator(f: Any) -> bool:
    """Whether a function is an operator in which processes wait for each other."""
    return isinstance(f, OpOverload) and f.namespace == "_c10d_functional"


def is_read_off_kind(f: Any) -> bool:
    """Whether a function is the getter of an attribute that is part of a tensor's kind, which is guarded, or a view."""
    if f is torch.device or f is torch.ops.prim.device.default:  # a device by its name, that of a tensor that pretends to one
        return True
    of = getattr(f, "__self__", None)
    return getattr(f, "__name__", "") == "__get__" and any(of is vars(torch._C.TensorBase).get(name) for name in _KINDS)  # pyright: ignore


def is_requires_grad(f: Any) -> bool:
    """Whether a function is the getter of ``requires_grad``."""
    of = getattr(f, "__self__", None)
    return getattr(f, "__name__", "") == "__get__" and of is vars(torch._C.TensorBase)["requires_grad"]  # pyright: ignore


def function_modes() -> tuple[Any, ...] | None:
    """What of the calling thread's modes changes what a call of torch gives: default devices; None if there is any other."""
    if torch._C._len_torch_dispatch_stack():  # pyright: ignore
        return None
    count: int = torch._C._len_torch_function_stack()  # pyright: ignore
    if not count:
        return ()
    from torch.utils._device import DeviceContext

    modes: list[Any] = [torch._C._get_function_stack_at(i) for i in range(count)]  # pyright: ignore
    return tuple(mode.device for mode in modes) if all(type(mode) is DeviceContext for mode in modes) else None


def is_of_transforms(frame: types.FrameType) -> bool:
    """Whether what runs is torch.func itself, and not a function that it transforms."""
    from torch._functorch import eager_transforms, vmap

    return any(frame.f_globals is vars(module) for module in (eager_transforms, vmap))


def is_transformed() -> bool:
    """Whether the call is made under a transform of torch.func, such as vmap."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore


class Guards:
    """Whether tensors have the types, dtypes, devices, shapes and strides of the first ones, and torch the same global state.

    No tensor may occur twice.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        from torch._C._dynamo.guards import GlobalStateGuard, TensorGuards

        sizes: Any = [list(x.shape) for x in tensors]
        strides: Any = [list(x.stride()) for x in tensors]
        self.count = len(tensors)
        self.tensors = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self.state = GlobalStateGuard()
        self.modes = function_modes()

    def fit(self, tensors: list[Tensor]) -> bool:
        """Whether these are such tensors."""
        if len(tensors) != self.count or not self.state.check() or function_modes() != self.modes:
            return False
        return self.tensors.check(*tensors)
