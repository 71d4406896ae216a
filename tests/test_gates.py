"""Gates: what a bound may say, and when a stage's figures keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lab import Run, load_recipe
from lab.cli import main
from lab.document import Place
from lab.gates import Gate

BEFORE: dict[str, Any] = {
    "dense": {"bytes": 3000, "metrics": {"test/accuracy": 0.96}, "latency_ms": {"batch_64": 12.0}}
}
HERE: dict[str, Any] = {"bytes": 100, "metrics": {"test/accuracy": 0.955}, "latency_ms": {"batch_64": 2.0}}


def gate(metric: str, text: str) -> Gate:
    return Gate.parse(metric, text, Place("r.yaml", 1, 1))


@pytest.mark.parametrize(
    ("metric", "text", "said"),
    [
        ("bytes", "<= 100", None),
        ("bytes", "< 100", "bytes is 100, < 100 is required"),
        ("bytes", "== 1e2", None),
        ("bytes", "<= dense / 30", None),
        ("bytes", "<=dense/30.5", "bytes is 100, <= dense / 30.5 is required, which is 98.3607"),
        ("bytes", "> dense", "bytes is 100, > dense is required, which is 3000"),
        ("test/accuracy", ">= dense - 0.01", None),
        ("test/accuracy", ">= dense + 0.01", "test/accuracy is 0.955, >= dense + 0.01 is required, which is 0.97"),
        ("latency_ms/batch_64", "<= dense / 6", None),
        ("latency_ms/batch_64", "< dense * 0.1", "latency_ms/batch_64 is 2, < dense * 0.1 is required, which is 1.2"),
        ("latency_ms", "< 3", "latency_ms was not measured, < 3 is required"),
        ("test/f1", "> 0", "test/f1 was not measured, > 0 is required"),
        ("macs", "< dense", "macs was not measured, < dense is required"),
        ("bytes", "< other", "bytes of other was not measured, < other is required"),
    ],
)
def test_figures_keep_a_bound_or_miss_it(metric: str, text: str, said: str | None) -> None:
    met, words = gate(metric, text).judge(HERE, BEFORE)
    assert met == (said is None)
    assert words == (said or words)
    assert words.startswith(f"{metric} ")


@pytest.mark.parametrize(
    "text", [">= 0.95", "< 50_000", "<= dense / 30", ">= dense - 0.0123456789", "== dense", "> -1.5"]
)
def test_a_bound_written_out_is_read_back_equal(text: str) -> None:
    first = gate("m", text)
    assert gate("m", str(first)) == first


@pytest.mark.parametrize(
    "text", ["", "0.9", "=> 3", "< dense / 0", "< dense / x", "< dense 3", "< 3 dense", "< Dense", "<"]
)
def test_what_is_no_bound(text: str) -> None:
    with pytest.raises(ValueError, match="no bound"):
        gate("m", text)


def chain(folder: Path, gates: str, *, more: str = "") -> Path:
    file = folder / "r.yaml"
    file.write_text(
        "data: {name: digits, batch_size: 128}\n"
        "trainer: {max_epochs: 1}\n"
        "stages:\n"
        "  dense: {module: {name: supervised, network: {name: mlp, hidden: [32]}}}\n"
        "  small: {module: {name: quantize, network: {from: dense}}}\n" + more + f"require: {gates}\n"
    )
    return file


def test_a_chain_is_held_to_its_first_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = "{small.bytes: '<= dense / 2', small.test/accuracy: '>= dense - 0.05'}"
    assert main(["fit", str(chain(tmp_path, kept)), "--fresh"]) == 0
    assert main(["fit", str(chain(tmp_path, "{small.bytes: '<= dense / 100'}"))]) == 3
    assert "<= dense / 100 is required, which is" in capsys.readouterr().err


def test_a_shortened_run_tells_its_gates_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = chain(tmp_path, "{dense.bytes: '< 10', small.bytes: '< 10'}")
    assert main(["fit", str(file), "--smoke"]) == 0
    said = capsys.readouterr().err
    assert said.count("required, and not met") == 2
    run = Run(max(Path("runs").glob("r/*")))
    assert run.status == "finished"
    assert run.results["stages"]["small"]["status"] == "gated"
    assert main(["fit", str(file)]) == 3
    assert "required, and not met: small" not in capsys.readouterr().err


@pytest.mark.parametrize("other", ["small", "none", "beside"])
def test_a_stage_that_it_does_not_come_from_is_no_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    beside = "  beside: {module: {name: supervised, network: {name: mlp, hidden: [8]}}}\n"
    file = chain(tmp_path, f"{{small.bytes: '< {other}'}}", more=beside)
    assert main(["check", str(file)]) == 2
    assert f"r.yaml:7:24: require.small.bytes: '{other}' is no stage that small comes from (there are: dense)" in (
        capsys.readouterr().err
    )
    assert load_recipe(chain(tmp_path, "{small.bytes: '< dense'}"))
