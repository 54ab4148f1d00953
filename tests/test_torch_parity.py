"""The aliases against torch.optim: every configuration and every error of torch's own table, ``optim_db``."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from oracle import (
    FLAGS,
    INFOS,
    ORACLES,
    TOLERANCE,
    RealTorchOptim,
    TorchOptim,
    as_numbers,
    configurations,
    follow,
    problem,
    sparse_problem,
)
from torch import Tensor, optim
from torch._subclasses.fake_tensor import FakeTensorMode

import optfn
from optfn import tree

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # inside torch.optim

DENSE = [cls for cls in ORACLES if not INFOS[cls].only_supports_sparse_grads]
SPARSE = [cls for cls in ORACLES if INFOS[cls].supports_sparse or INFOS[cls].only_supports_sparse_grads]


def dtypes_of(cls: type) -> list[torch.dtype]:
    return [dtype for dtype in TOLERANCE if INFOS[cls].supports_complex or not dtype.is_complex]


def without_decay(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k != "weight_decay"}


def cells(table: list[tuple[type, str, dict[str, Any]]], dtypes: list[torch.dtype] | None = None) -> list[Any]:
    """Each configuration in each dtype, by default those that torch has it in."""
    return [
        pytest.param(cls, kwargs, dtype, id=f"{cls.__name__}-{desc}-{str(dtype)[6:]}")
        for cls, desc, kwargs in table
        for dtype in dtypes or dtypes_of(cls)
    ]


def db(classes: list[type]) -> list[tuple[type, str, dict[str, Any]]]:
    return [(cls, desc, kwargs) for cls in classes for desc, kwargs in configurations(cls).items()]


DENSE_TABLE = db(DENSE)
SPARSE_TABLE = db(SPARSE)

# What the table leaves out. Hyperparameters as tensors are float32, whatever the leaves are.
DECOUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": True}
TENSORS = {name: torch.tensor(value) for name, value in {"lr": 0.1, "weight_decay": 0.1}.items()}
MORE = [
    (optim.SGD, "maximize, nesterov", {"momentum": 0.9, "nesterov": True, "maximize": True}),
    (optim.SGD, "all", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    (optim.SGD, "momentum above 1, dampening above 1", {"momentum": 1.1, "dampening": 1.5}),
    (optim.Adam, "decoupled", {**DECOUPLED, "lr": 0.1}),
    (optim.Adam, "decoupled, amsgrad, maximize", {**DECOUPLED, "amsgrad": True, "maximize": True}),
    (optim.Adam, "b1 = 0", {"betas": (0.0, 0.9)}),
    (optim.Adam, "b2 = 0", {"betas": (0.9, 0.0), "amsgrad": True}),
    (optim.Adam, "small betas, large eps", {"betas": (0.1, 0.2), "eps": 0.1}),
    (optim.AdamW, "b1 = 0", {"betas": (0.0, 0.9), "lr": 0.1}),
    (optim.AdamW, "no decay", {"weight_decay": 0.0}),
    (optim.AdamW, "large decay", {"weight_decay": 2.0, "lr": 0.3, "maximize": True}),
    (optim.Adagrad, "large eps", {"eps": 0.1, "lr": 0.1}),
    (optim.Adagrad, "all but decay", {"lr": 0.1, "lr_decay": 0.5, "initial_accumulator_value": 0.1, "maximize": True}),
    (optim.RMSprop, "momentum, not centered", {"momentum": 0.5, "weight_decay": 0.1}),
    (optim.RMSprop, "alpha = 0", {"alpha": 0.0, "eps": 0.1}),
    (optim.RMSprop, "alpha = 1", {"alpha": 1.0, "eps": 1.0}),
    (optim.SGD, "tensors", {**TENSORS, "momentum": torch.tensor(0.9), "dampening": torch.tensor(0.6)}),
    (optim.Adam, "tensors", {**TENSORS, "betas": (torch.tensor(0.9), torch.tensor(0.99)), "eps": torch.tensor(0.1)}),
    (optim.Adagrad, "tensors", {**TENSORS, "lr_decay": torch.tensor(0.1), "initial_accumulator_value": torch.tensor(0.1)}),
    (optim.RMSprop, "tensors", {**TENSORS, "alpha": torch.tensor(0.9), "momentum": torch.tensor(0.9), "centered": True}),
    (optim.SparseAdam, "b1 = 0", {"betas": (0.0, 0.9), "lr": 0.1}),
    (optim.SparseAdam, "large eps", {"eps": 0.1, "lr": 0.1, "maximize": True}),
    (optim.Adadelta, "all", {"lr": 0.3, "rho": 0.5, "eps": 0.1, "weight_decay": 0.1, "maximize": True}),
    (optim.Adadelta, "rho = 0", {"rho": 0.0}),
    (optim.Adadelta, "rho = 1", {"rho": 1.0, "eps": 0.1}),
    (optim.Adadelta, "tensors", {**TENSORS, "rho": torch.tensor(0.8), "eps": torch.tensor(1e-3)}),
    (optim.Adamax, "all", {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1, "weight_decay": 0.1, "maximize": True}),
    (optim.Adamax, "b1 = 0", {"betas": (0.0, 0.9)}),
    (optim.Adamax, "b2 = 0", {"betas": (0.9, 0.0), "eps": 0.1}),
    (optim.Adamax, "tensors", {**TENSORS, "betas": (torch.tensor(0.9), torch.tensor(0.99)), "eps": torch.tensor(0.1)}),
    (optim.NAdam, "all", {**DECOUPLED, "lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1, "momentum_decay": 0.5, "maximize": True}),
    (optim.NAdam, "b1 = 0", {"betas": (0.0, 0.9)}),
    (optim.NAdam, "b2 = 0, no momentum_decay", {"betas": (0.9, 0.0), "eps": 0.1, "momentum_decay": 0.0}),
    (optim.NAdam, "tensors", {**TENSORS, "betas": (torch.tensor(0.9), torch.tensor(0.99)), "momentum_decay": torch.tensor(0.1)}),
    (optim.RAdam, "all", {**DECOUPLED, "lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1, "maximize": True}),
    (optim.RAdam, "b1 = 0", {"betas": (0.0, 0.9)}),
    (optim.RAdam, "b2 = 0", {"betas": (0.9, 0.0)}),
    (optim.RAdam, "never rectified", {"betas": (0.9, 0.6), "lr": 0.1}),
    (optim.RAdam, "tensors", {**TENSORS, "betas": (torch.tensor(0.9), torch.tensor(0.95)), "eps": torch.tensor(0.1)}),
    (optim.Rprop, "all", {"lr": 0.02, "etas": (0.3, 1.9), "step_sizes": (0.01, 0.05), "maximize": True}),
    (optim.Rprop, "largest below smallest", {"step_sizes": (0.1, 0.05)}),
    (optim.Rprop, "tensors", {"lr": torch.tensor(0.1), "etas": (torch.tensor(0.3), 1.3), "step_sizes": (1e-3, torch.tensor(0.2))}),
    (optim.ASGD, "all", {"lr": 0.1, "lambd": 0.1, "alpha": 0.3, "t0": 3, "weight_decay": 0.1, "maximize": True}),
    (optim.ASGD, "averages from the beginning", {"t0": 0, "lambd": 0.0}),
    (optim.ASGD, "t0 below 0", {"t0": -2.5, "lr": 0.1}),
    (optim.ASGD, "tensors", {**TENSORS, "lambd": torch.tensor(0.1), "alpha": torch.tensor(0.5), "t0": torch.tensor(3.0)}),
    (optim.Adafactor, "all", {"lr": 0.2, "beta2_decay": -0.3, "eps": (1e-2, 0.5), "d": 1.1, "weight_decay": 0.1, "maximize": True}),
    (optim.Adafactor, "lr above 1", {"lr": 2.0}),
    (optim.Adafactor, "beta2_decay = 0", {"beta2_decay": 0.0, "eps": (0.1, 0.0)}),
    (optim.Adafactor, "tensors", {**TENSORS, "beta2_decay": -TENSORS["lr"], "eps": (TENSORS["lr"], 0.1), "d": torch.tensor(2.0)}),
    (optim.Muon, "match_rms_adamw", {"adjust_lr_fn": "match_rms_adamw", "lr": 0.1}),
    (optim.Muon, "original", {"adjust_lr_fn": "original", "nesterov": False}),
    (optim.Muon, "no momentum, no decay", {"momentum": 0.0, "weight_decay": 0.0, "lr": 0.1}),
    (optim.Muon, "momentum above 1", {"momentum": 1.1, "ns_steps": 2}),
    (optim.Muon, "large eps, no steps", {"eps": 2.0, "ns_steps": 0, "lr": 0.1}),
    (optim.Muon, "tensors", {**TENSORS, "eps": torch.tensor(0.1)}),
]  # fmt: skip


def problems(cls: type) -> Callable[..., oracle.Problem]:
    """Problems of leaves that the class takes."""
    return partial(problem, takes=ORACLES[cls].takes) if cls in DENSE else partial(sparse_problem, dense=False)


def compare(cls: type, kwargs: dict[str, Any], given: oracle.Problem, **options: Any) -> None:
    follow(partial(TorchOptim, cls, kwargs), ORACLES[cls].transformation(kwargs), given, states=ORACLES[cls].states, **options)


@pytest.mark.parametrize("absent", [False, True], ids=["", "none"])
@pytest.mark.parametrize(("cls", "kwargs", "dtype"), cells(DENSE_TABLE + [row for row in MORE if row[0] in DENSE]))
def test_trajectory(cls: type, kwargs: dict[str, Any], dtype: torch.dtype, absent: bool) -> None:
    compare(cls, kwargs, problems(cls)(dtype, absent=absent))


@pytest.mark.parametrize("absent", [False, True], ids=["", "none"])
@pytest.mark.parametrize(
    ("cls", "kwargs", "dtype"), cells(SPARSE_TABLE + [row for row in MORE if row[0] in SPARSE], list(TOLERANCE))
)
def test_sparse_trajectory(cls: type, kwargs: dict[str, Any], dtype: torch.dtype, absent: bool) -> None:
    kwargs = without_decay(kwargs)  # with it a sparse gradient is an error, see below
    given = sparse_problem(dtype, absent=absent, dense=cls in DENSE)
    # torch's Adagrad squares a complex sparse gradient as a complex number, and a dense one by parts; SparseAdam takes none.
    make = RealTorchOptim if dtype.is_complex and cls is not optim.SGD else TorchOptim
    follow(partial(make, cls, kwargs), ORACLES[cls].transformation(kwargs), given, states=ORACLES[cls].states)


@pytest.mark.parametrize("cls", [cls for cls in SPARSE if cls in DENSE])
def test_decay_of_a_sparse_gradient_is_an_error(cls: type) -> None:
    given = sparse_problem(torch.float64, dense=False)
    p, g = given.params["table"], given.gradients[1]["table"]
    with pytest.raises(RuntimeError):
        TorchOptim(cls, {"weight_decay": 0.1}, [p.clone()]).step([g])
    tx = ORACLES[cls].transformation({"weight_decay": 0.1})
    with pytest.raises(TypeError, match="add_decayed_weights: 'table' has a sparse gradient"):
        tx.update({"table": g}, tx.init({"table": p}), {"table": p})


@pytest.mark.parametrize("cls", [cls for cls in ORACLES if cls not in SPARSE])
def test_sparse_gradient_is_an_error_where_it_is_torchs(cls: type) -> None:
    given = sparse_problem(torch.float64, dense=False)
    p, g = given.params["table"], given.gradients[1]["table"]
    with pytest.raises(RuntimeError, match="sparse"):
        TorchOptim(cls, {}, [p.clone()]).step([g])
    tx = ORACLES[cls].transformation({})
    with pytest.raises(TypeError, match="'table' has a sparse gradient"):
        tx.update({"table": g}, tx.init({"table": p}), {"table": p})


def test_dense_gradient_of_sparse_adam_is_an_error() -> None:
    p = torch.ones(3)
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        TorchOptim(optim.SparseAdam, {}, [p.clone()]).step([p])
    tx = optfn.sparse_adam()
    with pytest.raises(TypeError, match=r"'w' has a gradient of layout torch\.strided"):
        tx.update({"w": p}, tx.init({"w": p}), {"w": p})


class Pair(NamedTuple):
    first: Any
    second: Any


def nested(x: dict[str, Any]) -> Any:
    a, b, c, d, *rest = x.values()
    return {"head": Pair(d, [b]), "blocks": [{"w": c, "b": a}, tuple(rest)]}


@pytest.mark.parametrize("absent", [False, True], ids=["", "none"])
@pytest.mark.parametrize(
    "build", [lambda x: list(x.values()), lambda x: tuple(x.values()), nested], ids=["list", "tuple", "nested"]
)
@pytest.mark.parametrize("cls", ORACLES)
def test_structures(cls: type, build: Callable[..., Any], absent: bool) -> None:
    compare(cls, {}, problems(cls)(torch.float64, absent=absent), build=build)


@pytest.mark.parametrize("absent", [False, True], ids=["", "none"])
@pytest.mark.parametrize("cls", ORACLES)
def test_bare_tensors(cls: type, absent: bool) -> None:
    whole = problems(cls)(torch.float64, absent=absent)
    for name, p in whole.params.items():
        alone = oracle.Problem({name: p}, [{name: row[name]} for row in whole.gradients])
        compare(cls, {}, alone, build=lambda x: next(iter(x.values())))


NO_EPS = [
    *((cls, {"eps": 0, **more}) for cls in (optim.Adam, optim.AdamW) for more in ({}, {"amsgrad": True}, {"betas": (0.0, 0.9)})),
    *((cls, {"eps": 0}) for cls in (optim.Adagrad, optim.RMSprop, optim.Adamax, optim.NAdam, optim.RAdam, optim.Muon)),
    (optim.Adadelta, {"eps": 0, "weight_decay": 0.1}),
    (optim.Adafactor, {"eps": (0, 0)}),
]


@pytest.mark.parametrize(("cls", "kwargs", "dtype"), cells([(cls, str(kwargs), kwargs) for cls, kwargs in NO_EPS]))
def test_eps_may_be_zero(cls: type, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    compare(cls, kwargs, problems(cls)(dtype, zeros=False))


@pytest.mark.parametrize("lr", [0, 0.0, torch.tensor(0.0), lambda step: 0.0 * step], ids=["int", "float", "tensor", "schedule"])
@pytest.mark.parametrize("cls", ORACLES)
def test_zero_lr_moves_nothing(cls: type, lr: Any) -> None:
    if cls is optim.SparseAdam and isinstance(lr, int | float):
        with pytest.raises(ValueError, match="lr must be > 0"):  # torch's rule
            optfn.sparse_adam(lr=lr)
        return
    given = problems(cls)(torch.float32)
    smallest = {"step_sizes": (0.0, 50.0)} if cls is optim.Rprop else {}  # it has steps of 1e-6 otherwise, as in torch
    tx = ORACLES[cls].transformation({"lr": lr, **({"weight_decay": 0.1} if cls in DENSE else {}), **smallest})
    params = {name: p.clone() for name, p in given.params.items()}
    state = tx.init(params)
    kept = {*ORACLES[cls].states.values()} - {"eta", "step_size"}  # those are the zeros themselves
    computed: list[list[Tensor]] = []
    for gradients in given.gradients:
        updates, state = tx.update(gradients, state, params)
        params = optfn.apply_updates(params, updates)
        computed.append([x for name in kept for x in tree.leaves(tree.get(state, name, None))])
    assert all(torch.equal(params[name], p) for name, p in given.params.items())
    for over_time in zip(*computed, strict=True):
        assert over_time[0].numel() == 0 or any(x.any() for x in over_time), "nothing moved because nothing was computed"


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "warmup_cosine": optfn.warmup_cosine_decay_schedule(0.0, 0.1, 3, 10),
    "exponential": optfn.exponential_decay(0.1, 2, 0.7),
    "piecewise": optfn.piecewise_constant_schedule(0.1, {3: 0.5, 8: 0.1}),
}


@pytest.mark.parametrize("absent", [False, True], ids=["", "none"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("cls", ORACLES)
def test_schedules(cls: type, schedule: Callable[[Any], Any], absent: bool) -> None:
    reference, given = partial(TorchOptim, cls, {}, schedule=schedule), problems(cls)(torch.float64, absent=absent)
    follow(reference, ORACLES[cls].alias(lr=schedule), given, states=ORACLES[cls].states)


@pytest.mark.parametrize("cls", [optim.SGD, optim.Adam])
def test_a_schedule_may_be_plain_arithmetic(cls: type) -> None:
    def schedule(step: Any) -> Any:
        return 0.1 * 0.9**step

    follow(partial(TorchOptim, cls, {}, schedule=schedule), ORACLES[cls].alias(lr=schedule), problem(torch.float64))


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (optim.Adam, {"betas": (torch.tensor(0.1), torch.tensor(0.2))}),
        (optim.SparseAdam, {"betas": (torch.tensor(0.1), torch.tensor(0.2))}),
        (optim.RMSprop, {"alpha": torch.tensor(0.1)}),
        (optim.SGD, {"momentum": 0.9, "dampening": torch.tensor(0.1)}),
    ],
)
def test_tensors_below_one_half(cls: type, kwargs: dict[str, Any]) -> None:
    """One minus them is not a float32 number, so it is to be computed in the dtype of the leaf."""
    compare(cls, kwargs, problems(cls)(torch.float64))


MASKS: dict[str, Any] = {
    "function": lambda path, p: p.ndim >= 2,
    "tree": {name: p.ndim >= 2 for name, p in problem(torch.float64).params.items()},
}


@pytest.mark.parametrize("absent", [False, True], ids=["", "none"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kwargs", [{}, {"amsgrad": True, "maximize": True}], ids=["", "amsgrad, maximize"])
@pytest.mark.parametrize(
    ("cls", "decoupled"), [(optim.Adam, {}), (optim.Adam, {"decoupled_weight_decay": True}), (optim.AdamW, {})]
)
def test_decay_masks(cls: type, decoupled: dict[str, Any], kwargs: dict[str, Any], mask: Any, absent: bool) -> None:
    kwargs = {"lr": 0.1, "weight_decay": 0.1, **decoupled, **kwargs}

    def groups(params: list[Tensor]) -> Any:
        decayed, others = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
        return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]

    follow(
        partial(TorchOptim, cls, kwargs, groups=groups),
        ORACLES[cls].alias(**kwargs, mask=mask),
        problem(torch.float64, absent=absent),
        states=ORACLES[cls].states,
    )


def functional(cls: type) -> Any:
    """The class of torch.distributed.optim that takes explicit gradients."""
    module = pytest.importorskip("torch.distributed.optim", reason="torch was built without torch.distributed")
    return getattr(module, f"_Functional{cls.__name__}")


FUNCTIONAL = [cls for cls in DENSE if cls not in (optim.NAdam, optim.RAdam, optim.ASGD, optim.Adafactor, optim.Muon)]
OTHER_DEFAULTS = {optim.SGD: {"lr": 1e-3}, optim.Adamax: {"lr": 2e-3}}  # 1e-2 and 1e-3 there


class Seed:
    """Such a class, with the face of :class:`TorchOptim`."""

    def __init__(self, cls: type, kwargs: dict[str, Any], params: list[Tensor]) -> None:
        with warnings.catch_warnings(record=True):  # a deprecation that torch shows past any filter
            self.params, self.optimizer = params, functional(cls)(params, **kwargs)

    def step(self, gradients: list[Tensor | None]) -> None:
        self.optimizer.step(gradients)

    def state(self, i: int) -> dict[str, Any]:
        return self.optimizer.state.get(self.params[i], {})


@pytest.mark.parametrize("absent", [False, True], ids=["", "none"])
@pytest.mark.parametrize(("cls", "kwargs", "dtype"), cells(db(FUNCTIONAL), [torch.float64, torch.complex128]))
def test_functional_trajectory(cls: type, kwargs: dict[str, Any], dtype: torch.dtype, absent: bool) -> None:
    if cls is optim.Adagrad and absent:
        pytest.skip("torch's functional Adagrad pairs gradients with other parameters when one is None")
    if cls is optim.Adagrad and dtype.is_complex and "initial_accumulator_value" in kwargs:
        pytest.skip("the complex initial value of torch's functional Adagrad has no imaginary part")
    if cls is optim.Rprop and dtype.is_complex:
        pytest.skip("the imaginary part of the step size of torch's functional Rprop begins at 0")
    kwargs = {**OTHER_DEFAULTS.get(cls, {}), **as_numbers(kwargs)}
    tx, given = ORACLES[cls].transformation(kwargs), problem(dtype, absent=absent)
    follow(partial(Seed, cls, kwargs), tx, given, states=ORACLES[cls].states)


# Every error of optim_db: where it is raised here, or why it is none.
VALUES_NOT_OBJECTS = "params are a tree of values: the same tensor twice is two leaves"
NO_FLAGS = "one path: no foreach, no fused, no differentiable, no capturable"
MIXED_BETAS = "each beta is a number or a tensor for itself"
NOT_AN_ERROR = {
    "invalid param type": "a bare tensor is a tree",
    "a param group cannot have duplicate parameters": VALUES_NOT_OBJECTS,
    "duplicate parameters should not occur across param groups either": VALUES_NOT_OBJECTS,
    "lr as Tensor doesn't work with foreach & not capturable": NO_FLAGS,
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": NO_FLAGS,
    "`fused` and `foreach` cannot be `True` together": NO_FLAGS,
    "`fused` does not support `differentiable`": NO_FLAGS,
    "betas must be either both floats or both Tensors": MIXED_BETAS,
    "complex not supported": "SparseAdam acts on real and imaginary part, as Adam does",
}
ERRORS = {
    "Tensor lr must be 1-element": ("construction", ValueError, r"^lr must be a number or .* of one element, got shape \(2,\)"),
    "lr_decay must be bigger than 0": ("construction", ValueError, "^lr_decay must be >= 0, got -0.5"),
    "beta1 should be between 0 and 1": ("construction", ValueError, "^b1 must be >= 0 and < 1, got 1.0"),
    "weight_decay should > 0": ("construction", ValueError, r"^weight_decay must be >= 0, got -\d"),
    "momentum should be between 0 and 1": ("construction", ValueError, r"^momentum must be >= 0, got -\d"),
    "rho should be between 0 and 1": ("construction", ValueError, "^rho must be >= 0 and <= 1, got 1.1"),
    "beta2 should be between 0 and 1": ("construction", ValueError, "^b2 must be >= 0 and < 1, got 1.0"),
    "momentum_decay should > 0": ("construction", ValueError, "^momentum_decay must be >= 0, got -0.2"),
    "0 < eta1 < 1 < eta2": ("construction", ValueError, r"^etas\[0\] must be > 0 and < 1, got 1.0"),
    "epsilon1 should be >= 0": ("construction", ValueError, "^eps must be >= 0, got -1e-30"),
    "invalid d": ("construction", ValueError, "^d must be >= 1, got 0.0"),
    "invalid beta2_decay": ("construction", ValueError, "^beta2_decay must be <= 0, got 0.8"),
    "only support `original` and `match_rms_adamw`": ("construction", ValueError, "^adjust_lr_fn must be .*, got 'arbitrary'"),
    "does not support complex parameters": ("init", TypeError, "'0' is complex, which scale_by_(factored_rms|muon) does not take"),
    "only support 2D parameters": ("init", ValueError, r"'0': Muon takes matrices, got shape \(2, 3, 4\): .* optfn\.partition"),
    "all optimizer params should be with/without names": ("init", TypeError, r"params at '0\.0' must be a tensor or None, got str"),
    "all optimizer param groups should be with/without names.": ("init", TypeError, r"params at '0\.lr' must be .*, got float"),
    "dense params required": ("init", TypeError, "'0' must be a dense"),
    "dense params required in param_groups": ("init", TypeError, r"'0\.params\.0' must be a dense"),
}  # fmt: skip


def error_inputs(cls: type) -> list[Any]:
    with FakeTensorMode():  # the list for CUDA makes tensors there
        on_cuda = INFOS[cls].optim_error_inputs_func(device="cuda", dtype=torch.float64)
    return [*INFOS[cls].optim_error_inputs_func(device="cpu", dtype=torch.float64), *on_cuda]


ERROR_TABLE = [(cls, entry.optimizer_error_input) for cls in ORACLES for entry in error_inputs(cls)]


@pytest.mark.parametrize(("cls", "given"), [pytest.param(*row, id=f"{row[0].__name__}-{row[1].desc}") for row in ERROR_TABLE])
def test_errors(cls: type, given: Any) -> None:
    flags = [name for name in FLAGS if name in given.kwargs]
    if flags:
        with pytest.raises(TypeError, match=f"has no argument '({'|'.join(flags)})'"):
            ORACLES[cls].alias(**given.kwargs)
    stage, kind, message = ERRORS.get(given.desc, ("", None, ""))
    if stage == "construction":
        with pytest.raises(kind, match=message):
            ORACLES[cls].transformation(given.kwargs)
        return
    tx = ORACLES[cls].transformation(given.kwargs)
    if stage == "init":
        with pytest.raises(kind, match=message):
            tx.init(given.params)
        return
    assert given.desc in NOT_AN_ERROR, "torch's table has an error that neither table here has"
    params = {"w": torch.ones(2, 2)} if given.params is None or flags else given.params
    gradients = tree.map(lambda p: torch.ones_like(p).to_sparse() if cls not in DENSE else torch.ones_like(p), params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    new = tree.leaves(optfn.apply_updates(params, updates))
    assert all(x.isfinite().all() and (x != p).all() for x, p in zip(new, tree.leaves(params), strict=True))


def test_mixed_betas_are_those_numbers() -> None:
    b1, b2 = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.75)
    for betas in ((b1, 0.75), (0.5, b2), (b1, b2)):
        follow(partial(TorchOptim, optim.Adam, {"betas": (0.5, 0.75)}), optfn.adam(betas=betas), problem(torch.float64))


def test_counts(record_property: Callable[[str, object], None]) -> None:
    def number(cls: type, device: str) -> int:
        return len(INFOS[cls].optim_inputs_func(device=device))

    covered = {cls: sum(row[0] is cls for row in (DENSE_TABLE if cls in DENSE else SPARSE_TABLE)) for cls in ORACLES}
    errors = {cls: [given.desc for owner, given in ERROR_TABLE if owner is cls] for cls in ORACLES}
    for cls in ORACLES:
        mapped = sum(desc in ERRORS for desc in errors[cls])
        record_property(
            "torch.optim parity",
            f"{cls.__name__:>10}: {covered[cls]:2} configurations ({number(cls, 'cpu')} CPU) in {len(dtypes_of(cls))} dtypes; "
            f"{len(errors[cls]):2} errors, {mapped} of them ours too, {len(errors[cls]) - mapped} not applicable",
        )
    for cls in ORACLES:
        # every CPU configuration is in the CUDA list too
        assert covered[cls] == number(cls, "cuda") >= number(cls, "cpu")
        assert len(errors[cls]) == len(INFOS[cls].optim_error_inputs_func(device="cpu", dtype=torch.float64)) + (
            {optim.Adam: 2, optim.AdamW: 2, optim.Adagrad: 2, optim.Muon: 3}.get(cls, 0)
        )
    assert sum(covered.values()) == 122
    assert sum(number(cls, "cpu") for cls in ORACLES) == 86
    assert sum(map(len, errors.values())) == 127  # 118 in the lists for the CPU
