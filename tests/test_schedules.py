"""Schedules with a warm-up, against timm's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from timm.scheduler import CosineLRScheduler
from torch.optim import SGD

from lab.datamodules.digits import Digits
from lab.modules.supervised import Supervised
from lab.networks.mlp import MLP
from lab.objectives.classification import Classification
from lab.schedules import Cosine, InverseDecay, WarmUpLinear


def optimizer() -> SGD:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.4, 0.1)]
    return SGD(groups, lr=0.4)


def rates(schedule: Cosine | WarmUpLinear | InverseDecay, steps: int) -> list[list[float]]:
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return seen


def test_the_cosine_is_timms_with_a_warm_up_before_it() -> None:
    peer = optimizer()
    reference = CosineLRScheduler(
        peer, t_initial=100, lr_min=0.01, warmup_t=20, warmup_lr_init=0.001, warmup_prefix=True, t_in_epochs=False
    )
    expected = []
    for step in range(120):
        reference.step_update(step)
        expected.append([group["lr"] for group in peer.param_groups])
    ours = Cosine(optimizer(), 120, 10, warmup_epochs=2, warmup_lr=0.001, min_lr=0.01)
    torch.testing.assert_close(torch.tensor(rates(ours, 120)), torch.tensor(expected))


def test_the_line_falls_evenly_to_its_end() -> None:
    seen = torch.tensor(rates(WarmUpLinear(optimizer(), 11, 1, min_lr=0.05), 14))
    torch.testing.assert_close(seen[:11, 0], torch.linspace(0.4, 0.4 - 0.35 * 10 / 11, 11))
    assert torch.equal(seen[12:], torch.full((2, 2), 0.05))


def test_the_inverse_decay_is_that_of_its_equation_for_every_group() -> None:
    seen = rates(InverseDecay(optimizer(), 40), 40)
    for step, (first, second) in enumerate(seen):
        left = 1 / (1 + 10 * step / 40) ** 0.75
        assert (first, second) == pytest.approx((0.4 * left, 0.1 * left), rel=1e-12)
    assert rates(InverseDecay(optimizer(), 10, alpha=1, beta=2), 11)[10][0] == pytest.approx(0.1)


def test_a_schedule_goes_on_from_its_saved_state() -> None:
    whole = rates(Cosine(optimizer(), 50, 10, warmup_epochs=1), 50)
    first = Cosine(optimizer(), 50, 10, warmup_epochs=1)
    rates(first, 17)
    second = Cosine(optimizer(), 50, 10, warmup_epochs=1)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    torch.testing.assert_close(torch.tensor(rates(second, 33)), torch.tensor(whole[17:]))


def test_a_training_shorter_than_its_warm_up_ends_within_it() -> None:
    seen = torch.tensor(rates(Cosine(optimizer(), 20, 10, warmup_epochs=5), 20))
    torch.testing.assert_close(seen[:, 0], 0.4 * torch.arange(20) / 50)


@pytest.mark.parametrize(("accumulate", "warm_up"), [(1, 15), (2, 8)])
def test_steps_come_from_the_trainer(accumulate: int, warm_up: int) -> None:
    network = MLP(num_classes=10, input_shape=(1, 8, 8))
    schedule = partial(Cosine, warmup_epochs=1.5)
    module = Supervised(network, Classification(10), partial(SGD, lr=0.1), schedule)
    trainer = Trainer(
        max_epochs=3, accumulate_grad_batches=accumulate, limit_val_batches=0, logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Digits(batch_size=128))  # 10 batches an epoch
    found = trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(found, Cosine)
    assert (found.total_steps, found.warmup_steps) == (30 // accumulate, warm_up)
    assert found.get_last_lr()[0] < 1e-6
