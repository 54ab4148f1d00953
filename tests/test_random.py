"""Keys and numbers against jax.random with its default generator, and what makes them values."""

import jax
import numpy as np
import pytest
import torch
from optax_oracle import from_jax

import optfn
from optfn import random

SEED = 7
KEY, THEIRS = random.key(SEED), jax.random.PRNGKey(SEED)
SHAPE = (301, 7)
HALF = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
FLOATS = {torch.float32: "float32", torch.float64: "float64", **HALF}


def words(x):
    return torch.from_numpy(np.asarray(x).astype(np.int64))


def wide(x):
    return torch.from_numpy(np.asarray(x).astype(np.float64))


def same(ours, theirs):
    assert ours.dtype == torch.int64
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**40 + 3, 2**63 - 1, -(2**63)])
def test_key_is_that_of_jax(seed):
    same(random.key(seed), words(jax.random.PRNGKey(seed)))


@pytest.mark.parametrize("num", [1, 2, 5, (2, 3), ()])
def test_split_is_that_of_jax(num):
    same(random.split(KEY, num), words(jax.random.split(THEIRS, num)))


@pytest.mark.parametrize("data", [0, 3, 2**32 - 1])
def test_fold_in_is_that_of_jax(data):
    same(random.fold_in(KEY, data), words(jax.random.fold_in(THEIRS, data)))
    same(random.fold_in(KEY, torch.tensor(data)), random.fold_in(KEY, data))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_bits_are_those_of_jax(width, shape):
    same(random.bits(KEY, shape, width), words(jax.random.bits(THEIRS, shape, f"uint{width}")))


@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform_is_that_of_jax_to_the_bit(dtype):
    ours = random.uniform(KEY, SHAPE, dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours.double(), wide(jax.random.uniform(THEIRS, SHAPE, FLOATS[dtype])))


def test_uniform_between_bounds():
    ours = random.uniform(KEY, SHAPE, torch.float64, -2.5, 0.3)
    # XLA makes a product and a sum into one operation, which rounds once.
    torch.testing.assert_close(ours, wide(jax.random.uniform(THEIRS, SHAPE, "float64", -2.5, 0.3)), rtol=0, atol=5e-16)
    assert ours.min() >= -2.5
    assert ours.max() < 0.3


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)]
)
def test_normal_is_that_of_jax_to_the_rounding_of_erfinv(dtype, tolerance):
    ours = random.normal(KEY, SHAPE, dtype).double()
    torch.testing.assert_close(ours, wide(jax.random.normal(THEIRS, SHAPE, FLOATS[dtype])), rtol=0, atol=tolerance)
    assert ours.isfinite().all()


def test_float32_normal_is_the_inverse_error_function_of_its_uniform():
    lowest = torch.nextafter(torch.tensor(-1.0), torch.tensor(0.0)).item()
    exact = 2**0.5 * torch.erfinv(random.uniform(KEY, SHAPE, torch.float32, lowest, 1.0).double())
    torch.testing.assert_close(random.normal(KEY, SHAPE).double(), exact, rtol=1e-6, atol=0)


def test_complex_normal_is_that_of_jax():
    ours, theirs = random.normal(KEY, SHAPE, torch.complex128), from_jax(jax.random.normal(THEIRS, SHAPE, "complex128"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(), (50,), (3, 4)])
def test_rademacher_is_that_of_jax(shape):
    with jax.enable_x64(False):
        theirs = wide(jax.random.rademacher(THEIRS, shape, "float32"))
    ours = random.rademacher(KEY, shape, torch.float32)
    assert ours.dtype == torch.float32
    assert torch.equal(ours.double(), theirs)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 1000, 3000])
def test_permutation_is_that_of_jax(count):
    same(random.permutation(KEY, count), words(jax.random.permutation(THEIRS, count)))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_permutation_of_slices_is_that_of_jax(dim):
    x = torch.arange(120.0).reshape(6, 4, 5)
    ours = random.permutation(KEY, x, dim)
    assert torch.equal(ours, from_jax(jax.random.permutation(THEIRS, x.numpy(), dim)))


def test_counters_beyond_32_bits():
    """The last rows of a tensor of 2**34 numbers, against the hash of their counters, which jax gives for any counter."""
    from jax.extend.random import threefry2x32_p

    shape, part = (2**30, 16), (slice(2**30 - 2, None), slice(None))
    at = np.arange((2**30 - 2) * 16, 2**34, dtype=np.uint64).reshape(2, 16)
    high, low = (at >> np.uint64(32)).astype(np.uint32), at.astype(np.uint32)
    first, second = threefry2x32_p.bind(THEIRS[0], THEIRS[1], jax.numpy.asarray(high), jax.numpy.asarray(low))
    same(random.bits(KEY, shape, part=part), words(first ^ second))


