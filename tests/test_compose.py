"""Chains, masks and partitions."""

import functools

import optax
import pytest
import torch
from optax_oracle import assert_close, counted, run, some_grads, some_params, to_jax

import optfn


def nested_params(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = {"body": {"0": {"weight": (2, 3), "bias": (3,)}, "1": {"weight": (3, 3), "bias": (3,)}}, "head": [(3, 1), (1,)]}

    def make(node):
        if isinstance(node, tuple):
            return torch.randn(node, generator=generator, dtype=dtype)
        return [make(x) for x in node] if isinstance(node, list) else {key: make(x) for key, x in node.items()}

    return make(shapes)


def nested_grads(steps=10):
    generator = torch.Generator().manual_seed(4)
    like = nested_params()
    return [optfn.tree.map(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), like) for _ in range(steps)]


def is_matrix(path, p):
    return p.ndim >= 2


def label_of(path, p):
    return "decay" if path.endswith("weight") else "head" if path.startswith("head") else "none"


def by_torch(groups, params, grads):
    """``groups``: dotted path to a class of torch.optim and its arguments; a path that is not there is frozen."""
    leaves = optfn.tree.map(lambda p: torch.nn.Parameter(p.clone()), params)
    named = dict(zip(optfn.tree.paths(leaves), optfn.tree.leaves(leaves), strict=True))
    optimizers = [kind([named[path] for path in paths], **arguments) for kind, arguments, paths in groups]
    steps = []
    for g in grads:
        for path, x in zip(optfn.tree.paths(g), optfn.tree.flatten(g)[0], strict=True):
            named[path].grad = None if x is None else x.clone()
        for optimizer in optimizers:
            optimizer.step()
        steps.append(optfn.tree.map(lambda p: p.detach().clone(), leaves))
    return steps


WEIGHTS, BIASES, HEAD = (
    ["body.0.weight", "body.1.weight"],
    ["body.0.bias", "body.1.bias"],
    ["head.0", "head.1"],
)


@pytest.mark.parametrize(
    "labels",
    [
        label_of,
        {
            "body": {"0": {"weight": "decay", "bias": "none"}, "1": {"weight": "decay", "bias": "none"}},
            "head": ["head", "head"],
        },
        {"body": {"0": {"weight": "decay", "bias": "none"}, "1": {"weight": "decay", "bias": "none"}}, "head": "head"},
    ],
    ids=["function", "tree", "prefix"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_partition_is_torch_param_groups(labels, frozen):
    params, grads = nested_params(), nested_grads()
    grads[3]["body"]["0"]["weight"] = None
    tx = optfn.partition(
        {
            "decay": optfn.adamw(lr=0.01, weight_decay=0.3),
            "none": optfn.freeze() if frozen else optfn.adam(lr=0.02, betas=(0.8, 0.9)),
            "head": optfn.sgd(lr=0.1, momentum=0.9, nesterov=True),
        },
        labels,
    )
    groups = [
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.3}, WEIGHTS),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, HEAD),
        *([] if frozen else [(torch.optim.Adam, {"lr": 0.02, "betas": (0.8, 0.9)}, BIASES)]),
    ]
    steps, state = run(tx, params, grads)
    assert_close([step["params"] for step in steps], by_torch(groups, params, grads), 1e-12)
    # What is hidden from a transformation has no slots in it.
    assert optfn.tree.get(optfn.tree.get(state, "decay"), "mu")["head"] == [(), ()]
    if frozen:
        assert steps[-1]["updates"]["body"]["0"]["bias"] is None


@pytest.mark.parametrize(
    "mask",
    [
        is_matrix,
        {"body": {"0": {"weight": True, "bias": False}, "1": {"weight": True, "bias": False}}, "head": [True, False]},
    ],
    ids=["function", "tree"],
)
def test_masked_decay_is_torch_param_groups(mask):
    params, grads = nested_params(), nested_grads()
    steps, _ = run(optfn.adamw(lr=0.05, weight_decay=0.2, mask=mask), params, grads)
    groups = [
        (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.2}, [*WEIGHTS, "head.0"]),
        (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.0}, [*BIASES, "head.1"]),
    ]
    assert_close([step["params"] for step in steps], by_torch(groups, params, grads), 1e-12)


