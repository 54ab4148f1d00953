"""Arithmetic that rules share: bias corrections, roots with a finite derivative at zero, norms, dtypes.

Everything here is written for one tensor and traces, batches (``vmap``) and differentiates.
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode  # pyright: ignore[reportPrivateUsage]

__all__ = [
    "Scalar",
    "add_scaled",
    "as_complex",
    "as_real",
    "as_scalar",
    "average_square",
    "bias_correction",
    "cbrt",
    "compute_dtype",
    "debias",
    "full_like",
    "global_norm",
    "lerp",
    "norm",
    "norm_of_norms",
    "ratio",
    "ravel",
    "real_dtype",
    "rms",
    "sign",
    "sqrt",
    "unravel",
    "widened_scalar",
]

Scalar: TypeAlias = float | Tensor
"""A number, or a 0-dim tensor: swept, learned or kept in a state."""


def widened_scalar(x: Tensor) -> Tensor:
    """A hyperparameter or a time in float64, float32 where the device has no float64, so that arithmetic on it loses nothing.

    A 0-dim tensor does not widen the tensors it is multiplied with.

    Example:
        >>> 1 - widened_scalar(torch.tensor(0.1)), 1 - torch.tensor(0.1)
        (tensor(0.9000, dtype=torch.float64), tensor(0.9000))
    """
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def as_scalar(x: Scalar, dtype: torch.dtype) -> Scalar:
    """A number for arithmetic with many tensors of ``dtype``: a 0-dim tensor of it, with which an operation takes half the time.

    Torch makes such a tensor of a Python number at every operation. Where a step is traced the number is handed on as it is.

    Example:
        >>> as_scalar(0.1, torch.float32)
        tensor(0.1000)
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return x
    # On the CPU it goes with tensors of any device.
    return (x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64, device="cpu")).to(dtype)


def bias_correction(decay: Scalar, step: Tensor) -> Tensor:
    r"""The weight that a moment has gathered after ``step`` steps: :math:`1 - \beta^t`.

    Computed as :math:`-\mathrm{expm1}(t \log \beta)`, which keeps all digits where
    :math:`1 - \beta^t` in float32 loses five of them at :math:`t = 1`.

    Args:
        decay: :math:`\beta` in ``[0, 1)``, a number or a 0-dim tensor.
        step: :math:`t \ge 1`, a 0-dim tensor of the dtype to compute in.

    Example:
        >>> bias_correction(0.999, torch.tensor(1.0))
        tensor(0.0010)
    """
    if isinstance(decay, Tensor):
        return -torch.expm1(step * torch.log(widened_scalar(decay)))
    if decay == 0:
        return torch.ones_like(step)
    return -torch.expm1(step * math.log(decay))


def debias(moment: Tensor, decay: Scalar, step: Tensor) -> Tensor:
    r"""A moment that began at zero, corrected: :math:`\hat m = m / (1 - \beta^t)`.

    Args:
        moment: an exponential moving average that began at zero, of any shape.
        decay: its :math:`\beta` in ``[0, 1)``.
        step: the number of values in it, :math:`t \ge 1`, a 0-dim tensor.

    Example:
        >>> debias(torch.tensor([0.1, 0.2]), 0.9, torch.tensor(1.0))
        tensor([1., 2.])
    """
    return moment / bias_correction(decay, step)


def full_like(x: Tensor, value: Scalar) -> Tensor:
    """A tensor like ``x`` that holds ``value`` everywhere, in the dtype of ``x``; ``value`` may be batched or differentiated.

    Example:
        >>> full_like(torch.zeros(2), torch.tensor(3.0, dtype=torch.float64))
        tensor([3., 3.])
    """
    return (torch.zeros_like(x) + value).to(x.dtype)


