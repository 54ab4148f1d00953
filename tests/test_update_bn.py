"""``interop.update_bn`` against ``torch.optim.swa_utils.update_bn``."""

import copy

import pytest
import torch
from torch import nn

import optfn
from optfn.interop import update_bn


class Net(nn.Module):
    """Layers with statistics at several places, one twice, among them ones that are left alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False)
        )
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.register_buffer("shift", torch.tensor(0.25))

    def forward(self, x):
        x = self.untracked(self.instance(self.body(x))).mean((2, 3)) + self.shift
        return self.norm(self.tied(self.norm(self.head(x))))


def problem(seed=0):
    torch.manual_seed(seed)
    model = Net().double()
    batches = [torch.randn(size, 2, 7, 7, dtype=torch.float64) + i for i, size in enumerate((5, 3, 4))]
    for x in batches:
        model(x)  # statistics that are not the initial ones
    return model, batches


def snapshot(model):
    return {name: (x.clone(), x._version) for name, x in model.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", ["parameters", "parameters and buffers", "nothing"])
def test_update_bn_is_torch(given, training):
    model, batches = problem()
    model.train(training)
    params = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}
    buffers = {"shift": torch.tensor(-1.0, dtype=torch.float64), "instance.running_mean": torch.ones(4, dtype=torch.float64)}
    given_params = None if given == "nothing" else params
    given_buffers = buffers if given == "parameters and buffers" else None
    expected = copy.deepcopy(model)
    expected.load_state_dict({**(given_params or {}), **(given_buffers or {})}, strict=False)
    torch.optim.swa_utils.update_bn(batches, expected)

    before = snapshot(model), {name: (x.clone(), x._version) for name, x in {**params, **buffers}.items()}
    modes = [(m.training, getattr(m, "momentum", None)) for m in model.modules()]
    found = update_bn(batches, model, given_params, given_buffers)
    assert found.keys() == dict(expected.named_buffers()).keys()
    for name, x in expected.named_buffers():
        assert torch.equal(found[name], x), name
    assert not torch.equal(found["norm.running_mean"], model.norm.running_mean)

    after = snapshot(model), {name: (x, x._version) for name, x in {**params, **buffers}.items()}
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(old[name][0], x) and old[name][1] == version for name, (x, version) in new.items())
    assert modes == [(m.training, getattr(m, "momentum", None)) for m in model.modules()]
    own = {x.data_ptr() for x in model.state_dict().values()} | {x.data_ptr() for x in buffers.values()}
    assert not own & {x.data_ptr() for x in found.values()}


def test_the_average_of_a_training_run():
    """A functional loop with an average, and torch's with AveragedModel: the same predictions in the end."""
    model, batches = problem()
    twin = copy.deepcopy(model)
    averaged = torch.optim.swa_utils.AveragedModel(twin)
    opt = torch.optim.SGD(twin.parameters(), lr=0.05)
    for x in batches:
        opt.zero_grad()
        twin(x)[:, 0].square().sum().backward()
        opt.step()
        averaged.update_parameters(twin)
    torch.optim.swa_utils.update_bn(batches, averaged)

    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    tx = optfn.chain(optfn.sgd(lr=0.05), optfn.ema_params(None))
    state = tx.init(params)
    for x in batches:
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
        loss = torch.func.functional_call(model, (params, buffers), x)[:, 0].square().sum()
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        with torch.no_grad():
            updates, state = tx.update(grads, state, params)
            params = optfn.apply_updates(params, updates)
    average = optfn.tree.get(state, "average")
    buffers = update_bn(batches, model, average, buffers)
    found = torch.func.functional_call(model.eval(), (average, buffers), batches[0])
    torch.testing.assert_close(found, averaged.eval()(batches[0]), rtol=0, atol=1e-12)


def test_batches_may_come_with_labels():
    model, batches = problem()
    bare = update_bn(batches, model)
    for pair in (tuple, list):
        found = update_bn((pair((x, torch.zeros(1))) for x in batches), model)
        assert all(torch.equal(found[name], x) for name, x in bare.items())


def test_without_batch_norm_nothing_is_run():
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("kept", torch.ones(1))
    found = update_bn(["no tensor"], model)
    assert torch.equal(found["kept"], model.kept)
    assert found["kept"] is not model.kept


def test_errors():
    model, batches = problem()
    with pytest.raises(KeyError, match=r"the module has no parameter 'norm.running_mean'; it has body.0.weight, "):
        update_bn(batches, model, {"norm.running_mean": torch.zeros(4)})
    with pytest.raises(KeyError, match=r"the module has no buffer 'body.0.weight'; it has shift, "):
        update_bn(batches, model, None, {"body.0.weight": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"'head.bias' must have shape \(4,\), got \(3,\)"):
        update_bn(batches, model, {"head.bias": torch.zeros(3)})
