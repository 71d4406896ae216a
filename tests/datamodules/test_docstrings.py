"""The embedded texts."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from lab.datamodules import docstrings
from lab.datamodules.docstrings import EACH, PACKAGES, WORDS, Docstrings


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    data = Docstrings()
    data.prepare_data()
    columns: dict[str, list[str]] = data.tables["train"].rows.to_pydict()
    return columns


def test_every_package_gives_as_many_different_texts(texts: dict[str, list[str]]) -> None:
    assert Counter(texts["package"]) == dict.fromkeys(PACKAGES, EACH)
    for package in PACKAGES:
        own = [text.lower() for text, name in zip(texts["text"], texts["package"], strict=True) if name == package]
        assert len(set(own)) == EACH


def test_no_text_names_a_package_or_is_too_short_or_long(texts: dict[str, list[str]]) -> None:
    names = re.compile(rf"\b({'|'.join((*PACKAGES, *PACKAGES.values()))})\b", re.IGNORECASE)
    for text in texts["text"]:
        assert not names.search(text)
        assert len(text.split()) in WORDS


def test_they_are_tokens_of_eight_classes_split_alike_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data, again = Docstrings(max_length=40), Docstrings(max_length=40)
    data.prepare_data()
    monkeypatch.setattr(docstrings, "_read", None)
    for one in (data, again):
        one.setup()
    assert (data.num_classes, data.input_shape, data.objective) == (8, (40,), "classification")
    assert [len(split) for split in (data.train, data.val, data.test)] == [5600, 800, 1600]
    assert data.classes == sorted(PACKAGES)
    assert data.train.targets.bincount().tolist() == [700] * 8
    assert int(data.train.inputs.max()) < data.vocab_size
    assert data.fingerprint() == again.fingerprint()
    assert torch.equal(data.test.inputs, again.test.inputs)
