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


class TotalShared(NamedTuple):
    total: Any


def tanh_of_share(h: Any) -> GradientTransformation:
    """A coupled rule of a user's own, which keeps an average of the sum of all gradients."""

    def measure(g: Tensor, slots: Any, p: Any, step: Tensor, shared: TotalShared) -> tuple[tuple[Tensor], Any]:
        return (g.sum(),), slots

    def decide(shared: TotalShared, sums: tuple[Tensor, ...]) -> TotalShared:
        return TotalShared(h * shared.total + (1 - h) * sums[0])

    def update(g: Tensor, slots: Any, p: Any, step: Tensor, shared: TotalShared) -> tuple[Tensor, Any]:
        return torch.tanh(g + shared.total), slots

    return optfn.coupled(lambda p: (), measure, decide, update, shared=TotalShared(1.0))


NO_NONE = Declared("torch.func has no None as an output", ValueError, "got type <class 'NoneType'>")
NO_SLOPE = Declared("a sign has no slope", AssertionError, "nothing depends on grads")
SIGNS = Declared("signs are exact in float32 too", AssertionError, "rounded to float32")
NO_NUMBER = Declared("it has no hyperparameter", AssertionError, "nothing depends on h")
AVERAGED = Declared("every parameter is averaged, one that sits the step out too", AssertionError, "average.c has changed")
RESET = Declared("the fast state begins anew as a whole", AssertionError, "has changed")
ALL_TAKE_PART = {
    "none": Declared(
        "a leaf that sits the step out has an update of 0: on another process it may have moved",
        AssertionError,
        r"where False = all\(",
    ),
    "meta": Declared("the count is on the CPU, so that to look at it waits for no accelerator", AssertionError, "is_meta"),
}
ONE_STEP_COUNT = dict.fromkeys(
    ("none", "none_param", "empty_leaf"),
    Declared("one vector has one step count", AssertionError, "step: The values for attribute 'shape' do not match"),
)
NO_GRAPH = Declared("torch.compile takes no sparse tensor as an input", torch._dynamo.exc.Unsupported, "wrap sparse Tensor")
AS_IT_IS = Declared("a function of whole trees is handed half-precision leaves as they are", AssertionError, "are not equal")
ABSOLUTE = Declared("a norm of an order other than 2 is of the absolute values, as torch's", AssertionError, "are not close")
NO_BATCH = Declared("torch has no batched sparse tensors", NotImplementedError, "'SparseCPU' backend")
NO_COMPLEX = Declared("it refuses complex parameters, as torch does", TypeError, "'a' is complex, which scale_by_.* does not take")

MU64 = {"mu": torch.float64}
M64 = {"m1": torch.float64, "m2": torch.float64}
REFUSES_COMPLEX = Declared("its units are of dimensions, of which a real view has one more", TypeError, "'a' is complex")
NO_USE = Declared("updates do not depend on the gradients", AssertionError, "nothing depends on grads")
NO_RECORD = Declared("updates do not depend on the gradients", AssertionError, "updates do not require grad")

ANEW = Declared("the adversary begins anew, for a leaf that sits the step out too", AssertionError, "has changed")
OWN_NUMBERS = {
    "float64": Declared("each dtype has its own random numbers", AssertionError, "are not close"),
    "complex": Declared("a complex number is one random number, of variance 1", AssertionError, "are not close"),
}

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


def warmed(start: Any, end: Any) -> optfn.Schedule:
    return optfn.linear_schedule(start, end, 10)


ONE_VECTOR = {
    "none": Declared("a None gradient counts as zeros, as in torch; sums with them round otherwise", AssertionError, "not equal")
}

PAIRS = {
    "none": Declared(
        "a leaf that sits the step out did not move; sums with its zeros round otherwise", AssertionError, "not equal"
    ),
    "scalar_leaf": Declared("what is kept of a leaf has one dimension more", AssertionError, r"Size\(\[.\]\) == \(\)"),
}

SEARCHED = {
    "grad": Declared("the step size is a constant to a derivative", AssertionError, "Scalars are not close"),
    "export": Declared("torch.export (2.13) fails on 3 * x, 0-dim, which torch.func differentiates", RuntimeError, "data pointer"),
    "none": Declared("the state has the gradient of a leaf that sits the step out, too", AssertionError, "grad.c has changed"),
    **dict.fromkeys(
        ("bf16", "fp16"), Declared("the gradient is the one at parameters that are rounded", AssertionError, "not close")
    ),
}


