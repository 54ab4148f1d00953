"""The pair that everything is: ``GradientTransformation``, and how its updates reach the parameters."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_no_state, refuse_torch
from optfn.sharding import is_sharded, like, local, placed_as
from optfn.sweep import Sweep

__all__ = [
    "GradientTransformation",
    "added",
    "apply_updates",
    "check_transformation",
    "identity",
    "in_form",
    "is_elementwise",
    "on_devices",
    "stateless",
    "transformation",
]


class GradientTransformation(NamedTuple):
    """An immutable pair of pure functions: an optimizer, or a part of one.

    Attributes:
        init: ``init(params) -> state``. The state is a tree of tensors; it shares no memory with ``params``.
        update: ``update(updates, state, params=None, **extra) -> (updates, state)``. The first transformation of a
            chain is handed the gradients; the updates of the last one are *added* to the parameters by
            :func:`apply_updates`. Extra arguments reach every transformation; what one does not use it passes on. A
            function among them (a ``value_fn``, ``obj_fn`` or ``grad_fn``) is one of all parameters, wherever it is called: it is
            handed what :func:`masked` and :func:`partition` hide, and the tree that :func:`flatten` shows as one vector.

    None as an update means that this leaf sits the step out: its part of the state and its parameter stay as they are.

    Example:
        >>> init, update = optfn.sgd(lr=0.5)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> updates, state = update({"w": torch.tensor([2.0, 0.0])}, init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0., 2.])}
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


def transformation(
    init: Callable[[Any], Any], update: Callable[..., tuple[Any, Any]], *, elementwise: bool = False
) -> GradientTransformation:
    """The pair of ``init`` and ``update``, with a mark if it is elementwise.

    Args:
        init: ``init(params) -> state``.
        update: ``update(updates, state, params=None, **extra) -> (updates, state)``.
        elementwise: whether an entry of an update depends on no other entry of the tensors, so that the pair may run on
            some of the entries alone, as :func:`sparse_masked` does.
    """
    update.elementwise = elementwise  # type: ignore[attr-defined]
    return GradientTransformation(init, update)


def is_elementwise(tx: GradientTransformation) -> bool:
    """Whether a transformation treats every entry by itself, so that it may run on some of them alone.

    Example:
        >>> is_elementwise(optfn.adam()), is_elementwise(optfn.clip_by_global_norm(1.0))
        (True, False)
    """
    return getattr(tx.update, "elementwise", False)


def identity() -> GradientTransformation:
    """The transformation that changes nothing and keeps no state.

    Example:
        >>> tx = identity()
        >>> tx.update(torch.ones(2), tx.init(torch.ones(2)))
        (tensor([1., 1.]), ())
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        check_no_state("identity", state)
        return updates, state

    def begin(leaves: Any, state: Any) -> Any:
        check_no_state("identity", state)
        return Sweep(lambda i, g, p: g, lambda: state, "entries", reads_params=False)

    update.begin = begin  # type: ignore[attr-defined]  # optfn.leafwise.lifted
    return transformation(lambda params: (), update, elementwise=True)


def stateless(f: Callable[[Any, Any], Any]) -> GradientTransformation:
    """A transformation without state from a function of whole trees.

    For a function of one tensor use :func:`stateless_with_tree_map`, which knows None, complex and half-precision leaves.

    Args:
        f: ``f(updates, params) -> updates``; ``params`` is None where none are given.

    Example:
        >>> tx = stateless(lambda updates, params: optfn.tree.map(torch.sign, updates))
        >>> tx.update({"w": torch.tensor([-3.0, 2.0])}, ())
        ({'w': tensor([-1.,  1.])}, ())
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return f(updates, params), state

    update.__qualname__ = getattr(f, "__qualname__", update.__qualname__)
    return transformation(lambda params: (), update)


