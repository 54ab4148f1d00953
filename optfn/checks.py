"""The checks of arguments, and their words. Numbers are checked when a pair is made; tensors only by their shape."""

import difflib
import functools
import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from optfn.numerics import widened_scalar

__all__ = [
    "alias",
    "check_factory",
    "check_no_state",
    "check_schedule",
    "check_state",
    "check_step",
    "each_leaf",
    "integer",
    "is_zero",
    "not_its_state",
    "number",
    "refuse_torch",
    "require",
    "rule_name",
    "scalar_or_schedule",
]

P = ParamSpec("P")
R = TypeVar("R")

_TO_INIT = "parameters go to init: tx = optfn.{alias}(lr=1e-3); state = tx.init(dict(model.named_parameters()))"
_ELSEWHERE = {
    **dict.fromkeys(("params", "parameters", "model"), _TO_INIT),
    **dict.fromkeys(("foreach", "fused", "capturable"), "a step is made fast by optfn.compile(step, donate=...)"),
    "differentiable": "every step is differentiable",
    "max_iter": "it is an argument of the loop, optfn.minimize(fun, params, tx, max_steps=...)",
    "max_eval": "it is an argument of the loop, optfn.minimize(fun, params, tx, max_evals=...)",
}
"""What to do for an argument that torch.optim or Optax has."""
_RENAMED = {
    **dict.fromkeys(("learning_rate", "step_size"), ("lr", "lr=...")),
    **dict.fromkeys(("b1", "b2", "beta1", "beta2", "beta_1", "beta_2"), ("betas", "betas=(b1, b2)")),
    "epsilon": ("eps", "eps=..."),
    "seed": ("key", "key=..."),
    "scaling": ("lr", "lr=..."),
    "decay": ("alpha", "alpha=..."),
    "beta": ("momentum", "momentum=..."),
}
"""The arguments that have another name here: which, and what to write."""


