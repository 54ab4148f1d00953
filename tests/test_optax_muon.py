"""Muon in Optax's form, block and alias, against Optax; matrices in tensors of more dimensions."""

import inspect

import jax.numpy as jnp
import optax
import optax.contrib
import pytest
import torch
from optax_oracle import assert_close, from_jax, run, run_optax, some_grads, some_params, to_jax

import optfn
from optfn import MuonDimensionNumbers, tree

Theirs = optax.contrib.MuonDimensionNumbers
SHAPES = {"wide": (2, 5), "tall": (5, 3), "square": (3, 3)}
KERNELS = {"kernel": (4, 3, 2, 2), "heads": (2, 3, 4), "w": (3, 4)}
NUMBERS = {"kernel": ((1, 2, 3), 0), "heads": (-1, 1), "w": (0, 1)}
DION = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
MILD = (2.0, -1.5, 0.5)
"""Coefficients that converge: the default ones enlarge what rounding does to small singular values."""

# Arguments of both; the shapes.
BLOCKS = {
    "defaults": {},
    "numbers": {"ns_coeffs": MILD, "ns_steps": 7, "beta": 0.8, "eps": 1e-3},
    "no momentum": {"beta": 0.0},
    "no steps": {"ns_steps": 0, "eps": 0.1},
    "not nesterov": {"nesterov": False},
    "adaptive": {"adaptive": True},
    "a triple for each step": {"ns_coeffs": DION},
    "spectral": {"preconditioning": "spectral", "eps": 1e-3},
    "aol": {"preconditioning": "aol"},
    "aol, a triple for each step": {"preconditioning": "aol", "ns_coeffs": DION, "adaptive": True},
    "schatten": {"preconditioning": "schatten", "nesterov": False},
}


def test_arguments_are_optaxs():
    theirs, ours = (inspect.signature(f).parameters.values() for f in (optax.contrib.scale_by_muon, optfn.scale_by_muon))
    assert [(p.name, p.default, p.kind) for p in ours][: len(theirs)] == [(p.name, p.default, p.kind) for p in theirs]
    assert [p.default for p in inspect.signature(MuonDimensionNumbers).parameters.values()] == [0, 1]


@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_is_optaxs(name):
    """Each leaf has its dimension numbers: without them Optax takes a bare matrix only."""
    shapes = SHAPES | KERNELS
    numbers = {key: NUMBERS.get(key, (0, 1)) for key in shapes}
    params, grads = some_params(shapes=shapes), some_grads(25, shapes=shapes)
    theirs = optax.contrib.scale_by_muon(**BLOCKS[name], weight_dimension_numbers={k: Theirs(*n) for k, n in numbers.items()})
    ours = {k: MuonDimensionNumbers(*n) for k, n in numbers.items()}
    expected, _ = run_optax(theirs, params, grads)
    for given in (ours, lambda path, p: ours[path]):
        found = run(optfn.scale_by_muon(**BLOCKS[name], weight_dimension_numbers=given), params, grads)[0]
        assert_close(found, expected, 1e-12)
    matrices = optfn.masked(optfn.scale_by_muon(**BLOCKS[name]), lambda path, p: path in SHAPES)
    only = [{kind: {key: x[kind][key] for key in SHAPES} for kind in x} for x in run(matrices, params, grads)[0]]
    assert_close(only, [{kind: {key: x[kind][key] for key in SHAPES} for kind in x} for x in expected], 1e-12)


def test_the_average_has_its_dtype():
    params, grads = some_params(shapes=SHAPES), some_grads(25, shapes=SHAPES)
    numbers = dict.fromkeys(SHAPES, Theirs())
    theirs = optax.contrib.scale_by_muon(MILD, mu_dtype=jnp.float32, weight_dimension_numbers=numbers)
    (expected, state), (found, ours) = (
        run_optax(theirs, params, grads),
        run(optfn.scale_by_muon(MILD, mu_dtype=torch.float32), params, grads),
    )
    assert {x.dtype for x in tree.leaves(ours.slots.mu)} == {torch.float32}
    assert_close(ours.slots.mu, from_jax(state.mu), 1e-6)
    assert_close(found, expected, 1e-5)  # of singular values near 0 the last digits are those of float32


def test_optax_takes_no_tree_without_dimension_numbers_and_refuses_more_triples_than_steps():
    """Why these differ: when Optax takes them, compare them above."""
    params = to_jax(some_params(shapes=SHAPES))
    theirs = optax.contrib.scale_by_muon()
    with pytest.raises(ValueError, match="pytree structure error"):
        theirs.update(params, theirs.init(params), params)
    with pytest.raises(ValueError, match="Not enough coeffs"):
        optax.contrib.scale_by_muon(DION, 4).init(params)
    given = torch.ones(2, 3)
    of_four, of_five = (optfn.scale_by_muon(DION, n) for n in (4, 5))
    assert_close(of_four.update(given, of_four.init(given))[0], of_five.update(given, of_five.init(given))[0], 0)


def as_optax_muon(
    lr, *args, weight_decay=0.0, numbers=None, adam=(0.9, 0.999, 0.0, 0.0), adam_lr=None, rms=None, mask=None, eps=1e-8, **options
):
    """The recipe of docs/from-optax.md."""
    layout = numbers or MuonDimensionNumbers()
    b1, b2, eps_root, adam_decay = adam
    return optfn.partition(
        {
            "muon": optfn.chain(
                optfn.scale_by_muon(*args, eps=eps, weight_dimension_numbers=layout, **options),
                optfn.scale_by_shape(weight_dimension_numbers=layout, consistent_rms=rms),
                optfn.add_decayed_weights(weight_decay, mask),
                optfn.scale_by_learning_rate(lr),
            ),
            "adam": optfn.nadamw(lr if adam_lr is None else adam_lr, (b1, b2), eps, adam_decay, eps_root=eps_root),
        },
        lambda path, p: "muon" if (numbers and path in NUMBERS and path != "w") or (not numbers and p.ndim == 2) else "adam",
    )


