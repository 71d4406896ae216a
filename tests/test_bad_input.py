"""Bad input through the command itself: exit code 2, a place, a key and a remedy, no traceback, and nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import registry
from lab.cli import main
from lab.types import _trains

RECIPE = """\
seed: 0
data: {name: digits, batch_size: 64}
trainer: {max_epochs: 1, limit_train_batches: 1, limit_val_batches: 1, limit_test_batches: 1}
callbacks: {progress: null, profile: null, checkpoints: {every_seconds: 5}}
logger: csv
stages:
  teacher:
    module:
      name: supervised
      network: {name: mlp, hidden: [4], dropout: 0.1}
      optimizer: {name: adam, lr: 0.01, betas: [0.9, 0.99]}
  student:
    module:
      name: distill
      network: {name: convnet, width: 4}
      objective: {name: classification, measures: [accuracy]}
      teacher: {from: teacher}
      temperature: 4.0
      weight: 0.9
"""

Refused = Callable[..., list[str]]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must refuse its input; what it says, by line."""

    def run(*arguments: str, code: int = 2) -> list[str]:
        before = {path for path in Path().rglob("*") if not path.is_dir()}
        assert main(list(arguments)) == code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert "\x1b" not in err
        assert out == ""
        assert {path for path in Path().rglob("*") if not path.is_dir()} == before
        assert not Path("runs").is_dir()
        assert err.strip()
        return err.splitlines()

    return run


@pytest.fixture
def changed(refused: Refused) -> Refused:
    """Refuse to fit the recipe above with one thing changed."""

    def run(old: str, new: str, *overrides: str) -> list[str]:
        assert RECIPE.count(old) == 1
        Path("recipe.yaml").write_text(RECIPE.replace(old, new), encoding="utf-8")
        return refused("fit", "recipe.yaml", *overrides)

    return run


