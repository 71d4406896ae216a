from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from lab import artifact
from lab.build import Builder
from lab.callbacks.profile import profile
from lab.check import component
from lab.document import Place
from lab.networks.huggingface import HuggingFace

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {**TINY, "vocab_size": 50, "max_position_embeddings": 20}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a test asked the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny BERT with three classes."""
    torch.manual_seed(3)
    BertForSequenceClassification(BertConfig(**BERT, num_labels=3)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def texts(size: int = 5, length: int = 12) -> Tensor:
    x = torch.randint(3, 50, (size, length), generator=torch.Generator().manual_seed(0))
    x[1, 7:] = 0
    return x


def test_a_folder_gives_the_librarys_own_outputs(folder: Path) -> None:
    x = texts()
    network = HuggingFace(3, 50, folder=folder).eval()
    own = BertForSequenceClassification.from_pretrained(folder).eval()
    assert torch.equal(network(x), own(input_ids=x, attention_mask=(x != 0).long()).logits)


def test_padding_changes_nothing(folder: Path) -> None:
    network, x = HuggingFace(3, 50, folder=folder).eval(), texts()
    assert torch.allclose(network(torch.nn.functional.pad(x, (0, 8))), network(x), atol=1e-6)


def test_an_empty_text_is_not_masked_out_as_a_whole(folder: Path) -> None:
    network, x = HuggingFace(3, 50, folder=folder).eval(), texts()
    x[2] = 0
    seen: list[Tensor] = []
    network.model.register_forward_pre_hook(
        lambda _, __, arguments: seen.append(arguments["attention_mask"]), with_kwargs=True
    )
    assert network(x).isfinite().all()
    assert seen[0].any(1).all()


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "albert", "mpnet", "deberta-v2", "modernbert"])
def test_the_classifier_of_any_encoder_is_found(kind: str) -> None:
    config = {"model_type": kind, **TINY, "max_position_embeddings": 20}
    if kind in ("electra", "albert"):
        config["embedding_size"] = 8
    if kind == "modernbert":
        config |= {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    network = HuggingFace(3, 50, config=config).eval()
    x = texts()
    assert network.features(x).shape == (5, 16)
    assert torch.allclose(network.head(network.features(x)), network(x), atol=1e-6)


def test_the_padding_is_the_models() -> None:
    network = HuggingFace(3, 50, config={"model_type": "roberta", **TINY, "max_position_embeddings": 20}).eval()
    assert network.padding == 1
    x = texts(length=10).clamp(min=2)
    assert torch.allclose(network(torch.nn.functional.pad(x, (0, 5), value=1)), network(x), atol=1e-6)


def test_a_classifier_of_other_classes_starts_anew_and_that_is_said(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"no weights that fit classifier.bias, classifier.weight: they start anew"):
        network = HuggingFace(5, 50, folder=folder)
    own = BertForSequenceClassification.from_pretrained(folder).bert.state_dict()
    assert all(torch.equal(network.model.bert.state_dict()[key], value) for key, value in own.items())
    assert network(texts()).shape == (5, 5)


def test_a_language_model_becomes_a_classifier_and_what_is_new_is_said(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**BERT)).save_pretrained(tmp_path / "mlm")
    with pytest.warns(UserWarning, match="no weights that fit .*classifier.weight"):
        HuggingFace(3, 50, folder=tmp_path / "mlm")


def test_without_pretrained_weights_the_configuration_alone_is_used(folder: Path) -> None:
    network = HuggingFace(5, 50, folder=folder, pretrained=False)
    own = BertForSequenceClassification.from_pretrained(folder).bert.state_dict()
    assert network.model.config.hidden_size == 16
    assert any(not torch.equal(network.model.bert.state_dict()[key], value) for key, value in own.items())


def test_a_saved_network_needs_neither_hub_nor_folder(folder: Path, tmp_path: Path) -> None:
    spec = {"name": "transformers", "num_classes": 3, "vocab_size": 40, "folder": str(folder), "input_shape": [12]}
    found, builder = component("networks", spec, Place("a test")), Builder(0)
    network = builder.build(found)
    artifact.save(tmp_path, network, artifact.Description("networks", builder.spec(found)))
    for file in folder.iterdir():
        file.unlink()
    saved = artifact.describe(tmp_path).component
    assert (saved["folder"], saved["path"], saved["pretrained"]) == (None, None, False)
    again = Builder(1).build(component("networks", saved, Place("saved")))
    artifact.load_weights(again, tmp_path / artifact.WEIGHTS)
    assert torch.equal(again.eval()(texts()), network.eval()(texts()))


def test_more_tokens_than_the_model_knows_are_refused_and_the_tokenizer_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"knows 50 tokens, the data has 60: .*\(data.tokenizer: .*bert\)"):
        HuggingFace(3, 60, folder=folder)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "say one of path"),
        ({"config": {"model_type": "bert"}, "path": "x"}, "say one of path"),
        ({"path": "./x"}, "say it as `folder:`"),
        ({"folder": "no_such"}, "there is no folder no_such"),
        ({"config": {"model_type": "bert", **BERT}, "input_shape": (21,)}, "texts of 20 tokens at most.*have 21"),
        ({"config": {"model_type": "bert", **BERT}, "input_shape": (1, 8, 8)}, r"token ids \(L,\)"),
        ({"config": {"model_type": "t5", "vocab_size": 50}}, "no encoder with a linear classifier"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HuggingFace(3, 50, **arguments)


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    BertConfig(**{**BERT, "intermediate_size": 48}, num_labels=3).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"are another network's: bert.encoder.layer.0.intermediate"):
        HuggingFace(3, 50, folder=folder)


def test_half_precision_files_are_trained_in_full(folder: Path) -> None:
    BertForSequenceClassification.from_pretrained(folder).half().save_pretrained(folder)
    assert {p.dtype for p in HuggingFace(3, 50, folder=folder).parameters()} == {torch.float32}


def test_code_in_a_folder_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text("import pathlib; pathlib.Path('harm').touch()\n")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"model_type": "bert"', '"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}')
    )
    with pytest.raises(ValueError, match=r"evil|trust_remote_code"):
        HuggingFace(3, 50, folder=folder)
    assert not Path("harm").exists()


def test_it_is_profiled(folder: Path) -> None:
    cost = profile(HuggingFace(3, 50, folder=folder), texts()[:1])
    assert cost["macs"] > 12 * 2 * 4 * 16**2


def test_importing_it_asks_no_network_and_says_nothing() -> None:
    code = (
        "import socket\n"
        "def refuse(*_): raise SystemExit('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import lab.networks.huggingface, sys\n"
        "assert 'datasets' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_library_reports_to_others_as_before(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    HuggingFace(3, 50, folder=folder)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capsys.readouterr() == ("", "")
    assert AutoConfig.from_pretrained(folder).num_labels == 3
    assert AutoModelForSequenceClassification is not None
