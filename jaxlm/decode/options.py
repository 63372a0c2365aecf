"""What `generate` and `stream` may be told, for type checkers.

Their overloads, which say that one prompt gives one result and a list gives a list, take these as
`**options` and stay short. The functions spell them out; tests/test_public_api.py holds both alike.
"""

from collections.abc import Sequence
from typing import TypedDict

import jax

from jaxlm.cache.base import CacheKind
from jaxlm.decode.samplers import Sampler
from jaxlm.decode.state import Kinds


class Options(TypedDict, total=False):
    """Of `generate`."""

    max_new_tokens: int
    sampler: Sampler
    cache: CacheKind | Kinds | str
    key: jax.Array | None
    stop: str | Sequence[str]
    include_stop: bool
    stop_ids: Sequence[int] | None
    max_len: int | None


class StreamOptions(Options, total=False):
    """Of `stream`."""

    chunk: int
