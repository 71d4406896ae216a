"""Weight sharing, beside any technique: a trained network's layers go on with a few values each."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge, Le
from lightning.pytorch import LightningModule, Trainer

from lab import sharing, sparsity
from lab.callbacks import Lean, network_of
from lab.errors import UserError
from lab.ranges import checked


class Sharing(Lean):
    """Trains values that a layer's weights share, and saves a code for each weight (:mod:`lab.sharing`).

    Begin from a network that has learnt (``network: {from: ...}``): the values are means of its weights. Weights that
    pruning made zero stay so. The file is smaller; the network is as fast as before.

    Args:
        clusters: values a layer.
        ignore: patterns of the names of layers to leave alone.
    """

    unsharded = "codes are of whole layers"

    @checked
    def __init__(self, clusters: Annotated[int, Ge(2), Le(sharing.LARGEST)] = 16, ignore: tuple[str, ...] = ()) -> None:
        self.clusters = clusters
        self.ignore = ignore

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Cluster the weights."""
        if stage != "fit":
            return
        network = network_of(pl_module)
        try:
            left = sparsity.ignored(network, self.ignore)
        except ValueError as cause:
            raise UserError(f"sharing: {cause}") from cause
        weights = sparsity.weights_of(network, left)
        tied = [name for name in sparsity.layers_of(network) if name not in left and f"{name}.weight" not in weights]
        if tied:
            raise UserError(f"sharing: {tied[0]} has the weights of another layer; name it in `ignore`")
        sharing.share(network, [name.removesuffix(".weight") for name in weights], self.clusters)

    def finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Make the shared values plain weights again."""
        sharing.settle(network_of(module))

    def results(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """How many values a layer has, at most."""
        state = network_of(module).state_dict()
        names = getattr(network_of(module), "shared", [])
        return {"shared_values": max((len(state[name].unique()) for name in names), default=0)}
