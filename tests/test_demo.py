"""The demo trains as torch.optim does, goes on after a kill bit for bit, and says what is wrong in one line."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS, EVERY = 120, 10

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo() -> Any:
    """The script as a module; what it sets for the whole process is put back."""
    sys.path.insert(0, str(EXAMPLES))
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield __import__("train_gpt")
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    # Threads that wait asleep: on a busy machine those that spin make a run of tiny kernels a hundred times slower.
    return os.environ | {"OMP_WAIT_POLICY": "passive"}


def command(out: Path, *options: str) -> list[str]:
    given = ("--size", "tiny", "--steps", str(STEPS), "--checkpoint-every", str(EVERY), "--out", str(out), *options)
    return [sys.executable, str(EXAMPLES / "train_gpt.py"), *given]


@pytest.fixture(scope="module")
def finished(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run that nothing interrupts, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "deep" / "er"
    done = subprocess.run(command(out), env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return out, done


def read(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_identical(a: Any, b: Any, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_identical(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{path}.{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def test_it_trains_as_torch_does_and_says_so(finished):
    out, done = finished
    run = read(out)["run"]
    ours, theirs = (run["history"][side] for side in ("optfn", "torch.optim"))
    assert len(ours["training"]) == len(theirs["training"]) == run["step"] == STEPS
    assert ours["validation"][0] == pytest.approx(np.log(256), abs=0.2)
    assert ours["validation"][STEPS] < ours["validation"][0] - 1.5
    assert ours["validation"].keys() == theirs["validation"].keys()
    assert np.abs(np.subtract(ours["training"], theirs["training"])).max() < 1e-4
    last = [side["validation"][STEPS] for side in (ours, theirs)]
    printed = [
        rf"validation loss after {STEPS} steps.*: optfn {last[0]:.4f}, torch\.optim {last[1]:.4f}\n",
        rf"largest difference of a parameter after 20 steps: {run['difference']:.1e}",
        r"optfn\.compile +\d+\.\d+ ms\n",
        r"torch\.optim\.AdamW +\d+\.\d+ ms +optfn / torch = \d+\.\d\d\n",
        r"torch\.optim\.AdamW\(fused=True\) +\d+\.\d+ ms +optfn / torch = \d+\.\d\d\n",
    ]
    for pattern in printed:
        assert re.search(pattern, done.stdout), done.stdout
    assert re.search(rf"{STEPS}/{STEPS} .*loss \d\.\d+, lr \d\.\de-\d\d, [\d,]+ tokens/s", done.stderr), done.stderr[-300:]


def test_the_picture_shows_both_curves(finished):
    picture = matplotlib.image.imread(finished[0] / "loss.png")[..., :3]
    assert min(picture.shape[:2]) >= 600
    for colour in ((0xF2, 0xA6, 0x5A), (0x1F, 0x4E, 0x79)):
        assert (np.abs(picture - np.array(colour) / 255).max(-1) < 0.02).sum() > 50


def test_difference_in_float64(demo, tmp_path, capsys):
    """In float64 what is left of the difference is rounding: the recipe is the same."""
    options = ["--size", "tiny", "--steps", "20", "--dtype", "float64", "--backend", "eager", "--out", str(tmp_path)]
    assert demo.main(options) == 0
    run = read(tmp_path)["run"]
    assert run["params"]["token.weight"].dtype == torch.float64
    assert run["difference"] < 1e-10
    assert "largest difference of a parameter after 20 steps" in capsys.readouterr().out


def test_killed_run_goes_on_bit_for_bit(finished, environment, tmp_path):
    process = subprocess.Popen(command(tmp_path), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert EVERY <= read(tmp_path)["run"]["step"] < STEPS
    done = subprocess.run(command(tmp_path, "--resume"), env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert_identical(read(tmp_path), read(finished[0]))


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_kill_while_a_checkpoint_is_written(demo, tmp_path, moment):
    file = tmp_path / "checkpoint.pt"
    demo.checkpoint.save(file, {}, {"x": torch.ones(3)})
    program = f"""
