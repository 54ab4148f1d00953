"""L-BFGS: torch's, with a fixed step or a strong-Wolfe line search, and Optax's, which is a direction alone."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import alias, check_state, integer, number, require, scalar_or_schedule
from optfn.core import GradientTransformation, added, transformation
from optfn.leafwise import leafwise, stateless_with_tree_map
from optfn.numerics import Scalar, norm, ratio, unravel
from optfn.schedules import ScalarOrSchedule, as_time
from optfn.sharding import entrywise, like, local, with_dims
from optfn.vectors import Vectors

__all__ = ["LbfgsState", "ScaleByLBFGSState", "lbfgs", "scale_by_lbfgs"]

CURVATURE = 1e-10  # torch keeps a pair whose y's is above this
MAX_LS = 25  # and its line search evaluates this often
C1, C2 = 1e-4, 0.9  # sufficient decrease and curvature: the constants that Nocedal and Wright give for quasi-Newton methods


_Point: TypeAlias = tuple[float, float, float]
"""Of a line search: the step, and value and slope there."""


class _NoSlots(NamedTuple):
    """What is kept of a leaf by itself."""


class LbfgsState(NamedTuple):
    r"""The state of :func:`lbfgs`: all leaves as one vector of n entries, in the order of :func:`optfn.tree.flatten`.

    Its dtype is the widest of the leaves', float32 at least; a complex entry is two. Where leaves lie on several processes,
    a vector is a tree whose leaves lie there too, those of ``s`` and ``y`` with a first dimension of m.

    Attributes:
        n_iter: iterations so far, a 0-dim int64 tensor.
        pairs: pairs kept so far, a 0-dim int64 tensor; the newest is in row ``(pairs - 1) % m``.
        last_grad: the gradient of the last iteration, n entries.
        last_step: what the last iteration added to the parameters, n entries; where the slope stopped it, as in torch, what
            it would have added.
        s: the last m steps, m rows of n entries; zeros where there is none yet.
        y: the changes of the gradient over them, as ``s``.
        products: :math:`s_i^\top y_j` of each pair with itself and with the newer ones, m rows of m entries; the identity
            where there are none yet.
        gamma: the scale of the first approximation of the inverse Hessian, 0-dim.
    """

    n_iter: Tensor
    pairs: Tensor
    last_grad: Tensor
    last_step: Tensor
    s: Tensor
    y: Tensor
    products: Tensor
    gamma: Tensor


@alias
def lbfgs(
    lr: ScalarOrSchedule = 1.0,
    *,
    tolerance_grad: Scalar = 1e-7,
    tolerance_change: Scalar = 1e-9,
    history_size: int = 100,
    line_search_fn: Literal["strong_wolfe"] | None = None,
    max_ls: int | None = None,
) -> GradientTransformation:
    r"""Limited-memory BFGS: :class:`torch.optim.LBFGS`, one of its iterations an update.

    With :math:`s_i` the last :math:`m` steps and :math:`y_i` the changes of the gradient over them, oldest first,

    .. math::
        &q = -g_k; \quad \text{newest to oldest:} \quad
            \alpha_i = s_i^\top q / y_i^\top s_i, \quad q \leftarrow q - \alpha_i y_i \\
        &d = \gamma_k q; \quad \text{oldest to newest:} \quad
            d \leftarrow d + s_i (\alpha_i - y_i^\top d / y_i^\top s_i) \\
        &p_{k+1} = p_k + t_k d_k, \qquad \gamma_k = y_{k-1}^\top s_{k-1} / y_{k-1}^\top y_{k-1}

    A pair is kept if :math:`y^\top s > 10^{-10}`. The step :math:`t_k` is the learning rate :math:`\eta`, the first one
    :math:`\eta \min(1, 1 / \|g\|_1)`; with a line search it is where the search begins.

    The two loops are two triangular systems in the products :math:`s_i^\top y_j`, and are solved as such, for all
    pairs at once: a step is five products of a matrix with a vector, whatever :math:`m` is. As nothing is changed in place,
    it also writes the history anew.

    :func:`minimize` is the loop around it: ``minimize(fun, params, lbfgs(), max_steps=20, max_evals=25)`` is one
    ``torch.optim.LBFGS.step(closure)``, and the state that it returns goes into the next. In a loop of your own, updates
    become 0 where torch's step stops: where every entry of the gradient is within ``tolerance_grad`` of 0 (the state stays too),
    and where the slope :math:`g^\top d` is above ``-tolerance_change``.

    Without a line search tensors decide everything: a step compiles to one graph, batches and differentiates. With one it runs
    eagerly, as the number of evaluations depends on their values: the search is Python's control flow on numbers, which
    ``torch.compile(fullgraph=True)`` and ``vmap`` refuse. What it evaluates may be compiled.

    A line search needs ``params``, ``value`` and a function in every update, given by name: ``update(grads, state, params,
    value=..., value_fn=...)``. Extra arguments that it reads:

    - ``value``: of the function at ``params``.
    - ``value_fn(params) -> value``, or ``value_and_grad_fn(params) -> (value, grads)``.
    - ``grad``: the gradient of ``value``, if what is passed as updates is another, changed by an earlier link of a chain.
    - ``max_evals``: a bound as ``max_ls`` is, for this update.

    Its steps are what the next iteration remembers, so nothing after it in a chain may change them.

    Args:
        lr: :math:`\eta \ge 0`, a number, a 0-dim tensor or a schedule of the iterations.
        tolerance_grad: in the units of the gradient, at least 0.
        tolerance_change: in the units of the value, for the slope; in those of the parameters, for the interval that
            a line search still divides; at least 0.
        history_size: :math:`m \ge 1`. The state has :math:`2 m` times the size of the parameters.
        line_search_fn: None or ``"strong_wolfe"``.
        max_ls: evaluations that a line search may make after its first, at least 1; None makes it ``max_evals`` where that is
            given, as in torch, else 25.

    All leaves are one vector, on one device. As in torch a None gradient counts as zeros (so its parameter may move, by what
    is remembered), a complex entry as its real and imaginary part, and a sparse gradient is made dense. Half-precision leaves are
    float32 in the state. A trial point of the search with a value that is not finite counts as too far; torch may take it.

    Raises:
        TypeError: from ``init`` and ``update``: a leaf that is no floating-point tensor; what a line search needs is missing.
        ValueError: an argument out of range; from ``update``: another structure or shape than that of the params, leaves on
            several devices.

    Reference:
        Nocedal and Wright, Numerical Optimization, 2nd edition, 2006, algorithm 7.4 (two loops), algorithms 3.5 and 3.6 (line
        search), equation 3.59 (cubic interpolation); Byrd, Nocedal and Schnabel, `Representations of quasi-Newton
        matrices <https://doi.org/10.1007/BF01582063>`_, 1994 (triangular form).

    Example:
        >>> tx, params = lbfgs(), {"w": torch.tensor([1.0, -1.0])}
        >>> state = tx.init(params)
        >>> for _ in range(10):
        ...     grads = {"w": torch.tensor([2.0, 0.5]) * params["w"]}
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optfn.apply_updates(params, updates)
        >>> params["w"].abs().max() < 1e-4
        tensor(True)
    """
    rate: Any = scalar_or_schedule("lr", lr, at_least=0)
    flat_enough = number("tolerance_grad", tolerance_grad, at_least=0)
    too_small = number("tolerance_change", tolerance_change, at_least=0)
    if line_search_fn not in (None, "strong_wolfe"):
        raise ValueError(f"line_search_fn must be None or 'strong_wolfe', got {line_search_fn!r}")
    for name, count in (("history_size", history_size), ("max_ls", max_ls)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")

    # Rules that do nothing: what the lift checks of params and gradients is checked of these.
    params_checked = leafwise(lambda p: _NoSlots(), lambda g, slots, p, step: (g, slots), elementwise=True)
    grads_checked = stateless_with_tree_map(lambda g, p, sizes: g, elementwise=False, norms=lambda g, p: (), sparse="dense")

    def gathered(grads: Any, params: Any) -> tuple[list[Tensor | None], Any]:
        """The gradients of all leaves, zeros for one that is None, and their structure."""
        found, spec = tree.flatten(grads_checked.update(grads, (), params)[0])
        owners = found if params is None else tree.match(spec, params, "params", "updates")
        return [torch.zeros_like(p) if g is None and p is not None else g for g, p in zip(found, owners, strict=True)], spec

    def init(params: Any) -> LbfgsState:
        params_checked.init(params)
        leaves, spec = tree.flatten(params)
        vectors = Vectors("lbfgs", leaves, spec)
        zero = torch.zeros_like(vectors.of(leaves))
        history = zero.new_zeros(history_size, len(zero))
        count = torch.zeros((), dtype=torch.int64, device=zero.device)
        products = torch.eye(history_size, dtype=zero.dtype, device=zero.device)
        kept = [vectors.kept(x) for x in (zero, zero.clone(), history, history.clone())]
        return LbfgsState._make((count, count.clone(), *kept, products, zero.new_ones(())))

    def update(
        updates: Any,
        state: LbfgsState,
        params: Any = None,
        *,
        value: Any = None,
        grad: Any = None,
        value_fn: Any = None,
        value_and_grad_fn: Any = None,
        max_evals: int | None = None,
        **extra: Any,
    ) -> tuple[Any, LbfgsState]:
        check_state("lbfgs", state, LbfgsState)
        grads, spec = gathered(updates, params)
        vectors = Vectors("lbfgs", grads, spec)
        counted, totals = vectors.counted, vectors.shares.totals
        last_grad, last_step, s, y = map(vectors.read, (state.last_grad, state.last_step, state.s, state.y))
        g = vectors.of(grads, last_grad)

        # The last step becomes a pair, in place of the oldest one. At an optimum nothing is kept.
        change = g - last_grad
        ys, yy, far, size = totals(
            counted(change).dot(last_step),
            counted(change).dot(change),
            (~(g.abs() <= flat_enough)).sum(),
            counted(g.abs()).sum(),
        )
        active = far > 0
        keep = active & (ys > CURVATURE)
        rows = torch.arange(history_size, device=g.device)
        newest = keep & (rows == state.pairs % history_size)
        s_all = torch.where(newest[:, None], last_step, s)
        y_all = torch.where(newest[:, None], change, y)
        sy, sg = totals(s_all @ counted(change), s_all @ counted(g))
        products = torch.where(newest, sy[:, None], state.products)
        gamma = torch.where(keep, ys / torch.where(keep, yy, 1), state.gamma)
        pairs = state.pairs + keep

        d = _direction(g, sg, s_all, y_all, products, gamma, pairs, vectors)
        (slope,) = totals(counted(g).dot(d))
        moves = active & ~(slope > -too_small)
        eta: Any = rate(as_time(state.n_iter)) if callable(rate) else rate
        t: Any = torch.where(state.n_iter == 0, 1 / size.clamp_min(1), 1) * eta

        if line_search_fn is not None:
            require("lbfgs", params=params, value=value, value_fn=value_and_grad_fn or value_fn)
            evaluate = value_and_grad_fn or tree.value_and_grad(value_fn)
            limits = [n for n in (max_ls, max_evals) if n is not None] or [MAX_LS]
            with torch.no_grad():

                def seen(f: Any, df: Any) -> tuple[float, float]:
                    slope = counted(vectors.of(gathered(df, params)[0], g)).dot(d)
                    value, slope = totals(vectors.shares.of_mean(f, slope), slope)
                    return float(value), float(slope)

                def along(t: float) -> tuple[float, float]:
                    point = added(params, vectors.leaves(t * d))[0]
                    with torch.enable_grad():
                        found = evaluate(point)
                    return seen(*found)

                if moves.item():
                    # A mask hides nothing of a gradient that is given.
                    at_0 = seen(value, updates if grad is None else tree.map(lambda p, x: x, params, grad))
                    shortest = float(too_small / vectors.shares.largest(d.abs()))
                    t = _strong_wolfe(along, float(t), (0.0, *at_0), shortest, min(limits))

        step = t * d
        last = torch.where(active, g, last_grad), torch.where(active, step, last_step)
        step = torch.where(moves, step, 0)
        kept = [vectors.kept(x) for x in (*last, s_all, y_all)]
        return vectors.leaves(step), LbfgsState._make((state.n_iter + active, pairs, *kept, products, gamma))

    return transformation(init, update)


class ScaleByLBFGSState(NamedTuple):
    r"""The state of :func:`scale_by_lbfgs`, whose trees have the structure and the dtypes of the parameters.

    Attributes:
        count: updates so far, a 0-dim int64 tensor.
        params: the parameters at the last update.
        updates: what the last update was handed, the gradients.
        diff_params_memory: the last m steps, those of each leaf stacked in a first dimension of m, the newest in row
            ``(count - 1) % m``; zeros where there is none yet.
        diff_updates_memory: the changes of the gradients over them, as ``diff_params_memory``.
        weights_memory: :math:`1 / y_i^\top s_i` of each pair, m entries, of the widest real dtype of the parameters, float32 at
            least; 0 where there is none yet.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    params: Any
    updates: Any
    diff_params_memory: Any
    diff_updates_memory: Any
    weights_memory: Tensor


