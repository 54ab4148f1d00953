"""Ways to take one optimizer step: every library set up to compute the same numbers, behind the same few methods."""

import importlib
import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import optfn

Tree = dict[str, Tensor]

# With these, five steps on gradients of size 1 tell apart any two recipes: each part moves a parameter by more than the check
# of agreement tolerates. The warm-up begins at 0, so that an average may begin as the parameters or as those of the first step.
RATE, BETAS, DECAY, MOMENTUM, AVERAGE = 1e-3, (0.9, 0.999), 0.1, 0.9, 0.99
WARMUP, STEPS, FINAL = 4, 100_000, 1e-4

FUSED, FOREACH, LOOP, OPT_STEP = "torch fused", "torch foreach", "torch for-loop", "torch.compile(opt.step)"
DEFAULT = "torch default"
TORCHOPT_IN_PLACE, TORCHOPT = "TorchOpt in place", "TorchOpt out of place"
OPTAX_DONATED, OPTAX, HEAVYBALL = "Optax, jit, donated", "Optax, jit", "HeavyBall"
EAGER, DONATED = "optfn eager", "optfn.compile, donated"
PLAIN, BACKEND = "torch.compile(optfn step)", 'torch.compile(optfn step, backend="optfn")'


class UnavailableError(Exception):
    """A contender that this machine does not have: what its row says instead of numbers."""


class Contender(Protocol):
    """What is timed: ``step`` takes one step and returns when it has been given to the device."""

    compiler: Literal["torch", "jax"] | None

    def step(self) -> None: ...

    def refill(self, grads: Any) -> None:
        """Give it other gradients."""

    def values(self) -> Tree:
        """What has to agree with the other contenders."""


class Recipe(NamedTuple):
    """What a step computes: AdamW, SGD with momentum, Muon or Adafactor; after clipping, if there is a norm; in the long form
    also with a decay of matrices alone, a warm-up and a cosine, and an average of the parameters.
    """

    rule: Literal["adamw", "sgd", "muon", "adafactor"] = "adamw"
    max_norm: float | None = None
    long: bool = False

    @property
    def streams(self) -> int:
        """How many times the memory of the parameters has to be read or written: a lower bound for any way to do it."""
        return (7 if self.rule == "adamw" else 5) + (self.max_norm is not None) + 2 * self.long


def rate(step: int) -> float:
    """The learning rate of the long form as a share of its peak."""
    if step < WARMUP:
        return step / WARMUP
    return FINAL / RATE + (1 - FINAL / RATE) * 0.5 * (1 + math.cos(math.pi * min((step - WARMUP) / (STEPS - WARMUP), 1.0)))


