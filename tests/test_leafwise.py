"""The lift: what it refuses, and the dtypes that it computes in and gives back."""

import types
import warnings
from typing import NamedTuple

import pytest
import torch
from optax_oracle import assert_close, some_grads, some_params

import optfn

PARAMS = {"a": {"w": torch.ones(2, 3), "b": torch.ones(3)}, "c": torch.ones((), dtype=torch.complex64), "none": None}
GRADS = {"a": {"w": torch.full((2, 3), 0.5), "b": torch.ones(3)}, "c": torch.ones((), dtype=torch.complex64), "none": None}


def with_(tree, path, value):
    """A copy of a nested dict with another leaf, or without it where the value is ``...``."""
    name, _, rest = path.partition(".")
    new = dict(tree)
    if rest:
        new[name] = with_(tree[name], rest, value)
    elif value is ...:
        del new[name]
    else:
        new[name] = value
    return new


SPARSE = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3), (2, 3), check_invariants=True)
with warnings.catch_warnings(action="ignore"):
    COMPRESSED = SPARSE.to_dense().to_sparse_csc()

# What is wrong with the gradients: the path, what stands there, the error and its message.
BAD_GRADS = {
    "missing leaf": ("a.b", ..., ValueError, "'a.b' is only in"),
    "leaf too many": ("a.x", torch.ones(1), ValueError, "'a.x' is only in updates"),
    "another name": ("a", {"w": torch.ones(2, 3), "v": torch.ones(3)}, ValueError, "'a.v' is only in updates"),
    "another container": ("a", [torch.ones(3), torch.ones(2, 3)], ValueError, "'a.0' is only in updates"),
    "another shape": ("a.w", torch.ones(3, 2), ValueError, r"'a.w' must have an update like .* \(2, 3\), got .* \(3, 2\)"),
    "one that would broadcast": ("a.w", torch.ones(3), ValueError, r"'a.w' must have an update like .* \(2, 3\), got .* \(3,\)"),
    "0-dim": ("a.b", torch.ones(()), ValueError, r"'a.b' must have an update like .* \(3,\), got .* \(\)"),
    "complex for real": ("a.b", torch.ones(3, dtype=torch.complex64), ValueError, "'a.b' must have an update like .*complex64"),
    "real for complex": ("c", torch.ones(()), ValueError, "'c' must have an update like .*complex64.* got torch.float32"),
    "integer": ("a.b", torch.ones(3, dtype=torch.int64), TypeError, "'a.b' must have a floating-point .*gradient, got torch.int64"),
    "bool": ("a.b", torch.ones(3, dtype=torch.bool), TypeError, "'a.b' must have a floating-point .*gradient, got torch.bool"),
    "number": ("a.b", 1.0, TypeError, "updates at 'a.b' must be a tensor or None, got float"),
    "string": ("a.b", "1.0", TypeError, "updates at 'a.b' must be a tensor or None, got str"),
    "for a None leaf": ("none", torch.ones(1), ValueError, "'none' has an update, but"),
    "sparse": ("a.w", SPARSE, TypeError, r"'a.w' has a sparse gradient.* optfn.sparse_masked\({}\(...\)\)"),
    "sparse CSC": ("a.w", COMPRESSED, TypeError, r"'a.w' has a sparse gradient.* \.to_dense\(\)"),
}

RULES = {
    "scale_by_adam": optfn.scale_by_adam(),
    "scale_by_rms": optfn.scale_by_rms(centered=True),
    "scale_by_adagrad": optfn.scale_by_adagrad(),
    "trace": optfn.trace(0.9),
    "clip": optfn.clip(1.0),
    "add_decayed_weights": optfn.add_decayed_weights(0.1),
}
STATELESS = {"clip", "add_decayed_weights"}


CELLS = [
    (bad, rule, given)
    for bad in BAD_GRADS
    for rule in RULES
    for given in ("params", "no params")
    # A sparse gradient is none of trace's errors; without state and params there is nothing to compare with.
    if not (bad == "sparse" and rule == "trace") and not (given == "no params" and rule in STATELESS)
]


