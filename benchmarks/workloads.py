"""What is measured: trees of parameters, a step on them, and the contenders that take it."""

import math
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import contenders as c
import torch
from contenders import Contender, Recipe, Tree
from torch import Tensor, nn
from torch.func import grad_and_value

import optfn

# Before the time is taken every contender takes these steps from the same start, on the gradients times these factors: at some
# steps clipping acts and at others not, and moments that were wrong would show.
FACTORS = (2.0, 0.5, -3.0, 0.7, -1.5)

SPARSE_ADAM = "torch.optim.SparseAdam"
TRAIN_TORCH, TRAIN_EAGER = "torch.compile(model), torch fused", "torch eager, torch fused"


@dataclass(frozen=True)
class Workload:
    """One table of the results.

    Attributes:
        title, about: its heading, and what a step does.
        leaves, parameters: the size of the tree.
        largest: bytes of its largest leaf.
        moved: bytes that any way to take the step has to read or write; None where that says nothing.
        reference: the contender that the others are divided by, and whose numbers they have to have.
        contenders: who takes part.
        probed: those whose compile time and memory are measured, each in processes of its own.
        make: makes a contender on a device.
        gradients: those that it begins with.
        tolerance: how far, absolutely and relatively, its values may be from the reference's.
    """

    title: str
    about: str
    leaves: int
    parameters: int
    largest: int
    moved: int | None
    reference: str
    contenders: tuple[str, ...]
    probed: tuple[str, ...]
    make: Callable[[str, str], Contender]
    gradients: Callable[[str], Any]
    tolerance: float = 1e-6


