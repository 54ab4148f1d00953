"""Checkpoints: across numbers of processes and layouts, after a crash at any moment, and those of torch.optim under FSDP2."""

import copy
import itertools
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from meshes import LAYOUTS, distributed, full_grads, full_params, layout_of, whole
from processes import on_processes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import optfn
from optfn import tree
from optfn.distributed import load, save
from optfn.interop import load_torch_state, to_torch_state_dict

BEFORE, AFTER = 3, 5


def made() -> optfn.GradientTransformation:
    adamw = optfn.inject_hyperparams(optfn.adamw)(lr=optfn.linear_schedule(0.1, 0.0, 20))
    return optfn.chain(optfn.clip_by_global_norm(0.1), adamw, optfn.ema_params(0.9))


def same(x: Any) -> Any:
    return x


def trained(params: Any, state: Any, start: int, stop: int, lay: Callable[[Any], Any] = same) -> tuple[Any, Any]:
    with torch.no_grad():
        for step in range(start, stop):
            updates, state = made().update(lay(full_grads(step)), state, params)
            params = optfn.apply_updates(params, updates)
    return params, state


def alone(steps: int) -> dict[str, Any]:
    params, state = trained(full_params(), made().init(full_params()), 0, steps)
    return {"params": params, "state": state, "steps": steps, "none": None}


def fresh(lay: Callable[[Any], Any] = same) -> dict[str, Any]:
    params = tree.map(torch.zeros_like, lay(full_params()))
    return {"params": params, "state": made().init(params), "steps": 0, "none": None}


def difference(x: Any, y: Any) -> float:
    a, b = (tree.to_flat_dict(whole(of)) for of in (x, y))
    assert [*a] == [*b]
    assert all(a[path].dtype == b[path].dtype and a[path].shape == b[path].shape for path in a)
    # NaN where they are not numbers alike
    return max(float((a[path].double() - b[path].double()).abs().max()) for path in a)


def gone_on(folder: str, lay: Callable[[Any], Any] = same) -> float:
    """How far a checkpoint is from one process, loaded and 5 steps later."""
    like = fresh(lay)
    before = tree.map(lambda x: x.clone() if isinstance(x, Tensor) else x, like)
    found = load(folder, like)
    assert difference(like, before) == 0
    assert tree.map(layout_of, found) == tree.map(layout_of, like)
    assert found["steps"] == BEFORE
    worst = difference(found, alone(BEFORE))
    params, state = trained(found["params"], found["state"], BEFORE, BEFORE + AFTER, lay)
    return max(worst, difference({**found, "params": params, "state": state, "steps": BEFORE + AFTER}, alone(BEFORE + AFTER)))


# On many processes


