"""Muon: momentum of matrices, made orthogonal."""

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise, stateless_with_tree_map
from optfn.numerics import Scalar, lerp, norm
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import add_decayed_weights
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["MuonSlots", "muon", "scale_by_muon", "scale_by_shape"]

Triple: TypeAlias = tuple[Scalar, Scalar, Scalar]
Adjust: TypeAlias = Literal["original", "match_rms_adamw"]


class MuonSlots(NamedTuple):
    """Slots of :func:`scale_by_muon` for one matrix: ``mu``, the average of its gradient, with its shape."""

    mu: Tensor


def scale_by_muon(
    ns_coeffs: Triple = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-7,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = True,
    ns_dtype: torch.dtype | None = torch.bfloat16,
) -> GradientTransformation:
    r"""Replace updates, which are matrices, by a near-orthogonal matrix close to their average.

    .. math::
        \mu_t &= \beta \mu_{t-1} + (1 - \beta)\, g_t, \qquad
        \tilde\mu_t = \begin{cases} \beta \mu_t + (1 - \beta)\, g_t & \text{nesterov} \\ \mu_t & \text{else} \end{cases}, \qquad
        X_0 = \tilde\mu_t / \max(\|\tilde\mu_t\|_F, \epsilon), \\
        X_k &= a X_{k-1} + (b A_k + c A_k^2) X_{k-1}, \qquad A_k = X_{k-1} X_{k-1}^\top, \qquad u_t = X_K

    where a matrix with more rows than columns is transposed for the iteration.

    Args:
        ns_coeffs: :math:`(a, b, c)` of the Newton-Schulz iteration. The default ones make singular values large fast, not
            exactly 1: after 5 steps those that were not tiny are between about 0.7 and 1.2.
        ns_steps: :math:`K`, from 0 to 99.
        beta: :math:`\beta \ge 0`, decay of the average, below 1 for one that stays bounded.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        mu_dtype: dtype of the average; the parameter's if None.
        nesterov: whether to look one step ahead.
        ns_dtype: dtype of the iteration; None takes that of the leaf, float32 at least.

    Raises:
        TypeError: from ``init`` and ``update``: a tensor is complex.
        ValueError: from ``init``: a tensor is no matrix; an argument out of range.

    Reference:
        Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024, in the form of :class:`torch.optim.Muon`.

    Example:
        >>> tx = scale_by_muon((2.0, -1.5, 0.5), 20, ns_dtype=None)  # coefficients that converge to singular values of 1
        >>> tx.update(torch.tensor([[5.0, 0.0], [0.0, -2.0]]), tx.init(torch.zeros(2, 2)))[0]
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    if len(ns_coeffs) != 3 or not 0 <= ns_steps < 100:
        raise ValueError(f"ns_coeffs must be 3 numbers and ns_steps >= 0 and < 100, got {ns_coeffs} and {ns_steps}")
    a, b, c = (number(f"ns_coeffs[{i}]", x) for i, x in enumerate(ns_coeffs))
    beta, eps = number("momentum", beta, at_least=0), number("eps", eps, at_least=0)

    def init(p: Tensor) -> MuonSlots:
        _check_matrix(p)
        return MuonSlots(torch.zeros_like(p, dtype=mu_dtype))

    def update(g: Tensor, slots: MuonSlots, p: Any, step: Tensor) -> tuple[Tensor, MuonSlots]:
        mu = lerp(slots.mu, g, 1 - beta)
        x = (lerp(g, mu, beta) if nesterov else mu).to(ns_dtype or g.dtype)
        tall = g.shape[0] > g.shape[1]
        x = x.mT if tall else x
        x = x / norm(x).clamp_min(eps).to(x.dtype)
        for _ in range(ns_steps):
            gram = x @ x.mT
            x = _mixed(a, x, 1, _mixed(b, gram, c, gram, gram), x)
        return (x.mT if tall else x).to(g.dtype), MuonSlots(mu)

    return leafwise(init, update, complex_="error")


def _mixed(a: Scalar, x: Tensor, b: Scalar, y: Tensor, z: Tensor) -> Tensor:
    """``a x + b y z``: in one operation, which rounds once, where it takes the factors, which are numbers there."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a * x + b * (y @ z)
    return torch.addmm(x, y, z, beta=a, alpha=b)


