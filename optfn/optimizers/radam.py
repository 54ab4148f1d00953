"""RAdam: Adam with a rectified variance."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, add_scaled, as_scalar, average_square, bias_correction, lerp, sqrt
from optfn.schedules import ScalarOrSchedule, as_time
from optfn.transforms.decay import decayed
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["RAdamSlots", "radam", "scale_by_radam"]


class RAdamSlots(NamedTuple):
    """Slots of :func:`scale_by_radam` for one tensor, each with its shape.

    Attributes:
        mu: first moment.
        nu: second moment.
    """

    mu: Tensor
    nu: Tensor


def scale_by_radam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    *,
    nesterov: bool = False,
    eps_hat: bool = False,
) -> GradientTransformation:
    r"""Rescale updates by Adam once its variance can be trusted; until then by momentum alone.

    .. math::
        \rho_\infty &= \tfrac{2}{1 - \beta_2} - 1, \qquad
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad
        r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\, \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\, \rho_t}}, \\
        u_t &= \begin{cases} r_t\, \hat\mu_t / (\sqrt{\hat\nu_t + \bar\epsilon} + \epsilon) & \rho_t > \rho_{\min} \\
        \hat\mu_t & \text{else} \end{cases}

    with the corrected moments :math:`\hat\mu_t, \hat\nu_t` of :func:`scale_by_adam`.

    Args:
        b1: :math:`\beta_1` in ``[0, 1)``, decay of the first moment.
        b2: :math:`\beta_2` in ``[0, 1)``, decay of the second moment.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        eps_root: :math:`\bar\epsilon \ge 0`, in the units of the squared gradient.
        threshold: :math:`\rho_{\min} \ge 4`, in steps: 5 in torch and Optax, 4 in the paper.
        nesterov: as in :func:`scale_by_adam`, as in Optax.
        eps_hat: as in :func:`scale_by_adam`: :math:`\epsilon` is not bias-corrected with the second moment, torch's form.

    Moments have the parameter's shape and dtype.

    Raises:
        ValueError: an argument out of range.

    Reference:
        Liu et al., `On the Variance of the Adaptive Learning Rate and Beyond <https://arxiv.org/abs/1908.03265>`_, 2019,
        algorithm 2.

    Example:
        >>> tx = scale_by_radam()
        >>> tx.update(torch.tensor([3.0, -0.1]), tx.init(torch.zeros(2)))[0]
        tensor([ 3.0000, -0.1000])
    """
    b1, b2 = number("b1", b1, at_least=0, below=1), number("b2", b2, at_least=0, below=1)
    eps, eps_root = number("eps", eps, at_least=0), number("eps_root", eps_root, at_least=0)
    threshold, longest = number("threshold", threshold, at_least=4), 2 / (1 - b2) - 1

    def init(p: Tensor) -> RAdamSlots:
        return RAdamSlots(torch.zeros_like(p), torch.zeros_like(p))

    def at_step(step: Tensor) -> tuple[Any, ...]:
        # In float64 also for float32 leaves: rho is a small difference of large numbers.
        weight = bias_correction(b2, as_time(step))
        rho = longest - 2 * as_time(step) * (1 - weight) / weight
        # 1 where nu is to be trusted. Where it is not r is 1, and the update is divided by the root of 0 nu + 1, plus 0.
        on, rho = (rho > threshold).to(rho.dtype), torch.where(rho > threshold, rho, longest)
        r = torch.where(on == 1, (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho), 1).sqrt()
        first, offset = bias_correction(b1, step), eps / weight.sqrt() if eps_hat else eps
        ahead = b1 * first / bias_correction(b1, step + 1) if nesterov else None
        scalars = r / first, on / weight, 1 - on + on * eps_root, on * offset
        return as_scalar(b2, step.dtype), *(x.to(step.dtype) for x in scalars), ahead

    def update(g: Tensor, slots: RAdamSlots, p: Any, step: Any) -> tuple[Tensor, RAdamSlots]:
        keep, size, share, under, offset, ahead = step
        mu, nu = lerp(slots.mu, g, 1 - b1), average_square(slots.nu, g, b2, keep)
        first = add_scaled(ahead * mu, g, 1 - b1) if nesterov else mu
        return size * first / (sqrt(share * nu, under) + offset), RAdamSlots(mu, nu)

    return leafwise(init, update, elementwise=True, at_step=at_step)


@alias
def radam(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""RAdam: :class:`torch.optim.RAdam`.

    .. math:: g_t \leftarrow g_t + \lambda p_{t-1}, \qquad p_t = p_{t-1} - \gamma\, \mathrm{radam}(g_t)

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``, see :func:`scale_by_radam`.
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        decoupled_weight_decay: decay as :func:`adamw` does, not by L2.
        maximize: ascend instead.

    Raises:
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_radam`.

    Example:
        >>> tx = radam(lr=0.1)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.5000])}
    """
    rule = scale_by_radam(*betas, eps=eps, eps_hat=True)
    return chain(negate_if(maximize), *decayed(rule, weight_decay, decoupled_weight_decay), scale_by_learning_rate(lr))
