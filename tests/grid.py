"""The rows of the conformance grid: every public transformation, with its main options, and what it declares not to do."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import optfn
from optfn import GradientTransformation


class Declared(NamedTuple):
    """Why a cell is not green, and the error that its check must raise for the reason to be true."""

    reason: str
    error: type[Exception]
    match: str


@dataclass(frozen=True, eq=False)
class Row:
    """One transformation under test.

    Attributes:
        name: a public name of optfn, and after a dot the option.
        make: the transformation, from a hyperparameter that may be a tensor (from nothing if ``value`` is None).
        value: a number for that hyperparameter, away from the points where the result has a kink.
        around: for a row that wraps: the same wrapper around any elementwise transformation.
        in_state: the hyperparameter's name, if it lives in the state rather than in the pair.
        wide: the parameter-shaped parts of the state that have a dtype of their own for half-precision parameters, and which.
        sparse: the gradients are handed over as sparse COO tensors.
        steps: how many it takes to show all that it does.
        extra: arguments that every update needs by name.
        but: the cells that are not green.
    """

    name: str
    make: Callable[..., GradientTransformation]
    value: float | None = 0.1
    around: Callable[[GradientTransformation], GradientTransformation] | None = None
    in_state: str | None = None
    wide: Mapping[str, torch.dtype] = field(default_factory=dict)
    sparse: bool = False
    steps: int = 3
    extra: Mapping[str, Any] = field(default_factory=dict)
    but: Mapping[str, Declared] = field(default_factory=dict)

    def build(self, h: Any = None) -> GradientTransformation:
        """The transformation, with the hyperparameter ``h`` if it is not one that lives in the state."""
        if self.value is None:
            return self.make()
        return self.make(self.value if self.in_state or h is None else h)

    def place(self, state: Any, h: Any) -> Any:
        """The state, with the hyperparameter in it if it lives there."""
        return optfn.tree.set(state, **{self.in_state: h}) if self.in_state and h is not None else state


def wrapper(
    name: str, around: Callable[[GradientTransformation], GradientTransformation], inner: Any = optfn.adam, **options: Any
) -> Row:
    """A row for what wraps another transformation; its hyperparameter is that one's learning rate."""
    return Row(name, lambda h: around(inner(h)), around=around, **options)


def pairs(path: str, p: Any) -> bool:
    """A mask that holds for one leaf of the samples, "a", also for its real view and under other paths."""
    return p.shape[:1] == (2,)


def kind(path: str, p: Any) -> str:
    return "pair" if pairs(path, p) else "other"


class SignSlots(NamedTuple):
    mu: Tensor


def sign_of_average(b1: Any) -> GradientTransformation:
    """A rule of a user's own (smooth, so that it can be differentiated) under the lift."""

    def update(g: Tensor, slots: SignSlots, p: Any, step: Tensor) -> tuple[Tensor, SignSlots]:
        mu = b1 * slots.mu + (1 - b1) * g
        return torch.tanh(mu * step), SignSlots(mu)

    return optfn.leafwise(lambda p: SignSlots(torch.zeros_like(p)), update, elementwise=True)


NO_NONE = Declared("torch.func has no None as an output", ValueError, "got type <class 'NoneType'>")
NO_NUMBER = Declared("it has no hyperparameter", AssertionError, "nothing depends on h")
AVERAGED = Declared("every parameter is averaged, one that sits the step out too", AssertionError, "average.c has changed")
RESET = Declared("the fast state begins anew as a whole", AssertionError, "has changed")
ONE_STEP_COUNT = dict.fromkeys(
    ("none", "none_param", "empty_leaf"),
    Declared("one vector has one step count", AssertionError, "step: The values for attribute 'shape' do not match"),
)
NO_GRAPH = Declared("torch.compile takes no sparse tensor as an input", torch._dynamo.exc.Unsupported, "wrap sparse Tensor")
AS_IT_IS = Declared("a function of whole trees is handed half-precision leaves as they are", AssertionError, "are not equal")
ABSOLUTE = Declared("a norm of an order other than 2 is of the absolute values, as torch's", AssertionError, "are not close")
NO_BATCH = Declared("torch has no batched sparse tensors", NotImplementedError, "'SparseCPU' backend")
NO_COMPLEX = Declared("it refuses complex parameters, as torch does", TypeError, "'a' is complex, which scale_by_.* does not take")

