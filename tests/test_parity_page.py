"""The documentation's table of what is compared with torch.optim is made here, from the tables that the tests run over.

``UPDATE_PARITY_PAGE=1 pytest tests/test_parity_page.py`` writes it anew.
"""

import os
from pathlib import Path

import test_lbfgs as lbfgs
import test_torch_parity as parity
from oracle import INFOS, ORACLES
from torch import optim

PAGE = Path(__file__).parent.parent / "docs" / "parity.md"
HEAD = """\
# Compared with torch.optim

Each alias takes the steps of the class that it is named after, over every configuration of torch's own table of optimizers
(`torch.testing._internal.common_optimizers.optim_db`), that of the CPU and that of CUDA in values, and is compared after each
step: within 1e-12 of 1 + |x| in float64 and complex128, 1e-6 in float32, with and without None among the gradients; the states
are compared at the end. LBFGS, whose iterations amplify rounding, is compared in float64 and complex128 alone. An error of torch's
table is raised here too, or is listed below with the reason why it is none.

The tables on this page are made by the tests.

| torch.optim | optfn | configurations (of the CPU's list) | dtypes | sparse gradients | errors raised here too | not applicable |
|---|---|---|---|---|---|---|
"""


def page() -> str:
    rows: list[tuple[str, str, int, int, int, str, int, int]] = []
    reasons: dict[str, str] = {}
    for cls, oracle in ORACLES.items():
        table = parity.DENSE_TABLE if cls in parity.DENSE else parity.SPARSE_TABLE
        errors = [given.desc for owner, given in parity.ERROR_TABLE if owner is cls]
        shared = sum(error in parity.ERRORS for error in errors)
        reasons |= {error: parity.NOT_AN_ERROR[error] for error in errors if error not in parity.ERRORS}
        on_cpu = len(INFOS[cls].optim_inputs_func(device="cpu"))
        sparse = ("only" if cls not in parity.DENSE else "yes") if cls in parity.SPARSE else ""
        covered, dtypes = sum(row[0] is cls for row in table), len(parity.dtypes_of(cls))
        rows.append((cls.__name__, oracle.alias.__name__, covered, on_cpu, dtypes, sparse, shared, len(errors) - shared))
    covered, on_cpu = len(lbfgs.CONFIGURATIONS), len(INFOS[optim.LBFGS].optim_inputs_func(device="cpu"))
    rows.append(("LBFGS", "lbfgs", covered, on_cpu, 2, "", len(lbfgs.ERRORS), len(lbfgs.NOT_AN_ERROR)))
    reasons |= lbfgs.NOT_AN_ERROR
    lines = [f"| {a} | {b} | {c} ({d}) | {e} | {f} | {g} | {h} |" for a, b, c, d, e, f, g, h in rows]
    total = [sum(column) for column in zip(*((r[2], r[3], r[6], r[7]) for r in rows), strict=True)]
    lines.append(f"| **{len(rows)} classes** | | **{total[0]} ({total[1]})** | | | **{total[2]}** | **{total[3]}** |")
    lines += ["", "## Errors of torch that are none here", "", "| in torch's table | why not here |", "|---|---|"]
    lines += [f"| {error.replace(chr(92), '')} | {reason} |" for error, reason in sorted(reasons.items())]
    return HEAD + "\n".join(lines) + "\n"


def test_the_page_says_what_the_tests_run() -> None:
    made = page()
    if os.environ.get("UPDATE_PARITY_PAGE"):
        PAGE.write_text(made)
    assert PAGE.read_text() == made, "UPDATE_PARITY_PAGE=1 writes the page anew"
    assert {*INFOS} == {*ORACLES, optim.LBFGS}
