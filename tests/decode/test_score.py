"""Scores against the model without a cache, in windows, in batches and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.core.errors import NumericsError, ShapeError
from jaxlm.core.mesh import make_mesh
from jaxlm.decode import score as module
from jaxlm.decode.score import perplexity, score, windows
from jaxlm.hf.bundle import load

TEXTS = ["a text", "another one, somewhat longer than the first", "ab"]
log_p = jax.jit(lambda lm, params, tokens: jax.nn.log_softmax(lm.apply(params, tokens).logits),
                static_argnums=0)


def by_hand(bundle, ids, start=0, end=None):
    """log p of ids[start + 1: end], read from `start` on."""
    part = ids[start:end]
    padded = jnp.asarray([part + [0] * (64 - len(part))])
    found = log_p(bundle.lm, bundle.params, padded)[0]
    return np.array([found[i - 1, part[i]] for i in range(1, len(part))])


def test_scores_equal_the_model_s_log_probabilities(bundle):
    for found, text in zip(score(bundle, TEXTS), TEXTS, strict=True):
        ids = bundle.tokenizer.encode(text)
        expected = by_hand(bundle, ids)
        assert list(found.tokens) == ids
        np.testing.assert_allclose(found.logprobs, expected, atol=1e-5)
        assert found.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-5)
        assert perplexity(found) == pytest.approx(found.perplexity, rel=1e-6)


def test_windows_give_each_token_the_context_that_was_promised(bundle):
    ids = bundle.tokenizer.encode(TEXTS[1])
    found = score(bundle, ids, window=16, stride=5).logprobs
    expected, scored, start = np.full(len(ids) - 1, np.nan), 1, 0
    while scored < len(ids):
        end = min(start + 16, len(ids))
        expected[scored - 1: end - 1] = by_hand(bundle, ids, start, end)[scored - 1 - start:]
        scored, start = end, start + 5
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - score(bundle, ids).logprobs).max() > 1e-3  # less context does matter


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_windows_score_every_token_once(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    found = windows(length, window, stride)
    scored = [t for start, end, new in found for t in range(new, end)]
    assert scored == list(range(1, length))
    assert all(0 <= s < new <= e and e - s <= window for s, e, new in found)
    assert all(new - s >= window - stride or s == 0 for s, _, new in found)  # context kept


def test_batches_and_neighbours_change_nothing(bundle):
    alone = [score(bundle, text, batch=1) for text in TEXTS]
    for batch in (2, 8):
        for one, other in zip(alone, score(bundle, TEXTS, batch=batch), strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("count", "batch", "rows"), [(1, 8, 1), (3, 8, 4), (5, 6, 6), (9, 8, 8)])
def test_few_texts_compute_few_rows(bundle, monkeypatch, count, batch, rows):
    plain, shapes = module._logprobs, []
    monkeypatch.setattr(module, "_logprobs", lambda lm, params, tokens_BT: (
        shapes.append(tokens_BT.shape[0]) or plain(lm, params, tokens_BT)))
    found = score(bundle, TEXTS[:1] * count, batch=batch)
    assert set(shapes) == {rows} and len(found) == count
    np.testing.assert_allclose(found[-1].logprobs, by_hand(bundle, list(found[-1].tokens)),
                               atol=1e-5)


@pytest.mark.parametrize("axes", [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 4}], ids=str)
def test_eight_devices_equal_one(tiny_folder, bundle, axes):
    spread = load(tiny_folder, mesh=make_mesh(**axes))
    for one, other in zip(score(spread, TEXTS), score(bundle, TEXTS), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    tokens = jnp.arange(64).reshape(8, 8)
    run = jax.jit(lambda lm, params, t: lm.apply(params, t).logits, static_argnums=0)
    np.testing.assert_allclose(run(spread.lm, spread.params, tokens),
                               run(bundle.lm, bundle.params, tokens), atol=1e-5)


def test_perplexity_weighs_tokens_and_not_texts(bundle):
    scores = score(bundle, TEXTS)
    everything = np.concatenate([s.logprobs for s in scores])
    assert perplexity(scores) == pytest.approx(np.exp(-everything.mean()), rel=1e-6)
    assert perplexity(scores) != pytest.approx(np.mean([s.perplexity for s in scores]), rel=1e-3)
    with pytest.raises(ShapeError, match="got no scores; expected at least one"):
        perplexity([])


def test_a_nan_is_an_error_that_names_the_text(bundle):
    table = bundle.params["embed"]["table"].at[5].set(jnp.nan)
    broken = bundle.replace(params={**bundle.params, "embed": {"table": table}})
    named = r"text 1: log-probability \d is not finite, first in .*layers_0/attn/q"
    with pytest.raises(NumericsError, match=named):
        score(broken, [[1, 2, 3], [1, 5, 2]])
