"""Microbatches against Optax where it takes the batch, against the whole batch where it does not, and the memory they take."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from optax_oracle import assert_close, counted, from_jax, to_jax
from test_speed import Operations

import optfn
from optfn import microbatching
from optfn.microbatching import AccumulationType, micro_grad, micro_vmap, microbatch, reshape_batch_axis

TYPES = ("MEAN", "SUM", "RUNNING_MEAN", "CONCAT")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch(rows: int = 12) -> tuple[Any, ...]:
    """A scale without a batch axis, a tree with one, and a tensor that has it in dimension 1."""
    return torch.tensor(1.3).double(), {"a": draw(rows, 3, seed=1), "b": [draw(rows, seed=2)]}, draw(2, rows, seed=3)


def fun(scale: Any, x: Any, *, y: Any) -> Any:
    """In torch and in jax alike: a result for each row, a sum, and a mean."""
    rows = scale * x["a"] * x["b"][0][:, None] + y.T[:, :1]
    return {"rows": rows, "of": ((rows**2).sum(0), (rows**3).mean()), "prefix": [rows.mean(), {"of": (rows**2).mean(0)}]}


def both(of: Any, **options: Any) -> Any:
    module, kind = of
    how = {"rows": kind.CONCAT, "of": (kind.SUM, kind.MEAN), "prefix": kind.RUNNING_MEAN}
    return module.microbatch(fun, 1, accumulator=how, argnames="y", in_axes=(0, 1), **options)


OURS, THEIRS = (microbatching, AccumulationType), (optax.microbatching, optax.microbatching.AccumulationType)


def in_jax(f: Any, *args: Any, **kwargs: Any) -> Any:
    """Jitted: Optax's loops take seconds without."""
    return from_jax(jax.jit(f)(*map(to_jax, args), **{name: to_jax(x) for name, x in kwargs.items()}))


# Against Optax


@pytest.mark.parametrize(("size", "real"), [(1, None), (4, None), (12, None), (1, 2), (4, 0), (4, 2), (12, 1)])
def test_microbatch_is_that_of_optax(size: int, real: int | None) -> None:
    """Also which rows come first, where not all microbatches count."""
    scale, x, y = batch()
    options = {"microbatch_size": size, "num_real_microbatches": real}
    expected = in_jax(both(THEIRS, **options), scale, x, y=y)
    assert_close(both(OURS, **options)(scale, x, y=y), expected, 1e-12)
    if real is not None:  # as a tensor it is not looked at
        tensor = {**options, "num_real_microbatches": torch.tensor(real)}
        assert_close(both(OURS, **tensor)(scale, x, y=y), expected, 1e-12)


def test_each_type_is_that_of_optax() -> None:
    """Also which rows are together: the first row of each microbatch says which they are."""

    def f(x: Any) -> Any:
        return x.cumprod(0), x[0, 0]

    def made(of: Any) -> Any:
        return lambda x: {name: of[0].microbatch(f, 0, 3, of[1][name])(x) for name in TYPES}

    x = draw(12, 3)
    assert_close(made(OURS)(x), in_jax(made(THEIRS), x), 1e-12)


@pytest.mark.parametrize(("size", "real"), [(None, None), (1, None), (4, None), (8, None), (2, 3)])
def test_micro_vmap_is_that_of_optax(size: int | None, real: int | None) -> None:
    def of_example(scale: Any, x: Any, y: Any, *, z: Any) -> Any:
        return {"p": scale * x["a"] * x["b"][0], "q": [(y * z).sum()]}

    def made(of: Any) -> Any:
        return of[0].micro_vmap(
            lambda *args, **kwargs: dict.fromkeys(TYPES, of_example(*args, **kwargs)),
            (None, 0, 1),
            accumulator={name: of[1][name] for name in TYPES},
            microbatch_size=size,
            num_real_microbatches=real,
        )

    scale, x, y = batch(8)
    z = draw(8, 2, seed=4)
    assert_close(made(OURS)(scale, x, y, z=z), in_jax(made(THEIRS), scale, x, y, z=z), 1e-12)


def loss(params: Any, x: Any, y: Any, weight: Any = 1.0) -> Any:
    """Of a batch or of one example, in torch and in jax alike."""
    return weight * ((x["a"] @ params["w"] + params["b"] - y) ** 2).mean()


