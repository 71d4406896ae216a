"""What decides a stage's result: what changes its fingerprint, and what doesn't."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from lab import code, fit, registry
from lab.api import load_recipe
from lab.assemble import build
from lab.fingerprint import _content, digest_of_artifact, fingerprint, inputs_of, key, pin
from lab.plan import Plan

MODULE = {"name": "supervised", "network": {"name": "mlp", "hidden": [8]}, "optimizer": {"name": "adam", "lr": 0.01}}
RECIPE = {"data": {"name": "digits"}, "module": MODULE, "trainer": {"max_epochs": 1}}
QUICK = {"trainer": {"max_epochs": 1, "limit_train_batches": 2}, "callbacks": {"progress": None, "profile": None}}
OWN = """
from lab import registry
from lab.networks.mlp import MLP
{more}

@registry.networks.register("{name}")
class Own(MLP):
    "Anyone's."
"""


def parts_of(plan: Plan, stage: str = "main", inputs: dict[str, str] | None = None, smoke: bool = False) -> Any:
    chosen = plan.stages[stage]
    return fingerprint(chosen, build(chosen), inputs or {}, smoke=smoke)


def parts(recipe: Any = RECIPE, *overrides: str, smoke: bool = False) -> dict[str, str]:
    found = parts_of(load_recipe(recipe, overrides), smoke=smoke)
    assert found is not None
    return found


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in one if one[name] != other[name]]


@pytest.fixture
def own_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets a test write modules into its folder, and forgets them."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    yield
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]
    for name in [name for name in registry.networks._registered if name.startswith("own_")]:
        del registry.networks._registered[name]


def own_network(name: str, more: str = "") -> dict[str, Any]:
    Path(f"{name}.py").write_text(OWN.format(name=name, more=more))
    registry.allow(name)
    return {**RECIPE, "module": {**MODULE, "network": {"name": name, "hidden": [8]}}}


def test_the_same_recipe_has_the_same_fingerprint_and_its_key_covers_every_part() -> None:
    one, other = parts(), parts()
    assert one == other
    assert len({key(one), *(key({**one, name: "x"}) for name in one)}) == 1 + len(one)
    assert key({**one, "key": key(one)}) == key(one)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=1", ["recipe"]),
        ("module.optimizer.lr=0.02", ["recipe"]),
        ("module.network.hidden=[9]", ["recipe"]),
        ("trainer.max_epochs=2", ["recipe"]),
        ("callbacks.checkpoints={mode: max, monitor: val/loss}", ["recipe"]),
        ("callbacks.profile=null", ["recipe"]),
        ("data.labels=100", ["recipe", "data"]),
        ("data.split_seed=1", ["recipe", "data"]),
    ],
)
def test_what_decides_the_result_is_in_its_part(override: str, expected: list[str]) -> None:
    assert differing(parts(), parts(RECIPE, override)) == expected


@pytest.mark.parametrize(
    "override",
    [
        "logger=csv",
        "callbacks.progress=null",
        "callbacks.progress={title: other}",
        "require={test/accuracy: '> 0.5'}",
        "module.network={name: mlp, hidden: [8], dropout: 0.0}",
        "description=another",
    ],
)
def test_what_only_watches_and_what_is_the_default_anyway_changes_nothing(override: str) -> None:
    assert parts() == parts(RECIPE, override)


def test_a_smoke_run_is_no_run() -> None:
    assert differing(parts(), parts(smoke=True)) == ["smoke"]


def test_data_count_by_what_they_are_not_by_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = numpy.random.default_rng(0)
    inputs, targets = random.random((60, 1, 8, 8), dtype=numpy.float32), numpy.arange(60) % 3
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        numpy.savez(tmp_path / folder / f"{folder}.npz", inputs=inputs, targets=targets)
    recipe = {**RECIPE, "data": {"name": "arrays", "path": "one/one.npz"}}
    one = parts(recipe)
    monkeypatch.chdir(tmp_path / "other")
    moved = {**RECIPE, "data": {"name": "arrays", "path": "other.npz"}}
    assert parts(moved) == one
    numpy.savez(tmp_path / "other" / "other.npz", inputs=inputs, targets=(targets + 1) % 3)
    assert differing(one, parts(moved)) == ["data"]


@pytest.mark.usefixtures("own_modules")
def test_a_networks_file_counts_by_its_content_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = OWN.format(name="own_file", more="from pathlib import Path")
    Path("own_file.py").write_text(
        source + "\n    def __init__(self, path: Path, num_classes: int, input_shape: tuple[int, ...]) -> None:\n"
        "        super().__init__(num_classes=num_classes, input_shape=input_shape)\n"
    )
    registry.allow("own_file")
    recipe = {**RECIPE, "module": {**MODULE, "network": {"name": "own_file", "path": "words"}}}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "words").write_text("one")
    monkeypatch.chdir(tmp_path / "a")
    one = parts(recipe)
    monkeypatch.chdir(tmp_path / "b")
    assert parts(recipe) == one
    Path("words").write_text("two")
    assert differing(one, parts(recipe)) == ["recipe"]


def test_other_files_count_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_bytes(b"1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "weights").write_bytes(b"1")
    assert _content(tmp_path / "a") == _content(tmp_path / "b")
    (tmp_path / "b" / "weights").write_bytes(b"2")
    assert _content(tmp_path / "a") != _content(tmp_path / "b")


def test_what_a_stage_is_called_changes_nothing_and_what_its_parent_gave_does() -> None:
    def student(teacher: str, name: str, digest: str) -> Any:
        distill = {"name": "distill", "network": {"name": "mlp", "hidden": [8]}, "teacher": {"from": teacher}}
        recipe = {**RECIPE, **QUICK, "stages": {teacher: {}, name: {"module": distill}}}
        stage = load_recipe(recipe).stages[name]
        return fingerprint(stage, build(stage, fit(recipe)), {teacher: digest}, smoke=False)

    before = student("teacher", "student", "a")
    assert before == student("t", "s", "a")
    assert differing(before, student("t", "s", "b")) == ["inputs"]


def test_inputs_are_the_digests_of_the_networks_that_are_taken() -> None:
    run = fit({**RECIPE, **QUICK})
    module = {"name": "distill", "network": "mlp", "teacher": {"from": f"{run.folder}/main"}}
    last = {**module, "teacher": {"from": f"{run.folder}/main", "checkpoint": "last"}}
    plan = load_recipe({**RECIPE, "stages": {"best": {"module": module}, "last": {"module": last}, "alone": {}}})
    best, other, none = (
        inputs_of(plan.stages[name], lambda _: run.stage("main")) for name in ("best", "last", "alone")
    )
    assert best == {f"{run.folder}/main": digest_of_artifact(run.stage("main"))}
    assert list(other.values()) != list(best.values())
    assert none == {}


def test_a_networks_digest_is_of_what_it_is_and_of_its_weights() -> None:
    run = fit({**RECIPE, **QUICK})
    folder = run.stage("main")
    digests = {digest_of_artifact(folder)}
    for name in ("network.json", "network.safetensors"):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        digests.add(digest_of_artifact(folder))
    assert len(digests) == 3
    (folder / "network.json").unlink()
    with pytest.raises(FileNotFoundError):
        digest_of_artifact(folder)


def test_data_that_cannot_be_fingerprinted_are_never_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from lab.datamodules.labelled import LabelledData

    monkeypatch.setattr(LabelledData, "fingerprint", None)
    assert parts_of(load_recipe(RECIPE)) is None


@pytest.mark.usefixtures("own_modules")
def test_code_is_the_source_of_every_file_that_is_no_release() -> None:
    recipe = (
        own_network("own_net", "import own_helper as helper") if Path("own_helper.py").write_text("a = 1\n") else {}
    )
    before = parts(recipe)
    assert {part.partition("=")[0] for part in before["code"].split()} == {"lab", "own_helper", "own_net"}
    for file in ("own_net.py", "own_helper.py"):
        Path(file).write_text(Path(file).read_text() + "b = 2\n")
        assert parts(recipe) == before
        pin(load_recipe(recipe))
        after = parts(recipe)
        assert differing(before, after) == ["code"]
        before = after


@pytest.mark.usefixtures("own_modules")
def test_the_code_of_an_installed_package_is_its_version() -> None:
    recipe = {**RECIPE, "data": {**RECIPE["data"], "transforms": [{"name": "autoaugment"}]}}
    import torchvision

    assert f"torchvision={torchvision.__version__.partition('+')[0]}" in parts(recipe)["code"]
    assert "torch" not in {part.partition("=")[0] for part in parts()["code"].split()}


@pytest.mark.usefixtures("own_modules")
def test_a_package_that_was_installed_from_a_folder_is_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path("site-packages").resolve()
    (place / "own_installed").mkdir(parents=True)
    (place / "own_installed" / "__init__.py").write_text("class Own: ...\n")
    info = place / "own_installed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own_installed\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(place))
    own = importlib.import_module("own_installed").Own
    code.forget()
    assert "own_installed=1.0" in str(code.of([own])).split()
    (info / "direct_url.json").write_text('{"url": "file:///there", "dir_info": {}}')
    code.forget()
    assert re.search("own_installed=[0-9a-f]{16}", str(code.of([own])))


def test_a_class_without_source_is_never_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import ModuleType

    class Typed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(1))

    monkeypatch.setitem(sys.modules, "typed_in", ModuleType("typed_in"))
    Typed.__module__ = "typed_in"
    registry.networks.register("own_typed")(Typed)
    try:
        assert parts_of(load_recipe({**RECIPE, "module": {**MODULE, "network": "own_typed"}})) is None
    finally:
        del registry.networks._registered["own_typed"]


def test_how_precisely_matrices_are_multiplied_counts_but_not_the_number_of_threads() -> None:
    before, precision, threads = parts(), torch.get_float32_matmul_precision(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert parts() == before
        torch.set_float32_matmul_precision("medium" if precision != "medium" else "high")
        assert differing(before, parts()) == ["device"]
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
