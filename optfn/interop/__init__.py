"""Bridges to other worlds: nn.Module, torch.optim, checkpoints."""

from optfn.interop.modules import write_to_module

__all__ = ["write_to_module"]
