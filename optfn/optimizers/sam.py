"""Sharpness-aware minimization: the gradient is taken uphill of where the parameters are."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state, integer, require
from optfn.core import GradientTransformation, added, check_transformation, transformation
from optfn.leafwise import aligned, check_dense
from optfn.numerics import compute_dtype
from optfn.wrappers.finite import select

__all__ = ["SAMState", "sam"]


class SAMState(NamedTuple):
    """The state of :func:`sam`.

    Attributes:
        steps_since_sync: updates since the last one that moved the parameters for good, a 0-dim int64 tensor.
        opt_state: the outer transformation's.
        adv_state: the adversarial transformation's.
        cache: the parameters as they were before the round, with their structure; ``()`` with ``opaque_mode``.
    """

    steps_since_sync: Tensor
    opt_state: Any
    adv_state: Any
    cache: Any


def sam(
    optimizer: GradientTransformation,
    adv_optimizer: GradientTransformation,
    sync_period: int = 2,
    reset_state: bool = True,
    opaque_mode: bool = False,
) -> GradientTransformation:
    r"""Sharpness-aware minimization: some steps uphill, then one step down from where they began, by the gradient found there.

    .. math::
        \tilde p = p_{t-1} + \rho\, \frac{g(p_{t-1})}{\|g(p_{t-1})\|}, \qquad p_t = p_{t-1} - \gamma\, g(\tilde p)

    is ``sam(optfn.sgd(lr), optfn.chain(optfn.normalize(), optfn.sgd(rho)))``. The updates of ``adv_optimizer`` are negated. The
    norm is that of all leaves together, as in the paper. A round of one update steps from where the parameters are, Optax's from
    where they were before.

    A round is ``sync_period`` updates. In all but the last of them the parameters move uphill; the last puts them back and takes
    the step of ``optimizer``. So the loop is that of any transformation, with half of the steps, and the parameters
    *between* are not those to evaluate or save: ``optfn.tree.get(state, "cache")`` is, after the first update of a round. A
    leaf whose update is None stays where it is; it should be None in all updates of a round, or in none.

    With ``opaque_mode`` one update is a whole round, and takes the gradients that it needs itself:
    ``tx.update(grads, state, params, grad_fn=lambda params, i: torch.func.grad(loss)(params, batch))``.

    Args:
        optimizer: the outer transformation, which steps down.
        adv_optimizer: the adversarial transformation, which steps uphill.
        sync_period: updates in a round, at least 1; 1 is ``optimizer`` alone.
        reset_state: whether ``adv_optimizer`` begins anew in each round.
        opaque_mode: a round in each update, by ``grad_fn(params, i) -> grads``, called with ``i`` from 0 to ``sync_period - 2``,
            and with all parameters: within a mask or a partition the others as they are. Of leaves that have no update it may give
            None or a gradient, which is not used.

    Raises:
        TypeError: what is no transformation; from ``update``: ``params``, or ``grad_fn``, is missing.
        ValueError: ``sync_period`` is less than 1.

    Reference:
        Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
        <https://arxiv.org/abs/2010.01412>`_, 2020, algorithm 1.

    Example:
        >>> tx = sam(optfn.sgd(lr=0.1), optfn.chain(optfn.normalize(), optfn.sgd(lr=1.0)))
        >>> params = torch.tensor([3.0])
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(2 * params, state, params)  # the gradient of the square
        ...     params = optfn.apply_updates(params, updates)
        ...     print(params)
        tensor([4.])
        tensor([2.2000])
    """
    for tx in (optimizer, adv_optimizer):
        check_transformation(tx, "sam", "sam(tx, adv_tx)")
    sync_period = integer("sync_period", sync_period, 1)

    def init(params: Any) -> SAMState:
        tree.checked(params, "sam: params")
        cache = () if opaque_mode else tree.map(lambda p: p.detach().clone(), params)
        return SAMState(tree.new_count(params), optimizer.init(params), adv_optimizer.init(params), cache)

    def update(updates: Any, state: SAMState, params: Any = None, **extra: Any) -> tuple[Any, SAMState]:
        check_state("sam", state, SAMState)
        if state.cache is not None:  # a bare tensor that a mask hides is None
            require("sam", params=params)
        leaves = aligned(updates, params)
        check_dense("sam", leaves)
        updates = tree.unflatten(leaves.spec, leaves.grads)
        return opaque(updates, state, params, **extra) if opaque_mode else transparent(updates, state, params, **extra)

    def transparent(updates: Any, state: SAMState, params: Any, **extra: Any) -> tuple[Any, SAMState]:
        first, last = state.steps_since_sync == 0, state.steps_since_sync == sync_period - 1
        cache = select(first, params, state.cache)
        uphill, adv_state = adv_optimizer.update(updates, state.adv_state, params, **extra)
        down, opt_state = optimizer.update(updates, state.opt_state, cache, **extra)

        def turn(g: Tensor, a: Any, u: Any, c: Tensor, p: Tensor) -> Tensor:
            wide = compute_dtype(g, p)
            up: Any = 0 if a is None else -a.to(wide)
            back = c.to(wide) - p.to(wide)
            return torch.where(last.to(g.device), back if u is None else back + u.to(wide), up).to(g.dtype)

        new = tree.map_entries(turn, updates, uphill, down, cache, params)
        fresh = adv_optimizer.init(params) if reset_state else state.adv_state
        return new, SAMState(
            (state.steps_since_sync + 1) % sync_period,
            select(last, opt_state, state.opt_state),
            select(last, fresh, adv_state),
            cache,
        )

    def opaque(
        updates: Any, state: SAMState, params: Any, grad_fn: Callable[[Any, int], Any] | None = None, **extra: Any
    ) -> tuple[Any, SAMState]:
        require("sam", grad_fn=grad_fn)
        moved, adv_state = params, state.adv_state
        for i in range(sync_period - 1):
            uphill, adv_state = adv_optimizer.update(updates, adv_state, moved, **extra)
            moved = added(moved, tree.map(torch.neg, uphill))[0]
            # A leaf that sits the round out has no gradient up there either.
            updates = tree.map(lambda _, g: g, updates, grad_fn(moved, i))  # type: ignore[misc]
        adv_state = adv_optimizer.init(params) if reset_state else adv_state
        updates, opt_state = optimizer.update(updates, state.opt_state, params, **extra)
        return updates, SAMState(state.steps_since_sync.clone(), opt_state, adv_state, ())

    return transformation(init, update)
