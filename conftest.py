"""Names that the examples in docstrings use."""

from typing import Any, NamedTuple

import pytest
import torch

import optfn


@pytest.fixture(autouse=True)
def _example_names(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace.update(torch=torch, optfn=optfn, NamedTuple=NamedTuple)
