from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer

from lab.batch import UNLABELLED, Labelled
from lab.datamodules.digits import Digits
from lab.datamodules.labelled import LabelledData, Splits, stratified
from lab.datamodules.loader import seeded


class Houses(LabelledData):
    """Two target columns: a regression."""

    def load(self) -> Labelled:
        inputs = torch.rand(100, 4, generator=seeded("houses"))
        return Labelled(inputs, inputs[:, :2].double() * 3)


def ready(**arguments: Any) -> Digits:
    data = Digits(**arguments)
    data.setup()
    return data


def attended(data: LabelledData, *, learns_unlabelled: bool = False, **state: Any) -> LabelledData:
    """The data as a trainer has them that trains such a module."""
    module = LightningModule()
    module.learns_unlabelled = learns_unlabelled
    state = {"global_rank": 0, "world_size": 1, "overfit_batches": 0, **state}
    data.trainer = SimpleNamespace(lightning_module=module, **state)
    return data


def served(data: LabelledData) -> list[list[int]]:
    return [batch.index.tolist() for batch in data.train_dataloader()]


def same(a: Labelled, b: Labelled) -> bool:
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


def test_splits_are_disjoint_and_leave_no_sample_out() -> None:
    data = ready()
    everything = Digits(val_fraction=0, test_fraction=0)
    everything.setup()
    parts = torch.cat([split.inputs.flatten(1) for split in (data.train, data.val, data.test)])
    assert len(parts) == 1797
    assert torch.equal(parts.unique(dim=0), everything.train.inputs.flatten(1).unique(dim=0))


def test_every_split_has_each_class_in_its_due_part() -> None:
    data = ready()
    sizes = torch.cat([data.train.targets, data.val.targets, data.test.targets]).bincount()
    for split in (data.train, data.val, data.test):
        due = sizes * len(split) / 1797
        assert (split.targets.bincount(minlength=10) - due).abs().max() <= 1


def test_splits_depend_on_split_seed_and_on_no_other_seed() -> None:
    assert same(ready(seed=1).test, ready(seed=2).test)
    assert not same(ready(split_seed=1).test, ready(split_seed=2).test)


def test_the_facts_say_what_networks_and_objectives_need() -> None:
    data = ready()
    assert (data.num_classes, data.in_channels, data.input_shape) == (10, 1, (1, 8, 8))
    assert data.objective == "classification"
    assert all(hasattr(data, fact) for fact in LabelledData.facts)


def test_a_regression_has_its_columns_as_num_classes_and_random_splits() -> None:
    data = Houses(val_fraction=0.25)
    data.setup()
    assert (data.num_classes, data.in_channels, data.input_shape) == (2, 4, (4,))
    assert data.objective == "regression"
    assert [len(split) for split in (data.train, data.val, data.test)] == [55, 25, 20]
    assert data.train.targets.dtype == torch.float32
    assert torch.allclose(data.val.targets, data.val.inputs[:, :2] * 3)


def test_withheld_labels_are_unlabelled_and_the_images_stay() -> None:
    full, few = ready(), ready(labels=100)
    assert torch.equal(few.train.inputs, full.train.inputs)
    kept = few.train.targets != UNLABELLED
    assert int(kept.sum()) == 100
    assert torch.equal(few.train.targets[kept], full.train.targets[kept])
    assert same(few.val, full.val)
    assert same(few.test, full.test)


def test_withheld_real_targets_are_nan() -> None:
    data = Houses(labels=10)
    data.setup()
    assert int(data.train.labelled.sum()) == 10
    assert data.train.targets[~data.train.labelled].isnan().all()


def test_fewer_labels_are_part_of_more_labels() -> None:
    kept = [set(ready(labels=labels).train.labelled.nonzero().flatten().tolist()) for labels in (5, 55, 200, 1000)]
    assert all(fewer < more for fewer, more in pairwise(kept))


def test_fewer_labels_than_classes_are_of_as_many_classes() -> None:
    targets = ready(labels=7).train.targets
    assert len(targets[targets != UNLABELLED].unique()) == 7


def test_more_labels_than_training_samples_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"labels=1259.*1258"):
        ready(labels=1259)


