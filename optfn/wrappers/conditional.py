"""Transformations that run at some of the steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state
from optfn.core import GradientTransformation, check_transformation, transformation
from optfn.wrappers.finite import select, zero_unless

__all__ = ["ConditionallyMaskState", "ConditionallyTransformState", "conditionally_mask", "conditionally_transform"]


class ConditionallyTransformState(NamedTuple):
    """The state of :func:`conditionally_transform`.

    Attributes:
        inner_state: the inner transformation's.
        step: the updates so far, a 0-dim int64 tensor.
    """

    inner_state: Any
    step: Tensor


class ConditionallyMaskState(NamedTuple):
    """The state of :func:`conditionally_mask`.

    Attributes:
        step: the updates so far, a 0-dim int64 tensor.
        inner_state: the inner transformation's.
    """

    step: Tensor
    inner_state: Any


def conditionally_transform(
    inner: GradientTransformation, should_transform_fn: Callable[..., Any], forward_extra_args: bool = False
) -> GradientTransformation:
    """Run a transformation at the steps where a condition holds; at the others the updates pass unchanged, and its state stays.

    Both outcomes are computed and one is selected, so nothing is synchronised. A leaf that ``inner`` makes None, as :func:`freeze`
    does, has an update of 0 where the condition holds.

    Args:
        inner: the transformation.
        should_transform_fn: ``should_transform_fn(step) -> bool``, in torch arithmetic: a 0-dim bool tensor, or a bool. The step is
            a 0-dim int64 tensor, 0 in the first update.
        forward_extra_args: whether the function is handed the extra arguments of ``update`` too, by name.

    Raises:
        TypeError: ``inner`` is no transformation; from ``update``: the condition is no bool.

    Example:
        >>> tx = conditionally_transform(optfn.scale(10.0), lambda step: step % 2 == 1)
        >>> state = tx.init(torch.ones(1))
        >>> for _ in range(2):
        ...     update, state = tx.update(torch.ones(1), state)
        ...     print(update)
        tensor([1.])
        tensor([10.])
    """
    check_transformation(inner, "conditionally_transform", "conditionally_transform(tx, should_transform_fn)")

    def init(params: Any) -> ConditionallyTransformState:
        return ConditionallyTransformState(inner.init(params), tree.new_count(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, ConditionallyTransformState]:
        check_state("conditionally_transform", state, ConditionallyTransformState)
        chosen = _holds("conditionally_transform", should_transform_fn, state.step, extra if forward_extra_args else {})
        new, inner_state = inner.update(updates, state.inner_state, params, **extra)

        def pick(u: Tensor, x: Any) -> Tensor:
            return torch.where(chosen.to(u.device), 0 if x is None else x, u)

        updates = tree.map_entries(pick, updates, new)
        return updates, ConditionallyTransformState(select(chosen, inner_state, state.inner_state), state.step + 1)

    return transformation(init, update)


def conditionally_mask(
    inner: GradientTransformation, should_transform_fn: Callable[..., Any], forward_extra_args: bool = False
) -> GradientTransformation:
    """Run a transformation at the steps where a condition holds; at the others the updates are 0, and its state stays.

    Args:
        inner: the transformation.
        should_transform_fn: as in :func:`conditionally_transform`.
        forward_extra_args: as there.

    Raises:
        TypeError: ``inner`` is no transformation; from ``update``: the condition is no bool.

    Example:
        >>> tx = conditionally_mask(optfn.scale(10.0), lambda step: step % 2 == 1)
        >>> state = tx.init(torch.ones(1))
        >>> for _ in range(2):
        ...     update, state = tx.update(torch.ones(1), state)
        ...     print(update)
        tensor([0.])
        tensor([10.])
    """
    check_transformation(inner, "conditionally_mask", "conditionally_mask(tx, should_transform_fn)")

    def init(params: Any) -> ConditionallyMaskState:
        return ConditionallyMaskState(tree.new_count(params), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, ConditionallyMaskState]:
        check_state("conditionally_mask", state, ConditionallyMaskState)
        chosen = _holds("conditionally_mask", should_transform_fn, state.step, extra if forward_extra_args else {})
        new, inner_state = inner.update(updates, state.inner_state, params, **extra)
        new = tree.map_entries(lambda u: zero_unless(chosen, u), new)
        return new, ConditionallyMaskState(state.step + 1, select(chosen, inner_state, state.inner_state))

    return transformation(init, update)


def _holds(owner: str, condition: Callable[..., Any], step: Tensor, extra: dict[str, Any]) -> Tensor:
    found = torch.as_tensor(condition(step, **extra), device=step.device)
    if found.dtype != torch.bool or found.ndim:
        raise TypeError(f"{owner}: should_transform_fn must give a bool, got {found.dtype} of shape {tuple(found.shape)}")
    return found
