"""optfn: pure-functional optimizers for PyTorch.

An optimizer is an immutable pair of functions over trees of tensors, ``init`` and ``update``; pairs compose by :func:`chain`.
"""

from optfn import interop, projections, random, tree
from optfn.compile import compile
from optfn.compose import (
    MaskedState,
    PartitionState,
    chain,
    freeze,
    masked,
    maximize,
    multi_transform,
    named_chain,
    partition,
    selective_transform,
)
from optfn.core import GradientTransformation, apply_updates, identity, is_elementwise, stateless
from optfn.leafwise import CoupledState, LeafwiseState, coupled, leafwise, stateless_with_tree_map
from optfn.minimize import MinimizeResult, minimize
from optfn.optimizers.adadelta import AdadeltaSlots, adadelta, scale_by_adadelta
from optfn.optimizers.adafactor import FactoredSlots, RelativeStepSlots, adafactor, scale_by_factored_rms, scale_by_relative_step
from optfn.optimizers.adagrad import AdagradSlots, adagrad, scale_by_adagrad
from optfn.optimizers.adam import AdamSlots, adam, adamw, scale_by_adam
from optfn.optimizers.adamax import AdamaxSlots, adamax, scale_by_adamax
from optfn.optimizers.asgd import AsgdSlots, asgd, scale_by_asgd
from optfn.optimizers.lbfgs import LbfgsState, lbfgs
from optfn.optimizers.muon import MuonSlots, muon, scale_by_muon, scale_by_shape
from optfn.optimizers.nadam import NAdamSlots, nadam, scale_by_nadam
from optfn.optimizers.radam import RAdamSlots, radam, scale_by_radam
from optfn.optimizers.rmsprop import RmsSlots, rmsprop, scale_by_rms
from optfn.optimizers.rprop import RpropSlots, rprop, scale_by_rprop
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
    warmup_exponential_decay_schedule,
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
    scale_by_param_block_rms,
    scale_by_schedule,
)
from optfn.wrappers.accumulate import AccumulateState, accumulate, skip_large_updates, skip_not_finite
from optfn.wrappers.averages import EmaParamsState, ema_params, incremental_update, periodic_update
from optfn.wrappers.conditional import (
    ConditionallyMaskState,
    ConditionallyTransformState,
    conditionally_mask,
    conditionally_transform,
)
from optfn.wrappers.finite import ApplyIfFiniteState, apply_if_finite
from optfn.wrappers.hyperparams import (
    InjectHyperparamsState,
    StatefulSchedule,
    WrappedSchedule,
    WrappedScheduleState,
    inject_hyperparams,
    inject_stateful_hyperparams,
)
from optfn.wrappers.layout import flatten
from optfn.wrappers.lookahead import LookaheadParams, LookaheadState, lookahead
from optfn.wrappers.monitoring import MeasureWithEmaState, MonitorState, SnapshotState, measure_with_ema, monitor, snapshot
from optfn.wrappers.sparse import sparse_masked

__version__ = "0.1.0"

__all__ = [
    "AccumulateState",
    "AdadeltaSlots",
    "AdagradSlots",
    "AdamSlots",
    "AdamaxSlots",
    "ApplyIfFiniteState",
    "AsgdSlots",
    "ClipByGlobalNormState",
    "ConditionallyMaskState",
    "ConditionallyTransformState",
    "CoupledState",
    "EmaParamsState",
    "FactoredSlots",
    "GradientTransformation",
    "InjectHyperparamsState",
    "LbfgsState",
    "LeafwiseState",
    "LookaheadParams",
    "LookaheadState",
    "MaskedState",
    "MeasureWithEmaState",
    "MinimizeResult",
    "MonitorState",
    "MuonSlots",
    "NAdamSlots",
    "PartitionState",
    "RAdamSlots",
    "ReduceOnPlateauState",
    "RelativeStepSlots",
    "RmsSlots",
    "RpropSlots",
    "ScaleByLearningRateState",
    "ScaleByScheduleState",
    "Schedule",
    "SnapshotState",
    "StatefulSchedule",
    "TraceSlots",
    "WrappedSchedule",
    "WrappedScheduleState",
    "__version__",
    "accumulate",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "add_decayed_weights",
    "apply_if_finite",
    "apply_updates",
    "asgd",
    "chain",
    "chained_scheduler",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "compile",
    "conditionally_mask",
    "conditionally_transform",
    "constant_schedule",
    "cosine_annealing_lr",
    "cosine_annealing_warm_restarts",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "coupled",
    "cyclic_lr",
    "ema_params",
    "exponential_decay",
    "flatten",
    "freeze",
    "identity",
    "incremental_update",
    "inject_hyperparams",
    "inject_stateful_hyperparams",
    "interop",
    "is_elementwise",
    "join_schedules",
    "lbfgs",
    "leafwise",
    "linear_onecycle_schedule",
    "linear_schedule",
    "lookahead",
    "masked",
    "maximize",
    "measure_with_ema",
    "minimize",
    "monitor",
    "multi_transform",
    "multiplicative_lr",
    "muon",
    "nadam",
    "named_chain",
    "one_cycle_lr",
    "partition",
    "periodic_update",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule",
    "polynomial_schedule",
    "projections",
    "radam",
    "random",
    "reduce_on_plateau",
    "rmsprop",
    "rprop",
    "scale",
    "scale_by_adadelta",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_asgd",
    "scale_by_factored_rms",
    "scale_by_learning_rate",
    "scale_by_muon",
    "scale_by_nadam",
    "scale_by_param_block_rms",
    "scale_by_radam",
    "scale_by_relative_step",
    "scale_by_rms",
    "scale_by_rprop",
    "scale_by_schedule",
    "scale_by_shape",
    "selective_transform",
    "sgd",
    "sgdr_schedule",
    "skip_large_updates",
    "skip_not_finite",
    "snapshot",
    "sparse_adam",
    "sparse_masked",
    "stateless",
    "stateless_with_tree_map",
    "trace",
    "tree",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
    "warmup_stable_decay_schedule",
]
