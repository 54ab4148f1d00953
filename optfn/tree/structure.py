"""The structure of trees: flatten and map, dotted paths, parts by name, flat dicts."""

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import optree
import torch
from optree.utils import total_order_sorted
from torch import Tensor

from optfn import numerics
from optfn.sharding import cut, entrywise, is_sharded, joint_norms, local, placed_as, same_layout, whole

__all__ = [
    "cast",
    "children",
    "flatten",
    "from_flat_dict",
    "get",
    "get_all_with_path",
    "global_norm",
    "leaves",
    "map",
    "map_params",
    "map_with_path",
    "match",
    "paths",
    "set",
    "subtrees",
    "to_flat_dict",
    "unflatten",
    "value_and_grad",
]

NAMESPACE = "optfn"
_DICTS = (dict, OrderedDict, defaultdict)


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a tree, None among them, and its structure. Keys of a dict are taken in sorted order.

    Example:
        >>> flatten({"b": 1.0, "a": None})[0]
        [None, 1.0]
    """
    if torch.compiler.is_dynamo_compiling():
        found: list[Any] = []
        return found, _Structure(tree, found)
    return optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)


def unflatten(spec: Any, new_leaves: list[Any]) -> Any:
    """The tree of structure ``spec``, as :func:`flatten` gives it, with these leaves.

    Example:
        >>> found, spec = flatten({"b": 1.0, "a": None})
        >>> unflatten(spec, [2.0, 3.0])
        {'b': 3.0, 'a': 2.0}
    """
    return spec.unflatten(new_leaves)


class _Structure:
    """The structure of a tree, as optree's ``PyTreeSpec``, for Dynamo to trace.

    Dynamo has optree's functions, but fails (torch 2.13) on a dict whose leaves are all constants, as None is; partitions and
    frozen groups make such dicts. Outside of tracing optree is used: it is faster.
    """

    def __init__(self, tree: Any, found: list[Any]) -> None:
        self.kind = type(tree)
        level = _level(tree)
        self.leaf = level is None
        self.keys, children, self.rebuild = level or ([], [], list)
        self.parts: list[_Structure] = []
        before = len(found)
        if self.leaf:
            found.append(tree)
        for child in children:
            if child is None or isinstance(child, Tensor):
                found.append(child)
                self.parts.append(_LEAF)
            else:
                self.parts.append(_Structure(child, found))
        self.num_leaves: int = len(found) - before

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Structure) or self.leaf or other.leaf:
            return isinstance(other, _Structure) and self.leaf and other.leaf
        return self.kind is other.kind and self.keys == other.keys and self.parts == other.parts

    __hash__ = None  # type: ignore[assignment]

    def is_leaf(self) -> bool:
        return self.leaf

    def children(self) -> list["_Structure"]:
        return self.parts

    def unflatten(self, new_leaves: list[Any]) -> Any:
        if self.leaf:
            return new_leaves[0]
        children, start = [], 0
        for part in self.parts:
            if part is _LEAF:
                children.append(new_leaves[start])
            else:
                children.append(part.unflatten(new_leaves[start : start + part.num_leaves]))
            start += part.num_leaves
        return self.rebuild(children)

    def flatten_up_to(self, tree: Any) -> list[Any]:
        if self.leaf:
            return [tree]
        level = _level(tree)
        if level is None:
            raise ValueError("the structures differ")
        keys, children, _ = level
        dicts = type(tree) in _DICTS and self.kind in _DICTS  # optree takes one dict for another, whatever the order of its keys
        if dicts and keys != self.keys and len(keys) == len(self.keys):
            named = dict(zip(keys, children, strict=True))
            keys = [key for key in self.keys if key in named]
            children = [named[key] for key in keys]
        if keys != self.keys or not (dicts or type(tree) is self.kind):
            raise ValueError("the structures differ")
        found: list[Any] = []
        for part, child in zip(self.parts, children, strict=True):
            if part is _LEAF:
                found.append(child)
            else:
                found.extend(part.flatten_up_to(child))
        return found


def match(spec: Any, tree: Any, name: str, like: str, advice: str = "") -> list[Any]:
    """Flatten ``tree`` to the structure ``spec``: what stands at each of its leaves, a subtree perhaps.

    A tuple is taken for a list of its length, and a list for a tuple. A NamedTuple is neither.

    Args:
        spec: a structure as :func:`flatten` gives it.
        tree: the tree to take apart.
        name: what to call ``tree`` in an error.
        like: what to call the owner of ``spec``.
        advice: the end of an error: what to do.

    Raises:
        ValueError: the structures differ; the message names the leaves that only one of them has.

    Example:
        >>> match(flatten({"w": 1.0})[1], {"v": 1.0}, "updates", "params")
        Traceback (most recent call last):
        ...
        ValueError: updates must have the structure of params: 'w' is only in params, 'v' is only in updates
    """
    return fit(spec, tree, name, like, advice)[0]


def fit(spec: Any, tree: Any, name: str, like: str, advice: str = "") -> tuple[list[Any], Any]:
    """As :func:`match`, and the structure ``spec`` with the lists and tuples that ``tree`` has, to put new leaves into.

    Example:
        >>> entries, own = fit(flatten([1.0, 2.0])[1], (3.0, 4.0), "updates", "params")
        >>> entries, unflatten(own, entries)
        ([3.0, 4.0], (3.0, 4.0))
    """
    try:
        return spec.flatten_up_to(tree), spec
    except (ValueError, TypeError):
        pass
    pattern = unflatten(spec, [None] * spec.num_leaves)
    try:
        return spec.flatten_up_to(_recast(tree, pattern)), flatten(_recast(pattern, tree))[1]
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{name} must have the structure of {like}: {_mistake(pattern, tree, name, like)}{advice}")


def _recast(tree: Any, like: Any) -> Any:
    """``tree``, a list or a tuple in it being what it is in ``like``, where that has as many entries."""
    level, wanted = _children(tree), _children(like)
    if level is None or wanted is None or level[0] != wanted[0]:
        return tree
    parts = [_recast(x, y) for x, y in zip(level[1], wanted[1], strict=True)]
    sequences = type(tree) in (list, tuple) and type(like) in (list, tuple)
    return (wanted if sequences else level)[2](parts)


def _mistake(wanted: Any, given: Any, name: str, like: str) -> str:
    """How the structures of two trees differ, in words, and what was probably meant."""
    ours, theirs = _children(given), _children(wanted)
    if ours is None and theirs is not None:
        what = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else _kind(given)
        return f"{name} is {what}, {like} is {_kind(wanted)} of {', '.join(repr(path) for path in paths(wanted)) or 'nothing'}"
    if ours is not None and theirs is not None:
        pattern = flatten(wanted)[1]
        for key, part in zip(ours[0], ours[1], strict=True):
            if _fits(pattern, part):
                return f"{name} is {_kind(given)}; its part {key!r} has that structure: pass this part alone"
        sequence = type(given) in (list, tuple) and len(ours[0]) == len(theirs[0]) and all(_children(x) is None for x in ours[1])
        if sequence and type(wanted) in _DICTS and like.isidentifier():
            return f"{name} is {_kind(given)}, {like} is {_kind(wanted)}: write dict(zip({like}, {name}))"
    return differences(wanted, given, name, like)


def differences(wanted: Any, given: Any, name: str, like: str) -> str:
    """Where the structures of two trees differ; a subtree may stand where ``wanted`` has a leaf.

    Example:
        >>> differences({"w": 1.0}, {"v": 1.0}, "updates", "params")
        "'w' is only in params, 'v' is only in updates"
    """
    paths_wanted, paths_given = paths(wanted), paths(given)
    lacks = next((path for path in paths_wanted if not any(_within(path, x) for x in paths_given)), None)
    extra = next((path for path in paths_given if not any(_within(x, path) for x in paths_wanted)), None)
    said = [f"{path!r} is only in {owner}" for path, owner in ((lacks, like), (extra, name)) if path is not None]
    return ", ".join(said) or _containers(wanted, given, name, like, "")


def _containers(wanted: Any, given: Any, name: str, like: str, path: str) -> str:
    """Where two trees with the same paths have another kind of container."""
    ours, theirs = _children(given), _children(wanted)
    if ours is None or theirs is None:
        return ""
    if ours[0] == theirs[0]:
        below = zip(ours[0], theirs[1], ours[1], strict=True)
        inside = (_containers(x, y, name, like, f"{path}.{key}" if path else key) for key, x, y in below)
        if found := next(filter(None, inside), ""):
            return found
    where = f"at {path!r} " if path else ""
    return "" if type(wanted) is type(given) else f"{where}{like} has {_kind(wanted)}, {name} has {_kind(given)}"


def _kind(x: Any) -> str:
    name = type(x).__name__
    return "None" if x is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _fits(spec: Any, tree: Any) -> bool:
    try:
        spec.flatten_up_to(tree)
    except (ValueError, TypeError):
        return False
    return True


def _within(outer: str, path: str) -> bool:
    return not outer or path == outer or path.startswith(outer + ".")


def map(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply ``f`` to every leaf of ``tree`` and what stands there in each tree of ``rest``; a None leaf stays None.

    Args:
        f: called with one leaf of each tree.
        tree: gives the structure; ``f`` is not called where it holds None.
        rest: trees of the same structure; a leaf of theirs may be None, and is handed to ``f``.

    Raises:
        ValueError: a tree of ``rest`` has another structure.

    Example:
        >>> map(lambda x: 2 * x, {"w": torch.ones(2), "b": None})
        {'w': tensor([2., 2.]), 'b': None}
    """
    first, spec = flatten(tree)
    others = [match(spec, other, f"tree {i + 2}", "tree 1") for i, other in enumerate(rest)]
    return unflatten(spec, [None if x is None else f(x, *y) for x, *y in zip(first, *others, strict=True)])


