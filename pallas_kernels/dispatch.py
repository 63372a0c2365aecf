"""Choice of a kernel's implementation: None tries in order, one name is strict, a list is tried."""

from collections.abc import Callable, Mapping, Sequence

import jax

Implementation = None | str | Sequence[str]


def preferred() -> tuple[str, ...]:
    """Implementations worth trying on the default backend, best first; XLA always ends the list."""
    backend = jax.default_backend()
    return {"tpu": ("tpu", "xla"), "gpu": ("gpu", "xla")}.get(backend, ("xla",))


def dispatch(table: Mapping[str, Callable], implementation: Implementation, *args, **kwargs):
    """Calls the first implementation that accepts the arguments.

    An implementation declines with `NotImplementedError`; any other error passes through.

    Args:
      table: name -> function, all with one signature.
      implementation: None (the preferred order of this backend), one name, or names in order.

    Returns: what the implementation returns.

    Raises:
      ValueError: an unknown name. NotImplementedError: every one asked for declined.
    """
    if implementation is None:
        names: Sequence[str] = preferred()
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