@pytest.mark.parametrize("mask", [{"body": True, "head": False}, {"body": {"0": True, "1": True}, "head": [False, False]}])
def test_a_mask_lets_the_other_updates_pass(mask):
    params, (g, *_) = nested_params(), nested_grads()
    tx = optfn.masked(optfn.scale(2.0), mask)
    updates, state = tx.update(g, tx.init(params), params)
    assert_close(updates["body"], optfn.tree.map(lambda x: 2 * x, g["body"]), 0)
    assert updates["head"][0] is g["head"][0]
    assert updates["head"][1] is g["head"][1]
    assert isinstance(state, optfn.MaskedState)


@pytest.mark.parametrize("mask", [True, False])
def test_a_bool_is_a_mask_of_everything(mask):
    params, (g, *_) = nested_params(), nested_grads()
    tx = optfn.masked(optfn.scale(2.0), mask)
    assert_close(tx.update(g, tx.init(params), params)[0], optfn.tree.map(lambda x: x * (2 if mask else 1), g), 0)


@pytest.mark.parametrize("inner", [optfn.add_decayed_weights(0.5), optfn.ema_params(0.5), optfn.adamw(), optfn.sgd()])
def test_a_mask_may_hide_a_bare_tensor(inner):
    """Its None is not "no params given"."""
    p, g = torch.ones(2), torch.full((2,), 3.0)
    for tx in (optfn.masked(inner, False), optfn.partition({"other": optfn.identity()}, "other")):
        assert tx.update(g, tx.init(p), p)[0] is g


def test_masks_nest():
    params, grads = nested_params(), nested_grads()
    inner = optfn.masked(optfn.scale_by_adam(), is_matrix)
    outer = optfn.masked(inner, {"body": {"0": True, "1": False}, "head": True})
    steps, state = run(optfn.chain(outer, optfn.scale(-0.1)), params, grads)
    adam = [(torch.optim.Adam, {"lr": 0.1}, ["body.0.weight", "head.0"])]
    rest = [(torch.optim.SGD, {"lr": 0.1}, ["body.0.bias", "body.1.weight", "body.1.bias", "head.1"])]
    assert_close([step["params"] for step in steps], by_torch(adam + rest, params, grads), 1e-12)
    kept = optfn.tree.to_flat_dict(optfn.tree.get(state, "mu"))
    assert [*kept] == ["body.0.weight", "head.0"]


def test_a_mask_sees_paths_and_leaves():
    seen = {}
    tx = optfn.masked(optfn.identity(), lambda path, p: seen.setdefault(path, p) is p)
    params = nested_params()
    tx.init(params)
    assert [*seen] == optfn.tree.paths(params) == [*sorted(WEIGHTS + BIASES), *HEAD]
    assert all(x is y for x, y in zip(seen.values(), optfn.tree.leaves(params), strict=True))


def test_freeze_takes_the_opposite_of_a_mask():
    params, grads = nested_params(), nested_grads()
    tx = optfn.chain(optfn.freeze({"body": True, "head": False}), optfn.adamw(lr=0.1, weight_decay=0.1))
    steps, state = run(tx, params, grads)
    expected = by_torch([(torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}, HEAD)], params, grads)
    assert_close([step["params"] for step in steps], expected, 1e-12)
    assert optfn.tree.get(state, "step").tolist() == [0, 0, 0, 0, 10, 10]
    assert steps[-1]["params"]["body"]["0"]["weight"] is params["body"]["0"]["weight"]


def test_maximize_is_torch():
    params, grads = nested_params(), nested_grads()
    steps, _ = run(optfn.maximize(optfn.adamw(lr=0.1, weight_decay=0.1)), params, grads)
    arguments = {"lr": 0.1, "weight_decay": 0.1, "maximize": True}
    expected = by_torch([(torch.optim.AdamW, arguments, optfn.tree.paths(params))], params, grads)
    assert_close([step["params"] for step in steps], expected, 1e-12)


def test_chain_runs_in_order():
    double, add = optfn.scale(2.0), optfn.add_decayed_weights(1.0)
    params, g = torch.tensor([10.0]), torch.tensor([1.0])
    for members, expected in (((double, add), 12.0), ((add, double), 22.0)):
        tx = optfn.chain(*members)
        assert tx.update(g, tx.init(params), params)[0].item() == expected


def test_chain_is_associative():
    a, b, c = optfn.clip(0.5), optfn.scale_by_adam(), optfn.add_decayed_weights(0.1)
    chains = [optfn.chain(a, b, c), optfn.chain(optfn.chain(a, b), c), optfn.chain(a, optfn.chain(b, c))]
    first, *others = (run(tx, some_params(), some_grads())[0] for tx in chains)
    for other in others:
        assert_close(other, first, 0)


