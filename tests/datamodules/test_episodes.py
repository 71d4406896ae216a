"""Episodes: what is in them, that it is the same wherever they are drawn, and what cannot be drawn."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lab import fit
from lab.cli import main
from lab.datamodules.digits import Digits
from lab.datamodules.episodes import Episodes
from lab.datamodules.episodic import EpisodeLoader, distinct
from lab.datamodules.glyphs import Glyphs
from lab.datamodules.sinusoid import Sinusoid


@pytest.fixture(scope="module")
def data() -> Episodes:
    return made()


def made(**arguments: Any) -> Episodes:
    given = {
        "ways": 2,
        "shots": 3,
        "queries": 4,
        "batch_size": 5,
        "episodes": 40,
        "test_episodes": 30,
        "val_episodes": 10,
    }
    given |= {"val_classes": 0.2, "test_classes": 0.3, **arguments}
    data = Episodes(source=Digits(), **given)
    data.prepare_data()
    data.setup()
    return data


# Drawing


def test_different_numbers_are_drawn_and_each_ordered_choice_equally_often() -> None:
    drawn = distinct(torch.full((60_000,), 4), 3, torch.Generator().manual_seed(0))
    assert drawn.shape == (60_000, 3)
    assert all(bool((drawn[:, a] != drawn[:, b]).all()) for a, b in ((0, 1), (0, 2), (1, 2)))
    counts = (drawn @ torch.tensor([16, 4, 1])).bincount()
    counts = counts[counts > 0]
    assert len(counts) == 24
    assert float((counts - 2500).abs().max()) < 5 * 2500**0.5
    assert distinct(torch.tensor([3]), 3, torch.Generator().manual_seed(0)).sort().values.tolist() == [[0, 1, 2]]


def test_support_and_query_have_no_sample_in_common_and_each_class_its_share(data: Episodes) -> None:
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            for support, query in zip(batch.support.index, batch.query.index, strict=True):
                assert not set(support.tolist()) & set(query.tolist())
                assert len(set(support.tolist())) == 6
                assert len(set(query.tolist())) == 8
            assert bool((batch.support.targets == torch.tensor([0, 1] * 3)).all())
            assert bool((batch.query.targets == torch.tensor([0, 1] * 4)).all())


def test_samples_are_those_of_their_class_and_classes_are_split(data: Episodes) -> None:
    source, seen = data.source, {}
    pool = torch.cat([part.targets for part in (source.train, source.val, source.test)])
    images = torch.cat([part.inputs for part in (source.train, source.val, source.test)])
    for split, loader in (
        ("train", data.train_dataloader()),
        ("val", data.val_dataloader()),
        ("test", data.test_dataloader()),
    ):
        seen[split] = set()
        for batch in loader:
            for part in (batch.support, batch.query):
                classes = pool[part.index].view(len(batch), -1, 2)
                assert bool((classes == classes[:, :1]).all())
                assert bool((classes[:, 0, 0] != classes[:, 0, 1]).all())
                assert torch.equal(images[part.index], part.inputs)
                seen[split] |= set(classes.flatten().tolist())
    assert {split: set(classes) for split, classes in data.split_classes.items()} == seen
    assert sorted(k for classes in data.split_classes.values() for k in classes) == list(range(10))


def test_a_class_takes_every_place() -> None:
    data = made(episodes=200)
    pool = torch.cat([part.targets for part in (data.source.train, data.source.val, data.source.test)])
    first = torch.cat([pool[batch.support.index[:, 0]] for batch in data.train_dataloader()])
    assert set(first.tolist()) == set(data.split_classes["train"])


def batches(loader: Any, epoch: int = 0, first: int = 0) -> list[Tensor]:
    loader.set_epoch(epoch)
    if first:
        loader.load_state_dict({"epoch": epoch, "batch": first})
    return [batch.support.index for batch in loader]


def test_training_tasks_are_a_function_of_seed_epoch_and_number(data: Episodes) -> None:
    loader = data.train_dataloader()
    whole = {epoch: batches(loader, epoch) for epoch in (0, 1)}
    assert len(whole[0]) == 8
    assert not torch.equal(torch.cat(whole[0]), torch.cat(whole[1]))
    resumed = batches(data.train_dataloader(), 1, 5)
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole[1][5:], strict=True))
    other = made(seed=1)
    assert not torch.equal(torch.cat(batches(other.train_dataloader())), torch.cat(whole[0]))


def test_evaluation_is_on_the_same_tasks_in_every_epoch_and_for_every_seed(data: Episodes) -> None:
    once, again = batches(data.test_dataloader()), batches(made(seed=7).test_dataloader(), 3)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], batches(made(eval_seed=1).test_dataloader())[0])


@pytest.mark.parametrize("training", [True, False])
def test_two_processes_see_what_one_does(training: bool) -> None:
    points = Sinusoid(shots=2, queries=2, batch_size=6, episodes=3000)

    def loader(batch_size: int, **where: int) -> EpisodeLoader:
        return EpisodeLoader(
            lambda generator, count: points.draw("train", generator, count),
            lambda numbers, epoch, first: points.serve("train", numbers, epoch, first), ("key",),
            length=2999, batch_size=batch_size, training=training, **where,
        )  # fmt: skip

    alone = list(loader(6))
    parts = [list(loader(3, rank=rank, world_size=2)) for rank in (0, 1)]
    assert len(alone) == len(parts[0]) == len(parts[1]) == (499 if training else 500)
    for whole, *halves in zip(alone, *parts, strict=True):
        for kind in ("support", "query"):
            assert torch.equal(getattr(whole, kind).inputs, torch.cat([getattr(half, kind).inputs for half in halves]))
        assert torch.equal(whole.query.task, torch.cat([half.query.task for half in halves]))
    first = torch.cat([batch.support.inputs[:, 0, 0] for batch in alone])
    assert len(torch.unique(first)) > len(first) - 5


def test_blocks_are_drawn_far_faster_than_tasks_are_learnt() -> None:
    drawn = []
    points = Sinusoid()
    original, points.draw = points.draw, lambda *key: drawn.append(1) or original(*key)  # type: ignore[method-assign]
    assert len(list(islice(points.train_dataloader(), 400))) == 400
    assert len(drawn) == -(-400 * 25 // 1024)


# Kinds of data


def test_sinusoids_are_the_papers() -> None:
    data = Sinusoid(test_episodes=2000, eval_batch_size=2000)
    [batch] = list(data.test_dataloader())
    points, amplitude, phase = (
        data.draw("train", torch.Generator().manual_seed(0), 4000)[place] for place in (0, 2, 3)
    )
    for values, low, high in ((points, -5, 5), (amplitude, 0.1, 5), (phase, 0, torch.pi)):
        assert low <= float(values.min()) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < float(values.max()) <= high
        assert float(values.mean()) == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    values = data.draw("train", torch.Generator().manual_seed(0), 4000)[1]
    torch.testing.assert_close(values, amplitude * torch.sin(points - phase))
    assert batch.support.inputs.shape == (2000, 10, 1)
    assert batch.query.targets.shape == (2000, 100, 1)


def test_glyphs_are_many_letters_whose_scripts_are_split() -> None:
    glyphs = Glyphs()
    glyphs.prepare_data()
    glyphs.setup()
    assert glyphs.class_splits is not None
    assert glyphs.classes is not None
    assert 740 <= glyphs.num_classes <= 800
    assert glyphs.input_shape == (1, 28, 28)
    scripts = {split: {glyphs.classes[k].split()[0] for k in classes} for split, classes in glyphs.class_splits.items()}
    assert scripts == {"train": {"LATIN", "CYRILLIC"}, "val": {"GREEK"}, "test": {"ARMENIAN", "GEORGIAN", "LAO"}}
    targets = torch.cat([part.targets for part in (glyphs.train, glyphs.val, glyphs.test)])
    assert int(targets.bincount().min()) >= 8
    assert int(targets.bincount().max()) <= 16
    assert "LATIN CAPITAL LETTER A" in glyphs.classes
    assert "GREEK CAPITAL LETTER ALPHA" not in glyphs.classes
    assert "CYRILLIC SMALL LETTER A" not in glyphs.classes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"test_scripts": ("armenia",)}, "there is no script 'armenia' .did you mean 'armenian'"),
     ({"val_scripts": ("lao",)}, "lao is in val_scripts and in test_scripts"),
     ({"faces": 17}, "less than or equal to 16")],
    ids=["unknown", "twice", "faces"],
)  # fmt: skip
def test_what_glyphs_there_are_not_is_said(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Glyphs(**arguments)


def test_rotations_turn_whole_classes_of_training_tasks_only() -> None:
    plain, turned = made(), made(rotations=True)
    some = 0
    for one, other in zip(plain.train_dataloader(), turned.train_dataloader(), strict=True):
        for task in range(len(one)):
            for way in (0, 1):
                before, after = (
                    torch.cat([b.support.inputs[task, way::2], b.query.inputs[task, way::2]]) for b in (one, other)
                )
                turns = [turn for turn in range(4) if torch.equal(before.rot90(turn, (-2, -1)), after)]
                assert turns
                some += turns != [0]
    assert 0.6 * 80 < some < 0.9 * 80
    for one, other in zip(plain.test_dataloader(), turned.test_dataloader(), strict=True):
        assert torch.equal(one.support.inputs, other.support.inputs)


# What cannot be drawn


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ways": 3}, r"ways=3, but there are 2 val classes of Digits's 10"),
        ({"ways": 4, "val_episodes": 0}, r"ways=4, but there are 3 test classes"),
        ({"ways": 6}, r"ways=6, but there are 5 train classes"),
        ({"shots": 100, "queries": 90}, r"shots=100 and queries=90 are 190 samples of a class, but train class"),
        ({"eval_queries": 500}, r"shots=3 and eval_queries=500 are 503 samples of a class, but val class"),
        ({"ways": 1}, "greater than or equal to 2"),
        ({"val_classes": 0.7}, "leave no class to learn from"),
        ({"support": Path(__file__)}, "path is missing"),
        ({"support": Path("nowhere"), "path": Path("nowhere")}, "nowhere is not there"),
        ({"episodes": 3}, "3 episodes make no batch of 5 tasks"),
    ],
    ids=["val", "test", "train", "queries", "eval", "one", "parts", "support", "nowhere", "few"],
)  # fmt: skip
def test_what_cannot_be_drawn_is_an_error_that_says_why(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        made(**arguments).train_dataloader()


# A task of the user's own


def drawn(folder: Path, names: list[str], count: int = 3) -> Path:
    generator = np.random.default_rng(0)
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 60, (8, 8)).astype(np.uint8)
            pixels[:, place * 3 : place * 3 + 3] += 180
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = fit({
        "data": {"name": "episodes", "source": "digits", "ways": 3, "val_episodes": 4, "test_episodes": 4,
                 "episodes": 8, "val_classes": 0.3, "test_classes": 0.3, "queries": 2, "batch_size": 4},
        "module": {"name": "maml", "network": {"name": "mlp", "hidden": [8]}, "inner_lr": 0.5, "test_steps": 20},
        "trainer": {"max_epochs": 1}, "logger": "csv", "callbacks": {"profile": None, "progress": None},
    }, out=tmp_path_factory.mktemp("runs"))  # fmt: skip
    return str(run.folder)


def test_a_support_folder_is_adapted_to_and_its_queries_predicted(finished: str, tmp_path: Path) -> None:
    from pyarrow import parquet

    support, new = drawn(tmp_path / "known", ["ant", "bee"]), drawn(tmp_path / "new", ["", "x"], 2) / "x"
    (tmp_path / "new" / "0.png").rename(new / "a.png")
    (tmp_path / "new" / "1.png").rename(new / "b.png")
    to = tmp_path / "p.parquet"
    assert main(["predict", finished, f"data.support={support}", f"data.path={new}", "--to", str(to)]) == 0
    table = parquet.read_table(to).to_pydict()
    assert table["index"] == [0, 1, 2, 3]
    assert table["prediction"] == [1, 1, 0, 0]
    assert all(len(row) == 3 for row in table["probabilities"])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["ant"], "has images of one class only, 'ant': two at least are needed"),
        (["ant", "bee", "cat", "dog"], "has 4 classes, the network answers for 3"),
        (["."], "a support set has a folder for each class"),
        ([], "holds no images"),
    ],
    ids=["one", "many", "flat", "none"],
)
def test_a_support_folder_that_is_no_task_is_an_error(
    finished: str, names: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "known").mkdir()
    for name in names:
        drawn(tmp_path / "k", [name]) if name == "." else drawn(tmp_path / "known", [name])
    support = tmp_path / ("k" if names == ["."] else "known")
    new = drawn(tmp_path / "new", ["x"]) / "x"
    assert main(["predict", finished, f"data.support={support}", f"data.path={new}"]) != 0
    assert said in capsys.readouterr().err


def test_points_of_the_users_own_are_adapted_to(tmp_path: Path) -> None:
    from pyarrow import parquet

    run = fit({
        "data": {"name": "sinusoid", "shots": 5, "val_episodes": 4, "test_episodes": 4, "episodes": 50},
        "module": {"name": "maml", "network": {"name": "mlp", "hidden": [16]}, "test_steps": 200, "inner_lr": 0.05},
        "trainer": {"max_epochs": 1}, "logger": "csv", "callbacks": {"profile": None, "progress": None},
    }, out=tmp_path)  # fmt: skip
    points = np.linspace(-2, 2, 9, dtype=np.float32)[:, None]
    np.savez(tmp_path / "known.npz", inputs=points, targets=0.5 * points[:, 0])
    np.savez(tmp_path / "new.npz", inputs=points + 0.1)
    to = tmp_path / "p.parquet"
    said = [f"data.support={tmp_path / 'known.npz'}", f"data.path={tmp_path / 'new.npz'}", "--to", str(to)]
    assert main(["predict", str(run.folder), *said]) == 0
    values = [row[0] for row in parquet.read_table(to).to_pydict()["prediction"]]
    assert len(values) == 9
    assert all(a < b for a, b in pairwise(values))
