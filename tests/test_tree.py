"""Trees: helpers, flat dicts, and properties of random trees, masks and chains."""

import collections
import io
from typing import Any, NamedTuple

import optree
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optax_oracle import assert_close, run, some_grads, some_params

import optfn
from optfn import tree
from optfn.tree import structure

settings.register_profile("trees", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trees")


class Point(NamedTuple):
    x: Any
    y: Any


# helpers


def test_map_keeps_none_and_hands_on_the_rest():
    first = {"a": 1, "b": [2, None], "c": Point(3, (4,))}
    second = {"a": 10, "b": [None, 20], "c": Point({"sub": 1}, (40,))}
    seen = []
    assert tree.map(lambda x, y: seen.append((x, y)) or -x, first, second) == {"a": -1, "b": [-2, None], "c": Point(-3, (-4,))}
    assert seen == [(1, 10), (2, None), (3, {"sub": 1}), (4, 40)]
    with pytest.raises(ValueError, match=r"tree 2 must have the structure of tree 1: 'b.1' is only in tree 1"):
        tree.map(lambda x, y: x, first, {**second, "b": [1]})


def test_containers_that_differ_are_named():
    with pytest.raises(ValueError, match="at 'a' tree 1 has a list, tree 2 has a dict"):
        tree.map(lambda x, y: x, {"a": [1, 2]}, {"a": {"0": 1, "1": 2}})


def test_paths_and_leaves():
    x = {"b": [torch.ones(1), None], "a": Point(torch.ones(2), {10: torch.ones(3), 9: torch.ones(4)})}
    assert tree.paths(x) == ["a.x", "a.y.9", "a.y.10", "b.0", "b.1"]
    assert [len(leaf) for leaf in tree.leaves(x)] == [2, 4, 3, 1]
    assert tree.paths(torch.ones(1)) == [""]
    assert tree.paths({}) == []
    assert tree.map_with_path(lambda path, leaf: path, x) == {"b": ["b.0", None], "a": Point("a.x", {10: "a.y.10", 9: "a.y.9"})}


def test_other_containers():
    ordered = collections.OrderedDict(b=torch.ones(1), a=torch.ones(2))
    default = collections.defaultdict(list, {"z": torch.ones(3)})
    for x in (ordered, default, collections.deque([torch.ones(1), torch.ones(2)])):
        found, spec = tree.flatten(x)
        assert len(tree.paths(x)) == len(found)
        assert type(tree.unflatten(spec, found)) is type(x)
        tx = optfn.adam(lr=0.1)
        updates, _ = tx.update(x, tx.init(x), x)
        assert_close(updates, tree.map(lambda leaf: torch.full_like(leaf, -0.1), x), 1e-6)


def test_cast():
    x = {"f": torch.ones(1), "c": torch.ones(1, dtype=torch.complex64), "i": torch.ones(1, dtype=torch.int32), "n": None}
    kinds = {name: leaf.dtype for name, leaf in tree.cast(x, torch.float64).items() if leaf is not None}
    assert kinds == {"f": torch.float64, "c": torch.complex128, "i": torch.int32}
    assert tree.cast(x, None)["f"].dtype == torch.float32


def test_global_norm_of_nothing():
    assert tree.global_norm({"a": None}).item() == 0.0


# get and set


def chained():
    tx = optfn.named_chain(
        ("first", optfn.scale_by_adam()),
        ("second", optfn.scale_by_rms(centered=True)),
        ("rate", optfn.inject_hyperparams(optfn.scale_by_learning_rate)(0.1)),
        ("decay", optfn.scale_by_schedule(optfn.linear_schedule(1.0, 0.0, 4))),
    )
    return tx, tx.init({"w": torch.ones(2), "sub": {"b": torch.ones(1)}})


def test_get():
    _, state = chained()
    assert tree.get(state, "first.slots.nu") is state["first"].slots.nu
    assert tree.get(state, "first.slots.mu.sub.b") is state["first"].slots.mu["sub"]["b"]
    assert tree.get(state["first"], "mu") is state["first"].slots.mu
    assert tree.get(state, "learning_rate") is state["rate"].hyperparams["learning_rate"]
    assert tree.get(state, "nothing", None) is None
    assert tree.get((state,), "0") is state
    with pytest.raises(KeyError, match=r"'nu' names several parts: 'first.slots.nu', 'second.slots.nu'; give more of the path"):
        tree.get(state, "nu")
    with pytest.raises(KeyError, match=r"nothing is called 'lr' here; there are .*'rate.hyperparams.learning_rate'"):
        tree.get(state, "lr")
    with pytest.raises(KeyError, match="nothing is called 'u' here"):  # the end of a path, not of a name
        tree.get(state, "u")


def test_set_replaces_all_that_are_called_so_and_nothing_else():
    _, state = chained()
    flat = tree.to_flat_dict(state)
    new = tree.to_flat_dict(tree.set(state, step=7, **{"first.slots.nu": {"w": torch.zeros(2), "sub": {"b": 5.0}}}))
    changed = {"first.step", "second.step", "first.slots.nu.w", "first.slots.nu.sub.b"}
    assert {path for path in flat if new[path] is not flat[path]} >= changed
    assert all(torch.equal(new[path], flat[path]) for path in flat if path not in changed)
    assert new["first.step"].tolist() == new["second.step"].tolist() == [7, 7]
    assert new["first.slots.nu.sub.b"].tolist() == [5.0]
    assert {path: (x.dtype, x.shape) for path, x in new.items()} == {path: (x.dtype, x.shape) for path, x in flat.items()}
    assert torch.equal(tree.to_flat_dict(state)["first.step"], torch.zeros(2, dtype=torch.int64))


def test_get_and_set_of_what_passes_a_filter():
    _, state = chained()
    small = lambda path, part: path.startswith("second")  # noqa: E731
    assert tree.get(state, "nu", filtering=small) is state["second"].slots.nu
    assert tree.get(state, "nu", None, lambda path, part: False) is None
    with pytest.raises(KeyError, match="nothing is called 'nu' here"):
        tree.get(state, "nu", filtering=lambda path, part: False)
    new = tree.set(state, small, step=7)
    assert (new["first"].step.tolist(), new["second"].step.tolist()) == ([0, 0], [7, 7])
    tree.set(state, lambda path, part: path.startswith("first"), mu=tree.get(state, "first.slots.mu"))
    with pytest.raises(KeyError, match="nothing is called 'step' here"):
        tree.set(state, lambda path, part: False, step=7)


def test_numbers_become_tensors_in_tuples_too():
    state = tree.set(optfn.inject_hyperparams(optfn.adam)().init(torch.ones(2)), betas=(0.5, torch.tensor(0.75)), lr=1)
    betas = tree.get(state, "betas")
    assert [x.item() for x in betas] == [0.5, 0.75]
    assert {x.dtype for x in (*betas, tree.get(state, "lr"))} == {torch.float64}


@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ({"lr": 0.1}, KeyError, "nothing is called 'lr' here"),
        ({"step_size": 0.1}, ValueError, "'step_size' is computed at each step"),
        ({"decay.step_size": 0.1}, ValueError, "'decay.step_size' is computed at each step"),
        ({"mu": {"w": torch.zeros(2)}}, ValueError, "the new 'mu' must have the structure of the old one: 'sub.b' is only in"),
        ({"step": 1, "nonsense": 1}, KeyError, "nothing is called 'nonsense' here"),
    ],
)
def test_set_errors(parts, kind, message):
    _, state = chained()
    with pytest.raises(kind, match=message):
        tree.set(state, **parts)


