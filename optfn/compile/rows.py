"""A donated step that costs what the rows it changes cost: run eagerly, its writes to rows put off to the end."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optfn import tree
from optfn.sharding import is_sharded, local

__all__ = ["is_sparse", "step_on_rows"]

_aten = torch.ops.aten
_ROW_WRITES = {
    *(_aten.index_put.default, _aten.index_copy.default, _aten.index_add.default),
    *(_aten.add.Tensor, _aten.sub.Tensor),  # of a sparse tensor
}


def is_sparse(x: Any) -> bool:
    """Whether something is a sparse COO tensor, which torch.compile does not take (torch 2.13).

    Example:
        >>> is_sparse(torch.eye(2).to_sparse()), is_sparse(torch.ones(2))
        (True, False)
    """
    return isinstance(x, Tensor) and x.layout == torch.sparse_coo


def step_on_rows(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    donated: list[Tensor],
    match: Callable[[list[Any], Any], dict[int, Tensor]],
) -> Any:
    """Run a pure step, then write its results into the donated tensors.

    Where the step makes a new tensor of a donated one by changing some of its rows, the new tensor is not made, the change is
    noted. If the result has it in the place of that donated tensor, the rows are written there, after the whole step
    has run and nothing is left that could read the old ones. All else is computed out of place and copied.

    Args:
        fn: the step, a pure function.
        args: its arguments.
        kwargs: those given by name.
        donated: the tensors among the arguments to write to, each in memory of its own.
        match: ``match(leaves, structure)`` of the result of ``fn``: which donated tensor takes the place of which leaf.

    Returns:
        The result, with the donated tensors in their places; its other tensors share memory with nothing.
    """
    # The rows of a sparse gradient are rows of what has its shape; all other tensors are handed on as they are.
    shapes = {x.shape for x in tree.flatten((args, kwargs))[0] if is_sparse(x)}
    step = _Step()
    tables = {id(x): _Table(step, x, ()) for x in donated if x.shape in shapes}
    args, kwargs = tree.map(lambda x: tables.get(id(x), x), (args, kwargs))
    with torch.no_grad():
        try:
            leaves, spec = tree.flatten(fn(*args, **kwargs))
            targets = match(leaves, spec)
            memory = {_memory(x) for x in donated}
            new = [_settled(x, targets.get(i), memory) for i, x in enumerate(leaves)]
        finally:
            step.over = True
        # All that could fail has been done.
        for i, old in targets.items():
            value, new[i] = new[i], old
            if isinstance(value, _Table):
                value.write_to(old)
            elif value is not old:
                _overwrite(old, value)
    return tree.unflatten(spec, new)


def _settled(x: Any, target: Tensor | None, memory: set[int]) -> Any:
    """A leaf of the result, such that no write to a donated tensor changes it, or is changed by it."""
    if isinstance(x, _Table):
        return x if x.base is target and not x.made else x.copied()
    if not isinstance(x, Tensor) or x is target or (target is not None and _memory(x) not in memory):
        return x
    return x.clone()


def _memory(x: Tensor) -> int:
    return local(x).untyped_storage().data_ptr()


def _overwrite(old: Any, value: Any) -> None:
    """Write a tensor into another one, of which each process writes its piece."""
    if not is_sharded(old):
        old.copy_(value)
        return
    local(old).copy_(local(value))
    if not old.is_inference():
        torch.autograd.graph.increment_version([old])


class _Step:
    """Whether a step is over, and with it what its tensors rest on."""

    over = False


class _Write(NamedTuple):
    """A change of some rows (or single entries) of a tensor, which cannot fail.

    Attributes:
        indices: where: one vector for each of the leading dimensions.
        values: the rows.
        factor: how many times they are added to what is there; None if they replace it.
    """

    indices: list[Tensor]
    values: Tensor
    factor: float | None

    def to(self, x: Tensor) -> None:
        if len(self.indices) > 1:
            values = self.values if self.factor is None else self.factor * self.values
            x.index_put_(tuple(self.indices), values, accumulate=self.factor is not None)
        elif self.factor is None:
            x.index_copy_(0, self.indices[0], self.values)
        else:
            x.index_add_(0, self.indices[0], self.values, alpha=self.factor)


def _of_what_is_read(name: str) -> Any:
    """A method that asks for memory, which is no operator and so does not come to ``__torch_dispatch__``."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.read(), name)(*args, **kwargs)

    return method


