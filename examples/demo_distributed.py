"""The same training three times: on one process, on four, and on four that are killed and go on as two.

    python examples/demo_distributed.py

Each is ``train_gpt_fsdp.py`` under torchrun on this machine, over the loopback address. All see the same batches, so the losses are
those of one process up to rounding.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("train_gpt_fsdp.py")


def start(processes: int, out: Path, args: argparse.Namespace, *more: str) -> subprocess.Popen[bytes]:
    """Start a training in a process group of its own, so that all of it can be killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(SCRIPT)]
    settings = [
        "--out",
        str(out),
        "--steps",
        str(args.steps),
        "--size",
        args.size,
        "--dtype",
        args.dtype,
        "--backend",
        args.backend,
    ]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, f"--out={out}", *settings, *more], env=environment, start_new_session=True)


def finish(training: subprocess.Popen[bytes]) -> None:
    """Wait for a training; an error if it fails."""
    if code := training.wait():
        sys.exit(f"the training ended with exit code {code}")


def losses(out: Path) -> dict[int, dict[str, Any]]:
    """What was written of each step, the last time that it was made."""
    file = out / "losses.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["step"]: line for line in found}


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/distributed"), help="folder for the checkpoints and the losses")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--size", choices=("small", "tiny"), default="small")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--backend", default="optfn", help="of optfn.compile")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    one, four, killed = args.out / "one", args.out / "four", args.out / "killed"

    print("one process", flush=True)
    finish(start(1, one, args))
    print("four processes", flush=True)
    finish(start(4, four, args))

    # A checkpoint is written every tenth step; the kill comes some steps later.
    print("four processes, which are killed after step", args.steps // 2 + 3, flush=True)
    training = start(4, killed, args)
    while max(losses(killed), default=0) < args.steps // 2 + 3:
        if training.poll() is not None:
            sys.exit(f"the training ended early, with exit code {training.returncode}")
        time.sleep(0.05)
    os.killpg(training.pid, signal.SIGKILL)
    training.wait()
    print("two processes, which go on from the checkpoint", flush=True)
    finish(start(2, killed, args, "--resume"))

    runs = {"one process": losses(one), "four processes": losses(four), "four, killed, then two": losses(killed)}
    shown = sorted({1, *range(args.steps // 4, args.steps, max(args.steps // 4, 1)), args.steps})
    print(f"\n{'training loss after step':26}" + "".join(f"{step:>10}" for step in shown))
    for name, of in runs.items():
        print(f"{name:26}" + "".join(f"{of[step]['loss']:10.5f}" for step in shown))
    apart = max(abs(of[step]["loss"] - runs["one process"][step]["loss"]) for of in runs.values() for step in of)
    resumed = [step for step, line in losses(killed).items() if line["processes"] == 2]
    if not resumed:
        sys.exit("the training was over before it was killed: give it more steps")
    print(f"resumed at step {min(resumed)}; largest difference of a loss from that of one process: {apart:.1e}")
    bound = 1e-9 if args.dtype == "float64" else 5e-3
    if apart > bound:
        print(f"that is more than {bound:.0e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
