"""Recipes broken at random: whatever is wrong, it is a problem with a place, and never another exception.

More of them than the suite checks, and trainings of those that are right:
    python tests/test_fuzz.py 2000
    python tests/test_fuzz.py --smoke 50
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab import document, recipe
from lab.check import check
from lab.document import RecipeError
from lab.plan import Plan
from lab.types import check_types

HANG = 60
"""Seconds after which a check is said to hang."""
TRAINING_HANG = 240
"""Seconds after which a shortened training is."""

EVERYTHING = """\
description: every sort of thing that a recipe has
seed: 3
data: {name: digits, batch_size: 8, labels: 100}
trainer: {max_epochs: 2, precision: 32-true, devices: 1, accelerator: cpu}
callbacks: {early_stopping: {patience: 3}, checkpoints: {every_seconds: 1.5}, profile: null}
logger: [csv, {name: wandb, project: p, tags: [a, b]}]
require: {student.test/accuracy: '>= 0.1'}
stages:
  student:
    data: {labels: null}
    module:
      name: distill
      network: {name: convnet, width: 4}
      objective: {name: classification, measures: [accuracy, f1]}
      teacher: [{from: teacher}, {from: old, checkpoint: last}, {name: mlp, hidden: [2, 3]}]
      teacher_weights: [1.0, 2.0, 3]
    require: {val/accuracy: '< 1'}
  teacher:
    module: {name: supervised, network: {name: mlp, hidden: []}, optimizer: {name: sgd, lr: 0.1, momentum: 0.9}}
  old:
    seed: 4
    module:
      name: supervised
      network: {from: teacher, head: reset}
      scheduler: {name: one_cycle, max_lr: 0.1}
"""
SOURCES = [*(path.read_text(encoding="utf-8") for path in recipe.bundled().values()), EVERYTHING]
TREES = [document.parse(text, document.Place("source")).plain() for text in SOURCES]
WORDS = sorted(
    {
        "name", "from", "class_path", "hidden", "width", "head", "monitor", "stages", "extends", "sweep", "teacher",
        "mlp", "convnet", "lenet", "adam", "cosine", "plateau", "step", "csv", "digits", "arrays", "path", "main",
        "early_stopping", "latest", "a/b", "null", "yes", "", "<<", "torch.nn.Linear", "os.system", "../..",
        "\x1b[31m", "a\nb", "é", "x" * 300, "\u202e", "\u0130", "\U0001f600", "\ufeff", "a\u0301", "{name: mlp}", "*",
        "!!python/name:os.system", "supervised", "timm", "transformers", "wandb", "mlflow", "one_cycle", "sgd", "flip",
        "cutmix", "bf16-mixed", "ddp", "cuda", "distill", "supervised.yaml", "recipe.yaml",
        *(key for tree in TREES for key in (*tree, *tree.get("stages", ()))),
    }
)  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63 - 1, 0.0, 0.5, -0.5, 1e-300, 1e300, float("inf"), float("nan"),
    "", [], {}, [1], [[]], [None], {"a": 1}, {"name": None}, {"from": None}, {"name": "mlp"}, {"name": "adam"},
    {"from": "teacher"}, {"name": "cosine"}, {"name": "classification"}, {"name": "digits"}, {"name": "wandb"},
    {"name": "early_stopping"}, {"name": "mlp", "hidden": [1]}, [{"name": "flip"}], {"from": "../x/y"}, 10**12,
    -(2**63), 0.1, 1e-3, 4, 16, "max", "min", "auto", [0.9, 0.99], ["a"], {"\u202e": "x"},
]  # fmt: skip

Steps = tuple[Any, ...]


def places(tree: Any, path: Steps = ()) -> list[Steps]:
    """Every path of a tree, the root's left out."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, child in children for found in ((*path, key), *places(child, (*path, key)))]


def at(tree: Any, path: Steps) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: Steps, value: Any) -> None:
    at(tree, path[:-1])[path[-1]] = value


def drop(tree: Any, path: Steps, dice: random.Random) -> None:
    del at(tree, path[:-1])[path[-1]]


def rename(tree: Any, path: Steps, dice: random.Random) -> None:
    parent = at(tree, path[:-1])
    if isinstance(parent, dict):
        key = str(path[-1])
        cut = dice.randrange(len(key) + 1)
        new = dice.choice([dice.choice(WORDS), key[:cut] + key[cut + 1 :], key + "s", key[::-1], key.upper()])
        entries = [(new if k == path[-1] else k, v) for k, v in parent.items()]
        parent.clear()
        parent.update(entries)


