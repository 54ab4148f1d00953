"""What is changed in the graph of a region before Inductor generates its code, so that it computes what torch does, and fast."""

import functools
import math
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.fx.node import map_aggregate

from optfn.compile.internals import OpOverload, is_narrow
from optfn.compile.phases import model_of

__all__ = ["keep_digits", "round_every_result", "sum_by_rows"]

aten = torch.ops.aten


# Of these, torch's CPU kernels round numbers, and tensors of no dimension, to the dtype of the other operand first.
_ROUND_NUMBERS = ("add", "sub", "rsub", "pow", "fmod", "remainder")


def round_every_result(graph: torch.fx.Graph) -> None:
    """Say what torch does with bfloat16 and float16: it computes in float32, and rounds the result of every operator.

    Inductor rounds what it writes, not what it goes on with. A model, which is planned as a whole, is left alone.
    """
    if model_of(graph):
        return
    convert, kinds = torch.ops.prims.convert_element_type.default, {torch.Tag.pointwise, torch.Tag.reduction}
    widened: dict[torch.fx.Node, torch.fx.Node] = {}

    def widen(a: torch.fx.Node) -> torch.fx.Node:
        if _is_narrow(a) and a not in widened:
            widened[a] = _call(graph, convert, a, torch.float32)
        return widened.get(a, a)

    def rounded(value: Tensor, a: Any) -> Any:
        if isinstance(a, int | float) and not isinstance(a, bool):
            return torch.tensor(a, dtype=value.dtype, device="cpu").item()
        if isinstance(a, torch.fx.Node) and not _is_narrow(a) and value.ndim and a.meta["val"].ndim == 0:
            return _call(graph, convert, a, value.dtype)
        return a

    for n in list(graph.nodes):
        n.meta.pop("low_precision_pointwise_barrier", None)  # Inductor's own mark for this
        if n.op != "call_function" or n.target is convert or not kinds.intersection(getattr(n.target, "tags", ())):
            continue
        if not _is_narrow(n) or not any(map(_is_narrow, n.all_input_nodes)):
            continue
        given: Any = n.args, n.kwargs
        with graph.inserting_before(n):
            if n.meta["val"].device.type == "cpu" and n.target.overloadpacket.__name__ in _ROUND_NUMBERS:
                given = map_aggregate(given, functools.partial(rounded, n.meta["val"]))
            args, kwargs = torch.fx.map_arg(given, widen)
            wide = _call(graph, n.target, *args, **kwargs)
            if wide.meta["val"].dtype != torch.float32:
                graph.erase_node(wide)
                continue
            n.replace_all_uses_with(_call(graph, convert, wide, n.meta["val"].dtype))
        graph.erase_node(n)


def keep_digits(graph: torch.fx.Graph) -> None:
    """Write ``expm1`` and ``atanh`` so that generated code is as exact near 0 as torch's kernels.

    Inductor's C++ vectors have ``exp(x) - 1`` and ``log((1 + x) / (1 - x)) / 2`` (torch 2.13): of a bias correction with a decay of
    0.999, five digits are lost at the first step. The quotient of exp(x) - 1 and of the logarithm of what exp(x) was rounded to
    is as exact as these two (W. Kahan).
    """
    for n in list(graph.nodes):
        if n.target not in (aten.expm1.default, aten.atanh.default):
            continue
        value, x = n.meta["val"], n.args[0]
        if value.device.type != "cpu" or value.is_complex() or x.meta["val"].dtype != value.dtype:
            continue
        with graph.inserting_before(n):
            if n.target is aten.atanh.default:
                ahead, back = (
                    _call(graph, aten.log1p.default, x),
                    _call(graph, aten.log1p.default, _call(graph, aten.neg.default, x)),
                )
                exact = _call(graph, aten.mul.Tensor, _call(graph, aten.sub.Tensor, ahead, back), 0.5)
            else:
                power = _call(graph, aten.exp.default, x)
                less = _call(graph, aten.sub.Tensor, power, 1)
                share = _call(graph, aten.div.Tensor, x, _call(graph, aten.log.default, power))
                small = _call(graph, aten.mul.Tensor, less, share)
                small = _call(graph, aten.where.self, _call(graph, aten.eq.Scalar, power, 1), x, small)
                near = _call(graph, aten.lt.Scalar, _call(graph, aten.abs.default, x), 0.5)
                exact = _call(graph, aten.where.self, near, small, less)
        n.replace_all_uses_with(exact)
        graph.erase_node(n)


_ROW = 1024


def sum_by_rows(graph: torch.fx.Graph) -> None:
    """Let sums and means of all entries of large tensors be made of sums of rows.

    Inductor's C++ keeps one long sum in memory, and waits for that at every step (torch 2.13: half the speed of memory). It keeps
    the sum of a row in registers. Rows are also more exact: of a million equal numbers the long sum is off by 6e-5, rows by 4e-6.
    """
    sums = (aten.sum.default, aten.sum.dim_IntList)
    means = (aten.mean.default, aten.mean.dim)
    wide = (torch.float32, torch.float64)
    for n in list(graph.nodes):
        if n.target not in (*sums, *means) or n.meta["val"].numel() != 1 or n.meta["val"].dtype not in wide:
            continue  # it is no sum of all entries, or is rounded when it is complete
        x: Any = n.args[0]
        value: Tensor = x.meta["val"]
        if value.numel() < 4 * _ROW or value.device.type != "cpu" or not value.is_floating_point():
            continue
        with graph.inserting_before(n):
            total = _total(x, n.meta["val"].dtype)
            if n.target in means:
                total = _call(graph, aten.div.Tensor, total, value.numel())
            if n.meta["val"].ndim:
                total = _call(graph, aten.view.default, total, [*n.meta["val"].shape])
        n.replace_all_uses_with(total)
        graph.erase_node(n)


def _total(x: torch.fx.Node, dtype: torch.dtype) -> torch.fx.Node:
    """The sum of all entries, converted to ``dtype`` first.

    Each dimension is split for itself: were all entries one long row, what is computed on the way to ``x`` would have to divide to
    find its indices, which takes several times as long.
    """
    shape = x.meta["val"].shape
    if math.prod(shape) < 4 * _ROW:
        return _call(x.graph, aten.sum.dim_IntList, x, [], dtype=dtype)
    first = max(d for d in range(len(shape)) if math.prod(shape[d:]) >= _ROW // 8)  # a row has this dimension and all later ones
    size, most = shape[first], _ROW // math.prod(shape[first + 1 :])
    if size > most:
        part = max(n for n in range(1, most + 1) if size % n == 0)
        if part < most // 4:
            end = size - size % most
            whole, rest = (_call(x.graph, aten.slice.Tensor, x, first, *ends) for ends in ((0, end), (end, size)))
            return _call(x.graph, aten.add.Tensor, _total(whole, dtype), _total(rest, dtype))
        x = _call(x.graph, aten.view.default, x, [*shape[:first], size // part, part, *shape[first + 1 :]])
        first += 1
    rows = _call(x.graph, aten.sum.dim_IntList, x, [*range(first, x.meta["val"].ndim)], dtype=dtype)
    return _total(rows, dtype)


def _call(graph: torch.fx.Graph, target: OpOverload, *args: Any, **kwargs: Any) -> torch.fx.Node:
    """A new node where nodes are inserted now."""
    node = graph.call_function(target, args, kwargs)
    given: Any = torch.fx.map_arg((args, kwargs), lambda a: a.meta["val"])
    node.meta["val"] = target(*given[0], **given[1])
    return node


def _is_narrow(n: torch.fx.Node) -> bool:
    return is_narrow(n.meta.get("val"))