def in_rows(tree_: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return tree.map(lambda x: distribute_tensor(x, mesh, [Shard(0) if x.ndim else Replicate()]), tree_)


def saved_on(layout: str, folder: str, asynchronous: bool) -> None:
    lay = distributed(layout)
    params, state = trained(lay(full_params()), made().init(lay(full_params())), 0, BEFORE, lay)
    given = {"params": params, "state": state, "steps": BEFORE, "none": None}
    saving = save(folder, given, asynchronous=asynchronous)
    for x in tree.leaves(given):  # as a step that donates would
        if isinstance(x, Tensor):
            x.zero_()
    assert saving.result().name == "checkpoint-0"


def written_once(folder: str) -> None:
    """The files have the records of the metadata and no others, and of each block one."""
    import torch.distributed.checkpoint as dcp

    path = Path(folder) / "checkpoint-0"
    metadata = dcp.FileSystemReader(path).read_metadata()
    sizes = sum(file.stat().st_size for file in path.glob("*.distcp"))
    assert sum(part.length for part in metadata.storage_data.values()) == sizes
    for name, of in metadata.state_dict_metadata.items():
        blocks = [tuple(chunk.offsets) for chunk in of.chunks]
        assert len({*blocks}) == len(blocks), name
        assert sum(math.prod(chunk.sizes) for chunk in of.chunks) == math.prod(of.size), name


def flat_both_ways(layout: str) -> None:
    lay = distributed(layout)
    plain, sharded = alone(BEFORE), fresh(lay)
    flat = tree.to_flat_dict(plain)
    found = tree.from_flat_dict(flat, like=sharded)
    assert tree.map(layout_of, found) == tree.map(layout_of, sharded)
    assert difference(found, plain) == 0
    assert difference(tree.from_flat_dict(tree.to_flat_dict(found), like=fresh()), plain) == 0
    rows = in_rows(full_params())
    again = tree.from_flat_dict(rows, like=lay(full_params()))
    assert tree.map(layout_of, again) == tree.map(layout_of, lay(full_params()))
    assert difference(again, full_params()) == 0
    with pytest.raises(ValueError, match=r"'w' must be torch.float64 of shape \(7, 4\), got torch.float64 of shape \(4, 7\)"):
        tree.from_flat_dict({**full_params(), "w": torch.ones(4, 7).double()}, like=lay(full_params()))


def refused(folder: str, file: str) -> None:
    lay, rank = distributed("fsdp"), dist.get_rank()
    like = fresh(lay)
    params = like["params"]
    cases: list[tuple[Any, type[Exception], str]] = [
        ({**like, "params": {**params, "new": params["w"]}}, KeyError, "only like has 'params.new'"),
        ({**like, "params": {k: x for k, x in params.items() if k != "w"}}, KeyError, "only the checkpoint has 'params.w'"),
        (
            {**like, "params": {**params, "w": torch.ones(4, 7).double()}},
            ValueError,
            r"'params.w' must be torch.float64 of shape \(4",
        ),
        ({**like, "params": {**params, "w": torch.ones(7, 4)}}, ValueError, r"'params.w' must be torch.float32"),
        (
            {**like, "state": optfn.adam().init(params)},
            ValueError,
            "at 'state.1' the checkpoint has InjectHyperparamsState, like has tuple: it is the state of another",
        ),
        ({**like, "params": {**params, "w": torch.ones(7, 4 + rank)}}, ValueError, "at 'params.w' process 0 has .* process 1"),
        ({**like, "steps": "three" if rank == 2 else 0}, TypeError, "'steps' must be a tensor, a number or None, got str"),
    ]
    for given, kind, words in cases:
        with pytest.raises(kind, match=words):
            load(folder, given)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*: load takes the folder that save was given"):
        load(folder + "-nowhere", like)
    with pytest.raises(TypeError, match="'steps' must be a tensor"):
        save(folder, {**like, "steps": "three" if rank == 2 else 0})
    with pytest.raises(ValueError, match=r"the tree differs between processes: at 'steps' process 0 has torch\.int64"):
        save(folder, {**like, "steps": 0.5 if rank == 3 else 0})
    with pytest.raises(NotADirectoryError, match="is a file: save takes a folder"):
        save(file, like)
    # What one process cannot write, here as it has no room, is raised by all; the checkpoint before stays.
    from torch.distributed.checkpoint import filesystem

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(filesystem.os, "fsync", full)
        with pytest.raises(RuntimeError, match=r"no checkpoint was written to .*: process 1: OSError: \[Errno 28\] no room"):
            save(folder, like)
        saving = save(folder, like, asynchronous=True)
        with pytest.warns(UserWarning, match="the last checkpoint for .* was not written: .* process 1"):
            assert load(folder, like)["steps"] == BEFORE
        assert isinstance(saving.exception(), RuntimeError)
    assert [path.name for path in Path(folder).iterdir()] == ["checkpoint-0"]


def full(opened: int) -> None:
    raise OSError(28, "no room")


def on_four(folder: str) -> dict[Any, float]:
    for k, layout in enumerate(LAYOUTS):
        saved_on(layout, f"{folder}/{layout}", asynchronous=k % 2 == 0)
        written_once(f"{folder}/{layout}")
        flat_both_ways(layout)
    found = {(a, b): gone_on(f"{folder}/{a}", distributed(b)) for a, b in itertools.pairwise([*LAYOUTS, "fsdp"])}
    found["plain"] = gone_on(f"{folder}/tp+fsdp")
    Path(f"{folder}/file").touch()
    refused(f"{folder}/fsdp", f"{folder}/file")
    return found


def in_rows_again(folders: list[str]) -> dict[str, float]:
    return {folder: gone_on(folder, in_rows) for folder in folders}


@pytest.mark.slow
def test_on_another_number_of_processes_and_another_layout(tmp_path: Path) -> None:
    for found in on_processes(on_four, 4, str(tmp_path)):
        assert {name: x for name, x in found.items() if not x <= 1e-10} == {}
    folders = [str(tmp_path / layout) for layout in LAYOUTS]
    assert max(map(gone_on, folders)) <= 1e-10
    for world, some in ((2, folders), (8, folders[-1:])):
        for found in on_processes(in_rows_again, world, some):
            assert {name: x for name, x in found.items() if not x <= 1e-10} == {}


def of_gaps(folder: str) -> None:
    """A piece that is no block: rows 0, 1, 4 and 5 of 8 on one process."""
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh, x = init_device_mesh("cpu", (2,)), torch.arange(16.0).reshape(8, 2)
    rows = x.reshape(2, 2, 2, 2)[:, dist.get_rank()].reshape(4, 2).clone()
    placed = [_StridedShard(0, split_factor=2)]
    given = DTensor.from_local(rows, mesh, placed, run_check=False, shape=x.shape, stride=x.stride())
    save(folder, {"x": given})
    found = load(folder, {"x": given * 0})["x"]
    assert found.placements == given.placements
    assert torch.equal(found.to_local(), rows)
    assert torch.equal(load(folder, {"x": torch.zeros(8, 2)})["x"], x)


def test_pieces_with_gaps(tmp_path: Path) -> None:
    on_processes(of_gaps, 2, str(tmp_path))


# On one process


def test_a_checkpoint_replaces_the_one_before(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's says that there is no group
        first = save(tmp_path / "new" / "folder", alone(1)).result()
        assert difference(load(tmp_path / "new" / "folder", fresh()), alone(1)) == 0
        second = save(first.parent, alone(2)).result()
    assert [*first.parent.iterdir()] == [second]
    assert difference(load(first.parent, fresh()), alone(2)) == 0
    meta = tree.map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, fresh())
    assert difference(load(first.parent, meta), alone(2)) == 0
    params = torch.nn.Parameter(torch.ones(2))
    save(first.parent, params)
    assert torch.equal(load(first.parent, params), torch.ones(2))


def test_what_is_copied_may_be_overwritten(tmp_path: Path) -> None:
    for step in (1, 2, 3):  # the next waits for the one before
        given = alone(step)
        saving = save(tmp_path, given, asynchronous=True)
        for x in tree.leaves(given["params"]) + tree.leaves(given["state"]):
            x.fill_(7)
    assert difference(load(tmp_path, fresh()), alone(3)) == 0
    assert saving.done()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_what_one_process_is_refused(tmp_path: Path) -> None:
    like = fresh()
    with pytest.raises(FileNotFoundError, match="has no checkpoint: load takes the folder that save was given"):
        load(tmp_path, like)
    (tmp_path / f"unfinished-0-{'a' * 32}").mkdir()
    with pytest.raises(FileNotFoundError, match=r"the first save to .* was interrupted, so it has no whole checkpoint: start"):
        load(tmp_path, like)
    path = save(tmp_path, alone(1)).result()
    with pytest.raises(FileNotFoundError, match=f"is inside the folder that save was given: load {re.escape(str(tmp_path))}"):
        load(path, like)
    params = {"w": torch.ones(2)}
    save(tmp_path, optfn.scale_by_belief().init(params))
    with pytest.raises(ValueError, match="at 'slots' the checkpoint has BeliefSlots, like has YogiSlots: it is the state of"):
        load(tmp_path, optfn.scale_by_yogi().init(params))
    with pytest.raises(TypeError, match="'x' must be a dense tensor"):
        save(tmp_path, {"x": torch.eye(2).to_sparse()})
    with pytest.raises(ValueError, match=r"two leaves have the path 'a\.b'"):
        save(tmp_path, {"a.b": 1.0, "a": {"b": 2.0}})
    plain = tmp_path / "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.save({"x": torch.ones(1)}, checkpoint_id=plain)
    with pytest.raises(FileNotFoundError, match=r"was not written by save: use torch\.distributed\.checkpoint\.load"):
        load(plain, {"x": torch.ones(1)})
    newest = max(tmp_path.glob("checkpoint-*"))
    (newest / ".metadata").unlink()
    with pytest.raises(FileNotFoundError, match=r"has lost \.metadata: copy the checkpoint again"):
        load(tmp_path, like)


# Crashes

_context = multiprocessing.get_context("forkserver")


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a process that has no group, and no thread, so that it may fork."""
    here, there = _context.Pipe(duplex=False)
    process: Any = _context.Process(target=_answer, args=(function, there, *args), daemon=True)
    process.start()
    there.close()
    try:
        assert here.poll(120), "there is no answer"
        return here.recv()
    finally:
        process.kill()
        process.join()


def _answer(function: Callable[..., Any], pipe: Any, *args: Any) -> None:
    torch.set_num_threads(1)
    pipe.send(function(*args))


OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}


def dead_at_every_operation(folder: str) -> tuple[list[int], list[str]]:
    """The steps that are loaded after a crash right before the first, second, ... operation on files, and those operations."""
    trees = {step: alone(step) for step in (1, 2, 3)}
    base = Path(folder) / "base"
    save(base, trees[1])
    save(base, trees[1])
    found: list[int] = []
    names: list[str] = []
    for k in itertools.count():
        place = Path(folder) / str(k)
        shutil.copytree(base, place)
        child = os.fork()
        if child == 0:
            die_at(k, Path(folder) / "names")
            save(place, trees[2])
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        step = load(place, fresh())["steps"]
        assert difference(load(place, fresh()), trees[step]) == 0
        if code == 0:
            assert step == 2
            return found, names
        assert code == 9
        found.append(step)
        names.append((Path(folder) / "names").read_text())
        save(place, trees[3])
        assert len([*place.iterdir()]) == 1, "what the crash left is there"
        assert difference(load(place, fresh()), trees[3]) == 0
    raise AssertionError


def die_at(k: int, report: Path) -> None:
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in OPERATIONS:
            if count == k:
                count = -1
                os.write(os.open(report, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), event.encode())
                os._exit(9)
            count += 1 if count >= 0 else 0

    sys.addaudithook(hook)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_crash_before_any_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    steps, names = in_a_process(dead_at_every_operation, str(tmp_path))
    assert steps == sorted(steps)
    assert {*steps} == {1, 2}
    assert names.count("os.rename") >= 3  # torch's of its metadata, ours of the new and of the old


SIZE = 40_000


def gradient(step: int) -> Tensor:
    return torch.linspace(-1, 1, SIZE, dtype=torch.float64) * (1 + step % 7) + math.sin(step)


def next_step(params: Any, state: Any, step: int, lay: Callable[[Any], Any] = same) -> tuple[Any, Any]:
    updates, state = optfn.adam(0.01).update({"w": lay(gradient(step))}, state, params)
    return optfn.apply_updates(params, updates), state


def begun(lay: Callable[[Any], Any] = same) -> dict[str, Any]:
    params = {"w": lay(torch.zeros(SIZE, dtype=torch.float64))}
    return {"params": params, "state": optfn.adam(0.01).init(params), "steps": 0}


def until_killed(rank: int, world: int, store: str, folder: str, finished: Any) -> None:
    """Train on, and save each step."""
    torch.set_num_threads(1)
    lay: Callable[[Any], Any] = same
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
        mesh = init_device_mesh("cpu", (world,))
        lay = lambda x: distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)  # noqa: E731
    try:
        now = load(folder, begun(lay))
    except FileNotFoundError:
        now = begun(lay)
    for step in itertools.count(now["steps"]):
        params, state = next_step(now["params"], now["state"], step, lay)
        now = {"params": params, "state": state, "steps": step + 1}
        asynchronous = step % 2 == 1
        save(folder, now, asynchronous=asynchronous)
        if rank == 0:
            finished.value = step if asynchronous else step + 1


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    moments = random.Random(0)
    folder, expected, loaded = tmp_path / "run", begun(), []
    rounds = request.config.getoption("--kills")
    for k in range(rounds):
        world = 1 + k % 2
        finished = _context.Value("q", -1)
        started: list[Any] = [
            _context.Process(
                target=until_killed, args=(rank, world, str(tmp_path / f"store{k}"), str(folder), finished), daemon=True
            )
            for rank in range(world)
        ]
        for process in started:
            process.start()
        end = time.monotonic() + 60
        while finished.value < 0:
            assert time.monotonic() < end, "nothing was saved"
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.2))
        moments.shuffle(started)
        for process in started:
            os.kill(process.pid, signal.SIGKILL)
            time.sleep(moments.uniform(0, 0.02))
        for process in started:
            process.join()
        found = load(folder, begun())
        assert found["steps"] >= finished.value, "a checkpoint that was there is lost"
        while expected["steps"] < found["steps"]:
            params, state = next_step(expected["params"], expected["state"], expected["steps"])
            expected = {"params": params, "state": state, "steps": expected["steps"] + 1}
        assert difference(found, expected) <= 1e-12, f"after kill {k} the checkpoint is none of the steps"
        loaded.append(found["steps"])
    assert loaded == sorted(loaded)
    assert loaded[-1] >= rounds


# torch.optim under FSDP2


OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], Callable[[], optfn.GradientTransformation]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 0.01}, lambda: optfn.adamw(0.01)),
    "amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}, lambda: optfn.adam(0.01, amsgrad=True)),
    "sgd": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}, lambda: optfn.sgd(0.01, momentum=0.9)),
    "rmsprop": (
        torch.optim.RMSprop,
        {"lr": 0.01, "momentum": 0.9, "centered": True},
        lambda: optfn.rmsprop(0.01, momentum=0.9, centered=True),
    ),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.01}, lambda: optfn.adagrad(0.01)),
}


def network() -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    for part in (model[0], model[2], model):
        fully_shard(part)
    return model


def differentiated(model: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    x = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    model.zero_grad()
    (model(x) - x.sum(1, keepdim=True)).square().mean().backward()


def functional_step(model: torch.nn.Module, tx: Any, state: Any, step: int) -> Any:
    differentiated(model, step)
    params = dict(model.named_parameters())
    with torch.no_grad():
        updates, state = tx.update({name: p.grad for name, p in params.items()}, state, params)
        for name, p in optfn.apply_updates(params, updates).items():
            params[name].copy_(p)
    return state


def torch_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    differentiated(model, step)
    optimizer.step()


def apart(first: torch.nn.Module, second: torch.nn.Module) -> float:
    return difference(dict(first.named_parameters()), dict(second.named_parameters()))


def bridged(name: str, flat: bool, folder: str) -> float:
    """From torch.optim's checkpoint to optfn, and from one made of optfn's state to torch.optim."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    cls, options, make = OPTIMIZERS[name]
    form, tx = StateDictOptions(flatten_optimizer_state_dict=flat), make()

    def new() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = network()
        return model, cls(model.parameters(), **options)

    def read(path: str) -> tuple[torch.nn.Module, torch.optim.Optimizer, dict[str, Any]]:
        model, optimizer = new()
        parts = dict(zip(("model", "optim"), get_state_dict(model, optimizer, options=form), strict=True))
        dcp.load(parts, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=copy.copy(parts["optim"]), options=form)
        return model, optimizer, parts["optim"]

    theirs, optimizer = new()
    for step in range(3):
        torch_step(theirs, optimizer, step)
    model_dict, optimizer_dict = get_state_dict(theirs, optimizer, options=form)
    dcp.save({"model": model_dict, "optim": optimizer_dict}, checkpoint_id=f"{folder}/{name}-{flat}-there")

    mine, _, loaded = read(f"{folder}/{name}-{flat}-there")
    state = load_torch_state(tx, dict(mine.named_parameters()), loaded)
    whole_state = load_torch_state(tx, dict(mine.named_parameters()), whole(loaded))
    assert tree.map(layout_of, whole_state) == tree.map(layout_of, state)
    assert difference(whole_state, state) == 0
    for step in range(3, 6):
        torch_step(theirs, optimizer, step)
        state = functional_step(mine, tx, state, step)
    worst = apart(theirs, mine)

    template, _ = new()
    _, like = get_state_dict(template, cls(template.parameters(), **options), options=form)
    back = to_torch_state_dict(tx, state, dict(mine.named_parameters()), like)
    assert {*back} == {*like}
    dcp.save({"model": dict(mine.state_dict()), "optim": back}, checkpoint_id=f"{folder}/{name}-{flat}-back")
    again, other, _ = read(f"{folder}/{name}-{flat}-back")
    for step in range(6, 9):
        torch_step(theirs, optimizer, step)
        torch_step(again, other, step)
    return max(worst, apart(theirs, again))


def all_bridged(folder: str) -> dict[Any, float]:
    forms = [("adamw", True), *((name, k % 2 == 1) for k, name in enumerate(OPTIMIZERS))]
    return {(name, flat): bridged(name, flat, folder) for name, flat in forms}


@pytest.mark.slow
def test_a_sharded_optimizer_of_torch_and_back(tmp_path: Path) -> None:
    for found in on_processes(all_bridged, 2, str(tmp_path)):
        assert {name: x for name, x in found.items() if not x <= 1e-12} == {}
