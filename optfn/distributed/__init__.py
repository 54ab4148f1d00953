"""Training on several processes."""

from optfn.distributed.checkpoints import load, save
from optfn.distributed.diloco import LocalStepsState, local_steps
from optfn.distributed.zero import shard_state

__all__ = ["LocalStepsState", "load", "local_steps", "save", "shard_state"]