def map_entries(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """As :func:`map`, for a function of which each entry of the result depends on that entry alone.

    Of tensors that lie on several processes it is shown the pieces that are here, and the result is laid out as they are. Numbers
    and 0-dim tensors belong to all entries.

    Example:
        >>> map_entries(lambda x, y: x + y, {"w": torch.ones(2)}, {"w": torch.ones(2)})
        {'w': tensor([2., 2.])}
    """
    return map(lambda *x: entrywise(f, *x), tree, *rest)


def map_with_path(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """As :func:`map`, with the leaf's dotted path as the first argument of ``f``.

    Example:
        >>> map_with_path(lambda path, x: f"{path}: {tuple(x.shape)}", {"w": torch.ones(2, 3)})
        {'w': 'w: (2, 3)'}
    """
    return map(lambda x, path, *y: f(path, x, *y), tree, unflatten(flatten(tree)[1], paths(tree)), *rest)


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree that are not None, in the order of :func:`paths`.

    Example:
        >>> leaves({"b": torch.ones(1), "a": None})
        [tensor([1.])]
    """
    return [x for x in flatten(tree)[0] if x is not None]


def paths(tree: Any) -> list[str]:
    """The dotted path of every leaf, None leaves among them; a bare tensor's is the empty string.

    Example:
        >>> paths({"w": [torch.ones(1), None]})
        ['w.0', 'w.1']
    """
    found: list[str] = []
    _add_paths(found, tree, "")
    return found


# A function inside another that calls itself would be a reference cycle, and keep what it holds until the garbage collector runs.
def _add_paths(found: list[str], node: Any, path: str) -> None:
    level = _children(node)
    if level is None:
        found.append(path)
        return
    for name, child in zip(level[0], level[1], strict=True):
        _add_paths(found, child, f"{path}.{name}" if path else name)


def global_norm(tree: Any, order: float = 2.0) -> Tensor:
    r"""The vector norm of all entries of all leaves together, :math:`(\sum_i |x_i|^p)^{1/p}`, as a 0-dim tensor.

    Its derivative where all entries are zero is 0. The norm of half-precision leaves is taken in float32.

    Args:
        tree: tensors of any shape, dense or sparse, real or complex; None counts for nothing.
        order: :math:`p`, any number that :func:`torch.linalg.vector_norm` takes; 0 counts the tensors that are not all zero, as
            :func:`torch.nn.utils.get_total_norm` does.

    Example:
        >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor(4.0)})
        tensor(5.)
    """
    found = leaves(tree)
    if not any(is_sharded(x) for x in found):
        return numerics.global_norm(found, order)
    norms = [_norm_of_piece(local(x), order) if is_sharded(x) else numerics.norm(x, order) for x in found]
    return numerics.norm_of_norms(joint_norms(norms, found, order), order)


def _norm_of_piece(x: Tensor, order: float) -> Tensor:
    if x.numel() == 0 and order < 0:  # the smallest of no entries
        return torch.full((), torch.inf, dtype=numerics.real_dtype(numerics.compute_dtype(x)), device=x.device)
    return numerics.norm(x, order)


def tensors(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The leaves that there are, which is what :mod:`torch.func` takes, and what makes the tree of others in their place.

    Example:
        >>> found, rebuilt = tensors({"a": torch.ones(1), "b": None})
        >>> rebuilt([2 * x for x in found])
        {'a': tensor([2.]), 'b': None}
    """
    found, spec = flatten(tree)
    count, places = len(found), [i for i, x in enumerate(found) if x is not None]

    def rebuilt(present: Sequence[Any]) -> Any:
        filled: list[Any] = [None] * count
        for i, x in zip(places, present, strict=True):
            filled[i] = x
        return unflatten(spec, filled)

    return [found[i] for i in places], rebuilt


