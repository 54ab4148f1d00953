"""Putting transformations together: one after the other, on some of the leaves, on each its own."""

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from optfn import tree
from optfn.checks import check_state, each_leaf, not_its_state
from optfn.core import GradientTransformation, check_transformation, identity, in_form, is_elementwise, transformation
from optfn.leafwise import aligned, begin_of, lifted, stateless_with_tree_map
from optfn.sweep import Leaves, Sweep

__all__ = [
    "MaskedState",
    "PartitionState",
    "chain",
    "chosen",
    "followed_by",
    "freeze",
    "masked",
    "maximize",
    "multi_transform",
    "named_chain",
    "negate_if",
    "partition",
    "selective_transform",
]

Mask = Any
"""A tree of bools (or labels) with the structure of the params, a prefix of it, or a function ``(path, leaf) -> bool or label``."""


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Apply transformations one after the other: each is handed the updates of the one before.

    Args:
        transformations: any number of pairs; with none the updates pass unchanged.

    Returns:
        A transformation whose state is the tuple of their states, and which hands ``params`` and every extra
        argument to each of them.

    Example:
        >>> tx = chain(optfn.clip(1.0), optfn.scale(-0.1))
        >>> tx.update({"w": torch.tensor([5.0, 0.5])}, tx.init({"w": torch.zeros(2)}))[0]
        {'w': tensor([-0.1000, -0.0500])}
    """
    for tx in transformations:
        check_transformation(tx, "chain")
    begins = [begin_of(tx) for tx in transformations]
    elementwise = all(map(is_elementwise, transformations))

    def init(params: Any) -> tuple[Any, ...]:
        tree.checked(params, "params")
        return tuple(tx.init(params) for tx in transformations)

    def check(state: Any) -> None:
        if type(state) is not tuple or len(state) != len(transformations):
            raise TypeError(not_its_state("chain", f"a tuple of {len(transformations)}", state))

    def begin(leaves: Leaves, state: tuple[Any, ...]) -> Sweep:
        links = [link(leaves, s) for link, s in zip(begins, state, strict=True)]

        def each(i: int, g: Tensor, p: Tensor | None) -> Tensor:
            for link in links:
                g = link.each(i, g, p)
            return g

        flat = tuple(inner for link in links for inner in link.links or (link,))
        return Sweep(each, lambda: tuple(link.end() for link in links), links=flat)

    if not transformations:
        return GradientTransformation(init, identity().update)
    if None not in begins:
        return lifted(init, begin, check=check, elementwise=elementwise)

    # Links that are lifted and follow each other run as one chain.
    runs: list[list[GradientTransformation]] = []
    for tx, link in zip(transformations, begins, strict=True):
        if link is not None and runs and begin_of(runs[-1][0]) is not None:
            runs[-1].append(tx)
        else:
            runs.append([tx])
    joined = [(len(run), run[0] if len(run) == 1 else chain(*run)) for run in runs]

    def update(updates: Any, state: tuple[Any, ...], params: Any = None, **extra: Any) -> tuple[Any, tuple[Any, ...]]:
        check(state)
        new: tuple[Any, ...] = ()
        for count, tx in joined:
            s: Any = state[len(new)] if count == 1 else state[len(new) : len(new) + count]
            updates, s = tx.update(updates, s, params, **extra)
            new += (s,) if count == 1 else s
        return updates, new

    return transformation(init, update, elementwise=elementwise)


def followed_by(tx: GradientTransformation, stateless: GradientTransformation) -> GradientTransformation:
    """A lifted rule and then one that keeps no state, as one: its state is that of the first, and it rounds once, at its end.

    So a rule has two parts, of which each says what it needs of a leaf that lies on several processes.

    Example:
        >>> tx = followed_by(optfn.scale_by_sign(), optfn.scale(-0.5))
        >>> tx.update({"w": torch.tensor([5.0])}, tx.init({"w": torch.zeros(1)}))[0]
        {'w': tensor([-0.5000])}
    """
    begins = begin_of(tx), begin_of(stateless)

    def init(params: Any) -> Any:
        stateless.init(params)  # it may refuse them
        return tx.init(params)

    def begin(leaves: Leaves, state: Any) -> Sweep:
        first, then = begins[0](leaves, state), begins[1](leaves, ())

        def unrounded(i: int, g: Tensor, p: Tensor | None) -> Tensor:
            return first.each(i, g, p, narrow=False)

        def rounded(i: int, g: Tensor, p: Tensor | None) -> Tensor:
            return then.each(i, g, p).to(leaves.grads[i].dtype)

        links = first._replace(each=unrounded), then._replace(each=rounded)
        return Sweep(lambda i, g, p: rounded(i, unrounded(i, g, p), p), first.end, links=links)

    return lifted(init, begin, elementwise=is_elementwise(tx) and is_elementwise(stateless))


def named_chain(*transformations: tuple[str, GradientTransformation]) -> GradientTransformation:
    """As :func:`chain`, with a state that is a dict: ``optfn.tree.get(state, "name.mu")`` finds a part by name.

    Args:
        transformations: pairs ``(name, transformation)`` with distinct names.

    Raises:
        TypeError: something else than such a pair.
        ValueError: a name appears twice.

    Example:
        >>> tx = named_chain(("clip", optfn.clip(1.0)), ("adam", optfn.scale_by_adam()))
        >>> optfn.tree.get(tx.init({"w": torch.zeros(2)}), "adam.slots.mu")
        {'w': tensor([0., 0.])}
    """
    for pair in transformations:
        given: Any = pair
        if isinstance(given, Mapping):
            raise TypeError("named_chain takes pairs, (name, transformation), got a dict: write named_chain(*steps.items())")
        if not isinstance(given, tuple | list) or isinstance(given, GradientTransformation) or len(given) != 2:
            raise TypeError(f"named_chain takes pairs, (name, transformation), got {type(given).__name__}")
    names = [name for name, _ in transformations]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"named_chain: the name {name!r} appears twice")
    inner = chain(*(tx for _, tx in transformations))

    def init(params: Any) -> dict[str, Any]:
        return dict(zip(names, inner.init(params), strict=True))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, dict[str, Any]]:
        if not isinstance(state, dict) or state.keys() != {*names}:
            raise TypeError(not_its_state("named_chain", f"a dict of {', '.join(map(repr, names))}", state))
        updates, new = inner.update(updates, tuple(state[name] for name in names), params, **extra)
        return updates, dict(zip(names, new, strict=True))

    return transformation(init, update, elementwise=is_elementwise(inner))


class MaskedState(NamedTuple):
    """The state of :func:`masked`.

    Attributes:
        inner_state: the inner transformation's, which holds nothing for the leaves that it does not see.
    """

    inner_state: Any


def masked(inner: GradientTransformation, mask: Mask, *, mask_compatible_extra_args: bool = False) -> GradientTransformation:
    """Apply a transformation to the leaves that a mask chooses; the updates of the others *pass as they are*.

    The inner transformation sees the others as None and holds no state for them. Passing is what a mask inside a
    chain needs (``masked(add_decayed_weights(0.1), matrices)``); ``masked(sgd(...), mask)`` alone would *add the gradients*
    of the other leaves to them: there use :func:`partition` with :func:`freeze`.

    A function among the extra arguments of an update, such as ``obj_fn`` of :func:`sophia` or ``grad_fn`` of :func:`sam`, is handed
    all parameters, the hidden ones as they are, and of gradients that it gives the inner transformation sees its own.

    Args:
        inner: the transformation.
        mask: True for the leaves it applies to: a tree or prefix of bools, or a function ``(path, leaf) -> bool``, which
            may use the dotted path, the shape and the dtype, never the values.
        mask_compatible_extra_args: whether leaves are hidden in extra arguments too that are trees like the parameters.

    Raises:
        ValueError: the mask's structure is no prefix of the params'.
        TypeError: an entry of the mask is no bool.

    Example:
        >>> tx = masked(optfn.scale(10.0), lambda path, p: p.ndim >= 2)
        >>> tx.update({"w": torch.ones(1, 2), "b": torch.ones(1)}, MaskedState(()))[0]
        {'w': tensor([[10., 10.]]), 'b': tensor([1.])}
    """
    check_transformation(inner, "masked", "masked(tx, mask)")

    def init(params: Any) -> MaskedState:
        return MaskedState(inner.init(_only(True, _resolve(mask, params, "mask", bool), params)))

    def update(updates: Any, state: MaskedState, params: Any = None, **extra: Any) -> tuple[Any, MaskedState]:
        check_state("masked", state, MaskedState)
        updates = _like_params(updates, params)
        chosen = _resolve(mask, updates if params is None else params, "mask", bool)
        seen, extra = _shown(True, chosen, params, extra, mask_compatible_extra_args)
        new, inner_state = inner.update(_only(True, chosen, updates), state.inner_state, seen, **extra)
        return _choose(updates, [(True, new)], chosen), MaskedState(inner_state)

    return transformation(init, update, elementwise=is_elementwise(inner))


class PartitionState(NamedTuple):
    """The state of :func:`partition`.

    Attributes:
        inner_states: label to the state of its transformation, which holds nothing for the other labels' leaves.
    """

    inner_states: dict[Hashable, Any]


def partition(
    transforms: Mapping[Hashable, GradientTransformation], param_labels: Mask, *, mask_compatible_extra_args: bool = False
) -> GradientTransformation:
    """Give each leaf to the transformation that its label names.

    Functions among the extra arguments of an update are handed all parameters, as in :func:`masked`.

    Args:
        transforms: label to transformation.
        param_labels: a tree or prefix of labels, or a function ``(path, leaf) -> label``, which may use the dotted path, the
            shape and the dtype, never the values.
        mask_compatible_extra_args: as in :func:`masked`.

    Raises:
        ValueError: at ``init``: a leaf has a label that no transformation has, or a transformation has a label that no leaf has.

    Example:
        >>> tx = partition({"train": optfn.sgd(lr=0.1), "frozen": optfn.freeze()},
        ...                lambda path, p: "train" if path == "head" else "frozen")
        >>> params = {"head": torch.ones(1), "body": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'head': tensor([-0.1000]), 'body': None}
    """
    given: Any = transforms
    if not isinstance(given, Mapping):
        got = type(given).__name__
        raise TypeError(f"partition takes a dict, label to transformation, and labels, got {got}: partition({{'a': tx}}, labels)")
    for tx in transforms.values():
        check_transformation(tx, "partition")

    def init(params: Any) -> PartitionState:
        owners = _resolve(param_labels, params, "param_labels")
        used: dict[Hashable, str] = {}
        for path, label, p in zip(tree.paths(params), tree.flatten(owners)[0], tree.flatten(params)[0], strict=True):
            if p is not None:
                used.setdefault(label, path)
        known = ", ".join(map(repr, transforms))
        for label, path in used.items():
            if label is None or label not in transforms:
                raise ValueError(f"partition: {path!r} has the label {label!r}, which is none of {known}")
        for label in transforms if used else ():  # where there are no leaves there is nothing to give
            if label not in used:
                raise ValueError(f"partition: no leaf has the label {label!r}; the labels are {', '.join(map(repr, used))}")
        return PartitionState({label: tx.init(_only(label, owners, params)) for label, tx in transforms.items()})

    def update(updates: Any, state: PartitionState, params: Any = None, **extra: Any) -> tuple[Any, PartitionState]:
        check_state("partition", state, PartitionState)
        updates = _like_params(updates, params)
        owners = _resolve(param_labels, updates if params is None else params, "param_labels")
        parts: list[tuple[Hashable, Any]] = []
        states: dict[Hashable, Any] = {}
        for label, tx in transforms.items():
            seen, given = _shown(label, owners, params, extra, mask_compatible_extra_args)
            part, states[label] = tx.update(_only(label, owners, updates), state.inner_states[label], seen, **given)
            parts.append((label, part))
        return _choose(updates, parts, owners), PartitionState(states)

    return transformation(init, update, elementwise=all(map(is_elementwise, transforms.values())))


multi_transform = partition
"""Optax's older name of :func:`partition`."""


