"""Bridges to other worlds: nn.Module, torch.optim, checkpoints."""

from optfn.interop.batchnorm import update_bn
from optfn.interop.modules import write_to_module
from optfn.interop.torch_optimizer import TorchOptimizer
from optfn.interop.torch_state import load_torch_state, to_torch_state_dict

__all__ = ["TorchOptimizer", "load_torch_state", "to_torch_state_dict", "update_bn", "write_to_module"]
