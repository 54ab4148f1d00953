"""Blocks against Optax, clipping against torch.nn.utils."""

import jax.numpy as jnp
import optax
import pytest
import torch
from optax_oracle import TOLERANCE, assert_close, counted, exact, run, run_optax, some_grads, some_params

import optfn

MASK = {"w": True, "b": False, "s": False}


def by_chain(*links, lr):
    """An Optax alias put together from blocks."""
    return optfn.chain(*links, optfn.scale_by_learning_rate(lr))


# Name: ours, Optax's.
PAIRS = {
    "adam": (optfn.scale_by_adam(), optax.scale_by_adam()),
    "adam: all numbers": (optfn.scale_by_adam(0.8, 0.95, 1e-6, 1e-3), optax.scale_by_adam(0.8, 0.95, 1e-6, 1e-3)),
    "adam: b1=0": (optfn.scale_by_adam(0.0, 0.95), optax.scale_by_adam(0.0, 0.95)),
    "adam: nesterov": (optfn.scale_by_adam(nesterov=True), optax.scale_by_adam(nesterov=True)),
    "amsgrad": (optfn.scale_by_adam(0.8, 0.9, amsgrad="debiased"), optax.scale_by_amsgrad(0.8, 0.9)),
    "amsgrad: eps_root": (
        optfn.scale_by_adam(b2=0.9, eps_root=1e-4, amsgrad="debiased"),
        optax.scale_by_amsgrad(b2=0.9, eps_root=1e-4),
    ),
    "rms": (optfn.scale_by_rms(), optax.scale_by_rms()),
    "rms: eps outside": (optfn.scale_by_rms(0.8, 1e-3, eps_in_sqrt=False), optax.scale_by_rms(0.8, 1e-3, eps_in_sqrt=False)),
    "rms: corrected": (optfn.scale_by_rms(0.95, bias_correction=True), optax.scale_by_rms(0.95, bias_correction=True)),
    "rms: initial scale": (optfn.scale_by_rms(initial_scale=0.5), optax.scale_by_rms(initial_scale=0.5)),
    # An eps above the rounding errors of nu - mu^2, which would otherwise be all that is compared.
    "centered": (optfn.scale_by_rms(0.9, 1e-2, centered=True), optax.scale_by_stddev(0.9, 1e-2)),
    "centered: eps outside, corrected, initial scale": (
        optfn.scale_by_rms(0.8, 1e-2, 0.5, False, True, centered=True),
        optax.scale_by_stddev(0.8, 1e-2, 0.5, False, True),
    ),
    "rss": (optfn.scale_by_adagrad(0.1, 1e-7, eps_in_sqrt=True), optax.scale_by_rss()),
    "rss: from zero": (optfn.scale_by_adagrad(0.0, 1e-3, eps_in_sqrt=True), optax.scale_by_rss(0.0, 1e-3)),
    "adadelta": (optfn.scale_by_adadelta(), optax.scale_by_adadelta()),
    "adadelta: all numbers": (optfn.scale_by_adadelta(0.7, 1e-2), optax.scale_by_adadelta(0.7, 1e-2)),
    "adamax": (optfn.scale_by_adamax(), optax.scale_by_adamax()),
    "adamax: all numbers": (optfn.scale_by_adamax(0.8, 0.7, 1e-3), optax.scale_by_adamax(0.8, 0.7, 1e-3)),
    "radam": (optfn.scale_by_radam(), optax.scale_by_radam()),
    "radam: all numbers": (
        optfn.scale_by_radam(0.8, 0.95, 1e-3, 1e-4, 4.0),
        optax.scale_by_radam(0.8, 0.95, 1e-3, 1e-4, threshold=4.0),
    ),
    "param_block_rms": (optfn.scale_by_param_block_rms(), optax.scale_by_param_block_rms()),
    "param_block_rms: min_scale": (optfn.scale_by_param_block_rms(2.0), optax.scale_by_param_block_rms(2.0)),
    "trace": (optfn.trace(0.9), optax.trace(0.9)),
    "trace: nesterov": (optfn.trace(0.8, nesterov=True), optax.trace(0.8, nesterov=True)),
    "decay": (optfn.add_decayed_weights(0.1), optax.add_decayed_weights(0.1)),
    "decay: mask": (optfn.add_decayed_weights(0.1, MASK), optax.add_decayed_weights(0.1, MASK)),
    "clip": (optfn.clip(0.3), optax.clip(0.3)),
    "clip_by_global_norm": (optfn.clip_by_global_norm(0.5), optax.clip_by_global_norm(0.5)),
    "clip_by_block_rms": (optfn.clip_by_block_rms(0.4), optax.clip_by_block_rms(0.4)),
    "scale": (optfn.scale(-0.3), optax.scale(-0.3)),
    "schedule": (
        optfn.scale_by_schedule(optfn.linear_schedule(1.0, -1.0, 8)),
        optax.scale_by_schedule(exact(optax.linear_schedule(1.0, -1.0, 8))),
    ),
    "learning rate": (optfn.scale_by_learning_rate(0.1), optax.scale_by_learning_rate(0.1)),
    "learning rate: schedule, uphill": (
        optfn.scale_by_learning_rate(optfn.cosine_decay_schedule(0.1, 7), flip_sign=False),
        optax.scale_by_learning_rate(exact(optax.cosine_decay_schedule(0.1, 7)), flip_sign=False),
    ),
    "optax.sgd": (
        by_chain(optfn.trace(0.9, nesterov=True), lr=optfn.exponential_decay(0.1, 3, 0.7)),
        optax.sgd(exact(optax.exponential_decay(0.1, 3, 0.7)), momentum=0.9, nesterov=True),
    ),
    "optax.adamw": (
        by_chain(optfn.scale_by_adam(0.85, 0.98, eps_root=1e-6), optfn.add_decayed_weights(0.2, MASK), lr=0.05),
        optax.adamw(0.05, 0.85, 0.98, eps_root=1e-6, weight_decay=0.2, mask=MASK),
    ),
    "optax.adadelta": (
        optfn.adadelta(0.5, weight_decay=0.1),
        optax.chain(optax.add_decayed_weights(0.1), optax.adadelta(0.5, eps=1e-6)),
    ),
    "optax.adamax": (optfn.adamax(0.05), optax.adamax(0.05)),
    "optax.adamaxw": (
        by_chain(optfn.scale_by_adamax(), optfn.add_decayed_weights(0.2, MASK), lr=0.05),
        optax.adamaxw(0.05, weight_decay=0.2, mask=MASK),
    ),
    "optax.radam": (by_chain(optfn.scale_by_radam(0.9, 0.99), lr=0.05), optax.radam(0.05, 0.9, 0.99)),
    "optax.nadamw": (
        by_chain(optfn.scale_by_adam(nesterov=True), optfn.add_decayed_weights(1e-4), lr=0.05),
        optax.nadamw(0.05),
    ),
    "optax.amsgrad": (by_chain(optfn.scale_by_adam(amsgrad="debiased"), lr=0.05), optax.amsgrad(0.05)),
    "optax.adagrad": (by_chain(optfn.scale_by_adagrad(0.1, 1e-7, eps_in_sqrt=True), lr=0.05), optax.adagrad(0.05)),
    # Optax's momentum is of the scaled update: the trace comes after the learning rate.
    "optax.rmsprop": (
        optfn.chain(by_chain(optfn.scale_by_rms(0.8), lr=optfn.linear_schedule(0.1, 0.0, 10)), optfn.trace(0.9)),
        optax.rmsprop(exact(optax.linear_schedule(0.1, 0.0, 10)), 0.8, momentum=0.9),
    ),
    "clip, then adam": (
        optfn.chain(optfn.clip_by_global_norm(1.0), optfn.scale_by_adam(), optfn.scale(-0.1)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale(-0.1)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_trajectory_is_optax(name):
    ours, theirs = PAIRS[name]
    expected, _ = run_optax(theirs, some_params(), some_grads())
    for dtype, tolerance in TOLERANCE.items():
        steps, _ = run(ours, some_params(dtype), some_grads(dtype=dtype))
        assert all(u.dtype == dtype for step in steps for u in optfn.tree.leaves(step))
        assert_close(steps, expected, tolerance)


@pytest.mark.parametrize(
    ("ours", "theirs", "name"),
    [
        (optfn.scale_by_adam(mu_dtype=torch.float32), optax.scale_by_adam(mu_dtype=jnp.float32), "mu"),
        (optfn.trace(0.9, accumulator_dtype=torch.float32), optax.trace(0.9, accumulator_dtype=jnp.float32), "trace"),
    ],
)
def test_dtype_of_a_slot(ours, theirs, name):
    steps, state = run(ours, some_params(), some_grads())
    expected, _ = run_optax(theirs, some_params(), some_grads())
    assert_close(steps, expected, 1e-6)  # a slot in float32 is what either of them rounds
    assert {x.dtype for x in optfn.tree.leaves(optfn.tree.get(state, name))} == {torch.float32}
    assert {u.dtype for u in optfn.tree.leaves(steps)} == {torch.float64}


def mixed_grads():
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    return {
        "single": torch.randn(4, generator=generator),
        "none": None,
        "double": torch.randn(2, 2, generator=generator, dtype=torch.float64),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "complex": torch.randn(3, generator=generator, dtype=torch.complex128),
        "sparse": torch.sparse_coo_tensor(torch.tensor([[3, 0]]), rows, (5, 3), check_invariants=True).coalesce(),
    }


def clipped_by_torch(grads, clip, *args):
    owners = {}
    for name, g in grads.items():
        owners[name] = torch.nn.Parameter(torch.zeros(()) if g is None else torch.zeros(g.shape, dtype=g.dtype))
        owners[name].grad = None if g is None else g.to_dense().clone()  # torch does not take sparse ones
    norm = clip(list(owners.values()), *args, foreach=False)
    return {name: p.grad for name, p in owners.items()}, norm


# torch scales in the gradient's dtype, bfloat16, by a factor rounded to it; we round once.
STEP = {torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-6, torch.complex128: 1e-6}


@pytest.mark.parametrize("max_norm", [0.0, 0.7, 1e6])
@pytest.mark.parametrize("factor", [1.0, 0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("without", ["sparse", "complex", None])
def test_clip_by_global_norm_is_clip_grad_norm(max_norm, factor, without):
    grads = {name: None if g is None else g * factor for name, g in mixed_grads().items() if name != without}
    if factor == 1:
        # torch takes the norm of a half-precision tensor in half precision: one that is exact there can be compared.
        grads["half"] = torch.tensor([3.0, 4.0, 0.0]).bfloat16()
    expected, norm = clipped_by_torch(grads, torch.nn.utils.clip_grad_norm_, max_norm)
    ours, _ = optfn.clip_by_global_norm(max_norm, eps=1e-6).update(grads, ())
    assert_close(optfn.tree.global_norm(grads), norm, 1e-6)
    for name, g in grads.items():
        assert (ours[name] is None) == (g is None)
        if g is not None:
            assert ours[name].dtype == g.dtype
            assert ours[name].layout == g.layout
            assert_close(ours[name], expected[name], STEP[g.dtype])


def test_clip_by_global_norm_is_clip_grad_norm_to_all_digits():
    """In one dtype, float64, where torch rounds nothing in between."""
    grads = {name: g for name, g in mixed_grads().items() if name in ("double", "sparse", "complex")}
    expected, _ = clipped_by_torch(grads, torch.nn.utils.clip_grad_norm_, 0.7)
    assert_close(optfn.clip_by_global_norm(0.7, eps=1e-6).update(grads, ())[0], expected, 1e-12)


ORDERS = [2.0, 1.0, float("inf"), 0.0, 0.5, 0.1, 3.0, float("-inf"), -1.0]


@pytest.mark.parametrize("max_norm", [0.0, 1e-7, 0.3, 4.0, 1e6])
@pytest.mark.parametrize("order", ORDERS)
def test_clip_by_global_norm_of_every_order_is_clip_grad_norm(order, max_norm):
    grads = {name: g for name, g in mixed_grads().items() if name in ("double", "sparse", "complex", "none")}
    grads["zero"], grads["scalar"] = torch.zeros(2, dtype=torch.float64), torch.tensor(-0.5, dtype=torch.float64)
    expected, norm = clipped_by_torch(grads, torch.nn.utils.clip_grad_norm_, max_norm, order)
    tx = optfn.clip_by_global_norm(max_norm, eps=1e-6, order=order, keep_norm=True)
    ours, state = tx.update(grads, tx.init(grads))
    assert_close(ours, expected, 1e-12)
    assert_close(state.norm, norm.double(), 1e-12)  # what clip_grad_norm_ returns
    without, nothing = optfn.clip_by_global_norm(max_norm, eps=1e-6, order=order).update(grads, ())
    assert_close(without, ours, 0)
    assert nothing == ()


@pytest.mark.parametrize("order", ORDERS[:7])
def test_clip_by_global_norm_takes_what_is_empty(order):
    """torch raises an error for an empty tensor and the order inf."""
    grads = {"empty": torch.zeros(0, 3), "rows": torch.zeros(3, 2).to_sparse(), "w": torch.tensor([3.0, 4.0])}
    ours, _ = optfn.clip_by_global_norm(0.5, order=order).update(grads, ())
    alone, _ = optfn.clip_by_global_norm(0.5, order=order).update({"w": grads["w"]}, ())
    assert torch.equal(ours["w"], alone["w"])
    assert ours["empty"].shape == (0, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("order", [2.0, 1.0, float("inf")])
def test_a_norm_that_is_not_finite_is_counted(order, value):
    """Where torch, asked for error_if_nonfinite, raises."""
    tx = optfn.clip_by_global_norm(1.0, eps=1e-6, order=order, keep_norm=True)
    state, raised = tx.init(some_params()), 0
    compiled, graphs = counted(tx.update)
    for i, g in enumerate(some_grads(6)):
        g = {**g, "b": g["b"] * value} if i % 3 == 2 else g
        if i % 3 == 2:
            raised += 1
            with pytest.raises(RuntimeError, match="non-finite"):
                clipped_by_torch(g, torch.nn.utils.clip_grad_norm_, 1.0, order, True)
        _, state = compiled(g, state)
        assert state.total_notfinite.item() == raised
        assert bool(state.norm.isfinite()) == (i % 3 != 2)
    assert raised == 2
    # Dynamo takes a 0-dim float64 tensor on the CPU for a number, and compiles once more where that is NaN.
    assert len(graphs) == (2 if value != value else 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_clip_is_clip_grad_value_where_it_is_not_finite(value):
    grads = {"w": torch.tensor([value, 0.5, -3.0], dtype=torch.float64), "half": torch.tensor([value, 2.0]).half()}
    expected, _ = clipped_by_torch(grads, torch.nn.utils.clip_grad_value_, 1.0)
    assert_close(optfn.clip(1.0).update(grads, ())[0], expected, 0)


@pytest.mark.parametrize("bound", [0.0, 0.4, 10.0])
def test_clip_is_clip_grad_value(bound):
    grads = {name: g for name, g in mixed_grads().items() if name not in ("sparse", "complex")}
    expected, _ = clipped_by_torch(grads, torch.nn.utils.clip_grad_value_, bound)
    assert_close(optfn.clip(bound).update(grads, ())[0], expected, 0)


def test_clip_acts_on_real_and_imaginary_part():
    g = torch.tensor([3 + 0.2j, -0.1 - 4j])
    assert torch.equal(optfn.clip(1.0).update(g, ())[0], torch.tensor([1 + 0.2j, -0.1 - 1j]))


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, float("inf")])
def test_global_norm_is_of_all_entries(order):
    grads = {name: g for name, g in mixed_grads().items() if name not in ("half", "single", "none")}
    flat = torch.cat([(g.to_dense() if g.is_sparse else g).flatten().to(torch.complex128) for g in grads.values()])
    assert_close(optfn.tree.global_norm({**grads, "none": None}, order), torch.linalg.vector_norm(flat, order), 1e-12)


def test_global_norm_of_half_precision_is_taken_in_float32():
    g = torch.full((1000,), 300.0, dtype=torch.float16)  # its square overflows
    norm = optfn.tree.global_norm({"w": g})
    assert norm.dtype == torch.float32
    assert_close(norm, torch.tensor(300.0 * 1000**0.5), 1e-6)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd])
def test_global_norm_has_a_derivative_at_zero(transform):
    tree = {"w": torch.zeros(3, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    assert_close(transform(optfn.tree.global_norm)(tree), optfn.tree.map(torch.zeros_like, tree), 0)
    one = {"w": torch.tensor([3.0, 0.0, 4.0]), "b": torch.zeros(())}
    assert_close(transform(optfn.tree.global_norm)(one), {"w": torch.tensor([0.6, 0, 0.8]), "b": torch.zeros(())}, 1e-6)


@pytest.mark.parametrize(
    ("make", "max_norm"),
    [
        *((optfn.clip_by_global_norm, bound) for bound in (0.0, 0.5, 2.0)),
        *((optfn.clip, bound) for bound in (0.0, 0.5, 2.0)),
        *((optfn.clip_by_block_rms, bound) for bound in (0.5, 2.0)),
    ],
)
def test_clipping_has_a_derivative_at_zero(make, max_norm):
    tx, zero = make(max_norm), torch.zeros(3, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda g: tx.update(g, ())[0])(zero)
    # Nothing is clipped near 0, where the derivative is the identity; with a bound of 0 it is one between 0 and that.
    assert jacobian.isfinite().all()
    if max_norm:
        assert_close(jacobian, torch.eye(3), 1e-12)


ERRORS = [
    (lambda: optfn.scale_by_adam(b1=1.0), "b1 must be >= 0 and < 1, got 1.0"),
    (lambda: optfn.scale_by_adam(b2=-0.1), "b2 must be >= 0 and < 1, got -0.1"),
    (lambda: optfn.scale_by_adam(eps=float("nan")), "eps must be >= 0, got nan"),
    (lambda: optfn.scale_by_adam(eps_root=-1.0), "eps_root must be >= 0, got -1.0"),
    (lambda: optfn.scale_by_adam(amsgrad="max"), "amsgrad must be False, True or 'debiased', got 'max'"),
    (lambda: optfn.scale_by_adam(b1=torch.tensor([0.1, 0.2])), "b1 must be a number or a tensor of one element"),
    (lambda: optfn.scale_by_rms(1.1), "decay must be >= 0 and <= 1, got 1.1"),
    (lambda: optfn.scale_by_rms(initial_scale=-1.0), "initial_scale must be >= 0, got -1.0"),
    (lambda: optfn.scale_by_adagrad(-0.1), "initial_accumulator_value must be >= 0, got -0.1"),
    (lambda: optfn.scale_by_adagrad(lr_decay=-0.1), "lr_decay must be >= 0, got -0.1"),
    (lambda: optfn.scale_by_adadelta(rho=-0.1), "rho must be >= 0 and <= 1, got -0.1"),
    (lambda: optfn.scale_by_adadelta(eps=-0.1), "eps must be >= 0, got -0.1"),
    (lambda: optfn.scale_by_adamax(b2=1.0), "b2 must be >= 0 and < 1, got 1.0"),
    (lambda: optfn.scale_by_adamax(eps=-1.0), "eps must be >= 0, got -1.0"),
    (lambda: optfn.scale_by_nadam(b2=1.0), "b2 must be >= 0 and < 1, got 1.0"),
    (lambda: optfn.scale_by_nadam(eps=-1.0), "eps must be >= 0, got -1.0"),
    (lambda: optfn.scale_by_radam(b2=1.0), "b2 must be >= 0 and < 1, got 1.0"),
    (lambda: optfn.scale_by_radam(threshold=3.0), "threshold must be >= 4, got 3.0"),
    (lambda: optfn.scale_by_rprop(-0.1), "lr must be >= 0, got -0.1"),
    (lambda: optfn.scale_by_rprop(eta_plus=1.0), r"etas\[1\] must be > 1, got 1.0"),
    (lambda: optfn.scale_by_rprop(min_step_size=-1.0), r"step_sizes\[0\] must be >= 0, got -1.0"),
    (lambda: optfn.scale_by_asgd(-0.1), "lr must be >= 0, got -0.1"),
    (lambda: optfn.scale_by_asgd(lambd=-0.1), "lambd must be >= 0, got -0.1"),
    (lambda: optfn.scale_by_asgd(alpha=-0.1), "alpha must be >= 0, got -0.1"),
    (lambda: optfn.scale_by_param_block_rms(-0.1), "min_scale must be >= 0, got -0.1"),
    (lambda: optfn.scale_by_relative_step(-0.1), "lr must be >= 0, got -0.1"),
    (lambda: optfn.adafactor(weight_decay=-0.1), "weight_decay must be >= 0, got -0.1"),
    (
        lambda: optfn.scale_by_muon((1.0, 2.0)),
        r"ns_coeffs must be 3 numbers and ns_steps >= 0 and < 100, got \(1.0, 2.0\) and 5",
    ),
    (lambda: optfn.muon(ns_steps=100), "ns_coeffs must be 3 numbers and ns_steps >= 0 and < 100, got .* and 100"),
    (lambda: optfn.scale_by_muon(beta=-0.1), "beta must be >= 0 and < 1, got -0.1"),
    (lambda: optfn.scale_by_muon(beta=-0.1, bias_correction_mu=False), "beta must be >= 0, got -0.1"),
    (lambda: optfn.muon(momentum=-0.1), "momentum must be >= 0, got -0.1"),
    (lambda: optfn.scale_by_shape("square"), "adjust_lr_fn must be None, 'original' or 'match_rms_adamw', got 'square'"),
    (lambda: optfn.trace(-0.1), "momentum must be >= 0, got -0.1"),
    (lambda: optfn.add_decayed_weights(-0.1), "weight_decay must be >= 0, got -0.1"),
    (lambda: optfn.clip(-0.1), "max_delta must be >= 0, got -0.1"),
    (lambda: optfn.clip_by_global_norm(-0.1), "max_norm must be >= 0, got -0.1"),
    (lambda: optfn.clip_by_global_norm(1.0, eps=-1.0), "eps must be >= 0, got -1.0"),
    (lambda: optfn.clip_by_global_norm(1.0, order=float("nan")), "order must be a number, got nan"),
    (lambda: optfn.clip_by_block_rms(0.0), "threshold must be > 0, got 0.0"),
    (lambda: optfn.scale(float("nan")), "step_size must be a number, got nan"),
    (lambda: optfn.scale_by_learning_rate(-0.1), "lr must be >= 0, got -0.1"),
]


@pytest.mark.parametrize(("make", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_numbers_are_checked_when_a_block_is_made(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize("value", ["0.1", None, True, 1j])
def test_what_is_no_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="step_size must be a number or a 0-dim tensor, got"):
        optfn.scale(value)
