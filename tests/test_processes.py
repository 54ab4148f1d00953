"""Every transformation on leaves that lie on several processes, in every way, against one process."""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from meshes import LAYOUTS, SHAPES, distributed, full_grads, full_params, layout_of, whole
from processes import named_counts, on_processes
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import optfn
from optfn.sharding import with_dims

STEPS = 5
VALUES = [1.5, 1.2, 1.3, 1.4, 0.9]


def adamw() -> optfn.GradientTransformation:
    return optfn.adamw(0.1)


def is_matrix(path: str, p: Tensor) -> bool:
    return p.ndim == 2


def aliases() -> dict[str, Callable[[], optfn.GradientTransformation]]:
    """Every alias; those that take no such leaves, or only others, are elsewhere."""
    made = {}
    for name in optfn.__all__:
        f = getattr(optfn, name)
        if not (inspect.isfunction(f) and f.__module__.startswith("optfn.optimizers.") and "lr" in inspect.signature(f).parameters):
            continue
        if name.startswith("scale_by_") or name in ELSEWHERE:
            continue
        needed = {
            k: {"lr": 0.1, "key": 7}[k] for k, p in inspect.signature(f).parameters.items() if p.default is p.empty or k == "key"
        }
        made[name] = lambda f=f, needed=needed: f(**needed)
    return made


ELSEWHERE = {
    "muon": "below, in a partition: it takes matrices alone",
    "galore": "below, with a rank",
    "sparse_adam": "takes sparse gradients, which DTensor has not",
    "dpsgd": "below: it takes the gradients of examples",
}

WRAPPERS: dict[str, Callable[[], optfn.GradientTransformation]] = {
    "muon": lambda: optfn.partition(
        {"matrix": optfn.muon(ns_dtype=None), "rest": optfn.adamw()}, lambda path, p: "matrix" if p.ndim == 2 else "rest"
    ),
    "clip": lambda: optfn.chain(optfn.clip_by_global_norm(0.1), adamw()),
    "clip, order 1": lambda: optfn.chain(optfn.clip_by_global_norm(0.1, order=1), adamw()),
    "clip, order inf": lambda: optfn.chain(optfn.clip_by_global_norm(0.1, order=math.inf), adamw()),
    "clip, order -inf": lambda: optfn.chain(optfn.clip_by_global_norm(0.1, order=-math.inf), adamw()),
    "clip, order 0": lambda: optfn.chain(optfn.clip_by_global_norm(0.1, order=0), adamw()),
    "clip, keep_norm": lambda: optfn.chain(optfn.clip_by_global_norm(0.1, keep_norm=True), adamw()),
    "clip_by_block_rms": lambda: optfn.chain(optfn.clip_by_block_rms(0.1), optfn.sgd(0.1)),
    "scale_by_param_block_norm": lambda: optfn.chain(optfn.scale_by_param_block_norm(), optfn.sgd(0.1)),
    "adaptive_grad_clip": lambda: optfn.chain(optfn.adaptive_grad_clip(0.1), optfn.sgd(0.1)),
    "centralize": lambda: optfn.chain(optfn.centralize(), optfn.sgd(0.1)),
    "normalize": lambda: optfn.chain(optfn.normalize(), optfn.sgd(0.1)),
    "scale_by_distance_over_gradients": lambda: optfn.chain(optfn.scale_by_distance_over_gradients(), optfn.scale(-1.0)),
    "accumulate": lambda: optfn.accumulate(adamw(), 2),
    "accumulate, skip": lambda: optfn.accumulate(adamw(), 2, should_skip_update_fn=optfn.skip_not_finite),
    "apply_if_finite": lambda: optfn.apply_if_finite(adamw()),
    "apply_every": lambda: optfn.chain(optfn.apply_every(2), optfn.sgd(0.1)),
    "ema_params": lambda: optfn.chain(adamw(), optfn.ema_params(0.9)),
    "lookahead": lambda: optfn.lookahead(adamw(), 2, 0.5),
    "mechanize": lambda: optfn.mechanize(adamw()),
    "schedule_free": lambda: optfn.schedule_free(optfn.sgd(0.1), 0.1),
    "reduce_on_plateau": lambda: optfn.chain(adamw(), optfn.reduce_on_plateau(patience=1)),
    "inject_hyperparams": lambda: optfn.inject_hyperparams(optfn.adamw)(lr=optfn.linear_schedule(0.1, 0.0, 8)),
    "schedule": lambda: optfn.adamw(optfn.linear_schedule(0.1, 0.0, 8)),
    "masked": lambda: optfn.masked(adamw(), is_matrix),
    "freeze": lambda: optfn.chain(optfn.freeze(is_matrix), adamw()),
    "selective_transform": lambda: optfn.selective_transform(adamw(), freeze_mask=is_matrix),
    "conditionally_transform": lambda: optfn.conditionally_transform(adamw(), lambda step: step != 1),
    "conditionally_mask": lambda: optfn.conditionally_mask(adamw(), lambda step: step != 1),
    "snapshot": lambda: optfn.chain(adamw(), optfn.snapshot("norm", optfn.tree.norm)),
    "monitor": lambda: optfn.chain(adamw(), optfn.monitor({"norm": optfn.tree.norm, "largest": optfn.tree.max})),
    "sam": lambda: optfn.sam(adamw(), optfn.chain(optfn.normalize(), optfn.sgd(0.1))),
    # Rules of a user's that declare nothing are shown whole tensors.
    "by the largest entry": lambda: optfn.chain(
        optfn.leafwise(lambda p: (), lambda g, slots, p, step: (g / g.abs().max(), slots)), optfn.sgd(0.1)
    ),
    "by the parameter": lambda: optfn.chain(
        optfn.leafwise(lambda p: (), lambda g, slots, p, step: (g * p.sum(), slots)), optfn.sgd(0.1)
    ),
}