SCALARS = {"eta": torch.float32, "mu": torch.float32}
FLOAT32 = dict.fromkeys(
    ("grad", "jvp"), Declared("its step size is rounded to float32, as torch's is", AssertionError, "Scalars are not close")
)
BFLOAT16 = {
    **dict.fromkeys(("grad", "jvp"), Declared("the iteration is rounded to bfloat16", AssertionError, "Scalars are not close")),
    "vmap": Declared("mapped, torch rounds a product to bfloat16 before it is added", AssertionError, "not close"),
}


def matrices(tx: GradientTransformation) -> GradientTransformation:
    """On what is a matrix; the updates of the rest pass."""
    return optfn.masked(tx, lambda path, p: p.ndim == 2)


ONE_VECTOR = {
    "none": Declared("a None gradient counts as zeros, as in torch; sums with them round otherwise", AssertionError, "not equal")
}

ROWS = [
    # Aliases
    Row("sgd", optfn.sgd),
    Row("sgd.momentum", lambda h: optfn.sgd(h, momentum=0.9, dampening=0.5, weight_decay=0.1, maximize=True)),
    Row("sgd.nesterov", lambda h: optfn.sgd(0.1, momentum=h, nesterov=True), 0.9),
    Row("adam", optfn.adam),
    Row("adam.amsgrad", lambda h: optfn.adam(h, weight_decay=0.1, amsgrad=True, maximize=True)),
    Row("adam.b1", lambda h: optfn.adam(0.1, betas=(h, 0.99)), 0.8),
    Row("adam.schedule", lambda h: optfn.adam(optfn.linear_schedule(h, 0.01, 10))),
    Row("adamw", optfn.adamw),
    Row("adamw.mask", lambda h: optfn.adamw(0.1, weight_decay=h, amsgrad=True, maximize=True, mask=pairs)),
    Row("adagrad", optfn.adagrad),
    Row("adagrad.decay", lambda h: optfn.adagrad(0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=h, maximize=True)),
    Row("rmsprop", optfn.rmsprop),
    Row("rmsprop.centered", lambda h: optfn.rmsprop(0.1, alpha=h, weight_decay=0.1, centered=True, maximize=True), 0.8),
    Row("rmsprop.momentum", lambda h: optfn.rmsprop(h, momentum=0.9)),
    Row(
        "sparse_adam",
        optfn.sparse_adam,
        sparse=True,
        but={
            "fullgraph": NO_GRAPH,
            "one_graph": NO_GRAPH,
            "vmap": NO_BATCH,
            "vmap_lr": NO_BATCH,
            "meta": Declared("torch neither adds sparse meta tensors nor makes them dense", NotImplementedError, "'SparseMeta'"),
            "jvp": Declared(
                "torch has no forward derivatives of sparse tensors", NotImplementedError, "forward AD with _sparse_coo"
            ),
        },
    ),
    Row("adadelta", lambda h: optfn.adadelta(h, eps=1e-3)),
    Row("adadelta.rho", lambda h: optfn.adadelta(rho=h, eps=1e-3, weight_decay=0.1, maximize=True), 0.8),
    Row("adamax", optfn.adamax),
    Row("adamax.b2", lambda h: optfn.adamax(0.1, betas=(0.8, h), weight_decay=0.1, maximize=True), 0.9),
    Row("nadam", optfn.nadam, wide={"mu_product": torch.float32}),
    Row(
        "nadam.decoupled",
        lambda h: optfn.nadam(0.1, weight_decay=h, decoupled_weight_decay=True, maximize=True),
        wide={"mu_product": torch.float32},
    ),
    Row("radam", optfn.radam, steps=6),
    Row("radam.decoupled", lambda h: optfn.radam(0.1, weight_decay=h, decoupled_weight_decay=True, maximize=True), steps=6),
    Row("rprop", optfn.rprop),
    Row("rprop.schedule", lambda h: optfn.rprop(optfn.linear_schedule(h, 0.0, 10), weight_decay=0.1, maximize=True)),
    Row("asgd", optfn.asgd, wide=SCALARS, but=FLOAT32),
    Row("asgd.lambd", lambda h: optfn.asgd(0.1, lambd=h, t0=1, weight_decay=0.1, maximize=True), wide=SCALARS, but=FLOAT32),
    Row("asgd.schedule", lambda h: optfn.asgd(optfn.linear_schedule(h, 0.01, 10), t0=1), wide=SCALARS, but=FLOAT32),
    Row("adafactor", optfn.adafactor, but={"complex": NO_COMPLEX}),
    Row(
        "adafactor.schedule",
        lambda h: optfn.adafactor(optfn.linear_schedule(h, 0.01, 10), eps=(1e-2, 0.1), weight_decay=0.1, maximize=True),
        but={"complex": NO_COMPLEX},
    ),
    Row("muon", lambda h: matrices(optfn.muon(h)), but={**BFLOAT16, "complex": NO_COMPLEX}),
    Row(
        "muon.float64",
        lambda h: matrices(optfn.muon(0.1, h, adjust_lr_fn="match_rms_adamw", ns_dtype=None, maximize=True)),
        but={"complex": NO_COMPLEX},
    ),
    Row("lbfgs", optfn.lbfgs, but=ONE_VECTOR),
    Row("lbfgs.history", lambda h: optfn.lbfgs(optfn.linear_schedule(h, 0.01, 10), history_size=2), but=ONE_VECTOR),
    # Blocks
    Row("scale_by_adadelta", lambda h: optfn.scale_by_adadelta(eps=h)),
    Row("scale_by_adamax", lambda h: optfn.scale_by_adamax(h), 0.9),
    Row("scale_by_nadam", lambda h: optfn.scale_by_nadam(b2=h), 0.9, wide={"mu_product": torch.float32}),
    Row("scale_by_radam", lambda h: optfn.scale_by_radam(b2=h, eps_root=1e-3), 0.9, steps=6),
    Row("scale_by_radam.eps_hat", lambda h: optfn.scale_by_radam(b2=0.95, eps=h, threshold=4.0, eps_hat=True), steps=6),
    Row("scale_by_rprop", lambda h: optfn.scale_by_rprop(0.1, eta_plus=h), 1.2),
    Row("scale_by_asgd", optfn.scale_by_asgd, wide=SCALARS, but=FLOAT32),
    Row("scale_by_factored_rms", lambda h: optfn.scale_by_factored_rms(h), -0.8, but={"complex": NO_COMPLEX}),
    Row("scale_by_param_block_rms", optfn.scale_by_param_block_rms, 2.0),
    Row("scale_by_relative_step", optfn.scale_by_relative_step),
    Row(
        "scale_by_muon",
        lambda h: matrices(optfn.scale_by_muon(ns_steps=2, beta=h, mu_dtype=torch.float64, ns_dtype=None)),
        0.9,
        wide={"mu": torch.float64},
        but={"complex": NO_COMPLEX},
    ),
    Row(
        "scale_by_muon.coeffs",
        lambda h: matrices(optfn.scale_by_muon((2.0, h, 0.5), ns_dtype=None)),
        -1.5,
        but={"complex": NO_COMPLEX},
    ),
    Row("scale_by_shape", lambda: matrices(optfn.scale_by_shape()), None, but={"complex": NO_COMPLEX, "vmap_lr": NO_NUMBER}),
    Row("scale_by_adam", lambda h: optfn.scale_by_adam(b2=h), 0.99),
    Row(
        "scale_by_adam.nesterov",
        lambda h: optfn.scale_by_adam(eps_root=h, nesterov=True, mu_dtype=torch.float64),
        wide={"mu": torch.float64},
    ),
    Row("scale_by_adam.debiased", lambda h: optfn.scale_by_adam(b2=h, amsgrad="debiased", eps_hat=True), 0.9),
    Row("scale_by_adagrad", lambda h: optfn.scale_by_adagrad(lr_decay=h)),
    Row("scale_by_adagrad.eps_in_sqrt", lambda h: optfn.scale_by_adagrad(0.1, eps=h, eps_in_sqrt=True)),
    Row("scale_by_rms", lambda h: optfn.scale_by_rms(h), 0.9),
    Row("scale_by_rms.centered", lambda h: optfn.scale_by_rms(h, 1e-3, 0.1, bias_correction=True, centered=True), 0.9),
    Row("trace", optfn.trace, 0.9),
    Row(
        "trace.nesterov",
        lambda h: optfn.trace(0.9, nesterov=True, accumulator_dtype=torch.float64, dampening=h),
        wide={"trace": torch.float64},
    ),
    Row("scale", optfn.scale, -0.1),
    Row("scale_by_schedule", lambda h: optfn.scale_by_schedule(optfn.linear_schedule(h, 0.0, 10))),
    Row("scale_by_learning_rate", optfn.scale_by_learning_rate),
    Row("scale_by_learning_rate.schedule", lambda h: optfn.scale_by_learning_rate(optfn.cosine_decay_schedule(h, 10))),
    Row("add_decayed_weights", optfn.add_decayed_weights),
    Row("add_decayed_weights.mask", lambda h: optfn.add_decayed_weights(h, mask=pairs)),
    Row("clip", optfn.clip, 0.7),
    Row("clip_by_global_norm", optfn.clip_by_global_norm, 0.7),
    Row(
        "clip_by_global_norm.inf",
        lambda h: optfn.clip_by_global_norm(h, eps=1e-6, order=float("inf"), keep_norm=True),
        0.3,
        but={"complex": ABSOLUTE},
    ),
    Row("clip_by_global_norm.root", lambda h: optfn.clip_by_global_norm(h, order=0.5), 0.7, but={"complex": ABSOLUTE}),
    Row("clip_by_block_rms", optfn.clip_by_block_rms, 0.7),
    # The first metric improves on none, the others not on it.
    Row("reduce_on_plateau", lambda h: optfn.reduce_on_plateau(h, 1), 0.7, extra={"value": 1.0}),
    Row("reduce_on_plateau.max", lambda h: optfn.reduce_on_plateau(0.5, 1, min_scale=h, mode="max"), 0.7, extra={"value": 1.0}),
    # Combinators
    wrapper("chain", lambda tx: optfn.chain(optfn.trace(0.9), optfn.clip(0.7), tx)),
    wrapper("named_chain", lambda tx: optfn.named_chain(("first", optfn.trace(0.9)), ("second", tx))),
    wrapper("masked", lambda tx: optfn.masked(tx, pairs)),
    wrapper(
        "partition",
        lambda tx: optfn.partition({"pair": tx, "other": optfn.sgd(0.1, momentum=0.9)}, kind),
        but={"bare_params": Declared("one leaf cannot have both labels", ValueError, "no leaf has the label 'other'")},
    ),
    Row(
        "freeze",
        optfn.freeze,
        None,
        but={
            "one_graph": Declared("nothing is computed", AssertionError, "^0 graphs"),
            "vmap": NO_NONE,
            "vmap_lr": NO_NUMBER,
            "grad": Declared("the gradients of frozen leaves are not used", AssertionError, "nothing depends on grads"),
            "records": Declared("the gradients of frozen leaves are not used", AssertionError, "updates do not require grad"),
        },
    ),
    Row("freeze.mask", lambda h: optfn.chain(optfn.freeze(pairs), optfn.adamw(h)), but={"vmap": NO_NONE}),
    wrapper("maximize", optfn.maximize),
    Row("identity", optfn.identity, None, but={"vmap_lr": NO_NUMBER}),
    Row(
        "stateless",
        lambda h: optfn.stateless(lambda updates, params: optfn.tree.map(lambda u: -h * (u / 3), updates)),
        but={"bf16": AS_IT_IS, "fp16": AS_IT_IS},
    ),
    Row("stateless_with_tree_map", lambda h: optfn.stateless_with_tree_map(lambda g, p: -h * torch.tanh(g))),
    Row("leafwise", sign_of_average, 0.9),
    # Wrappers
    wrapper("sparse_masked", lambda tx: optfn.sparse_masked(tx, dense="zeros_absent")),
    Row(
        "inject_hyperparams",
        lambda h: optfn.inject_hyperparams(optfn.adam)(h, eps=optfn.linear_schedule(1e-3, 1e-4, 5)),
        around=lambda tx: optfn.inject_hyperparams(lambda lr: optfn.chain(optfn.scale(lr), tx))(lr=0.1),
        in_state="lr",
    ),
    wrapper("apply_if_finite", optfn.apply_if_finite),
    wrapper("accumulate", lambda tx: optfn.accumulate(tx, 2), wide={"accumulated": torch.float32}),
    Row("ema_params", lambda h: optfn.chain(optfn.sgd(0.1), optfn.ema_params(h)), 0.9, but={"none": AVERAGED}),
    Row(
        "ema_params.avg_fn",
        lambda h: optfn.chain(optfn.sgd(h), optfn.ema_params(avg_fn=lambda average, p, n: (n * average + 3 * p) / (n + 3))),
        but={"none": AVERAGED},
    ),
    Row("ema_params.swa", lambda h: optfn.chain(optfn.sgd(h), optfn.ema_params(None)), but={"none": AVERAGED}),
    wrapper("lookahead", lambda tx: optfn.lookahead(tx, 2, 0.5)),
    Row(
        "lookahead.reset", lambda h: optfn.lookahead(optfn.sgd(0.1, momentum=0.9), 2, h, reset_state=True), 0.3, but={"none": RESET}
    ),
    wrapper("conditionally_transform", lambda tx: optfn.conditionally_transform(tx, lambda step: step != 1)),
    wrapper("conditionally_mask", lambda tx: optfn.conditionally_mask(tx, lambda step: step != 1)),
    Row(
        "selective_transform",
        lambda h: optfn.selective_transform(optfn.adamw(h), freeze_mask=pairs),
        but={"vmap": NO_NONE},
    ),
    wrapper(
        "multi_transform",
        lambda tx: optfn.multi_transform({"pair": tx, "other": optfn.sgd(0.1, momentum=0.9)}, kind),
        but={"bare_params": Declared("one leaf cannot have both labels", ValueError, "no leaf has the label 'other'")},
    ),
    wrapper("flatten", optfn.flatten, but=ONE_STEP_COUNT),
    Row(
        "inject_stateful_hyperparams",
        lambda h: optfn.inject_stateful_hyperparams(optfn.adam)(lr=optfn.WrappedSchedule(optfn.linear_schedule(h, 0.01, 10))),
        but={"donated": Declared("what an object reads is not proven, so Dynamo takes the step", AssertionError, "was not traced")},
    ),
    Row("snapshot", lambda h: optfn.chain(optfn.sgd(h), optfn.snapshot("norm", optfn.tree.norm))),
    Row(
        "monitor",
        lambda h: optfn.chain(optfn.sgd(h), optfn.monitor({"norm": optfn.tree.norm, "all": lambda updates: updates})),
    ),
    Row(
        "measure_with_ema",
        lambda h: optfn.chain(optfn.sgd(0.1), optfn.monitor({"norm": optfn.measure_with_ema(optfn.tree.norm, h)})),
        0.9,
    ),
    wrapper(
        "accumulate.should_skip",
        lambda tx: optfn.accumulate(tx, 2, should_skip_update_fn=functools.partial(optfn.skip_large_updates, max_squared_norm=9.0)),
        wide={"accumulated": torch.float32},
    ),
]
