"""LM: a frozen handle on a decoder, with pure functions over a plain tree of parameters."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlm.core.errors import ConfigError, ShapeError, whole
from jaxlm.core.mesh import keep_rows
from jaxlm.core.tree import Params, flatten, map_with_path
from jaxlm.models.attention import Mask, attention
from jaxlm.models.axes import axes_of
from jaxlm.models.config import LayerPlan, ModelConfig
from jaxlm.models.decoder import Attend, Block, Decoder, Embed, Norm, Tap
from jaxlm.models.layers import against_rows, apply_rope, softcap
from jaxlm.models.stack import STACK, split
from jaxlm.models.xent import token_logprobs

Slots = jax.Array | str  # "all", "last", or int32 positions (B, M)


class Output(NamedTuple):
    """What `LM.apply` returns; what was not asked for is None.

    logits: float32 (B, M, V). final: normed hidden states (B, T, D). hidden: tuple of L + 1
    (B, T, D): each layer's input, then `final`. taps: path of a projection -> (input, output).
    """

    logits: jax.Array | None
    final: jax.Array
    hidden: tuple[jax.Array, ...] | None = None
    taps: dict[str, tuple[jax.Array, jax.Array]] | None = None


@dataclass(frozen=True)
class LM:
    """A language model's shape and rules, hashed by value: pass it to jit as static.

    Args:
      config: the decoder.
      plan: one `LayerPlan` a layer, or empty.
      labels: outputs of a classification head (1: a scalar reward) instead of a vocabulary;
        None for a language model.
      per_token: label every token, with a bias, instead of the whole text at its last token.
      deep_head: labels behind a hidden layer with a ReLU, both with biases, as Qwen has them.
      remat: recompute each block in the backward pass instead of storing it.
      mesh: for training over several devices: activations keep their rows over its batch axes
        between blocks, whatever the parameters are split over.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlm.models.config import ModelConfig
      >>> lm = LM(ModelConfig(vocab_size=16, dim=8, num_layers=2, num_heads=2, num_kv_heads=1,
      ...                     head_dim=4, ffn_dim=16))
      >>> params = lm.init(jax.random.key(0))
      >>> lm.apply(params, jnp.ones((2, 3), jnp.int32)).logits.shape
      (2, 3, 16)
    """

    config: ModelConfig
    plan: tuple[LayerPlan, ...] = ()
    labels: int | None = None
    remat: bool = False
    per_token: bool = False
    mesh: Mesh | None = None
    deep_head: bool = False

    def __post_init__(self):
        plan = self.plan  # a list would not hash
        if not isinstance(plan, tuple) or not all(isinstance(p, LayerPlan) for p in plan):
            raise ConfigError(f"plan is {plan!r}; expected a tuple of LayerPlan, one a layer")
        if self.per_token and self.labels is None:
            raise ConfigError("per_token is for a model with labels; set labels")
        if self.deep_head and self.labels is None:
            raise ConfigError("deep_head is for a model with labels; set labels")
        if self.plan and len(self.plan) != self.config.num_layers:
            raise ConfigError(
                f"plan has {len(self.plan)} entries for {self.config.num_layers} layers; "
                "give one a layer, or none"
            )
        if self.labels is not None:
            whole("labels", self.labels)

    @property
    def module(self) -> Decoder:
        """The linen module that holds the parameters."""
        outputs = self.labels
        if outputs is None and not self.config.tie_embeddings:
            outputs = self.config.vocab_size
        head = "head" if self.labels is None else "score"
        return Decoder(self.config, self.plan, outputs, head, self.per_token, self.remat,
                       self.deep_head)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that attend, and so keep a cache."""
        layers = range(self.config.num_layers)
        return tuple(i for i in layers if not (self.plan and self.plan[i].skip_attention))

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Params:
        """Random parameters as a nested dict of arrays."""
        module, tokens = self.module, jnp.zeros((1, 1), jnp.int32)
        tree: Params = module.init(key, tokens, lambda layer, q, k, v: q, _no_tap)["params"]
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    def shapes(self, dtype: Any = jnp.float32) -> Params:
        """The tree of `init` as shapes, with nothing computed."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), dtype))

    def axes(self) -> Params:
        """The logical axis names of every parameter, in the tree of `init`."""
        return map_with_path(lambda path, _: axes_of(path), self.shapes())

    def run(
        self, params: Params, tokens_BT: jax.Array, attend: Attend,
        tap: Tap | None = None, keep: list | None = None,
    ) -> jax.Array:
        """Tokens to final normed hidden states (B, T, D), with attention handed in.

        A tree from `stack.stack` runs its layers as a scan, without taps or kept states.
        """
        if STACK not in params:
            rows = partial(keep_rows, mesh=self.mesh)
            return _apply(self.module, params, tokens_BT, attend, tap or _no_tap, keep, rows)
        if tap is not None or keep is not None:
            raise ConfigError("a stacked tree gives no taps or hidden states; unstack it first")
        return self._run_stacked(params, tokens_BT, attend)

    def _run_stacked(self, params: Params, tokens_BT: jax.Array, attend: Attend) -> jax.Array:
        c = self.config
        groups, size = split(c, self.plan)

        def block(layer: int, tree: Params, x: jax.Array) -> jax.Array:
            plan = self.plan[layer] if self.plan else LayerPlan()
            x = _apply(Block(c, layer, plan), tree, x, attend, _no_tap)
            return keep_rows(x, self.mesh)

        def one_period(x, trees):
            for j in range(size):
                x = block(j, trees[f"layers_{j}"], x)
            return x, None

        x = keep_rows(_apply(Embed(c), params["embed"], tokens_BT), self.mesh)
        step = jax.checkpoint(one_period) if self.remat else one_period
        x, _ = jax.lax.scan(step, x, params[STACK])
        for layer in range(groups * size, c.num_layers):
            x = block(layer, params[f"layers_{layer}"], x)
        return _apply(Norm(c.norm_eps, c.norm_offset), params["final_norm"], x)

    def head(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Hidden states (..., D) to float32 logits (..., V) or labels."""
        if self.deep_head:
            inner = against_rows(hidden, params["score"]["inner"]["table"])
            hidden = nn.relu(inner + params["score"]["inner"]["bias"]).astype(hidden.dtype)
        logits = against_rows(hidden, self.head_table(params))
        if self.labels is None:
            return self.shape_logits(logits)
        score = params["score"]["outer"] if self.deep_head else params["score"]
        return logits + score["bias"] if "bias" in score else logits

    def head_at(
        self, params: Params, final_BTD: jax.Array, at: Slots, lengths_B: jax.Array | None = None
    ) -> jax.Array:
        """`head` at the wanted positions, (B, M, V); NaN where a row has no such token.

        With "all", what stands in the padding is unspecified.
        """
        hidden_BMD, there_BM = pick(final_BTD, at, lengths_B)
        logits = self.head(params, hidden_BMD)
        if there_BM is None:
            return logits
        # behind the head, and not before it: there a loss that masks such a row would still have
        # NaN in the gradient of the head's table
        return jnp.where(there_BM[..., None], logits, jnp.nan)

    def head_table(self, params: Params) -> jax.Array:
        """The output weights (V, D): the head's own, the labels', or the embedding's when tied."""
        if self.labels is not None:
            score = params["score"]["outer"] if self.deep_head else params["score"]
            return score["table"]
        return params["head"]["table"] if "head" in params else params["embed"]["table"]

    def shape_logits(self, logits: jax.Array) -> jax.Array:
        """The family's divisor and soft cap on raw logits."""
        return softcap(logits / self.config.logit_divisor, self.config.logit_softcap)

    def classify(
        self, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array | None = None
    ) -> jax.Array:
        """Label logits, float32: (B, labels) at each row's last token, or (B, T, labels).

        transformers takes the last token that is not the padding id, so the two differ on a text
        that itself ends in that id. A length outside 1 to T has no last token: NaN.
        Raises: ConfigError for a model without labels.
        """
        if self.labels is None:
            raise ConfigError("this is a language model; classify needs LM(labels=...)")
        at = "all" if self.per_token else "last"
        logits = self.apply(params, tokens_BT, lengths_B=lengths_B, logits_at=at).logits
        assert logits is not None
        return logits if self.per_token else logits[:, 0]

    def apply(
        self,
        params: Params,
        tokens_BT: jax.Array,
        *,
        lengths_B: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        prefix_B: jax.Array | None = None,
        bias_BNTS: jax.Array | None = None,
        mask: Mask = Mask(),
        logits_at: Slots | None = "all",
        want: tuple[str, ...] = (),
    ) -> Output:
        """One forward pass without a cache.

        Args:
          params: the tree of `init`.
          tokens_BT: int32 ids, right-padded; an id outside the vocabulary gives NaN.
          lengths_B: valid tokens a row; default all.
          positions_BT: default 0, 1, 2, ...; with `segments_BT`, give positions that restart.
          segments_BT: ids of packed documents; a token sees only its own segment.
          prefix_B: length of a part that every query sees, besides the mask.
          bias_BNTS: additive attention bias, broadcastable.
          mask: static rule; each layer's own window is applied on top.
          logits_at: "all", "last" (of each row), int32 (B, M) indices, or None for no logits. An
            index outside the row's text, and the last token by a length outside 1 to T, give NaN.
          want: any of "hidden" and "taps".
        Returns: `Output`.
        Raises: ShapeError for arrays that do not fit together, ConfigError for an unknown want.
        """
        batch, time = check_tokens(tokens_BT)
        if not isinstance(want, tuple | list | set) or set(want) - {"hidden", "taps"}:
            raise ConfigError(f"want is {want!r}; expected a tuple of 'hidden' and 'taps', or ()")
        if not isinstance(mask, Mask):
            raise ConfigError(f"mask is {mask!r}; expected a Mask, such as jaxlm.Mask(causal=True)")
        if want and "taps" in want and self.remat:
            raise ConfigError("taps cannot be read through remat; use LM(remat=False)")
        aligned = positions_BT is None
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), (batch, time))
        check_shape("positions_BT", positions_BT, (batch, time))
        check_shape("segments_BT", segments_BT, (batch, time))
        check_shape("lengths_B", lengths_B, (batch,))
        check_shape("prefix_B", prefix_B, (batch,))
        valid_BT = None
        if lengths_B is not None:
            valid_BT = jnp.arange(time)[None] < lengths_B[:, None]
            tokens_BT = jnp.where(valid_BT, tokens_BT, 0)  # padding may be any number
        taps: dict[str, tuple[jax.Array, jax.Array]] = {}
        keep: list[jax.Array] | None = [] if "hidden" in want else None
        final = self.run(
            params, tokens_BT,
            self._full_attention(mask, positions_BT, aligned, valid_BT, segments_BT, prefix_B,
                                 bias_BNTS),
            (lambda name, x, y: taps.update({name: (x, y)})) if "taps" in want else None,
            keep,
        )
        logits = None
        if logits_at is not None:
            logits = self.head_at(params, final, logits_at, lengths_B)
        return Output(logits, final, tuple(keep) if keep is not None else None, taps or None)

    def _full_attention(
        self, mask, pos_BT, aligned, valid_BT, segments_BT, prefix_B, bias_BNTS
    ) -> Attend:
        """Every token against the tokens of the same call."""

        def full(layer: int, q, k, v):
            spec = self.config.attention(layer)
            window = min((w for w in (mask.window, spec.window) if w), default=None)
            q, k = (apply_rope(x, pos_BT, spec.rope) for x in (q, k))
            k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
            return attention(
                q, k, v, Mask(mask.causal, window), pos_BT, pos_BT,
                scale=spec.scale, softcap=spec.softcap, bias_BNTS=bias_BNTS,
                query_segment_BT=segments_BT, key_segment_BS=segments_BT,
                key_valid_BS=valid_BT, prefix_B=prefix_B, aligned=aligned,
            )[0]

        return full

    def logprobs(
        self, params: Params, tokens_BT: jax.Array, targets_BT: jax.Array,
        *, chunk: int = 8192, **apply_args,
    ) -> jax.Array:
        """`log p(target_t | tokens_<=t)`, float32 (B, T), the vocabulary taken in chunks.

        Never holds (B, T, V) logits; the backward pass recomputes each chunk.
        """
        if self.labels is not None:
            raise ConfigError("a model with labels gives no log-probabilities of tokens")
        final = self.apply(params, tokens_BT, logits_at=None, **apply_args).final
        table = self.head_table(params)
        return token_logprobs(final, table, targets_BT, self.shape_logits, chunk)


