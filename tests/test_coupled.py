"""The lift of rules that need sums over all leaves, and those rules against Optax."""

from typing import Any, NamedTuple

import jax
import optax
import pytest
import torch
from optax_oracle import assert_close, counted, exact, from_jax, some_grads, some_params, to_jax
from torch import Tensor

import optfn
from optfn import tree

SHAPES = {"matrix": (3, 2), "vector": (5,), "scalar": (), "cube": (2, 3, 2)}
STEPS = 25
LOSSES = [3.0 * 0.8**i + 0.1 * (i % 3) for i in range(STEPS)]
SCHEDULE = (optfn.linear_schedule(1.0, 0.2, 20), exact(optax.linear_schedule(1.0, 0.2, 20)))

c = optax.contrib
PAIRS: dict[str, tuple[Any, Any]] = {
    "dog": (optfn.dog(), c.dog()),
    "dog.distance": (optfn.dog(0.5, ("distance", 0.3), 1e-3, 0.1), c.dog(0.5, ("distance", 0.3), 1e-3, 0.1)),
    "dog.learning_rate": (optfn.dog(init_step=("learning_rate", 0.1)), c.dog(init_step=("learning_rate", 0.1))),
    "dog.schedule": (optfn.dog(SCHEDULE[0]), c.dog(SCHEDULE[1])),
    "dowg": (optfn.dowg(), c.dowg()),
    "dowg.options": (optfn.dowg(0.5, 0.3, 1e-2, 0.1), c.dowg(0.5, 0.3, 1e-2, 0.1)),
    "scale_by_distance_over_gradients": (
        optfn.scale_by_distance_over_gradients(param_dtype=torch.float64),
        optax.scale_by_distance_over_gradients(param_dtype=jax.numpy.float64),
    ),
    "scale_by_distance_over_gradients.options": (
        optfn.scale_by_distance_over_gradients(1e-2, 1e-3, torch.float32, -2.0),
        optax.scale_by_distance_over_gradients(1e-2, 1e-3, jax.numpy.float32, -2.0),
    ),
    "polyak_sgd": (optfn.polyak_sgd(), optax.polyak_sgd()),
    "polyak_sgd.options": (optfn.polyak_sgd(0.5, 0.3, 1.0, 0.1, "sps+"), optax.polyak_sgd(0.3, 0.5, 1.0, 0.1, "sps+")),
    "polyak_sgd.below": (optfn.polyak_sgd(f_min=1.0), optax.polyak_sgd(f_min=1.0)),
    "momo": (optfn.momo(), c.momo()),
    "momo.options": (optfn.momo(0.3, 0.5, 0.2, 0.1), c.momo(0.3, 0.5, 0.2, 0.1)),
    "momo.adapt": (optfn.momo(0.3, 0.8, 0.0, 0.1, True), c.momo(0.3, 0.8, 0.0, 0.1, True)),
    "momo.high": (optfn.momo(0.3, 0.8, 2.0, 0.1, True), c.momo(0.3, 0.8, 2.0, 0.1, True)),
    "momo.schedule": (optfn.momo(SCHEDULE[0]), c.momo(SCHEDULE[1])),
    "momo_adam": (optfn.momo_adam(), c.momo_adam()),
    "momo_adam.options": (
        optfn.momo_adam(0.3, (0.8, 0.95), 1e-3, weight_decay=0.1, lower_bound=0.2),
        c.momo_adam(0.3, 0.8, 0.95, 1e-3, 0.2, 0.1),
    ),
    "momo_adam.adapt": (
        optfn.momo_adam(0.3, weight_decay=0.1, adapt_lower_bound=True),
        c.momo_adam(0.3, weight_decay=0.1, adapt_lower_bound=True),
    ),
    "momo_adam.high": (
        optfn.momo_adam(0.3, lower_bound=2.0, adapt_lower_bound=True),
        c.momo_adam(0.3, lower_bound=2.0, adapt_lower_bound=True),
    ),
    "momo_adam.schedule": (optfn.momo_adam(SCHEDULE[0]), c.momo_adam(SCHEDULE[1])),
    "prodigy": (optfn.prodigy(), c.prodigy()),
    "prodigy.options": (
        optfn.prodigy(0.5, (0.8, 0.95), 0.9, 1e-3, 1e-2, 2.0, 0.1, True),
        c.prodigy(0.5, (0.8, 0.95), 0.9, 1e-3, 1e-2, 2.0, 0.1, True),
    ),
    "prodigy.schedule": (optfn.prodigy(SCHEDULE[0], estim_lr0=0.1), c.prodigy(SCHEDULE[1], estim_lr0=0.1)),
    "dadapt_adamw": (optfn.dadapt_adamw(), c.dadapt_adamw()),
    "dadapt_adamw.options": (
        optfn.dadapt_adamw(0.5, (0.8, 0.95), 1e-3, 1e-2, 0.1),
        c.dadapt_adamw(0.5, (0.8, 0.95), 1e-3, 1e-2, 0.1),
    ),
    "dadapt_adamw.schedule": (optfn.dadapt_adamw(SCHEDULE[0], estim_lr0=0.1), c.dadapt_adamw(SCHEDULE[1], estim_lr0=0.1)),
    "mechanize": (optfn.mechanize(optfn.adam(1.0)), c.mechanize(optax.adam(1.0))),
    "mechanize.options": (
        optfn.mechanize(optfn.sgd(SCHEDULE[0], 0.9), 0.1, 1e-3, 1e-2, 3),
        c.mechanize(optax.sgd(SCHEDULE[1], 0.9), 0.1, 1e-3, 1e-2, 3),
    ),
    "normalize_by_update_norm": (optfn.normalize_by_update_norm(-0.5, 1e-3), optax.normalize_by_update_norm(-0.5, 1e-3)),
}  # fmt: skip
FROM_LOSS = ("polyak", "momo")


