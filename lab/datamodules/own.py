"""What data of the user's own share: prediction for every sample, and other data in their place later.

``lab predict RUN data.path=NEW`` gives a run's network other data than it was trained on. What was learnt from the
training data, the order of the classes, a vocabulary, a scale, is the run's: it is kept with it, and new data are
read by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from lab.batch import UNLABELLED, Labelled
from lab.datamodules.labelled import LabelledData, Splits
from lab.datamodules.lazy import Lazy
from lab.datamodules.loader import Loader
from lab.ranges import checked
from lab.registry import nearest

SHOWN = 5
"""How many unknown classes an error names."""

T = TypeVar("T")


class OwnData(LabelledData):
    """Data of the user's own; a subclass reads them.

    Prediction is for *every* sample, labelled or not, in the order of the data; of data that come split, training
    samples first, then validation, then test. ``val_fraction: 0`` and ``test_fraction: 1`` test on every labelled
    sample of data that don't.

    ``learnt`` is what a run keeps: plain values, none before :meth:`setup`. Where it was there before, data are read by
    it instead of being learnt from. ``kept`` says of what type each value is: those of a run's folder may be anyone's.
    """

    kept: ClassVar[dict[str, Any]] = {}

    @checked
    def __init__(self, **labelled: Any) -> None:
        super().__init__(**labelled)
        self.learnt: dict[str, Any] = {}
        self._given = False

    @property
    def given(self) -> bool:
        """Whether what was learnt came from elsewhere: these are new data of a finished run."""
        return self._given

    def state_dict(self) -> dict[str, Any]:
        """What was learnt from training data."""
        return dict(self.learnt)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Read data by what was learnt from others.

        Raises:
            ValueError: these data have been read already, and gave something else; or a value is of another type than
                this data learns.
        """
        for key in self.kept.keys() & state_dict.keys():
            try:
                TypeAdapter(self.kept[key]).validate_python(state_dict[key], strict=True)
            except ValidationError as cause:
                raise ValueError(f"{key}: {cause.errors()[0]['msg'].lower()}") from cause
        if self._ready and self.learnt != state_dict:
            differing = [key for key in {**self.learnt, **state_dict} if self.learnt.get(key) != state_dict.get(key)]
            raise ValueError(
                f"the {' and '.join(differing)} of the data are not those that were trained on: the data have changed"
            )
        self.learnt, self._given = dict(state_dict), bool(state_dict)

    def once(self, key: str, find: Callable[[], T]) -> T:
        """What was learnt under a name, found now where nothing was."""
        if key not in self.learnt:
            self.learnt[key] = find()
        return cast(T, self.learnt[key])

    def predict_dataloader(self) -> Loader:
        """Every sample, in order."""
        loaded = self.load() if self._loaded is None else self._loaded
        parts = loaded if isinstance(loaded, Splits) else [loaded]
        everything = joined([part for part in parts if part is not None and len(part)])
        return self._batches(self.prepared(everything), self.eval_batch_size)


def joined(parts: Sequence[Labelled]) -> Labelled:
    """Samples end to end; those that are read when they are served are of one source."""
    if len(parts) == 1:
        return parts[0]
    targets = torch.cat([part.targets for part in parts])
    lazy = [cast(Lazy, part.inputs) for part in parts if isinstance(part.inputs, Lazy)]
    if not lazy:
        return Labelled(torch.cat([part.inputs for part in parts]), targets)
    return Labelled(streamed(Lazy(lazy[0].source, torch.cat([each.positions for each in lazy]))), targets)


def streamed(inputs: Lazy) -> Tensor:
    """Inputs that are read when they are served, typed as what loaders take them for."""
    return cast(Tensor, inputs)


def indices(names: Sequence[str | None], classes: Sequence[str], where: str) -> Tensor:
    """``[N]`` positions of names in ``classes``; ``UNLABELLED`` for None.

    Args:
        where: names are from, for the error.

    Raises:
        ValueError: names that are not in ``classes``.
    """
    places: dict[str | None, int] = {name: place for place, name in enumerate(classes)}
    places[None] = UNLABELLED
    unknown = sorted({name for name in names if name not in places and name is not None})
    if unknown:
        shown = ", ".join(map(repr, unknown[:SHOWN])) + (f" and {len(unknown) - SHOWN} more" if unknown[SHOWN:] else "")
        hint = nearest(unknown[0], list(classes)) if len(classes) <= 4 * SHOWN else f" (there are {len(classes)})"
        raise ValueError(f"{where}: the class{'es' * (len(unknown) > 1)} {shown} is unknown to training{hint}")
    return torch.tensor([places[name] for name in names], dtype=torch.int64)