# map_params

SHAPED = {
    "chain": (optfn.chain(optfn.scale_by_adam(), optfn.trace(0.9), optfn.scale_by_learning_rate(optfn.constant_schedule(0.1))), 3),
    "amsgrad": (optfn.scale_by_adam(amsgrad=True), 3),
    "accumulate": (optfn.accumulate(optfn.trace(0.9), 2), 2),
    "ema": (optfn.chain(optfn.scale(1.0), optfn.ema_params()), 1),
    "inject": (optfn.inject_hyperparams(optfn.adam)(lr=0.1), 2),
    "finite": (optfn.apply_if_finite(optfn.adam(lr=optfn.constant_schedule(0.1))), 2),
    "nothing": (optfn.sgd(lr=optfn.constant_schedule(0.1)), 0),
}
PARAMS = {
    "dict": {"a": torch.ones(2), "b": {"c": torch.ones(()), "d": torch.ones(1, 2)}},
    "one name": {"lr": torch.ones(2)},
    "names of hyperparameters": {"lr": torch.ones(2), "betas": (torch.ones(1), torch.ones(3)), "eps": torch.ones(1)},
    "tuple": (torch.ones(2), torch.ones(3)),
    "list": [torch.ones(2), torch.ones(())],
    "named tuple": Point(torch.ones(2), [torch.ones(1)]),
    "None": {"a": torch.ones(2), "b": None},
    "bare": torch.ones(2, 3),
    "bare, 1 entry": torch.ones(1),
    "bare, 0-dim": torch.ones(()),
}


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("name", SHAPED)
def test_map_params_finds_the_slots_and_no_others(name, params):
    tx, count = SHAPED[name]
    like = PARAMS[params]
    state = tx.init(like)
    marks = tree.map(lambda p: object(), like)
    seen = []
    new = tree.map_params(lambda x, mark: seen.append((x.shape, mark)) or -x - 1, state, like, marks)
    expected = [(p.shape, mark) for p, mark in zip(tree.leaves(like), tree.leaves(marks), strict=True)] * count
    assert sorted(seen, key=repr) == sorted(expected, key=repr)
    assert tree.paths(new) == tree.paths(state)
    others = []
    tree.map_params(lambda x: x, state, like, other=lambda x: others.append(x) or x)
    assert len(others) + len(seen) == len(tree.leaves(state))


