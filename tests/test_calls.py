"""How calls of a compiled step are told apart, and which of them no program serves."""

import threading
import warnings
from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from interpreted import interpreted
from steps import step_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import optfn
from optfn.compile.closure import bindings, is_plain_class, same_number
from optfn.compile.structure import Structure, UnknownContainerError


@pytest.fixture(autouse=True)
def _interpreted():
    torch._dynamo.reset()
    with interpreted():
        yield


def programs(step: Any) -> int:
    return sum(call.program is not None for call in step._calls.calls)


# Structures


class Point(NamedTuple):
    x: Any
    y: Any


class Scaled(NamedTuple):
    x: Any

    def scaled(self) -> Any:
        return self.x * 2


DIFFERENT = [
    {"a": 1, "b": 2},
    {"b": 2, "a": 1},
    OrderedDict(a=1, b=2),
    defaultdict(None, a=1, b=2),
    defaultdict(list, a=1, b=2),
    {1: 1},
    {True: 1},
    {"1": 1},
    [1, 2],
    (1, 2),
    Point(1, 2),
    [1, [2]],
    [1, 2, None],
    [None, 1, 2],
    {},
    [],
    (),
    None,
    [{}],
    [()],
]


@pytest.mark.parametrize("i", range(len(DIFFERENT)))
def test_a_structure_fits_itself_alone(i: int) -> None:
    leaves: list[Any] = []
    structure = Structure(DIFFERENT[i], leaves)
    for j, other in enumerate(DIFFERENT):
        found = structure.match(other)
        if i == j:
            assert found == leaves
            new = structure.unflatten(leaves)
            assert type(new) is type(other)
            assert new == other
            assert not isinstance(other, dict) or list(new) == list(other)
        else:
            # A leaf's place may hold anything: leaves are looked at one by one.
            assert found is None or any(isinstance(x, list | tuple | dict | None) for x in found)


