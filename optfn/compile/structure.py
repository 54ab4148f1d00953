"""The containers of a call's arguments, exactly: kinds, lengths, and keys in their order."""

import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["Structure", "UnknownContainerError", "is_named_tuple"]

Read = Callable[[Any, list[Any]], bool]
Build = Callable[[list[Any]], Any]
_FACTORIES = (list, dict, int, float, tuple)


class UnknownContainerError(Exception):
    """A container of a kind that is not known here, whose contents may depend on anything."""


class Structure:
    """The structure of a tree, for trees that a function must not be able to tell apart.

    optree takes dicts for equal whose keys come in another order, and an OrderedDict for a dict: a function may tell them
    apart. It is also faster, as keys need no sorting.

    Args:
        tree: dicts, OrderedDicts, defaultdicts, lists, tuples, NamedTuples and None, nested; all else is a leaf.
        leaves: a list to add the leaves of ``tree`` to; those of a dict are in the order of its keys.

    Attributes:
        classes: the NamedTuples in the tree.

    Raises:
        UnknownContainerError: a subclass of these, a set, a key that is neither a string nor a whole number.

    Example:
        >>> structure = Structure({"b": 1, "a": (2, None)}, leaves := [])
        >>> leaves, structure.match({"b": 3, "a": (4, None)}), structure.match({"a": (4, None), "b": 3})
        ([1, 2], [3, 4], None)
    """

    def __init__(self, tree: Any, leaves: list[Any]) -> None:
        self.classes: set[type] = set()
        self._read, self._build = self._of(tree, leaves)

    def match(self, tree: Any) -> list[Any] | None:
        """The leaves of a tree of the very same structure; None for any other."""
        found: list[Any] = []
        return found if self._read(tree, found) else None

    def unflatten(self, leaves: list[Any]) -> Any:
        """A new tree of this structure."""
        return self._build(leaves[::-1])

    def _of(self, node: Any, leaves: list[Any]) -> tuple[Read, Build]:
        kind: Any = type(node)
        if node is None:
            return lambda x, found: x is None, lambda left: None
        if kind in (dict, OrderedDict, defaultdict):
            return self._of_dict(node, leaves)
        if kind is tuple or kind is list or is_named_tuple(kind):
            return self._of_sequence(node, leaves)
        if isinstance(node, dict | list | tuple | set | frozenset):
            raise UnknownContainerError(f"{kind.__name__} is no container that is known here")
        leaves.append(node)

        def read(x: Any, found: list[Any]) -> bool:
            found.append(x)
            return True

        return read, list.pop

    def _of_dict(self, node: Any, leaves: list[Any]) -> tuple[Read, Build]:
        kind, keys, factory = type(node), list(node), getattr(node, "default_factory", None)
        if factory is not None and factory not in _FACTORIES:
            raise UnknownContainerError("the default of a defaultdict is made by a function that is not known here")
        key_kinds = {*map(type, keys)}
        if not key_kinds <= {str, int, bool}:
            raise UnknownContainerError("a key of a dict is neither a string nor a whole number")
        kinds = [*map(type, keys)]  # True equals 1, and an enumeration's member may equal a string
        read_values, builds = self._of_children([*node.values()], leaves)

        def read(x: Any, found: list[Any]) -> bool:
            if type(x) is not kind or list(x) != keys or [*map(type, x)] != kinds:
                return False
            return (kind is not defaultdict or x.default_factory is factory) and read_values(x.values(), found)

        def build(left: list[Any]) -> Any:
            pairs = zip(keys, [one(left) for one in builds], strict=True)
            return defaultdict(factory, pairs) if kind is defaultdict else kind(pairs)

        return read, build

    def _of_sequence(self, node: Any, leaves: list[Any]) -> tuple[Read, Build]:
        kind, count, named = type(node), len(node), is_named_tuple(type(node))
        if named:
            self.classes.add(kind)
        read_values, builds = self._of_children([*node], leaves)

        def read(x: Any, found: list[Any]) -> bool:
            return type(x) is kind and len(x) == count and read_values(x, found)

        def build(left: list[Any]) -> Any:
            children = [one(left) for one in builds]
            return kind._make(children) if named else kind(children)

        return read, build

    def _of_children(
        self, children: list[Any], leaves: list[Any]
    ) -> tuple[Callable[[Iterable[Any], list[Any]], bool], list[Build]]:
        before = len(leaves)
        pairs = [self._of(child, leaves) for child in children]
        reads, builds = [read for read, _ in pairs], [build for _, build in pairs]
        if len(leaves) == before + len(children) and all(map(operator.is_, children, leaves[before:])):
            return lambda values, found: not found.extend(values), builds  # a container in a leaf's place is no such leaf
        return lambda values, found: all(read(x, found) for read, x in zip(reads, values, strict=True)), builds


def is_named_tuple(kind: type) -> bool:
    """Whether a class is a NamedTuple, and no subclass of one.

    Example:
        >>> is_named_tuple(optfn.AdamSlots), is_named_tuple(tuple)
        (True, False)
    """
    return kind.__bases__ == (tuple,) and isinstance(getattr(kind, "_fields", None), tuple)
