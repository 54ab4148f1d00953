"""A state that is cut over processes, of parameters that all of them have: every transformation against one process."""

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from meshes import full_grads, full_params, whole
from processes import each, named_counts, of, on_processes
from test_processes import ALL, EXTRA, SEARCHES, VALUES, WRAPPERS, Net, adamw, aliases, difference, in_trees, is_matrix, net
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import optfn
from optfn.distributed import shard_state

WORLD, STEPS = 4, 5
Make = Callable[[], optfn.GradientTransformation]
Tree = dict[str, Any]


def mesh() -> Any:
    return dist.init_device_mesh("cpu", (WORLD,))


def steps(tx: optfn.GradientTransformation, grads: Callable[[int], Tree], start: Tree, **extra: Any) -> tuple[Tree, Any]:
    params, state = start, tx.init(start)
    for step in range(STEPS):
        given = {name: x[step] if isinstance(x, list) else x for name, x in extra.items()}
        updates, state = tx.update(grads(step), state, params, **given)
        assert not any(isinstance(u, DTensor) for u in updates.values())
        params = optfn.apply_updates(params, updates)
    return params, state


def apart(alone: Make, cut: optfn.GradientTransformation, grads: Any = full_grads, start: Any = full_params, **extra: Any) -> Any:
    """How far one process is from several, and what these end with."""
    params, state = steps(cut, grads, start(), **extra)
    state = whole(state)
    try:
        worst: Any = 0.0
        if dist.get_rank() == 0:
            wanted, expected = steps(alone(), grads, start(), **extra)
            worst = difference((wanted, in_trees(expected, wanted)), (params, state))
    except Exception:  # one process may not leave the others waiting
        worst = traceback.format_exc()
    return worst, ended(params)


def ended(params: Tree) -> list[bytes]:
    return [torch.view_as_real(x).numpy().tobytes() if x.is_complex() else x.double().numpy().tobytes() for x in params.values()]


SOME = (
    *("muon", "clip", "clip_by_block_rms", "centralize", "accumulate", "apply_if_finite", "ema_params", "lookahead", "mechanize"),
    *("schedule_free", "reduce_on_plateau", "snapshot", "masked", "by the parameter", "coupled, of whole leaves"),
)


def every_transformation() -> dict[str, Any]:
    """Every alias, and wrappers of each kind: what is shown entries, norms, sums over leaves, or whole tensors."""
    found: dict[str, Any] = {}
    handed_more = {*SEARCHES, "dpsgd"}  # functions, the gradients of examples
    for name, make in {**aliases(), **{name: WRAPPERS[name] for name in SOME}}.items():
        if name in handed_more:
            continue
        found[name] = apart(make, shard_state(make(), mesh()), **({"value": VALUES} if name in EXTRA else {}))
    return found


def placed() -> dict[str, Any]:
    """Within what composes transformations, and around it; over some of the processes alone."""
    rate = optfn.linear_schedule(0.1, 0.0, 8)
    cut = lambda tx: shard_state(tx, mesh())  # noqa: E731
    node = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("nodes", "within"))["within"]
    cases: dict[str, Callable[[Any], optfn.GradientTransformation]] = {
        "chain": lambda cut: optfn.chain(
            optfn.clip_by_global_norm(0.1), cut(optfn.scale_by_adam()), optfn.scale_by_learning_rate(rate)
        ),
        "partition": lambda cut: optfn.partition(
            {"matrix": cut(optfn.muon(ns_dtype=None)), "rest": cut(adamw())}, lambda path, p: "matrix" if p.ndim == 2 else "rest"
        ),
        "masked": lambda cut: optfn.chain(optfn.masked(cut(optfn.trace(0.9)), is_matrix), optfn.scale(-0.1)),
        "freeze": lambda cut: optfn.chain(optfn.freeze(is_matrix), cut(adamw())),
        "inject_hyperparams": lambda cut: optfn.inject_hyperparams(lambda lr: cut(optfn.adamw(lr)))(lr=0.1),
    }
    found = {name: apart(lambda make=make: make(lambda tx: tx), make(cut)) for name, make in cases.items()}
    for name in ("clip", "muon", "lamb", "adafactor"):
        found[f"{name}, of a node"] = apart(ALL[name], shard_state(ALL[name](), node))
    return found


