"""What a recipe says of a sweep, and what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from lab.api import load_recipe
from lab.document import Place, RecipeError
from lab.recipe import ONLY_STAGE
from lab.space import Axis

ONE = "data: digits\nmodule: {name: supervised, network: mlp}\n"
TWO = (
    "data: digits\nstages:\n  a: {module: {name: supervised, network: mlp}}\n"
    "  b: {module: {name: supervised, network: {from: a}}}\n"
)
SPACE = "  space: {module.optimizer.lr: {low: 1e-3, high: 1e-1, log: true}}\n"


def sweep_of(text: str, before: str = ONE, tmp: Any = None) -> Any:
    (tmp / "r.yaml").write_text(before + "sweep:\n" + text, encoding="utf-8")
    return load_recipe(tmp / "r.yaml").sweep


def test_a_sweep_is_what_the_recipe_says(tmp_path: Any) -> None:
    found = sweep_of(
        "  minimize: a.val/loss\n  trials: 7\n  seeds: 2\n  sampler: {name: tpe, n_startup_trials: 3}\n"
        "  pruner: median\n  space:\n    data.batch_size: {low: 16, high: 64, step: 16}\n"
        "    stages.a.module.network: [mlp, convnet]\n",
        TWO, tmp_path,
    )  # fmt: skip
    assert (found.stage, found.metric, found.maximize, found.goal) == ("a", "val/loss", False, "a.val/loss")
    assert (found.trials, found.seeds) == (7, 2)
    assert (found.sampler, found.pruner) == (("tpe", {"n_startup_trials": 3}), ("median", {}))
    batch, network = found.axes
    assert (batch.low, batch.high, batch.step, batch.whole, batch.points) == (16, 64, 16, True, [16, 32, 48, 64])
    assert (network.choices, network.override("mlp")) == (("mlp", "convnet"), 'stages.a.module.network="mlp"')


def test_the_last_stage_is_meant_where_none_is_named(tmp_path: Any) -> None:
    assert sweep_of("  maximize: val/accuracy\n" + SPACE, TWO, tmp_path).stage == "b"
    assert sweep_of("  maximize: val/accuracy\n" + SPACE, ONE, tmp_path).stage == ONLY_STAGE


def test_a_grid_has_as_many_trials_as_points_and_each_point_once(tmp_path: Any) -> None:
    text = "  maximize: val/accuracy\n  sampler: grid\n"
    space = "  space: {data.batch_size: {low: 1, high: 3}, trainer.max_epochs: [1, 5]}\n"
    found = sweep_of(text + space, ONE, tmp_path)
    assert found.trials == len({tuple(point.items()) for point in found.grid}) == 6
    assert sweep_of(f"{text}  trials: 4\n{space}", ONE, tmp_path).trials == 4


def test_a_float_axis_counts_its_ends_in() -> None:
    axis = Axis("a", Place("here"), low=0.1, high=0.7, step=0.1)  # (0.7 - 0.1) / 0.1 is less than 6 in floating point
    assert axis.points == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SPACE, "3:1: sweep: say either `maximize: METRIC` or `minimize: METRIC`"),
        ("  maximize: val/a\n  minimize: val/b\n" + SPACE, "3:1: sweep: say either"),
        ("  maximize: c.val/accuracy\n" + SPACE, "4:13: sweep.maximize: no stage named 'c'"),
        ("  maximize: [1]\n" + SPACE, "sweep.maximize: expected a metric such as val/accuracy, got"),
        ("  maximize: val/a\n  trails: 3\n" + SPACE, "5:3: sweep.trails: unknown key (did you mean 'trials'?)"),
        ("  maximize: val/a\n  trials: 0\n" + SPACE, "5:11: sweep.trials: expected a whole number from 1 to 100,000"),
        ("  maximize: val/a\n  sampler: tpi\n" + SPACE, "sweep.sampler: no sampler named 'tpi' (did you mean 'tpe'?)"),
        ("  maximize: val/a\n  sampler: bayes\n" + SPACE, "no sampler named 'bayes': tpe, random, grid"),
        ("  maximize: val/a\n  pruner: x\n" + SPACE, "sweep.pruner: no pruner named 'x': median, percentile"),
        ("  maximize: val/a\n", "3:1: sweep.space: say which keys take which values"),
        ("  maximize: val/a\n  space: {data.batch_size: 3}\n", "expected a list of values, or {low"),
        ("  maximize: val/a\n  space: {data.batch_size: [3]}\n", "two different values at least"),
        ("  maximize: val/a\n  space: {data.batch_size: [3, 3]}\n", "two different values at least"),
        ("  maximize: val/a\n  space: {data.batch_size: {low: 3}}\n", "data.batch_size.high: expected a finite number"),
        ("  maximize: val/a\n  space: {data.batch_size: {low: 3, high: 3}}\n", "low 3 is not below high 3"),
        ("  maximize: val/a\n  space: {data.batch_size: {low: 0, high: 3, log: true}}\n", "log needs low above 0"),
        ("  maximize: val/a\n  space: {data.batch_size: {low: 1, high: 3, log: true, step: 1}}\n", "log or step"),
        ("  maximize: val/a\n  space: {data.batch_size: {low: 1, high: 3, hi: 1}}\n", "batch_size.hi: unknown key"),
        ("  maximize: val/a\n  space: {seed: [1, 2]}\n", "a path into data, module, trainer, callbacks or stages"),
        ("  maximize: val/a\n  sampler: grid\n" + SPACE, "module.optimizer.lr has no step: a grid needs choices"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(text: str, said: str, tmp_path: Any) -> None:
    with pytest.raises(RecipeError) as raised:
        sweep_of(text, ONE, tmp_path)
    assert said in str(raised.value)
    assert "r.yaml:" in str(raised.value)


def test_a_recipe_with_a_sweep_trains_as_it_stands(tmp_path: Any) -> None:
    (tmp_path / "r.yaml").write_text(ONE + "sweep:\n  maximize: val/accuracy\n" + SPACE, encoding="utf-8")
    assert "sweep" not in load_recipe(tmp_path / "r.yaml").resolved()
