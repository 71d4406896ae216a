"""Types and ranges by the annotations, objects from components, seeds by place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD

from lab import RecipeError
from lab.api import load_recipe
from lab.build import Builder
from lab.check import component
from lab.document import Place
from lab.types import check_types

HERE = Place("a test")


def problems(module: dict[str, Any] | None = None, **top: Any) -> list[str]:
    base = {"name": "supervised", "network": "mlp"}
    plan = load_recipe({"data": "digits", "module": {**base, **(module or {})}, **top})
    with pytest.raises(RecipeError) as caught:
        check_types(plan)
    return [f"{problem.key}: {problem.message}" for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ({"network": {"name": "mlp", "dropout": "0.5"}}, "module.network.dropout: should be a valid number, got '0.5'"),
        ({"network": {"name": "mlp", "dropout": 1}}, "module.network.dropout: should be less than 1, got 1"),
        ({"network": {"name": "mlp", "hidden": 3}}, "module.network.hidden: should be a list, got 3"),
        (
            {"network": {"name": "mlp", "hidden": [3, 0]}},
            "module.network.hidden: should be greater than or equal to 1 at position 1, got [3, 0]",
        ),
        ({"optimizer": {"name": "sgd", "lr": -1.0}}, "module.optimizer.lr: sgd: Invalid learning rate: -1.0"),
        (
            {"scheduler": {"name": "one_cycle", "max_lr": 0.1, "pct_start": 3}},
            "module.scheduler.pct_start: one_cycle: ",
        ),
    ],
)
def test_wrong_values_are_named_with_what_is_allowed(module: dict[str, Any], expected: str) -> None:
    found = problems(module)
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_all_wrong_values_are_told_at_once() -> None:
    found = problems(
        {"network": {"name": "mlp", "dropout": 2.0, "hidden": "x"}},
        data={"name": "digits", "batch_size": 0},
        trainer={"max_epochs": "three"},
    )
    assert [line.partition(":")[0] for line in found] == [
        "data.batch_size", "module.network.dropout", "module.network.hidden", "trainer.max_epochs",
    ]  # fmt: skip


def test_a_boolean_is_no_number_and_a_word_no_boolean() -> None:
    assert problems(data={"name": "digits", "batch_size": True})[0].startswith("data.batch_size: should be a valid int")
    assert problems(data={"name": "digits", "drop_last": "yes"})[0].startswith("data.drop_last: should be a valid bool")


def test_a_whole_number_serves_where_a_real_one_is_wanted() -> None:
    check_types(
        load_recipe({"data": "digits", "module": {"name": "supervised", "network": {"name": "mlp", "dropout": 0}}})
    )


def test_the_trainers_names_are_checked_too() -> None:
    assert "ddpp" in problems(trainer={"strategy": "ddpp"})[0]
    assert problems(trainer={"precision": 17})[0].startswith("trainer.precision: ")


def test_lists_become_tuples_and_factories_wait() -> None:
    builder = Builder(0)
    network = builder.build(
        component("networks", {"name": "mlp", "num_classes": 2, "input_shape": [3], "hidden": [4]}, HERE)
    )
    assert next(network.parameters()).shape == (4, 3)
    factory = builder.build(component("optimizers", {"name": "sgd", "lr": 0.5}, HERE))
    optimizer = factory(network.parameters())
    assert isinstance(optimizer, SGD)
    assert optimizer.defaults["lr"] == 0.5


def test_a_component_at_one_place_starts_from_one_set_of_weights_whatever_was_built_before() -> None:
    described = component("networks", {"name": "mlp", "num_classes": 2, "input_shape": [3]}, HERE)
    first = Builder(7).build(described)
    torch.rand(5)
    again, other = Builder(7).build(described), Builder(8).build(described)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_facts_fill_what_is_left_out_and_the_specification_has_them() -> None:
    builder = Builder(0)
    builder.facts = {"num_classes": 5, "input_shape": (1, 8, 8)}
    described = component("networks", {"name": "mlp", "hidden": [4]}, HERE, ["num_classes", "input_shape"])
    assert builder.build(described).head.out_features == 5
    spec = builder.spec(described)
    assert spec == {"name": "mlp", "hidden": [4], "dropout": 0.0, "activation": "relu", "num_classes": 5,
                    "input_shape": [1, 8, 8]}  # fmt: skip


def test_a_path_is_relative_to_the_file_that_says_it(own_folder: Path) -> None:
    (own_folder / "deep").mkdir()
    (own_folder / "deep" / "my.npz").touch()
    recipe = own_folder / "deep" / "recipe.yaml"
    recipe.write_text("data: {name: arrays, path: my.npz}\nmodule: {name: supervised, network: mlp}\n")
    plan = load_recipe(recipe)
    assert plan.stages["main"].data is not None
    data = Builder(0).build(plan.stages["main"].data)
    assert Path(data.path) == own_folder / "deep" / "my.npz"
    assert plan.resolved(own_folder)["data"]["path"] == "deep/my.npz"


def test_a_path_on_the_command_line_is_relative_to_the_working_directory(own_folder: Path) -> None:
    plan = load_recipe(
        {"data": {"name": "arrays", "path": "x.npz"}, "module": {"name": "supervised", "network": "mlp"}}
    )
    assert plan.resolved(own_folder / "runs")["data"]["path"] == "../x.npz"