def test_fractions_beyond_the_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="more than the whole"):
        Digits(val_fraction=0.5, test_fraction=0.6)


def test_a_range_that_an_annotation_says_is_checked_at_construction() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        Digits(batch_size=0)


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_every_beginning_of_a_stratified_order_has_each_class_in_its_due_part(sizes: list[int], seed: int) -> None:
    classes = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    order = stratified(classes, seeded(seed))
    assert order.sort().values.tolist() == list(range(len(classes)))
    for count in range(len(classes) + 1):
        got = classes[order[:count]].bincount(minlength=len(sizes))
        # Webster's method minimises Σ (got - due)²/size over all choices of this many: no swap of one sample is better.
        costs = [(got[c] - count * sizes[c] / len(classes)) ** 2 / sizes[c] for c in range(len(sizes))]
        for giver in range(len(sizes)):
            for taker in range(len(sizes)):
                if giver == taker or got[giver] == 0:
                    continue
                given = (got[giver] - 1 - count * sizes[giver] / len(classes)) ** 2 / sizes[giver]
                taken = (got[taker] + 1 - count * sizes[taker] / len(classes)) ** 2 / sizes[taker]
                assert given + taken >= costs[giver] + costs[taker] - 1e-5


def test_a_module_that_needs_labels_gets_labelled_samples_for_as_many_steps_as_with_all() -> None:
    full, few = attended(ready()), attended(ready(labels=100))
    batches = served(few)
    assert [len(batch) for batch in batches] == [len(batch) for batch in served(full)]
    labelled = set(few.train.labelled.nonzero().flatten().tolist())
    seen = [index for batch in batches for index in batch]
    assert all(set(seen[start : start + 100]) == labelled for start in range(0, 1200, 100))


def test_a_module_that_learns_without_labels_gets_every_sample() -> None:
    data = attended(ready(labels=100), learns_unlabelled=True)
    assert sorted(index for batch in served(data) for index in batch) == list(range(1258))


def test_without_a_trainer_labels_are_what_is_learnt_from() -> None:
    data = ready(labels=100)
    assert all(batch.labelled.all() for batch in data.train_dataloader())


def test_the_order_of_training_is_decided_by_seed() -> None:
    assert served(ready(seed=1)) == served(ready(seed=1))
    assert served(ready(seed=1)) != served(ready(seed=2))


def test_each_process_gets_its_share() -> None:
    alone = served(attended(ready(batch_size=64)))
    first, second = (served(attended(ready(batch_size=32), global_rank=rank, world_size=2)) for rank in (0, 1))
    assert [a + b for a, b in zip(first, second, strict=True)] == alone


def test_overfitting_is_on_the_same_batches_every_epoch() -> None:
    loader = attended(ready(), overfit_batches=2).train_dataloader()
    assert [b.index.tolist() for b in loader] == [b.index.tolist() for b in loader]


def test_evaluation_and_prediction_are_in_order() -> None:
    data = ready(eval_batch_size=100)
    for loader, split in ((data.val_dataloader(), data.val), (data.test_dataloader(), data.test)):
        batches = list(loader)
        assert torch.equal(torch.cat([b.inputs for b in batches]), split.inputs)
        assert torch.equal(torch.cat([b.index for b in batches]), torch.arange(len(split)))
    assert torch.equal(torch.cat([b.inputs for b in data.predict_dataloader()]), data.test.inputs)


def test_the_fixed_inputs_are_those_that_index_names() -> None:
    data = ready()
    parts = data.fixed_train_inputs()
    assert parts is not None
    inputs = torch.cat(list(parts))
    for batch in data.train_dataloader():
        assert torch.equal(inputs[batch.index], batch.inputs)


def test_setup_a_second_time_changes_nothing() -> None:
    data = ready(labels=100)
    train = data.train
    data.setup("fit")
    assert data.train is train


def test_the_fingerprint_is_that_of_the_samples_and_their_labels() -> None:
    assert ready(seed=1).fingerprint() == ready(seed=2, batch_size=3).fingerprint()
    others = {ready().fingerprint(), ready(split_seed=1).fingerprint(), ready(labels=100).fingerprint()}
    assert len(others) == 3
    changed = ready()
    changed.test.inputs[-1, 0, 0, 0] += 1
    assert changed.fingerprint() not in others


