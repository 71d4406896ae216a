"""Runs side by side: what is found, what is aggregated, what is tested, and how it is shown."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

from lab import report
from lab.cli import main
from lab.compare import Comparison, compare
from lab.document import dump
from lab.errors import UserError
from lab.files import write_json, write_text
from lab.groups import Pick, find
from lab.page import page
from lab.run import Run, RunNotFound

TEACHER = [0.97, 0.96, 0.98]
STUDENT = [0.91, 0.93, 0.95]


def made(
    stages: dict[str, dict[str, Any]], *, seed: int = 0, recipe: str = "r", group: str | None = None, lr: float = 0.1,
    fold: int | None = None, **manifest: Any,
) -> Run:  # fmt: skip
    """A run's folder as ``lab fit`` leaves it."""
    number = len(list(Path("runs").glob("*/*/manifest.json")))
    folder = Path("runs") / recipe / f"20260101-000000-{number:06x}"
    folder.mkdir(parents=True)
    run = Run(folder)
    data = {"name": "digits", **({} if fold is None else {"folds": 3, "fold": fold})}
    said = {"seed": seed, "data": data, "trainer": {"max_epochs": 2}}
    modules = {name: {"module": {"name": "supervised", "lr": lr}} for name in stages}
    whole = list(stages) == ["main"]
    write_text(run.recipe, dump({**said, **(modules["main"] if whole else {"stages": modules})}))
    facts = {
        "run": run.id,
        "recipe": recipe,
        "group": group or run.id,
        "seed": seed,
        "started": "2026-01-01T00:00:00+0000",
    }
    write_json(folder / "manifest.json", {**facts, **manifest})
    results = {name: {"status": "finished", "parameters": 10, **stage} for name, stage in stages.items()}
    status = {"run": run.id, "status": "finished", "ended": "2026-01-01T00:01:05+0000"}
    write_json(folder / "results.json", {**status, "stages": results})
    for name in stages:
        run.stage(name).mkdir()
        lines = [f"{step},{1 / step},{seed / 10 + 2 / step},{1 - 1 / step}" for step in (1, 2, 3)]
        write_text(run.stage(name) / "metrics.csv", "\n".join(["step,train/loss,val/loss,val/accuracy", *lines, ""]))
    return run


def accuracy(value: float) -> dict[str, Any]:
    return {"metrics": {"test/accuracy": value}}


def seeds(values: list[float], **options: Any) -> list[Run]:
    return [made({"main": accuracy(value)}, seed=seed, **options) for seed, value in enumerate(values)]


def pair_of_stages(group: str = "group-abcdef") -> list[Run]:
    both = zip(TEACHER, STUDENT, strict=True)
    return [
        made({"teacher": accuracy(a), "student": accuracy(b)}, seed=seed, group=group)
        for seed, (a, b) in enumerate(both)
    ]


def compared(*runs: Run, **options: Any) -> Comparison:
    return compare([Pick(run) for run in runs], **options)


def shown(found: Comparison) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        for part in report.comparison(found):
            console.print(part)
    return console.export_text()


def test_seeds_become_one_row_with_students_interval() -> None:
    (row,) = compared(*seeds(STUDENT)).rows
    estimate = row.estimate("test/accuracy")
    assert estimate is not None
    assert estimate.interval == pytest.approx(stats.t.interval(0.95, 2, loc=0.93, scale=stats.sem(STUDENT)))
    assert row.figures["parameters"] == 10


def test_stages_of_a_group_are_tested_seed_by_seed() -> None:
    (difference,) = compared(*pair_of_stages()).differences
    reference = stats.ttest_rel(STUDENT, TEACHER)
    assert (difference.row.name, difference.baseline.name) == ("student", "teacher")
    assert difference.test.kind == "paired t"
    assert difference.p == pytest.approx(reference.pvalue)


def test_several_comparisons_are_corrected_by_holm() -> None:
    runs = [
        made({"a": accuracy(x), "b": accuracy(y), "c": accuracy(z)}, seed=seed, group="g")
        for seed, (x, y, z) in enumerate([(0.9, 0.8, 0.85), (0.91, 0.82, 0.9), (0.92, 0.81, 0.86)])
    ]
    b, c = compared(*runs).differences
    assert b.p == pytest.approx(2 * b.test.p)
    assert c.p == pytest.approx(max(c.test.p, b.p))
    assert len(compared(*runs, every_pair=True).differences) == 3


def test_a_stage_is_compared_with_the_first_groups_stage_of_its_name() -> None:
    here, there = pair_of_stages("one"), [
        made({"teacher": accuracy(0.9), "student": accuracy(0.8)}, seed=7, group="two", lr=0.2)
    ]  # fmt: skip
    found = compared(*here, *there)
    pairs = [(d.row.name, d.baseline.name) for d in found.differences]
    assert pairs == [("r two/teacher", "r one/teacher"), ("r two/student", "r one/student")]


