"""torch.optim as the oracle: an alias and the class it is named after take the same steps, and are compared after each.

A class is one line of ``ORACLES``; its configurations and its errors come from torch's own table, ``optim_db``.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.testing._internal.common_optimizers import optim_db

import optfn
from optfn import tree

STEPS = 12
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.complex128: 1e-12}

FLAGS = ("foreach", "fused", "capturable", "differentiable")
"""Arguments that choose one of torch's code paths and are no math."""


class Oracle(NamedTuple):
    """How a class of torch.optim is spelled here.

    Attributes:
        alias: the function that makes our transformation.
        states: a name in torch's state to the name, for ``optfn.tree.get``, of the same in ours.
        options: torch's keyword arguments, without ``FLAGS``, to ours.
        takes: whether the class takes a leaf like this one.
    """

    alias: Callable[..., optfn.GradientTransformation]
    states: Mapping[str, str]
    options: Callable[[dict[str, Any]], dict[str, Any]] = dict
    takes: Callable[[Tensor], bool] = lambda p: True

    def transformation(self, kwargs: Mapping[str, Any]) -> optfn.GradientTransformation:
        return self.alias(**self.options({k: v for k, v in kwargs.items() if k not in FLAGS}))


MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu", "max_exp_avg_sq": "nu_max"}
ORACLES: dict[type[torch.optim.Optimizer], Oracle] = {
    torch.optim.SGD: Oracle(optfn.sgd, {"momentum_buffer": "trace"}),
    torch.optim.Adam: Oracle(optfn.adam, MOMENTS),
    torch.optim.AdamW: Oracle(optfn.adamw, MOMENTS),
    torch.optim.Adagrad: Oracle(optfn.adagrad, {"sum": "sum"}),
    torch.optim.RMSprop: Oracle(optfn.rmsprop, {"square_avg": "nu", "grad_avg": "mu", "momentum_buffer": "trace"}),
    torch.optim.SparseAdam: Oracle(optfn.sparse_adam, {"exp_avg": "mu", "exp_avg_sq": "nu"}),
    torch.optim.Adadelta: Oracle(optfn.adadelta, {"square_avg": "e_g", "acc_delta": "e_x"}),
    torch.optim.Adamax: Oracle(optfn.adamax, {"exp_avg": "mu", "exp_inf": "nu"}),
    torch.optim.NAdam: Oracle(optfn.nadam, {"exp_avg": "mu", "exp_avg_sq": "nu", "mu_product": "mu_product"}),
    torch.optim.RAdam: Oracle(optfn.radam, {"exp_avg": "mu", "exp_avg_sq": "nu"}),
    torch.optim.Rprop: Oracle(optfn.rprop, {"prev": "prev", "step_size": "step_size"}),
    torch.optim.ASGD: Oracle(optfn.asgd, {"ax": "ax", "eta": "eta", "mu": "mu"}),
    # torch divides by the number of entries: an empty leaf is a ZeroDivisionError there.
    torch.optim.Adafactor: Oracle(
        optfn.adafactor, {"row_var": "v_row", "col_var": "v_col", "variance": "v"}, takes=lambda p: p.numel() > 0
    ),
    torch.optim.Muon: Oracle(optfn.muon, {"momentum_buffer": "mu"}, takes=lambda p: p.ndim == 2),
}
INFOS = {info.optim_cls: info for info in optim_db}


def configurations(cls: type) -> dict[str, dict[str, Any]]:
    """Keyword arguments by description: what optim_db has for the CPU, then what the CUDA list has beyond that."""
    found: dict[str, dict[str, Any]] = {}
    for device in ("cpu", "cuda"):
        for entry in INFOS[cls].optim_inputs_func(device=device):
            desc = entry.desc
            while str(found.get(desc, entry.kwargs)) != str(entry.kwargs):  # some descriptions are there twice
                desc += "'"
            found[desc] = entry.kwargs
    return found


def as_numbers(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for torch's reference path, which computes with Python numbers."""

    def number(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(number, x))
        return x.item() if isinstance(x, Tensor) else x

    return {k: number(v) for k, v in kwargs.items() if k not in FLAGS}


class TorchOptim:
    """torch.optim's loop over tensors, with explicit gradients.

    Args:
        cls: the class.
        kwargs: its arguments.
        params: the tensors that it changes in place.
        groups: what to make of ``params`` for the class, parameter groups perhaps.
        schedule: the learning rate as a function of the step.
    """

    def __init__(
        self,
        cls: type[torch.optim.Optimizer],
        kwargs: Mapping[str, Any],
        params: list[Tensor],
        *,
        groups: Callable[[list[Tensor]], Any] = list,
        schedule: Callable[[int], Any] | None = None,
    ) -> None:
        loop = {"foreach": False} if "foreach" in inspect.signature(cls).parameters else {}
        rate = {} if schedule is None else {"lr": 1.0}
        self.params = params
        self.optimizer = cls(groups(params), **{**as_numbers(kwargs), **loop, **rate})
        self.scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: float(schedule(t)))

    def step(self, gradients: list[Tensor | None]) -> None:
        for p, g in zip(self.params, gradients, strict=True):
            p.grad = g
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def state(self, i: int) -> dict[str, Any]:
        return self.optimizer.state.get(self.params[i], {})


