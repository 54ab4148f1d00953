"""A checkpoint is one file of ``torch.save``, written whole or not at all, and read only if every byte of it is sound."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged or another run's."""


def save(path: Path, settings: dict[str, Any], run: dict[str, Any]) -> None:
    """Write beside the old file, force it to disk, then put it in the old one's place: a crash leaves one or the other."""
    buffer = io.BytesIO()
    torch.save({"settings": settings, "run": run}, buffer)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Force the new name to disk too, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the run that were saved, tensors on the CPU.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}: start without --resume") from None
    try:
        # The file is a zip archive with a checksum of each entry, which torch.load does not look at.
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            sound = archive.testzip() is None
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True) if sound else None
    except Exception:  # whatever a parser can raise on arbitrary bytes
        content = None
    if not isinstance(content, dict) or content.keys() != {"settings", "run"}:
        raise CheckpointError(f"{path} is damaged, or no checkpoint of this program; it is left as it is")
    return content["settings"], content["run"]