def sqrt(x: Tensor, eps: Scalar = 0.0) -> Tensor:
    """The square root of ``x + eps``, with derivative 0 where that is 0 or below, and the true one infinite.

    Values under the smallest normal number of the dtype (``torch.finfo(dtype).tiny``) count as that
    number, so the root of 0 is about 1e-19 in float32 and 1e-154 in float64, and a difference
    of two moments that rounding made negative has a root, not NaN.

    Example:
        >>> torch.func.grad(sqrt)(torch.tensor(0.0))
        tensor(0.)
    """
    x = x if isinstance(eps, int | float) and eps == 0 else x + eps
    return x.clamp_min(_TINY[x.dtype]).sqrt()


_TINY = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def ratio(x: Tensor, y: Tensor) -> Tensor:
    """``x / y``, and 0, with derivatives of 0, where ``y`` is 0.

    Example:
        >>> ratio(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]))
        tensor([0.5000, 0.0000])
    """
    zero = y == 0
    return torch.where(zero, 0, x / torch.where(zero, 1, y))


def cbrt(x: Tensor) -> Tensor:
    """The cube root of ``x >= 0``, with derivative 0 at 0, as :func:`sqrt`: the root of 0 is about 1e-13 in float32.

    Example:
        >>> cbrt(torch.tensor([8.0, 27.0]))
        tensor([2., 3.])
    """
    return x.clamp_min(torch.finfo(x.dtype).tiny) ** (1 / 3)


def sign(x: Tensor) -> Tensor:
    """The sign of each entry, NaN where that is NaN; torch's is 0 there, which would hide it.

    Example:
        >>> sign(torch.tensor([-3.0, 0.0, float("nan")]))
        tensor([-1., 0., nan])
    """
    return torch.where(x.isnan(), x, x.sign())


def add_scaled(x: Tensor, y: Tensor, factor: Scalar) -> Tensor:
    """``x + factor * y``, in one operation where the factor is a number.

    Example:
        >>> add_scaled(torch.ones(2), torch.tensor([1.0, 2.0]), 0.5)
        tensor([1.5000, 2.0000])
    """
    return x + factor * y if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def average_square(average: Tensor, x: Tensor, decay: Scalar, keep: Scalar | None = None) -> Tensor:
    """``decay * average + (1 - decay) * x**2``, a step of an exponential moving average of squares.

    Args:
        average: the average so far.
        x: what is squared.
        decay: a number or a 0-dim tensor.
        keep: what :func:`as_scalar` makes of it, for an average of that dtype.

    Example:
        >>> average_square(torch.zeros(2), torch.tensor([1.0, 2.0]), 0.75)
        tensor([0.2500, 1.0000])
    """
    kept = average * (keep if isinstance(keep, Tensor) and keep.dtype == average.dtype else decay)
    return kept + (1 - decay) * x.square() if isinstance(decay, Tensor) else torch.addcmul(kept, x, x, value=1 - decay)


def lerp(start: Tensor, end: Tensor, weight: Scalar) -> Tensor:
    """``start + weight * (end - start)``, where a tensor weight may have another dtype.

    Example:
        >>> lerp(torch.zeros(2), torch.ones(2), torch.tensor(0.25, dtype=torch.float64))
        tensor([0.2500, 0.2500])
    """
    if start.dtype != end.dtype:
        wide = torch.promote_types(start.dtype, end.dtype)
        start, end = start.to(wide), end.to(wide)
    return torch.lerp(start, end, weight.to(start.dtype) if isinstance(weight, Tensor) else weight)


def norm(x: Tensor, order: float = 2.0) -> Tensor:
    """The vector norm of all entries of one tensor, in float32 or wider; a sparse tensor counts its sum of entries once.

    Its derivative at zero is 0, forward and backward. The largest entry (order inf) of an empty tensor is 0.

    Example:
        >>> norm(torch.tensor([3.0, 4.0], dtype=torch.bfloat16))
        tensor(5.)
    """
    if x.layout == torch.sparse_coo:
        x = x.to_dense() if order < 0 else x.coalesce().values()  # entries that are not there are the smallest
    if order == math.inf and x.numel() == 0:
        return torch.zeros((), dtype=real_dtype(compute_dtype(x)), device=x.device)
    return torch.linalg.vector_norm(x, order, dtype=compute_dtype(x))


