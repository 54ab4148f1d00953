"""The state of a running ``torch.optim`` optimizer as a functional one, and back."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.core import GradientTransformation, check_transformation
from optfn.interop.parts import Part, in_order, parts
from optfn.interop.torch_lbfgs import LBFGS_NAMES, lbfgs_from_torch, lbfgs_to_torch
from optfn.optimizers.lbfgs import LbfgsState
from optfn.sharding import copied_as, whole

__all__ = ["is_torch_state", "load_torch_state", "to_torch_state_dict"]


class Slots(NamedTuple):
    """What torch calls the slots of a rule.

    Attributes:
        names: field to name in torch's state.
        counted: whether torch counts the rule's steps.
        eager: whether torch makes its state with the optimizer, not with the first gradient.
    """

    names: Mapping[str, str]
    counted: bool = True
    eager: bool = False


TABLE: dict[str, Slots] = {
    "TraceSlots": Slots({"trace": "momentum_buffer"}, counted=False),
    "AdamSlots": Slots({"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}),
    "AdagradSlots": Slots({"sum": "sum"}, eager=True),
    "RmsSlots": Slots({"nu": "square_avg", "mu": "grad_avg"}),
    "AdadeltaSlots": Slots({"e_g": "square_avg", "e_x": "acc_delta"}),
    "AdamaxSlots": Slots({"mu": "exp_avg", "nu": "exp_inf"}),
    "NAdamSlots": Slots({"mu": "exp_avg", "nu": "exp_avg_sq", "mu_product": "mu_product"}),
    "RAdamSlots": Slots({"mu": "exp_avg", "nu": "exp_avg_sq"}),
    "RpropSlots": Slots({"prev": "prev", "step_size": "step_size"}),
    "AsgdSlots": Slots({"ax": "ax", "eta": "eta", "mu": "mu"}),
    "FactoredSlots": Slots({"v_row": "row_var", "v_col": "col_var", "v": "variance"}),
    "MuonSlots": Slots({"mu": "momentum_buffer"}, counted=False),
}
"""By the name of the slots' NamedTuple. A field that is not named here is called in torch what it is called here."""


def is_torch_state(states: Iterable[Mapping[str, Any]], own: Iterable[str]) -> bool:
    """Whether an optimizer of torch has kept this of each parameter; ``own`` are the names that would be expected otherwise."""
    names = {name for of in states for name in of}
    known = {"step", *LBFGS_NAMES, *(name for slots in TABLE.values() for name in slots.names.values())}
    return bool(names) and names <= known and names != {*own}


class _Torch(NamedTuple):
    """A state dict, in the order of our leaves: what torch keeps of each parameter, the options of its group; and torch's order."""

    kept: list[dict[str, Any]]
    options: list[Mapping[str, Any]]
    order: list[int]


