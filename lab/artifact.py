"""Networks as files: weights as safetensors, what they are as JSON; nothing in them is code.

``network.json`` says which registered class the network is and with which arguments; reading it builds registered
classes only. ``data.json`` has what the data learnt: plain values.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from lab import quantized, sharing, surgery
from lab.errors import UserError
from lab.files import inside, read_json, replacing, write_json

WEIGHTS = "network.safetensors"
DESCRIPTION = "network.json"
LEARNT = "data.json"
SCHEMA = 1


class ArtifactError(UserError):
    """A file that should be a network is missing, damaged, or another network."""


class Teacher:
    """A network that is only asked: frozen, in eval mode, outside optimizer, ``state_dict`` and DDP.

    It is no ``nn.Module`` on purpose: a module that holds one neither trains, saves nor moves it, and ``train()``
    does not reach it. It follows its inputs to their device and precision.

    Args:
        network: taken over, not copied.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """The network's outputs, without a graph."""
        first = next(self.network.parameters(), None)
        if first is not None and (
            first.device != inputs.device or (inputs.is_floating_point() and first.dtype != inputs.dtype)
        ):
            self.network.to(inputs.device, inputs.dtype if inputs.is_floating_point() else None)
        outputs: Tensor = self.network(inputs)
        return outputs


@dataclass(frozen=True)
class Description:
    """What a saved network is.

    Args:
        kind: the registry kind of its class, ``networks`` or ``modules``.
        component: what builds it: ``name`` and arguments.
        facts: of the data that it was trained on, such as ``num_classes``.
        surgery: the sizes of layers that shrank (:mod:`lab.surgery`).
        quantization: what is rounded, to how many bits (:mod:`lab.quantization`).
    """

    kind: str
    component: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    surgery: dict[str, dict[str, int]] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, network: nn.Module, description: Description) -> int:
    """Write a network into a folder, each file whole or not at all.

    Returns:
        The size of the weights' file in bytes.
    """
    with replacing(folder / WEIGHTS) as temporary:
        names = getattr(network, "shared", [])
        if names or getattr(network, "quantization", None):
            state = network.state_dict()
            once = {key: tensor for key, tensor in state.items() if key == min([key, *_tied(state)[key]])}
            save_file(sharing.packed(quantized.packed(network, once), names), str(temporary))
        else:
            save_model(network, str(temporary))
    write_json(folder / DESCRIPTION, {"schema": SCHEMA, **asdict(description)})
    return (folder / WEIGHTS).stat().st_size


def describe(folder: Path) -> Description:
    """What the network saved in a folder is.

    Raises:
        ArtifactError: there is none, or its description is damaged.
    """
    path = part(folder, DESCRIPTION)
    try:
        data = read_json(path)
        named = (data["kind"], data["component"], data["facts"])
        found = Description(*named, data.get("surgery", {}), data.get("quantization", {}))
    except FileNotFoundError as cause:
        raise ArtifactError(f"{folder} has no {DESCRIPTION}: its stage did not finish, or it is no stage") from cause
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise ArtifactError(f"{path} is damaged: {type(cause).__name__} {cause}") from cause
    if found.kind not in ("networks", "modules") or not all(
        isinstance(d, dict)
        for d in (found.component, found.facts, found.quantization, found.surgery, *found.surgery.values())
    ):
        raise ArtifactError(f"{path} is damaged: it describes no network")
    return found


def operate(network: nn.Module, saved: Description, folder: Path) -> None:
    """Give a network that was built as it once was the sizes, and the rounding, that it was saved with.

    Raises:
        ArtifactError: its description is damaged.
    """
    try:
        surgery.shrink(network, saved.surgery)
        quantized.restore(network, saved.quantization)
    except (ValueError, AttributeError, TypeError) as cause:
        raise ArtifactError(f"{part(folder, DESCRIPTION)} is damaged: {cause}") from cause


def save_learnt(folder: Path, data: LightningDataModule) -> None:
    """Write what data learnt from the training samples, such as the order of the classes, if anything."""
    if not (state := data.state_dict()):
        return
    try:
        write_json(folder / LEARNT, {"schema": SCHEMA, "data": type(data).__qualname__, "learnt": state})
    except (TypeError, ValueError) as cause:  # tensors of anyone's: checkpoints have them
        rank_zero_warn(f"what {type(data).__qualname__} learnt is kept in checkpoints only: {cause}")


