"""Measurements of the updates on their way, kept in the state."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state, number
from optfn.core import GradientTransformation, transformation
from optfn.numerics import Scalar, compute_dtype

__all__ = ["MeasureWithEmaState", "MonitorState", "SnapshotState", "measure_with_ema", "monitor", "snapshot"]

Measure = Callable[[Any], Any]
"""A function of the updates to a tensor, or to a tree of tensors."""


class SnapshotState(NamedTuple):
    """The state of :func:`snapshot`.

    Attributes:
        measurement: the name to what was measured.
    """

    measurement: dict[str, Any]


def snapshot(measure_name: str, measure: Measure) -> GradientTransformation:
    """Keep a measurement of the updates in the state; the updates pass unchanged.

    It is of the updates as they are at this place of a chain: ``optfn.tree.get(state, measure_name)``. Before the first update it
    is the measurement of the parameters, as in Optax; its structure and dtypes stay. Where it is None later the last one stays.

    Args:
        measure_name: what to call it.
        measure: ``measure(updates)``, a tensor, a number or a tree of such.

    Example:
        >>> tx = optfn.chain(optfn.sgd(lr=0.5), snapshot("norm", optfn.tree.norm), optfn.clip_by_global_norm(1.0))
        >>> params = {"w": torch.zeros(2)}
        >>> updates, state = tx.update({"w": torch.tensor([6.0, 8.0])}, tx.init(params), params)
        >>> optfn.tree.get(state, "norm")
        tensor(5.)
    """

    def init(params: Any) -> SnapshotState:
        return SnapshotState({measure_name: tree.map(lambda x: torch.as_tensor(x).detach().clone(), measure(params))})

    def update(updates: Any, state: SnapshotState, params: Any = None, **extra: Any) -> tuple[Any, SnapshotState]:
        check_state("snapshot", state, SnapshotState)
        return updates, SnapshotState({measure_name: _kept(measure(updates), state.measurement[measure_name])})

    return transformation(init, update)


class MonitorState(NamedTuple):
    """The state of :func:`monitor`.

    Attributes:
        measurements: name to what was measured last.
        measure_states: the states of those measurements that have one, ``()`` for the others, in their order.
    """

    measurements: dict[str, Any]
    measure_states: tuple[Any, ...]


def monitor(measures: Mapping[str, Measure | GradientTransformation]) -> GradientTransformation:
    """Keep several measurements of the updates in the state; the updates pass unchanged.

    Before the first update they are zeros, of the shapes and dtypes that they will have: the state has one structure from the first
    step on, where Optax's has no measurements before it.

    Args:
        measures: name to a function, as in :func:`snapshot`, or to a transformation, whose updates are what is measured:
            :func:`measure_with_ema`.

    Example:
        >>> average = measure_with_ema(lambda updates: optfn.tree.norm(updates) > 1, decay=0.9)
        >>> measured = monitor({"norm": optfn.tree.norm, "is_clipped": average})
        >>> tx = optfn.chain(optfn.sgd(lr=0.5), measured, optfn.clip_by_global_norm(1.0))
        >>> params = {"w": torch.zeros(2)}
        >>> updates, state = tx.update({"w": torch.tensor([6.0, 8.0])}, tx.init(params), params)
        >>> optfn.tree.get(state, "norm"), optfn.tree.get(state, "is_clipped")
        (tensor(5.), tensor(1.))
    """
    parts = [x if isinstance(x, GradientTransformation) else _stateless(x) for x in measures.values()]

    def init(params: Any) -> MonitorState:
        states = tuple(part.init(params) for part in parts)
        found = [part.update(params, state, params)[0] for part, state in zip(parts, states, strict=True)]
        return MonitorState(dict(zip(measures, tree.map(torch.zeros_like, found), strict=True)), states)

    def update(updates: Any, state: MonitorState, params: Any = None, **extra: Any) -> tuple[Any, MonitorState]:
        check_state("monitor", state, MonitorState)
        pairs = [part.update(updates, s, params, **extra) for part, s in zip(parts, state.measure_states, strict=True)]
        found = {name: _kept(x, state.measurements[name]) for name, (x, _) in zip(measures, pairs, strict=True)}
        return updates, MonitorState(found, tuple(s for _, s in pairs))

    return transformation(init, update)


class MeasureWithEmaState(NamedTuple):
    """The state of :func:`measure_with_ema`.

    Attributes:
        count: measurements so far, a 0-dim int64 tensor.
        ema: their average, with the structure of a measurement.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    ema: Any


def measure_with_ema(
    measure: Measure, decay: Scalar, debias: bool = True, accumulator_dtype: torch.dtype | None = None
) -> GradientTransformation:
    r"""An exponential moving average of a measurement, for :func:`monitor`.

    .. math:: a_t = \beta\, a_{t-1} + (1 - \beta)\, m_t, \qquad \hat a_t = a_t / (1 - \beta^t)

    Args:
        measure: ``measure(updates)``, as in :func:`snapshot`; bools count as 0 and 1.
        decay: :math:`\beta` in ``[0, 1)``.
        debias: whether to give :math:`\hat a`, or :math:`a`.
        accumulator_dtype: dtype of the average in the state; that of the measurement, float32 at least, if None.

    Returns:
        A transformation whose updates are the average, and no updates to apply.

    Raises:
        ValueError: ``decay`` out of range.

    Example:
        >>> tx = measure_with_ema(optfn.tree.norm, decay=0.5)
        >>> state = tx.init(torch.zeros(1))
        >>> for value in (2.0, 8.0):
        ...     average, state = tx.update(torch.tensor([value]), state)
        ...     print(average)
        tensor(2.)
        tensor(6.)
    """
    beta = number("decay", decay, at_least=0, below=1)

    def measured(updates: Any) -> Any:
        return tree.map(lambda x: x.to(compute_dtype(x)), tree.map(torch.as_tensor, measure(updates)))

    def init(params: Any) -> MeasureWithEmaState:
        return MeasureWithEmaState(tree.new_count(params), tree.zeros_like(measured(params), accumulator_dtype))

    def update(updates: Any, state: MeasureWithEmaState, params: Any = None, **extra: Any) -> tuple[Any, MeasureWithEmaState]:
        check_state("measure_with_ema", state, MeasureWithEmaState)
        count = state.count + 1
        average = tree.update_moment(measured(updates), state.ema, beta, 1)
        found = tree.bias_correction(average, beta, count) if debias else average
        return found, MeasureWithEmaState(count, tree.cast_like(average, state.ema))

    return transformation(init, update)


def _kept(measurement: Any, last: Any) -> Any:
    """Tensors of the state's own, which may be donated, of one structure and in the same dtypes at every step."""
    return tree.map(lambda old, x: old if x is None else torch.as_tensor(x).to(old.dtype, copy=True), last, measurement)


def _stateless(measure: Measure) -> GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return tree.map(torch.as_tensor, measure(updates)), state

    return transformation(lambda params: (), update)
