"""What all unsupervised domain adaptation shares: labelled source samples beside target samples without labels.

Every step passes one batch of both domains, in turns, through the network's ``features`` and ``head``. The source's
half gives the task's loss; what the two halves' features say about each other, a technique adds::

    L = L_task(source) + alignment + λ(p) · w · 1/M Σ_m H(p_m)

with H the entropy of the target's answers, in nats, w = ``entropy_weight`` (Y. Grandvalet and Y. Bengio, NIPS 2004),
and Ganin's schedule over the part p of *all* steps of the training that are done (arXiv:1505.07818, section 5.2.2)::

    λ(p) = ``strength`` · (2 / (1 + e^(−``gamma``·p)) − 1)

Batch normalisation, in that one pass, normalises each half by its own statistics (``batch_norm: separate``). Both have
running ones: the target's are the network's, by which it answers later; the source's are kept here, and serve where
source samples are validated or compared. Or it normalises both by those of the mixture (``mixed``), as where two
batches are simply put end to end: what is darker in one domain is then darker than the mean.

No label of the target is in any batch that this module trains or validates on. The weights that are kept are chosen
by one of :mod:`lab.validators`, asked on the target's validation inputs, or by the source's own labels (``validator``).
How well each of them would have followed the accuracy on the target's labelled test samples is reported beside
(``oracle``), and decides nothing.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lab import validators
from lab.batch import Labelled, SourceTarget
from lab.distributed import gathered, mean_of_all, summed
from lab.domain_norm import SourceStatistics, by_domain, in_turns
from lab.modes import evaluating
from lab.modules.supervised import Supervised, Terms
from lab.objectives.classification import Classification
from lab.ranges import NonNegative, Positive, checked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Validator = Literal["information", "entropy", "snd", "source"]
MONITORS: Mapping[str, tuple[str, str]] = {
    "information": ("val/information", "max"),
    "entropy": ("val/entropy", "min"),
    "snd": ("val/snd", "max"),
    "source": ("val/source_accuracy", "max"),
}
"""The metric that each validator is, and whether the most or the least of it is best."""
ORACLE = "oracle/target_accuracy"
"""The metric that target labels give, once an epoch."""
DRAWN = 500
"""How many samples of each domain a picture of features shows."""


WHOLE = "the distance of two domains is of whole batches, which parts of them have not"
"""Why some cannot accumulate gradients."""


class View(NamedTuple):
    """What the network makes of one domain's half of a batch.

    Args:
        features: ``[B, F]``.
        logits: ``[B, K]``.
    """

    features: Tensor
    logits: Tensor


def ramp(progress: float, gamma: float) -> float:
    """2 / (1 + e^(−γp)) − 1: from 0 at p = 0 towards 1."""
    return 2 / (1 + math.exp(-gamma * progress)) - 1


def correlations(one: Sequence[float], other: Sequence[float]) -> dict[str, float | None]:
    """``pearson`` and ``spearman`` of two series of one length; None of fewer than 3, or of a constant."""
    from scipy.stats import pearsonr, spearmanr

    if len(one) < 3 or min(one) == max(one) or min(other) == max(other):
        return {"pearson": None, "spearman": None}
    return {
        "pearson": round(float(pearsonr(one, other)[0]), 6),
        "spearman": round(float(spearmanr(one, other)[0]), 6),
    }


class Adaptation(Supervised):
    """Learns from a source's labels to be right on a target that has none.

    Args:
        validator: what chooses the weights that are kept, without a target label: ``information``, ``entropy`` or
            ``snd`` of the target's validation inputs, or the accuracy on the ``source``'s.
        strength: the largest λ.
        gamma: how soon λ rises.
        entropy_weight: w in the equation above.
        batch_norm: by which statistics batch normalisation goes in training: each domain's, or the mixture's.
        oracle: whether to ask once an epoch, for the report alone, how right the network is on the target's test
            samples.
        input_shape: of one sample; the data's.

    Raises:
        ValueError: an objective other than classification; a network without separable features.
    """

    consumes: ClassVar[type] = SourceTarget
    unsaved: ClassVar[tuple[str, ...]] = ("_seen",)

    @checked
    def __init__(
        self,
        *,
        validator: Validator = "information",
        strength: NonNegative = 1.0,
        gamma: Positive = 10.0,
        entropy_weight: NonNegative = 0.0,
        batch_norm: Literal["separate", "mixed"] = "separate",
        oracle: bool = True,
        input_shape: tuple[int, ...] | None = None,
        **supervised: Any,
    ) -> None:
        super().__init__(**supervised)
        if not isinstance(self.objective, Classification):
            raise ValueError(
                f"adaptation is validated by class probabilities: {type(self.objective).__name__} is no classification"
            )
        self.validator = validator
        self.strength = strength
        self.gamma = gamma
        self.entropy_weight = entropy_weight
        self.batch_norm = batch_norm
        self.oracle = oracle
        self.width = width_of(self.network, input_shape)
        """F, the features of a sample."""
        self.classes = self.objective.num_classes
        """K, its classes."""
        self.val_metrics = self.objective.metrics().clone(prefix="val/source_")
        self.source_statistics = SourceStatistics(self.network, separate=batch_norm == "separate")
        self.history: dict[str, list[float]] = {}
        """What each validator and the oracle said, validation by validation."""
        self.total_steps = 0
        self.apart: dict[str, float] = {}
        """The proxy A-distance before and after the training."""
        self.planes: dict[str, Tensor] = {}
        """Two principal components of the features before and after, ``[N, 2]``, the source's first."""
        self.drawn = 0
        """How many of them are the source's."""
        self._seen: list[tuple[Tensor, Tensor]] = []

    @property
    def monitor(self) -> tuple[str, str]:
        """The validator's metric, and whether ``min`` or ``max`` of it is best."""
        return MONITORS[self.validator]

    @property
    def level(self) -> float:
        """λ at this step of the training."""
        return self.strength * ramp(self.trainer.global_step / max(self.total_steps, 1), self.gamma)

    @abstractmethod
    def alignment(self, source: View, target: View) -> Terms:
        """What is added to the task's loss, and the parts that are worth watching."""

    def views(self, batch: SourceTarget) -> tuple[View, View]:
        """Both domains in one pass through the network."""
        with self.source_statistics.in_turns(self.network):
            features = self.features(in_turns(batch.source.inputs, batch.target.inputs))  # (2B, F)
            logits = self.head(features)  # (2B, K)
        source, target = map(View, by_domain(features), by_domain(logits))
        return source, target

    def features(self, inputs: Tensor) -> Tensor:
        """``[B, ...]`` inputs to ``[B, F]``."""
        features: Tensor = self.network.features(inputs)  # type: ignore[operator]  # width_of has seen that it is there
        return features

    def head(self, features: Tensor) -> Tensor:
        """``[B, F]`` features to ``[B, K]`` logits."""
        logits: Tensor = self.network.head(features)  # type: ignore[operator]  # so it has this
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One batch of both domains: the loss of the source's labels, and the alignment."""
        source, target = self.views(batch)
        task, level = self.objective.loss(source.logits, batch.source.targets), self.level
        found = self.alignment(source, target)
        total, parts = task + found.loss, {"task": task, **found.parts}
        if self.entropy_weight:
            parts["target_entropy"] = mean_of_all(validators.entropies(target.logits.softmax(1)))
            total = total + level * self.entropy_weight * parts["target_entropy"]
        self._watch(Terms(total, **parts, **{"lambda": total.new_tensor(level)}))
        return total

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add the source's half to ``val/source_…``; keep the answers to the target's inputs."""
        if len(batch.source):
            with self.source_statistics.serving(self.network):
                self._judge(batch.source, "val", self.val_metrics)
        if len(batch.target):
            self._keep(batch.target)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch of the target to the test's metrics; keep the answers."""
        super().test_step(batch, batch_idx)
        self._keep(Labelled.of(batch))

    def on_fit_start(self) -> None:
        """Say it where target labels are to choose the weights."""
        if self._by_labels():
            rank_zero_warn(
                f"the weights are chosen by {ORACLE}: by labels of the target, which adaptation does not have. "
                "The results say so"
            )

    def on_train_start(self) -> None:
        """See how many steps λ has to rise."""
        self.total_steps, _ = self.schedule_steps()

    def on_train_epoch_start(self) -> None:
        """See how far apart the domains are before the first step: a training that goes on knows it from then."""
        if not self.trainer.global_step:
            self._compare("before")

    def on_validation_epoch_start(self) -> None:
        """Begin without answers."""
        self._seen = []

    def on_validation_epoch_end(self) -> None:
        """Log the validators, and what the oracle says."""
        found = self._validated()
        for name, value in found.items():
            self.log(f"val/{name}", value, sync_dist=True)
        if self.trainer.sanity_checking or not found:
            return
        said = {name: float(value) for name, value in found.items()}
        if self.oracle and getattr(self._data, "has_test", False):
            said["oracle"] = self._asked()
            self.log(ORACLE, said["oracle"], sync_dist=True)
        for name, figure in said.items():
            self.history.setdefault(name, []).append(figure)

    def on_test_epoch_start(self) -> None:
        """Begin without answers."""
        super().on_test_epoch_start()
        self._seen = []

    def on_test_epoch_end(self) -> None:
        """Log the validators of the test."""
        super().on_test_epoch_end()
        for name, value in self._validated().items():
            self.log(f"test/{name}", value, sync_dist=True)

    def finish(self) -> None:
        """See how far apart the domains are with the weights that are kept."""
        with self._on_device():
            self._compare("after")

    def results(self) -> dict[str, Any]:
        """What chose the weights, what target labels were used for, and how the validators followed the oracle."""
        choosing = [c.monitor for c in self._callbacks if hasattr(c, "chosen") and getattr(c, "monitor", None)]
        found: dict[str, Any] = {
            "selected_by": choosing[0] if choosing else "nothing: the last weights",
            "selected_by_target_labels": self._by_labels(),
            "target_labels": "test metrics and the validators' correlation with them"
            if self.oracle
            else "test metrics",
            "a_distance": {when: round(value, 6) for when, value in self.apart.items()},
        }
        if "oracle" in self.history:
            oracle = self.history["oracle"]
            found["validators"] = {
                name: correlations([-v for v in values] if MONITORS[name][1] == "min" else values, oracle)
                for name, values in self.history.items()
                if name in MONITORS and len(values) == len(oracle)
            }
        return found

    def pictures(self) -> dict[str, Figure]:
        """The objective's, and ``features``: both domains' before and after."""
        from lab.pictures import clouds

        drawn = super().pictures()
        if self.planes:
            titles = {
                when: f"{when}: A-distance {self.apart[when]:.2f}" if when in self.apart else when
                for when in self.planes
            }
            planes = {titles[when]: plane.cpu().numpy() for when, plane in self.planes.items()}
            drawn["features"] = clouds(planes, self.drawn, ("source", "target"))
        return drawn

    @property
    def _data(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def _by_labels(self) -> bool:
        """Whether a callback chooses the weights, or when training ends, by the oracle."""
        return any(getattr(callback, "monitor", None) == ORACLE for callback in self._callbacks)

    @property
    def _callbacks(self) -> list[Any]:
        return list(self.trainer.callbacks)  # type: ignore[attr-defined]  # Lightning adds it outside the constructor

    def _keep(self, target: Labelled) -> None:
        assert target.index is not None
        self._seen.append((target.index, self.answers(target).softmax(1)))

    def _validated(self) -> dict[str, Tensor]:
        """The validators of all processes' answers, in the order of the samples; none where there were no answers."""
        index = torch.cat([torch.zeros(0, dtype=torch.int64, device=self.device), *(part[0] for part in self._seen)])
        parts = [part[1] for part in self._seen]
        answers = torch.cat(parts) if parts else torch.zeros(0, self.classes, device=self.device, dtype=self._precision)
        self._seen = []
        index, answers = gathered(index), gathered(answers)
        if len(answers) < 2:
            return {}
        answers = answers[index.argsort()]
        return {
            "information": validators.information(answers),
            "entropy": validators.entropy(answers),
            "snd": validators.neighbourhood_density(answers),
        }

    @torch.no_grad()
    def _asked(self) -> float:
        """The accuracy on the target's labelled test samples, for the report alone."""
        found, count = torch.zeros((), device=self.device), 0
        with evaluating(self.network), self.trainer.precision_plugin.forward_context():
            for batch in map(self._moved, self._data.test_dataloader()):
                found += (self.answers(batch).argmax(1) == batch.targets).sum()
                count += len(batch)
        right, number = summed(found, count)
        return float(right) / max(number, 1)

    @torch.no_grad()
    def _compare(self, when: str) -> None:
        """Find the A-distance of both domains' validation features, and what a picture shows of them."""
        found: tuple[list[Tensor], list[Tensor]] = [], []
        data, loader = self._data, []
        if hasattr(data, "val_dataloader"):
            loader = data.val_dataloader()
        with evaluating(self.network), self.trainer.precision_plugin.forward_context():
            for batch in loader:
                if len(batch.source):
                    with self.source_statistics.serving(self.network):
                        found[0].append(self.features(self._moved(batch.source).inputs))
                if len(batch.target):
                    found[1].append(self.features(self._moved(batch.target).inputs))
        nothing = torch.zeros(0, self.width, device=self.device, dtype=self._precision)
        source, target = (gathered(torch.cat([nothing, *features])).float() for features in found)
        if min(len(source), len(target)) < 2:
            return
        self.apart[when] = validators.a_distance(source, target)
        source, target = source[:DRAWN], target[:DRAWN]
        self.drawn = len(source)
        self.planes[when] = validators.projected(torch.cat([source, target])).cpu()

    def _moved(self, batch: Labelled) -> Labelled:
        moved: Labelled = self.trainer.strategy.batch_to_device(batch, self.device)
        moved.inputs = self.trainer.precision_plugin.convert_input(moved.inputs)
        return moved

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Where training was, which Lightning has left by the time that it is over."""
        before = self.device
        self.to(self.trainer.strategy.root_device)
        try:
            yield
        finally:
            self.to(before)

    @property
    def _precision(self) -> torch.dtype:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)


@torch.no_grad()
def width_of(network: nn.Module, input_shape: tuple[int, ...] | None) -> int:
    """How many features a network makes of one sample.

    Raises:
        ValueError: it has none that its head alone answers by; the shape isn't known.
    """
    features, head, name = getattr(network, "features", None), getattr(network, "head", None), type(network).__name__
    if not callable(features) or not isinstance(head, nn.Module):
        missing = " and ".join(
            f"`{part}`"
            for part, there in (("features", callable(features)), ("head", isinstance(head, nn.Module)))
            if not there
        )
        raise ValueError(
            f"{name} has no {missing}: domains are aligned by a network's features [B, F], which a method `features` "
            "gives and a module `head` answers by; all of `lab list networks` have both"
        )
    if input_shape is None:
        raise ValueError("to find how many features there are input_shape is needed, and the data does not give it")
    first = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    tokens = any(isinstance(module, nn.Embedding) for module in network.modules())
    one = torch.ones(1, *input_shape, dtype=torch.long if tokens else first.dtype, device=first.device)
    with evaluating(network):
        found, answers = features(one), network(one)
        if found.ndim != 2:
            raise ValueError(f"{name}'s features are {list(found.shape)} for one sample: [1, F] are needed")
        answered = head(found)
    if answered.shape != answers.shape or not torch.allclose(answered, answers, rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"{name}'s head does not answer by its features: head(features(x)) is not the network's output"
        )
    return int(found.shape[1])
