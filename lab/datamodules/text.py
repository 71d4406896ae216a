"""Texts and what they should be classified as, or rated: token ids ``[N, L]``.

Longer texts are cut after L tokens, shorter ones padded: L is ``max_length``, or the longest training text's length
where that is less. The vocabulary of lab's own tokenizers is the training split's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import pyarrow as pa
import torch
from annotated_types import Ge
from torch import Tensor

from lab.batch import Labelled
from lab.datamodules.columns import ColumnData, rows_of
from lab.datamodules.tables import Table
from lab.datamodules.tokens import OWN_IDS, Kept, Pieces, Pretrained, Tokenizer, restored
from lab.ranges import Count, PathOrName, checked

OWN = ("words", "characters")
"""lab's own tokenizers."""


class Text(ColumnData):
    """A column of texts and a column of targets; networks for token ids learn from them, such as ``transformer``.

    Args:
        path: ``.csv``, ``.tsv``, ``.parquet``, ``.jsonl`` or ``.arrow``; or a name on the Hugging Face hub.
        text: the column of texts; found where it is left out: the only one of text beside the target.
        tokenizer: ``words`` (lower-cased), ``characters``, or a Hugging Face tokenizer: its name on the hub or its
            folder, which needs the extra ``text``.
        vocab_size: of lab's own tokenizers, ids at most, padding and unknown included.
        max_length: tokens of a text at most.

    Raises:
        FileNotFoundError: the file isn't there.
        ValueError: a column is missing or isn't text; there is no such tokenizer.
    """

    facts: ClassVar[tuple[str, ...]] = ("num_classes", "input_shape", "objective", "vocab_size")

    kept: ClassVar[dict[str, Any]] = {**ColumnData.kept, "text": str, "tokenizer": Kept, "length": Count}

    @checked
    def __init__(
        self,
        path: PathOrName,
        *,
        text: str | None = None,
        tokenizer: PathOrName = "words",
        vocab_size: Annotated[int, Ge(OWN_IDS + 1)] = 20_000,
        max_length: Count = 256,
        **columns: Any,
    ) -> None:
        super().__init__(path, **columns)
        self.text = text
        self.tokenizer = tokenizer
        self.most = vocab_size
        self.vocab_size = vocab_size
        self.max_length = max_length
        self._texts: list[str] = []
        self._ids: Tensor | None = None

    def inputs(self, tables: Mapping[str, Table]) -> Tensor:
        """``[N, 1]`` row numbers: texts become tokens when it is known which are for training."""
        column = self.once("text", self._column)
        self._texts, self._ids = [], None
        for table in tables.values():
            table.need(column)
            if not _is_text(table, column):
                raise ValueError(f"{table.source}: the column '{column}' is not text; there are {table.said()}")
            self._texts += [value or "" for value in table.column(column).to_pylist()]
        return torch.arange(len(self._texts)).unsqueeze(1)

    def learn(self, train: Labelled) -> None:
        """The vocabulary, and the length of the longest text."""
        texts = [self._texts[row] for row in train.inputs[:, 0].tolist()]
        tokenizer = restored(self.once("tokenizer", lambda: self._tokenizer(texts).state()))
        longest = self.once("length", lambda: max([1, *(len(ids) for ids in tokenizer.ids(texts, self.max_length))]))
        self.vocab_size = tokenizer.vocab_size
        self._ids = torch.full((len(self._texts), longest), tokenizer.padding)
        for row, ids in enumerate(tokenizer.ids(self._texts, longest)):
            self._ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)

    def prepared(self, samples: Labelled) -> Labelled:
        """``[N, L]`` token ids."""
        if self._ids is None:
            self.learn(samples)
        assert self._ids is not None
        return rows_of(samples, self._ids)

    def _tokenizer(self, texts: list[str]) -> Tokenizer:
        if self.tokenizer in OWN:
            return Pieces.learnt(str(self.tokenizer), texts, self.most)
        return Pretrained.loaded(self.tokenizer)

    def _column(self) -> str:
        table = self.first
        if self.text is not None:
            table.need(self.text)
            return self.text
        found = [name for name in table.columns if _is_text(table, name) and name != self.learnt.get("target")]
        if len(found) != 1:
            raise ValueError(f"{table.source}: which column is the text? Say `text:`; there are {table.said()}")
        return found[0]


def _is_text(table: Table, column: str) -> bool:
    return bool(pa.types.is_string(table.type(column)) or pa.types.is_large_string(table.type(column)))
