"""Mechanic: the scale of another transformation's updates, found while training."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state, integer, number
from optfn.core import GradientTransformation, check_transformation, transformation
from optfn.leafwise import CoupledState, coupled
from optfn.numerics import Scalar, as_real, compute_dtype, full_like, sqrt

__all__ = ["MechanicShared", "MechanicSlots", "MechanizeState", "mechanize"]


class MechanicSlots(NamedTuple):
    """Slots of :func:`mechanize` for one tensor.

    Attributes:
        start: the parameter as it was at its first update.
    """

    start: Tensor


class MechanicShared(NamedTuple):
    """What :func:`mechanize` keeps for all tensors together: ``r`` to ``s`` are vectors, one entry for each decay.

    Attributes:
        r: the reward.
        m: the largest product so far, decayed.
        v: the sum of the squared products, decayed.
        s: the scale, whose sum multiplies the inner updates.
        last_scale: the sum of ``s`` before the last update, 0-dim.
    """

    r: Tensor
    m: Tensor
    v: Tensor
    s: Tensor
    last_scale: Tensor


class MechanizeState(NamedTuple):
    """The state of :func:`mechanize`.

    Attributes:
        inner_state: the inner transformation's.
        tuner: a :class:`CoupledState` with :class:`MechanicSlots` and :class:`MechanicShared`.
    """

    inner_state: Any
    tuner: CoupledState


def mechanize(
    base_optimizer: GradientTransformation,
    weight_decay: Scalar = 1e-2,
    eps: Scalar = 1e-8,
    s_init: Scalar = 1e-6,
    num_betas: int = 6,
) -> GradientTransformation:
    r"""Find the scale of an inner transformation's updates; its learning rate is 1, or a schedule whose largest value is 1.

    With :math:`u_t` the inner update, :math:`\Delta_t = \Delta_{t-1} + u_t`, and for each :math:`\beta_i = 1 - 10^{-i}`:

    .. math::
        h_t &= -\Big\langle g_t + \lambda \Big(\sum_i s_{t-1,i}\Big)
        \frac{\|g_t\|}{\|p_{t-1}\| + \epsilon} p_{t-1}, \Delta_{t-1} \Big\rangle, \\
        m_{t,i} &= \max(\beta_i m_{t-1,i}, |h_t| + \epsilon), \qquad
        v_{t,i} = \beta_i^2 v_{t-1,i} + h_t^2, \qquad
        r_{t,i} = \beta_i r_{t-1,i} + s_{t-1,i} \,\mathrm{clip}(h_t, \pm m_{t-1,i}), \\
        s_{t,i} &= \frac{\frac{s_0}{n} m_{t,i} + \max(r_{t,i}, 0)}{\sqrt{v_{t,i}} + \epsilon}, \qquad
        p_t = p_0 + \Big(\sum_i s_{t,i}\Big) \Delta_t

    :math:`\Delta_{t-1}` is not kept: it is :math:`(p_{t-1} - p_0) / (\sum_i s_{t-1,i} + \epsilon)`. Products and norms are over all
    tensors together. A leaf whose update is None moves with the others' scale from its next update on.

    Args:
        base_optimizer: the inner transformation.
        weight_decay: :math:`\lambda \ge 0`.
        eps: :math:`\epsilon \ge 0`.
        s_init: :math:`s_0 > 0`, the first scale.
        num_betas: :math:`n \ge 1`, how many decays.

    Raises:
        TypeError: ``base_optimizer`` is no transformation; from ``update``: ``params`` is missing.
        ValueError: an argument out of range.

    Reference:
        Cutkosky, Defazio and Mehta, `Mechanic <https://arxiv.org/abs/2306.00144>`_, 2023, algorithm 1.

    Example:
        >>> tx = mechanize(optfn.sgd(lr=1.0), s_init=0.1)
        >>> p = torch.tensor([1.0])
        >>> tx.update(torch.tensor([5.0]), tx.init(p), p)[0]
        tensor([-0.5000])
    """
    check_transformation(base_optimizer, "mechanize", "mechanize(tx)")
    decay, eps = number("weight_decay", weight_decay, at_least=0), number("eps", eps, at_least=0)
    s_init, count = number("s_init", s_init, above=0), integer("num_betas", num_betas, 1)

    def moved(start: Tensor, p: Tensor, scale: Tensor) -> Tensor:
        """Optax's sign: what the inner updates have summed up to, negated."""
        return (start - p) / (scale + eps)

    def measure(g: Tensor, slots: MechanicSlots, p: Tensor, step: Tensor, shared: MechanicShared) -> tuple[Any, MechanicSlots]:
        start = torch.where(step == 1, p, slots.start)
        delta = moved(start, p, shared.s.sum())
        return (g.square().sum(), p.square().sum(), (g * delta).sum(), (p * delta).sum()), MechanicSlots(start)

    def decide(shared: MechanicShared, sums: tuple[Tensor, ...]) -> MechanicShared:
        g_sq, p_sq, g_delta, p_delta = sums
        r, m, v, s, _ = shared
        beta = 1 - 0.1 ** torch.arange(1, count + 1, dtype=s.dtype, device=s.device)
        h = g_delta + decay * s.sum() * sqrt(g_sq) / (sqrt(p_sq) + eps) * p_delta
        new_m = torch.maximum(beta * m, h.abs() + eps)
        new_v = beta.square() * v + h.square()
        new_r = beta * r + torch.clamp(h, -m, m) * s
        new_s = (s_init / count * new_m + new_r.clamp_min(0)) / (sqrt(new_v) + eps)
        return MechanicShared(new_r, new_m, new_v, new_s, s.sum())

    def update(g: Tensor, slots: MechanicSlots, p: Tensor, step: Tensor, shared: MechanicShared) -> tuple[Tensor, MechanicSlots]:
        return slots.start - shared.s.sum() * moved(slots.start, p, shared.last_scale) - p, slots

    def shared(params: Any) -> MechanicShared:
        zeros = torch.zeros(count, dtype=compute_dtype(*map(as_real, tree.leaves(params))))
        return MechanicShared(zeros, zeros, zeros, full_like(zeros, s_init), zeros.sum())

    def start(p: Tensor) -> MechanicSlots:
        return MechanicSlots(p.clone())

    tuner = coupled(start, measure, decide, update, shared=shared, elementwise=True, needs_params=True)

    def init(params: Any) -> MechanizeState:
        return MechanizeState(base_optimizer.init(params), tuner.init(params))

    def tuned(updates: Any, state: MechanizeState, params: Any = None, **extra: Any) -> tuple[Any, MechanizeState]:
        check_state("mechanize", state, MechanizeState)
        inner, inner_state = base_optimizer.update(updates, state.inner_state, params, **extra)
        back, tuned_state = tuner.update(updates, state.tuner, params)
        scale = tuned_state.shared.s.sum()

        def both(x: Tensor | None, u: Tensor | None) -> Tensor | None:
            return None if x is None or u is None else x + (scale * u).to(x.dtype)

        return tree.map_entries(both, back, inner), MechanizeState(inner_state, tuned_state)

    return transformation(init, tuned)
