"""What ``pip install`` leaves behind: packages with entry points, in a folder that only a test puts on the path."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from shutil import copytree
from typing import NamedTuple

AURORA = Path(__file__).parent / "aurora"


def install(
    site: Path, name: str, entry_points: Mapping[str, Mapping[str, str]], files: Mapping[str, str] | None = None
) -> None:
    """A distribution of one version, with these files."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\nName: not this one\n")
    (info / "RECORD").write_text("")
    groups = [[f"[{group}]", *(f"{k} = {v}" for k, v in named.items()), ""] for group, named in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(line for group in groups for line in group))
    for file, text in (files or {}).items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_text(text)


def install_aurora(site: Path) -> None:
    """The package beside this file, with the entry points of its ``pyproject.toml``."""
    project = tomllib.loads((AURORA / "pyproject.toml").read_text())["project"]
    install(site, project["name"], project["entry-points"])
    copytree(AURORA / "aurora", site / "aurora")


def run(arguments: list[str], *, site: Path | None, folder: Path) -> subprocess.CompletedProcess[str]:
    """A Python process with the packages of ``site``, and without the working directory, as any installed command."""
    environment = {**os.environ, "WANDB_MODE": "offline", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    paths = [str(site) if site is not None else "", os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return subprocess.run(
        [sys.executable, "-P", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def lab(*arguments: str, site: Path | None = None, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command ``lab``."""
    return run(["-m", "lab", *arguments], site=site, folder=folder)


_EACH = """
import contextlib, io, json, sys
from lab.cli import main

told = []
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        code = main(command.split())
    told.append((code, output.getvalue(), errors.getvalue()))
print(json.dumps(told))
"""


class Told(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    output: str
    errors: str


def lab_each(*commands: str, site: Path | None = None, folder: Path) -> dict[str, Told]:
    """Several commands ``lab``, one after the other in one process: torch is imported once."""
    finished = run(["-c", _EACH, *commands], site=site, folder=folder)
    assert finished.returncode == 0, finished.stderr
    return {command: Told(*told) for command, told in zip(commands, json.loads(finished.stdout), strict=True)}
