"""Instructions given to the model, several wordings a task."""

from __future__ import annotations

import random
from functools import cache
from importlib.resources import files

import yaml

from osum_npu.tasks.task import TASKS, Task


@cache
def prompts() -> dict[str, tuple[str, ...]]:
    """Return the project's own wordings by task name, read from ``prompts.yaml``."""
    table = yaml.safe_load(files("osum_npu.tasks").joinpath("prompts.yaml").read_text("utf-8"))
    return {name: tuple(table[name]) for name in TASKS}


def draw_prompt(task: Task, rng: random.Random) -> str:
    """Draw one wording, for training."""
    return rng.choice(prompts()[task.name])


def default_prompt(task: Task) -> str:
    """Return the wording that inference uses."""
    return prompts()[task.name][0]
