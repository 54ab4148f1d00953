r"""Random numbers as values: keys, and numbers that are a pure function of a key and a position.

A key is an int64 tensor of two words of 32 bits. Nothing global is read or changed: the same key gives the same numbers, on every
device, eager or compiled, so a key in a state saves, resumes and repeats like any tensor. Use a key once: :func:`split` it, or
:func:`fold_in` a step or the number of a leaf, for new ones.

The numbers are those of ``jax.random`` with its default generator (partitionable Threefry), bit for bit; those of :func:`normal`
up to the rounding of the inverse error function. An entry depends on the key and on its own position alone. So a process may make
its part of a tensor's numbers (``part=``), and under :func:`optfn.compile` the generator fuses into the kernel that uses it, at
about the speed of ``torch.rand``. (Plain ``torch.compile`` of torch 2.13 takes half a minute for it, unless
``torch._inductor.config.realize_opcount_threshold`` is 8.) Eager it is some 150 operations, so thirty times slower.

Reference:
    Salmon, Moraes, Dror and Shaw, `Parallel Random Numbers: As Easy as 1, 2, 3 <https://doi.org/10.1145/2063384.2063405>`_, 2011,
    section 4.2 (Threefry, here 2 x 32 bits, 20 rounds). Giles, `Approximating the erfinv Function
    <https://people.maths.ox.ac.uk/gilesm/files/gems_erfinv.pdf>`_, 2011 (normal numbers, but for float64).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from optfn.numerics import Scalar, real_dtype

__all__ = ["bits", "fold_in", "key", "normal", "permutation", "rademacher", "split", "uniform"]

Part: TypeAlias = Sequence[slice | Sequence[int]] | None
"""For each dimension a slice, or indices, of those numbers alone; None for all."""

_WORD, _SIGN = 0xFFFFFFFF, 0x80000000
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def key(seed: int, device: torch.device | str | None = None) -> Tensor:
    """The key of a seed: ``jax.random.PRNGKey(seed)`` with 64-bit integers.

    Args:
        seed: an integer of at most 64 bits.
        device: where the key is, and the numbers made from it.

    Raises:
        TypeError: ``seed`` is no integer.
        ValueError: it has more than 64 bits.

    Example:
        >>> key(7)
        tensor([0, 7])
    """
    given: Any = seed
    if not isinstance(given, int):
        raise TypeError(f"key takes an integer seed, got {type(given).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"key takes a seed of at most 64 bits, got {seed}")
    return torch.tensor([seed >> 32 & _WORD, seed & _WORD], device=device)


def as_key(owner: str, given: int | Tensor | None) -> Tensor:
    """The key of a seed, or the key that is given; an error that names ``owner`` where neither is.

    Example:
        >>> as_key("add_noise", 7)
        tensor([0, 7])
        >>> as_key("add_noise", None)
        Traceback (most recent call last):
        ...
        TypeError: add_noise needs `key`: an integer seed, or a key, optfn.random.key(seed)
    """
    if given is None:
        raise TypeError(f"{owner} needs `key`: an integer seed, or a key, optfn.random.key(seed)")
    if isinstance(given, int):
        return key(given)
    _check(given)
    return given


def split(key: Tensor, num: int | tuple[int, ...] = 2) -> Tensor:
    """New keys from one: ``jax.random.split``. The old one is not to be used again.

    Args:
        key: a key.
        num: how many, or the shape of a tensor of keys.

    Returns:
        An int64 tensor of the shape ``(num, 2)``.

    Example:
        >>> first, second = split(key(7))
        >>> first
        tensor([3625411723, 1954958720])
    """
    first, second = _words(key, (num,) if isinstance(num, int) else tuple(num), None)
    return torch.stack([_number(first), _number(second)], -1)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key from a key and a number: ``jax.random.fold_in``.

    Args:
        key: a key.
        data: the number of a step or of a leaf, of which 32 bits count: an integer or a 0-dim integer tensor.

    Example:
        >>> fold_in(key(7), 3)
        tensor([ 276534068, 1641862660])
    """
    _check(key)
    count = _word(torch.as_tensor(data, dtype=torch.int64, device=key.device))
    first, second = _threefry(key, torch.zeros_like(count), count)
    return torch.stack([_number(first), _number(second)], -1)


