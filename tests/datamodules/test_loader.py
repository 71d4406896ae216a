from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy

from lab.batch import Labelled
from lab.datamodules.digits import Digits
from lab.datamodules.loader import Batches
from lab.networks.mlp import MLP

# Lightning 2.6's CombinedLoader builds what torch 2.15 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


def numbered(count: int) -> Labelled:
    return Labelled(torch.arange(float(count)).unsqueeze(1), torch.arange(count) % 3)


def indices(loader: Batches) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def test_an_epoch_serves_every_sample_once_with_its_own_target_and_index() -> None:
    batches = list(Batches(numbered(23), 5, shuffle=True))
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(23))
    for batch in batches:
        assert torch.equal(batch.inputs.squeeze(1).long(), batch.index)
        assert torch.equal(batch.targets, batch.index % 3)


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        loader = Batches(numbered(50), 7, shuffle=True, seed=seed)
        loader.set_epoch(epoch)
        return flat(indices(loader))

    before = torch.random.get_rng_state()
    first = order(0, 1)
    torch.manual_seed(99)
    assert order(0, 1) == first
    torch.random.set_rng_state(before)
    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


def test_serving_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    indices(Batches(numbered(50), 7, shuffle=True))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_set_epoch_each_pass_is_the_next_epoch() -> None:
    loader = Batches(numbered(20), 6, shuffle=True)
    passes = [indices(loader) for _ in range(3)]
    for epoch, seen in enumerate(passes):
        loader.set_epoch(epoch)
        assert indices(loader) == seen


def test_an_iterator_made_before_set_epoch_serves_the_epoch_that_was_set() -> None:
    early, late = Batches(numbered(20), 6, shuffle=True), Batches(numbered(20), 6, shuffle=True)
    iterator = iter(early)
    early.set_epoch(3)
    late.set_epoch(3)
    assert [batch.index.tolist() for batch in iterator] == indices(late)


@pytest.mark.parametrize("stopped_after", range(9))
def test_a_new_loader_with_a_loaded_state_serves_exactly_what_remains(stopped_after: int) -> None:
    whole = Batches(numbered(20), 6, shuffle=True, seed=5)
    expected = flat([flat(indices(whole)) for _ in range(3)])

    stopped = Batches(numbered(20), 6, shuffle=True, seed=5)
    seen: list[int] = []
    batches = (batch for _ in range(3) for batch in stopped)
    for _ in range(stopped_after):
        seen += next(batches).index.tolist()
    resumed = Batches(numbered(20), 6, shuffle=True, seed=5)
    resumed.load_state_dict(stopped.state_dict())
    while len(seen) < len(expected):
        seen += flat(indices(resumed))
    assert seen == expected


def test_the_state_after_an_epochs_last_batch_is_the_next_epochs_start() -> None:
    loader = Batches(numbered(20), 6, shuffle=True)
    iterator = iter(loader)
    for _ in range(len(loader)):  # as Lightning does, which never asks past the last one
        next(iterator)
    assert loader.state_dict() == {"epoch": 1, "batch": 0}


def test_a_loaded_position_stands_when_its_own_epoch_is_set_and_falls_when_another_is() -> None:
    loader = Batches(numbered(20), 6, shuffle=True)
    loader.set_epoch(2)
    whole = indices(loader)
    loader.load_state_dict({"epoch": 2, "batch": 3})
    loader.set_epoch(2)
    assert indices(loader) == whole[3:]
    loader.load_state_dict({"epoch": 1, "batch": 3})
    loader.set_epoch(2)
    assert indices(loader) == whole


def test_an_iteration_given_up_halfway_is_followed_by_a_whole_one() -> None:
    loader = Batches(numbered(20), 6, shuffle=True)
    whole = indices(loader)
    loader.load_state_dict({"epoch": 0, "batch": 1})
    assert next(iter(loader)).index.tolist() == whole[1]
    assert indices(loader) == whole


def test_a_position_beyond_the_epoch_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"batch 4, an epoch has 4"):
        Batches(numbered(20), 6).load_state_dict({"epoch": 0, "batch": 4})


