"""Optax in float64 on the CPU, trajectories to compare with it, and graphs that are counted."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
import torch
from torch import Tensor

import optfn

jax.config.update("jax_enable_x64", True)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
SHAPES = {"w": (3, 2), "b": (2,), "s": ()}


def some_params(dtype=torch.float64, shapes=SHAPES):
    """The same numbers in every dtype: they are those of float32."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def some_grads(steps=12, dtype=torch.float64, shapes=SHAPES):
    """Gradients over several orders of magnitude, among them one that is exactly zero."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for step in range(steps):
        size = 10.0 ** (step % 4 - 3)
        made.append({name: (size * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()})
    made[1:2] = [optfn.tree.map(torch.zeros_like, g) for g in made[1:2]]
    return made


def to_jax(tree):
    """In float64: the oracle is as exact as it can be also where float32 is tested."""
    return optfn.tree.map(lambda x: jax.numpy.asarray(np.asarray(x.double() if x.is_floating_point() else x)), tree)


def from_jax(tree):
    return jax.tree.map(lambda x: torch.from_numpy(np.array(x)), tree)


def exact(schedule):
    """An Optax schedule in float64: of an int32 count it would give a float32."""
    return lambda count: schedule(jax.numpy.asarray(count, jax.numpy.int64))


def run(tx, params, grads):
    """The updates and the parameters of every step, and the last state."""
    state, steps = tx.init(params), []
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optfn.apply_updates(params, updates)
        steps.append({"updates": updates, "params": params})
    return steps, state


def run_optax(tx, params, grads):
    params, update = to_jax(params), jax.jit(tx.update)
    state, steps = tx.init(params), []
    for g in grads:
        updates, state = update(to_jax(g), state, params)
        params = optax.apply_updates(params, updates)
        steps.append(from_jax({"updates": updates, "params": params}))
    return steps, state


def assert_close(ours, theirs, tolerance):
    """Every leaf within ``tolerance`` of the expected one, relative to 1 + abs; NaN where NaN is."""
    found, spec = optfn.tree.flatten(theirs)
    given = optfn.tree.match(spec, ours, "ours", "theirs")
    for path, x, y in zip(optfn.tree.paths(theirs), given, found, strict=True):
        if y is None:
            assert x is None, path
            continue
        x, y = dense(x), dense(y)
        assert x.shape == y.shape, path
        torch.testing.assert_close(
            x / (1 + y.abs().to(x.dtype)), (y / (1 + y.abs())).to(x.dtype), rtol=0, atol=tolerance, equal_nan=True, msg=path
        )


def dense(x) -> Tensor:
    x = torch.as_tensor(x).detach()
    x = x.to_dense() if x.layout == torch.sparse_coo else x
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def counted(fn):
    """``fn`` in full graphs that run eagerly, and the list that these graphs are put in."""
    graphs = []

    def collect(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend=collect), graphs
