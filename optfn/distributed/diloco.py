"""Many steps of each process by itself, and one of all together now and then: DiLoCo."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.checks import check_state, integer, require
from optfn.core import GradientTransformation, added, check_transformation, transformation
from optfn.distributed.zero import check_mesh
from optfn.leafwise import aligned, check_dense
from optfn.numerics import compute_dtype, ravel, unravel
from optfn.sharding import all_reduced, is_sharded, like, local

__all__ = ["LocalStepsState", "local_steps"]


class LocalStepsState(NamedTuple):
    """The state of :func:`local_steps`.

    Attributes:
        count: how many inner steps were made, a 0-dim int64 tensor, on the CPU: looking at it waits for no accelerator.
        inner_state: the inner transformation's, this process's own.
        outer_state: the outer transformation's, equal on all processes.
        outer_params: the parameters at the last outer step, with the structure of the parameters, equal on all processes.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    inner_state: Any
    outer_state: Any
    outer_params: Any


def local_steps(
    inner: GradientTransformation, outer: GradientTransformation, *, every: int, mesh: Any = None
) -> GradientTransformation:
    r"""Each process trains by itself, and every :math:`H` steps all go on from where they are on average (DiLoCo).

    .. math::
        \theta_{i,t} &= \theta_{i,t-1} + \mathrm{inner}(g_{i,t}) \\
        \Delta &= \tfrac1W \textstyle\sum_i (\phi - \theta_{i,t}), \qquad
        \phi \leftarrow \phi + \mathrm{outer}(\Delta), \qquad \theta_{i,t} \leftarrow \phi \qquad [t \bmod H = 0]

    Process :math:`i` of :math:`W` has data and gradients :math:`g_i` of its own, which nothing else may average (no
    ``DistributedDataParallel``). The outer transformation of the paper is ``optfn.sgd(lr=0.7, momentum=0.9, nesterov=True)``;
    ``optfn.sgd(lr=1.0)`` averages the parameters.

    *Communicated* is :math:`\Delta`, all leaves in one ``all_reduce``, in every :math:`H`-th step, and nothing in the others. One
    more in ``init`` makes :math:`\phi` the parameters of the first process. :func:`optfn.compile` keeps to that; plain
    :func:`torch.compile`, which computes both sides of a branch, communicates in every step. *Kept* is the state of ``inner``,
    over outer steps too as in the paper, and :math:`\phi` with the state of ``outer``, equal on all processes. So are the
    parameters after an outer step, up to the rounding of one addition.

    Evaluate with ``optfn.tree.get(state, "outer_params")``. Nothing after it in a chain may change the updates. A leaf whose
    gradient is None stays where it is, with an update of 0, and takes part in outer steps: on another process it may have moved.
    Extra arguments reach ``inner`` alone, as they are one process's own.

    On one process, without ``mesh``, it is :func:`lookahead` with an optimizer in the place of the step size. Where parameters
    lie on several processes ``mesh`` joins replicas, each of which has processes of its own for them.

    Args:
        inner: what makes the steps of each process.
        outer: what makes a step of :math:`\Delta`, as of a gradient.
        every: :math:`H \ge 1`.
        mesh: the processes, a mesh of one dimension or a process group; ``"self"`` where several run, and each trains by itself.

    Raises:
        TypeError: an argument of another type. From ``update``: ``params`` is missing, or a gradient is sparse.
        ValueError: an argument out of range. From ``init`` and ``update``: several processes run, and ``mesh`` does not say which
            train together. From ``init``: processes of ``mesh`` have pieces of the same tensor.
        RuntimeError: from ``update``: there is no derivative through what processes compute together.

    Reference:
        Douillard et al., `DiLoCo: Distributed Low-Communication Training of Language Models
        <https://arxiv.org/abs/2311.08105>`_, 2023, algorithm 1.

    Example:
        >>> tx = local_steps(optfn.sgd(lr=1.0), optfn.sgd(lr=0.5), every=2)
        >>> params = torch.tensor([0.0])
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(torch.tensor([-1.0]), state, params)
        ...     params = optfn.apply_updates(params, updates)
        ...     print(params, state.outer_params)
        tensor([1.]) tensor([0.])
        tensor([1.]) tensor([1.])
    """
    for tx in (inner, outer):
        check_transformation(tx, "local_steps", "local_steps(inner, outer, every=100)")
    period = integer("every", every, 1)
    group = _group(mesh)

    def init(params: Any) -> LocalStepsState:
        tree.checked(params, "local_steps: params")
        _check_processes(mesh)
        start = tree.map(lambda p: p.detach().clone(), params)
        if group is not None:
            _check_replicas(start, group)
            first = torch.distributed.get_rank(group) == 0
            start = _reduced(start, group, lambda x: x if first else torch.zeros_like(x))
        count = torch.zeros((), dtype=torch.int64, device="cpu")
        return LocalStepsState(count, inner.init(params), outer.init(start), start)

    def update(updates: Any, state: LocalStepsState, params: Any = None, **extra: Any) -> tuple[Any, LocalStepsState]:
        check_state("local_steps", state, LocalStepsState)
        if updates is not None:  # both are None for a bare tensor that a mask hides
            require("local_steps", params=params)
        _check_processes(mesh)
        check_dense("local_steps", aligned(updates, params))
        new, inner_state = inner.update(updates, state.inner_state, params, **extra)
        new = tree.map_entries(lambda p, u: torch.zeros_like(p) if u is None else u, params, new)
        count = state.count + 1

        def begun() -> Any:
            return tree.map_entries(lambda p, x: p.to(x.dtype, copy=True), params, state.outer_params)

        # So a derivative with respect to the first parameters reaches the outer ones, which init has no graph of.
        start = state.outer_params
        if group is None:
            start = tree.cond(state.count % period == 0, begun, lambda: state.outer_params)

        def apart() -> tuple[Any, Any, Any]:
            return new, state.outer_state, start

        def together() -> tuple[Any, Any, Any]:
            moved = tree.map_entries(_difference, start, added(params, new)[0])
            delta = moved if group is None else _reduced(moved, group, lambda x: x / group.size())
            step, outer_state = outer.update(delta, state.outer_state, start)
            outer_params = added(start, step)[0]
            back = tree.map_entries(lambda x, p, u: _difference(x, p).to(u.dtype), outer_params, params, new)
            return back, outer_state, outer_params

        # All processes have the same count, so all of them meet.
        new, outer_state, outer_params = tree.cond(count % period == 0, together, apart)
        return new, LocalStepsState(count, inner_state, outer_state, outer_params)

    return transformation(init, update)