def test_map_params_in_masked_and_partition():
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    mask = {"a": True, "b": False}
    tx = optfn.chain(
        optfn.masked(optfn.scale_by_adam(), mask),
        optfn.partition({"x": optfn.trace(0.9), "y": optfn.scale_by_rms()}, {"a": "x", "b": "y"}),
    )
    seen = []
    tree.map_params(lambda x, p: seen.append((x.shape, p.shape)) or x, tx.init(params), params, params)
    assert seen == [((2,), (2,)), ((2,), (2,)), ((2,), (2,)), ((3,), (3,))]


# flat dicts

STATES = {
    "adamw": optfn.adamw(amsgrad=True),
    "partition": optfn.partition(
        {"x": optfn.inject_hyperparams(optfn.adam)(lr=optfn.linear_schedule(1.0, 0.0, 5)), "y": optfn.freeze()},
        {"w": "x", "b": "x", "s": "y"},
    ),
    "accumulate": optfn.apply_if_finite(optfn.accumulate(optfn.sgd(momentum=0.9), 3)),
    "ema": optfn.named_chain(("sgd", optfn.sgd()), ("ema", optfn.ema_params(average_dtype=torch.bfloat16))),
}


def by_torch_save(flat):
    file = io.BytesIO()
    torch.save(flat, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "through",
    [dict, by_torch_save, lambda flat: safetensors.torch.load(safetensors.torch.save(flat))],
    ids=["dict", "save", "safe"],
)
@pytest.mark.parametrize("name", STATES)
def test_a_run_continues_from_a_flat_dict(name, through):
    tx, grads = STATES[name], some_grads(10)
    expected, _ = run(tx, some_params(), grads)
    steps, state = run(tx, some_params(), grads[:5])
    loaded = tree.from_flat_dict(through(tree.to_flat_dict(state)), like=tx.init(some_params()))
    assert optree.tree_structure(loaded, none_is_leaf=True) == optree.tree_structure(state, none_is_leaf=True)
    resumed = optfn.GradientTransformation(lambda params: loaded, tx.update)
    later, _ = run(resumed, steps[-1]["params"], grads[5:])
    assert_close(steps + later, expected, 0)