class Largest(NamedTuple):
    """The sum of the largest entries."""

    total: Any


def by_the_largest_entries() -> optfn.GradientTransformation:
    """A coupled rule that declares nothing: what a leaf adds is no sum over its entries."""

    def measure(g: Tensor, slots: Any, p: Tensor, step: Tensor, shared: Largest) -> tuple[tuple[Tensor], Any]:
        mu = torch.lerp(slots.mu, g, 0.5)
        return (mu.abs().max() + p.max(),), optfn.LionSlots(mu)

    def update(g: Tensor, slots: Any, p: Tensor, step: Tensor, shared: Largest) -> tuple[Tensor, Any]:
        return -0.1 * slots.mu / shared.total, slots

    init = lambda p: optfn.LionSlots(torch.zeros_like(p))  # noqa: E731
    return optfn.coupled(init, measure, lambda shared, sums: Largest(sums[0].abs() + 1), update, shared=Largest(0.0))


WRAPPERS["coupled, of whole leaves"] = by_the_largest_entries
WRAPPERS["coupled, of one leaf, which three processes do not own"] = lambda: optfn.masked(
    by_the_largest_entries(), lambda path, p: path == "w"
)

WRAPPERS["add_noise between rules of whole leaves"] = lambda: optfn.chain(
    optfn.scale_by_factored_rms(), optfn.add_noise(0.01, 0.5, key=7), optfn.scale_by_factored_rms(), optfn.sgd(0.1)
)

EXTRA = {"momo", "momo_adam", "polyak_sgd", "reduce_on_plateau"}


def loss(params: dict[str, Any]) -> Tensor:
    """A function of all entries, none of which is by itself."""
    wholes = [x.full_tensor() if isinstance(x, DTensor) else x for x in params.values() if x is not None]
    total = sum((x.sum() for x in wholes), torch.zeros((), dtype=torch.float64))
    return sum(((x.square() + x.pow(4) / 8 + x * x.cos()).sum() for x in wholes), total.square() / 50)


WRAPPERS["galore"] = lambda: optfn.galore(0.1, 2, 2, weight_decay=0.1)
WRAPPERS["galore, masked"] = lambda: optfn.masked(
    optfn.scale_by_galore(1, 3, base_optimizer=optfn.chain(optfn.trace(0.9), optfn.clip_by_global_norm(0.1))), is_matrix
)
WRAPPERS["dpsgd"] = lambda: optfn.dpsgd(0.1, l2_norm_clip=0.5, noise_multiplier=0.1, key=7, momentum=0.9)
WRAPPERS["dpsgd, batch_size"] = lambda: optfn.dpsgd(0.1, l2_norm_clip=0.5, noise_multiplier=0.1, key=7, batch_size=3)