def value_and_grad(fun: Callable[[Any], Any]) -> Callable[[Any], tuple[Tensor, Any]]:
    """The function that gives the value of ``fun`` and its gradient, a tree like its argument, None where that is None.

    It is :func:`torch.func.grad_and_value` with the value first, for every tree that this library takes. Where leaves lie on
    several processes it is :func:`torch.autograd.grad`, as torch.func does not know these (torch 2.13 gives another value).

    Args:
        fun: a function of one tree of tensors, to a 0-dim tensor.

    Raises:
        TypeError: ``fun`` gives no tensor.
        ValueError: it gives a tensor of another shape.

    Example:
        >>> value_and_grad(lambda params: params["w"].square().sum())({"w": torch.tensor([3.0, 4.0]), "b": None})
        (tensor(25.), {'w': tensor([6., 8.]), 'b': None})
    """

    def both(tree: Any) -> tuple[Tensor, Any]:
        present, rebuilt = tensors(tree)
        if any(map(is_sharded, present)):
            taped = Taped(lambda present: fun(rebuilt(present)), present)
            return taped.value.detach(), rebuilt(taped.grads())
        grads, value = torch.func.grad_and_value(lambda present: _number(fun(rebuilt(present))))(present)
        return value, rebuilt(grads)

    return both