# Links that take a leaf at a time, and links that see the whole tree: a clipped norm, a mask, a partition, a freeze.
LINKS = {
    "none": [],
    "leaf by leaf": [optfn.clip(0.5), optfn.scale_by_adam(), optfn.identity(), optfn.add_decayed_weights(0.1), optfn.scale(-0.1)],
    "scheduled": [optfn.trace(0.9), optfn.scale_by_learning_rate(optfn.linear_schedule(0.1, 0.0, 5))],
    "a tree first": [optfn.clip_by_global_norm(0.1), optfn.scale_by_adam(), optfn.scale(-0.1)],
    "a tree last": [optfn.scale_by_adam(), optfn.scale(-0.1), optfn.clip_by_global_norm(0.1)],
    "a tree between": [
        optfn.scale_by_rms(),
        optfn.trace(0.9),
        optfn.masked(optfn.add_decayed_weights(0.1), is_matrix),
        optfn.chain(optfn.clip(0.5), optfn.scale_by_learning_rate(0.1)),
        optfn.scale(0.5),
    ],
    "trees": [
        optfn.freeze(lambda path, p: path == "s"),
        optfn.partition({True: optfn.scale_by_adam(), False: optfn.trace(0.5)}, lambda path, p: p.ndim >= 2),
    ],
}


@pytest.mark.parametrize("name", LINKS)
def test_a_chain_is_its_links_one_after_the_other(name):
    """However the chain goes through them: the updates, the state of each link, and who sits out."""
    links, params = LINKS[name], some_params()
    tx = optfn.chain(*links)
    state, states = tx.init(params), [link.init(params) for link in links]
    for t, g in enumerate(some_grads()):
        expected = g = {**g, "b": None} if t % 3 == 2 else g
        for i, link in enumerate(links):
            expected, states[i] = link.update(expected, states[i], params)
        updates, state = tx.update(g, state, params)
        assert_close(updates, expected, 0)
        assert type(state) is tuple
        assert_close(state, tuple(states), 0)
        params = optfn.apply_updates(params, updates)


def test_a_chain_calls_an_update_that_wraps_another():
    """functools.wraps copies what marks an update as one that goes leaf by leaf."""
    inner = optfn.scale(2.0)

    @functools.wraps(inner.update)
    def update(updates, state, params=None, **extra):
        updates, state = inner.update(updates, state, params, **extra)
        return optfn.tree.map(lambda u: u + 1, updates), state

    tx = optfn.chain(inner, optfn.GradientTransformation(inner.init, update), inner)
    assert tx.update(torch.ones(()), tx.init(torch.ones(())))[0] == 10


@pytest.mark.parametrize("tx", [optfn.chain(), optfn.identity()])
def test_nothing_changes_nothing(tx):
    g = {"w": torch.ones(2), "b": None}
    updates, state = tx.update(g, tx.init({"w": torch.zeros(2), "b": None}))
    assert updates is g
    assert state == ()
    assert optfn.is_elementwise(tx)


def test_named_chain_is_chain_with_names():
    members = {"clip": optfn.clip_by_global_norm(1.0), "adam": optfn.scale_by_adam(), "lr": optfn.scale(-0.1)}
    named, plain = optfn.named_chain(*members.items()), optfn.chain(*members.values())
    (steps, state), (expected, tuple_state) = (run(tx, some_params(), some_grads()) for tx in (named, plain))
    assert_close(steps, expected, 0)
    assert [*state] == [*members]
    assert_close(state, dict(zip(members, tuple_state, strict=True)), 0)
    assert optfn.tree.get(state, "adam.slots.mu") is state["adam"].slots.mu


def taking(name, seen):
    """A transformation that needs an argument."""

    def update(updates, state, params=None, *, value=None, **extra):
        if value is None:
            raise TypeError(f"{name} needs `value`")
        seen.append((value, extra))
        return updates, state

    return optfn.GradientTransformation(lambda params: (), update)


