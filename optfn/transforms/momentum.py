"""Sums and averages of the updates over the steps: momentum, moving averages, updates that are gathered."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state, is_zero, number
from optfn.core import GradientTransformation, transformation
from optfn.leafwise import aligned, leafwise
from optfn.numerics import Scalar, add_scaled, bias_correction, compute_dtype, lerp

__all__ = ["ApplyEveryState", "EmaSlots", "TraceSlots", "apply_every", "ema", "trace"]


class TraceSlots(NamedTuple):
    """Slots of :func:`trace` for one tensor: ``trace``, the momentum buffer, with the tensor's shape."""

    trace: Tensor


def trace(
    decay: Scalar, nesterov: bool = False, accumulator_dtype: torch.dtype | None = None, *, dampening: Scalar = 0.0
) -> GradientTransformation:
    r"""Momentum: a decaying sum of the updates.

    .. math::
        b_1 = g_1, \qquad b_t = \mu\, b_{t-1} + (1 - \tau)\, g_t, \qquad
        u_t = \begin{cases} g_t + \mu\, b_t & \text{nesterov} \\ b_t & \text{else} \end{cases}

    Args:
        decay: :math:`\mu \ge 0`, below 1 for a sum that stays bounded.
        nesterov: whether to look one step ahead.
        accumulator_dtype: dtype of the buffer; the parameter's if None.
        dampening: :math:`\tau`; it does not act on the first update of a leaf, as in torch.

    The buffer has the parameter's shape. A sparse gradient is added into it; the update is then dense.

    Raises:
        ValueError: ``decay`` is negative or NaN.

    Reference:
        Sutskever et al., `On the importance of initialization and momentum in deep learning
        <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013, in the form of :class:`torch.optim.SGD`.

    Example:
        >>> tx = trace(0.9)
        >>> state = tx.init(torch.zeros(1))
        >>> for _ in range(2):
        ...     update, state = tx.update(torch.ones(1), state)
        >>> update
        tensor([1.9000])
    """
    mu, tau = number("momentum", decay, at_least=0), number("dampening", dampening)

    def init(p: Tensor) -> TraceSlots:
        return TraceSlots(torch.zeros_like(p, dtype=accumulator_dtype))

    def update(g: Tensor, slots: TraceSlots, p: Any, step: Tensor) -> tuple[Tensor, TraceSlots]:
        damped = g if is_zero(tau) else torch.where(step == 1, torch.ones_like(step), 1 - tau) * g
        buffer = add_scaled(damped, slots.trace, mu)
        return add_scaled(g, buffer, mu) if nesterov else buffer, TraceSlots(buffer)

    return leafwise(init, update, elementwise=True, sparse="dense")


class EmaSlots(NamedTuple):
    """Slots of :func:`ema` for one tensor: ``ema``, the average of its updates, with its shape."""

    ema: Tensor


def ema(decay: Scalar, debias: bool = True, accumulator_dtype: torch.dtype | None = None) -> GradientTransformation:
    r"""An exponential moving average of the updates. That of the parameters is :func:`ema_params`.

    .. math:: m_t = \beta\, m_{t-1} + (1 - \beta)\, g_t, \qquad u_t = m_t / (1 - \beta^t)

    Args:
        decay: :math:`\beta` in ``[0, 1)``.
        debias: whether the average is divided by the weight that it has gathered; without it :math:`u_t = m_t`.
        accumulator_dtype: dtype of the average; the parameter's if None.

    Raises:
        ValueError: ``decay`` out of range.

    Example:
        >>> tx = ema(0.5)
        >>> state = tx.init(torch.zeros(1))
        >>> for gradient in (1.0, 4.0):
        ...     update, state = tx.update(torch.tensor([gradient]), state)
        ...     print(update, optfn.tree.get(state, "ema"))
        tensor([1.]) tensor([0.5000])
        tensor([3.]) tensor([2.2500])
    """
    beta = number("decay", decay, at_least=0, below=1)

    def init(p: Tensor) -> EmaSlots:
        return EmaSlots(torch.zeros_like(p, dtype=accumulator_dtype))

    def at_step(step: Tensor) -> Tensor:
        return bias_correction(beta, step)

    def update(g: Tensor, slots: EmaSlots, p: Any, gathered: Tensor) -> tuple[Tensor, EmaSlots]:
        average = lerp(slots.ema, g, 1 - beta)
        return average / gathered if debias else average, EmaSlots(average)

    return leafwise(init, update, elementwise=True, at_step=at_step)


class ApplyEveryState(NamedTuple):
    """The state of :func:`apply_every`.

    Attributes:
        count: the updates so far, a 0-dim int64 tensor.
        grad_acc: the sum of those that have not been handed on, with the structure and the dtypes of the parameters.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    grad_acc: Any


def apply_every(k: int = 1) -> GradientTransformation:
    """Gather updates, and hand on their sum at every k-th one; the updates in between are zero.

    The other links of a chain see every step: those after this one zeros too, so an average there falls. To hand an
    optimizer one gradient for k micro-batches use :func:`accumulate`.

    A leaf whose update is None adds nothing; where it is None when the sums are handed on it keeps its own for the next time.

    Args:
        k: how many updates a sum has, at least 1.

    Raises:
        TypeError: ``k`` is no int.
        ValueError: ``k`` is less than 1.

    Example:
        >>> tx = optfn.chain(optfn.scale(-0.1), apply_every(2))
        >>> state = tx.init(torch.zeros(1))
        >>> for gradient in (1.0, 3.0):
        ...     update, state = tx.update(torch.tensor([gradient]), state)
        ...     print(update)
        tensor([0.])
        tensor([-0.4000])
    """
    given: Any = k
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"k must be an int, got {type(given).__name__}")
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")

    def init(params: Any) -> ApplyEveryState:
        tree.checked(params, "apply_every: params")
        return ApplyEveryState(tree.new_count(params), tree.map(torch.zeros_like, params))

    def update(updates: Any, state: ApplyEveryState, params: Any = None, **extra: Any) -> tuple[Any, ApplyEveryState]:
        check_state("apply_every", state, ApplyEveryState)
        leaves = aligned(updates, state.grad_acc if params is None else params)
        updates = tree.unflatten(leaves.spec, leaves.grads)
        now = (state.count + 1) % k == 0

        def add(g: Tensor, gathered: Tensor) -> Tensor:
            wide = compute_dtype(g, gathered)
            return gathered.to(wide) + g.to(wide)

        total = tree.map_entries(add, updates, state.grad_acc)
        new = tree.map_entries(lambda g, x: torch.where(now.to(x.device), x, 0).to(g.dtype), updates, total)
        kept = tree.map_entries(
            lambda old, x: old if x is None else torch.where(now.to(x.device), 0, x).to(old.dtype), state.grad_acc, total
        )
        return new, ApplyEveryState(state.count + 1, kept)

    return transformation(init, update)
