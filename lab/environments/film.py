"""An episode as a film: what a policy does, as a GIF."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lab.batch import Policy
from lab.environments.acting import to_environment
from lab.environments.making import Making
from lab.environments.stepping import Serial, Stacked

WIDEST = 300
"""Pixels a side that a film has at most."""
FRAMES = 160
"""How many pictures a film has at most: of a longer episode every second, third, …"""
COLOURS = 64


def film(making: Making, policy: Policy, seed: int, fps: int | None = None) -> tuple[bytes, float]:
    """An episode of the most probable actions as a GIF file, and its return.

    Args:
        making: the environment.
        policy: is asked for every action.
        seed: of the episode.
        fps: frames a second; None: as fast as the environment says that it runs.

    Raises:
        ImportError: what draws the environment is not installed; the message has the line that installs it.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without a display
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    environments = making.make(1, render_mode="rgb_array")
    inner = environments.inner if isinstance(environments, Stacked) else environments
    assert isinstance(inner, Serial)
    drawn = inner.environments[0]
    try:
        observations, total, over = environments.reset(seed), 0.0, False
        frames = [_frame(drawn.render())]
        while not over:
            actions = policy.best(torch.from_numpy(observations)).numpy()
            step = environments.step(to_environment(actions, environments.action_space))
            observations, total, over = step.observations, total + float(step.rewards[0]), bool(step.done[0])
            if not over:  # then it has begun anew
                frames.append(_frame(drawn.render()))
    finally:
        environments.close()
    rate = fps or int(drawn.metadata.get("render_fps", 30))
    return gif(frames, rate), total


def gif(frames: list[Image.Image], fps: int) -> bytes:
    """Pictures as a GIF file that repeats."""
    every = -(-len(frames) // FRAMES)
    kept = [frame.quantize(COLOURS) for frame in frames[::every]]
    content = io.BytesIO()
    kept[0].save(
        content, format="GIF", save_all=True, append_images=kept[1:], duration=max(20, 1000 * every // fps), loop=0
    )
    return content.getvalue()


def _frame(picture: Any) -> Image.Image:
    pixels: NDArray[np.uint8] = np.asarray(picture)
    image = Image.fromarray(pixels)
    image.thumbnail((WIDEST, WIDEST))
    return image