def rms(x: Tensor) -> Tensor:
    """The root mean square of all entries of one tensor, 0 where there are none; dtype and derivative as in :func:`norm`.

    Example:
        >>> rms(torch.tensor([1.0, 7.0]))
        tensor(5.)
    """
    return norm(x) / max(x.numel(), 1) ** 0.5


def global_norm(tensors: list[Tensor], order: float = 2.0) -> Tensor:
    """The vector norm of all entries of all tensors: the norm of the stacked norms, in the widest of their dtypes.

    Of order 0 this is the number of tensors that are not all zero, as in torch's ``clip_grad_norm_``.

    Example:
        >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    return norm_of_norms([norm(x, order) for x in tensors], order)


def norm_of_norms(norms: list[Tensor], order: float = 2.0) -> Tensor:
    """The vector norm of norms, in the widest of their dtypes; 0 where there are none.

    Example:
        >>> norm_of_norms([torch.tensor(3.0), torch.tensor(4.0)])
        tensor(5.)
    """
    if not norms:
        return torch.zeros(())
    dtype, device = norms[0].dtype, norms[0].device
    for x in norms[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return torch.linalg.vector_norm(torch.stack([x.to(device=device, dtype=dtype) for x in norms]), order)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that the math of these tensors runs in: the widest of theirs, and float32 at least.

    Example:
        >>> compute_dtype(torch.ones(2, dtype=torch.bfloat16))
        torch.float32
    """
    dtype = torch.float32
    for x in tensors:
        if x is not None and x.dtype != dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


_PARTS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parts of a complex dtype, any other dtype as it is; Dynamo (torch 2.13) has no ``dtype.to_real``.

    Example:
        >>> real_dtype(torch.complex64)
        torch.float32
    """
    return _PARTS.get(dtype, dtype)


def as_real(x: Tensor) -> Tensor:
    """A complex tensor as real and imaginary part in a last dimension of 2; any other tensor as it is.

    Example:
        >>> as_real(torch.tensor([1 + 2j]))
        tensor([[1., 2.]])
    """
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def as_complex(x: Tensor) -> Tensor:
    """The inverse of :func:`as_real` for a tensor that was complex; the last dimension must be 2.

    Example:
        >>> as_complex(torch.tensor([[1.0, 2.0]]))
        tensor([1.+2.j])
    """
    return torch.view_as_complex(x)


def ravel(tensors: list[Tensor | None], dtype: torch.dtype | None = None) -> Tensor:
    """All entries of the tensors that there are as one vector, complex ones as real and imaginary part.

    Args:
        tensors: on one device; None is passed over.
        dtype: the vector's; the widest real one of theirs, float32 at least, if None.

    Example:
        >>> ravel([torch.tensor(1.0), None, torch.tensor([2 + 3j])])
        tensor([1., 2., 3.])
    """
    found = [x for x in tensors if x is not None]
    dtype = dtype or real_dtype(compute_dtype(*found))
    return torch.cat([as_real(x).reshape(-1).to(dtype) for x in found]) if found else torch.zeros(0, dtype=dtype)


def unravel(vector: Tensor, likes: list[Tensor | None]) -> list[Tensor | None]:
    """The inverse of :func:`ravel`: tensors like these, that share no memory with the vector.

    Dimensions of the vector before its last one stay in front of those of the tensors.

    Example:
        >>> unravel(torch.tensor([1.0, 2.0, 3.0]), [torch.tensor(1.0), None, torch.tensor([2 + 3j])])
        [tensor(1.), None, tensor([2.+3.j])]
    """
    views = [None if x is None else as_real(x) for x in likes]
    parts = iter(vector.split([x.numel() for x in views if x is not None], dim=-1))

    def part(like: Tensor, view: Tensor) -> Tensor:
        x = next(parts).to(view.dtype, copy=True).reshape(vector.shape[:-1] + view.shape)
        return as_complex(x) if like.is_complex() else x

    return [None if x is None or view is None else part(x, view) for x, view in zip(likes, views, strict=True)]