def test_the_alias_of_optax_is_the_recipe():
    shapes = {"w": (3, 4), "tall": (5, 2), "b": (4,), "heads": (2, 3, 4), "s": ()}
    params, grads = some_params(shapes=shapes), some_grads(25, shapes=shapes)
    mask = {"w": True, "tall": False, "b": False, "heads": False, "s": False}
    for ours, theirs in (
        (as_optax_muon(0.1), optax.contrib.muon(0.1)),
        (
            as_optax_muon(0.1, MILD, 4, weight_decay=0.1, mask=mask, rms=0.2, adam=(0.8, 0.9, 1e-4, 0.05), adam_lr=0.01, eps=1e-4),
            optax.contrib.muon(
                *(0.1, MILD, 4, 0.95, 1e-4, 0.1, mask),
                adam_b1=0.8,
                adam_b2=0.9,
                adam_eps_root=1e-4,
                adam_weight_decay=0.05,
                adam_learning_rate=0.01,
                consistent_rms=0.2,
            ),
        ),
        (as_optax_muon(0.1, DION, preconditioning="aol"), optax.contrib.muon(0.1, "dion", preconditioning="aol")),
    ):
        assert_close(run(ours, params, grads)[0], run_optax(theirs, params, grads)[0], 1e-12)


def test_the_alias_of_optax_with_dimension_numbers():
    params, grads = some_params(shapes=KERNELS), some_grads(25, shapes=KERNELS)
    given = {k: Theirs(*NUMBERS[k]) if k != "w" else None for k in KERNELS}
    theirs = optax.contrib.muon(0.1, muon_weight_dimension_numbers=given, adaptive=True)
    ours = as_optax_muon(0.1, numbers=lambda path, p: MuonDimensionNumbers(*NUMBERS[path]), adaptive=True)
    assert_close(run(ours, params, grads)[0], run_optax(theirs, params, grads)[0], 1e-12)


def test_each_matrix_of_a_batch_is_made_orthogonal_by_itself():
    given = some_params(shapes={"x": (4, 3, 5)})["x"]
    tx = optfn.scale_by_muon((1.5, -0.5, 0.0), 60, beta=0.0, weight_dimension_numbers=MuonDimensionNumbers(1, 2))
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    assert_close(tx.update(given, tx.init(given))[0], u @ v, 1e-12)


@pytest.mark.parametrize("preconditioning", ["frobenius", "spectral", "aol", "schatten"])
def test_derivatives_are_finite_at_zero(preconditioning):
    tx = optfn.scale_by_muon(preconditioning=preconditioning, adaptive=True)
    zero = torch.zeros(2, 3, dtype=torch.float64)
    derivative = torch.func.jacrev(lambda g: tx.update(g, tx.init(zero))[0])(zero)
    assert derivative.isfinite().all()


def test_what_is_refused():
    x = {"x": torch.ones(2, 3, 4), "b": torch.ones(2)}
    for numbers, message in (
        (MuonDimensionNumbers(), r"\(0, 1\) are no rows and columns of a tensor of shape \(2,\)"),
        (MuonDimensionNumbers(0, 0), "are no rows and columns"),
        (MuonDimensionNumbers(0, 5), "are no rows and columns"),
        (MuonDimensionNumbers((), 0), "are no rows and columns"),
    ):
        for tx in (optfn.scale_by_muon(weight_dimension_numbers=numbers), optfn.scale_by_shape(weight_dimension_numbers=numbers)):
            with pytest.raises(ValueError, match=message):
                tx.init(x)
    with pytest.raises(
        TypeError, match=r"weight_dimension_numbers: 'b' must have MuonDimensionNumbers, got NoneType: optfn.partition"
    ):
        optfn.scale_by_muon(weight_dimension_numbers={"x": MuonDimensionNumbers(), "b": None}).init(x)
    with pytest.raises(TypeError, match=r"weight_dimension_numbers: the function is called .* path, p: .*give what it returns"):
        optfn.scale_by_muon(weight_dimension_numbers=lambda params: {"x": MuonDimensionNumbers()}).init(x)
    with pytest.raises(ValueError, match=r"^preconditioning must be 'frobenius'"):
        optfn.scale_by_muon(preconditioning="none")
    with pytest.raises(ValueError, match=r"^ns_coeffs must be 3 numbers"):
        optfn.scale_by_muon(((1.0, 2.0, 3.0), (1.0, 2.0)))
    with pytest.raises(ValueError, match=r"^adjust_lr_fn='original' has no consistent_rms$"):
        optfn.scale_by_shape("original", consistent_rms=0.1)


def test_shapes_in_both_layouts():
    given = {"w": torch.ones(2, 8), "kernel": torch.ones(8, 2, 1, 1)}
    tx = optfn.scale_by_shape(weight_dimension_numbers={"w": MuonDimensionNumbers(), "kernel": MuonDimensionNumbers((1, 2, 3), 0)})
    updates, _ = tx.update(given, tx.init(given))
    assert_close(updates, tree.map(lambda x: 2 * x, given), 1e-7)
    assert_close(
        optfn.scale_by_shape(consistent_rms=0.2).update(given["w"], ())[0],
        optfn.scale_by_shape("match_rms_adamw").update(given["w"], ())[0],
        0,
    )
