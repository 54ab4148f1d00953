"""What single algorithms do beyond torch's table: special shapes, low precision, averages, sparse gradients, derivatives."""

from collections.abc import Callable
from functools import partial
from typing import Any

import optax
import pytest
import torch
from optax_oracle import assert_close, run, run_optax, some_grads, some_params
from oracle import ORACLES, Problem, TorchOptim, check, follow, problem
from torch import Tensor, optim

import optfn
from optfn import tree

MATRICES = {"tall": (9, 2), "wide": (2, 9), "square": (4, 4), "row": (1, 5), "column": (5, 1), "one": (1, 1)}
BATCHES = {"3d": (3, 4, 5), "4d": (2, 1, 3, 4), "ones": (1, 1, 1), "column": (6, 1), "row": (1, 6)}


def shaped(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float64, size: float = 1.0) -> Problem:
    params = some_params(dtype, shapes)
    return Problem(params, [tree.map(lambda g: size * g, g) for g in some_grads(8, dtype, shapes)])


def agrees(cls: type, kwargs: dict[str, Any], given: Problem) -> None:
    follow(partial(TorchOptim, cls, kwargs), ORACLES[cls].transformation(kwargs), given, states=ORACLES[cls].states)


# Muon


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"adjust_lr_fn": "match_rms_adamw", "lr": 0.1}, {"nesterov": False}], ids=str)
def test_muon_of_any_matrix_is_torchs(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    agrees(optim.Muon, kwargs, shaped(MATRICES, dtype))


@pytest.mark.parametrize("shape", MATRICES.values(), ids=MATRICES)
def test_muon_with_coefficients_that_converge_is_the_polar_factor(shape: tuple[int, ...]) -> None:
    """The nearest matrix with orthonormal rows or columns, from the singular value decomposition."""
    g = shaped({"w": shape}).gradients[3]["w"]
    assert g is not None
    tx = optfn.scale_by_muon((1.5, -0.5, 0.0), 60, beta=0.0)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    assert_close(tx.update(g, tx.init(g))[0], u @ v, 1e-12)


@pytest.mark.parametrize(("how", "shape", "factor"), [(None, (8, 2), 2), ("original", (2, 8), 1), ("match_rms_adamw", (4, 25), 1)])
def test_scale_by_shape(how: Any, shape: tuple[int, ...], factor: float) -> None:
    assert_close(optfn.scale_by_shape(how).update(torch.ones(shape), ())[0], torch.full(shape, float(factor)), 1e-7)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_in_bfloat16(nesterov: bool) -> None:
    """The average is rounded once a step. (torch's is overwritten without nesterov.)"""
    given = shaped(MATRICES, torch.bfloat16)
    wide = tree.cast(given.params, torch.float32)
    tx = optfn.muon(lr=0.1, nesterov=nesterov)
    state, wide_state = tx.init(given.params), tx.init(wide)
    average = tree.map(torch.zeros_like, wide)
    for g in given.gradients:
        updates, state = tx.update(g, state, given.params)
        wide_updates, wide_state = tx.update(tree.cast(g, torch.float32), wide_state, wide)
        assert {u.dtype for u in tree.leaves(updates)} == {torch.bfloat16}
        average = tree.map(lambda a, g: torch.lerp(a, g.float(), 1 - 0.95).bfloat16().float(), average, g)
        assert_close(tree.get(state, "mu"), average, 1e-6)
    size = {name: u.float().norm() for name, u in wide_updates.items()}
    for name, u in updates.items():  # of the same direction, but for what 8 digits lose in a conditioned matrix
        assert torch.sum(u.float() * wide_updates[name].float()) > 0.97 * size[name] * u.float().norm(), name


def test_muon_takes_matrices_alone() -> None:
    params = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    with pytest.raises(ValueError, match=r"^scale_by_muon: 'b': Muon takes matrices, got shape \(2,\): .* optfn\.partition$"):
        optfn.muon().init(params)
    with pytest.raises(ValueError, match=r"got shape \(2,\): .* optfn\.partition$"):
        optfn.scale_by_shape().update(params, ())
    with pytest.raises(TypeError, match=r"^scale_by_muon: 'w' is complex, which scale_by_muon does not take"):
        optfn.muon().init({"w": torch.ones(2, 2, dtype=torch.complex64)})
    with pytest.raises(TypeError, match=r"^scale_by_shape: 'w' is complex"):
        optfn.scale_by_shape().update({"w": torch.ones(2, 2, dtype=torch.complex64)}, ())
    tx = optfn.partition({"m": optfn.muon(), "v": optfn.adamw()}, lambda path, p: "m" if p.ndim == 2 else "v")
    updates, _ = tx.update(params, tx.init(params), params)
    for name, alone in (("w", optfn.muon()), ("b", optfn.adamw())):
        assert_close(updates[name], alone.update(params[name], alone.init(params[name]), params[name])[0], 0)


def test_muon_ascends() -> None:
    given = shaped(MATRICES)
    follow(
        partial(TorchOptim, optim.Muon, {"lr": 0.1}),
        optfn.chain(optfn.scale(-1.0), optfn.muon(0.1, maximize=True)),
        given,
        states={"momentum_buffer": "mu"},
    )


# Adafactor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"lr": 1.0, "d": 1.5, "weight_decay": 0.1}], ids=str)
def test_adafactor_of_batches_of_matrices_is_torchs(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    agrees(optim.Adafactor, kwargs, shaped(BATCHES, dtype))


def test_adafactor_factors_exactly_what_has_rank_one() -> None:
    """The second moment of a matrix whose squares are a product of a row and a column is that product."""
    row, col = torch.tensor([[1.0], [3.0]], dtype=torch.float64), torch.tensor([[2.0, 5.0, 7.0]], dtype=torch.float64)
    whole, factored = optfn.scale_by_factored_rms(), optfn.scale_by_factored_rms()
    g = row * col
    assert_close(
        factored.update(g, factored.init(g))[0], whole.update(g.flatten(), whole.init(g.flatten()))[0].reshape(2, 3), 1e-12
    )


def test_adafactor_is_optaxs_with_its_epsilon_at_nothing() -> None:
    """Optax factors the two largest dimensions, from a size on, adds its epsilon to the squares, and has decays in float32."""
    shapes = {"w": (3, 2), "tall": (5, 4), "b": (4,)}
    grads = [tree.map(lambda g: g + 1.0, g) for g in some_grads(shapes=shapes)]
    theirs = optax.scale_by_factored_rms(
        decay_rate=0.6, min_dim_size_to_factor=1, epsilon=0.0, decay_rate_fn=lambda i, c: 1 - (i + 1.0) ** -c
    )
    expected, _ = run_optax(theirs, some_params(shapes=shapes), grads)
    assert_close(run(optfn.scale_by_factored_rms(-0.6, 0.0), some_params(shapes=shapes), grads)[0], expected, 1e-12)


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_adafactor_in_bfloat16(size: float) -> None:
    """Against torch with the epsilon given: as torch rounds every intermediate to 8 bits, to some of these."""
    given = shaped({"w": (6, 4), "b": (5,)}, torch.bfloat16, size)
    eps = torch.finfo(torch.bfloat16).eps
    tx, params = optfn.adafactor(0.1, eps=(eps, 1e-3)), given.params
    theirs = [p.clone() for p in params.values()]
    reference, state = TorchOptim(optim.Adafactor, {"lr": 0.1}, theirs), tx.init(params)
    for g in given.gradients:
        reference.step([None if x is None else x.clone() for x in g.values()])
        updates, state = tx.update(g, state, params)
        params = optfn.apply_updates(params, updates)
    for name, p in zip(params, theirs, strict=True):
        moved = (p.float() - given.params[name].float()).norm()
        assert moved > 0
        assert (params[name].float() - p.float()).norm() < 0.05 * moved + 4 * eps * p.float().norm(), name
    assert {x.dtype for x in tree.leaves(tree.get(state, "v_row"))} == {torch.bfloat16}


def test_adafactor_scales_small_gradients_up_in_bfloat16() -> None:
    """The default epsilon is that of the dtype of the computation, so 1e-3, below that of bfloat16, is no small gradient."""
    g = torch.full((4, 4), 1e-3, dtype=torch.bfloat16)
    tx = optfn.scale_by_factored_rms()
    assert_close(tx.update(g, tx.init(g))[0], torch.ones(4, 4), 2**-8)


# ASGD


def averaged(lr: Any, lambd: Any, grads: list[Tensor], p: Tensor, alpha: float = 0.75, t0: float = 2.0) -> tuple[Tensor, Tensor]:
    """The parameter and its average in closed form, in float64."""
    path = []
    for t, g in enumerate(grads):
        eta = lr / (1 + lambd * lr * t) ** alpha
        p = p - eta * (g + lambd * p)
        path.append(p)
    return p, torch.stack(path[int(t0) + 1 :]).mean(0)  # from step t0 + 2 on, counted from 1


def test_asgd_averages_what_came_after_t0() -> None:
    params = {"w": torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), "b": torch.ones(2)}
    grads = [torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    tx, p = optfn.asgd(0.25, 0.5, t0=2), params
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update({"w": g, "b": None}, state, p)
        p = optfn.apply_updates(p, updates)
    expected, average = averaged(0.25, 0.5, grads, params["w"])
    assert_close(p["w"], expected, 1e-6)  # the step sizes are float32 numbers
    assert_close(tree.get(state, "ax")["w"], average, 1e-6)
    assert torch.equal(tree.get(state, "ax")["b"], params["b"])  # what has no gradient is its own average


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.parametrize("name", ["lr", "lambd"])
def test_asgd_is_differentiable_in_its_numbers(name: str, transform: Callable[..., Any]) -> None:
    start = torch.ones(3, dtype=torch.float64)
    grads = [torch.arange(3.0, dtype=torch.float64) - i for i in range(6)]

    def ours(h: Tensor) -> Tensor:
        tx, p = optfn.asgd(**{"lr": 0.1, "lambd": 0.1, "t0": 2, name: h}), start
        state = tx.init(p)
        for g in grads:
            updates, state = tx.update(g, state, p)
            p = optfn.apply_updates(p, updates)
        return torch.stack([p, tree.get(state, "ax")])

    def expected(h: Tensor) -> Tensor:
        return torch.stack(averaged(**{"lr": 0.1, "lambd": 0.1, name: h}, grads=grads, p=start))

    h = torch.tensor(0.1, dtype=torch.float64)
    assert_close(transform(ours)(h), transform(expected)(h), 1e-6)


# NAdam


def test_nadam_is_differentiable_in_b1() -> None:
    grads = [torch.arange(3.0, dtype=torch.float64) - i / 2 for i in range(5)]

    def ours(b1: Tensor) -> Tensor:
        tx = optfn.scale_by_nadam(b1)
        state = tx.init(grads[0])
        for g in grads:
            u, state = tx.update(g, state)
        return u

    def expected(b1: Tensor) -> Tensor:
        m, v, product = torch.zeros(3), torch.zeros(3), 1.0
        for t, g in enumerate(grads, 1):
            mu, ahead = (b1 * (1 - 0.5 * 0.96 ** (s * 0.004)) for s in (t, t + 1))
            m, v, product = b1 * m + (1 - b1) * g, 0.999 * v + 0.001 * g**2, product * mu
            u = ((1 - mu) * g / (1 - product) + ahead * m / (1 - product * ahead)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        return u

    b1 = torch.tensor(0.9, dtype=torch.float64)
    assert_close(torch.func.jacrev(ours)(b1), torch.func.jacrev(expected)(b1), 1e-6)


# RAdam


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_radam_rectifies_from_the_step_that_torch_does(dtype: torch.dtype) -> None:
    """b2 sets when; where it is 0.6 or less, never. In float32 the differences of large numbers keep their digits."""
    for b2 in (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 0.999, 0.9999):
        agrees(optim.RAdam, {"lr": 0.05, "betas": (0.9, b2)}, problem(dtype))


# Rprop


def test_rprop_decays_by_l2() -> None:
    """torch's has no decay: it is given the gradients with it."""
    given = problem(torch.float64)
    theirs = [p.clone() for p in given.params.values()]
    reference, tx, params = TorchOptim(optim.Rprop, {}, theirs), optfn.rprop(weight_decay=0.3), given.params
    state = tx.init(params)
    for gradients in given.gradients:
        reference.step([g + 0.3 * p for g, p in zip(gradients.values(), theirs, strict=True) if g is not None])
        updates, state = tx.update(gradients, state, params)
        params = optfn.apply_updates(params, updates)
        for name, p in zip(params, theirs, strict=True):
            check(params[name], p, name)


# All of them

NEW = {
    "adadelta": optfn.adadelta,
    "adamax": optfn.adamax,
    "nadam": optfn.nadam,
    "radam": optfn.radam,
    "rprop": optfn.rprop,
    "asgd": optfn.asgd,
    "adafactor": optfn.adafactor,
    "muon": optfn.muon,
}


@pytest.mark.parametrize("name", NEW)
def test_injected_numbers_do_what_given_ones_do(name: str) -> None:
    """Muon's coefficients are multiplied apart where they are tensors, which rounds differently in bfloat16."""
    given = shaped(MATRICES)
    options = {"ns_dtype": torch.float64} if name == "muon" else {}
    steps, _ = run(optfn.inject_hyperparams(NEW[name])(lr=0.1, **options), given.params, given.gradients)
    assert_close(steps, run(NEW[name](lr=0.1, **options), given.params, given.gradients)[0], 1e-12)


@pytest.mark.parametrize("name", ["rprop", "asgd", "adafactor"])
def test_a_schedule_inside_a_rule_is_in_the_state(name: str) -> None:
    given = shaped(MATRICES)
    tx = NEW[name](optfn.linear_schedule(0.4, 0.0, 8))
    _, state = run(tx, given.params, given.gradients[:3])
    assert tree.get(state, "lr").item() == pytest.approx(0.3)
    with pytest.raises(ValueError, match="'lr' is computed at each step"):
        tree.set(state, lr=0.1)
    assert not optfn.is_elementwise(tx) or name == "rprop"


def rows(k: int, t: int) -> Tensor:
    generator = torch.Generator().manual_seed(t)
    index = torch.randperm(6, generator=generator)[:k]
    values = torch.randn(k, 3, dtype=torch.float64, generator=generator)
    return torch.sparse_coo_tensor(index[None], values, (6, 3), check_invariants=True)


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("name", ["adadelta", "adamax", "nadam", "radam", "rprop"])
def test_on_sparse_gradients(name: str, bare: bool) -> None:
    """Rows that a gradient holds move as in a dense tensor of theirs; what is one number a tensor moves at every step."""
    start = torch.ones(6, 3, dtype=torch.float64)

    def build(x: Any) -> Any:
        return x if bare else {"w": x, "other": None}

    dense, sparse = NEW[name](), optfn.sparse_masked(NEW[name]())
    everything = [rows(6, t) for t in range(5)]
    expected, whole = run(dense, build(start), [build(g.to_dense()) for g in everything])
    steps, state = run(sparse, build(start), [build(g) for g in everything])
    assert_close([s["params"] for s in steps], [s["params"] for s in expected], 1e-12)
    assert_close(state, whole, 1e-12)
    # Some rows, then none: the state of the others stays, and only numbers move without any.
    before = state
    for k in (2, 0):
        g = rows(k, 9)
        touched = torch.zeros(6, 1, dtype=torch.bool).index_fill(0, g.coalesce().indices()[0], True)
        _, after = sparse.update(build(g), before, build(start))
        _, full = dense.update(build(g.to_dense()), before, build(start))

        def held(x: Tensor, new: Tensor, old: Tensor, touched: Tensor = touched) -> None:
            assert torch.equal(x, torch.where(touched, new, old) if x.shape == (6, 3) else new)

        tree.map(held, after, full, before)
        before = after


def test_asgd_does_not_run_on_some_of_the_entries() -> None:
    with pytest.raises(ValueError, match="sparse_masked takes an elementwise transformation, which chain is not"):
        optfn.sparse_masked(optfn.asgd())


def test_nothing_is_complex_to_adafactor() -> None:
    z = {"w": torch.ones(2, 2, dtype=torch.complex64)}
    with pytest.raises(TypeError, match=r"^scale_by_factored_rms: 'w' is complex, which .* pass torch\.view_as_real of it$"):
        optfn.adafactor().init(z)
    tx = optfn.scale_by_factored_rms()
    with pytest.raises(TypeError, match=r"^scale_by_factored_rms: 'w' is complex"):
        tx.update(z, tx.init({"w": torch.ones(2, 2)}))
