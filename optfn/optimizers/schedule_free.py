"""Schedule-free learning: an average of the steps in place of a schedule that falls."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import alias, check_state, integer, number, require, scalar_or_schedule
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation, check_transformation, transformation
from optfn.leafwise import aligned
from optfn.numerics import Scalar, as_real, compute_dtype, ratio, ravel, unravel
from optfn.optimizers.rmsprop import scale_by_rms
from optfn.schedules import ScalarOrSchedule, as_time
from optfn.transforms.decay import add_decayed_weights
from optfn.transforms.scaling import scale_by_learning_rate
from optfn.wrappers.finite import select
from optfn.wrappers.mechanic import MechanizeState

__all__ = ["ScheduleFreeState", "schedule_free", "schedule_free_adamw", "schedule_free_eval_params", "schedule_free_sgd"]


class ScheduleFreeState(NamedTuple):
    """The state of :func:`schedule_free`; the numbers are 0-dim float64 tensors.

    Attributes:
        b1: how far the parameters are from ``z`` to the average.
        weight_sum: the sum of the weights so far.
        step_count: the updates so far, a 0-dim int64 tensor.
        max_lr: the largest learning rate so far.
        base_optimizer_state: the base transformation's.
        z: where the base transformation alone would be, with the structure of the parameters.
    """

    b1: Tensor
    weight_sum: Tensor
    step_count: Tensor
    max_lr: Tensor
    base_optimizer_state: Any
    z: Any

    _scalars = ("b1", "weight_sum", "max_lr")


def schedule_free(
    base_optimizer: GradientTransformation,
    learning_rate: ScalarOrSchedule,
    b1: Scalar = 0.9,
    weight_lr_power: Scalar = 2.0,
    state_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Take the gradient between the steps of a base transformation and their average, which is what to evaluate.

    .. math::
        y_t &= (1 - \beta)\, z_t + \beta\, x_t, &
        z_{t+1} &= z_t + \mathrm{base}(\nabla f(y_t)), \\
        c_{t+1} &= w_t / \textstyle\sum_{i \le t} w_i, \qquad w_t = (\max_{i \le t} \gamma_i)^r, &
        x_{t+1} &= (1 - c_{t+1})\, x_t + c_{t+1}\, z_{t+1}

    The parameters are :math:`y`. :math:`x` is not kept: :func:`schedule_free_eval_params` gives it.

    The base should have no momentum, which :math:`\beta` replaces, and ``learning_rate`` the base's own: no schedule that falls,
    but a warm-up. It is evaluated at the step that the base's is, 0 first. Optax evaluates it one step ahead of the base's, so
    that there the weights of a warm-up are not those of the paper.

    A leaf whose update is None keeps its :math:`y`, :math:`z` and :math:`x`.

    Args:
        base_optimizer: the base transformation, with its learning rate.
        learning_rate: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        b1: :math:`\beta` in ``(0, 1]``.
        weight_lr_power: :math:`r`; 0 weighs all steps alike, also those of a warm-up.
        state_dtype: dtype of :math:`z`; the parameter's if None.

    Raises:
        TypeError: ``base_optimizer`` is no transformation; from ``update``: ``params`` is missing.
        ValueError: an argument out of range.

    Reference:
        Defazio et al., `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_, 2024, equations 2 to 4 and 23.

    Example:
        >>> tx = schedule_free(optfn.sgd(lr=0.5), 0.5, b1=0.5)
        >>> y = torch.tensor([1.0])
        >>> state = tx.init(y)
        >>> for _ in range(2):
        ...     updates, state = tx.update(y, state, y)  # the gradient of half the square
        ...     y = optfn.apply_updates(y, updates)
        >>> y, state.z, schedule_free_eval_params(state, y)
        (tensor([0.3125]), tensor([0.2500]), tensor([0.3750]))
    """
    check_transformation(base_optimizer, "schedule_free", "schedule_free(tx, learning_rate)")
    rate: Any = scalar_or_schedule("learning_rate", learning_rate, at_least=0)
    beta, power = number("b1", b1, above=0, at_most=1), number("weight_lr_power", weight_lr_power)

    def init(params: Any) -> ScheduleFreeState:
        tree.checked(params, "schedule_free: params")
        count = tree.new_count(params)
        zero = as_time(count)
        z = tree.map(lambda p: p.detach().clone(), tree.cast(params, state_dtype))
        return ScheduleFreeState(zero + beta, zero, count, zero.clone(), base_optimizer.init(params), z)

    def update(updates: Any, state: ScheduleFreeState, params: Any = None, **extra: Any) -> tuple[Any, ScheduleFreeState]:
        check_state("schedule_free", state, ScheduleFreeState)
        if state.z is not None:  # a bare tensor that a mask hides is None
            require("schedule_free", params=params)
        leaves = aligned(updates, params)
        updates = tree.unflatten(leaves.spec, leaves.grads)
        updates, base_state = base_optimizer.update(updates, state.base_optimizer_state, params, **extra)
        now = torch.zeros_like(state.b1) + beta
        lr: Any = rate(as_time(state.step_count)) if callable(rate) else rate
        max_lr = torch.maximum(state.max_lr, state.max_lr.new_zeros(()) + lr)
        weight = max_lr**power
        total = state.weight_sum + weight
        c = ratio(weight, total)

        def moved(u: Tensor, y: Tensor, z: Tensor) -> Tensor:
            wide = compute_dtype(u, y, z)
            a, b = c.to(u.device), now.to(u.device)
            # y' - y of the equations above: neither x nor a quotient by b1 is in it.
            return (a * (z.to(wide) - y.to(wide)) + (1 - b * (1 - a)) * u.to(wide)).to(u.dtype)

        def stepped(z: Tensor, u: Any) -> Tensor:
            wide = compute_dtype(z, u)
            return z if u is None else (z.to(wide) + u.to(wide)).to(z.dtype)

        # It began as the parameters; taken from them once more, derivatives with respect to them go through it.
        before = select(state.step_count == 0, tree.map_entries(lambda p, z: p.to(z.dtype), params, state.z), state.z)
        z = tree.map_entries(stepped, before, updates)
        new = tree.map_entries(moved, updates, params, before)
        return new, ScheduleFreeState(now, total, state.step_count + 1, max_lr, base_state, z)

    return transformation(init, update)


