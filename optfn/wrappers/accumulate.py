"""Several micro-batches to a step."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state
from optfn.core import GradientTransformation, check_transformation, transformation
from optfn.leafwise import aligned
from optfn.schedules import Schedule, as_time
from optfn.wrappers.finite import all_finite, select

__all__ = ["AccumulateState", "accumulate"]


class AccumulateState(NamedTuple):
    """The state of :func:`accumulate`.

    Attributes:
        mini_step: micro-batches gathered since the last step, a 0-dim int64 tensor.
        gradient_step: steps taken so far, a 0-dim int64 tensor.
        skipped: micro-batches left out because they were not finite, a 0-dim int64 tensor.
        inner_state: the inner transformation's.
        accumulated: what has been gathered, with the structure of the parameters.
    """

    mini_step: Tensor
    gradient_step: Tensor
    skipped: Tensor
    inner_state: Any
    accumulated: Any


def accumulate(
    inner: GradientTransformation,
    every_k: int | Schedule,
    *,
    use_grad_mean: bool = True,
    skip_nonfinite: bool = True,
    accumulator_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Gather the gradients of :math:`k` micro-batches and hand their mean to the inner transformation (Optax's ``MultiSteps``).

    In the calls between the updates are zero and the inner state stays. A micro-batch whose gradient holds an inf or a NaN
    is left out and counted in ``skipped``: the step waits for another one, and nothing that is kept is touched.

    A leaf whose update is None adds nothing; where it is None in the call that takes the step it sits the step out and keeps
    what it has gathered for the next.

    Args:
        inner: the transformation; it sees one gradient for :math:`k` micro-batches.
        every_k: :math:`k \ge 1`, an int or a schedule of the steps taken so far (``gradient_step``).
        use_grad_mean: hand on the mean; False hands on the sum.
        skip_nonfinite: False lets everything in.
        accumulator_dtype: dtype to gather in; by default the parameter's, float32 at least.

    Raises:
        TypeError: ``inner`` is no transformation, ``every_k`` neither an int nor a function.
        ValueError: ``every_k`` is less than 1.

    Example:
        >>> tx = accumulate(optfn.sgd(lr=1.0), 2)
        >>> state = tx.init(torch.zeros(1))
        >>> for gradient in (1.0, 3.0):
        ...     update, state = tx.update(torch.tensor([gradient]), state)
        ...     print(update)
        tensor([0.])
        tensor([-2.])
    """
    check_transformation(inner, "accumulate", "accumulate(tx, every_k)")
    given: Any = every_k
    if isinstance(given, bool) or not (callable(given) or isinstance(given, int)):
        raise TypeError(f"every_k must be an int or a schedule, got {type(given).__name__}")
    if not callable(every_k) and every_k < 1:
        raise ValueError(f"every_k must be >= 1, got {every_k}")

    def zeros(p: Tensor) -> Tensor:
        real = p.dtype.to_real() if p.is_complex() else p.dtype
        dtype = accumulator_dtype or torch.promote_types(real, torch.float32)
        return torch.zeros_like(p, dtype=dtype.to_complex() if p.is_complex() else dtype)

    def init(params: Any) -> AccumulateState:
        tree.checked(params, "accumulate: params")
        count = tree.new_count(params)
        return AccumulateState(count, count.clone(), count.clone(), inner.init(params), tree.map(zeros, params))

    def update(updates: Any, state: AccumulateState, params: Any = None, **extra: Any) -> tuple[Any, AccumulateState]:
        check_state("accumulate", state, AccumulateState)
        aligned(updates, state.accumulated if params is None else params)
        k = every_k(as_time(state.gradient_step)) if callable(every_k) else every_k
        taken = (
            all_finite(updates, state.mini_step.device) if skip_nonfinite else torch.ones_like(state.mini_step, dtype=torch.bool)
        )
        share = 1 / as_time(k) if use_grad_mean else 1

        def add(total: Tensor, g: Any) -> Tensor:
            if g is None:
                return total
            part = (g.to(total.dtype) * share).to(total.dtype)  # of a 0-dim leaf the product is float64, as the share is
            return torch.where(taken.to(total.device), total + part, total)

        total = tree.map(add, state.accumulated, updates)
        mini_step = state.mini_step + taken
        emit = taken & (mini_step >= k)
        gathered = tree.map(lambda g, x: g if x is None else x.to(g.dtype), updates, total)
        new, inner_state = inner.update(gathered, state.inner_state, params, **extra)
        new = tree.map(lambda u: torch.where(emit.to(u.device), u, 0), new)
        kept = tree.map(lambda x, g: x if g is None else torch.where(emit.to(x.device), 0, x), total, updates)
        return new, AccumulateState(
            mini_step=torch.where(emit, 0, mini_step),
            gradient_step=state.gradient_step + emit,
            skipped=state.skipped + ~taken,
            inner_state=select(emit, inner_state, state.inner_state),
            accumulated=kept,
        )

    return transformation(init, update)
