"""The lift: a rule for one tensor becomes a transformation of trees.

Everything that is not an algorithm's math is here, once: the loop over leaves, None, step counts, complex as real,
half precision in float32, sparse gradients, and the errors, which name the leaf.
"""

import dis
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_no_state, check_state, not_its_state, require, rule_name
from optfn.core import GradientTransformation, on_devices, transformation
from optfn.numerics import as_complex, as_real, compute_dtype, norm, real_dtype
from optfn.sharding import cut, is_sharded, like, local, same_layout, stand_in, whole
from optfn.sweep import Each, Extent, Leaves, Needs, Owners, Sweep, as_pieces, joint_totals, swept

__all__ = [
    "CoupledState",
    "Each",
    "Extent",
    "LeafwiseState",
    "Leaves",
    "Sweep",
    "aligned",
    "begin_of",
    "check_dense",
    "coupled",
    "leafwise",
    "lifted",
    "stateless_with_tree_map",
    "told",
]

Sparse = Literal["error", "dense", "values"]
Complex = Literal["real", "error"]
Rule = Callable[..., Any]


def lifted(
    init: Callable[[Any], Any],
    begin: Callable[[Leaves, Any], Sweep],
    *,
    check: Callable[[Any], None] | None = None,
    elementwise: bool = False,
) -> GradientTransformation:
    """A transformation that handles one leaf after the other, each by itself; ``update.begin`` is how.

    :func:`chain` takes each leaf through all of its links that are lifted before it takes the next one. So what a link
    hands to the next is there for one leaf at a time, and never a tree.

    Args:
        init: ``init(params) -> state``.
        begin: ``begin(leaves, state)`` gives what happens to each leaf, and what gives the new state.
        check: called with the state before anything else; raises if it is another transformation's.
        elementwise: as in :func:`transformation`.
    """

    def checked(leaves: Leaves, state: Any) -> Sweep:
        if check is not None:
            check(state)
        return begin(leaves, state)

    checked.__qualname__ = begin.__qualname__  # by which messages name the rule

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if check is not None:
            check(state)  # first: of arguments in another order it says so
        leaves = as_pieces(aligned(updates, params))
        sweep = begin(leaves, state)
        directions = swept(sweep, leaves)
        return tree.unflatten(leaves.spec, directions), sweep.end()

    tx = transformation(init, update, elementwise=elementwise)
    update.begin = checked  # type: ignore[attr-defined]
    return tx


def begin_of(tx: GradientTransformation) -> Any:
    """The ``begin`` of a transformation that is :func:`lifted`, None of any other."""
    # functools.wraps hands an attribute on to a function that does something else.
    return None if hasattr(tx.update, "__wrapped__") else getattr(tx.update, "begin", None)


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
    update: Callable[..., tuple[Tensor, Any]],
    *,
    elementwise: bool = False,
    norms: Callable[[Tensor, Any], tuple[Tensor, ...]] | None = None,
    at_step: Callable[[Tensor], Any] | None = None,
    needs_params: bool = False,
    sparse: Sparse = "error",
    complex_: Complex = "real",
    per_leaf: Callable[[Any], list[Any]] | None = None,
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
        norms: declares that but for some norms, or root mean squares, an entry of the result depends on that entry alone:
            ``norms(g, p)`` gives the tensors, shaped as ``g``, and ``update(g, slots, p, step, extents)`` is handed the
            :class:`Extent` of each. Where neither this nor ``elementwise`` is declared the rule is shown whole tensors, wherever
            their pieces lie.
        at_step: what of the rule depends on its step alone, such as bias corrections, computed for all leaves at once:
            called with the steps of all leaves in one vector, it gives a vector, or a tuple of them, and the rule is handed its
            leaf's entry, or the tuple of its entries, as ``step``. What in the tuple is no vector is handed to each leaf as it is.
            A list has an entry for each leaf as it is: of bools, say, for :func:`optfn.tree.cond`, read once for all leaves.
        needs_params: whether the rule reads ``p``; without it ``p`` is None where no params are given.
        sparse: what a sparse COO gradient is to the rule: an ``"error"`` that names :func:`sparse_masked`; made ``"dense"``
            first; or its ``"values"`` as they lie there, not summed, which a linear rule that does not read ``p`` may take.
        complex_: what a complex tensor is to the rule: its ``"real"`` view, or an ``"error"``, where the last dimension of that
            view would be one dimension too many.
        per_leaf: what of the rule depends on which leaf it is, such as whether it decays: called with the parameters, or with the
            updates where none are given, it gives an entry for each leaf, which the rule is handed after ``step``.

    Returns:
        A transformation with a :class:`LeafwiseState`.

    Raises:
        TypeError: from ``init`` and ``update``: a leaf that is no floating-point tensor, a sparse or complex one where
            the rule takes none, missing params.
        ValueError: another structure or another shape than the params' or the state's, tensors of a leaf on several devices.

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
    lift = _Lift(update, elementwise, needs_params, sparse, complex_, norms)

    def check(state: Any) -> None:
        if not isinstance(state, LeafwiseState):
            check_state(rule_name(update), state, LeafwiseState)

    def begin(leaves: Leaves, state: LeafwiseState) -> Sweep:
        sweep = _Pass(lift, at_step, leaves, state)
        each = sweep.each
        if per_leaf is not None:
            of = _marks(per_leaf, leaves)
            each = lambda i, g, p, **known: sweep.each(i, g, p, shared=(of[i],), **known)  # noqa: E731
        return lift.sweep(leaves, each, lambda: LeafwiseState(sweep.step, sweep.slots()), sweep)

    def first(params: Any) -> LeafwiseState:
        return LeafwiseState(*_first_state(init, params, complex_, lift.needs))

    return lifted(first, begin, check=check, elementwise=elementwise)


