"""What each leaf of a state is: a slot of a parameter, a step count, a hyperparameter."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from torch import Tensor

from optfn import tree
from optfn.leafwise import LeafwiseState

__all__ = ["Part", "in_order", "parts"]

Role = Literal["slot", "steps", "count", "hyperparam", "derived", "other"]


class Part(NamedTuple):
    """One leaf of a state.

    Attributes:
        path: its dotted path in the state, without the parameter's own at the end.
        role: ``slot`` of a lifted rule, its ``steps`` (one entry a parameter), the ``count`` of a schedule, a ``hyperparam``, what
            is ``derived`` from these at each step, or something ``other``.
        leaf: the position of the parameter whose it is, in the order of :func:`optfn.tree.flatten`; None if it is nobody's.
        owner: the path of the NamedTuple with the steps, the count or the hyperparameters; of the rule's state for a slot.
        kind: the name of the NamedTuple of a rule's slots, for them and for its steps.
    """

    path: str
    role: Role
    leaf: int | None = None
    owner: str = ""
    kind: str = ""

    @property
    def name(self) -> str:
        """The last name in the path: of a slot ``mu``, of a hyperparameter ``lr``; that of the whole where it is a tuple."""
        if self.role == "hyperparam":
            return self.path.removeprefix(self.owner).lstrip(".").split(".")[1]
        return self.path.rsplit(".", 1)[-1]

    @property
    def identity(self) -> tuple[Any, ...]:
        """What it is, wherever in the state it is."""
        return self.role, self.kind, self.name, self.leaf


def parts(state: Any, params: Any) -> list[Part]:
    """A part for every leaf of a state, in the order of :func:`optfn.tree.flatten`.

    Args:
        state: any nested state.
        params: the parameters that it was made for.

    Example:
        >>> params = {"w": torch.ones(2)}
        >>> for part in parts(optfn.trace(0.9).init(params), params):
        ...     print(part.role, part.path, part.leaf)
        steps step None
        slot slots.trace 0
    """
    likes, spec = tree.flatten(params)
    return list(_walk(state, _Like(spec, likes[0] if spec.is_leaf() else None)))


class _Like(NamedTuple):
    """How the parameters are built; ``bare`` where they are one tensor."""

    spec: Any
    bare: Tensor | None

    def shaped(self, node: Any) -> list[Any] | None:
        """What ``node`` has for each parameter, if it is built as they are."""
        try:
            of: list[Any] = self.spec.flatten_up_to(node)
        except (ValueError, TypeError):
            return None
        fits = all(isinstance(x, Tensor) or x is None or x == () for x in of) and any(isinstance(x, Tensor) for x in of)
        return of if fits else None

    def whole(self, node: Any, role: Role) -> list[Any] | None:
        if role == "slot" or (role == "other" and not (self.spec.is_leaf() and not _like(node, self.bare))):
            return self.shaped(node)
        return None


def _walk(node: Any, like: _Like, path: str = "", role: Role = "other", owner: str = "", kind: str = "") -> Iterator[Part]:
    of = like.whole(node, role)
    if of is not None:
        yield from (Part(path, role, i, owner, kind) for i, x in enumerate(of) if not isinstance(x, tuple))
        return
    below = tree.children(node)
    if below is None:
        yield Part(path, role, None, owner, kind)
        return
    derived, scalars = (getattr(type(node), name, ()) for name in ("_derived", "_scalars"))
    for name, child in below.items():
        where = f"{path}.{name}" if path else name
        if isinstance(node, LeafwiseState):
            yield from _walk(child, like, where, "steps" if name == "step" else "slot", path, type(node.slots).__name__)
        elif name in scalars and not derived:
            yield Part(where, role, None, owner, kind)  # a number, also where the parameters are one
        elif name in scalars:
            yield from _walk(child, like, where, "hyperparam", path)
        elif name in derived:
            yield from _walk(child, like, where, "derived", path)
        elif derived and name == "count":
            yield from _walk(child, like, where, "count", path)
        else:
            yield from _walk(child, like, where, role, owner, kind)


def _like(node: Any, p: Tensor | None) -> bool:
    return (
        isinstance(node, Tensor) and p is not None and node.shape == p.shape and node.is_floating_point() == p.is_floating_point()
    )


def in_order(params: Any) -> list[int]:
    """The positions, as :func:`optfn.tree.flatten` has them, of the parameters that are not None, in the order they were put in.

    That is the order of ``module.parameters()`` for ``dict(module.named_parameters())``; flattening sorts the keys of a dict.

    Example:
        >>> in_order({"weight": torch.ones(2), "bias": torch.ones(1)})
        [1, 0]
    """
    leaves, spec = tree.flatten(params)
    return _positions(params, tree.unflatten(spec, list(range(len(leaves)))))


def _positions(node: Any, at: Any) -> list[int]:
    if tree.children(node) is None:
        return [] if node is None else [at]
    pairs = ((node[k], at[k]) for k in node) if isinstance(node, dict) else zip(_values(node), _values(at), strict=True)
    return [i for child, where in pairs for i in _positions(child, where)]


def _values(node: Any) -> list[Any]:
    return list((tree.children(node) or {}).values())
