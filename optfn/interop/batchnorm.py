"""Statistics of batch normalisation, as values."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["update_bn"]


def update_bn(
    loader: Iterable[Any],
    module: torch.nn.Module,
    params: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    device: int | torch.device | None = None,
) -> dict[str, Tensor]:
    """The buffers of a module after one pass over the data, in which its BatchNorm layers gather their statistics anew.

    A pure :func:`torch.optim.swa_utils.update_bn`: averaged parameters, ``optfn.tree.get(state, "average")``, come with no
    statistics of their own. Neither the module nor what is given is changed; what comes back goes into
    ``torch.func.functional_call(module, (params, buffers), x)``. The pass is made in training mode, without derivatives, so dropout
    draws random numbers; buffers of other layers that a pass changes come back changed.

    Args:
        loader: batches: tensors, or tuples and lists whose first entry is what the module takes.
        module: gives the computation; it is not run itself, a copy that shares its other tensors is.
        params: ``{dotted name: tensor}``, for the module's own parameters of these names.
        buffers: the same for its buffers.
        device: where batches are moved to; by default they stay where they are.

    Returns:
        ``{dotted name: tensor}``, new tensors: all buffers of the module.

    Raises:
        KeyError: the module has no parameter, or no buffer, of a name.
        ValueError: a shape differs.

    Example:
        >>> model = torch.nn.BatchNorm1d(1)
        >>> buffers = update_bn([torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [8.0]])], model)
        >>> buffers["running_mean"], model.running_mean
        (tensor([4.]), tensor([0.]))
    """
    own: dict[int, Tensor] = {}
    for kind, given, named in (
        ("parameter", params or {}, dict(module.named_parameters(remove_duplicate=False))),
        ("buffer", buffers or {}, dict(module.named_buffers(remove_duplicate=False))),
    ):
        for name, x in given.items():
            if name not in named:
                raise KeyError(f"the module has no {kind} {name!r}; it has {', '.join(named)}")
            if x.shape != named[name].shape:
                raise ValueError(f"{name!r} must have shape {tuple(named[name].shape)}, got {tuple(x.shape)}")
        for name, x in named.items():
            if name in given or id(x) not in own:
                new = given.get(name, x).detach()
                own[id(x)] = torch.nn.Parameter(new, requires_grad=False) if kind == "parameter" else new.clone()
    # deepcopy takes what it is told to be copied already: the copy has our tensors, tied ones in each of their places.
    twin = copy.deepcopy(module, own)  # pyright: ignore[reportArgumentType]
    torch.optim.swa_utils.update_bn(loader, twin, device)
    return dict(twin.named_buffers())
