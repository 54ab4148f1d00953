"""Fixed cases of the fuzzer, what its judgement of rounding lets pass and what not, and that it draws everything public."""

import inspect
import typing
from dataclasses import replace

import fuzz
import pytest
import torch
from fuzz import Case, Draw, Envelope, Leaf, Link
from torch import Tensor

import optfn


@pytest.mark.codegen
@pytest.mark.parametrize("seed", range(40))
def test_a_chain_compiled_is_the_chain(seed: int, pytestconfig: pytest.Config) -> None:
    """Code is generated for the first ``--generated`` of them; the regions of the others are run node by node."""
    fuzz.check(fuzz.draw(seed, small=True), quick=seed >= pytestconfig.getoption("--generated"))


def test_everything_public_is_drawn() -> None:
    def returning(kind: str) -> set[str]:
        functions = {name: f for name in optfn.__all__ if inspect.isfunction(f := getattr(optfn, name))}
        return {name for name, f in functions.items() if kind in str(typing.get_type_hints(f).get("return"))}

    assert returning("GradientTransformation") == fuzz.LINKS.keys()
    schedules = {
        name for name in optfn.__all__ if name.endswith(("_schedule", "_lr", "_scheduler", "schedules", "_decay", "_restarts"))
    }
    assert schedules - fuzz.LINKS.keys() == fuzz.SCHEDULES.keys()
    assert all(str(Link(draw(Draw(seed)))) for draw in fuzz.SCHEDULES.values() for seed in range(3))


def envelope(f: typing.Callable[..., Tensor], *given: Tensor) -> tuple[Envelope, Tensor]:
    return Envelope(lambda: [f(*given)]), f(*given)


def test_rounding_passes_and_more_does_not() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(1000), torch.randn(1000)
    near, wanted = envelope(lambda x, y: (x * 3 - y) / 7, x, y)
    assert near.near(0, torch.addcmul(-y, x, torch.tensor(3.0)) / 7, wanted)
    assert not near.near(0, wanted * (1 + 1e-5), wanted)
    assert not near.near(0, wanted.double().add(1e-6).float(), wanted)


def test_a_sign_may_flip_only_where_it_is_undecided() -> None:
    x, y = torch.tensor([1.0, 1.0]), torch.tensor([0.3 + 0.6 + 0.1, 1.001])
    near, wanted = envelope(lambda x, y: torch.sign(x / 3 - y / 3), x, y)
    assert near.near(0, torch.tensor([1.0, -1.0]), wanted)
    assert near.near(0, torch.tensor([-1.0, -1.0]), wanted)
    assert not near.near(0, torch.tensor([1.0, 1.0]), wanted)


def test_a_failing_case_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a step that is wrong wherever it clips, all but the clipping goes."""

    def check(case: Case, quick: bool = False) -> None:
        assert not any("clip(" in str(link) for link in case.links)

    monkeypatch.setattr(fuzz, "check", check)
    clip = Link("optfn.maximize({0})", (Link("optfn.clip(0.5)"),))
    case = Case(0, (Link("optfn.adam()"), clip), (Leaf((4, 4), "float64", "transposed"), Leaf((3,))), absent=((0,), (), ()))
    smallest = fuzz.shrunk(case, quick=True)
    assert smallest == replace(Case(0, (Link("optfn.clip(0.5)"),), (Leaf((), "float32"),)), tree="bare", absent=((),))
    namespace: dict[str, object] = {}
    with pytest.raises(AssertionError):
        exec(str(smallest), namespace)
