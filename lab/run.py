"""A run on disk: one folder with everything that a recipe produced.

``runs/<recipe>/<time>-<id>/`` holds ``recipe.yaml`` (resolved; runs again), ``manifest.json``, ``results.json``, and
a folder for every stage. Folders are never shared, and every file in them is written whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lab import document
from lab.errors import UserError
from lab.files import write_json, write_text
from lab.plan import Component, From, Plan
from lab.registry import nearest

SCHEMA = 1
LOCK = ".lock"
RUNS = Path("runs")
ENDED = ("finished", "gated")
"""The statuses, of a run or a stage, after which nothing is left to train."""
TIME = "%Y-%m-%dT%H:%M:%S%z"
VERSIONS = ("lightning-lab", "torch", "lightning", "torchmetrics", "numpy", "safetensors", "wandb")
"""The packages whose versions every manifest has, beside those that the recipe's components come from."""


class RunNotFound(UserError):
    """A path, id or ``latest`` that means no run."""


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    folder: Path

    @property
    def id(self) -> str:
        """The folder's name: when it started, and six random characters."""
        return self.folder.name

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.folder / "recipe.yaml"

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run was made of and with."""
        return _read_json(self.folder / "manifest.json")

    @property
    def results(self) -> dict[str, Any]:
        """What every stage gave so far."""
        return _read_json(self.folder / "results.json")

    @property
    def status(self) -> str:
        """``running``, ``finished``, ``gated``, ``failed``, ``interrupted`` (Ctrl-C) or ``stopped`` (SIGTERM)."""
        return str(self.results.get("status", "running"))

    def stage(self, name: str) -> Path:
        """A stage's folder."""
        return self.folder / name

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing to the run.

        Raises:
            UserError: one does already.
        """
        with open(self.folder / LOCK, "a", opener=_unfollowed, encoding="utf-8") as file:  # an opener
            if not _locked(file):
                raise UserError(f"{self.folder} is being written by another process: wait for it, or stop it first")
            yield

    @property
    def busy(self) -> bool:
        """Whether a process writes to the run now."""
        try:
            with (self.folder / LOCK).open("r+") as file:
                return not _locked(file)
        except FileNotFoundError:
            return False

    def note(self, **changes: Any) -> None:
        """Add to the manifest."""
        write_json(self.folder / "manifest.json", {**self.manifest, **changes})

    def record(self, status: str, stages: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Write ``results.json``: the run's status, and the stages' results added to those there are."""
        results = self.results
        merged = {**results["stages"], **{name: dict(result) for name, result in (stages or {}).items()}}
        ended = {"ended": time.strftime(TIME)} if status != "running" else {}
        write_json(self.folder / "results.json", {**results, "status": status, **ended, "stages": merged})
        for name, result in (stages or {}).items():
            if self.stage(name).is_dir():
                write_json(self.stage(name) / "results.json", dict(result))

    def forget(self, name: str) -> None:
        """Drop a stage's result: it is to be trained."""
        results = self.results
        kept = {stage: result for stage, result in results["stages"].items() if stage != name}
        write_json(self.folder / "results.json", {**results, "stages": kept})


def create(
    plan: Plan,
    out: Path | None = None,
    command: Sequence[str] = (),
    imports: Sequence[str] = (),
    group: str | None = None,
) -> Run:
    """A new folder for a plan, with its recipe and manifest.

    Args:
        group: what runs that belong together share; a run alone is its own group.

    Raises:
        UserError: the folder cannot be made.
    """
    parent = (out if out is not None else RUNS) / plan.name
    folder = parent / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True)
    except OSError as cause:
        raise UserError(
            f"{folder} cannot be made: {cause.strerror or cause}; choose another place with --out"
        ) from cause
    run = Run(folder)
    write_text(run.recipe, document.dump(plan.resolved(folder)))
    write_json(folder / "manifest.json", _manifest(run, plan, command, imports, group))
    seed = next(iter(plan.stages.values())).seed
    write_json(
        folder / "results.json", {"schema": SCHEMA, "run": run.id, "status": "running", "seed": seed, "stages": {}}
    )
    return run


def changed_since(this: Run) -> list[str]:
    """What is not as it was when a run began, a sentence each: packages, and the hardware."""
    manifest = this.manifest
    then = {**manifest.get("versions", {}), **manifest.get("plugins", {})}
    now = {name: platform.python_version() if name == "python" else _version(name) for name in then}
    lines = [f"{name} was {then[name]} and is {now[name]}" for name in then if then[name] != now[name]]
    before, after = manifest.get("hardware", {}), _hardware()
    return lines + [
        f"{key}: {before[key]} then, {after[key]} now" for key in after if before.get(key, after[key]) != after[key]
    ]


