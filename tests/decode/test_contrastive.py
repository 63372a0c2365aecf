"""Contrastive decoding against a loop in numpy over full passes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, ShapeError, TokenizerError
from jaxlm.core.mesh import make_mesh
from jaxlm.decode.contrastive import Contrast, contrast, contrastive_decode
from jaxlm.decode.generate import generate
from jaxlm.decode.rows import release
from jaxlm.decode.samplers import Categorical, Greedy
from jaxlm.decode.stop import NEVER, Stop, stop_rule
from jaxlm.hf.bundle import load
from jaxlm.models.lm import LM
from tests.decode.tiny import APPLY, DECODE, VOCAB, start, tiny_model
from tests.tiny import tokenizer_json, weights, write_folder

EXPERT, AMATEUR = tiny_model(0), tiny_model(5, num_layers=1)


@jax.jit
def run(expert_params, amateur_params, state, amateur_state, contrast, sampler, stop, max_new):
    return contrastive_decode(
        (EXPERT[0], expert_params), (AMATEUR[0], amateur_params), state, amateur_state,
        contrast, sampler, stop, max_new,
    )


def go(contrast, sampler, max_new=8, stop=NEVER, slots=20, amateur_slots=20):
    states = start(*EXPERT, slots, sampler), start(*AMATEUR, amateur_slots)
    return run(EXPERT[1], AMATEUR[1], *states, contrast, sampler, stop, max_new)


def log_softmax(l):
    return l - l.max(-1, keepdims=True) - np.log(
        np.exp(l - l.max(-1, keepdims=True)).sum(-1, keepdims=True))


def scores_along(tokens, alpha, beta, temperature):
    """The contrast after every prefix of the texts, from passes without a cache, float64."""
    p, q = (
        np.asarray(APPLY(lm, params, tokens).logits, np.float64)
        for lm, params in (EXPERT, AMATEUR)
    )
    p, q = log_softmax(p), log_softmax(q / temperature)
    plausible = np.exp(p) >= alpha * np.exp(p).max(-1, keepdims=True)
    return np.where(plausible, p - beta * q, -np.inf)


@pytest.mark.parametrize("alpha, beta, temperature", [(0.1, 1.0, 1.0), (0.01, 0.4, 0.5)])
def test_greedy_is_the_loop_in_numpy(alpha, beta, temperature):
    state, amateur = go(Contrast(alpha, beta, temperature), Greedy())
    scores = scores_along(state.tokens_BS, alpha, beta, temperature)
    plain = DECODE(*EXPERT, Greedy(), start(*EXPERT), NEVER, 8)
    for row, length in enumerate(np.asarray(state.length_B)):
        at = np.arange(length - 8, length)
        np.testing.assert_array_equal(state.tokens_BS[row, at], scores[row, at - 1].argmax(-1))
    assert not np.array_equal(state.tokens_BS, plain.tokens_BS)
    np.testing.assert_array_equal(state.tokens_BS, amateur.tokens_BS)
    np.testing.assert_array_equal(state.length_B, amateur.length_B)


def test_sampled_log_probabilities_are_those_of_the_scores():
    alpha, heat = 0.001, 0.7
    state, amateur = go(Contrast(alpha, 0.5), Categorical(heat, top_k=20))
    scores = scores_along(state.tokens_BS, alpha, 0.5, 1.0)
    q = log_softmax(np.asarray(APPLY(*AMATEUR, state.tokens_BS).logits, np.float64))
    for row, length in enumerate(np.asarray(state.length_B)):
        for at in range(length - 8, length):
            s, token = scores[row, at - 1], int(state.tokens_BS[row, at])
            s = np.where(s >= np.sort(s)[-20], s, -np.inf)
            np.testing.assert_allclose(
                state.logprob_BS[row, at], log_softmax(s / heat)[token], atol=1e-4
            )
            own = q[row, at - 1, token]
            np.testing.assert_allclose(amateur.logprob_BS[row, at], own, atol=1e-4)


def test_without_contrast_it_is_the_expert():
    state, _ = go(Contrast(alpha=1e-30, beta=0.0), Categorical(0.9))
    plain = DECODE(*EXPERT, Categorical(0.9), start(*EXPERT, 20, Categorical(0.9)), NEVER, 8)
    np.testing.assert_array_equal(state.tokens_BS, plain.tokens_BS)
    np.testing.assert_allclose(state.logprob_BS, plain.logprob_BS, atol=1e-5)


def test_rows_stop_wait_and_go_on_in_both_models():
    whole, _ = go(Contrast(), Greedy(), 12)
    begin = np.asarray(start(*EXPERT).length_B)
    first = int(whole.tokens_BS[0, begin[0] + 2])
    state, amateur = go(Contrast(), Greedy(), 12, Stop(ids=(first,)))
    assert state.done_B[0] and int(state.length_B[0]) <= begin[0] + 3
    np.testing.assert_array_equal(state.done_B, amateur.done_B)
    np.testing.assert_array_equal(state.length_B, amateur.length_B)
    rule = stop_rule([b"<%d>" % i for i in range(VOCAB)], delimiters=[f"<{first}>"])
    state, amateur = go(Contrast(), Greedy(), 12, rule)
    assert state.hold_B[0] and not state.done_B[0] and not amateur.hold_B.any()
    for _ in range(20):
        left = begin + 12 - np.asarray(state.length_B)
        if (left <= 0).all():
            break
        state, amateur = run(EXPERT[1], AMATEUR[1], release(state), amateur, Contrast(), Greedy(),
                             rule, 1)
    for row in range(3):
        end = begin[row] + 12
        np.testing.assert_array_equal(state.tokens_BS[row, :end], whole.tokens_BS[row, :end])


def test_a_full_amateur_ends_the_row():
    state, amateur = go(Contrast(), Greedy(), 30, slots=20, amateur_slots=10)
    assert state.done_B.all() and (np.asarray(state.length_B) == 10).all()
    np.testing.assert_array_equal(state.length_B, amateur.length_B)


def test_nan_in_the_amateur_is_not_hidden():
    scores = Contrast().scores(jnp.zeros((2, 5)), jnp.zeros((2, 5)).at[0, 3].set(jnp.nan))
    assert np.isnan(scores[0]).all() and np.isfinite(scores[1]).all()


@pytest.mark.parametrize("rule", [None, 0.5, Contrast, Greedy()], ids=str)
def test_a_rule_is_a_contrast(bundle, weak, rule):
    with pytest.raises(ConfigError, match="rule is .*expected a Contrast, such as"):
        contrast(bundle, weak, "x", rule=rule)
    with pytest.raises(ConfigError, match="contrast is .*expected a Contrast, such as"):
        contrastive_decode(EXPERT, AMATEUR, start(*EXPERT), start(*AMATEUR), rule)


def test_models_of_other_vocabularies_are_refused():
    small = tiny_model(1, vocab_size=VOCAB - 10)
    with pytest.raises(ConfigError, match="61 and 51"):
        contrastive_decode(EXPERT, small, start(*EXPERT), start(*EXPERT))


def test_states_of_other_texts_are_refused():
    plain, _ = go(Contrast(), Greedy())
    state, amateur = start(*EXPERT), start(*AMATEUR)
    other = amateur.replace(tokens_BS=amateur.tokens_BS.at[1, 0].add(1))
    longer = amateur.replace(length_B=amateur.length_B.at[2].add(1))
    for wrong, row in ((other, 1), (longer, 2)):
        with pytest.raises(ConfigError, match=rf"rows \[{row}\] .*other texts"):
            contrastive_decode(EXPERT, AMATEUR, state, wrong)
    with pytest.raises(ShapeError, match="3 and 2 rows"):
        contrastive_decode(EXPERT, AMATEUR, state, start(*AMATEUR, rows=2))
    found, _ = run(EXPERT[1], AMATEUR[1], start(*EXPERT, 20, Greedy()), other, Contrast(),
                   Greedy(), NEVER, 8)  # traced: the row says so by NaN, and its neighbours go on
    assert np.isnan(found.logprob_BS[1, state.length_B[1]])
    for row in (0, 2):
        np.testing.assert_array_equal(found.tokens_BS[row], plain.tokens_BS[row])
        np.testing.assert_array_equal(found.logprob_BS[row], plain.logprob_BS[row])


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    """Other weights under the tokenizer of the tests' model."""
    return load(write_folder(tmp_path_factory.mktemp("weak") / "m", tensors=weights(seed=7)))


