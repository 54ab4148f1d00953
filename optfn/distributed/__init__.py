"""Training on several processes."""

from optfn.distributed.diloco import LocalStepsState, local_steps
from optfn.distributed.zero import shard_state

__all__ = ["LocalStepsState", "local_steps", "shard_state"]
