"""Split data: every task has classes of its own.

F. Zenke, B. Poole, S. Ganguli: Continual Learning Through Synaptic Intelligence, ICML 2017, arXiv:1703.04200 (split
MNIST); the three scenarios after G. van de Ven, T. Tuytelaars, A. Tolias: Three Types of Incremental Learning, Nature
Machine Intelligence 4, 2022.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lab.batch import UNLABELLED, Labelled
from lab.datamodules.labelled import LabelledData
from lab.datamodules.loader import seeded
from lab.datamodules.stream import TaskStream
from lab.ranges import Count, Whole, checked


class Split(TaskStream):
    """The source's classes dealt out to tasks.

    In the scenario ``domain`` the targets are a class's place within its task (of digits in pairs: the first or the
    second of the two); in ``task`` and ``class`` they are the source's classes, and a network has an output for each.
    In ``task`` the outputs of a sample's own task alone are asked, in ``class`` those of all tasks seen so far.

    Args:
        source: labelled data of several classes.
        tasks: how many; the classes are shared as evenly as it goes.
        scenario: what a network is told and asked.
        classes: each task's, as numbers of the source's classes, in their order; classes that are in none are left out.
        task_seed: deals the classes out at random; in their order where it is None.

    Raises:
        ValueError: there are more tasks than classes, a class is in two tasks or is none of the source's, or a task has
            no samples.
    """

    @checked
    def __init__(
        self,
        source: LabelledData,
        tasks: Count = 5,
        scenario: Literal["domain", "task", "class"] = "domain",
        classes: tuple[tuple[Whole, ...], ...] | None = None,
        task_seed: int | None = None,
    ) -> None:
        super().__init__(source)
        self.tasks = tasks
        self.scenario = scenario
        self.task_seed = task_seed
        self.dealt = [list(task) for task in classes] if classes is not None else []
        if classes is not None and len(classes) != tasks:
            raise ValueError(f"{len(classes)} lists of classes for {tasks} tasks: one each is needed")

    @property
    def num_classes(self) -> int | None:
        """Outputs that a network needs: of the largest task, or for all of the source's classes."""
        if self.scenario == "domain":
            return max(map(len, self.dealt)) if self.dealt else None
        return self.source.num_classes

    def prepare_tasks(self) -> None:
        """Deal the classes out."""
        count = self.source.num_classes or 0
        if self.source.objective != "classification":
            raise ValueError(f"split parts data by their classes, {type(self.source).__name__} has none")
        if not self.dealt:
            if self.tasks > count:
                raise ValueError(f"{self.tasks} tasks need as many classes, {type(self.source).__name__} has {count}")
            chance = self.task_seed is not None
            order = torch.randperm(count, generator=seeded("split", self.task_seed or 0)) if chance else range(count)
            each = [int(number) for number in order]
            self.dealt = [each[count * t // self.tasks : count * (t + 1) // self.tasks] for t in range(self.tasks)]
        everything = [number for task in self.dealt for number in task]
        if twice := sorted({number for number in everything if everything.count(number) > 1}):
            raise ValueError(f"class {twice[0]} is in more than one place of the tasks' classes")
        if everything and max(everything) >= count:
            raise ValueError(f"class {max(everything)} is none of the {count} of {type(self.source).__name__}, from 0")
        self._task_of_class, self._place_of_class = torch.full((count,), -1), torch.zeros(count, dtype=torch.int64)
        for task, numbers in enumerate(self.dealt):
            self._task_of_class[numbers] = task
            self._place_of_class[numbers] = torch.arange(len(numbers))
        self.heads = None if self.scenario == "domain" else self.dealt

    def named(self, task: int) -> str:
        """Its classes."""
        return f" (classes {', '.join(map(str, self.dealt[task])) or 'none'})"

    def task_members(self, samples: Labelled) -> list[Tensor]:
        """Those of its classes; samples without a label are no task's."""
        known = samples.targets.clamp(min=0)
        task = torch.where(samples.targets == UNLABELLED, -1, self._task_of_class[known])
        return [(task == number).nonzero().squeeze(1) for number in range(self.tasks)]

    def retargeted(self, targets: Tensor, tasks: Tensor) -> Tensor:
        """``[B]`` classes as the scenario asks for them."""
        return self._place_of_class[targets] if self.scenario == "domain" else targets
