"""Checkpoints of trees, written by one process or by many: a folder that has the last whole one at every moment.

A checkpoint is a folder ``checkpoint-N`` inside the given one. The next is written beside it under another name, brought to the
disk, and renamed to ``checkpoint-(N+1)``; only then the one before goes, renamed first. Each of these is one step of the file
system, so whatever has the name ``checkpoint-N`` is whole, the highest N is the last, and a process may die at any moment. (A
checkpoint that replaced another under its own name would need two renames, with none between them.) What a dead process left
behind has other names; the next save removes it.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from optfn import tree as trees
from optfn.sharding import in_blocks, is_sharded, local, whole
from optfn.sharding import like as laid_out

__all__ = ["load", "save"]

T = TypeVar("T")

_WHOLE = re.compile(r"checkpoint-(\d+)")
_LEFT = re.compile(r"(unfinished|old)-\d+-[0-9a-f]{32}")
_PLAIN_KINDS = {"dict", "OrderedDict", "defaultdict", "list", "tuple"}


def save(folder: str | os.PathLike[str], tree: Any, *, asynchronous: bool = False) -> Future[Path]:
    """Write a tree to a folder, each process the pieces that it has, so that a crash at any moment leaves a whole checkpoint.

    The folder then has this checkpoint and no other. Until it is whole, which all processes know before this returns, the one
    before is there. Give each that you want to keep a folder of its own.

    All processes call this together, with the same tree, or one process that belongs to no group does. Tensors that do not lie on
    several processes must be equal on all; one process writes them. A save while another is under way waits for that.

    Args:
        folder: where; it is made if there is none. All processes must see the same one. One run at a time may save to it.
        tree: tensors, numbers and None, in any structure: ``{"params": params, "state": state}``.
        asynchronous: return when the tensors have been copied to the memory of the CPU, and write from another thread. They may be
            overwritten and donated at once. Call ``result()`` of what is returned before the group is destroyed.

    Returns:
        Where ``result()`` waits until the checkpoint is whole, gives its path and raises what went wrong. If nobody asks, the next
        save warns of that. Without ``asynchronous`` it is done, and errors are raised here.

    Raises:
        TypeError: a leaf is neither a dense tensor, a number nor None.
        ValueError: two leaves have the same dotted path, or processes have different trees.
        RuntimeError: a process could not write.

    Example:
        >>> import tempfile
        >>> tx = optfn.adam(0.1)
        >>> params = {"w": torch.ones(2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(folder, {"params": params, "state": tx.init(params)}).result()
        ...     loaded = load(folder, like={"params": params, "state": tx.init(params)})
        >>> path.name, loaded["params"]
        ('checkpoint-0', {'w': tensor([1., 1.])})
    """
    _wait()
    group, place = _group(), Path(folder)
    flat = _agreed(tree, "the tree", group)
    staged = {path: _staged(x, asynchronous) for path, x in flat.items()}
    new = _together(lambda: _prepared(place) if _is_first() else None, group)[0]
    assert new is not None
    if asynchronous:
        saving = _thread().submit(_written, new, staged, _kinds(tree), group)
        _under_way.append((saving, place))
        return saving
    done: Future[Path] = Future()
    done.set_result(_written(new, staged, _kinds(tree), group))
    return done


def load(folder: str | os.PathLike[str], like: Any) -> Any:
    """The tree that :func:`save` wrote to a folder, as new tensors that lie as those of ``like`` do.

    It may have been written by another number of processes, and lain on them in another way. Each process reads what it needs. All
    processes call this together, with the same ``like``, or one process that belongs to no group does.

    Args:
        folder: what :func:`save` was given.
        like: a tree of the structure wanted, as ``{"params": params, "state": tx.init(params)}``. Its tensors give shapes, dtypes,
            devices and places (a plain ``meta`` tensor gives no device); it is not changed.

    Raises:
        FileNotFoundError: there is no whole checkpoint.
        KeyError: a leaf is missing from the checkpoint, or ``like`` lacks one; all are listed.
        ValueError: a shape or a dtype differs, the state is one of another transformation, or processes have different trees.
        RuntimeError: a process could not read.

    Every error is raised by all processes.
    """
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    _wait()
    group = _group()
    path = _together(lambda: _newest(Path(folder)) if _is_first() else None, group)[0]
    assert path is not None
    flat = _agreed(like, "like", group)
    _together(lambda: _check_fits(path, flat, like), group)
    into = {name: _empty(x) for name, x in flat.items()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    read: Any = state_dict_loader
    try:
        # dcp.load does this, and warns where there is no group.
        read._load_state_dict(into, FileSystemReader(path), process_group=group, no_dist=group is None, planner=planner)
    except CheckpointException as error:  # no Exception; all processes raise it
        raise RuntimeError(f"the checkpoint {path} could not be read: {_first_failure(error)}") from error
    return trees.from_flat_dict(into, like)


# All processes


def _group() -> Any:
    """The group that all processes talk in for checkpoints, of their own so that a thread may; None where there is one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return _group_of(torch.distributed.group.WORLD)


@functools.lru_cache(maxsize=1)
def _group_of(world: Any) -> Any:
    return torch.distributed.new_group(backend="gloo")


def _is_first() -> bool:
    return _group() is None or torch.distributed.get_rank() == 0


def _together(f: Callable[[], T], group: Any) -> list[T]:
    """What ``f`` gives on each process. Where it fails on one, all raise that error."""
    if group is None:
        return [f()]
    error: Exception | None = None
    value: Any = None
    try:
        value = f()
    except Exception as caught:
        error = caught if type(caught).__module__ == "builtins" else RuntimeError(f"{type(caught).__name__}: {caught}")
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, (error, value), group=group)
    for rank, (failed, _) in enumerate(found):
        if failed is not None:
            raise error if error is not None and rank == torch.distributed.get_rank() else failed
    return [x for _, x in found]


def _agreed(tree: Any, name: str, group: Any) -> dict[str, Tensor]:
    """The leaves of a tree by their paths, which are the same on all processes."""
    flat: dict[str, Tensor] = {}
    described: dict[str, str] = {}

    def digest() -> str:
        for path, x in zip(trees.paths(tree), trees.flatten(tree)[0], strict=True):
            if isinstance(x, Tensor) and x.layout != torch.strided:
                raise TypeError(f"{path!r} must be a dense tensor, got {x.layout}: call its to_dense()")
        flat.update(trees.to_flat_dict(tree))
        described.update({path: _described(x) for path, x in flat.items()})
        return hashlib.sha256(json.dumps([described, _kinds(tree)]).encode()).hexdigest()

    if len({*_together(digest, group)}) > 1:
        every = _together(lambda: described, group)
        for rank, words in enumerate(every):
            for path in {**every[0], **words}:
                first, other = (of.get(path, "nothing") for of in (every[0], words))
                if first != other:
                    raise ValueError(f"{name} differs between processes: at {path!r} process 0 has {first}, process {rank} {other}")
        raise ValueError(f"{name} has other containers on other processes: give all of them the same")
    return flat


def _described(x: Any) -> str:
    where = f" on {tuple(x.device_mesh.shape)} as {x.placements}" if is_sharded(x) else ""
    return f"{x.dtype} of shape {tuple(x.shape)}{where}"


def _kinds(tree: Any) -> dict[str, str]:
    """The names of the containers in a tree, by their paths."""
    found: dict[str, str] = {}
    _add_kinds(found, tree, "")
    return found


def _add_kinds(found: dict[str, str], node: Any, path: str) -> None:
    below = trees.children(node)
    if below is None:
        return
    found[path] = type(node).__name__
    for name, child in below.items():
        _add_kinds(found, child, f"{path}.{name}" if path else name)


# Saves under way

_under_way: list[tuple[Future[Path], Path]] = []


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "optfn.distributed.save")  # Python waits for it at its end


