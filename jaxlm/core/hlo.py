"""Read the text of a compiled program: what its collectives carry, and its loops' trips."""

import re

import numpy as np

COLLECTIVE = re.compile(
    r"= (\(?[^=]*?\)?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(-start)?\("
)
INDEX = re.compile(r"/\*index=\d+\*/")  # a long tuple's elements are numbered in comments
CHANNEL = re.compile(r"channel_id=(\d+)")
CALLED = re.compile(r"(body|condition|calls|to_apply)=%?([\w.\-]+)")
KNOWN_TRIPS = re.compile(r'known_trip_count[^}]*?"n":"(\d+)"')
CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
SHAPE = re.compile(r"\b([a-z]+\d+)\[([\d,]*)\]")
BITS = {"pred": 8, "s8": 8, "u8": 8, "s32": 32, "u32": 32, "s64": 64, "u64": 64, "s16": 16,
        "u16": 16, "f32": 32, "f16": 16, "bf16": 16, "f64": 64, "s4": 4, "u4": 4}
Computations = dict[str, list[str]]


def collective_bytes(hlo: str) -> int:
    """Bytes that the collectives of a compiled module produce, in one run of it.

    In a loop they count by its trips; by one where these are data. Of an asynchronous form only
    the result counts, not the operand that stands beside it; a transfer that the TPU compiler
    spreads over several fusions has one channel, and counts once.

    >>> collective_bytes("x = f32[4,8]{1,0} all-reduce(y), replica_groups={}")
    128
    """
    parts = _computations(INDEX.sub("", hlo))
    callers = _callers(parts)
    total, seen = 0, set()
    for name, lines in parts.items():
        for line in lines:
            if not (match := COLLECTIVE.search(line)):
                continue
            if channel := CHANNEL.search(line):
                if channel.group(1) in seen:
                    continue
                seen.add(channel.group(1))
            total += _produced(match) * _runs(name, callers)
    return total


def _produced(match: re.Match[str]) -> int:
    """Bytes of a collective's result."""
    shapes = SHAPE.findall(match.group(1))
    if match.group(3) and match.group(2) in ("all-gather", "collective-permute"):
        while shapes and shapes[-1] == ("u32", ""):  # the transfer's own, no data
            shapes.pop()
        shapes = shapes[len(shapes) // 2:]  # operands, then results
    total = 0
    for kind, dims in shapes:
        size = int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64))
        total += size * BITS.get(kind, 32) // 8
    return total


def _computations(hlo: str) -> Computations:
    """The lines of each computation; of what stands in none, under an empty name."""
    parts: Computations = {"": []}
    name = ""
    for line in hlo.splitlines():
        if line.endswith("{") and " = " not in line:
            name = line.removeprefix("ENTRY ").split("(")[0].strip().lstrip("%")
        parts.setdefault(name, []).append(line)
    return parts


def _callers(parts: Computations) -> dict[str, tuple[str, int]]:
    """Of each computation, who calls it, and how many times in a row."""
    found = {}
    for name, lines in parts.items():
        for line in lines:
            called = dict(CALLED.findall(line))
            for role, callee in called.items():
                found[callee] = name, _trips(line, called, parts) if role == "body" else 1
    return found


def _trips(line: str, called: dict[str, str], parts: Computations) -> int:
    """Trips of a while: as the compiler says, or where its condition is `i < constant`."""
    if known := KNOWN_TRIPS.search(line):
        return int(known.group(1))
    condition = parts.get(called.get("condition", ""), [])
    bounds = [int(found) for text in condition for found in CONSTANT.findall(text)]
    counted = any("ROOT" in text and "compare(" in text and "direction=LT" in text
                  for text in condition)
    return bounds[0] if counted and len(bounds) == 1 else 1


def _runs(name: str, callers: dict[str, tuple[str, int]]) -> int:
    """How often a computation runs in a run of the program."""
    caller, times = callers.get(name, ("", 1))
    return times * _runs(caller, callers) if caller else times
