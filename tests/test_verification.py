"""``lab verify-resume`` and ``lab.testing``: what resumes exactly is said to, what doesn't is found, with a name."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from lab.cli import main
from lab.encoding import encoded
from lab.testing import check_module
from lab.verification import differences, verify

PLUGINS = {
    "remembering": """
        from lab.modules.supervised import Supervised

        class Fine(Supervised):
            def __init__(self, **supervised):
                super().__init__(**supervised)
                self.seen = []

            def training_step(self, batch, batch_idx):
                self.seen.append(batch_idx)
                return super().training_step(batch, batch_idx) * (1 + 0.01 * len(self.seen))
    """,
    "forgetful": """
        from lab.modules.supervised import Supervised

        seen = []

        class Forgetful(Supervised):
            def training_step(self, batch, batch_idx):
                seen.append(batch_idx)
                return super().training_step(batch, batch_idx) * (1 + 0.1 * len(seen))
    """,
    "unrepeatable": """
        import os
        import torch
        from lab.modules.supervised import Supervised

        class Unrepeatable(Supervised):
            def on_train_batch_end(self, outputs, batch, batch_idx):
                torch.manual_seed(int.from_bytes(os.urandom(4), "big"))
    """,
    "idle": """
        from lab.modules.supervised import Supervised

        class Idle(Supervised):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) * 0
    """,
}


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in PLUGINS.items():
        Path(f"{name}.py").write_text(dedent(source), encoding="utf-8")
    monkeypatch.syspath_prepend(str(Path.cwd()))


def recipe(module: str) -> dict[str, Any]:
    return {
        "data": {"name": "digits", "batch_size": 32},
        "module": {"name": module, "network": {"name": "mlp", "dropout": 0.5}},
    }


def test_every_break_of_what_resumes_exactly_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(json.dumps(recipe("supervised")), encoding="utf-8")
    assert main(["verify-resume", "mine.yaml", "--batches", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"main, left after {n} batches: the same" for n in (1, 2, 3)]


def test_what_was_timed_may_differ() -> None:
    one, other = (encoded({"train": {"chunk": 4, "milliseconds": {"4": time}}}) for time in (0.1, 0.2))
    assert differences(one, other) == []
    other = encoded({"train": {"chunk": 1, "milliseconds": {"4": 0.1}}})
    assert len(differences(one, other)) == 1


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("forgetful.Forgetful", "network.body.1.weight differs after batch 1 of epoch 1"),
        ("unrepeatable.Unrepeatable", "torch's random generator differs before batch 2 of epoch 1"),
    ],
)
def test_what_differs_first_is_named(module: str, said: str, tmp_path: Path) -> None:
    imports = [module.partition(".")[0]]
    (verdict,) = verify(recipe(module), folder=tmp_path / "verified", imports=imports, batches=2, places=[1])
    assert verdict.difference == said


@pytest.mark.usefixtures("plugins")
def test_a_module_that_keeps_what_it_promises_passes() -> None:
    import remembering  # type: ignore[import-not-found]

    check_module(
        remembering.Fine,
        {"network": {"name": "mlp", "hidden": [8]}},
        epochs=3,
        promises=["opens", "parallel", "learns"],
    )


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("name", "promise", "said"),
    [
        ("Forgetful", "resumes", "it does not resume exactly: main, left after 3 batches: "),
        ("Idle", "learns", r"it does not learn: test/accuracy is 0\.\d+ after 2 epochs, 0\.\d+ before"),
    ],
)
def test_a_promise_that_is_not_kept_is_an_error_that_names_it(name: str, promise: Any, said: str) -> None:
    module = getattr(__import__(name.lower()), name)
    with pytest.raises(AssertionError, match=said):
        check_module(module, {"network": {"name": "mlp", "hidden": [8]}}, promises=[promise], epochs=2)
