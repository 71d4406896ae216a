"""Pruning: a network that was trained becomes a smaller one, and learns to do without what it lost.

What goes, when, and by which importance is :class:`lab.callbacks.pruning.Pruning`'s, which goes along with any other
technique as well (``callbacks: {pruning: {...}}``); here it comes with supervised training.
"""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback

from lab.callbacks.pruning import Pruning
from lab.importance import Kind
from lab.modules.supervised import Supervised
from lab.ranges import Count, OpenFraction, Whole, checked
from lab.sparsity import Scope


class Prune(Supervised):
    """Trains a network while weights or channels that count least go.

    Args:
        sparsity: the share of weights, or of channels, that goes.
        structure: single ``weights``, or whole ``channels`` that are taken out in the end.
        macs: the share of the multiplications that goes, instead of ``sparsity``; of channels only.
        parameters: the share of the parameters that goes, instead of ``sparsity``; of channels only.
        schedule: ``one_shot`` at epoch ``begin``, ``linear`` or ``cubic`` from there to ``end``, or ``iterative``.
        begin: the epoch, from 0, that begins with the first pruning.
        end: the epoch that begins with the whole target.
        rounds: of the iterative schedule: the training once more for each.
        rewind: the epoch, from 0, as whose beginning the weights are in every round; None: they stay.
        importance: ``magnitude``, ``fisher`` or ``random``.
        fisher: of that importance: exact, sampled or empirical.
        samples: of the training data, for it.
        scope: whether all layers are compared, or each ``layer`` loses the same share.
        ignore: patterns of the names of layers to leave alone.
        round_to: channels are left in multiples of it.

    Raises:
        ValueError: options that do not go together.
    """

    unsharded = Pruning.unsharded

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
        **supervised: Any,
    ) -> None:
        super().__init__(**supervised)
        self.pruning = Pruning(
            sparsity, structure=structure, macs=macs, parameters=parameters, schedule=schedule, begin=begin, end=end,
            rounds=rounds, rewind=rewind, importance=importance, fisher=fisher, samples=samples, scope=scope,
            ignore=ignore, round_to=round_to,
        )  # fmt: skip

    def configure_callbacks(self) -> list[Callback]:
        """What prunes."""
        return [self.pruning]