@settings(deadline=None, max_examples=200)
@given(
    count=st.integers(1, 60),
    share=st.integers(1, 6),
    ranks=st.integers(1, 4),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_processes_together_see_what_one_process_with_their_global_batch_sees(
    count: int, share: int, ranks: int, shuffle: bool, drop_last: bool
) -> None:
    if count < (share * ranks if drop_last else ranks):
        with pytest.raises(ValueError, match=f"{count} samples make no batch"):
            Batches(numbered(count), share, world_size=ranks, drop_last=drop_last)
        return
    options: dict[str, Any] = {"shuffle": shuffle, "seed": 1, "drop_last": drop_last}
    alone = indices(Batches(numbered(count), share * ranks, **options))
    each = [indices(Batches(numbered(count), share, rank=rank, world_size=ranks, **options)) for rank in range(ranks)]
    assert len({len(batches) for batches in each}) == 1, "a process would wait for the others for ever"
    together = [flat(list(parts)) for parts in zip(*each, strict=True)]
    assert flat(together) == flat(alone)
    assert all(batch for batches in each for batch in batches), "an empty batch has no mean"
    full = count // (share * ranks)
    assert together[: full - 1] == alone[: full - 1]
    for parts in zip(*each, strict=True):
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_samples_than_there_are_come_in_rounds_each_in_a_new_order() -> None:
    loader = Batches(numbered(20), 6, shuffle=True, among=torch.tensor([1, 3, 5, 7, 9]), length=20)
    batches = indices(loader)
    assert [len(batch) for batch in batches] == [6, 6, 6, 2]
    served = flat(batches)
    rounds = [served[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(one) == [1, 3, 5, 7, 9] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


def test_what_a_layer_does_in_place_leaves_the_data_as_they_are() -> None:
    for shuffle in (False, True):
        samples = numbered(10)
        for batch in Batches(samples, 4, shuffle=shuffle):
            batch.inputs.mul_(0)
            batch.targets.fill_(7)
        assert torch.equal(samples.inputs, numbered(10).inputs)
        assert torch.equal(samples.targets, numbered(10).targets)


class Seen(Callback):
    """What was trained on, in order; and one checkpoint, from a hook of the caller's choice."""

    def __init__(self, hook: str = "", step: int = 0, path: Path | None = None) -> None:
        self.batches: list[list[int]] = []
        self.hook, self.step, self.path = hook, step, path

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Labelled, batch_idx: int) -> None:
        self.batches.append(batch.index.tolist())

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save("on_train_batch_end", trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save("on_validation_end", trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save("on_train_epoch_end", trainer)

    def _save(self, hook: str, trainer: Trainer) -> None:
        if hook == self.hook and trainer.global_step == self.step and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)


class Learner(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = MLP(10, (1, 8, 8), hidden=(8,))

    def training_step(self, batch: Labelled, batch_idx: int) -> Tensor:
        return cross_entropy(self.network(batch.inputs), batch.targets)

    def validation_step(self, batch: Labelled, batch_idx: int) -> None:
        self.network(batch.inputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(seen: Seen, folder: Path, checkpoint: Path | None = None) -> Learner:
    learner = Learner()
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", default_root_dir=folder, callbacks=[seen], logger=False, inference_mode=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(learner, datamodule=Digits(batch_size=256), ckpt_path=checkpoint, weights_only=True)
    return learner


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_end", 2),
        ("on_train_batch_end", 8),
        ("on_train_batch_end", 5),  # an epoch's last batch
        ("on_train_batch_end", 10),
        ("on_validation_end", 5),
        ("on_train_epoch_end", 5),
    ],
)
def test_a_resumed_fit_sees_the_same_batches_and_ends_with_the_same_weights(
    hook: str, step: int, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "saved.ckpt"
    before = Seen(hook, step, checkpoint)
    uninterrupted = fit(before, tmp_path)
    assert len(before.batches) == 15
    after = Seen()
    resumed = fit(after, tmp_path, checkpoint)
    assert after.batches == before.batches[step:]
    for expected, got in zip(uninterrupted.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, got)
