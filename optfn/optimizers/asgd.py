"""ASGD: averaged stochastic gradient descent."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, add_scaled, full_like, lerp
from optfn.schedules import ScalarOrSchedule, as_time
from optfn.transforms.decay import add_decayed_weights
from optfn.transforms.scaling import scale
from optfn.wrappers.hyperparams import with_learning_rate

__all__ = ["AsgdSlots", "asgd", "scale_by_asgd"]


class AsgdSlots(NamedTuple):
    """Slots of :func:`scale_by_asgd` for one tensor.

    Attributes:
        ax: the average of the parameter, with its shape; the parameter itself before the first step.
        eta: the step size of the next step, a 0-dim float32 tensor, as in torch, whatever the leaf's dtype.
        mu: the weight of the next parameter in the average, likewise.
    """

    ax: Tensor
    eta: Tensor
    mu: Tensor


def scale_by_asgd(
    learning_rate: Scalar = 1e-2, lambd: Scalar = 1e-4, alpha: Scalar = 0.75, t0: Scalar = 1e6
) -> GradientTransformation:
    r"""Decay the parameters, scale by a step size that falls, and average where the steps :math:`p_t = p_{t-1} - u_t` lead.

    .. math::
        u_t = \eta_t (g_t + \lambda p_{t-1}), \qquad
        a_t = a_{t-1} + \mu_t (p_{t-1} - u_t - a_{t-1}), \qquad
        \eta_{t+1} = \frac{\gamma}{(1 + \lambda \gamma t)^\alpha}, \qquad
        \mu_{t+1} = \frac{1}{\max(1, t - t_0)}

    with :math:`\eta_1 = \gamma` and :math:`\mu_1 = 1`. The learning rate is in :math:`u_t`: all that may follow is ``scale(-1.0)``.

    Args:
        learning_rate: :math:`\gamma \ge 0`.
        lambd: :math:`\lambda \ge 0`, decay of the parameters and of the step size.
        alpha: :math:`\alpha \ge 0`, power of the step size's decay.
        t0: :math:`t_0`, in steps: the average is of the parameters from step :math:`t_0 + 2` on, and before that the last one.

    The average, ``optfn.tree.get(state, "ax")``, has the parameter's shape and dtype. It is one of all entries, so the
    rule is not elementwise.

    Raises:
        TypeError: from ``update``: ``params`` is missing.
        ValueError: an argument out of range.

    Reference:
        Polyak and Juditsky, `Acceleration of Stochastic Approximation by Averaging <https://doi.org/10.1137/0330046>`_, 1992;
        Xu, `Towards Optimal One Pass Large Scale Learning with Averaged Stochastic Gradient Descent
        <https://arxiv.org/abs/1107.2490>`_, 2011; in the form of :class:`torch.optim.ASGD`.

    Example:
        >>> tx = scale_by_asgd(0.1, lambd=0.5)
        >>> tx.update(torch.ones(1), tx.init(torch.ones(1)), torch.ones(1))[0]
        tensor([0.1500])
    """
    lr, lambd = number("lr", learning_rate, at_least=0, finite=True), number("lambd", lambd, at_least=0)
    alpha, t0 = number("alpha", alpha, at_least=0), number("t0", t0)

    def init(p: Tensor) -> AsgdSlots:
        one = torch.ones((), dtype=torch.float32, device=p.device)
        return AsgdSlots(p.detach().clone(), full_like(one, lr), one)

    def at_step(step: Tensor) -> tuple[Tensor, ...]:
        time = as_time(step)
        return step == 1, full_like(step.float(), lr), lr / (1 + lambd * lr * time) ** alpha, 1 / (time - t0).clamp_min(1)

    def update(g: Tensor, slots: AsgdSlots, p: Tensor, step: Any) -> tuple[Tensor, AsgdSlots]:
        is_first, start, eta, mu = step
        direction = torch.where(is_first, start, slots.eta) * add_scaled(g, p, lambd)
        return direction, AsgdSlots(lerp(slots.ax, p - direction, slots.mu), eta, mu)

    return leafwise(init, update, at_step=at_step, needs_params=True)


@alias
def asgd(
    lr: ScalarOrSchedule = 1e-2,
    lambd: Scalar = 1e-4,
    alpha: Scalar = 0.75,
    t0: Scalar = 1e6,
    weight_decay: Scalar = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Averaged stochastic gradient descent: :class:`torch.optim.ASGD`.

    .. math:: g_t \leftarrow g_t + w p_{t-1}, \qquad p_t = p_{t-1} - \eta_t (g_t + \lambda p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule (kept by :func:`inject_hyperparams`).
        lambd: decay :math:`\lambda \ge 0`, see :func:`scale_by_asgd`.
        alpha: power of the step size's decay.
        t0: the average is of the parameters from step ``t0 + 2`` on, and before that the last one.
        weight_decay: L2 coefficient :math:`w \ge 0`.
        maximize: ascend instead.

    The average is ``optfn.tree.get(state, "ax")``.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_asgd`.

    Example:
        >>> tx = asgd(lr=0.1, lambd=0.0)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates), optfn.tree.get(state, "ax")
        ({'w': tensor([0.5000])}, {'w': tensor([0.5000])})
    """
    before = chain(negate_if(maximize), add_decayed_weights(weight_decay))
    return with_learning_rate(lambda lr: chain(before, scale_by_asgd(lr, lambd, alpha, t0), scale(-1.0)), lr)
