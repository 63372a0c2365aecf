"""Choice of a kernel's implementation: None tries in order, one name is strict, a list is tried."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Implementation = None | str | Sequence[str]


def preferred(device: Any = None) -> tuple[str, ...]:
    """Implementations worth trying on a device, best first; XLA always ends the list.

    Args:
      device: as of `jax.devices()`, or of a topology that is only compiled for; None: the default
        backend's first.
    """
    device = jax.devices()[0] if device is None else device
    if device.platform == "tpu":
        return ("tpu", "xla")
    # Triton refuses cards before compute capability 8, a T4 among them
    if device.platform in ("gpu", "cuda") and float(device.compute_capability) >= 8:
        return ("gpu", "xla")
    return ("xla",)


def later(module: str, name: str) -> Callable:
    """A function of a module that is imported when it is first called: Pallas is slow to import."""

    def call(*args, **kwargs):
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


def dispatch(table: Mapping[str, Callable], implementation: Implementation, *args, **kwargs):
    """Calls the first implementation that accepts the arguments.

    An implementation declines with `NotImplementedError`; any other error passes through.

    Args:
      table: name -> function, all with one signature.
      implementation: None (`preferred()`), one name, or names in order.

    Returns: what the implementation returns.

    Raises:
      ValueError: an unknown name. NotImplementedError: every one asked for declined.
    """
    if implementation is None:
        names: Sequence[str] = [name for name in preferred() if name in table]
    else:
        names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in table]
    if unknown or not names:
        raise ValueError(f"implementation is one of {sorted(table)} or a list of them, "
                         f"got {implementation!r}")
    declined = []
    for name in names:
        try:
            return table[name](*args, **kwargs)
        except NotImplementedError as error:
            declined.append(f"{name}: {error}")
    raise NotImplementedError("no implementation accepts these arguments; " + "; ".join(declined)
                              + ". implementation='xla' always does")
