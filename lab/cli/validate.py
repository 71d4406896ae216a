"""Validate a finished run's network again, also on other data.

lab validate latest/student
"""

from __future__ import annotations

import argparse

from lab.cli.test import add_arguments, evaluate

HELP = "validate a finished run, also on other data"

__all__ = ["HELP", "add_arguments", "run"]


def run(options: argparse.Namespace) -> int:
    """Print the validation metrics."""
    return evaluate(options, "validate")
