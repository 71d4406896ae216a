"""Hugging Face's text encoders with a classifier, from the hub, a local folder, or a configuration.

T. Wolf et al.: Transformers: State-of-the-Art Natural Language Processing, EMNLP 2020. Whatever
``AutoModelForSequenceClassification`` knows whose classifier sees one vector a text: BERT, DistilBERT, RoBERTa,
ELECTRA, ALBERT, DeBERTa, ModernBERT, ... The token id of the model's padding is not attended to. Code from the hub is
never run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import logging as _logging

from lab.ranges import Count, checked

_MODELS: Any = AutoModelForSequenceClassification  # it has no types
logging: Any = _logging

_NOT_REBUILT = {"architectures", "auto_map", "dtype", "id2label", "label2id", "torch_dtype", "transformers_version"}


class HuggingFace(nn.Module):
    """A text encoder of Hugging Face with a classifier; exactly one of ``path``, ``folder`` and ``config`` says which.

    Args:
        num_classes: outputs of the network; a classifier of another number starts anew.
        vocab_size: token ids of the data are below it.
        path: name of a model on the hub, such as ``distilbert-base-uncased``; downloaded once.
        folder: where ``save_pretrained`` wrote a model.
        config: of a model from random weights: ``model_type`` and its settings; ``vocab_size`` is the data's.
        pretrained: with the model's weights; else only its configuration is used.
        input_shape: ``(L,)``, the most tokens of a text.

    Raises:
        ValueError: the model knows fewer tokens than the data has, or shorter texts; its weights don't fit; it is no
            encoder with a classifier.
    """

    outside: ClassVar[tuple[str, ...]] = ("path", "folder", "pretrained")
    """Arguments by which a network takes something that is not in its own file."""

    @checked
    def __init__(
        self,
        num_classes: Count,
        vocab_size: Count,
        *,
        path: str | None = None,
        folder: Path | None = None,
        config: dict[str, Any] | None = None,
        pretrained: bool = True,
        input_shape: tuple[Count, ...] | None = None,
    ) -> None:
        super().__init__()
        if sum(source is not None for source in (path, folder, config)) != 1:
            raise ValueError("say one of path (a model on the hub), folder (a local one) and config (random weights)")
        if folder is not None and not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
        if path is not None and (path.startswith((".", "/", "~")) or Path(path).is_dir()):
            raise ValueError(f"path {path} is a folder: say it as `folder:`, relative to the file that says it")
        source = str(folder or path or (config or {}).get("model_type"))
        with _quiet():
            if config is None:
                found: Any = AutoConfig.from_pretrained(source, trust_remote_code=False)
            else:
                found = AutoConfig.for_model(**{"vocab_size": vocab_size, **config})
            _refuse_code(found, source)
            _refuse_longer(found, source, vocab_size, input_shape)
            if found.num_labels != num_classes:
                found.num_labels = num_classes
            if config is None and pretrained:
                self.model: Any = _loaded(source, found)
            else:
                self.model = _MODELS.from_config(found, trust_remote_code=False)
        self.model = self.model.float()
        self.padding = 0 if found.pad_token_id is None else int(found.pad_token_id)
        outputs = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == num_classes
        ]
        if not outputs or found.is_encoder_decoder:
            raise ValueError(f"{source} ({found.model_type}) is no encoder with a linear classifier")
        self.head_name = outputs[-1]

    @property
    def head(self) -> nn.Module:
        """The classifier's last layer."""
        head: nn.Module = self.model.get_submodule(self.head_name)
        return head

    def features(self, x: Tensor) -> Tensor:
        """``[B, L]`` token ids to ``[B, D]``, what the classifier's last layer is given."""
        seen: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self(x)
        finally:
            hook.remove()
        return seen[0]

    def forward(self, x: Tensor) -> Tensor:
        """``[B, L]`` token ids to ``[B, num_classes]`` logits."""
        real = x != self.padding  # (B, L)
        real = real | ~real.any(1, keepdim=True)  # an empty text sees its padding: a softmax over nothing is NaN
        logits: Tensor = self.model(input_ids=x, attention_mask=real.long()).logits  # (B, num_classes)
        return logits

    def rebuild(self) -> dict[str, Any]:
        """The arguments with which saved weights find the network again: its configuration, no hub, no folder."""
        config = json.loads(json.dumps(self.model.config.to_diff_dict()))
        kept = {key: value for key, value in config.items() if key not in _NOT_REBUILT and not key.startswith("_")}
        return {
            **{"path": None, "folder": None, "pretrained": False},
            "config": {**kept, "model_type": self.model.config.model_type, "vocab_size": self.model.config.vocab_size},
        }


def _refuse_code(config: Any, source: str) -> None:
    """Refuse attention and experts that a hub's compiled code computes, which is loaded when the model is built."""
    chosen = {key: value for key, value in vars(config).items() if "_implementation" in key}
    kernels = [name for value in chosen.values() for name in _strings(value) if "/" in name or "|" in name]
    if kernels:
        raise ValueError(f"{source} wants the code {kernels[0]} from the hub, which is never run")


def _strings(value: Any) -> list[str]:
    """The texts in a configuration's value, which may be one for each part of the model."""
    return [text for v in value.values() for text in _strings(v)] if isinstance(value, dict) else [str(value)]


def _refuse_longer(config: Any, source: str, vocab_size: int, input_shape: tuple[int, ...] | None) -> None:
    """Refuse data with token ids or texts that the model has no rows for."""
    if input_shape is not None and len(input_shape) != 1:
        raise ValueError(f"{source} takes token ids (L,), the inputs have shape {input_shape}")
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"{source} knows {config.vocab_size} tokens, the data has {vocab_size}: give the data the model's own "
            f"tokenizer (data.tokenizer: {source})"
        )
    positions = getattr(config, "max_position_embeddings", None) or 0
    if input_shape is not None and 0 < positions < input_shape[0]:
        raise ValueError(f"{source} takes texts of {positions} tokens at most, the data's have {input_shape[0]}")


def _loaded(source: str, config: Any) -> Any:
    """A model with its weights; what the file lacks is said.

    Raises:
        ValueError: weights other than the classifier's have other shapes.
    """
    model, report = _MODELS.from_pretrained(
        source, config=config, trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True
    )
    base = f"{model.base_model_prefix}."
    wrong = sorted(key for key, *_ in report["mismatched_keys"] if key.startswith(base))
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"the weights of {source} are another network's: {', '.join(wrong[:3])}{more}")
    fresh = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if fresh:
        rank_zero_warn(f"{source} has no weights that fit {', '.join(fresh)}: they start anew")
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own reports and progress bars: lab says what a user needs to know."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