def test_the_recipe_that_the_others_are_made_of_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    assert main(["check", "recipe.yaml"]) == 0
    assert capsys.readouterr().out == "1 recipe checked: no problems\n"


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"", "recipe.yaml: is empty"),
            (b"# only a comment\n", "recipe.yaml: is empty"),
            (b"just words\n", "recipe.yaml:1:1: a recipe is a mapping, not text"),
            (b"- a\n- b\n", "recipe.yaml:1:1: a recipe is a mapping, not a list"),
            (b"seed: 0\ndata: [1, 2\nmodule: x\n", "recipe.yaml:3:7: not YAML: "),
            (b"seed: 0\ndata:\n\tname: digits\n", "recipe.yaml:3:1: not YAML: "),
            (b"seed: 0\nseed: 1\n", "recipe.yaml:2:1: seed: the key stands twice in one mapping, first in line 1"),
            (b"a: 1\n---\nb: 2\n", "recipe.yaml:2:1: a second document"),
            (b"seed: 0\ndata: \x00\n", "recipe.yaml:2:7: not YAML: control characters are not allowed"),
            (b"seed: 0\ndata: caf\xe9\n", "recipe.yaml:2:1: is no UTF-8 text (byte 17)"),
            (bytes(range(256)) * 10, "recipe.yaml:"),
            (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "recipe.yaml:1:1: is no UTF-8 text"),
            (b"a: " + b"[" * 200 + b"]" * 200, "recipe.yaml:1:67: more than 64 levels deep"),
            (b"a: " + b"[" * 5000 + b"]" * 5000, ": more than 64 levels deep"),
            (b"a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
             b"c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\n"
             b"e: [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\n", "aliases that explode?"),
            (b"a: &a {b: *a}\n", "recipe.yaml:1:11: the alias *a names no finished anchor"),
            (b"data: !!python/object/apply:os.system ['touch pwned']\n",
             "recipe.yaml:1:7: the tag !!python/object/apply:os.system is not allowed: a recipe is plain data"),
            (b"seed: 0x" + b"f" * 10_000, "recipe.yaml:1:7: a whole number of more than 64 bits"),
        ],
    )  # fmt: skip
    def test_that_are_no_recipe(self, content: bytes, expected: str, refused: Refused) -> None:
        Path("recipe.yaml").write_bytes(content)
        began = time.process_time()
        [line] = refused("fit", "recipe.yaml")
        assert time.process_time() - began < 2
        assert expected in line
        assert line.startswith("recipe.yaml:")
        assert not Path("pwned").exists()

    def test_of_ten_megabytes(self, refused: Refused) -> None:
        Path("recipe.yaml").write_text("description: " + "x" * 10_000_000, encoding="utf-8")
        assert refused("fit", "recipe.yaml") == ["recipe.yaml: 10,000,013 bytes are more than a recipe's 1,000,000"]

    def test_that_are_not_there(self, refused: Refused) -> None:
        assert refused("fit", "none.yaml") == ["none.yaml: no such file"]
        assert refused("fit", "there/none") == ["there/none: no such file"]
        assert refused("fit", "distil") == [
            "distil: no such file, and no bundled recipe of that name "
            "(did you mean 'distill' or 'distill_qat' or 'distill_ddp'?)"
        ]
        assert refused("fit", "") == [".: is a folder, not a file"]
        assert refused("fit", "-") == [
            "-: no such file, and no bundled recipe of that name "
            "(there are: acrobot, actor_critic, adaptation, compress, continual, dann, distill, distill_ddp, "
            "distill_qat, ewc, finetune, finetune_fsdp, maml, maml_glyphs, pendulum, policy_gradient, ppo, prune, "
            "quantize, supervised, text)"
        ]

    def test_that_are_no_files(self, refused: Refused) -> None:
        Path("folder.yaml").mkdir()
        Path("loop.yaml").symlink_to("loop.yaml")
        Path("a").symlink_to("b")
        Path("b").symlink_to("a")
        assert refused("fit", "folder.yaml") == ["folder.yaml: is a folder, not a file"]
        assert refused("fit", "loop.yaml") == ["loop.yaml: is a link that leads nowhere"]
        assert refused("fit", "a/recipe.yaml") == ["a/recipe.yaml: no such file"]

    def test_whose_names_no_file_can_have(self, refused: Refused) -> None:
        assert refused("fit", "x" * 5000 + ".yaml") == ["x" * 5000 + ".yaml: cannot be read: File name too long"]
        assert refused("fit", "a\0.yaml") == ["a\\x00.yaml: no such file"]
        assert refused("fit", "\udcff.yaml") == ["\\udcff.yaml: no such file"]

    def test_that_never_end_are_not_waited_for(self) -> None:
        os.mkfifo("pipe.yaml")
        Path("recipe.yaml").write_text("extends: pipe.yaml\n", encoding="utf-8")
        names = ["pipe.yaml", "/dev/zero", "/dev/stdin", "recipe.yaml"]
        found = subprocess.run(
            [sys.executable, "-m", "lab", "check", *names],
            capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.PIPE,
        )  # fmt: skip
        assert found.returncode == 2
        assert found.stderr.splitlines() == [
            *(f"{name}: is no file but a pipe or a device" for name in names[:3]),
            "recipe.yaml:1:10: extends: pipe.yaml: is no file but a pipe or a device",
        ]

    def test_of_several_the_problems_of_each_are_said(self, refused: Refused) -> None:
        Path("a.yaml").write_text(RECIPE.replace("seed", "sede"), encoding="utf-8")
        Path("b.yaml").write_text(RECIPE.replace("width: 4", "width: x"), encoding="utf-8")
        assert refused("check", "a.yaml", "none.yaml", "b.yaml", "supervised") == [
            "a.yaml:1:1: sede: unknown key (did you mean 'seed' or 'sweep'?)",
            "none.yaml: no such file",
            "b.yaml:15:39: stages.student.module.network.width: should be a valid integer, got 'x'",
        ]


