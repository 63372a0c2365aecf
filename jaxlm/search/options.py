"""What the searches may be told, for type checkers: as `jaxlm.decode.options`, and held so too."""

from collections.abc import Sequence
from typing import TypedDict

import jax
from jax.typing import ArrayLike

from jaxlm.cache.base import CacheKind
from jaxlm.decode.samplers import Sampler
from jaxlm.decode.state import Kinds
from jaxlm.search.base import OnResult, Steps


class SearchOptions(TypedDict, total=False):
    """Of every search."""

    steps: Steps
    sampler: Sampler
    cache: CacheKind | Kinds | str
    key: jax.Array | None
    rows: int | None
    memory: int | None
    questions: str | Sequence[str] | None


class TurnOptions(SearchOptions, total=False):
    """Of a search whose prompts take turns in the batch."""

    at_once: int | None
    quorum: int | None
    on_result: OnResult | None


class FilterOptions(TurnOptions, total=False):
    """Of `particle_filter`."""

    particles: int
    weight: str
    tau: ArrayLike
    threshold: ArrayLike
    scheme: str
    temper: str | None
    temper_below: ArrayLike
    early: ArrayLike
    forget: bool
    choose: str
    compat: str | None


class BeamOptions(TurnOptions, total=False):
    """Of `beam_search` and `dvts`."""

    budget: int
    width: int


class GibbsOptions(SearchOptions, total=False):
    """Of `particle_gibbs`."""

    particles: int
    sweeps: int
    temperatures: Sequence[float]
    weight: str
    choose: str
