"""Steps that several files take."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

import optfn


def matrices(path: str, p: Tensor) -> bool:
    return p.ndim >= 2


def long_chain() -> optfn.GradientTransformation:
    return optfn.chain(
        optfn.clip_by_global_norm(1.0),
        optfn.scale_by_adam(),
        optfn.add_decayed_weights(0.1, mask=matrices),
        optfn.scale_by_learning_rate(optfn.warmup_cosine_decay_schedule(0.0, 0.1, 3, 10)),
        optfn.ema_params(0.9),
    )


def step_of(tx: optfn.GradientTransformation) -> Callable[..., Any]:
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optfn.apply_updates(params, updates), state

    return step
