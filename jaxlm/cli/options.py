"""What several commands share: opening a model, naming a cache kind, reading a text."""

import os
import pathlib
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from jaxlm.core.device import enable_compilation_cache
from jaxlm.core.errors import ConfigError
from jaxlm.hf.bundle import Bundle, load

Model = Annotated[str, tyro.conf.arg(metavar="MODEL")]
Device = Literal["cpu", "gpu", "tpu"]
Dtype = Literal["float32", "bfloat16", "float16"]
Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")]


@tyro.conf.configure(tyro.conf.OmitArgPrefixes)  # --device, not --loading.device
@dataclass(frozen=True)
class Loading:
    """How a model is loaded.

    Args:
      device: where to run; default what jax finds.
      dtype: of the parameters; default float32 on a CPU, the checkpoint's own elsewhere.
      ignore_fields: of config.json, unknown to jaxlm, that you know not to change the maths.
      check_tokenizer: refuse a tokenizer that looks like another model's.
    """

    device: Device | None = None
    dtype: Dtype | None = None
    ignore_fields: Names = ()
    check_tokenizer: bool = True


def open_model(model: str, loading: Loading = Loading(), revision: str | None = None) -> Bundle:
    """Load a model, with compiled programs kept on disk from run to run."""
    try:
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else the person has chosen
            enable_compilation_cache()
    except OSError as error:
        note(f"compiled programs are not kept, so each start compiles anew: {error}")
    return load(model, revision=revision, **vars(loading))


def read_text(source: str | os.PathLike) -> str:
    """A file's text, or stdin's for `-`; nothing is stripped.

    Raises: ConfigError for a file that is absent or not UTF-8.
    """
    try:
        raw = sys.stdin.buffer.read() if str(source) == "-" else pathlib.Path(source).read_bytes()
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 text ({error}); convert it first") from error
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror}") from error


def note(message: str) -> None:
    """A line for the person, apart from the output."""
    print(message, file=sys.stderr, flush=True)


def columns(rows: list[list[Any]]) -> str:
    """Rows as aligned text; numbers to the right, small ones to three digits.

    >>> print(columns([["name", "n"], ["a", 1], ["b", 12]]))
    name   n
    a      1
    b     12
    >>> columns([["n"], [0.00012345], [0.5]]).split()
    ['n', '0.000123', '0.5000']
    """
    show = lambda x: f"{x:.3g}" if 0 < abs(x) < 0.01 else f"{x:.4f}"
    cells = [[show(c) if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(isinstance(row[i], int | float) for row in rows[1:]) for i in range(len(widths))]
    place = [str.rjust if right else str.ljust for right in numeric]
    lines = ["  ".join(p(c, w) for p, c, w in zip(place, row, widths, strict=True))
             for row in cells]
    return "\n".join(line.rstrip() for line in lines)
