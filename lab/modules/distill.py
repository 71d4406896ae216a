"""Knowledge distillation: a student learns what its teachers answer, not only what the labels say.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531. With the student's
logits z, the teachers' logits v_k, the temperature T (``temperature``) and w (``weight``)::

    q   = Σ_k α_k softmax(v_k / T)                     soft targets, α = ``teacher_weights``
    L   = (1 − w) · L_hard(z, y) + w · T² · KL(q ‖ softmax(z / T)) + h · L_hint + a · L_attention

T² keeps the soft gradient's size the same at any temperature (section 2.1 of the paper). Several teachers are
averaged by probability, not by logit. Samples without a label take part in all terms but the hard one.

- ``standardize``: z and v_k are first standardised, each sample's logits to mean 0 and standard deviation 1: the
  student learns their relations, not their range (S. Sun et al.: Logit Standardization in Knowledge Distillation,
  CVPR 2024, arXiv:2403.01993).
- ``hints``, h = ``hint_weight``: L_hint = ½ · mean (r(s) − t)², over pairs of a layer of the student, s, and one of the
  (first) teacher, t; r is a linear map of channels that is learnt and then thrown away (A. Romero et al.: FitNets, ICLR
  2015, arXiv:1412.6550).
- ``attention``, a = ``attention_weight``: L_attention = ½ · Σ ‖ρ(s) − ρ(t)‖², where ρ(x) is Σ_c x_c² over the
  channels, as a vector over positions, scaled to length 1 (S. Zagoruyko and N. Komodakis: Paying More Attention to
  Attention, ICLR 2017, arXiv:1612.03928; the squared norm, as in the authors' code).

Where two maps differ in height and width, both are averaged down to the smaller.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.artifact import Teacher
from lab.batch import Labelled
from lab.modules.supervised import Supervised, Terms
from lab.objectives.classification import Classification
from lab.ranges import Fraction, NonNegative, Positive, checked
from lab.registry import nearest

IN_MEMORY = 2**28
"""Bytes of teachers' answers that are kept on the device; more go to a memory-mapped file, in half precision."""


def standardized(logits: Tensor) -> Tensor:
    """``[B, K]`` logits, each sample's with mean 0 and standard deviation 1."""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, correction=0, keepdim=True) + 1e-7)


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


def hint_loss(projected: Tensor, hint: Tensor) -> Tensor:
    """½ · the mean squared difference of two ``[B, C, ...]`` feature tensors of one number of channels."""
    projected, hint = _same_size(projected, hint)
    return 0.5 * F.mse_loss(projected, hint)


def attention_loss(features: Tensor, hint: Tensor) -> Tensor:
    """½ · ‖ρ(features) − ρ(hint)‖², the mean over the batch, of ``[B, C, H, W]`` maps of any numbers of channels."""
    maps = (F.normalize(one.square().sum(1).flatten(1), dim=1) for one in _same_size(features, hint))
    student, teacher = maps
    return 0.5 * (student - teacher).square().sum(1).mean()