def in_form(
    extra: dict[str, Any], params: Any, inward: Callable[[Any], Any], outward: Callable[[Any], Any], *, trees: bool = True
) -> dict[str, Any]:
    """Extra arguments of an update, for an inner transformation that is shown the parameters in another form.

    A function is handed its first argument as ``outward`` makes it, and what it answers, or a part of the tuple that it answers,
    goes ``inward`` where it is a tree like the parameters, as gradients are. Modules and classes stay what they are.

    Args:
        extra: the arguments.
        params: the parameters, as the outer transformation has them.
        inward: from their form to that of the inner transformation.
        outward: the reverse, which leaves as it is what does not have the inner form.
        trees: whether an argument that is a tree like the parameters goes inward too.

    Example:
        >>> to_list, to_dict = (lambda x: list(x.values())), (lambda x: dict(zip("ab", x)))
        >>> given = {"size": 3, "fun": lambda p: p["a"] + p["b"]}
        >>> in_form(given, {"a": 1.0, "b": 2.0}, to_list, to_dict)["fun"]([3.0, 4.0])
        7.0
    """
    if not extra:
        return extra
    found, spec = tree.flatten(params)

    def turned(x: Any) -> Any:
        parts, given = tree.flatten(x)
        if given == spec and (not spec.is_leaf() or _is_like(parts[0], found[0])):
            return inward(x)
        return tuple(map(turned, x)) if type(x) is tuple else x

    def outer(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return turned(function(*map(outward, args[:1]), *args[1:], **kwargs))

        return call

    def given(x: Any) -> Any:
        if callable(x) and not isinstance(x, Tensor | torch.nn.Module | type):
            return outer(x)
        return turned(x) if trees else x

    return {name: given(x) for name, x in extra.items()}


def _is_like(x: Any, p: Any) -> bool:
    """Whether what is a bare tensor may be of a parameter that is one: a number, such as a loss, is none."""
    return isinstance(x, Tensor) and isinstance(p, Tensor) and x.ndim > 0 and x.shape == p.shape


def check_transformation(tx: Any, owner: str, example: str = "") -> None:
    """Raise a TypeError that names ``owner`` where it is handed something else than a transformation.

    Example:
        >>> check_transformation(optfn.adam, "chain")
        Traceback (most recent call last):
        ...
        TypeError: chain takes transformations, (init, update) pairs such as optfn.adam() gives, got the function adam: call it if
        it makes one, adam(...); a schedule goes into one, optfn.adam(lr=schedule)
    """
    if isinstance(tx, GradientTransformation):
        return
    refuse_torch(owner, tx)
    got = type(tx).__name__
    if callable(tx) and not isinstance(tx, type):
        name = getattr(tx, "__name__", got)
        got = f"the function {name}: call it if it makes one, {name}(...); a schedule goes into one, optfn.adam(lr=schedule)"
    elif type(tx) in (list, tuple):
        got = f"{got}: write optfn.chain(*transformations)"
    elif example:
        got = f"{got}: write {example}"
    raise TypeError(f"{owner} takes transformations, (init, update) pairs such as optfn.adam() gives, got {got}")


def apply_updates(params: Any, updates: Any) -> Any:
    """Add updates to parameters: ``p + u``, in the wider of the two dtypes, returned in the parameter's.

    Where there are parameters, and every update is None, nothing changes, and a warning says so.

    Args:
        params: a tree of tensors.
        updates: a tree of the same structure (a tuple may stand for a list, and a list for a tuple); None leaves the parameter as
            it is, a sparse COO tensor changes its rows.

    Returns:
        A new tree with the structure and the dtypes of ``params``; a parameter whose update is None is the same tensor.

    Raises:
        ValueError: structure, shape or device differs; names the leaf.

    Example:
        >>> apply_updates({"w": torch.ones(2), "b": torch.ones(1)}, {"w": torch.tensor([1.0, -1.0]), "b": None})
        {'w': tensor([2., 0.]), 'b': tensor([1.])}
    """
    new, idle = added(params, updates)
    if idle and not torch.compiler.is_dynamo_compiling():  # which has no warnings
        warnings.warn(_IDLE, stacklevel=2)
    return new


_IDLE = (
    "apply_updates: every update is None, so no parameter changes. Was every gradient None? backward() gives a gradient to leaves "
    "only: after params = optfn.apply_updates(params, updates) outside of torch.no_grad() the parameters are none any more. Make "
    "the update under torch.no_grad() and call requires_grad_() on the new parameters, or take gradients by torch.func.grad."
)


def added(params: Any, updates: Any) -> tuple[Any, bool]:
    """What :func:`apply_updates` returns, and whether there are parameters of which none has an update.

    Example:
        >>> added({"w": torch.ones(1)}, {"w": None})
        ({'w': tensor([1.])}, True)
    """
    found, spec = tree.checked(params, "params")
    advice = "; tx.update returns (updates, state), in this order, and None in updates leaves a parameter as it is"
    changes = tree.match(spec, updates, "updates", "params", advice)

    def add(i: int, p: Tensor | None, u: Any) -> Tensor | None:
        if p is None or u is None:
            return p
        if not isinstance(u, Tensor) or u.shape != p.shape:
            what = f"shape {tuple(u.shape)}" if isinstance(u, Tensor) else type(u).__name__
            raise ValueError(f"the update of {tree.paths(params)[i]!r} must be a tensor of shape {tuple(p.shape)}, got {what}")
        if is_sharded(p) or is_sharded(u):
            if is_sharded(p) != is_sharded(u):
                where, other = ("the parameter", "its update") if is_sharded(p) else ("its update", "the parameter")
                raise TypeError(f"{tree.paths(params)[i]!r}: {where} lies on several processes, {other} does not")
            return like(add(i, local(p), local(placed_as(u, p))), p)
        if p.dtype == u.dtype:
            return p + u
        wide = torch.promote_types(p.dtype, u.dtype)
        return (p.to(wide) + u.to(wide)).to(p.dtype)

    new: list[Tensor | None] = []
    try:
        for i, (p, u) in enumerate(zip(found, changes, strict=True)):
            new.append(add(i, p, u))
    except RuntimeError as error:
        i = len(new)
        on_devices(error, f"{tree.paths(params)[i]!r}", {"the parameter": found[i], "the update": changes[i]})
        raise
    idle = any(p is not None for p in found) and all(p is None or u is None for p, u in zip(found, changes, strict=True))
    return tree.unflatten(spec, new), idle


def on_devices(error: Exception, where: str, things: dict[str, Any]) -> None:
    """Raise a ValueError from ``error``, one of torch, if things that belong together are on several devices.

    Args:
        error: what torch raised.
        where: the leaf.
        things: what it is made of, by name: trees of tensors.

    Example:
        >>> on_devices(RuntimeError(), "'w'", {"the parameter": torch.ones(1), "the update": torch.ones(1, device="meta")})
        Traceback (most recent call last):
        ...
        ValueError: 'w': the parameter is on cpu, the update is on meta; all must be on one device: move a tree by
        optfn.tree.map(lambda x: x.to(device), tree)
    """
    found = {name: sorted({str(x.device) for x in tree.leaves(part) if isinstance(x, Tensor)}) for name, part in things.items()}
    if len({device for devices in found.values() for device in devices}) > 1:
        said = ", ".join(f"{name} is on {' and '.join(devices)}" for name, devices in found.items() if devices)
        move = "move a tree by optfn.tree.map(lambda x: x.to(device), tree)"
        raise ValueError(f"{where}: {said}; all must be on one device: {move}") from error