def extras(name: str) -> list[dict[str, Any]]:
    return [{"value": x} if name.startswith(FROM_LOSS) else {} for x in LOSSES]


def ours(tx: optfn.GradientTransformation, params: Any, grads: list[Any], given: list[dict[str, Any]]) -> list[Any]:
    state, steps = tx.init(params), []
    for g, extra in zip(grads, given, strict=True):
        updates, state = tx.update(g, state, params, **extra)
        params = optfn.apply_updates(params, updates)
        steps.append({"updates": updates, "params": params})
    return steps


def theirs(tx: Any, params: Any, grads: list[Any], given: list[dict[str, Any]]) -> list[Any]:
    params, update = to_jax(params), jax.jit(tx.update)
    state, steps = tx.init(params), []
    for g, extra in zip(grads, given, strict=True):
        updates, state = update(to_jax(g), state, params, **extra)
        params = optax.apply_updates(params, updates)
        # Optax makes vectors of one entry of 0-dim leaves where it divides by its own sums of squares.
        params = {name: x.reshape(SHAPES[name]) for name, x in params.items()}
        updates = {name: x.reshape(SHAPES[name]) for name, x in updates.items()}
        steps.append(from_jax({"updates": updates, "params": params}))
    return steps


@pytest.mark.parametrize("name", PAIRS)
def test_trajectory_is_optaxs(name: str) -> None:
    # Not the gradients of 0 at the second step: Optax's D-Adaptation is NaN if the sums are 0, which is tested below.
    params, grads = some_params(shapes=SHAPES), some_grads(STEPS, shapes=SHAPES)
    mine, yours = PAIRS[name]
    for step, (a, b) in enumerate(
        zip(ours(mine, params, grads, extras(name)), theirs(yours, params, grads, extras(name)), strict=True)
    ):
        try:
            assert_close(a, b, 1e-12)
        except AssertionError as error:
            raise AssertionError(f"step {step}") from error


@pytest.mark.parametrize(
    ("kind", "sums"), [(("heuristic", 0.1), 3), (("distance", 0.1), 2), (("learning_rate", 0.1), 2), (None, 2)]
)
def test_the_size_of_the_parameters_is_computed_where_it_is_used(kind: Any, sums: int) -> None:
    """By DoG's heuristic alone; None is DoWG."""
    tx, p = optfn.scale_by_dowg() if kind is None else optfn.scale_by_dog(kind), torch.ones(3)
    step, graphs = counted(tx.update)
    step(p, tx.init(p), p)
    assert len(graphs) == 1
    called = [node for node in graphs[0].graph.nodes if node.op == "call_method" and node.target == "square"]
    assert len(called) == sums


def test_no_weight_decay_may_be_none() -> None:
    params, grads = some_params(shapes=SHAPES), some_grads(3, shapes=SHAPES)
    for make in (optfn.dog, optfn.dowg, optfn.schedule_free_sgd):
        a, b = (ours(make(0.1, weight_decay=decay), params, grads, [{}] * 3) for decay in (None, 0.0))
        assert_close(a, b, 0)


@pytest.mark.parametrize("name", ["prodigy", "dadapt_adamw"])
def test_a_mask_says_which_leaves_decay(name: str) -> None:
    """By the step size that is found: beside the rule without a decay, on the same parameters."""
    make, lr, betas, decay = getattr(optfn, name), 0.5, (0.8, 0.95), 0.1
    mask = {"matrix": True, "vector": False, "scalar": False, "cube": True}
    params, grads = some_params(shapes=SHAPES), some_grads(5, shapes=SHAPES)
    tx, plain = make(lr, betas, estim_lr0=0.1, weight_decay=decay, mask=mask), make(lr, betas, estim_lr0=0.1)
    state, other = tx.init(params), plain.init(params)
    for t, g in enumerate(grads, 1):
        updates, state = tx.update(g, state, params)
        wanted, other = plain.update(g, other, params)
        size = lr * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t)
        eta = size * tree.get(other, "last_estim_lr")
        wanted = {name: u - (eta * decay * params[name] if mask[name] else 0) for name, u in wanted.items()}
        assert_close(updates, wanted, 1e-12)
        assert_close(state, other, 0)
        params = optfn.apply_updates(params, updates)
    with pytest.raises(TypeError, match="mask: 'cube' must be a bool, got str"):
        make(weight_decay=decay, mask=lambda path, p: path).update(grads[0], state, params)