def _difference(x: Tensor, y: Tensor) -> Tensor:
    wide = compute_dtype(x, y)
    return x.to(wide) - y.to(wide)


def _group(mesh: Any) -> Any:
    """The processes that train together; None if this one does by itself."""
    if mesh is None or mesh == "self" or isinstance(mesh, torch.distributed.ProcessGroup):
        return None if isinstance(mesh, str) else mesh
    check_mesh("local_steps", mesh)
    return mesh.get_group()


def _check_processes(mesh: Any) -> None:
    distributed = torch.distributed
    if mesh is None and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            "local_steps: torch.distributed runs on several processes: say mesh=torch.distributed.group.WORLD if they train "
            "together, or mesh='self' if each trains by itself"
        )


def _check_replicas(params: Any, group: Any) -> None:
    ranks = {*torch.distributed.get_process_group_ranks(group)}
    for path, p in zip(tree.paths(params), tree.flatten(params)[0], strict=True):
        if is_sharded(p) and len(ranks.intersection(p.device_mesh.mesh.flatten().tolist())) > 1:
            raise ValueError(
                f"local_steps: {path!r} lies on several processes of `mesh`, which is to join processes that train replicas: "
                "each replica must have a mesh of its own"
            )


def _reduced(of: Any, group: Any, f: Any) -> Any:
    """The sum over processes of what ``f`` makes of all entries of a tree, as one vector: one all_reduce for all leaves."""
    homes, spec = tree.flatten(of)
    pieces = [None if x is None else local(x) for x in homes]
    first = next((x for x in pieces if x is not None and x.numel()), None)
    if first is None:
        return of
    vector = ravel([None if x is None else x.to(first.device) for x in pieces])
    total = unravel(all_reduced(f(vector), group), pieces)
    return tree.unflatten(spec, [None if x is None else like(x.to(h.device), h) for x, h in zip(total, homes, strict=True)])
