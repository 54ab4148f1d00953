"""Adafactor: second moments of matrices in factors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.checks import alias, is_zero, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise
from optfn.numerics import Scalar, lerp
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.clipping import clip_by_block_rms
from optfn.transforms.decay import add_decayed_weights
from optfn.transforms.scaling import scale, scale_by_param_block_rms
from optfn.wrappers.hyperparams import with_learning_rate

__all__ = ["FactoredSlots", "RelativeStepSlots", "adafactor", "scale_by_factored_rms", "scale_by_relative_step"]


class FactoredSlots(NamedTuple):
    """Slots of :func:`scale_by_factored_rms` for one tensor of shape ``[..., n, m]``; those that it does not use are ``()``.

    Attributes:
        v_row: averages over the last dimension, of shape ``[..., n, 1]``.
        v_col: averages over the last but one, of shape ``[..., 1, m]``.
        v: the whole second moment, of a tensor with fewer than two dimensions.
    """

    v_row: Tensor | tuple[()] = ()
    v_col: Tensor | tuple[()] = ()
    v: Tensor | tuple[()] = ()


def scale_by_factored_rms(beta2_decay: Scalar = -0.8, eps: Scalar | None = None) -> GradientTransformation:
    r"""Rescale updates by second moments that are kept, for matrices, as row and column averages.

    .. math::
        R_t &= (1 - w_t) R_{t-1} + w_t\, \mathrm{mean}_m(g_t^2), \qquad
        C_t = (1 - w_t) C_{t-1} + w_t\, \mathrm{mean}_n(g_t^2), \qquad w_t = t^{c}, \\
        V_t &= \frac{R_t C_t}{\max(\mathrm{mean}_n(R_t), \epsilon)}, \qquad u_t = \frac{g_t}{\sqrt{\max(V_t, \epsilon^2)}}

    A tensor with fewer than two dimensions has :math:`V_t = (1 - w_t) V_{t-1} + w_t\, g_t^2`; one with more is a batch of matrices.

    Args:
        beta2_decay: :math:`c \le 0`.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient; None takes ``torch.finfo(dtype).eps`` of the dtype that the
            leaf is computed in, float32 at least. (torch takes the leaf's own: 0.0078 in bfloat16, which no smaller gradient is
            scaled up from.)

    Slots have the parameter's dtype. With an :math:`\epsilon` of 0 a gradient of zeros gives NaN.

    Raises:
        TypeError: from ``init`` and ``update``: a tensor is complex.
        ValueError: an argument out of range.

    Reference:
        Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018, algorithms 4 and 5, with means where they have
        sums and :math:`\epsilon` where :class:`torch.optim.Adafactor` has it.

    Example:
        >>> tx = scale_by_factored_rms()
        >>> tx.update(torch.tensor([[3.0, -3.0], [1.0, 1.0]]), tx.init(torch.zeros(2, 2)))[0]
        tensor([[ 1., -1.],
                [ 1.,  1.]])
    """
    c = number("beta2_decay", beta2_decay, at_most=0)
    eps = None if eps is None else number("eps", eps, at_least=0)

    def init(p: Tensor) -> FactoredSlots:
        if p.ndim < 2:
            return FactoredSlots(v=torch.zeros_like(p))
        return FactoredSlots(p.new_zeros(*p.shape[:-1], 1), p.new_zeros(*p.shape[:-2], 1, p.shape[-1]))

    def mean(x: Tensor, dim: int) -> Tensor:
        return x.sum(dim, keepdim=True) / max(x.shape[dim], 1)

    def update(g: Tensor, slots: Any, p: Any, weight: Tensor) -> tuple[Tensor, FactoredSlots]:
        square, floor = g.square(), torch.finfo(g.dtype).eps if eps is None else eps
        if isinstance(slots.v, Tensor):
            v = lerp(slots.v, square, weight)
            new = FactoredSlots(v=v)
        else:
            row, col = lerp(slots.v_row, mean(square, -1), weight), lerp(slots.v_col, mean(square, -2), weight)
            v, new = row * col / mean(row, -2).clamp_min(floor), FactoredSlots(row, col)
        return g * v.clamp_min(floor * floor).rsqrt(), new

    return leafwise(init, update, at_step=lambda step: step**c, complex_="error")


class RelativeStepSlots(NamedTuple):
    """Slots of :func:`scale_by_relative_step`: none, its state counts the steps of each leaf."""


def scale_by_relative_step(learning_rate: Scalar = 1e-2) -> GradientTransformation:
    r"""Multiply updates by a step size that falls, and is at most the learning rate: :math:`u_t = g_t \min(\gamma, 1 / \sqrt t)`.

    Args:
        learning_rate: :math:`\gamma \ge 0`, a number or a 0-dim tensor.

    Raises:
        ValueError: a negative number.

    Reference:
        Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018, section 9 (:math:`\rho_t`).

    Example:
        >>> tx = scale_by_relative_step(0.8)
        >>> state = tx.init(torch.ones(1))
        >>> for _ in range(4):
        ...     update, state = tx.update(torch.ones(1), state)
        ...     print(update)
        tensor([0.8000])
        tensor([0.7071])
        tensor([0.5774])
        tensor([0.5000])
    """
    lr = number("lr", learning_rate, at_least=0, finite=True)

    def update(g: Tensor, slots: Any, p: Any, size: Tensor) -> tuple[Tensor, Any]:
        return g * size, slots

    return leafwise(lambda p: RelativeStepSlots(), update, elementwise=True, at_step=lambda step: step.rsqrt().clamp_max(lr))


@alias
def adafactor(
    lr: ScalarOrSchedule = 1e-2,
    beta2_decay: Scalar = -0.8,
    eps: tuple[Scalar | None, Scalar] = (None, 1e-3),
    d: Scalar = 1.0,
    weight_decay: Scalar = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    r"""Adafactor: :class:`torch.optim.Adafactor`.

    .. math::
        u_t = \frac{\mathrm{factored\_rms}(g_t)}{\max(1, \mathrm{RMS}(\mathrm{factored\_rms}(g_t)) / d)}, \qquad
        p_t = p_{t-1} - \min(\gamma, \tfrac{1}{\sqrt t}) \max(\epsilon_2, \mathrm{RMS}(p_{t-1}))\, u_t - \gamma \lambda p_{t-1}

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule (kept by :func:`inject_hyperparams`).
        beta2_decay: at most 0, see :func:`scale_by_factored_rms`.
        eps: :math:`\epsilon_1` of :func:`scale_by_factored_rms` and :math:`\epsilon_2 \ge 0`, in the units of the parameters.
        d: :math:`d \ge 1`, the root mean square that an update is clipped to.
        weight_decay: coefficient :math:`\lambda \ge 0` of decoupled decay.
        maximize: ascend instead; the decay still pulls to 0.

    Raises:
        TypeError: from ``init``: a parameter is complex.
        ValueError: an argument out of range.

    Reference:
        Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018, algorithms 4 to 6.

    Example:
        >>> tx = adafactor(lr=0.1)
        >>> params = {"w": torch.tensor([[2.0, 2.0]])}
        >>> updates, state = tx.update({"w": torch.tensor([[5.0, -5.0]])}, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)
        {'w': tensor([[1.8000, 2.2000]])}
    """
    clipped = clip_by_block_rms(number("d", d, at_least=1))
    rule = chain(negate_if(maximize), scale_by_factored_rms(beta2_decay, eps[0]), clipped, scale_by_param_block_rms(eps[1]))
    decay = number("weight_decay", weight_decay, at_least=0)

    def make(lr: Scalar) -> GradientTransformation:
        decayed = add_decayed_weights(decay if is_zero(decay) else lr * decay)
        return chain(rule, scale_by_relative_step(lr), decayed, scale(-1.0))

    return with_learning_rate(make, lr)
