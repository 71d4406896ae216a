"""``python -m lab`` is ``lab``."""

from lab.cli import script

script()