def freeze(mask: Mask = True) -> GradientTransformation:
    """Make leaves sit the step out: their update becomes None, so nothing after it changes them or their state.

    Args:
        mask: *True for the leaves to freeze* (the opposite of :func:`masked`); by default all. As in :func:`masked`.

    Example:
        >>> tx = chain(freeze({"w": True, "b": False}), optfn.sgd(lr=0.1))
        >>> params = {"w": torch.ones(1), "b": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': None, 'b': tensor([-0.1000])}
    """

    def init(params: Any) -> tuple[()]:
        _resolve(mask, params, "mask", bool)
        return ()

    def update(updates: Any, state: tuple[()], params: Any = None, **extra: Any) -> tuple[Any, tuple[()]]:
        updates = _like_params(updates, params)
        return _only(False, _resolve(mask, updates if params is None else params, "mask", bool), updates), state

    return transformation(init, update, elementwise=True)


def selective_transform(optimizer: GradientTransformation, *, freeze_mask: Mask) -> GradientTransformation:
    """Give the leaves that are not frozen to a transformation; the others sit every step out, and nothing is kept for them.

    Args:
        optimizer: the transformation.
        freeze_mask: *True for the leaves to freeze*, as in :func:`freeze`, the opposite of :func:`masked`.

    Raises:
        ValueError: from ``init``: the mask's structure is no prefix of the params'.
        TypeError: from ``init``: an entry of the mask is no bool.

    Example:
        >>> tx = selective_transform(optfn.sgd(lr=0.1), freeze_mask={"w": True, "b": False})
        >>> params = {"w": torch.ones(1), "b": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': None, 'b': tensor([-0.1000])}
    """
    check_transformation(optimizer, "selective_transform", "selective_transform(tx, freeze_mask=mask)")
    function: Any = freeze_mask
    free = (lambda path, p: not function(path, p)) if callable(freeze_mask) else tree.map(lambda frozen: not frozen, freeze_mask)
    return chain(freeze(freeze_mask), masked(optimizer, free))


