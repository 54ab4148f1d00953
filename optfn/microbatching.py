r"""Functions of a batch, evaluated on one microbatch after the other: the memory of one, and the result of the batch.

A batch is an axis of the tensors in some of the arguments, with as many rows in all of them. The names are Optax's. So is which
rows are together: of :math:`n` microbatches, number :math:`i`, from 0, has the rows :math:`i, i + n, i + 2n, \dots` A function that
treats each row by itself does not see that, and a concatenation is in the order of the batch again. A batch need not be a multiple
of the microbatch: the rows that are left over, its last ones, are one more microbatch, a smaller one, which weighs less in a mean.

The microbatches are a loop in Python over views of the batch. Where it is traced it is unrolled. To compile a microbatch once,
compile the function: ``microbatch(torch.compile(fun), ...)``, which makes a second program for a smaller last one. Where autograd
records through the loop it keeps what every microbatch saves, as for the whole batch. So let the function take the gradient,
as :func:`micro_grad` does.

Gradients clipped example by example, and summed, for which there are never more examples' gradients than those of a microbatch:

    >>> def loss(params, x, y):
    ...     return (x @ params["w"] - y).square()
    >>> of_examples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    >>> def clipped(params, x, y):
    ...     return optfn.per_example_global_norm_clip(of_examples(params, x, y), 1.0)
    >>> params, x, y = {"w": torch.zeros(2)}, torch.eye(2).repeat(50, 1), torch.ones(100)
    >>> total, count = optfn.microbatch(clipped, argnums=(1, 2), microbatch_size=16)(params, x, y)
    >>> total, count
    ({'w': tensor([-50., -50.])}, tensor(100))

:func:`dpsgd` with ``batch_size`` takes such a sum, and adds noise to it once. ``count`` says how many examples were clipped.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree as trees
from optfn.checks import integer
from optfn.numerics import compute_dtype, widened_scalar

__all__ = [
    "AccumulationType",
    "Accumulator",
    "IndividualOutputs",
    "micro_grad",
    "micro_vmap",
    "microbatch",
    "reshape_batch_axis",
]

Function = Callable[..., Any]


class AccumulationType(enum.Enum):
    """What becomes of the results of the microbatches.

    Floating-point ones are added up in float32 at least, and rounded once. In a sum, bools are counted.
    """

    MEAN = enum.auto()
    """Their mean, weighted by rows, over all rows of the batch."""
    SUM = enum.auto()
    """Their sum."""
    RUNNING_MEAN = enum.auto()
    """Their mean over the rows that count: another one than ``MEAN`` where ``num_real_microbatches`` is given."""
    CONCAT = enum.auto()
    """All of them along dimension 0, in the order of the batch if they have a row for each of its rows; 0-dim ones in a vector."""


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """Another way to put the results of the microbatches together, written as four functions of trees.

    Attributes:
        init: ``init(value) -> carry``, before the first result is taken in. It is handed that result, to make what has its
            structure, shapes and dtypes; Optax hands it shapes and dtypes alone.
        update: ``update(carry, value, index) -> carry``, for each microbatch; ``index`` counts from 0. The last value may be
            that of fewer rows.
        finalize: ``finalize(carry) -> result``.
        aggregate: ``aggregate(values) -> value``, for :func:`micro_vmap`: one value of those of a microbatch's examples, which are
            stacked along dimension 0.

    Example:
        >>> largest = Accumulator(
        ...     init=lambda value: torch.full_like(value, -torch.inf),
        ...     update=lambda carry, value, index: torch.maximum(carry, value),
        ...     finalize=lambda carry: carry,
        ...     aggregate=lambda values: values.amax(0),
        ... )
        >>> micro_vmap(torch.sum, microbatch_size=2, accumulator=largest)(torch.tensor([[1.0, 2.0], [3.0, 4.0], [2.0, 2.0]]))
        tensor(7.)
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, int], Any]
    finalize: Callable[[Any], Any]
    aggregate: Callable[[Any], Any]


