"""The same numbers as transformers, from committed goldens and (marker torch) live; gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.cache.dense import Dense
from jaxlm.core.tree import flatten, unflatten
from jaxlm.decode.samplers import Greedy
from jaxlm.decode.state import Stop
from jaxlm.hf.config import from_hf, read_json
from jaxlm.hf.families import FAMILIES, tensor_name
from jaxlm.hf.weights import load_params, to_theirs
from jaxlm.models.lm import LM
from tests.decode.steps import decode, prefill
from tests.tiny import VOCAB, model


@pytest.fixture(scope="module")
def golden(golden_subset):
    """The model, its parameters, and what transformers computed with them."""
    folder = golden_subset / "random_llama"
    lm = LM(from_hf(read_json(folder / "config.json")))
    params = load_params(folder, lm.shapes(), FAMILIES["llama"], jnp.float32)
    return lm, params, dict(np.load(folder / "expected.npz"))


def batch(rows):
    """Ragged rows, padded right."""
    lengths = np.array([len(row) for row in rows])
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return jnp.asarray(tokens), jnp.asarray(lengths)


def test_log_probabilities_equal_the_golden_ones(golden):
    lm, params, expected = golden
    tokens, lengths = batch([expected[f"prompt_{row}"] for row in range(3)])
    found = jax.nn.log_softmax(lm.apply(params, tokens, lengths_B=lengths).logits)
    for row, length in enumerate(lengths):
        wanted = jax.nn.log_softmax(expected[f"logits_{row}"])
        np.testing.assert_allclose(found[row, :length], wanted, atol=1e-4)


def test_greedy_tokens_equal_the_golden_ones(golden):
    lm, params, expected = golden
    tokens, lengths = batch([expected[f"prompt_{row}"] for row in range(3)])
    keys = jax.random.split(jax.random.key(0), 3)
    state = prefill(lm, params, Greedy(), tokens, lengths, Dense(), 96, keys)
    state = decode(lm, params, Greedy(), state, Stop(), 32)
    for row, length in enumerate(lengths):
        found = state.tokens_BS[row, length: length + 32]
        np.testing.assert_array_equal(found, expected[f"greedy_{row}"])


def test_gradient_equals_finite_differences():
    """Along random directions, in float32: the central difference has error h^2, rounding 1/h."""
    lm, params = model()
    tokens = jax.random.randint(jax.random.key(2), (4, 12), 0, VOCAB)

    @jax.jit
    def loss(p):
        return -lm.logprobs(p, tokens[:, :-1], tokens[:, 1:], chunk=100).mean()

    gradient = jax.device_get(jax.jit(jax.grad(loss))(params))
    flat, rng, size, step = flatten(jax.device_get(params)), np.random.default_rng(0), {}, 1e-2
    for path, leaf in flat.items():
        way = rng.standard_normal(leaf.shape).astype(np.float32)
        way = way / np.linalg.norm(way)
        moved = lambda sign, path=path, way=way: unflatten(flat | {path: flat[path] + sign * way})
        slope = float(loss(moved(step)) - loss(moved(-step))) / (2 * step)
        size[path] = float(np.vdot(flatten(gradient)[path], way))
        assert slope == pytest.approx(size[path], abs=5e-4), path
    assert max(map(abs, size.values())) > 0.01  # the bound above is not idle


@pytest.mark.torch
def test_live_log_probabilities_and_gradients_equal_torch(golden, golden_subset):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    lm, params, expected = golden
    theirs = AutoModelForCausalLM.from_pretrained(
        golden_subset / "random_llama", dtype=torch.float32, attn_implementation="eager"
    )
    ids = expected["prompt_2"]
    log_p = torch.log_softmax(theirs(torch.from_numpy(ids).long()[None]).logits[0], -1)
    loss = -log_p[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:]).long()].mean()
    loss.backward()
    ours, gradient = jax.value_and_grad(
        lambda p: -lm.logprobs(p, ids[None, :-1], ids[None, 1:]).mean()
    )(params)
    found = jax.nn.log_softmax(lm.apply(params, ids[None]).logits[0])
    np.testing.assert_allclose(found, log_p.detach().numpy(), atol=1e-4)
    assert float(ours) == pytest.approx(loss.item(), abs=1e-5)
    named = dict(theirs.named_parameters())
    for path, leaf in flatten(gradient).items():
        name = tensor_name(path, FAMILIES["llama"])
        np.testing.assert_allclose(to_theirs(leaf, name), named[name].grad.numpy(), atol=1e-5)