@pytest.mark.parametrize(("bad", "rule", "given"), CELLS)
def test_bad_gradients_name_the_leaf_and_change_nothing(bad, rule, given):
    path, value, kind, message = BAD_GRADS[bad]
    tx, grads = RULES[rule], with_(GRADS, path, value)
    state = tx.init(PARAMS)
    tensors = [x for x in optfn.tree.leaves((PARAMS, state, GRADS)) if isinstance(x, torch.Tensor)]
    before = [(x._version, x.clone()) for x in tensors]
    arguments = (grads, state, PARAMS) if given == "params" else (grads, state)
    with pytest.raises(kind, match=message.format(rule)):
        tx.update(*arguments)
    assert all(x._version == version and torch.equal(x, old) for x, (version, old) in zip(tensors, before, strict=True))


@pytest.mark.parametrize("params", [None, {**PARAMS, "c": None}])
def test_a_rule_that_reads_params_says_so(params):
    tx = RULES["add_decayed_weights"]
    kind, message = (
        (TypeError, "needs `params`: call update") if params is None else (ValueError, "'c' has an update, but no param")
    )
    with pytest.raises(kind, match=f"add_decayed_weights(:)? {message}"):
        tx.update(GRADS, tx.init(PARAMS), params)


@pytest.mark.parametrize("rule", [name for name in RULES if name not in STATELESS])
def test_a_state_of_other_parameters(rule):
    """The same structure, shapes that broadcast: no error of torch would stop it."""
    tx = RULES[rule]
    state = tx.init({"w": torch.ones(1)})
    g = {"w": torch.ones(3)}
    with pytest.raises(ValueError, match="'w'"):
        tx.update(g, state, g)


def test_params_of_another_structure():
    tx = optfn.scale_by_adam()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"updates must have the structure of params: 'a.b' is only in updates"):
        tx.update(GRADS, state, with_(PARAMS, "a.b", ...))
    with pytest.raises(ValueError, match=r"'a.b' is only in"):
        tx.update(with_(GRADS, "a.b", ...), state, with_(PARAMS, "a.b", ...))


@pytest.mark.parametrize(
    ("params", "kind", "message"),
    [
        ({"a": {"b": torch.ones(2, dtype=torch.int32)}}, TypeError, "'a.b' must be a dense floating-point .* got torch.int32"),
        ({"a": {"b": SPARSE}}, TypeError, "'a.b' must be a dense floating-point .* got torch.sparse_coo"),
        ({"a": [torch.ones(1), 2.0]}, TypeError, "params at 'a.1' must be a tensor or None, got float"),
        (2.0, TypeError, "params must be a tensor or None, got float"),
        (torch.nn.Linear(2, 2), TypeError, r"params is a module: pass a tree of tensors, dict\(module.named_parameters\(\)\)"),
        ({"m": torch.nn.Linear(2, 2)}, TypeError, "params at 'm' is a module: pass"),
        (torch.nn.Linear(2, 2).parameters(), TypeError, "params is a generator: pass a tree of tensors"),
        (iter([torch.ones(1)]), TypeError, "params is a generator"),
        ((x for x in [torch.ones(1)]), TypeError, "params is a generator"),
        ({"layer": (x for x in [torch.ones(1)])}, TypeError, "params at 'layer' is a generator"),
    ],
)
@pytest.mark.parametrize("tx", [optfn.scale_by_adam(), optfn.sgd(momentum=0.9), optfn.accumulate(optfn.adamw(), 2)])
def test_bad_params(tx, params, kind, message):
    with pytest.raises(kind, match=message):
        tx.init(params)


@pytest.mark.parametrize(
    ("params", "updates", "kind", "message"),
    [
        (
            {"a": [torch.ones(2)]},
            {"a": [torch.ones(3)]},
            ValueError,
            r"the update of 'a.0' must be a tensor of shape \(2,\), got .*3",
        ),
        (
            {"a": [torch.ones(2)]},
            {"a": [torch.ones(1)]},
            ValueError,
            r"the update of 'a.0' must be a tensor of shape \(2,\), got .*1",
        ),
        ({"a": torch.ones(2)}, {"a": 1.0}, ValueError, "the update of 'a' must be a tensor .* got float"),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, ValueError, "'a' is only in params, 'b' is only in updates"),
        (torch.nn.Linear(1, 1), {}, TypeError, "params is a module"),
    ],
)
def test_apply_updates_errors(params, updates, kind, message):
    with pytest.raises(kind, match=message):
        optfn.apply_updates(params, updates)


