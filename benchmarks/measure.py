"""Measuring: times taken in turn, compile seconds and memory in processes of their own.

``in_parts`` measures a workload. It has ``child`` run ``probe`` and ``times`` in new processes, with a limit on their time.
"""

import ctypes
import datetime
import gc
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from contenders import Contender, Functional, UnavailableError
from report import commit
from workloads import FACTORS, SUITES, Workload

import optfn

COPY = "copy"
LIMIT = 900.0  # seconds, for one process
SETTLE = 3  # steps in which a contender compiles what it compiles
UNIT = 5e-3  # seconds that are timed at once, at least: steps that are shorter are taken several times


def child(
    job: str, arguments: dict[str, Any], limit: float, cache: Path | None = None, command: list[str] | None = None
) -> dict[str, Any]:
    """What a job returns in a new process; where it fails or takes longer than ``limit`` seconds, ``{"failed": why}``.

    ``cache`` is the folder of Inductor's caches; ``command``, another command to run, whose output is returned.
    """
    if limit < 2:
        return {"failed": "no time was left"}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = command or [sys.executable, __file__, job, json.dumps(arguments), str(answer)]
        env = os.environ | ({"TORCHINDUCTOR_CACHE_DIR": str(cache)} if cache else {})
        with Path(folder, "output").open("w+") as output:
            process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                return {"failed": f"took longer than {limit:.0f} s"}
            finally:  # with the workers that it may have started
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            output.seek(0)
            text = output.read()
        if answer.exists():
            return json.loads(answer.read_text())
        return {"output": text, "code": process.returncode} | (
            {"failed": f"exit code {process.returncode}: {last_line(text)}"} if process.returncode else {}
        )


def last_line(text: str) -> str:
    """What a program said last, as a table can hold it."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")[:200].replace("|", "/")


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], device: str, calls: int = 1) -> float:
    """Seconds a call, of so many calls one after the other; on a GPU those between two events."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    before = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - before) / calls


def in_turn(runs: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, list[float]]:
    """The times of each run. Rounds in which each has its turn, in an order that rotates, so that whatever else the machine does
    falls on all alike.
    """
    calls = {name: math.ceil(UNIT / min(seconds_of(run, device) for _ in range(3))) for name, run in runs.items()}
    calls = {name: min(n, 1000) for name, n in calls.items()}
    names, taken = list(runs), {name: [] for name in runs}
    gc.collect()
    gc.freeze()  # what is there already need not be looked through after each round
    gc.disable()
    begin = time.perf_counter()
    for turn in range(60):
        if turn >= 7 and time.perf_counter() - begin > seconds:
            break
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            if device == "cpu":
                time.sleep(2e-3)  # until the threads of the one before have stopped to spin
            taken[name].append(seconds_of(runs[name], device, calls[name]))
        gc.collect()
    gc.enable()
    return taken


def check(contender: Contender, workload: Workload, device: str, expected: dict[str, Any] | None) -> dict[str, Any]:
    """Take the steps that all contenders take; the values after them, which have to be the expected ones.

    Raises:
        ValueError: they are not.
    """
    grads = workload.gradients(device)
    for factor in FACTORS:
        contender.refill({name: g * factor for name, g in grads.items()})
        contender.step()
    contender.refill(grads)
    values = contender.values()
    if expected is None:
        return {name: x.clone() for name, x in values.items()}
    if values.keys() != expected.keys():
        raise ValueError(f"not the same values: {sorted(values.keys() ^ expected.keys())[:3]}")
    worst = max(((values[name] - x).abs() / (1 + x.abs())).max().item() for name, x in expected.items())
    if not worst <= workload.tolerance:
        raise ValueError(f"not the same numbers: off by {worst:.1e} after {len(FACTORS)} steps")
    return expected


def times(workload: Workload, device: str, *, seconds: float, megabytes: int) -> dict[str, Any]:
    """All contenders of a workload, checked, then timed in turn, beside a copy of one large tensor to another."""
    expected, rows, ready = None, {}, {}
    for name in sorted(workload.contenders, key=lambda name: name != workload.reference):
        try:
            contender = workload.make(name, device)
            expected = check(contender, workload, device, expected)
            ready[name] = contender
        except UnavailableError as error:
            rows[name] = {"note": str(error)}
        except Exception as error:
            if name == workload.reference:
                raise
            rows[name] = {"failed": in_a_line(error)}
    del expected
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    taken = in_turn({COPY: lambda: target.copy_(source), **{name: x.step for name, x in ready.items()}}, device, seconds)
    medians = {name: statistics.median(some) for name, some in taken.items()}
    bandwidth = 2 * 4 * source.numel() / medians.pop(COPY)
    for name, median in medians.items():
        low, _, high = statistics.quantiles(taken[name], n=4)
        rows[name] = {"seconds": median, "quartiles": [low, high], "ratio": median / medians[workload.reference]}
        if workload.moved is not None:
            rows[name]["bandwidth"] = workload.moved / median / bandwidth
    return {"rounds": len(taken[COPY]), "copy_bytes_per_second": bandwidth, "rows": rows}


