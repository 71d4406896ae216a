"""Nothing in a recipe, a run's folder or a file of data is run, and what names say to terminals and pages is shown."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from lab import registry
from lab.api import fit
from lab.cli import main
from lab.modules.supervised import Supervised

CANARY = "canary"
RECIPE = """\
data: {name: digits, batch_size: 64}
logger: csv
callbacks: {progress: null, profile: null}
stages:
  first:
    module: {name: beside, network: {name: mlp, hidden: [4]}}
  second:
    module: {name: supervised, network: {from: first}}
"""

Commanded = Callable[..., str]


class Payload:
    """A pickle of it touches the canary when it is loaded."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {Path(CANARY).absolute()}",)


def touching(name: str = CANARY) -> str:
    """Python that touches the canary."""
    return f"import pathlib; pathlib.Path({str(Path(name).absolute())!r}).touch()\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose first stage has a tensor beside its network."""

    @registry.modules.register("beside")
    class Beside(Supervised):
        def __init__(self, **supervised: Any) -> None:
            super().__init__(**supervised)
            self.beside = torch.nn.Parameter(torch.zeros(1))

    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    yield fit(folder / "recipe.yaml", out=folder / "runs", smoke=True).folder
    del registry.modules._registered["beside"]


@pytest.fixture
def run(finished: Path) -> Path:
    """A copy of it, as from elsewhere."""
    return Path(shutil.copytree(finished, Path("runs", "recipe", finished.name)))


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Commanded:
    """Run a command that must refuse; what it says, in one line, and nothing that a terminal would obey."""

    def command(*arguments: str) -> str:
        assert main(list(arguments)) in (1, 2)
        _, err = capfd.readouterr()
        assert not Path(CANARY).exists()
        assert "Traceback" not in err
        line, *more = err.splitlines()
        ended = line.startswith(("lab fit: stage main: ", "lab test: ValueError: "))
        hint = re.compile(r"--debug shows where(; `lab resume [\w/.-]+` goes on)?")
        assert [said for said in more if not (ended and hint.fullmatch(said))] == []
        assert len(more) <= 1
        assert "\x1b" not in line
        return line

    return command


def changed(file: Path, change: Callable[[Any], Any]) -> None:
    """Change what a JSON file says."""
    said = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(change(said) or said), encoding="utf-8")


def test_a_run_that_was_copied_is_tested(run: Path) -> None:
    assert main(["test", str(run / "first")]) == 0
    assert main(["predict", str(run / "second")]) == 0


class TestCheckpoints:
    """Pickles, which can say to run anything."""

    CONTINUED = "data: digits\nmodule: {{name: supervised, network: {{from: {run}/first, checkpoint: last}}}}\n"

    def continued(self, run: Path) -> str:
        Path("more.yaml").write_text(self.CONTINUED.format(run=run), encoding="utf-8")
        return "more.yaml"

    @pytest.mark.parametrize("whole", [True, False])
    def test_that_a_network_is_taken_from_are_not_run(self, run: Path, whole: bool, refused: Commanded) -> None:
        file = run / "first" / "checkpoints" / "last.ckpt"
        saved = torch.load(file, weights_only=True)
        torch.save(Payload() if whole else {**saved, "more": Payload()}, file)
        line = refused("fit", self.continued(run), "--smoke")
        assert "last.ckpt is damaged, or holds more than tensors and plain values: nothing in it is run" in line
        assert "weights_only" not in line  # nobody is told to switch the protection off

    def test_that_hold_what_stands_beside_a_network_are_not_run(self, run: Path, refused: Commanded) -> None:
        torch.save({"state_dict": Payload()}, run / "first" / "checkpoints" / "best.ckpt")
        assert "best.ckpt is damaged, or holds more" in refused("test", str(run / "first"))

    def test_that_hold_other_things_than_tensors_are_refused(self, run: Path, refused: Commanded) -> None:
        for saved in (3, {}, {"state_dict": 3}, {"state_dict": {"beside": "x"}}):
            torch.save(saved, run / "first" / "checkpoints" / "best.ckpt")
            assert "is no checkpoint: it has no state_dict of tensors" in refused("test", str(run / "first"))

    @pytest.mark.parametrize(
        "content", [b"", b"PK\x03\x04", b"\x80\x02.", b"\x80\x04\x95", b"]q\x00(" * 50, bytes(256)]
    )
    def test_that_are_damaged_say_so(self, content: bytes, run: Path, refused: Commanded) -> None:
        (run / "first" / "checkpoints" / "last.ckpt").write_bytes(content)
        assert "last.ckpt " in refused("fit", self.continued(run), "--smoke")

    @pytest.mark.parametrize("said", ["../../../evil.ckpt", "{here}/evil.ckpt", "first/../../../../evil.ckpt", "a\0b"])
    def test_elsewhere_than_in_the_run_are_not_read(self, said: str, run: Path, refused: Commanded) -> None:
        shutil.copy(run / "first" / "checkpoints" / "best.ckpt", "evil.ckpt")

        def elsewhere(results: Any) -> None:
            results["stages"]["first"]["checkpoint"] = said.format(here=Path.cwd())

        changed(run / "results.json", elsewhere)
        assert "leads out of" in refused("test", str(run / "first"))

    def test_of_a_program_that_gives_no_name_are_refused(self, run: Path, refused: Commanded) -> None:
        for said in (3, ["x"], {"a": "b"}):
            changed(run / "results.json", lambda results, said=said: results["stages"]["first"].update(checkpoint=said))
            assert "results.json is damaged" in refused("test", str(run / "first"))
        changed(run / "results.json", lambda results: results["stages"]["first"].pop("checkpoint"))
        assert "results.json is damaged" in refused("test", str(run / "first"))


