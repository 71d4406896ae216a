"""Weights & Biases: one W&B run a stage, offline where there is no account, and never a question at the terminal."""

from __future__ import annotations

import netrc
import os
import sys
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lab.ranges import checked


class WandB(WandbLogger):
    """Lightning's W&B logger with the resolved recipe as config and one W&B run for each stage.

    Every metric arrives with ``trainer/global_step``, as with Lightning's own. ``log_table(key, columns, rows)`` and
    ``log_image(key, images)`` are Lightning's.

    Args:
        save_dir: the stage's folder; W&B's files go to ``wandb/`` in it.
        project: the W&B project.
        entity: the W&B user or team; None: the account's default.
        group: what W&B groups runs by; lab gives the run's id.
        job_type: W&B's word for the part a run plays; lab gives the stage's name.
        title: the W&B run's display name; lab gives ``recipe/stage``.
        id: of the W&B run; lab gives one that a resumed stage has again, so that it goes on there.
        tags: W&B tags.
        notes: a longer description.
        offline: write files for a later ``wandb sync``; None: as ``WANDB_MODE`` says, else online with an API key (in
            ``WANDB_API_KEY`` or from ``wandb login``) and offline without one.

    Raises:
        ValueError: ``offline`` is false and there is no API key.
    """

    @checked
    def __init__(
        self,
        save_dir: str,
        project: str = "lab",
        *,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        title: str | None = None,
        id: str | None = None,
        tags: tuple[str, ...] = (),
        notes: str | None = None,
        offline: bool | None = None,
    ) -> None:
        import wandb

        mode = _mode(offline, Path(save_dir))
        super().__init__(
            name=title,
            save_dir=save_dir,
            project=project,
            entity=entity,
            group=group,
            job_type=job_type,
            tags=list(tags),
            notes=notes,
            mode=mode,
            id=id,
            resume="allow" if id is not None and mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._wandb_init.pop("anonymous", None)  # W&B warns of it, also of None
        self._configured = False

    @property
    def experiment(self) -> Any:
        """The ``wandb.Run``, started when it is first asked for."""
        if self._experiment is not None:
            return super().experiment
        Path(self._wandb_init["dir"]).mkdir(parents=True, exist_ok=True)  # else W&B writes to the system's /tmp
        run = super().experiment
        if self._wandb_init["mode"] == "online":
            _tell(f"Weights & Biases: {run.url}")
        return run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Make the config equal ``params``, nested as they are; the first call counts.

        Lightning calls this again at each fit and test with the arguments that a module saved: the recipe has them.
        """
        if not self._configured:
            self._configured = True
            config = vars(params) if isinstance(params, Namespace) else params
            self.experiment.config.update(config, allow_val_change=True)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run of a stage that failed; after a fit or a test that went well there is more to come."""
        if status == "failed":
            self.finish(exit_code=1)

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """Close the stage's W&B run, so that the next stage starts its own; twice is once."""
        if self._experiment is not None:
            self._wandb_init["id"] = self._id = self._experiment.id
            self._experiment.finish(exit_code=exit_code)
            self._experiment = None
            if self._wandb_init["mode"] == "online":
                self._wandb_init["resume"] = "allow"  # whoever logs again goes on with the same run


def _mode(offline: bool | None, folder: Path) -> Literal["online", "offline", "disabled"]:
    asked = os.environ.get("WANDB_MODE", "").lower()
    if offline is None and asked == "disabled":
        return "disabled"
    if offline or (offline is None and asked in ("offline", "dryrun")):
        return "offline"
    if _has_key():
        return "online"
    if offline is False:
        raise ValueError(
            "offline: false needs an API key: set WANDB_API_KEY, run `wandb login`, or leave `offline` out"
        )
    if not any(folder.parent.glob("*/wandb")):  # told by another process, which trained another stage of the run
        _tell_offline()
    return "offline"


def _has_key() -> bool:
    """Whether W&B could log in without asking: by environment, settings or netrc; nothing is sent."""
    from wandb.sdk import wandb_setup

    settings = wandb_setup.singleton().settings
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.api_key:
        return True
    hosts = [urlsplit(settings.base_url).netloc]
    if "WANDB_BASE_URL" not in os.environ:
        hosts.append("api.wandb.ai")  # what W&B itself falls back on
    named = os.environ.get("NETRC")
    paths = [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    try:
        known = next((netrc.netrc(path) for path in paths if path.exists()), None)
    except (OSError, netrc.NetrcParseError):
        return False
    return known is not None and any(known.authenticators(host) for host in hosts)


@cache
@rank_zero_only
def _tell_offline() -> None:
    """Once a process."""
    _tell(
        "Weights & Biases: no API key, so runs are kept in files; "
        "`wandb sync */wandb/offline-run-*` in the run's folder uploads them"
    )


@rank_zero_only
def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
