"""Step sizes from the distance that was gone: DoG, DoWG, and DoG for each tensor by itself."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import coupled, leafwise
from optfn.numerics import Scalar, norm, sqrt
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import decayed
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = [
    "DistanceSlots",
    "DogShared",
    "DowgShared",
    "LayerDistanceSlots",
    "dog",
    "dowg",
    "scale_by_distance_over_gradients",
    "scale_by_dog",
    "scale_by_dowg",
]


class DistanceSlots(NamedTuple):
    """Slots of :func:`scale_by_dog` and :func:`scale_by_dowg` for one tensor.

    Attributes:
        start: the parameter as it was at its first update.
    """

    start: Tensor


class DogShared(NamedTuple):
    """What :func:`scale_by_dog` keeps for all tensors together, 0-dim.

    Attributes:
        max_dist: the largest distance from the start so far, or the initial one.
        sum_sq_norm_grads: the sum of the squared norms of all gradients.
        step_size: the last step size.
        count: the updates so far.
    """

    max_dist: Tensor
    sum_sq_norm_grads: Tensor
    step_size: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]


class DowgShared(NamedTuple):
    """What :func:`scale_by_dowg` keeps for all tensors together, 0-dim.

    Attributes:
        estim_sq_dist: the largest squared distance from the start so far, or the initial one.
        weighted_sq_norm_grads: the sum of the squared norms of all gradients, each times the squared distance at its step.
        step_size: the last step size.
    """

    estim_sq_dist: Tensor
    weighted_sq_norm_grads: Tensor
    step_size: Tensor


class LayerDistanceSlots(NamedTuple):
    """Slots of :func:`scale_by_distance_over_gradients` for one tensor.

    Attributes:
        start: the parameter as it was at its first update.
        max_dist: its largest distance from there so far, or the initial one, 0-dim.
        sum_sq_norm_grads: the sum of the squared norms of its gradients, 0-dim.
    """

    start: Tensor
    max_dist: Tensor
    sum_sq_norm_grads: Tensor


def _by_distance(decide: Callable[..., Any], shared: Any, sized: bool = False) -> GradientTransformation:
    """A rule that multiplies gradients by a step size, decided from the distance to the start and the size of the gradients.

    ``sized``: from that of the parameters too. All are squared norms.
    """

    def init(p: Tensor) -> DistanceSlots:
        return DistanceSlots(p.clone())

    def measure(g: Tensor, slots: DistanceSlots, p: Tensor, step: Any, shared: Any) -> tuple[tuple[Tensor, ...], DistanceSlots]:
        start = torch.where(step == 1, p, slots.start)
        size = (p.square().sum(),) if sized else ()
        return ((p - start).square().sum(), g.square().sum(), *size), DistanceSlots(start)

    def update(g: Tensor, slots: DistanceSlots, p: Tensor, step: Any, shared: Any) -> tuple[Tensor, DistanceSlots]:
        return shared.step_size * g, slots

    for function in (init, measure, update):
        function.__qualname__ = decide.__qualname__  # by which messages name the rule
    return coupled(init, measure, decide, update, shared=shared, elementwise=True, needs_params=True)


def scale_by_dog(
    init_step: tuple[Literal["distance", "learning_rate", "heuristic"], Scalar], eps: Scalar = 1e-8
) -> GradientTransformation:
    r"""Rescale updates by DoG: the distance from the start over the root of the summed squared gradients.

    .. math::
        \bar r_t = \max(\bar r_{t-1}, \|p_t - p_0\|), \qquad G_t = G_{t-1} + \|g_t\|^2, \qquad
        u_t = \frac{\bar r_t}{\sqrt{G_t + \epsilon}}\, g_t

    The norms are over all tensors together. The authors average the parameters, :func:`ema_params`.

    Args:
        init_step: how the first step is found. ``("distance", r)``: :math:`\bar r_0 = r`. ``("heuristic", a)``:
            :math:`\bar r_0 = a (1 + \|p_0\|)`; 1e-6 is recommended, 1e-4 with batch normalization. ``("learning_rate", eta)``: the
            first step size is :math:`\eta`.
        eps: :math:`\epsilon \ge 0`, in the units of a squared gradient.

    Raises:
        TypeError: from ``update``: ``params`` is missing.
        ValueError: an argument out of range.

    Reference:
        Ivgi, Hinder and Carmon, `DoG is SGD's Best Friend <https://arxiv.org/abs/2302.12022>`_, 2023, equation 1 and section 4.1.

    Example:
        >>> tx = scale_by_dog(("learning_rate", 0.1))
        >>> p = torch.tensor([1.0])
        >>> tx.update(torch.tensor([5.0]), tx.init(p), p)[0]
        tensor([0.5000])
    """
    kind, value = init_step
    if kind not in ("distance", "learning_rate", "heuristic"):
        raise ValueError(f"init_step[0] must be 'distance', 'learning_rate' or 'heuristic', got {kind!r}")
    value, eps = number("init_step[1]", value, at_least=0), number("eps", eps, at_least=0)

    def decide(shared: DogShared, sums: tuple[Tensor, ...]) -> DogShared:
        sq_dist, sq_norm, *sq_size = sums
        reach = value * (1 + sqrt(*sq_size)) if kind == "heuristic" else value if kind == "distance" else 0.0
        max_dist = torch.maximum(torch.where(shared.count == 0, reach, shared.max_dist), sqrt(sq_dist))
        sum_sq_norm_grads = shared.sum_sq_norm_grads + sq_norm
        step_size = max_dist / sqrt(sum_sq_norm_grads, eps)
        if kind == "learning_rate":
            step_size = torch.where(shared.count == 0, value, step_size)
        return DogShared(max_dist, sum_sq_norm_grads, step_size, shared.count + 1)

    return _by_distance(decide, DogShared(0.0, 0.0, 0.0, 0), sized=kind == "heuristic")  # type: ignore[arg-type]


def scale_by_dowg(init_estim_sq_dist: Scalar | None = None, eps: Scalar = 1e-4) -> GradientTransformation:
    r"""Rescale updates by DoWG: the squared distance from the start over the root of the gradients weighted by it.

    .. math::
        \bar r_t^2 = \max(\bar r_{t-1}^2, \|p_t - p_0\|^2), \qquad
        v_t = v_{t-1} + \bar r_t^2 \|g_t\|^2, \qquad u_t = \frac{\bar r_t^2}{\sqrt{v_t} + \epsilon}\, g_t

    The norms are over all tensors together.

    Args:
        init_estim_sq_dist: :math:`\bar r_0^2 \ge 0`, in the units of a squared parameter; ``eps`` if None.
        eps: :math:`\epsilon \ge 0`.

    Raises:
        TypeError: from ``update``: ``params`` is missing.
        ValueError: an argument out of range.

    Reference:
        Khaled, Mishchenko and Jin, `DoWG Unleashed <https://arxiv.org/abs/2305.16284>`_, 2023, algorithm 1.

    Example:
        >>> tx = scale_by_dowg(1.0)
        >>> p = torch.tensor([1.0])
        >>> tx.update(torch.tensor([5.0]), tx.init(p), p)[0]
        tensor([1.0000])
    """
    eps = number("eps", eps, at_least=0)
    start = eps if init_estim_sq_dist is None else number("init_estim_sq_dist", init_estim_sq_dist, at_least=0)

    def decide(shared: DowgShared, sums: tuple[Tensor, ...]) -> DowgShared:
        sq_dist, sq_norm = sums
        estim_sq_dist = torch.maximum(shared.estim_sq_dist, sq_dist)
        weighted_sq_norm_grads = shared.weighted_sq_norm_grads + estim_sq_dist * sq_norm
        return DowgShared(estim_sq_dist, weighted_sq_norm_grads, estim_sq_dist / (sqrt(weighted_sq_norm_grads) + eps))

    return _by_distance(decide, DowgShared(1.0 * start, 0.0, 0.0))  # type: ignore[arg-type]


def scale_by_distance_over_gradients(
    reps_rel: Scalar = 1e-6, eps: Scalar = 1e-8, param_dtype: torch.dtype = torch.float32, global_scale: Scalar = 1.0
) -> GradientTransformation:
    r"""Rescale updates by DoG for each tensor by itself: :func:`scale_by_dog` with the norms of that tensor alone.

    Args:
        reps_rel: :math:`a \ge 0` in :math:`\bar r_0 = a (1 + \|p_0\|)`.
        eps: :math:`\epsilon \ge 0`, in the units of a squared gradient.
        param_dtype: the dtype in which the start is kept. The default keeps that of float64 parameters in float32, as Optax does:
            the distance of such parameters is then at least that of the rounding.
        global_scale: a factor of every update.

    Raises:
        TypeError: from ``update``: ``params`` is missing.
        ValueError: an argument out of range.

    Reference:
        Ivgi, Hinder and Carmon, `DoG is SGD's Best Friend <https://arxiv.org/abs/2302.12022>`_, 2023, section 4.1 (L-DoG).

    Example:
        >>> tx = scale_by_distance_over_gradients(reps_rel=0.1)
        >>> p = torch.tensor([1.0])
        >>> tx.update(torch.tensor([5.0]), tx.init(p), p)[0]
        tensor([0.2000])
    """
    reps_rel, eps = number("reps_rel", reps_rel, at_least=0), number("eps", eps, at_least=0)
    scale = number("global_scale", global_scale)

    def init(p: Tensor) -> LayerDistanceSlots:
        zero = torch.zeros_like(norm(p))
        return LayerDistanceSlots(p.to(param_dtype, copy=True), zero, zero.clone())

    def update(g: Tensor, slots: LayerDistanceSlots, p: Tensor, step: Any) -> tuple[Tensor, LayerDistanceSlots]:
        start = torch.where(step == 1, p.to(param_dtype), slots.start)
        reach = torch.where(step == 1, reps_rel * (1 + norm(p)), slots.max_dist)
        max_dist = torch.maximum(reach, norm(p - start))
        sum_sq_norm_grads = slots.sum_sq_norm_grads + g.square().sum()
        direction = scale * max_dist / sqrt(sum_sq_norm_grads, eps) * g
        return direction, LayerDistanceSlots(start, max_dist, sum_sq_norm_grads)

    return leafwise(init, update, needs_params=True)


@alias
def dog(
    lr: ScalarOrSchedule = 1.0,
    init_step: tuple[Literal["distance", "learning_rate", "heuristic"], Scalar] = ("heuristic", 1e-6),
    eps: Scalar = 1e-8,
    weight_decay: Scalar | None = 0.0,
    *,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""DoG: gradient descent whose step size is found.

    .. math:: g_t \leftarrow g_t + \lambda p_{t-1}, \qquad p_t = p_{t-1} - \gamma\, \mathrm{dog}(g_t)

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        init_step: see :func:`scale_by_dog`.
        eps: see :func:`scale_by_dog`.
        weight_decay: :math:`\lambda \ge 0`; None, Optax's default, is 0.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_dog`.

    Example:
        >>> tx = dog(init_step=("learning_rate", 0.1))
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.5000])}
    """
    rule = scale_by_dog(init_step, eps)
    decay = 0.0 if weight_decay is None else weight_decay
    return chain(negate_if(maximize), *decayed(rule, decay, False, mask), scale_by_learning_rate(lr))


@alias
def dowg(
    lr: ScalarOrSchedule = 1.0,
    init_estim_sq_dist: Scalar | None = None,
    eps: Scalar = 1e-4,
    weight_decay: Scalar | None = 0.0,
    *,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""DoWG: gradient descent whose step size is found.

    .. math:: g_t \leftarrow g_t + \lambda p_{t-1}, \qquad p_t = p_{t-1} - \gamma\, \mathrm{dowg}(g_t)

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        init_estim_sq_dist: see :func:`scale_by_dowg`.
        eps: see :func:`scale_by_dowg`.
        weight_decay: :math:`\lambda \ge 0`; None, Optax's default, is 0.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_dowg`.

    Example:
        >>> tx = dowg(init_estim_sq_dist=1.0)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([2.0027e-05])}
    """
    rule = scale_by_dowg(init_estim_sq_dist, eps)
    decay = 0.0 if weight_decay is None else weight_decay
    return chain(negate_if(maximize), *decayed(rule, decay, False, mask), scale_by_learning_rate(lr))
