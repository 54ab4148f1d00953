"""The benchmarks' parts: contenders take the same step or are found out, meters measure, and the report says what was found."""

import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = ("against_optax", "contenders", "gpu", "measure", "report", "run", "workloads")
SHAPES = [(6, 3), (6,), (3, 3)]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The modules by their names."""
    path = sys.path.copy()
    sys.path.insert(0, str(BENCHMARKS))
    yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    sys.path[:] = path


def workload_of(bench: Any, contenders: tuple[str, ...], recipe: str = "adamw") -> Any:
    options = {"adamw": {}, "clip": {"clip": True}, "long": {"clip": True, "long": True}, "sgd": {"rule": "sgd"}}[recipe]
    return bench.workloads.tree("A tiny tree", SHAPES, contenders, (), **options)


EAGER_CONTENDERS = {  # by the recipes that they know
    "torch for-loop": ("adamw", "clip", "long", "sgd"),
    "torch foreach": ("adamw", "clip", "long", "sgd"),
    "optfn eager": ("adamw", "clip", "long", "sgd"),
    "TorchOpt in place": ("adamw", "clip", "long"),
    "TorchOpt out of place": ("adamw", "clip", "long"),
    "Optax, jit, donated": ("adamw", "clip", "long"),
    "Optax, jit": ("adamw", "clip", "long"),
}


@pytest.mark.parametrize(
    ("name", "recipe"), [(name, recipe) for name, recipes in EAGER_CONTENDERS.items() for recipe in recipes], ids=str
)
def test_contenders_take_the_step_of_torch_fused(bench: Any, name: str, recipe: str) -> None:
    if "TorchOpt" in name:
        pytest.importorskip("torchopt")
    workload = workload_of(bench, (), recipe)
    expected = bench.measure.check(workload.make("torch fused", "cpu"), workload, "cpu", None)
    start = bench.workloads.parameters(SHAPES, "cpu")
    assert len(expected) == len(start) * (2 if recipe == "long" else 1)
    assert min((expected[key] - p).abs().min() for key, p in start.items()) > 10 * workload.tolerance
    bench.measure.check(workload.make(name, "cpu"), workload, "cpu", expected)


def always(path: str, p: Any) -> bool:
    return True


@pytest.mark.parametrize(
    ("recipe", "name", "value"),
    [
        *(("adamw", "RATE", 1.01e-3), ("adamw", "DECAY", 0.09), ("adamw", "BETAS", (0.9, 0.99)), ("sgd", "MOMENTUM", 0.89)),
        *(("long", "AVERAGE", 0.98), ("long", "WARMUP", 5), ("long", "is_matrix", always)),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_another_step_is_found_out(bench: Any, monkeypatch: pytest.MonkeyPatch, recipe: str, name: str, value: Any) -> None:
    workload = workload_of(bench, (), recipe)
    expected = bench.measure.check(workload.make("torch fused", "cpu"), workload, "cpu", None)
    monkeypatch.setattr(bench.contenders, name, value)
    with pytest.raises(ValueError, match="not the same numbers"):
        bench.measure.check(workload.make("optfn eager", "cpu"), workload, "cpu", expected)


def test_a_step_with_less_in_it_is_found_out(bench: Any) -> None:
    plain, clipped, long = (workload_of(bench, (), recipe) for recipe in ("adamw", "clip", "long"))
    expected = bench.measure.check(clipped.make("torch fused", "cpu"), clipped, "cpu", None)
    with pytest.raises(ValueError, match="not the same numbers"):
        bench.measure.check(plain.make("optfn eager", "cpu"), clipped, "cpu", expected)
    expected = bench.measure.check(long.make("torch fused", "cpu"), long, "cpu", None)
    with pytest.raises(ValueError, match="not the same values"):
        bench.measure.check(clipped.make("optfn eager", "cpu"), long, "cpu", expected)


def test_sparse_contenders_agree(bench: Any) -> None:
    workload = bench.workloads.embedding(50, 3, 7)
    before = bench.workloads.parameters([(50, 3)], "cpu")["0000"]
    expected = bench.measure.check(workload.make("torch.optim.SparseAdam", "cpu"), workload, "cpu", None)
    assert (expected["0000"] != before).any(1).sum() == 7
    bench.measure.check(workload.make("optfn eager", "cpu"), workload, "cpu", expected)


def test_sizes(bench: Any) -> None:
    """GPT-2's are those of its authors' code."""
    count = {name: (w.leaves, w.parameters) for name, w in (bench.workloads.on_cpu() | bench.workloads.on_gpu()).items()}
    assert count["gpt2-adamw"] == (148, 124_439_808)
    assert count["gpt2-xl-adamw"] == (580, 1_557_611_200)
    assert count["adamw-148"] == (148, 11_640_320)
    assert count["clip-580"][0] == 580
    moved = {
        name: bench.workloads.on_cpu()[name].moved / (4 * count[name][1])
        for name in ("adamw-148", "clip-148", "long-148", "sgd-148")
    }
    assert list(moved.values()) == [7, 8, 10, 5]


def test_times(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender that is wrong, that fails, or that is not there is named, and the others are timed."""
    turns: list[str] = []

    def other(name: str) -> Callable[..., Any]:
        def make(*args: Any) -> Any:
            if name == "absent":
                raise bench.contenders.UnavailableError("it is not installed")
            contender = bench.contenders.CONTENDERS["optfn eager"](*args)
            step = contender.step
            contender.step = {
                "wrong": lambda: (step(), step()),
                "fails": lambda: 1 / 0,
                "good": lambda: (turns.append("x"), step()),
            }[name]
            return contender

        return make

    for name in ("absent", "wrong", "fails", "good"):
        monkeypatch.setitem(bench.contenders.CONTENDERS, name, other(name))
    monkeypatch.setattr(bench.measure, "UNIT", 1e-5)
    workload = workload_of(bench, ("absent", "wrong", "good", "fails", "torch fused"))
    found = bench.measure.times(workload, "cpu", seconds=0.0, megabytes=1)
    rows = found["rows"]
    assert rows["absent"] == {"note": "it is not installed"}
    assert rows["wrong"]["failed"].startswith("ValueError: not the same numbers")
    assert rows["fails"] == {"failed": "ZeroDivisionError: division by zero"}
    assert rows["torch fused"]["ratio"] == 1.0
    assert rows["good"]["ratio"] == rows["good"]["seconds"] / rows["torch fused"]["seconds"]
    assert rows["good"]["bandwidth"] == pytest.approx(workload.moved / rows["good"]["seconds"] / found["copy_bytes_per_second"])
    assert found["rounds"] == 7
    assert len(turns) >= len(bench.workloads.FACTORS) + 7
    assert bench.report.complain({"workloads": {"w": {"title": "", "rows": rows}}}, ["w"]) == 1