def maximize(inner: GradientTransformation) -> GradientTransformation:
    """Run a transformation on the negated gradients: its updates go uphill. Weight decay still pulls to zero.

    Example:
        >>> tx = maximize(optfn.sgd(lr=0.5))
        >>> tx.update(torch.tensor([2.0]), tx.init(torch.zeros(1)))[0]
        tensor([1.])
    """
    return chain(negate_if(True), inner)


def negate_if(flag: bool) -> GradientTransformation:
    """The first link of an alias with a ``maximize`` argument: negated gradients if it is set, else nothing.

    Example:
        >>> negate_if(True).update(torch.ones(1), ())[0]
        tensor([-1.])
    """
    return stateless_with_tree_map(lambda g, p: -g, sparse="values") if flag else chain()


def chosen(mask: Mask | None, like: Any) -> list[bool | None]:
    """Whether a mask has True for each leaf of a tree, None for a leaf that is None; for all of them where there is no mask.

    Raises:
        ValueError: the mask's structure is no prefix of the tree's.
        TypeError: an entry of the mask is no bool.

    Example:
        >>> chosen(lambda path, p: p.ndim >= 2, {"w": torch.ones(1, 1), "b": torch.ones(1), "c": None})
        [False, None, True]
    """
    return tree.flatten(_resolve(True if mask is None else mask, like, "mask", bool))[0]


