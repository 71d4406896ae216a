from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from own_data import batches, fitted, predicted
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_diabetes, load_wine
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from lab.cli import main
from lab.datamodules.tabular import Tabular

WINE = load_wine(as_frame=True).frame
NUMBERS = list(WINE.columns[:-1])


def wine() -> pd.DataFrame:
    """178 wines; some values are taken away, a number is told in words, and by yes or no."""
    table = WINE.rename(columns={"target": "cultivar"})
    table["cultivar"] = table["cultivar"].map({0: "barolo", 1: "grignolino", 2: "barbera"})
    table.loc[::7, "ash"] = np.nan
    table["colour"] = pd.cut(WINE["hue"], 3, labels=["brown", "red", "blue"]).astype(str)
    table["strong"] = WINE["alcohol"] > 13
    return table


def ready(path: Path, **arguments: Any) -> Tabular:
    data = Tabular(path, **{"target": "cultivar", **arguments})
    data.setup()
    return data


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    wine().to_csv(tmp_path / "wine.csv", index=False)
    return tmp_path / "wine.csv"


def test_the_facts_and_splits_are_the_tables(csv: Path) -> None:
    data = ready(csv)
    assert data.classes == ["barbera", "barolo", "grignolino"]
    assert [len(split) for split in (data.train, data.val, data.test)] == [124, 18, 36]
    assert data.in_channels == 13 + 1 + 3 + 2  # numbers, whether ash is missing, colours, yes and no
    assert (data.input_shape, data.num_classes, data.objective) == ((19,), 3, "classification")


def test_features_are_what_scikit_learn_makes_of_the_training_split(csv: Path) -> None:
    data = ready(csv)
    table = pd.read_csv(csv)
    rows = data._cut(data.load())  # type: ignore[arg-type]  # the same rows, as numbers
    train, test = (table.iloc[part.inputs[:, 0].numpy()] for part in (rows[0], rows[2]))
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    words = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    oracle = ColumnTransformer([("n", numbers, NUMBERS), ("w", words, ["colour", "strong"])]).fit(train)
    missing = 1 + NUMBERS.index("ash")
    for part, split in ((train, data.train), (test, data.test)):
        expected = oracle.transform(part)
        got = split.inputs.numpy()
        without = np.delete(got, missing, axis=1)
        # scikit-learn imputes before it scales, so that its deviation of `ash` is that of the imputed column
        known = train["ash"].notna().mean()
        expected[:, missing - 1] *= np.sqrt(known)
        np.testing.assert_allclose(without, expected, atol=1e-5)
        assert (got[:, missing] == part["ash"].isna()).all()


def test_nothing_is_learnt_from_rows_that_are_not_for_training(csv: Path) -> None:
    before = ready(csv)
    held = before._cut(before.load())[2].inputs[:, 0].numpy()  # type: ignore[arg-type]
    table = pd.read_csv(csv)
    table.loc[held, NUMBERS] *= 1000
    table.loc[held, "colour"] = "green"
    table.to_csv(csv, index=False)
    after = ready(csv)
    assert torch.equal(after.train.inputs, before.train.inputs)
    assert after.learnt == before.learnt
    assert (after.test.inputs[:, 14:17] == 0).all()  # a colour that training has not


def test_floating_point_targets_are_a_regression_and_task_says_otherwise(tmp_path: Path) -> None:
    frame = load_diabetes(as_frame=True).frame
    frame.to_parquet(tmp_path / "diabetes.parquet")
    data = ready(tmp_path / "diabetes.parquet", target="target")
    assert (data.objective, data.num_classes, data.in_channels) == ("regression", 1, 10)
    assert ready(tmp_path / "diabetes.parquet", target="target", task="classification").objective == "classification"
    frame.astype({"target": int}).to_parquet(tmp_path / "whole.parquet")
    assert ready(tmp_path / "whole.parquet", target="target", task="regression").objective == "regression"
    assert ready(tmp_path / "whole.parquet", target="target").objective == "classification"


def test_rows_without_a_target_stay_for_training_without_a_label(csv: Path) -> None:
    table = pd.read_csv(csv)
    table.loc[:9, "cultivar"] = None
    table.to_csv(csv, index=False)
    data = ready(csv)
    assert int((~data.train.labelled).sum()) == 10
    assert data.test.labelled.all()


