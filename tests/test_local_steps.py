"""Many steps of each process by itself, and one of all together: against the paper's Algorithm 1 with optimizers of torch."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from meshes import full_params, whole
from processes import each, of, on_processes
from test_processes import difference
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

import optfn
from optfn.distributed import local_steps
from optfn.interop import TorchOptimizer

WORLD, H, STEPS = 4, 3, 11  # three outer steps, and some more
Tree = dict[str, Any]


def gradients(worker: int, step: int, params: Tree) -> Tree:
    """Of a loss that is least elsewhere on each worker and in each step. Some workers have none for a leaf now and then."""
    generator = torch.Generator().manual_seed(1000 * worker + step)
    grads = {name: p - 3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in params.items()}
    return {**grads, "b": None} if (worker + step) % 4 == 2 else grads


def algorithm_1(workers: int, make_inner: Any, make_outer: Any) -> list[Tree]:
    """DiLoCo in one process: the parameters of each worker, and then those of the outer optimizer."""
    theta = {name: p.requires_grad_() for name, p in full_params().items()}
    replicas = [full_params() for _ in range(workers)]
    inner = [make_inner(list(replica.values())) for replica in replicas]
    outer = make_outer(list(theta.values()))
    for step in range(1, STEPS + 1):
        for worker, (replica, optimizer) in enumerate(zip(replicas, inner, strict=True)):
            for name, g in gradients(worker, step, replica).items():
                replica[name].grad = g
            optimizer.step()
        if step % H == 0:
            for name, p in theta.items():
                p.grad = sum(p.detach() - replica[name] for replica in replicas) / workers
            outer.step()
            for name, p in theta.items():
                for replica in replicas:
                    replica[name].copy_(p)
    return [*replicas, {name: p.detach() for name, p in theta.items()}]


def torch_inner(params: list[Tensor]) -> Any:
    return torch.optim.AdamW(params, lr=0.1)


def torch_outer(params: list[Tensor]) -> Any:
    return torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)


def inner() -> optfn.GradientTransformation:
    return optfn.adamw(0.1)


def outer() -> optfn.GradientTransformation:
    return optfn.sgd(lr=0.7, momentum=0.9, nesterov=True)


def trained(
    tx: optfn.GradientTransformation,
    worker: int = 0,
    params: Any = None,
    each: Callable[[Any], None] = lambda state: None,
    gradients: Callable[[int, int, Tree], Tree] = gradients,
) -> tuple[Tree, Any]:
    params = full_params() if params is None else params
    state = tx.init(params)
    for step in range(1, STEPS + 1):
        updates, state = tx.update(gradients(worker, step, params), state, params)
        params = optfn.apply_updates(params, updates)
        each(state)
    return params, state


# One process


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def test_one_process_is_one_worker() -> None:
    params, state = trained(local_steps(inner(), outer(), every=H))
    assert difference(algorithm_1(1, torch_inner, torch_outer), [params, state.outer_params]) <= 1e-12
    assert int(state.count) == STEPS


def test_a_plain_outer_step_is_lookahead() -> None:
    # Lookahead leaves alone what has no gradient when the others are moved.
    every = lambda worker, step, params: {**gradients(0, step, params), "b": params["b"] - 1}  # noqa: E731
    params, state = trained(local_steps(inner(), optfn.sgd(lr=0.3), every=H), gradients=every)
    ahead, expected = trained(optfn.lookahead(inner(), H, 0.3), gradients=every)
    assert difference((ahead, expected.slow), (params, state.outer_params)) <= 1e-12


def test_one_inner_step_and_all_of_it_is_the_inner_transformation() -> None:
    # Of a leaf without a gradient both say the same in another way: nothing, and 0.
    params, state = trained(local_steps(inner(), optfn.sgd(lr=1.0), every=1))
    alone, expected = trained(inner())
    assert difference((alone, expected), (params, state.inner_state)) <= 1e-12


def test_derivatives_reach_the_first_parameters() -> None:
    def end(tx: optfn.GradientTransformation) -> Any:
        def of(start: Tensor) -> Tensor:
            params, state = start, tx.init(start)
            for _ in range(2 * H + 1):
                updates, state = tx.update(params.sin(), state, params)
                params = optfn.apply_updates(params, updates)
            return params.square().sum()

        return torch.func.grad(of)(torch.tensor([0.5, 2.0], dtype=torch.float64))

    wanted = end(optfn.lookahead(optfn.sgd(0.1), H, 0.3))
    assert (wanted - end(local_steps(optfn.sgd(0.1), optfn.sgd(lr=0.3), every=H))).abs().max() <= 1e-12


def test_half_precision_and_complex_leaves_and_what_is_hidden() -> None:
    """The local parameters are the outer ones again, to the last bit where numbers are not far apart."""
    tx = optfn.masked(local_steps(optfn.sgd(0.125), optfn.sgd(lr=0.5), every=2), lambda path, p: path != "hidden")
    params = {
        "half": torch.full((3,), 4.0, dtype=torch.bfloat16),
        "z": torch.full((2, 2), 4 + 4j),
        "hidden": torch.ones(2),
        "none": torch.zeros(0),
        "missing": None,
    }
    state, start = tx.init(params), params
    for _ in range(2):
        grads = {name: p if p is None else torch.ones_like(p) for name, p in start.items()}
        updates, state = tx.update(grads, state, params)
        assert [u if u is None else u.dtype for u in updates.values()] == [g if g is None else g.dtype for g in grads.values()]
        params = optfn.apply_updates(params, {**updates, "hidden": None})
    # Two steps of -0.125, half of it taken.
    assert torch.equal(params["half"], start["half"] - 0.125)
    assert torch.equal(params["z"], start["z"] - 0.125)
    assert torch.equal(state.inner_state.outer_params["half"], params["half"])
    assert state.inner_state.outer_params["hidden"] is None


def test_it_maps_and_compiles_to_one_graph() -> None:
    tx = local_steps(inner(), outer(), every=H)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optfn.apply_updates(params, updates), state

    def run(step: Callable[..., Any], params: Any, state: Any, scale: Any) -> Any:
        for k in range(2 * H + 1):
            grads = {**gradients(0, k, full_params()), "b": full_params()["b"]}  # None cannot be mapped over
            params, state = step(params, state, {name: g * scale(g) for name, g in grads.items()})
        return params

    alone = [run(step, full_params(), tx.init(full_params()), lambda g, scale=scale: scale) for scale in (1.0, 2.0)]
    fast = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert difference(alone[0], run(fast, full_params(), tx.init(full_params()), lambda g: 1.0)) <= 1e-12
    both = {name: torch.stack([p, p]) for name, p in full_params().items()}
    scales = lambda g: torch.tensor([1.0, 2.0]).double().reshape(2, *[1] * g.ndim)  # noqa: E731
    mapped = run(torch.vmap(step), both, torch.vmap(tx.init)(both), scales)
    assert difference({n: torch.stack([x[n] for x in alone]) for n in both}, mapped) <= 1e-12


def test_a_run_is_resumed_between_outer_steps() -> None:
    tx = local_steps(inner(), outer(), every=H)
    params, state = full_params(), tx.init(full_params())
    for step in range(1, STEPS + 1):
        updates, state = tx.update(gradients(0, step, params), state, params)
        params = optfn.apply_updates(params, updates)
        if step == H + 1:
            state = optfn.tree.from_flat_dict(optfn.tree.to_flat_dict(state), like=tx.init(params))
    assert difference(trained(tx), (params, state)) == 0


def test_a_torch_optimizer_of_it() -> None:
    model = {name: torch.nn.Parameter(p) for name, p in full_params().items()}
    optimizer = TorchOptimizer(model.items(), lambda lr: local_steps(optfn.adamw(lr), outer(), every=H), lr=0.1)
    for step in range(1, STEPS + 1):
        for name, g in gradients(0, step, {name: p.detach() for name, p in model.items()}).items():
            model[name].grad = g
        optimizer.step()
    params = {name: p.detach() for name, p in model.items()}
    assert (
        difference(algorithm_1(1, torch_inner, torch_outer), [params, optfn.tree.get(optimizer.states[0], "outer_params")]) <= 1e-12
    )


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        (lambda: local_steps(optfn.adamw, outer(), every=H), TypeError, "local_steps takes transformations"),
        (lambda: local_steps(inner(), outer(), every=0), ValueError, "every must be >= 1, got 0"),
        (lambda: local_steps(inner(), outer(), every=H, mesh=4), TypeError, "local_steps takes a mesh, .* got int"),
        (lambda: trained(local_steps(inner(), outer(), every=H), params=torch.nn.Linear(1, 1)), TypeError, "params is a module"),
        (
            lambda: (tx := local_steps(inner(), outer(), every=H)).update(full_params(), tx.init(full_params())),
            TypeError,
            "local_steps needs `params`",
        ),
        (
            lambda: inner().init(full_params()) and local_steps(inner(), outer(), every=H).update({}, (), {}),
            TypeError,
            "needs the state",
        ),
        (
            lambda: (tx := local_steps(inner(), outer(), every=H)).update(
                {"w": torch.ones(2).to_sparse()}, tx.init({"w": torch.ones(2)}), {"w": torch.ones(2)}
            ),
            TypeError,
            "local_steps: 'w' has a sparse gradient",
        ),
    ],
)
def test_what_is_refused(how: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        how()


# Several processes, started once


def made() -> int:
    """How many messages there were in the group of all."""
    return dist.group.WORLD._get_sequence_number_for_group()


def together() -> Any:
    counts = [made()]
    tx = local_steps(inner(), outer(), every=H, mesh=dist.group.WORLD)
    params, state = trained(tx, dist.get_rank(), each=lambda state: counts.append(made()))
    return params, state.outer_params, [after - before for before, after in itertools.pairwise(counts)]


def from_elsewhere() -> Any:
    """Processes that begin apart: the first one's parameters are those of all after the first outer step."""
    tx = local_steps(optfn.scale(0.0), optfn.scale(0.0), every=1, mesh=dist.init_device_mesh("cpu", (WORLD,)))
    params = {name: p + dist.get_rank() for name, p in full_params().items()}
    updates, _ = tx.update(params, tx.init(params), params)
    return optfn.apply_updates(params, updates)