def test_recipes_that_differ_in_more_than_the_seed_are_two_groups_with_the_difference() -> None:
    found = compared(*seeds(STUDENT), *seeds(TEACHER, recipe="other", lr=0.5))
    assert [row.name for row in found.rows] == ["r", "other"]
    assert (found.columns, found.recipe) == (["r", "other"], {"module.lr": [0.1, 0.5]})


def test_what_every_stage_shares_is_said_once_in_the_recipes_difference() -> None:
    stages = {"a": accuracy(0.5), "b": accuracy(0.5)}
    found = compared(made(stages), made(stages, recipe="other", lr=0.5))
    assert found.recipe == {"module.lr": [0.1, 0.5]}


def test_the_same_recipe_and_seed_again_is_no_second_sample() -> None:
    found = compared(*seeds([0.9]), *seeds([0.95]))
    assert [len(row.members) for row in found.rows] == [1, 1]
    assert len({row.name for row in found.rows}) == 2


def test_a_run_named_twice_counts_once() -> None:
    runs = seeds(STUDENT)
    assert len(compared(*runs, *runs).rows[0].members) == 3


def test_folds_pair_with_folds_and_the_dependence_is_said() -> None:
    runs = [made({"a": accuracy(0.9 + f / 100), "b": accuracy(0.8 - f / 90)}, fold=f, group="g") for f in range(3)]
    found = compared(*runs)
    assert found.differences[0].test.kind == "paired t"
    assert found.differences[0].test.difference.n == 3
    assert any("folds share training data" in note for note in found.notes)


def test_one_run_has_neither_interval_nor_test() -> None:
    found = compared(*pair_of_stages()[:1])
    text = shown(found)
    assert "0.9700" in text
    assert "-0.0600" in text
    assert not re.search(r"±|nan|paired|\bp\b", text)


def test_a_nan_is_left_out_and_said() -> None:
    found = compared(*seeds([0.9, float("nan"), 0.8]))
    assert "main: test/accuracy is no finite number in 1 of 3 runs" in found.notes
    assert found.rows[0].estimate("test/accuracy").n == 2
    json.dumps(found.as_dict(), allow_nan=False)


def test_only_nan_is_shown_as_nothing() -> None:
    found = compared(*seeds([float("nan"), float("nan")]))
    assert "–" in shown(found)
    assert found.as_dict()["rows"][0]["metrics"] == {}
    assert "<svg" in page(found)


def test_unfinished_stages_are_left_out_and_said() -> None:
    runs = seeds([0.9, 0.8])
    write_json(runs[1].folder / "results.json", {"status": "failed", "stages": {"main": {"status": "failed"}}})
    found = compared(*runs)
    assert len(found.rows[0].members) == 1
    assert "main: not finished in 1 of 2 runs" in found.notes


def test_runs_in_which_nothing_finished_are_an_error() -> None:
    run = made({"main": {}})
    write_json(run.folder / "results.json", {"status": "failed", "stages": {}})
    with pytest.raises(UserError, match=f"no stage has finished in {run.id}"):
        compared(run)


def test_what_differs_besides_the_recipe_is_a_table_of_code_environment_and_data() -> None:
    def fingerprinted(code: str) -> dict[str, Any]:
        return {**accuracy(0.9), "fingerprint": {"code": code, "recipe": "r"}}

    one = made(
        {"main": fingerprinted("lab=1")}, versions={"torch": "2.1", "numpy": "2"}, git={"commit": "a" * 40},
        data={"main": "x" * 64}, plugins={"plug": "1"}, hardware={"cpus": 2, "gpus": [], "platform": "Linux"},
    )  # fmt: skip
    other = made(
        {"main": fingerprinted("lab=2")}, seed=1, versions={"torch": "2.2", "numpy": "2"}, git=None,
        data={"main": "y" * 64}, plugins={"plug": "2"}, hardware={"cpus": 2, "gpus": ["H200"], "platform": "Darwin"},
    )  # fmt: skip
    dirty = made(
        {"main": accuracy(0.9)},
        recipe="other",
        lr=0.5,
        git={"commit": "a" * 40, "dirty": True, "diff_sha256": "f" * 64},
        data={"main": "x" * 64},
    )
    found = compared(dirty, one, other)
    assert list(found.provenance.items()) == [
        ("git commit", [["aaaaaaa+ffffff"], ["aaaaaaa", "none"]]),
        ("code of lab", [[], ["1", "2"]]),
        ("torch", [[], ["2.1", "2.2"]]),
        ("plugin plug", [[], ["1", "2"]]),
        ("gpus", [[], ["[]", '["H200"]']]),
        ("data of main", [["x" * 12], ["x" * 12, "y" * 12]]),
    ]
    assert found.as_dict()["provenance"]["torch"] == {"other": [], "r": ["2.1", "2.2"]}
    text = shown(found)
    assert re.search(r"besides the recipe +other +r", text)
    assert re.search(r"git commit +aaaaaaa\+ffffff +aaaaaaa, none", text)
    assert re.search(r"torch +– +2\.1, 2\.2", text)