def of_two_examples(tx: GradientTransformation) -> GradientTransformation:
    """For what takes gradients of examples: one of them is the gradient, the other a tenth of it."""
    return optfn.chain(optfn.stateless(lambda updates, params: optfn.tree.map(lambda g: torch.stack([g, g / 10]), updates)), tx)


def on_a_paraboloid(tx: GradientTransformation) -> GradientTransformation:
    """With a function that has the given gradient at the parameters, for what searches along a line."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        def value_fn(moved: Any) -> Tensor:
            away = optfn.tree.map(lambda p, q: None if q is None else q - p.detach(), params, moved)
            seen = optfn.tree.map(lambda g, d: torch.zeros_like(d) if g is None else g.detach(), updates, away)
            square = optfn.tree.vdot(away, away).real
            return optfn.tree.vdot(seen, away).real + 3 * square + square**2

        given = {"value": torch.zeros((), dtype=torch.float64), "grad": updates, "value_fn": value_fn}
        return tx.update(updates, state, params, **{**extra, **given})

    return optfn.core.transformation(tx.init, update)


def uphill_by_itself(tx: GradientTransformation) -> GradientTransformation:
    """With a grad_fn, as what calls a transformation in one update for a whole round would give it."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        grad_fn = lambda moved, i: optfn.tree.map(lambda g, p: (g + (i + 1) * p).to(g.dtype), updates, moved)  # noqa: E731
        return tx.update(updates, state, params, grad_fn=grad_fn, **extra)

    return optfn.core.transformation(tx.init, update)