class RealTorchOptim(TorchOptim):
    """The same on the real views of complex tensors and gradients, for classes that take no complex tensors, or square them."""

    def __init__(self, cls: type[torch.optim.Optimizer], kwargs: Mapping[str, Any], params: list[Tensor]) -> None:
        super().__init__(cls, kwargs, [torch.view_as_real(p) for p in params])

    def step(self, gradients: list[Tensor | None]) -> None:
        def real(g: Tensor | None) -> Tensor | None:
            if g is None or g.layout == torch.strided:
                return g if g is None else torch.view_as_real(g)
            values = torch.view_as_real(g._values())
            return torch.sparse_coo_tensor(g._indices(), values, (*g.shape, 2), check_invariants=True)

        super().step([real(g) for g in gradients])

    def state(self, i: int) -> dict[str, Any]:
        like = self.params[i]
        return {
            name: torch.view_as_complex(x) if isinstance(x, Tensor) and x.shape == like.shape else x
            for name, x in super().state(i).items()
        }


class Problem(NamedTuple):
    """Parameters by name, and for each step the gradient of each, None where it has none."""

    params: dict[str, Tensor]
    gradients: list[dict[str, Tensor | None]]


ABSENT: dict[str, Callable[[int], bool]] = {
    "matrix": lambda t: t % 3 == 1,
    "vector": lambda t: t % 4 == 2,
    "scalar": lambda t: t in (0, 5),
    "empty": lambda t: t % 2 == 0,
    "late": lambda t: t < 4,
    "never": lambda t: True,
    "tall": lambda t: t < 4,
    "wide": lambda t: t == 0,
    "table": lambda t: t % 3 == 1,
    "row": lambda t: t < 4,
    "entries": lambda t: True,
}
"""When a leaf's gradient is None; at step 7 every leaf's is."""


def problem(
    dtype: torch.dtype,
    *,
    absent: bool = False,
    zeros: bool = True,
    seed: int = 0,
    takes: Callable[[Tensor], bool] = lambda p: True,
) -> Problem:
    """Dense leaves of every kind, with gradients of several sizes.

    Args:
        dtype: of parameters and gradients.
        absent: whether gradients are None as ``ABSENT`` says.
        zeros: whether there are exact zeros: one entry always, a whole first gradient, all gradients at step 6.
        seed: of the random numbers.
        takes: the leaves wanted.
    """
    generators = [torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)]

    def draw(*shape: int, by: int = 0) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generators[by])

    params = {
        "matrix": draw(4, 3),
        "vector": draw(5),
        "scalar": draw(),
        "empty": draw(0, 3),
        "transposed": draw(3, 4).t(),
        "sliced": draw(4, 6)[:, ::2],
        "late": draw(3),
        "never": draw(2),
        "tall": draw(7, 2, by=1),
        "wide": draw(2, 5, by=1),
        "deep": draw(2, 3, 4, by=1),
    }
    scales = dict(zip(params, (1.0, 1e-3, 10.0, 1.0, 0.1, 1e-2, 1.0, 1.0, 1e-3, 1.0, 0.1), strict=True))
    params = {name: p for name, p in params.items() if takes(p)}

    def gradient(name: str, t: int) -> Tensor:
        p = params[name]
        by = int(name in ("tall", "wide", "deep"))
        g = scales[name] * (draw(*reversed(p.shape)).t() if name == "matrix" else draw(*p.shape, by=by))  # strided as p is not
        if zeros and (t == 6 or (name == "transposed" and t == 0)):
            return torch.zeros_like(g)
        if zeros and name == "vector":
            g[0] = 0
        return g

    return Problem(params, _over_time(params, gradient, absent))


