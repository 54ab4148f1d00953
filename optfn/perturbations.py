"""Functions smoothed by noise, so that they have derivatives where they had none."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from optfn import random, tree
from optfn.checks import number
from optfn.numerics import Scalar

__all__ = ["Gumbel", "Noise", "Normal", "make_perturbed_fun"]


class Noise(Protocol):
    """A distribution: numbers from a key, and the logarithm of their density, up to a constant."""

    def sample(self, key: Tensor, sample_shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Independent numbers of a shape and a dtype."""
        ...

    def log_prob(self, inputs: Tensor) -> Tensor:
        """The logarithm of the density of each entry."""
        ...


class Normal:
    """The normal distribution of mean 0 and variance 1.

    Example:
        >>> Normal().sample(optfn.random.key(7), (3,))
        tensor([ 0.4512,  1.9535, -0.5162])
    """

    def sample(self, key: Tensor, sample_shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers: :func:`optfn.random.normal`."""
        return random.normal(key, sample_shape, dtype)

    def log_prob(self, inputs: Tensor) -> Tensor:
        r"""The logarithm of the density, up to a constant: :math:`-z^2 / 2`."""
        return -0.5 * inputs.square()


class Gumbel:
    """The standard Gumbel distribution, with which the perturbed maximum is the softmax.

    Example:
        >>> Gumbel().sample(optfn.random.key(7), (3,))
        tensor([ 0.9304,  3.6608, -0.1778])
    """

    def sample(self, key: Tensor, sample_shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        r"""Gumbel numbers, :math:`-\log(-\log u)` of uniform ones: ``jax.random.gumbel``."""
        return -torch.log(-torch.log(random.uniform(key, sample_shape, dtype, torch.finfo(dtype).tiny, 1.0)))

    def log_prob(self, inputs: Tensor) -> Tensor:
        r"""The logarithm of the density: :math:`-z - e^{-z}`."""
        return -inputs - torch.exp(-inputs)


def make_perturbed_fun(
    fun: Callable[[Any], Any],
    num_samples: int = 1000,
    sigma: Scalar = 0.1,
    noise: Noise = Gumbel(),  # noqa: B008 - it keeps nothing
    use_baseline: bool = True,
) -> Callable[[Tensor, Any], Any]:
    r"""A smoothed function, with derivatives of every order, from the values of one that may have none.

    .. math::
        f_\sigma(x) &= \mathbb{E}_z\, f(x + \sigma z) \approx \tfrac1n \sum_i f(x + \sigma z_i), \\
        \nabla f_\sigma(x) &= -\tfrac{1}{\sigma} \mathbb{E}_z \left( f(x + \sigma z) - f(x) \right) \nabla \log \mu(z)^\top

    So an ``argmax``, a sort, a shortest path or a simulator can stand inside of a loss. Values and derivatives, of any order, are
    averages over the same samples, without bias. :func:`torch.autograd.grad`, :mod:`torch.func` and forward mode give them;
    ``fun`` itself is never differentiated. The samples are those of Optax with the same key.

    Args:
        fun: a function of one tree of tensors to a tree of tensors, which :func:`torch.vmap` can map.
        num_samples: :math:`n \ge 1`.
        sigma: :math:`\sigma > 0`, the scale of the noise, in the units of ``x``.
        noise: the distribution :math:`\mu`: :class:`Gumbel`, :class:`Normal`, or what has their methods.
        use_baseline: whether :math:`f(x)` is subtracted in the derivatives, which makes their variance smaller.

    Returns:
        ``f(key, x)``, where ``key`` is a key of :mod:`optfn.random`, one for each call, and ``x`` a tree of floating-point tensors.

    Raises:
        ValueError: ``num_samples`` or ``sigma`` is out of range.

    Reference:
        Berthet et al., `Learning with Differentiable Perturbed Optimizers <https://arxiv.org/abs/2002.08676>`_, 2020, section 3;
        Foerster et al., `DiCE: The Infinitely Differentiable Monte Carlo Estimator <https://arxiv.org/abs/1802.05098>`_, 2018.

    Example:
        >>> def winner(x):
        ...     return torch.nn.functional.one_hot(x.argmax(), 3).to(x.dtype)
        >>> smooth = make_perturbed_fun(winner, 1000, 1.0)
        >>> key, x = optfn.random.key(7), torch.tensor([0.0, 1.0, 2.0])
        >>> smooth(key, x), x.softmax(0)
        (tensor([0.0790, 0.2540, 0.6670]), tensor([0.0900, 0.2447, 0.6652]))
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be >= 1, got {num_samples}")
    size = number("sigma", sigma, above=0, finite=True)

    def perturbed(key: Tensor, x: Any) -> Any:
        _, spec = tree.checked(x, "make_perturbed_fun: x")
        held = tree.map(torch.Tensor.detach, x)
        baseline = fun(held) if use_baseline else None
        structure: list[Any] = []

        def sampled(key: Tensor) -> list[Any]:
            keys = tree.unflatten(spec, list(random.split(key, spec.num_leaves).unbind()))
            moved = tree.map(lambda p, k: p + size * noise.sample(k, p.shape, p.dtype), held, keys)
            log_prob: Any = sum(tree.leaves(tree.map(lambda p, y: noise.log_prob((y - p) / size).sum(), x, moved)))
            # 1, whose derivatives are those of the density of the sample over that density.
            box = torch.exp(log_prob - log_prob.detach())
            values = fun(moved)
            if use_baseline:
                values = tree.map(lambda v, b: box * v + (1 - box) * b, values, baseline)
            else:
                values = tree.map(lambda v: box * v, values)
            structure[:] = tree.flatten(values)
            return tree.leaves(values)

        found = iter(torch.vmap(sampled)(random.split(key, num_samples)))
        values, spec_of_values = structure
        return tree.unflatten(spec_of_values, [None if v is None else next(found).mean(0) for v in values])

    return perturbed