class CoupledState(NamedTuple):
    """The state of a :func:`coupled` rule.

    Attributes:
        step: as in :class:`LeafwiseState`.
        slots: as in :class:`LeafwiseState`.
        shared: what the rule keeps for all leaves together, a NamedTuple of tensors, most of them 0-dim.
    """

    step: Tensor
    slots: Any
    shared: Any


def coupled(
    init: Callable[[Tensor], Any],
    measure: Callable[..., tuple[tuple[Tensor, ...], Any]],
    decide: Callable[..., Any],
    update: Callable[..., tuple[Tensor, Any]],
    *,
    shared: Any,
    elementwise: bool = False,
    at_step: Callable[[Tensor], Any] | None = None,
    needs_params: bool = False,
    extra: tuple[str, ...] = (),
    complex_: Complex = "real",
    per_leaf: Callable[[Any], list[Any]] | None = None,
) -> GradientTransformation:
    """Lift a rule for one tensor that needs sums over all of them: distances, products of gradients, norms.

    An update goes over the leaves twice. In between the sums of what they contribute, which are one vector, decide what is shared.

    What :func:`leafwise` promises a rule holds here too. A leaf whose update is None contributes nothing; where every update is
    None the shared scalars stay as they are. These are 0-dim tensors: numbers that come as floats in the widest real dtype of the
    parameters, float32 at least, integers and bools as int64 and bool.

    Args:
        init: ``init(p) -> slots``, as in :func:`leafwise`.
        measure: ``measure(g, slots, p, step, shared) -> (sums, slots)``, the first pass: a tuple of 0-dim tensors, what this leaf
            adds to each sum, and its new slots.
        decide: ``decide(shared, sums, **extra) -> shared``, once for all leaves; ``sums`` is the tuple of the totals.
        update: ``update(g, slots, p, step, shared) -> (direction, slots)``, the second pass, with the slots of the first one.
        shared: a NamedTuple of numbers or 0-dim tensors, what the shared scalars are before the first update; or a function that
            makes it of the parameters.
        elementwise: declares that what a leaf adds to a sum is a sum over its entries, and that but for what is shared an
            entry of the slots and of the direction depends on that entry alone. If not, the rule is shown whole tensors, wherever
            their pieces lie.
        at_step: as in :func:`leafwise`.
        needs_params: whether the rule reads ``p``.
        extra: the names of arguments of the transformation's update that ``decide`` needs, such as ``"value"``, the loss: numbers
            or 0-dim tensors, which it is handed as tensors of the dtype of the sums. Where leaves lie on several processes it is
            handed the mean of what these were given.
        complex_: as in :func:`leafwise`.
        per_leaf: as in :func:`leafwise`; ``update`` alone is handed its leaf's entry, after ``shared``.

    Returns:
        A transformation with a :class:`CoupledState`.

    Raises:
        TypeError: from ``update``: as :func:`leafwise`, or one of ``extra`` is missing.
        ValueError: as :func:`leafwise`, or one of ``extra`` is a tensor of more than one number.

    Example:
        >>> class Shared(NamedTuple):
        ...     norm: torch.Tensor
        >>> def scale_by_norm():
        ...     def measure(g, slots, p, step, shared):
        ...         return (g.square().sum(),), slots
        ...     def decide(shared, sums):
        ...         return Shared(sums[0].sqrt())
        ...     def update(g, slots, p, step, shared):
        ...         return g / shared.norm, slots
        ...     return coupled(lambda p: (), measure, decide, update, shared=Shared(0.0))
        >>> updates = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
        >>> tx = scale_by_norm()
        >>> updates, state = tx.update(updates, tx.init(updates))
        >>> updates, state.shared.norm
        ({'a': tensor([0.6000]), 'b': tensor([0.8000])}, tensor(5.))
    """
    lift = _Lift(update, False, needs_params, "error", complex_)
    needs: Needs = "entries" if elementwise else "whole"

    def init_fn(params: Any) -> CoupledState:
        step, slots = _first_state(init, params, complex_, needs)
        dtype = compute_dtype(*map(as_real, tree.leaves(params)))
        start: Any = shared(tree.map(torch.detach, params)) if callable(shared) else shared
        return CoupledState(step, slots, start._make([_shared_scalar(whole(x), dtype, step.device) for x in start]))

    def update_fn(updates: Any, state: Any, params: Any = None, **given: Any) -> tuple[Any, CoupledState]:
        if not isinstance(state, CoupledState):
            check_state(rule_name(update), state, CoupledState)
        if any(given.get(name) is None for name in extra):
            require(rule_name(update), **{name: given.get(name) for name in extra})
        for name in extra:
            if isinstance(x := given[name], Tensor) and x.ndim:
                said = f"{rule_name(update)}: {name!r} must be a number or a 0-dim tensor, got shape {tuple(x.shape)}"
                raise ValueError(f"{said}: its mean or its sum, say")
        leaves = as_pieces(aligned(updates, params))
        if all(g is None for g in leaves.grads):
            return tree.unflatten(leaves.spec, leaves.grads), state
        sweep = _Pass(lift, at_step, leaves, state)
        share: _Alone | _Together = _Alone(leaves)
        if leaves.homes is not None:
            reads = needs_params or _reads(measure, 2) or _reads(update, 2)
            share = _Together(leaves, None if elementwise else Owners([sweep], leaves, leaves.grads, reads=reads))
        grads, owned, mine = share.grads, share.params, share.mine
        sums: list[Any] = [sweep.each(i, grads[i], owned[i], measure, (state.shared,), last=False) for i in mine]
        rows = [torch.stack(x).to(sweep.step.device) for x in sums]
        count = len(rows[0]) if rows else _count(measure, sweep, leaves, state.shared)
        totals, numbers = share.totals(rows, count, [given[name] for name in extra])
        wide, device = totals[0].dtype, sweep.step.device
        numbers = {name: torch.as_tensor(x, dtype=wide, device=device) for name, x in zip(extra, numbers, strict=True)}
        decided = decide(state.shared, totals, **numbers)
        decided = decided._make([_narrowed(x, like) for x, like in zip(decided, state.shared, strict=True)])
        of = None if per_leaf is None else _marks(per_leaf, leaves)
        directions = grads.copy()
        for i in mine:
            directions[i] = sweep.each(i, grads[i], owned[i], update, (decided,) if of is None else (decided, of[i]))
        directions = share.laid_out(directions)  # which brings the slots back too
        return tree.unflatten(leaves.spec, directions), CoupledState(sweep.step, sweep.slots(), decided)

    return transformation(init_fn, update_fn)


