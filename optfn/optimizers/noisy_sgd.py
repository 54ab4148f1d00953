"""Stochastic gradient descent with noise in the gradient."""

from torch import Tensor

from optfn.checks import alias
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.numerics import Scalar
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.noise import add_noise
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["noisy_sgd"]


@alias
def noisy_sgd(
    lr: ScalarOrSchedule = 1e-3,
    eta: Scalar = 0.01,
    gamma: Scalar = 0.55,
    key: int | Tensor | None = None,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Stochastic gradient descent with noise, whose variance falls with the steps.

    .. math:: p_t = p_{t-1} - \gamma_t\, (g_t + \sigma_t z_t), \qquad \sigma_t^2 = \eta / t^\gamma

    Args:
        lr: :math:`\gamma_t \ge 0`, a number, a 0-dim tensor or a schedule.
        eta: :math:`\eta \ge 0`, see :func:`add_noise`.
        gamma: :math:`\gamma \ge 0`.
        key: an integer seed or a key of :mod:`optfn.random`, which has to be given.
        maximize: ascend instead.

    Raises:
        TypeError: ``key`` is missing.
        ValueError: an argument out of range.

    Reference:
        See :func:`add_noise`.

    Example:
        >>> tx = noisy_sgd(lr=0.1, eta=0.01, key=7)
        >>> params = {"w": torch.tensor([1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([0.5069])}
    """
    return chain(negate_if(maximize), add_noise(eta, gamma, key), scale_by_learning_rate(lr))
