"""Train a small byte-level GPT with optfn, and beside it, on the same batches, with torch.optim.

    python examples/train_gpt.py              about two minutes on two cores
    python examples/train_gpt.py --resume     go on after an interruption, bit for bit as if there had been none

It needs ``pip install optfn[demo]`` and a C++ compiler for Inductor (``--backend aot_eager`` does without), and downloads
nothing: the text is the source of Python's standard library. All it writes goes to one folder (``--out``).
"""

import argparse
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from gpt import checkpoint, data, report
from gpt.model import GPT, cross_entropy
from gpt.settings import SIZES, Recipe
from gpt.twin import Twin
from torch import Tensor
from torch.func import functional_call, grad_and_value
from tqdm import tqdm

import optfn

Params = dict[str, Tensor]


def make_optimizer(recipe: Recipe) -> optfn.GradientTransformation:
    """AdamW spelled out, with clipping before it; the decay is for matrices alone."""
    schedule = optfn.warmup_cosine_decay_schedule(0.0, recipe.peak, recipe.warmup, recipe.steps, recipe.final)
    return optfn.chain(
        optfn.clip_by_global_norm(recipe.max_norm, eps=1e-6),
        optfn.scale_by_adam(*recipe.betas),
        optfn.add_decayed_weights(recipe.weight_decay, mask=lambda path, p: p.ndim >= 2),
        optfn.scale_by_learning_rate(schedule),
    )


def make_loss(model: GPT) -> Callable[[Params, Tensor, Tensor], Tensor]:
    """The loss as a pure function of the parameters; those of the module itself are not used."""
    return lambda params, x, y: cross_entropy(functional_call(model, params, (x,)), y)