def _same_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps averaged down to the smaller height and width."""
    if one.ndim != 4 or other.ndim != 4 or one.shape[2:] == other.shape[2:]:
        return one, other
    size = min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3])
    return F.adaptive_avg_pool2d(one, size), F.adaptive_avg_pool2d(other, size)


class Distill(Supervised):
    """Trains a network to answer as one or several frozen teachers do.

    Args:
        teacher: one, or a list of them; frozen, in eval mode, with the student's outputs.
        temperature: T in the equations above.
        weight: w in the equations above; 1 learns from the teachers alone and needs no labels.
        teacher_weights: one a teacher, scaled to sum 1; equal where they are left out.
        standardize: whether logits are standardised first; 2 or so is then a usual temperature.
        hints: layers of the student, each with the layer of the teacher that it is to resemble, by module name
            (``body.2: body.2``).
        hint_weight: h in the equations above.
        attention: the same for attention transfer; layers whose outputs are maps.
        attention_weight: a in the equations above.
        input_shape: of one sample; needed for hints, whose maps are made for the layers' sizes. The data's.
        cache: ask the teachers once for every training sample and keep the answers, where the data says that its
            inputs are the same in every epoch and no layers are asked for; else at every step.

    Raises:
        ValueError: no teacher; weights that don't fit the teachers; an objective other than classification; layers that
            there are not, or whose outputs cannot be compared.
    """

    learns_unlabelled: ClassVar[bool] = True

    @checked
    def __init__(
        self,
        teacher: Teacher | list[Teacher],
        temperature: Positive = 4.0,
        weight: Fraction = 0.9,
        teacher_weights: tuple[Positive, ...] | None = None,
        *,
        standardize: bool = False,
        hints: dict[str, str] | None = None,
        hint_weight: NonNegative = 1.0,
        attention: dict[str, str] | None = None,
        attention_weight: NonNegative = 100.0,
        input_shape: tuple[int, ...] | None = None,
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
        self.standardize = standardize
        self.hints = hints or {}
        self.hint_weight = hint_weight
        self.attention = attention or {}
        self.attention_weight = attention_weight
        self.cache = cache
        self.projections = self._projections(input_shape)
        self._cached: Tensor | None = None  # [N, K], by the samples' index

    def loss(self, batch: Labelled) -> Terms:
        """The hard loss of the labelled samples, and the other terms of all."""
        with _listening(self.network, {*self.hints, *self.attention}) as ours:
            logits = self.network(batch.inputs)  # (B, K)
        with _listening(self.teachers[0].network, {*self.hints.values(), *self.attention.values()}) as theirs:
            targets = self._soft_targets(batch)
        hard = self.hard(logits, batch)
        soft = distillation_loss(self._scaled(logits), targets, self.temperature)
        terms = {"hard": hard, "soft": soft}
        total = (1 - self.weight) * hard + self.weight * soft
        if self.hints:
            pairs = zip(self.hints.items(), self.projections, strict=True)
            terms["hint"] = torch.stack([hint_loss(r(ours[s]), theirs[t]) for (s, t), r in pairs]).sum()
            total = total + self.hint_weight * terms["hint"]
        if self.attention:
            losses = [attention_loss(ours[s], theirs[t]) for s, t in self.attention.items()]
            terms["attention"] = torch.stack(losses).sum()
            total = total + self.attention_weight * terms["attention"]
        return Terms(total, **terms)

    def ask(self, inputs: Tensor) -> Tensor:
        """The teachers' soft targets for ``[B, ...]`` inputs, ``[B, K]``.

        Raises:
            ValueError: teachers with other outputs than each other.
        """
        answers = [self._scaled(teacher(inputs)) for teacher in self.teachers]
        if len({answer.shape for answer in answers}) > 1:
            raise ValueError(f"the teachers' outputs differ: {', '.join(str(tuple(a.shape)) for a in answers)}")
        return soft_targets(answers, self.temperature, self.teacher_weights)

    def on_fit_start(self) -> None:
        """Ask the teachers about every training sample, where its inputs never change."""
        data = getattr(self.trainer, "datamodule", None)
        fixed = getattr(data, "fixed_train_inputs", None)
        asked = self.cache and not self.hints and not self.attention and callable(fixed)
        inputs = fixed() if asked and fixed is not None else None
        self._cached = None
        if inputs is None:
            return
        precision, begin = self.trainer.precision_plugin, 0
        with precision.forward_context():
            for part in inputs:
                answers = self.ask(precision.convert_input(part.to(self.device)))
                if self._cached is None:
                    self._cached = _room(len(data.train), answers)  # type: ignore[union-attr]
                self._cached[begin : begin + len(part)] = answers
                begin += len(part)

    def on_fit_end(self) -> None:
        """Forget the answers: they are the training's alone."""
        self._cached = None

    def _soft_targets(self, batch: Labelled) -> Tensor:
        if self._cached is None or batch.index is None:
            return self.ask(batch.inputs)
        answers = self._cached.index_select(0, batch.index.to(self._cached.device)).to(batch.inputs.device)
        return answers.float() if answers.dtype == torch.float16 else answers

    def _scaled(self, logits: Tensor) -> Tensor:
        return standardized(logits) if self.standardize else logits

    def _projections(self, input_shape: tuple[int, ...] | None) -> nn.ModuleList:
        """A linear map of channels for each hint."""
        if not (self.hints or self.attention):
            return nn.ModuleList()
        if input_shape is None:
            raise ValueError("hints and attention need input_shape, and the data does not give it")
        ours = _shapes(self.network, [*self.hints, *self.attention], input_shape, "the student")
        teacher = self.teachers[0].network
        theirs = _shapes(teacher, [*self.hints.values(), *self.attention.values()], input_shape, "the teacher")
        for student, other in (*self.hints.items(), *self.attention.items()):
            maps = student in self.attention
            if len(ours[student]) != len(theirs[other]) or (maps and len(ours[student]) != 4):
                raise ValueError(
                    f"{student} gives {list(ours[student])} and the teacher's {other} {list(theirs[other])}: "
                    + ("attention is that of maps [B, C, H, W]" if maps else "they cannot be compared")
                )
        maps_of = {2: nn.Linear, 3: nn.Linear, 4: _Pointwise}
        return nn.ModuleList(
            maps_of[len(ours[s])](_channels(ours[s]), _channels(theirs[t]), bias=False) for s, t in self.hints.items()
        )


