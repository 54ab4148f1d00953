"""Steps that fail when they are run, with real code generation; run as a program, it says of each what it did.

It is a program of its own because an error in generated code that runs on several threads ends the process.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad
from torch.nn import functional

import optfn

ROWS, WIDTH = 96, 512  # large enough for two threads
GOOD, HIGH, LOW = (torch.tensor([0, 5, last]) for last in (ROWS - 1, ROWS, -1))
TABLE = torch.nn.Embedding(ROWS, WIDTH)
Case = tuple[Callable[..., Any], Any, Any]


def values(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def beside_a_write(use: Callable[[Tensor, Any], Tensor]) -> Callable[..., Any]:
    """A step that changes one tensor and may fail at another."""
    return lambda p, x: {"a": p["a"] + 1, "b": p["b"] + use(p["b"], x)}


def trained(loss: Callable[..., Tensor]) -> Callable[..., Any]:
    """A train step: forward, backward, clipping and AdamW."""
    tx = optfn.chain(optfn.clip_by_global_norm(1.0), optfn.adamw())

    def step(p: Any, x: Any) -> Any:
        updates, state = tx.update(grad(loss)(p["params"], x), p["state"], p["params"])
        return {"params": optfn.apply_updates(p["params"], updates), "state": state}

    return step


def predict(params: Any, x: Any) -> Tensor:
    hidden = functional.embedding(x["tokens"], params["table"]).sin()
    return functional.cross_entropy(hidden @ params["out"], x["targets"])


def with_module(params: Any, x: Any) -> Tensor:
    return functional_call(TABLE, {"weight": params["table"]}, x).sin().sum()


def at_most_a_model(params: Any) -> Any:
    tx = optfn.chain(optfn.clip_by_global_norm(1.0), optfn.adamw())
    return {"params": params, "state": tx.init(params)}


def cases() -> dict[str, Case]:
    """Of each case the step, what is donated, and another argument that is good, then some that are not."""
    p = {"a": values(ROWS, WIDTH), "b": values(ROWS, WIDTH)}
    counts = {"a": torch.arange(1, 1 + ROWS * WIDTH), "b": torch.arange(1, 1 + ROWS * WIDTH)}
    model = at_most_a_model({"table": values(ROWS, WIDTH).float(), "out": values(WIDTH, ROWS).float()})
    bad = [HIGH, LOW]
    square = values(64, 64).sin()
    positive = square @ square.T + torch.eye(64, dtype=torch.float64)
    q = {"a": values(ROWS, WIDTH), "b": values(64, 64)}
    return {
        "indexing": (beside_a_write(lambda b, i: b[i].sum()), p, [GOOD, HIGH, -1 - HIGH]),
        "index_select": (beside_a_write(lambda b, i: b.index_select(1, i).sum()), p, [GOOD, LOW]),
        "gather": (beside_a_write(lambda b, i: b.gather(0, i[:, None].expand(3, WIDTH)).sum()), p, [GOOD, *bad]),
        "scatter": (beside_a_write(lambda b, i: b.scatter(0, i[:, None].expand(3, WIDTH), 2.0)), p, [GOOD, *bad]),
        "index_add": (beside_a_write(lambda b, i: b.index_add(0, i, b[:3])), p, [GOOD, *bad]),
        "index_copy": (beside_a_write(lambda b, i: b.index_copy(0, i, b[:3])), p, [GOOD, *bad]),
        "index_put": (beside_a_write(lambda b, i: b.index_put((i,), b[:3], accumulate=True)), p, [GOOD, HIGH]),
        "a computed index": (
            beside_a_write(lambda b, x: b[x.cumsum(0)]),
            p,
            [torch.zeros(ROWS).long(), torch.ones(ROWS).long()],
        ),
        "inverse": (beside_a_write(lambda b, x: torch.linalg.inv(x)), q, [positive, torch.zeros_like(positive)]),
        "cholesky": (beside_a_write(lambda b, x: torch.linalg.cholesky(x)), q, [positive, -positive]),
        "solve": (beside_a_write(lambda b, x: torch.linalg.solve(x, b)), q, [positive, torch.zeros_like(positive)]),
        "integer division": (beside_a_write(lambda b, x: b // x), counts, [torch.tensor(3), torch.tensor(0)]),
        "remainder": (beside_a_write(lambda b, x: b % x), counts, [torch.full_like(counts["b"], 3), torch.zeros_like(counts["b"])]),
        "a train step": (
            trained(predict),
            model,
            [
                {"tokens": GOOD, "targets": torch.tensor([0, -100, 1])},
                *({"tokens": i, "targets": GOOD} for i in bad),
                *({"tokens": GOOD, "targets": i} for i in bad),
            ],
        ),
        "a train step by Dynamo": (trained(with_module), at_most_a_model({"table": model["params"]["table"]}), [GOOD, *bad]),
    }


def copies(of: Any) -> Any:
    return optfn.tree.map(lambda x: x.detach().clone(), of)


def run(step: Callable[..., Any], donated: Any, given: list[Any]) -> list[str]:
    """What was wrong."""
    wrong = []
    compiled = optfn.compile(step, donate=0)
    held = copies(donated)
    for turn in (given[0], *given[1:], given[0]):
        before = copies(held)
        try:
            expected = step(copies(before), turn)
        except Exception:
            expected = None
        try:
            got = compiled(held, turn)
        except Exception as error:
            got = None
            if expected is not None:
                wrong.append(f"raised {error!r}")
        if expected is None:
            if got is not None:
                wrong.append(f"no error for {turn}")
            if not all(map(torch.equal, optfn.tree.leaves(held), optfn.tree.leaves(before))):
                wrong.append(f"after the error for {turn} an argument is not what it was")
        elif got is not None:
            for x, y in zip(optfn.tree.leaves(got), optfn.tree.leaves(expected), strict=True):
                if not torch.allclose(x, y, rtol=1e-5, atol=1e-6):
                    wrong.append(f"off by {(x - y).abs().max().item()}")
    return wrong


if __name__ == "__main__":
    for name, case in cases().items():
        if len(sys.argv) < 2 or name in sys.argv[1:]:
            print(json.dumps([name, run(*case)]), flush=True)
