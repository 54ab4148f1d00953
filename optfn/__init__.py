"""optfn: pure-functional optimizers for PyTorch.

An optimizer is an immutable pair of functions over trees of tensors, ``init`` and ``update``; pairs compose by :func:`chain`.
"""

from optfn import interop, tree
from optfn.compile import compile
from optfn.compose import MaskedState, PartitionState, chain, freeze, masked, maximize, named_chain, partition
from optfn.core import GradientTransformation, apply_updates, identity, is_elementwise, stateless
from optfn.leafwise import LeafwiseState, leafwise, stateless_with_tree_map
from optfn.optimizers.adagrad import AdagradSlots, adagrad, scale_by_adagrad
from optfn.optimizers.adam import AdamSlots, adam, adamw, scale_by_adam
from optfn.optimizers.rmsprop import RmsSlots, rmsprop, scale_by_rms
from optfn.optimizers.sgd import sgd
from optfn.optimizers.sparse_adam import sparse_adam
from optfn.schedules import (
    Schedule,
    chained_scheduler,
    constant_schedule,
    cosine_annealing_lr,
    cosine_annealing_warm_restarts,
    cosine_decay_schedule,
    cosine_onecycle_schedule,
    cyclic_lr,
    exponential_decay,
    join_schedules,
    linear_onecycle_schedule,
    linear_schedule,
    multiplicative_lr,
    one_cycle_lr,
    piecewise_constant_schedule,
    piecewise_interpolate_schedule,
    polynomial_schedule,
    sgdr_schedule,
    warmup_constant_schedule,
    warmup_cosine_decay_schedule,
    warmup_stable_decay_schedule,
)
from optfn.transforms.clipping import ClipByGlobalNormState, clip, clip_by_block_rms, clip_by_global_norm
from optfn.transforms.decay import add_decayed_weights
from optfn.transforms.momentum import TraceSlots, trace
from optfn.transforms.plateau import ReduceOnPlateauState, reduce_on_plateau
from optfn.transforms.scaling import (
    ScaleByLearningRateState,
    ScaleByScheduleState,
    scale,
    scale_by_learning_rate,
    scale_by_schedule,
)
from optfn.wrappers.accumulate import AccumulateState, accumulate
from optfn.wrappers.averages import EmaParamsState, ema_params
from optfn.wrappers.finite import ApplyIfFiniteState, apply_if_finite
from optfn.wrappers.hyperparams import InjectHyperparamsState, inject_hyperparams
from optfn.wrappers.sparse import sparse_masked

__version__ = "0.1.0"

__all__ = [
    "AccumulateState",
    "AdagradSlots",
    "AdamSlots",
    "ApplyIfFiniteState",
    "ClipByGlobalNormState",
    "EmaParamsState",
    "GradientTransformation",
    "InjectHyperparamsState",
    "LeafwiseState",
    "MaskedState",
    "PartitionState",
    "ReduceOnPlateauState",
    "RmsSlots",
    "ScaleByLearningRateState",
    "ScaleByScheduleState",
    "Schedule",
    "TraceSlots",
    "__version__",
    "accumulate",
    "adagrad",
    "adam",
    "adamw",
    "add_decayed_weights",
    "apply_if_finite",
    "apply_updates",
    "chain",
    "chained_scheduler",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "compile",
    "constant_schedule",
    "cosine_annealing_lr",
    "cosine_annealing_warm_restarts",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "cyclic_lr",
    "ema_params",
    "exponential_decay",
    "freeze",
    "identity",
    "inject_hyperparams",
    "interop",
    "is_elementwise",
    "join_schedules",
    "leafwise",
    "linear_onecycle_schedule",
    "linear_schedule",
    "masked",
    "maximize",
    "multiplicative_lr",
    "named_chain",
    "one_cycle_lr",
    "partition",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule",
    "polynomial_schedule",
    "reduce_on_plateau",
    "rmsprop",
    "scale",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_rms",
    "scale_by_schedule",
    "sgd",
    "sgdr_schedule",
    "sparse_adam",
    "sparse_masked",
    "stateless",
    "stateless_with_tree_map",
    "trace",
    "tree",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_stable_decay_schedule",
]
