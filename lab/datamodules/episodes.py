"""N-way K-shot tasks from any labelled data.

``{name: episodes, source: {name: glyphs}, ways: 5, shots: 1}``. A task has N = ``ways`` of the source's classes, K =
``shots`` of each to learn from and ``queries`` others of each to be judged on (O. Vinyals et al.: Matching Networks for
One Shot Learning, NeurIPS 2016, arXiv:1606.04080). All samples of the source are used, and its classes are split: those
of training, validation and test have none in common. Which class is which of the N is drawn anew in every task.

Support and query sets are in the order of their samples, one of each class, then another of each: any N in a row are
one of each class.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge

from lab.batch import Episodes as Tasks
from lab.batch import Labelled
from lab.datamodules.episodic import EpisodicData, Numbers, Split, distinct
from lab.datamodules.images import Images
from lab.datamodules.labelled import LabelledData
from lab.datamodules.loader import Reader, pixels, seeded
from lab.datamodules.own import joined
from lab.errors import UserError
from lab.ranges import Fraction, checked


class Episodes(EpisodicData):
    """N-way K-shot tasks of a source's classes, which are split in three.

    Args:
        source: labelled data of many classes.
        ways: N, classes of a task.
        rotations: turn each class of a training task by a multiple of 90°, drawn anew: four classes of one.
        val_classes: part of the classes to validate on, drawn at random; a source may say itself which.
        test_classes: part of the classes to test on.
        class_seed: draws them.

    Raises:
        ValueError: the source has no classes; there are more ways than classes in a split; a class has fewer samples
            than ``shots`` + ``queries``.
    """

    @checked
    def __init__(
        self,
        source: LabelledData,
        ways: Annotated[int, Ge(2)] = 5,
        *,
        rotations: bool = False,
        val_classes: Fraction = 0.15,
        test_classes: Fraction = 0.2,
        class_seed: int = 0,
        **episodic: Any,
    ) -> None:
        super().__init__(**episodic)
        if val_classes + test_classes >= 1:
            raise ValueError(
                f"val_classes={val_classes} and test_classes={test_classes} leave no class to learn from: "
                "together they must be less than 1"
            )
        if source.transforms:
            raise ValueError("the source's transforms would be left out: episodes turns classes by `rotations`")
        self.source = source
        self.ways = ways
        self.rotations = rotations
        self.val_classes = val_classes
        self.test_classes = test_classes
        self.class_seed = class_seed
        self.num_classes, self.objective = ways, "classification"
        self.split_classes: dict[str, list[int]] = {}
        """The source's classes, by split."""
        self._reader: Reader | None = None

    def prepare_data(self) -> None:
        """The source's."""
        self.source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set the source up, split its classes, and see that there are enough of them, and of their samples.

        Raises:
            ValueError: there are not.
        """
        if self._reader is not None:
            return
        source = self.source
        source.setup("fit")
        if source.objective != "classification":
            raise ValueError(f"episodes are made of classes, {type(source).__name__} has none")
        parts = [
            part[part.labelled.nonzero().squeeze(1)] for part in (source.train, source.val, source.test) if len(part)
        ]
        samples = joined([Labelled(part.inputs, part.targets) for part in parts])
        self.input_shape, self.in_channels = tuple(samples.inputs.shape[1:]), int(samples.inputs.shape[1])
        if self.rotations and (len(self.input_shape) != 3 or self.input_shape[1] != self.input_shape[2]):
            raise ValueError(f"rotations turn square images (C, H, H), {type(source).__name__} has {self.input_shape}")
        self._by_class = samples.targets.argsort(stable=True)
        self._sizes = samples.targets.bincount(minlength=source.num_classes or 0)
        self._starts = self._sizes.cumsum(0) - self._sizes
        self.split_classes = getattr(source, "class_splits", None) or self._dealt()
        for split in ("train", "val", "test"):
            self._enough(split)
        self._pools = {split: torch.tensor(classes) for split, classes in self.split_classes.items()}
        self._reader = Reader(samples)

    def draw(self, split: Split, generator: torch.Generator, count: int) -> Numbers:
        """Samples ``[T, K + Q, N]`` as positions in the pool, and the classes' quarter turns ``[T, N]``."""
        pool = self._pools[split]
        classes = pool[distinct(torch.full((count,), len(pool)), self.ways, generator)]  # (T, N)
        each = self.shots + self.queries_of(split)
        places = distinct(self._sizes[classes], each, generator)  # (T, N, K + Q)
        positions = self._by_class[self._starts[classes].unsqueeze(-1) + places].transpose(1, 2).contiguous()
        return positions, torch.randint(4, (count, self.ways), generator=generator)

    def serve(self, split: Split, numbers: Numbers, epoch: int, first: int) -> Tasks:
        """Their images, and each one's class, 0 to N − 1."""
        positions, turns = numbers
        assert self._reader is not None
        tasks, each, ways = positions.shape
        inputs = pixels(self._reader.samples.inputs.index_select(0, positions.reshape(-1)))
        if self.rotations and split == "train":
            turned = turns.unsqueeze(1).expand(tasks, each, ways).reshape(-1)
            for quarter in (1, 2, 3):
                chosen = (turned == quarter).nonzero().squeeze(1)
                inputs[chosen] = inputs[chosen].rot90(quarter, (-2, -1))
        inputs = inputs.view(tasks, each * ways, *self.input_shape)
        index = positions.view(tasks, each * ways)
        targets = torch.arange(ways).repeat(each).expand(tasks, each * ways)
        task, k = torch.arange(first, first + tasks), self.shots * ways
        return Tasks(
            Labelled(inputs[:, :k], targets[:, :k], index[:, :k], task),
            Labelled(inputs[:, k:], targets[:, k:], index[:, k:], task),
        )

    def own(self, support: Path, path: Path) -> tuple[Labelled, Labelled]:
        """A folder with a folder of images for each class, and one of images, made like the source's."""
        if len(self.input_shape) != 3 or self.in_channels not in (1, 3):
            raise UserError(f"a support folder has images, {type(self.source).__name__} has inputs {self.input_shape}")
        given: Any = {"channels": self.in_channels, "size": self.input_shape[1:], "in_memory": True}
        known, asked = (_loaded(folder, **given) for folder in (support, path))
        if not bool(known.labelled.all()):
            raise UserError(f"{support}: a support set has a folder for each class, its images lie beside each other")
        if (classes := len(torch.unique(known.targets))) > self.ways:
            raise UserError(
                f"{support} has {classes} classes, the network answers for {self.ways} (data.ways): "
                f"take at most {self.ways}, or train it with more"
            )
        asked.targets = torch.full((len(asked),), -1)
        return known, asked

    def fingerprint(self) -> str:
        """SHA-256 of the source's, of its classes' split, and of tasks, in hexadecimal."""
        total = f"{self.source.fingerprint()} {self.split_classes} {super().fingerprint()}"
        return hashlib.sha256(total.encode()).hexdigest()

    def _dealt(self) -> dict[str, list[int]]:
        """The classes that have samples, dealt out at random."""
        there = self._sizes.nonzero().squeeze(1)
        order = there[torch.randperm(len(there), generator=seeded("classes", self.class_seed))].tolist()
        test, val = (round(len(order) * part) for part in (self.test_classes, self.val_classes))
        return {
            "test": sorted(order[:test]), "val": sorted(order[test : test + val]), "train": sorted(order[test + val :]),
        }  # fmt: skip

    def _enough(self, split: Split) -> None:
        """Whether a split's tasks can be drawn."""
        classes = self.split_classes[split]
        if split == "val" and not self.val_episodes:
            return
        if len(classes) < self.ways:
            raise ValueError(
                f"ways={self.ways}, but there are {len(classes)} {split} classes of {type(self.source).__name__}'s "
                f"{int((self._sizes > 0).sum())}: fewer ways, or other val_classes and test_classes"
            )
        queries = self.queries_of(split)
        smallest = min(classes, key=lambda number: int(self._sizes[number]))
        if (size := int(self._sizes[smallest])) < self.shots + queries:
            names = self.source.classes
            named = f" ({names[smallest]})" if names else ""
            what = "queries" if split == "train" else "eval_queries"
            raise ValueError(
                f"shots={self.shots} and {what}={queries} are {self.shots + queries} samples of a class, but "
                f"{split} class {smallest}{named} has {size}"
            )


def _loaded(folder: Path, **given: Any) -> Labelled:
    """All images of a folder.

    Raises:
        UserError: there are none, or only those of one class.
    """
    try:
        parts = [part for part in Images(path=folder, **given).load() if part is not None]
    except (ValueError, OSError) as cause:
        raise UserError(str(cause)) from cause
    inputs, targets = (torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets"))
    return Labelled(pixels(inputs), targets)
