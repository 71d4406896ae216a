"""The static checks: every unknown name, key and wire of a recipe with its exact place, and nothing imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lab import recipe, registry
from lab.api import load_recipe
from lab.check import check, component
from lab.document import Place, RecipeError
from lab.plan import Component, From
from lab.types import check_types

DATA = {entry.name: entry.load() for entry in registry.datamodules.entries()}
ANY_DATA = ", ".join(name for name, data in DATA.items() if "num_classes" in data.facts)
JUDGED_DATA = ", ".join(name for name, data in DATA.items() if "objective" in data.facts)
PAIRS = ("domains", "mnist_blend", "mnist_digits")
"""Data that yield something else than labelled batches unless they are told."""
EPISODIC = ("episodes", "sinusoid")
LABELLED_DATA = ", ".join(name for name in DATA if name not in (*PAIRS, *EPISODIC, "gym"))
IMAGE_DATA = ", ".join(name for name, data in DATA.items() if "in_channels" in data.facts)

RECIPE = """\
seed: 0
data: {name: digits, batch_size: 64}
trainer: {max_epochs: 1, strategy: auto}
callbacks: {early_stopping: {patience: 3}}
logger: [csv, {name: wandb, project: p}]
stages:
  teacher:
    module:
      name: supervised
      network: {name: mlp, hidden: [8], dropout: 0.1}
      objective: {name: classification, label_smoothing: 0.1}
      optimizer: {name: adam, lr: 0.01}
      scheduler: {name: one_cycle, max_lr: 0.01}
  student:
    module:
      name: distill
      network: {name: convnet, width: 4}
      teacher: [{from: teacher}, {name: mlp, hidden: [2]}]
      temperature: 4.0
