"""What the evaluation of a policy brings: an end at a return, its curve, and an episode to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lab.callbacks import Lean
from lab.datamodules.gym import Gym
from lab.datamodules.rollouts import seed_of
from lab.environments.film import film
from lab.errors import UserError
from lab.modes import evaluating
from lab.pictures import COLORS, grid, styled
from lab.ranges import Count, checked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MONITOR = "val/return"


class Evaluation(Lean):
    """Follows the return of a policy's most probable actions; draws its curve and an episode; may stop at a return.

    The data play the episodes, in environments of their own with seeds of their own (``val_episodes`` after every
    epoch). Every technique of reinforcement learning has one of these unless the recipe says otherwise.

    Args:
        stop_at: training ends with the first evaluation whose mean return is at least this; None: with its budget.
        film: whether an episode of the policy that is kept is drawn, as a GIF.
        fps: of the film; the environment's own where it is left out.

    Raises:
        UserError: there is a return to stop at, and nothing evaluates.
    """

    @checked
    def __init__(self, stop_at: float | None = None, film: bool = True, fps: Count | None = None) -> None:
        self.stop_at = stop_at
        self.film = film
        self.fps = fps
        self.curve: list[tuple[float, float, float | None]] = []
        """Of each evaluation: steps of the environments, its return, and that of the episodes trained on."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stop_at is not None and not trainer.enable_validation:
            raise UserError("evaluation: stop_at needs an evaluation, and there is no validation")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics.get(MONITOR)
        if not trainer.training and not trainer.fit_loop.epoch_loop.global_step:
            return
        if found is None or trainer.sanity_checking:
            return
        trained = trainer.callback_metrics.get("train/return")
        steps = float(getattr(pl_module, "env_steps", trainer.global_step))
        self.curve.append((steps, float(found), None if trained is None else float(trained)))
        if self.stop_at is not None and float(found) >= self.stop_at:
            trainer.should_stop = True

    def pictures(self, trainer: Trainer, module: LightningModule) -> dict[str, Figure | bytes]:
        """The curve of returns, and an episode."""
        found: dict[str, Figure | bytes] = {"returns": self._drawn()} if self.curve else {}
        data: Any = getattr(trainer, "datamodule", None)
        if self.film and isinstance(data, Gym):
            try:
                with evaluating(module):
                    found["episode"], _ = film(data.making, data.policy(), seed_of("film", data.seed), self.fps)
            except Exception as cause:  # whatever an environment's own drawing may raise
                rank_zero_warn(f"there is no film of an episode: {' '.join(str(cause).split())}{_install(cause)}")
        return found

    def _drawn(self) -> Figure:
        steps, judged, trained = zip(*self.curve, strict=True)
        with styled():
            figure, (ax,) = grid(1, width=5.2, height=3.2)
            known = [(step, value) for step, value in zip(steps, trained, strict=True) if value is not None]
            if known:
                ax.plot(*zip(*known, strict=True), color=COLORS[7], label="training, drawn actions")
            marker = "o" if len(steps) < 30 else None
            ax.plot(steps, judged, color=COLORS[0], label="evaluation, most probable actions", marker=marker, ms=3)
            if self.stop_at is not None:
                ax.axhline(self.stop_at, color=COLORS[1], linewidth=0.8, linestyle="--", label="stop at")
            ax.set(xlabel="steps of the environments", ylabel="mean return of an episode")
            ax.locator_params(axis="x", nbins=6)
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            ax.legend(loc="best")
        return figure


def _install(cause: Exception) -> str:
    missing = isinstance(cause, ImportError) or "not installed" in str(cause)
    return "; pip install 'lightning-lab[render]' (the rest works without)" if missing else ""
