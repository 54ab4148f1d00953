"""Stochastic gradient descent with differential privacy."""

from typing import Any, NamedTuple

from torch import Tensor

from optfn import random, tree
from optfn.checks import alias, check_state, is_zero, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation, identity, transformation
from optfn.leafwise import aligned
from optfn.numerics import Scalar, compute_dtype
from optfn.schedules import ScalarOrSchedule
from optfn.sharding import drawn, like, local
from optfn.sweep import as_pieces
from optfn.transforms.clipping import per_example_global_norm_clip
from optfn.transforms.momentum import trace
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["DifferentiallyPrivateAggregateState", "differentially_private_aggregate", "dpsgd"]


class DifferentiallyPrivateAggregateState(NamedTuple):
    """The state of :func:`differentially_private_aggregate`: ``rng_key``, the key of the next update's noise."""

    rng_key: Tensor


def differentially_private_aggregate(
    l2_norm_clip: Scalar, noise_multiplier: Scalar, key: int | Tensor | None = None, *, batch_size: Scalar | None = None
) -> GradientTransformation:
    r"""Make one gradient of those of the examples: each clipped, their mean, and noise.

    .. math:: u = \frac{1}{B} \Big( \sum_b g_b \min(1, c / \|g_b\|) + c\, s\, z \Big), \qquad z \sim \mathcal{N}(0, 1)

    It is the first link of a chain. What it is given has one dimension more than the parameters, the first one, of the :math:`B`
    examples: ``torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, batch)``. With ``batch_size`` it is given their
    sum, clipped already, which :func:`optfn.microbatch` makes in the memory of a few examples, see :mod:`optfn.microbatching`. The
    noise is the same, added once; in :func:`accumulate` it would be added to each microbatch.

    The numbers are a function of the key, the step and the place of a leaf in the tree, as in :func:`add_noise`. What privacy a run
    has is for an accountant to say, from ``noise_multiplier``, the sampling and the number of steps. The generator is
    fast and repeatable, not made to withstand an attacker who may guess the seed: draw it from ``secrets``.

    Args:
        l2_norm_clip: :math:`c \ge 0`, in the units of the gradients.
        noise_multiplier: :math:`s \ge 0`, the standard deviation of the noise in units of :math:`c`.
        key: an integer seed or a key of :mod:`optfn.random`, which has to be given.
        batch_size: :math:`B > 0`, where the updates are the sum of the clipped gradients, of norm :math:`c` at most each. Where
            each example is drawn by chance it is the expected number of them (the lot size of the paper).

    Raises:
        TypeError: ``key`` is missing, or is neither.
        ValueError: an argument out of range; from ``update``: a tensor without a dimension of the examples, or with one where
            ``batch_size`` is given (if it is given the parameters).

    Reference:
        Abadi et al., `Deep Learning with Differential Privacy <https://arxiv.org/abs/1607.00133>`_, 2016, algorithm 1.

    Example:
        >>> tx = differentially_private_aggregate(1.0, 0.1, key=7)
        >>> of_examples = {"w": torch.tensor([[3.0, 4.0], [0.0, 0.5]])}
        >>> updates, state = tx.update(of_examples, tx.init({"w": torch.zeros(2)}))
        >>> updates
        {'w': tensor([0.3227, 0.6970])}
        >>> clipped, _ = optfn.per_example_global_norm_clip(of_examples, 1.0)
        >>> tx = differentially_private_aggregate(1.0, 0.1, key=7, batch_size=2)
        >>> tx.update(clipped, tx.init({"w": torch.zeros(2)}))[0]
        {'w': tensor([0.3227, 0.6970])}
    """
    bound = number("l2_norm_clip", l2_norm_clip, at_least=0)
    deviation = bound * number("noise_multiplier", noise_multiplier, at_least=0)
    size = None if batch_size is None else number("batch_size", batch_size, above=0)
    start = random.as_key("differentially_private_aggregate", key)

    def init(params: Any) -> DifferentiallyPrivateAggregateState:
        return DifferentiallyPrivateAggregateState(start.to(tree.new_count(params).device, copy=True))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, DifferentiallyPrivateAggregateState]:
        check_state("differentially_private_aggregate", state, DifferentiallyPrivateAggregateState)
        leaves = aligned(updates, params)
        given = tree.unflatten(leaves.spec, leaves.grads)
        _check_shapes(given, leaves.owners, examples=size is None)
        totals = given if size is not None else per_example_global_norm_clip(given, bound)[0]
        totals = tree.unflatten(leaves.spec, as_pieces(aligned(totals, params)).laid_out())
        keys = random.split(state.rng_key, leaves.spec.num_leaves + 1).unbind()

        def noisy(total: Tensor, k: Tensor, g: Tensor) -> Tensor:
            wide, piece = compute_dtype(g), local(total)
            z = drawn(random.normal, k.to(g.device), piece, total, wide)
            new = (piece.to(wide) + deviation * z) / (g.shape[0] if size is None else size)
            return like(new.to(g.dtype), total)

        noise = tree.unflatten(leaves.spec, list(keys[1:]))
        return tree.map(noisy, totals, noise, updates), DifferentiallyPrivateAggregateState(keys[0])

    return transformation(init, update)


