"""What a reward is: a score from 0 to 1 for every row of a batch of growing texts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import struct

from jaxlm.core.errors import JaxlmError

Carry = Any  # what a reward keeps between steps; leaves lead with B = R P, shared prompts with R
Scores = jax.Array | np.ndarray  # float32 (B,), on the device or on the host


class Prompts(NamedTuple):
    """R prompts.

    tokens_RT: int32 ids, right-padded, as the policy reads them. length_R: their lengths. texts:
    what is asked, a chat's question without the chat. own: the texts of the ids; None: the same
    as `texts`.
    """

    tokens_RT: jax.Array
    length_R: jax.Array
    texts: Sequence[str]
    own: Sequence[str] | None = None


class Rows(NamedTuple):
    """B = R P rows after a step.

    tokens_BS: int32, prompt and answer so far. start_B: where the answer begins. length_B: tokens
    in all. ended_B: bool, rows that will not change any more. texts: the answers so far, for
    rewards on the host, which read nothing else but `ended_B` (None: no row has ended); None on
    the device.
    """

    tokens_BS: jax.Array
    start_B: jax.Array
    length_B: jax.Array
    ended_B: jax.Array
    texts: Sequence[str] | None = None


class Reward(Protocol):
    """Scores rows step by step, and goes with them when they are resampled.

    `on_device`: `score` and `gather` are traced inside the search's own program, and the reward is
    a pytree that is passed to it, so that another reward of the same shapes compiles nothing;
    otherwise they are called on the host between steps, with numpy arrays and texts.
    `costly`, where it is there and true: a model, computed over all rows of the batch at each call.
    A search then waits for all prompts of the batch before it asks.
    """

    on_device: bool

    def init(self, prompts: Prompts, particles: int, slots: int) -> Carry:
        """Read the prompts, once each; `slots` bounds the tokens a row adds to its prompt. On the
        device, and where costly, it is asked for its shapes too, by `jax.eval_shape`."""

    def score(self, carry: Carry, rows: Rows) -> tuple[Scores, Carry]:
        """float32 (B,) of the answers so far. A row that did not grow keeps the score it had."""

    def gather(self, carry: Carry, ancestors_RP: jax.Array) -> Carry:
        """Row p of prompt r goes on from row `ancestors_RP[r, p]` of that prompt."""


@struct.dataclass
class Stateless:
    """A reward that keeps nothing between steps: `function(rows) -> (B,)`.

    On the device `function` is traced and static: pass the same one again, and nothing compiles.

    >>> import jax.numpy as jnp
    >>> short = Stateless(lambda rows: 1.0 / (1.0 + rows.length_B - rows.start_B))
    >>> rows = Rows(jnp.zeros((1, 4), int), jnp.array([1]), jnp.array([4]), jnp.array([False]))
    >>> short.score((), rows)[0].tolist()
    [0.25]
    """

    function: Callable[[Rows], jax.Array] = struct.field(pytree_node=False)
    on_device: bool = struct.field(pytree_node=False, default=True)

    def init(self, prompts, particles, slots):
        """Nothing."""
        return ()

    def score(self, carry, rows):
        """`function(rows)`."""
        return self.function(rows), carry

    def gather(self, carry, ancestors_RP):
        """Nothing moves."""
        return carry


class RewardError(JaxlmError):
    """A reward on the host that failed for some prompts, after all retries.

    A search can record these problems as failed and go on: `scores_B` and `carry` are what `score`
    would have returned, with NaN in the rows of the failed.
    prompts: indices of the failed ones. reasons: a message for each.
    """

    def __init__(self, message: str, prompts: Sequence[int], reasons: Sequence[str],
                 scores_B: Any = None, carry: Carry = None):
        super().__init__(message)
        self.prompts, self.reasons = tuple(prompts), tuple(reasons)
        self.scores_B, self.carry = scores_B, carry