def need(module: str) -> Any:
    """Import what may not be installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UnavailableError(f"{module} is not installed") from None


class Stateful:
    """An optimizer that holds parameters and writes to them, with what has to stand around it."""

    def __init__(
        self,
        recipe: Recipe,
        params: Tree,
        grads: Tree,
        make: Callable[[Tree], Any],
        *,
        compiler: Literal["torch"] | None = None,
        compiled: bool = False,
        whole: bool = False,
    ) -> None:
        """``whole``: the optimizer clips and schedules by itself."""
        self.compiler = compiler
        self.leaves: Tree = {name: nn.Parameter(p.clone()) for name, p in params.items()}
        for name, p in self.leaves.items():
            p.grad = grads[name].clone()
        # Some optimizers drop the gradients that they have used: what is refilled is kept here.
        self.grads = [p.grad for p in self.leaves.values()]
        self.average = {name: p.clone() for name, p in params.items()} if recipe.long else {}
        optimizer, parameters, averages = make(self.leaves), list(self.leaves.values()), list(self.average.values())
        update_average = get_ema_multi_avg_fn(AVERAGE)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate) if recipe.long and not whole else None

        def update() -> None:
            if recipe.max_norm is not None and not whole:
                nn.utils.clip_grad_norm_(parameters, recipe.max_norm)
            optimizer.step()
            if recipe.long:
                update_average(averages, parameters, 0)

        self.update = torch.compile(update) if compiled else update

    def step(self) -> None:
        self.update()
        if self.scheduler:
            self.scheduler.step()

    def refill(self, grads: Tree) -> None:
        torch._foreach_copy_(self.grads, list(grads.values()))

    def values(self) -> Tree:
        return named(self.leaves, self.average)


class Functional:
    """A pure step on parameters and state, which are held here."""

    compiler: Literal["torch", "jax"] | None = None

    def __init__(self, params: Any, grads: Any, init: Callable[[Any], Any], step: Callable[..., Any]) -> None:
        self.params, self.grads = optfn.tree.map(torch.clone, (params, grads))
        self.state, self.function = init(self.params), step

    @torch.no_grad()
    def step(self) -> None:
        self.params, self.state = self.function(self.params, self.state, self.grads)

    def refill(self, grads: Any) -> None:
        self.grads = optfn.tree.map(torch.clone, grads)

    def values(self) -> Tree:
        return named(self.params, optfn.tree.get(self.state, "average", {}))


def named(params: Tree, average: Tree) -> Tree:
    """One dict of both."""
    return {name: p.detach() for name, p in params.items()} | {f"average of {name}": p.detach() for name, p in average.items()}


def groups(recipe: Recipe, leaves: Tree) -> Iterable[Any]:
    """The parameters, in two groups if only matrices decay."""
    if not recipe.long:
        return leaves.values()
    return [
        {"params": [p for p in leaves.values() if is_matrix("", p)], "weight_decay": DECAY},
        {"params": [p for p in leaves.values() if not is_matrix("", p)], "weight_decay": 0.0},
    ]


def is_matrix(path: str, p: Any) -> bool:
    """Whether a leaf decays in the long form."""
    return p.ndim >= 2


def torch_optim(recipe: Recipe, params: Tree, grads: Tree, *, compiled: bool = False, **how: bool) -> Contender:
    """torch.optim, eager or, all of the step at once, compiled."""

    def make(leaves: Tree) -> torch.optim.Optimizer:
        if recipe.rule == "sgd":
            return torch.optim.SGD(leaves.values(), RATE, MOMENTUM, **how)
        if recipe.rule in ("muon", "adafactor"):
            make_rule = {"muon": torch.optim.Muon, "adafactor": torch.optim.Adafactor}[recipe.rule]
            return make_rule(leaves.values(), RATE, weight_decay=DECAY)
        if compiled and recipe.long:  # a number that changes would be another graph in each step
            return torch.optim.AdamW(groups(recipe, leaves), torch.tensor(RATE), BETAS, weight_decay=DECAY, capturable=True, **how)
        return torch.optim.AdamW(groups(recipe, leaves), RATE, BETAS, weight_decay=DECAY, **how)

    return Stateful(recipe, params, grads, make, compiler="torch" if compiled else None, compiled=compiled)


def heavyball(recipe: Recipe, params: Tree, grads: Tree) -> Contender:
    """HeavyBall's AdamW as it is made by default, compiled by itself, with the betas and the decay of the others.

    It clamps the root at epsilon, where the others add epsilon: the same numbers where no gradient is that small.
    """
    library = need("heavyball")

    def make(leaves: Tree) -> Any:
        return library.AdamW(groups(recipe, leaves), RATE, BETAS, weight_decay=DECAY, consume_grad=False)

    return Stateful(recipe, params, grads, make, compiler="torch")


def torchopt(recipe: Recipe, params: Tree, grads: Tree, *, in_place: bool) -> Contender:
    """TorchOpt, with its own clipping and schedule; it has no average of parameters."""
    library = need("torchopt")
    tx = library.adamw(RATE, BETAS, weight_decay=DECAY)
    if recipe.long:  # what TorchOpt's adamw is made of: with a mask of its own it fails (0.7.3)
        tx = library.chain(
            library.transform.scale_by_adam(*BETAS),
            library.transform.add_decayed_weights(DECAY, lambda tree: library.pytree.tree_map(partial(is_matrix, ""), tree)),
            library.transform.scale_by_schedule(lambda count: -RATE * rate(int(count))),
        )
    if recipe.max_norm is not None:
        tx = library.chain(library.clip_grad_norm(recipe.max_norm), tx)
    if in_place:
        return Stateful(recipe, params, grads, lambda leaves: library.Optimizer(leaves.values(), tx), whole=True)

    def init(params: Tree) -> dict[str, Any]:
        return {"state": tx.init(params), "average": params if recipe.long else {}}

    def step(params: Tree, state: dict[str, Any], grads: Tree) -> tuple[Tree, dict[str, Any]]:
        updates, inner = tx.update(grads, state["state"], params=params, inplace=False)
        params = library.apply_updates(params, updates, inplace=False)
        average = {name: torch.lerp(old, params[name], 1 - AVERAGE) for name, old in state["average"].items()}
        return params, {"state": inner, "average": average}

    return Functional(params, grads, init, step)


class Optax(Functional):
    """Optax on JAX's arrays; waits for the result, as JAX would return before it is there."""

    compiler = "jax"

    def __init__(self, recipe: Recipe, params: Tree, grads: Tree, *, donated: bool) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        optax, self.jax = need("optax"), need("jax")
        lr = optax.warmup_cosine_decay_schedule(0.0, RATE, WARMUP, STEPS, FINAL) if recipe.long else RATE
        mask = (lambda tree: self.jax.tree.map(partial(is_matrix, ""), tree)) if recipe.long else None
        tx = optax.adamw(lr, *BETAS, weight_decay=DECAY, mask=mask)
        if recipe.max_norm is not None:
            tx = optax.chain(optax.clip_by_global_norm(recipe.max_norm), tx)

        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, inner = tx.update(grads, state["state"], params)
            params = optax.apply_updates(params, updates)
            average = optax.incremental_update(params, state["average"], 1 - AVERAGE) if recipe.long else {}
            return params, {"state": inner, "average": average}

        self.params, self.grads = self.arrays(params), self.arrays(grads)
        self.state = {"state": tx.init(self.params), "average": self.arrays(params) if recipe.long else {}}
        self.function = self.jax.jit(step, donate_argnums=(0, 1) if donated else ())

    def arrays(self, tree: Tree) -> Any:
        return {name: self.jax.numpy.array(x.numpy()) for name, x in tree.items()}

    def step(self) -> None:
        super().step()
        self.jax.block_until_ready(self.params)

    def refill(self, grads: Tree) -> None:
        self.grads = self.arrays(grads)

    def values(self) -> Tree:
        params, average = (
            {name: torch.from_numpy(self.jax.device_get(x).copy()) for name, x in tree.items()}
            for tree in (self.params, self.state["average"])
        )
        return named(params, average)