class IndividualOutputs(NamedTuple):
    """What :func:`micro_grad` gives besides gradients, example by example along dimension 0.

    Attributes:
        values: the values of the function.
        metrics: what ``metrics_fn`` gives.
        aux: what the function returns besides its value; None without ``has_aux``.
    """

    values: Any
    metrics: Any
    aux: Any


def microbatch(
    fun: Function,
    argnums: int | Sequence[int],
    microbatch_size: int | None,
    accumulator: Any = AccumulationType.SUM,
    *,
    argnames: str | Sequence[str] = (),
    in_axes: int | Sequence[int] = 0,
    num_real_microbatches: int | Tensor | None = None,
) -> Function:
    """The function that evaluates ``fun`` on one microbatch after the other, and puts the results together.

    See :mod:`optfn.microbatching` for which rows are together.

    Args:
        fun: a function of trees of tensors, to a tree of tensors; None in either stays None.
        argnums: the positional arguments that have a batch axis.
        microbatch_size: how many rows to evaluate at a time; None gives ``fun`` itself.
        accumulator: how to put the results together: an :class:`AccumulationType`, an :class:`Accumulator`, or a tree of them, each
            for the part of the result that stands there.
        argnames: the keyword arguments that have a batch axis.
        in_axes: which axis, one for all of ``argnums`` and ``argnames``, or one for each of them, in this order.
        num_real_microbatches: how many microbatches count, the first ones; those after it add nothing, are rows of zeros in a
            concatenation, and all count in ``MEAN``. An int stops the loop there. A 0-dim integer tensor is not looked at: all are
            evaluated, and what does not count is replaced.

    Returns:
        A function of the arguments of ``fun``. Those without a batch axis are handed on as they are.

    Raises:
        TypeError: ``microbatch_size`` is no int; from the function: a batch argument is missing or holds something else than
            tensors and None, a result that is to be accumulated is no tensor.
        ValueError: an argument out of range; from the function: batch arguments without the axis or of several sizes, results of
            another structure than ``accumulator``, a mean of integers, more real microbatches than there are.

    Example:
        >>> def fun(x):
        ...     return x + 1, (3 * x).sum()
        >>> both = (AccumulationType.CONCAT, AccumulationType.SUM)
        >>> microbatch(fun, argnums=0, microbatch_size=2, accumulator=both)(torch.tensor([1, 2, 3, 4, 5]))
        (tensor([2, 3, 4, 5, 6]), tensor(45))
    """
    if microbatch_size is None:
        return fun
    size = integer("microbatch_size", microbatch_size, 1)
    places = _places(argnums, argnames, in_axes)
    real = num_real_microbatches
    if not isinstance(real, Tensor):
        real = None if real is None else integer("num_real_microbatches", real, 0)
    elif real.ndim or real.is_floating_point():
        raise ValueError(f"num_real_microbatches must be an int or a 0-dim integer tensor, got {real.dtype}, {tuple(real.shape)}")

    def microbatched(*args: Any, **kwargs: Any) -> Any:
        split = _Split(_rows(args, kwargs, places), size, real)
        accumulate = _composed(accumulator, split)
        carry: Any = None
        for i in range(split.evaluated):
            given: list[Any] = list(args)
            named = dict(kwargs)
            for where, axis in places:
                given_in: Any = given if isinstance(where, int) else named
                given_in[where] = trees.map(functools.partial(split.take, axis=axis, i=i), given_in[where])
            value = fun(*given, **named)
            carry = accumulate.update(carry if i else accumulate.init(value), value, i)
            del value  # not to be alive beside the next
        return accumulate.finalize(carry)

    return microbatched


