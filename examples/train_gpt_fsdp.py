"""Train the small GPT on several processes: its parameters and the optimizer's state are cut over them (FSDP2).

    torchrun --nproc-per-node=4 examples/train_gpt_fsdp.py
    torchrun --nproc-per-node=2 examples/train_gpt_fsdp.py --resume     go on from the checkpoint, on another number of processes

What differs from one process are the lines that are marked. The batches are those of one process, each of which is shared.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from gpt import data
from gpt.model import GPT, cross_entropy
from gpt.settings import SIZES, Recipe
from torch.distributed.fsdp import fully_shard
from train_gpt import make_optimizer, make_update

import optfn


def train(args: argparse.Namespace) -> None:
    """Train, from the start or from a checkpoint; the losses go to a file, a line for each step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    size, recipe = SIZES[args.size], Recipe(args.steps)
    text, _, _ = data.standard_library()

    model = GPT(size, args.seed).to(getattr(torch, args.dtype))
    for block in model.blocks:  # several processes: every block is gathered when its turn comes
        fully_shard(block)
    fully_shard(model)

    tx = make_optimizer(recipe)
    update = optfn.compile(make_update(tx), donate=("state", "params"), backend=args.backend)
    params = dict(model.named_parameters())
    run = {"params": params, "state": tx.init(params), "step": 0}
    checkpoint = args.out / "checkpoint"
    if args.resume:
        run = optfn.distributed.load(checkpoint, like=run)
        optfn.interop.write_to_module(model, run["params"])
    state, step = run["state"], run["step"]
    saving = None
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "losses.jsonl").open("a") as losses:
        while step < args.steps:
            step += 1
            x, y = data.random_batch(text, args.seed, step, size.batch, size.context)
            x, y = x.chunk(world)[rank], y.chunk(world)[rank]  # several processes: each has its share of the batch
            begin = time.perf_counter()
            loss = cross_entropy(model(x), y)
            loss.backward()
            with torch.no_grad():
                _, state = update({name: p.grad for name, p in params.items()}, state, params)
                model.zero_grad()
                loss = loss.detach() / world
                dist.all_reduce(loss)
            if rank == 0:
                seconds = time.perf_counter() - begin
                losses.write(json.dumps({"step": step, "loss": loss.item(), "processes": world, "seconds": seconds}) + "\n")
                losses.flush()
            if step % args.checkpoint_every == 0 or step == args.steps:
                # What is trained goes on while the copies are written.
                run = {"params": params, "state": state, "step": step}
                saving = optfn.distributed.save(checkpoint, run, asynchronous=True)
    if saving is not None:
        saving.result()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpt-fsdp"), help="folder for the checkpoint and the losses")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--steps", type=int, default=60, help="steps to train, the learning rate's schedule among them")
    parser.add_argument("--seed", type=int, default=0, help="of the first parameters and the batches")
    parser.add_argument("--checkpoint-every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--backend", default="optfn", help="of optfn.compile")
    args = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    dist.init_process_group("gloo")
    try:
        train(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