class TestNames:
    @pytest.mark.parametrize(
        ("old", "new", "expected"),
        [
            ("seed: 0", "sede: 0", "recipe.yaml:1:1: sede: unknown key (did you mean 'seed' or 'sweep'?)"),
            ("name: digits", "name: digtis",
             "recipe.yaml:2:14: data.name: no datamodule named 'digtis' (did you mean 'digits'?)"),
            ("name: distill", "name: distil",
             "recipe.yaml:14:13: stages.student.module.name: no module named 'distil' (did you mean 'distill'?)"),
            ("name: convnet", "name: convent",
             "recipe.yaml:15:23: stages.student.module.network.name: no network named 'convent' (did you mean "),
            ("name: classification", "name: clasification",
             "recipe.yaml:16:25: stages.student.module.objective.name: no objective named 'clasification' (did "
             "you mean"),
            ("name: adam", "name: adamx",
             "recipe.yaml:11:25: stages.teacher.module.optimizer.name: no optimizer named 'adamx' (did you mean "
             "'adam'"),
            ("dropout: 0.1}", "dropout: 0.1}\n      scheduler: cosin",
             "recipe.yaml:11:18: stages.teacher.module.scheduler.name: no scheduler named 'cosin' (did you mean "
             "'cosine'"),
            ("checkpoints:", "checkpoint:",
             "recipe.yaml:4:44: callbacks.checkpoint: no callback named 'checkpoint' (did you mean 'checkpoints'?)"),
            ("logger: csv", "logger: cvs", "recipe.yaml:5:9: logger.name: no logger named 'cvs' (did you mean 'csv'?)"),
            ("weight: 0.9", "wieght: 0.9",
             "recipe.yaml:19:7: stages.student.module.wieght: distill has no argument 'wieght' (did you mean 'weight'"),
            ("width: 4", "widht: 4",
             "recipe.yaml:15:32: stages.student.module.network.widht: convnet has no argument 'widht' (did you mean "),
            ("batch_size", "batchsize",
             "recipe.yaml:2:22: data.batchsize: digits has no argument 'batchsize' (did you mean 'batch_size' or "),
            ("lr: 0.01", "learning_rate: 0.01",
             "recipe.yaml:11:31: stages.teacher.module.optimizer.learning_rate: adam has no argument 'learning_rate' "),
            ("max_epochs", "max_epoch",
             "recipe.yaml:3:11: trainer.max_epoch: the Trainer has no argument 'max_epoch' (did you mean 'max_epochs'"),
            ("every_seconds", "every_second",
             "recipe.yaml:4:58: callbacks.checkpoints.every_second: checkpoints has no argument 'every_second' "
             "(did you "),
            ("      teacher: {from: teacher}\n", "",
             "recipe.yaml:14:7: stages.student.module: distill needs the argument 'teacher': Teacher | list[Teacher]"),
            ("      network: {name: convnet, width: 4}\n", "",
             "recipe.yaml:14:7: stages.student.module: distill needs the argument 'network': nn.Module"),
            ("{from: teacher}", "{from: techer}",
             "recipe.yaml:17:23: stages.student.module.teacher.from: no stage named 'techer' (did you mean "
             "'teacher'?)"),
            ("{from: teacher}", "{from: student}",
             "recipe.yaml:17:23: stages.student.module.teacher.from: the stage 'student' takes from itself"),
            ("{name: mlp, hidden: [4], dropout: 0.1}", "{from: student}",
             "recipe.yaml:10:23: stages.teacher.module.network.from: the stages wait for each other: "
             "teacher → student → teacher"),
            ("{name: classification, measures: [accuracy]}", "{from: teacher}",
             "recipe.yaml:16:18: stages.student.module.objective: a stage gives a network; here an objective is "
             "wanted"),
            ("{name: convnet, width: 4}", "{class_path: torch.nn.Linear, init_args: {in_features: 3}}",
             "recipe.yaml:15:16: stages.student.module.network: expected a network: its name, or a mapping with "
             "`name:` "
             "and its arguments, or `from:` a stage; got a mapping of class_path, init_args without `name:`"),
            ("name: convnet, width: 4", "name: torch.nn.Linear",
             "recipe.yaml:15:23: stages.student.module.network.name: 'torch.nn.Linear' is a dotted name: recipes build "
             "registered classes only; `--import torch` allows the classes of that package"),
            ("logger: csv", "logger: {class_path: os.system}",
             "recipe.yaml:5:9: logger: expected a logger: its name, or a mapping with `name:` and its arguments; got "),
            ("max_epochs: 1", "callbacks: [{class_path: os.system}]",
             "recipe.yaml:3:11: trainer.callbacks: is lab's own: use the recipe's `callbacks`"),
            ("max_epochs: 1", "logger: csv",
             "recipe.yaml:3:11: trainer.logger: is lab's own: use the recipe's `logger`"),
            ("max_epochs: 1", "default_root_dir: x",
             "recipe.yaml:3:11: trainer.default_root_dir: is lab's own: use `--out`"),
            ("max_epochs: 1", "fast_dev_run: true",
             "recipe.yaml:3:11: trainer.fast_dev_run: is lab's own: use `lab fit --smoke`"),
            ("max_epochs: 1", "enable_checkpointing: false",
             "recipe.yaml:3:11: trainer.enable_checkpointing: is lab's own: use `callbacks: {checkpoints: null}`"),
            ("max_epochs: 1", "use_distributed_sampler: false",
             "recipe.yaml:3:11: trainer.use_distributed_sampler: is lab's own: the datamodule shards its batches"),
            ("max_epochs: 1", "plugins: []", "recipe.yaml:3:11: trainer.plugins: is lab's own: lab chooses them"),
            ("seed: 0", "sweep: [1, 2]", "recipe.yaml:1:8: sweep: expected a mapping, got a list"),
        ],
    )  # fmt: skip
    def test_and_wires_that_are_wrong(self, old: str, new: str, expected: str, changed: Refused) -> None:
        [line] = changed(old, new)
        assert line.startswith(expected)

    def test_that_a_terminal_would_obey_are_shown(self, changed: Refused) -> None:
        [line] = changed(
            "name: convnet", 'name: "\\e[31m\\e]0;title\\a[bold red]x[/]\\r\\nrecipe.yaml:1:1: fine\\u202e"'
        )
        assert line.startswith(
            "recipe.yaml:15:23: stages.student.module.network.name: no network named "
            "'\\x1b[31m\\x1b]0;title\\x07[bold red]x[/]\\r\\nrecipe.yaml:1:1: fine\\u202e'"
        )

    def test_that_a_terminal_would_obey_are_shown_as_keys_and_values_too(self, changed: Refused) -> None:
        assert changed("width: 4", '"\\e[1mx\\n": 4')[0].startswith(
            "recipe.yaml:15:32: stages.student.module.network.\\x1b[1mx\\n: convnet has no argument '\\x1b[1mx\\n'"
        )
        assert changed("width: 4", 'width: "\\e[2J[red]"')[0].endswith("should be a valid integer, got '\\x1b[2J[red]'")


