"""Work that a step does only at times."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack  # pyright: ignore[reportPrivateUsage]

from optfn.tree.structure import map

__all__ = ["cond", "decided", "decides"]


def cond(pred: bool | Tensor, true_fn: Callable[[], Any], false_fn: Callable[[], Any]) -> Any:
    """The tree that one of two functions gives, for work that is dear and not due at every step.

    Run eagerly, only the function that is taken is called: a tensor is looked at, which on an accelerator waits for it.
    A step that :func:`optfn.compile` compiles does the same: of both functions are written down, and what only one of them needs is
    computed when it is taken. Elsewhere both are computed and :func:`torch.where` selects: under ``vmap`` over the predicate, where
    each entry may take another, under plain :func:`torch.compile` and in :mod:`torch.export`. Neither should raise there.

    Args:
        pred: a bool, or a 0-dim bool tensor.
        true_fn: called without arguments where ``pred`` holds. Both give trees of one structure, with the same shapes, dtypes
            and devices.
        false_fn: called where it does not.

    Raises:
        TypeError: another predicate; where both functions are called: shapes or dtypes differ.
        ValueError: where both functions are called: the structures differ.

    Example:
        >>> step = torch.tensor(20)
        >>> cond(step % 10 == 0, lambda: torch.linalg.qr(torch.eye(2))[0].abs(), lambda: torch.zeros(2, 2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    given: Any = pred
    if not isinstance(given, bool) and not (isinstance(given, Tensor) and given.dtype == torch.bool and given.ndim == 0):
        got = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"cond: the predicate must be a bool or a 0-dim bool tensor, got {got}")
    if not decided(pred):
        marked: Any = given if torch.compiler.is_exporting() else decides(given)
        return map(lambda x, y: x if x is y else torch.where(marked, *_alike(x, y)), true_fn(), false_fn())
    return true_fn() if pred else false_fn()


def _alike(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    if not all(isinstance(z, Tensor) for z in (x, y)) or (x.shape, x.dtype) != (y.shape, y.dtype):
        said = [f"{z.dtype} of shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__ for z in (x, y)]
        raise TypeError(f"cond: both functions must give tensors of one shape and dtype, got {' and '.join(said)}")
    return x, y


def decided(pred: bool | Tensor) -> bool:
    """Whether a predicate is one value that may be looked at here, which it is not while a step is traced.

    Example:
        >>> decided(torch.tensor(True)), torch.func.vmap(lambda pred: torch.tensor(decided(pred)))(torch.tensor([True, False]))
        (True, tensor([False, False]))
    """
    if isinstance(pred, bool):
        return True
    if torch.compiler.is_compiling() or pred.is_meta or any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack()):
        return False
    functorch: Any = torch._C._functorch  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue] - torch 2.13 has no other way
    while functorch.is_functorch_wrapped_tensor(pred):
        if functorch.is_batchedtensor(pred):
            return False
        pred = functorch.get_unwrapped(pred)
    return True


@torch.library.custom_op("optfn::decides", mutates_args=())
def decides(pred: Tensor) -> Tensor:
    """The predicate itself. It says to :mod:`optfn.compile` that what it selects between is not to be computed in vain."""
    return pred.clone()


@decides.register_fake
def _(pred: Tensor) -> Tensor:
    return torch.empty_like(pred)


@decides.register_vmap
def _(info: Any, in_dims: Any, pred: Tensor) -> Any:
    return pred, in_dims[0]
