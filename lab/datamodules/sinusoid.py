"""Sinusoids to be met from a few points: the regression that MAML was shown on.

C. Finn, P. Abbeel, S. Levine: Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017,
arXiv:1703.03400, section 5.1. A task is y = A sin(x − φ), with A uniform in [0.1, 5], φ in [0, π] and x in [−5, 5].
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.batch import Episodes, Labelled
from lab.datamodules.arrays import Arrays
from lab.datamodules.episodic import EpisodicData, Numbers, Split
from lab.errors import UserError
from lab.ranges import Count, checked

AMPLITUDES, PHASES, POINTS = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)


class Sinusoid(EpisodicData):
    """Tasks of ``shots`` points of a sinusoid, amplitude and phase drawn for each; judged on other points of it.

    Args:
        shots: K.
        queries: points that the adapted network is trained on.
        eval_queries: points that it is judged on.
        batch_size: tasks a batch and process.
        episodes: tasks of a training epoch.
    """

    @checked
    def __init__(
        self,
        *,
        shots: Count = 10,
        queries: Count = 10,
        eval_queries: Count = 100,
        batch_size: Count = 25,
        episodes: Count = 25_000,
        **episodic: Any,
    ) -> None:
        super().__init__(
            shots=shots, queries=queries, eval_queries=eval_queries, batch_size=batch_size, episodes=episodes,
            **episodic,
        )  # fmt: skip
        self.num_classes, self.in_channels, self.input_shape, self.objective = 1, 1, (1,), "regression"

    def draw(self, split: Split, generator: torch.Generator, count: int) -> Numbers:
        """Points ``[T, K + Q, 1]`` and what is met there, amplitudes ``[T]`` and phases ``[T]``."""
        amplitude, phase = (_between(ends, (count, 1, 1), generator) for ends in (AMPLITUDES, PHASES))
        points = _between(POINTS, (count, self.shots + self.queries_of(split), 1), generator)
        return points, amplitude * (points - phase).sin(), amplitude, phase

    def serve(self, split: Split, numbers: Numbers, epoch: int, first: int) -> Episodes:
        """The first K points are the support set."""
        points, values, *_ = numbers
        task = torch.arange(first, first + len(points))
        k = self.shots
        return Episodes(
            Labelled(points[:, :k], values[:, :k], task=task), Labelled(points[:, k:], values[:, k:], task=task)
        )

    def own(self, support: Path, path: Path) -> tuple[Labelled, Labelled]:
        """The arrays of two ``.npz`` files: ``inputs`` ``[N, 1]``, of the support set ``targets`` too."""
        try:
            known, asked = (Arrays(path=file).load() for file in (support, path))
        except (ValueError, OSError) as cause:
            raise UserError(str(cause)) from cause
        for file, samples in ((support, known), (path, asked)):
            if samples.inputs.shape[1:] != (1,):
                raise UserError(f"{file}: inputs are {list(samples.inputs.shape)}, [N, 1] is needed")
        if not known.targets.is_floating_point() or not bool(known.labelled.all()):
            raise UserError(f"{support}: every input of a support set needs its target, a real number")
        asked.targets = torch.full((len(asked), 1), torch.nan)
        known.targets = known.targets.reshape(-1, 1)
        return known, asked


def _between(ends: tuple[float, float], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    low, high = ends
    return torch.rand(shape, generator=generator) * (high - low) + low
