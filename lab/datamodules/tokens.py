"""Text to token ids: by words, by characters, or by a Hugging Face tokenizer.

Ids of words and characters are 0 for padding, 1 for what training doesn't have, then the training texts' most frequent
pieces, the most frequent first.
"""

from __future__ import annotations

import contextlib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from typing_extensions import TypedDict

PADDING, UNKNOWN = 0, 1
OWN_IDS = 2
"""How many ids are no piece of text."""
_WORD = re.compile(r"\w+|[^\w\s]")


class KeptPieces(TypedDict):
    """What a run keeps of lab's own tokenizers."""

    kind: Literal["words", "characters"]
    vocabulary: list[str]


class KeptPretrained(TypedDict):
    """What a run keeps of Hugging Face's."""

    tokenizer: str
    padding: int


Kept: TypeAlias = KeptPieces | KeptPretrained


class Tokenizer(ABC):
    """Turns texts into ids below ``vocab_size``."""

    vocab_size: int
    padding: int = PADDING

    @abstractmethod
    def ids(self, texts: Sequence[str], longest: int) -> list[list[int]]:
        """Each text's ids, ``longest`` at most."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Plain values that :func:`restored` makes the same tokenizer of."""


class Pieces(Tokenizer):
    """Words (lower-cased runs of letters and digits, and every other sign for itself) or characters.

    Args:
        kind: ``words`` or ``characters``.
        vocabulary: the pieces that have an id, in its order.
    """

    def __init__(self, kind: str, vocabulary: Sequence[str]) -> None:
        self.kind = kind
        self.vocabulary = list(vocabulary)
        self.vocab_size = len(self.vocabulary) + OWN_IDS
        self._ids = {piece: at for at, piece in enumerate(self.vocabulary, OWN_IDS)}

    @classmethod
    def learnt(cls, kind: str, texts: Sequence[str], size: int) -> Pieces:
        """With the most frequent pieces of texts; those as frequent as each other in the order of their characters."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(pieces(kind, text))
        ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
        return cls(kind, ranked[: max(size - OWN_IDS, 0)])

    def ids(self, texts: Sequence[str], longest: int) -> list[list[int]]:
        """Each text's ids, ``longest`` at most."""
        return [[self._ids.get(piece, UNKNOWN) for piece in pieces(self.kind, text)[:longest]] for text in texts]

    def state(self) -> dict[str, Any]:
        """The pieces."""
        return {"kind": self.kind, "vocabulary": self.vocabulary}


class Pretrained(Tokenizer):
    """A tokenizer of Hugging Face, its special tokens included.

    Args:
        written: it as JSON, as the package ``tokenizers`` writes it.
        padding: the id of its padding.
    """

    def __init__(self, written: str, padding: int) -> None:
        from tokenizers import Tokenizer as Fast

        self._written = written
        self._fast = Fast.from_str(written)
        self.padding = padding
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def loaded(cls, path: Path | str) -> Pretrained:
        """From the hub or a folder.

        Raises:
            ValueError: there is none, or none that the package ``tokenizers`` can run.
            ModuleNotFoundError: ``transformers`` is not installed.
        """
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError as cause:
            message = f"the tokenizer {path} needs the package transformers: pip install 'lightning-lab[text]'"
            raise ModuleNotFoundError(message) from cause
        try:
            with _quiet():
                found: Any = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        except Exception as cause:  # of the network, of the hub, of whatever reads the files
            said = " ".join(str(cause).split())
            raise ValueError(
                f"no tokenizer can be loaded from {path}: {said} (tokenizers of lab's own: words, characters)"
            ) from cause
        if not getattr(found, "is_fast", False) or found.backend_tokenizer is None:
            raise ValueError(f"the tokenizer {path} is not one that the package tokenizers can run")
        fast = found.backend_tokenizer
        fast.no_padding()
        fast.no_truncation()
        return cls(fast.to_str(), PADDING if found.pad_token_id is None else int(found.pad_token_id))

    def ids(self, texts: Sequence[str], longest: int) -> list[list[int]]:
        """Each text's ids, ``longest`` at most, its special tokens among them."""
        self._fast.enable_truncation(longest)
        return [encoding.ids for encoding in self._fast.encode_batch(list(texts))]

    def state(self) -> dict[str, Any]:
        """All of it: a run does without the hub or folder that it came from."""
        return {"tokenizer": self._written, "padding": self.padding}


def restored(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer that gave a state."""
    if "tokenizer" in state:
        return Pretrained(state["tokenizer"], state["padding"])
    return Pieces(state["kind"], state["vocabulary"])


def pieces(kind: str, text: str) -> list[str]:
    """A text's words or characters, in order."""
    return list(text) if kind == "characters" else _WORD.findall(text.lower())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