class Taped:
    """A function of tensors that lie on several processes, recorded by torch.autograd.

    Attributes:
        given: the tensors, which require grad.
        value: of the function, whole.
    """

    def __init__(self, fun: Callable[[list[Any]], Any], present: Sequence[Any]) -> None:
        with torch.enable_grad():
            self.given = [x.detach().requires_grad_() for x in present]
            self.value = _number(whole(fun(self.given)))

    def grads(self) -> list[Any]:
        """The gradient, laid out as the tensors."""
        return [placed_as(g.detach(), x) for g, x in zip(self.recorded_grads(), self.given, strict=True)]

    def recorded_grads(self, *, again: bool = False) -> Sequence[Any]:
        """The gradient as it comes, recorded ``again`` if it is to be differentiated."""
        if not self.value.requires_grad:
            return [torch.zeros_like(x) for x in self.given]
        return torch.autograd.grad(self.value, self.given, create_graph=again, allow_unused=True, materialize_grads=True)

    def hessian_product(self, tangents: Sequence[Any]) -> list[Any]:
        """The product of the Hessian and tensors like the given ones."""
        grads = self.recorded_grads(again=True)
        pairs = [(g, v.to(g.dtype)) for g, v in zip(grads, tangents, strict=True) if g.requires_grad]
        if not pairs:
            return [torch.zeros_like(x) for x in self.given]
        outputs, vectors = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, self.given, vectors, allow_unused=True, materialize_grads=True)
        return [placed_as(h, x) for h, x in zip(found, self.given, strict=True)]


def _number(value: Any) -> Tensor:
    wanted = "a function whose gradient is taken must give a 0-dim tensor"
    if not isinstance(value, Tensor):
        raise TypeError(f"{wanted}, got {type(value).__name__}")
    if value.ndim:
        raise ValueError(f"{wanted}, got shape {tuple(value.shape)}: its mean or its sum, say")
    return value


def cast(tree: Any, dtype: torch.dtype | None) -> Any:
    """Convert floating-point leaves to ``dtype``, complex ones to the complex dtype of that precision.

    Args:
        tree: tensors; those of an integer dtype or bool stay as they are.
        dtype: a floating-point dtype; None changes nothing.

    Example:
        >>> cast({"w": torch.ones(1), "step": torch.zeros((), dtype=torch.int64)}, torch.bfloat16)
        {'w': tensor([1.], dtype=torch.bfloat16), 'step': tensor(0)}
    """

    def convert(x: Tensor) -> Tensor:
        if dtype is None or not (x.is_floating_point() or x.is_complex()):
            return x
        return x.to(dtype.to_complex() if x.is_complex() else dtype)

    return map(convert, tree)


def _children(node: Any) -> tuple[list[str], list[Any], Callable[[list[Any]], Any]] | None:
    """One level of a tree: the names of the children, the children, and how to put new ones together; None for a leaf."""
    level = _level(node)
    return level and ([str(key) for key in level[0]], *level[1:])