"""


def said(text: str, *overrides: str) -> list[str]:
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    try:
        check(recipe.load("recipe.yaml", overrides))
    except RecipeError as error:
        return [str(problem).removeprefix("recipe.yaml:") for problem in error.problems]
    return []


def test_the_recipe_that_the_others_are_made_of_is_right() -> None:
    assert said(RECIPE) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('name: digits', 'name: digtis',
         ["2:14: data.name: no datamodule named 'digtis' (did you mean 'digits'?)"]),
        ('name: supervised', 'name: supervisd',
         ["9:13: stages.teacher.module.name: no module named 'supervisd' (did you mean 'supervised'?)"]),
        ('name: mlp, hidden: [8]', 'name: mpl',
         ["10:23: stages.teacher.module.network.name: no network named 'mpl' (did you mean 'mlp'?)"]),
        ('name: classification', 'name: clasification',
         ["11:25: stages.teacher.module.objective.name: no objective named 'clasification' (did you mean "
          "'classification'?)"]),
        ('early_stopping:', 'early_stoping:',
         ["4:13: callbacks.early_stoping: no callback named 'early_stoping' (did you mean 'early_stopping'?)"]),
        ('logger: [csv,', 'logger: [cvs,',
         ["5:10: logger: no logger named 'cvs' (did you mean 'csv'?)"]),
        ('name: wandb', 'name: wanddb',
         ["5:22: logger.name: no logger named 'wanddb' (did you mean 'wandb'?)"]),
        ('name: adam', 'name: adma',
         ["12:25: stages.teacher.module.optimizer.name: no optimizer named 'adma' (did you mean 'adam' or "
          "'radam' or 'nadam'?)"]),
        ('name: one_cycle', 'name: onecycle',
         ["13:25: stages.teacher.module.scheduler.name: no scheduler named 'onecycle' (did you mean "
          "'one_cycle'?)"]),
        ('name: mlp, hidden: [2]', 'name: mlpp',
         ["18:41: stages.student.module.teacher.1.name: no network named 'mlpp' (did you mean 'mlp'?)"]),
        ('name: mlp, hidden: [8]', 'name: classification',
         ["10:23: stages.teacher.module.network.name: no network named 'classification': it is an objective"]),
        ('name: adam', 'name: one_cycle',
         ["12:25: stages.teacher.module.optimizer.name: no optimizer named 'one_cycle': it is a scheduler"]),
        ('seed: 0', 'sede: 0',
         ["1:1: sede: unknown key (did you mean 'seed' or 'sweep'?)"]),
        ('  teacher:\n    module', '  teacher:\n    modul',
         ["8:5: stages.teacher.modul: unknown key (did you mean 'module'?)",
          '8:5: stages.teacher.module: a stage needs a module, such as `module: {name: supervised, ...}`']),
        ('batch_size: 64', 'batchsize: 64',
         ["2:22: data.batchsize: digits has no argument 'batchsize' (did you mean 'batch_size' or "
          "'eval_batch_size'?)"]),
        ('temperature: 4.0', 'temprature: 4.0',
         ["19:7: stages.student.module.temprature: distill has no argument 'temprature' (did you mean "
          "'temperature'?)"]),
        ('hidden: [8]', 'hiden: [8]',
         ["10:28: stages.teacher.module.network.hiden: mlp has no argument 'hiden' (did you mean 'hidden'?)"]),
        ('label_smoothing', 'label_smooting',
         ['11:41: stages.teacher.module.objective.label_smooting: classification has no argument '
          "'label_smooting' (did you mean 'label_smoothing'?)"]),
        ('lr: 0.01}', 'learning_rate: 0.01}',
         ["12:31: stages.teacher.module.optimizer.learning_rate: adam has no argument 'learning_rate' (there "
          'are: amsgrad, betas, capturable, decoupled_weight_decay, differentiable, eps, foreach, fused, lr, '
          'maximize, weight_decay)']),
        (', max_lr: 0.01', ', maxlr: 0.01',
         ["13:36: stages.teacher.module.scheduler.maxlr: one_cycle has no argument 'maxlr' (did you mean "
          "'max_lr'?)",
          "13:18: stages.teacher.module.scheduler: one_cycle needs the argument 'max_lr': float | list[float]"]),
        ('patience', 'patiense',
         ["4:30: callbacks.early_stopping.patiense: early_stopping has no argument 'patiense' (did you mean "
          "'patience'?)"]),
        ('project', 'projekt',
         ["5:29: logger.projekt: wandb has no argument 'projekt' (did you mean 'project'?)"]),
        ('max_epochs', 'max_epoch',
         ["3:11: trainer.max_epoch: the Trainer has no argument 'max_epoch' (did you mean 'max_epochs' or "
          "'min_epochs' or 'max_steps'?)"]),
        ('hidden: [2]', 'hidden_units: [2]',
         ["18:46: stages.student.module.teacher.1.hidden_units: mlp has no argument 'hidden_units' (did you "
          "mean 'hidden'?)"]),
        ('      network: {name: convnet, width: 4}\n', '',
         ["16:7: stages.student.module: distill needs the argument 'network': nn.Module"]),
        (', max_lr: 0.01', '',
         ["13:18: stages.teacher.module.scheduler: one_cycle needs the argument 'max_lr': float | list[float]"]),
        ('name: one_cycle, max_lr: 0.01', 'name: step',
         ["13:18: stages.teacher.module.scheduler: step needs the argument 'step_size': int"]),
        ('      teacher: [{from: teacher}, {name: mlp, hidden: [2]}]\n', '',
         ["16:7: stages.student.module: distill needs the argument 'teacher': Teacher | list[Teacher]"]),
        ('{name: digits, batch_size: 64}', 'arrays',
         ["2:7: data: arrays needs the argument 'path': ExistingFile"]),
        ('data: {name: digits, batch_size: 64}\n', '',
         ["9:16: stages.teacher.module.network: mlp needs the argument 'num_classes': Count (data would give "
          f'it: {ANY_DATA})',
          "9:16: stages.teacher.module.network: mlp needs the argument 'input_shape': tuple[Count, ...] "
          f'(data would give it: {ANY_DATA})',
          "10:18: stages.teacher.module.objective: classification needs the argument 'num_classes': "
          f'Annotated[int, Ge(2)] (data would give it: {ANY_DATA})',
          "15:7: stages.student.module: distill needs the argument 'objective': Objective (data would give "
          f'it: {JUDGED_DATA})',
          "16:16: stages.student.module.network: convnet needs the argument 'num_classes': Count (data would "
          f'give it: {ANY_DATA})',
          "16:16: stages.student.module.network: convnet needs the argument 'in_channels': Count (data would "
          f'give it: {IMAGE_DATA})',
          "17:34: stages.student.module.teacher.1: mlp needs the argument 'num_classes': Count (data would "
          f'give it: {ANY_DATA})',
          "17:34: stages.student.module.teacher.1: mlp needs the argument 'input_shape': tuple[Count, ...] "
          f'(data would give it: {ANY_DATA})']),
        ('{name: digits, batch_size: 64}', '3',
         ['2:7: data: expected a datamodule: its name, or a mapping with `name:` and its arguments; got a '
          'number']),
        ('{name: digits, batch_size: 64}', '{batch_size: 64}',
         ['2:7: data: expected a datamodule: its name, or a mapping with `name:` and its arguments; got a '
          'mapping of batch_size without `name:`']),
        ('      name: supervised\n', '      name: 3\n',
         ['9:13: stages.teacher.module: expected a module: its name, or a mapping with `name:` and its '
          'arguments; got a name that is a number']),
        ('{name: convnet, width: 4}', '{width: 4, class_path: x}',
         ['17:16: stages.student.module.network: expected a network: its name, or a mapping with `name:` and '
          'its arguments, or `from:` a stage; got a mapping of width, class_path without `name:`']),
        ('{name: convnet, width: 4}', '[convnet]',
         ['17:16: stages.student.module.network: expected a network: its name, or a mapping with `name:` and '
          'its arguments, or `from:` a stage; got a list']),
        ('{name: convnet, width: 4}', 'torch.nn.Linear',
         ["17:16: stages.student.module.network.name: 'torch.nn.Linear' is a dotted name: recipes build "
          'registered classes only; `--import torch` allows the classes of that package']),
        ('{name: adam, lr: 0.01}', '[adam]',
         ['12:18: stages.teacher.module.optimizer: expected an optimizer: its name, or a mapping with '
          '`name:` and its arguments; got a list']),
        ('{name: adam, lr: 0.01}', '{lr: 0.01}',
         ['12:18: stages.teacher.module.optimizer: expected an optimizer: its name, or a mapping with '
          '`name:` and its arguments; got a mapping of lr without `name:`']),
        ('objective: {name: classification, label_smoothing: 0.1}', 'objective: {from: student}',
         ['11:25: stages.teacher.module.objective.from: the stages wait for each other: teacher → student → '
          'teacher',
          '11:18: stages.teacher.module.objective: a stage gives a network; here an objective is wanted']),
        ('optimizer: {name: adam, lr: 0.01}', 'optimizer: {from: student}',
         ['12:25: stages.teacher.module.optimizer.from: the stages wait for each other: teacher → student → '
          'teacher',
          '12:18: stages.teacher.module.optimizer: a stage gives a network; here an optimizer is wanted']),
        ('data: {name: digits, batch_size: 64}', 'data: {from: teacher}',
         ["2:14: stages.teacher.data.from: the stage 'teacher' takes from itself",
          '2:7: data: a stage gives a network; here a datamodule is wanted']),
        ('{from: teacher}', '{from: teachr}',
         ["18:24: stages.student.module.teacher.0.from: no stage named 'teachr' (did you mean 'teacher'?)"]),
        ('{from: teacher}', '{from: student}',
         ["18:24: stages.student.module.teacher.0.from: the stage 'student' takes from itself"]),
        ('{from: teacher}', '{from: teacher, chekpoint: last}',
         ['18:33: stages.student.module.teacher.0.chekpoint: unknown option of `from` (did you mean '
          "'checkpoint'?)"]),
        ('{from: teacher}', '{from: teacher, checkpoint: lastt}',
         ["18:45: stages.student.module.teacher.0.checkpoint: expected best or last, got 'lastt'"]),
        ('{from: teacher}', '{from: teacher, head: [keep]}',
         ['18:39: stages.student.module.teacher.0.head: expected keep or reset, got ["keep"]']),
        ('{from: teacher}', '{from: teacher, name: mlp}',
         ['18:33: stages.student.module.teacher.0.name: unknown option of `from` (there are: checkpoint, '
          'head)']),
        ('{from: teacher}', '{from: no/run}',
         ['18:24: stages.student.module.teacher.0.from: no/run is no run: no such folder, nor an id in runs/']),
        ('{from: teacher}', '{from: [a]}',
         ['18:24: stages.student.module.teacher.0.from: expected a stage or RUN/stage, got a list']),
        ('{name: mlp, hidden: [8], dropout: 0.1}', '{from: student}',
         ['10:23: stages.teacher.module.network.from: the stages wait for each other: teacher → student → '
          'teacher']),
        ('max_epochs: 1', 'callbacks: []',
         ["3:11: trainer.callbacks: is lab's own: use the recipe's `callbacks`"]),
        ('max_epochs: 1', 'logger: csv',
         ["3:11: trainer.logger: is lab's own: use the recipe's `logger`"]),
        ('max_epochs: 1', 'fast_dev_run: true',
         ["3:11: trainer.fast_dev_run: is lab's own: use `lab fit --smoke`"]),
        ('max_epochs: 1', 'default_root_dir: x',
         ["3:11: trainer.default_root_dir: is lab's own: use `--out`"]),
        ('max_epochs: 1', 'enable_checkpointing: false',
         ["3:11: trainer.enable_checkpointing: is lab's own: use `callbacks: {checkpoints: null}` to have "
          'none']),
        ('max_epochs: 1', 'plugins: []',
         ["3:11: trainer.plugins: is lab's own: lab chooses them"]),
        ('max_epochs: 1', 'use_distributed_sampler: true',
         ["3:11: trainer.use_distributed_sampler: is lab's own: the datamodule shards its batches"]),
        ('max_epochs: 1', 'enable_progress_bar: false',
         ["3:11: trainer.enable_progress_bar: is lab's own: use `callbacks: {progress: null}` to have none"]),
        ('strategy: auto', 'strategy: {class_path: os.system}',
         ['3:36: trainer.strategy: expected a number or a name, got a mapping']),
        ('trainer: {max_epochs: 1, strategy: auto}', 'trainer: fast',
         ["3:10: trainer: expected a mapping of the Trainer's arguments, got text"]),
        ('callbacks: {early_stopping: {patience: 3}}', 'callbacks: [early_stopping]',
         ['4:12: callbacks: expected a mapping of callbacks by name, got a list']),
        ('{patience: 3}', '3',
         ['4:29: callbacks.early_stopping: expected a callback: its name, or a mapping with `name:` and its '
          'arguments; got a number']),
        ('early_stopping: {patience: 3}', 'mine: {patience: 3}',
         ["4:13: callbacks.mine: no callback named 'mine' (there are: activation_checkpointing, channels_last, "
          'checkpoints, compile, early_stopping, ema, evaluation, export, learning_rate, nan_guard, profile, '
          'progress, pruning, quantization, sharing)']),
        ('early_stopping: {patience: 3}', 'mine: {name: early_stoping}',
         ["4:26: callbacks.mine.name: no callback named 'early_stoping' (did you mean 'early_stopping'?)"]),
        ('early_stopping: {patience: 3}', 'mine: {from: teacher}',
         ["4:26: stages.teacher.callbacks.mine.from: the stage 'teacher' takes from itself",
          '4:19: callbacks.mine: a stage gives a network; here a callback is wanted']),
        ('seed: 0', 'seed: -1',
         ['1:7: seed: expected a whole number from 0 to 4294967295, got -1']),
        ('seed: 0', 'seed: true',
         ['1:7: seed: expected a whole number from 0 to 4294967295, got true']),
        ('seed: 0', 'seed: null',
         ['1:7: seed: expected a whole number from 0 to 4294967295, got null']),
        ('seed: 0', "seed: '0'",
         ["1:7: seed: expected a whole number from 0 to 4294967295, got '0'"]),
        ('seed: 0', 'global_batch_size: 0',
         ['1:20: global_batch_size: expected a whole number from 1, got 0']),
        ('seed: 0', 'global_batch_size: many',
         ["1:20: global_batch_size: expected a whole number from 1, got 'many'"]),
        ('seed: 0', 'global_batch_size: {size: 1.5}',
         ['1:27: global_batch_size.size: expected a whole number from 1, got 1.5']),
        ('seed: 0', 'global_batch_size: {size: null}',
         ['1:27: global_batch_size.size: expected a whole number from 1, got null']),
        ('seed: 0', 'global_batch_size: {sise: 128}',
         ["1:21: global_batch_size.sise: unknown key (did you mean 'size'?)",
          '1:20: global_batch_size: needs `size`, the samples of a step']),
        ('seed: 0', 'global_batch_size: {size: 128, base_size: 64}',
         ['1:32: global_batch_size.base_size: is for a rule: say scale_lr: linear or sqrt']),
        ('seed: 0', 'global_batch_size: {size: 128, scale_lr: linaer, base_size: 64}',
         ["1:42: global_batch_size.scale_lr: no rule 'linaer' (did you mean 'linear'?)"]),
        ('seed: 0', 'global_batch_size: {size: 128, scale_lr: 2, base_size: 64}',
         ['1:42: global_batch_size.scale_lr: no rule 2 (there are: linear, sqrt)']),
        ('  teacher:\n', '  teacher:\n    global_batch_size: {size: 128, scale_lr: sqrt}\n',
         ["8:46: stages.teacher.global_batch_size.scale_lr: sqrt needs base_size, the samples of a step that the "
          "recipe's learning rates are for"]),
        ('  teacher:\n', '  teacher:\n    global_batch_size: {size: 128, scale_lr: sqrt, base_size: 0}\n',
         ['8:63: stages.teacher.global_batch_size.base_size: expected a whole number from 1, got 0']),
        ('seed: 0', 'global_batch_size: {size: 128, scale_lr: linear, base_size: 64}',
         ["1:42: stages.student.global_batch_size.scale_lr: the recipe does not say distill's optimizer, which is "
          'AdamW as it comes: say `optimizer: {name: ..., lr: ...}` with the learning rate of base_size']),
        ('      optimizer: {name: adam, lr: 0.01}\n      scheduler: {name: one_cycle, max_lr: 0.01}\n',
         '      optimizer: null\n    global_batch_size: {size: 9, scale_lr: linear, base_size: 3}\n',
         ['13:44: stages.teacher.global_batch_size.scale_lr: supervised has no optimizer in the recipe whose learning '
          'rate could be scaled']),
        ('seed: 0', 'description: [a]',
         ['1:14: description: expected text, got a list']),
        ('seed: 0', 'require: [a]',
         ["1:10: require: expected a mapping such as {student.test/accuracy: '>= 0.95'}, got a list"]),
        ('seed: 0', "require: {test/accuracy: '> 0'}",
         ['1:11: require.test/accuracy: expected stage.metric (there are: student, teacher)']),
        ('seed: 0', "require: {techer.test/accuracy: '> 0'}",
         ["1:11: require.techer.test/accuracy: expected stage.metric (did you mean 'teacher'?)"]),
        ('seed: 0', 'require: {teacher.test/accuracy: 0.9}',
         ["1:34: require.teacher.test/accuracy: expected a bound such as '>= 0.95', '< 50_000' or "
          "'<= teacher / 4', got 0.9"]),
        ('  student:\n', '  student:\n    require: {test/loss: low}\n',
         ["15:26: stages.student.require.test/loss: expected a bound such as '>= 0.95', '< 50_000' or "
          "'<= teacher / 4', got 'low'"]),
        ('logger: [csv, {name: wandb, project: p}]', 'logger: 3',
         ['5:9: logger: expected a logger: its name, or a mapping with `name:` and its arguments; got a '
          'number']),
        ('logger: [csv, {name: wandb, project: p}]', 'logger: {project: p}',
         ['5:9: logger: expected a logger: its name, or a mapping with `name:` and its arguments; got a '
          'mapping of project without `name:`']),
    ],
)  # fmt: skip
def test_a_problem_is_said_where_it_stands_and_how_to_mend_it(old: str, new: str, expected: list[str]) -> None:
    assert old in RECIPE
    assert said(RECIPE.replace(old, new, 1)) == expected


def test_all_problems_are_said_at_once_and_each_once() -> None:
    wrong = {
        "digits": "digtis", "max_epochs": "max_epoch", "patience": "patiense", "csv": "cvs",
        "hidden: [8]": "hiden: [8]", "lr: 0.01}": "rl: 0.01}", "width": "widht", "{from: teacher}": "{from: techer}",
        "temperature": "temprature",
    }  # fmt: skip
    text = RECIPE
    for old, new in wrong.items():
        text = text.replace(old, new, 1)
    assert sorted(line.split(" ")[0] for line in said(text)) == [
        "10:28:", "12:31:", "17:32:", "18:24:", "19:7:", "2:14:", "3:11:", "4:30:", "5:10:"
    ]  # fmt: skip


def test_what_stages_inherit_is_said_once_and_without_a_stages_name() -> None:
    assert [line.partition(": ")[2].partition(":")[0] for line in said(RECIPE, "trainer.max_epoch=1")] == [
        "trainer.max_epoch"
    ]


def test_an_override_is_the_place_of_what_it_says() -> None:
    assert said(RECIPE, "stages.student.module.widht=4", "data.lables=3") == [
        "override data.lables=3: data.lables: digits has no argument 'lables' (did you mean 'labels'?)",
        "override stages.student.module.widht=4: stages.student.module.widht: distill has no argument 'widht' "
        "(did you mean 'weight'?)",
    ]
    assert said(RECIPE, "module=null") == [
        "override module=null: module: a stage needs a module, such as `module: {name: supervised, ...}`"
    ]


def test_wrong_data_do_not_make_the_module_wrong_too() -> None:
    for data in ("digtis", "3", "{from: nowhere/run}", "{name: [x]}"):
        lines = said(f"data: {data}\nmodule: {{name: supervised, network: mlp}}\n")
        assert len(lines) == 1
        assert "data" in lines[0]


def test_names_are_shown_as_they_are_and_not_obeyed() -> None:
    [line] = said('data: "\\e[31m[red]digits\\n"\nmodule: {name: supervised, network: mlp}\n')
    assert line.startswith("1:7: data.name: no datamodule named '\x1b[31m[red]digits\\n' (there are: arrays, ")


def test_data_that_the_module_cannot_consume_is_refused_and_data_that_fits_named() -> None:
    text = "data: sinusoid\nmodule: {name: supervised, network: mlp}\n"
    assert said(text) == [
        f"1:7: data: supervised consumes Labelled batches, sinusoid yields Episodes; data that fits: {LABELLED_DATA}"
    ]


@pytest.mark.parametrize(
    ("data", "module", "problem"),
    [
        ("mnist_blend", "supervised",
         "supervised consumes Labelled batches, mnist_blend yields SourceTarget; "
         "train_on: source or target gives them"),
        ("{name: mnist_blend, train_on: source}", "dann",
         "dann consumes SourceTarget batches, mnist_blend with train_on: source yields Labelled; "
         "train_on: both gives them"),
        ("digits", "dann",
         f"dann consumes SourceTarget batches, digits yields Labelled; data that fits: {', '.join(PAIRS)}"),
    ],
    ids=["both", "source", "labelled"],
)  # fmt: skip
def test_an_argument_that_decides_what_data_yield_is_named(data: str, module: str, problem: str) -> None:
    [line] = said(f"data: {data}\nmodule: {{name: {module}, network: mlp}}\n")
    assert line.partition(": ")[2] == f"data: {problem}"


def test_data_that_are_told_what_to_yield_fit() -> None:
    for data, module in (("{name: mnist_blend, train_on: target}", "supervised"), ("mnist_blend", "dann")):
        assert said(f"data: {data}\nmodule: {{name: {module}, network: mlp}}\n") == []


def test_data_of_a_module_that_says_nothing_about_batches_is_left_alone() -> None:
    @registry.modules.register("silent")
    class Silent(nn.Module):
        """Says neither what it consumes nor that it is no LightningModule."""

    try:
        assert said("data: sinusoid\nmodule: silent\n") == []
    finally:
        del registry.modules._registered["silent"]


@pytest.fixture
def anything() -> Iterator[None]:
    """A network whose arguments have annotations of many sorts."""

    @registry.networks.register("anything")
    class Anything(nn.Module):
        def __init__(  # type: ignore[no-untyped-def]  # one without an annotation is what some plugins have
            self, plain=None, options: dict[str, Any] | None = None, parts: dict[str, nn.Module] | None = None,
            path: Path | None = None, paths: list[Path] | None = None, body: nn.Module | None = None,
        ) -> None:  # fmt: skip
            super().__init__()

    yield
    del registry.networks._registered["anything"]


def network(text: str) -> Component:
    Path("recipe.yaml").write_text(
        f"data: digits\nmodule: {{name: supervised, network: {{name: anything, {text}}}}}\n", encoding="utf-8"
    )
    found = check(recipe.load("recipe.yaml")).stages["main"].module.arguments["network"]
    assert isinstance(found, Component)
    return found


@pytest.mark.usefixtures("anything")
class TestValues:
    @pytest.mark.parametrize(
        "text",
        ["options: {a: {name_: 1}, b: [1, {c: 2}]}", "options: {name: mlp, x: 1}", "plain: [a, [b]]", "plain: {a: 1}",
         "path: x", "paths: [x, y]", "body: null", "parts: {}"],
    )  # fmt: skip
    def test_data_stay_data(self, text: str) -> None:
        assert list(network(text).components()) == [network(text)]

    @pytest.mark.parametrize(
        "text",
        ["body: mlp", "body: {name: mlp}", "parts: {a: mlp}", "parts: {a: {name: mlp}}", "plain: {name: mlp}",
         "plain: [1, {name: mlp}]", "plain: {deep: [{er: {name: mlp}}]}"],
    )  # fmt: skip
    def test_components_are_found_however_deep_they_are(self, text: str) -> None:
        assert [c.name for c in network(text).components() if isinstance(c, Component)] == ["mlp", "anything"]

    def test_references_are_found_however_deep_they_are(self) -> None:
        text = "stages: {a: {module: &m {name: supervised, network: mlp}}, b: {module: {name: supervised, network: \
            {name: anything, plain: [{x: {from: a}}]}}}}\ndata: digits\n"
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        plan = check(recipe.load("recipe.yaml"))
        assert [c.source for c in plan.stages["b"].components() if isinstance(c, From)] == ["a"]
        assert plan.stages["b"].parents == ["a"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("body: {nmae: mlp}", "2:60: module.network.body: expected a network: its name, or a mapping with `name:` "
             "and its arguments, or `from:` a stage; got a mapping of nmae without `name:`"),
            ("body: [mlp]", "2:60: module.network.body: expected a network: its name, or a mapping with `name:` "
             "and its arguments, or `from:` a stage; got a list"),
            ("plain: {name: mlpp}", "2:68: module.network.plain.name: nothing is registered as 'mlpp' "
             "(did you mean 'mlp'?)"),
            ("parts: {a: {name: mlpp}}", "2:72: module.network.parts.a.name: no network named 'mlpp' "
             "(did you mean 'mlp'?)"),
        ],
    )  # fmt: skip
    def test_what_is_neither_is_said(self, text: str, expected: str) -> None:
        lines = said(f"data: digits\nmodule: {{name: supervised, network: {{name: anything, {text}}}}}\n")
        assert lines == [expected]


def test_a_component_of_plain_data_is_checked_the_same_way() -> None:
    with pytest.raises(
        RecipeError, match=r"^here: networks.hiden: mlp has no argument 'hiden' \(did you mean 'hidden'"
    ):
        component("networks", {"name": "mlp", "hiden": [1]}, Place("here"), ["num_classes", "input_shape"])
    found = component("networks", "mlp", Place("here"), ["num_classes", "input_shape"])
    assert found.filled == {"num_classes": "the data", "input_shape": "the data"}


def test_a_run_that_a_reference_cannot_mean_is_no_crash() -> None:
    for reference in ("x" * 5000 + "/y", '"a\\0b/c"', "../../..", "/", "latest/x"):
        text = f"data: digits\nmodule: {{name: supervised, network: {{from: {reference}}}}}\n"
        [line] = said(text)
        assert "module.network.from: " in line


class TestNothingIsImported:
    """``lab check`` answers from text: neither torch nor lightning nor the class that a recipe names is loaded."""

    def modules_after(self, text: str, *arguments: str) -> tuple[int, set[str]]:
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        program = (
            "import sys, json; from lab.cli import main; status = main(sys.argv[1:]);"
            "print(json.dumps([status, sorted({name.partition('.')[0] for name in sys.modules} |"
            " {name for name in sys.modules if name.startswith('lab.')})]))"
        )
        found = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, timeout=60
        )
        status, names = json.loads(found.stdout.splitlines()[-1])
        return status, set(names)

    @pytest.mark.parametrize("command", ["check", "fit"])
    def test_where_the_static_checks_fail(self, command: str) -> None:
        status, names = self.modules_after(RECIPE.replace("hidden: [8]", "hiden: [8]"), command, "recipe.yaml")
        assert status == 2
        assert not names & {"torch", "lightning", "pytorch_lightning", "torchmetrics", "pydantic", "numpy", "wandb"}
        assert not names & {"lab.networks.mlp", "lab.modules.supervised", "lab.build"}

    def test_where_a_recipe_is_shown(self) -> None:
        status, names = self.modules_after(RECIPE, "show", "recipe.yaml")
        assert status == 0
        assert not names & {"torch", "lightning", "pydantic", "numpy"}


def test_facts_that_only_running_tells_are_waited_for(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from lab.datamodules.digits import Digits\n\nclass More(Digits):\n    facts = (*Digits.facts, 'extra')\n"
    (own_folder / "more_digits.py").write_text(source)
    monkeypatch.syspath_prepend(str(own_folder))
    recipe = {"data": "more_digits.More", "module": {"name": "supervised", "network": "mlp"}}
    stage = load_recipe(recipe, imports=["more_digits"]).stages["main"]
    assert stage.module.filled["objective"] == "the data"


def test_functions_are_not_named_in_full(own_folder: Path) -> None:
    recipe = {
        "data": "digits",
        "module": {"name": "supervised", "network": {"name": "os.system", "command": "touch x"}},
    }
    plan = load_recipe(recipe, imports=["os"])
    with pytest.raises(RecipeError, match=r"os\.system is no class: --import allows a package's classes only"):
        check_types(plan)
    assert not (own_folder / "x").exists()