def test_turns_rotate(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(bench.measure, "UNIT", 1e-12)
    taken = bench.measure.in_turn({name: functools.partial(order.append, name) for name in "abc"}, "cpu", 0.0)
    assert "".join(order[9:18]) == "abcbcacab"
    assert {len(times) for times in taken.values()} == {7}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory() -> None:
    """In a process of its own: the allocator is set for good."""
    program = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import measure, torch

class Contender:
    def __init__(self, megabytes):
        self.megabytes = megabytes
    def step(self):
        for _ in range(3):
            torch.ones(self.megabytes * 2**18)

print([measure.peak(Contender(megabytes), "cpu") / 2**20 for megabytes in (40, 1, 0)])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for measured, megabytes in zip(json.loads(done.stdout), (40, 1, 0), strict=True):
        assert megabytes - 0.5 <= measured <= megabytes + 2


def test_probe_in_a_process_of_its_own(bench: Any, tmp_path: Path) -> None:
    which = {"suite": "gpu", "small": True, "workload": "gpt2-adamw", "device": "cpu"}
    assert bench.measure.child("probe", which | {"name": "torch fused"}, 100, tmp_path).keys() == {"peak"}
    assert bench.measure.child("probe", which | {"name": "nobody"}, 100) == {"failed": "KeyError: 'nobody'"}


def test_a_process_that_fails_or_takes_too_long(bench: Any) -> None:
    child = functools.partial(bench.measure.child, "", {})
    said = child(100, command=[sys.executable, "-c", "print('some'); raise SystemExit(3)"])
    assert said == {"output": "some\n", "code": 3, "failed": "exit code 3: some"}
    assert child(0) == {"failed": "no time was left"}
    begin = time.monotonic()
    assert child(2, command=["sh", "-c", "sleep 100 & sleep 100"]) == {"failed": "took longer than 2 s"}
    assert time.monotonic() - begin < 90


def made_up(seconds: float) -> dict[str, Any]:
    """Results as a run leaves them, in which the donated step takes so long."""
    rows = {
        "torch fused": {"seconds": 0.01, "ratio": 1.0, "bandwidth": 1.1, "cold": {"peak": 65536}},
        "optfn.compile, donated": {
            "seconds": seconds,
            "ratio": seconds / 0.01,
            "bandwidth": 0.011 / seconds,
            "cold": {"floor": 7.0, "over": 5.25, "peak": 2_000_000},
            "warm": {"failed": "took longer than 900 s"},
        },
        "HeavyBall": {"note": "heavyball is not installed"},
    }
    found = {"title": "AdamW, 148 leaves", "about": "AdamW", "leaves": 148, "parameters": 11_640_320, "largest": 8_000_000}
    found |= {"reference": "torch fused", "date": "2020-01-01", "commit": "0123456789", "rows": rows}
    found |= {"rounds": 60, "copy_bytes_per_second": 3e10}
    here = {"cpu": "A processor", "threads": 2, "versions": {"torch": "2.13.0"}}
    return {"small": False, "machine": here, "workloads": {"adamw-148": found}}


def test_report(bench: Any, tmp_path: Path) -> None:
    results = made_up(0.0102)
    page = bench.report.write(results, tmp_path / "deep", "cpu-2-cores").read_text()
    lines = page.splitlines()
    assert "| AdamW, 148 leaves: step ÷ torch fused | 1.02 | ≤ 1.03 | reached |" in lines
    assert "| AdamW, 148 leaves: cold compile, beyond the floor | 5.25 s | ≤ 4.00 s | **not reached** |" in lines
    assert "| AdamW, 148 leaves: warm compile, beyond the floor | - | ≤ 2.00 s | not measured |" in lines
    assert "| AdamW, 148 leaves: peak memory beyond the live trees ÷ largest leaf | 0.25 | ≤ 1.00 | reached |" in lines
    assert "| optfn.compile, donated | 10.20 | 1.02 | 1.08 | 7.0 + 5.2 | fails | 2.0 |" in lines
    assert "- HeavyBall: heavyball is not installed" in lines
    assert "- optfn.compile, donated: took longer than 900 s" in lines
    assert "A processor, 2 threads. torch 2.13.0." in lines
    assert "148 leaves, 11,640,320 parameters, the largest leaf 8.0 MB. 60 rounds; a copy moved 30.0 GB/s." in page
    assert "2020-01-01, commit 0123456789" in page
    assert json.loads((tmp_path / "deep" / "cpu-2-cores.json").read_text()) == results
    assert "| AdamW, 148 leaves: step ÷ torch fused | 1.04 | ≤ 1.03 | **not reached** |" in bench.report.markdown(made_up(0.0104))


def test_picture(bench: Any, tmp_path: Path) -> None:
    bench.report.plot(made_up(0.0102), tmp_path / "one.svg")
    bench.report.plot(made_up(0.0102), tmp_path / "two.svg")
    drawn = (tmp_path / "one.svg").read_text()
    assert all(words in drawn for words in ("torch fused", "optfn.compile, donated", "not measured yet"))
    assert "HeavyBall" not in drawn
    assert drawn == (tmp_path / "two.svg").read_text()


def test_a_part_is_measured_again(bench: Any, tmp_path: Path) -> None:
    results = bench.report.begin(tmp_path, "here", "cpu", small=True, again=True)
    for name in ("b", "a"):
        bench.report.add(results, name, made_up(0.01)["workloads"]["adamw-148"], ["a", "b"])
    assert list(results["workloads"]) == ["a", "b"]
    bench.report.write(results, tmp_path, "here")
    assert bench.report.begin(tmp_path, "here", "cpu", small=True, again=True) == results
    assert bench.report.begin(tmp_path, "here", "cpu", small=True, again=False)["workloads"] == {}
    with pytest.raises(ValueError, match="from another machine, or from other versions"):
        bench.report.begin(tmp_path, "here", "cpu", small=False, again=True)


def test_command(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # In the processes that it starts torch.compile does nothing, or says that it cannot.
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    code = bench.run.main(["--small", "--only", "adamw-20", "--out", str(tmp_path), "--seconds", "0"])
    found = json.loads(next(tmp_path.glob("cpu-*-cores.json")).read_text())["workloads"]
    assert list(found) == ["adamw-20"]
    rows = found["adamw-20"]["rows"]
    assert rows.keys() == set(bench.workloads.FEW)
    assert all(row["seconds"] > 0 for name, row in rows.items() if "compile" not in name)
    assert code == any("failed" in row for row in rows.values())
    assert (tmp_path / "benchmarks.svg").exists()
    assert "## AdamW, 20 small leaves" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["run", "gpu"])
def test_bad_arguments(bench: Any, script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    main = getattr(bench, script).main
    for options, code, said in ((["--help"], 0, "--small"), (["--only", "all"], 2, "is called all; there are")):
        with pytest.raises(SystemExit) as end:
            main(["--device", "cpu", *options] if script == "gpu" and code else options)
        printed = capsys.readouterr()
        assert end.value.code == code
        assert said in printed.out + printed.err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.gpu.main([])
    assert "no CUDA device" in capsys.readouterr().err


def test_gpu_script_without_a_gpu(bench: Any, tmp_path: Path) -> None:
    """With no time left it says so of each part, and ends."""
    assert bench.gpu.main(["--device", "cpu", "--small", "--budget", "0", "--out", str(tmp_path)]) == 1
    page = (tmp_path / "gpu-parts-on-cpu.md").read_text()
    assert page.count("**The steps were not timed: no time was left**") == len(bench.workloads.on_gpu(small=True))
    assert "```text\nno time was left\n```" in page


@pytest.fixture
def against(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The comparison with Optax on a tiny model, which is compiled once, in two steps, written elsewhere."""
    module = bench.against_optax
    tiny = {"SIZE": module.Size(1, 2, 8, 8, 2), "STEPS": 2, "PAGE": tmp_path / "page.md", "RESULTS": tmp_path / "results.json"}
    for name, value in tiny.items():
        monkeypatch.setattr(module, name, value)
    with module.the_same_numbers():
        problem = module.Problem()
    monkeypatch.setattr(module, "Problem", lambda dtype: problem)
    return module


def test_a_training_against_optax(against: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wide = against.jax.config.jax_enable_x64
    assert against.main(["--only", "adam", "sgd"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 2 aliases are within 1 % of Optax's loss"
    first = json.loads(against.RESULTS.read_text())["rows"]
    assert against.PAGE.read_text().count("| 1.0000 |") == 2
    for row in first.values():
        assert row["ours"] == pytest.approx(row["theirs"], rel=1e-9)
        assert abs(row["ours"] - row["start"]) > 1e-4
    # Another learning rate is found out; the row of before stays.
    monkeypatch.setitem(against.ALIASES, "sgd", against.Pair("sgd(10.0)", "sgd(0.1)"))
    assert against.main(["--only", "sgd"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 of 1 aliases are within 1 % of Optax's loss; not sgd"
    assert json.loads(against.RESULTS.read_text())["rows"]["adam"] == first["adam"]
    assert against.PAGE.read_text().count("**not reached**") == 1
    # So is another model.
    of_torch = against.cross_entropy
    monkeypatch.setattr(against, "cross_entropy", lambda logits, targets: 1.01 * of_torch(logits, targets))
    with pytest.raises(ValueError, match=r"differs by 1\.0e-02 between JAX and torch: that is another model"):
        against.main(["--only", "sgd"])
    assert against.jax.config.jax_enable_x64 == wide


@pytest.mark.parametrize(
    ("ours", "others", "good"),
    [(2.0, False, True), (2.1, False, False), (1.9, False, False), (1.9, True, True), (2.1, True, False)],
)
def test_what_is_within_the_bar(bench: Any, ours: float, others: bool, good: bool) -> None:
    assert bench.against_optax.reached({"ours": ours, "theirs": 2.0, "others": others}) is good
    assert not bench.against_optax.reached({"ours": float("nan"), "theirs": ours, "others": others})


def test_every_alias_of_optax_is_trained(bench: Any) -> None:
    """Those that the page for people who come from Optax calls aliases, under the names that they have here."""
    page = (BENCHMARKS.parent / "docs/from-optax.md").read_text()
    table = page.split("\n## Aliases")[1].split("\n### ")[0]
    named = {
        name.removeprefix("contrib.")
        for row in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
        for name in re.findall(r"`([\w.]+)`", row)
    }
    aliases = {name for name in named if name[0].islower()} - {"optimistic_adam"}
    assert len(aliases) > 40
    assert aliases <= {name.split(",")[0] for name in bench.against_optax.ALIASES}
