"""Sophia: steps scaled by an estimate of the diagonal of the Hessian, and clipped."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import random, tree
from optfn.checks import alias, check_state, integer, number, require
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation, check_transformation, transformation
from optfn.leafwise import aligned, leafwise
from optfn.numerics import Scalar, as_complex, as_real, bias_correction, lerp
from optfn.schedules import ScalarOrSchedule
from optfn.second_order import hessian_product
from optfn.transforms.decay import add_decayed_weights
from optfn.transforms.momentum import ema
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = [
    "HutchinsonState",
    "SophiaSlots",
    "SophiaState",
    "hutchinson_estimator_diag_hessian",
    "scale_by_sophia",
    "sophia",
]


class HutchinsonState(NamedTuple):
    """The state of :func:`hutchinson_estimator_diag_hessian`: ``key``, where the next signs begin, see :mod:`optfn.random`."""

    key: Tensor


def hutchinson_estimator_diag_hessian(random_seed: int | Tensor | None = None) -> GradientTransformation:
    r"""Replace updates by an estimate of the diagonal of the Hessian, with random signs :math:`r`.

    .. math:: u = r \odot \nabla^2 f(p)\, r, \qquad r_i = \pm 1, \qquad \mathrm{E}\, u_i = \nabla^2_{ii} f(p)

    It is exact where the Hessian is diagonal. What comes in is not read. An update costs some gradients of ``obj_fn``, which is to
    be handed to it: ``tx.update(grads, state, params, obj_fn=lambda params: loss(params, batch))``. It is called with all
    parameters; those that a mask or a partition hides are constants. The signs are Optax's with the same key. Of a complex tensor
    there is one for the real and one for the imaginary part, which are parameters by themselves.

    Args:
        random_seed: where the signs begin, a key of :mod:`optfn.random` or an integer seed; 0 if None, as in Optax.

    Raises:
        TypeError: from ``update``: ``params`` or ``obj_fn`` is missing.

    Reference:
        Liu et al., `Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training
        <https://arxiv.org/abs/2305.14342>`_, 2023, algorithm 1. The authors draw :math:`r` from a normal distribution.

    Example:
        >>> tx = hutchinson_estimator_diag_hessian()
        >>> params = {"w": torch.tensor([2.0, 5.0])}
        >>> tx.update(params, tx.init(params), params, obj_fn=lambda p: (p["w"] ** 3).sum())[0]
        {'w': tensor([12., 30.])}
    """
    start = random.as_key("hutchinson_estimator_diag_hessian", 0 if random_seed is None else random_seed)

    def init(params: Any) -> HutchinsonState:
        return HutchinsonState(start.to(tree.new_count(params).device, copy=True))

    def update(
        updates: Any,
        state: HutchinsonState,
        params: Any = None,
        obj_fn: Callable[[Any], Tensor] | None = None,
        **extra: Any,
    ) -> tuple[Any, HutchinsonState]:
        check_state("hutchinson_estimator_diag_hessian", state, HutchinsonState)
        require("hutchinson_estimator_diag_hessian", params=params, obj_fn=obj_fn)
        leaves = aligned(updates, params)
        after, now = random.split(state.key).unbind()
        real = tree.map(as_real, params)
        signs = tree.random_like(now, real, random.rademacher)
        signs = tree.map(lambda r, p: r.to(p.device), signs, real)
        product = hessian_product(lambda x: obj_fn(tree.map(_like, x, params)), real, signs)  # type: ignore[misc]
        updates = tree.unflatten(leaves.spec, leaves.grads)
        return tree.map(lambda g, r, x, p: _like(r * x, p).to(g.dtype), updates, signs, product, params), HutchinsonState(after)

    return transformation(init, update)


def _like(real: Tensor, p: Tensor) -> Tensor:
    """A real view as the parameter that it is of."""
    return as_complex(real) if p.is_complex() else real


class SophiaSlots(NamedTuple):
    """Slots of :func:`scale_by_sophia` for one tensor: ``mu``, the average of its gradient, with its shape."""

    mu: Tensor


class SophiaState(NamedTuple):
    """The state of :func:`scale_by_sophia`.

    Attributes:
        count: the updates so far, a 0-dim int64 tensor.
        momentum: the state of the first moment, ``mu``.
        curvature: the state of the average of the estimates, of :func:`ema`.
        hessian_fn_state: the state of ``hessian_diagonal_fn``.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    momentum: Any
    curvature: Any
    hessian_fn_state: Any


