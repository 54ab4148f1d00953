"""The lift: a rule for one tensor becomes a transformation of trees.

Everything that is not an algorithm's math is here, once: the loop over leaves, None, step counts, complex as real,
half precision in float32, sparse gradients, and the errors, which name the leaf.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import require, rule_name
from optfn.core import GradientTransformation, transformation
from optfn.numerics import as_complex, as_real, compute_dtype, real_dtype

__all__ = ["LeafwiseState", "leafwise", "stateless_with_tree_map"]

Sparse = Literal["error", "dense", "values"]
Complex = Literal["real", "error"]
Rule = Callable[..., Any]


class LeafwiseState(NamedTuple):
    """The state of a lifted rule.

    Attributes:
        step: how many updates each leaf has had: int64, one entry a leaf, in the order of :func:`optfn.tree.flatten`.
        slots: what the rule's ``init`` returns, a NamedTuple, each field a tree with the structure of the parameters
            (``state.slots.mu["blocks.0.weight"]``); ``()`` for a leaf that is None, or a field that the rule does not keep.
    """

    step: Tensor
    slots: Any


def leafwise(
    init: Callable[[Tensor], Any],
    update: Callable[[Tensor, Any, Any, Any], tuple[Tensor, Any]],
    *,
    elementwise: bool = False,
    needs_params: bool = False,
    sparse: Sparse = "error",
    complex_: Complex = "real",
) -> GradientTransformation:
    """Lift a rule for one tensor to trees of tensors.

    What the rule may rely on: its tensors are real (a complex leaf comes as its real view, with a last dimension of 2), of
    one shape, and float32 or wider; ``step`` counts from 1, each leaf for itself, as a 0-dim tensor of the leaf's dtype. A leaf
    whose update is None is not shown to the rule: its slots and its step stay as they are. What comes back is cast: slots to the
    dtype that ``init`` gave them, the direction to the dtype of the gradient.

    Args:
        init: ``init(p) -> slots``, a NamedTuple of new tensors (``()`` for one that is not kept).
        update: ``update(g, slots, p, step) -> (direction, slots)``, a pure function in plain torch calls.
        elementwise: declares that an entry of the result depends on that entry alone, so that
            :func:`sparse_masked` may run the rule on some of the entries.
        needs_params: whether the rule reads ``p``; without it ``p`` is None where no params are given.
        sparse: what a sparse COO gradient is to the rule: an ``"error"`` that names :func:`sparse_masked`; made ``"dense"``
            first; or its ``"values"`` as they lie there, not summed, which a linear rule that does not read ``p`` may take.
        complex_: what a complex tensor is to the rule: its ``"real"`` view, or an ``"error"``, where the last dimension of that
            view would be one dimension too many.

    Returns:
        A transformation with a :class:`LeafwiseState`.

    Raises:
        TypeError: from ``init`` and ``update``: a leaf that is no floating-point tensor, a sparse or complex one where
            the rule takes none, missing params.
        ValueError: another structure or another shape than the params' or the state's, or an empty tree.

    Example:
        >>> class SignSlots(NamedTuple):
        ...     mu: torch.Tensor
        >>> def scale_by_sign_of_average(b1=0.9):
        ...     def init(p):
        ...         return SignSlots(torch.zeros_like(p))
        ...     def update(g, slots, p, step):
        ...         mu = torch.lerp(slots.mu, g, 1 - b1)
        ...         return mu.sign(), SignSlots(mu)
        ...     return leafwise(init, update, elementwise=True)
        >>> tx = scale_by_sign_of_average()
        >>> updates, state = tx.update({"w": torch.tensor([3.0, -2.0])}, tx.init({"w": torch.zeros(2)}))
        >>> updates
        {'w': tensor([ 1., -1.])}
    """

    def init_fn(params: Any) -> LeafwiseState:
        leaves, spec = tree.checked(params, "params")
        slots = [() if p is None else _init_leaf(init, p, complex_, params, i) for i, p in enumerate(leaves)]
        device = next((p.device for p in leaves if p is not None), None)
        return LeafwiseState(torch.zeros(len(leaves), dtype=torch.int64, device=device), _by_field(spec, slots))

    def update_fn(updates: Any, state: LeafwiseState, params: Any = None, **extra: Any) -> tuple[Any, LeafwiseState]:
        grads, owners, spec = _aligned(update, updates, params, needs_params)
        slots = _by_leaf(spec, state.slots)
        present = [g is not None for g in grads]
        step = state.step + (1 if all(present) else torch.tensor(present, device=state.step.device))
        steps = _Steps(step)
        directions: list[Tensor | None] = [None] * len(grads)
        for i, (g, p) in enumerate(zip(grads, owners, strict=True)):
            if g is None:
                continue
            if not _has_slots(slots[i]):
                raise ValueError(f"{_where(update, updates, i)} has an update, but there was no parameter when the state was made")
            likes = (p, _first_tensor(slots[i]) if elementwise else None)
            _check_complex(g, complex_, update, updates, i)
            values, rebuild = _dense_values(g, likes, sparse, elementwise, update, updates, i)
            direction, slots[i] = _apply(update, values, slots[i], p, steps.of(i, values, p))
            directions[i] = rebuild(direction)
        return tree.unflatten(spec, directions), LeafwiseState(step, _by_field(spec, slots))

    return transformation(init_fn, update_fn, elementwise=elementwise)


def stateless_with_tree_map(
    f: Callable[[Tensor, Any], Tensor],
    *,
    elementwise: bool = True,
    needs_params: bool = False,
    sparse: Sparse = "error",
    complex_: Complex = "real",
) -> GradientTransformation:
    """Lift a function of one tensor that keeps no state: ``f(g, p) -> direction``.

    The function may rely on what :func:`leafwise` promises a rule: real tensors, float32 or wider, never None.

    Args:
        f: called for every update that is not None; ``p`` is None where no params are given.
        elementwise: whether an entry of the result depends on that entry alone.
        needs_params: whether ``f`` reads ``p``.
        sparse: what a sparse COO gradient is to ``f``, as in :func:`leafwise`.
        complex_: what a complex tensor is to ``f``, as in :func:`leafwise`.

    Example:
        >>> tx = stateless_with_tree_map(lambda g, p: g.sign())
        >>> tx.update({"w": torch.tensor([-3.0, 2.0]), "b": None}, ())
        ({'w': tensor([-1.,  1.]), 'b': None}, ())
    """

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        grads, owners, spec = _aligned(f, updates, params, needs_params)
        directions: list[Tensor | None] = [None] * len(grads)
        for i, (g, p) in enumerate(zip(grads, owners, strict=True)):
            if g is not None:
                _check_complex(g, complex_, f, updates, i)
                values, rebuild = _dense_values(g, (p, None), sparse, elementwise, f, updates, i)
                direction, _ = _apply(lambda g, slots, p, step: (f(g, p), slots), values, (), p, None)
                directions[i] = rebuild(direction)
        return tree.unflatten(spec, directions), state

    return transformation(lambda params: (), update_fn, elementwise=elementwise)


def _aligned(rule: Rule, updates: Any, params: Any, needs_params: bool) -> tuple[list[Any], list[Any], Any]:
    """The leaves of updates and params side by side, and the structure of updates."""
    if needs_params and params is None and updates is not None:  # both are None for a bare tensor that a mask hides
        require(rule_name(rule), params=params)
    grads, spec = tree.checked(updates, "updates", empty=True)
    if params is None:
        return grads, [None] * len(grads), spec
    owners = tree.match(spec, params, "params", "updates")
    for i, (g, p) in enumerate(zip(grads, owners, strict=True)):
        if g is not None and p is None:
            raise ValueError(f"{_where(rule, updates, i)} has an update, but no parameter")
    return grads, owners, spec


def _where(rule: Rule, of: Any, i: int) -> str:
    # Names are looked up here, not when a transformation is made: Dynamo of torch 2.11 cannot trace that.
    path = tree.paths(of)[i]
    return f"{rule_name(rule)}: {repr(path) if path else 'the tensor'}"


def _check_complex(x: Tensor, complex_: Complex, rule: Rule, of: Any, i: int) -> None:
    if complex_ == "error" and x.is_complex():
        raise TypeError(f"{_where(rule, of, i)} is complex, which {rule_name(rule)} does not take: pass torch.view_as_real of it")


def _init_leaf(init: Callable[[Tensor], Any], p: Tensor, complex_: Complex, params: Any, i: int) -> Any:
    if not (p.is_floating_point() or p.is_complex()) or p.layout != torch.strided:
        kind = p.dtype if p.layout == torch.strided else p.layout
        raise TypeError(f"{_where(init, params, i)} must be a dense floating-point or complex tensor, got {kind}")
    _check_complex(p, complex_, init, params, i)
    real = as_real(p)
    try:
        slots = init(real)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_where(init, params, i)}: {error}") from error
    if not p.is_complex():
        return slots
    return type(slots)(*(as_complex(x) if isinstance(x, Tensor) and x.shape == real.shape else x for x in slots))


def _by_field(spec: Any, slots: list[Any]) -> Any:
    """Slots of each leaf to one NamedTuple of trees; a field that no leaf keeps is ``()``."""
    kind = next((type(s) for s in slots if type(s) is not tuple), None)
    if kind is None:
        return ()
    columns = ([s[k] if len(s) else () for s in slots] for k in range(len(kind._fields)))
    return kind(*(tree.unflatten(spec, c) if any(isinstance(x, Tensor) for x in c) else () for c in columns))


def _by_leaf(spec: Any, slots: Any) -> list[Any]:
    """The inverse of :func:`_by_field`."""
    count = spec.num_leaves
    columns = [[()] * count if isinstance(f, tuple) and len(f) == 0 else tree.match(spec, f, "the state", "updates") for f in slots]
    return [type(slots)(*row) for row in zip(*columns, strict=True)] if columns else [slots] * count


def _first_tensor(slots: Any) -> Tensor | None:
    return next((x for x in slots if isinstance(x, Tensor)), None)


def _has_slots(slots: Any) -> bool:
    return type(slots) is not tuple and (len(slots) == 0 or _first_tensor(slots) is not None)


def _dense_values(
    g: Tensor, likes: tuple[Tensor | None, Tensor | None], sparse: Sparse, elementwise: bool, rule: Rule, updates: Any, i: int
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What of a gradient the rule is shown, once it is found sound, and how to make an update of what the rule answers."""
    if not (g.is_floating_point() or g.is_complex()):
        raise TypeError(f"{_where(rule, updates, i)} must have a floating-point or complex gradient, got {g.dtype}")
    for owner, like in zip(("parameter", "slots"), likes, strict=True):
        if like is not None and (g.shape != like.shape or g.is_complex() != like.is_complex()):
            wanted, given = (f"{x.dtype} of shape {tuple(x.shape)}" for x in (like, g))
            raise ValueError(f"{_where(rule, updates, i)} must have an update like its {owner}, {wanted}, got {given}")
    if g.layout == torch.strided:
        return g, lambda direction: direction
    if g.layout == torch.sparse_coo and sparse == "dense":
        return g.to_dense(), lambda direction: direction
    if g.layout == torch.sparse_coo and sparse == "values":
        # torch's _values() has no derivative, and its values() wants the entries summed.
        g = g.coalesce() if g.requires_grad else g
        return g.values() if g.is_coalesced() else g._values(), lambda direction: torch.sparse_coo_tensor(
            g._indices(), direction, g.shape, is_coalesced=g.is_coalesced(), check_invariants=False
        )
    name = rule_name(rule)
    advice = f"wrap it, optfn.sparse_masked({name}(...)), or " if elementwise and g.layout == torch.sparse_coo else ""
    raise TypeError(
        f"{_where(rule, updates, i)} has a sparse gradient, which {name} does not take: {advice}make it dense, .to_dense()"
    )