HALF = {
    "adam": optfn.scale_by_adam(),
    "adam, nesterov, amsgrad": optfn.scale_by_adam(nesterov=True, amsgrad=True),
    "rms": optfn.scale_by_rms(centered=True, bias_correction=True, eps=1e-2),
    "adagrad": optfn.scale_by_adagrad(lr_decay=0.1),
    "trace": optfn.trace(0.9, nesterov=True, dampening=0.0),
    "decay": optfn.add_decayed_weights(0.3),
    "clip": optfn.clip(0.3),
    "clip_by_block_rms": optfn.clip_by_block_rms(0.3),
    "clip_by_global_norm": optfn.clip_by_global_norm(0.3),
    "learning rate": optfn.scale_by_learning_rate(torch.tensor(0.1, dtype=torch.float64)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_float32_rounded_once(name, dtype):
    """Each step against the same step in float32 from the same (half-precision) values."""
    tx, params = HALF[name], optfn.tree.cast(some_params(torch.float32), dtype)
    state = tx.init(params)
    for g in some_grads(10, torch.float32):
        g = optfn.tree.cast(g, dtype)
        wide = [optfn.tree.cast(x, torch.float32) if x is not None else None for x in (g, state, params)]
        expected, expected_state = tx.update(*wide)
        updates, new = tx.update(g, state, params)
        for x, y in zip(optfn.tree.leaves(updates), optfn.tree.leaves(expected), strict=True):
            assert x.dtype == dtype
            assert torch.equal(x, y.to(dtype))
        for x, y, old in zip(*map(optfn.tree.leaves, (new, expected_state, state)), strict=True):
            assert x.dtype == old.dtype
            assert torch.equal(x, y.to(x.dtype))
        state, params = new, optfn.apply_updates(params, updates)


NUMBERS = {
    "adam": lambda x: optfn.chain(optfn.scale_by_adam(x(0.9), x(0.99), x(1e-8), x(1e-9)), optfn.scale_by_learning_rate(x(0.1))),
    "adamw": lambda x: optfn.adamw(x(0.1), (x(0.9), x(0.99)), x(1e-8), x(0.1)),
    "rmsprop": lambda x: optfn.rmsprop(x(0.1), x(0.9), x(1e-8), x(0.1), x(0.9), centered=True),
    "adagrad": lambda x: optfn.adagrad(x(0.1), x(0.1), x(0.1), x(0.1), x(1e-8)),
    "sgd": lambda x: optfn.sgd(x(0.1), x(0.9), x(0.1), x(0.1)),
    "clip": lambda x: optfn.chain(optfn.clip(x(0.3)), optfn.clip_by_global_norm(x(0.3)), optfn.clip_by_block_rms(x(0.3))),
    "scheduled": lambda x: optfn.chain(optfn.scale_by_adam(), optfn.scale_by_learning_rate(optfn.constant_schedule(x(0.1)))),
}


@pytest.mark.parametrize("number", [float, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.complex128])
@pytest.mark.parametrize("name", NUMBERS)
def test_dtypes_are_those_of_the_leaf_whatever_the_numbers(name, dtype, number):
    """0-dim leaves too, where torch's promotion would let a 0-dim float64 number decide."""
    tx = NUMBERS[name](number if number is float else lambda x: torch.tensor(x, dtype=number))
    params = {name: p.to(dtype) for name, p in some_params().items()}
    state = tx.init(params)
    kinds = [x.dtype for x in optfn.tree.leaves(state)]
    for g in some_grads(2):
        updates, state = tx.update({name: x.to(dtype) for name, x in g.items()}, state, params)
        assert {u.dtype for u in updates.values()} == {dtype}
        params = optfn.apply_updates(params, updates)
        assert {p.dtype for p in params.values()} == {dtype}
        assert [x.dtype for x in optfn.tree.leaves(state)] == kinds


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "clip"])
def test_a_float32_number_does_not_make_a_float64_leaf_less_exact(name):
    """0.5 and its like are the same in both, so the results must be."""
    value = {0.9: 0.5, 0.99: 0.75, 0.1: 0.125, 1e-8: 2.0**-26, 1e-9: 2.0**-30}
    plain = NUMBERS[name](lambda x: value[x])
    tensors = NUMBERS[name](lambda x: torch.tensor(value[x], dtype=torch.float32))
    states = plain.init(some_params()), tensors.init(some_params())
    for g in some_grads(10):
        expected, first = plain.update(g, states[0], some_params())
        updates, second = tensors.update(g, states[1], some_params())
        states = first, second
        assert_close(updates, expected, 1e-12)


