"""Names that the examples in docstrings use, and what tests count, printed at the end of a run."""

from typing import Any, NamedTuple

import pytest
import torch

import optfn


@pytest.fixture(autouse=True)
def _example_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(torch=torch, optfn=optfn, NamedTuple=NamedTuple)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded with ``record_property``, by its name; worker processes send it along with their reports."""
    counted: dict[str, list[str]] = {}
    for report in terminalreporter.getreports("passed"):
        for name, line in report.user_properties:
            counted.setdefault(name, []).append(str(line))
    for name, lines in counted.items():
        terminalreporter.section(name)
        terminalreporter.write("\n".join(lines) + "\n")
