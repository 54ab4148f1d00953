"""What was measured, as JSON, Markdown and a picture; and whether it reaches the project's goals."""

import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import DEFAULT, DONATED, EAGER, FUSED, TORCHOPT
from workloads import SPARSE_ADAM

import optfn

Results = dict[str, Any]
LIBRARIES = ("optree", "triton", "jax", "optax", "torchopt", "heavyball")
ROOT = Path(__file__).parents[1]


class Bar(NamedTuple):
    """A goal: a number of the results, and the most (or the least) that it may be."""

    what: str
    workload: str
    value: Callable[[dict[str, Any]], float]
    limit: float
    unit: str = ""
    at_least: bool = False

    def verdict(self, results: Results) -> tuple[float | None, str]:
        """The number, and what it says of the goal."""
        try:
            value = self.value(results["workloads"][self.workload])
        except (KeyError, TypeError):  # not measured, or a failure's text in its place
            return None, "not measured"
        return value, "reached" if (value >= self.limit if self.at_least else value <= self.limit) else "**not reached**"


def ratio(name: str, to: str) -> Callable[[dict[str, Any]], float]:
    """Step of one contender over that of another."""
    return lambda found: found["rows"][name]["seconds"] / found["rows"][to]["seconds"]


def over(which: str) -> Callable[[dict[str, Any]], float]:
    """Compile seconds of the donated step, beyond the floor."""
    return lambda found: found["rows"][DONATED][which]["over"]


def leaves_held(found: dict[str, Any]) -> float:
    """What a donated step holds at most beyond the trees that live on, in sizes of the largest leaf."""
    return found["rows"][DONATED]["cold"]["peak"] / found["largest"]


BARS = (
    Bar("AdamW, 148 leaves: step ÷ torch fused", "adamw-148", ratio(DONATED, FUSED), 1.03),
    Bar("Clipping and AdamW, 148 leaves: step ÷ `clip_grad_norm_` and torch fused", "clip-148", ratio(DONATED, FUSED), 0.82),
    Bar("Clipping and AdamW, 580 leaves: step ÷ `clip_grad_norm_` and torch fused", "clip-580", ratio(DONATED, FUSED), 0.82),
    Bar("Long chain: step ÷ `clip_grad_norm_`, torch fused, scheduler, foreach average", "long-148", ratio(DONATED, FUSED), 0.75),
    Bar("AdamW, 92 M parameters: step ÷ torch fused", "adamw-92m", ratio(DONATED, FUSED), 1.0),
    Bar("AdamW, 20 small leaves: step ÷ torch fused", "adamw-20", ratio(DONATED, FUSED), 1.5),
    Bar("AdamW, 148 leaves: cold compile, beyond the floor", "adamw-148", over("cold"), 4.0, " s"),
    Bar("Clipping and AdamW, 580 leaves: cold compile, beyond the floor", "clip-580", over("cold"), 8.0, " s"),
    Bar("AdamW, 148 leaves: warm compile, beyond the floor", "adamw-148", over("warm"), 2.0, " s"),
    Bar("Clipping and AdamW, 580 leaves: warm compile, beyond the floor", "clip-580", over("warm"), 2.0, " s"),
    Bar("AdamW, 148 leaves: peak memory beyond the live trees ÷ largest leaf", "adamw-148", leaves_held, 1.0),
    Bar("AdamW, 92 M parameters: peak memory beyond the live trees ÷ largest leaf", "adamw-92m", leaves_held, 1.0),
    Bar("AdamW, 148 leaves: optfn eager ÷ TorchOpt out of place", "adamw-148", ratio(EAGER, TORCHOPT), 0.8),
    Bar("Muon, 60 matrices of 60 shapes: step ÷ torch's default", "muon-60", ratio(DONATED, DEFAULT), 1.0),
    Bar("Muon, 60 matrices of 60 shapes: cold compile, beyond the floor", "muon-60", over("cold"), 15.0, " s"),
    Bar("Adafactor, ResNet-50: step ÷ torch's default", "adafactor-161", ratio(DONATED, DEFAULT), 1.0),
    Bar("Adafactor, ResNet-50: cold compile, beyond the floor", "adafactor-161", over("cold"), 15.0, " s"),
    Bar("Sparse: donated step ÷ torch.optim.SparseAdam", "sparse", ratio(DONATED, SPARSE_ADAM), 1.1),
    *(
        bar
        for title, name in (("GPT-2 small", "gpt2-adamw"), ("GPT-2 XL", "gpt2-xl-adamw"))
        for bar in (
            Bar(f"AdamW, {title}: step ÷ torch fused", name, ratio(DONATED, FUSED), 1.0),
            Bar(f"AdamW, {title}: bandwidth ÷ that of a copy", name, lambda f: f["rows"][DONATED]["bandwidth"], 0.9, at_least=True),
        )
    ),
)