def _level(node: Any) -> tuple[list[Any], list[Any], Callable[[list[Any]], Any]] | None:
    """As :func:`_children`, with the keys themselves for names."""
    if node is None or isinstance(node, Tensor):
        return None
    kind = type(node)
    if kind is dict:
        keys = _in_order(node)
        return keys, [node[key] for key in keys], lambda new: _like_dict(node, keys, new)
    if kind is tuple or kind is list:
        return [*range(len(node))], list(node), kind
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(kind._fields), list(node), lambda new: kind(*new)
    other: Any = node
    if optree.tree_is_leaf(other, none_is_leaf=True, namespace=NAMESPACE):
        return None
    level: Any = optree.tree_flatten_one_level(other, none_is_leaf=True, namespace=NAMESPACE)
    found, metadata, entries, rebuild = level
    return list(entries), list(found), lambda new: rebuild(metadata, tuple(new))


def _in_order(keys: Any) -> list[Any]:
    """Sorted as optree sorts them; keys that do not compare take the long way."""
    try:
        return sorted(keys)
    except TypeError:
        return total_order_sorted(keys)


_LEAF = _Structure(None, [])
"""Stands for every leaf in a structure: Dynamo takes long over an object that it makes."""


def children(tree: Any) -> dict[str, Any] | None:
    """What a tree is made of, one level down, by the names that make up :func:`paths`; None for a leaf.

    Example:
        >>> children({"w": [1.0, 2.0]}), children(1.0)
        ({'w': [1.0, 2.0]}, None)
    """
    level = _children(tree)
    return None if level is None else dict(zip(level[0], level[1], strict=True))


def _like_dict(old: dict[Any, Any], keys: list[Any], new: list[Any]) -> dict[Any, Any]:
    values: dict[Any, Any] = dict.fromkeys(old)
    for key, x in zip(keys, new, strict=True):
        values[key] = x
    return values


def subtrees(tree: Any) -> list[Any]:
    """The tree, the parts it is made of, the parts of these, and so on down to the leaves; the larger ones first.

    Example:
        >>> subtrees((1, [2]))
        [(1, [2]), 1, [2], 2]
    """
    found = [tree]
    for node in found:
        level = _children(node)
        found.extend(level[1] if level else ())
    return found


_MISSING: Any = object()