def make_update(tx: optfn.GradientTransformation) -> Callable[..., tuple[Params, Any]]:
    """The optimizer's part of a step: new parameters and new state from old ones."""

    def update(grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
        updates, state = tx.update(grads, state, params)
        return optfn.apply_updates(params, updates), state

    return update


@dataclass
class Run:
    """All that changes while a training goes on, which is what a checkpoint holds. Batches are functions of the step."""

    params: Params
    state: Any
    twin: Twin | None
    history: dict[str, Any]
    step: int = 0
    difference: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """As plain tensors, numbers, lists and dicts."""
        trees = {"params": optfn.tree.to_flat_dict(self.params), "state": optfn.tree.to_flat_dict(self.state)}
        twin = self.twin.state_dict() if self.twin else None
        return trees | {"twin": twin, "history": self.history, "step": self.step, "difference": self.difference}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there."""
        self.params = optfn.tree.from_flat_dict(saved["params"], like=self.params)
        self.state = optfn.tree.from_flat_dict(saved["state"], like=self.state)
        self.history, self.step, self.difference = saved["history"], saved["step"], saved["difference"]
        if self.twin:
            self.twin.load_state_dict(saved["twin"])


def train(args: argparse.Namespace) -> None:
    """Train, from the start or from a checkpoint, and report."""
    size, recipe = SIZES[args.size], Recipe(args.steps)
    train_text, validation_text, digest = data.standard_library()
    settings = {name: getattr(args, name) for name in ("size", "steps", "seed", "dtype", "device", "backend", "compare")}
    settings["text"] = digest
    file = args.out / "checkpoint.pt"
    saved = open_folder(file, settings, resume=args.resume)
    settings["threads"] = torch.get_num_threads()

    model = GPT(size, args.seed).to(args.device, getattr(torch, args.dtype))
    tx, loss_of = make_optimizer(recipe), make_loss(model)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    sides = ("optfn", "torch.optim") if args.compare else ("optfn",)
    history = {side: {"training": [], "validation": {}} for side in sides}
    run = Run(params, tx.init(params), Twin(model, recipe) if args.compare else None, history)
    if saved:
        run.load_state_dict(saved)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return to_device(data.random_batch(train_text, args.seed, step, size.batch, size.context), args.device)

    held_out = [to_device(b, args.device) for b in data.even_batches(validation_text, 8, size.batch, size.context)]

    @torch.no_grad()
    def validate() -> None:
        for side in sides:
            weights = run.params if side == "optfn" else dict(run.twin.model.named_parameters())
            run.history[side]["validation"][run.step] = sum(loss_of(weights, x, y).item() for x, y in held_out) / len(held_out)

    count = f"{sum(p.numel() for p in params.values()):,} parameters"
    print(f"{count} on {args.device}, {torch.get_num_threads()} threads")
    print(f"Python source: {len(train_text) / 1e6:.1f} MB to train on, {len(validation_text) / 1e6:.1f} MB to validate on")
    if run.step == 0:
        validate()
    # Two pure functions, compiled; the second writes into the state and the parameters that it is given.
    gradients = optfn.compile(grad_and_value(loss_of), backend=args.backend)
    update = optfn.compile(make_update(tx), donate=("state", "params"), backend=args.backend)
    with tqdm(total=args.steps, initial=run.step, desc="compiling", unit="step", dynamic_ncols=True) as bar:
        while run.step < args.steps:
            run.step += 1
            x, y = batch(run.step)
            begin = time.perf_counter()
            grads, loss = gradients(run.params, x, y)
            run.params, run.state = update(grads, run.state, run.params)
            run.history["optfn"]["training"].append(loss.item())
            rate = x.numel() / (time.perf_counter() - begin)
            if run.twin:
                run.history["torch.optim"]["training"].append(run.twin.step(x, y).item())
                if run.step == min(20, args.steps):
                    run.difference = max((p - run.params[name]).abs().max().item() for name, p in run.twin.model.named_parameters())
            last = run.step == args.steps
            if last or run.step % math.ceil(args.steps / 6) == 0:
                validate()
            if last or run.step % args.checkpoint_every == 0:
                checkpoint.save(file, settings, run.state_dict())
            bar.set_description("training", refresh=False)
            lr = optfn.tree.get(run.state, "lr").item()
            bar.set_postfix_str(f"loss {loss.item():.3f}, lr {lr:.1e}, {rate:,.0f} tokens/s", refresh=False)
            bar.update()

    losses = ", ".join(f"{side} {run.history[side]['validation'][run.step]:.4f}" for side in sides)
    print(f"validation loss after {run.step} steps, nats per byte: {losses}")
    if run.twin:
        print(f"largest difference of a parameter after {min(20, args.steps)} steps: {run.difference:.1e}")
        grads, _ = gradients(run.params, *batch(run.step))
        compare_speed(update, grads, run, model, recipe, args.device)
    picture = args.out / "loss.png"
    report.plot(picture, run.history, f"A byte-level GPT of {count} on Python source")
    print(f"loss curves: {picture}; checkpoint: {file}")


def compare_speed(update: Callable[..., Any], grads: Params, run: Run, model: GPT, recipe: Recipe, device: str) -> None:
    """Time the optimizer's part of a step on either side, on copies."""
    params, state = optfn.tree.map(torch.clone, (run.params, run.state))
    ours, sides = "optfn.compile", {"torch.optim.AdamW": False, "torch.optim.AdamW(fused=True)": True}
    runs: dict[str, Callable[[], Any]] = {ours: lambda: update(grads, state, params)}
    for side, fused in sides.items():
        twin = Twin(model, recipe, fused=fused)
        for name, p in twin.model.named_parameters():
            p.grad = grads[name].clone()
        runs[side] = twin.apply
    medians = report.side_by_side(runs, torch.cuda.synchronize if device == "cuda" else lambda: None)
    print("the optimizer's part of a step (clipping, AdamW, schedule), medians of 100 taken in turn:")
    for side, seconds in medians.items():
        ratio = f"   optfn / torch = {medians[ours] / seconds:.2f}" if side in sides else ""
        print(f"  {side:30}{1e3 * seconds:7.3f} ms{ratio}")


def to_device(tensors: tuple[Tensor, ...], device: str) -> tuple[Tensor, ...]:
    """Move a batch."""
    return tuple(t.to(device) for t in tensors)


def open_folder(file: Path, settings: dict[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """Make sure that the folder can be written to, before any work; what the checkpoint holds, if it is to be gone on from."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=file.parent):
        pass
    if resume:
        began, run = checkpoint.load(file)
        differ = [name for name in settings if settings[name] != began.get(name)]
        if differ:
            then, now = (", ".join(f"{name} {some.get(name)}" for name in differ) for some in (began, settings))
            raise checkpoint.CheckpointError(
                f"the run in {file.parent} began with {then}, not {now}: it can only go on as it began"
            )
        torch.set_num_threads(began["threads"])  # sums are split among threads, so their number is part of the result
        return run
    if file.exists():
        earlier = file.with_name("checkpoint.previous.pt")
        os.replace(file, earlier)
        print(f"the checkpoint of an earlier run is kept as {earlier}")
    return None


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least(bound: int) -> Callable[[str], int]:
    """A type for argparse: an integer that is not too small."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = bound - 1
        if not bound <= value < 2**31:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {bound} and below 2^31, got {text!r}")
        return value

    return integer


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser("train_gpt.py", description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpt"), help="folder for the checkpoint and the loss curves")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--steps", type=at_least(1), default=300, help="steps to train, the learning rate's schedule among them")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the first parameters and the batches")
    parser.add_argument("--checkpoint-every", type=at_least(1), default=50, metavar="STEPS")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=("optfn", "inductor", "aot_eager", "eager"), default="optfn", help="of optfn.compile")
    parser.add_argument("--compare", action=argparse.BooleanOptionalAction, default=True, help="train with torch.optim, too")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device that torch can use")
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if args.backend in ("optfn", "inductor") and not shutil.which(compiler):
        parser.error(f"there is no C++ compiler {compiler}: install one, name yours in CXX, or use --backend aot_eager")
    return args


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(argv)
    # Bit for bit: without this the gradient of the embedding is summed in whatever order the threads arrive.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        train(args)
    except (checkpoint.CheckpointError, OSError) as error:
        print(f"train_gpt.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; --resume goes on from the last checkpoint in {args.out}, if there is one", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
