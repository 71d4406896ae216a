"""Anyone's data loader, made to go on from where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lab import state


class Replayed:
    """A loader that knows nothing of resuming: an epoch that was left is read again up to the batch to come.

    An epoch begins when its first batch is asked for, with the global random generators as they are then; a resumed
    epoch begins with the same, so that orders, and what workers draw, are the same. Reading again takes its time, once.
    What workers that outlive an epoch (``persistent_workers``) draw in later epochs cannot be repeated.

    Args:
        loader: anything that gives batches; everything else about it is asked of it.
        ahead: whether one batch more is fetched than is trained on, as Lightning does where it cannot know the last.
    """

    def __init__(self, loader: Any, ahead: Callable[[], bool] = lambda: False) -> None:
        self.loader = loader
        self._fetches_ahead = ahead
        self._ahead = False  # in this epoch
        self._served = 0
        self._began: state.State | None = None
        self._before_last: state.State | None = None
        self._left: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """The batch to come, and how its epoch began."""
        served = max(self._served - self._ahead, 0)
        before = self._before_last if self._ahead else None
        return {"served": served, "began": self._began if self._served else None, "before": before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next epoch be the one that was left."""
        self._left = state_dict

    def __iter__(self) -> Iterator[Any]:
        self._served, self._began = 0, None
        left, self._left = self._left, None
        return self._batches(left if left and left["began"] is not None else None)

    def _batches(self, left: dict[str, Any] | None) -> Iterator[Any]:
        now = state.randomness()
        if left is not None:
            state.set_randomness(left["began"])
        self._began, self._ahead = now if left is None else left["began"], self._fetches_ahead()
        batches = iter(self.loader)
        if left is not None:
            for _ in range(left["served"]):
                next(batches)
            self._served = left["served"]
            state.set_randomness(left["before"] or now)
        while True:
            if self._ahead:
                self._before_last = state.randomness()
            try:
                batch = next(batches)
            except StopIteration:
                self._served += self._ahead  # what was fetched ahead is that there is no more
                return
            self._served += 1
            yield batch
