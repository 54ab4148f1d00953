"""The numbers that both trainings share."""

from typing import NamedTuple


class Size(NamedTuple):
    """The network's shape, and the batch it is trained with."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int


class Recipe(NamedTuple):
    """AdamW with clipping, and a learning rate that climbs in a straight line and falls along a cosine."""

    steps: int
    peak: float = 2e-3
    final: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    max_norm: float = 1.0

    @property
    def warmup(self) -> int:
        """The steps up to the peak."""
        return self.steps // 10


SIZES = {"small": Size(layers=4, heads=5, width=160, context=128, batch=16), "tiny": Size(1, 2, 32, 32, 4)}
