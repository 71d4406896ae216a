"""Balancing a pole: lab's PPO and A2C beside Stable-Baselines3's, with the same settings and with lab's own.

    pip install stable-baselines3
    python benchmarks/rl.py [ROUNDS] [ppo] [a2c]

CartPole-v1, one thread, every contestant once a round, in turns; medians over the rounds. Settings of the zoo:
https://github.com/DLR-RM/rl-baselines3-zoo (8 environments; PPO: rollouts of 32 steps, 20 passes, batches of 256;
A2C: rollouts of 5 steps). Steps a second are of training alone, all that ``lab fit`` does in it included.

Seconds to 475, of training, by two measures. ``solved``: the mean of the last 100 episodes of training is 475, which is
CartPole-v1's own definition. ``evaluated``: the first evaluation (20 episodes, most probable actions) reaches it,
one each 5,000 steps for Stable-Baselines3 and one an epoch for lab; a policy that still learns may reach it by luck and
lose it again. The time of evaluations is taken off Stable-Baselines3's only.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from lab import fit
from lab.callbacks import Lean
from lab.registry import callbacks

try:
    import stable_baselines3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
except ImportError:
    sys.exit("this measures beside Stable-Baselines3: pip install stable-baselines3")

GOAL = 475.0
EVERY = 5_000
RECIPES = Path(__file__).parents[1] / "recipes"
NETWORK = {"name": "mlp", "hidden": [64, 64], "activation": "tanh"}
ZOO: dict[str, dict[str, Any]] = {
    "ppo": {
        "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "ent_coef": 0.0,
        "learning_rate": lambda left: 0.001 * left, "clip_range": lambda left: 0.2 * left,
    },
    "a2c": {"ent_coef": 0.0},
}  # fmt: skip
SAME: dict[str, dict[str, Any]] = {
    "ppo": {
        "data": {"rollout": 32},
        "module": {
            "name": "ppo", "network": NETWORK, "optimizer": {"name": "adam", "lr": 0.001, "eps": 1e-5, "fused": True},
            "scheduler": "warmup_linear", "epochs": 20, "minibatches": 1, "clip": 0.2, "clip_end": 0.0, "gamma": 0.98,
            "gae_lambda": 0.8,
        },
    },
    "a2c": {
        "data": {"rollout": 5},
        "module": {
            "name": "actor_critic", "network": NETWORK, "gamma": 0.99, "gae_lambda": 1.0,
            "optimizer": {"name": "rmsprop", "lr": 0.0007, "alpha": 0.99, "eps": 1e-5, "foreach": True},
        },
    },
}  # fmt: skip
STEPS = {"zoo": 24_000, "same": 48_000, "own": 150_000}
"""How long speed is measured."""
BUDGET = {"ppo": 100_000, "a2c": 500_000}
"""The zoo's."""


class Solved(BaseCallback):
    """Stops when the last 100 episodes have a mean of 475; keeps the seconds."""

    reached = math.inf

    def _on_training_start(self) -> None:
        self.began = time.perf_counter()

    def _on_step(self) -> bool:
        return math.isinf(self.reached)

    def _on_rollout_end(self) -> None:
        returns = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        if math.isinf(self.reached) and len(returns) == 100 and sum(returns) / 100 >= GOAL:
            self.reached = time.perf_counter() - self.began


class LabSolved(Lean):
    """The same of lab's training; ends it."""

    watches_only = True
    reached = math.inf

    def __init__(self) -> None:
        self.returns: deque[float] = deque(maxlen=100)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.returns.extend(batch.episode_returns.tolist())
        if math.isinf(self.reached) and len(self.returns) == 100 and sum(self.returns) / 100 >= GOAL:
            LabSolved.reached = time.perf_counter() - self.began
            trainer.should_stop = True


