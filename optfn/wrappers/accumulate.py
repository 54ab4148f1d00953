"""Several micro-batches to a step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state
from optfn.core import GradientTransformation, check_transformation, transformation
from optfn.leafwise import aligned
from optfn.numerics import Scalar, real_dtype
from optfn.schedules import Schedule, as_time
from optfn.wrappers.finite import all_finite, select

__all__ = ["AccumulateState", "accumulate", "skip_large_updates", "skip_not_finite"]


class AccumulateState(NamedTuple):
    """The state of :func:`accumulate`.

    Attributes:
        mini_step: micro-batches gathered since the last step, a 0-dim int64 tensor.
        gradient_step: steps taken so far, a 0-dim int64 tensor.
        skipped: micro-batches left out, a 0-dim int64 tensor.
        inner_state: the inner transformation's.
        accumulated: what has been gathered, with the structure of the parameters.
        skip_state: what ``should_skip_update_fn`` had to say of the last micro-batch; ``()`` without one.
    """

    mini_step: Tensor
    gradient_step: Tensor
    skipped: Tensor
    inner_state: Any
    accumulated: Any
    skip_state: Any = ()


def accumulate(
    inner: GradientTransformation,
    every_k: int | Schedule,
    *,
    use_grad_mean: bool = True,
    skip_nonfinite: bool = True,
    accumulator_dtype: torch.dtype | None = None,
    should_skip_update_fn: Callable[[Any, Tensor, Any], tuple[Any, Any]] | None = None,
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
        should_skip_update_fn: which other micro-batches to leave out: ``should_skip_update_fn(updates, gradient_step, params)``
            gives a 0-dim bool tensor, and a tree of tensors to keep as ``skip_state``; :func:`skip_large_updates` with a bound,
            or your own.

    Raises:
        TypeError: ``inner`` is no transformation, ``every_k`` neither an int nor a function.
        ValueError: ``every_k`` is less than 1; ``should_skip_update_fn`` gives no bool.

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
        dtype = accumulator_dtype or torch.promote_types(real_dtype(p.dtype), torch.float32)
        # Dynamo (torch 2.13) has no dtype.to_complex.
        return torch.zeros_like(p, dtype=torch.promote_types(dtype, torch.complex32) if p.is_complex() else dtype)

    def judged(updates: Any, gradient_step: Tensor, params: Any) -> tuple[Tensor, Any]:
        """Whether a micro-batch is taken, and what is kept of the judgement."""
        everything = torch.ones_like(gradient_step, dtype=torch.bool)
        taken = all_finite(updates, gradient_step.device) if skip_nonfinite else everything
        if should_skip_update_fn is None:
            return taken, ()
        skip, said = should_skip_update_fn(updates, gradient_step, params)
        skip = torch.as_tensor(skip, device=taken.device)
        if skip.dtype != torch.bool or skip.ndim:
            raise ValueError(f"should_skip_update_fn must give a bool, got {skip.dtype} of shape {tuple(skip.shape)}")
        return taken & ~skip, tree.map(lambda x: torch.as_tensor(x).clone(), said)

    def init(params: Any) -> AccumulateState:
        tree.checked(params, "accumulate: params")
        count = tree.new_count(params)
        _, said = judged(tree.zeros_like(params), count, params)
        said = tree.map(Tensor.detach, said)
        return AccumulateState(count, count.clone(), count.clone(), inner.init(params), tree.map(zeros, params), said)

    def update(updates: Any, state: AccumulateState, params: Any = None, **extra: Any) -> tuple[Any, AccumulateState]:
        check_state("accumulate", state, AccumulateState)
        aligned(updates, state.accumulated if params is None else params)
        k = every_k(as_time(state.gradient_step)) if callable(every_k) else every_k
        taken, said = judged(updates, state.gradient_step, params)
        share = 1 / as_time(k) if use_grad_mean else 1

        def add(total: Tensor, g: Any) -> Tensor:
            if g is None:
                return total
            part = (g.to(total.dtype) * share).to(total.dtype)  # of a 0-dim leaf the product is float64, as the share is
            return torch.where(taken.to(total.device), total + part, total)

        total = tree.map_entries(add, state.accumulated, updates)
        mini_step = state.mini_step + taken
        emit = taken & (mini_step >= k)
        gathered = tree.map_entries(lambda g, x: g if x is None else x.to(g.dtype), updates, total)
        new, inner_state = inner.update(gathered, state.inner_state, params, **extra)
        new = tree.map_entries(lambda u: torch.where(emit.to(u.device), u, 0), new)
        kept = tree.map_entries(lambda x, g: x if g is None else torch.where(emit.to(x.device), 0, x), total, updates)
        return new, AccumulateState(
            mini_step=torch.where(emit, 0, mini_step),
            gradient_step=state.gradient_step + emit,
            skipped=state.skipped + ~taken,
            inner_state=select(emit, inner_state, state.inner_state),
            accumulated=kept,
            skip_state=said,
        )

    return transformation(init, update)


def skip_not_finite(updates: Any, gradient_step: Any, params: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """For :func:`accumulate`: leave out a micro-batch whose gradient holds an inf or a NaN, and say how many.

    It leaves these out of itself; this adds ``num_not_finite`` and ``should_skip`` to its state.

    Args:
        updates: the gradient of the micro-batch.
        gradient_step: is not read.
        params: are not read.

    Example:
        >>> skip_not_finite({"w": torch.tensor([1.0, float("nan")])}, 0, None)
        (tensor(True), {'should_skip': tensor(True), 'num_not_finite': tensor(1)})
    """
    count = tree.sum(tree.map_entries(lambda u: ~u.isfinite(), updates)).to(torch.int64)
    return count > 0, {"should_skip": count > 0, "num_not_finite": count}


def skip_large_updates(updates: Any, gradient_step: Any, params: Any, max_squared_norm: Scalar) -> tuple[Tensor, dict[str, Tensor]]:
    """For :func:`accumulate`: leave out a micro-batch whose gradient has a squared norm that is not below a bound; NaN is not.

    ``should_skip_update_fn=functools.partial(skip_large_updates, max_squared_norm=100.0)``

    Args:
        updates: the gradient of the micro-batch.
        gradient_step: is not read.
        params: are not read.
        max_squared_norm: the bound, in the units of the squared gradient.

    Example:
        >>> skip_large_updates({"w": torch.tensor([3.0, 4.0])}, 0, None, 20.0)
        (tensor(True), {'should_skip': tensor(True), 'norm_squared': tensor(25.)})
    """
    square = tree.norm(updates, squared=True)
    skip = ~(square < max_squared_norm)
    return skip, {"should_skip": skip, "norm_squared": square}
