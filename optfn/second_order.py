r"""Second derivatives of a loss, on :mod:`torch.func`: products with the Hessian, its diagonal, that of the Fisher matrix.

A loss is ``loss(params, inputs, targets)``, a 0-dim tensor. A vector has the leaves of the parameters, flattened, one after the
other, in the order of :func:`optfn.tree.leaves`. The functions are those of ``optax.second_order``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optfn import tree
from optfn.sharding import is_sharded

__all__ = ["fisher_diag", "hessian_diag", "hessian_product", "hvp"]

Loss = Callable[[Any, Any, Any], Tensor]


def hvp(loss: Loss, v: Tensor, params: Any, inputs: Any, targets: Any) -> Any:
    r"""The product of the Hessian and a vector, :math:`\nabla^2 f(p)\, v`, at the cost of some gradients.

    Args:
        loss: the function :math:`f`.
        v: a vector with as many entries as ``params`` has.
        params: a tree of tensors.
        inputs: handed to ``loss``.
        targets: handed to ``loss``.

    Returns:
        The product, a tree like ``params``, as Optax's.

    Raises:
        ValueError: ``v`` has another size.

    Example:
        >>> hvp(lambda p, x, y: (p["w"] ** 3).sum(), torch.tensor([1.0, 0.0]), {"w": torch.tensor([2.0, 5.0])}, None, None)
        {'w': tensor([12.,  0.])}
    """
    found, spec = tree.flatten(params)
    sizes = [x.numel() for x in found if x is not None]
    if v.shape != (sum(sizes),):
        raise ValueError(f"v must have the {sum(sizes)} entries of params, got shape {tuple(v.shape)}")
    parts = iter(v.split(sizes))
    tangent = tree.unflatten(spec, [None if x is None else next(parts).reshape(x.shape).to(x.dtype) for x in found])
    return hessian_product(lambda p: loss(p, inputs, targets), params, tangent)


def hessian_product(fun: Callable[[Any], Tensor], params: Any, tangent: Any) -> Any:
    """The product of the Hessian of a function of one tree and a tree, at the cost of some gradients.

    Args:
        fun: a function of ``params``, to a 0-dim tensor.
        params: where the Hessian is taken, a tree of tensors; None stays None.
        tangent: what it is multiplied by, a tree like ``params``, with the same shapes and dtypes.

    Example:
        >>> params = {"w": torch.tensor([2.0, 5.0]), "b": None}
        >>> hessian_product(lambda p: (p["w"] ** 3).sum(), params, {"w": torch.tensor([1.0, 0.0]), "b": None})
        {'w': tensor([12.,  0.]), 'b': None}
    """
    present, rebuilt = tree.tensors(params)
    if any(map(is_sharded, present)):
        taped = tree.Taped(lambda present: fun(rebuilt(present)), present)
        return rebuilt(taped.hessian_product(tree.leaves(tree.map(lambda p, v: v, params, tangent))))

    def slope(p: Any) -> Tensor:
        # Backward twice: not every operator has a forward derivative, and torch.export takes no jvp (torch 2.13).
        return tree.vdot(tree.value_and_grad(fun)(p)[1], tangent)

    return tree.value_and_grad(slope)(params)[1]


def hessian_diag(loss: Loss, params: Any, inputs: Any, targets: Any) -> Tensor:
    r"""The diagonal of the Hessian, :math:`\partial^2 f / \partial p_i^2`: a product for each entry, one after the other.

    Args:
        loss: the function :math:`f`.
        params: a tree of tensors.
        inputs: handed to ``loss``.
        targets: handed to ``loss``.

    Example:
        >>> hessian_diag(lambda p, x, y: (p["w"] ** 3).sum(), {"w": torch.tensor([2.0, 5.0])}, None, None)
        tensor([12., 30.])
    """
    flat = _ravel(params)
    one = torch.zeros_like(flat)
    ones = (one.index_fill(0, torch.tensor(i, device=one.device), 1) for i in range(len(flat)))
    products = (_ravel(hvp(loss, v, params, inputs, targets)) for v in ones)
    return torch.stack([product[i] for i, product in enumerate(products)]) if len(flat) else flat


def fisher_diag(negative_log_likelihood: Loss, params: Any, inputs: Any, targets: Any) -> Tensor:
    r"""The diagonal of the observed Fisher matrix: the squared entries of the gradient of the log-likelihood.

    Args:
        negative_log_likelihood: a loss.
        params: a tree of tensors.
        inputs: handed to ``negative_log_likelihood``.
        targets: handed to ``negative_log_likelihood``.

    Example:
        >>> fisher_diag(lambda p, x, y: (p["w"] ** 2).sum(), {"w": torch.tensor([2.0, 5.0])}, None, None)
        tensor([ 16., 100.])
    """
    return _ravel(torch.func.grad(negative_log_likelihood)(params, inputs, targets)).square()


def _ravel(params: Any) -> Tensor:
    parts = [x.reshape(-1) for x in tree.leaves(params)]
    return torch.cat(parts) if parts else torch.zeros(0)
