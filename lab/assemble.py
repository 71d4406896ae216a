"""A stage's objects: its data and module, built for training, or with the weights of a finished run.

Here ``{from: ...}`` becomes a network: of another stage of the run, or of another run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn

from lab import artifact, recipe, run, trainer
from lab.build import Builder
from lab.check import check, component
from lab.document import Place, Problem, RecipeError
from lab.files import inside
from lab.plan import Component, From, Plan, Stage
from lab.recipe import shown
from lab.registry import KINDS
from lab.run import Run
from lab.types import check_component, check_types

PARTS = ("modules", "networks", "objectives", "optimizers", "schedulers", "transforms")
"""The kinds of which a saved network is made; to build others has effects, such as a logger's files."""


@dataclass
class Built:
    """The objects of one stage."""

    stage: Stage
    builder: Builder
    module: LightningModule
    data: LightningDataModule | None

    @property
    def network(self) -> nn.Module:
        """What the stage gives to others: the module's ``network`` if it is the one it was given, else the module."""
        network = getattr(self.module, "network", None)
        as_given = network is self.builder.made.get(("module", "network"))
        return network if isinstance(network, nn.Module) and as_given else self.module

    @property
    def description(self) -> artifact.Description:
        """What :attr:`network` is: enough to build it again without the recipe or the data."""
        described = self.stage.module.arguments.get("network")
        changed = (getattr(self.network, "surgery", {}), getattr(self.network, "quantization", {}))
        if self.network is self.module or not isinstance(described, Component | From):
            return artifact.Description("modules", self.builder.spec(self.stage.module), self.builder.facts, *changed)
        kind = "modules" if isinstance(self.network, LightningModule) else "networks"
        return artifact.Description(kind, self.builder.spec(described), self.builder.facts, *changed)


def build(stage: Stage, this: Run | None = None, facts: Mapping[str, Any] | None = None) -> Built:
    """A stage's data and module, the data's facts filled in.

    Args:
        this: the run that ``{from: stage}`` looks into.
        facts: instead of the data's own: those of the data that the stage was trained on.
    """
    builder = Builder(stage.seed, lambda reference, facts: fetch(reference, facts, this))
    data = builder.build(stage.data) if stage.data is not None else None
    if facts is not None:
        builder.facts = dict(facts)
    elif data is not None and (names := tuple(getattr(data, "facts", ()))):
        data.prepare_data()
        data.setup("fit")
        builder.facts = {name: value for name in names if (value := getattr(data, name, None)) is not None}
    return Built(stage, builder, builder.build(stage.module), data)


def fetch(reference: From, facts: Mapping[str, Any], this: Run | None) -> tuple[nn.Module, dict[str, Any]]:
    """The network that a ``{from: ...}`` means, with its specification.

    Raises:
        ArtifactError: there is none, or not of that kind.
    """
    folder = source_of(reference, this)
    saved = artifact.describe(folder)
    kind, spec = saved.kind, saved.component
    reset = reference.head == "reset"
    if reset:
        spec = {**spec, "num_classes": facts.get("num_classes", spec.get("num_classes"))}
    network: nn.Module = Builder(0).build(_described(folder, kind, spec))
    weights: Any = folder / artifact.WEIGHTS
    if reference.checkpoint != "last":  # whose weights are those of training, before layers shrank
        artifact.operate(network, saved, folder)
    else:
        state = artifact.weights_of(artifact.part(folder, "checkpoints/last.ckpt"))
        prefix = "network." if all(f"network.{key}" in state for key in network.state_dict()) else ""
        weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    prefixes = _prefixes(network, getattr(network, "head", None)) if reset else ()
    if reset and not prefixes:
        raise artifact.ArtifactError(
            f"{reference.place}: head: reset needs a network with a `head`; {spec['name']} has none"
        )
    artifact.load_weights(network, weights, except_for=prefixes)
    return network, spec


def _prefixes(network: nn.Module, part: object) -> tuple[str, ...]:
    """What the tensors of a part of a network are called in it: ``head`` may be its name for ``model.fc``."""
    parts = {id(module) for module in part.modules()} if isinstance(part, nn.Module) else set()
    named = network.named_modules(remove_duplicate=False)
    return tuple(f"{name}." for name, module in named if name and id(module) in parts)


def source_of(reference: From, this: Run | None) -> Path:
    """The folder of the stage that a reference names."""
    if "/" not in reference.source:
        if this is None:
            raise artifact.ArtifactError(f"{reference.place}: there is no run to take '{reference.source}' from")
        return this.stage(reference.source)
    pinned = this.manifest.get("origins", {}).get(reference.source) if this is not None else None
    if this is not None and pinned is not None:  # `latest` is what it was when the run began
        return this.folder / str(pinned)
    found, name = run.locate(reference.source, reference.folder)
    try:
        return run.stage_of(found, name)
    except run.RunNotFound as cause:
        raise artifact.ArtifactError(f"{reference.place}: {cause}") from cause


