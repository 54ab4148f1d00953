"""More than one process: checkpoints of parameters and states."""

from optfn.distributed.checkpoints import load, save

__all__ = ["load", "save"]
