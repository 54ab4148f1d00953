"""Which calls of a graph may fail when it is run, and how they fail before anything is written.

Shapes and dtypes have been seen to fit when a graph was traced. What is left depends on numbers: an index out of range, an integer
division by zero, a matrix that has no inverse. Code that was generated cannot raise an exception for these (an index out of range
ends the process where more than one thread runs it), and it may have written to an argument before it comes to them. So such calls
are ATen's own, which raise, and all of them are made before the first write. Of calls with indices only the indices are checked so;
what they read and write is left to generated code.
"""

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.fx import Graph, Node

from optfn.compile import internals
from optfn.compile.branches import Branch

__all__ = ["called_first", "check_indices", "strict", "within"]

aten = torch.ops.aten


@torch.library.custom_op("optfn::within", mutates_args=())
def within(index: Tensor, least: int, size: int) -> Tensor:
    """The index itself, all entries of which are at least ``least`` and less than ``size``.

    Raises:
        IndexError: an entry is not.

    Example:
        >>> within(torch.tensor([0, 2]), 0, 2)
        Traceback (most recent call last):
        IndexError: index 2 is out of bounds for dimension with size 2
    """
    if index.numel():
        low, high = (int(x) for x in index.aminmax())
        if low < least or high >= size:
            raise IndexError(f"index {low if low < least else high} is out of bounds for dimension with size {size}")
    return index.clone(memory_format=torch.contiguous_format)


@within.register_fake
def _(index: Tensor, least: int, size: int) -> Tensor:
    return torch.empty_like(index, memory_format=torch.contiguous_format)


# What cannot fail where shapes and dtypes fit, besides pointwise calls, reductions, views and what makes tensors of numbers.
_SAFE = {
    "aten": """
        mm addmm bmm baddbmm addbmm mv addmv dot vdot ger addr _int_mm linear matmul
        convolution convolution_backward _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_flash_attention
        _scaled_dot_product_flash_attention_backward _scaled_dot_product_efficient_attention
        _scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention
        _scaled_dot_product_cudnn_attention_backward
        cumsum cumprod cummax cummin logcumsumexp sort topk kthvalue median nanmedian mode std var std_mean var_mean
        cat stack repeat flip roll rot90 tril triu trace constant_pad_nd slice_scatter select_scatter diagonal_scatter
        as_strided_scatter slice_backward select_backward diagonal_backward split_with_sizes_copy unfold_backward
        _to_copy copy fill zero lift_fresh_copy view_copy expand_copy as_strided_copy new_empty new_empty_strided new_full
        new_zeros new_ones empty_like full_like zeros_like ones_like rand_like _unsafe_view _reshape_alias
        _unsafe_index _unsafe_index_put _unsafe_masked_index _unsafe_masked_index_put_accumulate
        avg_pool2d avg_pool2d_backward avg_pool3d avg_pool3d_backward
        _adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d _adaptive_avg_pool3d_backward
        max_pool2d_with_indices max_pool3d_with_indices
        upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d
        upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward upsample_bilinear2d_backward
        reflection_pad1d reflection_pad2d reflection_pad3d replication_pad2d replication_pad3d
        reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward
        _softmax _log_softmax _softmax_backward_data _log_softmax_backward_data glu glu_backward
        native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward
        _fused_rms_norm _fused_rms_norm_backward native_batch_norm native_batch_norm_backward
        _native_batch_norm_legit _native_batch_norm_legit_functional _native_batch_norm_legit_no_training
        complex polar view_as_real_copy view_as_complex_copy real_copy _conj_copy _neg_view_copy _fft_r2c _fft_c2c _fft_c2r
        hardtanh_backward elu_backward leaky_relu_backward softplus_backward hardsigmoid_backward
        hardswish hardswish_backward log_sigmoid_forward log_sigmoid_backward mish_backward logit_backward
        prelu prelu_backward _prelu_kernel _prelu_kernel_backward
        mse_loss mse_loss_backward smooth_l1_loss smooth_l1_loss_backward huber_loss huber_loss_backward
        isin _cdist_forward _cdist_backward squeeze_copy trapezoid
    """,
    "prims": """
        convert_element_type iota rev device_put xor_sum fma empty_strided empty_permuted scalar_tensor full sum prod amax amin var
        broadcast_in_dim collapse_view split_dim squeeze transpose view_of cat where maximum minimum sqrt rsqrt
        _low_memory_max_pool_with_offsets _low_memory_max_pool_offsets_to_indices inductor_force_stride_order
    """,
    "optfn": "copy",
}
_SAFE_NAMES = {f"{space}::{name}" for space, names in _SAFE.items() for name in names.split()}
_DIVISIONS = {"div", "divide", "floor_divide", "remainder", "fmod"}


