"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.errors import plain

__all__ = [
    "add_import", "add_json", "add_recipe", "add_run", "console", "located", "opened", "plain", "uncollected",
]  # fmt: skip


def add_recipe(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """RECIPE, overrides and ``--import``."""
    if several:
        parser.add_argument("recipes", metavar="RECIPE", nargs="+", help="a file, or the name of a bundled recipe")
    else:
        parser.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a bundled recipe")
        parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as trainer.max_epochs=3")
    add_import(parser)


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN, overrides of its data, and ``--import``."""
    parser.add_argument(
        "reference", metavar="RUN[/STAGE]", help="a run's folder, its id, or `latest`; its last stage by default"
    )
    parser.add_argument(
        "overrides", metavar="data.key=value", nargs="*", help="other data, or the same with other arguments"
    )
    add_import(parser)


def add_import(parser: argparse.ArgumentParser) -> None:
    """``--import``: allow the classes of a package."""
    parser.add_argument(
        "--import", dest="imports", metavar="PACKAGE", action="append", default=[],
        help="import a package first: its classes may be named in full; may be repeated",
    )  # fmt: skip


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def located(options: argparse.Namespace) -> tuple[Any, str | None]:
    """The run, and the stage where one is named, that a command's arguments mean; its packages are imported.

    Raises:
        UserError: the run was made with packages that the command does not allow.
    """
    from lab import run
    from lab.errors import UserError
    from lab.registry import allow

    this, name = run.locate(options.reference, Path())
    for package in this.manifest.get("imports", []):
        if package not in options.imports:
            raise UserError(f"this run was made with --import {package}: repeat it to allow that package's classes")
    for package in options.imports:
        allow(package)
    return this, name


def opened(options: argparse.Namespace) -> tuple[Any, str | None, Any, Any]:
    """The run and stage that a command's arguments mean, built, with a trainer that writes nothing."""
    this, name = located(options)

    from lab.assemble import open_stage

    built, trainer = open_stage(this, name, options.overrides)
    return this, built.stage.name, built, trainer


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """For commands that only read source: to look for garbage among syntax trees, which all stay, costs a third."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def console(**settings: Any) -> Any:
    """Where tables are printed; wide enough for a whole scoreboard where nobody watches."""
    from rich.console import Console

    probe = Console()
    return probe if probe.is_terminal else Console(width=160, **settings)
