"""timm's image networks, over a thousand, from random weights, pretrained ones or a weight file.

R. Wightman: PyTorch Image Models, 2019, doi:10.5281/zenodo.4414861; ``timm.list_models()`` has the names. Images come
in [0, 1]: a network with pretrained weights, or weights from a file, normalises them by its own mean and standard
deviation, (x − ``mean``) / ``std``, so that any data goes with any network, and a teacher and a student share a batch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import timm
import torch
from lightning.pytorch.utilities import rank_zero_warn
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lab import artifact
from lab.ranges import Count, Dropout, Positive, checked
from lab.registry import nearest

Weights = dict[str, Tensor]

_PREFIXES = ("_orig_mod.", "module.", "model.", "network.")
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
_OWN_OPTIONS = {
    **{"in_chans": "in_channels", "num_classes": "num_classes", "pretrained": "pretrained", "drop_rate": "drop_rate"},
    **{"drop_path_rate": "drop_path_rate", "checkpoint_path": "weights", "pretrained_cfg": "weights, mean and std"},
    **{"pretrained_cfg_overlay": "weights, mean and std", "features_only": "the network's features()"},
}


def _known(model: str) -> str:
    try:
        timm.models.get_pretrained_cfg(model)
        if timm.is_model(model):
            return model
    except RuntimeError:  # no such tag
        pass
    name = model.partition(".")[0]
    names = timm.list_pretrained(f"{name}.*") if timm.is_model(name) else timm.list_models()
    hint = nearest(model, names)
    raise PydanticCustomError(
        "model", "no timm model of this name{hint}", {"hint": hint if len(hint) < 500 else "; timm.list_models()"}
    )


ModelName = Annotated[str, AfterValidator(_known)]


class Timm(nn.Module):
    """A network of timm, for images in [0, 1].

    Args:
        num_classes: outputs of the network.
        in_channels: channels of the image; pretrained weights of the first convolution are adapted to them.
        model: timm's name, such as ``resnet18`` or ``vit_tiny_patch16_224.augreg_in21k_ft_in1k``.
        input_shape: ``(C, H, W)`` of one image; networks of a fixed image size are built for it.
        pretrained: start from timm's weights, which are downloaded once.
        weights: start from this file (``.safetensors``; ``.pth``, ``.pt``, ``.bin`` without code in them).
        drop_rate: dropout before the classifier, in [0, 1); the model's own where it is left out.
        drop_path_rate: stochastic depth, in [0, 1); the model's own where it is left out.
        mean: of each channel, to normalise by; with weights the model's own where it is left out.
        std: of each channel, likewise.
        options: any other keyword argument of ``timm.create_model`` for this model.

    Raises:
        ValueError: the model has no such weights, or does not take these images or options.
    """

    outside: ClassVar[tuple[str, ...]] = ("pretrained", "weights")
    """Arguments by which a network takes something that is not in its own file."""

    mean: Tensor | None
    std: Tensor | None

    @checked
    def __init__(
        self,
        num_classes: Count,
        in_channels: Count,
        model: ModelName,
        *,
        input_shape: tuple[Count, ...] | None = None,
        pretrained: bool = False,
        weights: Path | None = None,
        drop_rate: Dropout | None = None,
        drop_path_rate: Dropout | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[Positive, ...] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if pretrained and weights is not None:
            raise ValueError("either pretrained: true or weights: a file")
        if pretrained and not timm.is_model_pretrained(model):
            raise ValueError(f"timm has no pretrained weights for {model}; say pretrained: false, or weights: a file")
        if input_shape is not None and len(input_shape) != 3:
            raise ValueError(f"timm's networks take images (C, H, W), the inputs have shape {input_shape}")
        arguments = dict(options or {})
        if taken := sorted(arguments.keys() & _OWN_OPTIONS):
            raise ValueError(f"options: {taken[0]} is {_OWN_OPTIONS[taken[0]]} here")
        config = timm.models.get_pretrained_cfg(model)
        if input_shape is not None and config is not None and config.fixed_input_size:
            arguments = {"img_size": input_shape[1:], **arguments}
        arguments |= {"drop_rate": drop_rate, "drop_path_rate": drop_path_rate}  # timm leaves out what is None
        try:
            self.model: Any = timm.create_model(
                model, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels, **arguments
            )
            if input_shape is not None:
                _try(self.model, input_shape)
        except (TypeError, ValueError, AssertionError, ArithmeticError, _Untakeable) as cause:
            said = {key: value for key, value in arguments.items() if value is not None}
            why = str(cause).partition("\n")[0] or type(cause).__name__
            raise ValueError(f"{model} with inputs {input_shape} and {said}: {why}") from cause
        if weights is not None:
            _load(self.model, weights, num_classes, in_channels)
        if pretrained or weights is not None:
            own: Any = self.model.pretrained_cfg
            mean, std = mean or tuple(own["mean"]), std or tuple(own["std"])
        for name, values in ("mean", mean), ("std", std):
            tensor = _per_channel(name, values, in_channels) if mean or std else None
            self.register_buffer(name, tensor, persistent=False)

    @property
    def head(self) -> nn.Module:
        """The model's own classifier; those of a model that has several, in a list."""
        head: nn.Module | Sequence[nn.Module] = self.model.get_classifier()
        return head if isinstance(head, nn.Module) else nn.ModuleList(head)

    def features(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images in [0, 1] to ``[B, D]``, what the classifier is given."""
        features: Tensor = self.model.forward_head(self.model.forward_features(self._normalised(x)), pre_logits=True)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` images in [0, 1] to ``[B, num_classes]`` logits."""
        logits: Tensor = self.model(self._normalised(x))  # (B, num_classes)
        return logits

    def rebuild(self) -> dict[str, Any]:
        """The arguments with which saved weights find the network again: nothing to load, the same normalisation."""
        found = {name: getattr(self, name) for name in ("mean", "std")}
        known = {name: None if value is None else value.flatten().tolist() for name, value in found.items()}
        return {"pretrained": False, "weights": None, **known}

    def _normalised(self, x: Tensor) -> Tensor:
        return x if self.mean is None or self.std is None else (x - self.mean) / self.std


class _Untakeable(RuntimeError):
    """A model cannot compute anything of these images."""


@torch.no_grad()
def _try(model: nn.Module, input_shape: tuple[int, ...]) -> None:
    """One image, now: many a model is built for images that are too small for it, and fails at the first batch."""
    try:
        model.eval()(torch.zeros(1, *input_shape))
    except RuntimeError as cause:
        raise _Untakeable(str(cause)) from cause
    finally:
        model.train()


def _per_channel(name: str, values: Sequence[float] | None, channels: int) -> Tensor:
    """``[1, C, 1, 1]``; the colours' values are averaged for images of other channels, as of grey ones."""
    values = values or ((0.0,) if name == "mean" else (1.0,))
    if len(values) == 3 != channels:
        values = (sum(values) / 3,)
    if len(values) not in (1, channels):
        raise ValueError(f"{name} has {len(values)} values, the images have {channels} channels")
    return torch.tensor(values).view(1, -1, 1, 1).repeat(1, channels // len(values), 1, 1)


def _load(model: Any, file: Path, num_classes: int, in_channels: int) -> None:
    """Put a file's weights into a model, fitted to its classes and channels; says what it had to change.

    Raises:
        ValueError: it is no file of weights, or has another network's; the first that differ are named.
    """
    said: list[str] = []
    config = model.pretrained_cfg
    heads, stems = _names(config.get("classifier")), _names(config.get("first_conv"))
    state = _renamed(_read(file), model, heads, stems, said)
    for name in (f"{stem}.weight" for stem in stems):
        own = model.get_parameter(name)
        if name in state and state[name].ndim == 4 and state[name].shape[1] == 3 and own.shape[1] == in_channels != 3:
            state[name] = timm.models.adapt_input_conv(in_channels, state[name])
            said.append(f"its first convolution is adapted from 3 channels to {in_channels}")
    fresh = [head for head in heads if len(state.get(f"{head}.weight", [0] * num_classes)) != num_classes]
    if fresh:
        classes = len(state[f"{fresh[0]}.weight"])
        said.append(f"its {classes} classes are not the data's {num_classes}: the classifier starts anew")
    prefixes = tuple(f"{head}." for head in fresh)
    state = {key: value for key, value in state.items() if not key.startswith(prefixes)} if fresh else state
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    try:  # weights from before PyTorch 0.4.1 have no counters
        artifact.load_weights(model, {**counters, **state}, except_for=prefixes)
    except artifact.ArtifactError as cause:
        raise ValueError(f"{file}: {str(cause).removeprefix('the checkpoint ')}") from cause
    if said:
        rank_zero_warn(f"{file.name}: {'; '.join(said)}")


def _read(file: Path) -> Weights:
    """The tensors of a file by name, without the wrappers that training programs put around them."""
    if not file.is_file():
        raise ValueError(f"there is no weight file {file}")
    try:
        if file.suffix == ".safetensors":
            found: Any = load_file(file)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own checkpoints keep their arguments
                found = artifact.unpickled(file)
    except artifact.ArtifactError as cause:
        why = str(cause).removeprefix(f"{file} ")
        raise ValueError(f"{file} cannot be read as weights alone: it {why}") from cause
    except (OSError, SafetensorError) as cause:
        raise ValueError(f"{file} cannot be read as weights alone: {artifact.first_line(cause)}") from cause
    while isinstance(found, dict) and (inner := [found[key] for key in _NESTED if isinstance(found.get(key), dict)]):
        found = inner[0]
    state = {key: value for key, value in found.items() if isinstance(value, Tensor)} if isinstance(found, dict) else {}
    if not state:
        raise ValueError(f"{file} holds no weights")
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _renamed(state: Weights, model: Any, heads: Sequence[str], stems: Sequence[str], said: list[str]) -> Weights:
    """A file's tensors under the model's names: by timm's own filter for the model, else, where all fit, in order."""
    own: Weights = model.state_dict()
    if _fits(own, state, heads, stems):
        return {key: state[key] for key in own}
    result = state
    if filter_ := getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None):
        try:
            result = filter_(dict(state), model)
        except Exception:  # it knows other files than this
            result = state
    if set(result) == set(own) or len(state) != len(own):
        return result
    in_order = dict(zip(own, state.values(), strict=True))
    if set(state) & set(own) or not _fits(own, in_order, heads, stems):
        return result
    said.append(f"its {len(state)} tensors have other names but the network's shapes: they are taken in their order")
    return in_order


def _fits(own: Weights, state: Weights, heads: Sequence[str], stems: Sequence[str]) -> bool:
    """Whether names and shapes are the model's, but for the number of classes and of the image's channels."""

    def free(key: str) -> int | None:
        module = key.rpartition(".")[0]
        return 0 if module in heads else 1 if module in stems and own[key].ndim > 1 else None

    def without(shape: torch.Size, dimension: int | None) -> list[int]:
        return [size for at, size in enumerate(shape) if at != dimension]

    return set(own) == set(state) and all(
        without(own[key].shape, free(key)) == without(state[key].shape, free(key)) for key in own
    )


def _names(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())
