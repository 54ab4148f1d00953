"""The loop around a transformation: minimize a function, and say why it ended."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from optfn import tree
from optfn.core import GradientTransformation, added, check_transformation
from optfn.numerics import as_real
from optfn.sharding import Shares, all_reduced, is_sharded, local, whole

__all__ = ["MinimizeResult", "descend", "minimize"]


Reason: TypeAlias = Literal["gradient", "change", "max_steps", "max_evals", "nonfinite"]


class MinimizeResult(NamedTuple):
    """What :func:`minimize` ends with; all of it belongs to the one point ``params``.

    Attributes:
        params: the last point at which value and gradient were finite.
        state: the transformation's, to go on with: ``minimize(fun, result.params, tx, state=result.state)``.
        value: of the function there, 0-dim.
        grad_norm: the largest entry of the gradient there, by absolute value, 0-dim.
        steps: how many updates led there.
        evals: how often the function was evaluated in all.
        reason: why it ended there:

            - ``"gradient"``: ``grad_norm`` is at most ``tolerance_grad``;
            - ``"change"``: the last update changed no parameter by more than ``tolerance_change``, or the value by less than that;
            - ``"max_steps"``, ``"max_evals"``: as many as allowed;
            - ``"nonfinite"``: value or gradient are not finite at the next point (or at the first one, which is returned then).
    """

    params: Any
    state: Any
    value: Tensor
    grad_norm: Tensor
    steps: int
    evals: int
    reason: Reason


def minimize(
    fun: Callable[[Any], Any],
    params: Any,
    tx: GradientTransformation,
    *,
    state: Any = None,
    max_steps: int = 1000,
    max_evals: int | None = None,
    tolerance_grad: float | None = 1e-7,
    tolerance_change: float | None = 1e-9,
    value_and_grad: bool = False,
) -> MinimizeResult:
    """Update parameters until a function of them has a minimum, or there is another reason to stop.

    Each update is given ``value``, ``grad``, ``value_fn``, ``value_and_grad_fn`` and, with ``max_evals``, what is left of it: what
    line searches need (see :func:`lbfgs`). Where a search has evaluated the point that it chose, this evaluation is used. With
    ``lbfgs`` the loop is that of ``torch.optim.LBFGS.step``, its tolerances are torch's, and torch's ``max_iter`` and ``max_eval``
    are ``max_steps`` and ``max_evals``.

    ``lbfgs`` has tolerances of its own, at which its updates are 0: to go on to the last digit,
    ``tolerance_change=0.0`` in both.

    The loop is Python's, and waits for the values of every step; a function that is slow may be compiled. Nothing is recorded for
    autograd, and the arguments are left as they are.

    Args:
        fun: ``fun(params) -> value``, a 0-dim tensor; it is differentiated by :func:`torch.func.grad`.
        params: a tree of tensors to start from.
        tx: any transformation.
        state: its state; by default a new one.
        max_steps: updates at most, at least 0.
        max_evals: evaluations of ``fun`` after which no update begins, at least 0; None for any number.
        tolerance_grad: in the units of the gradient, at least 0; None for no such test.
        tolerance_change: in the units of the parameters, and of the value, at least 0; None for no such test (a transformation
            that only gathers at some steps, as :func:`accumulate` does, changes nothing at others).
        value_and_grad: whether ``fun`` returns ``(value, grads)`` instead, grads a tree in the structure of params, None for a leaf
            without one.

    Returns:
        A :class:`MinimizeResult`: the last point, the transformation's state there, and the reason to stop.

    Raises:
        RuntimeError: inside of a transform of :mod:`torch.func`, ``grad`` or ``vmap``: this can be neither differentiated nor
            batched.
        TypeError: ``fun`` is no function, ``params`` no tree of tensors, ``tx`` no transformation.
        ValueError: a limit or a tolerance is negative; the value is no 0-dim tensor.

    Example:
        >>> def rosenbrock(x):
        ...     return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
        >>> start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
        >>> result = minimize(rosenbrock, start, optfn.lbfgs(line_search_fn="strong_wolfe"))
        >>> result.params, result.reason, result.evals
        (tensor([1.0000, 1.0000], dtype=torch.float64), 'change', 43)
    """
    if not callable(fun):
        raise TypeError(f"minimize takes a function first, minimize(fun, params, tx), got {type(fun).__name__}")
    check_transformation(tx, "minimize", "minimize(fun, params, tx)")
    tree.checked(params, "minimize: params")
    if _in_transform():
        raise RuntimeError(
            "minimize cannot be differentiated or batched: its loop goes by the values of numbers. Call it outside of "
            "torch.func.grad and vmap, once for each problem; or make a number of steps with tx.update, which can be both"
        )
    steps_and_evals = {"max_steps": max_steps, "max_evals": max_evals}
    tolerances = {"tolerance_grad": tolerance_grad, "tolerance_change": tolerance_change}
    for name, limit in {**steps_and_evals, **tolerances}.items():
        if limit is not None and not limit >= 0:
            raise ValueError(f"{name} must be >= 0, got {limit}")
    return descend(
        fun if value_and_grad else tree.value_and_grad(fun),
        params,
        tx,
        state,
        max_steps=max_steps,
        max_evals=max_evals,
        tolerance_grad=tolerance_grad,
        tolerance_change=tolerance_change,
    )


def descend(
    fun: Callable[[Any], tuple[Any, Any]],
    params: Any,
    tx: GradientTransformation,
    state: Any,
    extra: Mapping[str, Any] | None = None,
    *,
    max_steps: int,
    max_evals: int | None,
    tolerance_grad: float | None,
    tolerance_change: float | None,
    evaluate_last: bool = True,
) -> MinimizeResult:
    """The loop of :func:`minimize`, of a function that gives value and gradients.

    Args:
        fun: ``fun(params) -> (value, grads)``.
        params: as in :func:`minimize`, and so are ``tx``, ``state`` and the limits.
        tx: the transformation.
        state: its state; None for a new one.
        extra: more arguments for each update.
        max_steps: updates at most.
        max_evals: evaluations after which no update begins.
        tolerance_grad: where the gradient is small enough.
        tolerance_change: where a change is too small.
        evaluate_last: False, as in a step of :class:`torch.optim.LBFGS`, leaves the point after the last update of ``max_steps``
            unevaluated: the result has the value and the norm of the point before. The first update is taken whatever
            ``max_evals`` is.
    """
    evaluate = _Evaluations(fun, params)
    shares = evaluate.shares

    def reason_to_stop(steps: int, size: float, moved: float, gained: float) -> Reason | None:
        if tolerance_grad is not None and size <= tolerance_grad:
            return "gradient"
        if tolerance_change is not None and (moved <= tolerance_change or gained < tolerance_change):
            return "change"
        if steps >= max_steps:
            return "max_steps"
        limit = max_evals if evaluate_last or steps else None
        return "max_evals" if limit is not None and evaluate.count >= limit else None

    with torch.no_grad():
        params = tree.map(Tensor.detach, params)
        state = tx.init(params) if state is None else state
        value, grads = evaluate.at(params)
        norm, steps = _largest(grads, value, shares), 0
        f, size = _numbers(value, norm)
        reason = reason_to_stop(0, size, math.inf, math.inf) if math.isfinite(f + size) else "nonfinite"
        while reason is None:
            given: dict[str, Any] = {} if max_evals is None else {"max_evals": max_evals - evaluate.count}
            given |= {"value": value, "grad": grads, "value_fn": evaluate.value, "value_and_grad_fn": evaluate}
            updates, new_state = tx.update(grads, state, params, **{**(extra or {}), **given})
            new_params = added(params, updates)[0]
            if steps + 1 == max_steps and not evaluate_last:
                params, state, steps, reason = new_params, new_state, steps + 1, "max_steps"
                break
            new_value, new_grads = evaluate.at(new_params)
            new_norm = _largest(new_grads, value, shares)
            new_f, size, moved = _numbers(new_value, new_norm, _largest(updates, value, shares))
            if not math.isfinite(new_f + size):
                reason = "nonfinite"
                break
            params, state, value, grads, norm, steps = new_params, new_state, new_value, new_grads, new_norm, steps + 1
            reason = reason_to_stop(steps, size, moved, abs(new_f - f))
            f = new_f
    return MinimizeResult(params, state, value, norm, steps, evaluate.count, reason)


def _in_transform() -> bool:
    """Whether this is called inside of a transform of torch.func, of which torch says nothing in public (2.13)."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    return functorch.maybe_current_level() is not None