def chain(recipe: Recipe) -> optfn.GradientTransformation:
    """The recipe as one pair of functions."""
    links: list[optfn.GradientTransformation] = []
    if recipe.max_norm is not None:
        links.append(optfn.clip_by_global_norm(recipe.max_norm, eps=1e-6))
    if recipe.rule == "sgd":
        links.append(optfn.sgd(RATE, MOMENTUM))
    elif recipe.rule in ("muon", "adafactor"):
        links.append({"muon": optfn.muon, "adafactor": optfn.adafactor}[recipe.rule](RATE, weight_decay=DECAY))
    elif recipe.long:
        schedule = optfn.warmup_cosine_decay_schedule(0.0, RATE, WARMUP, STEPS, FINAL)
        links += [optfn.adamw(schedule, BETAS, weight_decay=DECAY, mask=is_matrix), optfn.ema_params(AVERAGE)]
    else:
        links.append(optfn.adamw(RATE, BETAS, weight_decay=DECAY))
    return optfn.chain(*links)


Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def pure(tx: optfn.GradientTransformation, params: Tree, grads: Tree, compiler: Compiler | None = None) -> Contender:
    """optfn's step as a user writes it, eager or compiled in some way."""

    def step(params: Tree, state: Any, grads: Tree) -> tuple[Tree, Any]:
        updates, state = tx.update(grads, state, params)
        return optfn.apply_updates(params, updates), state

    contender = Functional(params, grads, tx.init, compiler(step) if compiler else step)
    contender.compiler = "torch" if compiler else None
    return contender


def donated(step: Callable[..., Any]) -> Callable[..., Any]:
    """The library's own way to be fast."""
    return optfn.compile(step, donate=("params", "state"))


def plain(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile, which knows nothing of donation."""
    return torch.compile(step, fullgraph=True)


def backend(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with the library's backend."""
    if "optfn" not in torch._dynamo.list_backends(exclude_tags=()):
        raise UnavailableError('torch.compile has no backend "optfn"')
    return torch.compile(step, fullgraph=True, backend="optfn")


OPTFN: dict[str, Compiler | None] = {EAGER: None, DONATED: donated, PLAIN: plain, BACKEND: backend}

CONTENDERS: dict[str, Callable[[Recipe, Tree, Tree], Contender]] = {
    LOOP: lambda *a: torch_optim(*a, foreach=False),
    FOREACH: lambda *a: torch_optim(*a, foreach=True),
    FUSED: lambda *a: torch_optim(*a, fused=True),
    DEFAULT: torch_optim,
    OPT_STEP: lambda *a: torch_optim(*a, foreach=True, compiled=True),
    TORCHOPT_IN_PLACE: lambda *a: torchopt(*a, in_place=True),
    TORCHOPT: lambda *a: torchopt(*a, in_place=False),
    OPTAX_DONATED: lambda *a: Optax(*a, donated=True),
    OPTAX: lambda *a: Optax(*a, donated=False),
    HEAVYBALL: heavyball,
    **{name: lambda recipe, *a, way=way: pure(chain(recipe), *a, way) for name, way in OPTFN.items()},
}
