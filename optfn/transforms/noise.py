"""Noise in the updates."""

from typing import Any, NamedTuple

from torch import Tensor

from optfn import random, tree
from optfn.checks import check_state, number
from optfn.core import GradientTransformation
from optfn.leafwise import begin_of, lifted, stateless_with_tree_map
from optfn.numerics import Scalar, as_real, compute_dtype, sqrt
from optfn.schedules import as_time
from optfn.sharding import drawn
from optfn.sweep import Leaves, Sweep

__all__ = ["AddNoiseState", "add_noise"]


class AddNoiseState(NamedTuple):
    """The state of :func:`add_noise`.

    Attributes:
        count: the updates so far, a 0-dim int64 tensor.
        rng_key: the key of the next update's noise, see :mod:`optfn.random`.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    rng_key: Tensor


def add_noise(eta: Scalar, gamma: Scalar, key: int | Tensor | None = None) -> GradientTransformation:
    r"""Add normal noise, whose variance falls with the steps.

    .. math:: u_t = g_t + \sigma_t z_t, \qquad z_t \sim \mathcal{N}(0, 1), \qquad \sigma_t^2 = \eta / t^\gamma

    The numbers are a function of the key, the step and the place of a leaf in the tree: the same key repeats a run, and a leaf that
    sits a step out, or is None, changes no others. They are those of Optax with the same key. Each dtype has its own; leaves of
    half precision have those of float32.

    Args:
        eta: :math:`\eta \ge 0`, in the units of the squared updates.
        gamma: :math:`\gamma \ge 0`.
        key: where the numbers begin, a key of :mod:`optfn.random` or an integer seed. It has no default: two runs that share
            a key share their noise.

    Raises:
        TypeError: ``key`` is missing, or is neither.
        ValueError: an argument out of range.

    Reference:
        Neelakantan et al., `Adding Gradient Noise Improves Learning for Very Deep Networks
        <https://arxiv.org/abs/1511.06807>`_, 2015, section 3.

    Example:
        >>> tx = add_noise(eta=0.01, gamma=0.55, key=7)
        >>> updates, state = tx.update(torch.zeros(3), tx.init(torch.zeros(3)))
        >>> updates
        tensor([-0.0690,  0.0889,  0.0762])
    """
    eta, gamma = number("eta", eta, at_least=0, finite=True), number("gamma", gamma, at_least=0, finite=True)
    start = random.as_key("add_noise", key)

    def init(params: Any) -> AddNoiseState:
        count = tree.new_count(params)
        return AddNoiseState(count, start.to(count.device, copy=True))

    def check(state: Any) -> None:
        check_state("add_noise", state, AddNoiseState)

    def begin(leaves: Leaves, state: AddNoiseState) -> Sweep:
        count = state.count + 1
        sigma = sqrt(eta * as_time(count) ** -gamma)
        after, now = random.split(state.rng_key).unbind()
        keys = random.split(now, leaves.spec.num_leaves)

        def each(i: int, g: Tensor, p: Tensor | None) -> Tensor:
            home = g if leaves.homes is None else leaves.homes[i]
            z = as_real(drawn(random.normal, keys[i].to(g.device), g, home, compute_dtype(g, p)))
            noisy = stateless_with_tree_map(lambda g, p: g + sigma.to(g.device) * z)
            return begin_of(noisy)(leaves, ()).each(i, g, p)

        return Sweep(each, lambda: AddNoiseState(count, after), "entries", reads_params=False)

    return lifted(init, begin, check=check)
