"""How a transformation goes over the leaves: one after the other, and where they lie on several processes.

There each transformation says what it has to see of a leaf. One that treats every entry by itself is shown the pieces that are
here. One that needs norms gets those of all leaves by one all_reduce. For one that needs whole tensors each of these has an owner,
which is sent the pieces and sends back the answer, in two all_to_all for all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from optfn import tree
from optfn.numerics import compute_dtype, real_dtype, widened_scalar
from optfn.sharding import (
    Exchange,
    all_reduced,
    check_agreement,
    group_of,
    is_debugging,
    is_sharded,
    joint_norms,
    like,
    local,
    numel,
    placed_as,
    replicas,
    whole,
)

__all__ = ["Each", "Extent", "Leaves", "Needs", "Owners", "Slots", "Sweep", "as_pieces", "joint_totals", "swept"]


class Leaves(NamedTuple):
    """The trees that an update was handed, and their leaves side by side; None for each parameter where none are given.

    Where leaves lie on several processes ``grads`` and ``owners`` are the pieces of this one, and ``homes`` has the tensors that
    they are pieces of; it is None where none does.
    """

    updates: Any
    params: Any
    grads: list[Any]
    owners: list[Any]
    spec: Any
    homes: list[Any] | None = None

    def laid_out(self) -> list[Any]:
        """The gradients as tensors that lie where their parameters do."""
        return self.grads if self.homes is None else [like(g, home) for g, home in zip(self.grads, self.homes, strict=True)]


Each = Callable[..., Tensor]
"""What happens to one leaf, by its number, gradient and parameter; and with extents that it needs of all processes."""
Needs = Literal["entries", "norms", "whole"]
"""What of a tensor that lies on several processes a rule has to see: its own entries, also norms of the whole, or the whole."""


class Extent(NamedTuple):
    """The size of a tensor, all of it, wherever its pieces are.

    Attributes:
        norm: the root of the sum of squares of its entries.
        numel: their number.

    Example:
        >>> def scale_by_size():
        ...     def update(g, slots, p, step, extents):
        ...         return g / extents[0].rms(), slots
        ...     return optfn.leafwise(lambda p: (), update, norms=lambda g, p: (g,))
        >>> tx, g = scale_by_size(), torch.tensor([1.0, -7.0])
        >>> tx.update(g, tx.init(g))[0]
        tensor([ 0.2000, -1.4000])
        >>> Extent(torch.tensor(6.0), 9).rms()
        tensor(2.)
    """

    norm: Tensor
    numel: int

    def rms(self) -> Tensor:
        """The root mean square of the entries, 0 where there are none."""
        return self.norm / max(self.numel, 1) ** 0.5


class Sweep(NamedTuple):
    """How one transformation goes over the leaves.

    Attributes:
        each: called for each leaf that has a gradient, with its number, gradient and parameter.
        end: called after that; gives the new state.
        needs: what it has to see of a leaf.
        reads_params: whether it looks at the parameter.
        norms: of one leaf, called as ``each``: the norms that it needs, which ``each`` is handed as those of the whole leaf.
        slots: the slots of each leaf, which change on the way.
        links: of a chain, its links.
        rule: the function that ``each`` calls.
    """

    each: Each
    end: Callable[[], Any]
    needs: Needs = "whole"
    reads_params: bool = True
    norms: Callable[[int, Tensor, Tensor | None], tuple[Tensor, ...]] | None = None
    slots: "Slots | None" = None
    links: "tuple[Sweep, ...]" = ()
    rule: Any = None


class Slots(Protocol):
    """What a rule keeps of each leaf, while it goes over them.

    Attributes:
        now: for each leaf its slots, a NamedTuple; pieces where the leaf lies on several processes.
        homes: the same as the state has them.
    """

    now: list[Any]
    homes: list[Any]


def as_pieces(leaves: Leaves) -> Leaves:
    """The leaves as this process has them. What does not fit is found from what all processes know.

    Raises:
        TypeError: a parameter lies on several processes, its update on one, or the other way round.
        ValueError: their shapes differ.
    """
    if not any(map(is_sharded, leaves.grads)) and not any(map(is_sharded, leaves.owners)):
        return leaves
    homes: list[Any] = []
    grads: list[Any] = []
    for i, (g, p) in enumerate(zip(leaves.grads, leaves.owners, strict=True)):
        home = g if p is None else p
        homes.append(home)
        if g is not None and is_sharded(g) != is_sharded(home):
            here, there = ("the update", "the parameter") if is_sharded(home) else ("the parameter", "the update")
            said = f"{_place(leaves, i)}: {there} lies on several processes, {here} does not"
            raise TypeError(f"{said}: distribute it, torch.distributed.tensor.distribute_tensor(x, mesh, placements)")
        if is_sharded(home) and g is not None and g.shape != home.shape:
            raise ValueError(f"{_place(leaves, i)} must have an update of shape {tuple(home.shape)}, got {tuple(g.shape)}")
        grads.append(local(placed_as(g, home)))
    if is_debugging():
        paths = tree.paths(leaves.updates if leaves.params is None else leaves.params)
        none = [path for path, g in zip(paths, leaves.grads, strict=True) if g is None]
        said = f"None for {', '.join(map(repr, none))}" if none else "no None"
        check_agreement(said, homes, "which updates are None")
    return leaves._replace(grads=grads, owners=[local(p) for p in leaves.owners], homes=homes)


def _place(leaves: Leaves, i: int) -> str:
    path = tree.paths(leaves.updates if leaves.params is None else leaves.params)[i]
    return repr(path) if path else "the tensor"


def _extents_of(sweep: Sweep, leaves: Leaves, grads: list[Any]) -> list[tuple[Extent, ...] | None]:
    """Of each leaf the sizes that a transformation needs; one all_reduce for those that lie on several processes."""
    homes = leaves.homes or leaves.grads
    assert sweep.norms is not None
    found = [None if g is None else sweep.norms(i, g, leaves.owners[i]) for i, g in enumerate(grads)]
    flat = [(x, homes[i]) for i, norms in enumerate(found) if norms is not None for x in norms]
    joint = iter(joint_norms([x for x, _ in flat], [h for _, h in flat]))
    return [
        None if norms is None else tuple(Extent(next(joint), numel(home)) for _ in norms)
        for norms, home in zip(found, homes, strict=True)
    ]


def swept(sweep: Sweep, leaves: Leaves) -> list[Any]:
    """The direction of each leaf; where leaves lie on several processes laid out as these are."""
    grads = leaves.grads
    if leaves.homes is None:
        each, owners = sweep.each, leaves.owners
        return [None if g is None else each(i, g, owners[i]) for i, g in enumerate(grads)]
    links = sweep.links or (sweep,)
    # From the first link that needs whole tensors on, whole they stay until none needs more than its entries.
    beyond = [k for k, link in enumerate(links) if link.needs != "entries"]
    start, stop = (beyond[0], beyond[-1] + 1) if any(link.needs == "whole" for link in links) else (0, 0)
    for link in links[:start]:
        grads = _over(link, leaves, grads)
    if stop:
        grads = _on_owners(links[start:stop], leaves, grads)
    for link in links[stop:]:
        grads = _over(link, leaves, grads)
    return [like(g, home) for g, home in zip(grads, leaves.homes, strict=True)]


def _over(link: Sweep, leaves: Leaves, grads: list[Any]) -> list[Any]:
    """One link, with the pieces that are here."""
    if link.needs == "entries":
        return [None if g is None else link.each(i, g, leaves.owners[i]) for i, g in enumerate(grads)]
    extents = _extents_of(link, leaves, grads)
    return [None if g is None else link.each(i, g, leaves.owners[i], extents=extents[i]) for i, g in enumerate(grads)]


def _on_owners(links: tuple[Sweep, ...], leaves: Leaves, grads: list[Any]) -> list[Any]:
    """Links, one after the other, with whole tensors, each on its owner."""
    reads = any(link.reads_params for link in links)
    _rehearse(links, leaves, grads)
    owners = Owners([link.slots for link in links if link.slots is not None], leaves, grads, reads=reads)
    answers = list(owners.grads)
    for i in owners.mine:
        for link in links:
            answers[i] = link.each(i, answers[i], owners.params[i])
    return owners.sent_back(answers)


def joint_totals(
    rows: dict[int, Tensor], count: int, numbers: list[Any], leaves: Leaves, owners: "Owners | None"
) -> tuple[list[Tensor], list[Tensor]]:
    """Sums over all leaves on all processes, and the means of numbers that each of them has: one all_reduce.

    Args:
        rows: by the number of a leaf, what of each sum its piece adds, or the whole leaf where this process owns it.
        count: how many sums there are.
        numbers: 0-dim tensors or numbers.
        leaves: the leaves.
        owners: who computed with whole leaves; None where each process has measured its pieces.
    """
    homes: list[Any] = leaves.homes or []
    sharded = [h for h, g in zip(homes, leaves.grads, strict=True) if is_sharded(h) and g is not None]
    if not sharded:
        return list(torch.stack([*rows.values()]).sum(0).unbind()), numbers
    group = group_of(sharded)
    size = len(torch.distributed.get_process_group_ranks(group))

    def parts(i: int) -> int:
        """How many processes add the same; a leaf has an owner on each of the meshes like its own that the group is made of."""
        if not is_sharded(homes[i]):
            return size
        return size // homes[i].device_mesh.size() if owners else replicas(homes[i], group)

    device = sharded[0].device
    total = torch.zeros(count, dtype=widened_scalar(torch.zeros((), device=device)).dtype, device=device)
    for i, row in rows.items():
        total = total + row.to(device) / parts(i)
    means = [torch.as_tensor(whole(x), dtype=total.dtype, device=device).reshape(1) / size for x in numbers]
    found = all_reduced(torch.cat([total, *means]), group).unbind()
    dtype = real_dtype(compute_dtype(*leaves.grads, *leaves.owners))
    return [x.to(dtype) for x in found[:count]], [*found[count:]]


_rehearsed: dict[Any, None] = {}


def _rehearse(links: tuple[Sweep, ...], leaves: Leaves, grads: list[Any]) -> None:
    """Call links on tensors without numbers, once for each kind of leaf, so that what fails for a shape fails on all processes.

    Else the owner of the tensor alone would raise, and the others would wait for it.
    """
    homes: list[Any] = leaves.homes or []
    for i, g in enumerate(grads):
        if g is None or not is_sharded(homes[i]) or torch.compiler.is_compiling():
            continue
        key = (g.dtype, homes[i].shape, tuple(_identity(link.rule) for link in links))
        if key in _rehearsed:
            continue
        keepers = [link.slots for link in links if link.slots is not None]
        before = [keeper.now[i] for keeper in keepers]
        x = torch.empty(homes[i].shape, dtype=g.dtype, device="meta")
        owner = leaves.owners[i]
        p = None if owner is None else torch.empty(homes[i].shape, dtype=owner.dtype, device="meta")
        try:
            for keeper, slots in zip(keepers, before, strict=True):
                whole_slots = [_empty(here, home) for here, home in zip(slots, keeper.homes[i], strict=True)]
                keeper.now[i] = slots if type(slots) is tuple else slots._make(whole_slots)
            for link in links:
                x = link.each(i, x, p)
        except (NotImplementedError, RuntimeError):  # a rule may need numbers, or an operator has no form without
            pass
        finally:
            for keeper, slots in zip(keepers, before, strict=True):
                keeper.now[i] = slots
        while len(_rehearsed) >= _KINDS:
            _rehearsed.pop(next(iter(_rehearsed)), None)
        _rehearsed[key] = None


_KINDS = 4096


def _empty(here: Any, home: Any) -> Any:
    """A slot as the whole tensor has it, without numbers."""
    return torch.empty(home.shape, dtype=here.dtype, device="meta") if isinstance(here, Tensor) else here


def _identity(rule: Any) -> Any:
    """What a rule is, by its code and the numbers that it closes over."""
    if not hasattr(rule, "__code__"):
        return rule
    inside = [cell.cell_contents for cell in rule.__closure__ or ()]
    return (rule.__code__, *(x if isinstance(x, int | float | str | None) else type(x) for x in inside))


class Owners:
    """Leaves that lie on several processes, brought whole to one owner each, with their slots.

    A leaf that lies here alone is there on all processes, and each of them owns it.

    Attributes:
        grads: the whole gradients of leaves that this process owns, None for all others.
        params: the same of parameters, where they are read.
        mine: the numbers of leaves with a gradient that this process owns.
    """

    def __init__(self, keepers: list[Slots], leaves: Leaves, grads: list[Any], *, reads: bool) -> None:
        self.keepers, self.before = keepers, [list(keeper.now) for keeper in keepers]
        self.homes: list[Any] = leaves.homes or []
        self.pieces, self.given = grads, leaves.grads
        self.grads: list[Any] = [None if is_sharded(h) else g for g, h in zip(grads, self.homes, strict=True)]
        self.params: list[Any] = [None if is_sharded(h) else p for p, h in zip(leaves.owners, self.homes, strict=True)]
        self.mine = [i for i, g in enumerate(self.grads) if g is not None]
        self.exchanges: list[tuple[Exchange, list[int]]] = []
        away = [i for i, g in enumerate(grads) if g is not None and is_sharded(self.homes[i])]
        for mesh in dict.fromkeys(self.homes[i].device_mesh for i in away):
            some = [i for i in away if self.homes[i].device_mesh == mesh]
            self._fetch(
                Exchange([self.homes[i] for i in some]), some, leaves.owners if reads and leaves.params is not None else None
            )

    def _fetch(self, exchange: Exchange, some: list[int], params: list[Any] | None) -> None:
        numbered = [*enumerate(some)]
        travelling = [(k, i, keeper, f) for k, i, keeper, f in self._slots(some) if is_sharded(keeper.homes[i][f])]
        items = [(k, self.pieces[i]) for k, i in numbered]
        items += [(k, params[i]) for k, i in numbered] if params is not None else []
        items += [(k, keeper.now[i][f]) for k, i, keeper, f in travelling]
        wholes = iter(exchange.to_owners(items))
        for _, i in numbered:
            self.grads[i] = next(wholes)
        for _, i in numbered if params is not None else ():
            self.params[i] = next(wholes)
        for k, i, keeper, f in travelling:
            x = next(wholes)
            if exchange.owned[k]:
                keeper.now[i] = _with(keeper.now[i], f, x)
        self.mine += [i for k, i in numbered if exchange.owned[k]]
        self.exchanges.append((exchange, some))

    def _slots(self, some: list[int]) -> list[tuple[int, int, Slots, int]]:
        """Every tensor among the slots of some leaves: the leaf, counted in ``some`` and in all, who keeps it, and its field."""
        return [
            (k, i, keeper, f)
            for k, i in enumerate(some)
            for keeper in self.keepers
            for f, x in enumerate(keeper.now[i])
            if isinstance(x, Tensor)
        ]

    def told(self, answers: Mapping[int, Sequence[Tensor]], likes: Mapping[int, Sequence[Tensor]]) -> dict[int, Sequence[Tensor]]:
        """What was computed of each leaf, by its number, on every process, whole.

        Args:
            answers: tensors of each leaf that this process owns.
            likes: of each leaf what they are like.
        """
        found = dict(answers)
        for exchange, some in self.exchanges:
            items = [
                (k, x, here, True) for k, i in enumerate(some) for x, here in zip(answers.get(i, likes[i]), likes[i], strict=True)
            ]
            new = iter(exchange.from_owners(items))
            found |= {i: [next(new) for _ in likes[i]] for i in some}
        return found

    def sent_back(self, answers: list[Any]) -> list[Any]:
        """What was computed of each leaf, as pieces; new slots come back to where the old ones lie."""
        found = [None if is_sharded(h) else x for x, h in zip(answers, self.homes, strict=True)]
        # What came may have been wider than the gradient; the answer is like it.
        like: list[Any] = [
            None if g is None else torch.empty_like(x, dtype=g.dtype) for x, g in zip(self.pieces, self.given, strict=True)
        ]
        of = {id(keeper): before for keeper, before in zip(self.keepers, self.before, strict=True)}
        for exchange, some in self.exchanges:
            slots = self._slots(some)
            items = [(k, answers[i], like[i], False) for k, i in enumerate(some)]
            for k, i, keeper, f in slots:
                items.append((k, keeper.now[i][f], of[id(keeper)][i][f], not is_sharded(keeper.homes[i][f])))
            new = iter(exchange.from_owners(items))
            for i in some:
                found[i] = next(new)
            for _, i, keeper, f in slots:
                keeper.now[i] = _with(keeper.now[i], f, next(new))
        return found


def _with(slots: Any, f: int, x: Any) -> Any:
    return slots._make([*slots[:f], x, *slots[f + 1 :]])
