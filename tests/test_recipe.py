"""Recipes: how files, stages and overrides merge, in which order stages run, what a resolved recipe is."""

from __future__ import annotations

import itertools
import os
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from lab import document, recipe
from lab.build import Builder
from lab.check import check
from lab.cli import main
from lab.document import Node, Place, RecipeError
from lab.plan import Component, Plan
from lab.recipe import Recipe


def write(text: str, path: str = "recipe.yaml") -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(textwrap.dedent(text), encoding="utf-8")
    return Path(path)


def load(text: str, *overrides: str) -> Recipe:
    return recipe.load(write(text), overrides)


def only(text: str, *overrides: str) -> Any:
    """The one stage of a recipe, as plain data."""
    found = load(text, *overrides)
    assert not found.problems, found.problems
    return found.stages["main"].plain()


def stages(text: str, *overrides: str) -> dict[str, Any]:
    found = load(text, *overrides)
    assert not found.problems, found.problems
    return {name: node.plain() for name, node in found.stages.items()}


def said(text: str, *overrides: str) -> list[str]:
    try:
        return [str(problem) for problem in load(text, *overrides).problems]
    except RecipeError as error:
        return [str(problem) for problem in error.problems]


def merged(base: Any, over: Any) -> Any:
    here = Place("here")
    return recipe.merge(Node.of(base, here), Node.of(over, here)).plain()


class TestMerge:
    @pytest.mark.parametrize(
        ("base", "over", "expected"),
        [
            ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
            ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 3}}}, {"a": {"b": {"c": 3, "d": 2}}}),
            ({"a": [1, 2, 3]}, {"a": [4]}, {"a": [4]}),
            ({"a": [1, 2, 3]}, {"a": []}, {"a": []}),
            ({"a": {"b": 1}}, {"a": None}, {"a": None}),
            ({"a": None}, {"a": {"b": 1}}, {"a": {"b": 1}}),
            ({"a": 1}, {"a": {"b": 1}}, {"a": {"b": 1}}),
            ({"a": {"b": 1}}, {"a": {}}, {"a": {"b": 1}}),
        ],
    )
    def test_mappings_merge_and_everything_else_is_replaced(self, base: Any, over: Any, expected: Any) -> None:
        assert merged(base, over) == expected

    @pytest.mark.parametrize(
        ("base", "over", "expected"),
        [
            ({"name": "mlp", "hidden": [1]}, {"dropout": 0.1}, {"name": "mlp", "hidden": [1], "dropout": 0.1}),
            ({"name": "mlp", "hidden": [1]}, {"name": "mlp", "dropout": 0.1},
             {"name": "mlp", "hidden": [1], "dropout": 0.1}),
            ({"name": "mlp", "hidden": [1]}, {"name": "convnet", "width": 4}, {"name": "convnet", "width": 4}),
            ({"name": "mlp", "hidden": [1]}, {"name": "convnet"}, {"name": "convnet"}),
            ({"name": "mlp", "hidden": [1]}, "convnet", "convnet"),
            ({"name": "mlp", "hidden": [1]}, "mlp", "mlp"),
            ("mlp", {"hidden": [1]}, {"name": "mlp", "hidden": [1]}),
            ("mlp", {"name": "convnet"}, {"name": "convnet"}),
            ("mlp", {}, {"name": "mlp"}),
            ({"hidden": [1]}, {"name": "mlp"}, {"hidden": [1], "name": "mlp"}),
            ({"name": "mlp", "hidden": [1]}, {"from": "a"}, {"from": "a"}),
            ({"from": "a", "head": "reset"}, {"name": "mlp"}, {"name": "mlp"}),
            ({"from": "a", "head": "reset"}, {"from": "b"}, {"from": "b"}),
            ({"from": "a", "head": "reset"}, {"from": "a", "checkpoint": "last"},
             {"from": "a", "head": "reset", "checkpoint": "last"}),
            ({"from": "a"}, {"checkpoint": "last"}, {"from": "a", "checkpoint": "last"}),
            ("mlp", {"from": "a"}, {"from": "a"}),
            ({"name": "mlp", "hidden": [1]}, None, None),
        ],
    )  # fmt: skip
    def test_another_name_drops_the_old_components_arguments(self, base: Any, over: Any, expected: Any) -> None:
        assert merged({"network": base}, {"network": over}) == {"network": expected}

    def test_a_merged_value_keeps_the_place_of_the_file_that_said_it(self) -> None:
        write("data: {name: digits, labels: 5}\nmodule: {name: supervised}\n", "base.yaml")
        found = load("extends: base.yaml\ndata: {batch_size: 3}\n").stages["main"].mapping["data"].mapping
        assert str(found["labels"].place) == "base.yaml:1:30"
        assert str(found["batch_size"].place) == "recipe.yaml:2:20"


