"""recipes/text.yaml beside TF-IDF + logistic regression, on the same texts and the same split.

    python benchmarks/text.py [SEEDS]

scikit-learn's pipelines see words, words and pairs of words, or pieces of words of two to five characters, each with
the default regularisation (C = 1) and a weaker one (C = 10). They have no seed; the recipe's figure is the mean over
its seeds, with a 95 % interval.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from lab import repeat
from lab.batch import Labelled
from lab.datamodules.docstrings import Docstrings
from lab.statistics import estimate

PEERS: dict[str, dict[str, Any]] = {
    "words": {},
    "words and pairs": {"ngram_range": (1, 2)},
    "2 to 5 characters": {"analyzer": "char_wb", "ngram_range": (2, 5)},
}


class Raw(Docstrings):
    """The same samples as texts."""

    def texts(self, split: Labelled) -> list[str]:
        return [self._texts[row] for row in split.inputs[:, 0].tolist()]

    def prepared(self, samples: Labelled) -> Labelled:
        return samples


def main(seeds: int) -> None:
    data = Raw()
    data.prepare_data()
    data.setup()
    table = Table("", "test accuracy", title="docstrings: 5,600 to train on, 1,600 to test", title_justify="left")
    for name, options in PEERS.items():
        for c in (1, 10):
            model = make_pipeline(TfidfVectorizer(**options), LogisticRegression(C=c, max_iter=2000))
            model.fit(data.texts(data.train), data.train.targets)
            score = model.score(data.texts(data.test), data.test.targets)
            table.add_row(f"TF-IDF of {name}, logistic regression, C = {c}", f"{score:.4f}")
    runs = repeat("text", seeds=seeds)
    scores = [run.results["stages"]["main"]["metrics"]["test/accuracy"] for run in runs]
    found = estimate(scores)
    table.add_row(f"recipes/text.yaml, {seeds} seeds", f"{found.mean:.4f} ± {found.half or 0:.4f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
