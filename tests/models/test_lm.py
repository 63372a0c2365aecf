"""What LM.apply can give besides logits, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, ShapeError
from jaxlm.core.tree import flatten, size
from jaxlm.models.attention import Mask
from jaxlm.models.config import LayerPlan
from jaxlm.models.layers import against_rows
from jaxlm.models.lm import LM, count_params
from tests.tiny import CONFIG, VOCAB, model

close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(2), (3, 12), 0, VOCAB)


def test_logits_at_chosen_positions(tokens):
    lm, params = model()
    full = lm.apply(params, tokens).logits
    lengths = jnp.array([12, 5, 1])
    last = lm.apply(params, tokens, lengths_B=lengths, logits_at="last").logits
    close(last[:, 0], full[jnp.arange(3), lengths - 1])
    at = jnp.array([[3, 0], [1, 1], [11, 4]])
    close(lm.apply(params, tokens, logits_at=at).logits, full[jnp.arange(3)[:, None], at])
    assert lm.apply(params, tokens, logits_at=None).logits is None


def asked(at, lengths=None):
    """Logits of three tokens a row, both ways of asking."""
    lm, params = model()
    lengths = None if lengths is None else jnp.array(lengths)
    run = lambda params: lm.apply(params, jnp.ones((2, 3), int), lengths_B=lengths,
                                  logits_at=at).logits
    made = run(params)
    np.testing.assert_array_equal(jnp.isnan(made), jnp.isnan(jax.jit(run)(params)))
    return jnp.isfinite(made).all(-1).tolist(), jnp.isnan(made).all(-1).tolist()


@pytest.mark.parametrize("index", [3, 9, -1, -3, 2**31 - 1, -2**31])
def test_a_position_that_is_not_there_is_nan(index):
    finite, nan = asked(jnp.array([[index, 2], [0, index]]))
    assert finite == [[False, True], [True, False]] and nan == [[True, False], [False, True]]


def test_a_position_in_the_padding_is_nan():
    finite, nan = asked(np.array([[0, 1, 2]] * 2), lengths=[2, 3])
    assert finite == [[True, True, False], [True] * 3]
    assert nan == [[False, False, True], [False] * 3]


@pytest.mark.parametrize("bad", [0, -2, 4, 99])
def test_the_last_token_of_a_length_that_cannot_be_is_nan(bad):
    assert asked("last", lengths=[bad, 3]) == ([[False], [True]], [[True], [False]])
    assert asked(jnp.array([[0], [0]]), lengths=[bad, 1]) == ([[False], [True]], [[True], [False]])
    rewards = LM(CONFIG, labels=1)
    found = rewards.classify(rewards.init(jax.random.key(0)), jnp.ones((2, 3), int),
                             jnp.array([bad, 3]))
    assert jnp.isnan(found[0]).all() and jnp.isfinite(found[1]).all()


def test_a_masked_row_without_a_text_harms_no_gradient(tokens):
    lm = LM(CONFIG.replace(tie_embeddings=False))
    params = lm.init(jax.random.key(0))

    def loss(params, tokens, lengths):
        logits = lm.apply(params, tokens, lengths_B=lengths, logits_at="last").logits[:, 0]
        return jnp.where(lengths > 0, jax.nn.log_softmax(logits)[:, 1], 0).sum()

    alone = jax.grad(loss)(params, tokens[:2], jnp.array([12, 5]))
    padded = jax.grad(loss)(params, tokens, jnp.array([12, 5, 0]))
    jax.tree.map(close, padded, alone)


def test_hidden_states(tokens):
    lm, params = model()
    output = lm.apply(params, tokens, want=("hidden",))
    assert len(output.hidden) == CONFIG.num_layers + 1
    close(output.hidden[0], params["embed"]["table"][tokens])
    close(lm.head(params, output.hidden[-1]), output.logits)


def test_a_tap_at_every_projection(tokens):
    lm, params = model(qkv_bias=True)
    params = jax.tree.map(lambda x: x + 0.01, params)  # biases that are not zero
    taps = lm.apply(params, tokens, want=("taps",)).taps
    flat = flatten(params)
    kernels = [path for path in flat if path.endswith("/kernel")]
    assert sorted(taps) == sorted(path.removesuffix("/kernel") for path in kernels)
    for path, (given, found) in taps.items():
        kernel = flat[f"{path}/kernel"]
        inputs = kernel.ndim - (found.ndim - 2)
        expected = jnp.tensordot(given, kernel, axes=inputs) + flat.get(f"{path}/bias", 0)
        close(found, expected)


def test_a_skipped_block_equals_a_zero_projection(tokens):
    lm, params = model()
    skipping = LM(CONFIG, (LayerPlan(), LayerPlan(skip_attention=True)))
    zeroed = jax.tree.map(lambda x: x, params)
    zeroed["layers_1"]["attn"]["o"]["kernel"] *= 0
    close(skipping.apply(params, tokens).logits, lm.apply(zeroed, tokens).logits)
    assert float(jnp.abs(lm.apply(params, tokens).logits - lm.apply(zeroed, tokens).logits).max())
    assert skipping.attention_layers == (0,)
    assert "attn" not in skipping.init(jax.random.key(0))["layers_1"]


def test_scaled_branches_equal_scaled_projections(tokens):
    lm, params = model()
    planned = LM(CONFIG, (LayerPlan(attention_scale=0.5), LayerPlan(mlp_scale=-2.0)))
    scaled = jax.tree.map(lambda x: x, params)
    scaled["layers_0"]["attn"]["o"]["kernel"] *= 0.5
    scaled["layers_1"]["mlp"]["down"]["kernel"] *= -2.0
    close(planned.apply(params, tokens).logits, lm.apply(scaled, tokens).logits)


def test_remat_changes_nothing(tokens):
    lm, params = model()
    loss = lambda lm: jax.value_and_grad(
        lambda p: lm.logprobs(p, tokens[:, :-1], tokens[:, 1:]).mean()
    )(params)
    jax.tree.map(close, loss(LM(CONFIG, remat=True)), loss(lm))


def test_packed_documents_equal_documents_alone(tokens):
    lm, params = model()
    row = tokens[:1]
    segments = jnp.array([[0] * 5 + [1] * 7])
    positions = jnp.array([[*range(5), *range(7)]])
    packed = lm.apply(params, row, segments_BT=segments, positions_BT=positions).logits
    close(packed[:, :5], lm.apply(params, row[:, :5]).logits)
    close(packed[:, 5:], lm.apply(params, row[:, 5:]).logits)


def test_prefix_window_and_bias_reach_every_layer(tokens):
    lm, params = model()
    apply = lambda **kind: lm.apply(params, tokens, **kind).logits
    close(apply(prefix_B=jnp.full(3, 12)), apply(mask=Mask(causal=False)))
    distance = jnp.arange(12)[:, None] - jnp.arange(12)[None]
    bias_BNTS = jnp.where(distance < 3, 0.0, -1e9)[None, None]
    close(apply(mask=Mask(window=3)), apply(bias_BNTS=bias_BNTS))
    windowed = LM(CONFIG.replace(windows=(3, 3)))
    close(windowed.apply(params, tokens).logits, apply(mask=Mask(window=3)))
    assert float(jnp.abs(apply(mask=Mask(window=3)) - apply()).max()) > 1e-3


def test_heads_with_labels(tokens):
    lm = LM(CONFIG, labels=3)
    params = lm.init(jax.random.key(0))
    assert lm.apply(params, tokens, logits_at="last").logits.shape == (3, 1, 3)
    last = lm.apply(params, tokens, logits_at="last").logits
    close(lm.apply(params, tokens).logits[:, -1:], last)


@pytest.mark.parametrize("lead", [(), (5,), (1, 1), (3, 1), (2, 5), (2, 0), (2, 3, 4)], ids=str)
def test_products_of_bfloat16_are_summed_in_float32(lead):
    """Each is exact there; what is rounded to bfloat16 at the end is a hundred times farther."""
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    x, table = draw(0, *lead, 16), draw(1, 48, 16)
    expected = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    for run in (against_rows, jax.jit(against_rows)):
        found = run(x, table)
        assert found.dtype == jnp.float32 and found.shape == (*lead, 48)
        close(found, expected)
    slope = jax.jit(jax.grad(lambda x: against_rows(x, table).sum()))(x)
    np.testing.assert_allclose(
        np.asarray(slope, np.float64),
        np.broadcast_to(np.asarray(table, np.float64).sum(0), x.shape), rtol=2**-7, atol=1e-3)


def test_tree_axes_and_counts_agree():
    lm, params = model()
    axes, shapes = flatten(lm.axes()), flatten(params)
    assert {path: len(names) for path, names in axes.items()} == {
        path: leaf.ndim for path, leaf in shapes.items()
    }
    assert count_params(lm) == size(params)
    assert hash(LM(CONFIG.replace())) == hash(lm) and LM(CONFIG.replace()) == lm


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**30])
def test_an_unknown_token_is_nan_and_harms_no_other_row(tokens, bad):
    lm, params = model()
    logits = lm.apply(params, tokens.at[1, 4].set(bad)).logits
    assert bool(jnp.isnan(logits[1, 4:]).all())
    close(logits[0], lm.apply(params, tokens).logits[0])
    padded = lm.apply(params, tokens.at[1, 4:].set(bad), lengths_B=jnp.array([12, 4, 12])).logits
    close(padded[1, :4], lm.apply(params, tokens).logits[1, :4])


@pytest.mark.parametrize("arguments, words", [
    ({"lengths_B": jnp.ones((3, 1), int)}, ["lengths_B", "(3, 1)", "(3,)"]),
    ({"positions_BT": jnp.ones((3, 11), int)}, ["positions_BT", "(3, 11)", "(3, 12)"]),
    ({"segments_BT": jnp.ones((1, 12), int)}, ["segments_BT", "(1, 12)", "(3, 12)"]),
    ({"prefix_B": jnp.ones((), int)}, ["prefix_B", "()", "(3,)"]),
    ({"logits_at": jnp.ones((3,), int)}, ["logits_at", "(3,)", "(3, M)"]),
    ({"logits_at": []}, ["logits_at", "[]", "array of whole numbers (3, M)"]),
    ({"logits_at": [[9], [0], [0]]}, ["logits_at", "[[9], [0], [0]]", "array of whole numbers"]),
    ({"logits_at": jnp.ones((3, 1))}, ["logits_at", "float32 (3, 1)", "whole numbers (3, M)"]),
    ({"logits_at": "first"}, ["logits_at", "'first'", "'last'"]),
    ({"want": ("gradients",)}, ["want", "gradients", "taps"]),
])
def test_arrays_that_do_not_fit_are_refused(tokens, arguments, words):
    lm, params = model()
    with pytest.raises((ShapeError, ConfigError)) as error:
        lm.apply(params, tokens, **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("tokens", [jnp.ones(3, int), jnp.ones((2, 0), int), jnp.ones((0, 2), int),
                                    jnp.ones((2, 2)), [[1, 2]]],
                         ids=["rank", "time", "batch", "float", "list"])
def test_tokens_must_be_rows_of_whole_numbers(tokens):
    lm, params = model()
    with pytest.raises(ShapeError, match="tokens are .*whole numbers.*rows, time"):
        lm.apply(params, tokens)


def test_taps_through_remat_are_refused(tokens):
    lm = LM(CONFIG, remat=True)
    with pytest.raises(ConfigError, match="remat=False"):
        lm.apply(model()[1], tokens, want=("taps",))