def load_torch_state(
    tx: GradientTransformation, params: Any, optimizer_state_dict: Mapping[str, Any], *, step: int | None = None
) -> Any:
    """The state of a running optimizer of ``torch.optim``, for a transformation that goes on where it stopped.

    Parameters are matched by name where the state dict has names (``param_names``, which torch writes for an optimizer of
    ``named_parameters()``; the names of :mod:`torch.distributed.checkpoint`, flattened or not) and ``params`` has these paths;
    else by order: that of the optimizer's groups, one after the other, and that in which ``params`` was built.

    What is taken: moments and buffers; step counts; for the counts of schedules the largest of the step counts; the values of
    a group (``lr``, ``betas``, ...) for hyperparameters of these names that ``tx`` keeps in its state (:func:`inject_hyperparams`).
    A parameter for which torch has no state yet, having had no gradient, gets fresh slots. The state of LBFGS is taken for the
    one :func:`lbfgs` that ``tx`` has.

    Parameters may lie on several processes, as those of ``fully_shard`` do. Then the state lies as they do, whether the state dict
    has such tensors or whole ones.

    Args:
        tx: the transformation, with the options that the optimizer has.
        params: the parameters, as the optimizer left them.
        optimizer_state_dict: what ``optimizer.state_dict()`` or ``get_optimizer_state_dict`` gave.
        step: the steps that the optimizer has taken, where it does not count them (SGD, Muon) and ``tx`` has a schedule, or where
            every parameter has missed some.

    Returns:
        A state of the structure of ``tx.init(params)``, which shares no memory with the state dict. What schedules gave last
        (``optfn.tree.get(state, "lr")``) is only known after the next update.

    Raises:
        ValueError: the number of parameters, a shape, or what is kept of a parameter differs; the message names it.
        KeyError: the state dict has names, and ``params`` has only some of them.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.Adam([p], lr=0.1)
        >>> p.grad = torch.ones(1)
        >>> optimizer.step()
        >>> state = load_torch_state(optfn.adam(lr=0.1), [p.detach()], optimizer.state_dict())
        >>> optfn.tree.get(state, "step"), optfn.tree.get(state, "mu")
        (tensor([1]), [tensor([0.1000])])
    """
    check_transformation(tx, "load_torch_state", "load_torch_state(tx, params, optimizer.state_dict())")
    given: Any = optimizer_state_dict
    if isinstance(given, torch.optim.Optimizer):
        raise TypeError("load_torch_state takes a state dict, got the optimizer: write optimizer.state_dict()")
    given = _read(optimizer_state_dict, params)
    state = tx.init(params)
    leaves, spec = tree.flatten(state)
    if (search := _search(state)) is not None:
        kept_by_first = next(filter(None, given.kept), {})
        found = lbfgs_from_torch(search, params, given.order, kept_by_first)
        leaves = [next((new for old, new in zip(search, found, strict=True) if old is x), x) for x in leaves]
        step = kept_by_first.get("n_iter", 0) if step is None else step
        given = given._replace(kept=[{} for _ in given.kept])
    places = parts(state, params)
    names = [f"{path!r}" if path else "the tensor" for path in tree.paths(params)]
    used: list[dict[str, str]] = [{} for _ in names]
    touched: dict[str, set[int]] = {}
    new = list(leaves)
    slotted = {part.owner for part in places if part.role == "slot"}

    for j, part in enumerate(places):
        if part.role != "slot" or part.leaf is None or not given.kept[part.leaf]:
            continue
        i, name = part.leaf, _torch_name(part)
        if name not in given.kept[i]:
            if part.kind in TABLE:
                raise ValueError(
                    f"torch's state of {names[i]} has no {name!r} for {part.path!r}, it has {_listed(given.kept[i])}: "
                    "the transformation needs the options of the optimizer"
                )
            continue
        if name in used[i]:
            raise ValueError(f"torch's {name!r} of {names[i]} has two places here, {used[i][name]!r} and {part.path!r}")
        new[j] = _taken(given.kept[i][name], leaves[j], f"{name!r} of {names[i]}")
        used[i][name] = part.path
        touched.setdefault(part.owner, set()).add(i)
    for i, kept in enumerate(given.kept):
        if unknown := {*kept} - {*used[i], "step"}:
            raise ValueError(f"torch's state of {names[i]} has {_listed(unknown)}, for which the transformation has no place")

    counts = [_count(kept, step) for kept in given.kept]
    most = step if step is not None else max(int(whole(kept.get("step", 0))) for kept in given.kept)
    counted = step is not None or any("step" in kept for kept in given.kept)
    scheduled = {part.owner for part in places if part.role == "derived"}
    for j, part in enumerate(places):
        if part.role == "steps":
            mine = touched.get(part.owner, set()) if part.owner in slotted else range(len(names))  # a rule may count, and no more
            new[j] = leaves[j].new_tensor([counts[i] if i in mine else 0 for i in range(len(names))])
        elif part.role == "count":
            if not counted and part.owner in scheduled:
                raise ValueError(f"torch's state has no step count for {part.path!r}: give load_torch_state(..., step=...)")
            new[j] = torch.full_like(leaves[j], most)
        elif part.role == "hyperparam":
            value = _group_value(part, given.options, _covered(part, places) or {*in_order(params)})
            if value is not None:
                new[j] = torch.full_like(leaves[j], float(value))
    return tree.unflatten(spec, new)


