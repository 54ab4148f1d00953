"""A tree whose leaves lie on several processes in every way, and the same in one process."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import optfn

# A row is no multiple of the processes, a leaf has fewer than there are, so that some pieces are empty, one leaf has no dimension.
SHAPES = {"w": (7, 4), "deep.w": (8, 6), "last": (2, 3), "one": (1,), "b": (8,), "s": ()}


def full_params() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def full_grads(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    size = 10.0 ** (step % 3 - 2)
    return {name: size * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def _fsdp(mesh: Any, name: str) -> tuple[Any, list[Any]]:
    return mesh, [Shard(0) if SHAPES[name] else Replicate()]


def _hsdp(mesh: Any, name: str) -> tuple[Any, list[Any]]:
    return mesh, [Replicate(), Shard(0) if SHAPES[name] else Replicate()]


def _tp(mesh: Any, name: str) -> tuple[Any, list[Any]]:
    """Columns, rows, and what is not cut."""
    return mesh, [{"w": Shard(1), "deep.w": Shard(0), "last": Shard(1)}.get(name, Replicate())]


def _tp_fsdp(mesh: Any, name: str) -> tuple[Any, list[Any]]:
    """Matrices on both dimensions, twice cut in one and the same; the rest by rows on one of them."""
    if name == "w":
        return mesh, [Shard(0), Shard(1)]
    if name == "deep.w":
        from torch.distributed.tensor.placement_types import _StridedShard

        return mesh, [_StridedShard(0, split_factor=2), Shard(0)]
    return mesh["dp"], [Shard(0) if SHAPES[name] else Replicate()]


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Any, str], tuple[Any, list[Any]]]]] = {
    "fsdp": ((4,), _fsdp),
    "hsdp": ((2, 2), _hsdp),
    "tp": ((4,), _tp),
    "tp+fsdp": ((2, 2), _tp_fsdp),
}


def distributed(layout: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What lays a tree out; some of the leaves of ``tp`` stay plain."""
    shape, place = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])

    def lay(tree: dict[str, Any]) -> dict[str, Any]:
        return {
            name: x if x is None or (layout == "tp" and name == "s") else _cut(x, *place(mesh, name)) for name, x in tree.items()
        }

    return lay


def _cut(x: Tensor, mesh: Any, placements: list[Any]) -> DTensor:
    if any(hasattr(p, "split_factor") for p in placements):
        # As FSDP2 does: what is cut in one dimension of the mesh is cut again in the other.
        inner = x.chunk(mesh.size(1))[mesh.get_local_rank(1)].chunk(mesh.size(0))[mesh.get_local_rank(0)].clone()
        return DTensor.from_local(inner, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())
    return distribute_tensor(x, mesh, placements)


def whole(tree: Any) -> Any:
    return optfn.tree.map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, tree)


def layout_of(x: Any) -> Any:
    return (x.device_mesh, x.placements) if isinstance(x, DTensor) else None
