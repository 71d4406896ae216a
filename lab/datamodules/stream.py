"""Streams of tasks, made of any labelled data: what continual learning learns one after the other.

A stream is data of its own around other data, ``{name: permuted, source: {name: mnist5k}, tasks: 10}``; splits, labels,
augmentation and batch sizes are the source's. ``trainer.max_epochs`` is the number of epochs of *each* task: one fit
goes through the whole stream, so every technique can be trained on one. Validation is on the tasks seen so far, the
test on all of them; weights are selected after the last task only.

A sample's place in the stream is task · N + position, for N samples of the source's split.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from lab.batch import Labelled, Tasks
from lab.datamodules.labelled import LabelledData
from lab.datamodules.lazy import Lazy
from lab.datamodules.loader import Batches, Loader, Reader, Streamed, seeded
from lab.errors import UserError
from lab.ranges import checked
from lab.transforms import Augmentation

Scenario = Literal["domain", "task", "class"]
Split = Literal["train", "val", "test"]


class TaskStream(LightningDataModule, ABC):
    """Tasks made of labelled data; a subclass says in which way.

    Its facts are the source's, and

    - ``tasks``: how many there are
    - ``scenario``: what a network is told and asked (G. van de Ven, T. Tuytelaars, A. Tolias: Three Types of
      Incremental Learning, Nature Machine Intelligence 4, 2022): in ``task`` which task a sample is of; in ``domain``
      the same question in every task, and not which one it is; in ``class`` which class of all tasks
    - ``heads``: the outputs that belong to each task; None where all tasks share all

    Args:
        source: any labelled data.
    """

    yields = Tasks
    facts: ClassVar[tuple[str, ...]] = (
        "num_classes", "in_channels", "input_shape", "objective", "tasks", "scenario", "heads",
    )  # fmt: skip
    unsaved: ClassVar[tuple[str, ...]] = ("_serving",)

    tasks: int
    scenario: Scenario = "domain"
    heads: list[list[int]] | None = None

    @checked
    def __init__(self, source: LabelledData) -> None:
        super().__init__()
        self.source = source
        self.epochs_per_task = 0
        """Epochs of each task; 0 until a trainer says it."""
        self.at_once = False
        """Whether all tasks are learnt together: a module says so."""
        self._followed: Trainer | None = None
        self._serving: tuple[object, Loader] | None = None

    @abstractmethod
    def task_members(self, samples: Labelled) -> list[Tensor]:
        """For each task, the positions in a split of the source of the samples that it has."""

    def prepare_tasks(self) -> None:
        """Find out what depends on the source, once it is set up: ``tasks`` and ``heads``, and what subclasses keep.

        Raises:
            ValueError: such tasks cannot be made of it.
        """

    def changed(self, inputs: Tensor, task: int) -> Tensor:
        """Inputs ``[B, ...]`` as a task shows them."""
        return inputs

    def retargeted(self, targets: Tensor, tasks: Tensor) -> Tensor:
        """Targets ``[B, ...]`` as the tasks ``[B]`` ask for them."""
        return targets

    @property
    def num_classes(self) -> int | None:
        """Outputs that a network needs."""
        return self.source.num_classes

    @property
    def in_channels(self) -> int:
        """The source's."""
        return self.source.in_channels

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The source's."""
        return self.source.input_shape

    @property
    def objective(self) -> str | None:
        """The source's."""
        return self.source.objective

    @property
    def classes(self) -> list[str] | None:
        """The classes' names, where the source knows them and the outputs are its classes."""
        return self.source.classes if self.num_classes == self.source.num_classes else None

    @property
    def has_test(self) -> bool:
        """Whether there are labelled samples to test on."""
        return self.source.has_test

    def prepare_data(self) -> None:
        """The source's."""
        self.source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set the source up, make the tasks, and have the trainer go through all of them.

        Raises:
            ValueError: such tasks cannot be made of the source, or one has no samples.
            UserError: the trainer is told to train for steps instead of epochs.
        """
        if not hasattr(self, "_members"):
            self.source.setup("fit")
            self.prepare_tasks()
            splits = {"train": self.source.train, "val": self.source.val, "test": self.source.test}
            self._members = {name: self._labelled(split) for name, split in splits.items()}
            for split in ("train", "test") if self.has_test else ("train",):
                for task, members in enumerate(self._members[split]):
                    if not len(members):
                        raise ValueError(f"task {task} has no labelled {split} samples{self.named(task)}")
        if stage == "fit" and self.trainer is not None and self.trainer is not self._followed:
            self._follow(self.trainer)

    def named(self, task: int) -> str:
        """What else there is to say of a task, for an error."""
        return ""

    def task_of(self, epoch: int) -> int:
        """The task that an epoch, from 0, learns; the last where all are learnt at once."""
        return self.tasks - 1 if self.at_once else min(epoch // max(self.epochs_per_task, 1), self.tasks - 1)

    def ends_task(self, epoch: int) -> bool:
        """Whether an epoch is the last of its task."""
        return (epoch + 1) % self.epochs_per_task == 0

    def selectable(self, epoch: int) -> bool:
        """Whether the weights after an epoch may be the ones that are kept: those after the last, of all tasks."""
        return self.at_once or epoch + 1 == self.epochs_per_task * self.tasks

    def of_tasks(self, split: Split, tasks: Sequence[int], at_most: int | None = None) -> Loader:
        """This process's part of the labelled samples of tasks, as they are, in order.

        Args:
            at_most: so many, chosen at random by the source's ``split_seed``.
        """
        places = self._places(split, tasks)
        if at_most is not None and at_most < len(places):
            chance = seeded("some", self.source.split_seed)
            places = places[torch.randperm(len(places), generator=chance)[:at_most].sort().values]
        return self._loader(split, places, self.source.eval_batch_size)

    def places(self, tasks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """``[N]`` places of the labelled training samples of tasks, their tasks and their targets."""
        places = self._places("train", tasks)
        size = len(self.source.train)
        return places, places // size, self.retargeted(self.source.train.targets[places % size], places // size)

    def at(self, places: Tensor) -> Tasks:
        """The training samples at ``[B]`` places, augmented by nothing."""
        return _TaskReader(self, "train").plain(places)

    def train_dataloader(self) -> Loader:
        """The training batches of the task that is being learnt, in a new order every epoch.

        As of the source, a module that learns from labels only gets the labelled ones, for as many steps as there are
        with all.
        """
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        tasks = range(self.tasks) if self.at_once else [self.task_of(epoch)]
        key = (tuple(tasks), self.trainer)
        if self._serving is None or self._serving[0] != key:  # kept, so that workers live as long as a task
            source, labelled = self.source, self._places("train", tasks)
            everything = self._places("train", tasks, labelled=False)
            among = everything if self._learns_unlabelled else labelled
            order = {
                "shuffle": True, "seed": source.seed, "drop_last": source.drop_last, "length": len(everything),
                "parts": getattr(self.trainer, "accumulate_grad_batches", 1),
            }  # fmt: skip
            loader = self._loader("train", among, source.batch_size, augmentation=self._augmentation, **order)
            self._serving = key, loader
        return self._serving[1]

    def val_dataloader(self) -> Loader | list[Loader]:
        """The validation samples of the tasks seen so far; no loader at all where there are none."""
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        seen = range(self.task_of(epoch) + 1 if self._followed is not None else self.tasks)
        return self.of_tasks("val", seen) if len(self._places("val", seen)) else []

    def test_dataloader(self) -> Loader:
        """The test samples of all tasks, one task after the other."""
        return self.of_tasks("test", range(self.tasks))

    def predict_dataloader(self) -> Loader:
        """The same."""
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on a device; where it is there already, itself."""
        if isinstance(batch, Labelled) and batch.inputs.device == device:
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """How long a task is learnt, and what the source learnt."""
        return {"epochs_per_task": self.epochs_per_task, "source": self.source.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a stream.

        Raises:
            UserError: its tasks were learnt for another number of epochs.
        """
        before = state_dict["epochs_per_task"]
        if self.epochs_per_task and before != self.epochs_per_task:
            raise UserError(
                f"the tasks of this stream were learnt for {before} epochs each, and that cannot become "
                f"{self.epochs_per_task}: what came after a task would be otherwise; fit the recipe anew"
            )
        self.source.load_state_dict(state_dict["source"])

    def __getstate__(self) -> dict[str, Any]:
        """What workers need of it: no trainer."""
        return {**vars(self), "trainer": None, "_followed": None, "_serving": None}

    def fingerprint(self) -> str:
        """SHA-256 of the source's and of which samples are which task's, in hexadecimal."""
        total = hashlib.sha256(self.source.fingerprint().encode())
        for split, members in self._members.items():
            for task in members:
                total.update(f"{split} {len(task)}\n".encode() + task.numpy().tobytes())
        return total.hexdigest()

    def _follow(self, trainer: Trainer) -> None:
        """Have the trainer go through all tasks, for as many epochs each as it was to train."""
        loop = trainer.fit_loop
        if trainer.max_steps != -1 or loop.max_epochs is None or loop.max_epochs < 1:
            raise UserError(
                f"a stream of {self.tasks} tasks is learnt by epochs: trainer.max_epochs says how many of each task, "
                f"trainer.max_steps has no place there (max_epochs={loop.max_epochs}, max_steps={trainer.max_steps})"
            )
        self.at_once = bool(getattr(trainer.lightning_module, "at_once", False))
        self.epochs_per_task = loop.max_epochs
        loop.max_epochs *= 1 if self.at_once else self.tasks
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # as Lightning's connector does
        self._followed = trainer

    def _labelled(self, samples: Labelled) -> list[Tensor]:
        return self.task_members(samples) if len(samples) else [torch.arange(0)] * self.tasks

    def _places(self, split: Split, tasks: Sequence[int], *, labelled: bool = True) -> Tensor:
        samples: Labelled = getattr(self.source, split)
        places = [self._members[split][task] + task * len(samples) for task in tasks]
        found = torch.cat([torch.arange(0), *places])
        return found[samples.labelled[found % len(samples)]] if labelled and len(found) else found

    def _loader(
        self, split: Split, places: Tensor, batch_size: int, augmentation: Augmentation | None = None, **order: Any
    ) -> Loader:
        if self.trainer is not None:
            order |= {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        reader = _TaskReader(self, split, augmentation)
        if isinstance(reader.samples.inputs, Lazy):
            workers = self.source.num_workers
            return Streamed(reader, batch_size, num_workers=workers, among=places, **order)
        return Batches(reader, batch_size, among=places, **order)

    @property
    def _augmentation(self) -> Augmentation | None:
        if not self.source.transforms:
            return None
        classes = self.num_classes if self.objective == "classification" else None
        return Augmentation(self.source.transforms, self.source.seed, classes)

    @property
    def _learns_unlabelled(self) -> bool:
        return self.trainer is not None and bool(getattr(self.trainer.lightning_module, "learns_unlabelled", False))


class _TaskReader(Reader):
    """Makes batches of places in a stream."""

    def __init__(self, stream: TaskStream, split: Split, augmentation: Augmentation | None = None) -> None:
        super().__init__(getattr(stream.source, split), augmentation)
        self._tasks = stream.tasks
        self._changed, self._retargeted = stream.changed, stream.retargeted

    def __len__(self) -> int:
        return len(self.samples) * self._tasks

    def select(self, chosen: Tensor) -> Tasks:
        """The samples at ``[B]`` places, as the source shows them."""
        size = len(self.samples)
        batch, task = super().select(chosen % size), chosen // size
        return Tasks(batch.inputs, self._retargeted(batch.targets, task), chosen, task)

    def plain(self, chosen: Tensor) -> Tasks:
        """The samples at ``[B]`` places, as their tasks show them."""
        return self._shown(self.select(chosen))

    def __call__(self, request: Any) -> Labelled:
        """One batch, augmented and then changed as its tasks want it."""
        return self._shown(super().__call__(request))

    def _shown(self, batch: Any) -> Tasks:
        first = int(batch.task[0])
        if bool((batch.task == first).all()):
            batch.inputs = self._changed(batch.inputs, first)
        else:
            inputs = batch.inputs.clone()
            for task in batch.task.unique().tolist():
                of_task = batch.task == task
                inputs[of_task] = self._changed(batch.inputs[of_task], task)
            batch.inputs = inputs
        assert isinstance(batch, Tasks)
        return batch
