"""`jaxlm info`: what this machine has."""

from json import dumps
from typing import Any

from jaxlm.cli.options import columns
from jaxlm.core.device import report


def run(json: bool = False) -> None:
    """Versions, devices and memory, and an accelerator that is visible but unused.

    Args:
      json: print JSON instead of a table.
    """
    found = report()
    print(dumps(found, indent=1) if json else table(found))


def table(found: dict[str, Any]) -> str:
    """The report of `core.device.report`, for people."""
    rows = [["what", "found"], *([name, value] for name, value in found["versions"].items())]
    rows += [["system", found["system"]], ["memory", size(found["host_bytes"])],
             ["backend", found["backend"] or "none"], ["processes", found["processes"]]]
    for device in found["devices"]:
        memory = ""
        if device["bytes_limit"]:
            used = size(device["bytes_in_use"])
            memory = f", {used} of {size(device['bytes_limit'])} in use"
        rows.append([device["device"], device["kind"] + memory])
    advice = [f"\nadvice: {line}" for line in found["advice"]]
    return columns([[str(cell) for cell in row] for row in rows]) + "".join(advice)


def size(count: int | None) -> str:
    """Bytes for people.

    >>> size(3 * 2**30), size(None)
    ('3.0 GiB', 'unknown')
    """
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