def test_texts_are_those_of_the_loop_in_numpy(bundle, weak):
    """Rows of unequal length, a stop id, and the log-probabilities of the scores."""
    prompts, rule = ["Hello", "a longer prompt"], Contrast(0.05, 0.7, 0.8)
    answers = contrast(bundle, weak, prompts, rule=rule, max_new_tokens=6, stop_ids=())
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = bundle.tokenizer.encode(prompt)
        text = jnp.array([ids + list(answer.tokens)])
        p, q = (log_softmax(np.asarray(APPLY(model.lm, model.params, text).logits[0], np.float64)
                            / heat)[len(ids) - 1: -1]
                for model, heat in ((bundle, 1.0), (weak, 0.8)))
        plausible = np.exp(p) >= 0.05 * np.exp(p).max(-1, keepdims=True)
        scores = np.where(plausible, p - 0.7 * q, -np.inf)
        np.testing.assert_array_equal(scores.argmax(-1), answer.tokens)
        np.testing.assert_allclose(answer.logprobs, log_softmax(scores).max(-1), atol=1e-4)
    assert [a.tokens for a in answers] != [
        a.tokens for a in generate(bundle, prompts, max_new_tokens=6, stop_ids=())]
    end = answers[0].tokens[2]
    ended = contrast(bundle, weak, prompts[0], rule=rule, max_new_tokens=6, stop_ids=[end])
    assert ended.finish == "stop" and ended.tokens == answers[0].tokens[: len(ended.tokens)]


