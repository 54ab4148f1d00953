"""Adam for sparse gradients."""

from optfn.checks import alias, number, scalar_or_schedule
from optfn.compose import chain, negate_if
from optfn.core import GradientTransformation
from optfn.numerics import Scalar
from optfn.optimizers.adam import scale_by_adam
from optfn.schedules import ScalarOrSchedule
from optfn.transforms.scaling import scale_by_learning_rate
from optfn.wrappers.sparse import sparse_masked

__all__ = ["sparse_adam"]


@alias
def sparse_adam(
    lr: ScalarOrSchedule = 1e-3, betas: tuple[Scalar, Scalar] = (0.9, 0.999), eps: Scalar = 1e-8, *, maximize: bool = False
) -> GradientTransformation:
    r"""Adam on the entries that a sparse gradient holds: :class:`torch.optim.SparseAdam`.

    .. math:: p_t = p_{t-1} - \gamma\, \sqrt{1 - \beta_2^t}\, \hat\mu_t / (\sqrt{\nu_t} + \epsilon)

    Moments move only where the gradient has an entry; the step :math:`t` counts the updates of the whole tensor, empty ones too.
    It is :func:`sparse_masked` around :func:`scale_by_adam` in its epsilon-hat form.

    Args:
        lr: :math:`\gamma > 0`, a number, a 0-dim tensor or a schedule.
        betas: :math:`(\beta_1, \beta_2)`, each in ``[0, 1)``.
        eps: :math:`\epsilon > 0`, not bias-corrected.
        maximize: ascend instead.

    Raises:
        TypeError: from ``update``: a gradient is dense.
        ValueError: an argument out of range.

    Reference:
        See :func:`scale_by_adam`.

    Example:
        >>> tx = sparse_adam(lr=0.1)
        >>> params = {"rows": torch.ones(3, 1)}
        >>> grads = {"rows": torch.sparse_coo_tensor([[1]], [[5.0]], (3, 1), check_invariants=True)}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optfn.apply_updates(params, updates)["rows"].flatten()
        tensor([1.0000, 0.9000, 1.0000])
    """
    return chain(
        negate_if(maximize),
        sparse_masked(scale_by_adam(*betas, eps=number("eps", eps, above=0), eps_hat=True)),
        scale_by_learning_rate(scalar_or_schedule("lr", lr, above=0)),
    )