class _Table(Tensor):
    """A donated tensor and the writes to its rows since: to whoever reads it the tensor that these make, which is made only then.

    Attributes:
        base: the donated tensor, which stays as it is while the step runs.
        made: the tensor that this stands for, once something has read it.
    """

    step: _Step
    base: Tensor
    writes: tuple[_Write, ...]
    made: list[Tensor]

    # What matters here comes to __torch_dispatch__.
    __torch_function__: Any = torch._C._disabled_torch_function_impl  # pyright: ignore[reportPrivateUsage]
    data = property(lambda self: self.read().data)
    grad: Any = property(lambda self: self.base.grad)  # pyright: ignore[reportIncompatibleVariableOverride]
    storage_offset, _is_view = map(_of_what_is_read, ("storage_offset", "_is_view"))
    data_ptr, untyped_storage, tolist = map(_of_what_is_read, ("data_ptr", "untyped_storage", "tolist"))
    numpy, __array__, __dlpack__ = map(_of_what_is_read, ("numpy", "__array__", "__dlpack__"))
    __deepcopy__, __reduce_ex__, __repr__ = map(_of_what_is_read, ("__deepcopy__", "__reduce_ex__", "__repr__"))

    @staticmethod
    def __new__(cls: type["_Table"], step: _Step, base: Tensor, writes: tuple[_Write, ...]) -> "_Table":
        strides = (torch.empty_like(base, device="meta") if writes else base).stride()
        self = Tensor._make_wrapper_subclass(
            cls, base.shape, strides, dtype=base.dtype, device=base.device, requires_grad=base.requires_grad and not writes
        )
        self._is_param = isinstance(base, torch.nn.Parameter) and not writes  # type: ignore[attr-defined]
        self.step, self.base, self.writes, self.made = step, base, writes, []
        return self

    def __getattr__(self, name: str) -> Any:
        """What somebody has set on the parameter."""
        if name in ("step", "base", "writes", "made") or self.writes:
            raise AttributeError(name)
        return getattr(self.base, name)

    def write_to(self, x: Tensor) -> None:
        for write in self.writes:
            write.to(x)

    def copied(self) -> Tensor:
        """The tensor that this stands for, in memory of its own."""
        if self.made:
            return self.made[0].clone()
        if self.step.over:
            raise RuntimeError("a tensor that a donated step made is read after the step; return it, or keep a clone of it")
        new = self.base.clone()
        self.write_to(new)
        return new

    def read(self) -> Tensor:
        """The tensor that this stands for."""
        if not self.writes:
            return self.base
        if not self.made:
            self.made.append(self.copied())
        return self.made[0]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        write = _row_write(func, args, kwargs)
        if write is not None:
            x = args[0]
            return _Table(x.step, x.base, (*x.writes, write))
        args, kwargs = tree.map(lambda x: x.read() if isinstance(x, _Table) else x, (args, kwargs))
        return func(*args, **kwargs)


def _row_write(func: Any, args: Any, kwargs: Any) -> _Write | None:
    """The write to rows that an operator is to a table which nothing has read since the last one; None if it is something else.

    What is not plainly right counts as something else: torch does it at once, or says what is wrong.
    """
    if func not in _ROW_WRITES or not isinstance(x := args[0], _Table) or x.made:
        return None
    factor = kwargs.get("alpha", 1)
    if func in (_aten.add.Tensor, _aten.sub.Tensor):
        if not is_sparse(args[1]) or args[1].shape != x.shape or not args[1].sparse_dim():
            return None
        indices, values = list(args[1]._indices()), args[1]._values()
        factor = factor if func is _aten.add.Tensor else -factor
    elif func is _aten.index_put.default:
        (indices, values), factor = args[1:3], 1 if True in args[3:] else None
    else:
        if args[1] != 0:
            return None
        indices, values = [args[2]], args[3]
        factor = factor if func is _aten.index_add.default else None
    if factor is not None and not (isinstance(factor, int | float) and (x.is_floating_point() or x.is_complex())):
        return None
    vectors = all(isinstance(i, Tensor) and i.ndim == 1 and i.dtype == torch.int64 and i.device == x.device for i in indices)
    if not vectors or len({len(i) for i in indices}) > 1:
        return None
    if (values.dtype, values.device, values.shape) != (x.dtype, x.device, (len(indices[0]), *x.shape[len(indices) :])):
        return None
    if not all(_within(i, size) for i, size in zip(indices, x.shape, strict=False)):
        return None
    # Copies: the step may write to what it made itself, and what was donated will be written to.
    return _Write([i.clone() for i in indices], values.clone(), factor)


def _within(index: Tensor, size: int) -> bool:
    """Whether all indices lie in a dimension of this size. On an accelerator, where to ask is to wait, torch's kernels check."""
    if index.device.type != "cpu" or not len(index):
        return True
    least, greatest = index.aminmax()
    return int(least) >= 0 and int(greatest) < size
