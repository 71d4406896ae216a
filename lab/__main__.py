"""``python -m lab`` is ``lab``: like it, it takes no modules from the working directory, where ``-m`` looks first."""

import os
import sys

if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:  # noqa: PTH109  # pathlib itself might lie there
    del sys.path[0]

from lab.cli import script

script()