class TestExtends:
    def test_a_chain_of_files_merges_from_its_far_end(self) -> None:
        write("seed: 1\ntrainer: {max_epochs: 1, precision: 32, devices: 1}\n", "a.yaml")
        write("extends: a.yaml\ntrainer: {max_epochs: 2, precision: 64}\n", "b.yaml")
        assert only("extends: b.yaml\ntrainer: {max_epochs: 3}\n") == {
            "seed": 1, "trainer": {"max_epochs": 3, "precision": 64, "devices": 1}
        }  # fmt: skip

    def test_of_several_files_the_later_wins_and_the_recipe_over_all(self) -> None:
        write("seed: 1\ndata: {name: digits, labels: 5}\n", "a.yaml")
        write("seed: 2\ndata: mnist5k\n", "b.yaml")
        assert only("extends: [a.yaml, b.yaml]\n") == {"seed": 2, "data": "mnist5k"}
        assert only("extends: [b.yaml, a.yaml]\nseed: 3\n") == {"seed": 3, "data": {"name": "digits", "labels": 5}}

    def test_a_bundled_recipe_goes_by_its_name(self) -> None:
        assert only("extends: supervised\nseed: 7\n")["module"]["name"] == "supervised"
        assert recipe.load({"extends": "supervised", "seed": 7}).stages["main"].mapping["seed"].value == 7

    def test_a_path_is_relative_to_the_file_that_says_it(self) -> None:
        write("seed: 5\n", "there/deep/base.yaml")
        write("extends: deep/base.yaml\n", "there/middle.yaml")
        assert only("extends: there/middle.yaml\n") == {"seed": 5}

    def test_stages_of_the_base_are_edited_removed_and_added(self) -> None:
        write("stages:\n  a: {seed: 1}\n  b: {seed: 2}\n", "base.yaml")
        found = stages("extends: base.yaml\nstages:\n  a: {trainer: {devices: 1}}\n  b: null\n  c: {}\n")
        assert found == {"a": {"seed": 1, "trainer": {"devices": 1}}, "c": {}}

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("recipe.yaml", "recipe.yaml:1:10: extends: 'recipe.yaml' extends itself"),
            ("none.yaml", "recipe.yaml:1:10: extends: none.yaml: no such file"),
            (".", "recipe.yaml:1:10: extends: .: is a folder, not a file"),
            ("''", "recipe.yaml:1:10: extends: .: is a folder, not a file"),
            ("3", "recipe.yaml:1:10: extends: expected a file or a bundled recipe's name, got a number"),
            ("[supervised, [x]]", "recipe.yaml:1:23: extends: expected a file or a bundled recipe's name, got a list"),
            ("{}", "recipe.yaml:1:10: extends: expected a file or a bundled recipe's name, got a mapping"),
            ("supervisd", "recipe.yaml:1:10: extends: no such file, and no bundled recipe of that name "
                          "(did you mean 'supervised'?)"),
            ("empty.yaml", "recipe.yaml:1:10: extends: empty.yaml: is empty"),
            ("loop.yaml", "recipe.yaml:1:10: extends: loop.yaml: is a link that leads nowhere"),
            ("pipe.yaml", "recipe.yaml:1:10: extends: pipe.yaml: is no file but a pipe or a device"),
            ("broken.yaml", "broken.yaml:2:1: not YAML: did not find expected node content"),
            ("list.yaml", "list.yaml:1:1: a recipe is a mapping, not a list"),
            ("x" * 300 + ".yaml", "File name too long"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_extended_is_said_where_it_is_asked_for(self, value: str, expected: str) -> None:
        write("", "empty.yaml")
        write("a: [1,\n", "broken.yaml")
        write("- a\n", "list.yaml")
        Path("loop.yaml").symlink_to("loop.yaml")
        os.mkfifo("pipe.yaml")
        found = said(f"extends: {value}\n")
        assert len(found) == 1
        assert expected in found[0]
        assert found[0].startswith(("recipe.yaml:1:", "broken.yaml:2:", "list.yaml:1:"))

    def test_a_circle_of_files_is_an_error_and_not_a_hang(self) -> None:
        write("extends: recipe.yaml\n", "b.yaml")
        assert said("extends: b.yaml\n") == ["b.yaml:1:10: extends: 'recipe.yaml' extends itself"]

    def test_a_circle_through_a_link_is_seen_too(self) -> None:
        Path("other.yaml").symlink_to("recipe.yaml")
        assert said("extends: other.yaml\n") == ["recipe.yaml:1:10: extends: 'other.yaml' extends itself"]

    def test_files_that_extend_the_same_files_twice_are_read_soon(self) -> None:
        write("seed: 3\n", "f0.yaml")
        for i in range(1, 40):
            write(f"extends: [f{i - 1}.yaml, f{i - 1}.yaml]\n", f"f{i}.yaml")
        assert only("extends: f39.yaml\n") == {"seed": 3}

    def test_a_chain_without_end_is_refused(self) -> None:
        write("seed: 3\n", "f0.yaml")
        for i in range(1, 2000):
            Path(f"f{i}.yaml").write_text(f"extends: f{i - 1}.yaml\n", encoding="utf-8")
        assert [re.sub(r"f\d+", "f", line) for line in said("extends: f1999.yaml\n")] == [
            "f.yaml:1:10: extends: more than 64 files deep"
        ]


STAGES = """\
seed: 1
data: {name: digits, batch_size: 8}
trainer: {max_epochs: 2}
module: {name: supervised, network: {name: mlp, hidden: [4, 5]}}
stages:
  teacher: {}
  student:
    data: {labels: 10}
    trainer: {max_epochs: 3}
    module: {network: {name: convnet, width: 4}}
"""


class TestStages:
    def test_inherit_the_top_level_merged_deeply(self) -> None:
        found = stages(STAGES)
        assert found["teacher"] == {
            "seed": 1, "data": {"name": "digits", "batch_size": 8}, "trainer": {"max_epochs": 2},
            "module": {"name": "supervised", "network": {"name": "mlp", "hidden": [4, 5]}},
        }  # fmt: skip
        assert found["student"]["data"] == {"name": "digits", "batch_size": 8, "labels": 10}
        assert found["student"]["module"] == {"name": "supervised", "network": {"name": "convnet", "width": 4}}

    def test_do_not_inherit_the_description_or_the_gates(self) -> None:
        found = stages("description: x\nrequire: {a.test/accuracy: '> 0'}\nseed: 1\nstages: {a: {}}\n")
        assert found == {"a": {"seed": 1}}

    def test_a_recipe_without_stages_is_one(self) -> None:
        assert stages("seed: 1\nrequire: {test/accuracy: '> 0'}\n") == {
            "main": {"seed": 1, "require": {"test/accuracy": "> 0"}}
        }  # fmt: skip
        assert stages("seed: 1\nstages: {}\n") == stages("seed: 1\nstages: null\n") == {"main": {"seed": 1}}

    def test_that_are_null_are_not_there(self) -> None:
        assert list(stages("stages: {a: null, b: {}}\n")) == ["b"]

    def test_none_left_is_an_error(self) -> None:
        assert said("stages: {a: null}\n") == [
            "recipe.yaml:1:1: stages: every stage is null: there is nothing to train"
        ]
        assert said("stages: {a: {}}\n", "stages.a=null")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("stages: [a]\n", "recipe.yaml:1:9: stages: expected a mapping of stages, got a list"),
            ("stages: {a: 3}\n", "recipe.yaml:1:13: stages.a: expected a mapping, got a number"),
            ("stages: {a: [x]}\n", "recipe.yaml:1:13: stages.a: expected a mapping, got a list"),
            ("stages: {A: {}}\n", "recipe.yaml:1:10: stages.A: a stage's name is lower case: [a-z][a-z0-9_]*"),
            ("stages: {a/b: {}}\n", "recipe.yaml:1:10: stages.a/b: a stage's name is lower case: [a-z][a-z0-9_]*"),
            ("stages: {../x: {}}\n", "recipe.yaml:1:10: stages.../x: a stage's name is lower case: [a-z][a-z0-9_]*"),
            ("stages: {a: {seeed: 1}}\n", "recipe.yaml:1:14: stages.a.seeed: unknown key (did you mean 'seed'?)"),
            ("stages: {a: {extends: b}}\n", "recipe.yaml:1:14: stages.a.extends: unknown key (there are: callbacks, "
             "data, global_batch_size, logger, module, require, seed, trainer)"),
            ("moduel: {}\n", "recipe.yaml:1:1: moduel: unknown key (did you mean 'module'?)"),
        ],
    )  # fmt: skip
    def test_that_are_wrong_are_said(self, text: str, expected: str) -> None:
        assert said(text) == [expected]

    def test_one_that_is_no_mapping_is_not_unknown_as_well(self) -> None:
        assert said("stages:\n  a: 3\n  b: {module: {network: {from: a}}}\n") == [
            "recipe.yaml:2:6: stages.a: expected a mapping, got a number"
        ]

    def test_one_that_is_null_cannot_be_taken_from(self) -> None:
        assert said("stages:\n  a: null\n  b: {module: {network: {from: a}}}\n") == [
            "recipe.yaml:3:32: stages.b.module.network.from: no stage named 'a' (there are: b)"
        ]