def schedule_free_eval_params(state: Any, params: Any) -> Any:
    r"""The parameters to evaluate or deploy: the averages :math:`x = y + (1 / \beta - 1) (y - z)`.

    Args:
        state: the state of :func:`schedule_free`, or of a chain, a partition or any wrapper that has it inside.
        params: the parameters :math:`y`. Those that no :func:`schedule_free` has, as a mask or a partition hides them from it,
            stay as they are. Within :func:`flatten` they are those that this is handed: where a mask or a partition around it hides
            others, they are None.

    Raises:
        TypeError: there is no such state in ``state``; or it is within :func:`mechanize`, which scales the steps, but not those of
            ``z``, so that :math:`y` is no mean of :math:`z` and :math:`x`.
        ValueError: the structures differ; or what :func:`flatten` was handed is not ``params``, or cannot be told, as there are
            several such states.

    Example:
        >>> tx = optfn.chain(optfn.clip_by_global_norm(1.0), schedule_free_sgd(lr=0.5))
        >>> params = {"w": torch.tensor([2.0])}
        >>> updates, state = tx.update({"w": torch.tensor([1.0])}, tx.init(params), params)
        >>> schedule_free_eval_params(state, optfn.apply_updates(params, updates))
        {'w': tensor([1.5000])}
    """
    states = [part for part in tree.subtrees(state) if isinstance(part, ScheduleFreeState)]
    if not states:
        raise TypeError(f"schedule_free_eval_params needs a state with that of schedule_free inside, got {type(state).__name__}")

    if any(isinstance(part, ScheduleFreeState) for tuned in tree.subtrees(state) for part in _within_mechanize(tuned)):
        raise TypeError(
            "schedule_free_eval_params: schedule_free ran within mechanize, which scales its steps, but not those of z, so that "
            "the parameters are no mean of z and the average of its steps: evaluate the parameters, or leave mechanize out"
        )

    if any(isinstance(s.z, Tensor) and not (isinstance(params, Tensor) and params.shape == s.z.shape) for s in states):
        return _eval_vector(states, params)

    def evaluated(y: Tensor, *zs: Any) -> Tensor:
        for s, z in zip(states, zs, strict=True):
            if z is not None:
                return _average(s, y, z)
        return y

    return tree.map_entries(evaluated, params, *(s.z for s in states))


def _within_mechanize(state: Any) -> list[Any]:
    return tree.subtrees(state.inner_state) if isinstance(state, MechanizeState) else []


