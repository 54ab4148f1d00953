"""Lookahead: slow parameters behind fast ones."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state, integer, number, require
from optfn.core import GradientTransformation, check_transformation, transformation
from optfn.numerics import Scalar, compute_dtype
from optfn.wrappers.finite import select

__all__ = ["LookaheadParams", "LookaheadState", "lookahead"]


class LookaheadParams(NamedTuple):
    """Fast and slow parameters together, for a :func:`lookahead` that is to keep both outside of its state, as in Optax.

    Attributes:
        fast: what gradients are taken at.
        slow: what a model is evaluated with.
    """

    fast: Any
    slow: Any

    @classmethod
    def init_synced(cls, params: Any) -> "LookaheadParams":
        """Both of them the same.

        Example:
            >>> LookaheadParams.init_synced(torch.zeros(1)).slow
            tensor([0.])
        """
        return cls(fast=params, slow=params)


class LookaheadState(NamedTuple):
    """The state of :func:`lookahead`.

    Attributes:
        fast_state: the fast optimizer's.
        steps_since_sync: how many steps it has made since the parameters were the same, a 0-dim int64 tensor.
        slow: the slow parameters, with the structure of the fast ones; ``()`` where :class:`LookaheadParams` hold them.
    """

    fast_state: Any
    steps_since_sync: Tensor
    slow: Any = ()


def lookahead(
    fast_optimizer: GradientTransformation, sync_period: int, slow_step_size: Scalar, reset_state: bool = False
) -> GradientTransformation:
    r"""Every :math:`k` steps move slow parameters towards the fast ones, and these to there.

    .. math::
        \theta_t &= \theta_{t-1} + u_t \\
        \phi &\leftarrow \phi + \alpha\, (\theta_t - \phi), \qquad \theta_t \leftarrow \phi \qquad [t \bmod k = 0]

    The slow parameters :math:`\phi` are in the state: evaluate with ``optfn.tree.get(state, "slow")``. Where the parameters given
    to ``init`` and ``update`` are :class:`LookaheadParams`, these hold them, as in Optax: gradients are taken at ``params.fast``,
    and the updates are for both. Nothing after it may change the updates. In the step after a move the slow parameters in the state
    are taken from the fast ones, which they are equal to. A leaf whose update is None when the others are moved stays. The state of
    the fast optimizer is kept over a move, as by default in Optax; some pull its momentum back with the parameters.

    Args:
        fast_optimizer: what makes :math:`u`.
        sync_period: :math:`k \ge 1`.
        slow_step_size: :math:`\alpha \ge 0`; 1 makes it the fast optimizer alone.
        reset_state: whether the state of the fast optimizer begins anew, as its ``init`` makes it, after each :math:`k` steps.

    Raises:
        TypeError: from ``update``: ``params`` is missing, or :class:`LookaheadParams` where ``init`` had none, or the reverse.
        ValueError: an argument out of range.

    Reference:
        Zhang, Lucas, Hinton and Ba, `Lookahead Optimizer: k steps forward, 1 step back
        <https://arxiv.org/abs/1907.08610>`_, 2019, algorithm 1.

    Example:
        >>> tx = lookahead(optfn.sgd(lr=1.0), sync_period=2, slow_step_size=0.5)
        >>> params = {"w": torch.tensor([0.0])}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update({"w": torch.tensor([-1.0])}, state, params)
        ...     params = optfn.apply_updates(params, updates)
        ...     print(params["w"], optfn.tree.get(state, "slow")["w"])
        tensor([1.]) tensor([0.])
        tensor([1.]) tensor([1.])
    """
    check_transformation(fast_optimizer, "lookahead", "lookahead(tx, sync_period, slow_step_size)")
    period, alpha = integer("sync_period", sync_period, 1), number("slow_step_size", slow_step_size, at_least=0)

    def init(params: Any) -> LookaheadState:
        fast = params.fast if isinstance(params, LookaheadParams) else params
        tree.checked(fast, "lookahead: params")
        slow = () if isinstance(params, LookaheadParams) else tree.map(lambda p: p.detach().clone(), params)
        return LookaheadState(fast_optimizer.init(fast), tree.new_count(fast), slow)

    def update(updates: Any, state: LookaheadState, params: Any = None, **extra: Any) -> tuple[Any, LookaheadState]:
        check_state("lookahead", state, LookaheadState)
        if updates is not None:  # both are None for a bare tensor that a mask hides
            require("lookahead", params=params)
        paired = isinstance(params, LookaheadParams)
        fast, slow = params if paired else (params, state.slow)
        if paired != (_is_empty(state.slow) and not _is_empty(fast)):
            how, what = ("without", "the fast parameters alone") if paired else ("of", "them")
            raise TypeError(f"lookahead: the state was made {how} LookaheadParams: give update {what} too")
        new, fast_state = fast_optimizer.update(updates, state.fast_state, fast, **extra)
        sync, synced = state.steps_since_sync == period - 1, state.steps_since_sync == 0

        def begun(s: Tensor, f: Any, u: Any) -> Tensor:
            # So a derivative with respect to the first parameters reaches the slow ones, which init has no graph of.
            return s if u is None else torch.where(synced.to(s.device), f.to(s.dtype), s)

        def ahead(u: Tensor, f: Tensor, s: Tensor) -> Tensor:
            """How far the fast parameter will be from the slow one."""
            wide = compute_dtype(u, f, s)
            return f.to(wide) + u.to(wide) - s.to(wide)

        def of_fast(u: Tensor, f: Tensor, s: Tensor) -> Tensor:
            back = u - (1 - alpha) * ahead(u, f, s)
            return torch.where(sync.to(u.device), back.to(u.dtype), u)

        def of_slow(s: Tensor, u: Any, f: Tensor) -> Any:
            return None if u is None else torch.where(sync.to(s.device), alpha * ahead(u, f, s), 0).to(s.dtype)

        slow = slow if paired else tree.map_entries(begun, slow, fast, new)
        moved, steps = tree.map_entries(of_slow, slow, new, fast), (state.steps_since_sync + 1) % period
        if reset_state:
            fast_state = select(sync, fast_optimizer.init(fast), fast_state)
        new = tree.map_entries(of_fast, new, fast, slow)
        if paired:
            return LookaheadParams(new, moved), LookaheadState(fast_state, steps)
        kept = tree.map_entries(lambda s, step: s if step is None else s + step, slow, moved)
        return new, LookaheadState(fast_state, steps, kept)

    return transformation(init, update)


def _is_empty(x: Any) -> bool:
    return type(x) is tuple and not x