def open_stage(this: Run, name: str | None, overrides: Sequence[str] = ()) -> tuple[Built, Trainer]:
    """A finished stage with its network's weights, and a trainer that writes nothing, for use.

    Args:
        name: the stage; the last one where it is left out.
        overrides: ``data.path=value`` each: other data, or the same with other arguments.

    Raises:
        RecipeError: an override is wrong, or names something else than the data.
        ArtifactError: the stage has not finished.
    """
    wrong = [text for text in overrides if not text.startswith(("data.", "data=", "trainer.", "trainer="))]
    if wrong:
        raise RecipeError(
            [Problem(Place(f"override {wrong[0]}"), "", "of a finished run only data and trainer can change")]
        )
    plan = check(recipe.load(this.recipe, overrides))
    name = name or list(plan.stages)[-1]
    check_types(Plan(plan.name, plan.description, {name: plan.stages[name]}))
    with trainer.quiet():
        saved = artifact.describe(this.stage(name))
        built = build(_as_saved(plan.stages[name], saved, this), this, saved.facts)
        if built.data is not None:
            artifact.load_learnt(this.stage(name), built.data)
        artifact.operate(built.network, saved, this.stage(name))
        _load(built, this)
        arguments = {key: value for key, value in plan.stages[name].trainer.plain().items() if key in _EVALUATION}
        lightning = Trainer(
            **arguments, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, default_root_dir=this.stage(name),
        )  # fmt: skip
    return built, lightning


def _as_saved(stage: Stage, saved: artifact.Description, this: Run) -> Stage:
    """The stage with its network as the run describes it: what it started from isn't needed once it has weights."""
    network = stage.module.arguments.get("network")
    if saved.kind != "networks" or not isinstance(network, Component):
        return stage
    found = replace(_described(this.stage(stage.name), "networks", saved.component), path=network.path)
    return replace(stage, module=replace(stage.module, arguments={**stage.module.arguments, "network": found}))


def _described(folder: Path, kind: str, spec: Mapping[str, Any]) -> Component:
    """The component that a stage's ``network.json`` describes.

    Raises:
        RecipeError: it names nothing that is registered, or says what its class doesn't take.
        ArtifactError: it refers to what is not in the folder: other runs, files, a hub.
    """
    file = folder / artifact.DESCRIPTION
    found = component(kind, spec, Place(str(file), is_file=True))
    check_component(found)
    for part in found.components():
        if isinstance(part, Component) and part.kind not in PARTS:
            raise artifact.ArtifactError(
                f"{file} is damaged: {part.name} is {KINDS[part.kind].one}, no part of a network"
            )
        outside = part.signature.attributes.get("outside", ()) if isinstance(part, Component) else ("from",)
        said = part.plain()
        for name in outside if isinstance(outside, tuple | list) else ():
            if said.get(str(name)):
                raise artifact.ArtifactError(
                    f"{file} is damaged: a saved network has all its weights, it takes none by `{name}:` "
                    f"{shown(said[str(name)])}"
                )
    return found


def _chosen(this: Run, name: str) -> Path | None:
    """The checkpoint that a stage's results name, which is in the run; None where none was kept."""
    file = this.folder / "results.json"
    try:
        said = this.results["stages"][name]["checkpoint"]
    except (KeyError, TypeError) as cause:
        raise artifact.ArtifactError(f"{file} is damaged: it has no checkpoint of {name}") from cause
    if said is None:
        return None
    if not isinstance(said, str):
        raise artifact.ArtifactError(f"{file} is damaged: {shown(said)} is no checkpoint")
    return inside(this.folder, said)


def _load(built: Built, this: Run) -> None:
    """Give a finished stage its weights: its network's, and from the checkpoint what its module learnt beside it."""
    name = built.stage.name
    artifact.load_weights(built.network, this.stage(name) / artifact.WEIGHTS)
    inside = {id(tensor) for tensor in built.network.state_dict(keep_vars=True).values()}
    own = built.module.state_dict(keep_vars=True)
    beside = {key for key, tensor in own.items() if id(tensor) not in inside}
    if not beside:
        return
    chosen = _chosen(this, name)
    if chosen is None:
        raise artifact.ArtifactError(
            f"{this.id}/{name}: {min(beside)} is not in its network, and no checkpoint was kept that has it"
        )
    saved = artifact.weights_of(chosen)
    weights = {key: saved.get(key) if key in beside else tensor for key, tensor in own.items()}
    artifact.load_weights(built.module, {key: tensor for key, tensor in weights.items() if tensor is not None})


_EVALUATION = (
    "accelerator",
    "devices",
    "precision",
    "limit_test_batches",
    "limit_val_batches",
    "limit_predict_batches",
)