@pytest.mark.parametrize(
    ("p", "u"),
    [
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.complex64, torch.complex128),
    ],
)
def test_apply_updates_adds_in_the_wider_dtype(p, u):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1000, generator=generator, dtype=torch.float64).to(dtype) for dtype in (p, u))
    wide = torch.complex128 if p.is_complex else torch.float64
    narrow_first = x + y.to(p)
    for given, update in ((x, y), (x[0], y[0])):
        new = optfn.apply_updates({"w": given}, {"w": update})["w"]
        assert new.dtype == p
        assert_close(new, (given.to(wide) + update.to(wide)).to(torch.promote_types(p, u)).to(p), 0)
    if torch.promote_types(p, u) != p:
        assert not torch.equal(optfn.apply_updates(x, y), narrow_first)  # rounding the update first would be another sum


def test_apply_updates_of_none_and_sparse():
    params = {"a": torch.ones(2), "rows": torch.ones(2, 3), "half": torch.ones(2, 3).bfloat16(), "none": None}
    new = optfn.apply_updates(params, {"a": None, "rows": SPARSE, "half": SPARSE, "none": None})
    assert new["a"] is params["a"]
    assert new["none"] is None
    for name in ("rows", "half"):
        assert new[name].dtype == params[name].dtype
        assert torch.equal(new[name], torch.tensor([[1.0], [2.0]]).expand(2, 3).to(new[name].dtype))


def test_updates_have_the_dtype_of_the_gradients():
    """Gradients of another precision than the parameters': slots stay with the parameters."""
    tx = optfn.adamw(lr=0.1)
    params, g = {"w": torch.ones(3)}, {"w": torch.ones(3).bfloat16()}
    updates, state = tx.update(g, tx.init(params), params)
    assert updates["w"].dtype == torch.bfloat16
    assert optfn.tree.get(state, "mu")["w"].dtype == torch.float32
    assert optfn.apply_updates(params, updates)["w"].dtype == torch.float32


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | tuple[()] = ()


def test_what_a_rule_may_rely_on():
    """Real tensors of one shape, float32 or wider, and a step of their dtype that counts from 1."""
    seen = []

    def make(needs_params):
        def init(p):
            return Pair(torch.zeros_like(p), torch.zeros(()))

        def update(g, slots, p, step):
            seen.append((g, p, step))
            return g, Pair(slots.first + g, slots.second + 1)

        return optfn.leafwise(init, update, needs_params=needs_params)

    params = {"c": torch.ones(2, dtype=torch.complex128), "h": torch.ones(2).half(), "n": torch.ones(2), "x": None}
    tx = make(True)
    state = tx.init(params)
    for _ in range(2):
        seen.clear()
        _, state = tx.update({**params, "n": None}, state, params)
    (c, pc, step_c), (h, ph, step_h) = seen
    assert (c.shape, pc.shape, c.dtype, step_c.dtype) == ((2, 2), (2, 2), torch.float64, torch.float64)
    assert (h.dtype, ph.dtype, step_h.dtype) == (torch.float32, torch.float32, torch.float32)
    assert step_c == step_h == 2
    assert step_c.ndim == 0
    assert state.step.tolist() == [2, 2, 0, 0]
    assert state.slots.first["c"].dtype == torch.complex128
    assert state.slots.first["x"] == ()
    assert [state.slots.second[name].item() for name in "chn"] == [2.0, 2.0, 0.0]
    seen.clear()
    make(False).update({"w": torch.ones(2)}, make(False).init({"w": torch.ones(2)}))
    assert seen[0][1] is None


