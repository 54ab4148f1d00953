"""Every algorithm of optfn on one page: what it is, what it keeps, what it is checked against, and how fast its step is.

    python benchmarks/algorithms.py               docs/algorithms.md, some five minutes
    python benchmarks/algorithms.py --only lion   some of the rows; the others stay

A step is compiled, with parameters and state donated, on 16 matrices of 1024 x 1024 in float32.
"""

import argparse
import inspect
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optax
import report
import torch
from measure import COPY, in_turn
from tqdm import tqdm

import optfn

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs/algorithms.md", ROOT / "benchmarks/results/algorithms.json"
LEAVES, SIDE = 16, 1024
LOSS = {"value": torch.tensor(1.0)}
EXTRA: dict[str, dict[str, Any]] = {"momo": LOSS, "momo_adam": LOSS, "polyak_sgd": LOSS}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "noisy_sgd": {"key": 0},
    "dpsgd": {"lr": 1e-3, "l2_norm_clip": 1.0, "noise_multiplier": 1.0, "key": 0},
    "lars": {"lr": 1e-3},
}
UNTIMED = {
    "lbfgs": "its step is a line search",
    "sparse_adam": "its step is that of the rows touched",
    "muon": "its time is that of products of matrices",
    "galore": "its time is that of products of matrices, and of a decomposition at times",
    "sophia": "its time is that of gradients of the loss, at times",
    "dpsgd": "its gradients are one for each example",
}
OTHERWISE = {
    "adan": "the authors' code",
    "acprop": "the authors' code",
    "yogi": "Optax, but for the first moment, and the paper",
    "adopt": "Optax, and the authors' code",
}
"""What an algorithm is checked against where its namesake in Optax is not, or not alone, what it follows."""


def aliases() -> list[str]:
    """The public functions that make a whole optimizer, in the order of their files."""

    def is_alias(name: str) -> bool:
        made = getattr(optfn, name)
        whole = inspect.isfunction(made) and not name.startswith("scale_by") and "lr" in inspect.signature(made).parameters
        return whole and made.__module__.startswith("optfn.optimizers.")

    found = filter(is_alias, optfn.__all__)
    return sorted(found, key=lambda name: (getattr(optfn, name).__module__, inspect.getsourcelines(getattr(optfn, name))[1]))


def paper(name: str) -> str:
    """The first link of a docstring's references, or of those of the block that it points to."""
    text = inspect.getdoc(getattr(optfn, name)) or ""
    reference = text.split("Reference:")[-1].split("Example:")[0]
    pointer = re.search(r":func:`(\w+)`", reference)
    if "<http" not in reference and pointer:
        return paper(pointer[1])
    link = re.search(r"`([^`<]+?)\s*<(http[^>]+)>`_", reference)
    return f"[{' '.join(link[1].split())}]({link[2]})" if link else "torch.optim"


def oracle(name: str) -> str:
    known = {x.lower() for x in vars(torch.optim) if x[0].isupper()}
    if name in OTHERWISE:
        return OTHERWISE[name]
    if name.replace("_", "") in known:
        return "torch.optim"
    return "Optax" if hasattr(optax, name) or hasattr(optax.contrib, name) else "the paper"


def measured(name: str, seconds: float) -> dict[str, Any]:
    """State in bytes a parameter; the compiled step beside a copy; seconds to compile it."""
    params = {f"{i:02d}": torch.randn(SIDE, SIDE) for i in range(LEAVES)}
    grads = {path: torch.randn(SIDE, SIDE) for path in params}
    tx = getattr(optfn, name)(**ARGUMENTS.get(name, {}))
    state = tx.init(params)
    count = LEAVES * SIDE * SIDE
    held = sum(x.numel() * x.element_size() for x in optfn.tree.leaves(state))
    found: dict[str, Any] = {"state": held / count}
    if name in UNTIMED:
        return found
    extra = EXTRA.get(name, {})

    def step(params: Any, state: Any, grads: Any, extra: Any) -> Any:
        updates, state = tx.update(grads, state, params, **extra)
        return optfn.apply_updates(params, updates), state

    compiled = optfn.compile(step, donate=("params", "state"))

    def run() -> None:
        nonlocal params, state
        params, state = compiled(params, state, grads, extra)

    begin = time.perf_counter()
    run()
    first = time.perf_counter() - begin
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    taken = in_turn({COPY: lambda: target.copy_(source), "step": run}, "cpu", seconds)
    copy, later = (statistics.median(taken[which]) for which in (COPY, "step"))
    moved = 3 * 4 * count + 2 * held  # parameters and state are read and written, gradients read
    return found | {"compile": first - later, "step": later, "over": later / (moved / (2 * 4 * source.numel() / copy))}


def row(name: str, found: dict[str, Any]) -> str:
    module = sys.modules[getattr(optfn, name).__module__]
    family = (module.__doc__ or "").split(":")[0].split(".")[0].strip()
    timed = [f"{found[x]:.1f}" for x in ("over", "compile")] if "over" in found else ["", ""]
    cells = [f"{{func}}`~optfn.{name}`", family, paper(name), f"{found['state']:.1f}", oracle(name), *timed]
    return f"| {' | '.join(cells)} |"


def page(results: dict[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        "# Algorithms",
        "",
        "Every optimizer here, one a row, made by `make algorithms`. Blocks, `scale_by_…`, are [on their own page](api/blocks.md).",
        "",
        "- **State**: bytes a parameter, of float32 matrices.",
        "- **Checked against**: whose trajectories the tests compare in float64, to 1e-12 relative to 1 + |x|.",
        f"- **Step ÷ copy**: a compiled step of {LEAVES} matrices of {SIDE} by {SIDE}, its buffers donated, over the time",
        "  that reading gradients and reading and writing parameters and state would take at the speed of a copy. Products of",
        "  matrices, and what is read again after a sum over all leaves, are not counted.",
        "- **Compile**: seconds that the first step takes longer than a later one, with an empty cache, after another compilation.",
        "",
        "Measured on "
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}. "
        + " ".join(f"`{name}` is not timed: {why}." for name, why in UNTIMED.items()),
        "",
        "| | Family | Paper | State | Checked against | Step ÷ copy | Compile |",
        "|---|---|---|---|---|---|---|",
        *(row(name, results["rows"][name]) for name in aliases() if name in results["rows"]),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="some of the algorithms; what an earlier run found of others stays"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="to time each (default: 1)")
    args = parser.parse_args(argv)
    if unknown := {*(args.only or ())} - {*aliases()}:
        parser.error(f"no algorithm is called {', '.join(sorted(unknown))}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    results["machine"] = report.machine("cpu")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        torch.compile(lambda x: x + 1)(torch.ones(3))  # what the first one of a process costs is not the algorithm's
        for name in tqdm(args.only or aliases(), unit="algorithm", dynamic_ncols=True):
            results["rows"][name] = measured(name, args.seconds)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))
    print(f"{PAGE.relative_to(ROOT)}: {len(results['rows'])} algorithms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
