"""A command's arguments as tyro reads them and `--help` shows them.

An option of several values may be said again: `--text a b`, `--text a --text b` and
`--text a --text=b` are the same. Metavars are of one style: `--top-k INT`, not `{None}|INT`;
`--text TEXT ...`, not `[STR [STR ...]]`.
"""

import dataclasses
import inspect
import pathlib
import shlex
import types
import typing
from collections.abc import Callable
from itertools import chain
from typing import Annotated, Any, Literal, NamedTuple

import tyro

KINDS = {int: "INT", float: "FLOAT", str: "TEXT", pathlib.Path: "PATH"}


def of_function(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, its arguments made ready for tyro."""
    signature, hints = inspect.signature(run), typing.get_type_hints(run, include_extras=True)
    ready = {
        name: _ready(hints[name], argument.default, argument.kind is argument.POSITIONAL_ONLY)
        for name, argument in signature.parameters.items()
    }

    def run_ready(*positional: Any, **options: Any) -> Any:
        return run(*positional, **_values(options, ready))

    run_ready.__doc__ = run.__doc__
    run_ready.__annotations__ = {name: argument.hint for name, argument in ready.items()}
    run_ready.__signature__ = signature.replace(parameters=[  # type: ignore[attr-defined]
        argument.replace(annotation=ready[name].hint, default=ready[name].default)
        for name, argument in signature.parameters.items()
    ])
    return run_ready


def of_dataclass(start: Any) -> tuple[Any, Callable[[Any], Any]]:
    """An instance like `start`, made ready for tyro; and the way back from one that tyro read.

    On the way back the fields are checked, so a refusal is not tyro's but our own one line.
    """
    own = type(start)
    hints = typing.get_type_hints(own, include_extras=True)
    ready = {f.name: _ready(hints[f.name], getattr(start, f.name))
             for f in dataclasses.fields(start)}
    # A subclass, for tyro looks for a field's help in the bases too.
    made = dataclasses.make_dataclass(
        own.__name__,
        [(name, found.hint, dataclasses.field(default=found.default))
         for name, found in ready.items()],
        bases=(own,), frozen=True,
        namespace={"__doc__": own.__doc__, "__post_init__": lambda self: None})
    return made(), lambda read: own(**_values(vars(read), ready))


class _Ready(NamedTuple):
    """An argument for tyro: its hint, its default, and how its value is got from what tyro read."""

    hint: Any
    default: Any
    value: Callable[[Any], Any] = lambda read: read


def _ready(hint: Any, default: Any, positional: bool = False) -> _Ready:
    """An argument with a metavar; an option of several values is read as a tuple of mentions."""
    kind, *notes = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    if dataclasses.is_dataclass(default):
        made, back = of_dataclass(default)
        return _Ready(Annotated[type(made), tyro.conf.arg(), *notes], made, back)
    one, said = _some(kind), None
    if _several(one):
        words = chain.from_iterable(v if isinstance(v, tuple) else (v,) for v in default or ())
        said = f"(default: {shlex.join(map(str, words)) or 'none'})"
    shown = tyro.conf.arg(metavar=_metavar(one), help_behavior_hint=said)
    if positional or not _several(one):
        return _Ready(Annotated[kind, shown, *notes], default)
    container, mentioned = typing.get_origin(one), types.GenericAlias(tuple, (one, ...))
    return _Ready(
        Annotated[mentioned, tyro.conf.UseAppendAction, shown, *notes], (),
        lambda mentions: container(chain.from_iterable(mentions)) if mentions else default)


def _values(read: dict[str, Any], ready: dict[str, _Ready]) -> dict[str, Any]:
    """What tyro read, by name, as it was meant."""
    return {name: ready[name].value(value) for name, value in read.items()}


def _some(kind: Any) -> Any:
    """X of `X | None`; another kind as it is."""
    if typing.get_origin(kind) not in (types.UnionType, typing.Union):
        return kind
    kinds = [part for part in typing.get_args(kind) if part is not types.NoneType]
    return kinds[0] if len(kinds) == 1 else kind


def _several(kind: Any) -> bool:
    """Whether a kind holds any number of values."""
    return typing.get_origin(kind) is list or ... in typing.get_args(kind)


def _metavar(kind: Any) -> str | None:
    """What stands for a value; None where tyro's own words will do.

    >>> _metavar(int), _metavar(Literal["a", "b"]), _metavar(list[str]), _metavar(bool)
    ('INT', '{a,b}', 'TEXT ...', None)
    >>> _metavar(tuple[tuple[str, float], ...])
    'TEXT FLOAT ...'
    """
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if typing.get_origin(kind) in (tuple, list):
        words = [_metavar(part) or "" for part in parts if part is not ...]
        return " ".join(words + ["..."] * _several(kind)) if all(words) else None
    return KINDS.get(kind)
