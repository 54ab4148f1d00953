"""The training loops that people write: each learns, none grows a graph, and a step can be differentiated and batched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, vmap

import optfn


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def regression() -> tuple[torch.nn.Module, Tensor, Tensor]:
    """A small network and a target it can learn."""
    x = torch.linspace(-1, 1, 32)[:, None]
    return torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)), x, x.square() - 0.5


def mse(prediction: Tensor, y: Tensor) -> Tensor:
    return (prediction - y).square().mean()


def functional_loop(model: torch.nn.Module, x: Tensor, y: Tensor, tx: Any, steps: int, seen: Callable[..., None]) -> float:
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = tx.init(params)
    for _ in range(steps):
        grads, loss = grad_and_value(lambda params: mse(functional_call(model, params, (x,)), y))(params)
        updates, state = tx.update(grads, state, params)
        params = optfn.apply_updates(params, updates)
        seen(loss, params, state, updates)
    optfn.interop.write_to_module(model, params)
    return mse(model(x), y).item()


def backward_loop(model: torch.nn.Module, x: Tensor, y: Tensor, tx: Any, steps: int, seen: Callable[..., None]) -> float:
    params = dict(model.named_parameters())
    state = tx.init(params)
    for _ in range(steps):
        model.zero_grad()
        loss = mse(model(x), y)
        loss.backward()
        with torch.no_grad():
            updates, state = tx.update({name: p.grad for name, p in params.items()}, state, params)
            optfn.interop.write_to_module(model, optfn.apply_updates(params, updates))
        seen(loss, params, state, updates)
    return mse(model(x), y).item()


def compiled_backward_loop(model: torch.nn.Module, x: Tensor, y: Tensor, tx: Any, steps: int, seen: Callable[..., None]) -> float:
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optfn.apply_updates(params, updates), state

    step = optfn.compile(step, donate=("params", "state"), backend="aot_eager")
    params = dict(model.named_parameters())
    state = tx.init(params)
    for _ in range(steps):
        model.zero_grad()
        loss = mse(model(x), y)
        loss.backward()
        params, state = step(params, state, {name: p.grad for name, p in params.items()})
        seen(loss, params, state, None)
    assert all(p is params[name] for name, p in model.named_parameters())
    return mse(model(x), y).item()


def graph_size(x: Tensor) -> int:
    """The number of autograd nodes that a tensor keeps alive."""
    nodes = {x.grad_fn} - {None}
    todo = [*nodes]
    while todo:
        new = {node for node, _ in todo.pop().next_functions} - nodes - {None}
        nodes |= new
        todo += new
    return len(nodes)


LOOPS = {"functional": functional_loop, "backward": backward_loop, "compiled backward": compiled_backward_loop}


def torch_loop(model: torch.nn.Module, x: Tensor, y: Tensor, steps: int) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        mse(model(x), y).backward()
        optimizer.step()
    return mse(model(x), y).item()


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_learns_what_torch_learns_and_records_nothing(name: str) -> None:
    model, x, y = regression()
    twin, _, _ = regression()
    twin.load_state_dict(model.state_dict())
    start = mse(model(x), y).item()
    sizes: list[int] = []

    def seen(loss: Tensor, params: Any, state: Any, updates: Any) -> None:
        for part in (state, updates):
            assert not any(t.requires_grad or t.grad_fn is not None for t in optfn.tree.leaves(part))
        assert all(p.grad_fn is None for p in optfn.tree.leaves(params))
        sizes.append(graph_size(loss))

    end = LOOPS[name](model, x, y, optfn.adamw(lr=0.03), 100, seen)
    assert end < 0.02 * start
    assert end == pytest.approx(torch_loop(twin, x, y, 100), rel=1e-3)
    assert len({*sizes}) == 1, "the graph of the loss grows"


def test_outside_of_no_grad_the_steps_on_a_modules_parameters_are_recorded() -> None:
    """Why the loops above have no_grad or a donated step; and that the measure they are held to sees a graph that grows."""
    model, x, y = regression()
    params = dict(model.named_parameters())
    tx = optfn.adamw()
    state, sizes = tx.init(params), []
    for _ in range(3):
        loss = mse(functional_call(model, params, (x,)), y)
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()), retain_graph=True), strict=True))
        updates, state = tx.update(grads, state, params)
        params = optfn.apply_updates(params, updates)
        sizes.append(graph_size(loss))
    assert all(p.grad_fn is not None for p in params.values())
    assert sizes[0] < sizes[1] < sizes[2]


def meta_problem() -> tuple[torch.nn.Linear, Tensor, Tensor, Tensor, Tensor]:
    """A linear model and two tasks' data: everything about it has a closed form."""
    model = torch.nn.Linear(3, 1, bias=False).double()
    x, y, other_x, other_y = (torch.randn(6, n).double() for n in (3, 1, 3, 1))
    return model, x, y, other_x, other_y