def sparse_problem(dtype: torch.dtype, *, absent: bool = False, dense: bool = True, seed: int = 0) -> Problem:
    """Leaves with sparse COO gradients: other entries at every step, some twice, at some steps none, at one step exact zeros.

    Args:
        dtype: of parameters and gradients.
        absent: whether gradients are None as ``ABSENT`` says.
        dense: whether two leaves more have dense gradients.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    params = {
        "table": draw(10, 4),
        "row": draw(7),
        "scalar": draw(),
        "entries": draw(2, 3),
        "grid": draw(5, 3),
        "deep": draw(6, 2, 2),
        "transposed": draw(4, 8).t(),
        "empty": draw(0, 3),
        **({"vector": draw(5), "matrix": draw(4, 3)} if dense else {}),
    }
    sparse_dims = {"scalar": 0, "grid": 2, "entries": 2}

    def gradient(name: str, t: int) -> Tensor:
        shape = params[name].shape
        if name in ("vector", "matrix"):
            return draw(*shape)
        k = sparse_dims.get(name, 1)
        count = 0 if t % 5 == 3 or name == "empty" or (name == "table" and t == 0) else 5
        rows = [torch.randint(max(n, 1), (count,), generator=generator) for n in shape[:k]]
        indices = torch.stack(rows) if rows else torch.zeros(0, count, dtype=torch.int64)
        indices[:, -1:] = indices[:, :1]  # at least one entry occurs twice
        values = draw(count, *shape[k:]) * (t != 6)
        return torch.sparse_coo_tensor(indices, values, shape, check_invariants=True)

    return Problem(params, _over_time(params, gradient, absent))


def _over_time(params: Iterable[str], gradient: Callable[[str, int], Tensor], absent: bool) -> list[dict[str, Tensor | None]]:
    def missing(name: str, t: int) -> bool:
        return absent and (t == 7 or ABSENT.get(name, lambda t: False)(t))

    drawn = [{name: gradient(name, t) for name in params} for t in range(STEPS)]
    return [{name: None if missing(name, t) else g for name, g in row.items()} for t, row in enumerate(drawn)]


def follow(
    make: Callable[[list[Tensor]], Any],
    tx: optfn.GradientTransformation,
    given: Problem,
    *,
    build: Callable[[dict[str, Any]], Any] = dict,
    states: Mapping[str, str] | None = None,
) -> None:
    """Take every step of a problem on both sides and compare: the parameters after each one, the states at the end.

    Args:
        make: the reference on these tensors: ``step(gradients)`` changes them, ``state(i)`` gives what it keeps of one.
        tx: ours.
        given: the problem.
        build: our tree out of leaves by name.
        states: as in :class:`Oracle`.
    """
    names = list(given.params)
    place = tree.flatten(build({name: i for i, name in enumerate(names)}))[0]  # our order of torch's parameters
    theirs = [p.clone() for p in given.params.values()]
    reference = make(theirs)
    params = build(given.params)
    start = state = tx.init(params)
    spec = tree.flatten(params)[1]

    def by_name(part: Any) -> dict[str, Any]:
        return {names[i]: x for i, x in zip(place, tree.match(spec, part, "this part", "params"), strict=True)}

    for t, gradients in enumerate(given.gradients):
        reference.step([None if g is None else g.clone() for g in gradients.values()])
        updates, state = tx.update(build(gradients), state, params)
        params = optfn.apply_updates(params, updates)
        ours = by_name(params)
        for name, p in zip(names, theirs, strict=True):
            check(ours[name], p, f"{name} after step {t + 1}")

    counts = {name: sum(row[name] is not None for row in given.gradients) for name in names}
    for part in tree.subtrees(state):
        if isinstance(part, optfn.LeafwiseState):
            assert part.step.tolist() == [counts[names[i]] for i in place]
    kept = {name: reference.state(i) for i, name in enumerate(names)}
    for name, of in kept.items():
        assert int(of.get("step", counts[name])) == counts[name], name
    for torch_name, our_name in (states or {}).items():
        if not any(torch_name in of for of in kept.values()):
            never = not any(counts.values())  # torch makes most of its state at the first gradient
            assert never or tree.get(state, our_name, ()) == (), f"{our_name} is kept, but torch has no {torch_name}"
            continue
        ours, fresh = by_name(tree.get(state, our_name)), by_name(tree.get(start, our_name))
        for name, of in kept.items():
            if isinstance(ours[name], tuple):
                assert torch_name not in of, f"torch has a {torch_name} of {name}"
            else:  # without a gradient ours is as init made it
                check(ours[name], of.get(torch_name, fresh[name]), f"{torch_name} of {name}")


def check(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Within ``TOLERANCE`` of the dtype, measured as ``|a - b| / (1 + |b|)``; NaN never is."""
    theirs = theirs.to_dense()  # the momentum of a sparse gradient is sparse in torch
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), what
    assert bool(theirs.isfinite().all()), f"{what}: the reference is not finite, the problem proves nothing"
    error = ((ours - theirs).abs() / (1 + theirs.abs())).max().item() if theirs.numel() else 0.0
    assert error <= TOLERANCE[theirs.dtype], f"{what}: off by {error:.2g}"