def micro_vmap(
    fun: Function,
    in_axes: int | Sequence[int | None] = 0,
    out_axes: Any = 0,
    *,
    microbatch_size: int | None = None,
    vmap_fn: Callable[..., Function] = torch.func.vmap,
    accumulator: Any = AccumulationType.CONCAT,
    num_real_microbatches: int | Tensor | None = None,
) -> Function:
    """:func:`torch.func.vmap`, one microbatch after the other, with a sum or a mean over the examples if that is wanted.

    Args:
        fun: a function of one example, to a tree of tensors; None, in arguments and results, stays None.
        in_axes: the axis to map over: one for all positional arguments, or one for each of them, None where there is none. Keyword
            arguments are mapped over axis 0, as in Optax.
        out_axes: 0, there is no other.
        microbatch_size: how many examples to evaluate at a time; None is all of them.
        vmap_fn: called as ``vmap_fn(f, in_dims, 0)``: ``functools.partial(torch.func.vmap, randomness="different")``, for example.
        accumulator: what becomes of the results, as in :func:`microbatch`: ``CONCAT`` gives those of all examples, stacked.
        num_real_microbatches: as in :func:`microbatch`; without ``microbatch_size`` it is not read.

    Raises:
        TypeError: as from :func:`microbatch`.
        NotImplementedError: ``out_axes`` is not 0.
        ValueError: ``in_axes`` has another length than the positional arguments; and as from :func:`microbatch`.

    Example:
        >>> micro_vmap(torch.dot, microbatch_size=2)(torch.eye(3), torch.ones(3, 3))
        tensor([1., 1., 1.])
    """
    if not (isinstance(out_axes, int) and out_axes == 0):
        raise NotImplementedError(
            f"micro_vmap: out_axes must be 0, got {out_axes}: move the dimension of the result, x.movedim(0, ...)"
        )

    def mapped(*args: Any, **kwargs: Any) -> Any:
        axes = (in_axes,) * len(args) if isinstance(in_axes, int) else tuple(in_axes)
        if len(axes) != len(args):
            raise ValueError(f"micro_vmap: in_axes must be an int or one for each of {len(args)} arguments, got {in_axes}")

        def of_examples(*args: Any, kwargs: Any) -> Any:
            results = _vmapped(fun, axes, vmap_fn, args, kwargs)
            return _composed(accumulator, _Split(1, 1, None)).aggregate(results)

        batched = [(i, axis) for i, axis in enumerate(axes) if axis is not None]
        _rows(args, kwargs, [*batched, *((name, 0) for name in kwargs)])
        run = microbatch(
            of_examples,
            [i for i, _ in batched],
            microbatch_size,
            accumulator,
            argnames="kwargs",
            in_axes=[*(axis for _, axis in batched), 0],
            num_real_microbatches=num_real_microbatches,
        )
        return run(*args, kwargs=kwargs)

    return mapped


