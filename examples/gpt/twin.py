"""The same training as torch.optim does it: AdamW, clip_grad_norm_ and a LambdaLR, on a module of its own."""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from gpt.model import GPT, cross_entropy
from gpt.settings import Recipe


class Twin:
    """A copy of a model, an optimizer and a scheduler, and the step that changes them."""

    def __init__(self, model: GPT, recipe: Recipe, *, fused: bool = False) -> None:
        self.model = copy.deepcopy(model)
        self.recipe = recipe
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.peak, betas=recipe.betas, fused=fused or None)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)

    def rate(self, step: int) -> float:
        """The learning rate as a share of its peak."""
        floor = self.recipe.final / self.recipe.peak
        if step < self.recipe.warmup:
            return step / self.recipe.warmup
        done = min((step - self.recipe.warmup) / (self.recipe.steps - self.recipe.warmup), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Train on one batch; returns its loss."""
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(x), y)
        loss.backward()
        self.apply()
        return loss.detach()

    def apply(self) -> None:
        """The part that optfn's ``update`` and ``apply_updates`` do."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_norm)
        self.optimizer.step()
        self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