class TestTypes:
    @pytest.mark.parametrize(
        ("old", "new", "expected"),
        [
            ("width: 4", "width: '4'",
             "15:39: stages.student.module.network.width: should be a valid integer, got '4'"),
            ("width: 4", "width: four",
             "15:39: stages.student.module.network.width: should be a valid integer, got 'four'"),
            ("width: 4", "width: 4.5",
             "15:39: stages.student.module.network.width: should be a valid integer, got 4.5"),
            ("width: 4", "width: 4.0",
             "15:39: stages.student.module.network.width: should be a valid integer, got 4.0"),
            ("width: 4", "width: 1e1",
             "15:39: stages.student.module.network.width: should be a valid integer, got 10.0"),
            ("width: 4", "width: true",
             "15:39: stages.student.module.network.width: should be a valid integer, got true"),
            ("width: 4", "width: null",
             "15:39: stages.student.module.network.width: should be a valid integer, got null"),
            ("width: 4", "width: [4]",
             "15:39: stages.student.module.network.width: should be a valid integer, got [4]"),
            ("width: 4", "width: {a: 4}",
             '15:39: stages.student.module.network.width: should be a valid integer, got {"a": 4}'),
            ("width: 4", "width: .inf",
             "15:39: stages.student.module.network.width: should be a valid integer, got .inf"),
            ("batch_size: 64", "drop_last: yes", "2:33: data.drop_last: should be a valid boolean, got 'yes'"),
            ("batch_size: 64", "drop_last: 1", "2:33: data.drop_last: should be a valid boolean, got 1"),
            ("hidden: [4]", "hidden: 4", "10:36: stages.teacher.module.network.hidden: should be a list, got 4"),
            ("hidden: [4]", "hidden: [4, x]",
             '10:36: stages.teacher.module.network.hidden: should be a valid integer at position 1, got [4, "x"]'),
            ("hidden: [4]", "hidden: [[4]]",
             "10:36: stages.teacher.module.network.hidden: should be a valid integer at position 0, got [[4]]"),
            ("betas: [0.9, 0.99]", "betas: [0.9]", "11:48: stages.teacher.module.optimizer.betas: "),
            ("betas: [0.9, 0.99]", "betas: 0.9",
             "11:48: stages.teacher.module.optimizer.betas: should be a list, got 0.9"),
            ("measures: [accuracy]", "measures: [acuracy]",
             "16:51: stages.student.module.objective.measures: should be 'accuracy', 'f1', 'precision', "
             "'recall', 'auroc', "
             "'calibration' or 'top5' at position 0, got [\"acuracy\"]"),
            ("weight: 0.9", "weight: much",
             "19:15: stages.student.module.weight: should be a valid number, got 'much'"),
            ("weight: 0.9", "cache: sometimes",
             "19:14: stages.student.module.cache: should be a valid boolean, got 'sometimes'"),
            ("{name: convnet, width: 4}", "3", "15:16: stages.student.module.network: expected a network: "),
            ("{name: convnet, width: 4}", "null", "15:16: stages.student.module.network: expected a network: "),
            ("{name: convnet, width: 4}", "[convnet]", "15:16: stages.student.module.network: expected a network: "),
            ("{from: teacher}", "[{from: teacher}, 3]", "17:34: stages.student.module.teacher: expected a network: "),
            ("{from: teacher}", "[{from: teacher}, null]",
             "17:34: stages.student.module.teacher: expected a network: "),
            ("{name: adam, lr: 0.01, betas: [0.9, 0.99]}", "3",
             "11:18: stages.teacher.module.optimizer: expected an optimizer: its name, or a mapping with "
             "`name:` and its "
             "arguments, got 3"),
            ("{name: adam, lr: 0.01, betas: [0.9, 0.99]}", "null",
             "11:18: stages.teacher.module.optimizer: expected an optimizer: "),
            ("{name: classification, measures: [accuracy]}", "true",
             "16:18: stages.student.module.objective: expected an objective: "),
            ("max_epochs: 1", "max_epochs: three", "3:23: trainer.max_epochs: should be a valid integer, got 'three'"),
            ("max_epochs: 1", "max_epochs: [1]", "3:23: trainer.max_epochs: should be a valid integer, got [1]"),
            ("max_epochs: 1", "max_epochs: {a: 1}",
             "3:23: trainer.max_epochs: expected a number or a name, got a mapping"),
            ("max_epochs: 1", "precision: 17", "3:22: trainer.precision: should be 64, 32 or 16 or "),
            ("max_epochs: 1", "strategy: ddpp", "3:21: trainer.strategy: no strategy named 'ddpp' (did you mean 'ddp'"),
            ("max_epochs: 1", "accelerator: tpuu",
             "3:24: trainer.accelerator: no accelerator named 'tpuu' (did you mean 'tpu'"),
            ("max_epochs: 1", "profiler: simpel",
             "3:21: trainer.profiler: no profiler named 'simpel' (did you mean 'simple'?)"),
            ("max_epochs: 1", "devices: many", "3:20: trainer.devices: "),
            ("seed: 0", "seed: zero", "1:7: seed: expected a whole number from 0 to 4294967295, got 'zero'"),
            ("seed: 0", "seed: 1.5", "1:7: seed: expected a whole number from 0 to 4294967295, got 1.5"),
            ("{name: digits, batch_size: 64}", "{name: arrays, path: 3}",
             "2:28: data.path: should be a valid string, got 3"),
            ("{name: digits, batch_size: 64}", "{name: arrays, path: [a]}",
             '2:28: data.path: should be a valid string, got ["a"]'),
        ],
    )  # fmt: skip
    def test_that_are_wrong(self, old: str, new: str, expected: str, changed: Refused) -> None:
        [line] = changed(old, new)
        assert line.startswith(f"recipe.yaml:{expected}")

    @pytest.mark.parametrize(
        ("old", "new", "expected"),
        [
            ("temperature: 4.0", "temperature: 0",
             "18:20: stages.student.module.temperature: should be greater than 0, got 0"),
            ("weight: 0.9", "weight: 2",
             "19:15: stages.student.module.weight: should be less than or equal to 1, got 2"),
            ("weight: 0.9", "weight: .nan", "19:15: stages.student.module.weight: should be "),
            ("weight: 0.9", "teacher_weights: [0]",
             "19:24: stages.student.module.teacher_weights: should be greater than 0"),
            ("width: 4", "width: 0",
             "15:39: stages.student.module.network.width: should be greater than or equal to 1, got 0"),
            ("hidden: [4]", "hidden: [4, 0]",
             "10:36: stages.teacher.module.network.hidden: should be greater than or equal to 1 at position 1, "
             "got [4, 0]"),
            ("dropout: 0.1", "dropout: 1.5",
             "10:50: stages.teacher.module.network.dropout: should be less than 1, got 1.5"),
            ("batch_size: 64", "batch_size: 0", "2:34: data.batch_size: should be greater than or equal to 1, got 0"),
            ("batch_size: 64", "labels: -3", "2:30: data.labels: should be greater than or equal to 1, got -3"),
            ("every_seconds: 5", "every_seconds: -1",
             "4:73: callbacks.checkpoints.every_seconds: should be greater than or equal to 0, got -1"),
            ("lr: 0.01", "lr: -1", "11:35: stages.teacher.module.optimizer.lr: adam: Invalid learning rate: -1.0"),
            ("lr: 0.01", "lr: .nan", "11:35: stages.teacher.module.optimizer.lr: should be a finite number, got .nan"),
            ("betas: [0.9, 0.99]", "betas: [0.9, 1.5]",
             "11:48: stages.teacher.module.optimizer.betas: adam: Invalid beta parameter at index 1: 1.5"),
            ("betas: [0.9, 0.99]}", "eps: 0.1}\n      scheduler: {name: one_cycle, max_lr: 1, pct_start: 5}",
             "12:58: stages.teacher.module.scheduler.pct_start: one_cycle: Expected float between 0 and 1 pct_start"),
            ("betas: [0.9, 0.99]}", "eps: 0.1}\n      scheduler: {name: plateau, factor: 3}",
             "12:42: stages.teacher.module.scheduler.factor: plateau: Factor should be < 1.0."),
            ("betas: [0.9, 0.99]}", "eps: 0.1}\n      scheduler: {name: step, step_size: 0}",
             "12:25: stages.teacher.module.scheduler: step: ZeroDivisionError: "),
            ("seed: 0", "seed: -1", "1:7: seed: expected a whole number from 0 to 4294967295, got -1"),
            ("seed: 0", "seed: 4294967296", "1:7: seed: expected a whole number from 0 to 4294967295, got 4294967296"),
            ("max_epochs: 1", "max_epochs: -5",
             "3:23: trainer.max_epochs: `max_epochs` must be a non-negative integer"),
            ("max_epochs: 1", "accumulate_grad_batches: 0",
             "3:36: trainer.accumulate_grad_batches: should be greater than or equal to 1, got 0"),
            ("max_epochs: 1", "check_val_every_n_epoch: 0",
             "3:36: trainer.check_val_every_n_epoch: should be greater than or equal to 1, got 0"),
            ("max_epochs: 1", "gradient_clip_val: -1",
             "3:30: trainer.gradient_clip_val: should be greater than or equal to 0, got -1"),
            ("max_epochs: 1", "val_check_interval: 1.5", "3:31: trainer.val_check_interval: "),
            ("max_epochs: 1", "devices: 0", "3:20: trainer.devices: "),
        ],
    )  # fmt: skip
    def test_of_the_right_kind_but_out_of_range(self, old: str, new: str, expected: str, changed: Refused) -> None:
        [line] = changed(old, new)
        assert line.startswith(f"recipe.yaml:{expected}")

    def test_all_wrong_ones_are_said_at_once(self, refused: Refused) -> None:
        wrong = {
            "batch_size: 64": "batch_size: 0", "width: 4": "width: x", "temperature: 4.0": "temperature: 0",
            "lr: 0.01, betas: [0.9, 0.99]": "lr: -1, eps: -2.0", "max_epochs: 1": "max_epochs: -5, devices: many",
        }  # fmt: skip
        text = RECIPE
        for old, new in wrong.items():
            text = text.replace(old, new)
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        assert sorted(line.split(": ")[1] for line in refused("check", "recipe.yaml")) == [
            "data.batch_size", "stages.student.module.network.width", "stages.student.module.temperature",
            "stages.teacher.module.optimizer.eps", "stages.teacher.module.optimizer.lr", "trainer.devices",
            "trainer.max_epochs",
        ]  # fmt: skip


