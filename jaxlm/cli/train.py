"""`jaxlm train`: fine-tune a model by a YAML file, with any setting overridden."""

import os
import sys
from collections.abc import Sequence

import tyro

from jaxlm.cli.options import note
from jaxlm.core.device import enable_compilation_cache
from jaxlm.core.errors import ConfigError, NumericsError
from jaxlm.train.config import Config, read_config
from jaxlm.train.runs import run as train

STOPPED, DIVERGED = 75, 3


def main(arguments: Sequence[str]) -> int:
    """`jaxlm train CONFIG.yaml [--steps 100 --optimizer.rate 1e-4 ...]`; the exit code.

    0: done. 2: bad input, or a checkpoint that does not fit. 3: the loss became NaN; the last
    good checkpoint is kept. 75: a SIGTERM came; all is saved, and the same command goes on.
    """
    names = [a for a in arguments[:1] if not a.startswith("-")]
    if not names and not {"-h", "--help"} & set(arguments):
        raise ConfigError("no config is named; expected jaxlm train CONFIG.yaml [--steps 100 ...]")
    default = read_config(names[0]) if names else Config()
    config = tyro.cli(
        tyro.conf.AvoidSubcommands[Config], prog="jaxlm train CONFIG.yaml", default=default,
        args=list(arguments[len(names):]), description=main.__doc__)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        enable_compilation_cache()
    try:
        found = train(config)
    except NumericsError as error:
        print(f"jaxlm: {error}", file=sys.stderr)
        return DIVERGED
    note(f"step {found.step} of {found.steps}, {'stopped' if found.stopped else 'done'}: "
         f"{found.counts}, in {config.out}")
    for name, value in found.evaluation.items():
        print(f"{name} {value:.6g}")
    return STOPPED if found.stopped else 0