class _Alone:
    """Who measures what of a coupled rule where all leaves are here: this process everything.

    Attributes:
        grads: the gradients that are measured here, whole or in pieces.
        params: the parameters.
        mine: the numbers of the leaves that are measured here.
    """

    def __init__(self, leaves: Leaves) -> None:
        self.grads, self.params = leaves.grads, leaves.owners
        self.mine = [i for i, g in enumerate(leaves.grads) if g is not None]

    def totals(self, rows: list[Tensor], count: int, numbers: list[Any]) -> tuple[Sequence[Tensor], list[Any]]:
        """Sums over all leaves of what each of :attr:`mine` adds, ``count`` in a row, and the means of numbers."""
        wide = compute_dtype(*rows)
        return torch.stack([x.to(wide) for x in rows]).sum(0).unbind(), numbers

    def laid_out(self, directions: list[Any]) -> list[Any]:
        """What was computed of each leaf, where the leaf lies."""
        return directions


class _Together(_Alone):
    """The same where leaves lie on several processes: each its pieces, or what it owns, whole."""

    def __init__(self, leaves: Leaves, owners: Owners | None) -> None:
        super().__init__(leaves)
        self.leaves, self.owners = leaves, owners
        if owners is not None:
            self.grads, self.params, self.mine = owners.grads, owners.params, owners.mine

    def totals(self, rows: list[Tensor], count: int, numbers: list[Any]) -> tuple[Sequence[Tensor], list[Any]]:
        return joint_totals(dict(zip(self.mine, rows, strict=True)), count, numbers, self.leaves, self.owners)

    def laid_out(self, directions: list[Any]) -> list[Any]:
        pieces = directions if self.owners is None else self.owners.sent_back(directions)
        return [like(x, home) for x, home in zip(pieces, self.leaves.homes or (), strict=True)]


