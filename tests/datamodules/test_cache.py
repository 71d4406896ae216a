from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lab.datamodules.cache import cached, digest, folder


class Source:
    """Something slow to read, that counts how often it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self) -> dict[str, Tensor]:
        self.reads += 1
        return {"x": torch.arange(1000, dtype=torch.uint8), "y": torch.eye(3)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_cached_is_read_from_its_source_once(cache: Path) -> None:
    source = Source()
    first, second = cached("data", source), cached("data", source)
    assert source.reads == 1
    assert digest(first) == digest(second)
    assert [path.name for path in cache.iterdir()] == ["data.safetensors"], "a temporary file was left"


@pytest.mark.parametrize("damage", ["cut short", "emptied", "one bit", "another's"])
def test_a_damaged_file_is_written_anew(cache: Path, damage: str) -> None:
    source = Source()
    whole = cached("data", source)
    path = cache / "data.safetensors"
    content = path.read_bytes()
    if damage == "cut short":
        path.write_bytes(content[:-500])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "one bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        save_file({"x": torch.zeros(3)}, path)
    assert digest(cached("data", source)) == digest(whole)
    assert source.reads == 2
    cached("data", source)
    assert source.reads == 2


def test_a_cache_that_cannot_be_written_costs_time_only(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("a file where the folder should be")
    source = Source()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cached("data", source)["y"], torch.eye(3))
        cached("data", source)
    assert source.reads == 2
    assert "data is not cached" in caplog.text


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LAB_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert "x" in cached("data", Source())


def test_lab_cache_goes_before_xdg_cache_home_before_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "cache"
    monkeypatch.delenv("LAB_CACHE")
    assert folder() == tmp_path / "xdg" / "lab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder() == Path.home() / ".cache" / "lab"


def test_a_digest_tells_names_types_and_shapes_apart() -> None:
    zeros = torch.zeros(4)
    assert len({digest(t) for t in ({"a": zeros}, {"b": zeros}, {"a": zeros.int()}, {"a": zeros.reshape(2, 2)})}) == 4
