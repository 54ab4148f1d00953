"""Bridges to other worlds: nn.Module, torch.optim, checkpoints."""

from optfn.interop.batchnorm import update_bn
from optfn.interop.modules import write_to_module

__all__ = ["update_bn", "write_to_module"]