# What is handed the gradient of a function, and the function.
SEARCHES: dict[str, Callable[[], optfn.GradientTransformation]] = {
    "sophia": lambda: optfn.sophia(0.1, update_interval=2, gamma=0.1),
    "sophia, masked": lambda: optfn.masked(optfn.sophia(0.1, update_interval=2, gamma=0.1), is_matrix),
    "lbfgs, strong_wolfe": lambda: optfn.lbfgs(line_search_fn="strong_wolfe", history_size=2),
    "scale_by_lbfgs": lambda: optfn.chain(
        optfn.scale_by_lbfgs(3), optfn.scale(-1.0), optfn.scale_by_zoom_linesearch(15, initial_guess_strategy="one")
    ),
    "backtracking, store_grad": lambda: optfn.chain(optfn.sgd(1.0), optfn.scale_by_backtracking_linesearch(15, store_grad=True)),
    "zoom": lambda: optfn.chain(optfn.sgd(1.0), optfn.scale_by_zoom_linesearch(15)),
}
ALL = {**aliases(), **WRAPPERS, **SEARCHES}


def difference(x: Any, y: Any) -> float:
    """The largest one of two trees, relative to 1 + abs; NaN where only one is."""
    worst = 0.0
    for a, b in zip(optfn.tree.leaves(x), optfn.tree.leaves(whole(y)), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = a.double(), b.double()
        apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0, (a - b).abs() / (1 + a.abs()))
        worst = max(worst, *apart.reshape(-1).tolist(), 0.0)
    return worst


def check(name: str, layout: str, lay: Callable[[Any], Any]) -> float:
    tx = ALL[name]()
    params = full_params()
    state, pieces = tx.init(params), lay(full_params())
    other, at = tx.init(pieces), optfn.tree.map(layout_of, pieces)
    for step in range(STEPS):
        grads = full_grads(step)
        extra = {"value": VALUES[step]} if name in EXTRA else {}
        given, laid, more = grads, lay(grads), extra
        if name == "dpsgd":
            each = [full_grads(k) for k in range(step, step + 3)]
            given = {leaf: torch.stack([g[leaf] for g in each]) for leaf in SHAPES}
            laid = {leaf: stacked([lay(g)[leaf] for g in each]) for leaf in SHAPES}
        if name in SEARCHES:
            (value, given), (same, laid) = (optfn.tree.value_and_grad(loss)(p) for p in (params, pieces))
            extra, more = ({"value": f, "grad": g, "value_fn": loss, "obj_fn": loss} for f, g in ((value, given), (same, laid)))
        updates, state = tx.update(given, state, params, **extra)
        params = optfn.apply_updates(params, updates)
        updates, other = tx.update(laid, other, pieces, **more)
        pieces = optfn.apply_updates(pieces, updates)
        assert optfn.tree.map(layout_of, pieces) == at
        for leaf, u in updates.items():
            assert u is None or layout_of(u) == at[leaf], leaf
        for path, x in zip(optfn.tree.paths(other), optfn.tree.flatten(other)[0], strict=True):
            shaped = [leaf for leaf in SHAPES if path.endswith("." + leaf) and x is not None and x.shape == SHAPES[leaf] != ()]
            assert all(layout_of(x) == at[leaf] for leaf in shaped), path
    return difference((params, in_trees(state, params)), (pieces, other))


def stacked(tensors: list[Any]) -> Any:
    if not isinstance(tensors[0], DTensor):
        return torch.stack(tensors)
    return with_dims(torch.stack([x.to_local() for x in tensors]), tensors[0], 1)


def in_trees(state: Any, params: dict[str, Tensor]) -> Any:
    """A state of ``lbfgs`` as it is of leaves that lie on several processes, with trees in the place of vectors."""
    if not isinstance(state, optfn.LbfgsState):
        return state

    def of(x: Tensor) -> dict[str, Tensor]:
        names = optfn.tree.paths(params)
        parts = x.split([params[name].numel() for name in names], -1)
        return {name: part.reshape(x.shape[:-1] + params[name].shape) for name, part in zip(names, parts, strict=True)}

    return state._replace(last_grad=of(state.last_grad), last_step=of(state.last_step), s=of(state.s), y=of(state.y))


