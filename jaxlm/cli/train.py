"""`jaxlm train`: fine-tune a model by a YAML file, with any setting overridden."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import tyro

from jaxlm.cli.arguments import of_dataclass
from jaxlm.cli.options import note
from jaxlm.core.device import enable_compilation_cache
from jaxlm.core.errors import ConfigError, DeviceError, NumericsError
from jaxlm.train.config import AnyTuning, Config, from_dict, read_config
from jaxlm.train.runs import run as train
from jaxlm.train.stopping import Stopped

STOPPED, DIVERGED = 75, 3


def main(arguments: Sequence[str]) -> int:
    """`jaxlm train CONFIG.yaml [--steps 100 --optimizer.rate 1e-4 ...]`; the exit code.

    0: done. 2: bad input, or a checkpoint that does not fit. 3: the loss became NaN; the last
    good checkpoint is kept. 75: a SIGTERM came; all is saved, and the same command goes on.

    --tuning.kind full, osft, lora, olora or ewc chooses the way of tuning; --help beside it lists
    that one's options.

    --distributed, with the same command in each process, makes the processes one run. On a TPU
    pod or under Slurm they find each other; elsewhere say --distributed HOST:PORT PROCESSES
    PROCESS, the address of the first one, how many they are, and which of them (from 0) this is.
    """
    names = [a for a in arguments[:1] if not a.startswith("-")]
    if not names and not {"-h", "--help"} & set(arguments):
        raise ConfigError("no config is named; expected jaxlm train CONFIG.yaml [--steps 100 ...]")
    default = read_config(names[0]) if names else Config()
    where, options = distributed(arguments[len(names):])
    default, options = of_kind(default, options)
    made, back = of_dataclass(default)
    config: Config = back(tyro.cli(
        type(made), prog="jaxlm train CONFIG.yaml", args=options, description=main.__doc__))
    if where is not None:
        join(where)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        enable_compilation_cache()
    try:
        found = train(config)
    except NumericsError as error:
        print(f"jaxlm: {error}", file=sys.stderr)
        return DIVERGED
    except Stopped as error:
        note(f"stopped: {error}")
        return STOPPED
    note(f"step {found.step} of {found.steps}, {'stopped' if found.stopped else 'done'}: "
         f"{in_words(found.counts)}, in {config.out}")
    for name, value in found.evaluation.items():
        print(f"{name} {value:.6g}")
    return STOPPED if found.stopped else 0


def distributed(arguments: Sequence[str]) -> tuple[tuple[Any, ...] | None, list[str]]:
    """What follows `--distributed`, None where it is not there; and the other arguments.

    >>> distributed(["--steps", "3", "--distributed", "host:1234", "2", "0"])
    (('host:1234', 2, 0), ['--steps', '3'])
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--distributed", nargs="*")
    known, others = parser.parse_known_args(list(arguments))
    if not known.distributed:
        return (None if known.distributed is None else ()), others
    try:
        host, processes, process = known.distributed
        return (host, int(processes), int(process)), others
    except ValueError as error:
        raise ConfigError(f"--distributed is {' '.join(known.distributed)!r}; expected nothing "
                          "behind it, or HOST:PORT PROCESSES PROCESS, as in host:1234 2 0"
                          ) from error


def join(where: tuple[str, int, int] | tuple[()]) -> None:
    """Meet the other processes, before anything touches a device."""
    try:
        jax.distributed.initialize(*where)
    except (ValueError, RuntimeError) as error:
        raise DeviceError(f"--distributed: {error}; on a TPU pod or under Slurm it needs nothing "
                          "behind it, elsewhere HOST:PORT PROCESSES PROCESS") from error


def of_kind(config: Config, arguments: Sequence[str]) -> tuple[Config, list[str]]:
    """The config with the way of tuning that `--tuning.kind` names, and the other arguments.

    The fields of another kind than the file's begin at their defaults.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tuning.kind", dest="kind")
    known, others = parser.parse_known_args(list(arguments))
    if known.kind is not None:
        tuning = from_dict(AnyTuning, {"kind": known.kind}, "tuning")
        if type(tuning) is not type(config.tuning):
            config = config.replace(tuning=tuning)
    return config, others


def in_words(counts: dict[str, int]) -> str:
    """What became of the lines.

    >>> in_words({"samples": 1200, "cut": 2, "skipped": 0, "tokens": 34567})
    '1,200 samples (34,567 tokens; 2 cut, 0 skipped)'
    """
    return (f"{counts['samples']:,} samples ({counts['tokens']:,} tokens; {counts['cut']:,} cut, "
            f"{counts['skipped']:,} skipped)")
