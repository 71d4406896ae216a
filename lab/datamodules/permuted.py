"""Permuted data: the same question in every task, asked of pixels in another order.

I. Goodfellow, M. Mirza, D. Xiao, A. Courville, Y. Bengio: An Empirical Investigation of Catastrophic Forgetting in
Gradient-Based Neural Networks, 2014, arXiv:1312.6211. The first task has the pixels as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lab.batch import Labelled
from lab.datamodules.labelled import LabelledData
from lab.datamodules.loader import seeded
from lab.datamodules.stream import TaskStream
from lab.ranges import Count, checked


class Permuted(TaskStream):
    """A fixed permutation of the positions of images, all channels alike, or of the features of vectors, in each task.

    Args:
        source: images ``(C, H, W)`` or vectors ``(F,)``, labelled.
        tasks: how many; the first is the source as it is.
        task_seed: of the permutations; runs with other seeds learn the same tasks.

    Raises:
        ValueError: the source is neither images nor vectors.
    """

    @checked
    def __init__(self, source: LabelledData, tasks: Count = 10, task_seed: int = 0) -> None:
        super().__init__(source)
        self.tasks = tasks
        self.task_seed = task_seed

    def prepare_tasks(self) -> None:
        """Draw the permutations."""
        shape = self.source.input_shape
        if len(shape) not in (1, 3) or self.source.train.inputs.dtype == torch.int64:
            raise ValueError(
                f"permuted takes images (C, H, W) or vectors (F,), {type(self.source).__name__} has inputs "
                f"{tuple(shape)} of {self.source.train.inputs.dtype}"
            )
        size = shape[0] if len(shape) == 1 else shape[1] * shape[2]
        self.orders = [
            torch.randperm(size, generator=seeded("permuted", self.task_seed, task)) if task else torch.arange(size)
            for task in range(self.tasks)
        ]

    def task_members(self, samples: Labelled) -> list[Tensor]:
        """All, in every task."""
        return [torch.arange(len(samples))] * self.tasks

    def changed(self, inputs: Tensor, task: int) -> Tensor:
        """``[B, C, H, W]`` or ``[B, F]`` in the task's order."""
        if not task:
            return inputs
        flat = inputs.flatten(2) if inputs.ndim == 4 else inputs
        return flat.index_select(-1, self.orders[task]).reshape(inputs.shape)