def with_a_loss(tx: GradientTransformation) -> GradientTransformation:
    """With a function of the parameters, whose Hessian is diagonal and positive."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        obj_fn = lambda moved: sum(2 - real.cos().sum() for real in map(optfn.numerics.as_real, optfn.tree.leaves(moved)))  # noqa: E731
        return tx.update(updates, state, params, obj_fn=obj_fn, **extra)

    return optfn.core.transformation(tx.init, update)


NO_SLOPE_AT_0 = {
    "grad_at_zero": Declared("singular vectors of 0 have no derivative", AssertionError, "isfinite"),
    "jvp": Declared("singular vectors of 0 have no derivative", AssertionError, "Expected nan"),
    "complex": NO_COMPLEX,
}
OF_LOW_RANK = {
    **NO_SLOPE_AT_0,
    **dict.fromkeys(("bf16", "fp16"), Declared("what the base is handed is rounded", AssertionError, "are not equal")),
}
EXPORTED = {
    "export": Declared("torch.export takes no gradient of a gradient", torch._dynamo.exc.Unsupported, "view functorch tensor")
}
ESTIMATE = {**EXPORTED, **dict.fromkeys(("bf16", "fp16"), AS_IT_IS), "vmap_lr": NO_NUMBER, "grad": NO_USE, "records": NO_RECORD}

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
    Row("dog", lambda h: optfn.dog(h, ("distance", 0.1), weight_decay=0.1, maximize=True)),
    Row("dog.learning_rate", lambda h: optfn.dog(init_step=("learning_rate", h))),
    Row("dowg", lambda h: optfn.dowg(h, 0.1, weight_decay=0.1, maximize=True)),
    Row("polyak_sgd", lambda h: optfn.polyak_sgd(h, 10.0), extra={"value": 1.0}),
    Row("momo", lambda h: optfn.momo(h, adapt_lower_bound=True, maximize=True), extra={"value": 1.0}),
    Row("momo_adam", lambda h: optfn.momo_adam(h, weight_decay=0.1, maximize=True), extra={"value": 1.0}),
    Row("prodigy", lambda h: optfn.prodigy(h, estim_lr0=0.1, weight_decay=0.1, maximize=True)),
    Row("prodigy.warmup", lambda h: optfn.prodigy(optfn.linear_schedule(0.0, h, 3), estim_lr0=0.1, safeguard_warmup=True)),
    Row("dadapt_adamw", lambda h: optfn.dadapt_adamw(h, estim_lr0=0.1, weight_decay=0.1, maximize=True)),
    Row("lion", optfn.lion),
    Row("lion.mask", lambda h: optfn.lion(0.1, (0.8, 0.9), h, mu_dtype=torch.float64, mask=pairs, maximize=True), wide=MU64),
    Row("sign_sgd", optfn.sign_sgd, but={"grad": NO_SLOPE}),
    Row("sign_sgd.decay", lambda h: optfn.sign_sgd(0.1, h, mask=pairs, maximize=True), but={"grad": NO_SLOPE}),
    Row("signum", optfn.signum),
    Row("signum.beta", lambda h: optfn.signum(0.1, h, weight_decay=0.1, mask=pairs, maximize=True), 0.9),
    Row("yogi", optfn.yogi),
    Row("yogi.decay", lambda h: optfn.yogi(0.1, (0.8, 0.9), 1e-2, h, mask=pairs, maximize=True)),
    Row("adabelief", optfn.adabelief),
    Row("adabelief.decay", lambda h: optfn.adabelief(0.1, (0.8, 0.9), 1e-3, h, nesterov=True, mask=pairs, maximize=True)),
    Row("amsgrad", optfn.amsgrad),
    Row("amsgrad.b2", lambda h: optfn.amsgrad(0.1, (0.8, h), eps_root=1e-3, bias_correction_nu=False, maximize=True), 0.9),
    Row("nadamw", optfn.nadamw),
    Row("nadamw.decay", lambda h: optfn.nadamw(0.1, (0.8, 0.9), weight_decay=h, mask=pairs, maximize=True)),
    Row("adamaxw", optfn.adamaxw),
    Row("adamaxw.decay", lambda h: optfn.adamaxw(0.1, (0.8, 0.9), weight_decay=h, mask=pairs, maximize=True)),
    Row("optimistic_gradient_descent", optfn.optimistic_gradient_descent),
    Row("optimistic_gradient_descent.beta", lambda h: optfn.optimistic_gradient_descent(0.1, 0.9, h, maximize=True), 0.7),
    Row("optimistic_adam_v2", optfn.optimistic_adam_v2),
    Row("optimistic_adam_v2.beta", lambda h: optfn.optimistic_adam_v2(0.1, (0.8, 0.9), beta=h, nesterov=False, maximize=True), 0.7),
    Row("acprop", optfn.acprop),
    Row("acprop.momentum", lambda h: optfn.acprop(0.1, (h, 0.9), 1e-3, 0.1, momentum_update=True, mask=pairs, maximize=True), 0.8),
    Row("ademamix", optfn.ademamix),
    Row("ademamix.schedules", lambda h: optfn.ademamix(0.1, (0.8, 0.9, warmed(h, 0.99)), alpha=warmed(h, 5.0), mask=pairs), 0.9),
    Row("simplified_ademamix", optfn.simplified_ademamix),
    Row(
        "simplified_ademamix.schedule",
        lambda h: optfn.simplified_ademamix(0.1, (0.9, 0.95), weight_decay=0.1, alpha=warmed(h, 2.0), mask=pairs, maximize=True),
    ),
    Row("adopt", optfn.adopt),
    Row("adopt.decay", lambda h: optfn.adopt(0.1, (0.8, 0.9), 1e-3, h, nesterov=True, mask=pairs, maximize=True)),
    Row("adan", lambda h: optfn.adan(h, weight_decay=0.1)),
    Row("adan.decay", lambda h: optfn.adan(warmed(0.1, 0.2), weight_decay=h, eps_root=1e-3, mask=pairs, maximize=True)),
    Row("adan.no_prox", lambda h: optfn.adan(0.1, (0.9, h, 0.8), weight_decay=0.1, no_prox=True), 0.9),
    Row("novograd", optfn.novograd, wide={"nu": torch.float32}),
    Row("novograd.decay", lambda h: optfn.novograd(0.1, weight_decay=h, maximize=True), wide={"nu": torch.float32}),
    Row("sm3", optfn.sm3, but={"complex": NO_COMPLEX}),
    Row("sm3.momentum", lambda h: optfn.sm3(0.1, h, 0.1, mask=pairs, maximize=True), 0.9, but={"complex": NO_COMPLEX}),
    Row("madgrad", optfn.madgrad),
    Row("madgrad.decay", lambda h: optfn.madgrad(warmed(0.1, 0.2), 0.8, h, 1e-3, maximize=True)),
    Row("cocob", lambda h: optfn.cocob(alpha=h), 5.0),
    Row("cocob.decay", lambda h: optfn.cocob(warmed(0.1, 0.2), 5.0, weight_decay=h, mask=pairs, maximize=True)),
    Row("lamb", optfn.lamb),
    Row("lamb.mask", lambda h: optfn.lamb(0.1, (0.8, 0.9), weight_decay=h, eps_root=1e-3, mask=pairs, maximize=True)),
    Row("lars", lambda h: optfn.lars(h, trust_coefficient=0.1)),
    Row(
        "lars.masks",
        lambda h: optfn.lars(0.1, h, pairs, 0.5, 1e-3, pairs, 0.8, True, maximize=True),
    ),
    Row("fromage", optfn.fromage),
    Row("fromage.schedule", lambda h: optfn.fromage(optfn.linear_schedule(h, 0.01, 10), 1e-3, maximize=True)),
    Row("noisy_sgd", lambda h: optfn.noisy_sgd(0.1, h, key=7, maximize=True), but=OWN_NUMBERS),
    Row("dpsgd", lambda h: of_two_examples(optfn.dpsgd(0.1, 0.7, h, 7, 0.9)), but=OWN_NUMBERS),
    Row("dpsgd.sum", lambda h: optfn.dpsgd(h, 0.7, 0.1, 7, 0.9, batch_size=4, maximize=True), but=OWN_NUMBERS),
    Row("schedule_free_sgd", optfn.schedule_free_sgd),
    Row(
        "schedule_free_sgd.warmup",
        lambda h: optfn.schedule_free_sgd(h, 0.8, 0.1, warmup_steps=5, weight_lr_power=1.0, mask=pairs, maximize=True),
    ),
    Row("schedule_free_adamw", optfn.schedule_free_adamw),
    Row(
        "schedule_free_adamw.state_dtype",
        lambda h: optfn.schedule_free_adamw(0.1, (h, 0.99), weight_decay=0.1, state_dtype=torch.float64),
        0.8,
        wide={"z": torch.float64},
    ),
    # Blocks
    Row(
        "scale_by_distance_over_gradients",
        lambda h: optfn.scale_by_distance_over_gradients(h, param_dtype=torch.float64),
        wide={"start": torch.float64, "max_dist": torch.float32, "sum_sq_norm_grads": torch.float32},
    ),
    Row("scale_by_dog", lambda h: optfn.scale_by_dog(("heuristic", h))),
    Row("scale_by_dowg", optfn.scale_by_dowg),
    Row("scale_by_polyak", lambda h: optfn.scale_by_polyak(eps=h, variant="sps+"), extra={"value": 1.0}),
    Row("scale_by_momo", lambda h: optfn.scale_by_momo(weight_decay=h), extra={"value": 1.0}),
    Row("scale_by_momo_adam", lambda h: optfn.scale_by_momo_adam(eps=h), extra={"value": 1.0}),
    Row("scale_by_prodigy", lambda h: optfn.scale_by_prodigy(estim_lr0=h, estim_lr_coef=2.0)),
    Row("scale_by_dadapt_adamw", lambda h: optfn.scale_by_dadapt_adamw(estim_lr0=h)),
    Row("normalize_by_update_norm", optfn.normalize_by_update_norm),
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
        lambda h: matrices(optfn.scale_by_muon(ns_steps=2, beta=h, mu_dtype=torch.float64)),
        0.9,
        wide={"mu": torch.float64},
        but={"complex": NO_COMPLEX},
    ),
    Row(
        "scale_by_muon.coeffs",
        lambda h: matrices(optfn.scale_by_muon((2.0, h, 0.5), 2)),
        -1.5,
        but={"complex": NO_COMPLEX},
    ),
    Row(
        "scale_by_muon.torchs",
        lambda h: matrices(optfn.scale_by_muon(ns_steps=2, beta=h, bias_correction_mu=False, eps_floor=True)),
        0.9,
        but={"complex": NO_COMPLEX},
    ),
    Row(
        "scale_by_muon.numbers",
        lambda h: matrices(
            optfn.scale_by_muon(
                ((2.0, -1.5, 0.5), (1.5, h, 0.0)),
                adaptive=True,
                preconditioning="aol",
                weight_dimension_numbers=lambda path, p: optfn.MuonDimensionNumbers(-1, 0),
            )
        ),
        -0.5,
        but={"complex": NO_COMPLEX},
    ),
    Row(
        "scale_by_muon.spectral",
        lambda h: matrices(optfn.scale_by_muon(ns_steps=2, eps=h, nesterov=False, preconditioning="spectral")),
        but={"complex": NO_COMPLEX},
    ),
    Row(
        "scale_by_muon.schatten",
        lambda h: matrices(optfn.scale_by_muon((2.0, -1.5, 0.5), 2, h, preconditioning="schatten")),
        0.9,
        but={"complex": NO_COMPLEX},
    ),
    Row(
        "scale_by_shape.rms",
        lambda h: matrices(optfn.scale_by_shape(weight_dimension_numbers=optfn.MuonDimensionNumbers(), consistent_rms=h)),
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
    Row("scale_by_lion", lambda h: optfn.scale_by_lion(b2=h), 0.9, but={"float64": SIGNS}),
    Row("scale_by_lion.smooth", lambda h: optfn.scale_by_lion(h, mode="smooth", smooth_beta=2.0), 0.8),
    Row("scale_by_lion.refined", lambda h: optfn.scale_by_lion(h, mu_dtype=torch.float64, mode="refined"), 0.3, wide=MU64),
    Row("scale_by_sign", optfn.scale_by_sign, None, but={"grad": NO_SLOPE, "vmap_lr": NO_NUMBER, "float64": SIGNS}),
    Row("scale_by_yogi", lambda h: optfn.scale_by_yogi(h, 0.9), 0.8),
    Row("scale_by_yogi.initial", lambda h: optfn.scale_by_yogi(b2=0.9, eps_root=1e-3, initial_accumulator_value=h)),
    Row("scale_by_belief", lambda h: optfn.scale_by_belief(h, 0.9), 0.8),
    Row("scale_by_belief.nesterov", lambda h: optfn.scale_by_belief(b2=0.9, eps_root=h, nesterov=True)),
    Row("scale_by_amsgrad", lambda h: optfn.scale_by_amsgrad(b2=h, mu_dtype=torch.float64), 0.9, wide=MU64),
    Row(
        "scale_by_amsgrad.uncorrected",
        lambda h: optfn.scale_by_amsgrad(h, 0.9, bias_correction_mu=False, bias_correction_nu=False),
        0.8,
    ),
    Row("scale_by_rss", lambda h: optfn.scale_by_rss(h)),
    Row("scale_by_stddev", lambda h: optfn.scale_by_stddev(h, 1e-3, 0.1, False, True), 0.9),
    Row("scale_by_optimistic_gradient", lambda h: optfn.scale_by_optimistic_gradient(beta=h), 0.7),
    Row("scale_by_acprop", lambda h: optfn.scale_by_acprop(0.8, h), 0.9),
    Row("scale_by_ademamix", lambda h: optfn.scale_by_ademamix(b2=0.9, b3=h, mu_dtype=torch.float64), 0.95, wide=M64),
    Row("scale_by_ademamix.schedules", lambda h: optfn.scale_by_ademamix(b3=warmed(0.9, 0.99), alpha=warmed(h, 5.0))),
    Row("scale_by_simplified_ademamix", lambda h: optfn.scale_by_simplified_ademamix(h, alpha=1.0), 0.9),
    Row("scale_by_adopt", lambda h: optfn.scale_by_adopt(h, 0.9, mu_dtype=torch.float64), 0.8, wide=MU64),
    Row("scale_by_adopt.unclipped", lambda h: optfn.scale_by_adopt(0.8, h, nesterov=True, use_clipping=False), 0.9),
    Row("scale_by_adopt.bound", lambda h: optfn.scale_by_adopt(0.8, 0.9, clip_value_fn=lambda count: h * count)),
    Row("scale_by_adan", lambda h: optfn.scale_by_adan(0.9, h, 0.95), 0.8),
    Row("scale_by_novograd", lambda h: optfn.scale_by_novograd(h), 0.8, wide={"nu": torch.float32}),
    Row(
        "scale_by_novograd.decay",
        lambda h: optfn.scale_by_novograd(0.8, h, eps_root=1e-3, weight_decay=0.1, mu_dtype=torch.float64),
        0.5,
        wide={"nu": torch.float32, "mu": torch.float64},
    ),
    Row("scale_by_sm3", lambda h: optfn.scale_by_sm3(h), 0.9, but={"complex": NO_COMPLEX}),
    Row("scale_by_sm3.b2", lambda h: optfn.scale_by_sm3(0.8, h, 1e-3), 0.9, but={"complex": NO_COMPLEX}),
    Row("scale_by_madgrad", lambda h: optfn.scale_by_madgrad(h)),
    Row("scale_by_madgrad.schedule", lambda h: optfn.scale_by_madgrad(warmed(0.1, 0.2), h), 0.8),
    Row("scale_by_cocob", lambda h: optfn.scale_by_cocob(h), 5.0),
    Row("centralize", lambda: optfn.centralize(), None, but={"complex": REFUSES_COMPLEX, "vmap_lr": NO_NUMBER}),
    Row("keep_params_nonnegative", optfn.keep_params_nonnegative, None, but={"vmap_lr": NO_NUMBER}),
    Row("zero_nans", optfn.zero_nans, None, but={"vmap_lr": NO_NUMBER}),
    Row("set_to_zero", optfn.set_to_zero, None, but={"vmap_lr": NO_NUMBER, "grad": NO_USE, "records": NO_RECORD}),
    Row("scale_by_param_block_norm", optfn.scale_by_param_block_norm, 4.0),
    Row("adaptive_grad_clip", optfn.adaptive_grad_clip, 0.2, but={"complex": REFUSES_COMPLEX}),
    Row(
        "adaptive_grad_clip.axis",
        lambda h: optfn.adaptive_grad_clip(0.2, eps=h, axis=-1),
        2.0,
        but={
            "complex": REFUSES_COMPLEX,
            "scalar_leaf": Declared("a 0-dim leaf has no such dimension", ValueError, "of the 0 dimensions"),
        },
    ),
    Row("ema", optfn.ema, 0.9),
    Row(
        "scale_by_lbfgs",
        lambda h: optfn.chain(optfn.scale_by_lbfgs(2), optfn.scale(h)),
        -0.1,
        but=PAIRS,
    ),
    Row(
        "scale_by_lbfgs.unscaled",
        lambda: optfn.scale_by_lbfgs(3, False),
        None,
        but={"vmap_lr": NO_NUMBER, **PAIRS},
    ),
    Row(
        "scale_by_backtracking_linesearch",
        lambda h: on_a_paraboloid(optfn.chain(optfn.scale(h), optfn.scale_by_backtracking_linesearch(4, store_grad=True))),
        -0.9,
        but=SEARCHED,
    ),
    Row(
        "scale_by_zoom_linesearch",
        lambda h: on_a_paraboloid(optfn.chain(optfn.scale(h), optfn.scale_by_zoom_linesearch(4, curv_rtol=0.1))),
        -0.9,
        but=SEARCHED,
    ),
    Row("ema.raw", lambda h: optfn.ema(h, False, torch.float64), 0.9, wide={"ema": torch.float64}),
    Row("apply_every", lambda h: optfn.chain(optfn.scale(h), optfn.apply_every(2)), 0.7, steps=4),
    Row("scale_by_trust_ratio", lambda h: optfn.scale_by_trust_ratio(trust_coefficient=h)),
    Row("scale_by_trust_ratio.eps", lambda h: optfn.scale_by_trust_ratio(2.0, 0.1, eps=h)),
    Row("add_noise", lambda h: optfn.add_noise(h, 0.5, 7), but=OWN_NUMBERS),
    Row(
        "differentially_private_aggregate",
        lambda h: of_two_examples(optfn.differentially_private_aggregate(h, 0.1, 7)),
        0.7,
        but=OWN_NUMBERS,
    ),
    Row(
        "differentially_private_aggregate.sum",
        lambda h: optfn.differentially_private_aggregate(0.7, 0.1, 7, batch_size=h),
        4.0,
        but=OWN_NUMBERS,
    ),
    Row("normalize", lambda: optfn.normalize(), None, but={"vmap_lr": NO_NUMBER}),
    # Combinators
    wrapper("chain", lambda tx: optfn.chain(optfn.trace(0.9), optfn.clip(0.7), tx)),
    wrapper("named_chain", lambda tx: optfn.named_chain(("first", optfn.trace(0.9)), ("second", tx))),
    wrapper("masked", lambda tx: optfn.masked(tx, pairs)),
    Row(
        "masked.functions",
        lambda h: with_a_loss(optfn.masked(optfn.sophia(h, eps=0.5, update_interval=2), pairs)),
        but=EXPORTED,
    ),
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
    Row("coupled", tanh_of_share, 0.9),
    # Wrappers
    wrapper("sparse_masked", lambda tx: optfn.sparse_masked(tx, dense="zeros_absent")),
    Row(
        "inject_hyperparams",
        lambda h: optfn.inject_hyperparams(optfn.adam)(h, eps=optfn.linear_schedule(1e-3, 1e-4, 5)),
        around=lambda tx: optfn.inject_hyperparams(lambda lr: optfn.chain(optfn.scale(lr), tx))(lr=0.1),
        in_state="lr",
    ),
    wrapper("mechanize", lambda tx: optfn.mechanize(tx, s_init=0.1, eps=1e-3)),
    wrapper("apply_if_finite", optfn.apply_if_finite),
    wrapper("accumulate", lambda tx: optfn.accumulate(tx, 2), wide={"accumulated": torch.float32}),
    Row("ema_params", lambda h: optfn.chain(optfn.sgd(0.1), optfn.ema_params(h)), 0.9, but={"none": AVERAGED}),
    Row(
        "ema_params.avg_fn",
        lambda h: optfn.chain(optfn.sgd(h), optfn.ema_params(avg_fn=lambda average, p, n: (n * average + 3 * p) / (n + 3))),
        but={"none": AVERAGED},
    ),
    wrapper("sam", lambda tx: optfn.sam(tx, optfn.chain(optfn.normalize(), optfn.sgd(0.1, momentum=0.9))), but={"none": ANEW}),
    Row("hutchinson_estimator_diag_hessian", lambda: with_a_loss(optfn.hutchinson_estimator_diag_hessian()), None, but=ESTIMATE),
    Row(
        "scale_by_sophia",
        lambda h: with_a_loss(optfn.scale_by_sophia(b2=0.5, gamma=h, eps=0.1, clip_threshold=None, update_interval=2)),
        2.0,
        but=EXPORTED,
    ),
    Row("sophia", lambda h: with_a_loss(optfn.sophia(h, eps=0.5, update_interval=2, mask=pairs)), but=EXPORTED),
    Row("scale_by_galore", lambda h: optfn.scale_by_galore(1, 2, h), but=OF_LOW_RANK),
    Row("galore", lambda h: optfn.galore(h, 1, 2, 0.5, weight_decay=0.1, mask=pairs, maximize=True), but=NO_SLOPE_AT_0),
    Row("sam.adversary", lambda h: optfn.sam(optfn.adam(0.1), optfn.adam(h), 3, reset_state=False), steps=4),
    Row("sam.opaque", lambda h: uphill_by_itself(optfn.sam(optfn.adam(0.1), optfn.sgd(h), 3, opaque_mode=True))),
    wrapper("schedule_free", lambda tx: optfn.schedule_free(tx, 0.1)),
    Row(
        "schedule_free.schedule",
        lambda h: optfn.schedule_free(optfn.sgd(0.1), optfn.linear_schedule(0.1, 0.5, 10), h, weight_lr_power=1.5),
        0.8,
    ),
    Row("ema_params.swa", lambda h: optfn.chain(optfn.sgd(h), optfn.ema_params(None)), but={"none": AVERAGED}),
    wrapper("lookahead", lambda tx: optfn.lookahead(tx, 2, 0.5)),
    Row(
        "lookahead.reset", lambda h: optfn.lookahead(optfn.sgd(0.1, momentum=0.9), 2, h, reset_state=True), 0.3, but={"none": RESET}
    ),
    wrapper(
        "local_steps",
        lambda tx: optfn.distributed.local_steps(tx, optfn.sgd(lr=0.7, momentum=0.9, nesterov=True), every=2),
        but=ALL_TAKE_PART,
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
