"""TorchOptimizer in the loops of Lightning and of Hugging Face Accelerate, beside the real torch.optim.AdamW."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import optfn
from optfn.interop import TorchOptimizer

pytestmark = pytest.mark.slow
REASON = "needs the extra `trainers`: pip install optfn[trainers]"

Make = Callable[[Any], torch.optim.Optimizer]
OURS: Make = lambda params: TorchOptimizer(params, optfn.adamw, lr=0.05)  # noqa: E731
THEIRS: Make = lambda params: torch.optim.AdamW(params, lr=0.05)  # noqa: E731


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()


def batches() -> DataLoader[Any]:
    x = torch.randn(48, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.square().sum(1, keepdim=True)), batch_size=8)


def loss_of(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def alike(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def start_loss() -> float:
    return sum(loss_of(network(), x, y).item() for x, y in batches()) / 6


def end_loss(model: torch.nn.Module) -> float:
    return sum(loss_of(model, x, y).item() for x, y in batches()) / 6


# Lightning


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning", reason=REASON)


def lightning_module(lightning: Any, make: Make, scheduler: str = "onecycle", manual: bool = False) -> Any:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.automatic_optimization = not manual
            self.rates: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            loss = loss_of(self.net, *batch)
            self.rates.append(self.optimizers().param_groups[0]["lr"])
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.lr_schedulers().step()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = make(self.parameters())
            if scheduler == "plateau":
                plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0.9)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}
            rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=40)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    return Module()


def fit(lightning: Any, module: Any, root: Path, epochs: int, ckpt: Any = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(module, batches(), ckpt_path=ckpt)
    return trainer


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 2}, {"scheduler": "plateau"}, {"manual": True}],
    ids=["", "clipped", "accumulated", "plateau", "manual"],
)
def test_lightning_trains_as_with_torch(lightning: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    of_module = {k: v for k, v in options.items() if k in ("scheduler", "manual")}
    of_trainer = {k: v for k, v in options.items() if k not in of_module}
    ours, theirs = (lightning_module(lightning, make, **of_module) for make in (OURS, THEIRS))
    for module in (ours, theirs):
        fit(lightning, module, tmp_path, 4, **of_trainer)
    alike(ours.net, theirs.net)
    assert ours.rates == theirs.rates
    assert len({*ours.rates}) > 1, "the scheduler did nothing"
    assert end_loss(ours.net) < 0.8 * start_loss()


def test_lightning_resumes_from_its_checkpoint(lightning: Any, tmp_path: Path) -> None:
    whole, first, second, real = (lightning_module(lightning, make) for make in (OURS, OURS, OURS, THEIRS))
    fit(lightning, whole, tmp_path, 5)
    fit(lightning, real, tmp_path, 5)
    trainer = fit(lightning, first, tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert trainer.optimizers[0].states[0].count == 12
    resumed = fit(lightning, second, tmp_path, 5, ckpt=tmp_path / "two.ckpt", enable_checkpointing=True)
    for (name, p), q in zip(second.net.state_dict().items(), whole.net.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    assert resumed.optimizers[0].states[0].count == 30
    assert second.rates == whole.rates[12:]
    alike(whole.net, real.net)


# Accelerate


@pytest.fixture
def accelerate() -> Iterator[Any]:
    module = pytest.importorskip("accelerate", reason=REASON)
    yield module
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def rounds(accelerator: Any, model: Any, optimizer: Any, data: Any, scheduler: Any, epochs: int, clip: bool = False) -> list[float]:
    rates = []
    for _ in range(epochs):
        for x, y in data:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                accelerator.backward(loss_of(model, x, y))
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
    return rates


def prepared(accelerate: Any, make: Make, **options: Any) -> Any:
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = network()
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    return accelerator, *accelerator.prepare(model, optimizer, batches(), scheduler)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulated"])
@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
def test_accelerate_trains_as_with_torch(accelerate: Any, options: dict[str, Any], clip: bool) -> None:
    ours, theirs = (prepared(accelerate, make, **options) for make in (OURS, THEIRS))
    rates = [rounds(*side, epochs=4, clip=clip) for side in (ours, theirs)]
    assert rates[0] == rates[1]
    assert len({*rates[0]}) > 1, "the scheduler did nothing"
    alike(ours[1], theirs[1])
    assert end_loss(ours[1]) < 0.8 * start_loss()


def test_accelerate_resumes_from_its_checkpoint(accelerate: Any, tmp_path: Path) -> None:
    accelerator, model, optimizer, data, scheduler = prepared(accelerate, OURS)
    rounds(accelerator, model, optimizer, data, scheduler, 2)
    accelerator.save_state(tmp_path / "two")
    rates = rounds(accelerator, model, optimizer, data, scheduler, 2)
    end = copy.deepcopy(model.state_dict())

    accelerator.free_memory()
    again = prepared(accelerate, OURS)
    again[0].load_state(tmp_path / "two")
    assert again[2].optimizer.states[0].count == 12
    assert rounds(*again, epochs=2) == rates
    for name, p in again[1].state_dict().items():
        assert torch.equal(p, end[name]), name