def test_data_that_the_module_cannot_consume(changed: Refused) -> None:
    lines = changed("{name: digits, batch_size: 64}", "sinusoid")
    others = ("episodes", "sinusoid", "domains", "mnist_blend", "mnist_digits", "gym")
    assert lines == [
        f"recipe.yaml:2:7: {stage}data: {module} consumes Labelled batches, sinusoid yields Episodes; "
        f"data that fits: {', '.join(name for name in registry.datamodules.names() if name not in others)}"
        for stage, module in (("stages.teacher.", "supervised"), ("stages.student.", "distill"))
    ]


def test_a_file_of_data_that_is_not_there(changed: Refused) -> None:
    Path("cells.npz").write_bytes(b"")
    [said] = changed("{name: digits, batch_size: 64}", "{name: arrays, path: cell.npz}")
    assert said.startswith("recipe.yaml:2:28: data.path: ")
    assert "cell.npz is not there (did you mean 'cells.npz'?)" in said
    [said] = changed("{name: digits, batch_size: 64}", "{name: arrays, path: .}")
    assert "is a folder, not a file" in said
    [said] = changed("{name: digits, batch_size: 64}", "{name: images, path: cells.npz}")
    assert "cells.npz is a file, not a folder" in said
    [said] = changed("{name: digits, batch_size: 64}", "{name: tabular, path: no/where.csv}")
    assert "where.csv is not there, nor is the folder" in said