def test_without_a_validation_split_there_is_no_validation_loader() -> None:
    assert ready(val_fraction=0).val_dataloader() == []


def test_a_regression_may_have_an_empty_split() -> None:
    data = Houses(val_fraction=0)
    data.setup()
    assert data.num_classes == 2
    assert data.val.targets.shape == (0, 2)


def test_an_empty_split_is_refused_where_samples_are_needed() -> None:
    data = ready(val_fraction=0, test_fraction=1)
    with pytest.raises(ValueError, match=r"no training samples \(val_fraction=0.0, test_fraction=1.0\)"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="no labelled test samples"):
        ready(test_fraction=0).test_dataloader()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_trainer_predicts_every_test_sample_in_order() -> None:
    class Echo(LightningModule):
        def predict_step(self, batch: Labelled, batch_idx: int) -> torch.Tensor:
            return batch.index

    data = Digits(eval_batch_size=100)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    outputs = trainer.predict(Echo(), datamodule=data)
    assert torch.equal(torch.cat(outputs), torch.arange(359))


class Split(LabelledData):
    """Digits that come with a test split of their own, the last 297."""

    def load(self) -> Splits:
        digits = Digits(val_fraction=0, test_fraction=0)
        digits.setup()
        return Splits(digits.train[:1500], test=digits.train[1500:])


def test_folds_hold_every_sample_out_once_each_with_its_due_part_of_every_class() -> None:
    folds = [ready(folds=5, fold=fold) for fold in range(5)]
    held = torch.cat([fold.test.inputs for fold in folds]).flatten(1)
    everything = torch.cat([part.inputs for part in (folds[0].train, folds[0].val, folds[0].test)]).flatten(1)
    assert sorted(held.tolist()) == sorted(everything.tolist())
    counts = torch.stack([fold.test.targets.bincount(minlength=10) for fold in folds])
    assert (counts.max(0).values - counts.min(0).values).max() <= 1
    assert {len(fold.test) for fold in folds} == {359, 360}
    assert all(len(fold.val) == round(0.1 * 1797) for fold in folds)


def test_folds_of_a_regression_hold_every_sample_out_once() -> None:
    folds = [Houses(folds=3, fold=fold) for fold in range(3)]
    for fold in folds:
        fold.setup()
    held = torch.cat([fold.test.inputs for fold in folds])
    everything = torch.cat([part.inputs for part in (folds[0].train, folds[0].val, folds[0].test)])
    assert sorted(held.tolist()) == sorted(everything.tolist())


def test_folds_of_data_with_a_test_split_are_for_validation() -> None:
    folds = [Split(folds=5, fold=fold) for fold in range(5)]
    for fold in folds:
        fold.setup()
        assert [len(part) for part in (fold.train, fold.val, fold.test)] == [1200, 300, 297]
    assert all(same(fold.test, folds[0].test) for fold in folds)
    held = torch.cat([fold.val.inputs for fold in folds]).flatten(1)
    assert len(held.unique(dim=0)) == len(
        torch.cat([folds[0].train.inputs, folds[0].val.inputs]).flatten(1).unique(dim=0)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"folds": 5, "fold": 5}, "fold=5, but folds=5"), ({"fold": 1}, "say folds too"), ({"folds": 1}, "folds")],
)
def test_a_fold_that_there_is_not_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)


def test_more_folds_than_samples_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="folds=2000, but there are 1797 labelled samples"):
        ready(folds=2000)


def test_what_is_learnt_is_learnt_from_the_training_split_only() -> None:
    class Centred(Digits):
        def learn(self, train: Labelled) -> None:
            self.mean = train.inputs.float().mean()

        def prepared(self, samples: Labelled) -> Labelled:
            return Labelled(samples.inputs - self.mean, samples.targets)

    data, plain = Centred(), ready()
    data.setup()
    assert data.mean == plain.train.inputs.float().mean()
    assert torch.equal(data.test.inputs, plain.test.inputs - data.mean)