def scale_by_lbfgs(memory_size: int = 10, scale_init_precond: bool = True) -> GradientTransformation:
    r"""Multiply gradients by the approximation of the inverse Hessian that L-BFGS makes of the last steps.

    With :math:`s_i` the last :math:`m` changes of the parameters and :math:`y_i` those of the gradients, oldest first,

    .. math::
        &u = g_k; \quad \text{newest to oldest:} \quad
            \alpha_i = s_i^\top u / y_i^\top s_i, \quad u \leftarrow u - \alpha_i y_i \\
        &u \leftarrow \gamma_k u; \quad \text{oldest to newest:} \quad
            u \leftarrow u + s_i (\alpha_i - y_i^\top u / y_i^\top s_i) \\
        &\gamma_k = y_{k-1}^\top s_{k-1} / y_{k-1}^\top y_{k-1}, \qquad \gamma_0 = \min(1, 1 / \|g_0\|_2)

    The pairs are what the parameters and the gradients have changed by since the last update, so links of a chain after this one
    may change the step. A line search should: :func:`scale_by_zoom_linesearch` makes :math:`y^\top s > 0`, without which this is
    no direction of descent. Pairs are kept whatever their sign, but not where :math:`y^\top s = 0`.

    Optax's ``lbfgs`` is ``chain(scale_by_lbfgs(), scale(-1.0), scale_by_zoom_linesearch(20, initial_guess_strategy="one"))``;
    :func:`lbfgs` is torch's.

    Args:
        memory_size: :math:`m \ge 1`. The state has :math:`2 m + 2` times the size of the parameters.
        scale_init_precond: False takes :math:`\gamma_k = 1`, :math:`\gamma_0` too.

    All leaves are one vector, on one device, a complex entry as its real and imaginary part. A leaf whose update is None counts
    as one that did not move. A step differentiates also through :math:`\gamma_0`, which is a constant to Optax.

    Raises:
        TypeError: from ``init`` and ``update``: a leaf that is no floating-point tensor; ``params`` is missing.
        ValueError: ``memory_size`` is less than 1; from ``update``: another structure or shape than that of the params or of the
            state, leaves on several devices.

    Reference:
        Nocedal and Wright, Numerical Optimization, 2nd edition, 2006, algorithms 7.4 and 7.5; Liu and Nocedal, `On the limited
        memory BFGS method for large scale optimization <https://doi.org/10.1007/BF01589116>`_, 1989.

    Example:
        >>> tx, params = optfn.chain(scale_by_lbfgs(), optfn.scale(-1.0)), {"w": torch.tensor([1.0, -1.0])}
        >>> state = tx.init(params)
        >>> for _ in range(10):
        ...     grads = {"w": torch.tensor([2.0, 0.5]) * params["w"]}
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optfn.apply_updates(params, updates)
        >>> params["w"].abs().max() < 1e-4
        tensor(True)
    """
    memory_size = integer("memory_size", memory_size, 1)
    # Rules that do nothing: what the lift checks of params and gradients is checked of these.
    params_checked = leafwise(lambda p: _NoSlots(), lambda g, slots, p, step: (g, slots), elementwise=True)
    grads_checked = stateless_with_tree_map(lambda g, p, sizes: g, elementwise=False, norms=lambda g, p: (), needs_params=True)

    def init(params: Any) -> ScaleByLBFGSState:
        params_checked.init(params)
        vector = Vectors("scale_by_lbfgs", *tree.flatten(params)).of(tree.leaves(params))
        zeros = [tree.zeros_like(params) for _ in range(2)]

        def rows(p: Tensor) -> Tensor:
            return with_dims(local(p).detach().new_zeros(memory_size, *local(p).shape), p, 1)

        memory = [tree.map(rows, params) for _ in range(2)]
        return ScaleByLBFGSState._make((tree.new_count(params), *zeros, *memory, vector.new_zeros(memory_size)))

    def update(updates: Any, state: ScaleByLBFGSState, params: Any = None, **extra: Any) -> tuple[Any, ScaleByLBFGSState]:
        check_state("scale_by_lbfgs", state, ScaleByLBFGSState)
        grads, spec = tree.flatten(grads_checked.update(updates, (), params)[0])
        if all(g is None for g in grads):
            return updates, state
        kept = zip(state._fields[1:5], state[1:5], strict=True)
        owners, before, last, *memory = (tree.match(spec, x, name, "updates") for name, x in (("params", params), *kept))
        vectors = Vectors("scale_by_lbfgs", owners, spec)
        counted, totals = vectors.counted, vectors.shares.totals
        here = [i for i, p in enumerate(owners) if p is not None]
        for i in here:
            if before[i] is None or before[i].shape != owners[i].shape:
                path, shape = tree.paths(params)[i], tuple(owners[i].shape)
                raise ValueError(f"scale_by_lbfgs: {path!r} has shape {shape}, and had another when the state was made")

        def vector(leaf: Callable[[int], Tensor]) -> Tensor:
            """All leaves, zeros for one whose update is None."""
            leaves = [torch.zeros_like(owners[i]) if grads[i] is None else leaf(i) for i in here]
            return vectors.of(leaves, dtype=state.weights_memory.dtype)

        # The last step becomes a pair, in place of the oldest one.
        g = vector(lambda i: grads[i])
        s, y = vector(lambda i: owners[i]) - vector(lambda i: before[i]), g - vector(lambda i: last[i])
        squares = [] if vectors.shares.group is None else [counted(g).dot(g)]
        ys, yy, *squares = totals(counted(y).dot(s), counted(y).dot(y), *squares)
        size, begun = squares[0].sqrt() if squares else norm(g), state.count > 0
        newest = begun & (torch.arange(memory_size, device=g.device) == (state.count - 1) % memory_size)
        weights = torch.where(newest, ratio(torch.ones_like(ys), ys), state.weights_memory)
        rows = [vectors.read(tree.unflatten(spec, x), g.dtype, always=True) for x in memory]
        s_all, y_all = (
            torch.where(newest[:, None], torch.where(ys == 0, 0, new), old) for new, old in zip((s, y), rows, strict=True)
        )

        # A pair that is not there is zeros, with a product of 1.
        sy, sg = totals(s_all @ counted(y_all).mT, s_all @ counted(g))
        products = sy + torch.diag_embed((weights == 0).to(g.dtype))
        scaled = torch.where(begun, torch.where(yy > 0, ratio(ys, yy), 1), 1 / size.clamp_min(1))
        d = -_direction(g, sg, s_all, y_all, products, scaled if scale_init_precond else 1, state.count, vectors)

        likes = [p if x is None else x for x, p in zip(grads, owners, strict=True)]
        parts = zip(grads, unravel(d, [local(x) for x in likes]), owners, strict=True)
        directions = [None if x is None else like(u, p) for x, u, p in parts]

        def copied(g: Any, new: Any, old: Any) -> Any:
            return old if g is None else entrywise(lambda x: x.to(old.dtype, copy=True), new)

        pairs_of = ((owners, before), (grads, last))
        now = [[copied(*row) for row in zip(grads, new, old, strict=True)] for new, old in pairs_of]
        memory = [vectors.laid_out(unravel(x, [local(b) for b in before]), 1) for x in (s_all, y_all)]
        new = ScaleByLBFGSState._make((state.count + 1, *(tree.unflatten(spec, x) for x in now), *memory, weights))
        return tree.unflatten(spec, directions), new

    return transformation(init, update)