# Operators with indices: of several dimensions, negative ones from the end; of the dimension that they name; of the first.
_OF_SEVERAL = {aten.index.Tensor, aten.index_put.default}
_OF_ONE = {
    *(aten.gather.default, aten.scatter.src, aten.scatter.value, aten.scatter.reduce, aten.scatter.value_reduce),
    *(aten.scatter_add.default, aten.scatter_reduce.two, aten.index_select.default, aten.index_add.default),
    *(aten.index_copy.default, aten.index_reduce.default),
}
_OF_ROWS = {aten.embedding.default}
_OF_TARGETS = {  # and where the scores are among the arguments, with the targets after them
    aten.nll_loss_forward.default: 0,
    aten.nll_loss_backward.default: 1,
    aten.nll_loss2d_forward.default: 0,
    aten.nll_loss2d_backward.default: 1,
}
# Decomposed, these would not fail where they do, or the other way round.
_KEPT = {
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_backward.default,
    aten.masked_scatter.default,
    aten.index_fill.int_Scalar,
    aten.index_fill.int_Tensor,
}
_FINDS_PLACES = {  # the second result is where in a dimension the first one was found
    *(aten.sort.default, aten.sort.stable, aten.topk.default, aten.kthvalue.default, aten.max.dim, aten.min.dim),
    *(aten.median.dim, aten.mode.default, aten.cummax.default, aten.cummin.default),
}


def check_indices(graph: Graph) -> None:
    """Let calls with indices read them through :func:`within`, so that it is this call that fails.

    On an accelerator to look at numbers is to wait for them: there torch's own kernels do not raise for an index either, and
    nothing is changed.
    """
    known: dict[Any, Node] = {}
    for n in list(graph.nodes):
        for index, least, size in _indices(n) or ():
            if _is_within(index, least, size) or index.meta["val"].device.type != "cpu":
                continue
            if (index, least, size) not in known:
                with graph.inserting_before(n):
                    check = known[index, least, size] = graph.call_function(torch.ops.optfn.within.default, (index, least, size))
                value = index.meta["val"]
                with value.fake_mode:
                    check.meta["val"] = torch.empty_like(value, memory_format=torch.contiguous_format)
            n.replace_input_with(index, known[index, least, size])


