"""Mistakes of the first hour, from torch.optim and from Optax, written as a user would write them: each is told what to write."""

import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import optfn
from optfn.interop import TorchOptimizer, load_torch_state, write_to_module

MODEL = torch.nn.Linear(3, 2)
NAMED = dict(MODEL.named_parameters())
PARAMS = {"w": torch.ones(3), "b": torch.ones(1)}
GRADS = {"w": torch.full((3,), 0.5), "b": torch.ones(1)}
ADAM = optfn.adam()
STATE = ADAM.init(PARAMS)
MOMENTUM = optfn.sgd(momentum=0.9)
TO_INIT = "parameters go to init: tx = optfn."


def on_meta(tree: Any) -> Any:
    return optfn.tree.map(lambda x: x.to("meta"), tree)


def value_of(params: Any) -> Any:
    return params["w"].sum() + params["b"].sum()


def start(tx: optfn.GradientTransformation) -> Any:
    """The first step with these gradients."""
    return tx.update(GRADS, tx.init(PARAMS), PARAMS)


# What is written, the type of the error, and the words that it must hold.
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    # Making an optimizer.
    "parameters()": (lambda: optfn.adam(MODEL.parameters()), TypeError, ("adam", "lr", "generator", TO_INIT + "adam(lr=1e-3)")),
    "parameters() and lr": (lambda: optfn.adam(MODEL.parameters(), lr=0.1), TypeError, ("lr", "generator", TO_INIT)),
    "list of parameters": (lambda: optfn.adamw([*MODEL.parameters()]), TypeError, ("lr", "list", TO_INIT + "adamw(lr=1e-3)")),
    "dict of parameters": (lambda: optfn.sgd(NAMED, momentum=0.9), TypeError, ("lr", "dict", TO_INIT + "sgd(lr=1e-3)")),
    "groups": (lambda: optfn.sgd([{"params": [*MODEL.parameters()], "lr": 0.1}]), TypeError, ("lr", "list", TO_INIT)),
    "a module": (lambda: optfn.adam(MODEL), TypeError, ("lr", "Linear", TO_INIT)),
    "params=": (lambda: optfn.adam(params=MODEL.parameters()), TypeError, ("'params'", TO_INIT)),
    "learning_rate=": (lambda: optfn.adam(learning_rate=0.1), TypeError, ("adam has no argument 'learning_rate': write lr=",)),
    "beta1=": (lambda: optfn.adam(beta1=0.9), TypeError, ("adam has no argument 'beta1': write betas=(b1, b2)",)),
    "b1=": (lambda: optfn.nadam(b1=0.9), TypeError, ("nadam has no argument 'b1': write betas=(b1, b2)",)),
    "b1= where there are no betas": (lambda: optfn.sgd(b1=0.9), TypeError, ("'b1'; it has lr, momentum, dampening",)),
    "decay=": (lambda: optfn.rmsprop(decay=0.9), TypeError, ("rmsprop has no argument 'decay': write alpha=",)),
    "foreach=": (lambda: optfn.adam(foreach=True), TypeError, ("'foreach': a step is made fast by optfn.compile",)),
    "differentiable=": (lambda: optfn.adam(differentiable=True), TypeError, ("every step is differentiable",)),
    "max_iter= of lbfgs": (lambda: optfn.lbfgs(max_iter=20), TypeError, ("'max_iter'", "optfn.minimize", "max_steps=")),
    "a slip of the pen": (lambda: optfn.adam(weigth_decay=0.1), TypeError, ("'weigth_decay': write weight_decay=",)),
    "betas=0.9": (lambda: optfn.adam(betas=0.9), TypeError, ("betas must be 2 numbers, as in betas=(0.9, 0.999), got 0.9",)),
    "Optax's order": (lambda: optfn.adam(1e-3, 0.9, 0.999), TypeError, ("betas must be 2 numbers", "got 0.9")),
    "three betas": (lambda: optfn.adam(betas=(0.9, 0.99, 0.999)), ValueError, ("betas must be 2 numbers", "(0.9, 0.99, 0.999)")),
    "one eta": (lambda: optfn.rprop(etas=0.5), TypeError, ("etas must be 2 numbers, as in etas=(0.5, 1.2), got 0.5",)),
    "lr=inf": (lambda: optfn.adam(lr=float("inf")), ValueError, ("lr must be finite, got inf",)),
    "lr=inf of adafactor": (lambda: optfn.adafactor(lr=float("inf")), ValueError, ("lr must be finite, got inf",)),
    "lr=inf of rprop": (lambda: optfn.rprop(lr=float("inf")), ValueError, ("lr must be finite, got inf",)),
    "lr=inf of asgd": (lambda: optfn.asgd(lr=float("inf")), ValueError, ("lr must be finite, got inf",)),
    "lr from a file": (lambda: optfn.adam(lr="1e-3"), TypeError, ("lr must be a number", "got str: write lr=float(...)")),
    "lr of numpy": (lambda: optfn.adam(lr=np.float32(0.1)), TypeError, ("lr must be a number", "float32: write lr=float(...)")),
    "nesterov in Optax's place": (lambda: optfn.sgd(0.1, 0.9, True), TypeError, ("dampening must be a number", "bool")),
    "a schedule's function": (
        lambda: optfn.adam(lr=optfn.cosine_decay_schedule),
        TypeError,
        ("lr: a schedule is a function of the step", "call it", "cosine_decay_schedule(...)"),
    ),
    "a schedule of nothing": (lambda: optfn.sgd(lambda: 0.1), TypeError, ("lr: a schedule is a function of the step alone",)),
    "a scheduler of torch": (lambda: optfn.rprop(torch.optim.lr_scheduler.StepLR), TypeError, ("lr: a schedule is a function",)),
    # Putting transformations together.
    "named_chain of a dict": (
        lambda: optfn.named_chain({"clip": optfn.clip(1.0), "adam": ADAM}),
        TypeError,
        ("named_chain takes pairs", "got a dict", ".items())"),
    ),
    "named_chain of transformations": (lambda: optfn.named_chain(ADAM), TypeError, ("named_chain takes pairs", "Transformation")),
    "chain of a list": (lambda: optfn.chain([ADAM]), TypeError, ("got list: write optfn.chain(*transformations)",)),
    "chain of a function": (lambda: optfn.chain(optfn.adam), TypeError, ("got the function adam: call it", "adam(...)")),
    "chain with a schedule": (
        lambda: optfn.chain(ADAM, optfn.linear_schedule(0.1, 0.0, 5)),
        TypeError,
        ("a schedule goes into one, optfn.adam(lr=schedule)",),
    ),
    "chain of torch's": (lambda: optfn.chain(torch.optim.Adam), TypeError, ("optfn.adam perhaps, got Adam of torch.optim",)),
    "accumulate swapped": (lambda: optfn.accumulate(4, ADAM), TypeError, ("got int: write accumulate(tx, every_k)",)),
    "accumulate half": (lambda: optfn.accumulate(ADAM, 2.5), TypeError, ("every_k must be an int or a schedule, got float",)),
    "masked swapped": (lambda: optfn.masked({"w": True}, ADAM), TypeError, ("masked", "got dict: write masked(tx, mask)")),
    "partition of a list": (lambda: optfn.partition([ADAM], lambda path, p: 0), TypeError, ("partition takes a dict", "got list")),
    "inject_hyperparams of what is made": (
        lambda: optfn.inject_hyperparams(optfn.adam(lr=0.1)),
        TypeError,
        ("takes the function", "got the transformation", "inject_hyperparams(optfn.adam)(lr=1e-3)"),
    ),
    "inject_hyperparams, a name of Optax's": (
        lambda: optfn.inject_hyperparams(optfn.adam)(learning_rate=0.1),
        TypeError,
        ("adam has no argument 'learning_rate'", "lr=..."),
    ),
    "inject_hyperparams of torch's": (lambda: optfn.inject_hyperparams(torch.optim.SGD), TypeError, ("optfn.sgd perhaps",)),
    "mask function of Optax": (
        lambda: optfn.masked(ADAM, lambda params: {"w": True, "b": False}).init(PARAMS),
        TypeError,
        ("mask: the function is called for each leaf", "lambda path, p: ...", "f(params), as the mask"),
    ),
    "label function of Optax": (
        lambda: optfn.partition({"a": ADAM}, lambda params: {"w": "a", "b": "a"}).init(PARAMS),
        TypeError,
        ("labels: the function is called for each leaf", "lambda path, p: ...", "f(params), as the param_labels"),
    ),
    "mask of names": (
        lambda: optfn.adamw(mask=["w"]).init(PARAMS),
        ValueError,
        ("mask must have the structure of params", "lambda path, p: path in ['w']"),
    ),
    "mask of one name": (lambda: optfn.freeze("w").init(PARAMS), TypeError, ("must be a bool, got str", "path in ['w']")),
    # init.
    "init of a module": (lambda: ADAM.init(MODEL), TypeError, ("params is a module", "dict(module.named_parameters())")),
    "init of a generator": (lambda: ADAM.init(MODEL.parameters()), TypeError, ("params is a generator", "list(...)")),
    "init of groups": (lambda: ADAM.init([{"params": [], "lr": 0.1}]), TypeError, ("'0.lr'", "groups", "optfn.partition")),
    "init of pairs": (lambda: ADAM.init([*MODEL.named_parameters()]), TypeError, ("'0.0'", "pairs", "dict(...)")),
    "init of a state dict": (
        lambda: ADAM.init(torch.nn.BatchNorm1d(3).state_dict()),
        TypeError,
        ("'num_batches_tracked'", "floating-point", "int64", "dict(module.named_parameters())"),
    ),
    # update.
    "another optimizer's state": (
        lambda: ADAM.update(GRADS, MOMENTUM.init(PARAMS), PARAMS),
        TypeError,
        ("scale_by_adam needs the state that its own init makes", "got TraceSlots", "tx.init(params)"),
    ),
    "another rule's state with the same names": (
        lambda: optfn.scale_by_adam().update(GRADS, optfn.scale_by_adamax().init(PARAMS), PARAMS),
        TypeError,
        ("scale_by_adam needs", "got AdamaxSlots"),
    ),
    "the state of other options": (
        lambda: optfn.adam(amsgrad=True).update(GRADS, STATE, PARAMS),
        TypeError,
        ("scale_by_adam needs the state that its own init makes",),
    ),
    "a state that would be left out": (
        lambda: optfn.sgd().update(GRADS, MOMENTUM.init(PARAMS), PARAMS),
        TypeError,
        ("needs the state that its own init makes, (), got LeafwiseState",),
    ),
    "a state without its schedule": (
        lambda: optfn.adam(optfn.linear_schedule(0.1, 0.0, 5)).update(GRADS, STATE, PARAMS),
        TypeError,
        ("scale_by_learning_rate needs the state", "ScaleByLearningRateState"),
    ),
    "a state without its wrapper": (
        lambda: optfn.accumulate(ADAM, 2).update(GRADS, STATE, PARAMS),
        TypeError,
        ("accumulate needs the state", "AccumulateState, got a tuple of 4"),
    ),
    "the state of a smaller model": (
        lambda: ADAM.update(GRADS, ADAM.init({"w": PARAMS["w"]}), PARAMS),
        ValueError,
        ("the state must have the structure of params", "'b' is only in params"),
    ),
    "state=None": (lambda: ADAM.update(GRADS, None, PARAMS), TypeError, ("got None: state = tx.init(params)",)),
    "state=None of a rule": (lambda: optfn.scale_by_adam().update(GRADS, None), TypeError, ("scale_by_adam needs", "got None")),
    "params before the state": (
        lambda: ADAM.update(GRADS, PARAMS, STATE),
        TypeError,
        ("got dict", "tx.update(updates, state, params), in this order"),
    ),
    "the state first": (
        lambda: ADAM.update(STATE, GRADS, PARAMS),
        TypeError,
        ("tx.update(updates, state, params), in this order",),
    ),
    "params first": (lambda: ADAM.update(PARAMS, GRADS, STATE), TypeError, ("tx.update(updates, state, params), in this order",)),
    "a missing gradient": (
        lambda: ADAM.update({"w": GRADS["w"]}, STATE, PARAMS),
        ValueError,
        ("updates must have the structure of params: 'b' is only in params", "None for a parameter that has none"),
    ),
    "a missing gradient, masked": (
        lambda: (lambda tx: tx.update({"w": GRADS["w"]}, tx.init(PARAMS), PARAMS))(optfn.masked(ADAM, True)),
        ValueError,
        ("updates must have the structure of params: 'b' is only in params",),
    ),
    "a missing gradient, without params": (
        lambda: ADAM.update({"w": GRADS["w"]}, STATE),
        ValueError,
        ("'b' is only in the state", "None for a parameter that has none"),
    ),
    "loss for gradients": (
        lambda: (lambda value, grads: ADAM.update(grads, STATE, PARAMS))(*torch.func.grad_and_value(value_of)(PARAMS)),
        ValueError,
        ("updates is a tensor of shape (), params is a dict of 'b', 'w'", "not the loss"),
    ),
    "loss for gradients, without params": (lambda: ADAM.update(torch.ones(()), STATE), ValueError, ("not the loss",)),
    "loss and gradients": (
        lambda: ADAM.update(torch.func.grad_and_value(value_of)(PARAMS), STATE, PARAMS),
        ValueError,
        ("updates is a tuple; its part '0' has that structure",),
    ),
    "what backward() returns": (lambda: ADAM.update(None, STATE, PARAMS), ValueError, ("updates is None, params is a dict",)),
    "autograd.grad of a dict's values": (
        lambda: ADAM.update(tuple(GRADS.values()), STATE, PARAMS),
        ValueError,
        ("updates is a tuple, params is a dict: write dict(zip(params, updates))",),
    ),
    "a NamedTuple for a tuple": (
        lambda: optfn.sgd().update(torch.ones(2).max(0), optfn.sgd().init(()), (torch.ones(()), torch.ones(()))),
        ValueError,
        ("updates must have the structure of params",),
    ),
    "a module for params": (lambda: ADAM.update(GRADS, STATE, MODEL), TypeError, ("params is a module",)),
    "gradients on another device": (
        lambda: ADAM.update(on_meta(GRADS), STATE, PARAMS),
        ValueError,
        ("scale_by_adam: 'b': the update is on meta, the parameter is on cpu", "x.to(device)"),
    ),
    "a state on another device": (
        lambda: ADAM.update(GRADS, on_meta(STATE), PARAMS),
        ValueError,
        ("scale_by_adam: 'b'", "the update is on cpu", "the state is on meta"),
    ),
    "a parameter on another device": (
        lambda: optfn.add_decayed_weights(0.1).update(GRADS, (), on_meta(PARAMS)),
        ValueError,
        ("add_decayed_weights: 'b'", "the update is on cpu", "the parameter is on meta"),
    ),
    "updates on another device": (
        lambda: optfn.apply_updates(PARAMS, on_meta(GRADS)),
        ValueError,
        ("'b': the parameter is on cpu, the update is on meta",),
    ),
    "state, updates = update(...)": (
        lambda: optfn.apply_updates(PARAMS, ADAM.update(GRADS, STATE, PARAMS)[1]),
        ValueError,
        ("tx.update returns (updates, state), in this order",),
    ),
    "both results for one": (
        lambda: optfn.apply_updates(PARAMS, ADAM.update(GRADS, STATE, PARAMS)),
        ValueError,
        ("updates is a tuple; its part '0' has that structure",),
    ),
    # Around the step.
    "compile(3)": (lambda: optfn.compile(3), TypeError, ("compile takes a function, got 3",)),
    "compile(tx)": (lambda: optfn.compile(ADAM), TypeError, ("compile takes a function, got a transformation", "tx.update")),
    "minimize: params first": (
        lambda: optfn.minimize(PARAMS, value_of, ADAM),
        TypeError,
        ("a function first, minimize(fun, params, tx), got dict",),
    ),
    "minimize: tx first": (lambda: optfn.minimize(ADAM, value_of, PARAMS), TypeError, ("minimize(fun, params, tx)",)),
    "minimize: tx second": (
        lambda: optfn.minimize(value_of, ADAM, PARAMS),
        TypeError,
        ("got dict: write minimize(fun, params, tx)",),
    ),
    "minimize of a module": (lambda: optfn.minimize(lambda m: m(torch.ones(3)), MODEL, ADAM), TypeError, ("params is a module",)),
    "minimize, differentiated": (
        lambda: torch.func.grad(lambda a: optfn.minimize(lambda x: (x - a) ** 2, torch.zeros(()), ADAM).params)(torch.ones(())),
        RuntimeError,
        ("minimize cannot be differentiated or batched", "outside of torch.func.grad", "tx.update"),
    ),
    "minimize, batched": (
        lambda: torch.func.vmap(lambda x: optfn.minimize(torch.sin, x, ADAM).params)(torch.ones(3)),
        RuntimeError,
        ("minimize cannot be differentiated or batched",),
    ),
    "the optimizer for its state dict": (
        lambda: load_torch_state(ADAM, NAMED, torch.optim.Adam(MODEL.parameters())),
        TypeError,
        ("load_torch_state takes a state dict, got the optimizer: write optimizer.state_dict()",),
    ),
    "load_torch_state swapped": (
        lambda: load_torch_state(torch.optim.Adam(MODEL.parameters()).state_dict(), NAMED, ADAM),
        TypeError,
        ("got dict: write load_torch_state(tx, params, optimizer.state_dict())",),
    ),
    "TorchOptimizer of torch's": (
        lambda: TorchOptimizer(MODEL.parameters(), torch.optim.AdamW),
        TypeError,
        ("TorchOptimizer takes what is of optfn, optfn.adamw perhaps, got AdamW of torch.optim",),
    ),
    "from_flat_dict swapped": (lambda: optfn.tree.from_flat_dict(STATE, {}), TypeError, ("flat must be a dict, got tuple",)),
    "write_to_module swapped": (lambda: write_to_module(NAMED, MODEL), TypeError, ("module must be a module, got dict",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_what_to_write(name: str) -> None:
    wrong, kind, words = MISTAKES[name]
    with pytest.raises(kind) as caught:
        wrong()
    assert type(caught.value) is kind
    for word in words:
        assert word in str(caught.value)


ALIASES = [
    name
    for name in optfn.__all__
    if inspect.isfunction(getattr(optfn, name)) and next(iter(inspect.signature(getattr(optfn, name)).parameters), "") == "lr"
]


@pytest.mark.parametrize("name", ALIASES)
def test_every_alias_says_it(name: str) -> None:
    """And is in every other way the function that it was."""
    function = getattr(optfn, name)
    with pytest.raises(TypeError, match=f"{name} has no argument 'learning_rate': write lr="):
        function(learning_rate=0.1)
    with pytest.raises(TypeError, match=rf"parameters go to init: tx = optfn.{name}\("):
        function(MODEL.parameters(), lr=0.1)
    assert pickle.loads(pickle.dumps(function)) is function
    assert (function.__name__, function.__module__) == (name, inspect.unwrap(function).__module__)
    assert inspect.signature(function) == inspect.signature(inspect.unwrap(function))
    assert "Example:" in inspect.getdoc(function)


def test_the_aliases_are_found() -> None:
    assert {"adam", "adamw", "sgd", "lbfgs", "muon", "adafactor", "sparse_adam"} <= {*ALIASES}
    assert len(ALIASES) >= 15


def test_functions_without_a_signature_may_be_masks_and_schedules() -> None:
    assert optfn.masked(ADAM, lambda *args: True).init(PARAMS)
    schedule = np.vectorize(float)  # its signature takes anything
    assert start(optfn.sgd(schedule))[0]["b"] == 0


def test_an_error_inside_of_a_mask_function_stays_what_it_is() -> None:
    with pytest.raises(TypeError, match="can only concatenate"):
        optfn.freeze(lambda path, p: path + 1).init(PARAMS)


def newcomers_loop(steps: int) -> None:
    params = {"w": torch.nn.Parameter(torch.ones(3))}
    tx = optfn.sgd(lr=0.1)
    state = tx.init(params)
    for _ in range(steps):
        params["w"].square().sum().backward()
        updates, state = tx.update({name: p.grad for name, p in params.items()}, state, params)
        params = optfn.apply_updates(params, updates)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_where_no_gradient_is_there_a_warning_says_so_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # Python's own: once for a line
        newcomers_loop(5)
    said = [w for w in caught if "every update is None" in str(w.message)]
    assert len(said) == 1
    assert said[0].filename == __file__
    for words in ("Was every gradient None?", "torch.no_grad()", "requires_grad_()", "torch.func.grad"):
        assert words in str(said[0].message)


def trained(params: Any, tx: optfn.GradientTransformation, grads: Any) -> Any:
    return optfn.apply_updates(params, tx.update(grads, tx.init(params), params)[0])


@pytest.mark.parametrize(
    ("tx", "grads"),
    [
        (optfn.masked(ADAM, {"w": True, "b": False}), {"w": None, "b": GRADS["b"]}),
        (optfn.partition({"a": ADAM, "still": optfn.freeze()}, {"w": "still", "b": "a"}), GRADS),
        (
            optfn.partition({"a": ADAM, "b": optfn.chain(MOMENTUM, optfn.ema_params(0.9))}, {"w": "b", "b": "a"}),
            {**GRADS, "w": None},
        ),
        (optfn.chain(ADAM, optfn.ema_params(0.9)), {**GRADS, "w": None}),
    ],
    ids=["masked", "frozen", "a part that sits out", "average"],
)
@pytest.mark.filterwarnings("error")
def test_leaves_that_sit_out_are_no_reason_to_warn(tx: optfn.GradientTransformation, grads: Any) -> None:
    new = trained(PARAMS, tx, grads)
    assert torch.equal(new["w"], PARAMS["w"])
    assert not torch.equal(new["b"], PARAMS["b"])


@pytest.mark.filterwarnings("error")
def test_a_group_without_gradients_is_no_reason_to_warn() -> None:
    still, moves = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    opt = TorchOptimizer([{"params": [still]}, {"params": [moves]}], optfn.sgd, lr=0.1)
    moves.square().sum().backward()
    opt.step()
    assert still.tolist() == [1, 1]
    assert moves.tolist() != [1, 1]


@pytest.mark.filterwarnings("error")
def test_a_compiled_step_without_gradients_is_traced() -> None:
    """Dynamo has no warnings."""
    step = torch.compile(lambda params, grads: trained(params, ADAM, grads), fullgraph=True, backend="eager")
    new = step(PARAMS, {"w": None, "b": None})
    assert all(torch.equal(new[name], PARAMS[name]) for name in PARAMS)
