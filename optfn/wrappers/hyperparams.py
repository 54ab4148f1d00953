"""Hyperparameters as tensors in the state: to read, to set, to schedule, to sweep, to learn."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_factory, is_zero
from optfn.core import GradientTransformation, is_elementwise, transformation
from optfn.schedules import ScalarOrSchedule, Schedule, as_time

__all__ = [
    "InjectHyperparamsState",
    "StatefulSchedule",
    "WrappedSchedule",
    "WrappedScheduleState",
    "inject_hyperparams",
    "inject_stateful_hyperparams",
    "with_learning_rate",
    "with_schedules",
]


class StatefulSchedule(Protocol):
    """A schedule that keeps a state, for :func:`inject_hyperparams`: a value that depends on what happens, such as the loss."""

    def init(self) -> Any:
        """The first state, a tree of tensors or numbers."""
        ...

    def update(self, state: Any, **extra: Any) -> Any:
        """The next state; ``extra`` are the extra arguments of the transformation's update."""
        ...

    def __call__(self, state: Any, **extra: Any) -> Any:
        """The value. When the transformation's state is made there are no extra arguments."""
        ...


class WrappedScheduleState(NamedTuple):
    """The state of :class:`WrappedSchedule`.

    Attributes:
        count: the updates so far, a 0-dim int64 tensor.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]


class WrappedSchedule:
    """A schedule as a :class:`StatefulSchedule`, whose state is the step.

    Args:
        schedule_fn: see :mod:`optfn.schedules`.

    Example:
        >>> schedule = WrappedSchedule(optfn.linear_schedule(1.0, 0.0, 4))
        >>> schedule(schedule.update(schedule.init()))
        tensor(0.7500, dtype=torch.float64)
    """

    def __init__(self, schedule_fn: Schedule) -> None:
        self.schedule_fn = schedule_fn

    def init(self) -> WrappedScheduleState:
        """Step 0."""
        return WrappedScheduleState(torch.zeros((), dtype=torch.int64))

    def update(self, state: WrappedScheduleState, **extra: Any) -> WrappedScheduleState:
        """The next step."""
        return WrappedScheduleState(state.count + 1)

    def __call__(self, state: WrappedScheduleState, **extra: Any) -> Tensor:
        """The schedule at this step."""
        return self.schedule_fn(as_time(state.count))


class InjectHyperparamsState(NamedTuple):
    """The state of :func:`inject_hyperparams`.

    Attributes:
        count: the updates so far, a 0-dim int64 tensor.
        hyperparams: name to 0-dim tensor (a tuple of them for ``betas``): the value that the next update uses.
        scheduled: name to 0-dim tensor: what the schedule gave in the last update, before the first what it will give.
        inner_state: the inner transformation's.
        hyperparams_states: the state of each :class:`StatefulSchedule`, in their order.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    hyperparams: dict[str, Any]
    scheduled: dict[str, Any]
    inner_state: Any
    hyperparams_states: tuple[Any, ...] = ()

    _derived = ("scheduled",)
    _scalars = ("hyperparams", "hyperparams_states")