def _average(state: ScheduleFreeState, y: Tensor, z: Tensor) -> Tensor:
    wide = compute_dtype(y, z)
    return (y.to(wide) + (1 / state.b1.to(y.device) - 1) * (y.to(wide) - z.to(wide))).to(y.dtype)


def _eval_vector(states: list[ScheduleFreeState], params: Any) -> Any:
    """The averages where :func:`flatten` showed the parameters as one vector."""
    leaves, spec = tree.checked(params, "schedule_free_eval_params: params")
    size = sum(as_real(p).numel() for p in leaves if p is not None)
    state = states[0]
    if len(states) > 1 or not isinstance(state.z, Tensor) or state.z.shape != (size,):
        sizes = " and ".join(str(tuple(s.z.shape)) for s in states if isinstance(s.z, Tensor))
        raise ValueError(
            f"schedule_free_eval_params: schedule_free ran within flatten, which keeps no structure: z has shape {sizes}, params "
            f"have {size} entries. Give one such state alone, and the parameters that it is of, None for the others"
        )
    return tree.unflatten(spec, unravel(_average(state, ravel(leaves, state.z.dtype), state.z), leaves))


@alias
def schedule_free_sgd(
    lr: ScalarOrSchedule = 1.0,
    b1: Scalar = 0.9,
    weight_decay: Scalar | None = 0.0,
    *,
    warmup_steps: int | None = 0,
    weight_lr_power: Scalar = 2.0,
    state_dtype: torch.dtype | None = None,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Schedule-free SGD: :func:`schedule_free` around SGD.

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule, which should not fall.
        b1: :math:`\beta` in ``(0, 1]``, in the place of momentum.
        weight_decay: L2 coefficient :math:`\lambda \ge 0`, of the parameters :math:`y`; None, Optax's default, is 0.
        warmup_steps: how long the rate rises: in the step :math:`t = 1, 2, \dots` it is :math:`\gamma \min(1, t / T)`, as the
            authors have it; Optax's is 0 in the first step.
        weight_lr_power: see :func:`schedule_free`.
        state_dtype: dtype of :math:`z`; the parameter's if None.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`schedule_free`.

    Example:
        >>> tx = schedule_free_sgd(lr=0.5)
        >>> params = {"w": torch.tensor([2.0])}
        >>> updates, state = tx.update({"w": torch.tensor([1.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([1.5000])}
    """
    rate, decay = _warmed_up(lr, warmup_steps), 0.0 if weight_decay is None else weight_decay
    base = chain(negate_if(maximize), add_decayed_weights(decay, mask), scale_by_learning_rate(rate))
    return schedule_free(base, rate, b1, weight_lr_power, state_dtype)


@alias
def schedule_free_adamw(
    lr: ScalarOrSchedule = 0.0025,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    warmup_steps: int | None = 0,
    weight_lr_power: Scalar = 2.0,
    state_dtype: torch.dtype | None = None,
    mask: Any = None,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Schedule-free AdamW: :func:`schedule_free` around Adam without its first moment.

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule, which should not fall.
        betas: :math:`\beta` in ``(0, 1]``, in the place of the first moment, and :math:`\beta_2` in ``[0, 1)``, decay of the
            second.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`, of the parameters :math:`y`.
        warmup_steps: as in :func:`schedule_free_sgd`.
        weight_lr_power: see :func:`schedule_free`.
        state_dtype: dtype of :math:`z`; the parameter's if None.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Defazio et al., `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_, 2024, algorithm 1, in the form of the
        `authors' code <https://github.com/facebookresearch/schedule_free>`_.

    Example:
        >>> tx = schedule_free_adamw(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.9000])}
    """
    rate, rule = _warmed_up(lr, warmup_steps), scale_by_rms(betas[1], eps, eps_in_sqrt=False, bias_correction=True)
    base = chain(negate_if(maximize), rule, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(rate))
    return schedule_free(base, rate, betas[0], weight_lr_power, state_dtype)


def _warmed_up(lr: ScalarOrSchedule, warmup_steps: int | None) -> ScalarOrSchedule:
    warmup_steps = integer("warmup_steps", warmup_steps or 0, 0)  # Optax's default is None
    rate: Any = scalar_or_schedule("lr", lr, at_least=0)
    if warmup_steps == 0:
        return rate

    def warmed_up(step: Any) -> Tensor:
        full: Any = rate(step) if callable(rate) else rate
        return full * ((as_time(step) + 1) / warmup_steps).clamp(max=1)

    return warmed_up