def integer(name: str, value: Any, at_least: int) -> int:
    """Return ``value`` if it is an int of at least so much, else raise.

    Raises:
        TypeError: ``value`` is no int.
        ValueError: it is too small.

    Example:
        >>> integer("sync_period", 2.5, 1)
        Traceback (most recent call last):
        ...
        TypeError: sync_period must be an int, got float
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    found = operator.index(value)
    if found < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {found}")
    return found


def number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    finite: bool = False,
) -> Any:
    """Return ``value`` if it is a number within the bounds or a tensor of one element (made 0-dim, float64), else raise.

    A tensor's value is not looked at: it may be batched, traced or on a device that would have to synchronise.

    Raises:
        TypeError: ``value`` is neither a number nor a tensor.
        ValueError: out of bounds, NaN, or infinite where it must be finite; or a tensor of more than one element.

    Example:
        >>> number("b1", 1.0, at_least=0, below=1)
        Traceback (most recent call last):
        ...
        ValueError: b1 must be >= 0 and < 1, got 1.0
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one element, got shape {tuple(value.shape)}")
        return widened_scalar(value if value.ndim == 0 else value.reshape(()))
    if isinstance(value, bool) or not isinstance(value, int | float):
        advice = f": write {name}=float(...)" if isinstance(value, str) or hasattr(value, "__float__") else ""
        if callable(value):
            advice = f": a schedule acts through optfn.inject_hyperparams(make)({name}=schedule)"
        elif value is None:
            advice = f": write {name}=0.0 for none"
        raise TypeError(f"{name} must be a number or a 0-dim tensor, got {type(value).__name__}{advice}")
    bounds = [
        (f">= {at_least}", at_least is None or value >= at_least),
        (f"> {above}", above is None or value > above),
        (f"<= {at_most}", at_most is None or value <= at_most),
        (f"< {below}", below is None or value < below),
    ]
    if value != value or not all(held for _, held in bounds):
        wanted = " and ".join(text for text, _ in bounds if not text.endswith("None")) or "a number"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    if finite and math.isinf(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def scalar_or_schedule(name: str, value: Any, *, at_least: float | None = None, above: float | None = None) -> Any:
    """As :func:`number`, finite, but a callable, a schedule, passes as it is.

    Example:
        >>> scalar_or_schedule("lr", -1.0, at_least=0)
        Traceback (most recent call last):
        ...
        ValueError: lr must be >= 0, got -1.0
    """
    if callable(value) and not isinstance(value, Tensor):
        check_schedule(name, value)
        return value
    return number(name, value, at_least=at_least, above=above, finite=True)


def check_schedule(name: str, schedule: Callable[..., Any]) -> None:
    """Raise a TypeError where a function cannot be called with a step alone, as a schedule is.

    Example:
        >>> check_schedule("lr", optfn.cosine_decay_schedule)
        Traceback (most recent call last):
        ...
        TypeError: lr: a schedule is a function of the step alone, cosine_decay_schedule is not: call it if it makes one,
        cosine_decay_schedule(...)
    """
    if torch.compiler.is_dynamo_compiling():  # which has no signatures
        return
    try:
        inspect.signature(schedule).bind(0)
    except ValueError:  # a function without a signature
        return
    except TypeError:
        title = getattr(schedule, "__name__", type(schedule).__name__)
        call = "" if title == "<lambda>" else f": call it if it makes one, {title}(...)"
        raise TypeError(f"{name}: a schedule is a function of the step alone, {title} is not{call}") from None


def is_zero(value: Any) -> bool:
    """True for the Python number 0 alone: what can be left out of a chain. A tensor is never looked at.

    Example:
        >>> is_zero(0.0), is_zero(torch.tensor(0.0))
        (True, False)
    """
    return isinstance(value, int | float) and value == 0


def require(owner: str, **arguments: Any) -> None:
    """Raise a TypeError that names ``owner`` and the first argument that is None.

    Example:
        >>> require("add_decayed_weights", params=None)
        Traceback (most recent call last):
        ...
        TypeError: add_decayed_weights needs `params`: call update(updates, state, params=...)
    """
    for name, value in arguments.items():
        if value is None:
            raise TypeError(f"{owner} needs `{name}`: call update(updates, state, {name}=...)")


def rule_name(function: Callable[..., Any]) -> str:
    """The name of the public function that a closure was made in, for messages.

    Example:
        >>> def scale_by_something():
        ...     return lambda g: g
        >>> rule_name(scale_by_something())
        'scale_by_something'
    """
    function = getattr(function, "begin", function)  # of an update that is lifted
    return function.__qualname__.split(".<locals>")[0].rsplit(".", 1)[-1]


def each_leaf(name: str, function: Callable[[str, Any], Any], paths: Sequence[str], leaves: Sequence[Any]) -> list[Any]:
    """What a function of a path and a leaf, the argument ``name``, says of each leaf, None of one that is None.

    Raises:
        TypeError: the function does not take these two, as Optax's, which take the whole tree, do not.

    Example:
        >>> each_leaf("mask", lambda params: {"w": True}, ["w"], [torch.ones(1)])
        Traceback (most recent call last):
        ...
        TypeError: mask: the function is called for each leaf with its dotted path and the leaf, lambda path, p: ..., and does not
        take these two; for one that takes the whole tree, as in Optax, give what it returns, f(params), as the mask
    """
    try:
        return [None if x is None else function(path, x) for path, x in zip(paths, leaves, strict=True)]
    except TypeError as error:
        if _takes_two(function):
            raise
        wanted = "is called for each leaf with its dotted path and the leaf, lambda path, p: ..."
        optax = f"for one that takes the whole tree, as in Optax, give what it returns, f(params), as the {name}"
        raise TypeError(f"{name}: the function {wanted}, and does not take these two; {optax}") from error


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind("path", None)
    except TypeError:
        return False
    except ValueError:  # a function without a signature
        pass
    return True


def alias(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, an alias, with words for the arguments that people bring from torch.optim and Optax.

    Refused are parameters in the place of ``lr``, names that the alias does not have, and a number, or a tuple of another length,
    where its default is a tuple.

    Example:
        >>> optfn.adam(learning_rate=0.1)
        Traceback (most recent call last):
        ...
        TypeError: adam has no argument 'learning_rate': write lr=...; it has lr, betas, eps, weight_decay, amsgrad, maximize,
        decoupled_weight_decay, mask
        >>> optfn.adam(betas=0.9)
        Traceback (most recent call last):
        ...
        TypeError: betas must be 2 numbers, as in betas=(0.9, 0.999), got 0.9
    """
    parameters = inspect.signature(function).parameters
    names, title = tuple(parameters), function.__name__
    tuples = tuple((i, name, p.default) for i, (name, p) in enumerate(parameters.items()) if isinstance(p.default, tuple))

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                raise TypeError(_unknown(title, name, names))
        _check_rate(title, args[0] if args else kwargs.get(names[0]))
        for i, name, default in tuples:
            value: Any = args[i] if i < len(args) else kwargs.get(name, default)
            _check_length(name, value, default)
        return function(*args, **kwargs)

    return cast(Callable[P, R], run)


def _unknown(title: str, name: str, names: tuple[str, ...]) -> str:
    own, write = _RENAMED.get(name, ("", ""))
    near = difflib.get_close_matches(name, names, 1, 0.7)
    advice = _ELSEWHERE.get(name, "").format(alias=title) or (f"write {write}" if own in names else "")
    advice = advice or (f"write {near[0]}=..." if near else "")
    return f"{title} has no argument {name!r}{': ' + advice if advice else ''}; it has {', '.join(names)}"


def _check_rate(title: str, lr: Any) -> None:
    # Any function may be a schedule, but a module is a model.
    if isinstance(lr, torch.nn.Module) or (hasattr(lr, "__iter__") and not isinstance(lr, str) and not hasattr(lr, "__float__")):
        kind, advice = type(lr).__name__, _TO_INIT.format(alias=title)
        raise TypeError(f"{title}: lr must be a number, a 0-dim tensor or a schedule, got {kind}; {advice}")
    if callable(lr) and not isinstance(lr, Tensor):
        check_schedule("lr", lr)


def _check_length(name: str, value: Any, default: tuple[Any, ...]) -> None:
    several = isinstance(value, tuple | list) or (isinstance(value, Tensor) and value.ndim > 0)
    if not several or len(value) != len(default):
        error = ValueError if several else TypeError
        raise error(f"{name} must be {len(default)} numbers, as in {name}={default}, got {value}")


def check_state(owner: str, state: Any, kind: type) -> None:
    """Raise a TypeError that names ``owner`` where a state is not of the kind that its init makes.

    Example:
        >>> check_state("scale_by_adam", None, optfn.LeafwiseState)
        Traceback (most recent call last):
        ...
        TypeError: scale_by_adam needs the state that its own init makes, LeafwiseState, got None: state = tx.init(params), then
        tx.update(updates, state, params), in this order
    """
    if not isinstance(state, kind):
        raise TypeError(not_its_state(owner, kind.__name__, state))


def not_its_state(owner: str, wanted: str, state: Any) -> str:
    """What to say of a state that is another transformation's, or none.

    Example:
        >>> not_its_state("chain", "a tuple of 2", ((),)).split(":")[0]
        'chain needs the state that its own init makes, a tuple of 2, got a tuple of 1'
    """
    given = f"a tuple of {len(state)}" if type(state) is tuple else "None" if state is None else type(state).__name__
    order = "state = tx.init(params), then tx.update(updates, state, params), in this order"
    return f"{owner} needs the state that its own init makes, {wanted}, got {given}: {order}"


def check_no_state(owner: str, state: Any) -> None:
    """Raise a TypeError that names ``owner``, which keeps no state, where it is handed one.

    Example:
        >>> check_no_state("identity", optfn.trace(0.9).init(torch.ones(1)))
        Traceback (most recent call last):
        ...
        TypeError: identity needs the state that its own init makes, (), got LeafwiseState: state = tx.init(params), then
        tx.update(updates, state, params), in this order
    """
    if type(state) is not tuple or state:
        raise TypeError(not_its_state(owner, "()", state))


def refuse_torch(owner: str, factory: Any) -> None:
    """Raise a TypeError where one of torch's optimizers, or its class, stands in the place of a transformation's function.

    Example:
        >>> refuse_torch("TorchOptimizer", torch.optim.AdamW)
        Traceback (most recent call last):
        ...
        TypeError: TorchOptimizer takes what is of optfn, optfn.adamw perhaps, got AdamW of torch.optim
    """
    kind = factory if isinstance(factory, type) else type(factory)
    if issubclass(kind, torch.optim.Optimizer):
        name = kind.__name__
        raise TypeError(f"{owner} takes what is of optfn, optfn.{name.lower()} perhaps, got {name} of torch.optim")


def check_factory(owner: str, factory: Any) -> None:
    """Raise a TypeError where a function that makes a transformation is wanted, and something else is given.

    Example:
        >>> check_factory("inject_hyperparams", optfn.adam(lr=0.1))
        Traceback (most recent call last):
        ...
        TypeError: inject_hyperparams takes the function that makes a transformation, got the transformation that it made: write
        inject_hyperparams(optfn.adam)(lr=1e-3)
    """
    refuse_torch(owner, factory)
    if not callable(factory):
        got = "the transformation that it made" if _is_pair(factory) else type(factory).__name__
        raise TypeError(f"{owner} takes the function that makes a transformation, got {got}: write {owner}(optfn.adam)(lr=1e-3)")


def check_step(fn: Any) -> None:
    """Raise a TypeError where :func:`optfn.compile` is given something else than a function.

    Example:
        >>> check_step(optfn.adam())
        Traceback (most recent call last):
        ...
        TypeError: compile takes a function, got a transformation: write the step as a function that calls tx.update and
        optfn.apply_updates, and compile that
    """
    if not callable(fn):
        got = "a transformation" if _is_pair(fn) else repr(fn)
        step = "write the step as a function that calls tx.update and optfn.apply_updates, and compile that"
        raise TypeError(f"compile takes a function, got {got}: {step}")


def _is_pair(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "init") and hasattr(x, "update")
