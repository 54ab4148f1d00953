"""Muon: momentum of matrices, made orthogonal."""

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from optfn.checks import alias, number
from optfn.compose import chain, followed_by, negate_if
from optfn.core import GradientTransformation
from optfn.leafwise import leafwise, stateless_with_tree_map
from optfn.matrices import MuonDimensionNumbers, as_matrices, as_tensor, matrix_shape, with_numbers
from optfn.numerics import Scalar, bias_correction, compute_dtype, lerp, norm
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.decay import add_decayed_weights
from optfn.transforms.scaling import scale_by_learning_rate

__all__ = ["MuonSlots", "muon", "scale_by_muon", "scale_by_shape"]

Triple: TypeAlias = tuple[Scalar, Scalar, Scalar]
Adjust: TypeAlias = Literal["original", "match_rms_adamw"]
Preconditioning: TypeAlias = Literal["frobenius", "spectral", "aol", "schatten"]


class MuonSlots(NamedTuple):
    """Slots of :func:`scale_by_muon` for one tensor: ``mu``, the average of its gradient, with its shape."""

    mu: Tensor


_ROWS_FIRST = MuonDimensionNumbers()
_AS_IN_TORCH = MuonDimensionNumbers(1, 0)


def scale_by_muon(
    ns_coeffs: Triple | tuple[Triple, ...] = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    beta: Scalar = 0.95,
    eps: Scalar = 1e-8,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    weight_dimension_numbers: Any = None,
    bias_correction_mu: bool = True,
    eps_floor: bool = False,
    ns_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    r"""Replace updates, which are matrices, by a near-orthogonal matrix close to their average.

    .. math::
        \mu_t &= \beta \mu_{t-1} + (1 - \beta)\, g_t, \\
        \hat\mu_t &= \begin{cases} \beta \mu_t / (1 - \beta^{t+1}) + (1 - \beta)\, g_t / (1 - \beta^t) & \text{nesterov} \\
            \mu_t / (1 - \beta^t) & \text{else} \end{cases}, \qquad
        X_0 = \hat\mu_t / (\|\hat\mu_t\|_F + \epsilon), \\
        X_k &= a X_{k-1} + (b A_k + c A_k^2) X_{k-1}, \qquad A_k = X_{k-1} X_{k-1}^\top, \qquad u_t = X_K

    where a matrix with more rows than columns is transposed for the iteration.

    Args:
        ns_coeffs: :math:`(a, b, c)` of the Newton-Schulz iteration, or such a triple for each step. The default ones make
            singular values large fast, not exactly 1: after 5 steps those that were not tiny are between about 0.7 and 1.2.
        ns_steps: :math:`K`, from 0 to 99; where there is a triple for each step, their number is.
        beta: :math:`\beta \ge 0`, decay of the average, below 1; without bias correction it may be more.
        eps: :math:`\epsilon \ge 0`, in the units of the gradient.
        mu_dtype: dtype of the average; the parameter's if None.
        nesterov: whether to look one step ahead.
        adaptive: multiply by the dual norm :math:`\langle \hat\mu_t, X_K \rangle`, summed over all entries of the tensor.
        preconditioning: what :math:`\hat\mu_t` is divided by, so that no singular value is above 1:

            - ``"frobenius"``: as above;
            - ``"spectral"``: the largest singular value plus :math:`\epsilon`, which takes a decomposition;
            - ``"aol"``: in row i the root of :math:`\max(\sum_j |\hat\mu_t \hat\mu_t^\top|_{ij}, \epsilon)`;
            - ``"schatten"``: the root of :math:`\max(\|\hat\mu_t \hat\mu_t^\top\|_F, \epsilon)`.
        weight_dimension_numbers: for tensors that are no matrices: :class:`MuonDimensionNumbers` for all of them, a tree of such,
            or a function ``(path, leaf)`` that gives them. With None all must be matrices.
        bias_correction_mu: False is torch's form, where :math:`\hat\mu_t` is :math:`\beta \mu_t + (1 - \beta)\, g_t`, or
            :math:`\mu_t`.
        eps_floor: True is torch's form, which divides by :math:`\max(\|\hat\mu_t\|, \epsilon)`.
        ns_dtype: dtype of the iteration, bfloat16 in torch; None takes that of the leaf, float32 at least.

    Optax has no ``"aol"`` and ``"schatten"`` with another :math:`\epsilon` than 1e-8; without ``weight_dimension_numbers`` it takes
    a bare matrix only; and it refuses more triples than ``ns_steps``, but takes fewer.

    Raises:
        TypeError: from ``init`` and ``update``: a tensor is complex.
        ValueError: from ``init``: a tensor is no matrix, or has no such dimensions; an argument out of range.

    Reference:
        Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; Bernstein and Newhouse, `Old Optimizer, New
        Norm <https://arxiv.org/abs/2409.20325>`_, 2024 (dual norm); Boissin et al., `Turbo-Muon
        <https://arxiv.org/abs/2512.04632>`_, 2025 (aol); Grishina et al., `Accelerating Newton-Schulz Iteration
        <https://arxiv.org/abs/2506.10935>`_, 2025 (schatten).

    Example:
        >>> tx = scale_by_muon((2.0, -1.5, 0.5), 20)  # coefficients that converge to singular values of 1
        >>> tx.update(torch.tensor([[5.0, 0.0], [0.0, -2.0]]), tx.init(torch.zeros(2, 2)))[0]
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    each_step = len(ns_coeffs) > 0 and isinstance(ns_coeffs[0], tuple | list)
    triples: Any = ns_coeffs if each_step else [ns_coeffs]
    if not 0 <= ns_steps < 100 or any(len(triple) != 3 for triple in triples):
        raise ValueError(f"ns_coeffs must be 3 numbers and ns_steps >= 0 and < 100, got {ns_coeffs} and {ns_steps}")
    triples = [[number(f"ns_coeffs[{i}]", x) for i, x in enumerate(triple)] for triple in triples]
    triples = triples if each_step else triples * ns_steps
    beta = number("beta", beta, at_least=0, below=1 if bias_correction_mu else None)
    eps = number("eps", eps, at_least=0)
    if preconditioning not in ("frobenius", "spectral", "aol", "schatten"):
        raise ValueError(f"preconditioning must be 'frobenius', 'spectral', 'aol' or 'schatten', got {preconditioning!r}")

    def init(p: Tensor) -> MuonSlots:
        if weight_dimension_numbers is None:
            _check_matrix(p)
        return MuonSlots(torch.zeros_like(p, dtype=mu_dtype))

    def at_step(step: Tensor) -> tuple[Any, Any]:
        now = bias_correction(beta, step)
        return now, bias_correction(beta, step + 1) if nesterov else now

    def average(g: Tensor, slots: MuonSlots, p: Any, step: Any) -> tuple[Tensor, MuonSlots]:
        mu = lerp(slots.mu, g, 1 - beta)
        g_hat, mu_hat = (g / step[0], mu / step[1]) if bias_correction_mu else (g, mu)
        return lerp(g_hat, mu_hat, beta) if nesterov else mu_hat, MuonSlots(mu)

    def orthogonalize(mu_hat: Tensor, p: Any, numbers: MuonDimensionNumbers = _ROWS_FIRST) -> Tensor:
        x = as_matrices(mu_hat, numbers).to(ns_dtype or mu_hat.dtype)
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = x / _size(x, preconditioning, eps, eps_floor).to(x.dtype)
        for a, b, c in triples:
            gram = x @ x.mT
            x = _mixed(a, x, 1, _mixed(b, gram, c, gram, gram), x)
        x = as_tensor(x.mT if tall else x, mu_hat, numbers).to(mu_hat.dtype)
        return (mu_hat * x).sum() * x if adaptive else x

    averaged = leafwise(init, average, at_step=at_step if bias_correction_mu else None, elementwise=True, complex_="error")
    orthogonalized = stateless_with_tree_map(orthogonalize, elementwise=False, complex_="error")
    return followed_by(averaged, with_numbers(orthogonalized, weight_dimension_numbers))


def _size(x: Tensor, preconditioning: Preconditioning, eps: Scalar, eps_floor: bool) -> Tensor:
    """What a matrix, or each row of it, is divided by before the iteration."""
    wide = x.to(compute_dtype(x))
    if preconditioning in ("aol", "schatten"):
        gram = wide @ wide.mT
        size = gram.abs().sum(-1, keepdim=True) if preconditioning == "aol" else _frobenius(gram)
        return size.clamp_min(eps).sqrt()
    spectral = preconditioning == "spectral" and x.numel() > 0  # an empty matrix has no singular values
    size = torch.linalg.matrix_norm(wide, 2, keepdim=True) if spectral else _frobenius(wide)
    return size.clamp_min(eps) if eps_floor else size + eps


def _frobenius(x: Tensor) -> Tensor:
    # Of one matrix it is a 0-dim tensor, which optfn.compile keeps apart from what it leaves to the products of matrices.
    return norm(x) if x.ndim == 2 else torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)


def _mixed(a: Scalar, x: Tensor, b: Scalar, y: Tensor, z: Tensor) -> Tensor:
    """``a x + b y z``: in one operation, which rounds once, where it takes the factors, which are numbers there."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a * x + b * (y @ z)
    return torch.addmm(x, y, z, beta=a, alpha=b) if x.ndim == 2 else torch.baddbmm(x, y, z, beta=a, alpha=b)


def scale_by_shape(
    adjust_lr_fn: Adjust | None = None, *, weight_dimension_numbers: Any = None, consistent_rms: Scalar | None = None
) -> GradientTransformation:
    r"""Scale matrices of :math:`n` rows and :math:`m` columns by their shape, so that one learning rate suits all.

    Args:
        adjust_lr_fn: ``"original"``, which None is too, for :math:`u \sqrt{\max(1, n/m)}`, or ``"match_rms_adamw"`` for
            :math:`0.2\, u \sqrt{\max(n, m)}`, with which the updates of :func:`scale_by_muon` are as large as AdamW's usually are.
        weight_dimension_numbers: as in :func:`scale_by_muon`; :math:`n` is the number of outputs, :math:`m` that of inputs. With
            None all are matrices in torch's layout, ``MuonDimensionNumbers(1, 0)``; Optax's is ``MuonDimensionNumbers()``.
        consistent_rms: another number in place of 0.2.

    Raises:
        TypeError: from ``update``: a tensor is complex.
        ValueError: another ``adjust_lr_fn``, or ``"original"`` with ``consistent_rms``; from ``update``: a tensor is no matrix, or
            has no such dimensions.

    Reference:
        Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; Liu et al., `Muon is Scalable for LLM Training
        <https://arxiv.org/abs/2502.16982>`_, 2025, section 2.2.

    Example:
        >>> scale_by_shape().update(torch.ones(4, 1), ())[0].flatten()
        tensor([2., 2., 2., 2.])
    """
    if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
        raise ValueError(f"adjust_lr_fn must be None, 'original' or 'match_rms_adamw', got {adjust_lr_fn!r}")
    if adjust_lr_fn == "original" and consistent_rms is not None:
        raise ValueError("adjust_lr_fn='original' has no consistent_rms")
    rms: Any = 0.2 if adjust_lr_fn == "match_rms_adamw" else None
    rms = rms if consistent_rms is None else number("consistent_rms", consistent_rms, at_least=0)

    def scaled(g: Tensor, p: Any, numbers: MuonDimensionNumbers = _AS_IN_TORCH) -> Tensor:
        if weight_dimension_numbers is None:
            _check_matrix(g)
        m, n = matrix_shape(g.shape, numbers)
        return g * (max(1, n / max(m, 1)) ** 0.5 if rms is None else rms * max(n, m) ** 0.5)

    return with_numbers(stateless_with_tree_map(scaled, elementwise=False, complex_="error"), weight_dimension_numbers)


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
    torchs: Any = {"bias_correction_mu": False, "eps_floor": True, "ns_dtype": ns_dtype}
    beta = number("momentum", momentum, at_least=0)
    rule = scale_by_muon(ns_coefficients, ns_steps, beta, eps, nesterov=nesterov, **torchs)
    sized = chain(negate_if(maximize), rule, scale_by_shape(adjust_lr_fn))
    return chain(sized, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(lr))
