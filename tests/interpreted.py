"""The regions of a compiled step, run node by node: what splitting does to values, without the time of code generation."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.fx

from optfn.compile import internals


@contextlib.contextmanager
def interpreted() -> Iterator[list[torch.fx.Graph]]:
    """Within it regions are not compiled; the list gathers the graphs of the distinct ones."""
    graphs: list[torch.fx.Graph] = []

    def compile_region(graph: torch.fx.Graph, fakes: list[Any]) -> Callable[[list[Any]], Any]:
        graphs.append(graph)
        module = torch.fx.GraphModule({}, graph)

        def run(values: list[Any]) -> Any:
            for value, fake in zip(values, fakes, strict=True):
                assert (value.shape, value.dtype, value.stride()) == (fake.shape, fake.dtype, fake.stride())
            results = module(*values)
            values.clear()
            return results

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(internals, "compile_regions", lambda regions: [compile_region(*region) for region in regions])
        yield graphs