def scale_by_shape(adjust_lr_fn: Adjust | None = None) -> GradientTransformation:
    r"""Scale matrices of :math:`n` rows and :math:`m` columns by their shape, so that one learning rate suits all.

    Args:
        adjust_lr_fn: ``"original"``, which None is too, for :math:`u \sqrt{\max(1, n/m)}`, or ``"match_rms_adamw"`` for
            :math:`0.2\, u \sqrt{\max(n, m)}`, with which the updates of :func:`scale_by_muon` are as large as AdamW's usually are.

    Raises:
        TypeError: from ``update``: a tensor is complex.
        ValueError: another ``adjust_lr_fn``; from ``update``: a tensor is no matrix.

    Reference:
        Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; Liu et al., `Muon is Scalable for LLM Training
        <https://arxiv.org/abs/2502.16982>`_, 2025, section 2.2.

    Example:
        >>> scale_by_shape().update(torch.ones(4, 1), ())[0].flatten()
        tensor([2., 2., 2., 2.])
    """
    if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
        raise ValueError(f"adjust_lr_fn must be None, 'original' or 'match_rms_adamw', got {adjust_lr_fn!r}")

    def scaled(g: Tensor, p: Any) -> Tensor:
        _check_matrix(g)
        n, m = g.shape
        return g * (0.2 * max(n, m) ** 0.5 if adjust_lr_fn == "match_rms_adamw" else max(1, n / max(m, 1)) ** 0.5)

    return stateless_with_tree_map(scaled, elementwise=False, complex_="error")


def _check_matrix(x: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"Muon takes matrices, got shape {tuple(x.shape)}: give other tensors to another one, optfn.partition")


@alias
def muon(
    lr: ScalarOrSchedule = 1e-3,
    weight_decay: Scalar = 0.1,
    momentum: Scalar = 0.95,
    nesterov: bool = True,
    ns_coefficients: Triple = (3.4445, -4.775, 2.0315),
    eps: Scalar = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: Adjust | None = None,
    *,
    ns_dtype: torch.dtype | None = torch.bfloat16,
    maximize: bool = False,
    mask: Any = None,
) -> GradientTransformation:
    r"""Muon, for matrices: :class:`torch.optim.Muon`.

    .. math:: p_t = p_{t-1} - \gamma\, (r\, \mathrm{muon}(g_t) + \lambda p_{t-1})

    Args:
        lr: :math:`\gamma \ge 0`, a number, a 0-dim tensor or a schedule.
        weight_decay: coefficient :math:`\lambda \ge 0` of decoupled decay.
        momentum: :math:`\beta \ge 0`, decay of the average of the gradient, see :func:`scale_by_muon`.
        nesterov: whether to look one step ahead.
        ns_coefficients: of the Newton-Schulz iteration, three.
        eps: :math:`\epsilon \ge 0`.
        ns_steps: iterations, from 0 to 99.
        adjust_lr_fn: the factor :math:`r`, ``"original"``, which None is too, or ``"match_rms_adamw"``, see :func:`scale_by_shape`.
        ns_dtype: dtype of the iteration; None takes that of the leaf, float32 at least.
        maximize: ascend instead; the decay still pulls to 0.
        mask: True for the leaves that decay, as in :func:`masked`; None for all.

    Hidden layers are what it is for; embeddings, the last layer, biases and whatever is no matrix go to another optimizer,
    by :func:`partition`.

    Raises:
        TypeError: from ``init``: a parameter is complex.
        ValueError: from ``init``: a parameter is no matrix; an argument out of range.

    Reference:
        See :func:`scale_by_muon` and :func:`scale_by_shape`.

    Example:
        >>> tx = optfn.partition({"matrix": muon(lr=0.02), "other": optfn.adamw()},
        ...                      lambda path, p: "matrix" if p.ndim == 2 else "other")
        >>> params = {"w": torch.eye(2), "b": torch.zeros(2)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["w"].diagonal() < 0
        tensor([True, True])
    """
    rule = scale_by_muon(ns_coefficients, ns_steps, momentum, eps, nesterov=nesterov, ns_dtype=ns_dtype)
    sized = chain(negate_if(maximize), rule, scale_by_shape(adjust_lr_fn))
    return chain(sized, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(lr))
