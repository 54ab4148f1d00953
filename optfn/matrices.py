"""Tensors as matrices, or as batches of them, for the rules that act on these."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import each_leaf
from optfn.core import GradientTransformation
from optfn.leafwise import begin_of, lifted
from optfn.sweep import Leaves, Sweep

__all__ = [
    "GaLoreDimensionNumbers",
    "MuonDimensionNumbers",
    "as_matrices",
    "as_tensor",
    "matrix_shape",
    "numbers_of",
    "with_numbers",
]


class MuonDimensionNumbers(NamedTuple):
    """Which dimensions of a tensor are the rows of its matrices, and which are the columns.

    Several are taken together as one. What is neither numbers the matrices, each of which is made orthogonal by itself.

    The defaults are Optax's, whose layers have the output last; torch's have it first. What is made orthogonal does not depend
    on which of the two are rows; the factor of :func:`scale_by_shape` does, and the ``"aol"`` scaling of square matrices.

    Attributes:
        reduction_axis: the dimension or dimensions that a layer sums over, the rows.
        output_axis: the dimension or dimensions of what it answers, the columns.

    Example:
        >>> kernels = torch.ones(8, 3, 5, 5)  # of 3 x 5 x 5 inputs, for 8 outputs
        >>> tx = optfn.scale_by_muon(weight_dimension_numbers=MuonDimensionNumbers((1, 2, 3), 0))
        >>> tx.update(kernels, tx.init(kernels))[0].shape
        torch.Size([8, 3, 5, 5])
    """

    reduction_axis: int | tuple[int, ...] = 0
    output_axis: int | tuple[int, ...] = 1


GaLoreDimensionNumbers = MuonDimensionNumbers


def _groups(shape: torch.Size, numbers: MuonDimensionNumbers) -> tuple[list[int], list[int], list[int]]:
    """The dimensions that number the matrices, those of their rows, and those of their columns."""
    axes = [(x,) if isinstance(x, int) else tuple(x) for x in (numbers.reduction_axis, numbers.output_axis)]
    rows, columns = ([i + len(shape) if i < 0 else i for i in group] for group in axes)
    both = {*rows, *columns}
    if not rows or not columns or len(both) < len(rows) + len(columns) or not both <= {*range(len(shape))}:
        raise ValueError(f"{tuple(numbers)} are no rows and columns of a tensor of shape {tuple(shape)}")
    return [i for i in range(len(shape)) if i not in both], rows, columns


def as_matrices(x: Tensor, numbers: MuonDimensionNumbers) -> Tensor:
    """A tensor as one matrix, or as a batch of them.

    Example:
        >>> as_matrices(torch.ones(8, 3, 5, 5), MuonDimensionNumbers((1, 2, 3), 0)).shape
        torch.Size([75, 8])
    """
    batch, rows, columns = _groups(x.shape, numbers)
    sizes = (math.prod([x.shape[i] for i in batch]),) if batch else ()
    return x.permute(*batch, *rows, *columns).reshape(*sizes, *matrix_shape(x.shape, numbers))


def matrix_shape(shape: torch.Size, numbers: MuonDimensionNumbers) -> tuple[int, int]:
    """How many rows and columns the matrices of a tensor have.

    Example:
        >>> matrix_shape(torch.Size([8, 3, 5, 5]), MuonDimensionNumbers((1, 2, 3), 0))
        (75, 8)
    """
    _, rows, columns = _groups(shape, numbers)
    return math.prod([shape[i] for i in rows]), math.prod([shape[i] for i in columns])


def as_tensor(x: Tensor, like: Tensor, numbers: MuonDimensionNumbers) -> Tensor:
    """The inverse of :func:`as_matrices`, ``like`` the tensor.

    Example:
        >>> kernels = torch.randn(8, 3, 5, 5)
        >>> numbers = MuonDimensionNumbers((1, 2, 3), 0)
        >>> as_tensor(as_matrices(kernels, numbers), kernels, numbers).equal(kernels)
        True
    """
    order = [i for group in _groups(like.shape, numbers) for i in group]
    return x.reshape([like.shape[i] for i in order]).permute(sorted(range(like.ndim), key=order.__getitem__))


def numbers_of(like: Any, given: Any) -> list[MuonDimensionNumbers | None]:
    """The dimension numbers of each leaf of a tree, None for one that has none; one kind for all, a tree, or a function.

    Raises:
        TypeError: a leaf has something else, or a function does not take a path and a leaf.
        ValueError: a tree of another structure; a leaf has no such dimensions.

    Example:
        >>> numbers_of([torch.ones(2, 3), torch.ones(3)], lambda path, p: MuonDimensionNumbers() if p.ndim == 2 else None)
        [MuonDimensionNumbers(reduction_axis=0, output_axis=1), None]
    """
    (leaves, spec), paths = tree.flatten(like), tree.paths(like)
    found: list[Any]
    if isinstance(given, MuonDimensionNumbers):
        found = [given] * len(leaves)
    elif callable(given):
        found = each_leaf("weight_dimension_numbers", given, paths, leaves)
    else:
        found = tree.match(spec, given, "weight_dimension_numbers", "params")
    for path, x, numbers in zip(paths, leaves, found, strict=True):
        if x is None or numbers is None:
            continue
        if not isinstance(numbers, MuonDimensionNumbers):
            raise TypeError(f"weight_dimension_numbers: {path!r} must have MuonDimensionNumbers, got {type(numbers).__name__}")
        _groups(x.shape, numbers)
    return [None if x is None else numbers for x, numbers in zip(leaves, found, strict=True)]


def with_numbers(tx: GradientTransformation, given: Any) -> GradientTransformation:
    """A transformation that is lifted, of a rule that takes dimension numbers, with those of each leaf.

    Raises:
        TypeError: from ``init`` and ``update``: a leaf has none, or as :func:`numbers_of`.

    Example:
        >>> flat = optfn.stateless_with_tree_map(lambda g, p, numbers: as_matrices(g, numbers).flatten())
        >>> with_numbers(flat, MuonDimensionNumbers(1, 0)).update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), ())[0]
        tensor([1., 3., 2., 4.])
    """
    if given is None:
        return tx

    def of_all(like: Any) -> list[Any]:
        found = numbers_of(like, given)
        for path, x, numbers in zip(tree.paths(like), tree.flatten(like)[0], found, strict=True):
            if x is not None and numbers is None:
                raise TypeError(f"weight_dimension_numbers: {path!r} must have MuonDimensionNumbers, got NoneType: optfn.partition")
        return found

    def init(params: Any) -> Any:
        of_all(params)
        return tx.init(params)

    def begin(leaves: Leaves, state: Any) -> Sweep:
        numbers = of_all(leaves.updates if leaves.params is None else leaves.params)
        sweep: Sweep = begin_of(tx)(leaves, state)
        return sweep._replace(each=lambda i, g, p, **known: sweep.each(i, g, p, shared=(numbers[i],), **known))

    return lifted(init, begin)