def to_torch_state_dict(
    tx: GradientTransformation, state: Any, params: Any, optimizer: torch.optim.Optimizer | Mapping[str, Any]
) -> dict[str, Any]:
    """A functional state as the state dict of an optimizer of ``torch.optim``, which its ``load_state_dict`` takes.

    The inverse of :func:`load_torch_state`. A parameter that has taken no step has no state, as in torch.

    Args:
        tx: the transformation.
        state: its state.
        params: the parameters.
        optimizer: the optimizer to load into, or its state dict, or what ``get_optimizer_state_dict`` gave, flattened or not: it
            gives the groups and their options, and the result has its form. Parameters are matched as in
            :func:`load_torch_state`. Hyperparameters that the state holds (:func:`inject_hyperparams`) replace the groups'.

    Raises:
        ValueError: the number of parameters differs; ``state`` is not one of ``tx`` for these parameters, or holds
            slots for which torch has no name.

    Example:
        >>> params = {"w": torch.ones(1)}
        >>> tx = optfn.adam(lr=0.1)
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
        >>> p = torch.nn.Parameter(optfn.apply_updates(params, updates)["w"])
        >>> optimizer = torch.optim.Adam([p], lr=0.1)
        >>> optimizer.load_state_dict(to_torch_state_dict(tx, state, params, optimizer))
        >>> optimizer.state[p]["exp_avg"], optimizer.state[p]["step"]
        (tensor([0.1000]), tensor(1.))
    """
    like = optimizer.state_dict() if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    flattened = "param_groups" not in like
    if flattened:
        like = _nested(like, params)
    owners = _owners(like["param_groups"], params)
    tree.match(tree.flatten(tx.init(params))[1], state, "the state", "tx.init(params)")
    leaves, places = tree.flatten(state)[0], parts(state, params)
    steps = {part.owner: x.tolist() for part, x in zip(places, leaves, strict=True) if part.role == "steps"}
    options = [dict(group) for group in like["param_groups"]]
    kept: dict[Any, dict[str, Any]] = {}
    if (search := _search(state)) is not None and search.n_iter:
        kept[next(iter(owners.values()))[0]] = lbfgs_to_torch(search, params, list(owners))
    for part, x in zip(places, leaves, strict=True):
        if part.role != "slot" or part.leaf is None:
            continue
        slots = TABLE.get(part.kind, Slots({}))
        (key, n), count = owners[part.leaf], steps[part.owner][part.leaf]
        if count == 0 and not slots.eager:
            continue
        of, name = kept.setdefault(key, {}), _torch_name(part)
        if name in of:
            raise ValueError(f"{part.path!r} of {tree.paths(params)[part.leaf]!r} is torch's {name!r}, but so is another slot")
        if slots.counted:
            count = max(count, int(of.get("step", 0)))
            of["step"] = torch.tensor(float(count)) if "foreach" in options[n] else count  # SparseAdam counts in a Python number
        of[name] = x.detach().clone()
    for part, x in zip(places, leaves, strict=True):
        if part.role == "hyperparam":
            for n in {owners[i][1] for i in _covered(part, places) or owners}:
                if part.name in options[n]:
                    _put(options[n], part, x.item())
    ordered = {key: kept[key] for key, _ in owners.values() if key in kept}
    return _flattened(ordered, options) if flattened else {"state": ordered, "param_groups": options}


def _search(state: Any) -> LbfgsState | None:
    """The state of L-BFGS in this one, if it is there once."""
    found = [node for node in tree.subtrees(state) if isinstance(node, LbfgsState)]
    return found[0] if len(found) == 1 else None


def _torch_name(part: Part) -> str:
    field = part.path.rsplit(".", 1)[-1]
    return TABLE[part.kind].names.get(field, field) if part.kind in TABLE else field


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "nothing"


def _taken(x: Any, like: Tensor, what: str) -> Tensor:
    if not isinstance(x, Tensor):
        x = torch.as_tensor(x)
    if x.layout != torch.strided:  # the momentum of a sparse gradient
        x = x.to_dense()
    if x.shape != like.shape:
        raise ValueError(f"torch's {what} must have shape {tuple(like.shape)}, got {tuple(x.shape)}")
    return copied_as(x.detach(), like)


def _count(kept: Mapping[str, Any], step: int | None) -> int:
    """The steps of one parameter; where torch does not count them any number above 0 says that there was a first one."""
    if not kept:
        return 0
    return int(whole(kept["step"])) if "step" in kept else max(step or 1, 1)


def _covered(part: Part, places: list[Part]) -> set[int]:
    """The parameters whose slots are inside of the state that owns a hyperparameter; none where it has no slots."""
    inside = f"{part.owner}." if part.owner else ""
    return {p.leaf for p in places if p.role == "slot" and p.leaf is not None and p.path.startswith(inside)}