def test_folds_labels_and_the_order_of_prediction(csv: Path) -> None:
    folds = [ready(csv, folds=5, fold=fold, features=("alcohol", "hue")) for fold in range(5)]
    table = pd.read_csv(csv)
    held = sum(len(fold.test) for fold in folds)
    assert held == 178
    sizes = torch.stack([fold.test.targets.bincount(minlength=3) for fold in folds])
    assert (sizes.max(0).values - sizes.min(0).values).max() <= 1
    assert sizes.sum(0).tolist() == [(table["cultivar"] == name).sum() for name in folds[0].classes or []]
    assert int(ready(csv, labels=12).train.labelled.sum()) == 12
    assert len(batches(ready(csv))) == 124
    served = torch.cat([b.targets for b in ready(csv).predict_dataloader()])
    assert [(folds[0].classes or [])[target] for target in served] == table["cultivar"].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "cultiva"}, r"wine\.csv has no column 'cultiva' \(did you mean 'cultivar'\?\)"),
        ({"features": ("ash", "nose")}, r"wine\.csv has no column 'nose'.*it has alcohol \(double\)"),
        ({"features": ("ash", "cultivar")}, r"'cultivar' is the target"),
        ({"target": None}, r"which column is the target\?"),
        ({"task": "regression"}, r"'cultivar' \(string\) is no number"),
        ({"target": "alcohol", "task": "auto", "labels": 200}, r"labels=200, but the training split has 124"),
    ],
)
def test_an_error_lists_what_there_is(csv: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(csv, **arguments)


def test_tables_that_no_network_can_learn_from_are_refused(tmp_path: Path) -> None:
    table = wine()
    table["bottled"] = pd.Timestamp("1991-07-01")
    table.to_parquet(tmp_path / "wine.parquet")
    with pytest.raises(ValueError, match=r"'bottled' \(timestamp.*has neither numbers nor text.*`features:`"):
        ready(tmp_path / "wine.parquet")
    (tmp_path / "torn.csv").write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(ValueError, match=r"torn\.csv cannot be read as csv: .*Expected 2 columns, got 3"):
        ready(tmp_path / "torn.csv")
    (tmp_path / "twice.csv").write_text("a,a,cultivar\n1,2,x\n")
    with pytest.raises(ValueError, match=r"twice\.csv has more than one column 'a'"):
        ready(tmp_path / "twice.csv")
    wine().assign(cultivar="barolo").to_csv(tmp_path / "one.csv", index=False)
    with pytest.raises(ValueError, match=r"'cultivar' has 1 different values"):
        ready(tmp_path / "one.csv")
    wine().head(0).to_csv(tmp_path / "none.csv", index=False)
    with pytest.raises(ValueError, match=r"none\.csv has no rows"):
        ready(tmp_path / "none.csv")


def test_a_run_scales_new_data_and_orders_their_classes_as_its_own(csv: Path) -> None:
    run = fitted({"name": "tabular", "path": str(csv), "target": "cultivar"}, epochs=3)
    learnt = json.loads((run.stage("main") / "data.json").read_text())["learnt"]
    assert learnt["classes"] == ["barbera", "barolo", "grignolino"]
    old = predicted(run)
    table = pd.read_csv(csv)
    some = table["cultivar"] != "barbera"
    table[some].to_csv("new.csv", index=False)
    new = predicted(run, "data.path=new.csv")
    chosen = [at for at, is_some in enumerate(some) if is_some]
    assert new["target"] == [old["target"][at] for at in chosen]
    first = [name for name in new if name not in ("index", "target")][-1]
    torch.testing.assert_close(torch.tensor(new[first]), torch.tensor([old[first][at] for at in chosen]))
    table.drop(columns="cultivar").to_csv("unknown.csv", index=False)
    assert predicted(run, "data.path=unknown.csv")[first] == old[first]
    assert main(["test", str(run.folder), "data.path=new.csv", "data.test_fraction=1", "data.val_fraction=0"]) == 0


def test_unknown_classes_and_missing_columns_of_new_data_are_named(
    csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fitted({"name": "tabular", "path": str(csv), "target": "cultivar"}, epochs=1)
    pd.read_csv(csv).replace("barbera", "nebbiolo").to_csv("new.csv", index=False)
    assert main(["predict", str(run.folder), "data.path=new.csv"]) != 0
    assert "the class 'nebbiolo' is unknown to training" in capsys.readouterr().err
    pd.read_csv(csv).drop(columns="hue").to_csv("new.csv", index=False)
    assert main(["predict", str(run.folder), "data.path=new.csv"]) != 0
    assert "new.csv has no column 'hue'" in capsys.readouterr().err