class TestBuiltForNothing:
    """What only a constructor, or Lightning at the start of a training, would refuse."""

    @pytest.mark.parametrize(
        ("old", "new", "expected"),
        [
            ("lr: 0.01", "lr: .inf", "11:35: stages.teacher.module.optimizer.lr: should be a finite number, got .inf"),
            ("lr: 0.01", "lr: .nan", "11:35: stages.teacher.module.optimizer.lr: should be a finite number, got .nan"),
            ("[0.9, 0.99]", "[0.9, .inf]", "module.optimizer.betas: should be a finite number, got [0.9, Infinity]"),
            ("logger: csv", "logger: [csv, {name: csv}]",
             "5:15: logger: csv stands twice, and would write into the same place"),
            ("progress: null", "early_stopping: {mode: maxx}",
             "callbacks.early_stopping.mode: early_stopping: MisconfigurationException: `mode` can be min, max, "
             "got maxx"),
            ("progress: null", "early_stopping: {}, other: {name: early_stopping, patience: 7}",
             "callbacks.other: is the same early_stopping as callbacks.early_stopping, as far as its state tells"),
            ("progress: null", "ema: {}, other: {name: ema}", "callbacks.other: is the same ema as callbacks.ema"),
        ],
    )  # fmt: skip
    def test_is_refused_in_its_place(self, old: str, new: str, expected: str, changed: Refused) -> None:
        [line] = changed(old, new)
        assert expected in line

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("logger: csv", "logger: [{name: wandb, project: a}, {name: wandb, project: b}]"),
            ("progress: null", "learning_rate: {}, again: {name: learning_rate, logging_interval: step}"),
            ("progress: null", "early_stopping: {monitor: val/loss, mode: min}, other: {name: early_stopping}"),
        ],
    )
    def test_is_told_apart_from_what_is_right(self, old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
        Path("recipe.yaml").write_text(RECIPE.replace(old, new), encoding="utf-8")
        assert main(["check", "recipe.yaml"]) == 0, capsys.readouterr().err


class TestDevices:
    """What this machine has is pretended: no GPU, or one."""

    @pytest.fixture
    def gpus(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
        def pretend(count: int) -> None:
            for name in ("torch.cuda", "lightning.fabric.accelerators.cuda", "lightning.pytorch.accelerators.cuda"):
                counting = "device_count" if name == "torch.cuda" else "num_cuda_devices"
                monkeypatch.setattr(f"{name}.{counting}", lambda: count)
            monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)

        _trains.cache_clear()
        yield pretend
        _trains.cache_clear()

    @pytest.mark.parametrize(
        ("there", "said", "expected"),
        [
            (0, "accelerator: gpu", "3:24: trainer.accelerator: there is no GPU here that torch can use: `acceler"),
            (0, "accelerator: gpu, devices: 4", "3:24: trainer.accelerator: there is no GPU here that torch can use"),
            (1, "accelerator: gpu, devices: 2", "3:38: trainer.devices: GPUs 0, 1 are asked for, this machine has 0: "),
            (1, "accelerator: gpu, devices: [3]", "3:38: trainer.devices: GPUs 3 are asked for, this machine has 0: "),
            (0, "accelerator: cpu, devices: 0", "3:38: trainer.devices: `Trainer(devices=0)` value is not a valid "),
        ],
    )
    def test_that_are_not_there(
        self, there: int, said: str, expected: str, changed: Refused, gpus: Callable[[int], None]
    ) -> None:
        gpus(there)
        [line] = changed("max_epochs: 1", said)
        assert line.startswith(f"recipe.yaml:{expected}")

    @pytest.mark.parametrize("name", ["deepspeed", "deepspeed_stage_3_offload"])
    def test_whose_strategy_is_not_installed(
        self, name: str, changed: Refused, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightning.pytorch.strategies.deepspeed._DEEPSPEED_AVAILABLE", False)
        [line] = changed("max_epochs: 1", f"strategy: {name}")
        assert line.startswith("recipe.yaml:3:21: trainer.strategy: ")
        assert "pip install -U deepspeed" in line


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("trainer.max_epoch=3",
             "trainer.max_epoch: the Trainer has no argument 'max_epoch' (did you mean 'max_epochs'"),
            ("trainr.max_epochs=3", "trainr: no such key at the top of a recipe (did you mean 'trainer'?)"),
            ("stages.studnt.seed=3", "stages.studnt: no such stage (did you mean 'student'?)"),
            ("stages.student.module.network.widht=3",
             "stages.student.module.network.widht: convnet has no argument 'widht' (did you mean 'width'?)"),
            ("stages.teacher.module.network.hidden.7=3",
             "module.network.hidden.7: the list at module.network.hidden has the positions 0 to 0"),
            ("trainer.max_epochs.x=3",
             "trainer.max_epochs.x: trainer.max_epochs is a number: there is nothing below it"),
            ("trainer.max_epochs", "an override is key=value, such as trainer.max_epochs=3"),
            ("=3", "an override is key=value, such as trainer.max_epochs=3"),
            ("data.batch_size=0", "data.batch_size: should be greater than or equal to 1, got 0"),
            ("data.batch_size='8'", "data.batch_size: should be a valid integer, got '8'"),
            ("data.batch_size=[", "not YAML: "),
            ("data.batch_size=!!python/name:os.system x", "the tag !!python/name:os.system is not allowed"),
            ("stages.student.module.teacher.from=techer",
             "stages.student.module.teacher.from: no stage named 'techer' (did you mean 'teacher'?)"),
            ("stages.student.module.teacher.from=student",
             "stages.student.module.teacher.from: the stage 'student' takes from itself"),
            ("trainer.strategy=ddpp", "trainer.strategy: no strategy named 'ddpp' (did you mean 'ddp'"),
            ("callbacks={checkpoints: {monitr: x}}",
             "callbacks.checkpoints.monitr: checkpoints has no argument 'monitr'"),
            ("seed=\udcff", "is no UTF-8 text"),
        ],
    )  # fmt: skip
    def test_that_are_wrong_are_named(self, override: str, expected: str, refused: Refused) -> None:
        Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
        [line] = refused("fit", "recipe.yaml", override)
        assert line.startswith(f"override {override}: {expected}".replace("\udcff", "\\udcff"))

    def test_of_an_unknown_option_is_a_matter_of_usage(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["fit", "distill", "--smoek"])
        assert caught.value.code == 2
        assert "unrecognized arguments: --smoek" in capsys.readouterr().err


