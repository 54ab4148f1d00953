"""The page for people who come from Optax names all that Optax has, and what it says is here is here."""

import inspect
import re
import types
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import optax
import pytest

import optfn

PAGE = (Path(__file__).parents[1] / "docs" / "from-optax.md").read_text()
MODULES = (
    "assignment",
    "contrib",
    "losses",
    "microbatching",
    "perturbations",
    "projections",
    "schedules",
    "second_order",
    "transforms",
    "tree",
)
ROWS = re.findall(r"^\| (`.+?) \| (.+) \|$", PAGE, re.MULTILINE)
NAMED = {name: here for names, here in ROWS for name in re.findall(r"`([\w.]+)`", names)}


def public(module: types.ModuleType) -> set[str]:
    return {name for name, x in vars(module).items() if not name.startswith("_") and not inspect.ismodule(x)}


def exported() -> list[str]:
    """Each name once, as it is written from `optax` on, at the top if it is there too."""
    top = public(optax)
    found = sorted(top)
    for name in MODULES:
        module = import_module(f"optax.{name}")
        found += [f"{name}.{x}" for x in sorted(public(module)) if x not in top or getattr(module, x) is not getattr(optax, x)]
    return found


def test_every_name_of_optax_has_a_row() -> None:
    assert len(exported()) > 300
    missing = [name for name in exported() if name not in NAMED and name.split(".")[-1] not in NAMED]
    assert not missing


def test_no_row_is_of_something_else() -> None:
    """Names that Optax does not have, or has no more."""
    known = {*exported(), *(f"{m}.{x}" for m in (*MODULES, "tree_utils") for x in public(import_module(f"optax.{m}")))}
    assert not [name for name in NAMED if name not in known]


HERE = sorted(name for name, here in NAMED.items() if here.startswith(("the same", "torch.optim's")) and not name[0].isupper())


@pytest.mark.parametrize("name", [name for name in HERE if not name.split(".")[-1][0].isupper()])
def test_what_is_the_same_is_here(name: str) -> None:
    where = name.removeprefix("contrib.").removeprefix("transforms.")
    if "optfn.tree." in NAMED[name]:
        where = where if where.startswith("tree.") else f"tree.{where}"
    found = optfn
    for part in where.split("."):
        found = getattr(found, part)
    assert callable(found)


BLOCKS = [
    name for name in HERE if "." not in name and name.startswith(("scale_by_", "clip", "add_", "trace", "ema", "per_example"))
]


@pytest.mark.parametrize("name", BLOCKS)
def test_arguments_of_blocks_are_optaxs(name: str) -> None:
    """Its names in its order, and its defaults; there may be more, by keyword or at the end."""
    theirs = [p for p in inspect.signature(getattr(optax, name)).parameters.values() if p.name not in DIFFERS.get(name, ())]
    ours = inspect.signature(getattr(optfn, name)).parameters
    positional = [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [*ours][: len(positional)] == positional
    for p in theirs:
        assert p.name in ours
        optional = p.default not in (p.empty, None) and "dtype" not in p.name  # Optax has float32 where torch has the parameter's
        assert not optional or ours[p.name].default == p.default, p.name


DIFFERS: dict[str, tuple[str, ...]] = {
    "add_noise": ("key", "seed"),  # a key is required, and seed is its old name
}


@pytest.mark.parametrize("here", sorted({here for _, here in ROWS}))
def test_what_is_named_exists(here: str) -> None:
    for name in re.findall(r"\{(?:func|class|mod)\}`optfn\.([\w.]+)`", here):
        found = optfn
        for part in name.split("."):
            found = getattr(found, part)


EXAMPLES = re.findall(r"^\| \[(\w+)\]\(https://\S+\) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("theirs", "here"), [row[1:] for row in EXAMPLES], ids=[row[0] for row in EXAMPLES])
def test_what_the_examples_of_optax_need_exists(theirs: str, here: str) -> None:
    """Names of Optax are those of the tables above; what they are here is here."""
    for name in re.findall(r"`([\w.]+)`", theirs):
        assert {name, name.split(".")[-1], name.replace("tree_utils.tree_", "tree.")} & {*NAMED}, name
    for name in re.findall(r"\{(?:func|class)\}`optfn\.([\w.]+)`", here):
        assert callable(attrgetter(name)(optfn))