WRAPPERS = {
    "chain": lambda tx: optfn.chain(optfn.identity(), tx),
    "named_chain": lambda tx: optfn.named_chain(("first", optfn.scale_by_adam()), ("second", tx)),
    "masked": lambda tx: optfn.masked(tx, {"w": True, "b": False, "s": True}),
    "partition": lambda tx: optfn.partition({0: tx, 1: optfn.sgd()}, {"w": 0, "b": 1, "s": 1}),
    "maximize": optfn.maximize,
    "accumulate": lambda tx: optfn.accumulate(tx, 2),
    "apply_if_finite": optfn.apply_if_finite,
    "inject_hyperparams": lambda tx: optfn.inject_hyperparams(lambda lr: optfn.chain(tx, optfn.scale(lr)))(lr=0.1),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_extra_arguments_reach_every_member(name):
    seen, params, (g, *_) = [], some_params(), some_grads(1)
    tx = WRAPPERS[name](taking("by_value", seen))
    state = tx.init(params)
    tx.update(g, state, params, value=3.0, other=4.0)
    assert seen == [(3.0, {"other": 4.0})]
    with pytest.raises(TypeError, match="by_value needs `value`"):
        tx.update(g, state, params)


@pytest.mark.parametrize(
    ("tx", "name"),
    [(optfn.add_decayed_weights(0.1), "add_decayed_weights"), (optfn.ema_params(), "ema_params")],
)
def test_a_member_that_lacks_params_names_itself(tx, name):
    tx = optfn.chain(optfn.scale(2.0), optfn.masked(tx, True))
    g = {"w": torch.ones(2)}
    with pytest.raises(TypeError, match=rf"{name} needs `params`: call update\(updates, state, params=...\)"):
        tx.update(g, tx.init(g))


LABELS = {"decay": optfn.sgd(), "none": optfn.freeze()}
ERRORS = {
    "label that no transformation has": (
        lambda p: optfn.partition(LABELS, lambda path, x: "decay" if x.ndim > 1 else "nonsense").init(p),
        (ValueError, "partition: 'body.0.bias' has the label 'nonsense', which is none of 'decay', 'none'"),
    ),
    "label that no leaf has": (
        lambda p: optfn.partition(LABELS, lambda path, x: "decay").init(p),
        (ValueError, "partition: no leaf has the label 'none'; the labels are 'decay'"),
    ),
    "no label": (
        lambda p: optfn.partition(LABELS, {"body": "decay", "head": [None, "none"]}).init(p),
        (ValueError, "partition: 'head.0' has the label None, which is none of"),
    ),
    "labels of another structure": (
        lambda p: optfn.partition(LABELS, {"body": "decay", "tail": "none"}).init(p),
        (
            ValueError,
            "param_labels must have the structure of params, .*: 'tail' is only in param_labels, 'head.0' is only in params",
        ),
    ),
    "mask of another type": (
        lambda p: optfn.masked(optfn.sgd(), {"body": 1, "head": True}).init(p),
        (TypeError, "mask: 'body.0.bias' must be a bool, got int"),
    ),
    "mask that is a tensor": (
        lambda p: optfn.masked(optfn.sgd(), {"body": torch.tensor(True), "head": True}).init(p),
        (TypeError, "mask: 'body.0.bias' must be a bool, got Tensor"),
    ),
    "mask function that forgets its return": (
        lambda p: optfn.masked(optfn.sgd(), lambda path, x: None).init(p),
        (TypeError, "mask: 'body.0.bias' must be a bool, got NoneType"),
    ),
    "mask of another structure": (
        lambda p: optfn.masked(optfn.sgd(), {"body": True}).init(p),
        (ValueError, "mask must have the structure of params, .*: 'head.0' is only in params"),
    ),
    "mask deeper than the params": (
        lambda p: optfn.freeze({"body": True, "head": [True, {"x": False}]}).init(p),
        (ValueError, "mask must have the structure of params, .*: 'head.1.x' is only in mask"),
    ),
    "freeze: mask of another type": (
        lambda p: optfn.freeze("body").init(p),
        (TypeError, "mask: 'body.0.bias' must be a bool, got str"),
    ),
    "mask of a decay": (
        lambda p: optfn.adamw(mask={"body": 1.0, "head": False}).init(p),
        (TypeError, "mask: 'body.0.bias' must be a bool, got float"),
    ),
    "chain of a factory": (
        lambda p: optfn.chain(optfn.sgd),
        (TypeError, "chain takes transformations, .* got the function sgd: call"),
    ),
    "masked: a factory": (
        lambda p: optfn.masked(optfn.sgd, True),
        (TypeError, "masked takes transformations, .* got the function sgd: call"),
    ),
    "partition of a float": (
        lambda p: optfn.partition({"a": 0.1}, {}),
        (TypeError, "partition takes transformations, .* got float"),
    ),
    "named_chain with a name twice": (
        lambda p: optfn.named_chain(("a", optfn.sgd()), ("a", optfn.sgd())),
        (ValueError, "named_chain: the name 'a' appears twice"),
    ),
    "chain with another state": (
        lambda p: optfn.chain(optfn.clip(1.0), optfn.trace(0.9)).update(p, ((),), p),
        (TypeError, "chain needs the state that its own init makes, a tuple of 2, got a tuple of 1"),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    run_it, (kind, message) = ERRORS[name]
    with pytest.raises(kind, match=message):
        run_it(nested_params())


HIDING = {
    "masked": lambda tx: optfn.masked(tx, {"a": {"x": True, "y": False}, "b": False}),
    "freeze": lambda tx: optfn.chain(optfn.freeze({"a": {"x": False, "y": True}, "b": True}), tx),
    "partition": lambda tx: optfn.partition(
        {"x": tx, "y": optfn.freeze(), "b": optfn.scale(-0.1)}, {"a": {"x": "x", "y": "y"}, "b": "b"}
    ),
    "partition of masked": lambda tx: optfn.partition(
        {"a": optfn.masked(tx, {"a": {"x": True, "y": False}, "b": False}), "b": optfn.freeze()}, {"a": "a", "b": "b"}
    ),
}
INNER = {
    "momentum": optfn.sgd(lr=0.1, momentum=0.9),
    "accumulate": optfn.accumulate(optfn.trace(0.9), 2),
    "inject": optfn.inject_hyperparams(optfn.sgd)(lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize(
    ("name", "inner"), [*((name, "momentum") for name in HIDING), *(("partition", inner) for inner in INNER if inner != "momentum")]
)
def test_hidden_sub_dicts_in_one_graph(name, inner):
    """A whole sub-dict, and a whole list, of nothing but None: eagerly and traced."""
    tx = HIDING[name](INNER[inner])
    params = {"a": {"x": {"0": torch.ones(2), "1": torch.ones(3)}, "y": {"0": torch.ones(1)}}, "b": [torch.ones(2)]}
    grads = [optfn.tree.map(lambda p, step=step: step * p, params) for step in (1.0, -2.0, 0.5)]
    compiled, graphs = counted(tx.update)
    expected, _ = run(tx, params, grads)
    steps, _ = run(optfn.GradientTransformation(tx.init, compiled), params, grads)
    assert_close(steps, expected, 1e-7)
    assert len(graphs) == 1


# What a function among the extra arguments is handed

WHOLE = {"a": torch.tensor([0.3, -1.2]).double(), "b": {"x": torch.tensor(0.7).double(), "y": torch.tensor([[0.5, 2.0]]).double()}}
ASCENT = optfn.chain(optfn.normalize(), optfn.sgd(0.3))


def coupled_loss(p):
    """Every leaf meets every other one."""
    return (p["a"].sin().sum() + p["b"]["x"] ** 3 + p["b"]["y"].cos().sum()) ** 2


OF_FUNCTIONS = {
    "sophia": (optfn.sophia(0.1, update_interval=1, eps=1e-3), lambda loss: {"obj_fn": loss}),
    "sam": (
        optfn.sam(optfn.sgd(0.1), ASCENT, 3, opaque_mode=True),
        lambda loss: {"grad_fn": lambda p, i: torch.func.grad(loss)(p)},
    ),
    "zoom": (optfn.chain(optfn.sgd(1.0), optfn.scale_by_zoom_linesearch(10)), lambda loss: {"value_fn": loss}),
    "backtracking": (
        optfn.chain(optfn.sgd(1.0), optfn.scale_by_backtracking_linesearch(10, store_grad=True)),
        lambda loss: {"value_fn": loss},
    ),
    "lbfgs": (
        optfn.lbfgs(line_search_fn="strong_wolfe"),
        lambda loss: {"value_and_grad_fn": optfn.tree.value_and_grad(loss)},
    ),
}


def first_update(name, around=lambda tx: tx, loss=coupled_loss, params=WHOLE):
    tx, given = OF_FUNCTIONS[name]
    tx, grad = around(tx), torch.func.grad(loss)(params)
    return tx.update(grad, tx.init(params), params, value=loss(params), grad=grad, **given(loss))[0]


def first_update_of_a(name):
    """That of a problem in which the other leaves are constants."""
    return first_update(name, loss=lambda p: coupled_loss({**p, "b": WHOLE["b"]}), params={"a": WHOLE["a"]})["a"]


ROUND_IT = {
    "masked": lambda tx: optfn.masked(tx, {"a": True, "b": False}),
    "partition": lambda tx: optfn.partition({"a": tx, "b": optfn.freeze()}, {"a": "a", "b": "b"}),
    "partition of masked": lambda tx: optfn.partition(
        {"ax": optfn.masked(tx, {"a": True, "b": False}), "y": optfn.sgd()}, {"a": "ax", "b": {"x": "ax", "y": "y"}}
    ),
    "selective": lambda tx: optfn.selective_transform(tx, freeze_mask={"a": False, "b": True}),
}


@pytest.mark.parametrize("around", ROUND_IT)
@pytest.mark.parametrize("name", OF_FUNCTIONS)
def test_a_function_is_handed_all_parameters(name, around):
    assert_close(first_update(name, ROUND_IT[around])["a"], first_update_of_a(name), 1e-12)


@pytest.mark.parametrize("name", [name for name in OF_FUNCTIONS if name != "sophia"])  # whose signs are one vector's there
def test_a_function_within_flatten_is_of_the_tree(name):
    assert_close(first_update(name, optfn.flatten), first_update(name), 1e-12)


def test_the_curvature_within_flatten_is_that_of_the_tree():
    square = lambda p: (p["a"] ** 2).sum() + 3 * p["b"] ** 2  # noqa: E731
    params = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(1.0)}
    tx = optfn.flatten(optfn.hutchinson_estimator_diag_hessian())
    assert_close(
        tx.update(params, tx.init(params), params, obj_fn=square)[0], {"a": torch.full((2,), 2.0), "b": torch.tensor(6.0)}, 0
    )


def test_a_leaf_that_sits_out_has_no_gradient_uphill():
    found = first_update("sam", lambda tx: optfn.chain(optfn.freeze({"a": False, "b": True}), tx))
    assert_close(found["a"], first_update_of_a("sam"), 1e-12)
    assert found["b"] == {"x": None, "y": None}


def test_functions_within_a_mask_are_one_graph():
    tx = optfn.masked(optfn.sophia(0.1, update_interval=1), {"a": True, "b": False})
    compiled, graphs = counted(lambda g, state, p: tx.update(g, state, p, obj_fn=coupled_loss))
    state = tx.init(WHOLE)
    assert_close(compiled(WHOLE, state, WHOLE), tx.update(WHOLE, state, WHOLE, obj_fn=coupled_loss), 1e-12)
    assert len(graphs) == 1


def test_what_is_no_function_of_parameters_is_handed_on_as_it_is():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    model, tx = (
        torch.nn.Linear(1, 1),
        optfn.masked(optfn.GradientTransformation(lambda params: (), update), {"w": True, "b": False}),
    )
    params = {"w": torch.ones(1), "b": torch.ones(1)}
    given = {"model": model, "kind": torch.nn.Linear, "sample": lambda *size: size, "tags": {"w": 1, "b": 2}, "pair": (params, 1.0)}
    tx.update(params, tx.init(params), params, **given)
    assert seen["model"] is model
    assert seen["kind"] is torch.nn.Linear
    assert (seen["sample"](), seen["sample"](2, 3)) == ((), (2, 3))
    assert seen["tags"] is given["tags"]
    assert seen["pair"] is given["pair"]


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("name", ["masked", "partition"])
def test_extra_arguments_are_masked_as_optaxs(name, chosen):
    """A tree like the parameters, and one of another structure."""

    def of(lib):
        kind = lib.GradientTransformation if lib is optfn else lib.GradientTransformationExtraArgs
        seen = []

        def update(updates, state, params=None, *, tags, other, **extra):
            seen.append((tags["w"], tags["b"] if isinstance(tags["b"], int) else None, other))
            return updates, state

        inner = kind(lambda params: (), update)
        if name == "masked":
            tx = lib.masked(inner, {"w": True, "b": False}, mask_compatible_extra_args=chosen)
        else:
            labels = {"w": "in", "b": "out"}
            tx = lib.partition({"in": inner, "out": lib.set_to_zero()}, param_labels=labels, mask_compatible_extra_args=chosen)
        params = {"w": torch.ones(1), "b": torch.ones(1)}
        params = params if lib is optfn else to_jax(params)
        tx.update(params, tx.init(params), params, tags={"w": 1, "b": 2}, other={"w": 3})
        return seen

    assert of(optfn) == of(optax) == [(1, None if chosen else 2, {"w": 3})]
