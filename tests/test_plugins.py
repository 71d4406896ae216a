"""Other people's packages: what works, what a broken one spoils, and what it does not."""

import json
import re
from pathlib import Path

import pytest
from plugins.install import AURORA, Told, install, install_aurora, lab, lab_each
from pyarrow import parquet

from lab.cli import main

NETWORK = '''
from torch import nn


class {name}(nn.Linear):
    """{name} of a rival."""

    def __init__(self, num_classes: int):
        super().__init__(64, num_classes)
'''

MIXED = """
data: handwriting
trainer: {max_epochs: 1, accelerator: cpu}
callbacks: {diary: {file: trace.txt}}
stages:
  theirs:
    module: {name: classify, network: {name: mlp, input_shape: [1, 8, 8]}, optimizer: {name: sgd, lr: 0.1}}
  ours:
    module: {name: supervised, network: slim, objective: classification}
  whole:
    module: linear
  after_theirs:
    module: {name: distill, network: wide, teacher: {from: theirs}, objective: classification}
  after_whole:
    module: {name: classify, network: {from: whole}}
"""

SHELF = '''
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn, optim

from lab import registry


class Tiny(nn.Module):
    """One layer."""

    def __init__(self, num_classes: int, name: str = "tiny"):
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.layer(x.flatten(1))


@registry.modules.register("headed")
class Headed(LightningModule):
    """Has weights of its own beside its network, and annotations nowhere."""

    def __init__(self, network, lr=0.1):
        super().__init__()
        self.network = network
        self.head = nn.Linear(10, 10)
        self.lr = lr

    def forward(self, x):
        return self.head(self.network(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test/loss", F.cross_entropy(self(x), y), batch_size=len(x))

    def configure_optimizers(self):
        return optim.SGD(self.parameters(), lr=self.lr)


@registry.modules.register("selfmade")
class Selfmade(Headed):
    """Makes its network itself."""

    def __init__(self, num_classes: int):
        super().__init__(Tiny(num_classes))
'''

OWN = """
data: digits
trainer: {max_epochs: 1, accelerator: cpu, limit_train_batches: 20}
stages:
  headed: {module: {name: headed, network: {name: shelf.Tiny}}}
  selfmade: {module: selfmade}
  after: {module: {name: headed, network: {from: selfmade}}}
  later: {module: {name: headed, network: {from: after, checkpoint: last}}}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that anyone may have installed at once: what works, what is broken, and what is at odds."""
    site = tmp_path_factory.mktemp("site")
    install_aurora(site)
    raising = "raise RuntimeError('no licence')\n\n\nclass Grim:\n    '''G.'''\n"
    install(site, "grim", {"lab.modules": {"grim": "grim:Grim"}}, {"grim.py": raising})
    leaving = "import sys\n\nsys.exit('bye')\n\n\nclass Gone:\n    '''G.'''\n"
    install(site, "leaver", {"lab.modules": {"leaver": "leaver:Gone"}}, {"leaver.py": leaving})
    install(site, "typo", {"lab.modules": {"typo": "typo:Typo"}}, {"typo.py": "class Typo(:\n"})
    install(site, "hollow", {"lab.modules": {"hollow": "hollow.tasks:Task"}})
    install(site, "needy", {"lab.modules": {"needy": "needy:Task"}}, {"needy.py": "import rare_dependency\n"})
    install(site, "liar", {"lab.modules": {"liar": "liar:Liar"}}, {"liar.py": "class Liar:\n    '''L.'''\n"})
    install(site, "odd", {"lab.modules": {"odd": "no target!"}, "lab.bogus": {"mlp": "odd:MLP"}})
    for rival in ("left", "right"):
        install(
            site, rival, {"lab.networks": {"comet": f"{rival}:Comet"}}, {f"{rival}.py": NETWORK.format(name="Comet")}
        )
    install(site, "copycat", {"lab.networks": {"lenet": "copycat:LeNet"}}, {"copycat.py": NETWORK.format(name="LeNet")})
    return site