def _apply(module: nn.Module, params: Params, *args: Any) -> jax.Array:
    """A linen module over its part of the tree; every one here returns one array."""
    out = module.apply({"params": params}, *args)
    assert isinstance(out, jax.Array)
    return out


def pick(
    hidden_BTD: jax.Array, at: Slots, lengths_B: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The hidden states whose logits are wanted, (B, M, D), and where a row has such a token, bool
    (B, M); None where every row does. Elsewhere a neighbour's state stands in."""
    batch, time = hidden_BTD.shape[:2]
    if isinstance(at, str):
        if at == "all":
            return hidden_BTD, None
        if at != "last":
            raise ConfigError(f"logits_at is {at!r}; expected 'all', 'last', indices or None")
        if lengths_B is None:
            return hidden_BTD[:, -1:], None
        at = lengths_B[:, None] - 1
    if not isinstance(at, jax.Array | np.ndarray) or not jnp.issubdtype(at.dtype, jnp.integer):
        got = f"{at.dtype} {at.shape}" if hasattr(at, "dtype") else repr(at)
        raise ShapeError(f"logits_at is {got}; expected an array of whole numbers ({batch}, M)")
    if at.ndim != 2 or len(at) != batch:
        raise ShapeError(f"logits_at is {at.shape}; expected ({batch}, M), by rows")
    there_BM = (at >= 0) & (at < time)
    if lengths_B is not None:
        length_B1 = lengths_B[:, None]
        there_BM &= (at < length_B1) & (length_B1 <= time)
    return jnp.take_along_axis(hidden_BTD, at[..., None], axis=1, mode="clip"), there_BM


def check_tokens(tokens_BT: jax.Array) -> tuple[int, int]:
    """The shape (B, T) of token ids; ShapeError for another rank, a float, or nothing at all."""
    if not isinstance(tokens_BT, jax.Array | np.ndarray):
        raise ShapeError(f"tokens are {tokens_BT!r}; expected an array of whole numbers "
                         "(rows, time), such as jnp.array([[1, 2]])")
    shape, dtype = tokens_BT.shape, tokens_BT.dtype
    if len(shape) != 2 or 0 in shape or not jnp.issubdtype(dtype, jnp.integer):
        raise ShapeError(
            f"tokens are {dtype} {shape}; expected whole numbers (rows, time), at least one of each"
        )
    return shape[0], shape[1]


def check_shape(name: str, array: jax.Array | None, shape: tuple[int, ...]) -> None:
    """ShapeError unless `array` is None or of this shape; a broadcast would hide a mistake."""
    if array is not None and jnp.shape(array) != shape:
        raise ShapeError(f"{name} is {jnp.shape(array)}; expected {shape}, to go with the tokens")


def count_params(lm: LM) -> int:
    """How many numbers the model holds."""
    return sum(int(x.size) for x in flatten(lm.shapes()).values())


def _no_tap(name: str, x: jax.Array, y: jax.Array) -> None:
    """The tap that does nothing."""
