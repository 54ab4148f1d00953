"""A ``torch.optim.Optimizer`` over any transformation, for code that wants one."""

import inspect
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import refuse_torch
from optfn.compile import compile as compiled
from optfn.core import GradientTransformation, added
from optfn.interop.parts import Part, parts
from optfn.wrappers.hyperparams import inject_hyperparams

__all__ = ["TorchOptimizer"]

Factory = Callable[..., GradientTransformation]

PATTERNS = 8
"""For how many patterns of None gradients a group compiles its step; with any other it runs eagerly."""


class TorchOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` whose steps are those of a transformation: for schedulers, trainers, scalers and checkpoints.

    ``TorchOptimizer(model.parameters(), optfn.adamw, lr=1e-3)`` is used as :class:`torch.optim.AdamW` is. The numeric arguments of
    the factory (see :func:`inject_hyperparams`) are options of the groups: a group may have its own, and whatever changes
    ``optimizer.param_groups[i]["lr"]`` (every class of ``torch.optim.lr_scheduler``) changes the next step. The factory's other
    arguments (``amsgrad=True``) may differ between groups too, but stay as they are. Which are which can be said by giving
    ``optfn.inject_hyperparams(factory, static_args=...)`` for the factory.

    Every group is one tree with one state: the list of its parameters, or where the optimizer is made with
    ``model.named_parameters()`` a dict, so that masks and labels see the names. A global norm in a chain is that of a group.
    A parameter whose ``.grad`` is None sits the step out.

    **State.** ``optimizer.state[p]`` is a dict of tensors: the parts of the functional state that are the parameter's, by
    their dotted path (``"inner_state.1.slots.mu"``, its step count ``"inner_state.1.step"``), and those that no parameter owns
    (``"count"``), the same in all parameters of a group. It is there from the start. Hyperparameters are in the groups. What
    is put there by other code, a checkpoint or a trainer that moves it to a device, is what the next step uses. Loading keeps
    the dtypes that the state has here: torch would round float32 moments of half-precision parameters.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts of these with options: what every optimizer of torch takes.
        tx: a function that returns a transformation, such as :func:`adamw` or your own, or a transformation; of that only the
            hyperparameters that its state holds are options of groups.
        compile: whether to compile the step, with the parameters and the state donated, by :func:`optfn.compile`. The first
            step takes its time, and the first with other gradients None; after the eighth such pattern new ones run eagerly.
        backend: a backend of :func:`torch.compile`.
        options: arguments of the function, for the groups that have no others.

    Raises:
        TypeError: ``tx`` is neither; options for a transformation that is made already.
        ValueError: an option out of range; an empty list; a name that occurs twice in a group.

    ``step(closure=None, **extra)`` returns the closure's loss and hands it to the transformation as ``value``, and ``extra`` as
    it is. A functional state is in ``states``, one a group.

    Pickling and deep copies carry the factory along, so that must be a function that pickle finds by name.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> optimizer = TorchOptimizer(model.named_parameters(), optfn.adamw, lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1)).sum().backward()
        ...     optimizer.step()
        ...     scheduler.step()
        >>> optimizer.param_groups[0]["lr"], optfn.tree.get(optimizer.states[0], "step")
        (0.025, tensor([2, 2]))
    """

    def __init__(
        self,
        params: Any,
        tx: GradientTransformation | Factory,
        *,
        compile: bool = False,  # noqa: A002
        backend: str | Callable[..., Any] = "optfn",
        **options: Any,
    ) -> None:
        refuse_torch("TorchOptimizer", tx)
        given: Any = tx
        if not (isinstance(given, GradientTransformation) or callable(given)):
            raise TypeError(f"tx must be a transformation or a function that returns one, got {type(given).__name__}")
        if unknown := {*options} - {*_known(tx)}:
            raise TypeError(f"tx has no arguments {_listed(unknown)}; it has {_listed(_known(tx)) or 'none, being made already'}")
        self._source = tx
        self._backend = backend if compile else None
        # What a checkpoint can hold goes into the groups; functions (masks, schedules) do not.
        self._fixed = {name: x for name, x in options.items() if not _is_plain(x)}
        self._groups: list[_Group] = []
        super().__init__(params, {name: x for name, x in options.items() if name not in self._fixed})

    @property
    def states(self) -> list[Any]:
        """The functional state of each group, with the hyperparameters that its next step uses; () for one without parameters."""
        return [group.current(self.state, options) for group, options in self._aligned()]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with a state of its own, as :meth:`torch.optim.Optimizer.add_param_group` does."""
        own = {*param_group}
        super().add_param_group(param_group)
        try:
            group = self._make(param_group)
        except Exception:
            self.param_groups.pop()
            raise
        for name, value in group.initial.items():
            param_group.setdefault(name, value)
            default = _default(self._source, name) if name in own else value
            if default is not None:
                self.defaults.setdefault(name, default)
        self._groups.append(group)
        group.publish(self.state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:
        """Take one step: every parameter that has a gradient is changed in place.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss.
            extra: arguments for the transformation.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if isinstance(loss, Tensor | float | int):
                extra = {"value": torch.as_tensor(loss).detach(), **extra}
        for group, options in self._aligned():
            group.step(self.state, options, extra)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict()`` gave; a parameter that it has no state for gets a fresh one.

        Raises:
            KeyError: the state of a parameter has other parts than here.
            ValueError: the groups, or the shape of a part, differ. Nothing has been loaded then.
        """
        groups: list[_Group] = []

        def read(optimizer: Any, given: Any) -> None:
            saved = given["param_groups"]
            if [len(group["params"]) for group in saved] != [len(group["params"]) for group in self.param_groups]:
                return  # torch says so
            for old, new in zip(self.param_groups, saved, strict=True):
                group = self._make({**new, "params": old["params"], "param_names": old.get("param_names")})
                group.take(dict(zip(old["params"], (given["state"].get(key, {}) for key in new["params"]), strict=True)))
                groups.append(group)

        def install(optimizer: Any) -> None:
            # torch has cast everything to the dtype of the parameter; what was read has not been.
            for i, (group, options) in enumerate(zip(groups, self.param_groups, strict=True)):
                self._groups[i] = group.like(self._groups[i])
                for name, value in group.initial.items():
                    options.setdefault(name, value)
            self.state = defaultdict(dict)
            for group in self._groups:
                group.publish(self.state)

        first: Any = self.register_load_state_dict_pre_hook(read)  # type: ignore[arg-type]
        last = self.register_load_state_dict_post_hook(install, prepend=True)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            first.remove()
            last.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_source": self._source, "_backend": self._backend, "_fixed": self._fixed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_groups" not in self.__dict__:
            self._groups = [self._make(options) for options in self.param_groups]
            for group in self._groups:
                group.take(self.state)
                group.publish(self.state)

    def _make(self, options: dict[str, Any]) -> "_Group":
        return _Group(self._source, {**self._fixed, **options}, self._backend)

    def _aligned(self) -> list[tuple["_Group", dict[str, Any]]]:
        """Our side of each group; made again where other code has put other parameters into it."""
        for i, options in enumerate(self.param_groups):
            if not self._groups[i].has(options["params"]):
                self._groups[i] = self._make(options)
                self._groups[i].take(self.state)
                self._groups[i].publish(self.state)
        return list(zip(self._groups, self.param_groups, strict=True))


class _Group:
    """One group: its transformation, its functional state, and what of it is in ``optimizer.state``.

    The tensors of the state are the same from step to step, and are written in place, as torch's are.
    """

    def __init__(self, source: GradientTransformation | Factory, options: dict[str, Any], backend: Any) -> None:
        self.owners: list[Tensor] = list(options["params"])
        names = options.get("param_names")
        if names is not None and len({*names}) != len(names):
            raise ValueError(f"the names of a group's parameters must differ, got {', '.join(map(repr, names))}")
        self.params: Any = list(self.owners) if names is None else dict(zip(names, self.owners, strict=True))
        self.leaves, self.spec = tree.flatten(self.params)
        self.fixed = _arguments(source, options)
        self.tx, self.state = _prepared(source, self.fixed, self.params)
        self.flat, self.state_spec = tree.flatten(self.state)
        self.parts = parts(self.state, self.params) if self.owners else []
        self.hyperparams = self._hyperparams()
        self.initial = {name: _value(self.parts, self.flat, at) for name, at in self.hyperparams.items()}
        self.fixed = {name: x for name, x in self.fixed.items() if name not in self.hyperparams}
        self.written: dict[str, Any] = {}
        self.published: list[tuple[Tensor, list[Any]]] = []
        self.memory: set[int] = set()
        self.backend = backend
        self.compiled: dict[tuple[bool, ...], Callable[..., Any]] = {}

    def _hyperparams(self) -> dict[str, list[int]]:
        """The places of each hyperparameter by its name, by its path where several have that name."""
        found: dict[str, dict[str, list[int]]] = {}
        for j, part in enumerate(self.parts):
            if part.role == "hyperparam":
                path = f"{part.owner}.hyperparams.{part.name}".lstrip(".")
                found.setdefault(part.name, {}).setdefault(path, []).append(j)
        return {name if len(of) == 1 else path: at for name, of in found.items() for path, at in of.items()}

    def has(self, params: list[Tensor]) -> bool:
        return len(params) == len(self.owners) and all(map(operator.is_, params, self.owners))

    def like(self, old: "_Group") -> "_Group":
        """This state in a group that is built as the old one: there what is compiled can be used again."""
        if old.fixed != self.fixed or not old.has(self.owners) or old.state_spec != self.state_spec:
            return self
        old.state, old.flat, old.written = self.state, self.flat, {}
        return old

    def current(self, kept: Any, options: dict[str, Any]) -> Any:
        """The state, with what other code has put into ``optimizer.state`` and into the options."""
        if any(not _same(kept.get(p), values) for p, values in self.published):
            self.take(kept)
            self.publish(kept)
        for name, x in self.fixed.items():
            if name in options and options[name] is not x and options[name] != x:
                raise ValueError(
                    f"{name!r} has become {options[name]!r}, but it is no hyperparameter in the state: give it, other than its "
                    "default, when the group is made"
                )
        for name, at in self.hyperparams.items():
            value = options[name]
            if isinstance(value, Tensor) or self.written.get(name) != value:
                for j, x in zip(at, value if isinstance(value, tuple | list) else [value], strict=True):
                    self.flat[j].copy_(x) if isinstance(x, Tensor) else self.flat[j].fill_(x)
                self.written[name] = None if isinstance(value, Tensor) else value
        return self.state

    def step(self, kept: Any, options: dict[str, Any], extra: dict[str, Any]) -> None:
        if not self.owners:
            return
        state = self.current(kept, options)
        grads = [p.grad for p in self.leaves]
        pattern = tuple(g is not None for g in grads)
        if self.backend is not None and (pattern in self.compiled or len(self.compiled) < PATTERNS):
            if pattern not in self.compiled:
                self.compiled[pattern] = compiled(_step_of(self.tx), donate=("params", "state"), backend=self.backend)
            self.compiled[pattern](self.params, state, tree.unflatten(self.spec, grads), extra)
            return
        params, state = _step_of(self.tx)(self.params, state, tree.unflatten(self.spec, grads), extra)
        # A pure step may return what it was given: a gradient as a slot, one slot as another.
        new = [(old, self._apart(x, old)) for old, x in zip(self.flat, tree.flatten(state)[0], strict=True) if x is not old]
        new += [(p, x) for p, x in zip(self.leaves, tree.flatten(params)[0], strict=True) if x is not p]
        for old, x in new:
            old.copy_(x)

    def _apart(self, x: Tensor, old: Tensor) -> Tensor:
        """A new part of the state that is not about to be overwritten."""
        if x.shape != old.shape:
            raise ValueError(f"a part of the state has changed its shape, from {tuple(old.shape)} to {tuple(x.shape)}")
        return x.clone() if x.untyped_storage().data_ptr() in self.memory else x

    def pieces(self) -> list[tuple[str, int | None, Any]]:
        """Name, parameter (None for all) and value of what goes into ``optimizer.state``."""
        found: list[tuple[str, int | None, Any]] = []
        for part, x in zip(self.parts, self.flat, strict=True):
            if part.role == "steps":
                found.extend((part.path, i, count) for i, count in enumerate(x.unbind()))
            elif part.role != "hyperparam" and x is not None:
                found.append((part.path, part.leaf, x))
        return found

    def publish(self, kept: Any) -> None:
        """Put the parts of the state where torch looks for them."""
        of: list[dict[str, Any]] = [{} for _ in self.leaves]
        for name, i, x in self.pieces():
            for mine in of if i is None else [of[i]]:
                mine[name] = x
        for p, mine in zip(self.leaves, of, strict=True):
            there = kept.setdefault(p, {})
            there.clear()
            there.update(mine)
        self.memory = {x.untyped_storage().data_ptr() for x in (*self.leaves, *self.flat) if x is not None}
        self.published = [(p, list(mine.values())) for p, mine in zip(self.leaves, of, strict=True)]

    def take(self, kept: Mapping[Tensor, Any]) -> None:
        """The state with these parts; a parameter that has none gets fresh ones, and all are copied."""
        fresh = tree.flatten(self.tx.init(self.params))[0] if self.owners else []
        given = [kept.get(p) or {} for p in self.leaves]
        names: list[set[str]] = [set() for _ in self.leaves]
        for name, i, _ in self.pieces():
            for mine in names if i is None else [names[i]]:
                mine.add(name)
        for path, of, wanted in zip(tree.paths(self.params), given, names, strict=True):
            if of and {*of} != wanted:
                lacks, extra = wanted - {*of}, {*of} - wanted
                said = [f"{what} {_listed(x)}" for what, x in (("missing", lacks), ("unexpected", extra)) if x]
                raise KeyError(f"the state of parameter {path!r} does not fit: {'; '.join(said)}")

        def choose(part: Part, like: Any) -> Any:
            if like is None or part.role == "hyperparam":
                return like
            if part.role == "steps":
                return torch.stack([torch.as_tensor(of.get(part.path, 0)).to(like) for of in given]).reshape(like.shape)
            found = next((of[part.path] for of in (given if part.leaf is None else [given[part.leaf]]) if of), like)
            if not isinstance(found, Tensor) or found.shape != like.shape:
                shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                whose = "" if part.leaf is None else f" of parameter {tree.paths(self.params)[part.leaf]!r}"
                raise ValueError(f"{part.path!r}{whose} must have shape {tuple(like.shape)}, got {shape}")
            return torch.empty_like(like).copy_(found)

        self.flat = [choose(part, like) for part, like in zip(self.parts, fresh, strict=True)]
        self.state = tree.unflatten(self.state_spec, self.flat)
        self.written = {}


def _step_of(tx: GradientTransformation) -> Callable[..., Any]:
    def step(params: Any, state: Any, grads: Any, extra: dict[str, Any]) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, **extra)
        return added(params, updates)[0], state  # a group without gradients is no mistake

    return step


def _prepared(
    source: GradientTransformation | Factory, arguments: dict[str, Any], params: Any
) -> tuple[GradientTransformation, Any]:
    """The transformation, with its hyperparameters in the state if it comes from a function, and its first state."""
    made = source if isinstance(source, GradientTransformation) else source(**arguments)
    if not tree.flatten(params)[0]:
        return made, ()
    with torch.no_grad():
        state = made.init(params)
        if not isinstance(source, GradientTransformation) and all(x.role != "hyperparam" for x in parts(state, params)):
            made = inject_hyperparams(source)(**arguments)
            state = made.init(params)
    return made, state


def _arguments(source: GradientTransformation | Factory, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of a group that are arguments of its factory."""
    return {name: x for name, x in options.items() if name in _known(source)}


def _known(source: GradientTransformation | Factory) -> Mapping[str, inspect.Parameter]:
    return {} if isinstance(source, GradientTransformation) else inspect.signature(source).parameters


def _default(source: GradientTransformation | Factory, name: str) -> Any:
    parameter = _known(source).get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _value(places: list[Part], flat: list[Tensor], at: list[int]) -> Any:
    """A hyperparameter as the number that torch has in a group, a tuple for betas."""
    values = tuple(flat[j].item() for j in at)
    return values if places[at[0]].path.rsplit(".", 1)[-1].isdigit() else values[0]


def _same(kept: Any, values: list[Any]) -> bool:
    return kept is not None and len(kept) == len(values) and all(map(operator.is_, kept.values(), values))


def _is_plain(x: Any) -> bool:
    return x is None or isinstance(x, bool | int | float | str | Tensor) or (isinstance(x, tuple | list) and all(map(_is_plain, x)))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))