def bits(key: Tensor, shape: Sequence[int] = (), width: int = 32, *, part: Part = None) -> Tensor:
    """Random bits: ``jax.random.bits``.

    Args:
        key: a key.
        shape: the shape of the result.
        width: how many bits an entry has: 8, 16, 32 or 64.
        part: only these of them.

    Returns:
        An int64 tensor; of 64 bits the first is its sign.

    Raises:
        ValueError: another width.

    Example:
        >>> bits(key(7), (2,), 8)
        tensor([11,  0])
    """
    if width not in (8, 16, 32, 64):
        raise ValueError(f"width must be 8, 16, 32 or 64, got {width!r}")
    high, low = _words(key, shape, part)
    return _number(high) << 32 | _number(low) if width == 64 else _number(high ^ low) & ((1 << width) - 1)


def uniform(
    key: Tensor,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    minval: Scalar = 0.0,
    maxval: Scalar = 1.0,
    *,
    part: Part = None,
) -> Tensor:
    """Uniform numbers in ``[minval, maxval)``: ``jax.random.uniform``.

    Args:
        key: a key.
        shape: the shape of the result.
        dtype: a floating-point dtype. The numbers are multiples of its epsilon, so each dtype has its own.
        minval: the lower bound, which can occur.
        maxval: the upper bound, which cannot, but by rounding.
        part: only these of them.

    Raises:
        TypeError: ``dtype`` is not a floating-point dtype.

    Example:
        >>> uniform(key(7), (3,))
        tensor([0.6741, 0.9746, 0.3028])
    """
    _check(key)
    low, high = (torch.as_tensor(x, dtype=dtype, device=key.device) for x in (minval, maxval))
    return torch.maximum(low, _fraction(key, shape, dtype, part) * (high - low) + low)


def normal(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32, *, part: Part = None) -> Tensor:
    r"""Normal numbers, of mean 0 and variance 1: ``jax.random.normal``, that is :math:`\sqrt 2\, \mathrm{erf}^{-1}(u)`.

    Args:
        key: a key.
        shape: the shape of the result.
        dtype: a floating-point or complex dtype; a complex number has a variance of 1, its parts of 1/2 each.
        part: only these of them.

    Example:
        >>> normal(key(7), (3,))
        tensor([ 0.4512,  1.9535, -0.5162])
    """
    if dtype.is_complex:
        parts = (normal(k, shape, real_dtype(dtype), part=part) / math.sqrt(2) for k in split(key).unbind())
        return torch.complex(*parts)
    lowest = -1 + _floating(dtype).eps / 2  # the number after -1
    return math.sqrt(2) * _erfinv(uniform(key, shape, dtype, lowest, 1.0, part=part))


def rademacher(key: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.int64, *, part: Part = None) -> Tensor:
    """-1 or 1, each in half of the cases: ``jax.random.rademacher``.

    Args:
        key: a key.
        shape: the shape of the result.
        dtype: its dtype.
        part: only these of them.

    Example:
        >>> rademacher(key(7), (3,))
        tensor([-1, -1,  1])
    """
    high, low = _words(key, shape, part)
    return (((high ^ low) >> 31) * 2 + 1).to(dtype)  # a shift of the sign gives -1 or 0


def permutation(key: Tensor, x: int | Tensor, dim: int = 0) -> Tensor:
    """A random order: ``jax.random.permutation``.

    Args:
        key: a key.
        x: a number of things, for the order of ``range(x)``; or a tensor, whose slices are put in a random order.
        dim: the dimension that the slices are of.

    Example:
        >>> permutation(key(7), 5)
        tensor([4, 2, 3, 0, 1])
    """
    _check(key)
    count = x if isinstance(x, int) else x.shape[dim]
    order = torch.arange(count, device=key.device)
    # Keys of 32 bits collide. Sorted so often, two entries have the same keys in every round in hardly any case.
    for _ in range(math.ceil(3 * math.log(max(1, count)) / math.log(_WORD))):
        key, now = split(key).unbind()
        order = order[torch.argsort(bits(now, (count,)), stable=True)]
    return order if isinstance(x, int) else x.index_select(dim, order)


