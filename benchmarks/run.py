"""Every way to take an optimizer step that we know of, side by side on this machine's CPU.

    python benchmarks/run.py                      all of it
    python benchmarks/run.py --only adamw-148     some of it; the rest of an earlier run's results stays
    python benchmarks/run.py --small              tiny trees, to see whether everything works

What a contender does not have (a library that is not installed, say) is left out, and the results say so. A contender that
fails, or whose numbers are not those of the reference, is named, and the exit code is 1.
"""

import argparse
import sys
import time
from pathlib import Path

import report
from measure import in_parts
from tqdm import tqdm
from workloads import SUITES


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny trees and few rounds, to see whether everything works")
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", help="some of: " + ", ".join(SUITES["cpu"](small=True)))
    parser.add_argument("--seconds", type=float, help="to time each workload (default: 60, small: 1)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results, small: runs/benchmarks)")
    parser.add_argument("--plot", type=Path, help="file of the picture (default: docs/benchmarks.svg, small: in the folder)")
    args = parser.parse_args(argv)
    suite = SUITES["cpu"](small=args.small)
    chosen = args.only or list(suite)
    if unknown := set(chosen) - set(suite):
        parser.error(f"no workload is called {', '.join(sorted(unknown))}; there are {', '.join(suite)}")
    seconds = args.seconds if args.seconds is not None else 1.0 if args.small else 60.0
    out = args.out or report.ROOT / ("runs/benchmarks" if args.small else "benchmarks/results")
    name = report.file_name("cpu")
    try:
        results = report.begin(out, name, "cpu", small=args.small, again=bool(args.only))
    except ValueError as error:
        parser.error(str(error))
    begin = time.perf_counter()
    with tqdm(chosen, unit="workload", dynamic_ncols=True) as bar:
        for which in bar:
            for what, found in in_parts("cpu", which, suite[which], "cpu", small=args.small, seconds=seconds):
                bar.set_description(f"{which}: {what}")
                report.add(results, which, found, list(suite))
                page = report.write(results, out, name)
    report.plot(results, args.plot or (out / "benchmarks.svg" if args.small else report.ROOT / "docs/benchmarks.svg"))
    print(page.read_text())
    print(f"{page}, after {(time.perf_counter() - begin) / 60:.1f} minutes")
    return report.complain(results, chosen)


if __name__ == "__main__":
    sys.exit(main())