def params() -> Any:
    return {"w": draw(3, seed=5), "b": torch.tensor(0.3).double()}


@pytest.mark.parametrize(("size", "keep", "real"), [(None, True, None), (1, True, 5), (4, False, None), (2, True, 3)])
def test_micro_grad_is_that_of_optax(size: int | None, keep: bool, real: int | None) -> None:
    def made(of: Any, tree: Any) -> Any:
        return of[0].micro_grad(
            lambda p, x, y, weight: (loss(p, x, y, weight), {"twice": 2 * loss(p, x, y)}),
            has_aux=True,
            argnums=(0,),
            batch_argnums=(1, 2),
            keep_batch_dim=keep,
            microbatch_size=size,
            accumulator={name: of[1][name] for name in TYPES},
            transform_fn=lambda g: dict.fromkeys(TYPES, (g[0]["w"], g[0]["b"] ** 2)),
            metrics_fn=lambda g: tree.norm(g[0], squared=True),
            num_real_microbatches=real,
        )

    _, x, _ = batch(8)
    y, weight = draw(8, seed=6), draw(8, seed=7)
    grads, aux = made(OURS, optfn.tree)(params(), x, y, weight=weight)
    expected, of_examples = in_jax(made(THEIRS, optax.tree), params(), x, y, weight=weight)
    assert_close((grads, tuple(aux)), (expected, tuple(of_examples)), 1e-12)


def test_reshape_batch_axis_is_that_of_optax() -> None:
    for axis in (0, 1, 2):
        x = {"a": draw(6, 6, 6)}
        found = reshape_batch_axis(x, 2, axis)
        assert_close(found, from_jax(optax.microbatching.reshape_batch_axis(to_jax(x), 2, axis)), 0)
        assert found["a"].untyped_storage().data_ptr() == x["a"].untyped_storage().data_ptr()
    assert_close(reshape_batch_axis(x, 2, -1), found, 0)


def test_an_accumulator_of_ones_own_is_that_of_optax() -> None:
    def made(of: Any, numbers: Any) -> Any:
        return of[0].Accumulator(
            init=lambda value: (numbers.zeros_like(value["x"]), numbers.zeros_like(value["y"])),
            update=lambda carry, value, i: (carry[0] + (i + 1) * value["x"], numbers.maximum(carry[1], value["y"])),
            finalize=lambda carry: {"x": carry[0] / 2, "y": carry[1]},
            aggregate=lambda values: {"x": values["x"].sum(0), "y": values["y"].max(0) if of is THEIRS else values["y"].amax(0)},
        )

    x = draw(6, 3)
    f = lambda x: ({"x": x.sum(), "y": x**2}, x.sum())  # noqa: E731
    for real in (None, 0, 2):
        options = {"microbatch_size": 2, "num_real_microbatches": real}
        theirs = optax.microbatching.micro_vmap(f, accumulator=(made(THEIRS, jnp), THEIRS[1].CONCAT), **options)
        for given in {real, real if real is None else torch.tensor(real)}:
            accumulator = (made(OURS, torch), AccumulationType.CONCAT)
            ours = micro_vmap(f, accumulator=accumulator, **{**options, "num_real_microbatches": given})
            assert_close(ours(x), in_jax(theirs, x), 1e-12)


@pytest.mark.parametrize("name", ["microbatch", "micro_vmap", "micro_grad", "reshape_batch_axis", "Accumulator"])
def test_arguments_are_those_of_optax(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (microbatching, optax.microbatching))
    assert [*ours] == [*theirs]
    for p in theirs.values():
        assert ours[p.name].kind == p.kind
        same = ours[p.name].default == p.default
        assert same or p.name in ("accumulator", "vmap_fn", "transform_fn", "metrics_fn"), p.name
    assert "accumulator" not in ours or ours["accumulator"].default.name == theirs["accumulator"].default.name


def test_names_are_those_of_optax() -> None:
    assert {*microbatching.__all__} - {"IndividualOutputs"} == {x for x in vars(optax.microbatching) if not x.startswith("_")}
    assert [x.name for x in AccumulationType] == [x.name for x in THEIRS[1]] == [*TYPES]
    assert optfn.microbatch is microbatch
    assert optax.microbatch is optax.microbatching.microbatch