def machine(device: str) -> dict[str, Any]:
    """What it ran on, and with which versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {"python": platform.python_version(), "torch": torch.__version__, "optfn": optfn.__version__}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return gpu | {"cpu": model, "threads": torch.get_num_threads(), "versions": versions}


def file_name(device: str) -> str:
    """``h200`` or ``cpu-2-cores``."""
    if device == "cuda":
        return torch.cuda.get_device_name().removeprefix("NVIDIA ").lower().replace(" ", "-")
    return f"cpu-{torch.get_num_threads()}-cores"


def commit() -> str:
    """Of the checkout, and whether the library differs from it."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + (" and changes" if git("status", "--porcelain", "optfn") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def begin(folder: Path, name: str, device: str, *, small: bool, again: bool) -> Results:
    """New results, or with ``again`` those that there are, to be measured again in part.

    Raises:
        ValueError: they are from another machine, or from other versions.
    """
    results = {"small": small, "machine": machine(device), "workloads": {}}
    file = folder / f"{name}.json"
    if again and file.exists():
        earlier = json.loads(file.read_text())
        if any(earlier[key] != results[key] for key in ("small", "machine")):
            raise ValueError(f"{file} is from another machine, or from other versions: measure all again, or name another --out")
        return earlier
    return results


def add(results: Results, name: str, found: dict[str, Any], order: list[str]) -> None:
    """Put in what was found of a workload, in the order of them all."""
    workloads = results["workloads"] | {name: found}
    results["workloads"] = {key: workloads[key] for key in order if key in workloads}


def complain(results: Results, chosen: Iterable[str]) -> int:
    """Print what failed; the exit code."""
    said = []
    for workload in (results["workloads"][name] for name in chosen if name in results["workloads"]):
        said += [f"{workload['title']}: {workload['failed']}"] if "failed" in workload else []
        said += [f"{workload['title']}, {name}: {why}" for name, row in workload["rows"].items() for why in failed(row)]
    for line in said:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if said else 0


def number(value: float | None, form: str, unit: str = "") -> str:
    """A cell of a table; a dash where there is nothing."""
    return "-" if value is None else format(value, form) + unit


def compile_cell(found: dict[str, Any]) -> str:
    """Floor and what is beyond it."""
    if "failed" in found:
        return "fails"
    return f"{found['floor']:.1f} + {found['over']:.1f}" if "over" in found else "-"