def told(
    tx: GradientTransformation,
    leaves: Leaves,
    state: LeafwiseState,
    shown: Callable[[Tensor, Any], Tensor],
    marks: list[Any],
    size: Callable[[Tensor], Sequence[int]],
) -> tuple[list[Any], LeafwiseState]:
    """An update by a lifted rule whose answer is not like the leaf; where a leaf lies on several processes, all have the answer.

    Args:
        tx: what :func:`leafwise` gave, of a rule that does not read the parameter; its state has nothing in the shape of a leaf.
        leaves: the pieces.
        state: its state.
        shown: ``shown(g, mark)``, what the rule is shown of a whole gradient.
        marks: of each leaf, what ``shown`` is handed; None for a leaf that is not shown.
        size: the shape of an answer, of what is shown.

    Returns:
        The answers, None for a leaf that is not shown, and the new state.
    """
    pairs = zip(leaves.laid_out(), marks, strict=True)
    seen = [None if g is None or mark is None else shown(stand_in(g), mark) for g, mark in pairs]
    if leaves.homes is None:
        updates, state = tx.update(tree.unflatten(leaves.spec, seen), state)
        return tree.flatten(updates)[0], state
    sweep: Sweep = begin_of(tx)(Leaves(tree.unflatten(leaves.spec, seen), None, seen, [None] * len(seen), leaves.spec, seen), state)
    slots: Any = sweep.slots
    away = [None if x is None else g for x, g in zip(seen, leaves.grads, strict=True)]
    for i, g in enumerate(away):
        if g is not None and not g.is_floating_point():  # the lift says so on the owner alone
            raise TypeError(f"{_where(sweep.rule, leaves.updates, i)} must have a real gradient, got {g.dtype}")
    owners = Owners([], leaves._replace(grads=away), away, reads=False)
    answers = {i: [sweep.each(i, shown(owners.grads[i], marks[i]), None), *slots.now[i]] for i in owners.mine}
    likes = {i: [x.new_empty(size(x)), *slots.homes[i]] for i, x in enumerate(seen) if x is not None}
    found: list[Any] = [None] * len(seen)
    for i, (found[i], *kept) in owners.told(answers, likes).items():
        slots.now[i] = type(slots.homes[i])(*kept)
    return found, sweep.end()


def _marks(per_leaf: Callable[[Any], list[Any]], leaves: Leaves) -> list[Any]:
    return per_leaf(leaves.updates if leaves.params is None else leaves.params)


def _count(measure: Rule, sweep: "_Pass", leaves: Leaves, shared: Any) -> int:
    """How many sums a rule measures, for a process that owns no leaf: found without numbers."""
    i = next(i for i, g in enumerate(leaves.grads) if g is not None)
    g, p, slots, shared = tree.map(lambda x: x.to("meta"), (leaves.grads[i], leaves.owners[i], sweep.now[i], shared))
    dtype = _real_dtype(g, p)
    step = sweep.steps.of(dtype, torch.device("meta"))[i]
    wide = slots._make([_widened(x, dtype) for x in slots]) if type(slots) is not tuple else slots
    return len(measure(_widened(g, dtype), wide, _widened(p, dtype), step, shared)[0])