UNKNOWN = {
    "a set": {1, 2},
    "a tuple as a key": {(1,): 2},
    "a float as a key": {1.0: 2},
    "a subclass": type("D", (dict,), {})(a=1),
    "a function for defaults": defaultdict(lambda: 1),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_containers_are_not_known(name: str) -> None:
    with pytest.raises(UnknownContainerError):
        Structure([UNKNOWN[name]], [])


def test_classes_that_hold_more_than_fields_are_not_plain() -> None:
    assert is_plain_class(Point)
    assert not is_plain_class(Scaled)
    assert not is_plain_class(tuple)


NUMBERS = [0, 1, False, True, 0.0, -0.0, 1.0, float("nan"), float("inf"), 0j, -0j, complex(0.0, -0.0), 1 + 0j, 2**70]


def test_numbers_are_the_same_only_as_themselves() -> None:
    for i, a in enumerate(NUMBERS):
        for j, b in enumerate(NUMBERS):
            assert same_number(a, b) == (i == j or repr(a) == repr(b)), (a, b)


# Calls


def test_a_tensor_that_is_passed_twice_is_recorded_once() -> None:
    x, y = torch.ones(2), torch.full((2,), 3.0)
    step = optfn.compile(lambda p, a, b: p + a + 2 * b if a is not b else p + 10 * a, donate="p")
    for _ in range(3):
        assert step(torch.zeros(2), x, x).tolist() == [10.0, 10.0]
        assert step(torch.zeros(2), x, y).tolist() == [7.0, 7.0]
    assert programs(step) == len(step._calls.calls) == 2


def test_a_number_that_is_bound_anew_at_each_call_is_compiled_a_few_times_and_warned_of_once() -> None:
    k = 0.5
    step = optfn.compile(lambda p: p * k, donate="p")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(20):
            k = i + 0.5
            assert step(torch.ones(2)).tolist() == [k, k]
    assert programs(step) == 4
    assert [w.category for w in caught if "Pass it as an argument" in str(w.message)] == [UserWarning]


def test_values_that_come_back_find_their_programs() -> None:
    k = 2.0
    step = optfn.compile(lambda p: p * k, donate="p")
    for k in (2.0, 3.0, 2.0, 3.0, 2.0):
        assert step(torch.ones(2)).tolist() == [k, k]
    assert programs(step) == 2


def test_a_call_holds_no_tensor_of_the_call_before() -> None:
    import gc
    import weakref

    step = optfn.compile(lambda p, g: p - g, donate="p")
    g = torch.ones(2)
    gc.disable()  # what only the collector would free is held too
    try:
        step(torch.ones(2), g)
        alive = weakref.ref(g)
        del g
        assert alive() is None
    finally:
        gc.enable()


def test_tensors_that_are_negative_or_conjugate_in_name_only() -> None:
    z = torch.tensor([1 + 2j, 3 - 1j])
    step = optfn.compile(lambda p, g: p + 2 * g, donate="p")
    p = torch.zeros(2)
    assert step(p, z.conj().imag) is p
    assert p.tolist() == [-4.0, 2.0]
    base = z.clone()
    donated = base.conj().imag
    assert step(donated, torch.ones(2)) is donated
    assert donated.tolist() == [0.0, 3.0]
    assert base.imag.tolist() == [0.0, -3.0]
    c = optfn.compile(lambda p, g: p + 1j * g, donate="p")
    assert c(torch.zeros(2, dtype=z.dtype), z.conj()).tolist() == (1j * z.conj()).tolist()


def test_a_step_that_asks_whether_a_tensor_is_negated_runs_as_it_is() -> None:
    step = optfn.compile(lambda p, g: p + (1.0 if g.is_neg() else 2.0), donate="p")
    z = torch.tensor([1 + 2j, 3 - 1j])
    assert step(torch.zeros(2), z.imag).tolist() == [2.0, 2.0]
    assert step(torch.zeros(2), z.conj().imag).tolist() == [1.0, 1.0]
    assert step(torch.zeros(2), z.imag).tolist() == [2.0, 2.0]


def test_meta_tensors() -> None:
    tx = optfn.adamw()
    params = {"w": torch.ones(3, 2, device="meta")}
    state = tx.init(params)
    step = optfn.compile(step_of(tx), donate=("params", "state"))
    new, _ = step(params, state, {"w": torch.ones(3, 2, device="meta")})
    assert new["w"] is params["w"]


class Doubling(TorchDispatchMode):
    """Every product is twice as large."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.mul.Tensor else result


def test_a_mode_that_changes_calls_is_obeyed() -> None:
    step = optfn.compile(lambda p: p * torch.full((), 3.0), donate="p")
    assert step(torch.ones(2)).tolist() == [3.0, 3.0]
    p = torch.ones(2)
    with Doubling():
        assert step(p) is p
    assert p.tolist() == [6.0, 6.0]
    assert step(torch.ones(2)).tolist() == [3.0, 3.0]


INSIDE = {
    "vmap": lambda step: torch.vmap(step)(torch.ones(3, 2)),
    "grad": lambda step: torch.func.grad(lambda p: step(p).sum())(torch.ones(2)),
    "a step that donates": lambda step: optfn.compile(lambda p: step(p) + 1, donate="p")(torch.ones(2)),
    "a step that does not": lambda step: optfn.compile(lambda p: step(p) + 1, backend="aot_eager")(torch.ones(2)),
    "torch.compile": lambda step: torch.compile(lambda p: step(p) + 1, backend="eager", fullgraph=True)(torch.ones(2)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_nothing_can_be_donated_inside_of(name: str) -> None:
    step = optfn.compile(lambda p: p * 2, donate="p")
    for _ in range(2):
        with pytest.raises(Exception, match=r"call the function that it was made of, step.__wrapped__"):
            INSIDE[name](step)
        assert step(torch.ones(2)).tolist() == [2.0, 2.0]
    assert torch.vmap(step.__wrapped__)(torch.ones(3, 2)).tolist() == [[2.0, 2.0]] * 3


def test_a_variable_that_is_deleted_is_the_functions_own_error() -> None:
    def make() -> Any:
        k = 2.0

        def step(p: Tensor) -> Tensor:
            return p * k

        def forget() -> None:
            nonlocal k
            del k

        return step, forget

    function, forget = make()
    step = optfn.compile(function, donate="p")
    assert step(torch.ones(2)).tolist() == [2.0, 2.0]
    forget()
    p = torch.ones(2)
    with pytest.raises(NameError, match="k"):
        step(p)
    assert p.tolist() == [1.0, 1.0]


def test_what_the_step_returns_is_made_anew() -> None:
    """A result that could be changed by who gets it is none that is kept."""
    step = optfn.compile(lambda p: (p + 1, [1, 2], {"a": 3}), donate="p")
    first = step(torch.ones(2))[1]
    first.append(9)
    assert step(torch.ones(2))[1:] == ([1, 2], {"a": 3})


def test_a_container_that_the_step_changes_is_as_when_it_runs_by_itself() -> None:
    def step(p: dict[str, Tensor]) -> dict[str, Tensor]:
        p["b"] = p["a"] * 2
        return p

    eager, given = {"a": torch.ones(2)}, {"a": torch.ones(2)}
    step(eager)
    try:
        optfn.compile(step, donate="p")(given)
    except Exception:  # an error is as good, with nothing changed
        assert list(given) == ["a"]
    else:
        assert list(given) == list(eager)


def test_several_threads_call_one_step() -> None:
    tx = optfn.chain(optfn.clip_by_global_norm(1.0), optfn.adamw(0.1))
    eager = step_of(tx)
    step = optfn.compile(eager, donate=("params", "state"))
    wrong: list[str] = []

    def run(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        params = {"w": torch.randn(4, generator=generator), "b": torch.randn(2, generator=generator)}
        state = tx.init(params)
        wanted = optfn.tree.map(torch.clone, (params, state))
        with torch.no_grad():
            for _ in range(20):
                grads = {name: torch.randn(p.shape, generator=generator) for name, p in params.items()}
                wanted = eager(*wanted, grads)
                step(params, state, grads)
                for x, y in zip(optfn.tree.leaves((params, state)), optfn.tree.leaves(wanted), strict=True):
                    if not torch.allclose(x, y, rtol=1e-5, atol=1e-6):
                        wrong.append(f"{seed}: {x} {y}")

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert programs(step) == 1


SWALLOWED = {
    "item": lambda p, x: float(x),
    "a branch": lambda p, x: 2.0 if x > 0 else 3.0,
    "random": lambda p, x: torch.rand(()) * 0 + 3.0,
    "an attribute": lambda p, x: p.rate,
    "an attribute of its own": lambda p, x: p._rate,
}


@pytest.mark.parametrize("name", SWALLOWED)
def test_a_refusal_that_the_step_swallows_is_kept(name: str) -> None:
    read = SWALLOWED[name]

    def step(p: Tensor, x: Tensor) -> Tensor:
        try:
            factor = read(p, x)
        except:  # noqa: E722
            factor = 0.1
        return p * factor

    for value in (3.0, -1.0):
        p = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        p.rate = p._rate = value
        x = torch.tensor(value)
        expected = step(p, x)
        try:
            assert torch.equal(optfn.compile(step, donate="p")(p, x), expected)
        except torch._dynamo.exc.Unsupported:
            assert name == "a branch"
            assert p.tolist() == [1.0, 1.0]


def test_donated_tensors_that_overlap_what_the_step_finds_elsewhere() -> None:
    base, held = torch.arange(4.0), [torch.ones(4)]
    r = base[1:3]
    step = optfn.compile(lambda p: p + r, donate="p")
    for at in (0, 2):
        expected = base[at : at + 2] + r
        assert torch.equal(step(base[at : at + 2]), expected)
    reverse = optfn.compile(lambda p: p + held[0].flip(0), donate="p")
    reverse(torch.arange(4.0))
    p = torch.arange(4.0)
    held[0] = p[:]
    assert reverse(p).tolist() == [3.0] * 4


def test_arguments_by_name_stay_by_name() -> None:
    def step(*args: Tensor, **kwargs: Tensor) -> Tensor:
        return args[0] * (1 + len(kwargs)) * len(names)

    names = ["one"]

    def declared(p: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    step.__wrapped__ = declared
    p, x = torch.ones(2), torch.ones(2)
    assert optfn.compile(step, donate="p")(p, x=x).tolist() == [2.0, 2.0]


def test_another_threads_compile_is_none_of_ours() -> None:
    step = optfn.compile(lambda p: p + 1, donate="p")
    step(torch.ones(2))
    other = threading.Thread(target=lambda: torch.compile(lambda x: x.sin() + 1, backend="aot_eager")(torch.ones(3)))
    other.start()
    p = torch.zeros(2)
    calls = 0
    while other.is_alive() or not calls:
        step(p)
        calls += 1
    other.join()
    assert p.tolist() == [calls, calls]


def test_a_device_among_the_arguments_is_recorded_once() -> None:
    step = optfn.compile(lambda p, device: p + torch.ones(2, device=device), donate="p")
    for _ in range(3):
        assert step(torch.ones(2), torch.device("cpu")).tolist() == [2.0, 2.0]
    assert len(step._calls.calls) == 1


# Who is left to Dynamo


TRACED = {
    "a gradient": lambda p: p - torch.func.grad(lambda q: q.square().sum())(p),
    "a gradient of a batch": lambda p: p - torch.vmap(torch.func.grad(lambda q: q.sin().sum()))(p),
    "a pooling's gradient": lambda p: p - torch.func.grad(lambda q: torch.max_pool2d(q[None], 2).sum())(p),
    "a Hessian": lambda p: p + torch.func.hessian(lambda q: q.pow(3).sum())(p).sum(),
    "a softmax's": lambda p: p - torch.func.grad(lambda q: torch.nn.functional.cross_entropy(q[0], q[0].detach()))(p),
    "without a gradient": lambda p: p * 2 if not torch.is_grad_enabled() else p,
}


@pytest.mark.parametrize("name", TRACED)
def test_functional_transforms_in_a_step_are_traced(name: str) -> None:
    p = torch.arange(16.0).reshape(1, 4, 4) / 16
    with torch.no_grad():
        expected = TRACED[name](p)
    step = optfn.compile(TRACED[name], donate="p")
    assert step(p) is p
    torch.testing.assert_close(p, expected)
    assert programs(step) == 1


def test_what_is_known_and_what_is_not() -> None:
    tx, rate, names = optfn.adamw(), 0.1, ["w"]

    def known(p: Tensor) -> Tensor:
        return optfn.apply_updates(p, tx.update(p, tx.init(p), p)[0]) * rate

    assert bindings(known) is not None
    assert bindings(lambda p: known(p) * len(names)) is None
    assert bindings(lambda p: p * torch.nn.functional.softmax(p, 0)) is not None

    def annotated(p: Tensor) -> Tensor:
        def inner(x: Any, y: list[int] | None = None, z: tuple[Any, ...] = ()) -> Any:
            return x

        return inner(p)

    assert bindings(annotated) is not None
    assert bindings(lambda p: p * torch.rand(())) is not None  # the trace refuses it
    assert bindings(lambda p: p if threading.active_count() else -p) is None
    assert bindings(Doubling) is None