def test_maml_on_a_modules_own_parameters_equals_the_closed_form_and_torch_func() -> None:
    model, x, y, other_x, other_y = meta_problem()
    lr, tx = 0.1, optfn.sgd(lr=0.1)

    params = dict(model.named_parameters())
    inner = mse(model(x), y)
    grads = dict(zip(params, torch.autograd.grad(inner, list(params.values()), create_graph=True), strict=True))
    updates, _ = tx.update(grads, tx.init(params), params)
    adapted = optfn.apply_updates(params, updates)
    mse(functional_call(model, adapted, (other_x,)), other_y).backward()

    def meta_loss(params: Any) -> Tensor:
        grads = grad(lambda params: mse(functional_call(model, params, (x,)), y))(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return mse(functional_call(model, optfn.apply_updates(params, updates), (other_x,)), other_y)

    functional = grad(meta_loss)({name: p.detach() for name, p in params.items()})["weight"]

    # w' = w - lr 2/n X'(Xw - y);  d/dw |Zw' - v|^2 / n = (I - lr 2/n X'X) 2/n Z'(Zw' - v)
    w, n = model.weight.detach().T, len(x)
    after = w - lr * 2 / n * x.T @ (x @ w - y)
    hessian = 2 / n * x.T @ x
    wanted = (torch.eye(3).double() - lr * hessian) @ (2 / n * other_x.T @ (other_x @ after - other_y))
    torch.testing.assert_close(model.weight.grad.T, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(functional.T, wanted, rtol=1e-12, atol=1e-12)


META = {
    "adam": lambda lr: optfn.adam(lr),
    "adamw": lambda lr: optfn.adamw(lr),
    "amsgrad": lambda lr: optfn.adam(lr, amsgrad=True),
    "momentum": lambda lr: optfn.sgd(lr, momentum=0.9, nesterov=True),
    "rmsprop": lambda lr: optfn.rmsprop(lr, momentum=0.9, centered=True),
    "adagrad": lambda lr: optfn.adagrad(lr),
    "clipped": lambda lr: optfn.chain(optfn.clip_by_global_norm(0.5), optfn.adam(lr)),
}


def after_three_steps(make: Callable[[Tensor], Any], lr: Tensor, params: Tensor, target: Tensor) -> Tensor:
    """The loss after three steps on a quadratic, as a function of the learning rate and of where it begins."""
    tx = make(lr)
    state = tx.init(params)
    curvature = torch.arange(1.0, len(target) + 1, dtype=target.dtype)
    for _ in range(3):
        updates, state = tx.update(curvature * (params - target), state, params)
        params = optfn.apply_updates(params, updates)
    return (curvature * (params - target).square()).sum()


@pytest.mark.parametrize("name", META)
def test_a_learning_rate_has_the_gradient_that_central_differences_give(name: str) -> None:
    start, target = torch.randn(4).double(), torch.randn(4).double()

    def loss(lr: Tensor) -> Tensor:
        return after_three_steps(META[name], lr, start, target)

    lr, h = torch.tensor(0.05).double(), 1e-5
    numeric = (loss(lr + h) - loss(lr - h)) / (2 * h)
    leaf = lr.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(leaf.grad, numeric, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(grad(loss)(lr), numeric, rtol=1e-7, atol=1e-8)
    assert abs(numeric) > 1e-3


@pytest.mark.parametrize("name", META)
def test_the_start_has_the_gradient_that_central_differences_give(name: str) -> None:
    start, target = torch.randn(4).double().requires_grad_(), torch.randn(4).double()
    lr = torch.tensor(0.05).double()
    assert torch.autograd.gradcheck(lambda p: after_three_steps(META[name], lr, p, target), start, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", META)
def test_gradients_through_a_step_are_finite_where_the_gradient_is_zero(name: str, dtype: torch.dtype) -> None:
    start = torch.randn(4, dtype=dtype)
    target = start.clone()
    target[2:] += 1
    for at in (target, start):  # two of the entries are zero; then all of them
        by_start, by_lr = grad(lambda p, lr, at=at: after_three_steps(META[name], lr, p, at), argnums=(0, 1))(
            start, torch.tensor(0.05, dtype=dtype)
        )
        assert by_start.isfinite().all()
        assert by_lr.isfinite()


def test_a_learning_rate_is_learned() -> None:
    """Descent on the gradient through three Adam steps finds a better rate than the one it began with."""
    start, target = torch.zeros(4).double(), torch.ones(4).double()
    outer = optfn.adam(lr=0.2)
    log_lr = torch.tensor(-4.0).double()
    state = outer.init(log_lr)
    losses = []
    for _ in range(60):
        slope, loss = grad_and_value(lambda v: after_three_steps(optfn.adam, v.exp(), start, target))(log_lr)
        updates, state = outer.update(slope, state, log_lr)
        log_lr = optfn.apply_updates(log_lr, updates)
        losses.append(loss.item())
    # From 0 to 1 in three steps of nearly lr each: the best rate is near 1/3.
    assert losses[-1] < 0.05 * losses[0]
    assert 0.2 < log_lr.exp().item() < 0.5


@pytest.mark.parametrize("name", META)
def test_a_batch_of_learning_rates_is_the_separate_runs(name: str) -> None:
    model, x, y = regression()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}

    def train(lr: Tensor) -> tuple[Any, Tensor]:
        tx = META[name](lr)
        p, state = params, tx.init(params)
        for _ in range(5):
            grads, loss = grad_and_value(lambda p: mse(functional_call(model, p, (x,)), y))(p)
            updates, state = tx.update(grads, state, p)
            p = optfn.apply_updates(p, updates)
        return p, loss

    rates = torch.tensor([0.0, 1e-3, 1e-2, 0.1])
    batched, losses = vmap(train)(rates)
    for i, lr in enumerate(rates):
        alone, loss = train(lr)
        torch.testing.assert_close(losses[i], loss, rtol=1e-4, atol=1e-5)
        for leaf in params:
            torch.testing.assert_close(batched[leaf][i], alone[leaf], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(batched[leaf][0], params[leaf]) for leaf in params), "a rate of 0 is exact"
