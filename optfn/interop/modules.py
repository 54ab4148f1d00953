"""Parameters from an ``nn.Module`` and back."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["write_to_module"]


def write_to_module(module: torch.nn.Module, params: dict[str, Any]) -> None:
    """Copy a tree of parameters into a module's own, in place: the one step of a training loop that is not pure.

    With ``optfn.compile(donate=...)`` of ``dict(module.named_parameters())`` there is nothing to copy.

    Args:
        module: the module; buffers may be named as well as parameters.
        params: ``{dotted name: tensor}``, some or all of ``module.state_dict()``; None is left as it is.

    Raises:
        KeyError: the module has no such parameter or buffer.
        ValueError: a shape differs. Nothing has been written then.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> write_to_module(model, {"bias": torch.tensor([2.0])})
        >>> model.bias.item()
        2.0
    """
    given_module: Any = module
    if not isinstance(given_module, torch.nn.Module):
        raise TypeError(f"write_to_module(module, params): module must be a module, got {type(given_module).__name__}")
    own = {**dict(module.named_buffers(remove_duplicate=False)), **dict(module.named_parameters(remove_duplicate=False))}
    given = {name: x for name, x in params.items() if x is not None}
    for name, x in given.items():
        if name not in own:
            raise KeyError(f"the module has no parameter or buffer {name!r}; it has {', '.join(own)}")
        if x.shape != own[name].shape:
            raise ValueError(f"{name!r} must have shape {tuple(own[name].shape)}, got {tuple(x.shape)}")
    with torch.no_grad():
        for name, x in given.items():
            target: Tensor = own[name]
            target.copy_(x)