def _named(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _add_named(found: list[tuple[str, Any]], node: Any, path: str, name: str) -> None:
    if path and _named(path, name):
        found.append((path, node))
        return
    level = _children(node)
    for key, child in zip(*level[:2], strict=True) if level else ():
        _add_named(found, child, f"{path}.{key}" if path else key, name)


def get(tree: Any, key: str, default: Any = _MISSING, filtering: Callable[[str, Any], bool] | None = None) -> Any:
    """The one part of a nested state (or any tree) that is called ``key``.

    A part is called by a field name, a key or an index; where that is not enough, by the end of its dotted path
    (``"adam.slots.mu"``). A part inside another that already matched is not looked at.

    Args:
        tree: a state, however nested.
        key: a name, or the end of a dotted path.
        default: returned where nothing has that name.
        filtering: ``filtering(path, part) -> bool``, which of the parts of that name come into question; all by default.

    Raises:
        KeyError: nothing has that name (and no default is given), or several parts do; the message lists them.

    Example:
        >>> tx = optfn.chain(optfn.clip_by_global_norm(1.0), optfn.scale_by_adam())
        >>> get(tx.init({"w": torch.ones(2)}), "mu")
        {'w': tensor([0., 0.])}
    """
    found = get_all_with_path(tree, key, filtering)
    if len(found) > 1:  # a slot that is not kept, (), has the name but is no part to speak of
        found = [(path, part) for path, part in found if part != ()] or found[:1]
    if len(found) > 1:
        where = ", ".join(repr(path) for path, _ in found)
        raise KeyError(f"{key!r} names several parts: {where}; give more of the path")
    if not found and default is _MISSING:
        raise KeyError(_nothing_is(key, tree))
    return found[0][1] if found else default


def _nothing_is(key: str, tree: Any) -> str:
    return f"nothing is called {key!r} here; there are {', '.join(repr(p) for p in paths(tree)) or 'no leaves'}"


def get_all_with_path(tree: Any, key: str, filtering: Callable[[str, Any], bool] | None = None) -> list[tuple[str, Any]]:
    """Every part of a nested state (or any tree) that is called ``key``, with its dotted path.

    Args:
        tree: a state, however nested.
        key: a name, or the end of a dotted path, as in :func:`get`.
        filtering: ``filtering(path, part) -> bool``, which of them to give; all by default.

    Example:
        >>> tx = optfn.chain(optfn.trace(0.9), optfn.scale_by_adam())
        >>> get_all_with_path(tx.init({"w": torch.ones(2)}), "step")
        [('0.step', tensor([0])), ('1.step', tensor([0]))]
    """
    found: list[tuple[str, Any]] = []
    _add_named(found, tree, "", key)
    return [(path, part) for path, part in found if filtering is None or filtering(path, part)]


def _replaced(node: Any, path: str, derived: bool, names: Iterable[str], replace: Callable[[Any, str, str, bool], Any]) -> Any:
    name = next((name for name in names if path and _named(path, name)), None)
    if name is not None:
        return replace(node, path, name, derived)
    level = _children(node)
    if level is None:
        return node
    computed = getattr(type(node), "_derived", ())
    keys, children, rebuild = level
    pairs = zip(keys, children, strict=True)
    return rebuild([_replaced(c, f"{path}.{k}" if path else k, derived or k in computed, names, replace) for k, c in pairs])


def set(tree: Any, filtering: Callable[[str, Any], bool] | None = None, /, **parts: Any) -> Any:
    """A copy of the tree with every part that is called by one of the names replaced.

    Args:
        tree: a state, however nested.
        filtering: ``filtering(path, part) -> bool``, which of the parts of that name are replaced; all by default.
        parts: ``name=value``; names as in :func:`get`, a dotted one written ``**{"adam.slots.mu": value}``. Where a
            tensor stood, a number becomes a tensor of its shape, dtype and device, and a tensor is
            converted to its dtype and device (a 0-dim one may become a batch, to ``vmap`` over); where a tree stood, a tree of
            that structure is wanted, of tensors or numbers.

    Raises:
        KeyError: nothing has that name.
        ValueError: the part is computed at each step (a scheduled hyperparameter), so what is put there would be lost;
            or the new part has another structure or shape than the old one.

    Example:
        >>> tx = optfn.inject_hyperparams(optfn.sgd)(lr=0.1)
        >>> state = set(tx.init(torch.ones(2)), lr=0.01)
        >>> get(state, "lr")
        tensor(0.0100, dtype=torch.float64)
    """
    used: dict[str, bool] = dict.fromkeys(parts, False)

    def convert(old: Any, value: Any, name: str) -> Any:
        if not isinstance(old, Tensor):
            return value
        if not isinstance(value, Tensor):
            return torch.full_like(old, value)
        if old.ndim and value.shape != old.shape:
            raise ValueError(f"the new {name!r} must have shape {tuple(old.shape)} where the old one has, got {tuple(value.shape)}")
        return value.to(dtype=old.dtype, device=old.device)

    def replace(old: Any, path: str, name: str, derived: bool) -> Any:
        if filtering is not None and not filtering(path, old):
            return old
        if derived:
            raise ValueError(f"{name!r} is computed at each step: a value set here would be lost; build the transformation with it")
        used[name] = True
        below = match(flatten(old)[1], parts[name], f"the new {name!r}", "the old one")
        return unflatten(flatten(old)[1], [convert(x, y, name) for x, y in zip(flatten(old)[0], below, strict=True)])

    new = _replaced(tree, "", False, parts, replace)
    for name, was_used in used.items():
        if not was_used:
            raise KeyError(_nothing_is(name, tree))
    return new


def map_params(f: Callable[..., Any], state: Any, params: Any, *rest: Any, other: Callable[[Any], Any] | None = None) -> Any:
    """Apply ``f`` to the parts of a state that are shaped like the parameters: moments, averages, accumulators.

    A part is shaped like the parameters if it has their tree structure and holds floating-point tensors, ``None`` or
    ``()`` (nothing kept for that leaf) at the leaves; where ``params`` is a bare tensor, if it is a tensor of its shape.

    Args:
        f: called with a leaf of such a part and the leaf of each tree in ``rest`` that stands for the same parameter.
        state: any nested state.
        params: the parameters, or any tree of their structure; only the structure and a bare tensor's shape are read.
        rest: trees of the structure of ``params``; a leaf of theirs may be None.
        other: called with every other leaf; by default they stay as they are.

    Example:
        >>> params = {"w": torch.ones(2)}
        >>> state = optfn.scale_by_adam().init(params)
        >>> map_params(lambda x: x.to(torch.bfloat16), state, params).slots.mu
        {'w': tensor([0., 0.], dtype=torch.bfloat16)}
    """
    if not callable(f) or callable(state):
        raise TypeError("map_params: call map_params(f, state, params), the function first and no transformation")
    likes: list[Any] = []
    spec = _Structure(params, likes)  # optree would write out the tensors of every part that does not fit
    others = [match(spec, tree, f"tree {i + 1} of rest", "params") for i, tree in enumerate(rest)]
    bare = likes[0].shape if spec.is_leaf() and isinstance(likes[0], Tensor) else None

    def shaped(node: Any) -> list[Any] | None:
        try:
            found: list[Any] = spec.flatten_up_to(node)
        except (ValueError, TypeError):
            return None
        tensors = [x for x in found if isinstance(x, Tensor)]
        if not tensors or not all(isinstance(x, Tensor) or x is None or x == () for x in found):
            return None
        fits = all((x.is_floating_point() or x.is_complex()) and (bare is None or x.shape == bare) for x in tensors)
        return found if fits else None

    def change(node: Any, found: list[Any] | None) -> Any:
        if found is None:
            return node if other is None or node is None else other(node)
        return unflatten(spec, [f(x, *y) if isinstance(x, Tensor) else x for x, *y in zip(found, *others, strict=True)])

    return _with_parts(state, False, shaped, change)


def _with_parts(node: Any, scalar: bool, shaped: Callable[[Any], list[Any] | None], change: Callable[..., Any]) -> Any:
    found = None if scalar else shaped(node)
    level = _children(node) if found is None else None
    if level is None:
        return change(node, found)
    # A hyperparameter may look like a parameter: betas, where the params are a tuple of two.
    scalars = (*getattr(type(node), "_scalars", ()), *getattr(type(node), "_derived", ()))
    pairs = zip(*level[:2], strict=True)
    return level[2]([_with_parts(child, scalar or key in scalars, shaped, change) for key, child in pairs])


def to_flat_dict(tree: Any) -> dict[str, Tensor]:
    """A state (or any tree) as ``{dotted path: tensor}``: what ``torch.save`` and safetensors store.

    The tensors are detached and contiguous and share memory with the tree's where those are contiguous.
    None leaves are left out; Python numbers become 0-dim tensors.

    Raises:
        TypeError: a leaf is neither a tensor, a number nor None.
        ValueError: two leaves have the same dotted path (``{"a.b": x, "a": {"b": y}}``).

    Example:
        >>> to_flat_dict(optfn.trace(0.9).init({"w": torch.ones(2)}))
        {'step': tensor([0]), 'slots.trace.w': tensor([0., 0.])}
    """
    flat: dict[str, Tensor] = {}
    for path, x in zip(paths(tree), flatten(tree)[0], strict=True):
        if x is None:
            continue
        if path in flat:
            raise ValueError(f"two leaves have the path {path!r}; rename one of them")
        if isinstance(x, bool | int | float):
            x = torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else None)
        if not isinstance(x, Tensor):
            raise TypeError(f"{path!r} must be a tensor, a number or None, got {type(x).__name__}")
        flat[path] = x.detach().contiguous()
    return flat


