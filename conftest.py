"""Names that the examples in docstrings use, and what tests count, printed at the end of a run."""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

# Threads that wait asleep. Those that spin, in several processes at once, make a run of small tensors take twice the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import optfn


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the tests."""
    parser.addoption("--generated", type=int, default=16, help="of the fixed cases of the fuzzer, how many are compiled to code")
    parser.addoption("--table", action="store_true", help="also what takes longer than there is time for in every run")
    parser.addoption("--kills", type=int, default=8, help="how often the process that saves checkpoints is killed")


@pytest.fixture(autouse=True, scope="session")
def _guards_are_not_timed() -> Iterator[None]:
    # Dynamo flushes the processor's caches to time its guards, for a log: it takes longer than a small function takes to trace.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._dynamo.guards.profile_guard_manager", lambda *_: 0.0, raising=False)
        yield


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