def _group_value(part: Part, options: list[Mapping[str, Any]], mine: set[int]) -> Any:
    """What the groups of some parameters have for a hyperparameter, or for one entry of it; None if they do not have it."""
    tail = part.path.rsplit(".", 1)[-1]
    values: list[Any] = []
    for i in sorted(mine):
        value = options[i].get(part.name)
        if isinstance(value, tuple | list):
            value = value[int(tail)] if tail.isdigit() and int(tail) < len(value) else None
        if value is None:
            return None
        values.append(value)
    if any(float(value) != float(values[0]) for value in values):
        raise ValueError(
            f"the groups have several values for {part.path!r}, {', '.join(map(str, dict.fromkeys(map(float, values))))}: "
            "use optfn.partition, with a transformation for each group"
        )
    return values[0]


def _put(group: dict[str, Any], part: Part, value: Any) -> None:
    old, tail = group[part.name], part.path.rsplit(".", 1)[-1]
    if isinstance(old, tuple | list):
        group[part.name] = tuple(value if tail == str(k) else x for k, x in enumerate(old))
    else:
        group[part.name] = torch.full_like(old, value) if isinstance(old, Tensor) else value


def _owners(groups: list[Mapping[str, Any]], params: Any) -> dict[int, tuple[Any, int]]:
    """For each of our leaves torch's key of the parameter and the number of its group, in torch's order."""
    order, paths = in_order(params), tree.paths(params)
    keys: dict[Any, tuple[int, Any]] = {}
    for n, group in enumerate(groups):
        names = group.get("param_names") or [None] * len(group["params"])
        keys.update({key: (n, key if isinstance(key, str) else name) for key, name in zip(group["params"], names, strict=True)})
    if len(keys) != len(order):
        raise ValueError(f"torch's optimizer has {len(keys)} parameters, params has {len(order)}")
    if all(isinstance(name, str) for _, name in keys.values()):
        own = {paths[i]: i for i in order}
        theirs = {name for _, name in keys.values()}
        if theirs == {*own}:
            return {own[name]: (key, n) for key, (n, name) in keys.items()}
        if theirs & {*own} or all(isinstance(key, str) for key in keys):
            raise KeyError(f"only torch's optimizer has {_listed(theirs - {*own})}; only params has {_listed({*own} - theirs)}")
    return {i: (key, n) for i, (key, (n, _)) in zip(order, keys.items(), strict=True)}


def _read(state_dict: Mapping[str, Any], params: Any) -> _Torch:
    if "state" not in state_dict or "param_groups" not in state_dict:
        state_dict = _nested(state_dict, params)
    groups = state_dict["param_groups"]
    owners = _owners(groups, params)
    if unknown := {*state_dict["state"]} - {key for key, _ in owners.values()}:
        raise ValueError(f"the state dict has state for {', '.join(map(repr, unknown))}, which no group has")
    count = len(tree.paths(params))
    kept: list[dict[str, Any]] = [{} for _ in range(count)]
    options: list[Mapping[str, Any]] = [{} for _ in range(count)]
    for i, (key, n) in owners.items():
        kept[i] = {name: x for name, x in state_dict["state"].get(key, {}).items() if x is not None}
        options[i] = groups[n]
    return _Torch(kept, options, list(owners))


def _nested(flat: Mapping[str, Any], params: Any) -> dict[str, Any]:
    """The state dict that torch.distributed.checkpoint has flattened to ``state.<parameter>.<name>``, and options likewise."""
    paths = sorted((tree.paths(params)[i] for i in in_order(params)), key=len, reverse=True)
    state: dict[str, dict[str, Any]] = {path: {} for path in paths}
    groups: dict[str, dict[str, Any]] = {path: {} for path in paths}
    for key, x in flat.items():
        kind, _, rest = key.partition(".")
        path = next((path for path in paths if rest.startswith(f"{path}.")), None)
        if kind not in ("state", "param_groups") or path is None:
            raise KeyError(f"{key!r} is neither 'state.' nor 'param_groups.' and the path of a parameter: {_listed(paths)}")
        (state if kind == "state" else groups)[path][rest[len(path) + 1 :]] = x
    if missing := [path for path, group in groups.items() if not group]:
        raise KeyError(f"the state dict has no group for {_listed(missing)}")
    return {"state": state, "param_groups": [{**group, "params": [path], "param_names": [path]} for path, group in groups.items()]}


def _flattened(state: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The inverse of :func:`_nested`: each of the groups has one parameter."""
    flat = {f"state.{key}.{name}": x for key, kept in state.items() for name, x in kept.items()}
    for group in groups:
        options = {name: x for name, x in group.items() if name not in ("params", "param_names")}
        flat.update({f"param_groups.{group['params'][0]}.{name}": x for name, x in options.items()})
    return flat
