"""A global batch is the same samples however many processes and parts it is trained in."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lab import fit
from lab.api import load_recipe
from lab.batching import settled, shares
from lab.check import check
from lab.document import RecipeError
from lab.recipe import load
from lab.types import check_types

RECIPE: dict[str, Any] = {
    "seed": 1,
    "data": {"name": "digits", "drop_last": True},
    "global_batch_size": 96,
    "trainer": {"max_epochs": 1, "precision": "64-true", "accelerator": "cpu", "log_every_n_steps": 1},
    "callbacks": {"progress": None, "profile": None},
    "logger": "csv",
    "module": {
        "name": "supervised", "network": {"name": "mlp", "hidden": [16], "activation": "tanh"},
        "optimizer": {"name": "adamw", "lr": 0.01},
    },
}  # fmt: skip
STEPS = 14
"""In an epoch of 96 samples each; the last, smaller batch is left out."""
TWO = {"devices": 2, "strategy": "ddp"}


def changed(data: dict[str, Any] | None = None, **trainer: Any) -> dict[str, Any]:
    return {**RECIPE, "data": {**RECIPE["data"], **(data or {})}, "trainer": {**RECIPE["trainer"], **trainer}}


@pytest.mark.parametrize(
    ("total", "count", "most", "accumulated", "expected"),
    [
        (96, 1, None, None, (96, 1)),
        (96, 2, None, None, (48, 1)),
        (96, 2, None, 3, (16, 3)),
        (96, 1, 32, None, (32, 3)),
        (96, 1, 40, None, (32, 3)),
        (96, 4, 64, None, (24, 1)),
        (7, 1, 2, None, (1, 7)),
    ],
)
def test_samples_are_shared_out_in_as_few_parts_as_there_can_be(
    total: int, count: int, most: int | None, accumulated: int | None, expected: tuple[int, int]
) -> None:
    size, times = shares(total, count, most, accumulated)
    assert (size, times) == expected
    assert size * times * count == total


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (changed(**TWO) | {"global_batch_size": 33}, "33 samples cannot be shared out evenly among 2 processes"),
        (
            changed(accumulate_grad_batches=5) | {"global_batch_size": 32},
            "32 samples cannot be shared out evenly among 1 processes, 5 times each",
        ),
        (changed({"batch_size": 8}, accumulate_grad_batches=2), "leave one of the three out"),
        (changed() | {"data": "sinusoid"}, "consumes Labelled batches"),
    ],
)
def test_what_cannot_be_shared_out_is_said_where_it_stands(recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_types(load_recipe(recipe))


def test_data_without_a_batch_size_say_so() -> None:
    recipe = {
        "data": {"name": "gym", "environment": "CartPole-v1"}, "module": {"name": "ppo", "network": "mlp"},
        "global_batch_size": 8,
    }  # fmt: skip
    with pytest.raises(RecipeError, match="global_batch_size: gym has no batch_size that could follow from it"):
        load_recipe(recipe)


def test_a_streams_source_is_what_is_told() -> None:
    data = {"name": "permuted", "source": "digits", "tasks": 2}
    found = load_recipe(changed() | {"data": data, "module": {"name": "naive", "network": "mlp"}})
    source: Any = settled(found.stages["main"]).data.arguments["source"]  # type: ignore[union-attr]
    assert source.arguments["batch_size"].plain() == 96


@pytest.mark.parametrize("said", [96, {"size": 96, "scale_lr": "sqrt", "base_size": 24}])
def test_a_resolved_recipe_means_the_same(said: Any) -> None:
    plan = load_recipe({**RECIPE, "global_batch_size": said})
    resolved = plan.resolved()
    assert resolved["global_batch_size"] == said
    assert resolved["module"]["optimizer"]["lr"] == 0.01
    assert "batch_size" not in resolved["data"]
    again = check(load(resolved, []))
    assert settled(again.stages["main"]).plain() == settled(plan.stages["main"]).plain()


def test_without_data_there_is_nothing_to_share_out() -> None:
    recipe = {key: value for key, value in RECIPE.items() if key != "data"}
    with pytest.raises(RecipeError, match="global_batch_size: there are no data whose batch_size could follow"):
        load_recipe(recipe)


SCALED = {"size": 96, "scale_lr": "linear", "base_size": 32}


def with_module(module: dict[str, Any], batch: Any = 96) -> dict[str, Any]:
    return {**RECIPE, "global_batch_size": batch, "module": {**RECIPE["module"], **module}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("global_batch_size=48", {**SCALED, "size": 48}),
        ("global_batch_size.size=48", {**SCALED, "size": 48}),
        ("global_batch_size.scale_lr=sqrt", {**SCALED, "scale_lr": "sqrt"}),
        ("global_batch_size.scale_lr=null", 96),
        ("global_batch_size={size: 48, base_size: 24}", {**SCALED, "size": 48, "base_size": 24}),
        ("stages.one.global_batch_size=48", {**SCALED, "size": 48}),
        ("stages.one={global_batch_size: 48}", {**SCALED, "size": 48}),
        ("stages={one: {global_batch_size: 48}}", {**SCALED, "size": 48}),
        ("global_batch_size=null", None),
    ],
)
def test_a_number_is_the_size_alone_and_the_rule_stays(override: str, expected: Any) -> None:
    recipe = {**RECIPE, "global_batch_size": SCALED, "stages": {"one": {}}}
    [stage] = check(load(recipe, [override])).stages.values()
    assert (stage.global_batch and stage.global_batch.plain()) == expected


def test_a_rule_is_added_to_a_number(tmp_path: Path) -> None:
    rule = {"scale_lr": "linear", "base_size": 32}
    of_stage = check(load({**RECIPE, "stages": {"one": {"global_batch_size": rule}}})).stages["one"]
    assert of_stage.global_batch is not None
    assert of_stage.global_batch.plain() == SCALED
    (tmp_path / "base.yaml").write_text("global_batch_size: 96\nstages: {one: {global_batch_size: 48}}")
    (tmp_path / "over.yaml").write_text(
        "extends: base.yaml\ndata: digits\nglobal_batch_size: {scale_lr: linear, base_size: 32}\n"
        "module: {name: supervised, network: mlp, optimizer: sgd}"
    )
    extended = check(load(tmp_path / "over.yaml")).stages["one"].global_batch
    assert extended is not None
    assert extended.plain() == {**SCALED, "size": 48}


@pytest.mark.parametrize(
    ("batch", "module", "expected"),
    [
        (SCALED, {}, {}),
        ({**SCALED, "size": 32}, {}, {"optimizer": {"lr": 0.01}}),
        ({"size": 96, "scale_lr": "sqrt", "base_size": 24}, {}, {"optimizer": {"lr": 0.02}}),
        (SCALED, {"optimizer": "nadam"}, {"optimizer": {"lr": 0.002 * 3}}),
        (SCALED, {"scheduler": {"name": "one_cycle", "max_lr": [0.1]}}, {"scheduler": {"max_lr": [0.1 * 3]}}),
        (
            SCALED,
            {"scheduler": {"name": "cosine", "warmup_lr": 0.001, "min_lr": 0.002, "warmup_epochs": 0.5}},
            {"scheduler": {"warmup_lr": 0.001 * 3, "min_lr": 0.002 * 3, "warmup_epochs": 0.5}},
        ),
        (
            SCALED,
            {"scheduler": {"name": "cosine_annealing", "eta_min": 0.001}},
            {"scheduler": {"eta_min": 0.001 * 3}},
        ),
        (SCALED, {"scheduler": {"name": "plateau", "min_lr": 0.001}}, {"scheduler": {"min_lr": 0.001 * 3}}),
        (
            SCALED,
            {"scheduler": {"name": "step", "step_size": 2, "gamma": 0.5}},
            {"scheduler": {"step_size": 2, "gamma": 0.5}},
        ),
    ],
)
def test_rates_follow_the_global_batch_and_nothing_else_does(
    batch: Any, module: dict[str, Any], expected: dict[str, Any]
) -> None:
    plan = load_recipe(with_module(module, batch))
    check_types(plan)
    built = settled(plan.stages["main"]).plain()["module"]
    plain = plan.stages["main"].plain()["module"]
    rates = {"optimizer": {"lr": 0.01 * 3}, **expected}
    for part in ("optimizer", "scheduler"):
        assert built.get(part) == (plain[part] and {**plain[part], **rates.get(part, {})})


SCHEDULE = {"name": "cosine", "warmup_lr": 0.001, "warmup_epochs": 0.5}
DISCRIMINATIVE = {"name": "finetune", "layer_decay": 0.5, "head_lr": 4.0, "scheduler": SCHEDULE}


@pytest.mark.parametrize("technique", [{}, {"scheduler": SCHEDULE}, DISCRIMINATIVE])
def test_weights_are_those_of_the_scaled_rate_written_out(technique: dict[str, Any]) -> None:
    written = {**technique, "optimizer": {"name": "adamw", "lr": 0.01 * 3}}
    if "scheduler" in technique:
        written["scheduler"] = {**SCHEDULE, "warmup_lr": 0.001 * 3}
    runs = [fit(recipe, fresh=True) for recipe in (with_module(technique, SCALED), with_module(written))]
    scaled, expected = (load_file(run.stage("main") / "network.safetensors") for run in runs)
    assert scaled.keys() == expected.keys()
    assert all(torch.equal(scaled[name], weight) for name, weight in expected.items())
    ruled, plain = (run.results["stages"]["main"] for run in runs)
    assert ruled["learning_rate"] == 0.01 * 3
    assert "learning_rate" not in plain


def test_weights_are_those_of_one_process_that_takes_all_at_once() -> None:
    def weights(recipe: dict[str, Any]) -> dict[str, torch.Tensor]:
        run = fit(recipe, fresh=True)
        result = run.results["stages"]["main"]
        assert result["global_batch_size"] == 96
        assert result["devices"] == recipe["trainer"].get("devices", 1)
        assert result["samples_per_second"] > 0
        with (run.stage("main") / "metrics.csv").open(encoding="utf-8") as file:
            steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
        assert len(steps) == STEPS
        return load_file(run.stage("main") / "network.safetensors")

    alone = weights(changed())
    for other in (
        changed(accumulate_grad_batches=2),
        changed({"batch_size": 20}),
        changed(**TWO),
        changed({"batch_size": 24}, **TWO),
    ):
        found = weights(other)
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            apart = (found[name].double() - expected.double()).abs().max() / expected.double().abs().max()
            assert apart <= 1e-9, (other, name, float(apart))