def _wait() -> None:
    """Wait for the save under way. All processes know whether there is one, and none raises alone."""
    while _under_way:
        saving, place = _under_way.pop()
        error = saving.exception()
        if error is not None:
            warnings.warn(f"the last checkpoint for {place} was not written: {error}", stacklevel=3)


# Writing


class _New(NamedTuple):
    """The folder of all checkpoints, the number of the new one, and where it is until it is whole."""

    folder: Path
    number: int
    unfinished: Path


def _staged(x: Any, copied: bool) -> Tensor:
    """What is written of a tensor: its blocks, or all of it where pieces are no blocks, which a checkpoint cannot have."""
    if not is_sharded(x):
        return x.to("cpu", copy=True) if copied else x
    if not in_blocks(x):
        return whole(x).to("cpu", copy=copied)
    piece = local(x).detach()
    return laid_out(piece.to("cpu", copy=True) if copied else piece, x)


def _prepared(folder: Path) -> _New:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: save takes a folder")
    if not folder.exists():
        folder.mkdir(parents=True)
        _to_disk(folder.parent)
    for path in folder.iterdir():
        if _LEFT.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    number = 1 + max(_numbers(folder), default=-1)
    return _New(folder, number, folder / f"unfinished-{number}-{uuid.uuid4().hex}")


def _numbers(folder: Path) -> list[int]:
    return [int(match[1]) for path in folder.iterdir() if (match := _WHOLE.fullmatch(path.name))]