class TestRunFolder:
    def test_a_file_in_the_way_is_said_with_the_way_out(self, refused: Refused) -> None:
        Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
        Path("runs").write_text("in the way", encoding="utf-8")
        [line] = refused("fit", "recipe.yaml")
        assert line.startswith("runs/recipe/")
        assert line.endswith(" cannot be made: Not a directory; choose another place with --out")

    def test_an_unwritable_place_is_said_with_the_way_out(self, refused: Refused) -> None:
        Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
        [line] = refused("fit", "recipe.yaml", "--out", "/proc/lab")
        assert line.startswith("/proc/lab/recipe/")
        assert "choose another place with --out" in line


@pytest.fixture
def made() -> Path:
    """What a run's folder looks like, with one stage that never finished."""
    folder = Path("runs") / "recipe" / "20260101-000000-abcdef"
    (folder / "teacher").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    for name, data in {"manifest": {"imports": []}, "results": {"status": "running", "seed": 0, "stages": {}}}.items():
        (folder / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
class TestFinishedRuns:
    @pytest.mark.parametrize(
        ("reference", "expected"),
        [
            ("nowhere", "nowhere is no run: no such folder, nor an id in runs/"),
            ("latest", "latest is no run: no such folder, nor an id in runs/"),
            ("latest/teacher", "latest/teacher is no run: no such folder, nor an id in runs/"),
            ("folder", "folder is a folder, but no run (it has no manifest.json)"),
            ("../..", "../.. is a folder, but no run (it has no manifest.json)"),
            ("folder/stage", "folder/stage is no run: no such folder"),
            ("a\0b", "a\\x00b is no run: no such folder"),
            ("/dev/zero", "/dev/zero is no run: no such folder"),
        ],
    )
    def test_that_are_none(self, command: str, reference: str, expected: str, refused: Refused) -> None:
        Path("folder").mkdir()
        [line] = refused(command, reference)
        assert line.startswith(expected)

    @pytest.mark.parametrize(
        ("reference", "overrides", "expected"),
        [
            ("abcdeg", [], "abcdeg is no run: no such folder, nor an id in runs/ (there are: 20260101-000000-abcdef)"),
            ("20260101-000000-abcdeg", [], "nor an id in runs/ (did you mean '20260101-000000-abcdef'?)"),
            ("latest/techer", [], "the run 20260101-000000-abcdef has no stage 'techer' (did you mean 'teacher'?)"),
            ("latest/teacher", ["data.batchsize=3"], "override data.batchsize=3: "),
            ("latest/teacher", ["data.batch_size=x"], "override data.batch_size=x: "),
            ("latest/teacher", ["seed=3"], "override seed=3: of a finished run only data and trainer can change"),
            ("latest/teacher", ["data"], "override data: "),
            ("latest/teacher", [], "teacher has no network.json: its stage "),
        ],
    )
    def test_in_part(
        self,
        command: str,
        reference: str,
        overrides: list[str],
        expected: str,
        made: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        before = sorted(Path().rglob("*"))
        assert main([command, reference, *overrides]) == 2
        err = capsys.readouterr().err
        assert expected in err
        assert "Traceback" not in err
        assert sorted(Path().rglob("*")) == before

    def test_whose_files_are_damaged(self, command: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for content in ("{", "[]", "\0"):
            (made / "manifest.json").write_text(content, encoding="utf-8")
            assert main([command, "latest"]) == 2
            assert "manifest.json" in capsys.readouterr().err


class TestOnlySeenInTraining:
    """What nobody can know before the data are there: the run says that it failed, and why."""

    def failed(self, text: str, capsys: pytest.CaptureFixture[str]) -> str:
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        assert main(["fit", "recipe.yaml", "stages.student=null"]) in (1, 2)
        err = capsys.readouterr().err
        assert "Traceback" not in err
        [results] = Path("runs").glob("recipe/*/results.json")
        assert json.loads(results.read_text(encoding="utf-8"))["status"] == "failed"
        return err

    def test_more_labels_than_there_are(self, capsys: pytest.CaptureFixture[str]) -> None:
        err = self.failed(RECIPE.replace("batch_size: 64", "labels: 100000"), capsys)
        assert "labels=100000, but the training split has 1258 labelled samples" in err

    def test_a_metric_that_nothing_logs(self, capsys: pytest.CaptureFixture[str]) -> None:
        err = self.failed(RECIPE.replace("every_seconds: 5", "monitor: val/acuracy, mode: max"), capsys)
        assert "no metric 'val/acuracy' was logged (did you mean 'val/accuracy'?)" in err