def chain(*names: str) -> str:
    """Stages in the file's order, each taking from the one named before it in the alphabet."""
    needs = {"b": "a", "c": "b", "d": "c"}
    lines = [f"  {n}: {{module: {{network: {{from: {needs[n]}}}}}}}" if n in needs else f"  {n}: {{}}" for n in names]
    return "\n".join(["stages:", *lines, ""])


class TestOrder:
    @pytest.mark.parametrize("names", list(itertools.permutations("abcd")), ids="".join)
    def test_stages_run_after_those_that_they_take_from(self, names: tuple[str, ...]) -> None:
        assert load(chain(*names)).order == ["a", "b", "c", "d"]

    def test_the_files_order_decides_among_equals(self) -> None:
        assert load("stages: {z: {}, b: {module: {x: {from: z}}}, a: {}}\n").order == ["z", "b", "a"]

    def test_a_reference_in_lists_and_mappings_counts(self) -> None:
        found = load("stages:\n  b: {module: {teacher: [1, {x: {from: a}}]}}\n  a: {}\n")
        assert (found.order, found.problems) == (["a", "b"], [])

    def test_a_run_is_no_stage(self) -> None:
        assert load("stages: {b: {module: {network: {from: a/b}}}, a: {}}\n").order == ["b", "a"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("stages: {a: {module: {n: {from: a}}}}\n",
             "recipe.yaml:1:33: stages.a.module.n.from: the stage 'a' takes from itself"),
            ("stages:\n  a: {module: {n: {from: b}}}\n  b: {module: {n: {from: a}}}\n",
             "recipe.yaml:2:26: stages.a.module.n.from: the stages wait for each other: a → b → a"),
            ("stages:\n  x: {module: {n: {from: a}}}\n  a: {module: {n: {from: b}}}\n  b: {module: {n: {from: a}}}\n",
             "recipe.yaml:3:26: stages.a.module.n.from: the stages wait for each other: a → b → a"),
            ("stages: {teacher: {}, b: {module: {n: {from: taecher}}}}\n",
             "recipe.yaml:1:46: stages.b.module.n.from: no stage named 'taecher' (did you mean 'teacher'?)"),
            ("stages: {b: {module: {n: {from: 3}}}}\n",
             "recipe.yaml:1:33: stages.b.module.n.from: expected a stage or RUN/stage, got a number"),
            ("module: {n: {from: a}}\n", "recipe.yaml:1:20: module.n.from: no stage named 'a' (there are none)"),
            ("module: {n: {from: main}}\n", "recipe.yaml:1:20: module.n.from: no stage named 'main' (there are none)"),
        ],
    )  # fmt: skip
    def test_wrong_wiring_is_said_where_it_stands(self, text: str, expected: str) -> None:
        assert said(text) == [expected]

    def test_many_stages_are_ordered_soon(self) -> None:
        lines = [f"  s{i}: {{module: {{n: {{from: s{i - 1}}}}}}}" for i in range(800, 0, -1)]
        assert load("\n".join(["stages:", *lines, "  s0: {}", ""])).order == [f"s{i}" for i in range(801)]


