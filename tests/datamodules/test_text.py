from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from own_data import batches, fitted, predicted
from sklearn import datasets as sklearn_datasets
from sklearn.feature_extraction.text import CountVectorizer

from lab.cli import main
from lab.datamodules.text import Text

DESCRIPTIONS = {
    name: getattr(sklearn_datasets, f"load_{name}")().DESCR for name in ("breast_cancer", "diabetes", "wine", "iris")
}
TEXTS = [
    (line.strip(), name) for name, text in DESCRIPTIONS.items() for line in text.splitlines() if len(line.split()) > 3
]
SMALL = {"name": "transformer", "width": 8, "depth": 1, "heads": 2}


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    pd.DataFrame(TEXTS, columns=["line", "label"]).to_csv(tmp_path / "lines.csv", index=False)
    return tmp_path / "lines.csv"


def ready(path: Path, **arguments: Any) -> Text:
    data = Text(path, **arguments)
    data.setup()
    return data


def texts_of(data: Text, part: str = "train") -> list[str]:
    rows = dict(zip(("train", "val", "test"), data._cut(data.load()), strict=True))[part]  # type: ignore[arg-type]
    return [TEXTS[row][0] for row in rows.inputs[:, 0].tolist()]


def test_the_facts_are_those_of_token_ids(csv: Path) -> None:
    data = ready(csv, max_length=12)
    assert data.classes == sorted(DESCRIPTIONS)
    assert data.train.inputs.dtype == torch.int64
    assert (data.input_shape, data.num_classes, data.objective) == ((12,), 4, "classification")
    assert data.train.inputs.shape == (len(data.train), 12)
    assert 0 < int(data.train.inputs.max()) < data.vocab_size
    assert "in_channels" not in data.facts
    assert "vocab_size" in data.facts


def test_ids_are_padding_unknown_and_the_training_words_most_frequent_first(csv: Path) -> None:
    data = ready(csv)
    training = texts_of(data)
    count = CountVectorizer(token_pattern=r"\w+|[^\w\s]")
    totals = count.fit_transform(training).toarray().sum(0)
    frequency = dict(zip(count.get_feature_names_out(), totals.tolist(), strict=True))
    vocabulary = sorted(frequency, key=lambda word: (-frequency[word], word))
    assert data.vocab_size == len(vocabulary) + 2
    for part in ("train", "test"):
        for text, ids in zip(texts_of(ready(csv), part), getattr(data, part).inputs.tolist(), strict=True):
            words = re.findall(r"\w+|[^\w\s]", text.lower())
            expected = [vocabulary.index(word) + 2 if word in frequency else 1 for word in words]
            assert ids == expected + [0] * (len(ids) - len(words))
    small = ready(csv, vocab_size=10)
    assert small.vocab_size == 10
    assert small.learnt["tokenizer"]["vocabulary"] == vocabulary[:8]


def test_characters_are_tokens_too(csv: Path) -> None:
    data = ready(csv, tokenizer="characters", max_length=40)
    letters = data.learnt["tokenizer"]["vocabulary"]
    first = data.train.inputs[0].tolist()
    text = texts_of(data)[0][:40]
    assert [letters[place - 2] for place in first if place] == list(text)