def all_on(layout: str) -> dict[str, float]:
    lay, found = distributed(layout), {}
    with torch.no_grad():
        for name in ALL:
            try:
                found[name] = check(name, layout, lay)
            except Exception as error:
                raise AssertionError(f"{name} on {layout}") from error
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_transformation_is_that_of_one_process(layout: str) -> None:
    for found in on_processes(all_on, 4, layout, seconds=500):
        assert {name: x for name, x in found.items() if not x <= 1e-12} == {}


def searched(layout: str) -> dict[str, float]:
    """Loops whose control flow goes by numbers, which are to be the same on all processes."""
    import torch.distributed as dist

    lay, found = distributed(layout), {}
    for name in ("lbfgs, strong_wolfe", "zoom"):
        alone, together = (optfn.minimize(loss, p, SEARCHES[name](), max_steps=8) for p in (full_params(), lay(full_params())))
        assert (alone.reason, alone.steps, alone.evals) == (together.reason, together.steps, together.evals)
        found[name] = difference((alone.params, alone.value), (together.params, together.value))

    # Each process has the loss of its share of a batch: what they decide by is the mean.
    tx = optfn.chain(optfn.sgd(1.0), optfn.scale_by_backtracking_linesearch(15))
    params, pieces = full_params(), lay(full_params())
    state, other, share = tx.init(params), tx.init(pieces), 1 + (dist.get_rank() - 1.5) / 2
    with torch.no_grad():
        for _ in range(STEPS):
            (value, grad), (_, laid) = (optfn.tree.value_and_grad(loss)(p) for p in (params, pieces))
            updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
            mine = {"value": share * value, "value_fn": lambda p: share * loss(p)}
            laid, other = tx.update(laid, other, pieces, grad=laid, **mine)
            params, pieces = optfn.apply_updates(params, updates), optfn.apply_updates(pieces, laid)
    return found | {"shares": difference((params, state), (pieces, other))}


@pytest.mark.slow
def test_loops_that_go_by_numbers_go_the_same_way_on_all_processes() -> None:
    for found in on_processes(searched, 4, "hsdp"):
        assert {name: x for name, x in found.items() if not x <= 1e-12} == {}


def of_other_leaves(layout: str) -> dict[str, float]:
    """Complex leaves, and leaves that sit a step out, where entries of all leaves are taken together or drawn."""
    lay, found = distributed(layout), {}

    def complex_too(leaves: dict[str, Any]) -> dict[str, Any]:
        return {name: torch.complex(x, x.cos()) if name in ("w", "b") else x for name, x in leaves.items()}

    def size(params: dict[str, Any]) -> Tensor:
        wholes = [x.full_tensor() if isinstance(x, DTensor) else x for x in params.values()]
        return sum(((x.abs() ** 2 + x.abs() ** 4 / 8).sum() for x in wholes), torch.zeros((), dtype=torch.float64))

    for name in ("lbfgs, strong_wolfe", "scale_by_lbfgs", "sophia", "noisy_sgd"):
        tx, params, pieces = ALL[name](), complex_too(full_params()), lay(complex_too(full_params()))
        state, other = tx.init(params), tx.init(pieces)
        for step in range(3):
            (value, given), (same, laid) = (optfn.tree.value_and_grad(size)(p) for p in (params, pieces))
            if step == 1:
                given, laid = ({**g, "deep.w": None} for g in (given, laid))
            with torch.no_grad():
                more = [{"value": f, "grad": g, "value_fn": size, "obj_fn": size} for f, g in ((value, given), (same, laid))]
                updates, state = tx.update(given, state, params, **more[0])
                moved, other = tx.update(laid, other, pieces, **more[1])
                params, pieces = optfn.apply_updates(params, updates), optfn.apply_updates(pieces, moved)
        real = lambda leaves: optfn.tree.map(lambda x: torch.view_as_real(x) if x.is_complex() else x, whole(leaves))  # noqa: E731
        found[name] = difference(real(params), real(pieces))

    key, params = optfn.random.key(7), full_params()
    for sampler in (optfn.random.uniform, lambda key, shape, dtype: optfn.random.uniform(key, shape, dtype)):
        numbers = optfn.tree.random_like(key, lay(params), sampler)
        assert optfn.tree.map(layout_of, numbers) == optfn.tree.map(layout_of, lay(params))
        found["random_like"] = difference(optfn.tree.random_like(key, params, sampler), numbers)
    return found


