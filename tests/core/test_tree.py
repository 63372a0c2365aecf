"""Trees with path names, and rows gathered within their prompt."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.core.tree import flatten, gather_rows, map_with_path, nbytes, size, unflatten

NAMES = st.text("abc", min_size=1, max_size=3)
TREES = st.dictionaries(
    NAMES,
    st.recursive(st.integers(), lambda t: st.dictionaries(NAMES, t, min_size=1), max_leaves=6),
)


@given(TREES)
def test_flatten_and_unflatten_are_inverse(tree):
    assert unflatten(flatten(tree)) == tree
    assert map_with_path(lambda path, leaf: leaf, tree) == tree
    assert list(flatten(tree).values()) == jax.tree.leaves(tree) or len(flatten(tree)) > 1


def test_sizes_of_arrays_and_of_shapes():
    tree = {"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(5, jnp.bfloat16)}}
    shapes = jax.eval_shape(lambda: tree)
    assert size(tree) == size(shapes) == 11
    assert nbytes(tree) == nbytes(shapes) == 24 + 10


def test_rows_move_within_their_prompt():
    rows = np.arange(24).reshape(6, 4)
    ancestors = np.array([[0, 0, 2], [1, 2, 0]])
    moved = gather_rows({"x": jnp.asarray(rows), "k": jax.random.split(jax.random.key(0), 6)},
                        jnp.asarray(ancestors))
    flat = (ancestors + np.array([[0], [3]])).reshape(-1)
    np.testing.assert_array_equal(moved["x"], rows[flat])
    assert moved["k"].shape == (6,)