def load_learnt(folder: Path, data: LightningDataModule) -> None:
    """Give data what the data of a finished stage learnt; classes that share an ancestor of lab's read each other's.

    Raises:
        ArtifactError: what was kept is damaged.
    """
    path = part(folder, LEARNT)
    if not path.exists():
        return
    try:
        saved = read_json(path)
        owner, state = str(saved["data"]), dict(saved["learnt"])
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise ArtifactError(f"{path} is damaged: {type(cause).__name__} {cause}") from cause
    if owner == type(data).__qualname__ or hasattr(data, "learnt"):
        try:
            data.load_state_dict(state)
        except Exception as cause:  # what anyone's data raise where they are told what they never learnt
            raise ArtifactError(f"{path} is not what {type(data).__qualname__} learns: {cause}") from cause


def part(folder: Path, name: str) -> Path:
    """A file of a stage's folder.

    Raises:
        UserError: a link leads out of the run that the stage is part of.
    """
    return inside(folder.parent, Path(folder.name, name))


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a Lightning checkpoint.

    Raises:
        ArtifactError: the file is missing or damaged, or holds anything else.
    """
    saved = unpickled(checkpoint)
    state = saved.get("state_dict") if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ArtifactError(f"{checkpoint} is no checkpoint: it has no state_dict of tensors")
    return state


def unpickled(path: Path) -> Any:
    """What ``torch.save`` wrote: tensors, numbers, strings, and lists and mappings of them; nothing in it is executed.

    Raises:
        ArtifactError: the file is missing or damaged, or holds anything else.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is no file" if path.exists() else f"{path} is not there")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as cause:
        said = f"{path} is damaged, or holds more than tensors and plain values: nothing in it is run"
        raise ArtifactError(said) from cause
    except Exception as cause:  # damaged pickles raise whatever they like
        raise ArtifactError(f"{path} cannot be read: {type(cause).__name__} {first_line(cause)}") from cause


def first_line(cause: Exception) -> str:
    """The first sentence of what may go on about C++ frames, or advise to load code after all."""
    return str(cause).partition("\n")[0].partition(". ")[0]


def load_weights(network: nn.Module, weights: Path | Mapping[str, Tensor], *, except_for: tuple[str, ...] = ()) -> None:
    """Put saved weights into a network that was built for them.

    Args:
        weights: a safetensors file, or a state dict.
        except_for: prefixes of tensors to leave as they are, such as ``("head.",)``.

    Raises:
        ArtifactError: the file is missing or damaged, or the tensors are another network's; names the first that
        differ.
    """
    source = "the checkpoint"
    if isinstance(weights, Path):
        source = str(weights)
        if not part(weights.parent, weights.name).is_file():
            raise ArtifactError(f"{source} cannot be read: there is no such file")
        try:
            whole = quantized.unpacked(network, load_file(weights))
            weights = sharing.unpacked(whole, {k: t.shape for k, t in network.state_dict().items()})
        except (OSError, SafetensorError, ValueError) as cause:
            raise ArtifactError(f"{source} cannot be read: {cause}") from cause
    own = network.state_dict()
    wanted = {key for key in own if not key.startswith(except_for)} if except_for else set(own)
    same_memory = _tied(own)
    missing = sorted(
        key for key in wanted if key not in weights and not any(other in weights for other in same_memory[key])
    )
    unexpected = sorted(key for key in weights if key not in own)
    shapes = [
        f"{key}: {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(wanted & set(weights))
        if weights[key].shape != own[key].shape
    ]
    faults = [*shapes, *(f"{key}: missing" for key in missing), *(f"{key}: not in this network" for key in unexpected)]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ArtifactError(f"{source} has the weights of another network: {'; '.join(faults[:3])}{more}")
    network.load_state_dict({key: weights[key] for key in wanted if key in weights}, strict=False)


def _tied(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For every tensor, the names of those that share its memory: safetensors keeps one of them."""
    groups: dict[tuple[int, int], list[str]] = {}
    for key, tensor in state.items():
        groups.setdefault((tensor.data_ptr(), tensor.numel()), []).append(key)
    return {key: [k for k in group if k != key] for group in groups.values() for key in group}