def test_a_flat_dict_is_detached_contiguous_and_named():
    x = {"a": [torch.ones(2, 3, requires_grad=True), None, 3, 0.5], "b": torch.arange(6).reshape(2, 3).T}
    flat = tree.to_flat_dict(x)
    assert [*flat] == ["a.0", "a.2", "a.3", "b"]
    assert not flat["a.0"].requires_grad
    assert flat["b"].is_contiguous()
    back = tree.from_flat_dict(flat, x)
    assert (back["a"][1:], type(back["a"][2])) == ([None, 3, 0.5], int)
    with pytest.raises(ValueError, match=r"two leaves have the path 'a\.b'"):
        tree.to_flat_dict({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})
    with pytest.raises(TypeError, match="'f' must be a tensor, a number or None, got str"):
        tree.to_flat_dict({"f": "text"})


DAMAGED = {
    "missing": (lambda f: f.pop("slots.mu.w"), KeyError, "the flat dict does not fit: missing 'slots.mu.w'"),
    "extra": (lambda f: f.update(more=torch.ones(1)), KeyError, "the flat dict does not fit: unexpected 'more'"),
    "renamed": (
        lambda f: f.update({"slots.mu.v": f.pop("slots.mu.w")}),
        KeyError,
        "missing 'slots.mu.w'; unexpected 'slots.mu.v'",
    ),
    "for a leaf that is None": (lambda f: f.update({"slots.mu.n": torch.ones(1)}), KeyError, "unexpected 'slots.mu.n'"),
    "shape": (
        lambda f: f.update({"slots.nu.b": torch.ones(3)}),
        ValueError,
        r"'slots.nu.b' must be torch.float32 of shape \(2,\), got torch.float32 of shape \(3,\)",
    ),
    "dtype": (lambda f: f.update({"slots.nu.b": torch.ones(2).double()}), ValueError, "'slots.nu.b' must be .*float32.*float64"),
    "no tensor": (lambda f: f.update(step=[1, 1, 1]), TypeError, "'step' must be a tensor, got list"),
    "empty": (lambda f: f.clear(), KeyError, "missing 'step', 'slots.mu.b', 'slots.mu.w', 'slots.nu.b', 'slots.nu.w'"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_flat_dict_is_refused_and_nothing_changes(damage):
    spoil, kind, message = DAMAGED[damage]
    like = optfn.scale_by_adam().init({"w": torch.ones(2, 2), "b": torch.ones(2), "n": None})
    flat = {path: x + 1 for path, x in tree.to_flat_dict(like).items()}
    spoil(flat)
    before = {path: (x._version, x.clone()) for path, x in flat.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(kind, match=message):
        tree.from_flat_dict(flat, like)
    assert all(not x.any() for x in tree.leaves(like))
    assert all(flat[path]._version == version and torch.equal(flat[path], x) for path, (version, x) in before.items())


# random trees

KEYS = st.sampled_from(["a", "b", "weight", "bias", "0"])


def trees(leaf, *, max_leaves=8):
    def nested(children):
        return st.one_of(
            st.dictionaries(KEYS, children, max_size=4),
            st.dictionaries(st.integers(0, 20), children, max_size=3),
            st.lists(children, max_size=3),
            st.lists(children, max_size=3).map(tuple),
            st.builds(Point, children, children),
            st.dictionaries(KEYS, children, max_size=3).map(collections.OrderedDict),
        )

    return st.recursive(leaf, nested, max_leaves=max_leaves)


LEAVES = st.one_of(st.none(), st.integers(0, 100))
TENSORS = st.tuples(st.sampled_from([(), (1,), (2, 2), (0,)]), st.integers(-8, 8)).map(lambda x: torch.full(x[0], x[1] / 4.0))


def reordered(node):
    """The same tree, with the keys of its dicts inserted the other way round."""
    if type(node) is dict:
        return {key: reordered(node[key]) for key in reversed(node)}
    if isinstance(node, Point):
        return Point(*map(reordered, node))
    return type(node)(map(reordered, node)) if type(node) in (list, tuple) else node


def retyped(node, kinds):
    """The same tree in other containers."""
    if isinstance(node, dict):
        return kinds.get(type(node), type(node))({key: retyped(child, kinds) for key, child in node.items()})
    if type(node) in (list, tuple):
        return kinds.get(type(node), type(node))(retyped(child, kinds) for child in node)
    return Point(*(retyped(child, kinds) for child in node)) if isinstance(node, Point) else node


OTHER_KINDS = [{list: tuple, tuple: list}, {dict: collections.OrderedDict}, {collections.OrderedDict: dict}]


def same(x, y):
    """Equal, and dicts in the same order."""
    return x == y and repr(x) == repr(y)


@given(trees(LEAVES))
def test_flatten_and_back(x):
    found, spec = tree.flatten(x)
    assert same(tree.unflatten(spec, found), x)
    assert found == optree.tree_leaves(x, none_is_leaf=True)
    assert len(tree.paths(x)) == len(found)
    for path, leaf in zip(tree.paths(x), found, strict=True):
        node = x
        for name in path.split(".") if path else ():
            level = structure._children(node)
            node = level[1][level[0].index(name)]
        assert node is leaf


@given(trees(LEAVES), trees(LEAVES))
def test_the_structure_for_dynamo_is_that_of_optree(x, y):
    found = []
    spec, (expected, other) = structure._Structure(x, found), tree.flatten(x)
    assert found == expected
    assert spec.num_leaves == other.num_leaves
    assert spec.is_leaf() == other.is_leaf()
    numbers = list(range(len(found)))
    assert same(spec.unflatten(numbers), other.unflatten(numbers))
    for candidate in (y, x, reordered(x), *(retyped(x, kinds) for kinds in OTHER_KINDS), spec.unflatten([y] * len(found))):
        try:
            wanted = other.flatten_up_to(candidate)
        except ValueError:
            with pytest.raises(ValueError, match="the structures differ"):
                spec.flatten_up_to(candidate)
        else:
            assert spec.flatten_up_to(candidate) == wanted
    assert (spec == structure._Structure(y, [])) == (other == tree.flatten(y)[1])


@given(trees(TENSORS | st.none()))
def test_a_flat_dict_and_back(x):
    paths = [path for path, leaf in zip(tree.paths(x), tree.flatten(x)[0], strict=True) if leaf is not None]
    flat = tree.to_flat_dict(x)
    assert [*flat] == paths
    back = tree.from_flat_dict(flat, tree.map(torch.zeros_like, x))
    assert repr(back) == repr(x)


@given(trees(TENSORS | st.none()).filter(tree.leaves))
def test_the_order_of_keys_is_kept_and_confuses_nothing(x):
    """Gradients, state and parameters with their keys inserted in different orders."""
    tx = optfn.adamw(lr=0.1, weight_decay=0.5)
    expected, _ = tx.update(x, tx.init(x), x)
    updates, _ = tx.update(reordered(x), tx.init(x), reordered(x))
    assert repr(reordered(updates)) == repr(expected)
    params = optfn.apply_updates(x, updates)
    assert tree.map(lambda p, u: torch.equal(p, u), params, optfn.apply_updates(x, expected)) == tree.map(lambda p: True, x)
    blank = lambda node: repr(tree.map(lambda leaf: 0, node))  # noqa: E731
    assert blank(params) == blank(x)
    assert blank(updates) == blank(reordered(x))


@st.composite
def masked_trees(draw):
    x = draw(trees(TENSORS | st.none()).filter(tree.leaves))
    return x, tree.map(lambda _: draw(st.booleans()), x)


RULES = [optfn.scale_by_adam(), optfn.trace(0.5), optfn.add_decayed_weights(0.5), optfn.clip(0.7)]


def two_steps(tx, x):
    state, params, seen = tx.init(x), x, []
    for factor in (1.0, -0.5):
        updates, state = tx.update(tree.map(lambda p, factor=factor: factor * p, x), state, params)
        params = optfn.apply_updates(params, updates)
        seen += [updates, params]
    return seen


@pytest.mark.parametrize("rule", range(len(RULES)))
@given(masked_trees())
@settings(max_examples=20)
def test_a_mask_and_its_opposite_are_everything(rule, drawn):
    x, mask = drawn
    tx, opposite = RULES[rule], tree.map(lambda m: not m, mask)
    both = optfn.chain(optfn.masked(tx, mask), optfn.masked(tx, opposite))
    assert repr(two_steps(both, x)) == repr(two_steps(tx, x))


@given(masked_trees())
@settings(max_examples=30)
def test_partition_is_each_leaf_by_itself(drawn):
    x, mask = drawn
    rules = {True: optfn.adam(lr=0.1), False: optfn.sgd(lr=0.5, momentum=0.5)}
    used = {*tree.leaves(mask)}
    tx = optfn.partition({label: rules[label] for label in used}, mask)

    def alone(p, label):
        return two_steps(rules[label], p)

    pieces = tree.map(alone, x, mask)
    for i, step in enumerate(two_steps(tx, x)):
        assert repr(step) == repr(tree.map(lambda p, piece, i=i: piece[i], x, pieces))


@given(trees(TENSORS | st.none()).filter(tree.leaves), st.lists(st.sampled_from(RULES), max_size=4), st.data())
@settings(max_examples=30)
def test_chains_are_associative(x, rules, data):
    cut = data.draw(st.integers(0, len(rules)))
    nested = optfn.chain(optfn.chain(*rules[:cut]), optfn.chain(*rules[cut:]))
    assert repr(two_steps(nested, x)) == repr(two_steps(optfn.chain(*rules), x))


def test_get_passes_over_slots_that_are_not_kept() -> None:
    tx = optfn.chain(optfn.scale_by_adam(), optfn.scale_by_rms())
    assert tree.get(tx.init({"w": torch.ones(2)}), "mu")["w"].tolist() == [0, 0]


def test_set_refuses_another_shape_but_takes_a_batch_of_scalars() -> None:
    params = {"w": torch.ones(2)}
    state = optfn.scale_by_adam().init(params)
    with pytest.raises(ValueError, match=r"'mu' must have shape \(2,\)"):
        tree.set(state, mu={"w": torch.ones(5)})
    swept = tree.set(optfn.inject_hyperparams(optfn.sgd)(lr=0.1).init(params), lr=torch.tensor([0.1, 0.2]))
    assert tree.get(swept, "lr").shape == (2,)


def test_value_and_grad_of_any_tree() -> None:
    class Pair(NamedTuple):
        a: Any
        b: Any

    def fun(x: Any) -> torch.Tensor:
        assert x.b["gone"] is None
        return (x.a[0].square() * x.b["w"]).sum()

    a, w = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    value, grads = tree.value_and_grad(fun)(Pair([a], {"w": w, "gone": None, "unused": a}))
    assert value == 19
    assert tree.flatten(grads)[1] == tree.flatten(Pair([a], {"w": w, "gone": None, "unused": a}))[1]
    assert torch.equal(grads.a[0], 2 * a * w)
    assert torch.equal(grads.b["w"], a.square())
    assert torch.equal(grads.b["unused"], torch.zeros(2))
    assert grads.b["gone"] is None
    z = torch.tensor(3 + 4j, requires_grad=True)
    torch.autograd.backward(z.abs().square())
    assert torch.equal(tree.value_and_grad(lambda z: z.abs().square())(z.detach())[1], z.grad)  # torch's convention