class TestOverrides:
    def test_a_top_level_override_wins_over_what_stages_say_themselves(self) -> None:
        found = stages(STAGES, "trainer.max_epochs=9")
        assert [stage["trainer"]["max_epochs"] for stage in found.values()] == [9, 9]

    def test_a_stages_override_wins_over_a_top_level_one_whatever_their_order(self) -> None:
        both = ["trainer.max_epochs=9", "stages.student.trainer.max_epochs=8"]
        for overrides in (both, both[::-1]):
            found = stages(STAGES, *overrides)
            assert [stage["trainer"]["max_epochs"] for stage in found.values()] == [9, 8]

    def test_of_two_for_one_path_the_later_wins(self) -> None:
        assert stages(STAGES, "seed=2", "seed=3")["teacher"]["seed"] == 3

    def test_overrides_win_over_what_is_extended(self) -> None:
        write(STAGES, "base.yaml")
        assert stages("extends: base.yaml\nseed: 2\n", "seed=3")["student"]["seed"] == 3

    @pytest.mark.parametrize(
        ("override", "path", "expected"),
        [
            ("data.batch_size=16", "data", {"name": "digits", "batch_size": 16}),
            ("data.labels=5", "data", {"name": "digits", "batch_size": 8, "labels": 5}),
            ("data={labels: 5}", "data", {"name": "digits", "batch_size": 8, "labels": 5}),
            ("data=mnist5k", "data", "mnist5k"),
            ("data={name: mnist5k}", "data", {"name": "mnist5k"}),
            ("data.name=mnist5k", "data", {"name": "mnist5k"}),
            ("data.name=digits", "data", {"name": "digits", "batch_size": 8}),
            ("data=null", "data", None),
            ("data=", "data", None),
            ("data=NULL", "data", None),
            ("data.labels=null", "data", {"name": "digits", "batch_size": 8, "labels": None}),
            (" trainer . max_epochs = 5 ", "trainer", {"max_epochs": 5}),
            ("trainer.max_epochs=1e1", "trainer", {"max_epochs": 10.0}),
            ("trainer.max_epochs='5'", "trainer", {"max_epochs": "5"}),
            ("trainer.max_time=00:00:01:00", "trainer", {"max_epochs": 2, "max_time": "00:00:01:00"}),
            ("trainer.precision=a=b", "trainer", {"max_epochs": 2, "precision": "a=b"}),
            ("callbacks.early_stopping.patience=3", "callbacks", {"early_stopping": {"patience": 3}}),
            ("callbacks.checkpoints=null", "callbacks", {"checkpoints": None}),
            ("logger=[csv, wandb]", "logger", ["csv", "wandb"]),
        ],
    )
    def test_an_override_is_a_yaml_value_at_a_path(self, override: str, path: str, expected: Any) -> None:
        assert stages(STAGES, override)["teacher"][path] == expected

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("module.network.hidden=[7]", {"name": "mlp", "hidden": [7]}),
            ("module.network.hidden.0=7", {"name": "mlp", "hidden": [7, 5]}),
            ("module.network.hidden.1=7", {"name": "mlp", "hidden": [4, 7]}),
            ("module.network={dropout: 0.5}", {"name": "mlp", "hidden": [4, 5], "dropout": 0.5}),
            ("module.network=mlp", "mlp"),
            ("module.network.name=mlp", {"name": "mlp", "hidden": [4, 5]}),
            ("module.network.name=convnet", {"name": "convnet"}),
            ("module.network.from=student", {"from": "student"}),
            ("module.network={from: student}", {"from": "student"}),
        ],
    )
    def test_overrides_merge_by_the_rule_that_files_merge_by(self, override: str, expected: Any) -> None:
        assert stages(STAGES, f"stages.teacher.{override}")["teacher"]["module"]["network"] == expected

    def test_an_argument_of_a_bare_name_makes_it_a_mapping(self) -> None:
        assert only("data: digits\n", "data.labels=5") == {"data": {"name": "digits", "labels": 5}}
        assert only("logger: [csv, wandb]\n", "logger.1.project=x") == {
            "logger": ["csv", {"name": "wandb", "project": "x"}]
        }

    def test_a_whole_stage_merges_or_goes(self) -> None:
        found = stages(STAGES, "stages.student={seed: 4, trainer: {devices: 1}}")["student"]
        assert (found["seed"], found["trainer"]) == (4, {"max_epochs": 3, "devices": 1})
        assert list(stages(STAGES, "stages.student=null")) == ["teacher"]
        assert stages(STAGES, "stages={teacher: {seed: 4}, student: null}").keys() == {"teacher"}

    def test_the_description_and_the_gates_can_be_overridden(self) -> None:
        found = load(STAGES, "description=other", "require={student.test/accuracy: '> 0'}")
        assert (found.description, found.problems) == ("other", [])
        assert found.top.mapping["require"].plain() == {"student.test/accuracy": "> 0"}

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("trainer.max_epochs", "an override is key=value, such as trainer.max_epochs=3"),
            ("=3", "an override is key=value, such as trainer.max_epochs=3"),
            ("trainer.=3", "an override is key=value, such as trainer.max_epochs=3"),
            ("trainer..x=3", "an override is key=value, such as trainer.max_epochs=3"),
            (".=3", "an override is key=value, such as trainer.max_epochs=3"),
            ("", "an override is key=value, such as trainer.max_epochs=3"),
            ("trainr.max_epochs=3", "trainr: no such key at the top of a recipe (did you mean 'trainer'?)"),
            ("extends=supervised", "extends: no such key at the top of a recipe (there are: callbacks, data, "),
            ("student.seed=3", "student: no such key at the top of a recipe (there are: "),
            ("stages.studnt.seed=3", "stages.studnt: no such stage (did you mean 'student'?)"),
            ("stages.student.sed=3", "stages.student.sed: unknown key of a stage (did you mean 'seed'?)"),
            ("stages.student={sed: 3}", "stages.student.sed: unknown key (did you mean 'seed'?)"),
            ("stages.student=3", "stages.student: expected a mapping, got a number"),
            ("stages=3", "stages: expected a mapping of stages, got a number"),
            ("stages=null", "stages: expected a mapping of stages, got nothing"),
            ("stages={studnt: {}}", "stages.studnt: no such stage (did you mean 'student'?)"),
            ("trainer.max_epochs.x=3",
             "trainer.max_epochs.x: trainer.max_epochs is a number: there is nothing below it"),
            ("stages.teacher.module.network.hidden.2=3",
             "module.network.hidden.2: the list at module.network.hidden has the positions 0 to 1"),
            ("stages.teacher.module.network.hidden.-1=3",
             "module.network.hidden.-1: the list at module.network.hidden has the positions 0 to 1"),
            ("stages.teacher.module.network.hidden.²=3",
             "module.network.hidden.²: the list at module.network.hidden has the positions 0 to 1"),
            ("seed=[1", "not YAML: did not find expected"),
            ("seed=!!python/object/apply:os.system [ls]", "the tag !!python/object/apply:os.system is not allowed"),
            ("seed={a: 1, a: 2}", "a: the key stands twice in one mapping"),
            ("seed=*a", "the alias *a names no finished anchor"),
            ("seed=" + "[" * 65, "more than 64 levels deep"),
            (".".join(["module", *["a"] * 3000]) + "=1", "more than 64 levels deep"),
            ("seed=" + "9" * 30, "a whole number of more than 64 bits"),
            ("description=\udcff", "is no UTF-8 text (character 1)"),
        ],
    )  # fmt: skip
    def test_a_wrong_override_is_named_in_full(self, override: str, expected: str) -> None:
        [found] = said(STAGES, override)
        assert found.startswith(f"override {override[:80]}")
        assert expected in found

    def test_every_wrong_override_is_said(self) -> None:
        assert len(said(STAGES, "trainr.x=1", "stages.x.y=1", "seed=2")) == 2

    def test_a_recipe_without_stages_says_so(self) -> None:
        assert said("seed: 1\n", "stages.a.seed=2") == ["override stages.a.seed=2: stages.a: this recipe has no stages"]

    def test_an_empty_list_has_no_positions(self) -> None:
        assert said("logger: []\n", "logger.0=csv") == ["override logger.0=csv: logger.0: the list at logger is empty"]