def inject_hyperparams(
    inner_factory: Callable[..., GradientTransformation],
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: torch.dtype | None = None,
) -> Callable[..., GradientTransformation]:
    """Keep the numeric hyperparameters of a factory in the state, as tensors.

    The state's values, not the ones the pair was made with, are used: ``optfn.tree.get(state, "lr")`` reads one,
    ``optfn.tree.set(state, lr=0.01)`` gives a state with another, without a new graph where the step is compiled. A schedule
    may stand in place of a number (of any argument, not ``lr`` alone): it is evaluated at this transformation's own step. So may a
    :class:`StatefulSchedule`, which has a state of its own and reads the extra arguments of ``update``.

    Numeric is an argument that is given as a float, or as a number or a 0-dim tensor where its default is a float; a
    tuple of such (``betas``) too. Bools, strings, functions where the default is no number (``mask``) and ints where the
    default is no float stay what they are. So does the number 0 where that is the default, given or not: it switches a part of
    the algorithm off. Give a tensor, ``weight_decay=torch.tensor(0.0)``, to have it in the state.

    Args:
        inner_factory: a function that returns a transformation, such as :func:`adamw` or your own.
        static_args: names of arguments to leave alone.
        hyperparam_dtype: dtype of the values; by default float64 (float32 on a device that has none), whatever the
            params' dtype: half precision would make 0.999 a 1.

    Returns:
        A function with the arguments of ``inner_factory`` whose transformation has an :class:`InjectHyperparamsState`.

    Raises:
        ValueError: ``static_args`` names no argument, or the factory takes ``*args``, ``**kwargs`` or positional-only ones;
            what ``inner_factory`` raises for the values given.

    Example:
        >>> tx = inject_hyperparams(optfn.adam)(lr=optfn.linear_schedule(0.1, 0.0, 2))
        >>> state = tx.init(torch.zeros(1))
        >>> _, state = tx.update(torch.ones(1), state)
        >>> optfn.tree.get(state, "lr"), optfn.tree.get(state, "eps")
        (tensor(0.1000, dtype=torch.float64), tensor(1.0000e-08, dtype=torch.float64))
    """
    check_factory("inject_hyperparams", inner_factory)
    signature = inspect.signature(inner_factory)
    static = {static_args} if isinstance(static_args, str) else {*static_args}
    if unknown := static - {*signature.parameters}:
        raise ValueError(f"static_args names {', '.join(sorted(unknown))}, which the factory has no argument of")

    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"inject_hyperparams needs named arguments, the factory has {parameter}")

    @functools.wraps(inner_factory)
    def make(*args: Any, **kwargs: Any) -> GradientTransformation:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            inner_factory(*args, **kwargs)  # says what is wrong, in better words
            raise
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        kinds = {name: _kind(value, signature.parameters[name].default) for name, value in arguments.items() if name not in static}
        numbers = {name: arguments[name] for name, kind in kinds.items() if kind == "number"}
        schedules = {name: arguments[name] for name, kind in kinds.items() if kind == "schedule"}

        def inner(values: dict[str, Any]) -> GradientTransformation:
            return inner_factory(**{**arguments, **values})

        return _injected(inner, numbers, schedules, hyperparam_dtype)

    return make