def duplicate(tree: Any, path: Steps, dice: random.Random) -> None:
    parent = at(tree, path[:-1])
    if isinstance(parent, dict):
        parent[dice.choice(WORDS)] = copy.deepcopy(parent[path[-1]])
    else:
        parent.append(copy.deepcopy(parent[path[-1]]))


def retype(tree: Any, path: Steps, dice: random.Random) -> None:
    old = at(tree, path)
    others = [str(old), [old], {"name": old}, {"from": old}, {str(path[-1]): old}, not old]
    put(tree, path, copy.deepcopy(dice.choice([dice.choice(VALUES), dice.choice(WORDS), dice.choice(others)])))


def swap(tree: Any, path: Steps, dice: random.Random) -> None:
    other = dice.choice(places(tree))
    if path[: len(other)] != other and other[: len(path)] != path:
        mine, its = at(tree, path), at(tree, other)
        put(tree, path, its)
        put(tree, other, mine)


def graft(tree: Any, path: Steps, dice: random.Random) -> None:
    source = dice.choice(TREES)
    put(tree, path, copy.deepcopy(at(source, dice.choice(places(source)))))


def nudge(tree: Any, path: Steps, dice: random.Random) -> None:
    """What should leave a recipe right: another whole number or fraction of the same size, another order of keys."""
    value = at(tree, path)
    if isinstance(value, dict):
        entries = sorted(value.items(), key=lambda _: dice.random())
        value.clear()
        value.update(entries)
    elif isinstance(value, int | float) and not isinstance(value, bool) and value:
        put(tree, path, value + 1 if isinstance(value, int) and dice.random() < 0.5 else value)


def nest(tree: Any, path: Steps, dice: random.Random) -> None:
    """Deeper, up to deeper than a recipe may be."""
    value = at(tree, path)
    for _ in range(dice.choice([1, 2, 5, 60, 100])):
        value = dice.choice([[value], {"a": value}, {"name": value}, {"name": "mlp", "hidden": value}, {"from": value}])
    put(tree, path, value)


def extend(tree: Any, path: Steps, dice: random.Random) -> None:
    """On top of other recipes, or of what is none."""
    names = [*recipe.bundled(), "recipe.yaml", "none.yaml", "..", "", 3, None, "text.yaml", "\u202e.yaml"]
    chosen = [dice.choice(names) for _ in range(dice.choice([1, 1, 2, 3]))]
    tree["extends"] = chosen if len(chosen) > 1 or dice.random() < 0.3 else chosen[0]


WRONG: list[Callable[[Any, Steps, random.Random], None]] = [drop, rename, duplicate, retype, swap, graft, nest, extend]


def scratch(text: str, dice: random.Random) -> str:
    """A text with a few characters taken out, put in or doubled."""
    for _ in range(dice.choice([1, 1, 2, 5])):
        i = dice.randrange(len(text) + 1)
        j = min(len(text), i + dice.choice([1, 1, 1, 5, 40]))
        piece = dice.choice(
            ["", "", text[i:j] * 2, dice.choice("{}[]:,-&*!|>'\"%#\t\n \0\x85é?@`"), dice.choice(WORDS)]
        )
        text = text[:i] + piece + text[j:]
    return text


def overridden(tree: Any, dice: random.Random) -> str:
    path = [str(key) for key in dice.choice(places(tree) or [("seed",)])]
    if dice.random() < 0.3:
        path[dice.randrange(len(path))] = dice.choice(WORDS)
    value = dice.choice(
        [dice.choice(["1", "0.5", "null", "[1]", "{a: 1}", "'", "*x", "{name: mlp}", ""]), dice.choice(WORDS)]
    )
    return f"{'.'.join(path)}={value}"


def broken(seed: int) -> tuple[str, list[str]]:
    """A recipe with some things wrong, or none, and overrides."""
    dice = random.Random(seed)
    tree = copy.deepcopy(dice.choice(TREES))
    for _ in range(dice.choice([0, 1, 3])):
        nudge(tree, dice.choice(places(tree)), dice)
    for _ in range(dice.choice([0, 0, 0, 0, 1, 1, 2, 4])):
        if found := places(tree):
            dice.choice(WRONG)(tree, dice.choice(found), dice)
    overrides = [overridden(tree, dice) for _ in range(dice.choice([1, 1, 3]))] if dice.random() < 0.15 else []
    text = document.dump(tree)
    return (scratch(text, dice) if dice.random() < 0.15 else text), overrides


