"""Line searches: how far to go along the updates, found by evaluating the function that is minimized."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state, number, require
from optfn.core import GradientTransformation, added, transformation
from optfn.leafwise import aligned
from optfn.numerics import Scalar, as_real, compute_dtype, real_dtype
from optfn.sharding import Shares, is_sharded, placed_as
from optfn.sweep import as_pieces
from optfn.transforms.scaling import scale

__all__ = [
    "BacktrackingLinesearchInfo",
    "ScaleByBacktrackingLinesearchState",
    "ScaleByZoomLinesearchState",
    "ZoomLinesearchInfo",
    "scale_by_backtracking_linesearch",
    "scale_by_zoom_linesearch",
    "value_and_grad_from_state",
]

State = TypeVar("State")


class BacktrackingLinesearchInfo(NamedTuple):
    """How the last search of :func:`scale_by_backtracking_linesearch` went, 0-dim tensors.

    Attributes:
        num_linesearch_steps: evaluations of the function, int64.
        decrease_error: by how much the decrease falls short at the end; 0 for a decrease that suffices.
    """

    num_linesearch_steps: Tensor
    decrease_error: Tensor


class ScaleByBacktrackingLinesearchState(NamedTuple):
    """The state of :func:`scale_by_backtracking_linesearch`; numbers have the widest real dtype of the parameters.

    Attributes:
        learning_rate: of the last update, 0-dim; 1 before the first, 0 where no trial had a finite value.
        value: of the function where the last update leads, 0-dim; inf where that is not known.
        grad: its gradient there, a tree like the parameters, with ``store_grad``; else ``()``, where Optax has None.
        info: how the last search went.
    """

    learning_rate: Tensor
    value: Tensor
    grad: Any
    info: BacktrackingLinesearchInfo


class ZoomLinesearchInfo(NamedTuple):
    """How the last search of :func:`scale_by_zoom_linesearch` went, 0-dim tensors.

    Attributes:
        num_linesearch_steps: evaluations of the function and its gradient, int64.
        decrease_error: by how much the decrease fell short at the last trial; 0 for a decrease that suffices.
        curvature_error: by how much the slope was too steep at the last trial; 0 for one that is flat enough.
    """

    num_linesearch_steps: Tensor
    decrease_error: Tensor
    curvature_error: Tensor


class ScaleByZoomLinesearchState(NamedTuple):
    """The state of :func:`scale_by_zoom_linesearch`; numbers have the widest real dtype of the parameters.

    Attributes:
        learning_rate: of the last update, 0-dim; 1 before the first.
        value: of the function where the last update leads, 0-dim; inf before the first.
        grad: its gradient there, a tree like the parameters.
        info: how the last search went.
    """

    learning_rate: Tensor
    value: Tensor
    grad: Any
    info: ZoomLinesearchInfo


class _Backtracking(NamedTuple):
    """A search by :func:`scale_by_backtracking_linesearch`: the last trial."""

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    step: Tensor
    value: Tensor
    error: Tensor


def scale_by_backtracking_linesearch(
    max_backtracking_steps: int,
    slope_rtol: Scalar = 1e-4,
    decrease_factor: Scalar = 0.8,
    increase_factor: Scalar = 1.5,
    max_learning_rate: Scalar = 1.0,
    atol: Scalar = 0.0,
    rtol: Scalar = 0.0,
    store_grad: bool = False,
    verbose: bool = False,
) -> GradientTransformation:
    r"""Scale updates by the first step size, of smaller and smaller ones, at which the function decreases enough.

    .. math:: f(p + \eta u) \le (1 + \delta) f(p) + c\, \eta\, \langle u, \nabla f(p) \rangle + \epsilon

    The first :math:`\eta` is the last one times ``increase_factor``, and ``max_learning_rate`` at most. The last trial is taken
    even where it does not decrease enough, unless its value is not finite: then the update is 0, and the next search begins at
    ``max_learning_rate`` (Optax's stays at 0 from there on).

    The updates should point downhill, so :func:`scale_by_learning_rate` or ``scale(-1.0)`` stands before it in a chain. What else
    an update needs is given by name, ``update(grads, state, params, value=..., grad=..., value_fn=...)``, with more arguments of
    ``value_fn``, such as a batch, by their names:

    - ``value`` and ``grad``: of the function at ``params``.
    - ``value_fn(params, ...) -> value``, a 0-dim tensor.

    Eagerly each trial is one evaluation, and waits for the device to say whether it was the last. Within ``vmap`` and
    compiled, where no number can be read, all ``max_backtracking_steps + 1`` trials are made, and those after the last one change
    nothing. To a derivative the step size is a constant.

    Where leaves lie on several processes, ``value_fn`` gives the loss of all of them on each, and is called by all at once. What
    is looked at is the mean of what they have, so that all take the same step.

    Args:
        max_backtracking_steps: how often the step is made smaller at most, at least 0.
        slope_rtol: :math:`c \ge 0`.
        decrease_factor: in ``(0, 1)``, what a step that is too long is multiplied with.
        increase_factor: at least 1, what the last step is multiplied with to begin; inf begins at ``max_learning_rate``.
        max_learning_rate: above 0.
        atol: :math:`\epsilon \ge 0`, in the units of the function.
        rtol: :math:`\delta \ge 0`.
        store_grad: whether to keep the gradient where the step leads for :func:`value_and_grad_from_state`. It comes
            from the last trial at the cost of its backward pass, compiled or batched from one more evaluation.
        verbose: print what a search that failed has found; not where no number can be read.

    Raises:
        TypeError: from ``update``: ``params``, ``value``, ``grad`` or ``value_fn`` is missing.
        ValueError: an argument out of range.

    Reference:
        Armijo, `Minimization of functions having Lipschitz continuous first partial derivatives
        <https://doi.org/10.2140/pjm.1966.16.1>`_, 1966; Vaswani et al., `Painless Stochastic Gradient
        <https://arxiv.org/abs/1905.09997>`_, 2019, algorithm 1.

    Example:
        >>> tx = optfn.chain(optfn.sgd(1.0), scale_by_backtracking_linesearch(15))
        >>> fun, params = lambda p: (p**2).sum(), torch.tensor([1.0, 2.0])
        >>> value, grad = optfn.tree.value_and_grad(fun)(params)
        >>> updates, state = tx.update(grad, tx.init(params), params, value=value, grad=grad, value_fn=fun)
        >>> updates, state[1].info.num_linesearch_steps
        (tensor([-1.6000, -3.2000]), tensor(2))
    """
    at_most = _count("max_backtracking_steps", max_backtracking_steps, 0) + 1
    c = number("slope_rtol", slope_rtol, at_least=0)
    shrink = number("decrease_factor", decrease_factor, above=0, below=1)
    grow = number("increase_factor", increase_factor, at_least=1)
    longest = number("max_learning_rate", max_learning_rate, above=0)
    absolute, relative = number("atol", atol, at_least=0), number("rtol", rtol, at_least=0)

    def init(params: Any) -> ScaleByBacktrackingLinesearchState:
        one, count = _one(params), tree.new_count(params)
        info = BacktrackingLinesearchInfo(count, torch.inf * one)
        return ScaleByBacktrackingLinesearchState(one, torch.inf * one, tree.zeros_like(params) if store_grad else (), info)

    def update(
        updates: Any,
        state: ScaleByBacktrackingLinesearchState,
        params: Any = None,
        *,
        value: Any = None,
        grad: Any = None,
        value_fn: Any = None,
        **extra: Any,
    ) -> tuple[Any, ScaleByBacktrackingLinesearchState]:
        check_state("scale_by_backtracking_linesearch", state, ScaleByBacktrackingLinesearchState)
        require("scale_by_backtracking_linesearch", params=params, value=value, grad=grad, value_fn=value_fn)
        fun = _with_arguments(value_fn, extra)
        pullbacks: list[Callable[[], Any]] = []

        with torch.no_grad():
            line = _Line(params, updates, state.learning_rate)
            f, slope = line.seen(value, grad)

            def trial(last: _Backtracking) -> _Backtracking:
                step = torch.where(last.count > 0, shrink * last.step, last.step).to(f.dtype)
                if store_grad:
                    new, pullback = _with_pullback(fun, line.at(step))
                    pullbacks[:] = [pullback]
                else:
                    new = fun(line.at(step))
                new, _ = line.seen(new)
                error = new - (1 + relative) * f - c * step * slope
                return _Backtracking(last.count + 1, step, new, _error(error).to(f.dtype))

            # After a step of 0 there is nothing to make longer.
            first = torch.where(state.learning_rate > 0, grow * state.learning_rate, longest).clamp_max(longest).to(f.dtype)
            start = _Backtracking(torch.zeros_like(state.info.num_linesearch_steps), first, f, torch.full_like(f, torch.inf))
            end, read = _searched(trial, start, lambda last: last.error <= absolute, at_most)
            failed = end.error.isinf()
            rate = torch.where(failed, 0, end.step)
            new_grad: Any = ()
            if store_grad:
                found = pullbacks[0]() if read else tree.value_and_grad(fun)(line.at(end.step))[1]
                new_grad = line.like_params(found)
            if verbose:
                _say("scale_by_backtracking_linesearch", end.error > absolute, f, slope, end.step, end.error)
            info = BacktrackingLinesearchInfo(end.count, end.error)
            new_state = ScaleByBacktrackingLinesearchState(rate, torch.where(failed, torch.inf, end.value), new_grad, info)
        return scale(rate).update(updates, ())[0], new_state

    return transformation(init, update)


class _Point(NamedTuple):
    """Of a search: a step, and value and slope there, 0-dim tensors."""

    step: Tensor
    value: Tensor
    slope: Tensor


class _Zoom(NamedTuple):
    """A search by :func:`scale_by_zoom_linesearch`.

    Attributes:
        count: trials so far.
        point: the last trial.
        grad: the gradient there.
        safe: the best trial with a decrease that suffices, the start before there is one.
        safe_grad: the gradient there.
        low: the end of the interval with the lower value.
        high: the other end.
        third: a point that was one of the ends before, for the cubic.
        decrease_error: of the last trial.
        curvature_error: of the last trial.
        found: whether there is an interval.
        over: whether the search has ended.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    point: _Point
    grad: Any
    safe: _Point
    safe_grad: Any
    low: _Point
    high: _Point
    third: _Point
    decrease_error: Tensor
    curvature_error: Tensor
    found: Tensor
    over: Tensor


def scale_by_zoom_linesearch(
    max_linesearch_steps: int,
    max_learning_rate: Scalar | None = None,
    tol: Scalar = 0.0,
    increase_factor: Scalar = 2.0,
    slope_rtol: Scalar = 1e-4,
    curv_rtol: Scalar = 0.9,
    approx_dec_rtol: Scalar | None = 1e-6,
    stepsize_precision: Scalar = 1e-5,
    initial_guess_strategy: Literal["one", "keep"] = "keep",
    verbose: bool = False,
) -> GradientTransformation:
    r"""Scale updates by a step size at which the function has decreased enough and is flat enough, the strong Wolfe conditions.

    .. math::
        f(p + \eta u) \le f(p) + c_1 \eta\, \langle u, \nabla f(p) \rangle + \epsilon, \qquad
        |\langle u, \nabla f(p + \eta u) \rangle| \le c_2 |\langle u, \nabla f(p) \rangle| + \epsilon

    Where values are too close to tell a decrease, :math:`f(p + \eta u) \le f(p) + c_3 |f(p)|`, the first may be met by
    the slopes: :math:`\langle u, \nabla f(p + \eta u) \rangle \le (2 c_1 - 1) \langle u, \nabla f(p) \rangle + \epsilon`.

    Steps are made longer until there is such a step between two of them. Then the interval is made smaller, at the minimum of
    the cubic or the parabola through what is known, or at its middle. A search that ends without such a step takes the
    one that decreased enough with the lowest value, else the last trial, or none where that has no finite value (after
    which the next search begins at 1; Optax's stays at 0 from there on).

    What an update needs is as for :func:`scale_by_backtracking_linesearch`, with the gradient of ``value_fn``, by
    :func:`torch.func.grad`, or with ``value_and_grad_fn(params) -> (value, grads)`` in its place. Eagerly each trial is one
    evaluation, and waits for the device to say whether it was the last. Within ``vmap`` and compiled, where no number can be
    read, all ``max_linesearch_steps`` trials are made, and those after the last one change nothing. To a derivative the step
    size is a constant. Of leaves that lie on several processes each trial is one all_reduce, as in
    :func:`scale_by_backtracking_linesearch`.

    Args:
        max_linesearch_steps: trials at most, at least 1.
        max_learning_rate: the longest step; None for no bound.
        tol: :math:`\epsilon \ge 0`.
        increase_factor: above 1, what a step that is too short is multiplied with.
        slope_rtol: :math:`c_1 \ge 0`.
        curv_rtol: :math:`c_2 \ge 0`; inf asks for the decrease alone.
        approx_dec_rtol: :math:`c_3 \ge 0`; None asks for the first condition as it is.
        stepsize_precision: the length of an interval that is not made smaller if there is a step that decreases enough.
        initial_guess_strategy: where to begin, at the last step (``"keep"``), or at 1 (``"one"``), as suits Newton's methods.
        verbose: print what a search that failed has found; not where no number can be read.

    Raises:
        TypeError: from ``update``: ``params``, ``value``, ``grad`` or the function is missing.
        ValueError: an argument out of range.

    Reference:
        Nocedal and Wright, Numerical Optimization, 2nd edition, 2006, algorithms 3.5 and 3.6; Hager and Zhang, `Algorithm 851:
        CG_DESCENT <https://doi.org/10.1145/1132973.1132979>`_, 2006, equations 23, 26 and 27.

    Example:
        >>> tx = optfn.chain(optfn.sgd(1.0), scale_by_zoom_linesearch(15))
        >>> fun, params = lambda p: (p**2).sum(), torch.tensor([1.0, 2.0])
        >>> value, grad = optfn.tree.value_and_grad(fun)(params)
        >>> updates, state = tx.update(grad, tx.init(params), params, value=value, grad=grad, value_fn=fun)
        >>> updates, state[1].learning_rate
        (tensor([-1., -2.]), tensor(0.5000))
    """
    at_most = _count("max_linesearch_steps", max_linesearch_steps, 1)
    longest = None if max_learning_rate is None else number("max_learning_rate", max_learning_rate, above=0)
    tol, grow = number("tol", tol, at_least=0), number("increase_factor", increase_factor, above=1)
    c1, c2 = number("slope_rtol", slope_rtol, at_least=0), number("curv_rtol", curv_rtol, at_least=0)
    c3 = None if approx_dec_rtol is None else number("approx_dec_rtol", approx_dec_rtol, at_least=0)
    shortest = number("stepsize_precision", stepsize_precision, at_least=0)
    if initial_guess_strategy not in ("one", "keep"):
        raise ValueError(f"initial_guess_strategy must be 'one' or 'keep', got {initial_guess_strategy!r}")

    def errors(point: _Point, start: _Point) -> tuple[Tensor, Tensor]:
        decrease = point.value - start.value - c1 * point.step * start.slope
        if c3 is not None:
            by_slope = point.slope - (2 * c1 - 1) * start.slope
            decrease = torch.minimum(torch.maximum(by_slope, point.value - start.value - c3 * start.value.abs()), decrease)
        return _error(decrease), _error(point.slope.abs() - c2 * start.slope.abs())

    def search(line: "_Line", evaluate: Callable[[Any], tuple[Any, Any]], start: _Point, guess: Tensor, state: _Zoom) -> _Zoom:
        """One trial, and what follows from it."""
        longer = torch.where(state.count == 0, guess, grow * state.point.step)
        reached = torch.zeros_like(state.found) if longest is None else longer >= longest
        longer = longer if longest is None else longer.clamp_max(longest)
        step = torch.where(state.found, _inside(state.low, state.high, state.third), longer).to(guess.dtype)
        value, grad = evaluate(line.at(step))
        new = _Point(step, *line.seen(value, grad))
        grad, count = line.like_params(grad), state.count + 1
        decrease_error, curvature_error = (x.to(step.dtype) for x in errors(new, start))
        good = torch.maximum(decrease_error, curvature_error) <= tol
        better = (decrease_error <= tol) & (~state.found | (new.value < state.safe.value))
        safe, safe_grad = tree.where(better, (new, grad), (state.safe, state.safe_grad))

        # Algorithm 3.5: the last trial and this one are the ends of an interval, or steps get longer.
        last, low, high = state.point, state.low, state.high
        risen = (decrease_error > 0) | ((new.value >= last.value) & (state.count > 0))
        turned = (new.slope >= 0) & ~risen
        outer = tree.where(turned, (new, last), (last, new))
        found = risen | turned | good
        longest_is_good = reached & ~found

        # Algorithm 3.6: this trial is one of the ends, and the other one stays or is the lower one of before.
        above = (decrease_error > 0) | (new.value >= low.value)
        across = (new.slope * (high.step - low.step) >= 0) & ~above
        inner = tree.where(above, (low, new), (new, tree.where(across, low, high)))
        third = tree.where(above | across, high, low)
        enough = ((high.step - low.step).abs() <= shortest) & (safe.step > 0)

        ends = tree.where(state.found, inner, outer)
        done = good | (~state.found & longest_is_good)
        failed = ((count >= at_most) | (state.found & enough)) & ~done
        fall_back = failed & ((safe.step > 0) | decrease_error.isinf())
        new, grad = tree.where(fall_back, (safe, safe_grad), (new, grad))
        third = tree.where(state.found, third, outer[0])
        return _Zoom._make(
            (
                *(count, new, grad, safe, safe_grad, *ends, third),
                *(decrease_error, curvature_error, state.found | found, done | failed),
            )
        )

    def init(params: Any) -> ScaleByZoomLinesearchState:
        one, count = _one(params), tree.new_count(params)
        info = ZoomLinesearchInfo(count, torch.inf * one, torch.inf * one)
        return ScaleByZoomLinesearchState(one, torch.inf * one, tree.zeros_like(params), info)

    def update(
        updates: Any,
        state: ScaleByZoomLinesearchState,
        params: Any = None,
        *,
        value: Any = None,
        grad: Any = None,
        value_fn: Any = None,
        value_and_grad_fn: Any = None,
        **extra: Any,
    ) -> tuple[Any, ScaleByZoomLinesearchState]:
        check_state("scale_by_zoom_linesearch", state, ScaleByZoomLinesearchState)
        function = value_and_grad_fn or value_fn
        require("scale_by_zoom_linesearch", params=params, value=value, grad=grad, value_fn=function)
        fun = _with_arguments(function, extra)
        evaluate = fun if value_and_grad_fn is not None else tree.value_and_grad(fun)

        with torch.no_grad():
            line = _Line(params, updates, state.learning_rate)
            start = _Point(torch.zeros_like(line.like), *line.seen(value, grad))
            given, no = line.like_params(grad), torch.zeros_like(line.like, dtype=torch.bool)
            one, infinite = torch.ones_like(line.like), torch.full_like(line.like, torch.inf)
            guess = one if initial_guess_strategy == "one" else torch.where(state.learning_rate > 0, state.learning_rate, one)
            begin = _Zoom(
                *(torch.zeros_like(state.info.num_linesearch_steps), start, given, start, given, start, start, start),
                *(infinite, infinite, no, no),
            )
            trial = functools.partial(search, line, evaluate, start, guess)
            end, _ = _searched(trial, begin, lambda state: state.over, at_most)
            if verbose:
                failed = torch.maximum(end.decrease_error, end.curvature_error) > tol
                _say("scale_by_zoom_linesearch", failed, start.value, start.slope, end.point.step, end.decrease_error)
            rate, info = end.point.step, ZoomLinesearchInfo(end.count, end.decrease_error, end.curvature_error)
        return scale(rate).update(updates, ())[0], ScaleByZoomLinesearchState(rate, end.point.value, end.grad, info)

    return transformation(init, update)


def value_and_grad_from_state(value_fn: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """The function that gives value and gradient from the state of a line search, which knows them where it has led.

    ``value_and_grad(params, *args, state=state, **kwargs)`` are the value and the gradient that the state holds, or, before the
    first update, or where they are not finite, ``value_fn(params, *args, **kwargs)`` and its gradient by :func:`torch.func.grad`.
    Whether the state is of these parameters and arguments is not looked at: each batch of data is another function. Eagerly
    this waits for the device; within ``vmap`` and compiled, where no number can be read, the function is evaluated in any case.

    Args:
        value_fn: a function of a tree of tensors and perhaps more, to a 0-dim tensor.

    Raises:
        ValueError: when called: the state holds no value, or no gradient (``store_grad=True`` keeps it), or several.

    Example:
        >>> tx = optfn.chain(optfn.sgd(1.0), scale_by_zoom_linesearch(15))
        >>> fun, params = lambda p: (p**2).sum(), torch.tensor([1.0, 2.0])
        >>> value_and_grad, state = value_and_grad_from_state(fun), tx.init(params)
        >>> for _ in range(2):
        ...     value, grad = value_and_grad(params, state=state)
        ...     updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=fun)
        ...     params = optfn.apply_updates(params, updates)
        >>> params
        tensor([0., 0.])
    """

    def value_and_grad(params: Any, *args: Any, state: Any, **kwargs: Any) -> tuple[Any, Any]:
        try:
            value, grad = tree.get(state, "value"), tree.get(state, "grad")
        except KeyError as error:
            raise ValueError(f"value_and_grad_from_state: {error.args[0]}") from None
        if type(grad) is tuple and not grad:
            raise ValueError("value_and_grad_from_state: the state keeps no gradient: make the line search with store_grad=True")
        known = value.isfinite()
        read = _read(known)
        if read:
            return value, grad
        new = tree.value_and_grad(lambda p: value_fn(p, *args, **kwargs))(params)
        return new if read is False else tree.where(known, (value, grad), new)

    return value_and_grad


class _Line:
    """The points along updates, and what is found there as numbers of one dtype."""

    def __init__(self, params: Any, updates: Any, like: Tensor) -> None:
        self.leaves = aligned(updates, params)
        self.spec = self.leaves.spec
        self.params = tree.map(Tensor.detach, params)
        self.updates = [None if u is None else u.detach() for u in self.leaves.grads]
        self.like = like.detach()
        self.pieces = as_pieces(self.leaves)
        self.shares = Shares(self.pieces.homes or ())

    def at(self, step: Tensor) -> Any:
        """The parameters after a step, as :func:`optfn.apply_updates` makes them of the scaled updates."""
        return added(self.params, scale(step).update(tree.unflatten(self.spec, self.updates), ())[0])[0]

    def seen(self, value: Any, grad: Any = None) -> tuple[Tensor, Tensor]:
        """Value and slope, the same on all processes: the mean of the values that they have, the sum of their slopes."""
        slope = torch.zeros_like(self.like) if grad is None else self.slope(grad)
        found = self.shares.totals(self.number(self.shares.of_mean(value, slope)), slope)
        return found[0], found[1]

    def number(self, x: Any) -> Tensor:
        x = torch.as_tensor(x, device=self.like.device)
        if x.ndim:
            raise ValueError(f"a line search takes a value that is a 0-dim tensor, got shape {tuple(x.shape)}")
        return x.detach().to(self.like.dtype)

    def slope(self, grad: Any) -> Tensor:
        """The derivative along the updates; a leaf that does not move, or has no gradient, adds nothing."""
        total, grads = torch.zeros_like(self.like), tree.match(self.spec, grad, "grad", "params")
        pieces = as_pieces(self.leaves._replace(grads=grads)).grads
        for i, (u, g) in enumerate(zip(self.pieces.grads, pieces, strict=True)):
            if u is not None and g is not None:
                product = (as_real(u.detach()).to(total.dtype) * as_real(g.detach()).to(total.dtype)).sum().to(total.device)
                total = total + (product if self.shares.group is None else product / self.shares.parts[i])
        return total

    def like_params(self, grad: Any) -> Any:
        """A gradient as the state keeps it, zeros for a parameter that has none."""
        grads, params = tree.match(self.spec, grad, "grad", "params"), tree.flatten(self.params)[0]

        def kept(g: Any, p: Any) -> Any:
            return None if p is None else torch.zeros_like(p) if g is None else placed_as(g.detach().to(p.dtype), p)

        return tree.unflatten(self.spec, [kept(g, p) for g, p in zip(grads, params, strict=True)])


def _searched(trial: Callable[[State], State], state: State, over: Callable[[State], Tensor], at_most: int) -> tuple[State, bool]:
    """What trials lead to, until one of them was the last, and whether that could be read of the numbers."""
    read: bool | None = True
    for _ in range(at_most):
        ended = over(state)
        read = _read(ended)
        if read:
            break
        new = trial(state)
        state = new if read is False else tree.where(ended, state, new)
    return state, read is not None


def _read(x: Tensor) -> bool | None:
    """A 0-dim bool, None where it cannot be read: within vmap, on the meta device, and while a step is traced."""
    return bool(x) if tree.decided(x) else None


def _inside(low: _Point, high: _Point, third: _Point) -> Tensor:
    """A step between two: the minimum of a cubic or a parabola if it is not close to an end, else the middle."""
    db, dc = high.step - low.step, third.step - low.step
    rise, rise_of_third = high.value - low.value - low.slope * db, third.value - low.value - low.slope * dc
    a = (dc**2 * rise - db**2 * rise_of_third) / ((db * dc) ** 2 * (db - dc))
    b = (-(dc**3) * rise + db**3 * rise_of_third) / ((db * dc) ** 2 * (db - dc))
    cubic = low.step + (-b + (b * b - 3 * a * low.slope).sqrt()) / (3 * a)
    parabola = low.step - low.slope / (2 * (rise / db**2))

    def within(step: Tensor, margin: float) -> Tensor:
        left, right = torch.minimum(low.step, high.step), torch.maximum(low.step, high.step)
        return (step > left + margin * db.abs()) & (step < right - margin * db.abs())

    middle = torch.where(within(parabola, 0.1), parabola, (low.step + high.step) / 2)
    return torch.where(within(cubic, 0.2), cubic, middle)


def _error(x: Tensor) -> Tensor:
    """By how much a condition is not met: 0 where it is, inf where it is NaN."""
    return torch.where(x.isnan(), torch.inf, x.clamp_min(0))


def _with_arguments(function: Callable[..., Any], extra: Mapping[str, Any]) -> Callable[..., Any]:
    """A function with those of the extra arguments that are its own, by their names."""
    if not extra:
        return function
    names = inspect.signature(function).parameters
    return functools.partial(function, **{name: x for name, x in extra.items() if name in names})


def _with_pullback(function: Callable[..., Any], params: Any) -> tuple[Any, Callable[[], Any]]:
    """The value of a function, and what gives its gradient when that is wanted."""
    present, rebuilt = tree.tensors(params)
    if any(map(is_sharded, present)):
        taped = tree.Taped(lambda present: function(rebuilt(present)), present)
        return taped.value.detach(), lambda: rebuilt(taped.grads())
    value, pullback, *_ = torch.func.vjp(lambda *present: function(rebuilt(present)), *present)
    return value, lambda: rebuilt(pullback(torch.ones_like(value)))


def _say(owner: str, failed: Tensor, value: Tensor, slope: Tensor, step: Tensor, error: Tensor) -> None:
    if _read(failed):
        found = f"value {value.item()}, slope {slope.item()}, step {step.item()}, decrease error {error.item()}"
        downhill = "" if slope.item() < 0 else "; the updates do not point downhill"
        print(f"{owner}: no step met the conditions: {found}{downhill}")


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    return value


def _one(params: Any) -> Tensor:
    """A 1 in the widest real dtype of the parameters, float32 at least."""
    found, _ = tree.checked(params, "params")
    device = next((p.device for p in found if p is not None), None)
    return torch.ones((), dtype=real_dtype(compute_dtype(*found)), device=device)