def locate(reference: str, base: Path = Path()) -> tuple[Run, str | None]:
    """The run, and the stage where one is named, that a path, an id or ``latest`` means.

    Args:
        reference: ``RUN`` or ``RUN/stage``.
        base: what a relative path starts from.

    Raises:
        RunNotFound: there is none; says what was looked for.
    """
    path = base / reference
    try:
        for candidate, stage in ((path, None), (path.parent, path.name)):
            if (candidate / "manifest.json").is_file() and (stage is None or (candidate / stage).is_dir()):
                return Run(candidate), stage
    except (OSError, ValueError) as cause:  # a name that no file can have
        raise RunNotFound(f"{reference} is no run: {cause}") from cause
    identity, _, stage = reference.partition("/")
    runs = {folder.name: folder for folder in folders()}
    found = runs.get(max(runs)) if identity == "latest" and runs else None
    matches = [folder for name, folder in runs.items() if name == identity or name.endswith(f"-{identity}")]
    if found is None and len(matches) == 1:
        found = matches[0]
    if found is None:
        what = "is a folder, but no run (it has no manifest.json)" if path.is_dir() else "is no run: no such folder"
        hint = f", nor an id in {RUNS}/{nearest(identity, runs) if runs else ''}" if not path.is_dir() else ""
        raise RunNotFound(f"{reference} {what}{hint}")
    if stage and not (found / stage).is_dir():
        stages = [entry.name for entry in found.iterdir() if entry.is_dir()]
        raise RunNotFound(f"the run {found.name} has no stage '{stage}'{nearest(stage, stages)}")
    return Run(found), stage or None


def folders(out: Path = RUNS) -> list[Path]:
    """The folders of all runs below ``out``, which has a folder for each recipe, in no order."""
    return [manifest.parent for manifest in out.glob("*/*/manifest.json")]


def _unfollowed(path: str, flags: int) -> int:
    """Open a file, but not one that a link leads to."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o644)


def _locked(file: IO[str]) -> bool:
    """Take the file's lock, which goes when it is closed or its process dies; False where another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise RunNotFound(f"{path} cannot be read: {cause}") from cause
    if not isinstance(data, dict):
        raise RunNotFound(f"{path} is damaged: expected a mapping")
    return data


def _manifest(
    run: Run, plan: Plan, command: Sequence[str], imports: Sequence[str], group: str | None
) -> dict[str, Any]:
    packages = {
        c.entry.package for stage in plan.stages.values() for c in stage.components() if isinstance(c, Component)
    }
    plugins = sorted(package for package in packages if package not in ("lightning-lab",))
    parents = [
        c.source for s in plan.stages.values() for c in s.components() if isinstance(c, From) and "/" in c.source
    ]
    return {
        "schema": SCHEMA,
        "run": run.id,
        "recipe": plan.name,
        "group": group or run.id,
        "command": list(command),
        "imports": list(imports),
        "started": time.strftime(TIME),
        "seed": next(iter(plan.stages.values())).seed,
        "parents": parents,
        "origins": _origins(run, plan),
        "plugins": versions(*plugins),
        "versions": {"python": platform.python_version(), **versions(*VERSIONS)},
        "hardware": _hardware(),
        "git": _git(run.folder),
        "data": {},
        "callbacks": {},
    }


def _origins(run: Run, plan: Plan) -> dict[str, str]:
    """The folders of the stages of other runs that the plan takes networks from: what ``latest`` means now, too."""
    references = [c for stage in plan.stages.values() for c in stage.components() if isinstance(c, From)]
    found: dict[str, str] = {}
    for reference in references:
        if "/" in reference.source:
            with contextlib.suppress(UserError):  # told where the network is read
                folder = stage_of(*locate(reference.source, reference.folder))
                found[reference.source] = Path(os.path.relpath(folder, run.folder)).as_posix()
    return found


def stage_of(run: Run, name: str | None) -> Path:
    """The folder of a run's stage, by name, or of its only one.

    Raises:
        RunNotFound: it has several.
    """
    stages = list(run.results.get("stages", {}))
    if name is None and len(stages) != 1:
        raise RunNotFound(f"{run.id} has the stages {', '.join(stages)}: name one")
    return run.stage(name or stages[0])


def versions(*packages: str) -> dict[str, str | None]:
    """The installed versions of packages; None of those that aren't."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    threads = torch.get_num_threads() if torch else None  # sums of other numbers of threads are rounded otherwise
    return {
        "platform": platform.platform(), "processor": platform.machine(), "cpus": os.cpu_count(), "threads": threads,
        "gpus": gpus,
    }  # fmt: skip


def _git(folder: Path) -> dict[str, Any] | None:
    """The commit of the working directory, and the difference to it, kept beside the manifest where there is one."""

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", *arguments], capture_output=True, check=True, timeout=20).stdout

    try:
        commit = git("rev-parse", "HEAD").decode().strip()
        difference = git("diff", "HEAD", "--no-ext-diff")
    except (OSError, subprocess.SubprocessError):
        return None
    if difference and len(difference) <= document.MAX_BYTES:
        (folder / "uncommitted.patch").write_bytes(difference)
    return {"commit": commit, "dirty": bool(difference), "diff_sha256": hashlib.sha256(difference).hexdigest()}
