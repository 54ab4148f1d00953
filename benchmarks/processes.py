"""What processes say to each other in one step of each algorithm, counted and by formula; and what a step on pieces costs.

    python benchmarks/processes.py                counts on 2, 4 and 8 processes, times on 2, and writes docs/collectives.md
    python benchmarks/processes.py --only muon    some of it, printed

The processes are on this machine and talk over the loopback address. Counts are those of the calls; bytes are what a process
receives, in the mean over processes: of an all_to_all all that is not its own, of an all_reduce of n bytes 2 (W - 1) / W n, as in
a ring.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import optfn

PAGE = Path(__file__).parents[1] / "docs" / "collectives.md"
WORLDS = (2, 4, 8)
DEPTHS = (2, 4)
DEVICES = (8, 256, 10_000)
WIDTH = 64


class Talk(NamedTuple):
    """What an algorithm says in one step.

    Attributes:
        tx: makes the transformation.
        numbers: how many numbers of 8 bytes are summed over processes, for the shapes of all leaves.
        cut: how many entries of whole tensors go to their owners, and come back from them.
        everywhere: how many entries owners send to every process.
    """

    tx: Callable[[], optfn.GradientTransformation]
    numbers: Callable[[list[torch.Size]], int] = lambda shapes: 0
    cut: Callable[[list[torch.Size]], int] = lambda shapes: 0
    everywhere: Callable[[list[torch.Size]], int] = lambda shapes: 0


def is_matrix(path: str, p: Tensor) -> bool:
    return p.ndim == 2


def muon() -> optfn.GradientTransformation:
    rules = {"matrix": optfn.muon(ns_dtype=None), "rest": optfn.adamw()}
    return optfn.partition(rules, lambda path, p: "matrix" if is_matrix(path, p) else "rest")


def entries(shapes: list[torch.Size], dimensions: int | None = None) -> int:
    """Of all leaves, or of those that have so many dimensions."""
    return sum(shape.numel() for shape in shapes if dimensions in (None, len(shape)))


def factors(shapes: list[torch.Size]) -> int:
    """A row and a column of second moments for each matrix."""
    return sum(sum(shape) for shape in shapes if len(shape) == 2)


TALKS: dict[str, Talk] = {
    "sgd": Talk(lambda: optfn.sgd(0.1, momentum=0.9)),
    "adamw": Talk(optfn.adamw),
    "lion": Talk(optfn.lion),
    "clip_by_global_norm + adamw": Talk(lambda: optfn.chain(optfn.clip_by_global_norm(1.0), optfn.adamw()), len),
    "clip_by_block_rms + adamw": Talk(lambda: optfn.chain(optfn.clip_by_block_rms(1.0), optfn.adamw()), len),
    "apply_if_finite(adamw)": Talk(lambda: optfn.apply_if_finite(optfn.adamw()), lambda shapes: 4 * len(shapes)),
    "lamb": Talk(optfn.lamb, lambda shapes: 2 * len(shapes)),
    "prodigy": Talk(optfn.prodigy, lambda shapes: 2),
    # The average of the gradient goes, the update comes back.
    "muon for matrices + adamw": Talk(muon, cut=lambda shapes: 2 * entries(shapes, 2)),
    # Gradient, parameter and update; and the moments of what is no matrix, there and back.
    "adafactor": Talk(optfn.adafactor, cut=lambda shapes: 3 * entries(shapes) + 2 * entries(shapes, 1), everywhere=factors),
}


def shapes_of(depth: int) -> dict[str, torch.Size]:
    of_block = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH), "b": (WIDTH,)}
    return {f"{i}.{name}": torch.Size(shape) for i in range(depth) for name, shape in of_block.items()}


def sharded(shapes: dict[str, torch.Size], mesh: Any, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    from torch.distributed.tensor import Shard, distribute_tensor

    generator = torch.Generator().manual_seed(seed)
    return {
        name: distribute_tensor(torch.randn(shape, generator=generator, dtype=dtype), mesh, [Shard(0)])
        for name, shape in shapes.items()
    }


class Listen(TorchDispatchMode):
    """Counts collectives, and the bytes that this process receives in them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.received = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and "wait" not in str(func):
            name, world, rank = func._schema.name.split("::")[1].removesuffix("_single"), dist.get_world_size(), dist.get_rank()
            self.calls[name] += 1
            if name == "all_reduce":
                self.received += 2 * (world - 1) / world * args[0].numel() * args[0].itemsize
            else:
                self.received += (sum(args[1]) - args[1][rank]) * args[0].itemsize
        return func(*args, **(kwargs or {}))