def from_flat_dict(flat: Mapping[str, Tensor], like: Any) -> Any:
    """The inverse of :func:`to_flat_dict`: the tensors of ``flat`` in the structure of ``like``.

    Nothing is taken before all of it has been checked. Where a tensor of ``like`` lies on several processes, the new one lies
    there as it does, whether ``flat`` has it whole on every process or distributed in any way; where one of ``like`` is plain, the
    new one is whole. All processes call this together, with the same keys.

    Args:
        flat: ``{dotted path: tensor}``, with exactly the leaves of ``like``.
        like: a state of the structure wanted, such as a fresh ``tx.init(params)``; its tensors give shapes,
            dtypes, devices and places (a ``meta`` tensor gives no device).

    Raises:
        KeyError: a leaf is missing from ``flat``, or ``flat`` has one that ``like`` lacks; all are listed.
        TypeError: an entry of ``flat`` is no tensor.
        ValueError: a shape or a dtype differs.

    Example:
        >>> tx = optfn.trace(0.9)
        >>> state = tx.init({"w": torch.ones(2)})
        >>> from_flat_dict(to_flat_dict(state), like=tx.init({"w": torch.zeros(2)}))
        LeafwiseState(step=tensor([0]), slots=TraceSlots(trace={'w': tensor([0., 0.])}))
    """
    given: Any = flat
    if not isinstance(given, Mapping):
        raise TypeError(f"from_flat_dict(flat, like): flat must be a dict, got {type(given).__name__}")
    found, spec = flatten(like)
    named = dict(zip(paths(like), found, strict=True))
    missing = [path for path, x in named.items() if x is not None and path not in flat]
    extra = [path for path in flat if named.get(path) is None]
    if missing or extra:
        said = [
            f"{what} {', '.join(repr(p) for p in some)}" for what, some in (("missing", missing), ("unexpected", extra)) if some
        ]
        raise KeyError(f"the flat dict does not fit: {'; '.join(said)}")

    for path, old in named.items():
        if old is not None:
            _check_fits(path, flat[path], old)
    return unflatten(spec, [None if old is None else _placed(flat[path], old) for path, old in named.items()])