def _shared_scalar(x: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(x, Tensor):
        return x.to(device=device, dtype=torch.promote_types(x.dtype, dtype) if x.is_floating_point() else x.dtype, copy=True)
    return torch.tensor(x, dtype=dtype if isinstance(x, float) else None, device=device)


def _first_state(init: Callable[[Tensor], Any], params: Any, complex_: Complex, needs: Needs) -> tuple[Tensor, Any]:
    """The steps and the slots of parameters that have had no update."""
    leaves, spec = tree.checked(params, "params")

    def of(i: int, p: Tensor) -> Any:
        if not is_sharded(p):
            return _init_leaf(init, p, complex_, params, i)
        full = torch.empty(p.shape, dtype=p.dtype, device="meta") if needs != "whole" else whole(p)
        slots = _init_leaf(init, full, complex_, params, i)
        own = [isinstance(x, Tensor) and x.shape == p.shape for x in slots]
        if needs == "whole":
            return slots if type(slots) is tuple else slots._make(cut(x, p) if o else x for x, o in zip(slots, own, strict=True))
        here = _init_leaf(init, local(p), complex_, params, i)
        return here if type(here) is tuple else here._make(like(x, p) if o else x for x, o in zip(here, own, strict=True))

    slots = [() if p is None else of(i, p.detach()) for i, p in enumerate(leaves)]
    device = next((p.device for p in leaves if p is not None), None)
    return torch.zeros(len(leaves), dtype=torch.int64, device=device), _by_field(spec, slots)


def stateless_with_tree_map(
    f: Callable[..., Tensor],
    *,
    once: Callable[[torch.dtype], Any] | None = None,
    elementwise: bool = True,
    norms: Callable[[Tensor, Any], tuple[Tensor, ...]] | None = None,
    needs_params: bool = False,
    sparse: Sparse = "error",
    complex_: Complex = "real",
) -> GradientTransformation:
    """Lift a function of one tensor that keeps no state: ``f(g, p) -> direction``.

    The function may rely on what :func:`leafwise` promises a rule: real tensors, float32 or wider, never None.

    Args:
        f: called for every update that is not None; ``p`` is None where no params are given.
        once: what is computed once for all leaves of a dtype, and handed to ``f`` after ``p``: ``once(dtype)``, with the real
            dtype that ``f`` computes in.
        elementwise: whether an entry of the result depends on that entry alone.
        norms: with ``elementwise=False``, as in :func:`leafwise`: ``f(g, p, extents)`` depends on these besides.
        needs_params: whether ``f`` reads ``p``.
        sparse: what a sparse COO gradient is to ``f``, as in :func:`leafwise`.
        complex_: what a complex tensor is to ``f``, as in :func:`leafwise`.

    Example:
        >>> tx = stateless_with_tree_map(lambda g, p: g.sign())
        >>> tx.update({"w": torch.tensor([-3.0, 2.0]), "b": None}, ())
        ({'w': tensor([-1.,  1.]), 'b': None}, ())
    """
    lift = _Lift(f, elementwise, needs_params, sparse, complex_, norms)

    def begin(leaves: Leaves, state: Any) -> Sweep:
        lift.require_params(leaves)
        numbers = _Once(lambda dtype, device: once(dtype) if once else None)

        def each(
            i: int, g: Tensor, p: Tensor | None, shared: tuple[Any, ...] = (), extents: Any = None, *, narrow: bool = True
        ) -> Tensor:
            plain = _is_plain(g, p, None)
            values, rebuild = (g, None) if plain else lift.values(leaves, i, g, p)
            dtype = g.dtype if plain else _real_dtype(values, p)
            seen, owner = (g, p) if plain else (_widened(values, dtype), _widened(p, dtype))
            given = shared if once is None else (numbers.of(dtype, values.device), *shared)
            try:
                direction = f(seen, owner, *given, *lift.extents(seen, owner, extents))
            except RuntimeError as error:
                _explain(error, f, leaves, i, ())
                raise
            direction = _narrowed(direction, values) if narrow or values.is_complex() else direction
            return rebuild(direction) if rebuild else direction

        return lift.sweep(leaves, each, lambda: state)

    def check(state: Any) -> None:
        if type(state) is not tuple or state:
            check_no_state(rule_name(f), state)

    return lifted(lambda params: (), begin, check=check, elementwise=elementwise)


def aligned(updates: Any, params: Any) -> Leaves:
    """The leaves of updates beside those of the parameters, whose structure is that of the result; of updates where none are given.

    Raises:
        TypeError: a leaf is neither a tensor nor None.
        ValueError: the structures differ.

    Example:
        >>> aligned((torch.ones(1), None), [torch.zeros(1), torch.zeros(1)]).grads
        [tensor([1.]), None]
    """
    if params is None:
        grads, spec = tree.checked(updates, "updates")
        return Leaves(updates, params, grads, [None] * len(grads), spec)
    owners, spec = tree.checked(params, "params")
    try:
        grads = tree.match(spec, updates, "updates", "params", _ADVICE)
    except ValueError:
        tree.checked(updates, "updates")  # a module or a generator is said to be one
        raise
    tree.check_leaves(grads, spec, "updates")
    return Leaves(updates, params, grads, owners, spec)


def check_dense(owner: str, leaves: Leaves) -> None:
    """Raise if a gradient is sparse, for a transformation that handles whole trees by itself.

    Example:
        >>> check_dense("sam", aligned({"w": torch.ones(2).to_sparse()}, None))
        Traceback (most recent call last):
        ...
        TypeError: sam: 'w' has a sparse gradient, which sam does not take: make it dense, .to_dense()
    """
    for i, g in enumerate(leaves.grads):
        if g is not None and g.layout != torch.strided:
            said = f"{owner}: {_place(leaves.updates, i)} has a sparse gradient, which {owner} does not take"
            raise TypeError(f"{said}: make it dense, .to_dense()")


_ADVICE = "; updates are the gradients, not the loss, and None for a parameter that has none"


def _where(rule: Rule, of: Any, i: int) -> str:
    # Names are looked up here, not when a transformation is made: Dynamo of torch 2.11 cannot trace that.
    return f"{rule_name(rule)}: {_place(of, i)}"


def _place(of: Any, i: int) -> str:
    path = tree.paths(of)[i]
    return repr(path) if path else "the tensor"


def _check_complex(x: Tensor, complex_: Complex, rule: Rule, of: Any, i: int) -> None:
    if complex_ == "error" and x.is_complex():
        raise TypeError(f"{_where(rule, of, i)} is complex, which {rule_name(rule)} does not take: pass torch.view_as_real of it")


def _init_leaf(init: Callable[[Tensor], Any], p: Tensor, complex_: Complex, params: Any, i: int) -> Any:
    if not (p.is_floating_point() or p.is_complex()) or p.layout != torch.strided:
        kind = p.dtype if p.layout == torch.strided else p.layout
        advice = "" if p.is_floating_point() or p.is_complex() else ": no parameter has that; pass dict(module.named_parameters())"
        raise TypeError(f"{_where(init, params, i)} must be a dense floating-point or complex tensor, got {kind}{advice}")
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


def _by_leaf(leaves: Leaves, state: LeafwiseState) -> tuple[list[Any], Any]:
    """The inverse of :func:`_by_field`: slots of each leaf, and the structure of the trees that they were in."""
    count, spec = leaves.spec.num_leaves, leaves.spec
    columns: list[Any] = []
    like = "updates" if leaves.params is None else "params"
    for field in state.slots:
        entries = [()] * count
        if not (isinstance(field, tuple) and len(field) == 0):
            entries, spec = tree.fit(leaves.spec, field, "the state", like, _ADVICE if leaves.params is None else "")
        columns.append(entries)
    if len(state.step) != count:
        advice = _ADVICE if leaves.params is None else ": make it with tx.init(params)"
        raise ValueError(f"the state is of {len(state.step)} leaves, {like} has {count}{advice}")
    slots = [type(state.slots)(*row) for row in zip(*columns, strict=True)] if columns else [state.slots] * count
    return slots, spec


def _first_tensor(slots: Any) -> Tensor | None:
    for x in slots:
        if isinstance(x, Tensor):
            return x
    return None


def _alike(g: Tensor, like: Tensor | None) -> bool:
    return like is None or (g.shape == like.shape and g.is_complex() == like.is_complex())


def _kind(x: Any) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"


class _Lift(NamedTuple):
    """What a rule declares, and the checks of what it is shown."""

    rule: Rule
    elementwise: bool
    needs_params: bool
    sparse: Sparse
    complex_: Complex
    norms: Callable[[Tensor, Any], tuple[Tensor, ...]] | None = None

    @property
    def needs(self) -> Needs:
        return "entries" if self.elementwise else "whole" if self.norms is None else "norms"

    def sweep(self, leaves: Leaves, each: Each, end: Callable[[], Any], slots: "_Pass | None" = None) -> Sweep:
        if leaves.homes is None:
            return Sweep(each, end)  # nobody asks for more

        def norms(i: int, g: Tensor, p: Tensor | None) -> tuple[Tensor, ...]:
            values, _ = self.values(leaves, i, g, p)
            dtype = _real_dtype(values, p)
            return tuple(extent.norm for extent in self.extents(_widened(values, dtype), _widened(p, dtype), None)[0])

        reads = self.needs_params or _reads(self.rule, 1 if slots is None else 2)
        return Sweep(each, end, self.needs, reads, None if self.norms is None else norms, slots, rule=self.rule)

    def extents(self, g: Tensor, p: Any, known: Any) -> tuple[Any, ...]:
        """What a rule that needs norms is handed besides: those that are known, or else those of what it is shown."""
        if self.norms is None:
            return ()
        return (known or tuple(Extent(norm(x), x.numel()) for x in self.norms(g, p)),)

    def require_params(self, leaves: Leaves) -> None:
        if self.needs_params and leaves.params is None and leaves.updates is not None:
            require(rule_name(self.rule), params=None)  # both are None for a bare tensor that a mask hides

    def values(
        self, leaves: Leaves, i: int, g: Tensor, p: Tensor | None, slot: Tensor | None = None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """What of a gradient the rule is shown, once it is found sound, and how to make an update of the answer if it is none."""
        if p is None and leaves.params is not None and leaves.owners[i] is None:  # else nobody reads it
            raise ValueError(f"{_where(self.rule, leaves.updates, i)} has an update, but no parameter")
        if not g.is_floating_point():
            _check_complex(g, self.complex_, self.rule, leaves.updates, i)
            if not g.is_complex():
                where = _where(self.rule, leaves.updates, i)
                raise TypeError(f"{where} must have a floating-point or complex gradient, got {g.dtype}")
        if not (_alike(g, p) and _alike(g, slot)):
            owner, like = ("slots", slot) if _alike(g, p) else ("parameter", p)
            where = _where(self.rule, leaves.updates, i)
            raise ValueError(f"{where} must have an update like its {owner}, {_kind(like)}, got {_kind(g)}")
        if g.layout == torch.strided:
            return g, None
        if g.layout == torch.sparse_coo and self.sparse == "dense":
            return g.to_dense(), None
        if g.layout == torch.sparse_coo and self.sparse == "values":
            # torch's _values() has no derivative, and its values() wants the entries summed.
            g = g.coalesce() if g.requires_grad else g
            return g.values() if g.is_coalesced() else g._values(), lambda direction: torch.sparse_coo_tensor(
                g._indices(), direction, g.shape, is_coalesced=g.is_coalesced(), check_invariants=False
            )
        name = rule_name(self.rule)
        advice = f"wrap it, optfn.sparse_masked({name}(...)), or " if self.elementwise and g.layout == torch.sparse_coo else ""
        raise TypeError(
            f"{_where(self.rule, leaves.updates, i)} has a sparse gradient, which {name} does not take: "
            f"{advice}make it dense, .to_dense()"
        )


class _Pass:
    """A rule over the leaves: ``each`` for one of them, then ``slots()`` for the new ones."""

    def __init__(self, lift: _Lift, at_step: Callable[[Tensor], Any] | None, leaves: Leaves, state: Any) -> None:
        lift.require_params(leaves)
        self.lift, self.leaves = lift, leaves
        self.homes, self.spec = _by_leaf(leaves, state)
        self.now = list(self.homes) if leaves.homes is None else [self._pieces(i, s) for i, s in enumerate(self.homes)]
        self.before = list(self.now)
        self.kept = len(state.slots) > 0
        present = [g is not None for g in leaves.grads]
        self.step = state.step + (1 if all(present) else torch.tensor(present, device=state.step.device))
        # A leaf that has had no update yet is shown to at_step all the same: at 0 a root in it would have no derivative.
        seen = self.step if all(present) else self.step.clamp_min(1)
        self.steps = _Once(lambda dtype, device: _at_steps(seen.to(dtype=dtype, device=device), at_step))

    def _pieces(self, i: int, slots: Any) -> Any:
        """The slots of a leaf as this process has them."""
        home: Any = (self.leaves.homes or ())[i]
        for x in slots:
            if (
                is_sharded(x)
                and (self.leaves.owners[i] is not None or self.leaves.grads[i] is not None)
                and not same_layout(x, home)
            ):
                said = "the state does not lie on the processes as the leaf does: give update the params that init was given"
                raise ValueError(f"{_where(self.lift.rule, self.leaves.updates, i)}: {said}")
        return slots if type(slots) is tuple else slots._make([local(x) for x in slots])

    def each(
        self,
        i: int,
        g: Tensor,
        p: Tensor | None,
        rule: Rule | None = None,
        shared: tuple[Any, ...] = (),
        extents: Any = None,
        *,
        last: bool = True,
        narrow: bool = True,
    ) -> Any:
        lift = self.lift
        slots: Any = self.now[i]
        slot = _first_tensor(slots)
        if (type(slots) is tuple and self.kept) or (slot is None and len(slots)):
            where = _where(lift.rule, self.leaves.updates, i)
            raise ValueError(f"{where} has an update, but there was no parameter when the state was made")
        plain = _is_plain(g, p, slot if lift.elementwise else None) and _all_of(g.dtype, slots)
        values, rebuild = (g, None) if plain else lift.values(self.leaves, i, g, p, slot if lift.elementwise else None)
        dtype = g.dtype if plain else _real_dtype(values, p)
        try:
            step = self.steps.of(dtype, values.device)[i]
            seen, owner = (g, p) if plain else (_widened(values, dtype), _widened(p, dtype))
            wide = slots if plain or _all_of(dtype, slots) else type(slots)(*(_widened(x, dtype) for x in slots))
            answer, new = (rule or lift.rule)(seen, wide, owner, step, *shared, *lift.extents(seen, owner, extents))
            if type(new) is not type(slots):
                raise TypeError(_of_another(rule or lift.rule, slots))
        except (AttributeError, RuntimeError, TypeError) as error:
            _explain(error, lift.rule, self.leaves, i, slots)
            raise
        sound = not last or (plain and slots is self.before[i] and _all_of(dtype, new))
        self.now[i] = new if sound else _cast_back(new, self.before[i], dtype)
        answer = _narrowed(answer, values) if narrow or values.is_complex() else answer
        return rebuild(answer) if rebuild else answer

    def slots(self) -> Any:
        if self.leaves.homes is None:
            return _by_field(self.spec, self.now)
        pairs = zip(self.now, self.homes, strict=True)
        return _by_field(self.spec, [s if type(s) is tuple else s._make(map(like, s, before)) for s, before in pairs])


def _cast_back(new: Any, before: Any, dtype: torch.dtype) -> Any:
    """New slots in the dtypes that those before have."""
    if _all_of(dtype, new) and _all_of(dtype, before):
        return new
    return new._make([_narrowed(x, like) for x, like in zip(new, before, strict=True)])


def _reads(rule: Rule, k: int) -> bool:
    """Whether a rule may look at its argument number ``k``: unless its code says that it doesn't."""
    if not isinstance(rule, types.FunctionType) or rule.__code__.co_argcount <= k:
        return True
    code, name = rule.__code__, rule.__code__.co_varnames[k]
    if name in code.co_cellvars:
        return True
    return any(
        step.argval == name or (isinstance(step.argval, tuple) and name in step.argval) for step in dis.get_instructions(code)
    )


def _explain(error: Exception, rule: Rule, leaves: Leaves, i: int, slots: Any) -> None:
    """Raise an error that says more, if it is known why a rule has raised this one."""
    if isinstance(error, RuntimeError):
        things = {"the update": leaves.grads[i], "the parameter": leaves.owners[i], "the state": slots}
        on_devices(error, _where(rule, leaves.updates, i), things)
    lacks = isinstance(error, TypeError) and "tuple" in str(error) and any(isinstance(x, tuple) for x in slots)  # a slot not kept
    if lacks or (isinstance(error, AttributeError) and type(error.obj) is type(slots)):
        raise TypeError(_of_another(rule, slots)) from error


def _of_another(rule: Rule, slots: Any) -> str:
    return not_its_state(rule_name(rule), "with the slots of its rule", slots)


def _is_plain(g: Tensor, p: Tensor | None, slot: Tensor | None) -> bool:
    """Whether a leaf is what most are: dense, real, float32 or wider, and like its parameter and its slot. It is shown as it is."""
    dtype, shape = g.dtype, g.shape
    return (
        p is not None
        and p.dtype == dtype
        and (dtype == torch.float32 or dtype == torch.float64)
        and p.shape == shape
        and (slot is None or slot.shape == shape)
        and g.layout == torch.strided
    )


def _all_of(dtype: torch.dtype, slots: Any) -> bool:
    """Whether the tensors of these slots have this dtype, so that nothing is to be cast."""
    for x in slots:  # noqa: SIM110 - a loop is half the time of all() here, at every leaf
        if isinstance(x, Tensor) and x.dtype != dtype:
            return False
    return True


def _widened(x: Any, dtype: torch.dtype) -> Any:
    """What the rule is shown of a tensor: its real view, in ``dtype`` or wider; anything else as it is."""
    if not isinstance(x, Tensor) or x.dtype == dtype or not (x.is_floating_point() or x.is_complex()):
        return x
    x = as_real(x)
    return x.to(torch.promote_types(x.dtype, dtype))


def _narrowed(x: Any, like: Any) -> Any:
    """The inverse: what the rule answered, as ``like`` came."""
    if not isinstance(x, Tensor) or not isinstance(like, Tensor) or x.dtype == like.dtype:
        return x
    return as_complex(x.to(real_dtype(like.dtype))) if like.is_complex() else x.to(like.dtype)


def _real_dtype(g: Tensor, p: Tensor | None) -> torch.dtype:
    if g.dtype == torch.float32 and (p is None or p.dtype == torch.float32):
        return torch.float32  # the usual case
    return real_dtype(compute_dtype(g, p))


class _Once:
    """What is computed once for all leaves of one dtype and device."""

    def __init__(self, make: Callable[[torch.dtype, torch.device], Any]) -> None:
        self.make, self.found = make, {}
        self.dtype, self.device, self.last = None, None, None

    def of(self, dtype: torch.dtype, device: torch.device) -> Any:
        if dtype != self.dtype or device != self.device:
            if (dtype, device) not in self.found:
                self.found[dtype, device] = self.make(dtype, device)
            self.dtype, self.device, self.last = dtype, device, self.found[dtype, device]
        return self.last


def _at_steps(step: Tensor, at_step: Callable[[Tensor], Any] | None) -> Any:
    """What each leaf's rule is handed as its step."""
    given = at_step(step) if at_step else step
    if isinstance(given, Tensor):
        return given.unbind()
    if isinstance(given, list):
        return given
    return list(zip(*(x.unbind() if isinstance(x, Tensor) and x.ndim else [x] * len(step) for x in given), strict=True))
