"""One task after the other, and nothing against forgetting: the lower bound of continual learning."""

from __future__ import annotations

from lab.modules.continual import Continual


class Naive(Continual):
    """Learns each task as if there had been none before."""