def failed(row: dict[str, Any]) -> list[str]:
    """What failed of what was measured of a contender, each reason once."""
    return list(dict.fromkeys(part["failed"] for part in (row, row.get("cold", {}), row.get("warm", {})) if "failed" in part))


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown; the first column is text, the others are numbers."""
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] + ["--:"] * (len(heads) - 1), *rows)]


def workload_table(found: dict[str, Any]) -> list[str]:
    """Everything about one workload."""
    size = f"{found['leaves']} leaves, {found['parameters']:,} parameters, the largest leaf {found['largest'] / 1e6:.1f} MB"
    text = [f"## {found['title']}", "", f"{found['about'][0].upper()}{found['about'][1:]}: {size}."]
    if "copy_bytes_per_second" in found:
        copied = found["copy_bytes_per_second"] / 1e9
        text[-1] += f" {found['rounds']} rounds; a copy moved {copied:,.1f} GB/s. {found['date']}, commit {found['commit']}."
    if "failed" in found:
        text += ["", f"**The steps were not timed: {found['failed']}**"]
    heads = ["", "step, ms", f"÷ {found['reference']}", "bandwidth ÷ copy", "cold compile, s", "warm compile, s", "peak memory, MB"]
    on_gpu = any("launches" in row.get("cold", {}) for row in found["rows"].values())
    heads += ["kernels", "waits for the device", "CUDA graph, ms"] if on_gpu else []
    rows, notes = [], []
    fastest = sorted(found["rows"].items(), key=lambda item: item[1].get("seconds", float("inf")))
    for name, row in fastest:
        cold, warm = row.get("cold", {}), row.get("warm", {})
        notes += [f"- {name}: {note}" for note in dict.fromkeys((row.get("note"), *failed(row))) if note]
        peak, seconds = cold.get("peak"), row.get("seconds")
        cells = [
            name,
            number(seconds and 1e3 * seconds, ".3f" if seconds and seconds < 1e-2 else ".2f"),
            number(row.get("ratio"), ".2f"),
            number(row.get("bandwidth"), ".2f"),
            compile_cell(cold),
            compile_cell(warm),
            number(None if peak is None else peak / 1e6, ".1f"),
        ]
        if on_gpu:
            graph = cold.get("graph")
            cells += [number(cold.get("launches"), "d"), cold.get("synchronizes", "-")]
            cells.append(graph if isinstance(graph, str) else number(graph and 1e3 * graph, ".3f"))
        rows.append(cells)
    return [*text, "", *table(heads, rows), "", *notes, *([""] if notes else [])]


def markdown(results: Results) -> str:
    """The whole page."""
    here = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    text = [
        "# Benchmarks",
        "",
        *(["**A small run, to see whether everything works: its numbers say nothing.**", ""] if results["small"] else []),
        (f"{here['gpu']}, {here['cpu']}" if "gpu" in here else here["cpu"]) + f", {here['threads']} threads. {versions}.",
        "",
        "How to run and to read this: `docs/benchmarks.md`.",
        "",
    ]
    verdicts = [(bar, *bar.verdict(results)) for bar in BARS if bar.workload in results["workloads"]]
    if verdicts:
        rows = [
            [bar.what, number(value, ".2f", bar.unit), f"{'≥' if bar.at_least else '≤'} {bar.limit:.2f}{bar.unit}", said]
            for bar, value, said in verdicts
        ]
        text += ["## Goals", "", *table(["", "measured", "goal", ""], rows), ""]
    if results.get("tests"):
        text += ["## Tests on the device", "", "```text", *results["tests"], "```", ""]
    for found in results["workloads"].values():
        text += workload_table(found)
    return "\n".join(text)


def write(results: Results, folder: Path, name: str) -> Path:
    """Both files; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    page = folder / f"{name}.md"
    page.write_text(markdown(results))
    return page


def plot(results: Results, path: Path) -> None:
    """Bars: the step of each contender over torch fused, for some workloads; compile seconds of those that compile."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = {name: results["workloads"].get(name, {"rows": {}}) for name in ("adamw-148", "long-148", "clip-580")}
    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for ax, (name, found) in zip(panels, shown.items(), strict=False):
        rows = {who: row["ratio"] for who, row in found["rows"].items() if "ratio" in row}
        rows = dict(sorted(rows.items(), key=lambda item: -item[1]))
        ax.barh(list(rows), list(rows.values()), color=[colour(who) for who in rows])
        ax.axvline(1.0, color="#777777", linewidth=0.8)
        ax.set_title(found.get("title", name), loc="left")
        ax.set_xlabel("step ÷ torch fused")
    ax, rows = panels[3], shown["adamw-148"]["rows"]
    rows = {who: row["cold"] for who, row in rows.items() if "over" in row.get("cold", {})}
    rows = dict(sorted(rows.items(), key=lambda item: -item[1]["over"]))
    ax.barh(list(rows), [row["floor"] for row in rows.values()], color="#dddddd")
    lefts = [row["floor"] for row in rows.values()]
    ax.barh(list(rows), [row["over"] for row in rows.values()], left=lefts, color=[colour(who) for who in rows])
    ax.set_title("AdamW, 148 leaves", loc="left")
    ax.set_xlabel("cold compile, s (grey: the floor)")
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        if not ax.patches:
            ax.text(0.5, 0.5, "not measured yet", transform=ax.transAxes, ha="center", color="#777777")
    with matplotlib.rc_context({"svg.hashsalt": "optfn", "svg.fonttype": "none"}):
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)


def colour(contender: str) -> str:
    """Ours, and the others."""
    return "#1f4e79" if "optfn" in contender else "#f2a65a"
