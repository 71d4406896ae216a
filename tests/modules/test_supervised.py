"""The base of all techniques that learn from labels: its loss, its logging, its optimizer, its schedule."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from lab import fit
from lab.batch import UNLABELLED, Labelled
from lab.datamodules.digits import Digits
from lab.errors import UserError
from lab.loggers.csv import CSV
from lab.modules.supervised import Supervised, Terms
from lab.networks.convnet import ConvNet
from lab.networks.mlp import MLP
from lab.objectives.classification import Classification


def module(kind: type[Supervised] = Supervised, **arguments: object) -> Supervised:
    seed_everything(0, verbose=False)
    network = MLP(num_classes=10, input_shape=(1, 8, 8), hidden=(32,))
    return kind(network=network, objective=Classification(num_classes=10), **arguments)


def trainer(**arguments: object) -> Trainer:
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(**{**settings, "enable_progress_bar": False, "accelerator": "cpu", **arguments})


def test_one_step_is_the_gradient_of_the_mean_cross_entropy() -> None:
    trained, by_hand = (module(optimizer=partial(SGD, lr=0.1)) for _ in range(2))
    data = Digits()
    trainer(max_steps=1, limit_val_batches=0).fit(trained, datamodule=data)
    inputs, targets = next(iter(data.train_dataloader()))
    F.cross_entropy(by_hand.network(inputs), targets).backward()
    for name, parameter in by_hand.network.named_parameters():
        torch.testing.assert_close(trained.network.get_parameter(name), parameter - 0.1 * parameter.grad)


def test_it_learns_past_a_linear_model() -> None:
    data = Digits()
    data.setup()
    linear = LogisticRegression(max_iter=5000).fit(data.train.inputs.flatten(1), data.train.targets)
    seed_everything(0, verbose=False)
    network = ConvNet(num_classes=10, in_channels=1, width=16)
    trained = Supervised(network, Classification(10), partial(Adam, lr=0.01), partial(OneCycleLR, max_lr=0.01))
    judge = trainer(max_epochs=15)
    judge.fit(trained, datamodule=data)
    accuracy = judge.test(trained, datamodule=data, verbose=False)[0]["test/accuracy"]
    baseline = linear.score(data.test.inputs.flatten(1), data.test.targets)
    assert accuracy > baseline


def test_withheld_labels_change_neither_loss_nor_metrics() -> None:
    data = Digits()
    data.setup()
    batch = data.test[:64]
    hidden = Labelled(batch.inputs, batch.targets.clone())
    hidden.targets[::2] = UNLABELLED
    own = module()
    expected = F.cross_entropy(own.network(batch.inputs[1::2]), batch.targets[1::2])
    torch.testing.assert_close(own.loss(hidden).loss, expected)


class _Parts(Supervised):
    """A loss of known parts: the number of the step."""

    def loss(self, batch: Labelled) -> Terms:
        step = torch.tensor(float(self.global_step))
        return Terms(super().loss(batch).loss, step=step)


def test_logged_terms_are_the_means_since_the_last_log(tmp_path: Path) -> None:
    own = module(_Parts)
    logger = CSV(save_dir=str(tmp_path))
    trainer(max_epochs=1, log_every_n_steps=8, logger=logger, limit_val_batches=0).fit(own, datamodule=Digits())
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/step")
    means = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    assert means == [3.5, 11.5, 17.5]  # of steps 0–7, 8–15, and 16–19, where the epoch ends


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_plain_pairs_of_tensors_are_batches_too() -> None:
    own = module()
    pairs = TensorDataset(torch.rand(12, 1, 8, 8), torch.arange(12) % 10)
    trainer(max_epochs=1).fit(own, DataLoader(pairs, batch_size=4))
    assert own.global_step == 3


def test_anything_else_is_no_batch_and_says_so() -> None:
    with pytest.raises(TypeError, match="inputs and targets was expected, got dict"):
        module().training_step({"image": torch.rand(1)}, 0)


@pytest.mark.parametrize(
    ("scheduler", "interval"),
    [
        (partial(OneCycleLR, max_lr=0.1), "step"),
        (CosineAnnealingLR, "step"),
        (partial(StepLR, step_size=1), "epoch"),
    ],
)
def test_schedules_over_the_training_move_at_every_step(scheduler: object, interval: str) -> None:
    own = module(optimizer=partial(SGD, lr=0.1), scheduler=scheduler)
    fitted = trainer(max_epochs=2)
    fitted.fit(own, datamodule=Digits())
    config = fitted.lr_scheduler_configs[0]
    assert config.interval == interval
    moves = config.scheduler._step_count - 1
    assert moves == (40 if interval == "step" else 2)


def test_a_schedule_ends_with_the_training() -> None:
    own = module(optimizer=partial(SGD, lr=0.1), scheduler=CosineAnnealingLR)
    fitted = trainer(max_epochs=3, limit_train_batches=5)
    fitted.fit(own, datamodule=Digits())
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_a_training_without_an_end_takes_the_schedules_that_need_none() -> None:
    endless = {"max_epochs": -1, "limit_train_batches": 5}
    stepped = trainer(**endless, callbacks=[EarlyStopping("val/accuracy", patience=0, mode="min")])
    stepped.fit(module(optimizer=partial(SGD, lr=0.1), scheduler=partial(StepLR, step_size=1)), datamodule=Digits())
    assert stepped.optimizers[0].param_groups[0]["lr"] < 0.1
    with pytest.raises(UserError, match=r"needs its end: say trainer\.max_epochs or trainer\.max_steps"):
        trainer(**endless).fit(module(optimizer=AdamW, scheduler=CosineAnnealingLR), datamodule=Digits())


def test_a_plateau_watches_the_modules_metric() -> None:
    own = module(optimizer=AdamW, scheduler=partial(ReduceLROnPlateau, patience=1))
    fitted = trainer(max_epochs=1)
    fitted.fit(own, datamodule=Digits())
    assert fitted.lr_scheduler_configs[0].monitor == "val/accuracy"


def test_frozen_parameters_are_not_optimized() -> None:
    own = module()
    own.network.requires_grad_(False)
    own.network.head.requires_grad_(True)
    fitted = trainer(max_steps=1)
    fitted.fit(own, datamodule=Digits())
    optimized = [p for group in fitted.optimizers[0].param_groups for p in group["params"]]
    assert len(optimized) == 2


def test_predictions_name_sample_target_and_probabilities() -> None:
    parts = trainer().predict(module(), datamodule=Digits(eval_batch_size=100))
    assert parts is not None
    assert list(parts[0]) == ["index", "target", "prediction", "probabilities"]
    assert sum(len(part["prediction"]) for part in parts) == 359
    probabilities: Tensor = parts[0]["probabilities"]
    torch.testing.assert_close(probabilities.sum(1), torch.ones(100))


EVERYTHING = """
seed: 0
data:
  name: digits
  batch_size: 64
  transforms:
  - {name: crop, padding: 1}
  - {name: mixup, alpha: 0.2}
  - {name: cutmix, alpha: 1.0}
module:
  name: supervised
  network: {name: convnet, width: 16}
  objective: {name: classification, label_smoothing: 0.1}
  optimizer: {name: adamw, lr: 0.02, weight_decay: 0.05}
  scheduler: {name: cosine, warmup_epochs: 2, warmup_lr: 1e-5, min_lr: 1e-5}
trainer: {max_epochs: 20, gradient_clip_val: 1.0, precision: bf16-mixed, accumulate_grad_batches: 2}
callbacks:
  ema: {decay: 0.99}
  channels_last: {}
  compile: {backend: aot_eager}
  learning_rate: {logging_interval: step}
"""


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step")
def test_all_of_a_modern_recipe_trains_together(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(EVERYTHING)
    run = fit(tmp_path / "recipe.yaml")
    assert run.results["stages"]["main"]["metrics"]["test/accuracy"] > 0.93
