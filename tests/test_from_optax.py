"""The page for people who come from Optax names all that Optax has, and what it says is here is here."""

import inspect
import re
import types
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

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


HERE = sorted(name for name, here in NAMED.items() if here.startswith(("the same", "torch.optim's")))
STATES = [name for name in HERE if name.endswith(("State", "ApplyEvery"))]  # most are a LeafwiseState here


def here(name: str) -> Any:
    """What is here of a name of Optax."""
    where = re.sub(r"^(contrib|schedules|transforms)\.", "", name)
    return attrgetter(f"tree.{where}" if "optfn.tree." in NAMED[name] and not where.startswith("tree.") else where)(optfn)


@pytest.mark.parametrize("name", [name for name in HERE if name not in STATES])
def test_what_is_the_same_is_here(name: str) -> None:
    assert callable(here(name))


SAME = sorted(name for name, here in NAMED.items() if here.startswith("the same") and not here.startswith("the same name"))
FUNCTIONS = [name for name in SAME if not name.split(".")[-1][0].isupper()]
ALIASES = sorted(name for name, here in NAMED.items() if here.startswith("the same name") and not name.split(".")[-1][0].isupper())


def both(name: str) -> tuple[Any, dict[str, Any]]:
    """The arguments of what Optax has under a name, without ``*args`` and ``**kwargs``, and of what is here, by name."""
    theirs = inspect.signature(attrgetter(name)(optax)).parameters.values()
    ours = inspect.signature(here(name)).parameters
    return [p for p in theirs if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)], dict(ours)


def plain(default: Any) -> Any:
    """A default; of a function, a dtype or an object, of which each library has its own, the name."""
    if isinstance(default, bool | int | float | str | tuple | None):
        return default
    text = str(default).removeprefix("torch.")
    return getattr(default, "__name__", type(default).__name__ if text.startswith("<") else text)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_of_what_is_the_same_are_optaxs(name: str) -> None:
    """Their names in their order, and their defaults; there may be more at the end. What differs is named in the row."""
    theirs, ours = both(name)
    differs = re.findall(r"`(\w+)`", NAMED[name])
    kept = [p for p in theirs if p.name not in differs]
    positional = [p.name for p in kept if p.kind is not p.KEYWORD_ONLY]
    assert [x for x in ours if x not in differs][: len(positional)] == positional
    for p in kept:
        assert p.name in ours
        if p.default is not p.empty:
            assert plain(ours[p.name].default) == plain(p.default), p.name


RENAMED = {"learning_rate": "lr", "seed": "key", "scaling": "lr"}
OTHER_NUMBER = {("adan", "eps_root")}  # as the authors of Adan
HAS_NO = {("nadamw", "nesterov")}


@pytest.mark.parametrize("name", ALIASES)
def test_arguments_of_aliases_are_optaxs_in_torchs_form(name: str) -> None:
    """`lr` first, `betas` in one; the rest has Optax's names and defaults, where None and 0 are the same."""
    theirs, ours = both(name)
    assert next(iter(ours)) == "lr"
    betas = [p for p in theirs if re.fullmatch(r"b\d", p.name) and p.name not in ours]
    assert not betas or ours["betas"].default == tuple(p.default for p in betas)
    for p in theirs:
        if p in betas or (name, p.name) in HAS_NO:
            continue
        own = ours[RENAMED.get(p.name, p.name)]
        if p.default is not p.empty and p.name not in RENAMED and (name, p.name) not in OTHER_NUMBER:
            assert plain(own.default or 0) == plain(p.default or 0), p.name


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