def _fraction(key: Tensor, shape: Sequence[int], dtype: torch.dtype, part: Part) -> Tensor:
    """Multiples of the dtype's epsilon in [0, 1)."""
    info = _floating(dtype)
    digits = -round(math.log2(info.eps))
    high, low = _words(key, shape, part)
    if info.bits == 64:
        mantissa = _number(high) << 20 | _number(low) >> 12
    else:
        width = info.bits if digits >= 8 else 8
        mantissa = (high ^ low) >> (width - digits) & ((1 << digits) - 1)
    return mantissa.to(dtype) * info.eps


def _floating(dtype: torch.dtype) -> torch.finfo:
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    return torch.finfo(dtype)


# Of w - 2.5 where w < 5, else of sqrt(w) - 3 (Giles, in single precision), the highest power first.
_CENTRAL = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
_TAIL = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)


def _erfinv(x: Tensor) -> Tensor:
    """The inverse error function within (-1, 1): in float32 by polynomials, as in JAX, since torch's is not made for vectors."""
    if x.dtype == torch.float64:
        return torch.erfinv(x)
    wide = x.float()
    w = -torch.log((1 - wide) * (1 + wide))  # log1p(-x**2) would have the rounding of the square, 1e-5 in the tails
    central = w < 5
    at = torch.where(central, w - 2.5, w.sqrt() - 3)
    result = torch.where(central, _CENTRAL[0], _TAIL[0])
    for near, far in zip(_CENTRAL[1:], _TAIL[1:], strict=True):
        result = torch.where(central, near, far) + result * at
    return (result * wide).to(x.dtype)


def _words(key: Tensor, shape: Sequence[int], part: Part) -> tuple[Tensor, Tensor]:
    """The two words of each entry of a tensor of this shape, whose counter is its position; as :func:`_threefry` gives them."""
    _check(key)
    given: Any = shape
    if not isinstance(given, Sequence):
        raise TypeError(f"shape must be a tuple of ints, as (2,), got {given!r}")
    high, low = _positions(tuple(given), part, key.device)
    return _threefry(key, high, low)


def _positions(shape: tuple[int, ...], part: Part, device: torch.device) -> tuple[Tensor, Tensor]:
    """High and low word of positions."""
    small = math.prod(shape) <= 2**31
    count = functools.partial(torch.arange, dtype=torch.int32 if small else torch.int64, device=device)
    if part is None:
        position = count(math.prod(shape)).reshape(shape)
    elif len(part) != len(shape):
        raise ValueError(f"part must have a slice, or indices, for each of the {len(shape)} dimensions, got {len(part)}")
    else:
        position = count(1)[0]
        for size, wanted in zip(shape, part, strict=True):
            here = count(*wanted.indices(size)) if isinstance(wanted, slice) else torch.tensor(wanted, device=device)
            position = position[..., None] * size + here.to(position.dtype)
    if small:
        return torch.zeros((), dtype=torch.int32, device=device), position
    return _word(position >> 32), _word(position)


def _word(x: Tensor) -> Tensor:
    """The low 32 bits of integers, as int32 has them."""
    return ((x & _WORD ^ _SIGN) - _SIGN).to(torch.int32)


def _number(word: Tensor) -> Tensor:
    """What 32 bits are without a sign, in int64."""
    return word.to(torch.int64) & _WORD


def _threefry(key: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Threefry 2x32 of counters. Words are int32, whose sums wrap around: a vector register holds twice as many as of int64."""
    k0, k1 = _word(key).unbind()
    keys = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    x0, x1 = x0 + k0, x1 + k1
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ (x1 << r | x1 >> (32 - r) & ((1 << r) - 1))  # the shift to the right copies the sign
        x0 = x0 + keys[(i + 1) % 3]
        x1 = x1 + (keys[(i + 2) % 3] + (i + 1))
    return x0, x1


def _check(key: Any) -> None:
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.shape != (2,):
        got = f"{key.dtype} of shape {tuple(key.shape)}" if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(f"a key is an int64 tensor of two words, as optfn.random.key(seed) makes one, got {got}")
