"""A reward by its name, as `jaxlm solve` and `jaxlm serve` take it."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm.core.errors import ConfigError
from jaxlm.hf.bundle import Bundle
from jaxlm.rewards.base import Reward


def open_reward(
    name: str, policy: Bundle, open_model: Callable[[str], Bundle], aggregate: str = "last",
    steps: int = 64,
) -> Reward:
    """The reward that a name stands for.

    Args:
      name: "arithmetic", the exact checker of the sums that the bundled model was taught, or
        "arithmetic:0.1", wrong in a tenth of its verdicts; "module:function", a Python function
        (prompts, answers) -> scores from 0 to 1; else a process reward model's folder or hub id.
      policy: the model whose answers are scored.
      open_model: how a folder or hub id becomes a bundle.
      aggregate: of a process reward model's step scores: prod, min, last or model.
      steps: the most that an answer takes: a process reward model's room for separators.
    Raises: ConfigError where it stands for none; as `open_model`.
    """
    kind, _, rest = name.partition(":")
    if kind == "arithmetic":
        from jaxlm.eval.arithmetic_reward import arithmetic_reward

        try:
            return arithmetic_reward(float(rest or 0))
        except ValueError as error:
            raise ConfigError(f"prm is {name!r}; expected arithmetic:NOISE, from 0 to 1") from error
    if rest and not Path(name).exists():
        from jaxlm.rewards.call import TextReward

        return TextReward(function_of(name))
    from jaxlm.rewards.process import process_reward

    return process_reward(open_model(name), policy, aggregate=aggregate, steps=steps)


def function_of(name: str) -> Any:
    """A Python function by module:function; modules of the working folder are found too.

    >>> function_of("math:sqrt")(4.0)
    2.0
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"prm {name} is no function that can be imported: {error}") from error
