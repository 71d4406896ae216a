"""Fine-tuning: a network that has learnt something else learns this, with as little lost as possible.

What learns, and how fast (``{from: ...}``, timm's ``pretrained``, or a file of weights is what it starts from):

- ``train: all``, every weight; ``head``, a linear probe of frozen features; ``lora``, the head and differences of low
  rank (:mod:`lab.lora`), which are added to the weights when training ends.
- ``probe_epochs``: the head alone at first, then all (A. Kumar et al.: Fine-Tuning Can Distort Pretrained Features and
  Underperform Out-of-Distribution, ICLR 2022, arXiv:2202.10054).
- ``unfreeze``: the epoch from which layers learn, by pattern; ``unfreeze_every``: one layer more, from the head down,
  every so many epochs (J. Howard and S. Ruder: Universal Language Model Fine-Tuning, ACL 2018, arXiv:1801.06146);
  ``unfreeze_patience``: one layer more whenever so many epochs brought nothing.
- ``layer_decay``, δ: a layer k below the head learns at δ^k of the optimizer's rate, the head at ``head_lr`` times it.

Layers are those of :func:`layers_of`: a network's blocks, as its weights' names tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Le
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lab import lora
from lab.batch import Labelled
from lab.modules.supervised import Supervised
from lab.ranges import Count, Positive, Whole, checked

RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""What optimizers and torch's schedules call a parameter group's rates."""
SHOWN = 12
SOME_DAY = 2**31
"""The epoch of what waits for a plateau."""
"""How many layers an error lists."""


def layers_of(network: nn.Module) -> list[list[str]]:
    """The names of a network's parameters by layers, from the input to the head, which is the last.

    A layer is what stands before a number in the names (``body.3``, ``encoder.layer.11``), or, where there is none,
    what holds the parameter (``stem``). timm's models say themselves what their layers are.

    Raises:
        ValueError: the network has no ``head``.
    """
    head = getattr(network, "head", None)
    if not isinstance(head, nn.Module) or not any(True for _ in head.parameters()):
        raise ValueError(f"{type(network).__name__} has no `head` that could learn apart from the rest")
    of_head = {id(parameter) for parameter in head.parameters()}
    model, prefix = getattr(network, "model", None), "model."
    places: Mapping[str, Any] = {}
    if isinstance(model, nn.Module) and hasattr(model, "group_matcher"):
        from timm.models import group_parameters

        places = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    layers: dict[Any, list[str]] = {}
    last: list[str] = []
    for name, parameter in network.named_parameters():
        if id(parameter) in of_head:
            last.append(name)
        else:
            layers.setdefault(places.get(name.removeprefix(prefix), _block(name)), []).append(name)
    ordered = [layers[key] for key in sorted(layers)] if places and all(isinstance(k, int) for k in layers) else None
    return [*(ordered or layers.values()), last]


def _block(name: str) -> str:
    """``body.3`` of ``body.3.0.weight``, ``stem`` of ``stem.weight``."""
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: numbered + 1] if numbered is not None else parts[:-1])