@contextlib.contextmanager
def guarded(seconds: float) -> Iterator[None]:
    """Ends what takes longer, so that a hang is a failure that names its example."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def accepted(text: str, overrides: list[str]) -> Plan | None:
    """The plan of a recipe that is right; None for one that is wrong, each of whose problems has its place."""
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    try:
        plan = check(recipe.load("recipe.yaml", overrides))
        check_types(plan)
    except RecipeError as error:
        refuse_unplaced(error)
        return None
    Path("again.yaml").write_text(document.dump(plan.resolved()), encoding="utf-8")
    again = check(recipe.load("again.yaml"))
    assert repr(again.resolved()) == repr(plan.resolved())  # nan is itself
    check_types(again)
    return plan


def refuse_unplaced(error: RecipeError) -> None:
    bundled = {str(path) for path in recipe.bundled().values()}
    assert error.problems
    for problem in error.problems:
        source = problem.place.source
        assert problem.message.strip()
        assert problem.place.line or not problem.place.is_file or problem.message == "is empty", problem
        assert source == "recipe.yaml" or source in bundled or source.startswith("override "), problem
        assert "\n" not in str(problem)
        assert "Node(" not in str(problem)
    assert len(set(map(str, error.problems))) == len(error.problems)


def test_no_recipe_raises_anything_but_problems_with_their_places() -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**64))
    def run(seed: int) -> None:
        with guarded(HANG):
            outcomes["right" if accepted(*broken(seed)) else "wrong"] += 1

    gc.collect()  # what other tests left, such as loaders that wait for their workers, is not what is watched
    run()
    assert outcomes.total() >= 200
    assert outcomes["right"] >= 0.3 * outcomes.total(), outcomes
    assert outcomes["wrong"] >= 0.3 * outcomes.total(), outcomes


def smoked(seed: int) -> str | None:
    """How ``fit --smoke`` of a recipe that was broken at random ends; None where it is no right and changed one.

    ``finished`` and ``refused: ...`` are well; ``defect: ...`` is a traceback, a hang, or no word about what was wrong.
    """
    text, overrides = broken(seed)
    changed = text not in {document.dump(tree) for tree in TREES} or overrides
    if not changed or accepted(text, overrides) is None:
        return None
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lab", "fit", "recipe.yaml", "--smoke", *overrides]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            _, err = process.communicate(timeout=TRAINING_HANG)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"defect: no end in {TRAINING_HANG} s"
    said = [line for line in err.splitlines() if line != "--debug shows where"]
    last = said[-1] if said else ""
    if "Traceback" in err or process.returncode not in (0, 1, 2, 3):
        return f"defect: exit code {process.returncode}: {last}"
    if process.returncode in (0, 3):
        return "finished"
    return f"refused: {last}" if last else "defect: no word"


def test_recipes_that_are_right_train_or_say_what_is_wrong() -> None:
    found = (ending for seed in range(100, 200) if (ending := smoked(seed)) is not None)
    endings = [next(found) for _ in range(3)]
    assert not [ending for ending in endings if ending.startswith("defect")]
    assert "finished" in endings


def fuzz(examples: int, start: int) -> int:
    """Check recipes, and print how they ended; the number of defects."""
    outcomes: Counter[str] = Counter()
    slowest = (0.0, 0)
    for seed in range(start, start + examples):
        began = time.monotonic()
        try:
            with guarded(HANG):
                outcomes["accepted" if accepted(*broken(seed)) else "refused"] += 1
        except Exception as cause:  # each is a defect
            outcomes["defects"] += 1
            print(f"seed {seed}: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}", flush=True)
        slowest = max(slowest, (time.monotonic() - began, seed))
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"{counts}; the slowest took {slowest[0]:.1f} s (seed {slowest[1]})")
    return outcomes["defects"]


def smoke(examples: int, start: int) -> int:
    """Start trainings, and print how they ended; the number of defects."""
    outcomes: Counter[str] = Counter()
    seed = start
    while outcomes.total() < examples:
        if (ending := smoked(seed)) is not None:
            outcomes[ending.partition(":")[0]] += 1
            print(f"seed {seed}: {ending}", flush=True)
        seed += 1
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    return outcomes["defect"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", type=int)
    parser.add_argument("--smoke", action="store_true", help="train those that are right, as many as EXAMPLES")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        return bool((smoke if options.smoke else fuzz)(options.examples, options.start))


if __name__ == "__main__":
    sys.exit(main())