class _Evaluations:
    """A function that counts, and remembers the points that it was asked for since the last step."""

    def __init__(self, fun: Callable[[Any], tuple[Any, Any]], params: Any) -> None:
        self.fun = fun
        self.shares = Shares(tree.leaves(params))
        self.count = 0
        self.seen: list[tuple[Any, Tensor, Any]] = []

    def __call__(self, params: Any) -> tuple[Tensor, Any]:
        self.count += 1
        with torch.enable_grad():
            value, grads = self.fun(params)
        value = torch.as_tensor(value).detach()
        if value.ndim:
            raise ValueError(f"minimize: the value must be a 0-dim tensor, got shape {tuple(value.shape)}")
        value = whole(value)
        (value,) = self.shares.totals(self.shares.of_mean(value, value))
        self.seen.append((params, value, tree.map(Tensor.detach, grads)))
        return self.seen[-1][1:]

    def value(self, params: Any) -> Tensor:
        return self(params)[0]

    def are(self, params: Any) -> Iterable[Any]:
        """Whether each of the points that were seen is this one, on all processes."""
        here, *seen = ([local(x) for x in tree.leaves(point)] for point in (params, *(point for point, _, _ in self.seen)))
        known = (all(map(torch.equal, point, here)) for point in seen)
        if self.shares.group is None or not seen:
            return known
        return all_reduced(torch.tensor([*known], dtype=torch.float32, device=here[0].device), self.shares.group, "min").tolist()

    def at(self, params: Any) -> tuple[Tensor, Any]:
        """Value and gradients at the point that the next step begins at: what a search has found there, or a new evaluation."""
        found = next((point for point, known in zip(self.seen, self.are(params), strict=True) if known), None)
        value, grads = found[1:] if found else self(params)
        self.seen = [(params, value, grads)]
        return value, grads


def _largest(of: Any, like: Tensor, shares: Shares) -> Tensor:
    """The largest entry by absolute value, of real and imaginary part if it is complex; 0 if there is none, NaN if one is NaN."""
    pieces = [local(x) if is_sharded(x) else x.to_dense() for x in tree.leaves(of)]
    sizes = [as_real(x).abs().amax().to(like) for x in pieces if x.numel()]
    return shares.largest(torch.stack(sizes) if sizes else torch.zeros_like(like))


def _numbers(*tensors: Tensor) -> list[float]:
    return torch.stack([x.to(tensors[0]) for x in tensors]).tolist()
