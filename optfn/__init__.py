"""optfn: pure-functional optimizers for PyTorch.

An optimizer is an immutable pair of functions over trees of tensors, ``init`` and ``update``; pairs compose by :func:`chain`.
"""

from optfn import interop, random, tree
from optfn.compile import compile
from optfn.compose import MaskedState, PartitionState, chain, freeze, masked, maximize, named_chain, partition
from optfn.core import GradientTransformation, apply_updates, identity, is_elementwise, stateless
from optfn.leafwise import CoupledState, LeafwiseState, coupled, leafwise, stateless_with_tree_map
from optfn.minimize import MinimizeResult, minimize
from optfn.optimizers.acprop import AcpropSlots, acprop, scale_by_acprop
from optfn.optimizers.adabelief import BeliefSlots, adabelief, scale_by_belief
from optfn.optimizers.adadelta import AdadeltaSlots, adadelta, scale_by_adadelta
from optfn.optimizers.adafactor import FactoredSlots, RelativeStepSlots, adafactor, scale_by_factored_rms, scale_by_relative_step
from optfn.optimizers.adagrad import AdagradSlots, adagrad, scale_by_adagrad, scale_by_rss
from optfn.optimizers.adam import AdamSlots, adam, adamw, amsgrad, nadamw, scale_by_adam, scale_by_amsgrad
from optfn.optimizers.adamax import AdamaxSlots, adamax, adamaxw, scale_by_adamax
from optfn.optimizers.adan import AdanSlots, adan, scale_by_adan
from optfn.optimizers.ademamix import (
    AdemamixSlots,
    SimplifiedAdemamixSlots,
    ademamix,
    scale_by_ademamix,
    scale_by_simplified_ademamix,
    simplified_ademamix,
)
from optfn.optimizers.adopt import AdoptSlots, adopt, scale_by_adopt
from optfn.optimizers.asgd import AsgdSlots, asgd, scale_by_asgd
from optfn.optimizers.cocob import CocobSlots, cocob, scale_by_cocob
from optfn.optimizers.dog import (
    DistanceSlots,
    DogShared,
    DowgShared,
    LayerDistanceSlots,
    dog,
    dowg,
    scale_by_distance_over_gradients,
    scale_by_dog,
    scale_by_dowg,
)
from optfn.optimizers.lbfgs import LbfgsState, lbfgs
from optfn.optimizers.lion import LionSlots, lion, scale_by_lion
from optfn.optimizers.madgrad import MadgradSlots, madgrad, scale_by_madgrad
from optfn.optimizers.momo import (
    MomoAdamSlots,
    MomoShared,
    MomoSlots,
    PolyakShared,
    momo,
    momo_adam,
    polyak_sgd,
    scale_by_momo,
    scale_by_momo_adam,
    scale_by_polyak,
)
from optfn.optimizers.muon import MuonSlots, muon, scale_by_muon, scale_by_shape
from optfn.optimizers.nadam import NAdamSlots, nadam, scale_by_nadam
from optfn.optimizers.novograd import NovogradSlots, novograd, scale_by_novograd
from optfn.optimizers.optimistic import (
    OptimisticGradientSlots,
    optimistic_adam_v2,
    optimistic_gradient_descent,
    scale_by_optimistic_gradient,
)
from optfn.optimizers.prodigy import (
    DAdaptSlots,
    EstimateShared,
    ProdigySlots,
    dadapt_adamw,
    prodigy,
    scale_by_dadapt_adamw,
    scale_by_prodigy,
)
from optfn.optimizers.radam import RAdamSlots, radam, scale_by_radam
from optfn.optimizers.rmsprop import RmsSlots, rmsprop, scale_by_rms, scale_by_stddev
from optfn.optimizers.rprop import RpropSlots, rprop, scale_by_rprop
from optfn.optimizers.sgd import sgd
from optfn.optimizers.signum import scale_by_sign, sign_sgd, signum
from optfn.optimizers.sm3 import Sm3Slots, scale_by_sm3, sm3
from optfn.optimizers.sparse_adam import sparse_adam
from optfn.optimizers.yogi import YogiSlots, scale_by_yogi, yogi
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
    normalize_by_update_norm,
    scale,
    scale_by_learning_rate,
    scale_by_param_block_rms,
    scale_by_schedule,
)
from optfn.wrappers.accumulate import AccumulateState, accumulate
from optfn.wrappers.averages import EmaParamsState, ema_params
from optfn.wrappers.finite import ApplyIfFiniteState, apply_if_finite
from optfn.wrappers.hyperparams import InjectHyperparamsState, inject_hyperparams
from optfn.wrappers.mechanic import MechanicShared, MechanicSlots, MechanizeState, mechanize
from optfn.wrappers.sparse import sparse_masked