@pytest.mark.slow
def test_complex_leaves_and_absent_ones() -> None:
    for found in on_processes(of_other_leaves, 4, "tp+fsdp"):
        assert {name: x for name, x in found.items() if not x <= 1e-12} == {}


def fitted(model: Any, x: Tensor, y: Tensor, group: Any) -> list[Any]:
    """A model whose loss each process has of its share of a batch: by minimize, then by an optimizer with a closure."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def value_and_grad(params: Any) -> tuple[Tensor, Any]:
        optfn.interop.write_to_module(model, params)
        model.zero_grad()
        value = (model(x) - y).square().mean()
        value.backward()
        return value.detach(), {name: p.grad for name, p in model.named_parameters()}

    tx = optfn.lbfgs(line_search_fn="strong_wolfe", history_size=4)
    found = optfn.minimize(value_and_grad, start, tx, value_and_grad=True, max_steps=6).params
    optfn.interop.write_to_module(model, start)
    optimizer = optfn.interop.TorchOptimizer(
        model.named_parameters(), optfn.lbfgs, lr=1.0, line_search_fn="strong_wolfe", max_iter=6, process_group=group
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (model(x) - y).square().mean()
        value.backward()
        return value

    optimizer.step(closure)
    return [found, {name: p.detach() for name, p in model.named_parameters()}]


def sharded_fit() -> float:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (7, 2))
    model, rank = net(), dist.get_rank()
    for layer in (model.first, model.last, model):
        fully_shard(layer)
    return difference(fitted(net(), x, y, "self"), fitted(model, x.chunk(4)[rank], y.chunk(4)[rank], dist.group.WORLD))


@pytest.mark.slow
def test_a_sharded_model_is_fitted_by_lbfgs_as_on_one_process() -> None:
    assert max(on_processes(sharded_fit, 4)) <= 1e-10


# TorchOptimizer


OPTIMIZERS: dict[str, Callable[..., optfn.GradientTransformation]] = {
    "adamw": optfn.adamw,
    "sgd": lambda lr: optfn.sgd(lr, momentum=0.9),
    "clip": lambda lr: optfn.chain(optfn.clip_by_global_norm(0.1), optfn.adamw(lr)),
    "lamb": optfn.lamb,
    "adafactor": optfn.adafactor,
    "ema": lambda lr: optfn.chain(optfn.adamw(lr), optfn.ema_params(0.9)),
}


class Net(torch.nn.Module):
    """Sizes that four processes do not divide, and fewer rows than processes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(7, 9), torch.nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def trained(model: Any, name: str, batches: list[Any], cut: Callable[[Any], Any], *, resume: bool) -> tuple[Any, Any]:
    """A loop as people have it: a scheduler, and in the middle a checkpoint that a new optimizer takes."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def made() -> tuple[Any, Any]:
        optimizer = optfn.interop.TorchOptimizer(model.named_parameters(), OPTIMIZERS[name], lr=0.1)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    optimizer, scheduler = made()
    for k, (x, y) in enumerate(batches):
        if resume and k == 3:
            saved, when = get_optimizer_state_dict(model, optimizer), scheduler.state_dict()
            optimizer, scheduler = made()
            set_optimizer_state_dict(model, optimizer, saved)
            scheduler.load_state_dict(when)
        optimizer.zero_grad()
        (model(cut(x)) - cut(y)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return dict(model.named_parameters()), optimizer.states[0]


def sharded_training(name: str) -> float:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    generator = torch.Generator().manual_seed(1)
    batches = [[torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (7, 2)] for _ in range(STEPS)]
    alone = trained(net(), name, batches, lambda x: x, resume=False)
    model = net()
    for layer in (model.first, model.last, model):
        fully_shard(layer)
    rank = dist.get_rank()
    params, state = trained(model, name, batches, lambda x: x.chunk(4)[rank], resume=True)
    assert all(isinstance(p, DTensor) for p in params.values())
    return difference(optfn.tree.map(torch.detach, alone[0]), params) + difference(alone[1], state)


def all_trained() -> dict[str, float]:
    return {name: sharded_training(name) for name in OPTIMIZERS}


@pytest.mark.slow
def test_a_torch_optimizer_of_a_sharded_model_is_that_of_one_process() -> None:
    """fully_shard, a scheduler, and torch's own functions for checkpoints of optimizers."""
    for found in on_processes(all_trained, 4):
        assert {name: x for name, x in found.items() if not x <= 1e-10} == {}