def micro_grad(
    fun: Function,
    has_aux: bool = False,
    argnums: int | Sequence[int] = 0,
    *,
    batch_argnums: int | Sequence[int] = 1,
    keep_batch_dim: bool = True,
    microbatch_size: int | None = None,
    accumulator: Any = AccumulationType.SUM,
    transform_fn: Callable[[Any], Any] = lambda x: x,
    metrics_fn: Callable[[Any], Any] = lambda x: None,
    num_real_microbatches: int | Tensor | None = None,
) -> Callable[..., tuple[Any, IndividualOutputs]]:
    """The gradients of single examples, each transformed, and their sum: no more at a time than those of one microbatch.

    Args:
        fun: a function to a 0-dim tensor, such as ``loss(params, batch)``; with ``has_aux`` to a pair of that and a tree.
        has_aux: whether it returns such a pair.
        argnums: the argument or arguments that gradients are of; where it is a sequence they are a tuple.
        batch_argnums: the argument or arguments with a batch axis, which is dimension 0. Keyword arguments have one too.
        keep_batch_dim: whether ``fun`` is handed a batch of one example; else the example without that dimension, as keyword
            arguments always are.
        microbatch_size: how many examples to take at a time; None is all of them.
        accumulator: what becomes of the transformed gradients, as in :func:`microbatch`.
        transform_fn: called with the gradient of one example, for example to clip it or to give its square as well.
        metrics_fn: called with the gradient of one example before that, for what is to be returned of each: something small.
        num_real_microbatches: as in :func:`microbatch`.

    Returns:
        A function of the arguments of ``fun`` to a pair: the accumulated gradients, and an :class:`IndividualOutputs`.

    Raises:
        TypeError: as from :func:`microbatch`.
        ValueError: as from :func:`microbatch`.

    Example:
        >>> def loss(params, x, y):
        ...     return 0.5 * (x @ params["w"] - y).square().mean()
        >>> clip = optfn.clip_by_global_norm(3.0)
        >>> clipped = micro_grad(
        ...     loss,
        ...     batch_argnums=(1, 2),
        ...     microbatch_size=3,
        ...     transform_fn=lambda g: clip.update(g, ())[0],
        ...     metrics_fn=optfn.tree.global_norm,
        ... )
        >>> total, aux = clipped({"w": torch.zeros(1)}, torch.ones(4, 1), torch.tensor([0.0, 2.0, 4.0, 6.0]))
        >>> total, aux.values, aux.metrics
        ({'w': tensor([-8.])}, tensor([ 0.,  2.,  8., 18.]), tensor([0., 2., 4., 6.]))
    """
    batched = (batch_argnums,) if isinstance(batch_argnums, int) else tuple(batch_argnums)

    def of_example(*args: Any, **kwargs: Any) -> tuple[Any, IndividualOutputs]:
        grads, value, aux = _grad(fun, argnums, has_aux, args, kwargs)
        return transform_fn(grads), IndividualOutputs(value, metrics_fn(grads), aux)

    def run(*args: Any, **kwargs: Any) -> tuple[Any, IndividualOutputs]:
        _rows(args, kwargs, [(i, 0) for i in (*batched, *kwargs)])
        axes: list[int | None] = [None] * len(args)
        given = list(args)
        for i in batched:
            axes[i] = 0
            given[i] = trees.map(lambda x: x.unsqueeze(1), args[i]) if keep_batch_dim else args[i]
        return micro_vmap(
            of_example,
            axes,
            microbatch_size=microbatch_size,
            accumulator=(accumulator, AccumulationType.CONCAT),
            num_real_microbatches=num_real_microbatches,
        )(*given, **kwargs)

    return run


