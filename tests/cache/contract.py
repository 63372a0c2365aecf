"""What every cache kind promises, as one suite: subclass `Contract`, give `kind` and `exact`.

The oracle is attention without a cache over the same tokens. `exact = False` (a kind that
quantises) widens the tolerance of what is read back, and leaves out bit-for-bit claims.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache.base import CacheKind
from jaxlm.core.tree import gather_rows
from jaxlm.models.attention import Mask, attend, merge, visible
from jaxlm.models.config import AttentionSpec, Rope
from jaxlm.models.layers import apply_rope

B, T, N, K, H, SLOTS = 3, 9, 4, 2, 8, 12
SPEC = AttentionSpec(N, K, H, H**-0.5, Rope())
SPECS = {"full": SPEC, "window": replace(SPEC, window=4), "softcap": replace(SPEC, softcap=2.0)}
LENGTHS = np.array([9, 4, 1])


def draw(time: int = T, seed: int = 0, batch: int = B):
    """Random q, k, v of one call."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(key, (batch, time, heads, H))
                 for key, heads in zip(keys, (N, K, K), strict=True))


def positions(time: int = T):
    """0, 1, 2, ... in every row."""
    return jnp.broadcast_to(jnp.arange(time), (B, time))


def reference(spec, q, k, v):
    """Attention over all tokens of the call, without a cache."""
    pos = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    q, k = apply_rope(q, pos, spec.rope), apply_rope(k, pos, spec.rope)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    seen = visible(Mask(window=spec.window), pos, pos)
    return attend(q, k, v, seen, scale=spec.scale, softcap=spec.softcap)


CALLS = {name: jax.jit(lambda kind, spec, *rest, name=name: getattr(kind, name)(spec, *rest),
                       static_argnums=(0, 1)) for name in ("prefill", "extend", "step")}


def jitted(kind):
    """The kind's functions, compiled once a kind, spec and shape, whichever test asks."""
    return {name: partial(call, kind) for name, call in CALLS.items()}


