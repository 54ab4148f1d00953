"""GaLore: an optimizer that sees the gradients of matrices in a subspace of low rank."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import alias, check_state, integer, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation, check_transformation, transformation
from optfn.leafwise import aligned, check_dense, leafwise, told
from optfn.matrices import GaLoreDimensionNumbers, as_matrices, as_tensor, matrix_shape, numbers_of
from optfn.numerics import Scalar, compute_dtype
from optfn.optimizers.adam import scale_by_adam
from optfn.schedules import ScalarOrSchedule
from optfn.sharding import placed_as, stand_in
from optfn.sweep import as_pieces
from optfn.transforms.decay import add_decayed_weights
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["GaLoreSlots", "GaLoreState", "galore", "scale_by_galore"]


class GaLoreSlots(NamedTuple):
    """Slots of :func:`scale_by_galore` for one matrix: ``projector``, of its longer side and the rank."""

    projector: Tensor


class GaLoreState(NamedTuple):
    """The state of :func:`scale_by_galore`.

    Attributes:
        projection: the steps and the projectors, of the leaves that are matrices.
        base_optimizer_state: the state of the base transformation, of matrices in the subspace and of what is no matrix.
    """

    projection: Any
    base_optimizer_state: Any


def scale_by_galore(
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: Scalar = 1.0,
    base_optimizer: GradientTransformation | None = None,
    weight_dimension_numbers: Any = None,
) -> GradientTransformation:
    r"""Run a transformation on the gradients of matrices in a subspace of rank r, found anew every k updates.

    .. math::
        P_t &= \begin{cases} U_{:, 1:r} \text{ of } g_t = U \Sigma V^\top & t - 1 \text{ is a multiple of } k \\
            P_{t-1} & \text{else} \end{cases} \\
        u_t &= s\, P_t\, \mathrm{base}(P_t^\top g_t)

    where a matrix with more columns than rows is transposed. So the state of an m by n matrix, :math:`m \ge n`, with Adam is
    :math:`r\,(m + 2n)` entries in the place of :math:`2mn`. What is no matrix is handed to the base transformation as it is.

    The base transformation is handed no parameters: it can neither decay them nor look at their norms. What it keeps is not
    turned when the subspace is: as a singular vector may have either sign, and libraries differ in it, a run on another one is
    another run from the second subspace on. :math:`P` projects the longer side, as in Optax, where the paper and the authors'
    code take the shorter one: their projector is smaller, and what the base keeps is larger.

    Where a matrix lies on several processes, one of them projects it, and all keep its projector and what the base keeps of it.

    A decomposition takes some hundred times as long as a product of the matrix; it is made only when it is due, compiled by
    :func:`optfn.compile` too, see :func:`optfn.tree.cond`.

    Args:
        rank: :math:`r \ge 1`; the shorter side of a matrix where that is less.
        update_proj_gap: :math:`k \ge 1`.
        scale: :math:`s`, for matrices alone.
        base_optimizer: the transformation, :func:`scale_by_adam` if None.
        weight_dimension_numbers: what is a matrix: :class:`GaLoreDimensionNumbers` for all tensors of 2 dimensions or more, a tree
            of such and None, or a function ``(path, leaf)`` that gives them. With None it is what has 2 dimensions.

    Raises:
        TypeError: ``base_optimizer`` is no transformation; from ``init`` and ``update``: a matrix is complex.
        ValueError: an argument out of range; from ``init``: a tensor has no such dimensions.

    Reference:
        Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
        <https://arxiv.org/abs/2403.03507>`_, 2024, algorithm 2.

    Example:
        >>> tx = scale_by_galore(rank=1, base_optimizer=optfn.identity())
        >>> g = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> tx.update(g, tx.init(g))[0]
        tensor([[3., 0.],
                [0., 0.]])
    """
    rank, update_proj_gap = integer("rank", rank, 1), integer("update_proj_gap", update_proj_gap, 1)
    scale = number("scale", scale)
    base = base_optimizer if base_optimizer is not None else scale_by_adam()
    check_transformation(base, "scale_by_galore", "scale_by_galore(base_optimizer=tx)")

    given = _numbers(weight_dimension_numbers)

    def first_projector(p: Tensor) -> GaLoreSlots:
        return GaLoreSlots(p.new_zeros(*p.shape[:-1], min(rank, p.shape[-1])))

    def project(g: Tensor, slots: GaLoreSlots, p: Any, due: Any) -> tuple[Tensor, GaLoreSlots]:
        projector = tree.cond(due, lambda: _singular_vectors(g, rank), lambda: slots.projector)
        return projector.mT @ g, GaLoreSlots(projector)

    def at_step(step: Tensor) -> Any:
        due = (step - 1) % update_proj_gap == 0
        return due.tolist() if tree.decided(due) else due  # read once for all leaves

    projected = leafwise(first_projector, project, at_step=at_step, complex_="error")

    def size(x: Tensor) -> tuple[int, ...]:
        return (*x.shape[:-2], min(rank, x.shape[-1]), x.shape[-1])

    def init(params: Any) -> GaLoreState:
        leaves, spec = tree.checked(params, "scale_by_galore: params")
        tall = [None if n is None else _tall(stand_in(p), n) for p, n in zip(leaves, numbers_of(params, given), strict=True)]
        low = [p if x is None else x.new_zeros(size(x)) for p, x in zip(leaves, tall, strict=True)]
        return GaLoreState(projected.init(tree.unflatten(spec, tall)), base.init(tree.unflatten(spec, low)))

    def update(updates: Any, state: GaLoreState, params: Any = None, **extra: Any) -> tuple[Any, GaLoreState]:
        check_state("scale_by_galore", state, GaLoreState)
        leaves = as_pieces(aligned(updates, params))
        check_dense("scale_by_galore", leaves)
        numbers = numbers_of(updates if params is None else params, given)
        pairs = list(zip(leaves.laid_out(), numbers, strict=True))
        low, projection = told(projected, leaves, state.projection, _tall, numbers, size)
        shown = [g if n is None else x for (g, n), x in zip(pairs, low, strict=True)]
        try:
            new, base_state = base.update(tree.unflatten(leaves.spec, shown), state.base_optimizer_state, None, **extra)
        except TypeError as error:
            if "params" not in str(error):
                raise
            raise TypeError(
                f"scale_by_galore hands its base no params: decay outside of it, galore(weight_decay=...) ({error})"
            ) from error
        projectors = iter(tree.leaves(tree.map(lambda x, kept: kept, tree.unflatten(leaves.spec, low), *projection.slots)))
        moved = zip(pairs, tree.flatten(new)[0], strict=True)
        directions = [u if u is None or n is None else _back(scale, next(projectors), u, g, n) for (g, n), u in moved]
        return tree.unflatten(leaves.spec, directions), GaLoreState(projection, base_state)

    return transformation(init, update)


def _numbers(given: Any) -> Any:
    """What :func:`numbers_of` is to be given, so that a tensor that cannot have them has none."""
    if given is None:
        return lambda path, p: GaLoreDimensionNumbers() if p.ndim == 2 else None
    return (lambda path, p: given if p.ndim >= 2 else None) if isinstance(given, GaLoreDimensionNumbers) else given


def _tall(x: Tensor, numbers: GaLoreDimensionNumbers) -> Tensor:
    """A tensor as matrices that have no more columns than rows."""
    x = as_matrices(x, numbers)
    return x if x.shape[-2] >= x.shape[-1] else x.mT


def _singular_vectors(g: Tensor, rank: int) -> Tensor:
    """The first ones of the longer side, in the layout that the projector began in: of another one a graph would be made anew.

    What is not finite is in the gradient still, and is no reason to stop here.
    """
    vectors = torch.linalg.svd(g.nan_to_num(0.0, 0.0, 0.0), full_matrices=False)[0]
    return vectors[..., :rank].clone(memory_format=torch.contiguous_format)


def _back(scale: Scalar, projector: Tensor, u: Tensor, g: Tensor, numbers: GaLoreDimensionNumbers) -> Tensor:
    """An update of the subspace as one of the tensor."""
    dtype = compute_dtype(u, projector)
    full = scale * (projector.to(dtype) @ u.to(dtype))
    full = full if full.shape[-2:] == matrix_shape(g.shape, numbers) else full.mT
    return placed_as(as_tensor(full, g, numbers).to(g.dtype), g)


@alias
def galore(
    lr: ScalarOrSchedule = 1e-2,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: Scalar = 1.0,
    base_optimizer: GradientTransformation | None = None,
    weight_decay: Scalar = 0.0,
    *,
    weight_dimension_numbers: Any = None,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""GaLore: Adam, or another transformation, on gradients of low rank, with decoupled weight decay.

    .. math:: p_t = p_{t-1} - \gamma\, (\mathrm{galore}(g_t) + \lambda p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        rank: of the subspace, see :func:`scale_by_galore`.
        update_proj_gap: updates from one subspace to the next.
        scale: a factor for matrices alone; 0.25 in the authors' experiments.
        base_optimizer: the transformation, :func:`scale_by_adam` if None. It is not to decay.
        weight_decay: :math:`\lambda \ge 0`.
        weight_dimension_numbers: what is a matrix, see :func:`scale_by_galore`.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        TypeError: ``base_optimizer`` is no transformation; from ``init`` and ``update``: a matrix is complex.
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_galore`. The numbers are Optax's; the default of ``lr`` is the authors'.

    Example:
        >>> tx = galore(lr=0.1, rank=1)
        >>> params = {"w": torch.eye(2), "b": torch.ones(1)}
        >>> optfn.tree.map(lambda x: x.shape, optfn.tree.get(tx.init(params), "mu"))
        {'w': torch.Size([1, 2]), 'b': torch.Size([1])}
    """
    rule = scale_by_galore(rank, update_proj_gap, scale, base_optimizer, weight_dimension_numbers)
    return chain(negate_if(maximize), rule, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(lr))