def test_where_optax_differs() -> None:
    """What it refuses, or gives without a word."""
    ones = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="vmap in_axes must be"):
        optax.microbatching.micro_vmap(lambda x, y: x + y, microbatch_size=2)(ones, ones)
    two = torch.ones(4, 2)
    assert_close(micro_vmap(lambda x, y: x + y, microbatch_size=2)(two, two), two + two, 0)
    with pytest.raises(ValueError, match="must be divisible"):
        optax.microbatch(jnp.sum, 0, 3)(ones)
    assert jnp.isnan(optax.microbatch(jnp.sum, 0, 2, num_real_microbatches=3)(ones))
    with pytest.raises(ValueError, match="num_real_microbatches must be at most 2"):
        microbatch(torch.sum, 0, 2, num_real_microbatches=3)(two)


# A last one that is smaller


@pytest.mark.parametrize("rows", range(1, 12))
@pytest.mark.parametrize("size", [1, 3, 5, 20])
def test_rows_that_are_left_over_weigh_what_they_are(rows: int, size: int) -> None:
    x = {"a": draw(rows, 2), "b": None}
    sizes: list[int] = []

    def f(x: Any) -> Any:
        sizes.append(len(x["a"]))
        return x, x["a"].sum(0), x["a"].mean(0), x["a"].mean()

    how = (AccumulationType.CONCAT, AccumulationType.SUM, AccumulationType.MEAN, AccumulationType.RUNNING_MEAN)
    found = microbatch(f, 0, size, how)(x)
    assert_close(found[0], x, 0)
    assert sizes == [size] * (rows // size) + [rows % size] * (rows % size > 0)
    assert_close(found, f(x), 1e-12)


def test_rows_that_are_left_over_of_micro_vmap_and_micro_grad() -> None:
    x, y, p = {"a": draw(7, 3)}, draw(7, seed=1), {**params(), "none": None}
    for name in TYPES:
        accumulator = AccumulationType[name]
        whole, of_whole = micro_grad(loss, batch_argnums=(1, 2), accumulator=accumulator)(p, x, y)
        assert whole["none"] is None
        for size in (1, 2, 3, 7, 9):
            options: Any = {"microbatch_size": size, "accumulator": accumulator}
            grads, aux = micro_grad(loss, batch_argnums=(1, 2), **options)(p, x, y)
            assert_close((grads, aux.values), (whole, of_whole.values), 1e-12)
            assert (aux.metrics, aux.aux) == (None, None)
            f = lambda a, b: (a["a"] * b, None)  # noqa: E731
            assert_close(micro_vmap(f, **options)(x, y), micro_vmap(f, accumulator=accumulator)(x, y), 1e-12)
    sums = optfn.tree.value_and_grad(lambda p: 7 * loss(p, x, y))(p)[1]
    assert_close(micro_grad(loss, batch_argnums=(1, 2), microbatch_size=2)(p, x, y)[0], sums, 1e-12)


def test_microbatches_that_do_not_count() -> None:
    """Of seven rows, two at a time: the microbatches are rows 0 and 3, 1 and 4, 2 and 5, and row 6 alone."""
    x, rows, how = draw(7, 2), [0, 3, 1, 4], AccumulationType
    for real in (2, torch.tensor(2)):
        of = functools.partial(microbatch, argnums=0, microbatch_size=2, num_real_microbatches=real)
        assert_close(of(lambda x: x.sum(0))(x), x[rows].sum(0), 1e-12)
        assert_close(of(lambda x: x.mean(0), accumulator=how.MEAN)(x), x[rows].sum(0) / 7, 1e-12)
        assert_close(of(lambda x: x.mean(0), accumulator=how.RUNNING_MEAN)(x), x[rows].mean(0), 1e-12)
        kept = torch.zeros(7, 1, dtype=torch.float64).index_fill(0, torch.tensor(rows), 1)
        assert_close(of(lambda x: x, accumulator=how.CONCAT)(x), kept * x, 0)
        assert_close(of(lambda x: x[0, 0], accumulator=how.CONCAT)(x), torch.tensor([x[0, 0], x[1, 0], 0, 0]), 0)
    seven = microbatch(lambda x: x.mean(0), 0, 2, how.RUNNING_MEAN, num_real_microbatches=torch.tensor(4))(x)
    assert_close(seven, x.mean(0), 1e-12)
    several = torch.vmap(lambda n: microbatch(lambda x: x.sum(0), 0, 2, num_real_microbatches=n)(x))(torch.tensor([0, 1, 4]))
    assert_close(several, torch.stack([0 * x[0], x[0] + x[3], x.sum(0)]), 1e-12)


def test_what_does_not_count_may_be_nan() -> None:
    x = torch.tensor([1.0, torch.nan])
    for real in (1, torch.tensor(1)):
        for name, expected in {"MEAN": 0.5, "SUM": 1.0, "RUNNING_MEAN": 1.0, "CONCAT": [1.0, 0.0]}.items():
            found = microbatch(lambda x: x[0], 0, 1, AccumulationType[name], num_real_microbatches=real)(x)
            assert_close(found, torch.tensor(expected), 0)


def test_no_rows() -> None:
    how = (AccumulationType.CONCAT, AccumulationType.SUM)
    assert_close(microbatch(lambda x: (x, x.sum(0)), 0, 4, how)(torch.ones(0, 2)), (torch.ones(0, 2), torch.zeros(2)), 0)


# Numbers


def test_sums_are_gathered_in_float32() -> None:
    """One of 4,000 ones in bfloat16 would stay at 256."""
    ones = torch.ones(4000, dtype=torch.bfloat16)
    found = microbatch(lambda x: x.sum(), 0, 1)(ones)
    assert found.dtype == torch.bfloat16
    assert found == torch.tensor(4000.0).to(torch.bfloat16)
    mean = microbatch(lambda x: x.sum(), 0, 1, AccumulationType.MEAN)(ones)
    assert (mean.dtype, mean.item()) == (torch.bfloat16, 1.0)


def test_sums_of_integers_bools_and_complex_numbers() -> None:
    x = torch.arange(5)
    count, total = microbatch(lambda x: (x[0] > 0, x.sum()), 0, 1)(x)
    assert (count.dtype, count.item(), total.item()) == (torch.int64, 4, 10)
    assert micro_vmap(lambda x: x > 0, microbatch_size=2, accumulator=AccumulationType.SUM)(x) == 4
    z = torch.complex(draw(5), draw(5, seed=1))
    assert_close(microbatch(torch.mean, 0, 2, AccumulationType.MEAN)(z), z.mean(), 1e-12)


def test_nothing_is_changed() -> None:
    scale, x, y = batch(7)
    tensors = [scale, *optfn.tree.leaves(x), y]
    before = [t._version for t in tensors]
    both(OURS, microbatch_size=2)(scale, x, y=y)
    assert [t._version for t in tensors] == before


# Transforms of torch


def test_under_grad_and_vmap() -> None:
    scale, x, y = batch(7)

    def size(f: Any, scale: Any, x: Any) -> torch.Tensor:
        return sum(leaf.square().sum() for leaf in optfn.tree.leaves(f(scale, x, y=y)))

    ours, whole = (torch.func.grad(functools.partial(size, f), argnums=(0, 1)) for f in (both(OURS, microbatch_size=3), fun))
    assert_close(ours(scale, x), whole(scale, x), 1e-11)
    ours, whole = (torch.func.vmap(lambda scale, f=f: f(scale, x, y=y))(draw(4)) for f in (both(OURS, microbatch_size=3), fun))
    assert_close(ours, whole, 1e-12)


def test_a_gradient_through_micro_grad() -> None:
    """Of the norm of the clipped sum, in the data: second derivatives, in microbatches."""
    x, y, p = {"a": draw(5, 3)}, draw(5, seed=1), params()

    def norm(size: int | None, y: torch.Tensor) -> torch.Tensor:
        return optfn.tree.global_norm(clipped_sums(0.5, size)(p, x, y)[0])

    expected = torch.func.grad(functools.partial(norm, None))(y)
    assert expected.abs().min() > 0
    assert_close(torch.func.grad(functools.partial(norm, 2))(y), expected, 1e-12)
    ys = draw(3, 5, seed=2)
    mapped = torch.func.vmap(torch.func.grad(functools.partial(norm, 2)))(ys)
    assert_close(mapped, torch.stack([torch.func.grad(functools.partial(norm, None))(y) for y in ys]), 1e-12)


def test_randomness_is_that_of_vmap_fn() -> None:
    different = functools.partial(torch.func.vmap, randomness="different")
    found = micro_vmap(lambda x: x + torch.rand(()), microbatch_size=2, vmap_fn=different)(torch.zeros(5))
    assert len({*found.tolist()}) == 5


def test_traced_in_one_graph() -> None:
    scale, x, y = batch(7)
    made = both(OURS, microbatch_size=3)
    run, graphs = counted(lambda scale, x, y: made(scale, x, y=y))
    assert_close(run(scale, x, y), fun(scale, x, y=y), 1e-12)
    assert len(graphs) == 1

    p, y = {**params(), "none": None}, draw(7, seed=1)
    step = micro_grad(loss, batch_argnums=(1, 2), microbatch_size=4, metrics_fn=optfn.tree.global_norm)
    run, graphs = counted(lambda p, x, y: step(p, x, y))
    assert_close(run(p, x, y), step(p, x, y), 1e-12)
    assert len(graphs) == 1

    real = lambda x, n: microbatch(torch.sum, 0, 2, num_real_microbatches=n)(x)  # noqa: E731
    run, graphs = counted(real)
    for n in range(3):
        assert_close(run(x["a"], torch.tensor(n)), real(x["a"], n), 1e-12)
    assert len(graphs) == 1


def test_a_function_that_is_compiled_itself() -> None:
    """One program for whole microbatches and one for the last, however many there are."""
    run, graphs = counted(lambda x: x.sin().sum(0))
    x = draw(50, 3)
    assert_close(microbatch(run, 0, 8)(x), x.sin().sum(0), 1e-12)
    assert len(graphs) == 2


# Examples' gradients, clipped


def clipped_sums(bound: float, size: int | None) -> Any:
    """By Optax's micro_grad."""
    clip = optfn.clip_by_global_norm(bound)
    return micro_grad(loss, batch_argnums=(1, 2), microbatch_size=size, transform_fn=lambda g: clip.update(g, ())[0])


def clipped_at_once(bound: float, p: Any, x: Any, y: Any) -> Any:
    """The gradients of all of the examples that there are, then clipped."""
    of_examples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(p, x, y)
    return optfn.per_example_global_norm_clip(of_examples, bound)


@pytest.mark.parametrize("bound", [0.0, 0.7, 1e3])
@pytest.mark.parametrize("size", [1, 4, 7, 23, 40])
def test_clipped_sums_are_those_of_the_whole_batch(size: int, bound: float) -> None:
    x, y, p = {"a": draw(23, 3)}, draw(23, seed=1), params()
    total, count = clipped_at_once(bound, p, x, y)
    found, clipped = microbatch(functools.partial(clipped_at_once, bound), (1, 2), size)(p, x, y)
    assert_close(found, total, 1e-12)
    assert (clipped.dtype, clipped.item()) == (torch.int64, count.item())
    assert_close(clipped_sums(bound, size)(p, x, y)[0], total, 1e-12)


@pytest.mark.parametrize("noise", [0.0, 1.1])
def test_private_steps_of_microbatches_are_those_of_the_whole_batch(noise: float) -> None:
    """Noise is added once, and is the same."""
    data = [({"a": draw(23, 3, seed=2 * i)}, draw(23, seed=2 * i + 1)) for i in range(25)]
    rate = optfn.linear_schedule(0.3, 0.01, 25)
    at_once = optfn.dpsgd(rate, 0.7, noise, 7, 0.9, True)
    summed = optfn.dpsgd(rate, 0.7, noise, 7, 0.9, True, batch_size=23)
    mini = microbatch(functools.partial(clipped_at_once, 0.7), (1, 2), 5)
    of_examples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    p = q = params()
    one, other = at_once.init(p), summed.init(q)
    for x, y in data:
        updates, one = at_once.update(of_examples(p, x, y), one, p)
        p = optfn.apply_updates(p, updates)
        updates, other = summed.update(mini(q, x, y)[0], other, q)
        q = optfn.apply_updates(q, updates)
        assert_close((q, other), (p, one), 1e-12)


def test_batch_size_is_a_number_or_a_tensor() -> None:
    total = {"w": draw(3), "b": None}
    of = functools.partial(optfn.differentially_private_aggregate, 1.0, 0.5, 7)
    found, expected = (tx.update(total, tx.init(total), total)[0] for tx in (of(batch_size=torch.tensor(4.0)), of(batch_size=4)))
    assert_close(found, expected, 1e-14)
    one = of(batch_size=1)
    assert_close(optfn.tree.scale(0.25, one.update(total, one.init(total))[0]), expected, 1e-14)


def live(run: Any) -> int:
    """The most bytes that are alive at a time, of all that a function makes."""
    with Operations() as operations:
        kept = run()
    del kept
    return operations.peak


def test_memory_is_that_of_one_microbatch() -> None:
    """Of 64 examples, 4 at a time: no more than for 4 examples alone and the sums so far, as large as the parameters."""
    p = {"w": draw(100, 30), "v": draw(30)}
    x, y = draw(64, 100), draw(64, seed=1)
    bytes_of_params = 8 * optfn.tree.size(p)

    def loss(p: Any, x: Any, y: Any) -> Any:
        return (((x @ p["w"]).tanh() @ p["v"] - y) ** 2).mean()

    def clipped(p: Any, x: Any, y: Any) -> Any:
        of_examples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(p, x, y)
        return optfn.per_example_global_norm_clip(of_examples, 0.5)

    clip = optfn.clip_by_global_norm(0.5)
    by_grad = functools.partial(
        micro_grad, loss, batch_argnums=(1, 2), keep_batch_dim=False, transform_fn=lambda g: clip.update(g, ())[0]
    )
    makes = {
        "microbatch": lambda size: microbatch(clipped, (1, 2), size),
        "micro_grad": lambda size: by_grad(microbatch_size=size),
    }
    for name, make in makes.items():
        few = live(lambda make=make: make(None)(p, x[:4], y[:4]))
        several = live(lambda make=make: make(4)(p, x, y))
        ragged = live(lambda make=make: make(4)(p, x[:63], y[:63]))
        whole = live(lambda make=make: make(None)(p, x, y))
        assert whole >= 64 * bytes_of_params, name
        assert few >= 4 * bytes_of_params, name
        sums = bytes_of_params + 8 * 64 + 1000  # those so far; the values of the examples; scalars
        assert several <= few + sums, (name, several / bytes_of_params, few / bytes_of_params)
        assert ragged <= few + sums, name


def test_memory_of_a_result_that_is_dropped() -> None:
    """A function whose intermediate results are large: those of one microbatch are not alive beside those of the next."""
    x = draw(64, 10)

    def f(x: torch.Tensor) -> torch.Tensor:
        return (x[:, :, None, None] * torch.ones(10, 10, dtype=x.dtype)).exp().sum((1, 2, 3))

    for how in AccumulationType:
        one, whole = (live(lambda n=n: f(x[:n])) for n in (8, 64))
        assert live(lambda how=how: microbatch(f, 0, 8, how)(x)) <= one + 8 * 64 * 4
        assert whole >= 7 * one


# Errors


TWO, THREE = torch.ones(2, 2), torch.ones(3, 2)
SUMS = microbatch(lambda x, y: x, (0, 1), 2)

ERRORS: list[tuple[Any, type[Exception], str]] = [
    (lambda: microbatch(torch.sum, 0, 0), ValueError, "microbatch_size must be >= 1, got 0"),
    (lambda: microbatch(torch.sum, 0, 2.0), TypeError, "microbatch_size must be an int, got float"),
    (lambda: microbatch(torch.sum, 0, 2, in_axes=(0, 1)), ValueError, r"one for each of 1 batch arguments, got \(0, 1\)"),
    (lambda: microbatch(torch.sum, 0, 2, num_real_microbatches=-1), ValueError, "num_real_microbatches must be >= 0"),
    (lambda: microbatch(torch.sum, 0, 2, num_real_microbatches=TWO), ValueError, "an int or a 0-dim integer tensor"),
    (
        lambda: SUMS({"a": [TWO, None]}, THREE),
        ValueError,
        "argument 0 at 'a.0' has 2 and argument 1 has 3: correct argnums or in_axes",
    ),
    (lambda: SUMS(TWO, {"a": [TWO, THREE]}), ValueError, "argument 0 has 2 and argument 1 at 'a.1' has 3"),
    (lambda: SUMS(TWO, torch.tensor(1.0)), ValueError, r"argument 1 must have a batch axis 0, got shape \(\)"),
    (lambda: SUMS(TWO, 1.0), TypeError, "argument 1 must be a tensor or None, got float"),
    (lambda: SUMS(TWO, y=TWO), TypeError, "argument 1 has a batch axis, but there are 1 positional ones: give names in argnames"),
    (lambda: SUMS(None, None), ValueError, "there is no batch"),
    (
        lambda: microbatch(torch.sum, (), 2, argnames="input")(TWO),
        TypeError,
        "argument 'input' has a batch axis: pass it by its name",
    ),
    (lambda: microbatch(torch.sum, 0, 2, "sum")(TWO), TypeError, "accumulator must be an AccumulationType, .* got 'sum'"),
    (
        lambda: microbatch(lambda x: {"a": x}, 0, 2, {"b": AccumulationType.SUM})(TWO),
        ValueError,
        "the result of the function must have the structure of accumulator: 'b' is only in accumulator",
    ),
    (lambda: microbatch(lambda x: {"n": 2}, 0, 2)(TWO), TypeError, "the result of the function at 'n' must be a tensor or None"),
    (
        lambda: microbatch(lambda x: {"n": x.sum().int()}, 0, 2, AccumulationType.MEAN)(TWO),
        ValueError,
        "the result at 'n' is torch.int32: convert it, or take SUM",
    ),
    (
        lambda: micro_vmap(lambda x: x.int(), microbatch_size=1, accumulator=AccumulationType.MEAN)(TWO),
        ValueError,
        "a mean is of floating-point tensors, the result is torch.int32",
    ),
    (lambda: micro_vmap(torch.sum, out_axes=1), NotImplementedError, "out_axes must be 0, got 1"),
    (lambda: micro_vmap(torch.sum, (0, None))(TWO), ValueError, "in_axes must be an int or one for each of 1 arguments"),
    (lambda: micro_vmap(torch.add)(TWO, THREE), ValueError, "argument 0 has 2 and argument 1 has 3"),
    (lambda: micro_vmap(torch.sum)(TWO, dim=THREE), ValueError, "argument 0 has 2 and argument 'dim' has 3"),
    (lambda: micro_grad(loss)(params()), TypeError, "argument 1 has a batch axis, but there are 1 positional ones"),
    (lambda: micro_grad(loss, batch_argnums=(1, 2))(params(), TWO, THREE), ValueError, "argument 1 has 2 and argument 2 has 3"),
    (lambda: reshape_batch_axis({"x": THREE}, 2), ValueError, "must be a multiple of microbatch_size=2, got 3 rows"),
    (lambda: reshape_batch_axis({"x": THREE}, 2, 2), ValueError, r"at 'x' must have a batch axis 2, got shape \(3, 2\)"),
    (lambda: optfn.dpsgd(0.1, 1.0, 1.0, 7, batch_size=0), ValueError, "batch_size must be > 0, got 0"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message[:40] for _, _, message in ERRORS])
def test_errors_say_what_to_do(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_sum_for_examples_and_examples_for_a_sum() -> None:
    """Else a sum of 4 rows would be taken for 4 examples."""
    p = {"w": torch.ones(4, 2), "b": torch.ones(4)}
    many = optfn.tree.map(lambda x: torch.stack([x, x]), p)
    private = functools.partial(optfn.differentially_private_aggregate, 1.0, 0.5, 7)
    tx = private()
    with pytest.raises(
        ValueError, match=r"'b' must have a first dimension of the examples.*for a sum of clipped gradients give batch_size"
    ):
        tx.update(p, tx.init(p), p)
    tx.update(many, tx.init(p), p)
    tx = private(batch_size=2)
    with pytest.raises(ValueError, match=r"'b' must have the shape \(4\) of its parameter, got shape \(2, 4\)"):
        tx.update(many, tx.init(p), p)