def scale_by_sophia(
    b1: Scalar = 0.965,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-8,
    gamma: Scalar = 0.01,
    clip_threshold: Scalar | None = 1.0,
    update_interval: int = 10,
    hessian_diagonal_fn: GradientTransformation | None = None,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Divide momentum by an average of Hessian diagonals, where these are large enough, and clip.

    .. math::
        \mu_t &= \beta_1 \mu_{t-1} + (1 - \beta_1)\, g_t, \qquad
        u_t = \mathrm{clip}\left(\frac{\mu_t / (1 - \beta_1^t)}{\max(\gamma\, h_{t-1}, \epsilon)}, \pm\rho\right), \\
        h_t &= \beta_2 h_{t-1} + (1 - \beta_2)\, \hat h(p_{t-1}) \quad\text{in the first of every } k \text{ updates, else } h_{t-1}

    Where the curvature is small or negative the step is the sign of the momentum. The authors suggest a :math:`\gamma` with which
    10 to 50 % of the entries are not clipped. As in their code, an estimate acts from the next update on, so the first step
    is one of signs. The correction of :math:`\mu` is Optax's. Where Optax prints the share that is not clipped, count it:
    it is that of the entries of the updates below ``clip_threshold``.

    An estimate costs two to three gradients, and is made only when it is due, compiled by :func:`optfn.compile` too, see
    :func:`optfn.tree.cond`. Each process makes its own of its
    ``obj_fn``: give one of the loss of all, or average them in a ``hessian_diagonal_fn`` of yours.

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``.
        b2: :math:`\beta_2` in ``[0, 1)``, for each estimate.
        eps: :math:`\epsilon > 0`, the least divisor.
        gamma: :math:`\gamma \ge 0`.
        clip_threshold: :math:`\rho > 0`; None does not clip.
        update_interval: :math:`k \ge 1`, updates from one estimate to the next.
        hessian_diagonal_fn: a transformation that gives the estimates; :func:`hutchinson_estimator_diag_hessian` if None. Extra
            arguments of ``update`` are handed to it.
        mu_dtype: dtype of the momentum; the parameter's if None.

    Raises:
        TypeError: from ``update``: ``params``, or what ``hessian_diagonal_fn`` needs, is missing.
        ValueError: an argument out of range.

    Reference:
        Liu et al., `Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training
        <https://arxiv.org/abs/2305.14342>`_, 2023, algorithm 3.

    Example:
        >>> tx = scale_by_sophia(update_interval=1, gamma=1.0)
        >>> params, square = torch.tensor([2.0, 5.0]), lambda p: (p**2).sum()
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(torch.tensor([0.01, 5.0]), state, params, obj_fn=square)
        >>> updates
        tensor([0.5000, 1.0000])
    """
    b1, gamma = number("b1", b1, at_least=0, below=1), number("gamma", gamma, at_least=0)
    eps = number("eps", eps, above=0)
    rho = None if clip_threshold is None else number("clip_threshold", clip_threshold, above=0)
    update_interval = integer("update_interval", update_interval, 1)
    estimator = hessian_diagonal_fn if hessian_diagonal_fn is not None else hutchinson_estimator_diag_hessian()
    check_transformation(estimator, "scale_by_sophia", "scale_by_sophia(hessian_diagonal_fn=tx)")
    average = ema(b2, debias=False)

    def rule(g: Tensor, slots: SophiaSlots, h: Tensor, correction: Tensor) -> tuple[Tensor, SophiaSlots]:
        mu = lerp(slots.mu, g, 1 - b1)
        u = mu / correction / (gamma * h).clamp_min(eps)
        return u if rho is None else u.clamp(-rho, rho), SophiaSlots(mu)

    def first_moment(p: Tensor) -> SophiaSlots:
        return SophiaSlots(torch.zeros_like(p, dtype=mu_dtype))

    correction = lambda step: bias_correction(b1, step)  # noqa: E731
    scaled = leafwise(first_moment, rule, elementwise=True, at_step=correction, needs_params=True)

    def init(params: Any) -> SophiaState:
        return SophiaState(tree.new_count(params), scaled.init(params), average.init(params), estimator.init(params))

    def update(updates: Any, state: SophiaState, params: Any = None, **extra: Any) -> tuple[Any, SophiaState]:
        check_state("scale_by_sophia", state, SophiaState)
        require("scale_by_sophia", params=params)

        def estimated() -> tuple[Any, Any]:
            found, hessian_fn_state = estimator.update(updates, state.hessian_fn_state, params, **extra)
            return average.update(found, state.curvature, params)[1], hessian_fn_state

        # The rule is shown the curvature in the place of the parameters.
        h = tree.map(lambda p, h: h, params, *state.curvature.slots)
        new, momentum = scaled.update(updates, state.momentum, h)
        due = state.count % update_interval == 0
        curvature, hessian_fn_state = tree.cond(due, estimated, lambda: (state.curvature, state.hessian_fn_state))
        return new, SophiaState(state.count + 1, momentum, curvature, hessian_fn_state)

    return transformation(init, update)


@alias
def sophia(
    lr: ScalarOrSchedule = 1e-4,
    betas: tuple[Scalar, Scalar] = (0.965, 0.99),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-4,
    *,
    gamma: Scalar = 0.01,
    clip_threshold: Scalar | None = 1.0,
    update_interval: int = 10,
    hessian_diagonal_fn: GradientTransformation | None = None,
    mu_dtype: torch.dtype | None = None,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Sophia, with decoupled weight decay.

    .. math:: p_t = p_{t-1} - \alpha\, (\mathrm{sophia}(g_t) + \lambda p_{t-1})

    The default estimator needs the loss as a function of the parameters alone:
    ``tx.update(grads, state, params, obj_fn=lambda params: loss(params, batch))``.

    Args:
        lr: :math:`\alpha \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_sophia`.
        eps: the least divisor, ``> 0``.
        weight_decay: :math:`\lambda \ge 0`.
        gamma: how much of the curvature counts, ``>= 0``.
        clip_threshold: the largest entry of an update before ``lr``; None does not clip.
        update_interval: updates from one estimate to the next.
        hessian_diagonal_fn: a transformation that gives the estimates; :func:`hutchinson_estimator_diag_hessian` if None.
        mu_dtype: dtype of the momentum; the parameter's if None.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead, with ``obj_fn`` the negated objective; the decay still pulls to 0.

    Raises:
        TypeError: from ``update``: ``params`` or ``obj_fn`` is missing.
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_sophia`. The numbers are Optax's.

    Example:
        >>> tx = sophia(lr=0.1)
        >>> params, square = {"w": torch.tensor([2.0])}, lambda p: (p["w"] ** 2).sum()
        >>> updates, state = tx.update({"w": torch.tensor([4.0])}, tx.init(params), params, obj_fn=square)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([1.9000])}
    """
    rule = scale_by_sophia(*betas, eps, gamma, clip_threshold, update_interval, hessian_diagonal_fn, mu_dtype)
    return chain(negate_if(maximize), rule, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(lr))