class Contract:
    """The promises. `kind`: the one under test."""

    kind: CacheKind
    exact = True
    tolerance = 1e-5

    def close(self, found, expected, rows=None):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=self.tolerance)

    def begin(self, spec=SPEC, lengths=LENGTHS, qkv=None, slots=SLOTS):
        q, k, v = qkv or draw()
        state = self.kind.init(spec, B, slots, jnp.float32)
        return jitted(self.kind)["prefill"](
            spec, state, q, k, v, positions(q.shape[1]), jnp.asarray(lengths)
        )

    @pytest.mark.parametrize("name", SPECS)
    def test_prefill_equals_full_attention(self, name):
        spec, qkv = SPECS[name], draw()
        out, lse, _ = self.begin(spec)
        expected = reference(spec, *qkv)
        for row, length in enumerate(LENGTHS):
            for found, wanted in zip((out, lse), expected, strict=True):
                np.testing.assert_allclose(found[row, :length], wanted[row, :length], atol=1e-5)

    @pytest.mark.parametrize("name", SPECS)
    def test_steps_equal_full_attention(self, name):
        """Row b has LENGTHS[b] tokens of one long text; steps append the ones that follow."""
        spec, (q, k, v) = SPECS[name], draw(SLOTS)
        prompt = tuple(x[:, :T] for x in (q, k, v))
        *_, state = self.begin(spec, qkv=prompt)
        expected = reference(spec, q, k, v)
        step = jitted(self.kind)["step"]
        for number in range(3):
            at = jnp.asarray(LENGTHS) + number
            rows = jnp.arange(B)
            now = tuple(x[rows, at][:, None] for x in (q, k, v))
            out, lse, state = step(spec, state, *now, at, at)
            self.close((out[:, 0], lse[:, 0]), [x[rows, at] for x in expected])
            if self.kind.flush_every == 1:  # else three tokens are fewer than must be flushed
                state = self.kind.flush(spec, state, jnp.asarray(True), at + 1)

    def test_a_ragged_extend_equals_single_steps(self):
        qkv, more = draw(), draw(4, seed=1)
        *_, state = self.begin(qkv=qkv, lengths=(5, 3, 1))
        start, counts = jnp.array([5, 3, 1]), np.array([4, 2, 0])
        pos = start[:, None] + jnp.arange(4)
        out, lse, extended = jitted(self.kind)["extend"](
            SPEC, state, *more, pos, start, jnp.asarray(counts)
        )
        stepped = state
        for t in range(4):
            o, l, stepped = jitted(self.kind)["extend"](
                SPEC, stepped, *(x[:, t:t + 1] for x in more), pos[:, t:t + 1], start + t,
                jnp.asarray(counts > t).astype(int),
            )
            live = counts > t
            self.close((out[live, t], lse[live, t]), (o[live, 0], l[live, 0]))
        probe = draw(1, seed=2)
        after = start + jnp.asarray(counts)
        step = jitted(self.kind)["step"]
        self.close(step(SPEC, extended, *probe, after, after)[:2],
                   step(SPEC, stepped, *probe, after, after)[:2])

    def test_log_sum_exp_lets_segments_merge(self):
        """A row's text split over two caches, positions carried on, equals one cache."""
        q, k, v = draw()
        *_, first = self.begin(lengths=(6, 6, 6))
        empty = self.kind.init(SPEC, B, SLOTS, jnp.float32)
        six, zero = jnp.full(B, 6), jnp.zeros(B, int)
        three = tuple(x[:, 6:9] for x in (q, k, v))
        pos = positions()[:, 6:9]
        extend = jitted(self.kind)["extend"]
        own = extend(SPEC, empty, *three, pos, zero, jnp.full(B, 3))[:2]
        prompt = extend(SPEC, first, *three, pos, six, zero)[:2]  # reads, appends nothing
        whole = extend(SPEC, first, *three, pos, six, jnp.full(B, 3))[:2]
        self.close(merge([prompt, own]), whole)

    def test_rows_are_gathered_by_ordinary_tree_operations(self):
        *_, state = self.begin()
        probe = draw(1, seed=2)
        at = jnp.asarray(LENGTHS)
        assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(state))
        order = jnp.array([[2, 0, 0]])
        moved = gather_rows(state, order)
        step = jitted(self.kind)["step"]
        take = lambda tree: jax.tree.map(lambda x: x[order[0]], tree)
        found = step(SPEC, moved, *take(probe), at[order[0]], at[order[0]])[:2]
        self.close(found, take(step(SPEC, state, *probe, at, at)[:2]))

    def test_neighbours_do_not_touch_a_row(self):
        probe, at = draw(1, seed=2), jnp.asarray(LENGTHS)
        step = jitted(self.kind)["step"]
        *_, state = self.begin()
        one = step(SPEC, state, *probe, at, at)[:2]
        other = tuple(x.at[1:].multiply(-3) for x in draw())
        *_, state = self.begin(qkv=other)
        two = step(SPEC, state, *probe, at, at)[:2]
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a[0], b[0])
            assert bool((a[1] != b[1]).any())

    def test_padding_is_never_read(self):
        probe, at = draw(1, seed=2), jnp.asarray(LENGTHS)
        step = jitted(self.kind)["step"]
        pad = jnp.arange(T)[None, :, None, None] >= jnp.asarray(LENGTHS)[:, None, None, None]
        results = []
        for filler in (0.0, 1e4):
            *_, state = self.begin(qkv=tuple(jnp.where(pad, filler, x) for x in draw()))
            results.append(step(SPEC, state, *probe, at, at)[:2])
        self.close(*results)

    def test_what_overflows_is_dropped(self):
        """A full row keeps its text; writing beyond the slots changes none of it."""
        *_, state = self.begin(lengths=(9, 9, 9), slots=T)
        full, zero = jnp.full(B, T), jnp.zeros(B, int)
        extend = jitted(self.kind)["extend"]
        probe = draw(1, seed=2)
        before = extend(SPEC, state, *probe, full[:, None], full, zero)[:2]
        for count in (1, 2):
            more = draw(count, seed=3)
            *_, after = extend(SPEC, state, *more, full[:, None] + jnp.arange(count), full,
                               jnp.full(B, count))
            found = extend(SPEC, after, *probe, full[:, None], full, zero)[:2]
            for a, b in zip(found, before, strict=True):
                np.testing.assert_array_equal(a, b)

    def test_flush_keeps_the_state_s_shape_and_what_is_read(self):
        *_, state = self.begin()
        at, probe = jnp.asarray(LENGTHS), draw(1, seed=2)
        flushed = self.kind.flush(SPEC, state, jnp.asarray(False), at)
        assert jax.tree.map(jnp.shape, flushed) == jax.tree.map(jnp.shape, state)
        step = jitted(self.kind)["step"]
        self.close(step(SPEC, flushed, *probe, at, at)[:2], step(SPEC, state, *probe, at, at)[:2])