def _like_params(updates: Any, params: Any) -> Any:
    """The updates in the structure of the parameters."""
    leaves = aligned(updates, params)
    return tree.unflatten(leaves.spec, leaves.grads)


def _resolve(mask: Mask, like: Any, name: str, kind: type | None = None) -> Any:
    """The mask as a tree with one entry for each leaf of ``like``, None where that is None."""
    leaves, spec = tree.flatten(like)
    if callable(mask):
        entries = each_leaf(name, mask, tree.paths(like), leaves)
    else:
        entries = [None if x is None else entry for entry, x in zip(_broadcast(mask, like, name), leaves, strict=True)]
    for i, (entry, x) in enumerate(zip(entries, leaves, strict=True)):
        if kind is not None and x is not None and not isinstance(entry, kind):
            said = f"{name}: {tree.paths(like)[i]!r} must be a {kind.__name__}, got {type(entry).__name__}"
            raise TypeError(said + _by_name(mask))
    return tree.unflatten(spec, entries)


def _broadcast(prefix: Any, like: Any, name: str) -> list[Any]:
    entries, spec = tree.flatten(prefix)
    try:
        below = tree.match(spec, like, "params", name)
    except ValueError:
        wanted = f"{name} must have the structure of params, or be a prefix of it, or a function of the path and the leaf"
        raise ValueError(f"{wanted}: {tree.differences(prefix, like, 'params', name)}{_by_name(prefix)}") from None
    return [entry for entry, part in zip(entries, below, strict=True) for _ in tree.flatten(part)[0]]


def _by_name(mask: Mask) -> str:
    """What to write for a mask that is the names of leaves."""
    names = [mask] if isinstance(mask, str) else mask
    if isinstance(names, list | tuple | set | frozenset) and names and all(isinstance(name, str) for name in names):
        return f"; to choose leaves by name give lambda path, p: path in {sorted(names)}"
    return ""


def _only(label: Hashable, labels: Any, of: Any) -> Any:
    """A tree with None in place of the leaves that have another label."""
    return tree.map(lambda mine, x: x if mine == label else None, labels, of)


def _shown(label: Hashable, labels: Any, params: Any, extra: dict[str, Any], trees: bool) -> tuple[Any, dict[str, Any]]:
    """What a transformation sees of the parameters, those that have its label, and of the extra arguments."""
    if params is None:
        return None, extra
    seen = _only(label, labels, params)

    def whole(x: Any) -> Any:
        """The parameters, and what ``x`` has in the place of those that are seen."""
        if tree.flatten(x)[1] != tree.flatten(seen)[1]:
            return x
        return tree.map(lambda p, mine, new: new if mine == label else p, params, labels, x)

    return seen, in_form(extra, params, lambda x: _only(label, labels, x), whole, trees=trees)


def _choose(updates: Any, parts: list[tuple[Hashable, Any]], labels: Any) -> Any:
    """For each leaf the entry of the part whose label it has; the update as it came where there is none."""

    def pick(old: Any, mine: Any, *new: Any) -> Any:
        return next((x for (label, _), x in zip(parts, new, strict=True) if mine == label), old)

    return tree.map(pick, updates, labels, *(part for _, part in parts))