def strict(decompositions: dict[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """The same decompositions, but those that would give a value where the operator raises check their indices first."""

    def of_one(decompose: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, dim: int, index: Tensor, *args: Any, **kwargs: Any) -> Any:
            size = x.shape[dim] if x.ndim else 1
            return decompose(x, dim, within(index, 0, size) if index.device.type == "cpu" else index, *args, **kwargs)

        return run

    def of_targets(decompose: Callable[..., Any], at: int) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            scores, target, _, _, ignored = args[at : at + 5]
            if target.device.type == "cpu":
                skipped = target == ignored
                classes = scores.shape[1] if scores.ndim > 1 else scores.shape[0]
                target = torch.where(skipped, target, within(target.masked_fill(skipped, 0), 0, classes))
            return decompose(*args[: at + 1], target, *args[at + 2 :])

        return run

    found = {op: decompose for op, decompose in decompositions.items() if op not in _KEPT}
    found |= {op: of_one(found[op]) for op in _OF_ONE if op in found}
    return found | {op: of_targets(found[op], at) for op, at in _OF_TARGETS.items()}


def _indices(n: Node) -> list[tuple[Node, int, int]] | None:
    """The indices that a call is given, the least that each may be, and what it must be less than.

    None if the call has no indices, or if they are masks, of which the number of entries that are true may not fit.
    """
    args: Any = n.args
    if n.target in _OF_SEVERAL:
        found = [(i, -size, size) for i, size in zip(args[1], args[0].meta["val"].shape, strict=False) if i is not None]
        if any(i.meta["val"].dtype in (torch.bool, torch.uint8) for i, _, _ in found):
            return [] if n.target is aten.index_put.default and args[2].meta["val"].numel() == 1 else None
        return found
    if n.target in _OF_ONE:
        shape = args[0].meta["val"].shape
        return [(args[2], 0, shape[args[1]] if shape else 1)]
    if n.target in _OF_ROWS:
        return [(args[1], 0, args[0].meta["val"].shape[0])]
    return None


def _is_within(index: Node, least: int, size: int) -> bool:
    """Whether an index is known to be in range: it was found in a dimension of that size, or made of no input."""
    n = index
    while getattr(n.target, "is_view", False):
        n = n.all_input_nodes[0]
    args: Any = n.args
    if n.target is operator.getitem and args[1] == 1 and args[0].target in _FINDS_PLACES:
        searched: Any = args[0].args[0]
        return max(searched.meta["val"].shape, default=1) <= size
    if n.target in (aten.argmax.default, aten.argmin.default):
        shape = args[0].meta["val"].shape
        return (math.prod(shape) if len(args) < 2 or args[1] is None else max(shape, default=1)) <= size
    if n.target is torch.ops.prims._low_memory_max_pool_offsets_to_indices.default:
        return math.prod(args[2]) <= size
    below = _ancestors(index) | {index}
    if any(a.op == "placeholder" for a in below):
        return False
    values: dict[Node, Any] = {}
    with internals.no_modes():
        for a in [a for a in index.graph.nodes if a in below]:
            args, kwargs = torch.fx.map_arg((a.args, a.kwargs), values.__getitem__)
            values[a] = a.target(*args, **kwargs)
        return not values[index].numel() or bool((values[index] >= least).logical_and(values[index] < size).all())


def called_first(graph: Graph) -> set[Node]:
    """The calls that may fail, and those that are as well made with them: what an index is computed by of integers."""
    called = {n for n in graph.nodes if _may_fail(n)}
    called.update(n for n in graph.nodes if n.target is operator.getitem and n.args[0] in called)
    for check in [n for n in called if n.target is torch.ops.optfn.within.default]:
        chain = _ancestors(check, called)
        if all(n.op == "placeholder" or _is_simple(n) for n in chain):
            called |= {n for n in chain if n.op != "placeholder"}
    return called


def _ancestors(n: Node, without: Iterable[Node] = ()) -> set[Node]:
    found: set[Node] = set()
    waiting = [n]
    while waiting:
        new = {a for a in waiting.pop().all_input_nodes if a not in found and a not in without}
        found |= new
        waiting += new
    return found


def _is_simple(n: Node) -> bool:
    """A view, numbers, or integers of which each depends on those at its place."""
    target: Any = n.target
    if not isinstance(target, internals.OpOverload):
        return False
    return target.is_view or not n.all_input_nodes or (torch.Tag.pointwise in target.tags and _is_integer(n.meta["val"]))


def _may_fail(n: Node) -> bool:
    """Whether a call, of shapes and dtypes that fit, may raise because of the numbers that it is given. Unknown ones may."""
    target: Any = n.target
    if not isinstance(target, internals.OpOverload):
        return isinstance(target, Branch)  # none is an input, or an item of what an operator gives
    name = target._schema.name  # pyright: ignore[reportPrivateUsage]
    space, _, plain = name.partition("::")
    if target is aten.copy_.default or target.is_view or name in _SAFE_NAMES or (space in _SAFE and not n.all_input_nodes):
        return False
    if target in _OF_SEVERAL or target in _OF_ONE or target in _OF_ROWS:
        return _indices(n) is None
    if plain in _DIVISIONS and _is_integer(n.meta["val"]):
        divisor: Any = n.args[1]
        return isinstance(divisor, Node) or divisor == 0
    return not {torch.Tag.pointwise, torch.Tag.reduction}.intersection(target.tags)


def _is_integer(x: Any) -> bool:
    return not (x.is_floating_point() or x.is_complex())
