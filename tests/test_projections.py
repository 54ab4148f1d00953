"""Projections against optax.projections, with their derivatives; where Optax errs, against what defines them."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from optax_oracle import assert_close, counted, from_jax, to_jax

from optfn import projections, tree

SHAPES = {"w": (2, 3), "b": [(2,), ()]}


def some(seed, size=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda x: size * torch.randn(x.shape, dtype=dtype, generator=generator), ZEROS)


ZEROS = {"w": torch.zeros(2, 3), "b": [torch.zeros(2), torch.zeros(())]}
LOWER, A = some(11, 0.5), some(12)
UPPER = tree.map(lambda x: x + 0.7, LOWER)


def bounds(x, value, of):
    """Optax takes a number for a bound only where the tree is one tensor."""
    return value if of is projections else jax.tree.map(lambda leaf: jnp.full_like(leaf, value), x)


def hypercube(of, x, *scale):
    if of is projections:
        return of.projection_hypercube(x, *scale)
    return of.projection_box(x, bounds(x, 0, of), bounds(x, *(scale or (1,)), of))


def given(of, x):
    return x if of is projections else to_jax(x)


# Name: the projection of a tree by a module, with a tensor argument h, and what h is.
CASES = {
    "non_negative": (lambda of, x, h: of.projection_non_negative(x), 1.0),
    "box": (lambda of, x, h: of.projection_box(x, given(of, LOWER), given(of, UPPER)), 1.0),
    "box: numbers": (lambda of, x, h: of.projection_box(x, bounds(x, -h, of), bounds(x, 0.3, of)), 0.4),
    "hypercube": (lambda of, x, h: hypercube(of, x), 1.0),
    "hypercube: scale": (lambda of, x, h: hypercube(of, x, h), 0.3),
    "simplex": (lambda of, x, h: of.projection_simplex(x), 1.0),
    "simplex: scale": (lambda of, x, h: of.projection_simplex(x, h), 2.5),
    "l1_sphere": (lambda of, x, h: of.projection_l1_sphere(x), 1.0),
    "l1_sphere: scale": (lambda of, x, h: of.projection_l1_sphere(x, h), 4.0),
    "l1_ball": (lambda of, x, h: of.projection_l1_ball(x), 1.0),
    "l1_ball: scale": (lambda of, x, h: of.projection_l1_ball(x, h), 4.0),
    "l2_sphere": (lambda of, x, h: of.projection_l2_sphere(x), 1.0),
    "l2_sphere: scale": (lambda of, x, h: of.projection_l2_sphere(x, h), 0.3),
    "l2_ball": (lambda of, x, h: of.projection_l2_ball(x), 1.0),
    "l2_ball: scale": (lambda of, x, h: of.projection_l2_ball(x, h), 2.0),
    "linf_ball": (lambda of, x, h: of.projection_linf_ball(x), 1.0),
    "linf_ball: scale": (lambda of, x, h: of.projection_linf_ball(x, h), 0.3),
    "vector": (lambda of, x, h: of.projection_vector(x, given(of, A)), 1.0),
    "hyperplane": (lambda of, x, h: of.projection_hyperplane(x, given(of, A), h), 0.4),
    "halfspace": (lambda of, x, h: of.projection_halfspace(x, given(of, A), h), 0.4),
}
POINTS = {f"{size} {seed}": some(seed, size) for size in (0.1, 1.0, 100.0) for seed in (0, 1)}


@functools.cache
def by_optax():
    """The projections of every point and their jacobians, in one program."""
    points = tree.map(lambda *x: torch.stack(x), *POINTS.values())

    def both(f, x, h):
        return f(x, h), jax.jacrev(f, (0, 1))(x, h)

    def every(points):
        fs = {name: functools.partial(f, optax.projections) for name, (f, _) in CASES.items()}
        return {name: jax.vmap(lambda x, f=f, h=CASES[name][1]: both(f, x, jnp.asarray(h)))(points) for name, f in fs.items()}

    return from_jax(jax.jit(every)(to_jax(points)))


@pytest.mark.parametrize("name", CASES)
def test_is_optax(name):
    f, value = functools.partial(CASES[name][0], projections), torch.tensor(CASES[name][1], dtype=torch.float64)
    expected, jacobians = by_optax()[name]
    points = tree.map(lambda *x: torch.stack(x), *POINTS.values())
    for i, x in enumerate(POINTS.values()):
        for h in (value, value.item()):
            assert_close(f(x, h), tree.map(lambda y, i=i: y[i], expected), 1e-12)
        beside = f({"tree": x, "none": None}, value) if name not in ("box", "vector", "hyperplane", "halfspace") else None
        assert beside is None or beside["none"] is None
    # Batched.
    mapped = torch.vmap(f, (0, None))
    assert_close(mapped(points, value), expected, 1e-12)
    # All of the derivatives, backward and forward.
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        found = torch.vmap(jacobian(f, (0, 1)), (0, None))(points, value)
        for path, ours in zip(tree.paths(jacobians), tree.flatten(as_jax_nests(found, jacobians))[0], strict=True):
            theirs = dict(zip(tree.paths(jacobians), tree.flatten(jacobians)[0], strict=True))[path]
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=path)


def as_jax_nests(found, like):
    """jax nests the parts of the jacobian under those of the result, as torch does."""
    return tree.unflatten(tree.flatten(like)[1], tree.flatten(found)[0])


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_finite_differences(name):
    f = functools.partial(CASES[name][0], projections)
    h = torch.tensor(CASES[name][1], dtype=torch.float64, requires_grad=True)
    for x in POINTS.values():
        leaves = [leaf.clone().requires_grad_() for leaf in tree.leaves(x)]
        spec = tree.flatten(x)[1]
        assert torch.autograd.gradcheck(
            lambda h, *leaves, spec=spec: tuple(tree.leaves(f(tree.unflatten(spec, list(leaves)), h))),
            (h, *leaves),
            check_forward_ad=True,
        )


def test_one_graph():
    x = POINTS["1.0 0"]

    def every(x, h):
        return {name: f(projections, x, h) for name, (f, _) in CASES.items()}

    compiled, graphs = counted(every)
    for h in (torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)):
        assert_close(compiled(x, h), every(x, h), 1e-12)
    assert len(graphs) == 1


EDGES = {
    "zero": tree.map(torch.zeros_like, some(0)),
    "equal": tree.map(lambda x: torch.full_like(x, 0.5), some(0)),
    "on all of them": {"w": torch.tensor([[1.0, 0, 0], [0, 0, 0]]), "b": [torch.zeros(2), torch.zeros(())]},
    "at the bounds": UPPER,
    "huge": some(3, 1e150),
    "tiny": some(3, 1e-150),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", CASES)
def test_is_finite_at_the_edges(name, edge):
    f, value = functools.partial(CASES[name][0], projections), torch.tensor(CASES[name][1], dtype=torch.float64)
    x = tree.cast(EDGES[edge], torch.float64)
    for h in (value, 0 * value):
        found = f(x, h)
        for y in tree.leaves((found, torch.func.jacrev(f, (0, 1))(x, h), torch.func.jacfwd(f, (0, 1))(x, h))):
            assert y.isfinite().all()


def contains(name, x, h):
    """Whether a point is in the set, by its definition."""
    flat = torch.cat([leaf.reshape(-1) for leaf in tree.leaves(x)])
    near = 1e-12 * (1 + h)
    return {
        "non_negative": lambda: flat.min() >= 0,
        "hypercube": lambda: flat.min() >= 0 and flat.max() <= h,
        "simplex": lambda: flat.min() >= 0 and abs(flat.sum() - h) <= near,
        "l1_sphere": lambda: abs(flat.abs().sum() - h) <= near,
        "l1_ball": lambda: flat.abs().sum() <= h + near,
        "l2_sphere": lambda: abs(flat.norm() - h) <= near,
        "l2_ball": lambda: flat.norm() <= h + near,
        "linf_ball": lambda: flat.abs().max() <= h,
    }[name]()


SETS = ["non_negative", "hypercube", "simplex", "l1_sphere", "l1_ball", "l2_sphere", "l2_ball", "linf_ball"]


@pytest.mark.parametrize("h", [0.0, 0.3, 1.0, 7.0])
@pytest.mark.parametrize("name", SETS)
def test_a_projection_is_the_nearest_point_of_the_set(name, h):
    """In the set, once more the same, and no point of the set that is tried is nearer."""
    project = getattr(projections, f"projection_{name}")
    project = project if name == "non_negative" else functools.partial(project, scale=h)
    others = [project(some(seed, size)) for seed in range(20, 40) for size in (0.1, 1.0)]
    for x in [*POINTS.values(), *(tree.cast(x, torch.float64) for x in EDGES.values())]:
        p = project(x)
        assert contains(name, p, h)
        assert_close(project(p), p, 1e-12)
        distance = tree.norm(tree.sub(x, p))
        assert all(tree.norm(tree.sub(x, q)) >= distance * (1 - 1e-12) - 1e-12 for q in others)


def test_where_optax_errs():
    # The tree of a bound that is a number.
    x = {"w": jnp.array([-1.0, 2.0])}
    with pytest.raises((ValueError, TypeError)):
        optax.projections.projection_hypercube(x)
    assert_close(projections.projection_hypercube({"w": torch.tensor([-1.0, 2.0])}), {"w": torch.tensor([0.0, 1.0])}, 0)
    # A zero inside of the l1 sphere.
    x = [0.1, 0.0]
    assert abs(optax.projections.projection_l1_sphere(jnp.array(x))).sum() < 0.6
    assert_close(projections.projection_l1_sphere(torch.tensor(x)), torch.tensor([0.55, 0.45]), 1e-6)
    # The middle of the l2 sphere.
    assert jnp.isnan(optax.projections.projection_l2_sphere(jnp.zeros(4))).all()
    assert_close(projections.projection_l2_sphere(torch.zeros(4)), torch.full((4,), 0.5), 0)
    # A set that is one point.
    for name in ("simplex", "l1_sphere", "l2_ball"):
        assert jnp.isnan(getattr(optax.projections, f"projection_{name}")(jnp.zeros(3), 0.0)).all()
        assert_close(getattr(projections, f"projection_{name}")(torch.zeros(3), 0.0), torch.zeros(3), 0)


def test_complex():
    """Where Optax takes the conjugate of the coefficient."""
    x, a = (torch.randn(5, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    line = projections.projection_vector(x, a)
    assert torch.vdot(a, x - line).abs() < 1e-12
    theirs = from_jax(optax.projections.projection_vector(to_jax(x), to_jax(a)))
    assert torch.vdot(a, x - theirs).abs() > 0.1
    assert_close(torch.vdot(a, projections.projection_hyperplane(x, a, 0.3)), torch.tensor(0.3, dtype=torch.complex128), 1e-12)
    assert_close(torch.vdot(a, projections.projection_halfspace(x, a, -9.0)).real, torch.tensor(-9.0, dtype=torch.float64), 1e-12)
    assert_close(projections.projection_l2_sphere(x), x / x.norm(), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETS)
def test_dtypes_stay(name, dtype):
    project = getattr(projections, f"projection_{name}")
    x = tree.cast(POINTS["1.0 0"], dtype)
    found = project(x)
    assert {y.dtype for y in tree.leaves(found)} == {dtype}
    assert_close(found, project(tree.cast(x, torch.float64)), 1e-6 if dtype == torch.float32 else 2**-8)
    mixed = project({**x, "b": tree.cast(x["b"], torch.float64)})
    assert {y.dtype for y in tree.leaves(mixed["b"])} == {torch.float64}


def test_nothing_to_project():
    for name in SETS:
        for empty in ({}, {"a": None}, {"a": torch.ones(0, 2)}):
            assert_close(getattr(projections, f"projection_{name}")(empty), empty, 0)
    a = {"a": torch.zeros(2)}
    assert_close(projections.projection_vector({"a": torch.ones(2)}, a), a, 0)
    for project in (projections.projection_hyperplane, projections.projection_halfspace):
        assert_close(project({"a": torch.ones(2)}, a, -1.0), {"a": torch.ones(2)}, 0)


@pytest.mark.parametrize("name", ["simplex", "l1_sphere", "l1_ball", "l2_sphere", "l2_ball", "linf_ball"])
def test_a_negative_scale(name):
    with pytest.raises(ValueError, match=r"scale must be >= 0, got -1.0"):
        getattr(projections, f"projection_{name}")(torch.ones(2), -1.0)


def test_every_name_of_optax_is_here():
    assert {name for name in dir(optax.projections) if name.startswith("projection_")} == {*projections.__all__}


@pytest.mark.parametrize("name", ["projection_simplex", "projection_l1_ball", "projection_l1_sphere"])
def test_what_is_not_finite_has_no_projection(name):
    """A run that diverges shows."""
    assert getattr(projections, name)(torch.tensor([float("inf"), 1.0, 2.0])).isnan().any()


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"floating-point tensors, got torch\.int64 at 'w'"):
        projections.projection_simplex({"w": torch.tensor([3, -1, 2])})