class Watch(BaseCallback):
    """Evaluates now and then; stops at the goal; keeps the seconds of training."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.played = make_vec_env("CartPole-v1", 20, seed=10_000 + seed)
        self.next, self.aside, self.reached = EVERY, 0.0, math.inf

    def _on_training_start(self) -> None:
        self.began = time.perf_counter()

    def _on_step(self) -> bool:
        if self.num_timesteps < self.next:
            return True
        self.next += EVERY
        now = time.perf_counter()
        found, _ = evaluate_policy(self.model, self.played, 20)
        after = time.perf_counter()
        if found >= GOAL:
            self.reached = now - self.began - self.aside
            self.steps = self.num_timesteps
            return False
        self.aside += after - now
        return True


def zoo(name: str, seed: int) -> Any:
    """Stable-Baselines3's with the zoo's settings."""
    kind = stable_baselines3.PPO if name == "ppo" else stable_baselines3.A2C
    return kind("MlpPolicy", make_vec_env("CartPole-v1", 8, seed=seed), seed=seed, device="cpu", **ZOO[name])


def zoo_speed(name: str, seed: int) -> float:
    model = zoo(name, seed)
    began = time.perf_counter()
    model.learn(STEPS["zoo"])
    return STEPS["zoo"] / (time.perf_counter() - began)


def zoo_solved(name: str, seed: int) -> float:
    watch = Solved()
    zoo(name, seed).learn(BUDGET[name], callback=watch)
    return watch.reached


def zoo_goal(name: str, seed: int) -> float:
    watch = Watch(seed)
    zoo(name, seed).learn(BUDGET[name], callback=watch)
    return watch.reached


def recipe(name: str, settings: str, seed: int, steps: int | None) -> dict[str, Any]:
    """What lab trains; without evaluation where ``steps`` are given."""
    file = {"ppo": "ppo", "a2c": "actor_critic"}[name]
    own = yaml.safe_load((RECIPES / f"{file}.yaml").read_text())
    found: dict[str, Any] = {"data": own["data"], "module": own["module"]}
    if settings == "same":
        often = {"ppo": 20, "a2c": 125}[name]  # some 5,000 steps
        size = {"name": "gym", "environment": "CartPole-v1", "num_envs": 8, "rollouts_per_epoch": often,
                "env_steps": BUDGET[name]}  # fmt: skip
        found = {"data": {**size, **SAME[name]["data"]}, "module": SAME[name]["module"]}
    watching: dict[str, Any] = {"progress": None, "profile": None, "evaluation": {"stop_at": GOAL, "film": False}}
    trainer: dict[str, Any] = {}
    if steps is not None:
        found["data"]["env_steps"] = steps
        watching["evaluation"] = {"film": False}
        trainer = {"limit_val_batches": 0}
    found["data"]["test_episodes"] = 1
    return {**found, "seed": seed, "logger": "csv", "callbacks": watching, "trainer": trainer}


def lab_trained(name: str, settings: str, seed: int, steps: int | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = fit(recipe(name, settings, seed, steps), out=Path(folder), fresh=True)
        return dict(run.results["stages"]["main"])


def lab_speed(name: str, settings: str, seed: int) -> float:
    found = lab_trained(name, settings, seed, STEPS[settings])
    return float(found["env_steps"] / found["train_seconds"])


def lab_solved(name: str, settings: str, seed: int) -> float:
    LabSolved.reached = math.inf
    found = recipe(name, settings, seed, recipe(name, settings, seed, None)["data"]["env_steps"])
    found["callbacks"]["solved"] = {"name": "solved"}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(found, out=Path(folder), fresh=True)
    return LabSolved.reached


def lab_goal(name: str, settings: str, seed: int) -> float:
    found = lab_trained(name, settings, seed, None)
    reached = found["metrics"].get("val/return", 0.0) >= GOAL
    return float(found["train_seconds"]) if reached else math.inf


Measure = Callable[[int], float]


def contestants_of(name: str) -> dict[str, tuple[Measure, Measure, Measure]]:
    """Speed, and seconds by both measures, of each seed."""
    found: dict[str, tuple[Measure, Measure, Measure]] = {
        "Stable-Baselines3, zoo": tuple(partial(f, name) for f in (zoo_speed, zoo_solved, zoo_goal))  # type: ignore[dict-item]
    }
    for settings, who in (("same", "lab, the same settings"), ("own", "lab, its recipe")):
        found[who] = tuple(partial(f, name, settings) for f in (lab_speed, lab_solved, lab_goal))  # type: ignore[assignment]
    return found


def main(rounds: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    callbacks.register("solved")(LabSolved)
    lab_trained("ppo", "own", 0, 5_000)  # what is imported and compiled once is
    console = Console(width=120)
    for name in names:
        contestants = contestants_of(name)
        found: dict[str, list[tuple[float, ...]]] = {who: [] for who in contestants}
        for turn in range(rounds):
            for who in list(contestants)[turn % 3 :] + list(contestants)[: turn % 3]:
                found[who].append(tuple(measure(turn) for measure in contestants[who]))
        columns = ("steps/s", "×", "s, solved", "×", "of", "s, evaluated", "×", "of")
        table = Table("", *columns, title=f"{name}, CartPole-v1, medians of {rounds} rounds")
        peer = [statistics.median(column) for column in zip(*found["Stable-Baselines3, zoo"], strict=True)]
        for who, rows in found.items():
            cells = []
            for place, column in enumerate(zip(*rows, strict=True)):
                value = statistics.median(column)
                cells += [f"{value:,.0f}" if place == 0 else f"{value:.2f}", f"{value / peer[place]:.2f}"]
                cells += [f"{sum(map(math.isfinite, column))}/{rounds}"] if place else []
            table.add_row(who, *cells)
        console.print(table)


if __name__ == "__main__":
    counts = [int(word) for word in sys.argv[1:] if word.isdigit()]
    main(counts[0] if counts else 5, [word for word in sys.argv[1:] if not word.isdigit()] or ["ppo", "a2c"])