MLP = {"name": "mlp", "num_classes": 10, "input_shape": [1, 8, 8]}


class TestNetworks:
    """``network.safetensors`` and ``network.json``."""

    @pytest.mark.parametrize("kind", ["pickle", "torch"])
    def test_whose_weights_are_a_pickle_are_refused(self, kind: str, run: Path, refused: Commanded) -> None:
        file = run / "second" / "network.safetensors"
        file.write_bytes(pickle.dumps(Payload())) if kind == "pickle" else torch.save(Payload(), file)
        assert "network.safetensors cannot be read" in refused("test", str(run))

    @pytest.mark.parametrize(
        ("component", "said"),
        [
            ({"name": "os.system"}, "`--import os` allows"),
            ({"name": "torch.nn.Linear", "in_features": 1, "out_features": 1}, "is a dotted name"),
            ({"class_path": "os.system", "init_args": {"command": "touch canary"}}, "without `name:`"),
            ({"name": "subprocess:run"}, "no network named"),
            ({"name": "cosine"}, "it is a scheduler"),
            ({"name": "wandb"}, "it is a logger"),
            ({"name": ["mlp"]}, "a name that is a list"),
            ({**MLP, "hidden": [{"name": "wandb"}]}, "wandb is no int"),
            ({**MLP, "hidden": [2**62]}, "mlp: "),
            ({**MLP, "hidden": [2**80]}, "a whole number of more than 64 bits"),
            ({**MLP, "hidden": 1e308}, "hidden: should be a list, got 1e+308"),
            ({**MLP, "evil": 1}, "mlp has no argument 'evil'"),
            ({**MLP, "hidden": {"from": "../second"}}, "takes none by `from:`"),
            ({"name": "transformers", "path": "a/b", "num_classes": 10, "vocab_size": 9}, "takes none by `path:`"),
            ({"name": "transformers", "folder": "..", "num_classes": 10, "vocab_size": 9}, "takes none by `folder:`"),
            ({"name": "timm", "model": "resnet18", "pretrained": True, "num_classes": 2, "in_channels": 1},
             "takes none by `pretrained:`"),
            ({"name": "timm", "model": "resnet18", "weights": "/etc/x.pth", "num_classes": 2, "in_channels": 1},
             "takes none by `weights:`"),
            ({"name": "timm", "model": "hf-hub:evil/model", "num_classes": 10, "in_channels": 1}, "no timm model"),
        ],
    )  # fmt: skip
    def test_that_name_anything_but_a_whole_registered_network_are_refused(
        self, component: Any, said: str, run: Path, refused: Commanded
    ) -> None:
        for stage in ("first", "second"):
            changed(run / stage / "network.json", lambda found: {**found, "component": component})
        assert said in refused("test", str(run / "first"))
        Path("more.yaml").write_text(
            f"data: digits\nmodule: {{name: supervised, network: {{from: {run}/second}}}}\n", encoding="utf-8"
        )
        assert said in refused("fit", "more.yaml", "--smoke")

    @pytest.mark.parametrize(
        "text",
        [
            "[" * 100_000, '{"component":' * 100_000, "", "null", "3", "\0", "{}", '{"kind": "networks"}',
            '{"kind": "loggers", "component": {"name": "wandb"}, "facts": {}}',
            '{"kind": "networks", "component": {"name": "mlp", "hidden": ' + "9" * 5000 + '}, "facts": {}}',
            '{"kind": ["networks"], "component": {}, "facts": {}}',
            '{"kind": "networks", "facts": {}, "component": ' + '{"name": ' * 200 + "1" + "}" * 201,
        ],
    )  # fmt: skip
    def test_whose_description_is_damaged_say_so(self, text: str, run: Path, refused: Commanded) -> None:
        (run / "first" / "network.json").write_text(text, encoding="utf-8")
        assert "network.json" in refused("test", str(run / "first"))