def _apply(rule: Rule, g: Tensor, slots: Any, p: Tensor | None, step: Tensor | None) -> tuple[Tensor, Any]:
    """One rule on one tensor: complex as real, half precision in float32, and back to the dtypes that came."""
    dtype = _real_dtype(g, p)

    def widened(x: Any) -> Any:
        if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
            return x
        x = as_real(x)
        return x.to(torch.promote_types(x.dtype, dtype))

    def narrowed(x: Any, like: Any) -> Any:
        if not isinstance(x, Tensor) or not isinstance(like, Tensor):
            return x
        return as_complex(x.to(real_dtype(like.dtype))) if like.is_complex() else x.to(like.dtype)

    direction, new = rule(widened(g), type(slots)(*map(widened, slots)) if len(slots) else slots, widened(p), step)
    return narrowed(direction, g), type(new)(*map(narrowed, new, slots)) if len(new) else new


def _real_dtype(g: Tensor, p: Tensor | None) -> torch.dtype:
    dtype = compute_dtype(g, p)
    return real_dtype(dtype)


class _Steps:
    """The counts of all leaves, converted once for each dtype and device that a rule computes in."""

    def __init__(self, step: Tensor) -> None:
        self.step = step
        self.unbound: dict[Any, Any] = {}

    def of(self, i: int, g: Tensor, p: Tensor | None) -> Tensor:
        key = (_real_dtype(g, p), g.device)
        if key not in self.unbound:
            self.unbound[key] = self.step.to(dtype=key[0], device=key[1]).unbind()
        return self.unbound[key][i]
