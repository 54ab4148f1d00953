"""What there is to see on a GPU, in one call that ends within its budget.

    python benchmarks/gpu.py                         tests, and AdamW, clipping and the long chain on GPT-2 small and XL
    python benchmarks/gpu.py --device cpu --small    the same on tiny trees without a GPU, to see whether everything works

Each part runs in a process of its own with a limit on its time, and what it found is written at once.
"""

import argparse
import sys
import time
from pathlib import Path

import report
import torch
from measure import child, in_parts
from workloads import SUITES

NO_TESTS = 5  # pytest's exit code where none is marked


def main(argv: list[str] | None = None) -> int:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny trees and few rounds, to see whether everything works")
    parser.add_argument("--only", nargs="+", metavar="PART", help="some of: tests, " + ", ".join(SUITES["gpu"](small=True)))
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all of it (default: 570)")
    parser.add_argument("--limit", type=float, default=200.0, help="seconds for one process (default: 200)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results, small: runs/benchmarks)")
    parser.add_argument("--commit", help="that of the library, where this is no checkout")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device that torch can use; --device cpu --small shows whether the rest works")
    suite = SUITES["gpu"](small=args.small)
    parts = ["tests", *suite]
    chosen = args.only or parts
    if unknown := set(chosen) - set(parts):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    out = args.out or report.ROOT / ("runs/benchmarks" if args.small else "benchmarks/results")
    name = report.file_name("cuda") if args.device == "cuda" else "gpu-parts-on-cpu"
    try:
        results = report.begin(out, name, args.device, small=args.small, again=bool(args.only))
    except ValueError as error:
        parser.error(str(error))

    def left() -> float:
        return min(args.limit, args.budget - (time.monotonic() - begin))

    def written(what: str) -> Path:
        print(f"{time.monotonic() - begin:5.0f} s  {what}", flush=True)
        return report.write(results, out, name)

    page, wrong = written("begin"), False
    if "tests" in chosen:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--continue-on-collection-errors", str(report.ROOT / "tests")]
        found = child("tests", {}, left(), command=command)
        lines = found.get("output", found.get("failed", "")).strip().splitlines() or ["nothing"]
        results["tests"] = [line for line in lines[:-1] if line.startswith(("FAILED", "ERROR"))][:20] + lines[-1:]
        wrong |= found.get("code") not in (0, NO_TESTS)
        page = written(f"tests: {lines[-1]}")
    for which in (part for part in chosen if part in suite):
        options = {"small": args.small, "seconds": 1.0 if args.small else 8.0, "left": left}
        for what, found in in_parts("gpu", which, suite[which], args.device, **options):
            report.add(results, which, found | ({"commit": args.commit} if args.commit else {}), list(suite))
            page = written(f"{which}: {what}")
    print(page.read_text())
    return max(report.complain(results, chosen), int(wrong))


if __name__ == "__main__":
    sys.exit(main())