def test_runs_that_were_made_alike_have_nothing_besides() -> None:
    alike = {"versions": {"torch": "2.1"}, "git": {"commit": "a" * 40}, "data": {"main": "x" * 64}}
    found = compared(made({"main": accuracy(0.9)}, **alike), made({"main": accuracy(0.8)}, seed=1, **alike))
    assert found.provenance == {}
    assert "besides" not in shown(found)


def test_code_is_told_package_by_package() -> None:
    def stages(plug: str) -> dict[str, Any]:
        codes = {"a": "lab=1", "b": f"lab=1 plug={plug}"}
        return {name: {**accuracy(0.9), "fingerprint": {"code": code}} for name, code in codes.items()}

    assert compared(made(stages("1")), made(stages("2"), seed=1)).provenance == {"code of plug": [["1", "2"]]}


def test_metrics_are_chosen_by_their_short_name_too() -> None:
    run = made({"main": {"metrics": {"test/accuracy": 0.9, "test/loss": 1.0, "val/loss": 2.0}}})
    assert compared(run, metrics=["loss", "val/loss"]).metrics == ["test/loss", "val/loss"]
    with pytest.raises(UserError, match=r"no stage has a metric 'accuracu' \(did you mean 'test/accuracy'"):
        compared(run, metrics=["accuracu"])


def test_the_baseline_is_a_row_or_a_run() -> None:
    runs = pair_of_stages()
    assert compared(*runs, baseline="student").differences[0].baseline.name == "student"
    assert compared(*runs, baseline=f"{runs[0].id}/student").differences[0].baseline.name == "student"
    with pytest.raises(UserError, match=r"the baseline 'studnet' is no row .*did you mean 'student'"):
        compared(*runs, baseline="studnet")
    with pytest.raises(UserError, match="several rows"):
        compared(*runs, baseline=runs[0].id)


def test_runs_are_found_by_group_folder_and_recipe() -> None:
    runs = pair_of_stages()
    made({"main": accuracy(0.5)}, recipe="other")
    for reference in ("group-abcdef", "runs/r", "r", "runs/r/group-abcdef"):
        assert [pick.run.id for pick in find(reference)] == [run.id for run in runs]
    assert find(f"{runs[0].id}/student") == [Pick(runs[0], "student")]


def test_an_unknown_reference_names_the_nearest() -> None:
    pair_of_stages()
    with pytest.raises(RunNotFound, match=r"group-abcdeg is no run, group or recipe .*did you mean 'group-abcdef'"):
        find("group-abcdeg")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"stages": []}', '{"stages": {"main": 1}}', '{"stages": {"main": {"metrics": 5}}}']
)
def test_damaged_results_are_an_error_that_names_the_file(content: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = made({"main": accuracy(0.9)})
    (run.folder / "results.json").write_text(content)
    assert main(["compare", run.id]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert run.id in error


def test_names_are_shown_not_obeyed() -> None:
    evil = "test/<script>alert(1)</script>[red]$x_1$"
    run = made({"main": {"metrics": {evil: 0.5}}}, recipe="a&b [bold]", command=["lab", '"><img src=x>'])
    more = made({"main": {"metrics": {evil: 0.6}}}, recipe="a&b [bold]", seed=1)
    found = compared(run, more)
    assert "<script>alert(1)</script>[red]$x_1$" in shown(found)
    text = page(found)
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "&lt;script&gt;" in text
    assert well_formed(text)


def test_the_page_of_a_comparison_needs_nothing_else() -> None:
    runs = pair_of_stages()
    folder = runs[0].stage("student") / "pictures"
    folder.mkdir()
    (folder / "confusion.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    text = page(compared(*runs))
    assert well_formed(text)
    assert "data:image/png;base64,iVBORw0KGgo=" in text
    assert "0.9300 ± 0.0497" in text
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert not re.search(r"url\((?!#)", text)


def test_the_command_writes_json_png_and_html(capsys: pytest.CaptureFixture[str]) -> None:
    pair_of_stages()
    assert main(["compare", "group-abcdef", "--json", "--png", "a.png", "--html", "a.html"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][1]["metrics"]["test/accuracy"]["values"] == STUDENT
    assert found["differences"][0]["test"] == "paired t"
    assert Path("a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert well_formed(Path("a.html").read_text())


def test_a_picture_that_cannot_be_written_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    made({"main": accuracy(0.9)})
    assert main(["compare", "r", "--png", "missing/a.png"]) == 2
    assert "missing/a.png cannot be written: No such file or directory" in capsys.readouterr().err


class _Nesting(HTMLParser):
    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def well_formed(text: str) -> bool:
    parser = _Nesting()
    parser.feed(text)
    parser.close()
    return not parser.open and not parser.wrong