import os, signal, torch
from pathlib import Path
from gpt import checkpoint
os.{moment} = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save(Path({str(file)!r}), {{}}, {{"x": torch.zeros(3)}})
"""
    died = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(EXAMPLES)}, timeout=100)
    assert died.returncode == -signal.SIGKILL
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["checkpoint.pt", "checkpoint.pt.partial"]
    assert demo.checkpoint.load(file)[1]["x"].tolist() == [1, 1, 1]
    demo.checkpoint.save(file, {}, {"x": torch.full((3,), 2.0)})
    assert demo.checkpoint.load(file)[1]["x"].tolist() == [2, 2, 2]
    assert list(tmp_path.iterdir()) == [file]


def test_full_disk_leaves_the_old_checkpoint(demo, tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.pt"
    demo.checkpoint.save(file, {}, {"x": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        demo.checkpoint.save(file, {}, {"x": 2})
    assert demo.checkpoint.load(file)[1]["x"] == 1
    assert list(tmp_path.iterdir()) == [file]


def test_a_flipped_byte_is_found_or_harmless(demo, finished, tmp_path):
    """Wherever it is: what loads at all is what was saved. (The archive's padding and dates mean nothing.)"""
    whole = (finished[0] / "checkpoint.pt").read_bytes()
    content, file, found = read(finished[0]), tmp_path / "checkpoint.pt", 0
    places = np.random.default_rng(0).integers(len(whole), size=60).tolist()
    for place in [*places, *range(0, 120, 7), *range(len(whole) - 120, len(whole), 7)]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        try:
            settings, run = demo.checkpoint.load(file)
        except demo.checkpoint.CheckpointError:
            found += 1
        else:
            assert_identical({"settings": settings, "run": run}, content)
    assert found > 40


def other_content(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def fails(demo: ModuleType, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line that the command prints when it fails with exit code 2."""
    try:
        code = demo.main(["--size", "tiny", "--steps", str(STEPS), *options])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert code == 2
    assert re.fullmatch(r"train_gpt\.py: error: [^\n]+\n", printed.err), printed.err
    return printed.err


@pytest.mark.parametrize(
    "damage",
    {
        "truncated": lambda whole: whole[: len(whole) // 2],
        "without its end": lambda whole: whole[:-1],
        "empty": lambda whole: b"",
        "text": lambda whole: b"what is this",
        "zeros in the middle": lambda whole: whole[:400_000] + bytes(64) + whole[400_064:],
        "another program's": lambda whole: other_content({"weight": torch.ones(2)}),
        "no dict": lambda whole: other_content(torch.ones(2)),
        "without the run": lambda whole: other_content({"settings": torch.load(io.BytesIO(whole), weights_only=True)["settings"]}),
    }.items(),
    ids=lambda item: item[0],
)
def test_damaged_checkpoint(demo, finished, tmp_path, capsys, damage):
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(damage[1]((finished[0] / "checkpoint.pt").read_bytes()))
    before = file.read_bytes()
    said = fails(demo, capsys, "--out", str(tmp_path), "--resume")
    assert str(file) in said
    assert "damaged" in said
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "0"], "--steps: must be an integer of at least 1"),
        (["--steps", "many"], "'many'"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**31)], "--seed"),
        (["--checkpoint-every", "0"], "--checkpoint-every"),
        (["--size", "huge"], "'huge'"),
        (["--dtype", "int8"], "'int8'"),
        (["--backend", "gcc"], "'gcc'"),
        (["--sizes", "tiny", "extra"], "extra"),
        (["--device", "cuda"], "no CUDA device"),
    ],
    ids=" ".join,
)
def test_bad_arguments(demo, tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said in fails(demo, capsys, "--out", str(tmp_path / "new"), *options)
    assert not (tmp_path / "new").exists()


def test_no_compiler(demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler no-such-compiler" in fails(demo, capsys, "--out", str(tmp_path / "new"))


def test_folder_that_cannot_be_written(demo, tmp_path, capsys):
    """A file where the folder, or one above it, should be; a file system that takes no files (root may write anywhere else)."""
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below", Path("/proc/gpt"), Path("/proc/self")):
        assert str(out) in fails(demo, capsys, "--out", str(out))
    assert file.read_text() == "mine"


def test_resume_without_a_checkpoint(demo, tmp_path, capsys):
    assert "start without --resume" in fails(demo, capsys, "--out", str(tmp_path), "--resume")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [("--steps", "300"), ("--seed", "1"), ("--no-compare",), ("--dtype", "float64")], ids=" ".join)
def test_resume_with_other_settings(demo, finished, capsys, options):
    before = (finished[0] / "checkpoint.pt").read_bytes()
    said = fails(demo, capsys, "--out", str(finished[0]), "--resume", *options)
    assert options[0].removeprefix("--").removeprefix("no-") in said
    assert (finished[0] / "checkpoint.pt").read_bytes() == before


def test_exit_code_of_the_command(tmp_path):
    done = subprocess.run(command(tmp_path, "--resume"), capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_a_new_run_keeps_the_earlier_checkpoint(demo, tmp_path):
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(b"dear")
    demo.open_folder(file, {}, resume=False)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("checkpoint.previous.pt", b"dear")]


def test_text_is_split_by_file_and_batches_are_functions_of_the_step(demo):
    train, validation, digest = demo.data.standard_library()
    assert demo.data.standard_library()[2] == digest
    assert 0.02 < len(validation) / len(train) < 0.5
    x, y = demo.data.random_batch(train, 1, 5, size=4, context=16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    whole, first = bytes(train.tolist()), bytes([*x[0].tolist(), y[0, -1].item()])
    assert first in whole
    again, other_step, other_seed = (demo.data.random_batch(train, seed, step, 4, 16)[0] for seed, step in ((1, 5), (1, 6), (2, 5)))
    assert torch.equal(x, again)
    assert not torch.equal(x, other_step)
    assert not torch.equal(x, other_seed)
    batches = demo.data.even_batches(validation, 3, 4, 16)
    assert [tuple(x.shape) for x, _ in batches] == [(4, 16)] * 3
    assert torch.equal(batches[0][0][0], validation[:16].long())
    assert torch.equal(batches[-1][1][-1], validation[-16:].long())


def test_the_network_sees_no_later_byte(demo):
    model = demo.GPT(demo.SIZES["tiny"], seed=0)
    x = torch.arange(20)[None]
    changed = x.clone()
    changed[0, 12:] = 99
    a, b = model(x)[0], model(changed)[0]
    torch.testing.assert_close(a[:12], b[:12])
    assert (a[12:] - b[12:]).abs().amax(1).min() > 1e-3
