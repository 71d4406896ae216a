"""Labelled data: splits, folds, withheld labels, augmentation, loaders.

A data set is a subclass with one method, :meth:`LabelledData.load`. Splits and withheld labels are decided by
``split_seed`` alone, the order of training and its augmentation by ``seed`` and the epoch, so that runs with other
seeds are judged on the same samples.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from annotated_types import Ge
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lab.batch import UNLABELLED, Labelled
from lab.datamodules.cache import digest
from lab.datamodules.lazy import Lazy
from lab.datamodules.loader import Batches, Loader, Streamed, pixels, seeded
from lab.ranges import Count, Fraction, Whole, checked
from lab.transforms import Augmentation, Transform

READ_AT_ONCE = 512
"""How many training inputs :meth:`LabelledData.fixed_train_inputs` gives at once."""


class Splits(NamedTuple):
    """Data that come split: the samples to learn from, to select by, and to be judged on; None where there are none."""

    train: Labelled
    val: Labelled | None = None
    test: Labelled | None = None


class LabelledData(LightningDataModule, ABC):
    """Labelled data; a subclass says in :meth:`load` what they are.

    Inputs are floating point, token ids, or uint8 pixels, which batches give as float32 in [0, 1]; they lie in memory,
    or are read when they are served (:class:`~lab.datamodules.lazy.Lazy`). Floating-point targets make a regression,
    whole numbers a classification.

    Splits that the data don't bring are cut from the labelled training samples. With ``folds`` one of as many equal
    parts of them takes the place of the test split, or, where the data bring a test split of their own, of the
    validation split.

    After :meth:`setup` the splits are ``train``, ``val`` and ``test``, and the facts are attributes:

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
        folds: for cross-validation, the number of parts; None: no cross-validation.
        fold: which of them, from 0, is held out.
        transforms: what happens to training inputs, in this order, anew in every epoch.
        seed: of the order of training and its augmentation; the recipe's ``seed`` where it is left out.
        split_seed: of the splits and folds, and of which samples keep their label.
        drop_last: leave a last, smaller training batch out.

    Raises:
        ValueError: ``val_fraction`` and ``test_fraction`` exceed 1 together; a fold out of range.
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
    classes: list[str] | None = None
    """The classes' names, where the data know them."""
    num_workers: int = 0
    """Processes that read what is not in memory."""

    @checked
    def __init__(
        self,
        *,
        batch_size: Count = 64,
        eval_batch_size: Count = 512,
        labels: Count | None = None,
        val_fraction: Fraction = 0.1,
        test_fraction: Fraction = 0.2,
        folds: Annotated[int, Ge(2)] | None = None,
        fold: Whole = 0,
        transforms: tuple[Transform, ...] = (),
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
        if fold >= (folds or 1):
            raise ValueError(f"fold={fold}, but folds={folds}: it counts from 0" + ("" if folds else "; say folds too"))
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.labels = labels
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.folds = folds
        self.fold = fold
        self.transforms = transforms
        self.seed = seed
        self.split_seed = split_seed
        self.drop_last = drop_last
        self._ready = False
        self._loaded: Labelled | Splits | None = None

    @abstractmethod
    def load(self) -> Labelled | Splits:
        """The data: all samples, to be split, or ``Splits`` of data that come split.

        Withheld targets are ``UNLABELLED``, or NaN in a regression.
        """

    def learn(self, train: Labelled) -> None:
        """Learn from the training split, and from nothing else, what :meth:`prepared` needs; for subclasses."""

    def prepared(self, samples: Labelled) -> Labelled:
        """Samples that :meth:`load` gave as networks take them; they are what they are where a subclass doesn't say."""
        return samples

    def setup(self, stage: str | None = None) -> None:
        """Load, split, prepare and withhold labels, once, whatever the stage.

        Raises:
            ValueError: ``labels`` or ``folds`` are more than the training samples that have a label.
        """
        if self._ready:
            return
        loaded = self.load()
        self._loaded = loaded if stage == "predict" else None
        splits = self._cut(loaded if isinstance(loaded, Splits) else Splits(loaded))
        self.learn(splits[0])
        splits = (self.prepared(splits[0]), self.prepared(splits[1]), self.prepared(splits[2]))
        targets = torch.cat([split.targets[_known(split)] for split in splits])
        regression = targets.is_floating_point()
        columns = targets.shape[1] if regression else int(targets.max()) + 1 if len(targets) else 0
        self.num_classes = len(self.classes) if self.classes else columns if len(targets) else None
        self.objective = ("regression" if regression else "classification") if len(targets) else None
        self.input_shape = tuple(splits[0].inputs.shape[1:])
        self.in_channels = self.input_shape[0]
        train, self.val, self.test = splits
        self.train = train if self.labels is None else self._withhold(train, self.labels)
        self._ready = True

    def _cut(self, splits: Splits) -> tuple[Labelled, Labelled, Labelled]:
        """The three splits; those that there are not are cut from training, each with its samples in their order."""
        train, val, test = (None if split is None else _typed(split) for split in splits)
        assert train is not None
        known = _known(train)
        order = known[self._order(train.targets[known], "splits")]
        if self.folds is not None:
            if self.folds > len(order):
                raise ValueError(f"folds={self.folds}, but there are {len(order)} labelled samples to part")
            begin, end = (len(order) * fold // self.folds for fold in (self.fold, self.fold + 1))
            held, order = order[begin:end], torch.cat([order[:begin], order[end:]])
            if test is not None:
                return _without(train, held), train[held.sort().values], test
        else:
            size = _share(self.test_fraction, len(order)) if test is None else 0
            held, order = order[:size], order[size:]
        size = min(_share(self.val_fraction, len(known)), len(order)) if val is None else 0
        chosen = order[:size]
        return (
            _without(train, torch.cat([held, chosen])),
            train[chosen.sort().values] if val is None else val,
            train[held.sort().values] if test is None else test,
        )

    def train_dataloader(self) -> Loader:
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
            augmentation=self._augmentation,
            parts=getattr(self.trainer, "accumulate_grad_batches", 1),
        )

    def val_dataloader(self) -> Loader | list[Loader]:
        """The validation split, in order; no loader at all (Lightning's ``[]``) where it is empty."""
        return self._batches(self.val, self.eval_batch_size) if len(self.val) else []

    def test_dataloader(self) -> Loader:
        """The test split, in order.

        Raises:
            ValueError: it is empty.
        """
        if not len(self.test):
            raise ValueError(f"{type(self).__name__} has no labelled test samples ({self._fractions})")
        return self._batches(self.test, self.eval_batch_size)

    def predict_dataloader(self) -> Loader:
        """The test split, in order.

        Raises:
            ValueError: it is empty.
        """
        return self.test_dataloader()

    @property
    def has_test(self) -> bool:
        """Whether there are labelled samples to test on."""
        return len(self.test) > 0

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on a device; where it is there already, itself: Lightning would look through it and copy it."""
        if isinstance(batch, Labelled) and batch.inputs.device == device:
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def fixed_train_inputs(self) -> Iterator[Tensor] | None:
        """All training inputs in the order of ``index``, ``[B, ...]`` at a time; None where transforms change them.

        What they are, they are in every epoch: a technique may keep an output for each.
        """
        if self.transforms:
            return None
        return (
            pixels(self.train.inputs.index_select(0, part))
            for part in torch.split(torch.arange(len(self.train)), READ_AT_ONCE)
        )

    def fingerprint(self) -> str:
        """SHA-256 of all splits, withheld labels being withheld, in hexadecimal.

        Of inputs that are read when they are served it has their source's fingerprint.
        """
        splits = {"train": self.train, "val": self.val, "test": self.test}
        tensors = {f"{name}.targets": split.targets for name, split in splits.items()}
        total = hashlib.sha256()
        for name, split in splits.items():
            if isinstance(split.inputs, Lazy):
                total.update(f"{name} {split.inputs.source.fingerprint()}\n".encode())
                tensors[f"{name}.positions"] = split.inputs.positions
            else:
                tensors[f"{name}.inputs"] = split.inputs
        total.update(digest(tensors).encode())
        return total.hexdigest()

    @property
    def _augmentation(self) -> Augmentation | None:
        if not self.transforms:
            return None
        classes = self.num_classes if self.objective == "classification" else None
        return Augmentation(self.transforms, self.seed, classes)

    @property
    def _learns_unlabelled(self) -> bool:
        return self.trainer is not None and bool(getattr(self.trainer.lightning_module, "learns_unlabelled", False))

    def _batches(self, samples: Labelled, batch_size: int, **order: Any) -> Loader:
        if self.trainer is not None:
            order |= {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        if isinstance(samples.inputs, Lazy):
            return Streamed(samples, batch_size, num_workers=self.num_workers, **order)
        return Batches(samples, batch_size, **order)

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


def _without(split: Labelled, positions: Tensor) -> Labelled:
    """The other samples, in their order."""
    left = torch.ones(len(split), dtype=torch.bool)
    left[positions] = False
    return split[left.nonzero().squeeze(1)]


def _known(split: Labelled) -> Tensor:
    """Positions of the samples that have a label."""
    return split.labelled.nonzero().squeeze(1) if len(split) else torch.arange(0)


def _share(fraction: float, size: int) -> int:
    """A fraction of ``size`` samples, rounded; one at least where any is asked for."""
    return min(max(round(fraction * size), fraction > 0), size)
