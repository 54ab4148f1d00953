"""What is shown when the training is over: times taken side by side, and the loss curves."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

STYLES = {"torch.optim": {"color": "#f2a65a", "linewidth": 3.5}, "optfn": {"color": "#1f4e79", "linewidth": 1.0}}


def side_by_side(runs: dict[str, Callable[[], Any]], synchronize: Callable[[], Any], rounds: int = 100) -> dict[str, float]:
    """The median seconds of each run, all taken in turn, so that whatever else the machine does falls on each alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 5):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken[5:]) for name, taken in times.items()}


def plot(path: Path, history: dict[str, Any], title: str) -> None:
    """The loss curves as a PNG; below them, where there are two, how far they are apart."""
    names = [name for name in STYLES if name in history]
    figure = Figure(figsize=(8, 6 if len(names) == 2 else 4.5), dpi=130, layout="constrained")
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False, height_ratios=[3, 1][: len(names)])[:, 0]
    for name in names:
        losses, validation = history[name]["training"], history[name]["validation"]
        axes[0].plot(range(1, len(losses) + 1), losses, label=f"{name}, training", alpha=0.8, **STYLES[name])
        marker = {"marker": "o", "markersize": 9 if name == "torch.optim" else 4.5, "markeredgecolor": "white", "linestyle": ""}
        axes[0].plot(*zip(*validation.items(), strict=True), label=f"{name}, validation", color=STYLES[name]["color"], **marker)
    axes[0].set(ylabel="cross-entropy (nats per byte)", title=title)
    axes[0].legend(frameon=False)
    if len(names) == 2:
        pairs = zip(*(history[name]["training"] for name in names), strict=True)
        axes[1].semilogy(range(1, len(losses) + 1), [abs(a - b) or None for a, b in pairs], ".", color="#777777", markersize=3)
        axes[1].set(ylabel="|difference|\nof training loss")
    axes[-1].set(xlabel="step")
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
