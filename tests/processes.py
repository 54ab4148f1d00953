"""Functions run on several processes at once, which talk over the loopback address, under a time limit."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

SECONDS = 120
"""How long a function may take on all processes together."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "optfn"]
)


def on_processes(function: Callable[..., Any], world: int, *args: Any, seconds: float = SECONDS) -> list[Any]:
    """What ``function(*args)`` returns on each of so many processes, which are one group of gloo.

    Raises:
        AssertionError: a process failed, with what it printed, or the time was over.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_context.Pipe(duplex=False) for _ in range(world)]
        started: list[Any] = [
            _context.Process(target=_run, args=(function, rank, world, folder, pipe[1], args), daemon=True)
            for rank, pipe in enumerate(pipes)
        ]
        for process in started:
            process.start()
        for _, end in pipes:
            end.close()
        try:
            return _answers({pipe: rank for rank, (pipe, _) in enumerate(pipes)}, started, seconds)
        finally:
            for process in started:
                process.kill()
                process.join()


def each(checks: Iterable[Callable[[], Any]]) -> dict[str, Any]:
    """By its name what each check gives without recording for autograd, or the trace of its error; then the next one runs too."""
    found: dict[str, Any] = {}
    for check in checks:
        try:
            with torch.no_grad():
                found[check.__name__] = check()
        except Exception:
            found[check.__name__] = traceback.format_exc()
    return found


def of(answers: list[dict[str, Any]], check: Callable[[], Any]) -> list[Any]:
    """What one of them gave on each process."""
    found = [answer[check.__name__] for answer in answers]
    for x in found:
        assert not isinstance(x, str), x
    return found


def named_counts(mode: CommDebugMode) -> dict[str, int]:
    """How many collectives of each name there were: ``all_reduce``, ``all_to_all``, ``all_gather``."""
    found: Counter[str] = Counter()
    for op, count in mode.get_comm_counts().items():
        name = str(op).rsplit(".", 1)[-1]
        for more in ("_single", "_into_tensor", "_"):
            name = name.removesuffix(more)
        found[name] += count
    return dict(found)


def _answers(ranks: dict[Any, int], started: list[Any], seconds: float) -> list[Any]:
    found: dict[int, Any] = {}
    end = time.monotonic() + seconds
    while len(found) < len(ranks):
        ready = wait([pipe for pipe, rank in ranks.items() if rank not in found], max(end - time.monotonic(), 0))
        if not ready:
            raise AssertionError(f"after {seconds} s there is no answer of processes {sorted({*ranks.values()} - {*found})}")
        for pipe in ready:
            rank = ranks[pipe]
            try:
                failed, found[rank] = pipe.recv()
            except EOFError:
                started[rank].join(5)
                raise AssertionError(f"process {rank} ended with {started[rank].exitcode}") from None
            if failed:
                raise AssertionError(f"on process {rank}:\n{found[rank]}")
    return [found[rank] for rank in sorted(found)]


def _run(function: Callable[..., Any], rank: int, world: int, folder: str, pipe: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
        answer = function(*args)
        dist.barrier()
        pipe.send((False, answer))
    except BaseException:
        pipe.send((True, traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)
