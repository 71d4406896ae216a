"""Validate recipes without training: every problem at once, each with file, line and column.

lab check recipes/*.yaml
"""

from __future__ import annotations

import argparse

from lab.cli import options as shared

HELP = "validate recipes without training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``lab check``."""
    shared.add_recipe(parser, several=True)
    shared.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Names, keys and wiring from source text; where those are right, types and ranges from the classes."""
    from lab import recipe
    from lab.check import check
    from lab.document import Problem, RecipeError
    from lab.registry import allow

    for package in options.imports:
        allow(package)
    problems: list[Problem] = []
    for source in options.recipes:
        try:
            plan = check(recipe.load(source))
            from lab.types import check_types

            check_types(plan)
        except RecipeError as error:
            problems += error.problems
    if options.json:
        import json

        print(json.dumps([problem.as_dict() for problem in problems], indent=2))
    elif problems:
        raise RecipeError(problems)
    else:
        count = len(options.recipes)
        print(f"{count} recipe{'s' if count > 1 else ''} checked: no problems")
    return 2 if problems else 0