class TestFind:
    def test_a_file_goes_before_a_bundled_recipe_of_its_name(self) -> None:
        assert recipe.find("supervised") == recipe.bundled()["supervised"]
        write("seed: 1\n", "supervised")
        assert recipe.find("supervised") == Path("supervised")

    def test_an_unknown_name_has_the_nearest_bundled_one(self) -> None:
        with pytest.raises(
            RecipeError,
            match=r"no bundled recipe of that name \(did you mean 'distill' or 'distill_qat' or 'distill_ddp'\?\)",
        ):
            recipe.find("distil")

    def test_a_name_that_no_file_can_have_is_no_crash(self) -> None:
        for name in ("x" * 5000, "a\0b"):
            with pytest.raises(RecipeError, match="no such file, and no bundled recipe"):
                recipe.find(name)

    @pytest.mark.parametrize(
        ("file", "name"),
        [("my recipe.yaml", "my_recipe"), ("a/b.c.yaml", "b.c"), ("...yaml", "recipe"), ("é!.yaml", "_"), ("r", "r")],
    )
    def test_the_name_of_its_runs_is_a_plain_folders(self, file: str, name: str) -> None:
        assert recipe.load(write("seed: 1\n", file)).name == name

    def test_what_is_no_mapping_is_no_recipe(self) -> None:
        assert said("- a\n") == ["recipe.yaml:1:1: a recipe is a mapping, not a list"]
        assert said("a\n") == ["recipe.yaml:1:1: a recipe is a mapping, not text"]


