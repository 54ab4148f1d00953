"""The README's code runs as printed."""

import re
from pathlib import Path

import pytest
import torch

import optfn

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_first_example_is_ten_lines_and_learns() -> None:
    lines = [line for line in BLOCKS[0].splitlines() if line.strip() and not line.startswith("import")]
    assert len(lines) <= 10
    torch.manual_seed(0)
    names: dict = {}
    exec(BLOCKS[0], names)
    start = {"w": torch.zeros(3), "b": torch.zeros(())}
    assert names["loss"](names["params"]) < names["loss"](start)


@pytest.mark.codegen
def test_all_examples_run_in_order() -> None:
    torch.manual_seed(0)
    names: dict = {}
    for block in BLOCKS:
        exec(block, names)
    assert names["value"].isfinite()
    assert optfn.tree.get(names["state"], "step").tolist() == [3, 3]
