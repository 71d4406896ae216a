"""Experience replay: some samples of earlier tasks are kept, and learnt again beside the new ones.

D. Rolnick, A. Ahuja, J. Schwarz, T. Lillicrap, G. Wayne: Experience Replay for Continual Learning, NeurIPS 2019,
arXiv:1811.11682; A. Chaudhry et al.: On Tiny Episodic Memories in Continual Learning, 2019, arXiv:1902.10486. The
memory holds M = ``memory`` samples of the tasks before the current one, chosen when a task ends:

- ``reservoir``: each sample seen so far is as likely to be in it as any other (J. Vitter: Random Sampling with a
  Reservoir, 1985). Every sample has a random number of its own; the M smallest stay.
- ``balanced``: the same within each class and task, all of them with equal shares of M.

A step learns from the mean of the objective over the new batch and as many samples from the memory.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lab.batch import Labelled, Tasks
from lab.modules.continual import Continual
from lab.modules.supervised import Terms
from lab.ranges import Count, checked
from lab.transforms import Draw, hashed


def reservoir(places: Tensor, size: int, seed: int) -> Tensor:
    """``[M]`` of ``[N]`` places, uniformly chosen; one that is chosen among more is also chosen among fewer.

    Args:
        places: whole numbers, each once.
        size: M; all where there are fewer.
        seed: of the choice.
    """
    numbers = Draw(places.cpu(), "memory", seed).uniform(2)  # 48 bits decide
    order = (numbers[:, 0].double() + numbers[:, 1].double() * 2.0**-24).argsort(stable=True)
    return places[order[:size].to(places.device)]


def balanced(places: Tensor, groups: Tensor, size: int, seed: int) -> Tensor:
    """``[M]`` of ``[N]`` places, equal shares of each group; the room that a small group leaves goes to the others.

    Args:
        groups: ``[N]``, of which group each place is.
        size: M; all where there are fewer.
        seed: of the choice.
    """
    order = reservoir(torch.arange(len(places)), len(places), seed)
    ordered = groups[order]
    turn = torch.zeros(len(places), dtype=torch.int64)
    for group in set(ordered.tolist()):
        members = (ordered == group).nonzero().squeeze(1)
        turn[members] = torch.arange(len(members))
    return places[order[turn.argsort(stable=True)[:size]]]


class Replay(Continual):
    """Learns each task beside remembered samples of earlier ones.

    Args:
        memory: M, how many samples are kept in all.
        choice: ``reservoir`` or ``balanced``.
        seed: of the choice and of what is learnt again; the recipe's.
    """

    unsaved: ClassVar[tuple[str, ...]] = ("_remembered",)

    @checked
    def __init__(
        self,
        memory: Count = 200,
        choice: Literal["reservoir", "balanced"] = "balanced",
        *,
        seed: int = 0,
        **continual: Any,
    ) -> None:
        super().__init__(**continual)
        self.memory = memory
        self.choice = choice
        self.seed = seed
        self._remembered: tuple[int, Tasks] | None = None

    def loss(self, batch: Labelled) -> Terms:
        """The objective's, over the batch and remembered samples."""
        if not self.task or self.stream.at_once:
            return super().loss(batch)
        old = self.recalled(batch)
        both = Tasks(*(torch.cat([getattr(batch, part), getattr(old, part)]) for part in _PARTS))
        answers = self.answers(both)
        new = len(batch)
        loss = self.objective.loss(answers, both.targets)
        with torch.no_grad():
            parts = {
                "task": self.objective.loss(answers[:new], batch.targets),
                "memory": self.objective.loss(answers[new:], old.targets),
            }
        return Terms(loss, **parts)

    def recalled(self, batch: Labelled) -> Tasks:
        """As many samples of the memory as a batch has, drawn anew at every step: of those of the step, its part."""
        memory = self.remembered()
        begin, whole = (batch.part.begin, batch.part.samples) if batch.part is not None else (0, len(batch))
        generator = torch.Generator().manual_seed(hashed("replay", self.seed, self.trainer.global_step) >> 1)
        rounds = -(-whole // len(memory))
        drawn = torch.cat([torch.randperm(len(memory), generator=generator) for _ in range(rounds)])
        return memory[drawn[begin : begin + len(batch)].to(memory.targets.device)]  # type: ignore[return-value]

    def remembered(self) -> Tasks:
        """The memory: a function of the seed and the tasks seen alone, so that nothing of it needs to be saved."""
        if self._remembered is None or self._remembered[0] != self.task:
            places, tasks, targets = self.stream.places(range(self.task))
            if self.choice == "balanced":
                classes = 0 if targets.is_floating_point() else targets
                chosen = balanced(places, tasks * (int(targets.max()) + 1) + classes, self.memory, self.seed)
            else:
                chosen = reservoir(places, self.memory, self.seed)
            samples = self.trainer.strategy.batch_to_device(self.stream.at(chosen), self.device)
            samples.inputs = self.trainer.precision_plugin.convert_input(samples.inputs)
            self._remembered = self.task, samples
        return self._remembered[1]


_PARTS = ("inputs", "targets", "index", "task")
