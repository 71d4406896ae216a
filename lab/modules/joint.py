"""All tasks at once: the upper bound of continual learning.

It sees in every epoch the samples of all tasks, in one order, and takes as many steps in all as the others do.
"""

from __future__ import annotations

from typing import ClassVar

from lab.modules.continual import Continual


class Joint(Continual):
    """Learns all tasks together."""

    at_once: ClassVar[bool] = True