def test_at_step_is_the_step_of_each_leaf_once_for_all():
    """A rule that is handed what ``at_step`` makes of its step against one that makes it itself."""
    calls = []

    def init(p):
        return Pair(torch.zeros_like(p))

    def plain(g, slots, p, step):
        return g / step, Pair(slots.first + g * step.sqrt())

    def at_step(step):
        calls.append(step)
        return 1 / step, step.sqrt(), 2.0

    def shared(g, slots, p, step):
        inverse, root, two = step
        assert two == 2.0
        return g * inverse, Pair(slots.first + g * root)

    def single(g, slots, p, inverse):
        return g * inverse, Pair(slots.first + g / inverse.sqrt())

    params = {"a": torch.ones(2), "b": torch.ones(()), "c": torch.ones(3, dtype=torch.float64), "h": torch.ones(2).bfloat16()}
    links = [
        optfn.leafwise(init, plain),
        optfn.leafwise(init, shared, at_step=at_step),
        optfn.leafwise(init, single, at_step=lambda step: 1 / step),
    ]
    states = [tx.init(params) for tx in links]
    for t in range(4):
        grads = {name: None if name == "b" and t % 2 == 0 else torch.full_like(p, 0.5) for name, p in params.items()}
        found = []
        for i, tx in enumerate(links):
            updates, states[i] = tx.update(grads, states[i])
            found.append(updates)
        for other, state in zip(found[1:], states[1:], strict=True):
            assert {name: None if u is None else u.dtype for name, u in other.items()} == {
                name: None if g is None else g.dtype for name, g in grads.items()
            }
            assert_close(optfn.tree.leaves(other), optfn.tree.leaves(found[0]), 1e-6)
            assert_close(optfn.tree.leaves(state), optfn.tree.leaves(states[0]), 1e-6)
    assert states[1].step.tolist() == [4, 2, 4, 4]
    assert [x.dtype for x in calls] == [torch.float32, torch.float64] * 4
    assert all(x.shape == (4,) and x.min() >= 1 for x in calls)


def test_a_leaf_that_has_not_begun_spoils_no_derivative():
    """Its count is 0, where the root of Adam's bias correction has an infinite derivative."""
    params, g = {"w": torch.ones(2), "b": torch.ones(2)}, {"w": torch.tensor([0.5, 2.0]), "b": None}

    def after(b2):
        tx = optfn.scale_by_adam(b2=b2)
        _, state = tx.update(g, tx.init(params))
        return tx.update({"w": torch.ones(2), "b": None}, state)[0]["w"].sum()

    derivative = torch.func.grad(after)(torch.tensor(0.9, dtype=torch.float64))
    assert derivative.isfinite()
    assert derivative != 0


def test_an_error_of_a_rule_s_init_names_the_leaf():
    def matrices_only():
        def init(p):
            if p.ndim != 2:
                raise ValueError(f"needs a matrix, got {p.ndim} dimensions")
            return Pair(torch.zeros_like(p))

        return optfn.leafwise(init, lambda g, slots, p, step: (g, slots))

    with pytest.raises(ValueError, match=r"'a.b': needs a matrix, got 1 dimensions"):
        matrices_only().init({"a": {"w": torch.ones(1, 1), "b": torch.ones(1)}})


def test_a_bare_tensor_has_no_path_to_name():
    tx = optfn.scale_by_adam()
    with pytest.raises(ValueError, match=r"^scale_by_adam: the tensor must have an update like its parameter"):
        tx.update(torch.ones(3), tx.init(torch.ones(2)), torch.ones(2))


def test_the_pair_is_immutable():
    tx = optfn.adam()
    assert isinstance(tx, tuple)
    assert isinstance(tx.init, types.FunctionType)
    with pytest.raises(AttributeError):
        tx.init = None