def _injected(
    make: Callable[[dict[str, Any]], GradientTransformation],
    numbers: dict[str, Any],
    schedules: dict[str, Schedule],
    hyperparam_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """``make(values)`` at every step, with the values of numbers and of schedules by name."""
    stateful: dict[str, Any] = {name: schedule for name, schedule in schedules.items() if hasattr(schedule, "init")}

    def scheduled_at(count: Tensor, states: tuple[Any, ...], extra: dict[str, Any]) -> dict[str, Any]:
        given = dict(zip(stateful, states, strict=True))

        def value(name: str, schedule: Any) -> Any:
            return schedule(given[name], **extra) if name in stateful else schedule(as_time(count))

        return {name: _as_tensor(value(name, schedule), hyperparam_dtype, count) for name, schedule in schedules.items()}

    checked = make(dict.fromkeys(schedules, torch.zeros(())))  # the numbers are checked here, once; what a schedule gives never is

    def init(params: Any) -> InjectHyperparamsState:
        count = tree.new_count(params)
        hyperparams = {name: tree.map(torch.clone, _as_tensor(value, hyperparam_dtype, count)) for name, value in numbers.items()}
        begun = [schedule.init() for schedule in stateful.values()]
        states = tuple(tree.map(lambda x: torch.as_tensor(x, device=count.device).clone(), state) for state in begun)
        scheduled = tree.map(torch.clone, scheduled_at(count, states, {})) if stateful else scheduled_at(count, (), {})
        return InjectHyperparamsState(count, hyperparams, scheduled, make({**hyperparams, **scheduled}).init(params), states)

    def update(updates: Any, state: InjectHyperparamsState, params: Any = None, **extra: Any) -> tuple[Any, InjectHyperparamsState]:
        scheduled = scheduled_at(state.count, state.hyperparams_states, extra)
        tx = make({**state.hyperparams, **scheduled})
        updates, inner_state = tx.update(updates, state.inner_state, params, **extra)
        old = zip(stateful.values(), state.hyperparams_states, strict=True)
        states = tuple(schedule.update(s, **extra) for schedule, s in old)
        if stateful:  # a value may be a part of the schedule's state
            scheduled = tree.map(torch.clone, scheduled)
        return updates, InjectHyperparamsState(state.count + 1, state.hyperparams, scheduled, inner_state, states)

    return transformation(init, update, elementwise=is_elementwise(checked))


def inject_stateful_hyperparams(
    inner_factory: Callable[..., GradientTransformation],
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: torch.dtype | None = None,
) -> Callable[..., GradientTransformation]:
    """Optax's older name of :func:`inject_hyperparams`, which takes a :class:`StatefulSchedule` too.

    Args:
        inner_factory: as there.
        static_args: as there.
        hyperparam_dtype: as there.

    Example:
        >>> class LossTimesTenth:
        ...     def init(self):
        ...         return torch.tensor(0.0)
        ...     def update(self, state, *, value, **extra):
        ...         return torch.as_tensor(value)
        ...     def __call__(self, state, **extra):
        ...         return 0.1 * extra.get("value", state)
        >>> tx = inject_stateful_hyperparams(optfn.sgd)(lr=LossTimesTenth())
        >>> tx.update(torch.ones(1), tx.init(torch.ones(1)), value=5.0)[0]
        tensor([-0.5000])
    """
    return inject_hyperparams(inner_factory, static_args, hyperparam_dtype)


def with_learning_rate(make: Callable[[Any], GradientTransformation], lr: ScalarOrSchedule) -> GradientTransformation:
    """``make(lr)``, where ``lr`` may be a schedule though the rule that ``make`` hands it to takes a number.

    Example:
        >>> tx = with_learning_rate(lambda lr: optfn.scale(-lr), optfn.linear_schedule(0.5, 0.0, 2))
        >>> tx.update(torch.ones(1), tx.init(torch.ones(1)))[0]
        tensor([-0.5000])
    """
    return with_schedules(make, lr=lr)


def with_schedules(make: Callable[..., GradientTransformation], **arguments: ScalarOrSchedule) -> GradientTransformation:
    """``make(**arguments)``, where each may be a schedule though ``make`` takes numbers; its value is in the state, by its name.

    Example:
        >>> tx = with_schedules(lambda factor, bound: optfn.chain(optfn.scale(factor), optfn.clip(bound)), factor=3.0,
        ...                     bound=optfn.linear_schedule(1.0, 0.0, 2))
        >>> state = tx.init(torch.ones(1))
        >>> for _ in range(2):
        ...     updates, state = tx.update(torch.ones(1), state)
        >>> updates, optfn.tree.get(state, "bound")
        (tensor([0.5000]), tensor(0.5000, dtype=torch.float64))
    """
    schedules: dict[str, Any] = {name: x for name, x in arguments.items() if callable(x) and not isinstance(x, Tensor)}
    if not schedules:
        return make(**arguments)
    return _injected(lambda values: make(**{**arguments, **values}), {}, schedules)


def _as_tensor(value: Any, dtype: torch.dtype | None, like: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_as_tensor(v, dtype, like) for v in value)
    return torch.as_tensor(
        value, dtype=dtype or (torch.float32 if like.device.type == "mps" else torch.float64), device=like.device
    )


def _kind(value: Any, default: Any) -> str:
    """What an argument is: a number to keep in the state, a schedule, or static."""
    if is_zero(value) and is_zero(default):
        return "static"
    wants_float = isinstance(default, float) or default is inspect.Parameter.empty
    if callable(value) and not isinstance(value, Tensor):
        return "schedule" if wants_float else "static"
    if isinstance(value, tuple):
        numeric = all(isinstance(v, int | float | Tensor) and not isinstance(v, bool) for v in value)
        like = (*value, *default) if isinstance(default, tuple) else value
        return "number" if numeric and any(isinstance(v, float | Tensor) for v in like) else "static"
    if isinstance(value, float) or (wants_float and isinstance(value, int | Tensor) and not isinstance(value, bool)):
        return "number"
    return "static"