class _Pointwise(nn.Conv2d):
    """A linear map of the channels of ``[B, C, H, W]`` maps."""

    def __init__(self, channels: int, out_channels: int, *, bias: bool) -> None:
        super().__init__(channels, out_channels, 1, bias=bias)


def _channels(shape: Sequence[int]) -> int:
    """Of ``[B, C]``, ``[B, T, C]`` or ``[B, C, H, W]``."""
    return shape[1] if len(shape) == 4 else shape[-1]


@contextmanager
def _listening(network: nn.Module, layers: set[str]) -> Iterator[dict[str, Tensor]]:
    """What these layers give while the network runs, by name."""
    heard: dict[str, Tensor] = {}

    def hear(name: str) -> Any:
        return lambda module, inputs, output: heard.__setitem__(name, output)

    handles = [network.get_submodule(name).register_forward_hook(hear(name)) for name in layers]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _shapes(
    network: nn.Module, layers: Sequence[str], input_shape: tuple[int, ...], whose: str
) -> Mapping[str, tuple[int, ...]]:
    """The shapes of what layers give for one sample."""
    names = dict(network.named_modules())
    for name in layers:
        if name not in names:
            raise ValueError(f"{whose} has no layer '{name}'{nearest(name, names)}")
    training = network.training
    network.eval()
    first = next(network.parameters(), torch.empty(0))
    tokens = any(isinstance(module, nn.Embedding) for module in network.modules())
    try:
        with _listening(network, set(layers)) as heard:
            network(torch.ones(1, *input_shape, dtype=torch.long if tokens else first.dtype, device=first.device))
    finally:
        network.train(training)
    for name in layers:
        if not isinstance(heard.get(name), Tensor) or heard[name].ndim not in (2, 3, 4):
            raise ValueError(f"{whose}'s layer '{name}' gives no features [B, C], [B, T, C] or [B, C, H, W]")
    return {name: tuple(features.shape) for name, features in heard.items()}


def _room(samples: int, answers: Tensor) -> Tensor:
    """An empty ``[samples, K]`` for answers; one that is too large for the device's memory lies in a file."""
    shape = (samples, answers.shape[1])
    if samples * answers[0].numel() * answers.element_size() <= IN_MEMORY:
        return answers.new_empty(shape)
    with tempfile.NamedTemporaryFile(prefix="lab-teachers-") as file:  # stays as long as it is mapped
        return torch.from_file(file.name, shared=True, size=samples * shape[1], dtype=torch.float16).view(shape)
