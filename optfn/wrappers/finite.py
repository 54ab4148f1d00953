"""Steps that are not finite, skipped."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state
from optfn.core import GradientTransformation, check_transformation, transformation
from optfn.sharding import joint_extremes, local

__all__ = ["ApplyIfFiniteState", "all_finite", "apply_if_finite", "select", "zero_unless"]


class ApplyIfFiniteState(NamedTuple):
    """The state of :func:`apply_if_finite`; all but the last are 0-dim tensors.

    Attributes:
        notfinite_count: how many steps in a row were not finite, int64.
        last_finite: whether the last step was finite, bool.
        total_notfinite: how many steps were not finite in all, int64.
        inner_state: the inner transformation's.
    """

    notfinite_count: Tensor
    last_finite: Tensor
    total_notfinite: Tensor
    inner_state: Any


def apply_if_finite(inner: GradientTransformation, max_consecutive_errors: int | None = None) -> GradientTransformation:
    """Skip a step whose gradients, or whose updates, hold an inf or a NaN: zero updates, the inner state as it was.

    Optax looks at the gradients alone; here an inner transformation that overflows by itself is caught too. Nothing is
    synchronised: both outcomes are computed and one is selected.

    Args:
        inner: the transformation.
        max_consecutive_errors: after this many such steps in a row the next one is let through, as in Optax, so that training
            that is beyond help fails loudly; None never does.

    Example:
        >>> tx = apply_if_finite(optfn.sgd(lr=1.0))
        >>> update, state = tx.update(torch.tensor([float("nan"), 1.0]), tx.init(torch.zeros(2)))
        >>> update, state.total_notfinite
        (tensor([0., 0.]), tensor(1))
    """
    check_transformation(inner, "apply_if_finite", "apply_if_finite(tx)")
    if max_consecutive_errors is not None and max_consecutive_errors < 0:
        raise ValueError(f"max_consecutive_errors must be >= 0 or None, got {max_consecutive_errors}")

    def init(params: Any) -> ApplyIfFiniteState:
        zero = tree.new_count(params)
        return ApplyIfFiniteState(zero, torch.ones_like(zero, dtype=torch.bool), zero.clone(), inner.init(params))

    def update(updates: Any, state: ApplyIfFiniteState, params: Any = None, **extra: Any) -> tuple[Any, ApplyIfFiniteState]:
        check_state("apply_if_finite", state, ApplyIfFiniteState)
        new, inner_state = inner.update(updates, state.inner_state, params, **extra)
        finite = all_finite((updates, new), state.last_finite.device)
        errors = torch.where(finite, 0, state.notfinite_count + 1)
        taken = finite if max_consecutive_errors is None else finite | (errors > max_consecutive_errors)
        new = tree.map_entries(lambda u: zero_unless(taken, u), new)
        return new, ApplyIfFiniteState(
            errors, finite, state.total_notfinite + ~finite, select(taken, inner_state, state.inner_state)
        )

    return transformation(init, update)


def all_finite(updates: Any, device: torch.device | None = None) -> Tensor:
    """Whether no leaf holds an inf or a NaN, as a 0-dim bool tensor.

    Example:
        >>> all_finite({"w": torch.tensor([1.0, float("inf")])})
        tensor(False)
    """
    found = tree.leaves(updates)
    finite = joint_extremes([_values(local(u)).isfinite().all() for u in found], found, largest=False)
    return torch.stack([x.to(device) for x in finite]).all() if finite else torch.ones((), dtype=torch.bool, device=device)


def select(condition: Tensor, new: Any, old: Any) -> Any:
    """``new`` where a 0-dim condition holds, else ``old``: two trees of the same structure.

    Example:
        >>> select(torch.tensor(False), {"w": torch.ones(1)}, {"w": torch.zeros(1)})
        {'w': tensor([0.])}
    """
    return tree.map_entries(lambda x, y: torch.where(condition.to(x.device), x, y), new, old)


def _values(u: Tensor) -> Tensor:
    return u.coalesce().values() if u.layout == torch.sparse_coo else u


def zero_unless(condition: Tensor, u: Tensor) -> Tensor:
    """A tensor, dense or sparse, where a 0-dim condition holds, else zeros.

    Example:
        >>> zero_unless(torch.tensor(False), torch.ones(2))
        tensor([0., 0.])
    """
    if u.layout == torch.sparse_coo:
        u = u.coalesce()
        kept = torch.where(condition.to(u.device), u.values(), 0)
        return torch.sparse_coo_tensor(u.indices(), kept, u.shape, is_coalesced=True, check_invariants=False)
    return torch.where(condition.to(u.device), u, 0)
