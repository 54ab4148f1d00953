"""The state of ``torch.optim.LBFGS``, which torch keeps with the first parameter: vectors of all, in the order of its groups."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optfn import tree
from optfn.optimizers.lbfgs import LbfgsState

__all__ = ["LBFGS_NAMES", "lbfgs_from_torch", "lbfgs_to_torch"]

LBFGS_NAMES = ("func_evals", "n_iter", "d", "t", "old_dirs", "old_stps", "ro", "al", "H_diag", "prev_flat_grad", "prev_loss")
"""What torch keeps."""


def lbfgs_from_torch(state: LbfgsState, params: Any, order: list[int], kept: Mapping[str, Any]) -> LbfgsState:
    """What torch keeps, in a fresh state.

    Args:
        state: a fresh state, as ``lbfgs(...).init(params)`` makes it; of a longer history in torch its newest pairs are taken.
        params: the parameters.
        order: the positions of the parameters, as :func:`optfn.tree.flatten` has them, in torch's order.
        kept: torch's state of the first parameter.

    Raises:
        TypeError: a parameter lies on several processes.
        ValueError: torch's vectors are not as long as the parameters together.
    """
    if not kept:
        return state
    tree.check_here("load_torch_state of torch.optim.LBFGS", params)

    def ours(x: Tensor) -> Tensor:
        return _reordered(x.detach().to(state.last_step), params, order, sorted(order))

    history = len(state.s)
    pairs = list(zip(kept["old_stps"], kept["old_dirs"], strict=True))[-history:]
    s, y, products = state.s.clone(), state.y.clone(), state.products.clone()
    for row, (step, change) in enumerate(pairs):
        s[row], y[row] = ours(step), ours(change)
    products[:, : len(pairs)] = s @ y[: len(pairs)].T
    return LbfgsState(
        n_iter=torch.full_like(state.n_iter, kept["n_iter"]),
        pairs=torch.full_like(state.pairs, len(pairs)),
        last_grad=ours(kept["prev_flat_grad"]),
        last_step=ours(kept["d"] * kept["t"]),
        s=s,
        y=y,
        products=products,
        gamma=torch.as_tensor(kept["H_diag"]).to(state.gamma),
    )


def lbfgs_to_torch(state: LbfgsState, params: Any, order: list[int]) -> dict[str, Any]:
    """The inverse of :func:`lbfgs_from_torch`. Evaluations are not counted here: torch's ``func_evals`` becomes the iterations."""
    if state.n_iter == 0:
        return {}
    tree.check_here("to_torch_state_dict of lbfgs", params)

    def theirs(x: Tensor) -> Tensor:
        return _reordered(x.detach(), params, sorted(order), order).clone()

    history, total, n_iter = len(state.s), int(state.pairs), int(state.n_iter)
    rows = [i % history for i in range(max(total - history, 0), total)]  # the oldest first
    return {
        "func_evals": n_iter,
        "n_iter": n_iter,
        "d": theirs(state.last_step),
        "t": 1.0,
        "old_dirs": [theirs(state.y[i]) for i in rows],
        "old_stps": [theirs(state.s[i]) for i in rows],
        "ro": [1 / state.products[i, i].detach() for i in rows],
        "H_diag": state.gamma.detach().clone(),
        "prev_flat_grad": theirs(state.last_grad),
        "prev_loss": None,
    }


def _reordered(x: Tensor, params: Any, before: list[int], after: list[int]) -> Tensor:
    """A vector of all entries of the parameters, which are in one order, with them in another."""
    leaves = tree.flatten(params)[0]
    sizes = [leaves[i].numel() * (2 if leaves[i].is_complex() else 1) for i in before]
    if sum(sizes) != len(x):
        raise ValueError(f"torch's LBFGS has vectors of {len(x)} entries, the parameters have {sum(sizes)}")
    parts = dict(zip(before, x.split(sizes), strict=True))
    return torch.cat([parts[i] for i in after])
