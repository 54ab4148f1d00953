"""Torch's own tests of its optimizers and schedulers, run over ``TorchOptimizer``.

They are not in torch's wheel: take torch's source, of the version that is installed or one near it, and run

    python tests/torch_test_optim.py pytorch/test/test_optim.py
    python tests/torch_test_optim.py pytorch/test/test_optim.py --explicit -k TestLRScheduler

Each class of ``torch.optim`` is replaced by one of its name, with its arguments, whose steps are those of the alias here.
``--theirs`` replaces nothing, for comparison; ``--explicit`` gives every argument that is left out torch's default; everything
else goes to pytest. ``foreach``, ``fused`` and ``capturable`` say how torch computes, and mean nothing here; tests that are made
for them, or for ``differentiable=True``, are not generated.
"""

import inspect
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal import common_optimizers

import optfn
from optfn.interop import TorchOptimizer

HOW = ("foreach", "fused", "capturable", "differentiable")


def replacement(cls: type[torch.optim.Optimizer], explicit: bool) -> type[TorchOptimizer]:
    """A class with the arguments of a class of torch, over the alias of its name."""
    alias, signature = getattr(optfn, {"SparseAdam": "sparse_adam"}.get(cls.__name__, cls.__name__.lower())), inspect.signature(cls)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        bound = signature.bind(*args, **kwargs)
        if bound.arguments.get("differentiable"):
            raise NotImplementedError("differentiable=True: a functional step is")
        if explicit:
            bound.apply_defaults()
        options = {name: x for name, x in bound.arguments.items() if name not in HOW}
        TorchOptimizer.__init__(self, options.pop("params"), alias, **options)

    return type(cls.__name__, (TorchOptimizer,), {"__init__": __init__, "__module__": cls.__module__, "__signature__": signature})


def main(path: str, *arguments: str) -> int:
    """Exit status of pytest."""
    theirs, explicit = (option in arguments for option in ("--theirs", "--explicit"))
    rest = [x for x in arguments if x not in ("--theirs", "--explicit")]
    for info in common_optimizers.optim_db:
        info.supported_impls = ()
        if not theirs:
            new = replacement(info.optim_cls, explicit)
            setattr(torch.optim, info.optim_cls.__name__, new)
            setattr(sys.modules[info.optim_cls.__module__], info.optim_cls.__name__, new)
            info.optim_cls = new
    os.chdir(Path(path).parent)
    sys.path.insert(0, str(Path(path).parent.absolute()))
    options = ["-p", "no:cacheprovider", "-q", "--rootdir", ".", "-c", os.devnull]
    return pytest.main([Path(path).name, *options, *rest])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