def count(name: str, depth: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = shapes_of(depth)
    params, grads = sharded(shapes, mesh, 0), sharded(shapes, mesh, 1)
    tx = TALKS[name].tx()
    with torch.no_grad():
        state = tx.init(params)
        _, state = tx.update(grads, state, params)  # on the first step rules are tried, and groups are made
        with Listen() as heard, FlopCounterMode(display=False) as flops:
            updates, _ = tx.update(grads, state, params)
            optfn.apply_updates(params, updates)
    return {"calls": dict(heard.calls), "received": heard.received, "flops": flops.get_total_flops()}


def by_formula(name: str, shapes: list[torch.Size], world: int) -> float:
    """Bytes that a process receives in a step, in the mean."""
    talk, rest = TALKS[name], (world - 1) / world
    return rest * (4 * talk.cut(shapes) / world + 2 * 8 * talk.numbers(shapes) + 4 * talk.everywhere(shapes))


def times(rounds: int) -> dict[str, float]:
    """AdamW on 160 leaves: the step on pieces over the same on plain tensors of their size, eager and compiled; medians."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shapes = {f"{i}.{name}": shape for i in range(32) for name, shape in shapes_of(1).items()}
    tx = optfn.adamw()

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optfn.apply_updates(params, updates), state

    found: dict[str, list[float]] = {}
    with torch.no_grad():
        pieces = [sharded(shapes, mesh, 0), sharded(shapes, mesh, 1)]
        plain = [optfn.tree.map(lambda x: x.to_local().clone(), tree) for tree in pieces]
        ways = {}
        for where, (params, grads) in (("pieces", pieces), ("plain", plain)):
            for how in ("eager", "compiled"):
                own = optfn.tree.map(torch.clone, params)
                ways[how, where] = [
                    step if how == "eager" else optfn.compile(step, donate=("params", "state")),
                    own,
                    tx.init(own),
                    grads,
                ]
        for k in range(rounds + 3):
            dist.barrier()
            for (how, where), way in ways.items():
                f, params, state, grads = way
                begin = time.perf_counter()
                way[1], way[2] = f(params, state, grads)
                if k >= 3:
                    found.setdefault(f"{how} {where}", []).append(time.perf_counter() - begin)
    return {name: statistics.median(of) for name, of in found.items()}


# Processes


def _run(rank: int, world: int, folder: str, name: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    answer = globals()[name](*arguments)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


def on_processes(world: int, f: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function of this module returns on each of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run, (world, folder, f.__name__, arguments), nprocs=world)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def counts(names: list[str]) -> dict[str, dict[str, Any]]:
    return {f"{name}, {depth}": count(name, depth) for name in names for depth in DEPTHS}


# The page


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            break
        n /= 1000
    return f"{n:.3g} {unit}" if n else "0"


def _head(*titles: str) -> str:
    return f"| | {' | '.join(titles)} |\n|---|" + "---|" * len(titles)


def _calls(calls: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(calls.items())) or "nothing"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="ALGORITHM", help="some of: " + ", ".join(TALKS))
    parser.add_argument("--rounds", type=int, default=60, help="steps to time; 0 for none")
    args = parser.parse_args(argv)
    names = args.only or list(TALKS)
    if unknown := {*names} - {*TALKS}:
        parser.error(f"no algorithm is called {', '.join(sorted(unknown))}; there are {', '.join(TALKS)}")
    wrong, rows, lines = [], [], []
    counted = {world: on_processes(world, counts, names) for world in WORLDS}
    for name in names:
        cells = []
        for world in WORLDS:
            found = {depth: [of[f"{name}, {depth}"] for of in counted[world]] for depth in DEPTHS}
            calls = [of["calls"] for each in found.values() for of in each]
            if any(c != calls[0] for c in calls):
                wrong.append(f"{name}: the calls differ, by process or by depth: {calls}")
            for depth, of in found.items():
                mean = statistics.fmean(x["received"] for x in of)
                formula = by_formula(name, [*shapes_of(depth).values()], world)
                if abs(mean - formula) > 1e-6 * formula:
                    wrong.append(f"{name}, {world} processes, depth {depth}: received {mean}, by formula {formula}")
            cells.append(_bytes(statistics.fmean(x["received"] for x in found[DEPTHS[-1]])))
        rows.append(f"| `{name}` | {_calls(calls[0])} | {' | '.join(cells)} |")
        lines.append(f"| `{name}` | " + " | ".join(_bytes(by_formula(name, of_a_model(), world)) for world in DEVICES) + " |")
    text = [HEAD.format(depth=DEPTHS[-1]), _head("in one step", *(f"{world} processes" for world in WORLDS)), *rows]
    text += [FORMULA, _head(*(f"{devices:,} devices" for devices in DEVICES)), *lines]
    if "muon for matrices + adamw" in names:
        text += [MUON, *_of_muon(counted)]
    if args.rounds:
        both = on_processes(2, times, args.rounds)
        ratio = {how: statistics.fmean(of[f"{how} pieces"] / of[f"{how} plain"] for of in both) for how in ("eager", "compiled")}
        text.append(TIMES.format(**ratio))
    page = "\n".join(text) + "\n"
    print(page)
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    if not args.only and args.rounds and not wrong:
        PAGE.write_text(page)
    return bool(wrong)


def of_a_model() -> list[torch.Size]:
    """The leaves of a decoder with seven billion parameters: 32 blocks of width 4096."""
    block = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2
    return [*map(torch.Size, 32 * block), torch.Size((32000, 4096)), torch.Size((32000, 4096)), torch.Size((4096,))]


def _of_muon(counted: dict[int, list[Any]]) -> list[str]:
    said = []
    for world, found in counted.items():
        of = [x[f"muon for matrices + adamw, {DEPTHS[-1]}"] for x in found]
        size = 4 * sum(shape.numel() for shape in shapes_of(DEPTHS[-1]).values())
        total = sum(x["flops"] for x in of)
        busiest = max(x["flops"] for x in of) / total * world
        said.append(f"| {world} | {sum(x['received'] for x in of) / size:.2f} | {busiest:.2f} |")
    return said


HEAD = """# What processes say to each other

Made by `make collectives`. One step of a model of some blocks, each of four matrices and a bias, cut by rows (FSDP2's layout),
float32. The calls are the same on all processes and at twice the depth. Bytes are what one process receives in the mean, at a
depth of {depth}: of an `all_to_all` all that is not its own, of an `all_reduce` of n bytes 2 (W - 1) / W n, as in a ring.
"""
FORMULA = """
With W processes a process receives in a step

- of `all_reduce`: 2 (W - 1) / W · 8 bytes for each number that is summed, at most a few for each leaf;
- of `all_to_all`: (W - 1) / W · e N / W, where N entries of e bytes go to their owners (the gradient; parameters and slots, where
  a rule reads them) or come back (the update, slots); and (W - 1) / W · e M for M entries that every process is sent (factors).

The command fails if what was counted is not that. So the bytes of one device shrink as devices are added, and the number of
calls stays. For a decoder of seven billion parameters in float32 (32 blocks of width 4096) this is, of one step:
"""
MUON = """
Muon: bytes that all processes receive ÷ bytes of all parameters, and the operations of the busiest process ÷ those of an even
share. With more processes than matrices some have nothing to do.

| processes | bytes | busiest |
|---|---|---|"""
TIMES = """
## What a step on pieces costs

AdamW on 160 leaves, on two processes of one thread, each leaf cut by rows: the time of a step ÷ that of the same step on plain
tensors of the size of the pieces, in one run. Eager {eager:.2f}, compiled and donated {compiled:.2f}."""


if __name__ == "__main__":
    sys.exit(main())
