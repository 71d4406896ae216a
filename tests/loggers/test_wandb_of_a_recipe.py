"""What a recipe with `logger: wandb` leaves behind: one W&B run a stage, the recipe as config, every metric."""

import csv
from typing import Any

import yaml
from wandb_file import runs_in

from lab import fit

OWN = {"network": {"name": "mlp", "hidden": [8]}, "optimizer": {"name": "adam", "lr": 1e-2}}
RECIPE: dict[str, Any] = {
    "description": "two stages on digits",
    "data": {"name": "digits", "labels": 300},
    "trainer": {"max_epochs": 2, "log_every_n_steps": 7},
    "logger": "wandb",
    "callbacks": {"progress": None, "learning_rate": {"logging_interval": "step"}},
    "stages": {
        "teacher": {"module": {"name": "supervised", **OWN}},
        "student": {"module": {"name": "distill", "teacher": {"from": "teacher"}, **OWN}},
    },
}


def test_the_offline_files_hold_the_recipe_and_every_metric_of_the_csv() -> None:
    run = fit(RECIPE)
    logged = runs_in(run.folder)
    assert [(w.job_type, w.title, w.group) for w in logged] == [
        ("teacher", "recipe/teacher", run.id),
        ("student", "recipe/student", run.id),
    ]
    resolved = yaml.safe_load(run.recipe.read_text())
    for stage, w in zip(("teacher", "student"), logged, strict=True):
        assert w.exit_code == 0
        assert w.config == resolved
        rows = list(csv.DictReader((run.stage(stage) / "metrics.csv").read_text().splitlines()))
        values = {
            (name, float(value))
            for row in rows
            for name, value in row.items()
            if value and name not in ("step", "epoch")
        }
        found = {(name, float(v)) for item in w.history for name, v in item.items() if isinstance(v, int | float)}
        assert len(values) > 20
        assert values <= found
        assert any("scoreboard/path" in item for item in w.history)
