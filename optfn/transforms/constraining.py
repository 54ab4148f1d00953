"""Blocks that hold the updates, or the parameters after them, to a set: centred, without NaN, not negative."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn.core import GradientTransformation
from optfn.leafwise import leafwise, stateless_with_tree_map

__all__ = ["ZeroNansSlots", "centralize", "keep_params_nonnegative", "zero_nans"]


def centralize() -> GradientTransformation:
    r"""Subtract from each update its mean over all dimensions but the first, so that every row has mean 0.

    .. math:: u_{i \cdot} = g_{i \cdot} - \mathrm{mean}_j\, g_{ij}

    The first dimension is the output in torch's layers, so these are the weights of one unit. Tensors of fewer than two
    dimensions pass as they are.

    Raises:
        TypeError: from ``update``: a tensor is complex.

    Reference:
        Yong et al., `Gradient Centralization <https://arxiv.org/abs/2004.01461>`_, 2020, equation 1.

    Example:
        >>> centralize().update(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 9.0]]), ())[0]
        tensor([[-1.,  0.,  1.],
                [-2., -1.,  3.]])
    """

    def centred(g: Tensor, p: Any) -> Tensor:
        return g - g.mean(tuple(range(1, g.ndim)), keepdim=True) if g.ndim > 1 else g

    return stateless_with_tree_map(centred, elementwise=False, complex_="error")


def keep_params_nonnegative() -> GradientTransformation:
    r"""Cut the updates so that no parameter becomes negative: :math:`u \leftarrow \max(u, -p)`.

    It belongs at the end of a chain, where the updates are what will be added. A parameter that is negative already
    moves to 0 or above. Of a complex parameter real and imaginary part are held.

    Raises:
        TypeError: from ``update``: ``params`` is missing.

    Example:
        >>> keep_params_nonnegative().update(torch.tensor([-3.0, -0.5]), (), torch.tensor([1.0, 1.0]))[0]
        tensor([-1.0000, -0.5000])
    """
    return stateless_with_tree_map(lambda g, p: torch.where(p + g < 0, -p, g), needs_params=True)


class ZeroNansSlots(NamedTuple):
    """Slots of :func:`zero_nans` for one tensor: ``found_nan``, whether its last update had a NaN, a 0-dim bool tensor."""

    found_nan: Tensor


def zero_nans() -> GradientTransformation:
    """Replace NaN by 0, entry by entry; infinities stay. Of a complex entry it is the part that is NaN.

    Where there was one, ``optfn.tree.get(state, "found_nan")`` says for each leaf: a tree of bool tensors. To leave out the
    whole step use :func:`apply_if_finite`.

    Example:
        >>> tx = zero_nans()
        >>> updates = {"w": torch.tensor([float("nan"), 2.0]), "b": torch.tensor([3.0])}
        >>> updates, state = tx.update(updates, tx.init(updates))
        >>> updates["w"], optfn.tree.get(state, "found_nan")
        (tensor([0., 2.]), {'w': tensor(True), 'b': tensor(False)})
    """

    def init(p: Tensor) -> ZeroNansSlots:
        return ZeroNansSlots(torch.zeros((), dtype=torch.bool, device=p.device))

    def update(g: Tensor, slots: ZeroNansSlots, p: Any, step: Tensor) -> tuple[Tensor, ZeroNansSlots]:
        nan = g.isnan()
        return torch.where(nan, 0, g), ZeroNansSlots(nan.any())

    return leafwise(init, update)
