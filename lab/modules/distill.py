"""Knowledge distillation: a student learns what its teachers answer, not only what the labels say.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531. With the student's
logits z, the teachers' logits v_k, the temperature T (``temperature``) and w (``weight``)::

    q   = Σ_k α_k softmax(v_k / T)                     soft targets, α = ``teacher_weights``
    L   = (1 − w) · L_hard(z, y) + w · T² · KL(q ‖ softmax(z / T))

T² keeps the soft gradient's size the same at any temperature (section 2.1 of the paper). Several teachers are
averaged by probability, not by logit. Samples without a label take part in the soft term alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.artifact import Teacher
from lab.batch import Labelled
from lab.modules.supervised import Supervised, Terms
from lab.objectives.classification import Classification
from lab.ranges import Fraction, Positive, checked


def soft_targets(logits: Sequence[Tensor], temperature: float, weights: Sequence[float]) -> Tensor:
    """The teachers' softened probabilities, averaged.

    Args:
        logits: each teacher's, ``[B, K]``.
        temperature: T > 0; the higher, the closer to uniform.
        weights: each teacher's, of sum 1.

    Returns:
        ``[B, K]`` probabilities.
    """
    return torch.stack([w * F.softmax(v / temperature, dim=1) for w, v in zip(weights, logits, strict=True)]).sum(0)


def distillation_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """T² · KL(targets ‖ softmax(logits / T)), in nats, the mean over the batch.

    Args:
        logits: the student's, ``[B, K]``.
        targets: ``[B, K]`` probabilities at the same temperature.
        temperature: T > 0.

    Raises:
        ValueError: the student has other outputs than the teachers.
    """
    if logits.shape != targets.shape:
        raise ValueError(f"the student's outputs are {tuple(logits.shape)}, the teachers' {tuple(targets.shape)}")
    log_probabilities = F.log_softmax(logits / temperature, dim=1)
    return temperature**2 * F.kl_div(log_probabilities, targets, reduction="batchmean")


class Distill(Supervised):
    """Trains a network to answer as one or several frozen teachers do.

    Args:
        teacher: one, or a list of them; frozen, in eval mode, with the student's outputs.
        temperature: T in the equations above.
        weight: w in the equations above; 1 learns from the teachers alone and needs no labels.
        teacher_weights: one a teacher, scaled to sum 1; equal where they are left out.
        cache: ask the teachers once for every training sample and keep the answers, where the data says that its
            inputs are the same in every epoch; else, and where it cannot say, at every step.

    Raises:
        ValueError: no teacher; weights that don't fit the teachers; an objective other than classification.
    """

    learns_unlabelled: ClassVar[bool] = True

    @checked
    def __init__(
        self,
        teacher: Teacher | list[Teacher],
        temperature: Positive = 4.0,
        weight: Fraction = 0.9,
        teacher_weights: tuple[Positive, ...] | None = None,
        cache: bool = True,
        **supervised: Any,
    ) -> None:
        super().__init__(**supervised)
        self.teachers = teacher if isinstance(teacher, list) else [teacher]
        if not self.teachers:
            raise ValueError("distillation needs a teacher, and the list of them is empty")
        shares = teacher_weights or (1.0,) * len(self.teachers)
        if len(shares) != len(self.teachers):
            raise ValueError(f"{len(shares)} teacher_weights for {len(self.teachers)} teachers")
        if not isinstance(self.objective, Classification):
            raise ValueError(
                f"soft targets are class probabilities: {type(self.objective).__name__} is no classification"
            )
        self.teacher_weights = [share / sum(shares) for share in shares]
        self.temperature = temperature
        self.weight = weight
        self.cache = cache
        self._cached: Tensor | None = None  # [N, K], by the samples' index

    def loss(self, batch: Labelled) -> Terms:
        """The hard loss of the labelled samples and the soft loss of all."""
        logits = self.network(batch.inputs)  # (B, K)
        hard = self.objective.loss(logits, batch.targets)
        soft = distillation_loss(logits, self._soft_targets(batch), self.temperature)
        return Terms((1 - self.weight) * hard + self.weight * soft, hard=hard, soft=soft)

    def ask(self, inputs: Tensor) -> Tensor:
        """The teachers' soft targets for ``[B, ...]`` inputs, ``[B, K]``.

        Raises:
            ValueError: teachers with other outputs than each other.
        """
        answers = [teacher(inputs) for teacher in self.teachers]
        if len({answer.shape for answer in answers}) > 1:
            raise ValueError(f"the teachers' outputs differ: {', '.join(str(tuple(a.shape)) for a in answers)}")
        return soft_targets(answers, self.temperature, self.teacher_weights)

    def on_fit_start(self) -> None:
        """Ask the teachers about every training sample, where its inputs never change."""
        fixed = getattr(getattr(self.trainer, "datamodule", None), "fixed_train_inputs", None)
        inputs = fixed() if self.cache and callable(fixed) else None
        self._cached = None
        if inputs is not None:
            precision = self.trainer.precision_plugin
            with precision.forward_context():
                self._cached = torch.cat([self.ask(precision.convert_input(part.to(self.device))) for part in inputs])

    def on_fit_end(self) -> None:
        """Forget the answers: they are the training's alone."""
        self._cached = None

    def _soft_targets(self, batch: Labelled) -> Tensor:
        if self._cached is None or batch.index is None:
            return self.ask(batch.inputs)
        return self._cached.index_select(0, batch.index)