CHAIN = """\
description: 'a: [b] # {c}'
seed: 3
data: {name: digits, batch_size: 8, labels: 100}
trainer: {max_epochs: 2, precision: 32-true}
callbacks: {early_stopping: {patience: 3, min_delta: 1e-3}, checkpoints: null, again: {name: learning_rate}}
logger: [csv, {name: wandb, tags: ['yes', '1e-3', a b]}]
require: {student.test/accuracy: '>= 0.000001', teacher.n_test: == 3}
stages:
  student:
    data: {labels: null}
    module:
      name: distill
      network: {name: convnet, width: 4}
      teacher: [{from: teacher}, {from: old, checkpoint: last}]
      teacher_weights: [1.0, 2.0]
    require: {val/accuracy: '< 1'}
  teacher:
    module: {name: supervised, network: {name: mlp, hidden: [], dropout: 0.0}, optimizer: sgd}
  old:
    seed: 4
    module: {name: supervised, network: {from: teacher, head: reset}, scheduler: {name: one_cycle, max_lr: .1}}
"""


def resolved(source: str | Path, *overrides: str) -> Plan:
    return check(recipe.load(source, overrides))


class TestResolved:
    @pytest.mark.parametrize(
        ("source", "overrides"),
        [
            (CHAIN, []),
            (CHAIN, ["stages.old.module.network=lenet", "seed=9", "callbacks.early_stopping=null"]),
            (CHAIN, ["stages.student=null", "require=null"]),
            (STAGES, []),
            (STAGES, ["trainer=null"]),
            (STAGES, ["stages.student=null"]),
            ("data: digits\nmodule: {name: supervised, network: mlp}\nrequire: {test/loss: <= .5}\n", []),
            ("data: digits\nmodule: {name: supervised, network: mlp}\nlogger: false\n", []),
            ("extends: distill\n", ["logger=null"]),
            ("extends: supervised\n", []),
            ("data: {name: digits, drop_last: yes, batch_size: x}\nmodule: {name: supervised, network: mlp}\n", []),
        ],
    )
    def test_a_resolved_recipe_resolves_to_itself(self, source: str, overrides: list[str]) -> None:
        plan = resolved(write(source), *overrides)
        again = resolved(write(document.dump(plan.resolved()), "again.yaml"))
        assert again.resolved() == plan.resolved()
        assert document.dump(again.resolved()) == document.dump(plan.resolved())
        assert list(again.stages) == list(plan.stages)
        for name, stage in plan.stages.items():
            assert again.stages[name].plain() == stage.plain()
            assert {c.path: c.filled for c in again.stages[name].components() if isinstance(c, Component)} == {
                c.path: c.filled for c in stage.components() if isinstance(c, Component)
            }

    @pytest.mark.parametrize("name", sorted(recipe.bundled()))
    def test_what_lab_show_prints_is_a_recipe_that_shows_the_same(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["show", name, "seed=5"]) == 0
        first = capsys.readouterr().out
        write(first, "shown.yaml")
        assert main(["show", "shown.yaml"]) == 0
        second = capsys.readouterr().out
        assert second.partition("\n#")[0] == first.partition("\n#")[0]
        assert sorted(second.splitlines()) == sorted(first.splitlines())

    def test_swapped_stages_mean_the_same(self) -> None:
        head, student, teacher, old = re.split(r"(?m)^(?=  \w+:\n)", CHAIN)
        plans = [resolved(write(head + "".join(parts))) for parts in itertools.permutations((student, teacher, old))]
        assert all(plan.resolved() == plans[0].resolved() for plan in plans)
        assert {tuple(plan.stages) for plan in plans} == {("teacher", "old", "student")}

    def test_defaults_are_said_and_what_lab_fills_is_left_out(self) -> None:
        found = resolved(write(STAGES), "stages.student=null").resolved()
        assert found["module"]["network"] == {"name": "mlp", "hidden": [4, 5], "dropout": 0.0, "activation": "relu"}
        assert "seed" not in found["data"]
        assert "objective" not in found["module"]

    @pytest.mark.parametrize(
        ("bound", "said"),
        [
            ("0.1234567890123",) * 2,
            ("1e-06",) * 2,
            ("1e+16",) * 2,
            ("-3.5",) * 2,
            (".5", "0.5"),
            ("50_000", "50000"),
            ("0", "0"),
        ],
    )
    def test_gates_keep_their_bound_to_the_last_digit(self, bound: str, said: str) -> None:
        text = f"data: digits\nmodule: {{name: supervised, network: mlp}}\nrequire: {{test/loss: '>={bound}'}}\n"
        plan = resolved(write(text))
        assert plan.resolved()["require"] == {"test/loss": f">= {said}"}
        assert resolved(write(document.dump(plan.resolved()))).stages["main"].gates[0].bound == float(bound)

    def test_gates_of_the_top_and_of_a_stage_come_together(self) -> None:
        gates = resolved(write(CHAIN)).stages["student"].gates
        assert [(gate.metric, gate.relation, gate.bound) for gate in gates] == [
            ("val/accuracy", "<", 1.0), ("test/accuracy", ">=", 1e-6)
        ]  # fmt: skip


