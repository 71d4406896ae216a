"""Labelled data that fits in memory: splits, withheld labels, loaders.

A data set is a subclass with one method, :meth:`InMemory.load`. Splits and withheld labels are decided by
``split_seed`` alone, the order of training by ``seed`` and the epoch, so that runs with other seeds are judged on the
same samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lab.batch import UNLABELLED, Labelled
from lab.datamodules.cache import digest
from lab.datamodules.loader import Batches, seeded
from lab.ranges import Count, Fraction, checked


class Splits(NamedTuple):
    """The samples to learn from, to select by, and to be judged on."""

    train: Labelled
    val: Labelled
    test: Labelled


class InMemory(LightningDataModule, ABC):
    """Labelled data held as tensors; a subclass says in :meth:`load` what they are.

    Floating-point targets make a regression, whole numbers a classification. After :meth:`setup` the splits are
    ``train``, ``val`` and ``test``, and the facts are attributes:

    - ``num_classes``: classes, or target columns of a regression (timm's word for the outputs of a network);
      None where no sample has a label
    - ``input_shape``: of one sample, images ``(C, H, W)``
    - ``in_channels``: channels of an image, features of a vector
    - ``objective``: the registered name, ``classification`` or ``regression``; None where no sample has a label

    Args:
        batch_size: training samples a batch and process.
        eval_batch_size: the same for validation, test and prediction.
        labels: training samples that keep their label, stratified by class; the rest stay, without one. With the same
            ``split_seed`` a smaller choice is part of every larger one. All keep it where this is None.
        val_fraction: part of the labelled samples to validate on; with 0 there is no validation.
        test_fraction: part of the labelled samples to test on.
        seed: of the order of training; the recipe's ``seed`` where it is left out.
        split_seed: of the splits, and of which samples keep their label.
        drop_last: leave a last, smaller training batch out.

    Raises:
        ValueError: ``val_fraction`` and ``test_fraction`` exceed 1 together.
    """

    yields = Labelled
    facts: ClassVar[tuple[str, ...]] = ("num_classes", "in_channels", "input_shape", "objective")

    train: Labelled
    val: Labelled
    test: Labelled
    num_classes: int | None
    in_channels: int
    input_shape: tuple[int, ...]
    objective: str | None

    @checked
    def __init__(
        self,
        *,
        batch_size: Count = 64,
        eval_batch_size: Count = 512,
        labels: Count | None = None,
        val_fraction: Fraction = 0.1,
        test_fraction: Fraction = 0.2,
        seed: int = 0,
        split_seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        if val_fraction + test_fraction > 1:
            raise ValueError(
                f"val_fraction={val_fraction} and test_fraction={test_fraction} are more than the whole: "
                "together they may be 1 at most"
            )
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.labels = labels
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed
        self.split_seed = split_seed
        self.drop_last = drop_last
        self._ready = False

    @abstractmethod
    def load(self) -> Splits:
        """The data: ``self.split(samples)``, or ``Splits`` of data that come split.

        Withheld targets are ``UNLABELLED``, or NaN in a regression.
        """

    def setup(self, stage: str | None = None) -> None:
        """Load, split and withhold labels, once, whatever the stage.

        Raises:
            ValueError: ``labels`` are more than the training samples that have one.
        """
        if self._ready:
            return
        splits = Splits(*(_typed(split) for split in self.load()))
        targets = torch.cat([split.targets[_known(split)] for split in splits])
        regression = targets.is_floating_point()
        columns = targets.shape[1] if regression else int(targets.max()) + 1 if len(targets) else 0
        self.num_classes = columns if len(targets) else None
        self.objective = ("regression" if regression else "classification") if len(targets) else None
        self.input_shape = tuple(splits.train.inputs.shape[1:])
        self.in_channels = self.input_shape[0]
        self.train = splits.train if self.labels is None else self._withhold(splits.train, self.labels)
        self.val, self.test = splits.val, splits.test
        self._ready = True

    def split(self, samples: Labelled) -> Splits:
        """Samples split by the fractions, stratified by class; those without a label are all in the training split.

        The samples of a split keep the order that they had.
        """
        known = _known(samples)
        order = known[self._order(samples.targets[known], "splits")]
        test = _share(self.test_fraction, len(order))
        val = min(_share(self.val_fraction, len(order)), len(order) - test)
        elsewhere = torch.ones(len(samples), dtype=torch.bool)
        elsewhere[order[: test + val]] = False
        parts = (elsewhere.nonzero().squeeze(1), order[test : test + val].sort().values, order[:test].sort().values)
        return Splits(*(samples[part] for part in parts))

    def train_dataloader(self) -> Batches:
        """Training batches, in a new order every epoch.

        A module that says ``learns_unlabelled = True`` gets every sample; any other the labelled ones, again and again,
        for as many steps as there are with all: who learns from fewer labels doesn't learn for a shorter time.

        Raises:
            ValueError: there is nothing to learn from.
        """
        train, known = self.train, _known(self.train)
        if not len(train):
            raise ValueError(f"{type(self).__name__} has no training samples ({self._fractions})")
        if not (len(known) or self._learns_unlabelled):
            raise ValueError(
                f"none of the {len(train)} training samples of {type(self).__name__} has a label, "
                "and the module learns from labels only"
            )
        overfitting = getattr(self.trainer, "overfit_batches", 0) > 0  # on the same batches, every epoch
        return self._batches(
            train,
            self.batch_size,
            shuffle=not overfitting,
            seed=self.seed,
            among=None if self._learns_unlabelled or len(known) == len(train) else known,
            length=len(train),
            drop_last=self.drop_last,
        )

    def val_dataloader(self) -> Batches | list[Batches]:
        """The validation split, in order; no loader at all (Lightning's ``[]``) where it is empty."""
        return self._batches(self.val, self.eval_batch_size) if len(self.val) else []

    def test_dataloader(self) -> Batches:
        """The test split, in order.

        Raises:
            ValueError: it is empty.
        """
        if not len(self.test):
            raise ValueError(f"{type(self).__name__} has no labelled test samples ({self._fractions})")
        return self._batches(self.test, self.eval_batch_size)

    def predict_dataloader(self) -> Batches:
        """The test split, in order.

        Raises:
            ValueError: it is empty.
        """
        return self.test_dataloader()

    @property
    def fixed_train_inputs(self) -> Tensor | None:
        """``[N, ...]`` training inputs in the order of ``index``; a subclass that augments has None.

        What they are, they are in every epoch: a technique may keep an output for each.
        """
        return self.train.inputs

    def fingerprint(self) -> str:
        """SHA-256 of all splits, withheld labels being withheld, in hexadecimal."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return digest({f"{s}.{part}": getattr(splits[s], part) for s in splits for part in ("inputs", "targets")})

    @property
    def _learns_unlabelled(self) -> bool:
        return self.trainer is not None and bool(getattr(self.trainer.lightning_module, "learns_unlabelled", False))

    def _batches(self, samples: Labelled, batch_size: int, **order: Any) -> Batches:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        return Batches(samples, batch_size, rank=rank, world_size=world_size, **order)

    def _withhold(self, train: Labelled, labels: int) -> Labelled:
        known = _known(train)
        if labels > len(known):
            raise ValueError(
                f"labels={labels}, but the training split has {len(known)} labelled samples ({self._fractions})"
            )
        hidden = known[self._order(train.targets[known], "labels")[labels:]]
        targets = train.targets.clone()
        targets[hidden] = torch.nan if targets.is_floating_point() else UNLABELLED
        return replace(train, targets=targets)

    def _order(self, targets: Tensor, purpose: str) -> Tensor:
        generator = seeded(purpose, self.split_seed)
        if targets.is_floating_point():
            return torch.randperm(len(targets), generator=generator)
        return stratified(targets, generator)

    @property
    def _fractions(self) -> str:
        return f"val_fraction={self.val_fraction}, test_fraction={self.test_fraction}"


def stratified(classes: Tensor, generator: torch.Generator) -> Tensor:
    """``[N]`` positions in a random order whose every beginning has each class in its due part.

    The j-th sample of a class of n comes at (j − ½)/n: Webster's (Sainte-Laguë's) apportionment, within one sample of
    each class's exact part for all but contrived sizes. Largest remainders are as close, but a longer beginning may
    then have *fewer* of a class (the Alabama paradox), and choices would not be nested.

    Args:
        classes: ``[N]`` class indices.
        generator: decides the order within each class, and between classes whose turn comes at once.
    """
    shuffled = torch.randperm(len(classes), generator=generator)
    by_class = classes[shuffled].argsort(stable=True)
    sizes = classes.bincount()
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    turns = ((torch.arange(len(classes)) - starts).double() + 0.5) / sizes.repeat_interleave(sizes)
    turn = torch.empty_like(turns)
    turn[by_class] = turns
    return shuffled[turn.argsort(stable=True)]


def _typed(split: Labelled) -> Labelled:
    """Class indices as int64 ``[N]``, real targets as float32 ``[N, K]``."""
    if not split.targets.is_floating_point():
        return replace(split, targets=split.targets.long())
    columns = split.targets if split.targets.ndim > 1 else split.targets.unsqueeze(1)
    return replace(split, targets=columns.float())


def _known(split: Labelled) -> Tensor:
    """Positions of the samples that have a label."""
    return split.labelled.nonzero().squeeze(1) if len(split) else torch.arange(0)


def _share(fraction: float, size: int) -> int:
    """A fraction of ``size`` samples, rounded; one at least where any is asked for."""
    return min(max(round(fraction * size), fraction > 0), size)