def _direction(
    g: Tensor, sg: Tensor, s: Tensor, y: Tensor, products: Tensor, gamma: Any, pairs: Tensor, vectors: Vectors
) -> Tensor:
    """The two loops. A pair that is not there yet is zeros, with a product of 1, and adds nothing. ``sg`` is S g.

    R is the upper triangle of the products, oldest pair first. The first loop is R a = -S g, the second, with b its quotients
    and c = a - b, is R'c = D a - Y q, where D is the diagonal of R.
    """
    rows = torch.arange(len(products), device=g.device)
    oldest_first, back = (rows + pairs) % len(products), (rows - pairs) % len(products)
    r = products[oldest_first][:, oldest_first].triu()
    a = torch.linalg.solve_triangular(r, -sg[oldest_first, None], upper=True)
    q = gamma * (-g - a[back, 0] @ y)
    (yq,) = vectors.shares.totals(y @ vectors.counted(q))
    c = torch.linalg.solve_triangular(r.mT, r.diagonal()[:, None] * a - yq[oldest_first, None], upper=False)
    return q + c[back, 0] @ s


def _strong_wolfe(along: Callable[[float], tuple[float, float]], t: float, start: _Point, shortest: float, max_ls: int) -> float:
    """The step at which the search ends. ``along(t)`` gives value and slope; a bracket that is ``shortest`` is not divided."""
    _, f0, slope0 = start

    def trial(t: float) -> _Point:
        f, slope = along(t)
        return t, f if math.isfinite(f) else math.inf, slope

    def too_high(point: _Point) -> bool:
        return point[1] > f0 + C1 * point[0] * slope0

    def is_flat(point: _Point) -> bool:
        return abs(point[2]) <= -C2 * slope0

    # Longer and longer steps, until there is a minimum between two of them.
    before, point, trials = start, trial(t), 0
    while trials < max_ls:
        if too_high(point) or (trials > 1 and point[1] >= before[1]):
            break
        if is_flat(point):
            return point[0]
        if point[2] >= 0:
            break
        longer = _cubic(before, point, (point[0] + 0.01 * (point[0] - before[0]), 10 * point[0]))
        before, point, trials = point, trial(longer), trials + 1
    else:
        before = start

    # The bracket is divided, its lower end kept. Which of two equal ends is the lower one goes by their places, as in torch.
    bracket, stuck = [before, point], False
    low = 0 if before[1] <= point[1] else 1
    while trials < max_ls:
        left, right = sorted((bracket[0][0], bracket[1][0]))
        if right - left < shortest:
            break
        t, margin = _cubic(bracket[0], bracket[1], (left, right)), 0.1 * (right - left)
        # A trial near an end is moved inside where it is at the end, or where the last one was near an end too.
        near = min(right - t, t - left) < margin
        if near and (stuck or t >= right or t <= left):
            t, near = (right - margin if abs(t - right) < abs(t - left) else left + margin), False
        stuck = near
        point, trials = trial(t), trials + 1
        if too_high(point) or point[1] >= bracket[low][1]:
            bracket[1 - low] = point
            low = 0 if bracket[0][1] <= bracket[1][1] else 1
        elif is_flat(point):
            return point[0]
        else:
            if point[2] * (bracket[1 - low][0] - bracket[low][0]) >= 0:
                bracket[1 - low] = bracket[low]
            bracket[low] = point
    return bracket[low][0]


def _cubic(a: _Point, b: _Point, bounds: tuple[float, float]) -> float:
    """The minimum within bounds of the cubic through two points with these slopes; the middle where it has none."""
    (x1, f1, g1), (x2, f2, g2) = sorted((a, b), key=lambda point: point[0])
    d1 = g1 + g2 - 3 * (f1 - f2) / (x1 - x2) if x1 != x2 else math.nan
    square = d1 * d1 - g1 * g2
    if 0 <= square < math.inf and (curvature := g2 - g1 + 2 * math.sqrt(square)) != 0:
        return min(max(x2 - (x2 - x1) * ((g2 + math.sqrt(square) - d1) / curvature), bounds[0]), bounds[1])
    return (bounds[0] + bounds[1]) / 2