class TestPaths:
    """A path is relative to the file that says it, on the command line to the working directory."""

    def built(self, plan: Plan) -> Path:
        data = plan.stages["main"].data
        assert data is not None
        path: Path = Builder(0).build(data).path
        return Path(os.path.normpath(path.resolve()))

    def there(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    def test_in_a_file_elsewhere(self, own_folder: Path) -> None:
        write("data: {name: arrays, path: x.npz}\nmodule: {name: supervised, network: mlp}\n", "there/recipe.yaml")
        assert self.there(own_folder / "there" / "x.npz") == self.built(resolved("there/recipe.yaml"))

    def test_in_a_file_that_is_extended(self, own_folder: Path) -> None:
        write("data: {name: arrays, path: ../x.npz}\nmodule: {name: supervised, network: mlp}\n", "there/base.yaml")
        plan = resolved(write("extends: there/base.yaml\ndata: {labels: 3}\n"))
        assert self.there(own_folder / "x.npz") == self.built(plan)

    def test_on_the_command_line(self, own_folder: Path) -> None:
        write("data: {name: arrays, path: x.npz}\nmodule: {name: supervised, network: mlp}\n", "there/recipe.yaml")
        assert self.there(own_folder / "y.npz") == self.built(resolved("there/recipe.yaml", "data.path=y.npz"))

    def test_absolute_ones_stay(self, own_folder: Path) -> None:
        path = self.there(own_folder / "elsewhere" / "x.npz")
        text = f"data: {{name: arrays, path: {path}}}\nmodule: {{name: supervised, network: mlp}}\n"
        assert self.built(resolved(write(text, "there/recipe.yaml"))) == path

    @pytest.mark.parametrize("said", ["x.npz", "../x.npz", "deep/x.npz"])
    def test_in_a_run_they_are_relative_to_its_folder_and_mean_the_same(self, said: str, own_folder: Path) -> None:
        self.there(own_folder / "there" / said)
        write(
            f"data: {{name: arrays, path: {said}}}\nmodule: {{name: supervised, network: mlp}}\n", "there/recipe.yaml"
        )
        plan = resolved("there/recipe.yaml")
        folder = own_folder / "runs" / "recipe" / "1"
        text = document.dump(plan.resolved(folder))
        assert str(own_folder) not in text
        assert self.built(resolved(write(text, str(folder / "recipe.yaml")))) == self.built(plan)
