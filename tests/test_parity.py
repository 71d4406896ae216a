"""Every technique ends with the same weights however many processes share its batches; parity.yaml has them all.

All of it, one process in parts too: PYTHONPATH=tests/modules lab verify-parallel tests/parity.yaml --import recorded
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lab import UserError, parity
from lab.api import load_recipe
from lab.cli import main
from lab.document import RecipeError
from lab.modules.supervised import Supervised, Terms
from lab.parity import WIDTHS, compare, difference
from lab.registry import modules
from lab.types import check_types

RECIPE = Path(__file__).parent / "parity.yaml"
HERE = Path(__file__).parent
TANH = {"name": "mlp", "hidden": [8], "activation": "tanh"}
SMALL: dict[str, Any] = {
    "seed": 1, "data": {"name": "digits", "batch_size": 32},
    "module": {"name": "supervised", "network": TANH, "optimizer": {"name": "sgd", "lr": 0.1}},
}  # fmt: skip
DDP, BOTH, FSDP = WIDTHS[1:]
IN_PARTS = {"policy_gradient", "actor_critic", "ppo", "cdan", "mmd", "coral"}
"""Whose batches have no parts."""
SHARDED = {
    "supervised",
    "distill",
    "finetune",
    "probe",
    "lora",
    "replay",
    "naive",
    "joint",
    "dann",
    "cdan",
    "mmd",
    "coral",
}
"""Whose weights may be shared out."""


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:checkpoints. no metric")
def test_every_technique_ends_alike_at_every_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE / "modules"))
    plan = load_recipe(RECIPE, imports=["recorded"])
    own = {entry.name for entry in modules.entries() if entry.package == "lightning-lab"}
    assert {stage.module.name for stage in plan.stages.values()} == own - {"adabn"}
    found = list(compare(RECIPE, folder=tmp_path / "parts", imports=["recorded"], widths=(BOTH, FSDP), steps=6))
    whole = [f"stages.{name}=null" for name in plan.stages if name not in IN_PARTS]
    found += compare(RECIPE, whole, folder=tmp_path / "whole", imports=["recorded"], widths=[DDP], steps=6)
    assert len(found) == 2 * len(plan.stages) + len(IN_PARTS)
    assert [verdict for verdict in found if verdict.differs(1e-9)] == []
    refused = {(verdict.width, verdict.stage) for verdict in found if verdict.refused}
    assert refused == {(BOTH.name, name) for name in IN_PARTS} | {
        (FSDP.name, name) for name in plan.stages.keys() - SHARDED
    }
    assert all(verdict.tensor for verdict in found if not verdict.refused)


@pytest.mark.parametrize(
    ("trainer", "module", "said"),
    [
        ("{gradient_clip_val: 1}", "{name: ppo, network: mlp}", "3:30: trainer.gradient_clip_val: ppo .*max_grad_norm"),
        ("{accumulate_grad_batches: 2}", "{name: mmd, network: mlp}", "3:36: trainer.accumulate_grad_batches: mmd .*"),
        ("{accumulate_grad_batches: 2}", "{name: cdan, network: mlp, entropy_conditioning: true}", "cdan .*whole"),
        ("{accumulate_grad_batches: 2}", "{name: cdan, network: mlp}", None),
        ("{accumulate_grad_batches: 1}", "{name: coral, network: mlp}", None),
        ("{gradient_clip_val: null}", "{name: ppo, network: mlp}", None),
    ],
)  # fmt: skip
def test_settings_that_a_technique_cannot_have_are_refused(
    trainer: str, module: str, said: str | None, tmp_path: Path
) -> None:
    data = "{name: gym, environment: CartPole-v1}" if "ppo" in module else "{name: mnist_digits, size: 8}"
    file = tmp_path / "r.yaml"
    file.write_text(f"data: {data}\nmodule: {module}\ntrainer: {trainer}\n")
    if said is None:
        check_types(load_recipe(file))
        return
    with pytest.raises(RecipeError, match=said):
        check_types(load_recipe(file))


class Summed(Supervised):
    """Forgets that a loss is a mean: parts of a batch give parts of the gradient."""

    def loss(self, batch: Any) -> Terms:
        return Terms(super().loss(batch).loss * len(batch))


class Counted(Supervised):
    """Says how many samples it was tested with, of one process alone."""

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self.log("test/seen", float(self.trainer.num_test_batches[0]))


@pytest.mark.parametrize(("name", "said"), [("Summed", "network."), ("Counted", "test/seen")])
def test_what_forgets_the_other_processes_is_found(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    recipe = {**SMALL, "data": {**SMALL["data"], "eval_batch_size": 100}}
    recipe["module"] = {**SMALL["module"], "name": f"test_parity.{name}"}
    (verdict,) = compare(recipe, folder=tmp_path, imports=["test_parity"], widths=[DDP], epochs=1, steps=2)
    assert verdict.differs(1e-9)
    assert (verdict.tensor if name == "Summed" else verdict.metric).startswith(said)


def test_the_smaller_last_batch_and_unknown_labels_count_as_they_do_together(tmp_path: Path) -> None:
    recipe = {
        **SMALL, "data": {"name": "digits", "batch_size": 96, "labels": 300},
        "stages": {
            "alone": {"seed": 2},
            "taught": {"module": {**SMALL["module"], "name": "distill", "teacher": {"from": "alone"}}},
        },
    }  # fmt: skip
    found = list(compare(recipe, folder=tmp_path, widths=(WIDTHS[0], DDP, BOTH), epochs=1, steps=1000))
    assert len(found) == 6
    assert [verdict for verdict in found if verdict.differs(1e-9)] == []


def test_the_command_shows_a_table_and_what_differs_by_its_nature(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "data: {name: digits, batch_size: 32}\n"
        "module: {name: supervised, network: {name: convnet, width: 2}}\n"
        "callbacks: {ema: {}}\n"
    )
    assert main(["verify-parallel", str(recipe), "--steps", "2", "--epochs", "1"]) == 1
    shown = capsys.readouterr()
    assert "stage  1 in 2 parts" in shown.out
    assert "ema cannot be trained with fsdp: averages are of whole weights; use ddp" in shown.out
    assert "normalises each part by its own statistics" in shown.err
    assert main(["verify-parallel", str(recipe), "--steps", "0"]) == 2


def test_a_training_that_fails_is_told_with_its_width(tmp_path: Path) -> None:
    recipe = {**SMALL, "module": {**SMALL["module"], "optimizer": {"name": "sgd", "lr": 1e308}}}
    with pytest.raises(UserError, match=r"^1: .*the loss is (nan|inf)"):
        list(compare(recipe, folder=tmp_path, widths=[DDP], epochs=1, steps=30))


def test_differences() -> None:
    one = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([torch.nan, 0.0]), "c": torch.zeros(0)}
    assert difference(one, {name: tensor.clone() for name, tensor in one.items()})[0] == 0
    assert difference(one, {**one, "a": torch.tensor([1.0, -4.2])}) == (pytest.approx(0.05), "a")
    assert difference(one, {**one, "b": torch.tensor([0.0, 0.0])}) == (float("inf"), "b")
    assert difference(one, {"a": one["a"], "b": one["b"]}) == (float("inf"), "c")
    assert difference(one, {**one, "b": torch.tensor([torch.nan, 0.5])}) == (0.5, "b")
    assert parity.Verdict("s", "w", 0.0, metric_off=1e-4).differs(1e-9)
