"""What there is: past runs listed, also damaged ones, and bundled recipes copied."""

import json
from pathlib import Path
from typing import Any

import pytest

from lab import document, recipe
from lab.api import load_recipe
from lab.cli import main
from lab.run import Run, create

RECIPE = {"data": "digits", "module": {"name": "supervised", "network": "mlp"}}


def made(**options: Any) -> Run:
    return create(load_recipe(RECIPE), **options)


def test_runs_are_listed_the_newest_first(capsys: pytest.CaptureFixture[str]) -> None:
    older = made()
    older = Run(older.folder.rename(older.folder.with_name("20000101-000000-abcdef")))
    newer = made(group="group-123456")
    newer.record("finished", {"main": {"status": "finished", "metrics": {"test/loss": 1.0, "test/accuracy": 0.97}}})
    assert main(["runs"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["id", "recipe", "group", "seed", "status", "started", "took", "result"]
    assert first.startswith(newer.id)
    assert first.endswith("accuracy: 0.9700")
    assert "group-123456" in first
    assert second.startswith(older.id)
    assert "running" in second


def test_json_has_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    run = made()
    stages = {"a": {"status": "finished", "metrics": {"test/mse": float("nan")}}, "b": {"status": "failed"}}
    run.record("failed", stages)
    assert main(["runs", "recipe", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["group"] is None
    assert row["seconds"] >= 0
    assert row["stages"] == {
        "a": {"status": "finished", "metric": "test/mse", "value": None},
        "b": {"status": "failed"},
    }


@pytest.mark.parametrize("content", ["{", "[]", '{"stages": 3}', '{"stages": {"main": {"metrics": {"test/a": "b"}}}}'])
def test_a_damaged_run_is_listed_as_damaged(content: str, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = made(), made()
    (bad.folder / "results.json").write_text(content)
    assert main(["runs"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "damaged" in lines[bad.id]
    assert "running" in lines[good.id]


def test_no_runs_is_no_error_but_an_unknown_recipe_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 0
    assert "no runs in runs/" in capsys.readouterr().out
    made()
    assert main(["runs", "recipes"]) == 2
    assert "no runs of a recipe 'recipes' in runs/ (did you mean 'recipe'?)" in capsys.readouterr().err


def test_runs_elsewhere_and_of_one_recipe_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    run = made(out=Path("there"))
    assert main(["runs", "some/recipe.yaml", "--out", "there"]) == 0
    assert run.id in capsys.readouterr().out


def test_control_characters_are_shown_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    made().record("finished", {"\x1b[31mred": {"metrics": {"test/a": 1.0}}, "b": {"metrics": {"test/a": 1.0}}})
    assert main(["runs"]) == 0
    assert "\\x1b[31mred" in capsys.readouterr().out


def test_listing_runs_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, lab.cli; lab.cli.main(['runs']); sys.exit('torch' in sys.modules)"
    made()
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_a_bundled_recipe_is_copied_with_its_comments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "distill"]) == 0
    text = Path("distill.yaml").read_text()
    assert text.splitlines()[0] == recipe.bundled()["distill"].read_text().splitlines()[0]
    assert "# lab fit distill.yaml" in text
    assert "lab fit distill.yaml --smoke" in capsys.readouterr().out
    assert document.read(Path("distill.yaml")).plain() == document.read(recipe.bundled()["distill"]).plain()


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("mine")
    assert main(["new", "distill", "mine.yaml"]) == 2
    assert "mine.yaml is there already" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "mine"


def test_what_a_recipe_extends_comes_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "base.yaml").write_text("data: digits\n")
    (tmp_path / "from" / "more.yaml").write_text("extends: [base.yaml, distill]\n")
    monkeypatch.setattr(recipe, "bundled", lambda: {"more": tmp_path / "from" / "more.yaml"})
    (tmp_path / "to").mkdir()
    assert main(["new", "more", "to"]) == 0
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"more.yaml", "base.yaml"}


def test_an_unknown_bundled_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "destill"]) == 2
    assert (
        "no bundled recipe 'destill' (did you mean 'distill' or 'distill_qat' or 'distill_ddp'?)"
        in capsys.readouterr().err
    )


def test_a_place_that_cannot_be_written_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "distill", "missing/mine.yaml"]) == 2
    assert "missing/mine.yaml cannot be written: No such file or directory" in capsys.readouterr().err