def _check_shapes(grads: Any, params: list[Any], examples: bool) -> None:
    """The shapes of the parameters where there are any, after that of the examples if these are not summed."""
    for path, g, p in zip(tree.paths(grads), tree.flatten(grads)[0], params, strict=True):
        if g is not None and p is not None and (g.shape[1:] if examples else g.shape) != p.shape:
            dims = ", ".join(map(str, p.shape))
            wanted = f"a first dimension of the examples, then ({dims})" if examples else f"the shape ({dims}) of its parameter"
            advice = (
                "for a sum of clipped gradients give batch_size" if examples else "batch_size is for a sum of clipped gradients"
            )
            raise ValueError(f"differentially_private_aggregate: {path!r} must have {wanted}, got shape {tuple(g.shape)}; {advice}")


@alias
def dpsgd(
    lr: ScalarOrSchedule,
    l2_norm_clip: Scalar,
    noise_multiplier: Scalar,
    key: int | Tensor | None = None,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    *,
    batch_size: Scalar | None = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Stochastic gradient descent with differential privacy, from the gradients of examples.

    .. math:: p_t = p_{t-1} - \gamma\, \mathrm{trace}_\mu(\mathrm{aggregate}(g_{t, 1}, \dots, g_{t, B}))

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        l2_norm_clip: the largest norm of an example's gradient, at least 0, see :func:`differentially_private_aggregate`.
        noise_multiplier: the standard deviation of the noise, at least 0, in units of ``l2_norm_clip``.
        key: an integer seed or a key of :mod:`optfn.random`, which has to be given.
        momentum: :math:`\mu \ge 0`; None and the number 0 leave :func:`trace` out.
        nesterov: Nesterov momentum.
        batch_size: how many examples there are where the updates are the sum of their clipped gradients, which
            :func:`optfn.microbatch` makes in constant memory; see :func:`differentially_private_aggregate`.
        maximize: ascend instead.

    Raises:
        TypeError: ``key`` is missing.
        ValueError: an argument out of range.

    Reference:
        See :func:`differentially_private_aggregate`.

    Example:
        >>> def loss(params, x, y):
        ...     return (x @ params["w"] - y).square()
        >>> params, x, y = {"w": torch.zeros(2)}, torch.eye(2), torch.ones(2)
        >>> tx = dpsgd(lr=0.5, l2_norm_clip=1.0, noise_multiplier=0.1, key=7)
        >>> of_examples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, y)
        >>> updates, state = tx.update(of_examples, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.2386, 0.2265])}

        The same step in the memory of one example:

        >>> def clipped(params, x, y):
        ...     of_examples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, y)
        ...     return optfn.per_example_global_norm_clip(of_examples, 1.0)
        >>> tx = dpsgd(lr=0.5, l2_norm_clip=1.0, noise_multiplier=0.1, key=7, batch_size=2)
        >>> total, count = optfn.microbatch(clipped, argnums=(1, 2), microbatch_size=1)(params, x, y)
        >>> updates, state = tx.update(total, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.2386, 0.2265])}
    """
    return chain(
        differentially_private_aggregate(l2_norm_clip, noise_multiplier, key, batch_size=batch_size),
        negate_if(maximize),
        identity() if momentum is None or is_zero(momentum) else trace(momentum, nesterov),
        scale_by_learning_rate(lr),
    )