def odd_params() -> Tree:
    """Several dtypes, complex and empty leaves, one that is not there; the best dimension to cut is not always the first."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (3, 8), "z": (6, 3), "half": (9, 2), "single": (2, 5, 3), "one": (1, 1), "none": (0, 3), "flat": (3, 0)}
    dtypes = {"z": torch.complex128, "half": torch.bfloat16, "single": torch.float32}
    found: Tree = {
        name: torch.randn(shape, generator=generator, dtype=dtypes.get(name, torch.float64)) for name, shape in shapes.items()
    }
    return {**found, "s": torch.tensor(2.0, dtype=torch.complex64), "missing": None}


def odd_grads(step: int) -> Tree:
    grads = {name: x if x is None else x * (1 + step) for name, x in odd_params().items()}
    return {**grads, "w": None} if step == 1 else dict.fromkeys(grads) if step == 3 else grads


def odd() -> dict[str, Any]:
    def steps_of(tx: optfn.GradientTransformation, given: bool) -> Any:
        params, state = odd_params(), tx.init(odd_params())
        all_of: list[Any] = []
        for step in range(STEPS):
            updates, state = tx.update(odd_grads(step), state, params if given else None)
            all_of.append(updates)
        return all_of, state

    found: dict[str, Any] = {}
    for name, make, given in (
        ("adamw", adamw, True),
        ("lamb", lambda: optfn.lamb(0.1), True),
        ("sgd", lambda: optfn.sgd(0.1, momentum=0.9), False),
        ("whole", lambda: optfn.leafwise(lambda p: (), lambda g, slots, p, step: (g / (1 + g.abs().sum()), slots)), False),
    ):
        updates, state = steps_of(shard_state(make(), mesh()), given)
        wanted, expected = steps_of(make(), given)
        ours, theirs = optfn.tree.flatten(updates), optfn.tree.flatten(wanted)
        assert ours[1] == theirs[1]
        assert [x is None for x in ours[0]] == [x is None for x in theirs[0]]
        exact = lambda x: x.dtype in (torch.float64, torch.complex128)  # noqa: E731
        pairs = [(x, y) for x, y in zip(ours[0], theirs[0], strict=True) if x is not None]
        assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)
        found[name] = max(difference_of(x, y) for x, y in pairs if exact(y))
        found[f"{name}, narrow"] = max(difference_of(x, y) for x, y in pairs if not exact(y))
        assert len(optfn.tree.leaves(state)) == len(optfn.tree.leaves(expected))
    return found


def difference_of(x: Tensor, y: Tensor) -> float:
    x, y = (z.to(torch.complex128) for z in (x, y))
    return float(((x - y).abs() / (1 + y.abs())).max()) if x.numel() else 0.0


def size(x: Any) -> int:
    return x.numel() * x.element_size()


def kept() -> dict[str, tuple[int, int, int]]:
    """Bytes of a state: here, in all, and of one row of each of its leaves."""
    found: dict[str, tuple[int, int, int]] = {}
    cases = {"sgd": lambda: optfn.sgd(0.1, momentum=0.9), **{name: ALL[name] for name in ("adamw", "lamb", "muon", "ema_params")}}
    for name, make in cases.items():
        state = optfn.tree.leaves(shard_state(make(), mesh()).init(full_params()))
        rows = [x for x in state if x.ndim and isinstance(x, DTensor)]
        found[name] = (
            sum(size(x.to_local() if isinstance(x, DTensor) else x) for x in state),
            sum(map(size, state)),
            sum(size(x) // x.shape[0] for x in rows),
        )
    # A gradient that is kept, as it is, must not keep the whole of it.
    tx = shard_state(optfn.scale_by_optimistic_gradient(), mesh())
    params = full_params()
    state = optfn.tree.leaves(tx.update(full_grads(0), tx.init(params), params)[1])
    held = sum(x.to_local().untyped_storage().nbytes() for x in state if isinstance(x, DTensor))
    found["in memory"] = (held, sum(map(size, params.values())), sum(size(x) // x.shape[0] for x in params.values() if x.ndim))
    return found


COUNTS: dict[str, tuple[Callable[[Any], optfn.GradientTransformation], dict[str, int]]] = {
    "adamw": (lambda cut: cut(adamw()), {"all_gather": 1}),
    "clip inside": (lambda cut: cut(ALL["clip"]()), {"all_gather": 1, "all_reduce": 1}),
    "clip before": (lambda cut: optfn.chain(optfn.clip_by_global_norm(0.1), cut(adamw())), {"all_gather": 1}),
    "muon, adamw": (lambda cut: cut(ALL["muon"]()), {"all_gather": 1, "all_to_all": 2}),
    "two dtypes": (lambda cut: cut(adamw()), {"all_gather": 1}),
    "nothing": (lambda cut: cut(optfn.set_to_zero()), {}),
}


def counted() -> dict[Any, dict[str, int]]:
    found: dict[Any, dict[str, int]] = {}
    for name, (make, _) in COUNTS.items():
        for depth in (2, 4):
            shapes = {f"{i}.{leaf}": shape for i in range(depth) for leaf, shape in (("w", (8, 12)), ("v", (12, 8)), ("b", (8,)))}
            params = {leaf: torch.ones(shape, dtype=torch.float64) for leaf, shape in shapes.items()}
            if name == "two dtypes":
                params["0.b"] = params["0.b"].to(torch.bfloat16)
            tx = make(lambda tx: shard_state(tx, mesh()))
            _, state = tx.update(params, tx.init(params), params)
            grads = dict.fromkeys(params) if name == "nothing" else params
            with CommDebugMode() as mode:
                tx.update(grads, state, params)
            found[name, depth] = named_counts(mode)
    return found


OPTIMIZERS: dict[str, Callable[..., optfn.GradientTransformation]] = {
    "adamw": lambda lr: optfn.adamw(lr),
    "clip": lambda lr: optfn.chain(optfn.clip_by_global_norm(0.1), optfn.adamw(lr)),
    "adafactor": lambda lr: optfn.adafactor(lr),
}


def trained(model: Any, make: Any, batches: list[Any], *, resume: str = "") -> tuple[Any, Any]:
    """A loop as people have it: a scheduler, and in the middle a checkpoint that a new optimizer takes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

    def made() -> tuple[Any, Any]:
        optimizer = optfn.interop.TorchOptimizer(model.named_parameters(), make, lr=0.1)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    optimizer, scheduler = made()
    for k, (x, y) in enumerate(batches):
        if resume and k == 3:
            old, when = optimizer, scheduler.state_dict()
            optimizer, scheduler = made()
            if resume == "state_dict":
                optimizer.load_state_dict(old.state_dict())
            else:
                options = StateDictOptions(full_state_dict=resume == "full")
                saved = get_optimizer_state_dict(model, old, options=options)
                set_optimizer_state_dict(model, optimizer, saved, options=options)
            scheduler.load_state_dict(when)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}, optimizer.states[0]