def _check_fits(path: str, new: Any, old: Any) -> None:
    if not isinstance(new, Tensor):
        raise TypeError(f"{path!r} must be a tensor, got {type(new).__name__}")
    if isinstance(old, Tensor) and (new.shape != old.shape or new.dtype != old.dtype):
        wanted, given = (f"{x.dtype} of shape {tuple(x.shape)}" for x in (old, new))
        raise ValueError(f"{path!r} must be {wanted}, got {given}")


def _placed(new: Tensor, old: Any) -> Any:
    """A tensor as a leaf that was there: on its device and processes, or as a number."""
    if not isinstance(old, Tensor):
        return type(old)(whole(new).item())
    if not is_sharded(old):
        new = whole(new)
        return new if old.is_meta else new.to(old.device)
    sharded: Any = old
    device = sharded.device_mesh.device_type if sharded.is_meta else sharded.device
    if is_sharded(new):
        new = new if same_layout(new, old) else placed_as(new, old)
        return new.to(device)
    return cut(new, old, device)


def new_count(params: Any) -> Tensor:
    """A count at 0, as states keep it: a 0-dim int64 tensor on the device of the first leaf.

    Example:
        >>> new_count({"w": torch.ones(2)})
        tensor(0)
    """
    return torch.zeros((), dtype=torch.int64, device=next((p.device for p in leaves(params)), None))


def check_here(owner: str, params: Any, advice: str = "pass whole tensors") -> None:
    """Raise a TypeError if a leaf lies on several processes, for what takes no such leaves.

    Example:
        >>> check_here("flatten", {"w": torch.ones(2)})
    """
    for path, p in zip(paths(params), flatten(params)[0], strict=True):
        if is_sharded(p):
            raise TypeError(f"{owner}: {path!r} lies on several processes, which {owner} does not take: {advice}")


def checked(tree: Any, name: str) -> tuple[list[Any], Any]:
    """:func:`flatten`, and an error for what is no tree of tensors: a module, a generator, another leaf.

    Raises:
        TypeError: a leaf is neither a tensor nor None; a generator or a module stands in place of a tree.

    Example:
        >>> checked({"w": 1.0}, "params")
        Traceback (most recent call last):
        ...
        TypeError: params at 'w' must be a tensor or None, got float
    """
    found, spec = flatten(tree)
    try:
        check_leaves(found, spec, name)
    except TypeError as error:
        first: Any = tree[0] if isinstance(tree, list | tuple) and len(tree) else None
        if isinstance(first, dict) and "params" in first:
            groups = "these are groups of torch.optim: pass one tree, and choose leaves by optfn.partition or by masks"
            raise TypeError(f"{error}; {groups}") from None
        if isinstance(first, tuple) and len(first) == 2 and isinstance(first[0], str):
            raise TypeError(f"{error}; these are pairs: pass dict(...) of them") from None
        raise
    return found, spec


def check_leaves(found: list[Any], spec: Any, name: str) -> None:
    """Raise a TypeError if one of the leaves of a tree of structure ``spec`` is neither a tensor nor None, as :func:`checked`.

    Example:
        >>> check_leaves([torch.ones(1), None], flatten([0, 0])[1], "params")
    """
    for x in found:
        if x is None or isinstance(x, Tensor):
            continue
        place = next(i for i, y in enumerate(found) if y is x)
        where = name if spec.is_leaf() else f"{name} at {paths(unflatten(spec, [None] * len(found)))[place]!r}"
        if isinstance(x, torch.nn.Module):
            raise TypeError(f"{where} is a module: pass a tree of tensors, dict(module.named_parameters())")
        if inspect.isgenerator(x) or hasattr(x, "__next__"):
            raise TypeError(f"{where} is a generator: pass a tree of tensors, dict(module.named_parameters()) or list(...)")
        raise TypeError(f"{where} must be a tensor or None, got {type(x).__name__}")