@pytest.mark.parametrize("name", ["prodigy", "dadapt_adamw"])
def test_gradients_of_zero_change_no_estimate(name: str) -> None:
    """Optax divides 0 by 0 there; the authors leave the estimate as it is."""
    params = some_params(shapes=SHAPES)
    zeros = tree.map(torch.zeros_like, params)
    mine, yours = PAIRS[name]
    updates, state = mine.update(zeros, mine.init(params), params)
    assert all(not u.any() for u in tree.leaves(updates))
    shared = tree.get(state, "shared")
    assert (shared.estim_lr.item(), shared.numerator_weighted.item()) == (1e-6, 0.0)
    _, state = yours.update(to_jax(zeros), yours.init(to_jax(params)), to_jax(params))
    assert jax.numpy.isnan(state.estim_lr)


def test_polyak_steps_to_the_minimum_of_a_parabola() -> None:
    """Half of the way a step: f / |g|**2 is 1/4 for the square."""
    tx, p = optfn.polyak_sgd(), torch.tensor([4.0, -8.0])
    for wanted in (2.0, 1.0, 0.5):
        updates, _ = tx.update(2 * p, tx.init(p), p, value=p.square().sum())
        p = optfn.apply_updates(p, updates)
        torch.testing.assert_close(p, torch.tensor([wanted, -2 * wanted]))


@pytest.mark.parametrize("make", [optfn.momo, optfn.momo_adam])
def test_uphill_is_downhill_of_the_negated_objective(make: Any) -> None:
    """Weight decay pulls to 0 in both."""
    params, grads = some_params(shapes=SHAPES), some_grads(5, shapes=SHAPES)
    down = ours(make(0.1, weight_decay=0.1), params, grads, extras("momo")[:5])
    up = ours(make(0.1, weight_decay=0.1, maximize=True), params, tree.scale(-1.0, grads), extras("momo")[:5])
    assert_close(up, down, 0)


# The lift


class Seen(NamedTuple):
    total: Any
    updates: Any = 0


class Slots(NamedTuple):
    kept: Tensor


def share(seen: list[Any] | None = None, **options: Any) -> optfn.GradientTransformation:
    """A gradient's share of the sum of all of them."""

    def measure(g: Tensor, slots: Slots, p: Any, step: Tensor, shared: Seen) -> tuple[tuple[Tensor, ...], Slots]:
        return (g.sum(), torch.ones_like(g).sum()), Slots(slots.kept + 1)

    def decide(shared: Seen, sums: tuple[Tensor, ...], **given: Any) -> Seen:
        if seen is not None:
            seen.append((sums, given))
        return Seen(sums[0], shared.updates + 1)

    def update(g: Tensor, slots: Slots, p: Any, step: Tensor, shared: Seen) -> tuple[Tensor, Slots]:
        return g / shared.total, Slots(10 * slots.kept)

    return optfn.coupled(lambda p: Slots(torch.zeros_like(p)), measure, decide, update, shared=Seen(0.0), **options)


def test_slots_go_through_both_passes() -> None:
    params = {"a": torch.zeros(2), "b": torch.zeros(())}
    tx, grads = share(), {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(5.0)}
    updates, state = tx.update(grads, tx.init(params))
    assert_close(updates, {"a": torch.tensor([1.0, 2.0]) / 8, "b": torch.tensor(5 / 8)}, 1e-7)
    assert state.slots.kept["a"].tolist() == [10.0, 10.0]
    updates, state = tx.update(grads, state)
    assert state.slots.kept["a"].tolist() == [110.0, 110.0]
    assert (state.shared.total.item(), state.shared.updates.item(), state.step.tolist()) == (8.0, 2, [2, 2])


def test_none_contributes_nothing_and_keeps_what_it_has() -> None:
    params = {"a": torch.zeros(2), "b": torch.zeros(2), "c": None}
    seen: list[Any] = []
    tx = share(seen)
    updates, state = tx.update({"a": torch.ones(2), "b": None, "c": None}, tx.init(params), params)
    assert updates["b"] is None
    assert [x.item() for x in seen[0][0]] == [2.0, 2.0]
    assert (state.step.tolist(), state.slots.kept["b"].tolist(), state.slots.kept["c"]) == ([1, 0, 0], [0.0, 0.0], ())
    updates, after = tx.update({"a": None, "b": None, "c": None}, state, params)
    assert (len(seen), after) == (1, state)


