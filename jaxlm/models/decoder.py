"""One decoder block with switches, as linen modules that hold parameters and nothing else.

A module never sees a cache, a mask or a mesh. Attention is a function handed in from outside,
`attend(layer, q, k, v) -> out`; a tap is a function `tap(name, input, output)` called at every
projection. Both are ordinary closures that live for one trace.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.models.config import LayerPlan, ModelConfig
from jaxlm.models.layers import activate, linear, rms_norm

Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
Tap = Callable[[str, jax.Array, jax.Array], None]


class Norm(nn.Module):
    """RMS norm over the last axis."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.zeros if self.offset else nn.initializers.ones
        return rms_norm(x, self.param("scale", start, (x.shape[-1],)), self.eps, self.offset)


class Linear(nn.Module):
    """A projection from x's last axes (`inputs`) to the axes `outputs`."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes = tuple(range(len(self.inputs)))
        start = nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=axes,
            out_axis=tuple(range(len(axes), len(axes) + len(self.outputs))),
        )
        y = linear(x, self.param("kernel", start, self.inputs + self.outputs), len(self.inputs))
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, self.outputs).astype(y.dtype)
        return y


class Attention(nn.Module):
    """Project to queries, keys and values, attend, project back."""

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(self, x_BTD: jax.Array, attend: Attend, tap: Tap) -> jax.Array:
        c = self.config
        kv_shape = (c.num_kv_heads, c.head_dim)
        shapes = {"q": (c.num_heads, c.head_dim), "k": kv_shape, "v": kv_shape}
        heads = {}
        for name, shape in shapes.items():
            heads[name] = Linear((c.dim,), shape, c.qkv_bias, name=name)(x_BTD)
            tap(f"attn/{name}", x_BTD, heads[name])
        if c.qk_norm:
            for name in ("q", "k"):
                heads[name] = Norm(c.norm_eps, c.norm_offset, name=f"{name}_norm")(heads[name])
        mixed_BTNH = attend(self.layer, heads["q"], heads["k"], heads["v"])
        out = Linear((c.num_heads, c.head_dim), (c.dim,), name="o")(mixed_BTNH)
        tap("attn/o", mixed_BTNH, out)
        return out


class MLP(nn.Module):
    """The gated feed-forward: `down(act(gate(x)) * up(x))`. Source: 2002.05202."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, tap: Tap) -> jax.Array:
        c = self.config
        gate = Linear((c.dim,), (c.ffn_dim,), name="gate")(x)
        up = Linear((c.dim,), (c.ffn_dim,), name="up")(x)
        tap("mlp/gate", x, gate)
        tap("mlp/up", x, up)
        gated = activate(gate, c.activation) * up
        out = Linear((c.ffn_dim,), (c.dim,), name="down")(gated)
        tap("mlp/down", gated, out)
        return out


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, each branch scaled by the plan."""

    config: ModelConfig
    layer: int
    plan: LayerPlan = LayerPlan()

    @nn.compact
    def __call__(self, x: jax.Array, attend: Attend, tap: Tap) -> jax.Array:
        c, plan = self.config, self.plan

        def norm(name: str, value: jax.Array) -> jax.Array:
            return Norm(c.norm_eps, c.norm_offset, name=name)(value)

        def add(x: jax.Array, branch: jax.Array, scale: float) -> jax.Array:
            scale = scale * c.residual_scale
            if scale != 1.0:  # in float32: 0.22 is not a bfloat16
                branch = (branch.astype(jnp.float32) * scale).astype(branch.dtype)
            return x + branch

        if not plan.skip_attention:
            branch = Attention(c, self.layer, name="attn")(norm("attn_norm", x), attend, tap)
            if c.post_norms:
                branch = norm("attn_post_norm", branch)
            x = add(x, branch, plan.attention_scale)
        branch = MLP(c, name="mlp")(norm("mlp_norm", x), tap)
        if c.post_norms:
            branch = norm("mlp_post_norm", branch)
        return add(x, branch, plan.mlp_scale)


class Embed(nn.Module):
    """The token table; also the output head of tied models."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        c = self.config
        start = nn.initializers.normal(c.dim**-0.5)
        table_VD = self.param("table", start, (c.vocab_size, c.dim))
        # an id outside the vocabulary becomes NaN, not some other token
        known_BT = jnp.where(tokens_BT < 0, c.vocab_size, tokens_BT)
        x = table_VD.at[known_BT].get(mode="fill", fill_value=jnp.nan)
        return x if c.embed_scale == 1.0 else x * jnp.asarray(c.embed_scale, x.dtype)


class Head(nn.Module):
    """An output head's own weights, `(outputs, D)`; applied by `LM`, which may chunk it."""

    outputs: int
    dim: int
    bias: bool = False

    @nn.compact
    def __call__(self) -> None:
        self.param("table", nn.initializers.normal(self.dim**-0.5), (self.outputs, self.dim))
        if self.bias:
            self.param("bias", nn.initializers.zeros, (self.outputs,))


class DeepHead(nn.Module):
    """Labels behind a hidden layer of the model's width; applied by `LM`."""

    outputs: int
    dim: int

    @nn.compact
    def __call__(self) -> None:
        Head(self.dim, self.dim, True, name="inner")()
        Head(self.outputs, self.dim, True, name="outer")()


class Decoder(nn.Module):
    """Embed, blocks, final norm: tokens to normed hidden states."""

    config: ModelConfig
    plan: tuple[LayerPlan, ...] = ()
    outputs: int | None = None  # rows of a head of its own; None: the embedding table serves
    head: str = "head"  # "score" for labels
    head_bias: bool = False
    remat: bool = False
    deep_head: bool = False

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, attend: Attend, tap: Tap, keep: list | None = None,
        rows: Callable[[jax.Array], jax.Array] = lambda x: x,  # holds rows where they are
    ):
        c = self.config
        x = rows(Embed(c, name="embed")(tokens_BT))
        block = nn.remat(Block, static_argnums=(2, 3)) if self.remat else Block
        for layer in range(c.num_layers):
            if keep is not None:
                keep.append(x)
            plan = self.plan[layer] if self.plan else LayerPlan()
            named = f"layers_{layer}"

            def layer_tap(name, x, y, prefix=named):
                tap(f"{prefix}/{name}", x, y)

            with jax.named_scope(named):
                x = rows(block(c, layer, plan, name=named)(x, attend, layer_tap))
        x = Norm(c.norm_eps, c.norm_offset, name="final_norm")(x)
        if keep is not None:
            keep.append(x)
        if self.outputs is not None and self.deep_head:
            DeepHead(self.outputs, c.dim, name=self.head)()
        elif self.outputs is not None:
            Head(self.outputs, c.dim, self.head_bias, name=self.head)()
        return x
