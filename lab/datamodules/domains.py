"""Two domains: labelled data to learn from beside data of another kind that the network is to be right on.

``{name: domains, source: {name: images, path: photos}, target: {name: images, path: sketches}}``; splits, labels and
augmentation are those of the two, and of their own. Every training batch has as many samples of one as of the other:
an epoch goes once through the domain that has more of them, and through the other again and again, in a new order each
time. Both orders are functions of (seed, epoch) and unrelated to each other.

Where both domains are learnt from, the target's labels are withheld from every training and validation batch: they
serve the test alone. ``train_on`` gives ordinary, labelled batches of one of the two instead, for the bounds that
adaptation is measured between: the same batches of the source, or the target's with their labels. The test is on the
target in each case.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lab.batch import UNLABELLED, Labelled, SourceTarget
from lab.datamodules.labelled import LabelledData
from lab.datamodules.loader import Loader, Positioned, seeded
from lab.errors import UserError
from lab.ranges import Count, checked
from lab.transforms import Augmentation, hashed

SHOWN = 5
"""How many classes an error names."""


class Pairs(Positioned[SourceTarget]):
    """A batch of one loader beside a batch of the other, both in the same epoch and at the same place of it.

    The position is this loader's alone. Going round a shorter loader by its own iterator would advance its own epoch.

    Args:
        source: of the labelled domain.
        target: of the other; one that has fewer batches gives empty ones after its last.

    Raises:
        ValueError: there is no batch.
    """

    def __init__(self, source: Loader | None, target: Loader | None) -> None:
        super().__init__()
        self.parts = source, target
        given = [part for part in self.parts if part is not None]
        if not given:
            raise ValueError("neither domain has a batch")
        self._steps = max(map(len, given))

    def __len__(self) -> int:
        return self._steps

    def _serve(self, epoch: int, first: int) -> Iterator[SourceTarget]:
        served = [iter(()) if part is None else part._serve(epoch, first) for part in self.parts]
        for source, target in zip_longest(*served):
            yield SourceTarget(target[:0] if source is None else source, source[:0] if target is None else target)


class Domains(LightningDataModule):
    """A labelled source domain and a target domain of the same classes.

    Its facts are the source's.

    Args:
        source: labelled data.
        target: data of the same shape and classes, labelled or not.
        train_on: what training and validation batches have: ``both`` domains, without the target's labels; or
            labelled samples of the ``source``, or of the ``target``.
        batch_size: training samples of each domain a batch and process; those of the two where it is left out.

    Raises:
        ValueError: the two say other batch sizes.
    """

    yields = SourceTarget
    yields_by: ClassVar[str] = "train_on"
    yields_source = Labelled
    yields_target = Labelled
    facts: ClassVar[tuple[str, ...]] = ("num_classes", "in_channels", "input_shape", "objective")

    @checked
    def __init__(
        self,
        source: LabelledData,
        target: LabelledData,
        train_on: Literal["both", "source", "target"] = "both",
        *,
        batch_size: Count | None = None,
    ) -> None:
        super().__init__()
        if batch_size is None and source.batch_size != target.batch_size:
            raise ValueError(
                f"the source's batch_size is {source.batch_size}, the target's {target.batch_size}: a batch has as "
                "many samples of one as of the other; say the same for both, or batch_size beside them"
            )
        self.source = source
        self.target = target
        self.train_on = train_on
        self.batch_size = batch_size or source.batch_size
        self._ready = False

    @property
    def num_classes(self) -> int | None:
        """The source's."""
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
        """The classes' names, where the source knows them."""
        return self.source.classes

    @property
    def has_test(self) -> bool:
        """Whether the target has labelled samples to test on."""
        return self.target.has_test

    def prepare_data(self) -> None:
        """Those of both."""
        self.source.prepare_data()
        self.target.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set both up, and see that a network for one is a network for the other.

        Raises:
            UserError: the module learns from other batches.
            ValueError: they differ in shape or classes; one has nothing to learn from.
        """
        self._fits()
        self.source.setup(stage)
        self.target.setup(stage)
        if self._ready:
            return
        self._compare()
        for which, data in (("source", self.source), ("target", self.target)):
            if not len(data.train):
                raise ValueError(f"the {which}, {type(data).__name__}, has no training samples")
        if not self.target.has_test:
            rank_zero_warn(
                f"the target, {type(self.target).__name__}, has no labelled samples to test on: "
                "test metrics are left out"
            )
        self._target_train, self._target_val = self._held_out()
        self._ready = True

    def train_dataloader(self) -> Positioned[Any]:
        """Batches of both domains, or labelled ones of the one that is trained on.

        Raises:
            ValueError: no sample of the domain whose labels are learnt has one.
        """
        if self.train_on == "source":
            return self._training("source", labelled=True)
        if self.train_on == "target":
            return self._training("target", labelled=True)
        return Pairs(self._training("source", labelled=True), self._training("target", labelled=False))

    def val_dataloader(self) -> Positioned[Any] | list[Any]:
        """The validation samples of both domains, in order, or of the one that is trained on."""
        if self.train_on == "both":
            source, target = (
                self._judging(self.source.val, "source"),
                self._judging(_withheld(self._target_val), "target"),
            )
            return Pairs(source, target) if source or target else []
        data: LabelledData = getattr(self, self.train_on)
        return self._judging(data.val, self.train_on) or []

    def test_dataloader(self) -> Loader:
        """The target's test samples, with their labels, in order.

        Raises:
            ValueError: there are none.
        """
        found = self._judging(self.target.test, "target")
        if found is None:
            raise ValueError(f"the target, {type(self.target).__name__}, has no labelled test samples")
        return found

    def predict_dataloader(self) -> Loader:
        """What the target predicts."""
        return self.target.predict_dataloader()

    def target_inputs(self) -> Loader:
        """The target's training samples as they are, without labels, in order."""
        found = self._judging(_withheld(self._target_train), "target")
        assert found is not None
        return found

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on a device; where it is there already, itself."""
        part = batch.source if isinstance(batch, SourceTarget) else batch
        if isinstance(part, Labelled) and part.inputs.device == device:
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """What the two learnt, where they did."""
        found = {"source": self.source.state_dict(), "target": self.target.state_dict()}
        return found if any(found.values()) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read the two by what they learnt before."""
        self.source.load_state_dict(state_dict["source"])
        self.target.load_state_dict(state_dict["target"])

    def fingerprint(self) -> str:
        """SHA-256 of the two fingerprints, in hexadecimal."""
        return hashlib.sha256(f"{self.source.fingerprint()} {self.target.fingerprint()}".encode()).hexdigest()

    def _held_out(self) -> tuple[Labelled, Labelled]:
        """The target's training and validation samples: where no label made it cut the latter, some without one."""
        train, val, part = self.target.train, self.target.val, self.target.val_fraction
        free = (~train.labelled).nonzero().squeeze(1)
        if len(val) or not part or len(free) < 2:
            return train, val
        order = torch.randperm(len(free), generator=seeded("validation", self.target.split_seed))
        chosen = free[order[: min(max(round(part * len(free)), 1), len(free) - 1)]]
        left = torch.ones(len(train), dtype=torch.bool)
        left[chosen] = False
        return train[left.nonzero().squeeze(1)], train[chosen.sort().values]

    def _compare(self) -> None:
        source, target = self.source, self.target
        names = f"the source, {type(source).__name__}, ", f"the target, {type(target).__name__}, "
        if source.objective is None:
            raise ValueError(f"{names[0]}has no labels: they are what is learnt")
        if source.input_shape != target.input_shape:
            raise ValueError(
                f"{names[0]}has inputs {source.input_shape}, {names[1]}{target.input_shape}: "
                "one network takes one shape"
            )
        if target.objective is None:
            return
        if source.objective != target.objective:
            raise ValueError(f"{names[0]}is a {source.objective}, {names[1]}a {target.objective}")
        ours, theirs = source.classes, target.classes
        if ours is not None and theirs is not None and ours != theirs:
            only = [_some(set(one) - set(other)) for one, other in ((ours, theirs), (theirs, ours))]
            differ = (
                f"only the source has {only[0]}, only the target {only[1]}"
                if set(ours) != set(theirs)
                else "their order differs"
            )
            raise ValueError(f"{names[0]}and {names[1]}have other classes: {differ}")
        if source.num_classes != target.num_classes:
            raise ValueError(f"{names[0]}has {source.num_classes} classes, {names[1]}{target.num_classes}")

    def _fits(self) -> None:
        module = self.trainer.lightning_module if self.trainer is not None else None
        consumes = getattr(module, "consumes", None)
        if consumes in (Labelled, SourceTarget) and (consumes is SourceTarget) != (self.train_on == "both"):
            raise UserError(
                f"{type(module).__name__} learns from {consumes.__name__} batches: "
                + ("train_on: both" if consumes is SourceTarget else "train_on: source, or target,")
                + f" gives them, not train_on: {self.train_on}"
            )

    def _training(self, which: Literal["source", "target"], *, labelled: bool) -> Loader:
        data: LabelledData = getattr(self, which)
        samples = self.source.train if which == "source" else self._target_train
        known = samples.labelled.nonzero().squeeze(1)
        if labelled and not len(known):
            raise ValueError(f"none of the {len(samples)} training samples of the {which} has a label")
        overfitting = getattr(self.trainer, "overfit_batches", 0) > 0  # on the same batches, every epoch
        # Data with the same seed would come in the same order, each image beside the one that it was made of.
        seed = data.seed if which == "source" else hashed("target", data.seed) >> 1
        classes = data.num_classes if data.objective == "classification" else None
        return self._loader(
            samples if labelled else _withheld(samples),
            which,
            self.batch_size,
            shuffle=not overfitting,
            seed=seed,
            among=known if labelled and len(known) < len(samples) else None,
            length=max(len(self.source.train), len(self._target_train)),
            drop_last=self.source.drop_last or self.target.drop_last,
            augmentation=Augmentation(data.transforms, seed, classes) if data.transforms else None,
        )

    def _judging(self, samples: Labelled, which: str) -> Loader | None:
        data: LabelledData = getattr(self, which)
        return self._loader(samples, which, data.eval_batch_size) if len(samples) else None

    def _loader(self, samples: Labelled, which: str, batch_size: int, **order: Any) -> Loader:
        if self.trainer is not None:
            order |= {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        data: LabelledData = getattr(self, which)
        return data._batches(samples, batch_size, **order)


def _withheld(samples: Labelled) -> Labelled:
    """The same samples without a label."""
    targets = samples.targets
    value = torch.nan if targets.is_floating_point() else UNLABELLED
    hidden: Tensor = torch.full_like(targets, value)
    return replace(samples, targets=hidden)


def _some(names: set[str]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:SHOWN])) + (
        f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    )
    return shown or "none"
