"""Cache kinds by name, for command lines and policy files."""

import dataclasses
import re
from typing import Any, get_type_hints

from jaxlm.cache.base import CacheKind
from jaxlm.cache.compat import ReferenceKivi, ReferenceSquat
from jaxlm.cache.dense import Dense
from jaxlm.cache.kivi import Kivi
from jaxlm.cache.rotated import RotatedKivi, RotatedSquat
from jaxlm.cache.squat import Squat
from jaxlm.cache.turboquant import TurboQuant
from jaxlm.core.errors import ConfigError

KINDS: dict[str, type] = {"dense": Dense, "kivi": Kivi, "squat": Squat, "rkivi": RotatedKivi,
                          "rsquat": RotatedSquat, "turboquant": TurboQuant}
COMPAT: dict[str, type] = {"kivi": ReferenceKivi, "squat": ReferenceSquat}  # compat=reference
NAME = re.compile(r"([a-z]+?)(?:([248])(?:v([248]))?)?(?::(.+))?")


def parse_cache(text: str) -> CacheKind:
    """A kind from `name[bits[v bits]][:field=value,...]`.

    Args: text: 'dense', 'kivi4' (4 bits), 'squat2v4' (2-bit keys, 4-bit values),
      'squat2:group=64,window=64,rope=before', 'rkivi2', 'turboquant4v2'. 'compat=reference' among
      the fields of kivi or squat: the policy and settings of the reference, to compare with it.
    Raises: ConfigError for a name, a field or a value that there is not.

    Example:
      >>> parse_cache("squat2v4:window=64").v_bits
      4
    """
    found = NAME.fullmatch(text.strip())
    if found is None or found[1] not in KINDS or (found[1] == "dense" and found[2]):
        raise ConfigError(f"cache {text!r} is unknown; expected dense, or kivi, rkivi, squat, "
                          "rsquat or turboquant with 2, 4 or 8 bits, as kivi2 or "
                          "squat2v4:group=64,window=64")
    kind = KINDS[found[1]]
    values: dict[str, Any] = {}
    if found[2]:
        values = {"k_bits": int(found[2]), "v_bits": int(found[3] or found[2])}
    given: dict[str, str] = {}
    for part in filter(None, (found[4] or "").split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"cache {text!r}: {part!r} has no value; expected field=value")
        given[name.strip()] = value.strip()
    if "compat" in given:
        if given.pop("compat") != "reference" or found[1] not in COMPAT:
            raise ConfigError(f"cache {text!r}: expected compat=reference, of {sorted(COMPAT)}")
        kind = COMPAT[found[1]]
    values |= {name: _read(kind, name, value, text) for name, value in given.items()}
    return kind(**values)


def cache_name(kind: CacheKind) -> str:
    """The text that `parse_cache` reads back as the same kind.

    >>> cache_name(parse_cache("kivi4v2:window=64"))
    'kivi4v2:window=64'
    """
    known = [*KINDS.items(), *COMPAT.items()]
    name = next((name for name, one in known if type(kind) is one), None)
    if name is None:
        raise ConfigError(f"{type(kind).__name__} has no name; expected one of {sorted(KINDS)}")
    fields: tuple[dataclasses.Field, ...] = dataclasses.fields(kind)  # type: ignore[arg-type]
    given = {field.name: getattr(kind, field.name) for field in fields
             if field.name != "mesh" and getattr(kind, field.name) != field.default}
    k_bits, v_bits = getattr(kind, "k_bits", None), getattr(kind, "v_bits", None)
    bits = "" if k_bits is None else f"{k_bits}" if k_bits == v_bits else f"{k_bits}v{v_bits}"
    write = lambda value: "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
    rest = [f"{key}={write(value)}" for key, value in given.items()
            if key not in ("k_bits", "v_bits")]
    rest = ["compat=reference"] * (type(kind) in COMPAT.values()) + rest
    return name + bits + (":" + ",".join(rest) if rest else "")


def _read(kind: type, name: str, value: str, text: str) -> Any:
    """One field's value by the field's type; tuples are written a/b/c."""
    types = get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind) if field.name != "mesh"]
    if name not in fields:
        raise ConfigError(f"cache {text!r}: no field {name!r}; expected one of {fields}")
    wanted = str(types[name])
    try:
        if value == "None" and "None" in wanted:
            return None
        if "tuple" in wanted:
            words = "numbers with / between them, as 1.0/0.8"
            return tuple(float(x) for x in value.split("/"))
        if "bool" in wanted:
            words = "true or false"
            return {"true": True, "false": False}[value.lower()]
        if "int" in wanted:
            words = "a whole number"
            return int(value)
        words = "a number"
        return float(value) if "float" in wanted else value
    except (ValueError, KeyError):
        words += ", or None" if "None" in wanted else ""
        raise ConfigError(f"cache {text!r}: {name} is {value!r}; expected {words}") from None