class TestFilesOfARun:
    """Whatever lies where a run's files should."""

    FILES = ("recipe.yaml", "manifest.json", "results.json", "second/network.json", "second/network.safetensors")

    @pytest.mark.parametrize("file", [*FILES, "first/checkpoints/best.ckpt"])
    @pytest.mark.parametrize("instead", ["nothing", "half", "noise", "folder", "link"])
    def test_that_is_damaged_is_named(self, file: str, instead: str, run: Path, refused: Commanded) -> None:
        path = run / file
        content = path.read_bytes()
        path.unlink()
        if instead == "folder":
            path.mkdir()
        elif instead == "link":
            path.symlink_to(path)
        else:
            path.write_bytes(
                {"nothing": b"", "half": content[: len(content) // 3], "noise": bytes(range(256))}[instead]
            )
        line = refused("test", str(run if file.startswith("second") else run / "first"))
        assert path.name in line or "is no run" in line

    @pytest.mark.parametrize(
        "file", ["second/network.json", "second/network.safetensors", "first/checkpoints/best.ckpt"]
    )
    def test_that_is_a_link_out_of_it_is_not_followed(self, file: str, run: Path, refused: Commanded) -> None:
        Path("elsewhere").mkdir()
        outside = Path("elsewhere", Path(file).name).absolute()
        (run / file).rename(outside)
        (run / file).symlink_to(outside)
        stage = file.partition("/")[0]
        assert f"{Path(file).name} leads out of" in refused("test", str(run / stage))
        shutil.move(str(run / stage), "elsewhere")
        (run / stage).symlink_to(Path("elsewhere", stage).absolute())
        assert "leads out of" in refused("test", f"{run.name}/{stage}")

    @pytest.mark.timeout(60)
    @pytest.mark.parametrize("file", ["network.json", "network.safetensors", "checkpoints/best.ckpt"])
    def test_that_would_be_waited_for_is_not(self, file: str, run: Path, refused: Commanded) -> None:
        (run / "first" / file).unlink()
        os.mkfifo(run / "first" / file)
        assert Path(file).name in refused("test", str(run / "first"))

    def test_says_what_to_import_and_is_not_obeyed(self, run: Path, refused: Commanded) -> None:
        Path("evil.py").write_text(touching(), encoding="utf-8")
        changed(run / "manifest.json", lambda manifest: manifest.update(imports=["evil"]))
        assert "this run was made with --import evil: repeat it" in refused("test", str(run))
        assert "evil" not in sys.modules


class TestRecipes:
    @pytest.mark.parametrize(
        "text",
        [
            "data: !!python/object/apply:os.system ['touch canary']",
            "data: !!python/object/new:os.system ['touch canary']",
            "!!python/name:os.system : 1",
            "!<tag:yaml.org,2002:python/module:evil> x",
            "module: {class_path: os.system, init_args: {command: touch canary}}",
            "module: {name: os.system, command: touch canary}",
            "trainer: {callbacks: [{class_path: os.system, init_args: {command: touch canary}}]}\nmodule: supervised",
            "logger: {name: mlflow, class_path: os.system}\nmodule: supervised",
            "callbacks: {x: {name: os.system}}\nmodule: supervised",
            "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
            "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d]",
        ],
    )
    def test_that_name_code_are_refused(self, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        Path("evil.py").write_text(touching(), encoding="utf-8")
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        assert main(["fit", "recipe.yaml"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("recipe.yaml:")
        assert "Traceback" not in err
        assert not Path(CANARY).exists()

    def test_of_a_run_are_refused_alike(self, run: Path, refused: Commanded) -> None:
        (run / "recipe.yaml").write_text("data: !!python/object/apply:os.system ['touch canary']", encoding="utf-8")
        for command in ("test", "predict", "compare"):
            assert "is not allowed: a recipe is plain data" in refused(command, str(run))


def fitted(data: str, network: str = "mlp") -> list[str]:
    Path("recipe.yaml").write_text(
        f"data: {data}\nmodule: {{name: supervised, network: {network}}}\n"
        "callbacks: {progress: null, profile: null}\n",
        encoding="utf-8",
    )
    return ["fit", "recipe.yaml", "--smoke"]


class TestData:
    def test_arrays_of_objects_are_not_unpickled(self, refused: Commanded) -> None:
        np.savez("data.npz", inputs=np.array([Payload()] * 4, dtype=object), targets=np.arange(4))
        assert "data.npz is no .npz file of plain arrays" in refused(*fitted("{name: arrays, path: data.npz}"))
        Path("data.npz").write_bytes(pickle.dumps(Payload()))
        assert "data.npz is no .npz file of plain arrays" in refused(*fitted("{name: arrays, path: data.npz}"))

    @pytest.mark.parametrize("whole", [True, False])
    def test_weights_of_timm_are_not_unpickled(self, whole: bool, refused: Commanded) -> None:
        torch.save(Payload() if whole else {"state_dict": {}, "optimizer": Payload()}, "weights.pth")
        network = "{name: timm, model: test_resnet, weights: weights.pth}"
        line = refused(*fitted("digits", network))
        assert "weights.pth cannot be read as weights alone" in line
        assert "weights_only" not in line

    def test_a_folder_that_brings_a_loading_script_is_read_without_it(self, refused: Commanded) -> None:
        pytest.importorskip("datasets")
        for place in ("photos", "photos/train", "table"):
            Path(place).mkdir()
            for script in (f"{Path(place).name}.py", "dataset.py", "__init__.py", "sitecustomize.py"):
                Path(place, script).write_text(touching(), encoding="utf-8")
        assert "holds no images" in refused(*fitted("{name: images, path: photos}"))
        parquet.write_table(pa.table({"x": [[1.0, 2.0]] * 40, "label": [0, 1] * 20}), "table/train.parquet")
        assert "table cannot be loaded" in refused(*fitted("{name: hf, path: table}"))
        Path("table", "table.py").unlink()
        assert main(fitted("{name: hf, path: table}")) == 0
        assert not Path(CANARY).exists()

    @pytest.mark.parametrize("reader", ["pandas", "webdataset", "imagefolder"])
    def test_a_reader_of_datasets_is_no_data_set(self, reader: str, refused: Commanded) -> None:
        pytest.importorskip("datasets")
        Path("train.pkl").write_bytes(pickle.dumps(Payload()))
        assert f"{reader} is a reader of the package datasets" in refused(*fitted(f"{{name: hf, path: {reader}}}"))

    def test_an_image_that_would_never_end_is_not_read(self, refused: Commanded) -> None:
        images = pa.array(
            [{"bytes": None, "path": "/dev/zero"}] * 4, pa.struct({"bytes": pa.binary(), "path": pa.string()})
        )
        parquet.write_table(pa.table({"image": images, "label": ["a", "b"] * 2}), "data.parquet")
        assert "/dev/zero is no file" in refused(*fitted("{name: hf, path: data.parquet}"))

    def test_cells_and_columns_that_a_terminal_would_obey_are_shown(self, refused: Commanded) -> None:
        parquet.write_table(pa.table({"\x1b[31mx": [1.0] * 20, "label": ["a", "\x1b]0;b\x07"] * 10}), "data.parquet")
        line = refused(*fitted("{name: tabular, path: data.parquet, target: none}"))
        assert "\\x1b[31mx" in line
        parquet.write_table(
            pa.table({"x": [1.0] * 20, "label": [f"[red]\x1b[2J{i}" for i in range(20)]}), "more.parquet"
        )
        shutil.rmtree("runs")
        parquet.write_table(pa.table({"x": [1.0] * 20, "label": ["a", "\x1b]0;b\x07"] * 10}), "data.parquet")
        assert main(fitted("{name: tabular, path: data.parquet}")) == 0
        assert "[red]\\x1b[2J0" in refused("test", "latest", "data.path=more.parquet")

    @pytest.mark.parametrize(
        "learnt",
        [
            {"classes": 5}, {"classes": [1]}, {"classes": None}, {"target": ["x"]}, {"regression": "no"},
            {"columns": 3}, {"columns": {"x": {}}}, {"columns": {"x": {"mean": "0", "deviation": 1, "missing": False}}},
            {"columns": {"x": {"categories": [Ellipsis.__class__.__name__, 3]}}}, {"numbers": "x"},
        ],
    )  # fmt: skip
    def test_what_a_run_learnt_of_another_type_is_refused(self, learnt: Any, refused: Commanded) -> None:
        parquet.write_table(pa.table({"x": [1.0, 2.0] * 10, "label": ["a", "b"] * 10}), "data.parquet")
        assert main(fitted("{name: tabular, path: data.parquet}")) == 0
        [file] = Path("runs").glob("*/*/*/data.json")
        changed(file, lambda said: said["learnt"].update(learnt))
        assert "data.json is not what Tabular learns" in refused("test", "latest")
        for damage in ("", "[" * 100_000, "[]", '{"data": "Tabular", "learnt": 3}'):
            file.write_text(damage, encoding="utf-8")
            assert "data.json is damaged" in refused("test", "latest")


class TestHub:
    """Folders as Hugging Face's libraries write them."""

    def test_models_that_bring_code_are_refused(self, refused: Commanded) -> None:
        pytest.importorskip("transformers")
        Path("model").mkdir()
        Path("model", "evil.py").write_text(touching(), encoding="utf-8")
        config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
        Path("model", "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert "model" in refused(*fitted("docstrings", "{name: transformers, folder: model}"))

    def test_models_whose_attention_is_code_of_a_hub_are_refused(self, refused: Commanded) -> None:
        pytest.importorskip("transformers")
        config = "{model_type: bert, num_hidden_layers: 1, attn_implementation: kernels-community/flash-attn}"
        line = refused(*fitted("docstrings", f"{{name: transformers, config: {config}}}"))
        assert "wants the code kernels-community/flash-attn from the hub, which is never run" in line

    def test_weights_that_are_a_pickle_are_refused(self, refused: Commanded) -> None:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        transformers.BertConfig(vocab_size=20_000, **sizes).save_pretrained("model")
        torch.save({"x": Payload()}, "model/pytorch_model.bin")
        assert "transformers: " in refused(*fitted("docstrings", "{name: transformers, folder: model}"))


def commanded(*arguments: str, program: tuple[str, ...] | None = None, **settings: Any) -> Any:
    """``lab`` as its own process."""
    program = program or (str(Path(sys.executable).with_name("lab")),)
    return subprocess.run(
        [*program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        stdin=subprocess.DEVNULL,
        **settings,
    )


class TestWorkingDirectory:
    """A folder from elsewhere in which ``lab`` is run."""

    PLANTED = (
        "sitecustomize",
        "usercustomize",
        "torch",
        "wandb",
        "yaml",
        "lightning",
        "numpy",
        "json",
        "lab.cli",
        "evil",
    )

    @pytest.fixture
    def planted(self) -> None:
        """Modules that Python would find here if it looked, and a distribution that claims lab's names."""
        for name in self.PLANTED:
            Path(f"{name}.py").write_text(touching(), encoding="utf-8")
        info = Path("lightning_lab-9.dist-info")
        info.mkdir()
        (info / "METADATA").write_text("Name: lightning-lab\nVersion: 9\n", encoding="utf-8")
        entries = "[lab.networks]\nmlp = evil:MLP\n[lab.datamodules]\ndigits = evil:Digits\n"
        (info / "entry_points.txt").write_text(entries, encoding="utf-8")
        Path("recipe.yaml").write_text(
            "data: digits\nmodule: {name: supervised, network: mlp}\nlogger: [csv, wandb]\n", encoding="utf-8"
        )

    @pytest.mark.usefixtures("planted")
    @pytest.mark.parametrize("program", [None, (sys.executable, "-m", "lab")])
    def test_gives_the_command_no_modules(self, program: tuple[str, ...] | None) -> None:
        found = commanded("check", "recipe.yaml", program=program)
        assert (found.returncode, found.stderr) == (0, "")
        assert not Path(CANARY).exists()

    @pytest.mark.usefixtures("planted")
    def test_gives_a_named_package_and_nothing_that_is_installed(self) -> None:
        Path("mine.py").write_text("", encoding="utf-8")
        found = commanded("check", "recipe.yaml", "--import", "mine")
        assert (found.returncode, found.stderr) == (0, "")
        assert not Path(CANARY).exists()


HOSTILE = "[red]x[/red][link=https://evil]\x1b[31m\x1b]0;title\x07<script>alert(1)</script>\u202e --><b>&amp;\ud800"


class _Tags(HTMLParser):
    """Which elements and attributes a page has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


class TestText:
    """Names are shown, not obeyed."""

    @pytest.fixture
    def hostile(self, run: Path) -> Path:
        """The run with such a name wherever a name may stand."""

        def said(results: Any) -> None:
            for stage in results["stages"].values():
                stage["metrics"] = {f"test/{HOSTILE}": 0.5, "test/accuracy": 0.5}
            results["status"] = HOSTILE

        changed(run / "results.json", said)
        hostile = {"recipe": HOSTILE, "group": HOSTILE, "command": [HOSTILE], "git": {"commit": HOSTILE}}
        hostile |= {"versions": {HOSTILE: HOSTILE}, "hardware": {HOSTILE: HOSTILE}}
        changed(run / "manifest.json", lambda manifest: {**manifest, **hostile})
        recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
        (run / "recipe.yaml").write_text(
            f"description: {json.dumps(HOSTILE.replace(chr(0xD800), ''))}\n{recipe}", encoding="utf-8"
        )
        (run / "second" / "metrics.csv").write_text(
            f"step,val/{HOSTILE.replace(chr(0xD800), '')}\n1,0.5\n2,0.6\n", encoding="utf-8"
        )
        return run

    @pytest.mark.parametrize("command", [["runs"], ["compare"], ["runs", "--json"], ["compare", "--json"]])
    def test_in_what_is_printed(self, command: list[str], hostile: Path, capfd: pytest.CaptureFixture[str]) -> None:
        assert main([*command, *([str(hostile)] if command[0] == "compare" else [])]) == 0
        out = capfd.readouterr().out
        assert not {"\x1b", "\x07", "\u202e"} & set(out)
        assert "[red]x[/red][link=https://evil]" in out

    def test_on_a_page(self, hostile: Path) -> None:
        assert main(["compare", str(hostile), "--html", "page.html"]) == 0
        text = Path("page.html").read_text(encoding="utf-8")
        found = _Tags(text)
        assert not {"script", "b", "link", "iframe"} & found.tags
        assert not {name for name in found.attributes if name.startswith("on")}
        assert "default-src 'none'" in text
        assert "&lt;script&gt;alert(1)" in text

    def test_in_a_recipe_that_is_shown(self, capsys: pytest.CaptureFixture[str]) -> None:
        name = HOSTILE.replace("\ud800", "")
        Path("recipe.yaml").write_text(
            f"description: {json.dumps(name)}\ndata: digits\nmodule: {{name: supervised, network: mlp}}\n",
            encoding="utf-8",
        )
        assert main(["show", "recipe.yaml"]) == 0
        out = capsys.readouterr().out
        assert not {"\x1b", "\x07", "\u202e"} & set(out)
        Path("again.yaml").write_text(out, encoding="utf-8")
        from lab import recipe

        assert recipe.load("again.yaml").description == name

    def test_as_a_callbacks_name_is_refused(self, refused: Commanded) -> None:
        Path("recipe.yaml").write_text(
            'data: digits\nmodule: supervised\ncallbacks: {"a\\nseed: 7": {name: early_stopping}}\n', encoding="utf-8"
        )
        assert "a callback's name is one line of printable text" in refused(
            "show", "recipe.yaml", "module={name: supervised, network: mlp}"
        )

    def test_pictures_that_are_others_files_are_not_taken_into_a_page(self, run: Path) -> None:
        Path("secret.png").write_bytes(b"\x89PNG\r\nsecret")
        pictures = run / "second" / "pictures"
        (pictures / "linked.png").symlink_to(Path("secret.png").absolute())
        (pictures / "key.png").write_bytes(b"-----BEGIN OPENSSH PRIVATE KEY-----")
        assert main(["compare", str(run), "--html", "page.html"]) == 0
        page = Path("page.html").read_text(encoding="utf-8")
        assert "second: confusion" in page
        assert "second: linked" not in page
        assert "second: key" not in page
