"""The checks of arguments, and their words. Numbers are checked when a pair is made; tensors only by their shape."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from optfn.numerics import widened_scalar

__all__ = ["is_zero", "number", "require", "rule_name", "scalar_or_schedule"]


def number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Return ``value`` if it is a number within the bounds or a tensor of one element (made 0-dim, float64), else raise.

    A tensor's value is not looked at: it may be batched, traced or on a device that would have to synchronise.

    Raises:
        TypeError: ``value`` is neither a number nor a tensor.
        ValueError: out of bounds or NaN; or a tensor of more than one element.

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
        raise TypeError(f"{name} must be a number or a 0-dim tensor, got {type(value).__name__}")
    bounds = [
        (f">= {at_least}", at_least is None or value >= at_least),
        (f"> {above}", above is None or value > above),
        (f"<= {at_most}", at_most is None or value <= at_most),
        (f"< {below}", below is None or value < below),
    ]
    if value != value or not all(held for _, held in bounds):
        wanted = " and ".join(text for text, _ in bounds if not text.endswith("None")) or "a number"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return value


def scalar_or_schedule(name: str, value: Any, *, at_least: float | None = None, above: float | None = None) -> Any:
    """As :func:`number`, but a callable, a schedule, passes as it is.

    Example:
        >>> scalar_or_schedule("lr", -1.0, at_least=0)
        Traceback (most recent call last):
        ...
        ValueError: lr must be >= 0, got -1.0
    """
    return value if callable(value) and not isinstance(value, Tensor) else number(name, value, at_least=at_least, above=above)


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