def of_pieces() -> Any:
    """Two replicas, each on two processes."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "within"))

    def lay(tree: Tree) -> Tree:
        cut = lambda p: distribute_tensor(p, mesh["within"], [Shard(0)]) if p.ndim else p  # noqa: E731
        return optfn.tree.map(cut, tree)

    tx = local_steps(optfn.chain(optfn.clip_by_global_norm(1.0), inner()), outer(), every=H, mesh=mesh["replicas"])
    params = lay(full_params())
    state = tx.init(params)
    for step in range(1, STEPS + 1):
        grads = lay(gradients(mesh.get_local_rank("replicas"), step, whole(params)))
        updates, state = tx.update(grads, state, params)
        params = optfn.apply_updates(params, updates)
    with pytest.raises(ValueError, match=r"local_steps: 'b' lies on several processes of `mesh`, .* a mesh of its own"):
        local_steps(inner(), outer(), every=H, mesh=mesh["within"]).init(params)
    return whole(params), whole(state.outer_params)


def refused() -> None:
    tx, params = local_steps(inner(), outer(), every=H), full_params()
    with pytest.raises(ValueError, match=r"local_steps: .* say mesh=torch.distributed.group.WORLD .* or mesh='self'"):
        tx.init(params)
    with pytest.raises(ValueError, match=r"a mesh of one dimension, this one has 2: give one of them, mesh\['a'\] perhaps"):
        local_steps(inner(), outer(), every=H, mesh=dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")))
    before = made()
    found, _ = trained(local_steps(inner(), outer(), every=H, mesh="self"), dist.get_rank())
    assert made() == before
    tx = local_steps(inner(), outer(), every=1, mesh=dist.group.WORLD)
    state, recorded = tx.init(params), {name: p.clone().requires_grad_() for name, p in params.items()}
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no derivative through what several processes compute together"):
        tx.update(params, state, recorded)
    return found


def all_checks() -> dict[str, Any]:
    found = each((together, from_elsewhere, of_pieces, refused))
    return optfn.tree.map(lambda x: x.numpy() if isinstance(x, Tensor) else x, found)


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    found = on_processes(all_checks, WORLD)
    return [{name: tensors(x) for name, x in answer.items()} for answer in found]


def tensors(x: Any) -> Any:
    return optfn.tree.map(lambda y: torch.as_tensor(y) if hasattr(y, "dtype") else y, x)


@pytest.mark.slow
def test_processes_are_the_workers_of_the_paper(answers: list[dict[str, Any]]) -> None:
    *replicas, theta = algorithm_1(WORLD, torch_inner, torch_outer)
    for replica, (params, outer_params, _) in zip(replicas, of(answers, together), strict=True):
        assert difference((replica, theta), (params, outer_params)) <= 1e-12
        assert all(torch.equal(x, answers[0]["together"][1][name]) for name, x in outer_params.items())


@pytest.mark.slow
def test_nothing_is_communicated_between_outer_steps(answers: list[dict[str, Any]]) -> None:
    for _, _, counts in of(answers, together):
        assert counts == [int(step == 1 or step % H == 0) for step in range(1, STEPS + 1)]  # one in init


@pytest.mark.slow
def test_processes_begin_from_the_first_one(answers: list[dict[str, Any]]) -> None:
    for params in of(answers, from_elsewhere):
        assert difference(full_params(), params) <= 1e-12


@pytest.mark.slow
def test_parameters_may_lie_on_several_processes(answers: list[dict[str, Any]]) -> None:
    def workers() -> list[Any]:
        tx = [optfn.chain(optfn.clip_by_global_norm(1.0), inner()) for _ in range(2)]
        states, replicas = [t.init(full_params()) for t in tx], [full_params() for _ in range(2)]
        theta, momentum = full_params(), outer().init(full_params())
        for step in range(1, STEPS + 1):
            for w in range(2):
                updates, states[w] = tx[w].update(gradients(w, step, replicas[w]), states[w], replicas[w])
                replicas[w] = optfn.apply_updates(replicas[w], updates)
            if step % H == 0:
                delta = {name: p - (replicas[0][name] + replicas[1][name]) / 2 for name, p in theta.items()}
                updates, momentum = outer().update(delta, momentum, theta)
                theta = optfn.apply_updates(theta, updates)
                replicas = [dict(theta), dict(theta)]
        return [*replicas, theta]

    *replicas, theta = workers()
    for rank, found in enumerate(of(answers, of_pieces)):
        assert difference((replicas[rank // 2], theta), found) <= 1e-12


@pytest.mark.slow
def test_what_is_refused_is_refused_by_all(answers: list[dict[str, Any]]) -> None:
    for rank, params in enumerate(of(answers, refused)):
        assert difference(trained(local_steps(inner(), outer(), every=H), rank)[0], params) == 0


def compiled() -> list[Any]:
    """For each way to compile: messages of each step, and how far it is from the eager one."""
    tx, found = local_steps(optfn.sgd(0.1), outer(), every=2, mesh=dist.group.WORLD), []

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optfn.apply_updates(params, updates), state

    for donate in (("params", "state"), ()):
        fast, counts = optfn.compile(step, donate=donate), list[int]()
        params, ours = torch.ones(3), torch.ones(3)
        state, other = tx.init(params), tx.init(ours)
        for k in range(4):
            g = torch.arange(3.0) + k + dist.get_rank()
            params, state = step(params, state, g)
            before = made()
            ours, other = fast(ours, other, g)
            counts.append(made() - before)
        found.append((counts, float((params - ours).abs().max())))
    return found


@pytest.mark.slow
@pytest.mark.codegen
def test_a_compiled_step_communicates_when_it_is_due() -> None:
    for found in on_processes(compiled, 2):
        for counts, apart in found:
            assert counts == [0, 1, 0, 1]
            assert apart <= 1e-6
