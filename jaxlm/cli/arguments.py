"""A command's arguments as `--help` shows them: `--top-k INT`, not `--top-k {None}|INT`."""

import inspect
import pathlib
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

import tyro

KINDS = {int: "INT", float: "FLOAT", str: "TEXT", pathlib.Path: "PATH"}


def in_words(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, its optional arguments shown without None and empty defaults as none."""
    signature = inspect.signature(run)
    hints = typing.get_type_hints(run, include_extras=True)
    for name, argument in signature.parameters.items():
        word = _metavar(hints[name])
        shown: dict[str, Any] = {} if word is None else {"metavar": word}
        if argument.default == ():
            shown["help_behavior_hint"] = "(default: none)"
        if shown:
            hints[name] = Annotated[hints[name], tyro.conf.arg(**shown)]

    def shown_anew(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    shown_anew.__doc__, shown_anew.__annotations__ = run.__doc__, hints
    shown_anew.__signature__ = signature.replace(parameters=[  # type: ignore[attr-defined]
        argument.replace(annotation=hints[name]) for name, argument in signature.parameters.items()
    ])
    return shown_anew


def _metavar(hint: Any) -> str | None:
    """What stands for an optional value; None where tyro's own words will do.

    >>> _metavar(int | None), _metavar(Literal["a", "b"] | None), _metavar(tuple[str, ...] | None)
    ('INT', '{a,b}', 'TEXT ...')
    """
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return None
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    if len(kinds) != 1:
        return None
    inner = typing.get_args(kinds[0])
    if typing.get_origin(kinds[0]) is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if typing.get_origin(kinds[0]) is tuple:
        return f"{KINDS[inner[0]]} ..." if inner[0] in KINDS else None
    return KINDS.get(kinds[0])