def reshape_batch_axis(tree: Any, microbatch_size: int, axis: int = 0) -> Any:
    """The tensors with two axes in place of that of the batch: the number of microbatches, and their rows. They are views.

    Args:
        tree: tensors with a batch axis.
        microbatch_size: how many rows a microbatch has.
        axis: which axis is that of the batch.

    Raises:
        ValueError: a tensor has no such axis, or its size is no multiple of ``microbatch_size``.

    Example:
        >>> reshape_batch_axis(torch.arange(6), 3)
        tensor([[0, 2, 4],
                [1, 3, 5]])
    """
    size = integer("microbatch_size", microbatch_size, 1)
    rows = _rows((), {"tree": tree}, [("tree", axis)])
    if rows % size:
        raise ValueError(f"the batch must be a multiple of microbatch_size={size}, got {rows} rows: microbatch takes any number")
    return trees.map(lambda x: _by_microbatch(x, size, rows // size, axis), tree)


class _Split:
    """How a batch is split: ``whole`` microbatches of ``size`` rows, and one of the ``rest``."""

    def __init__(self, rows: int, size: int, real: int | Tensor | None = None) -> None:
        self.size, self.real = size, real
        self.whole, self.rest = divmod(rows, size)
        self.sizes = [size] * self.whole + [self.rest] * (self.rest > 0 or rows == 0)
        self.evaluated = max(real, 1) if isinstance(real, int) else len(self.sizes)
        if self.evaluated > len(self.sizes):
            raise ValueError(f"num_real_microbatches must be at most {len(self.sizes)}, as many as there are, got {real}")

    def take(self, x: Tensor, axis: int, i: int) -> Tensor:
        """The rows of a microbatch, a view."""
        end = self.whole * self.size
        if i == self.whole:
            return x.narrow(axis, end, self.rest)
        return _by_microbatch(x.narrow(axis, 0, end), self.size, self.whole, axis).select(axis % x.ndim, i)

    def weights(self) -> list[float]:
        """What each microbatch counts in a mean, 1 for a whole one."""
        return [size / self.size for size in self.sizes]

    def is_real(self, i: int) -> bool | Tensor:
        """Whether microbatch ``i`` counts."""
        return True if self.real is None else self.real > i

    def counted(self, i: int, new: Any, old: Any) -> Any:
        """``new``, or ``old`` where microbatch ``i`` does not count."""
        real = self.is_real(i)
        if isinstance(real, Tensor):
            return torch.where(real.to(new.device), new, old)
        return new if real else old


def _by_microbatch(x: Tensor, size: int, count: int, axis: int) -> Tensor:
    axis %= x.ndim
    return x.unflatten(axis, (size, count)).transpose(axis, axis + 1)


def _composed(accumulator: Any, split: _Split) -> Accumulator:
    """One accumulator of a tree of them: what it carries is the structure, and what each of them does."""
    found, spec = trees.flatten(accumulator)
    each = [_one(x, split) for x in found]

    def parts(value: Any) -> tuple[list[Any], Any]:
        return trees.fit(spec, value, "the result of the function", "accumulator")

    def init(value: Any) -> Any:
        values, own = parts(value)
        return own, [x.init(v) for x, v in zip(each, values, strict=True)]

    def update(carry: Any, value: Any, i: int) -> Any:
        return carry[0], [x.update(c, v, i) for x, c, v in zip(each, carry[1], parts(value)[0], strict=True)]

    def finalize(carry: Any) -> Any:
        return trees.unflatten(carry[0], [x.finalize(c) for x, c in zip(each, carry[1], strict=True)])

    def aggregate(values: Any) -> Any:
        stacked, own = parts(values)
        return trees.unflatten(own, [x.aggregate(v) for x, v in zip(each, stacked, strict=True)])

    return Accumulator(init, update, finalize, aggregate)


def _one(accumulator: Any, split: _Split) -> Accumulator:
    if isinstance(accumulator, Accumulator):
        return accumulator if split.real is None else _of_real_ones(accumulator, split)
    if accumulator is AccumulationType.SUM:
        return _sum(split)
    if accumulator is AccumulationType.MEAN:
        return _mean(split, sum(split.weights()))
    if accumulator is AccumulationType.RUNNING_MEAN:
        return _mean(split, _weight_of_real_ones(split))
    if accumulator is AccumulationType.CONCAT:
        return _concatenation(split)
    raise TypeError(f"accumulator must be an AccumulationType, an Accumulator or a tree of them, got {accumulator!r}")


def _of_real_ones(accumulator: Accumulator, split: _Split) -> Accumulator:
    """The same; its carry stays as it is where a microbatch does not count."""

    def update(carry: Any, value: Any, i: int) -> Any:
        return trees.map(lambda new, old: split.counted(i, new, old), accumulator.update(carry, value, i), carry)

    return dataclasses.replace(accumulator, update=update)


def _weight_of_real_ones(split: _Split) -> Any:
    real = [split.is_real(i) for i in range(len(split.sizes))]
    total = sum(w * (widened_scalar(x) if isinstance(x, Tensor) else x) for w, x in zip(split.weights(), real, strict=True))
    # The mean of none is 0.
    return torch.where(total == 0, 1, total) if isinstance(total, Tensor) else total or 1


def _lift(
    start: Callable[[Tensor], Any],
    add: Callable[[Any, Tensor, int], Any],
    finish: Callable[[Any], Tensor],
    aggregate: Callable[[Tensor], Tensor],
) -> Accumulator:
    """An accumulator of trees, of functions of one leaf. What it carries is the structure, and what ``start`` and ``add`` give."""

    def init(value: Any) -> Any:
        found, spec = trees.checked(value, "the result of the function")
        return spec, [None if x is None else start(x) for x in found]

    def update(carry: Any, value: Any, i: int) -> Any:
        found = trees.match(carry[0], value, f"the result of microbatch {i}", "the first one")
        return carry[0], [None if x is None else add(c, x, i) for c, x in zip(carry[1], found, strict=True)]

    def finalize(carry: Any) -> Any:
        return trees.unflatten(carry[0], [None if c is None else finish(c) for c in carry[1]])

    return Accumulator(init, update, finalize, lambda values: trees.map(aggregate, values))


def _sum(split: _Split, weights: Sequence[float] | None = None, divisor: Any = None) -> Accumulator:
    """What it carries of a leaf is the sum so far, float32 at least, and the dtype of the result."""

    def start(x: Tensor) -> tuple[Tensor, torch.dtype]:
        dtype = torch.int64 if x.dtype == torch.bool else x.dtype
        return torch.zeros_like(x, dtype=compute_dtype(x) if _inexact(x) else dtype), dtype

    def add(carry: tuple[Tensor, torch.dtype], x: Tensor, i: int) -> tuple[Tensor, torch.dtype]:
        total, dtype = carry
        x = x.to(total.dtype) if weights is None or weights[i] == 1 else x.to(total.dtype) * weights[i]
        return total + split.counted(i, x, 0), dtype

    def finish(carry: tuple[Tensor, torch.dtype]) -> Tensor:
        total, dtype = carry
        by = divisor.to(total.device) if isinstance(divisor, Tensor) else divisor
        return (total if by is None else total / by).to(dtype)

    return _lift(start, add, finish, lambda x: x.sum(0))


def _mean(split: _Split, divisor: Any) -> Accumulator:
    """A weighted sum; its divisor is the sum of the weights that count."""
    total = _sum(split, split.weights(), divisor)

    def checked(value: Any) -> Any:
        for path, x in zip(trees.paths(value), trees.flatten(value)[0], strict=True):
            if isinstance(x, Tensor) and not _inexact(x):
                where = f" at {path!r}" if path else ""
                raise ValueError(f"a mean is of floating-point tensors, the result{where} is {x.dtype}: convert it, or take SUM")
        return value

    return dataclasses.replace(
        total,
        init=lambda value: total.init(checked(value)),
        aggregate=lambda values: trees.map(lambda x: x.mean(0), checked(values)),
    )


def _concatenation(split: _Split) -> Accumulator:
    """What it carries of a leaf are the results so far."""

    def add(parts: list[Tensor], x: Tensor, i: int) -> list[Tensor]:
        return [*parts, split.counted(i, x, torch.zeros_like(x))]

    def finish(parts: list[Tensor]) -> Tensor:
        if len(parts) < split.whole:
            parts = parts + [torch.zeros_like(parts[0])] * (split.whole - len(parts))
        if len(parts) < len(split.sizes):
            rest = parts[0] if parts[0].ndim == 0 else parts[0][: len(parts[0]) * split.rest // split.size]
            parts = [*parts, torch.zeros_like(rest)]
        if parts[0].ndim == 0:
            return torch.stack(parts)
        whole = [torch.stack(parts[: split.whole], 1).flatten(0, 1)] if split.whole else []
        found = whole + parts[split.whole :]
        return torch.cat(found) if len(found) > 1 else found[0]

    return _lift(lambda x: [], add, finish, lambda x: x)


def _inexact(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _grad(
    fun: Function, argnums: int | Sequence[int], has_aux: bool, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """The gradient, the value and what comes besides it."""
    places = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    present, rebuilt = trees.tensors(tuple(args[i] for i in places))
    of_aux: list[Callable[..., Any]] = []

    def of_tensors(tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        given = list(args)
        for i, x in zip(places, rebuilt(tensors), strict=True):
            given[i] = x
        value, aux = fun(*given, **kwargs) if has_aux else (fun(*given, **kwargs), None)
        found, rebuilt_aux = trees.tensors(aux)
        of_aux.append(rebuilt_aux)
        return value, tuple(found)

    grads, (value, aux) = torch.func.grad_and_value(of_tensors, has_aux=True)(present)
    several = rebuilt(grads)
    return several[0] if isinstance(argnums, int) else several, value, of_aux[-1](aux)


def _vmapped(
    fun: Function, axes: Sequence[int | None], vmap_fn: Callable[..., Function], args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """``fun`` over the axes of its positional arguments, and axis 0 of the others; vmap itself takes no None and returns none."""
    found, spec = trees.flatten((tuple(args), kwargs))
    per_arg = [(x, axis) for x, axis in zip(args, axes, strict=True)] + [(kwargs, 0)]
    every = [axis for x, axis in per_arg for _ in trees.flatten(x)[0]]
    places = [i for i, (x, axis) in enumerate(zip(found, every, strict=True)) if x is not None and axis is not None]
    of_results: list[Callable[..., Any]] = []

    def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(found)
        for i, x in zip(places, tensors, strict=True):
            filled[i] = x
        args, kwargs = trees.unflatten(spec, filled)
        results, rebuilt = trees.tensors(fun(*args, **kwargs))
        of_results.append(rebuilt)
        return tuple(results)

    results = vmap_fn(of_tensors, tuple(every[i] for i in places), 0)(*[found[i] for i in places])
    return of_results[-1](results)


Places = Sequence[tuple[int | str, int]]
"""Which arguments have a batch axis, by position or by name, and which axis that is."""


def _places(argnums: int | Sequence[int], argnames: str | Sequence[str], in_axes: int | Sequence[int]) -> Places:
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    names = (argnames,) if isinstance(argnames, str) else tuple(argnames)
    several = (*numbers, *names)
    axes = (in_axes,) * len(several) if isinstance(in_axes, int) else tuple(in_axes)
    if len(axes) != len(several):
        raise ValueError(f"in_axes must be an int or one for each of {len(several)} batch arguments, got {in_axes}")
    return list(zip(several, axes, strict=True))


def _rows(args: Sequence[Any], kwargs: dict[str, Any], places: Places) -> int:
    """How many rows the batch has, in every tensor of these arguments."""
    first: tuple[int | str, Any, int, int] | None = None
    for where, axis in places:
        tree = _argument(args, kwargs, where)
        found, _ = trees.checked(tree, f"argument {where!r}")
        for i, x in enumerate(found):
            if x is None:
                continue
            if not -x.ndim <= axis < x.ndim:
                raise ValueError(f"{_leaf(where, tree, i)} must have a batch axis {axis}, got shape {tuple(x.shape)}")
            if first is None:
                first = where, tree, i, x.shape[axis]
            elif x.shape[axis] != first[3]:
                rows = f"{_leaf(*first[:3])} has {first[3]} and {_leaf(where, tree, i)} has {x.shape[axis]}"
                raise ValueError(f"a batch must have as many rows in all of its tensors, but {rows}: correct argnums or in_axes")
    if first is None:
        raise ValueError("there is no batch: name the arguments that have a batch axis, and pass tensors in them")
    return first[3]


def _argument(args: Sequence[Any], kwargs: dict[str, Any], where: int | str) -> Any:
    if isinstance(where, str):
        if where not in kwargs:
            raise TypeError(f"argument {where!r} has a batch axis: pass it by its name, or give its position in argnums")
        return kwargs[where]
    if not -len(args) <= where < len(args):
        raise TypeError(f"argument {where} has a batch axis, but there are {len(args)} positional ones: give names in argnames")
    return args[where]


def _leaf(where: int | str, tree: Any, i: int) -> str:
    path = trees.paths(tree)[i]
    return f"argument {where!r} at {path!r}" if path else f"argument {where!r}"
