"""Pruning, beside any technique: weights or channels that count least become zero while training goes on.

Masks are laid over the weights after each step, so momentum and weight decay bring nothing back. Weights that are zero
make no network faster and no file smaller by themselves; channels that are zero are taken out when training ends, and
do both.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lab import sparsity
from lab.batch import Labelled
from lab.callbacks import Lean, network_of, training_batches
from lab.callbacks.profile import multiplications
from lab.distributed import summed
from lab.errors import UserError
from lab.importance import Kind, Likelihood, fisher
from lab.modes import evaluating
from lab.objectives import Objective
from lab.objectives.classification import Classification
from lab.ranges import Count, OpenFraction, Whole, checked
from lab.sparsity import Group, Masks, Scope

HALVINGS = 12
"""How often the share of channels that meets a target is narrowed down: to 0.02 % of them."""


def share_at(schedule: str, progress: float) -> float:
    """What part of the target holds at a part of the way: all at once, evenly, or as 1 − (1 − t)³.

    The cubic takes most at first, when it costs least (M. Zhu and S. Gupta: To Prune, or Not to Prune, ICLR workshop
    2018, arXiv:1710.01878).
    """
    progress = min(progress, 1.0)
    return {"one_shot": 1.0, "linear": progress, "cubic": 1 - (1 - progress) ** 3}[schedule]


class Pruning(Lean):
    """Prunes the network that is trained.

    Args:
        sparsity: the share of weights, or of channels, that goes; of channels p, about 1 − (1 − p)² of the weights.
        structure: single ``weights``, or whole ``channels`` that are taken out in the end.
        macs: the share of the multiplications that goes, instead of ``sparsity``; of channels only.
        parameters: the share of the parameters that goes, instead of ``sparsity``; of channels only.
        schedule: all at once, at the beginning of epoch ``begin``; ``linear`` or ``cubic`` from there to ``end``; or
            ``iterative``: the training's ``max_epochs`` once more for each of ``rounds``, each of which takes the same
            share of what is left.
        begin: the epoch, from 0, that begins with the first pruning.
        end: the epoch that begins with the whole target; half of those left where it is left out.
        rounds: of the iterative schedule.
        rewind: the epoch, from 0, as whose beginning the weights that are left are in every round (J. Frankle et al.:
            Linear Mode Connectivity and the Lottery Ticket Hypothesis, ICML 2020, arXiv:1912.05671); None: they stay.
        importance: what a weight counts by: its ``magnitude``, the ``fisher`` information (:mod:`lab.sparsity`), or at
            ``random``, to compare with.
        fisher: of that importance: exact, sampled or empirical.
        samples: of the training data, for it.
        scope: whether weights, or channels, of all layers are compared, or each ``layer`` loses the same share.
        ignore: patterns of the names of layers to leave alone.
        round_to: channels are left in multiples of it.

    Raises:
        ValueError: options that do not go together.
    """

    unsharded = "masks are of whole layers"

    @checked
    def __init__(
        self,
        sparsity: OpenFraction | None = None,
        *,
        structure: Literal["weights", "channels"] = "weights",
        macs: OpenFraction | None = None,
        parameters: OpenFraction | None = None,
        schedule: Literal["one_shot", "linear", "cubic", "iterative"] = "cubic",
        begin: Whole = 0,
        end: Count | None = None,
        rounds: Count = 5,
        rewind: Whole | None = None,
        importance: Literal["magnitude", "fisher", "random"] = "magnitude",
        fisher: Kind = "sampled",
        samples: Count = 512,
        scope: Scope = "global",
        ignore: tuple[str, ...] = (),
        round_to: Count = 1,
    ) -> None:
        targets = {"sparsity": sparsity, "macs": macs, "parameters": parameters}
        given = [name for name, value in targets.items() if value is not None]
        if len(given) != 1:
            raise ValueError("one target: sparsity, or for channels macs or parameters")
        if structure == "weights" and (given[0] != "sparsity" or round_to > 1):
            raise ValueError("macs, parameters and round_to are for structure: channels; single weights save neither")
        if end is not None and end <= begin:
            raise ValueError(f"end {end} is not after begin {begin}")
        if rewind is not None and schedule != "iterative":
            raise ValueError("rewind goes with schedule: iterative")
        self.by, self.target = given[0], float(targets[given[0]] or 0)
        self.structure, self.schedule, self.begin, self.end = structure, schedule, begin, end
        self.rounds = rounds if schedule == "iterative" else 0
        self.rewind, self.importance, self.kind, self.samples = rewind, importance, fisher, samples
        self.scope, self.ignore, self.round_to = scope, ignore, round_to
        self.masks: Masks = {}
        self.pruned_in = -1
        """The epoch of the last pruning."""
        self.early: dict[str, Tensor] = {}
        self._epochs = 0
        self._example: Tensor | None = None
        self._reported: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the trainer go through all rounds, and see that the options fit the network and the training."""
        if stage != "fit":
            return
        try:
            sparsity.ignored(network_of(pl_module), self.ignore)
        except ValueError as cause:
            raise UserError(f"pruning: {cause}") from cause
        loop = trainer.fit_loop
        if loop.max_epochs is None or loop.max_epochs < 1:
            raise UserError("pruning goes by epochs: say trainer.max_epochs")
        self._epochs = loop.max_epochs
        if getattr(trainer, "smoke", False):  # of one epoch
            self.begin, self.end, self.rewind = 0, 1, None if self.rewind is None else 0
        if self.rounds:
            loop.max_epochs *= self.rounds + 1
            pl_module.rounds = self.rounds + 1  # type: ignore[assignment]
        elif self.begin >= self._epochs or self._end > self._epochs:
            raise UserError(f"pruning: from epoch {self.begin} to {self._end}, but there are {self._epochs} epochs")
        if self.rewind is not None and self.rewind >= self._epochs:
            raise UserError(f"pruning: rewind to epoch {self.rewind}, but a round has {self._epochs} epochs")

    @property
    def _end(self) -> int:
        if self.schedule == "one_shot":
            return self.begin + 1
        return self.end if self.end is not None else self.begin + max((self._epochs - self.begin) // 2, 1)

    def selectable(self, epoch: int) -> bool:
        """Whether the target holds after an epoch."""
        return epoch >= (self.rounds * self._epochs if self.rounds else self._end - 1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """With an epoch that the schedule names, prune further."""
        if self._example is None:
            self._example = Labelled.of(batch).inputs[:2].detach().clone()
        epoch = trainer.current_epoch
        if self.pruned_in == epoch:
            return
        network = network_of(pl_module)
        if self.rounds:
            number = epoch // self._epochs
            if self.rewind == epoch and not self.early:
                self.early = copy.deepcopy(network.state_dict())
            if number == 0 or epoch % self._epochs:
                return
            part = number / self.rounds
        elif self.begin <= epoch < self._end:
            part = share_at(self.schedule, (epoch + 1 - self.begin) / (self._end - self.begin))
        else:
            return
        self.pruned_in = epoch
        self._prune(trainer, pl_module, 1 - (1 - self.target) ** part if self.rounds else self.target * part)
        if self.rounds:
            if self.early:
                network.load_state_dict(self.early)
            trainer.strategy.setup_optimizers(trainer)
        self.apply(network)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """What is gone has no gradient: it counts in no norm that is clipped."""
        self._over(network_of(pl_module), gradients=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """What is gone stays so, whatever the optimizer did."""
        self._over(network_of(pl_module))

    def finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Make what is gone zero in the selected weights, an average's too; take the channels out."""
        network = network_of(module)
        self.apply(network)
        gone = sum(int((~mask).sum()) for mask in self.masks.values())
        self._reported = {"pruned_weights": gone}
        if self.structure == "weights" or not self.masks or self._example is None:
            return
        inputs = self._inputs(trainer, module)
        whole, groups = self._ask(network, inputs), self._groups(network, inputs)
        sparsity.without(network, inputs, groups, self.masks)
        difference = (self._ask(network, inputs) - whole).abs().max() / whole.abs().max().clamp_min(1e-12)
        self._reported["shrinking_changed_outputs_by"] = float(difference)
        if float(difference) > 1e-3:  # normalisation over channels, or f(0) that is not 0
            rank_zero_warn(
                f"pruning: taking the channels out changes the outputs by {float(difference):.2g} of the largest: "
                "a layer of this network normalises over channels, or answers zeros by something else"
            )

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """How many weights are gone."""
        return self._reported

    @torch.no_grad()
    def apply(self, network: nn.Module) -> None:
        """Lay the masks over the weights."""
        self._over(network)

    @torch.no_grad()
    def _over(self, network: nn.Module, *, gradients: bool = False) -> None:
        if not self.masks:
            return
        parameters = dict(network.named_parameters())
        for name in self.masks:
            tensor = parameters[name].grad if gradients else parameters[name]
            if tensor is not None:
                self.masks[name] = self.masks[name].to(tensor.device)
                tensor.mul_(self.masks[name])

    def _prune(self, trainer: Trainer, module: LightningModule, share: float) -> None:
        network = network_of(module)
        left = sparsity.ignored(network, self.ignore)
        if self.structure == "weights":
            weights = sparsity.weights_of(network, left)
            self.masks = sparsity.smallest(self._scores(trainer, module, weights), share, self.scope, self.masks)
            return
        inputs = self._inputs(trainer, module)
        groups = self._groups(network, inputs)
        parameters = dict(network.named_parameters())
        names = {name for group in groups for parts in group.parts for name, _, _ in parts}
        scores = self._scores(trainer, module, {name: parameters[name] for name in parameters if name in names})
        scored = sparsity.channel_scores(groups, scores)

        def masks(part: float) -> Masks:
            return sparsity.channel_masks(network, groups, scored, part, self.scope, round_to=self.round_to)

        self.masks = masks(share if self.by == "sparsity" else self._meeting(network, inputs, groups, masks, share))

    def _meeting(self, network: nn.Module, inputs: Tensor, groups: list[Group], masks: Any, share: float) -> float:
        """The least share of channels without which the target is met."""

        def size(part: float | None) -> float:
            small = network
            if part is not None:
                small = copy.deepcopy(network)
                sparsity.without(small, inputs, groups, masks(part))
            if self.by == "macs":
                return float(multiplications(small, inputs[:1]))
            return float(sum(parameter.numel() for parameter in small.parameters()))

        dense = size(None)
        bound, low, high = (1 - share) * dense, 0.0, 1.0
        if (least := size(high)) > bound:
            raise UserError(
                f"pruning: {self.by} cannot fall by {share:g}: with one channel left in every layer that can be pruned "
                f"they fall by {1 - least / dense:.3g}"
            )
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if size(middle) <= bound else (middle, high)
        return high

    def _scores(self, trainer: Trainer, module: LightningModule, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        if self.importance == "random":
            generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
            drawn = {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
            return {name: drawn[name].to(weight) * (weight != 0) for name, weight in weights.items()}
        squares = {name: weight.detach() ** 2 for name, weight in weights.items()}
        if self.importance == "magnitude":
            return squares
        frozen = [name for name, weight in weights.items() if not weight.requires_grad]
        if frozen:
            raise UserError(f"pruning: importance: fisher is of weights that learn; {frozen[0]} is frozen")
        information, count = fisher(
            network_of(module), training_batches(trainer, module, self.samples), self.kind,
            likelihood=_likelihood(module), generator=torch.Generator(device=module.device).manual_seed(0),
        )  # fmt: skip
        scores = {}
        for name, square in squares.items():
            total, number = summed(information[name], count)
            scores[name] = square * total / (2 * max(number, 1))
        return scores

    def _groups(self, network: nn.Module, inputs: Tensor) -> list[Group]:
        try:
            return sparsity.groups_of(network, inputs, sparsity.ignored(network, self.ignore))
        except ValueError as cause:
            raise UserError(f"pruning: {cause}") from cause

    def _inputs(self, trainer: Trainer, module: LightningModule) -> Tensor:
        assert self._example is not None  # the first batch has been here
        inputs: Tensor = trainer.precision_plugin.convert_input(self._example.to(module.device))
        return inputs

    @torch.no_grad()
    def _ask(self, network: nn.Module, inputs: Tensor) -> Tensor:
        with evaluating(network):
            outputs: Tensor = network(inputs)
        return outputs


def _likelihood(module: LightningModule) -> Likelihood:
    if not isinstance(objective := getattr(module, "objective", None), Objective):
        raise UserError("pruning: importance: fisher needs a technique with an objective: classification, regression")
    return "classification" if isinstance(objective, Classification) else "regression"