def padded(folder, seed, size):
    """The model of a seed with more rows of vocabulary, which it would draw, and a token there."""
    tensors, rng = weights(seed=seed), np.random.default_rng(9)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tail = 10 * rng.standard_normal((size - len(tensors[name]), tensors[name].shape[1]))
        tensors[name] = np.concatenate([tensors[name], tail.astype(np.float32)])
    made = tokenizer_json()
    made["added_tokens"].append(made["added_tokens"][-1] | {"id": 258, "content": "<image>"})
    write_folder(folder, tensors=tensors, vocab_size=size)
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return load(folder)


def test_padding_of_either_model_changes_nothing(bundle, weak, tmp_path):
    """As in Qwen 2.5 7B against 0.5B, and Gemma 3 4B against 1B."""
    large, large_weak = padded(tmp_path / "a", 0, 264), padded(tmp_path / "b", 7, 264)
    given = dict(rule=Contrast(1e-6, 0.7, 0.8), max_new_tokens=6, stop_ids=())
    prompts = ["Hello", "a longer prompt"]
    wanted = contrast(bundle, weak, prompts, **given)
    assert any(t >= 258 for a in contrast(large, large_weak, prompts, **given) for t in a.tokens)
    for pair in ((large, weak), (bundle, large_weak)):
        for found, want in zip(contrast(*pair, prompts, **given), wanted, strict=True):
            assert found.tokens == want.tokens
            np.testing.assert_allclose(found.logprobs, want.logprobs, atol=1e-4)
    with pytest.raises(TokenizerError, match="prompt 0 has token id 260"):
        contrast(large, weak, [[5, 260]])


def test_without_beta_the_text_is_generate_s(bundle, weak):
    alone = Contrast(alpha=1e-30, beta=0.0)
    warm = dict(max_new_tokens=6, sampler=Categorical(0.9), key=jax.random.key(4))
    assert contrast(bundle, weak, "Hello", rule=alone, **warm).tokens == generate(
        bundle, "Hello", **warm).tokens


def test_pairs_that_do_not_belong_together_are_refused(bundle, weak, tmp_path):
    made = tokenizer_json()
    vocab = made["model"]["vocab"]
    made["model"]["vocab"] = {name: 255 - i for name, i in vocab.items()}
    folder = write_folder(tmp_path / "m")
    (folder / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(ConfigError, match="other ids"):
        contrast(bundle, load(folder), "x")
    made = tokenizer_json()
    first, second = made["added_tokens"]
    first["content"], second["content"] = second["content"], first["content"]
    folder = write_folder(tmp_path / "swapped", bos_token_id=257, eos_token_id=256)
    (folder / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(ConfigError, match="'</s>' is 257 and 256"):
        contrast(bundle, load(folder), "x")
    with pytest.raises(ConfigError, match="258 and 61 tokens"):
        contrast(bundle, weak.replace(lm=EXPERT[0]), "x")
    with pytest.raises(ConfigError, match="meshes None and .*same mesh"):
        contrast(bundle, weak.replace(mesh=make_mesh(devices=jax.devices()[:1])), "x")
    with pytest.raises(ConfigError, match="bundle is 'tiny'"):
        contrast(bundle, "tiny", "x")
    short = weak.replace(lm=LM(weak.lm.config.replace(max_len=16)))
    with pytest.raises(ShapeError, match="the amateur was made for 16"):
        contrast(bundle, short, "Hello", max_new_tokens=30)
