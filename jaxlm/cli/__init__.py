"""The command `jaxlm`: a table of commands, each a file here with a function `run`.

A new command is one file, `jaxlm/cli/<name>.py`, and one line in `COMMANDS`. The signature of its
`run` is its arguments (positional-only ones are positional) and its docstring is its help.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from jaxlm.cli import clock
from jaxlm.core.errors import JaxlmError

COMMANDS = {
    "info": "versions, devices and memory, and an accelerator that is visible but unused",
    "generate": "continue a prompt",
    "score": "log-probabilities and perplexity of texts",
    "convert": "a model folder in another dtype, checked against transformers",
    "solve": "answer problems by a search (particles, best-of-n, votes); resumable",
    "fit": "whether a job fits a chip, by the chip's own compiler, without the chip",
    "train": "fine-tune a model by a YAML file; goes on where it was stopped",
    "tune-cache": "choose a cache kind for every layer, on a text",
    "serve": "an HTTP server in OpenAI's protocol",
    "demo": "run the bundled model on held-out problems and write a report",
}
BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args: argv: the arguments after `jaxlm`; default the process's own.
    Returns: the exit code: 0; 1 where a check failed; 2 after one line on stderr that says what
      was wrong.

    Example:
      >>> main(["--version"])
      jaxlm 0.1.0
      0
    """
    clock.start(own=argv is None)
    name, *arguments = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        from jaxlm import __version__

        print(f"jaxlm {__version__}")
        return 0
    try:
        if name not in COMMANDS:
            raise JaxlmError(unknown(name))
        return call(name, arguments)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (JaxlmError, OSError) as error:
        print(f"jaxlm: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("jaxlm: interrupted", file=sys.stderr)
        return INTERRUPTED


def call(name: str, arguments: list[str]) -> int:
    """Import one command's file, read its arguments, run it; its exit code, None being 0."""
    import tyro

    command = importlib.import_module(f"jaxlm.cli.{name.replace('-', '_')}")
    if hasattr(command, "main"):  # its arguments depend on a file that one of them names
        return command.main(arguments)
    from jaxlm.cli.arguments import of_function

    code = tyro.cli(of_function(command.run), prog=f"jaxlm {name}", args=arguments)
    sys.stdout.flush()
    return code or 0


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join([
        "usage: jaxlm COMMAND [ARGUMENTS]", "", *lines, "",
        "`jaxlm COMMAND --help` lists a command's arguments; `jaxlm --version` the version.",
        "An option of several values may be said again: `--stop a --stop b` is `--stop a b`.",
    ])


def unknown(name: str) -> str:
    """What to say of a command that there is not."""
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no command {name!r}; expected one of {', '.join(COMMANDS)}{hint}"