def _written(new: _New, staged: dict[str, Tensor], kinds: dict[str, str], group: Any) -> Path:
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = FileSystemWriter(new.unfinished, sync_files=True)
    write: Any = state_dict_saver
    try:
        # dcp.save does this, and warns where there is no group.
        metadata = write._save_state_dict(staged, writer, process_group=group, no_dist=group is None, planner=planner)
    except CheckpointException as error:  # no Exception; all processes raise it
        if _is_first():
            shutil.rmtree(new.unfinished, ignore_errors=True)
        raise RuntimeError(f"no checkpoint was written to {new.folder}: {_first_failure(error)}") from error
    path = _together(lambda: _renamed(new, metadata, kinds) if _is_first() else None, group)[0]
    assert path is not None
    return path


def _renamed(new: _New, metadata: Any, kinds: dict[str, str]) -> Path:
    for part in metadata.storage_data.values():
        file = new.unfinished / part.relative_path
        if not file.exists() or file.stat().st_size < part.offset + part.length:
            raise RuntimeError(f"{file}, which another process wrote, is not here: the folder must be one that all processes see")
    with (new.unfinished / "tree.json").open("w") as file:
        json.dump({"format": 1, "kinds": kinds}, file)
        file.flush()
        os.fsync(file.fileno())
    _to_disk(new.unfinished)
    path = new.folder / f"checkpoint-{new.number}"
    new.unfinished.rename(path)
    _to_disk(new.folder)
    for number in _numbers(new.folder):
        if number < new.number:
            old = new.folder / f"old-{number}-{uuid.uuid4().hex}"
            (new.folder / f"checkpoint-{number}").rename(old)
            shutil.rmtree(old, ignore_errors=True)
    return path


def _to_disk(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    if os.name != "posix":  # a folder cannot be opened elsewhere
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _first_failure(error: Any) -> str:
    rank, (cause, _) = min(error.failures.items())
    return f"process {rank}: {type(cause).__name__}: {cause}"


# Reading


def _newest(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: load takes the folder that save was given")
    if numbers := _numbers(folder):
        path = folder / f"checkpoint-{max(numbers)}"
        if lost := [name for name in (".metadata", "tree.json") if not (path / name).exists()]:
            raise FileNotFoundError(f"{path} has lost {', '.join(lost)}: copy the checkpoint again, with all of its files")
        return path
    if (folder / ".metadata").exists():
        if (folder / "tree.json").exists():
            raise FileNotFoundError(f"{folder} is inside the folder that save was given: load {folder.parent}")
        raise FileNotFoundError(f"{folder} was not written by save: use torch.distributed.checkpoint.load")
    if any(_LEFT.fullmatch(path.name) for path in folder.iterdir()):
        raise FileNotFoundError(f"the first save to {folder} was interrupted, so it has no whole checkpoint: start without one")
    raise FileNotFoundError(f"{folder} has no checkpoint: load takes the folder that save was given")


def _check_fits(path: Path, flat: dict[str, Any], like: Any) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    written = json.loads((path / "tree.json").read_text())
    if written["format"] != 1:
        raise ValueError(f"{path} was written by a newer version of optfn: load it with that")
    kinds, own = written["kinds"], _kinds(like)
    for place, ours in own.items():
        theirs = kinds.get(place, ours)
        if theirs != ours and not _PLAIN_KINDS.issuperset((theirs, ours)):
            said = f"at {place!r} the checkpoint has {theirs}, like has {ours}"
            raise ValueError(
                f"{said}: it is the state of another transformation; build tx as it was when the checkpoint was written"
            )
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    missing, extra = ([repr(name) for name in some if name not in other] for some, other in ((flat, saved), (saved, flat)))
    if missing or extra:
        said = [
            f"{what} {', '.join(names)}"
            for what, names in (("only like has", missing), ("only the checkpoint has", extra))
            if names
        ]
        raise KeyError(f"the checkpoint does not fit: {'; '.join(said)}")
    for name, x in flat.items():
        of: Any = saved[name]
        if tuple(of.size) != tuple(x.shape) or of.properties.dtype != x.dtype:
            wanted, given = (
                f"{dtype} of shape {tuple(shape)}" for dtype, shape in ((x.dtype, x.shape), (of.properties.dtype, of.size))
            )
            raise ValueError(f"{name!r} must be {wanted}, the checkpoint has {given}")


def _empty(x: Any) -> Tensor:
    """A new tensor to read into; whole where the pieces are no blocks."""
    device = x.device if not x.is_meta else x.device_mesh.device_type if is_sharded(x) else "cpu"
    if is_sharded(x) and in_blocks(x):
        return laid_out(torch.empty(x.to_local().shape, dtype=x.dtype, device=device), x)
    return torch.empty(x.shape, dtype=x.dtype, device=device)
