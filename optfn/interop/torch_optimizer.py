"""A ``torch.optim.Optimizer`` over any transformation, for code that wants one."""

import functools
import inspect
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import is_zero, refuse_torch
from optfn.compile import compile as compiled
from optfn.compile.donation import check_memory
from optfn.core import GradientTransformation, added
from optfn.interop.parts import Part, parts
from optfn.interop.torch_state import is_torch_state, load_torch_state
from optfn.minimize import descend
from optfn.optimizers.lbfgs import LbfgsState
from optfn.sharding import copied_as, local, placed_as, same_layout
from optfn.wrappers.hyperparams import inject_hyperparams

__all__ = ["TorchOptimizer"]

Factory = Callable[..., GradientTransformation]

PATTERNS = 8
"""For how many patterns of None gradients a group compiles its step; with any other it runs eagerly."""

HOW = frozenset({"foreach", "fused", "capturable"})
"""Options of torch's groups that say how a step is computed, which means nothing here."""

LOOP = ("max_iter", "max_eval")
"""Options of a group that L-BFGS trains."""

WITHHELD = (
    "torch.distributed runs on several processes, so the loss of the closure, one process's own, was not handed on as `value`: "
    "say TorchOptimizer(..., process_group=torch.distributed.group.WORLD) to average it, or process_group='self' where each "
    "process trains parameters of its own"
)


class TorchOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` whose steps are those of a transformation: for schedulers, trainers, scalers and checkpoints.

    ``TorchOptimizer(model.parameters(), optfn.adamw, lr=1e-3)`` is used as :class:`torch.optim.AdamW` is. Every group is one tree
    with one state: the list of its parameters, or where the optimizer is made with ``model.named_parameters()`` a dict, so that
    masks and labels see the names. A global norm in a chain is that of a group. A parameter whose ``.grad`` is None sits the step
    out.

    **Options.** A group has every argument of the factory as an option, with its default where none is given; functions (a
    mask, a schedule) stay out of it, as a checkpoint cannot hold them. Whatever is changed in
    ``optimizer.param_groups[i]``, by a class of ``torch.optim.lr_scheduler`` or by hand, acts at the next step. A number
    that is in the functional state (see :func:`inject_hyperparams`) is written there. With any other change, one of
    ``amsgrad``, or of ``momentum`` from or to its default of 0, the transformation of the group is made anew. It goes on with the
    state that it finds: a slot that is new begins fresh, one that is no longer used is kept for when it is used again (not in
    checkpoints). If that cannot be, since what has begun has another shape or dtype or another beginning under the new option, the
    step raises an error and nothing has changed. What only says how a state begins (``initial_accumulator_value``) acts where one
    begins. The factory's own errors come at the next step too. An option of a class of
    torch that the factory has no argument for is an error (``foreach``, ``fused`` and ``capturable`` mean nothing here); any other
    name is a note of the user's, as in torch.

    Of a transformation that is made already the options are the hyperparameters that its state holds. A chain without them has
    no ``lr`` for a scheduler: give a function, ``lambda lr: optfn.chain(optfn.clip(1.0), optfn.adamw(lr))``, and ``lr=``.

    **State.** ``optimizer.state[p]`` is a dict of tensors: the parts of the functional state that are the parameter's, by
    their dotted path (``"inner_state.1.slots.mu"``, its step count ``"inner_state.1.step"``), and those that no parameter owns
    (``"count"``), the same in all parameters of a group. It is there from the start. Hyperparameters are in the groups. What
    is put there by other code, a checkpoint or a trainer that moves it to a device, is what the next step uses. Loading keeps
    the dtypes that the state has here: torch would round float32 moments of half-precision parameters. A functional state is in
    ``states``, one a group; one that is put there (``optimizer.states[0] = state``) is copied.

    **Closures.** ``step(closure=None, **extra)`` returns the closure's loss and hands it to the transformation as ``value``, and
    ``extra`` as it is. For :func:`lbfgs` a step with a closure is that of :class:`torch.optim.LBFGS`: up to ``max_iter``
    iterations, 20 if the group has no other number, and ``max_eval`` evaluations, by default ``max_iter * 5 // 4``.

    **Several processes.** Where :mod:`torch.distributed` runs on more than one, a loss is one process's own, and parameters that
    are meant to be equal would part if each process followed its own (:func:`reduce_on_plateau`, a line search). So there
    ``value`` is averaged over ``process_group``. If that is not given, the loss of a closure is not handed on, and a ``value``
    that is given to ``step``, or a closure for L-BFGS, is an error. Nothing is communicated in a step without ``value``.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or dicts of these with options: what every optimizer of torch takes.
        tx: a function that returns a transformation, such as :func:`adamw` or your own, or a transformation.
        compile: whether to compile the step, with the parameters and the state donated, by :func:`optfn.compile`. The first
            step takes its time, and the first with other gradients None; after the eighth such pattern new ones run eagerly. It is
            worth that in a long run with many parameters or small ones, where an eager step, a loop over the parameters as torch's
            is, takes a visible part of the time (for 100 small ones 1.5 times as long as torch's Adam, compiled an eighth).
        backend: a backend of :func:`torch.compile`.
        process_group: the processes that train the same parameters (``torch.distributed.group.WORLD`` under
            ``DistributedDataParallel``), or ``"self"`` where each trains its own.
        options: arguments of the function, for the groups that have no others.

    Raises:
        TypeError: ``tx`` is neither; options that the function has no argument for.
        ValueError: an option out of range; an empty list; a name that occurs twice in a group; a hyperparameter in the state that
            differs from the argument of its name.

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
        process_group: Any = None,
        **options: Any,
    ) -> None:
        refuse_torch("TorchOptimizer", tx)
        given: Any = tx
        if not (isinstance(given, GradientTransformation) or callable(given)):
            raise TypeError(f"tx must be a transformation or a function that returns one, got {type(given).__name__}")
        if unknown := {*options} - {*_known(tx)} - {*LOOP}:
            raise TypeError(f"tx has no arguments {_listed(unknown)}; it has {_listed(_known(tx)) or 'none, being made already'}")
        self._source = tx
        self._backend = backend if compile else None
        self._process_group = process_group
        # What a checkpoint can hold goes into the groups; functions (masks, schedules) do not.
        self._fixed = {name: x for name, x in options.items() if not _is_plain(x)}
        self._groups: list[_Group] = []
        super().__init__(params, {name: x for name, x in options.items() if name not in self._fixed})

    @property
    def states(self) -> "_States":
        """The functional state of each group, with the hyperparameters that its next step uses; () for one without parameters.

        ``states[i] = state`` copies a state into the optimizer, and its hyperparameters into the options of the group.
        """
        return _States(self, [group.state for group, _ in self._aligned()])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with a state of its own, as :meth:`torch.optim.Optimizer.add_param_group` does."""
        own = {*param_group}
        super().add_param_group(param_group)
        try:
            group = self._make(param_group)
        except Exception:
            self.param_groups.pop()
            raise
        for name, value in group.shown.items():
            param_group.setdefault(name, value)
            default = _default(self._source, name) if name in own else value
            if default is not None or name not in own:
                self.defaults.setdefault(name, default)
        self.param_groups[-1] = _telling(param_group)
        self._groups.append(group)
        group.publish(self.state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:
        """Take one step: every parameter that has a gradient is changed in place.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward`` and returns the loss.
            extra: arguments for the transformation.

        Returns:
            What the closure returned; for L-BFGS at the first of its calls.

        Raises:
            ValueError: an option that has been changed to what cannot be; ``value`` on several processes without a
                ``process_group``; L-BFGS with several groups.
        """
        groups = self._aligned()
        if any(group.searches and (closure is not None or options.get("line_search_fn")) for group, options in groups):
            return self._minimize(groups, closure, extra)
        loss, withheld = None, False
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            groups = self._aligned()
            if isinstance(loss, Tensor | float | int):
                withheld = self._process_group is None and _on_several()
                extra = extra if withheld else {"value": torch.as_tensor(loss).detach(), **extra}
        if "value" in extra:
            extra["value"] = self._shared(extra["value"])
        try:
            for group, _ in groups:
                group.step(extra)
        except TypeError as error:
            if withheld:
                error.add_note(WITHHELD)
            raise
        return loss

    def _minimize(self, groups: list[tuple["_Group", dict[str, Any]]], closure: Any, extra: dict[str, Any]) -> Any:
        """A step of L-BFGS: as many evaluations and iterations as the options of the group say."""
        if closure is None:
            raise ValueError("L-BFGS with a line search evaluates the loss at several points: call step(closure)")
        if len(groups) > 1:
            raise ValueError("L-BFGS takes all parameters as one vector, so one group is all it can have")
        (group, options), losses = groups[0], list[Any]()

        def evaluate(params: Any) -> tuple[Tensor, Any]:
            with torch.no_grad():
                group.put(params)
            loss = closure()
            losses.append(loss)
            return self._shared(torch.as_tensor(loss).detach().clone().reshape(())), group.gradients(Tensor.clone)

        limits = _loop(options)
        result = descend(
            evaluate,
            tree.map(Tensor.clone, group.params),
            group.tx,
            group.state,
            extra,
            max_steps=limits["max_iter"],
            max_evals=limits["max_eval"],
            tolerance_grad=float(options.get("tolerance_grad", 1e-7)),
            tolerance_change=float(options.get("tolerance_change", 1e-9)),
            evaluate_last=False,
        )
        group.put(result.params)
        group.store(result.state)
        return losses[0]

    def _shared(self, value: Any) -> Any:
        """The mean of a value over the processes that train the same parameters."""
        if self._process_group == "self" or not _on_several():
            return value
        if self._process_group is None:
            raise ValueError(WITHHELD.replace("was not handed on as `value`", "is no `value` for all"))
        first = next(p for group in self.param_groups for p in group["params"])
        mean = torch.as_tensor(value).detach().to(first.device, copy=True)
        torch.distributed.all_reduce(mean, group=self._process_group)
        return mean / torch.distributed.get_world_size(self._process_group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict()`` gave, here or of an optimizer of ``torch.optim``; a parameter without state gets a fresh one.

        The options of the saved groups become those of the groups here. The state of an optimizer of torch is taken as
        :func:`load_torch_state` takes it, group by group: what the factory has no argument for must be as the factory has it.

        Raises:
            KeyError: the state of a parameter has other parts than here.
            ValueError: the groups, or the shape of a part, differ; torch's state is that of another algorithm. Nothing has
                been loaded then.
        """
        groups: list[_Group] = []

        def read(optimizer: Any, given: Any) -> None:
            saved = given["param_groups"]
            if [len(group["params"]) for group in saved] != [len(group["params"]) for group in self.param_groups]:
                return  # torch says so
            for old, new in zip(self.param_groups, saved, strict=True):
                options = {name: x for name, x in new.items() if name in _known(self._source) or name not in _torch_options()}
                group = self._make({**options, "params": old["params"], "param_names": old.get("param_names")})
                group.load([given["state"].get(key, {}) for key in new["params"]], new)
                groups.append(group)

        def install(optimizer: Any) -> None:
            # torch has cast everything to the dtype of the parameter; what was read has not been.
            for i, (group, options) in enumerate(zip(groups, self.param_groups, strict=True)):
                self._groups[i] = group.like(self._groups[i])
                for name in (_torch_options() | HOW) - {*group.shown, *_known(self._source)}:
                    options.pop(name, None)
                for name, value in group.shown.items():
                    options.setdefault(name, value)
                self.param_groups[i] = _telling(options)
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
        # A process group is no value that could be written down.
        own = self._process_group if isinstance(self._process_group, str) else None
        mine = {"_source": self._source, "_backend": self._backend, "_fixed": self._fixed, "_process_group": own}
        return {**super().__getstate__(), **mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_groups" not in self.__dict__:
            self._groups = [self._make(options) for options in self.param_groups]
            for group in self._groups:
                group.take(self.state)
                group.publish(self.state)

    def _make(self, options: Mapping[str, Any]) -> "_Group":
        return _Group(self._source, {**self._fixed, **options}, self._backend)

    def _aligned(self) -> list[tuple["_Group", dict[str, Any]]]:
        """Our side of each group, with what other code has put into the group and into ``optimizer.state``.

        Made again where the group has other parameters than before, or options with which its transformation is another one.
        """
        # Groups may have been put in, taken away, moved, or given other parameters by hand.
        groups: list[_Group] = []
        for i, options in enumerate(self.param_groups):
            candidates = [*self._groups[i : i + 1], *self._groups]
            known = next((group for group in candidates if group.has(options["params"])), None)
            group = known or self._make(options)
            if not known or group.replaced(self.state):
                group.take(self.state)
                group.publish(self.state)
            if changed := group.outdated(options):
                new = self._make(options)
                new.inherit(group, changed)
                new.publish(self.state)
                group = new
            group.set_hyperparams(options)
            groups.append(group)
        self._groups = groups
        return list(zip(self._groups, self.param_groups, strict=True))


def _check_apart(params: list[Tensor]) -> None:
    """Raise where two parameters of a group share memory: they would be written one after the other, from the same old numbers."""
    dense = [p for p in params if type(p) in (Tensor, torch.nn.Parameter) and p.layout == torch.strided and not p.is_meta]
    try:
        check_memory({"params": dense}, {"params"})
    except ValueError as error:
        said = str(error).removeprefix("donate: ").split(":")[0]
        raise ValueError(f"{said}: give each tensor once, as module.parameters() does") from None


class _States(Sequence[Any]):
    """The states of an optimizer's groups. What is put in place of one is written to the optimizer."""

    def __init__(self, optimizer: TorchOptimizer, states: list[Any]) -> None:
        self.optimizer, self.of = optimizer, states

    def __getitem__(self, i: Any) -> Any:
        return self.of[i]

    def __len__(self) -> int:
        return len(self.of)

    def __setitem__(self, i: Any, value: Any) -> None:
        group, options = self.optimizer._aligned()[i]  # pyright: ignore[reportPrivateUsage]
        tree.match(group.state_spec, value, "the new state", "the state of the group")
        group.adopt(value, options)
        self.of[i] = group.state

    def __repr__(self) -> str:
        return repr(self.of)


class _WithoutRate(dict[str, Any]):
    """A group that has no learning rate; what asks for one is told how to have it."""

    def __missing__(self, name: str) -> Any:
        if name != "lr":
            raise KeyError(name)
        raise KeyError(
            "this optimizer has no 'lr' that could change: give TorchOptimizer a function with an argument lr and a number for it, "
            "TorchOptimizer(params, lambda lr: optfn.chain(optfn.clip(1.0), optfn.adamw(lr)), lr=1e-3)"
        )


def _telling(options: dict[str, Any]) -> dict[str, Any]:
    return options if "lr" in options else _WithoutRate(options)


class _Group:
    """One group: its transformation, its functional state, and what of it is in ``optimizer.state``.

    The tensors of the state are the same from step to step, and are written in place, as torch's are.
    """

    def __init__(self, source: GradientTransformation | Factory, options: Mapping[str, Any], backend: Any) -> None:
        self.owners: list[Tensor] = list(options["params"])
        _check_apart(self.owners)
        names = options.get("param_names")
        if names is not None and len({*names}) != len(names):
            raise ValueError(f"the names of a group's parameters must differ, got {', '.join(map(repr, names))}")
        self.params: Any = list(self.owners) if names is None else dict(zip(names, self.owners, strict=True))
        self.leaves, self.spec = tree.flatten(self.params)

        known = _known(source)
        arguments = {name: x for name, x in options.items() if name in known}
        self.tx, self.state = _prepared(source, arguments, self.params)
        self.flat, self.state_spec = tree.flatten(self.state)
        self.parts = parts(self.state, self.params) if self.owners else []
        self.searches = any(isinstance(node, LbfgsState) for node in tree.subtrees(self.state))

        bound = {name: p.default for name, p in known.items() if p.default is not p.empty} | arguments
        self.hyperparams = self._hyperparams()
        self.written = {name: _value(self.parts, self.flat, at) for name, at in self.hyperparams.items()}
        for name, value in self.written.items():
            if name in bound and not _is_number(bound[name], like=value):
                raise ValueError(
                    f"the argument {name!r} is {bound[name]!r}, but the hyperparameter of that name in the state is {value!r}, and "
                    "a group can have only one of them: give one another name"
                )
        self.switches = [name for name in self.hyperparams if is_zero(_default(source, name))]
        self.static = {name: x for name, x in bound.items() if name not in self.hyperparams}
        self.shown = (
            self.written | {name: x for name, x in bound.items() if _is_plain(x)} | (_loop(options) if self.searches else {})
        )
        self.names = {*known, *self.shown}
        self.checked = 0
        self.check_names(options, TypeError)

        self.published: list[tuple[Tensor, list[Any]]] = []
        self.parked: dict[tuple[str, int | None], tuple[Part, Tensor]] = {}
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
        same = [*old.static] == [*self.static] and all(map(_equal, old.static.values(), self.static.values()))
        if not same or not old.has(self.owners) or old.state_spec != self.state_spec:
            return self
        old.state, old.flat, old.written, old.parked = self.state, self.flat, {}, {}
        return old

    def check_names(self, options: Mapping[str, Any], error: type[Exception] = ValueError) -> None:
        """Raise where there is an option of a class of torch that would do nothing here."""
        foreign = {name for name in {*options} & _torch_options() - self.names if options[name] or name not in _torch_switches()}
        if foreign:
            raise error(
                f"tx has no arguments {_listed(foreign)}, which a group has been given; it has {_listed(self.names) or 'none'}. "
                "What is to change must be an argument of a function: TorchOptimizer(params, lambda lr: optfn.chain(...), lr=1e-3)"
            )
        self.checked = len(options)

    def outdated(self, options: Mapping[str, Any]) -> list[str]:
        """The options that have become others than the transformation was made with, and are not in its state."""
        if not self.owners:
            return []
        if len(options) != self.checked:
            self.check_names(options)
        changed = [name for name, x in self.static.items() if not _equal(options.get(name, x), x)]
        return changed + [name for name in self.switches if is_zero(options[name])]

    def set_hyperparams(self, options: Mapping[str, Any]) -> None:
        """Write what the options say into the state."""
        for name, at in self.hyperparams.items():
            value = options[name]
            fixed = not _has_tensor(value)
            if fixed and self.written.get(name) == value:
                continue
            values = value if isinstance(value, tuple | list) else [value]
            if len(values) != len(at) or not all(isinstance(x, int | float | Tensor) for x in values):
                raise ValueError(f"{name!r} must be {'a number' if len(at) == 1 else f'{len(at)} numbers'}, got {value!r}")
            for j, x in zip(at, values, strict=True):
                self.flat[j].copy_(x) if isinstance(x, Tensor) else self.flat[j].fill_(x)
            self.written[name] = value if fixed else None

    def inherit(self, old: "_Group", changed: list[str]) -> None:
        """Go on where this group left off when it was made with other options."""
        began = tree.flatten(old.tx.init(old.params))[0]
        there = {
            (part.path, part.leaf): (part, x, start)
            for part, x, start in zip(old.parts, old.flat, began, strict=True)
            if x is not None and part.role not in ("hyperparam", "derived")
        }
        if not old.parked and all(torch.equal(x, start) for _, x, start in there.values()):
            return
        pool = {key: (part, x) for key, (part, x, _) in there.items()} | {k: v for k, v in old.parked.items() if k not in there}
        wanted = {
            (part.path, part.leaf): (j, part)
            for j, part in enumerate(self.parts)
            if self.flat[j] is not None and part.role not in ("hyperparam", "derived")
        }
        found = {key: key for key, (_, part) in wanted.items() if key in pool and pool[key][0].identity == part.identity}
        # A link of a chain may have moved: what it is says which it was, where that is unambiguous.
        ours = _unambiguous({key: part.identity for key, (_, part) in wanted.items() if key not in found})
        theirs = _unambiguous({key: part.identity for key, (part, _) in pool.items() if key not in found})
        found |= {key: theirs[identity] for identity, key in ours.items() if identity in theirs}
        for key, source in found.items():
            (j, part), (_, x) = wanted[key], pool[source]
            like = self.flat[j]
            fits = x.shape == like.shape and x.dtype == like.dtype
            if source in there and not (fits and torch.equal(there[source][2], like)):
                raise ValueError(
                    f"{_listed(changed)} cannot be changed here: {part.path!r} in the state would have another "
                    f"{'beginning' if fits else 'shape or dtype'}, and it has begun. Make a new TorchOptimizer"
                )
            if fits:
                self.flat[j] = x
                pool.pop(source)
        self.parked = pool
        self.state = tree.unflatten(self.state_spec, self.flat)

    def step(self, extra: dict[str, Any]) -> None:
        if not self.owners:
            return
        grads = [p.grad for p in self.leaves]
        pattern = tuple(g is not None for g in grads)
        if self.backend is not None and (pattern in self.compiled or len(self.compiled) < PATTERNS):
            if pattern not in self.compiled:
                self.compiled[pattern] = compiled(_step_of(self.tx), donate=("params", "state"), backend=self.backend)
            self.compiled[pattern](self.params, self.state, tree.unflatten(self.spec, grads), extra)
            return
        updates, state = self.tx.update(tree.unflatten(self.spec, grads), self.numbered(), self.params, **extra)
        add = self.adding(updates)
        self.store(state)
        add()

    def numbered(self) -> Any:
        """The state with Python numbers for hyperparameters: with a number an eager step has half the operations.

        One that is not above 0 stays a tensor, as a function may take the number 0 for leaving something out.
        """
        leaves = list(self.flat)
        for name, at in self.hyperparams.items():
            value = self.written[name]
            if value is not None:
                for j, x in zip(at, value if isinstance(value, tuple | list) else [value], strict=True):
                    leaves[j] = float(x) if x > 0 else leaves[j]
        return tree.unflatten(self.state_spec, leaves)

    def gradients(self, f: Callable[[Tensor], Tensor]) -> Any:
        return tree.unflatten(self.spec, [None if p.grad is None else f(p.grad) for p in self.leaves])

    def adding(self, updates: Any) -> Callable[[], Any]:
        """What adds updates to the parameters, in place where they are like them; errors are raised before it is called."""
        changes = tree.match(self.spec, updates, "updates", "params")
        pairs = [(p, u) for p, u in zip(self.leaves, changes, strict=True) if u is not None]
        if not all(_alike(p, u) for p, u in pairs):
            return functools.partial(self.put, added(self.params, updates)[0])
        into, of = [local(p) for p, _ in pairs], [local(self._apart(u, u)) for _, u in pairs]
        return lambda: pairs and torch._foreach_add_(into, of)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    def put(self, params: Any) -> None:
        """Write a tree into the parameters."""
        new = [(p, x) for p, x in zip(self.leaves, tree.flatten(params)[0], strict=True) if x is not p]
        _write(new)

    def store(self, state: Any) -> None:
        """Write a state into the tensors of this one."""
        # A pure step may return what it was given: a gradient as a slot, one slot as another.
        pairs = zip(self.flat, tree.flatten(state)[0], strict=True)
        new = [(old, self._apart(x, old)) for old, x in pairs if x is not old and isinstance(x, Tensor)]
        _write(new)

    def _apart(self, x: Tensor, old: Tensor) -> Tensor:
        """A new part of the state that is not about to be overwritten."""
        if x.shape != old.shape:
            raise ValueError(f"a part of the state has changed its shape, from {tuple(old.shape)} to {tuple(x.shape)}")
        return x.clone() if _memory(x) in self.memory else x

    def adopt(self, state: Any, options: dict[str, Any]) -> None:
        """Take over a state that other code has made, and its hyperparameters as options."""
        self.store(state)
        for name, at in self.hyperparams.items():
            value = self.written[name] = _value(self.parts, self.flat, at)
            if _has_tensor(options[name]):
                options[name] = tree.map(lambda x: torch.as_tensor(x), value)
            else:
                options[name] = value

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
        self.memory = {_memory(x) for x in (*self.leaves, *self.flat) if x is not None}
        self.published = [(p, list(mine.values())) for p, mine in zip(self.leaves, of, strict=True)]

    def replaced(self, kept: Any) -> bool:
        """Whether other code has put something else there."""
        return any(not _same(kept.get(p), values) for p, values in self.published)

    def load(self, states: list[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
        """Take what a state dict has of each parameter, ours or torch's; ``options`` are those of the saved group."""
        if is_torch_state(states, {name for name, _, _ in self.pieces()}):
            group = {name: x for name, x in options.items() if name != "param_names"} | {"params": [*range(len(states))]}
            saved = {"state": {i: of for i, of in enumerate(states) if of}, "param_groups": [group]}
            self.flat = tree.flatten(load_torch_state(self.tx, self.params, saved))[0]
            self.state = tree.unflatten(self.state_spec, self.flat)
            self.written = {}
        else:
            self.take(dict(zip(self.owners, states, strict=True)))

    def take(self, kept: Mapping[Tensor, Any]) -> None:
        """The state with these parts; a parameter that has none gets fresh ones, and all are copied."""
        with torch.no_grad():
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
            return copied_as(found, like)

        self.flat = [choose(part, like) for part, like in zip(self.parts, fresh, strict=True)]
        self.state = tree.unflatten(self.state_spec, self.flat)
        self.written = {}


def _alike(p: Tensor, u: Any) -> bool:
    alike = isinstance(u, Tensor) and u.dtype == p.dtype and u.shape == p.shape and u.layout == p.layout and u.device == p.device
    return alike and same_layout(u, p)


def _memory(x: Tensor) -> int:
    """Where a tensor lies, or the piece of it that is here."""
    return local(x).untyped_storage().data_ptr()


def _write(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first."""
    into, of = [local(x) for x, _ in pairs], [local(placed_as(x, old)) for old, x in pairs]
    if pairs:
        torch._foreach_copy_(into, of)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def _loop(options: Mapping[str, Any]) -> dict[str, Any]:
    """How long a step of L-BFGS may be, with torch's defaults."""
    most, evals = options.get("max_iter", 20), options.get("max_eval")
    return {"max_iter": most, "max_eval": most * 5 // 4 if evals is None else evals}


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


def _known(source: GradientTransformation | Factory) -> Mapping[str, inspect.Parameter]:
    return {} if isinstance(source, GradientTransformation) else inspect.signature(source).parameters


def _default(source: GradientTransformation | Factory, name: str) -> Any:
    parameter = _known(source).get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _value(places: list[Part], flat: list[Tensor], at: list[int]) -> Any:
    """A hyperparameter as the number that torch has in a group, a tuple for betas."""
    values = tuple(flat[j].item() for j in at)
    return values if places[at[0]].path.rsplit(".", 1)[-1].isdigit() else values[0]


def _is_number(x: Any, like: Any) -> bool:
    """Whether an argument is the hyperparameter that is in the state, where it may have been rounded."""
    if isinstance(x, tuple | list):
        return isinstance(like, tuple) and len(x) == len(like) and all(map(_is_number, x, like))
    if isinstance(x, Tensor):
        return x.numel() == 1  # not looked at
    rounded = (torch.tensor(x, dtype=dtype).item() for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16))
    return isinstance(x, int | float) and like in rounded


def _has_tensor(x: Any) -> bool:
    return isinstance(x, Tensor) or (isinstance(x, tuple | list) and any(map(_has_tensor, x)))


def _equal(x: Any, y: Any) -> bool:
    return x is y or (not _has_tensor(x) and not _has_tensor(y) and x == y)


def _unambiguous(identities: Mapping[Any, Any]) -> dict[Any, Any]:
    """What has each identity, where that is one."""
    owners: dict[Any, list[Any]] = {}
    for key, identity in identities.items():
        owners.setdefault(identity, []).append(key)
    return {identity: keys[0] for identity, keys in owners.items() if len(keys) == 1}


@functools.cache
def _torch_defaults() -> list[tuple[str, Any]]:
    """What classes of torch have as options of a group, and the defaults."""
    classes = [x for x in vars(torch.optim).values() if inspect.isclass(x) and issubclass(x, torch.optim.Optimizer)]
    of = [p for cls in classes if cls is not torch.optim.Optimizer for p in inspect.signature(cls).parameters.values()]
    return [(p.name, p.default) for p in of if p.name != "params" and p.name not in HOW]


@functools.cache
def _torch_options() -> frozenset[str]:
    return frozenset(name for name, _ in _torch_defaults())


@functools.cache
def _torch_switches() -> frozenset[str]:
    """Those that are off where they are 0, False or None, so that an algorithm that has no such thing does what they say."""
    return frozenset(name for name, default in _torch_defaults() if not default)


def _on_several() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _same(kept: Any, values: list[Any]) -> bool:
    return kept is not None and len(kept) == len(values) and all(map(operator.is_, kept.values(), values))


def _is_plain(x: Any) -> bool:
    if isinstance(x, tuple | list):
        return all(map(_is_plain, x))
    return x is None or isinstance(x, bool | int | float | str | torch.dtype | Tensor)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))
