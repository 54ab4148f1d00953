"""Trees of tensors, on optree: dicts, lists, tuples, NamedTuples, nested, with None as a leaf that says "nothing here".

A leaf is named by its dotted path: keys, indices and field names joined by dots (``"blocks.0.attn.weight"``),
the empty string for a bare tensor. Where a state keeps nothing for a leaf it holds ``()``.

Arithmetic has Optax's names and arguments. Where one of its trees holds None, the result does; a reduction passes over it.
"""

from optfn.tree.arithmetic import (
    add,
    add_scale,
    allclose,
    batch_shape,
    bias_correction,
    cast_like,
    clip,
    conj,
    div,
    dtype,
    full_like,
    max,
    min,
    mul,
    norm,
    ones_like,
    random_like,
    real,
    scale,
    size,
    split_key_like,
    sub,
    sum,
    update_infinity_moment,
    update_moment,
    update_moment_per_elem_norm,
    vdot,
    where,
    zeros_like,
)
from optfn.tree.branch import cond
from optfn.tree.branch import decided as decided
from optfn.tree.structure import NAMESPACE as NAMESPACE
from optfn.tree.structure import Taped as Taped
from optfn.tree.structure import (
    cast,
    children,
    flatten,
    from_flat_dict,
    get,
    get_all_with_path,
    global_norm,
    leaves,
    map,
    map_params,
    map_with_path,
    match,
    paths,
    set,
    subtrees,
    to_flat_dict,
    unflatten,
    value_and_grad,
)
from optfn.tree.structure import check_here as check_here
from optfn.tree.structure import check_leaves as check_leaves
from optfn.tree.structure import checked as checked
from optfn.tree.structure import differences as differences
from optfn.tree.structure import fit as fit
from optfn.tree.structure import map_entries as map_entries
from optfn.tree.structure import new_count as new_count
from optfn.tree.structure import tensors as tensors

__all__ = [
    "add",
    "add_scale",
    "allclose",
    "batch_shape",
    "bias_correction",
    "cast",
    "cast_like",
    "children",
    "clip",
    "cond",
    "conj",
    "div",
    "dtype",
    "flatten",
    "from_flat_dict",
    "full_like",
    "get",
    "get_all_with_path",
    "global_norm",
    "leaves",
    "map",
    "map_params",
    "map_with_path",
    "match",
    "max",
    "min",
    "mul",
    "norm",
    "ones_like",
    "paths",
    "random_like",
    "real",
    "scale",
    "set",
    "size",
    "split_key_like",
    "sub",
    "subtrees",
    "sum",
    "to_flat_dict",
    "unflatten",
    "update_infinity_moment",
    "update_moment",
    "update_moment_per_elem_norm",
    "value_and_grad",
    "vdot",
    "where",
    "zeros_like",
]
