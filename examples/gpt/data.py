"""Text that every machine with Python has: the source of its standard library, as bytes."""

import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
VALIDATION = 26 / 256


def standard_library() -> tuple[Tensor, Tensor, str]:
    """The text to train on, the text to validate on (a tenth of the files, chosen by their names), and a digest of both."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, validation = bytearray(), bytearray()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT.isdisjoint(name.parts):
            chance = hashlib.sha256(name.as_posix().encode()).digest()[0] / 256
            (validation if chance < VALIDATION else train).extend(path.read_bytes())
    if min(len(train), len(validation)) < 100_000:
        raise FileNotFoundError(f"too little Python source in {root} to train on")
    digest = hashlib.sha256(train + b"\0" + validation).hexdigest()[:16]
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(validation, dtype=torch.uint8), digest


def random_batch(text: Tensor, seed: int, step: int, size: int, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, ``[size, context]`` each: a function of seed and step alone, so there is no state to save."""
    mixed = hashlib.sha256(f"{seed} {step}".encode()).digest()[:4]  # torch's generator on the CPU reads 32 bits of a seed
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "big"))
    return _windows(text, torch.randint(len(text) - context, (size,), generator=generator), context)


def even_batches(text: Tensor, count: int, size: int, context: int) -> list[tuple[Tensor, Tensor]]:
    """``count`` batches spread evenly over the text, always the same."""
    starts = torch.arange(count * size) * (len(text) - context - 1) // (count * size - 1)
    return [_windows(text, some, context) for some in starts.split(size)]


def _windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    windows = text[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