PARTS = [
    ((20, 3, 4), (slice(2, 9, 3), slice(None), slice(-1, None))),
    ((20,), (slice(5, 5),)),
    ((), ()),
    ((4, 6), (slice(None), slice(3, 100))),
]


@pytest.mark.parametrize(("shape", "part"), PARTS)
@pytest.mark.parametrize(
    "make", [random.bits, random.uniform, random.normal, random.rademacher], ids=["bits", "uniform", "normal", "rademacher"]
)
def test_a_part_is_what_the_whole_has_there(make, shape, part):
    assert torch.equal(make(KEY, shape, part=part), make(KEY, shape)[part])
    if shape:
        apart = [(0, shape[0] - 1), *part[1:]]  # indices that are no slice
        assert torch.equal(make(KEY, shape, part=apart), make(KEY, shape)[[0, -1]][(slice(None), *part[1:])])


def test_a_part_is_made_without_the_whole():
    huge = (2**20, 2**20)
    assert random.uniform(KEY, huge, part=(slice(3, 5), slice(7, 9))).shape == (2, 2)


def test_keys_map_and_differ():
    keys = random.split(KEY, 5)
    mapped = torch.vmap(lambda k: random.normal(k, (3,)))(keys)
    assert torch.equal(mapped, torch.stack([random.normal(k, (3,)) for k in keys]))
    assert len({tuple(row) for row in mapped.tolist()}) == 5


def test_numbers_are_differentiable_in_their_bounds():
    def f(low, high):
        return random.uniform(KEY, (3,), torch.float64, low, high).sum()

    low, high = torch.func.grad(f, argnums=(0, 1))(torch.tensor(1.0), torch.tensor(2.0))
    u = random.uniform(KEY, (3,), torch.float64).sum()
    torch.testing.assert_close(torch.stack([low, high]), torch.stack([3 - u, u]).float())


def test_nothing_global_is_read_or_changed():
    before = torch.get_rng_state()
    first = random.normal(KEY, (4,))
    torch.manual_seed(123)
    assert torch.equal(random.normal(KEY, (4,)), first)
    torch.set_rng_state(before)
    random.permutation(KEY, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_moments():
    x = random.normal(KEY, (200_000,), torch.float64)
    found = torch.stack([(x**k).mean() for k in (1, 2, 3, 4)])
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 0.0, 3.0], dtype=torch.float64), rtol=0, atol=0.03)


@pytest.mark.codegen
def test_a_noisy_step_is_compiled_to_the_same_numbers():
    def step(p, key):
        now, after = random.split(key).unbind()
        noise = optfn.tree.map(lambda x: random.uniform(now, x.shape, x.dtype), p)
        return optfn.tree.map(torch.add, p, noise), after

    p, key = {"w": torch.zeros(3, 5), "b": torch.zeros(5, dtype=torch.float64)}, KEY
    wanted, theirs = optfn.tree.map(torch.clone, p), KEY
    compiled = optfn.compile(step, donate="p")
    for _ in range(3):
        wanted, theirs = step(wanted, theirs)
        p, key = compiled(p, key)
    assert torch.equal(key, theirs)
    for name, x in p.items():
        torch.testing.assert_close(x, wanted[name], rtol=0, atol=1e-6 if x.dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random.key(1.5), TypeError, "key takes an integer seed, got float"),
        (lambda: random.key(2**64), ValueError, "at most 64 bits"),
        (
            lambda: random.split(3),
            TypeError,
            r"a key is an int64 tensor of two words, as optfn.random.key\(seed\) makes one, got int",
        ),
        *(
            (lambda draw=draw: draw(3, (2,)), TypeError, r"as optfn.random.key\(seed\) makes one, got int")
            for draw in (random.normal, random.uniform, random.bits, random.rademacher, random.permutation)
        ),
        (lambda: random.normal(KEY, 2), TypeError, r"shape must be a tuple of ints, as \(2,\), got 2"),
        (lambda: random.normal(KEY, (2,), torch.int64), TypeError, "dtype must be a floating-point dtype, got torch.int64"),
        (lambda: random.bits(torch.ones(2)), TypeError, r"got torch.float32 of shape \(2,\)"),
        (lambda: random.bits(random.split(KEY)), TypeError, r"got torch.int64 of shape \(2, 2\)"),
        (lambda: random.bits(KEY, (2,), 12), ValueError, "width must be 8, 16, 32 or 64, got 12"),
        (lambda: random.uniform(KEY, (2,), torch.int64), TypeError, "dtype must be a floating-point dtype, got torch.int64"),
        (
            lambda: random.uniform(KEY, (2, 3), part=(slice(1),)),
            ValueError,
            "a slice, or indices, for each of the 2 dimensions, got 1",
        ),
        (lambda: random.permutation(torch.ones(2), 3), TypeError, "a key is an int64 tensor"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