def test_a_leaf_that_had_no_parameter_is_an_error() -> None:
    tx = share()
    state = tx.init({"a": torch.zeros(2), "b": None})
    with pytest.raises(ValueError, match="share: 'b' has an update, but there was no parameter when the state was made"):
        tx.update({"a": torch.ones(2), "b": torch.ones(2)}, state)


@pytest.mark.parametrize(
    ("dtypes", "wide"),
    [
        ((torch.float32, torch.float64), torch.float64),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.complex64, torch.bfloat16), torch.float32),
        ((torch.complex128,), torch.float64),
    ],
    ids=str,
)
def test_dtypes(dtypes: tuple[torch.dtype, ...], wide: torch.dtype) -> None:
    """Sums and shared scalars in the widest dtype, updates and slots each in their own."""
    params = [torch.ones(2, dtype=dtype) for dtype in dtypes]
    seen: list[Any] = []
    tx = share(seen)
    state = tx.init(params)
    assert (state.shared.total.dtype, state.shared.updates.dtype) == (wide, torch.int64)
    updates, state = tx.update(params, state, params)
    assert {x.dtype for x in seen[0][0]} == {wide}
    assert (state.shared.total.dtype, state.shared.updates.dtype) == (wide, torch.int64)
    assert [x.dtype for x in updates] == [x.dtype for x in state.slots.kept] == [*dtypes]


def test_sums_are_one_vector_in_one_graph() -> None:
    params = {f"{i}": torch.ones(3) for i in range(5)}
    tx = share()
    step, graphs = counted(lambda g, s: tx.update(g, s))
    state = tx.init(params)
    for _ in range(3):
        _, state = step(params, state)
    assert len(graphs) == 1
    reduced = [n for n in graphs[0].graph.nodes if n.target == "sum" and n.args[1:] == (0,)]
    assert len(reduced) == 1, "the totals of all leaves and all sums are one reduction"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: optfn.dog(init_step=("far", 1.0)), ValueError, r"init_step\[0\] must be 'distance', 'learning_rate' or"),
        (lambda: optfn.dog(init_step=("distance", -1.0)), ValueError, r"init_step\[1\] must be >= 0, got -1.0"),
        (lambda: optfn.prodigy(estim_lr0=0.0), ValueError, "estim_lr0 must be > 0, got 0.0"),
        (lambda: optfn.prodigy(betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be >= 0 and < 1, got 1.0"),
        (lambda: optfn.polyak_sgd(variant="sps-"), ValueError, "variant must be 'sps' or 'sps\\+', got 'sps-'"),
        (lambda: optfn.dog(learning_rate=1.0), TypeError, "dog has no argument 'learning_rate': write lr="),
        (lambda: one_step(optfn.momo()), TypeError, r"scale_by_momo needs `value`: call update\(updates, state, value=...\)"),
        (lambda: one_step(optfn.scale_by_dog(("distance", 1.0)), params=None), TypeError, "scale_by_dog needs `params`"),
        (lambda: one_step(optfn.scale_by_dowg(), state=()), TypeError, "scale_by_dowg needs the state that its own init makes"),
        (lambda: one_step(share(extra=("value",))), TypeError, "share needs `value`"),
        (lambda: optfn.prodigy().init({"n": torch.ones(2, dtype=torch.int64)}), TypeError, "'n' must be a dense floating-point"),
    ],
)  # fmt: skip
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


PARAMS = {"a": torch.ones(2)}


def one_step(tx: optfn.GradientTransformation, state: Any = None, params: Any = PARAMS) -> Any:
    return tx.update(PARAMS, tx.init(PARAMS) if state is None else state, params)


@pytest.mark.parametrize("make", [optfn.polyak_sgd, optfn.momo, optfn.momo_adam])
def test_losses_of_examples_are_no_loss(make: Any) -> None:
    p = {"w": torch.ones(3, 2)}
    tx = make()
    with pytest.raises(ValueError, match=r"'value' must be a number or a 0-dim tensor, got shape \(2,\)"):
        tx.update(p, tx.init(p), p, value=torch.tensor([1.0, 100.0]))


def test_an_injected_lower_bound_acts() -> None:
    p = {"w": torch.ones(2)}
    bound = optfn.linear_schedule(0.0, 1.0, 5)
    tx = optfn.inject_hyperparams(optfn.momo)(lr=10.0, lower_bound=bound)
    state = tx.init(p)
    for i in range(4):
        _, state = tx.update(p, state, p, value=2.0)
        assert tree.get(state.inner_state, "lower_bound").item() == pytest.approx(bound(i))
