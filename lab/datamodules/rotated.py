"""Rotated images: the same question in every task, the images turned by another angle.

D. Lopez-Paz and M. Ranzato: Gradient Episodic Memory for Continual Learning, NeurIPS 2017, arXiv:1706.08840.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from lab.batch import Labelled
from lab.datamodules.labelled import LabelledData
from lab.datamodules.stream import TaskStream
from lab.ranges import Count, checked


class Rotated(TaskStream):
    """Images turned by an angle of their task's, bilinearly, what comes in from outside black.

    Args:
        source: images ``(C, H, W)``, labelled.
        tasks: how many.
        largest: degrees, counter-clockwise; without ``angles`` task t of T is turned by t / T of it.
        angles: degrees, one a task, in their order.

    Raises:
        ValueError: the source is no images, or there is not one angle a task.
    """

    @checked
    def __init__(
        self,
        source: LabelledData,
        tasks: Count = 10,
        largest: Annotated[float, Ge(0)] = 180.0,
        angles: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(source)
        self.tasks = tasks
        self.angles = [largest * task / tasks for task in range(tasks)] if angles is None else list(angles)
        if len(self.angles) != tasks:
            raise ValueError(f"{len(self.angles)} angles for {tasks} tasks: one each is needed")

    def prepare_tasks(self) -> None:
        """See that there are images."""
        if len(self.source.input_shape) != 3:
            raise ValueError(
                f"rotated takes images (C, H, W), {type(self.source).__name__} has {tuple(self.source.input_shape)}"
            )

    def task_members(self, samples: Labelled) -> list[Tensor]:
        """All, in every task."""
        return [torch.arange(len(samples))] * self.tasks

    def changed(self, inputs: Tensor, task: int) -> Tensor:
        """``[B, C, H, W]`` turned by the task's angle."""
        angle = self.angles[task] % 360
        if not angle:
            return inputs
        cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        height, width = inputs.shape[2:]
        back = [[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]]  # where a pixel comes from
        turn = torch.tensor(back, dtype=inputs.dtype, device=inputs.device).expand(len(inputs), 2, 3)
        grid = F.affine_grid(turn, list(inputs.shape), align_corners=False)
        return F.grid_sample(inputs, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