def under_ddp() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    batches = [[torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (7, 2)] for _ in range(STEPS)]
    mine = [[x.chunk(WORLD)[dist.get_rank()] for x in batch] for batch in batches]
    found: dict[str, Any] = {}
    with torch.enable_grad():
        for name, make in OPTIMIZERS.items():
            alone = trained(net(), make, batches)
            for resume in ("", "state_dict", "dcp", "full") if name == "adamw" else ("full",):
                model = DistributedDataParallel(net())
                params, state = trained(model, lambda lr, make=make: shard_state(make(lr), mesh()), mine, resume=resume)
                leaves = [x for x in optfn.tree.leaves(state) if x.ndim > 1]
                assert all(isinstance(x, DTensor) for x in leaves) or name == "adafactor"
                found[f"{name} {resume}"] = difference(alone, (params, state)), ended(params)
    return found


def by_functions() -> Any:
    """A function among the extra arguments is one of whole parameters."""
    make = lambda: optfn.sam(adamw(), optfn.chain(optfn.normalize(), optfn.sgd(0.1)), opaque_mode=True)  # noqa: E731

    def grad_fn(params: Tree, i: int) -> Tree:
        assert not any(isinstance(p, DTensor) for p in params.values())
        return {name: p.sin() * p.sum() for name, p in params.items()}

    return {"sam": apart(make, shard_state(make(), mesh()), grad_fn=grad_fn)}