def gpt(layers: int, width: int, vocabulary: int = 8192, context: int = 256) -> list[tuple[int, ...]]:
    """The shapes of GPT-2, with biases, its output layer being its embedding: 12 leaves a layer and 4 more."""
    w = width
    attention = [(w,), (w,), (3 * w, w), (3 * w,), (w, w), (w,)]
    perceptron = [(w,), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
    return [(vocabulary, w), (context, w), *[*attention, *perceptron] * layers, (w,), (w,)]


def matrices(count: int) -> list[tuple[int, ...]]:
    """As many matrices, no two of one shape."""
    return [(128 + 16 * (i % 8), 128 + 16 * (i // 8)) for i in range(count)]


def resnet_50() -> list[tuple[int, ...]]:
    """The shapes of ResNet-50: kernels of convolutions, weights and biases of batch norms, and the last layer."""
    found: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, inputs, 1, 1))
            for kernel in convolutions:
                found += [kernel, kernel[:1], kernel[:1]]
            inputs = 4 * width
    return [*found, (1000, 2048), (1000,)]


def parameters(shapes: list[tuple[int, ...]], device: str) -> Tree:
    """Parameters, always the same."""
    generator = torch.Generator(device).manual_seed(0)
    return {f"{i:04d}": torch.randn(shape, generator=generator, device=device) for i, shape in enumerate(shapes)}


def gradients(shapes: list[tuple[int, ...]], device: str) -> Tree:
    """Gradients, always the same. None is near 0, where epsilon, and how it is used, would count."""
    generator = torch.Generator(device).manual_seed(1)

    def gradient(shape: tuple[int, ...]) -> Tensor:
        x = torch.rand(shape, generator=generator, device=device) - 0.5
        return x + x.sign() / 2

    return {f"{i:04d}": gradient(shape) for i, shape in enumerate(shapes)}


def tree(
    title: str,
    shapes: list[tuple[int, ...]],
    contenders: tuple[str, ...],
    probed: tuple[str, ...],
    *,
    rule: Literal["adamw", "sgd", "muon", "adafactor"] = "adamw",
    clip: bool = False,
    long: bool = False,
    cached: bool = False,
    reference: str = c.FUSED,
    tolerance: float = 1e-6,
) -> Workload:
    """A step on a tree of these shapes. ``cached``: the speed of memory is not what limits it."""
    sizes = [math.prod(shape) for shape in shapes]
    # The gradients have about 0.76 times this norm, so that clipping acts where their factor is above 1.3.
    recipe = Recipe(rule, math.sqrt(sum(sizes)) if clip else None, long)
    steps = {"adamw": "AdamW", "sgd": "SGD with momentum", "muon": "Muon", "adafactor": "Adafactor"}[rule]
    about = ("clipping by global norm, " if clip else "") + steps
    if long:
        about += ", decay of matrices alone, warm-up and cosine, average of the parameters"

    def make(name: str, device: str) -> Contender:
        return c.CONTENDERS[name](recipe, parameters(shapes, device), gradients(shapes, device))

    moved = None if cached else 4 * sum(sizes) * recipe.streams
    begin = partial(gradients, shapes)
    return Workload(
        title, about, len(sizes), sum(sizes), 4 * max(sizes), moved, reference, contenders, probed, make, begin, tolerance
    )


class SparseAdam(c.Stateful):
    """torch.optim's on one embedding."""

    def __init__(self, params: Tree, grads: Tree) -> None:
        self.compiler, self.average = None, {}
        self.leaves = {name: nn.Parameter(p) for name, p in params.items()}
        self.refill(grads)
        self.optimizer = torch.optim.SparseAdam(self.leaves.values(), c.RATE, c.BETAS)

    def step(self) -> None:
        self.optimizer.step()

    def refill(self, grads: Tree) -> None:
        for name, p in self.leaves.items():
            p.grad = grads[name]


def embedding(rows: int, width: int, touched: int) -> Workload:
    """Adam on the rows of an embedding that a batch has touched, given as ``Embedding(sparse=True)`` gives them."""

    shapes = [(rows, width)]

    def touched_gradients(device: str) -> Tree:
        chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:touched].to(device)
        values = gradients([(touched, width)], device)
        return {key: torch.sparse_coo_tensor(chosen[None], g, shapes[0], check_invariants=True) for key, g in values.items()}

    def make(name: str, device: str) -> Contender:
        params, grads = parameters(shapes, device), touched_gradients(device)
        if name == SPARSE_ADAM:
            return SparseAdam(params, grads)
        return c.pure(optfn.sparse_adam(c.RATE, c.BETAS), params, grads, c.OPTFN[name])

    about, names = f"Adam on {touched:,} touched rows of {rows:,}, {width} wide", (SPARSE_ADAM, c.EAGER, c.DONATED)
    size, moved = rows * width, 7 * 4 * touched * width
    return Workload("A sparse gradient", about, 1, size, 4 * size, moved, SPARSE_ADAM, names, names, make, touched_gradients)


class Training:
    """A train step of the demo; what has to agree are its losses."""

    def __init__(self, step: Callable[[], Tensor], compiled: bool) -> None:
        self.compiler: Literal["torch", "jax"] | None = "torch" if compiled else None
        self.function, self.losses = step, deque[Tensor](maxlen=len(FACTORS))

    def step(self) -> None:
        self.losses.append(self.function())

    def refill(self, grads: Any) -> None:
        """Its gradients are its own."""

    def values(self) -> Tree:
        return {"loss": torch.stack(list(self.losses))}


def training(size: str) -> Workload:
    """Forward, backward and update of the demo's GPT, on one batch."""
    examples = str(Path(__file__).parents[1] / "examples")
    if examples not in sys.path:
        sys.path.append(examples)
    import train_gpt
    from gpt.model import GPT
    from gpt.settings import SIZES, Recipe
    from gpt.twin import Twin

    shape, recipe = SIZES[size], Recipe(1000)
    sizes = [p.numel() for p in GPT(shape, 0).parameters()]

    def make(name: str, device: str) -> Contender:
        model = GPT(shape, 0).to(device)
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randint(256, (2, shape.batch, shape.context), generator=generator).to(device)
        if name in (TRAIN_TORCH, TRAIN_EAGER):
            twin = Twin(model, recipe, fused=True)
            if name == TRAIN_TORCH:
                twin.model.compile()
            return Training(lambda: twin.step(x, y), name == TRAIN_TORCH)
        tx, loss_of = train_gpt.make_optimizer(recipe), train_gpt.make_loss(model)

        def step(params: Tree, state: Any, x: Tensor, y: Tensor) -> tuple[Tree, Any, Tensor]:
            grads, loss = grad_and_value(loss_of)(params, x, y)
            updates, state = tx.update(grads, state, params)
            return optfn.apply_updates(params, updates), state, loss

        kept: list[Any] = [{name: p.detach().clone() for name, p in model.named_parameters()}]
        kept.append(tx.init(kept[0]))
        compiled = c.donated(step)

        def run() -> Tensor:
            *kept[:], loss = compiled(*kept, x, y)
            return loss

        return Training(run, compiled=True)

    return Workload(
        "A whole train step",
        f"forward, backward, clipping, AdamW and schedule of the demo's GPT, {shape.batch} times {shape.context} bytes",
        len(sizes),
        sum(sizes),
        4 * max(sizes),
        None,
        TRAIN_TORCH,
        (TRAIN_TORCH, TRAIN_EAGER, c.DONATED),
        (TRAIN_TORCH, c.DONATED),
        make,
        lambda device: {},
        tolerance=1e-5,
    )


ALL = tuple(name for name in c.CONTENDERS if name != c.DEFAULT)
COMPILED = (c.OPT_STEP, c.OPTAX_DONATED, c.HEAVYBALL, c.DONATED, c.PLAIN, c.BACKEND)
FEW = (c.FUSED, c.FOREACH, c.OPT_STEP, c.EAGER, c.DONATED)
PLAIN_TORCH = (c.DEFAULT, c.EAGER, c.DONATED)
TINY = [(32, 16), (16,), (16, 16)]


def on_cpu(*, small: bool = False) -> dict[str, Workload]:
    """What ``run.py`` measures; small, to see whether all of it works."""
    gpt_148, gpt_580, gpt_big = (TINY,) * 3 if small else (gpt(12, 256), gpt(48, 136), gpt(12, 768))
    memory, few = (c.FUSED, c.TORCHOPT, c.EAGER), (c.OPT_STEP, c.DONATED)
    found = {
        "adamw-148": tree("AdamW, 148 leaves", gpt_148, ALL, (*memory, *COMPILED)),
        "clip-148": tree("Clipping and AdamW, 148 leaves", gpt_148, FEW, few, clip=True),
        "long-148": tree("The long chain, 148 leaves", gpt_148, ALL, few, clip=True, long=True),
        "sgd-148": tree("SGD with momentum, 148 leaves", gpt_148, FEW, few, rule="sgd"),
        "clip-580": tree("Clipping and AdamW, 580 leaves", gpt_580, FEW, few, clip=True),
        "adamw-92m": tree("AdamW, 92 M parameters", gpt_big, FEW, (c.DONATED,)),
        "adamw-20": tree("AdamW, 20 small leaves", [(100, 50)] * (3 if small else 20), FEW, (c.DONATED,), cached=True),
        "muon-60": tree(
            "Muon, 60 matrices of 60 shapes",
            [(16, 8), (8, 12)] if small else matrices(60),
            PLAIN_TORCH,
            (c.DONATED,),
            rule="muon",
            cached=True,
            reference=c.DEFAULT,
            tolerance=2e-5,
        ),
        "adafactor-161": tree(
            "Adafactor, ResNet-50",
            TINY if small else resnet_50(),
            PLAIN_TORCH,
            (c.DONATED,),
            rule="adafactor",
            cached=True,
            reference=c.DEFAULT,
        ),
        "sparse": embedding(1000, 8, 20) if small else embedding(1_000_000, 64, 4096),
        "train": training("tiny" if small else "small"),
    }
    return unprobed(found) if small else found


def on_gpu(*, small: bool = False) -> dict[str, Workload]:
    """What ``gpu.py`` measures, the most important first."""
    medium, large = (TINY,) * 2 if small else (gpt(12, 768, 50257, 1024), gpt(48, 1600, 50257, 1024))
    eager, two, probed = (c.FUSED, c.FOREACH, c.EAGER, c.DONATED), (c.FUSED, c.DONATED), (c.DONATED,)
    compiled = (c.FUSED, c.OPT_STEP, c.PLAIN, c.BACKEND, c.DONATED)
    found = {
        "gpt2-adamw": tree("AdamW, GPT-2 small", medium, eager, (c.DONATED, c.FUSED)),
        "gpt2-xl-adamw": tree("AdamW, GPT-2 XL", large, two, probed),
        "gpt2-long": tree("The long chain, GPT-2 small", medium, eager, probed, clip=True, long=True),
        "gpt2-clip": tree("Clipping and AdamW, GPT-2 small", medium, eager, probed, clip=True),
        "gpt2-xl-long": tree("The long chain, GPT-2 XL", large, two, probed, clip=True, long=True),
        "gpt2-xl-clip": tree("Clipping and AdamW, GPT-2 XL", large, two, probed, clip=True),
        "gpt2-compiled": tree("AdamW, GPT-2 small, compiled in other ways", medium, compiled, (c.OPT_STEP,)),
    }
    return unprobed(found) if small else found


def unprobed(workloads: dict[str, Workload]) -> dict[str, Workload]:
    """The same without what takes the most time, to compile in empty folders; the first keeps two of its probes."""
    first, *rest = workloads
    kept = {
        first: replace(workloads[first], probed=tuple(name for name in workloads[first].probed if name in (c.EAGER, c.DONATED)))
    }
    return kept | {name: replace(workloads[name], probed=()) for name in rest}


SUITES = {"cpu": on_cpu, "gpu": on_gpu}