def probe(workload: Workload, device: str, *, name: str) -> dict[str, Any]:
    """Of one contender: what compiling costs beyond a function that does next to nothing, and the memory of a step.

    ``over``, seconds to compile: those of the first steps, without what as many later ones take.
    ``peak``, bytes: the most that was held during steps, beyond what was held between them.
    """
    try:
        contender = workload.make(name, device)
    except UnavailableError as error:
        return {"note": str(error)}
    found: dict[str, Any] = {}
    synchronize(device)
    if contender.compiler:
        found["floor"] = floor(contender.compiler, device)
    begin = time.perf_counter()
    several(contender, SETTLE)
    synchronize(device)
    first = time.perf_counter() - begin
    if contender.compiler:
        later = statistics.median(seconds_of(contender.step, device) for _ in range(5))
        found["over"] = max(first - SETTLE * later, 0.0)
    found["peak"] = peak(contender, device)
    if device == "cuda":
        found["launches"] = launches(contender)
        found["synchronizes"] = attempt(lambda: without_synchronizing(contender))
        if isinstance(contender, Functional):
            found["graph"] = attempt(lambda: replayed(contender, workload.tolerance))
    return found


def several(contender: Contender, steps: int) -> None:
    """Take some steps."""
    for _ in range(steps):
        contender.step()


def floor(compiler: str, device: str) -> float:
    """Seconds that the first function costs that is compiled in a process."""
    begin = time.perf_counter()
    if compiler == "jax":
        import jax

        jax.jit(lambda x: x + 1)(jax.numpy.ones(3)).block_until_ready()
    else:
        torch.compile(lambda x: x + 1)(torch.ones(3, device=device))
        synchronize(device)
    return time.perf_counter() - begin


def peak(contender: Contender, device: str) -> int | None:
    """The most memory held during steps, beyond what is held between them. On the CPU it is what Linux says is resident."""
    gc.collect()
    if device == "cuda":
        several(contender, 1)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        several(contender, 3)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    # Memory that is freed has to go back to the system at once, or it would count as held.
    mmap_threshold, libc = -3, ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 65536)
    several(contender, 3)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = status("VmRSS")
    several(contender, 3)
    return status("VmHWM") - before


def status(field: str) -> int:
    """Bytes, from what Linux says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def launches(contender: Contender) -> int:
    """Kernels that a step launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        contender.step()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in on_device)


def without_synchronizing(contender: Contender) -> str:
    """Take a step in which torch raises where it would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        contender.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def replayed(contender: Functional, tolerance: float) -> float:
    """Seconds of a donated step that is replayed from a CUDA graph; two of them have to do what two steps without one do."""
    held = optfn.tree.leaves((contender.params, contender.state))
    before = [x.clone() for x in held]
    several(contender, 2)
    wanted = {name: x.clone() for name, x in contender.values().items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        contender.step()
    for x, old in zip(held, before, strict=True):
        x.copy_(old)
    graph.replay()
    graph.replay()
    for name, x in contender.values().items():
        torch.testing.assert_close(x, wanted[name], rtol=tolerance, atol=tolerance)
    return statistics.median(seconds_of(graph.replay, "cuda") for _ in range(20))


def attempt(run: Callable[[], Any]) -> Any:
    """What it returns, or what it says when it fails."""
    try:
        return run()
    except Exception as error:
        return f"fails: {in_a_line(error)}"


def in_a_line(error: Exception) -> str:
    """What went wrong, as a table can hold it."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200].replace("|", "/")


def in_parts(
    suite: str,
    name: str,
    workload: Workload,
    device: str,
    *,
    small: bool,
    seconds: float,
    left: Callable[[], float] = lambda: LIMIT,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure one workload, process by process: what is measured next, and everything so far.

    ``left`` says how long the next process may take.
    """
    found: dict[str, Any] = {
        key: getattr(workload, key) for key in ("title", "about", "leaves", "parameters", "largest", "reference")
    }
    found |= {"date": datetime.date.today().isoformat(), "commit": commit(), "rows": {}}
    which = {"suite": suite, "small": small, "workload": name, "device": device}
    probes: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder, "shared")
        for i, contender in enumerate(workload.probed):
            cache, probes[contender] = Path(folder, str(i)), {}
            for state in ("cold", "warm"):
                yield f"{contender}: {state} compile and memory", found
                answer = child("probe", which | {"name": contender}, left(), cache)
                probes[contender] |= {"note": answer["note"]} if "note" in answer else {state: answer}
                found["rows"] = {who: dict(row) for who, row in probes.items()}
                if "over" not in answer:
                    break  # there is nothing that a cache would make faster
            if cache.exists():
                shutil.copytree(cache, shared, dirs_exist_ok=True)
                shutil.rmtree(cache)
        yield "steps", found
        which |= {"seconds": seconds, "megabytes": 8 if small else {"cpu": 256, "cuda": 2048}[device]}
        answer = child("times", which, left(), shared if workload.probed else None)
        rows = answer.pop("rows", {})
        found["rows"] = {who: probes.get(who, {}) | rows.get(who, {}) for who in dict.fromkeys([*rows, *probes])}
        found |= answer
        yield "done", found


def main(job: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Do a job in this process."""
    suite = SUITES[arguments.pop("suite")](small=arguments.pop("small"))
    workload = suite[arguments.pop("workload")]
    try:
        return {"times": times, "probe": probe}[job](workload, **arguments)
    except Exception as error:
        traceback.print_exc()
        return {"failed": in_a_line(error)}


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
