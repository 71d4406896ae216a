"""Streams of tasks: what each task has, in which order, on how many processes, and how a trainer goes through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchvision.transforms import RandomErasing

from lab.batch import Labelled, Tasks
from lab.datamodules.digits import Digits
from lab.datamodules.docstrings import Docstrings
from lab.datamodules.labelled import LabelledData
from lab.datamodules.permuted import Permuted
from lab.datamodules.rotated import Rotated
from lab.datamodules.split import Split
from lab.datamodules.stream import TaskStream
from lab.errors import UserError
from lab.modules.naive import Naive
from lab.modules.supervised import Supervised
from lab.networks.mlp import MLP
from lab.objectives.classification import Classification


def made(stream: TaskStream) -> TaskStream:
    stream.setup("fit")
    return stream


def everything(stream: TaskStream, split: Any, tasks: list[int]) -> Tasks:
    batches = list(stream.of_tasks(split, tasks))
    return Tasks(*(torch.cat([getattr(b, part) for b in batches]) for part in ("inputs", "targets", "index", "task")))


def trainer(**arguments: Any) -> Trainer:
    settings = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**{**settings, "enable_progress_bar": False, "num_sanity_val_steps": 0, **arguments})


class Seen(Supervised):
    """Notes what it is given."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(MLP(10, (1, 8, 8), (16,)), Classification(10), **arguments)
        self.trained: list[tuple[int, Tensor]] = []
        self.validated: list[tuple[int, set[int]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained += [(self.current_epoch, batch.task)]
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += [(self.current_epoch, set(batch.task.tolist()))]
        super().validation_step(batch, batch_idx)


class Together(Seen):
    at_once = True


def test_the_first_permuted_task_is_the_source_and_the_others_are_the_same_pixels_elsewhere() -> None:
    stream = made(Permuted(Digits(), tasks=3))
    plain, one, two = (everything(stream, "test", [task]).inputs.flatten(1) for task in range(3))
    assert torch.equal(plain, stream.source.test.inputs.flatten(1))
    assert torch.equal(plain.sort(1).values, one.sort(1).values)
    assert not torch.equal(plain, one)
    assert not torch.equal(one, two)


def test_a_permutation_is_one_for_all_samples_splits_and_channels() -> None:
    stream = made(Permuted(Digits(), tasks=2))
    order = stream.orders[1]
    for split in ("train", "test"):
        source = getattr(stream.source, split).inputs.flatten(1)
        assert torch.equal(everything(stream, split, [1]).inputs.flatten(1), source[:, order])
    colours = torch.rand(2, 3, 8, 8)
    assert torch.equal(stream.changed(colours, 1).flatten(2), colours.flatten(2)[:, :, order])


def test_permutations_depend_on_their_own_seed_alone() -> None:
    first, again, other = (
        made(Permuted(Digits(seed=s), tasks=2, task_seed=t)).orders[1] for s, t in [(0, 0), (1, 0), (0, 1)]
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rotations_are_spread_evenly_and_four_quarters_are_a_whole() -> None:
    stream = made(Rotated(Digits(), tasks=4, largest=360))
    assert stream.angles == [0, 90, 180, 270]
    images = stream.source.test.inputs
    for quarter in range(4):
        turned = everything(stream, "test", [quarter]).inputs
        torch.testing.assert_close(turned, images.rot90(quarter, (2, 3)), atol=1e-5, rtol=0)


def test_split_tasks_share_the_classes_out_and_hold_every_sample_once() -> None:
    stream = made(Split(Digits(), tasks=5, scenario="class"))
    assert stream.heads == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    for split in ("train", "val", "test"):
        parts = [everything(stream, split, [task]) for task in range(5)]
        assert [sorted(part.targets.unique().tolist()) for part in parts] == stream.heads
        source = getattr(stream.source, split)
        assert sum(map(len, parts)) == len(source)
        size = len(source)
        assert sorted(place % size for part in parts for place in part.index.tolist()) == list(range(size))


def test_seven_classes_for_three_tasks_are_shared_as_evenly_as_it_goes_and_the_rest_left_out() -> None:
    stream = made(Split(Digits(), tasks=3, scenario="task", classes=((7, 1), (0, 2, 4), (9, 3))))
    assert stream.heads == [[7, 1], [0, 2, 4], [9, 3]]
    assert set(everything(stream, "train", [0, 1, 2]).targets.tolist()) == {0, 1, 2, 3, 4, 7, 9}
    assert [len(task) for task in made(Split(Digits(), tasks=3)).dealt] == [3, 3, 4]


def test_classes_are_dealt_by_chance_where_a_seed_is_said() -> None:
    dealt = [made(Split(Digits(), tasks=5, task_seed=seed)).dealt for seed in (0, 0, 1)]
    assert dealt[0] == dealt[1] != dealt[2]
    assert sorted(number for task in dealt[2] for number in task) == list(range(10))


def test_targets_of_the_domain_scenario_are_places_within_the_task() -> None:
    stream = made(Split(Digits(), tasks=2, scenario="domain", classes=((8, 3), (5, 1))))
    assert (stream.num_classes, stream.heads) == (2, None)
    for task, classes in enumerate([(8, 3), (5, 1)]):
        part = everything(stream, "test", [task])
        names = stream.source.test.targets[part.index % len(stream.source.test)]
        assert [classes[place] for place in part.targets.tolist()] == names.tolist()


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_fit_learns_each_task_for_the_trainers_epochs_and_validates_those_seen(epochs: int) -> None:
    module, stream = Seen(), Split(Digits(batch_size=128), tasks=5, scenario="class")
    fitting = trainer(max_epochs=epochs)
    fitting.fit(module, datamodule=stream)
    assert fitting.current_epoch == 5 * epochs
    assert {(epoch, task) for epoch, tasks in module.trained for task in tasks.tolist()} == {
        (epoch, epoch // epochs) for epoch in range(5 * epochs)
    }
    for epoch in range(5 * epochs):
        validated = set().union(*(tasks for at, tasks in module.validated if at == epoch))
        assert validated == set(range(epoch // epochs + 1))
    steps = [sum(at == epoch for at, _ in module.trained) for epoch in range(5 * epochs)]
    sizes = [len(stream._places("train", [epoch // epochs])) for epoch in range(5 * epochs)]
    assert steps == [-(-size // 128) for size in sizes]


def test_at_once_every_epoch_has_all_tasks_mixed() -> None:
    module, stream = Together(), Permuted(Digits(batch_size=64), tasks=3)
    fitting = trainer(max_epochs=2)
    fitting.fit(module, datamodule=stream)
    assert fitting.current_epoch == 2
    for epoch in range(2):
        tasks = torch.cat([task for at, task in module.trained if at == epoch])
        assert tasks.bincount().tolist() == [len(stream.source.train)] * 3
    assert all(len(task.unique()) > 1 for _, task in module.trained)


@pytest.mark.parametrize(
    "make", [lambda d: Permuted(d, tasks=3), lambda d: Split(d, tasks=3)], ids=["permuted", "split"]
)
def test_two_processes_see_what_one_sees(make: Callable[[LabelledData], TaskStream]) -> None:
    stream = made(make(Digits(batch_size=16)))
    for task in range(3):
        places = stream._places("train", [task])
        order = {"shuffle": True, "seed": 3, "length": len(places)}
        alone = list(stream._loader("train", places, 32, **order))
        each = [list(stream._loader("train", places, 16, rank=r, world_size=2, **order)) for r in range(2)]
        assert [b.index.tolist() for b in alone] == [
            one.index.tolist() + other.index.tolist() for one, other in zip(*each, strict=True)
        ]
        assert torch.equal(alone[0].inputs[:16], each[0][0].inputs)


def test_images_are_augmented_before_they_are_permuted() -> None:
    plain, erased = (
        made(Permuted(Digits(transforms=transforms), tasks=2))
        for transforms in [(), (RandomErasing(p=1.0, value=7.0),)]
    )
    places = plain._places("train", [1])[:32]
    loaders = [s._loader("train", places, 32, augmentation=s._augmentation) for s in (plain, erased)]
    before, after = (next(iter(loader)).inputs for loader in loaders)
    back = after.flatten(2)[:, :, plain.orders[1].argsort()].reshape(-1, 8, 8)
    assert not torch.equal(before, after)
    for image in back:
        rows, columns = (image == 7).nonzero(as_tuple=True)
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert int((image == 7).sum()) == int(box)  # a rectangle: it was erased where the image was one


def test_withheld_labels_are_learnt_by_nobody_who_needs_them_and_steps_stay_as_many() -> None:
    stream = Permuted(Digits(labels=100, batch_size=64), tasks=2)
    module = Seen()
    trainer(max_epochs=1).fit(module, datamodule=stream)
    assert len(module.trained) == 2 * -(-len(stream.source.train) // 64)
    places, tasks, targets = stream.places([0, 1])
    assert len(places) == 200
    assert tasks.bincount().tolist() == [100, 100]
    assert bool((targets >= 0).all())


def test_samples_are_found_again_by_their_places() -> None:
    stream = made(Permuted(Digits(), tasks=3))
    places = torch.tensor([5, 2 * len(stream.source.train) + 7])
    found, whole = stream.at(places), everything(stream, "train", [0, 1, 2])
    assert torch.equal(found.inputs, whole.inputs[places])
    assert torch.equal(found.targets, whole.targets[places])
    assert found.task.tolist() == [0, 2]
    assert isinstance(found, Tasks)
    assert isinstance(found[:1], Tasks)


def test_a_choice_of_a_tasks_samples_is_of_that_size_and_the_same_again() -> None:
    stream = made(Permuted(Digits(), tasks=2))
    chosen = [torch.cat([batch.index for batch in stream.of_tasks("train", [1], at_most=50)]) for _ in range(2)]
    assert torch.equal(*chosen)
    assert len(chosen[0].unique()) == 50
    assert bool((chosen[0] // len(stream.source.train) == 1).all())


class Squares(LabelledData):
    """A regression."""

    def load(self) -> Labelled:
        x = torch.linspace(-1, 1, 200)[:, None]
        return Labelled(x, x.square())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Split(Digits(), tasks=11), "11 tasks need as many classes, Digits has 10"),
        (lambda: Split(Digits(), tasks=2, classes=((0, 1),)), "1 lists of classes for 2 tasks"),
        (lambda: Split(Digits(), tasks=2, classes=((0, 1), (1, 2))), "class 1 is in more than one place"),
        (lambda: Split(Digits(), tasks=2, classes=((0, 1), (12,))), "class 12 is none of the 10 of Digits"),
        (
            lambda: Split(Digits(), tasks=2, classes=((0, 1), ())),
            r"task 1 has no labelled train samples \(classes none",
        ),
        (lambda: Split(Squares(), tasks=2), "split parts data by their classes, Squares has none"),
        (lambda: Permuted(Docstrings(), tasks=2), r"permuted takes images \(C, H, W\) or vectors \(F,\), Docstrings"),
        (lambda: Rotated(Docstrings(), tasks=2), r"rotated takes images \(C, H, W\), Docstrings"),
        (lambda: Rotated(Digits(), tasks=2, angles=(1.0,)), "1 angles for 2 tasks"),
    ],
    ids=lambda value: None if callable(value) else value[:20],
)
def test_what_makes_no_stream_is_an_error_that_says_why(make: Callable[[], TaskStream], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(make())


def test_a_stream_is_not_learnt_by_steps() -> None:
    with pytest.raises(UserError, match=r"learnt by epochs: trainer.max_epochs says how many of each task"):
        trainer(max_steps=10).fit(Seen(), datamodule=Permuted(Digits(), tasks=2))


def test_tasks_that_were_learnt_for_other_epochs_are_not_gone_on_with() -> None:
    stream = Permuted(Digits(), tasks=2)
    trainer(max_epochs=2, limit_train_batches=1).fit(Seen(), datamodule=stream)
    with pytest.raises(UserError, match="learnt for 1 epochs each, and that cannot become 2"):
        stream.load_state_dict({**stream.state_dict(), "epochs_per_task": 1})


def test_a_continual_technique_without_a_stream_says_what_it_needs() -> None:
    module = Naive(network=MLP(10, (1, 8, 8), (16,)), objective=Classification(10))
    with pytest.raises(TypeError, match="naive learns a stream of tasks"):
        trainer(max_epochs=1).fit(module, datamodule=Digits())