def hugging_face(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"], show_progress=False
    )
    tokenizer.train_from_iterator([text for text, _ in TEXTS], trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
    fast.save_pretrained(folder)
    return folder


def test_a_hugging_face_tokenizer_gives_its_own_ids_and_the_run_needs_it_no_more(csv: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = hugging_face(tmp_path / "tokenizer")
    data = ready(csv, tokenizer=folder, max_length=16)
    assert data.vocab_size == 300
    own = AutoTokenizer.from_pretrained(folder)
    expected = own(texts_of(data), truncation=True, max_length=16, padding="max_length")["input_ids"]
    assert data.train.inputs.tolist() == expected
    again = Text(csv, tokenizer="no/longer/there", max_length=16)
    again.load_state_dict(json.loads(json.dumps(data.state_dict())))
    again.setup()
    assert torch.equal(again.train.inputs, data.train.inputs)


def test_a_tokenizer_that_is_nowhere_is_named(csv: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        Text(csv, tokenizer="./nowhere")
    (csv.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no tokenizer can be loaded from .*empty.*words, characters"):
        ready(csv, tokenizer=csv.parent / "empty")


def test_folds_cover_every_text_once(csv: Path) -> None:
    folds = [ready(csv, folds=5, fold=fold) for fold in range(5)]
    assert sorted(text for fold in folds for text in texts_of(fold, "test")) == sorted(text for text, _ in TEXTS)
    counts = torch.stack([fold.test.targets.bincount(minlength=4) for fold in folds])
    assert (counts.max(0).values - counts.min(0).values).max() <= 1
    assert len({fold.vocab_size for fold in folds}) > 1  # each learns from its own training texts
    assert len(batches(folds[0])) == len(folds[0].train)


def test_json_lines_and_parquet_are_the_same_and_an_empty_cell_is_an_empty_text(csv: Path, tmp_path: Path) -> None:
    table = pd.read_csv(csv)
    table.loc[3, "line"] = None
    table.to_json(tmp_path / "lines.jsonl", orient="records", lines=True)
    table.to_parquet(tmp_path / "lines.parquet")
    one, other = ready(tmp_path / "lines.jsonl"), ready(tmp_path / "lines.parquet")
    assert torch.equal(one.train.inputs, other.train.inputs)
    assert torch.equal(one.test.targets, other.test.targets)
    served = torch.cat([batch.inputs for batch in one.predict_dataloader()])
    assert (served[3] == 0).all()
    assert (served[[row for row in range(len(table)) if row != 3], 0] != 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "lines"}, r"no column 'lines' \(did you mean 'line'\?\); it has line \(string\), label \(string\)"),
        ({"text": "line", "target": "lable"}, r"no column 'lable' \(did you mean 'label'\?\)"),
        ({"text": "length", "target": "label"}, r"'length' is not text"),
    ],
)
def test_an_error_lists_the_columns(csv: Path, arguments: dict[str, Any], message: str) -> None:
    if arguments["text"] == "length":
        pd.read_csv(csv).assign(length=3).to_csv(csv, index=False)
    with pytest.raises(ValueError, match=message):
        ready(csv, **arguments)


def test_several_columns_of_text_are_ambiguous(csv: Path) -> None:
    pd.read_csv(csv).assign(title="a title").to_csv(csv, index=False)
    with pytest.raises(ValueError, match=r"which column is the text\? Say `text:`; there are line \(string\)"):
        ready(csv)


def test_a_run_reads_new_texts_by_its_own_words(csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fitted({"name": "text", "path": str(csv), "max_length": 16}, SMALL, epochs=1)
    old = predicted(run)
    columns = [name for name in old if name not in ("index", "target")]
    table = pd.read_csv(csv)
    table[table["label"] == "wine"].to_csv("new.csv", index=False)
    rows = [row for row, label in enumerate(table["label"]) if label == "wine"]
    new = predicted(run, "data.path=new.csv")
    assert new["target"] == [3] * len(rows)
    torch.testing.assert_close(torch.tensor(new[columns[-1]]), torch.tensor([old[columns[-1]][row] for row in rows]))
    table.assign(label="beer").to_csv("new.csv", index=False)
    assert main(["test", str(run.folder), "data.path=new.csv"]) != 0
    assert "the class 'beer' is unknown to training" in capsys.readouterr().err


def test_networks_that_are_not_for_these_data_say_so(csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(data: str, network: str) -> str:
        text = f"data: {data}\nmodule: {{name: supervised, network: {network}}}\ntrainer: {{max_epochs: 1}}\n"
        Path("recipe.yaml").write_text(text)
        assert main(["fit", "recipe.yaml"]) != 0
        return capsys.readouterr().err

    assert "convnet needs the argument 'in_channels'" in refused("{name: text, path: lines.csv}", "convnet")
    error = refused("digits", "transformer")
    assert "transformer needs the argument 'vocab_size'" in error
    assert re.search(r"this data does not give it, other data would: [\w, ]*\btext\b", error)
    assert "mlp takes numbers, the inputs are token ids" in refused("{name: text, path: lines.csv}", "mlp")