def test_float16_parameters_want_a_wide_second_moment() -> None:
    """The square of 1e-4 is 0 in float16; with ``nu_dtype`` the direction is that of float32."""
    p, g = torch.zeros(1, dtype=torch.float16), torch.tensor([1e-4], dtype=torch.float16)
    narrow, wide = optfn.scale_by_adam(), optfn.scale_by_adam(nu_dtype=torch.float32)
    _, state = wide.update(g, wide.init(p))
    assert optfn.tree.get(state, "nu").item() == pytest.approx(1e-3 * g.float().item() ** 2)
    direction, _ = wide.update(g, state)
    assert direction.item() == pytest.approx(1.0, rel=1e-3)
    _, state = narrow.update(g, narrow.init(p))
    assert optfn.tree.get(state, "nu").item() == 0


class Two(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


SEQUENCES = {
    "adamw": optfn.adamw(lr=0.1),
    "lbfgs": optfn.lbfgs(lr=0.1),
    "adafactor": optfn.adafactor(lr=0.1),
    "clipped, scheduled": optfn.chain(optfn.clip_by_global_norm(0.5), optfn.sgd(optfn.linear_schedule(0.1, 0.0, 5), momentum=0.9)),
    "masked": optfn.chain(optfn.masked(optfn.add_decayed_weights(0.1), lambda path, p: path.endswith("0")), optfn.scale_by_adam()),
    "partition": optfn.partition({1: optfn.adam(lr=0.1), 2: optfn.chain(optfn.freeze(), optfn.adam())}, [1, {"x": 1, "y": 2}, [1]]),
    "accumulate": optfn.accumulate(optfn.sgd(lr=0.1, momentum=0.9), 2),
    "finite, averaged": optfn.chain(optfn.apply_if_finite(optfn.adam(lr=0.1)), optfn.ema_params(0.5)),
    "injected": optfn.inject_hyperparams(optfn.adam)(lr=0.1),
    "sparse": optfn.sparse_masked(optfn.adam(lr=0.1), dense="pass"),
}


def as_tuples(x):
    if isinstance(x, list | tuple):
        return tuple(as_tuples(y) for y in x)
    return {name: as_tuples(y) for name, y in x.items()} if isinstance(x, dict) else x


NEED_PARAMS = ("adamw", "adafactor", "masked", "finite, averaged")


@pytest.mark.parametrize(
    ("name", "given"),
    [(name, given) for name in SEQUENCES for given in ("params", "no params") if given == "params" or name not in NEED_PARAMS],
)
def test_tuples_of_gradients_for_lists_of_parameters(name, given):
    """As torch.autograd.grad gives them: the same numbers, and a state that keeps its structure."""
    tx = SEQUENCES[name]
    params = [torch.ones(2), {"x": torch.ones(3), "y": torch.ones(1)}, [torch.ones(2, 2)]]
    expected = state = tx.init(params)
    spec = optfn.tree.flatten(state)[1]
    for t in range(4):
        grads = optfn.tree.map(lambda p, t=t: (t + 0.5) * p, params)
        mine = (params,) if given == "params" else ()
        wanted, expected = tx.update(grads, expected, *mine)
        updates, state = tx.update(as_tuples(grads), state, *mine)
        assert optfn.tree.flatten(state)[1] == spec
        assert optfn.tree.flatten(updates)[1] == optfn.tree.flatten(params if given == "params" else as_tuples(params))[1]
        for x, y in zip(optfn.tree.leaves((updates, state)), optfn.tree.leaves((wanted, expected)), strict=True):
            assert torch.equal(x, y)
        new = optfn.apply_updates(params, updates)
        assert [type(x) for x in (new, new[1], new[2])] == [list, dict, list]
        params = new


def test_tuples_of_gradients_are_traced():
    tx, params = optfn.chain(optfn.adamw(lr=0.1), optfn.ema_params(0.5)), [torch.ones(2), [torch.ones(3)]]
    grads = (torch.full((2,), 0.5), (torch.ones(3),))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optfn.apply_updates(params, updates), state

    expected = step(params, tx.init(params), grads)
    compiled = torch.compile(step, fullgraph=True, backend="eager")(params, tx.init(params), grads)
    traced = torch.fx.experimental.proxy_tensor.make_fx(step)(params, tx.init(params), grads)(params, tx.init(params), grads)
    for got in (compiled, traced):
        assert optfn.tree.flatten(got)[1] == optfn.tree.flatten(expected)[1]
        for x, y in zip(optfn.tree.leaves(got), optfn.tree.leaves(expected), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-7)


def test_gradients_of_several_arguments():
    weights = [torch.tensor([3.0]), torch.tensor([4.0])]
    grads = torch.func.grad(lambda v, w: (v * v * w).sum(), argnums=(0, 1))(*weights)
    assert type(grads) is tuple
    tx = optfn.sgd(lr=0.5)
    updates, _ = tx.update(grads, tx.init(weights), weights)
    assert updates == [torch.tensor([-12.0]), torch.tensor([-4.5])]


@pytest.mark.parametrize(
    ("params", "grads"),
    [
        ([0, 0], (0,)),
        ([0, 0], (0, 0, 0)),
        ((0, 0), Two(0, 0)),
        (Two(0, 0), (0, 0)),
        (Two(0, 0), [0, 0]),
        ([0, 0], {"0": 0, "1": 0}),
        ({"a": 0, "b": 0}, (0, 0)),
        ([0, 0], ((0, 0),)),
        ([0, [0]], (0, 0)),
    ],
)
def test_what_is_not_paired_by_position(params, grads):
    """Where it is not plain which leaf belongs to which, nothing is guessed."""
    params, grads = (optfn.tree.map(lambda _: torch.ones(1), x) for x in (params, grads))
    for tx in (optfn.sgd(lr=0.1), optfn.adam(), optfn.masked(optfn.trace(0.9), True), optfn.accumulate(optfn.sgd(), 2)):
        with pytest.raises((ValueError, TypeError), match=r"updates .*must"):
            tx.update(grads, tx.init(params), params)
    with pytest.raises(ValueError, match=r"updates must have the structure of params|the update of '1' must be a tensor"):
        optfn.apply_updates(params, grads)


NOTHING = {
    **{name: getattr(optfn, name)() for name in ("adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "lbfgs")},
    **{name: getattr(optfn, name)() for name in ("muon", "nadam", "radam", "rmsprop", "rprop", "sgd", "sparse_adam", "freeze")},
    "scheduled": optfn.sgd(optfn.linear_schedule(0.1, 0.0, 5), momentum=0.9),
    "chain": optfn.chain(
        optfn.clip_by_global_norm(1.0, keep_norm=True), optfn.clip(1.0), optfn.clip_by_block_rms(1.0), optfn.adam()
    ),
    "named_chain": optfn.named_chain(("clip", optfn.clip(1.0)), ("adam", optfn.adam())),
    "masked": optfn.masked(optfn.adam(), lambda path, p: True),
    "partition": optfn.partition({"a": optfn.adam(), "b": optfn.freeze()}, lambda path, p: "a"),
    "accumulate": optfn.accumulate(optfn.adam(), 2),
    "apply_if_finite": optfn.apply_if_finite(optfn.adam()),
    "inject_hyperparams": optfn.inject_hyperparams(optfn.adam)(lr=0.1),
    "ema_params": optfn.chain(optfn.sgd(), optfn.ema_params(0.9)),
    "sparse_masked": optfn.sparse_masked(optfn.adam()),
    "chain of nothing": optfn.chain(),
}


@pytest.mark.parametrize("empty", [{}, [], (), {"a": {}, "b": []}], ids=str)
@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.filterwarnings("error")
def test_an_empty_tree_is_nothing_to_do(name, empty):
    tx = NOTHING[name]
    state = first = tx.init(empty)
    for _ in range(3):
        updates, state = tx.update(empty, state, empty)
        assert updates == empty
        assert optfn.tree.flatten(state)[1] == optfn.tree.flatten(first)[1]
        assert optfn.apply_updates(empty, updates) == empty


def test_an_empty_tree_is_a_minimum():
    result = optfn.minimize(lambda params: torch.ones(()), {}, optfn.adam())
    assert (result.params, result.steps, result.reason) == ({}, 0, "gradient")


def test_an_exhausted_generator_is_no_empty_tree():
    used = torch.nn.Linear(2, 2).parameters()
    assert len([*used]) == 2
    for tx in (optfn.adam(), optfn.sgd(), optfn.accumulate(optfn.adam(), 2), optfn.masked(optfn.adam(), True)):
        with pytest.raises(TypeError, match="params is a generator"):
            tx.init(used)