__version__ = "0.1.0"

__all__ = [
    "AccumulateState",
    "AcpropSlots",
    "AdadeltaSlots",
    "AdagradSlots",
    "AdamSlots",
    "AdamaxSlots",
    "AdanSlots",
    "AdemamixSlots",
    "AdoptSlots",
    "ApplyIfFiniteState",
    "AsgdSlots",
    "BeliefSlots",
    "ClipByGlobalNormState",
    "CocobSlots",
    "CoupledState",
    "DAdaptSlots",
    "DistanceSlots",
    "DogShared",
    "DowgShared",
    "EmaParamsState",
    "EstimateShared",
    "FactoredSlots",
    "GradientTransformation",
    "InjectHyperparamsState",
    "LayerDistanceSlots",
    "LbfgsState",
    "LeafwiseState",
    "LionSlots",
    "MadgradSlots",
    "MaskedState",
    "MechanicShared",
    "MechanicSlots",
    "MechanizeState",
    "MinimizeResult",
    "MomoAdamSlots",
    "MomoShared",
    "MomoSlots",
    "MuonSlots",
    "NAdamSlots",
    "NovogradSlots",
    "OptimisticGradientSlots",
    "PartitionState",
    "PolyakShared",
    "ProdigySlots",
    "RAdamSlots",
    "ReduceOnPlateauState",
    "RelativeStepSlots",
    "RmsSlots",
    "RpropSlots",
    "ScaleByLearningRateState",
    "ScaleByScheduleState",
    "Schedule",
    "SimplifiedAdemamixSlots",
    "Sm3Slots",
    "TraceSlots",
    "YogiSlots",
    "__version__",
    "accumulate",
    "acprop",
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "adan",
    "add_decayed_weights",
    "ademamix",
    "adopt",
    "amsgrad",
    "apply_if_finite",
    "apply_updates",
    "asgd",
    "chain",
    "chained_scheduler",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "cocob",
    "compile",
    "constant_schedule",
    "cosine_annealing_lr",
    "cosine_annealing_warm_restarts",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "coupled",
    "cyclic_lr",
    "dadapt_adamw",
    "dog",
    "dowg",
    "ema_params",
    "exponential_decay",
    "freeze",
    "identity",
    "inject_hyperparams",
    "interop",
    "is_elementwise",
    "join_schedules",
    "lbfgs",
    "leafwise",
    "linear_onecycle_schedule",
    "linear_schedule",
    "lion",
    "madgrad",
    "masked",
    "maximize",
    "mechanize",
    "minimize",
    "momo",
    "momo_adam",
    "multiplicative_lr",
    "muon",
    "nadam",
    "nadamw",
    "named_chain",
    "normalize_by_update_norm",
    "novograd",
    "one_cycle_lr",
    "optimistic_adam_v2",
    "optimistic_gradient_descent",
    "partition",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule",
    "polyak_sgd",
    "polynomial_schedule",
    "prodigy",
    "radam",
    "random",
    "reduce_on_plateau",
    "rmsprop",
    "rprop",
    "scale",
    "scale_by_acprop",
    "scale_by_adadelta",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_adan",
    "scale_by_ademamix",
    "scale_by_adopt",
    "scale_by_amsgrad",
    "scale_by_asgd",
    "scale_by_belief",
    "scale_by_cocob",
    "scale_by_dadapt_adamw",
    "scale_by_distance_over_gradients",
    "scale_by_dog",
    "scale_by_dowg",
    "scale_by_factored_rms",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_madgrad",
    "scale_by_momo",
    "scale_by_momo_adam",
    "scale_by_muon",
    "scale_by_nadam",
    "scale_by_novograd",
    "scale_by_optimistic_gradient",
    "scale_by_param_block_rms",
    "scale_by_polyak",
    "scale_by_prodigy",
    "scale_by_radam",
    "scale_by_relative_step",
    "scale_by_rms",
    "scale_by_rprop",
    "scale_by_rss",
    "scale_by_schedule",
    "scale_by_shape",
    "scale_by_sign",
    "scale_by_simplified_ademamix",
    "scale_by_sm3",
    "scale_by_stddev",
    "scale_by_yogi",
    "sgd",
    "sgdr_schedule",
    "sign_sgd",
    "signum",
    "simplified_ademamix",
    "sm3",
    "sparse_adam",
    "sparse_masked",
    "stateless",
    "stateless_with_tree_map",
    "trace",
    "tree",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_stable_decay_schedule",
    "yogi",
]