@pytest.fixture(scope="module")
def listed(site: Path) -> list[dict[str, str]]:
    """What ``lab list`` says with all of them installed."""
    finished = lab("list", "--json", site=site, folder=site)
    assert finished.returncode == 0, finished.stderr
    rows: list[dict[str, str]] = json.loads(finished.stdout)
    return rows


# A package of plain Lightning classes


Used = tuple[Path, dict[str, Told]]


@pytest.fixture(scope="module")
def used(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Used:
    """A working directory with a run of MIXED, and what every command on it gave."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "mixed.yaml").write_text(MIXED)
    tests = [f"test latest/{stage} --json" for stage in ("theirs", "ours", "whole", "after_whole")]
    predictions = [f"predict latest/{stage}" for stage in ("theirs", "ours")]
    told = lab_each("fit mixed.yaml --smoke", *tests, *predictions, site=site, folder=folder)
    assert [each.code for each in told.values()] == [0] * len(told), told
    return folder, told


def results(folder: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads(next(folder.glob("runs/*/*/results.json")).read_text())["stages"]
    return found


def test_the_package_does_not_know_lab() -> None:
    sources = [file.read_text() for file in AURORA.rglob("*.py")]
    assert sources
    assert not [source for source in sources if re.search(r"\blab\b", source)]


def test_list_shows_plugins_with_their_package_and_a_line(listed: list[dict[str, str]]) -> None:
    theirs = {row["name"]: (row["kind"], row["about"]) for row in listed if row["package"] == "aurora"}
    assert theirs == {
        "classify": ("modules", "Trains any network with cross-entropy."),
        "linear": ("modules", "Logistic regression: the module itself is the network."),
        "slim": ("networks", "A thin perceptron for images of 8×8 pixels."),
        "wide": ("networks", "One layer, and a bias to start from."),
        "handwriting": ("datamodules", "1,797 images of handwritten digits, 8×8 pixels."),
        "diary": ("callbacks", "Writes a line for every epoch."),
    }


def test_describe_shows_a_plugins_arguments(site: Path) -> None:
    finished = lab("describe", "classify", "--json", site=site, folder=site)
    [described] = json.loads(finished.stdout)
    assert described["package"] == "aurora"
    arguments = {a["name"]: (a["required"], a["default"], a["component"]) for a in described["arguments"]}
    assert arguments == {
        "network": (True, None, "networks"),
        "lr": (False, "0.01", None),
        "optimizer": (False, "None", "optimizers"),
    }


def test_describe_shows_a_plugins_function(site: Path) -> None:
    finished = lab("describe", "slim", site=site, folder=site)
    assert "slim, a network of aurora (aurora.nets:slim)" in finished.stdout
    assert [line.split() for line in finished.stdout.splitlines() if line.startswith("hidden")] == [
        ["hidden", "int", "16"]
    ]


def test_every_stage_of_a_mixed_recipe_trains(used: Used) -> None:
    stages = results(used[0])
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(
        ("theirs", "ours", "whole", "after_theirs", "after_whole"), "finished"
    )


def test_their_callback_runs_in_every_stage(used: Used) -> None:
    diaries = list(used[0].glob("runs/*/*/*/trace.txt"))
    assert [diary.read_text() for diary in diaries] == ["epoch 0\n"] * 5


def test_the_manifest_has_the_plugins_version(used: Used) -> None:
    manifest = json.loads(next(used[0].glob("runs/*/*/manifest.json")).read_text())
    assert manifest["plugins"] == {"aurora": "1.0"}


@pytest.mark.parametrize("stage", ["theirs", "ours", "whole", "after_whole"])
def test_testing_a_finished_stage_again_measures_its_weights(used: Used, stage: str) -> None:
    metrics = json.loads(used[1][f"test latest/{stage} --json"].output)["metrics"]
    assert 0 <= metrics["test/accuracy"] <= 1


@pytest.mark.parametrize(("stage", "column"), [("theirs", "prediction"), ("ours", "target")])
def test_predictions_are_written_for_every_sample(used: Used, stage: str, column: str) -> None:
    table = parquet.read_table(next(used[0].glob(f"runs/*/*/{stage}/predictions.parquet")))
    assert table.num_rows == 397
    assert column in table.column_names


def test_a_module_without_a_network_is_given_on_whole(used: Used) -> None:
    described = json.loads(next(used[0].glob("runs/*/*/after_whole/network.json")).read_text())
    assert (described["kind"], described["component"]["name"]) == ("modules", "linear")
    assert results(used[0])["after_whole"]["parent"] == "whole"


def test_a_modules_network_is_given_on_alone(used: Used) -> None:
    described = json.loads(next(used[0].glob("runs/*/*/theirs/network.json")).read_text())
    assert (described["kind"], described["component"]["name"]) == ("networks", "mlp")


# Broken packages

WHY_UNREADABLE = {
    "typo": "syntax error in",
    "hollow": "no module named 'hollow.tasks'",
    "odd": "no module named 'no target!'",
}
WHY_UNLOADABLE = {
    "grim": "package grim does not load (grim:Grim): RuntimeError: no licence",
    "leaver": "package leaver does not load (leaver:Gone): SystemExit: bye",
    "typo": "package typo does not load (typo:Typo): SyntaxError: invalid syntax (typo.py, line 1)",
    "hollow": "No module named 'hollow'; files of hollow are missing: install it again",
    "needy": "No module named 'rare_dependency'; pip install rare_dependency",
    "liar": "liar of package liar (liar:Liar) is no lightning.pytorch.LightningModule",
    "odd": "package odd does not load (no target!): ModuleNotFoundError",
}


CHECK_ALL = " ".join(["check", *(f"{name}.yaml" for name in WHY_UNLOADABLE)])


@pytest.fixture(scope="module")
def refused(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Used:
    """What is said of a recipe for each of the broken packages."""
    folder = tmp_path_factory.mktemp("refused")
    for name in WHY_UNLOADABLE:
        (folder / f"{name}.yaml").write_text(f"data: digits\nmodule: {{name: {name}}}\n")
    return folder, lab_each(CHECK_ALL, "fit grim.yaml", site=site, folder=folder)


@pytest.mark.parametrize("name", WHY_UNREADABLE)
def test_list_says_why_an_entry_cannot_be_read(listed: list[dict[str, str]], name: str) -> None:
    [about] = [row["about"] for row in listed if row["name"] == name]
    assert about.startswith(f"cannot be read: {WHY_UNREADABLE[name]}")


@pytest.mark.parametrize("name", WHY_UNLOADABLE)
def test_a_recipe_that_names_a_broken_plugin_is_told_the_package_and_the_cause(refused: Used, name: str) -> None:
    told = refused[1][CHECK_ALL]
    assert told.code == 2
    [line] = [line for line in told.errors.splitlines() if line.startswith(f"{name}.yaml:2:")]
    assert WHY_UNLOADABLE[name] in line


def test_fit_refuses_a_broken_plugin_before_it_makes_a_run(refused: Used) -> None:
    folder, told = refused
    assert told["fit grim.yaml"].code == 2
    assert "package grim does not load (grim:Grim): RuntimeError: no licence" in told["fit grim.yaml"].errors
    assert not (folder / "runs").exists()


# Packages at odds


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("comet", ("left (left:Comet)", "right (right:Comet)")),
        ("lenet", ("lightning-lab (lab.networks.lenet:LeNet)", "copycat (copycat:LeNet)")),
    ],
)
def test_a_recipe_with_a_name_that_two_packages_claim_is_told_both(
    site: Path, tmp_path: Path, name: str, packages: tuple[str, str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(f"data: digits\nmodule: {{name: supervised, network: {name}}}\n")
    finished = lab("fit", "recipe.yaml", site=site, folder=tmp_path)
    assert finished.returncode == 2
    assert f"recipe.yaml:2:37: module.network.name: networks '{name}' is claimed by" in finished.stderr
    assert all(package in finished.stderr for package in packages)


def test_list_shows_both_claims(listed: list[dict[str, str]]) -> None:
    assert [row["package"] for row in listed if row["name"] == "lenet"] == ["copycat", "lightning-lab"]
    assert [row["package"] for row in listed if row["name"] == "comet"] == ["left", "right"]


def test_describe_shows_both_claims(site: Path) -> None:
    finished = lab("describe", "comet", "--json", site=site, folder=site)
    assert [entry["class"] for entry in json.loads(finished.stdout)] == ["left:Comet", "right:Comet"]


# --import


TEST, DESCRIBE = "test latest/headed --import shelf --json", "describe shelf.Tiny --import shelf --json"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Used:
    """A working directory with a module of one's own and a run made with it, and what other processes did with it."""
    folder = tmp_path_factory.mktemp("imported")
    (folder / "shelf.py").write_text(SHELF)
    (folder / "own.yaml").write_text(OWN)
    (folder / "dotted.yaml").write_text("data: digits\nmodule: {name: supervised, network: {name: shelf.Tiny}}\n")
    trained = lab_each("fit own.yaml --import shelf", folder=folder)
    return folder, trained | lab_each(TEST, DESCRIBE, folder=folder)


def test_registered_and_dotted_names_train_with_import(imported: Used) -> None:
    folder, told = imported
    assert told["fit own.yaml --import shelf"].code == 0, told
    assert [stage["status"] for stage in results(folder).values()] == ["finished"] * 4


def test_a_dotted_name_without_import_is_told_the_remedy(imported: Used) -> None:
    finished = lab("check", "dotted.yaml", folder=imported[0])
    assert finished.returncode == 2
    assert "dotted.yaml:2:44" in finished.stderr
    assert "`--import shelf` allows the classes of that package" in finished.stderr


def test_a_runs_test_demands_the_same_import(
    imported: Used, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(imported[0])
    assert main(["test", "latest"]) == 2
    assert "made with --import shelf: repeat it" in capsys.readouterr().err


def test_weights_beside_the_network_are_there_when_a_run_is_tested_again(imported: Used) -> None:
    folder, told = imported
    measured = results(folder)["headed"]["metrics"]
    assert json.loads(told[TEST].output)["metrics"] == pytest.approx(measured, rel=1e-5)


def test_a_module_that_makes_its_own_network_is_given_on_whole(imported: Used) -> None:
    described = json.loads(next(imported[0].glob("runs/*/*/selfmade/network.json")).read_text())
    assert (described["kind"], described["component"]["name"]) == ("modules", "selfmade")


def test_describe_finds_a_dotted_names_kind(imported: Used) -> None:
    [described] = json.loads(imported[1][DESCRIBE].output)
    assert (described["kind"], described["package"], described["class"]) == ("network", "shelf", "shelf:Tiny")


def test_describe_does_not_offer_an_argument_that_a_recipe_cannot_say(imported: Used) -> None:
    [described] = json.loads(imported[1][DESCRIBE].output)
    assert [argument["name"] for argument in described["arguments"]] == ["num_classes"]


def test_describe_without_import_is_told_the_remedy(imported: Used) -> None:
    finished = lab("describe", "shelf.Tiny", folder=imported[0])
    assert finished.returncode == 2
    assert "`--import shelf`" in finished.stderr


def test_a_package_that_does_not_import_is_an_error_of_the_command(site: Path, tmp_path: Path) -> None:
    finished = lab("list", "--import", "grim", site=site, folder=tmp_path)
    assert finished.returncode == 2
    assert finished.stderr == "--import grim: RuntimeError: no licence\n"
