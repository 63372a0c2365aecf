"""The seam to `jaxlm.search`: one table from a method's name to a job."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxlm.core.errors import ConfigError
from jaxlm.hf.bundle import Bundle

Method = Callable[..., Any]


class Methods:
    """The searches that a server offers."""

    def __init__(self, bundle: Bundle, table: Mapping[str, Method]):
        self.bundle, self.table = bundle, dict(table)

    def job(self, given: Any, prompts: list, max_budget: int) -> Callable[[], dict]:
        """A checked search as a job for the engine.

        Raises: ConfigError for a method that there is not, or what a search cannot do.
        """
        if given.method not in self.table:
            names = ", ".join(["plain", *self.table])
            raise ConfigError(f"method is {given.method!r}; expected one of {names}")
        raise NotImplementedError