class Finetune(Supervised):
    """Trains a network that was trained before.

    Args:
        train: what learns in the end: ``all``, the ``head``, or by ``lora`` the head and differences of low rank.
        probe_epochs: epochs in which the head learns alone, at first.
        unfreeze: the epoch, from 0, from which parameters learn, by patterns of their names (``body.0.*: 5``); what no
            pattern has learns from the beginning.
        unfreeze_every: epochs after which one layer more learns, from the head down; not beside ``unfreeze``.
        unfreeze_patience: epochs without a better validation metric after which one layer more learns, from the head
            down; beside neither.
        layer_decay: δ in (0, 1], what a layer's rate is of that of the layer above it.
        head_lr: what the head's rate is of the optimizer's.
        decay_norms: whether weight decay is also on biases, normalisations and other vectors.
        batch_norm: which batch normalisations keep their running statistics: those of layers that do not learn
            (``frozen``), ``all``, or ``none``.
        rank: of the differences.
        alpha: α, how much they count: α / rank times; rank where it is left out.
        targets: patterns of the names of the layers that get a difference; all linear layers and convolutions but the
            head where it is left out.
        cache: compute the features of a probe once for every training sample and keep them, where the data says that
            its inputs are the same in every epoch.

    Raises:
        ValueError: the network has no head; a pattern that nothing matches; options that do not go together.
    """

    @checked
    def __init__(
        self,
        train: Literal["all", "head", "lora"] = "all",
        *,
        probe_epochs: Whole = 0,
        unfreeze: dict[str, Whole] | None = None,
        unfreeze_every: Count | None = None,
        unfreeze_patience: Count | None = None,
        layer_decay: Annotated[float, Gt(0), Le(1)] = 1.0,
        head_lr: Positive = 1.0,
        decay_norms: bool = False,
        batch_norm: Literal["frozen", "all", "none"] = "frozen",
        rank: Count = 8,
        alpha: Positive | None = None,
        targets: tuple[str, ...] | None = None,
        cache: bool = True,
        **supervised: Any,
    ) -> None:
        super().__init__(**supervised)
        if sum(map(bool, (unfreeze, unfreeze_every, unfreeze_patience))) > 1:
            raise ValueError("either unfreeze, by patterns, or unfreeze_every, or unfreeze_patience, layer by layer")
        if train == "head" and (unfreeze or unfreeze_every or unfreeze_patience or probe_epochs):
            raise ValueError("with train: head nothing else ever learns: leave out what would unfreeze it")
        self.what = train
        self.layer_decay = layer_decay
        self.head_lr = head_lr
        self.decay_norms = decay_norms
        self.batch_norm = batch_norm
        self.rank = rank
        self.alpha = float(rank) if alpha is None else alpha
        self.cache = cache
        self.layers = layers_of(self.network)
        names = [name for layer in self.layers for name in layer]
        self.adapted = self._targets(targets) if train == "lora" else []
        below = SOME_DAY if unfreeze_patience else probe_epochs
        self.begins = self._begins(names, unfreeze or {}, unfreeze_every, below)
        """The epoch from which each parameter learns; those that never do are not in it."""
        self.patience, self.waited, self.best = unfreeze_patience, 0, -math.inf
        self._features: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Add the differences of low rank, and freeze what never learns."""
        if stage == "fit":
            if self.adapted:
                lora.adapt([self.network.get_submodule(name) for name in self.adapted], self.rank, self.alpha)
            for name, parameter in self.network.named_parameters():
                parameter.requires_grad_(self._begin(name) is not None)

    def finish(self) -> None:
        """Add the differences to the weights."""
        lora.merge(self.network)

    def learning(self, epoch: int) -> set[str]:
        """The names of the network's parameters that learn in an epoch, from 0."""
        return {
            name
            for name, _ in self.network.named_parameters()
            if (begin := self._begin(name)) is not None and begin <= epoch
        }

    def answers(self, batch: Labelled) -> Tensor:
        """The network's outputs; of the head alone where the features are kept."""
        if self._features is None or not self.training or batch.index is None:
            return super().answers(batch)
        features = self._features.index_select(0, batch.index.to(self._features.device)).to(batch.inputs.device)
        outputs: Tensor = self.network.head(features)  # type: ignore[operator]  # layers_of has seen that it is there
        return outputs

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer over groups of their own rates, and its scheduler over the training's steps."""
        named = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("nothing of the network learns")
        others = [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("network.")]
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): others} if others else {}
        for name, parameter in named.items():
            decays = self.decay_norms or (parameter.ndim > 1 and not name.endswith(".bias"))
            groups.setdefault((self.scale(name), decays), []).append(parameter)
        optimizer = self.optimizer([{"params": members} for members in groups.values()])
        configured = self.scheduled(optimizer)
        bases = getattr(configured.get("lr_scheduler", {}).get("scheduler"), "base_lrs", None)
        for place, ((scale, decays), group) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
            for rate in RATES:
                if rate in group:
                    group[rate] = group[rate] * scale
            if bases is not None:
                bases[place] = bases[place] * scale
            if not decays and "weight_decay" in group:
                group["weight_decay"] = 0.0
        return configured

    def scale(self, name: str) -> float:
        """What a parameter's rate is of the optimizer's."""
        plain = _plain(name)
        below = next(i for i, layer in enumerate(reversed(self.layers)) if plain in layer)
        return self.head_lr if below == 0 else self.layer_decay**below

    def on_fit_start(self) -> None:
        """Compute the features of every training sample, where nothing below the head ever learns."""
        fixed = getattr(getattr(self.trainer, "datamodule", None), "fixed_train_inputs", None)
        inputs = fixed() if self.what == "head" and self.cache and callable(fixed) else None
        self._features = None
        if inputs is None or not hasattr(self.network, "features"):
            return
        precision = self.trainer.precision_plugin
        training = self.network.training
        self.network.eval()
        with torch.no_grad(), precision.forward_context():
            parts = [self.network.features(precision.convert_input(part.to(self.device))) for part in inputs]  # type: ignore[operator]
        self.network.train(training)
        self._features = torch.cat(parts)

    def on_fit_end(self) -> None:
        """Forget the features."""
        self._features = None

    def on_train_epoch_start(self) -> None:
        """Freeze and unfreeze; below DDP, which knows only what learns from the beginning, gradients are dropped."""
        if not isinstance(self.trainer.strategy, ParallelStrategy):
            now = self.learning(self.current_epoch)
            for name, parameter in self.network.named_parameters():
                parameter.requires_grad_(name in now)
        self.train()

    def on_train_epoch_end(self) -> None:
        """Where a plateau decides, have one layer more learn from the next epoch on if this one was no better."""
        super().on_train_epoch_end()
        name, mode = self.monitor
        if self.patience is None or (value := self.trainer.callback_metrics.get(name)) is None:
            return
        score = float(value) if mode == "max" else -float(value)
        self.waited = 0 if score > self.best else self.waited + 1
        self.best = max(score, self.best)
        still = [layer for layer in self.layers if self.begins[layer[0]] == SOME_DAY]
        if self.waited >= self.patience and still:
            self.waited = 0
            self.begins.update(dict.fromkeys(still[-1], self.current_epoch + 1))

    def on_before_optimizer_step(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Drop the gradients of what does not learn yet."""
        now = self.learning(self.current_epoch)
        for name, parameter in self.network.named_parameters():
            if name not in now:
                parameter.grad = None

    def train(self, mode: bool = True) -> Finetune:
        """Training mode, but for batch normalisation that is to stay, and for all of a network that is only probed."""
        super().train(mode)
        if not mode or not hasattr(self, "begins"):
            return self
        head: nn.Module = self.network.head  # type: ignore[assignment]
        if self.what == "head":
            self.network.eval()
            head.train()
            return self
        now = self.learning(self.current_epoch if self._trainer is not None else 0)
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        for part in self.network.modules():
            if isinstance(part, _BatchNorm):
                learns = any(names[id(parameter)] in now for parameter in part.parameters(recurse=False))
                if self.batch_norm == "all" or (self.batch_norm == "frozen" and not learns):
                    part.eval()
        return self

    def results(self) -> dict[str, Any]:
        """How many parameters learnt."""
        return {"trained_parameters": self._trained}

    def on_train_start(self) -> None:
        """Count what learns."""
        self._trained = sum(p.numel() for n, p in self.network.named_parameters() if self._begin(n) is not None)

    _trained = 0

    def _begin(self, name: str) -> int | None:
        """The epoch from which a parameter learns; None: it never does."""
        if name.endswith((".down", ".up")) and ".parametrizations." in name:
            return self.begins[_plain(name)]
        if ".parametrizations." in name:
            return None
        return self.begins.get(name) if self.what != "lora" or name in self.layers[-1] else None

    def _begins(
        self, names: Sequence[str], unfreeze: Mapping[str, int], every: int | None, below: int
    ) -> dict[str, int]:
        head = set(self.layers[-1])
        if self.what == "head":
            return dict.fromkeys(head, 0)
        begins = {name: 0 if name in head else below for name in names}
        for pattern, epoch in unfreeze.items():
            matching = [name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
            if not matching:
                raise ValueError(f"unfreeze: no parameter's name fits '{pattern}'; {self._listed()}")
            begins.update(dict.fromkeys(matching, epoch))
        if every is not None:
            for depth, layer in enumerate(reversed(self.layers)):
                begins.update(dict.fromkeys(layer, depth * every))
        return begins

    def _targets(self, patterns: Sequence[str] | None) -> list[str]:
        """The names of the layers that get a difference."""
        head = set(self.layers[-1])
        known = [
            name
            for name, part in self.network.named_modules()
            if isinstance(part, lora.ADAPTED) and f"{name}.weight" not in head
        ]
        if patterns is None:
            chosen = known
        else:
            chosen = [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in known):
                    raise ValueError(f"targets: no linear layer or convolution's name fits '{pattern}'; {_some(known)}")
        if not chosen:
            raise ValueError(f"{type(self.network).__name__} has no layer below its head that lora could adapt")
        return chosen

    def _listed(self) -> str:
        return _some([_block(layer[0]) for layer in self.layers])


def _plain(name: str) -> str:
    """A parameter's name without what a parametrization adds to it."""
    before, found, _ = name.partition(".parametrizations.weight.")
    return f"{before}.weight" if found else name


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"there are: {', '.join(names[:SHOWN])}{more}"