def refused() -> None:
    tx, params = shard_state(adamw(), mesh()), full_params()
    state = tx.init(params)
    with pytest.raises(TypeError, match="shard_state takes transformations"):
        shard_state(optfn.adamw, mesh())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"shard_state takes a mesh, .* got ProcessGroup"):
        shard_state(adamw(), dist.group.WORLD)
    with pytest.raises(ValueError, match=r"a mesh of one dimension, this one has 2: give one of them, mesh\['a'\] perhaps"):
        shard_state(adamw(), dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")))
    with pytest.raises(ValueError, match="shard_state: the processes of the mesh must be in ascending order"):
        shard_state(adamw(), dist.DeviceMesh("cpu", [3, 1, 0, 2]))
    cut = {"w": distribute_tensor(params["w"], mesh(), [Shard(0)])}
    for wrong in (cut, {"w": distribute_tensor(params["w"], mesh(), [Replicate()])}):
        with pytest.raises(TypeError, match="shard_state: 'w' lies on several processes already"):
            tx.init(wrong)
    with pytest.raises(TypeError, match="shard_state: 'w' lies on several processes already"):
        tx.update({**full_grads(0), **cut}, state, params)
    with pytest.raises(TypeError, match=r"shard_state: 'w' is sparse, .* \.to_dense\(\)"):
        tx.update({**full_grads(0), "w": params["w"].to_sparse()}, state, params)
    with pytest.raises(ValueError, match=r"'w' must have an update of shape \(7, 4\), got \(4, 7\)"):
        tx.update({**full_grads(0), "w": params["w"].T}, state, params)
    with pytest.raises(TypeError, match="shard_state: params is a module"):
        tx.init(Net())
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no derivative through what several processes compute together"):
        tx.update(full_grads(0), state, {name: p.clone().requires_grad_() for name, p in params.items()})


CHECKS: tuple[Callable[[], Any], ...] = (every_transformation, placed, odd, kept, counted, under_ddp, by_functions, refused)


def all_checks() -> dict[str, Any]:
    return each(CHECKS)


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    """What each check gives on each of four processes, which are started once."""
    return on_processes(all_checks, WORLD, seconds=300)


@pytest.mark.slow
@pytest.mark.parametrize("check", [every_transformation, placed, under_ddp, by_functions], ids=lambda check: check.__name__)
def test_a_cut_state_is_that_of_one_process(answers: list[dict[str, Any]], check: Callable[[], Any]) -> None:
    first, *others = of(answers, check)
    assert len(first) > 0
    assert {name: x for name, (x, _) in first.items() if isinstance(x, str) or not x <= 1e-12} == {}
    for other in others:
        assert [name for name, (_, params) in first.items() if other[name][1] != params] == [], "parameters have parted"


@pytest.mark.slow
def test_leaves_of_every_kind(answers: list[dict[str, Any]]) -> None:
    for found in of(answers, odd):
        assert {name: x for name, x in found.items() if not x <= (1e-6 if "narrow" in name else 1e-12)} == {}


@pytest.mark.slow
def test_a_process_keeps_its_part_alone(answers: list[dict[str, Any]]) -> None:
    for found in of(answers, kept):
        for name, (here, whole_state, rows) in found.items():
            assert here <= whole_state / WORLD + rows, name


@pytest.mark.slow
def test_what_is_communicated_does_not_grow_with_the_depth(answers: list[dict[str, Any]]) -> None:
    for found in of(answers, counted):
        assert found == {(name, depth): wanted for name, (_, wanted) in COUNTS.items() for depth in (2, 4)}


@pytest.mark.slow
def test_what_is_refused_is_refused_by_all(answers: list[dict[str, Any]]) -> None:
    of(answers, refused)


def test_the_package_costs_nothing_to_import() -> None:
    """What torch.distributed has beyond what torch itself imports comes with the first use."""
    import subprocess
    import sys

    code = (
        "import sys, torch; before = {*sys.modules}; import optfn; optfn.distributed.shard_state; "
        "assert not [m for m in {*sys.modules} - before if m.startswith('torch.distributed')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_on_one_process() -> None:
    """Also of several dtypes, whose bytes lie at odd places of what travels."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        params = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2, 2), "c": torch.ones(1, dtype=torch.complex128)}
        tx, cut = adamw(), shard_state(adamw(), dist.init_device_mesh("cpu", (1,)))
        wanted, _ = tx.update(params, tx.init(params), params)
        found, _ = cut.update(params, cut.init(params), params)
        assert all(torch.equal(found[name], wanted[name]) for name in params)
    finally:
        dist.destroy_process_group()