def of_partial_sums() -> None:
    """Gradients that are still to be summed over processes, as they are for what tensor parallelism repeats."""
    lay = distributed("fsdp")
    params, tx = lay(full_params()), WRAPPERS["clip"]()
    mesh = params["w"].device_mesh
    parts = {name: DTensor.from_local(x / 4, mesh, [Partial()]) for name, x in full_grads(0).items()}
    updates, state = tx.update(parts, tx.init(params), params)
    wanted, expected = tx.update(full_grads(0), tx.init(full_params()), full_params())
    assert difference((wanted, expected), (updates, state)) <= 1e-12
    with pytest.raises(ValueError, match="scale_by_adam: 'b': the state does not lie on the processes as the leaf does"):
        optfn.scale_by_adam().update(parts, optfn.scale_by_adam().init(params))
    assert difference(optfn.tree.sum(full_grads(0)), optfn.tree.sum(parts)) <= 1e-12


def test_sums_that_are_still_to_be_made_are_made() -> None:
    on_processes(of_partial_sums, 4)


# What is communicated


def big(depth: int, mesh: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{i}.{name}": shape for i in range(depth) for name, shape in (("w", (8, 12)), ("v", (12, 8)), ("b", (8,)))}
    return {
        name: distribute_tensor(torch.randn(shape, generator=generator, dtype=torch.float64), mesh, [Shard(0)])
        for name, shape in shapes.items()
    }


COUNTS: dict[str, tuple[Callable[[], optfn.GradientTransformation], dict[str, int]]] = {
    "adamw": (adamw, {}),
    "clip, adamw": (WRAPPERS["clip"], {"all_reduce": 1}),
    "clip_by_block_rms": (WRAPPERS["clip_by_block_rms"], {"all_reduce": 1}),
    "lamb": (optfn.lamb, {"all_reduce": 1}),
    "prodigy": (optfn.prodigy, {"all_reduce": 1}),
    "apply_if_finite": (WRAPPERS["apply_if_finite"], {"all_reduce": 1}),
    "accumulate": (WRAPPERS["accumulate"], {"all_reduce": 1}),
    "adafactor": (optfn.adafactor, {"all_to_all": 2}),
    "muon, adamw": (WRAPPERS["muon"], {"all_to_all": 2}),
    "noisy_sgd": (lambda: optfn.noisy_sgd(0.1, key=7), {}),
    "dpsgd, batch_size": (WRAPPERS["dpsgd, batch_size"], {}),
    "galore": (WRAPPERS["galore"], {"all_to_all": 2}),
    "lbfgs": (optfn.lbfgs, {"all_reduce": 4}),
    "scale_by_lbfgs": (optfn.scale_by_lbfgs, {"all_reduce": 3}),
    "zoom, the start and one trial": (lambda: optfn.scale_by_zoom_linesearch(1), {"all_reduce": 2}),
}


def counted(name: str, depth: int) -> dict[str, int]:
    from torch.distributed.device_mesh import init_device_mesh

    params = big(depth, init_device_mesh("cpu", (4,)))
    tx = COUNTS[name][0]()
    with torch.no_grad():
        state = tx.init(params)
        _, state = tx.update(params, state, params, value=1.0, grad=params, value_and_grad_fn=lambda p: (1.0, p))
        with CommDebugMode() as mode:
            updates, _ = tx.update(params, state, params, value=1.0, grad=params, value_and_grad_fn=lambda p: (1.0, p))
            optfn.apply_updates(params, updates)
    return named_counts(mode)


def all_counted() -> dict[Any, Any]:
    return {(name, depth): counted(name, depth) for name in COUNTS for depth in (2, 4)}


@pytest.mark.slow
def test_what_is_communicated_does_not_grow_with_the_depth() -> None:
    for found in on_processes(all_counted, 4):
        assert found == {(name, depth): COUNTS[name][1] for name in COUNTS for depth in (2, 4)}


# What is refused, by all processes alike

REFUSED: dict[str, tuple[Callable[[], optfn.GradientTransformation], str]] = {
    "flatten": (lambda: optfn.flatten(adamw()), "flatten: 'w' lies on several processes, .* run the transformation without it"),
}


def of_columns(g: Tensor, slots: Any, p: Tensor, step: Tensor) -> tuple[Tensor, Any]:
    """A rule that fails for some leaves, each of which one process owns."""
    if g.ndim == 2 and g.shape[1] != 4:
        raise ValueError("it takes matrices of 4 columns")
    return g / g.abs().max(), slots


def all_refused() -> None:
    params = distributed("fsdp")(full_params())
    for make, words in REFUSED.values():
        tx = make()
        with pytest.raises(TypeError, match=words):
            tx.init({"w": params["w"]})
    picky = optfn.leafwise(lambda p: (), of_columns)
    for rule, words in ((picky, "of 4 columns"), (optfn.scale_by_shape(), "Muon takes matrices")):
        state = rule.init(params)
        with pytest.raises(ValueError, match=words):
            rule.update(params, state, params)
    tx = adamw()
    state = tx.init(params)
    with pytest.raises(TypeError, match="'b': the parameter lies on several processes, the update does not: distribute it"):
        tx.update(full_params(), state, params)
    turned = distribute_tensor(torch.ones(4, 7).double(), params["w"].device_mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"'w' must have an update of shape \(7, 4\), got \(4, 7\)"):
        tx.update({**params, "w": turned}, state, params)
    with pytest.raises(TypeError, match="'b': the parameter lies on several processes, its update does not"):
        optfn.apply_updates(params, full_params())
    wide = distribute_tensor(torch.ones(4, 7).double(), params["w"].device_mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"a piece of shape \(1, 7\) became one of \(4, 7\)"):
        optfn.tree.where(torch.ones(4, 1, dtype=torch.bool), wide, wide)
    backwards = {"w": distribute_tensor(torch.ones(4, 4), DeviceMesh("cpu", [1, 0, 3, 2]), [Shard(0)])}
    with pytest.raises(ValueError, match="the processes of a mesh must be in ascending order along each of its dimensions"):
        optfn.scale_by_muon().update(backwards, optfn.scale_by_muon().init(backwards), backwards)
    cut = {"w": distribute_tensor(torch.ones(4, 7, 4).double(), params["w"].device_mesh, [Shard(0)])}
    with pytest.raises(TypeError, match="'w' is cut in its first dimension, that of the examples"):
        optfn.per_example_global_norm_clip(cut, 1.0)
    for make in (optfn.lbfgs, optfn.scale_by_lbfgs):
        elsewhere = make().init(full_params())
        with pytest.raises(ValueError, match="lbfgs: the state does not lie on the processes as the leaves do"):
            make().update(params, elsewhere, params)
    recorded = {name: x.detach().requires_grad_() for name, x in params.items()}
    with pytest.raises(RuntimeError, match="no derivative through what several processes compute together"):
        optfn.clip_by_global_norm(1.0).update(recorded, (), params)


def test_what_is_refused_is_refused_by_all() -> None:
    on_processes(all_refused, 4)


def other_patterns() -> None:
    lay, tx = distributed("fsdp"), adamw()
    params, grads = lay(full_params()), lay(full_grads(0))
    state = tx.init(params)
    torch.distributed.set_debug_level(torch.distributed.DebugLevel.DETAIL)
    tx.update({**grads, "b": None}, state, params)
    gone = {"w": None} if torch.distributed.get_rank() == 2 else {}
    said = "None for 'w'" if gone else "no None"
    with pytest.raises(RuntimeError, match=f"processes differ in which updates are None; this one has {said}"):
        tx.update({**grads, **gone}, state, params)


def test_other_patterns_of_none_are_an_error_on_all_with_torchs_debug_switch() -> None:
    on_processes(other_patterns, 4)
