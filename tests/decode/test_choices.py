"""Answers to choose among: against whole texts scored without a cache, in batches, bad input."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, NumericsError, ShapeError
from jaxlm.core.mesh import make_mesh
from jaxlm.decode.choices import Choices, choice_logprobs, common
from jaxlm.decode.score import score
from jaxlm.hf.bundle import load

PROMPTS = ["a text", "another one, somewhat longer than the first", "ab"]
ANSWERS = [" and its end", " a", " b, or not"]


def by_hand(bundle, prompt, choices, end=None):
    """log p of what each whole text has beyond the beginning that all have in common."""
    ids = [bundle.tokenizer.encode(prompt + choice) for choice in choices]
    alike = next(i for i in range(99) if len({tuple(text[:i + 1]) for text in
                                              [*ids, bundle.tokenizer.encode(prompt)]}) > 1)
    texts = [text + ([] if end is None else [end]) for text in ids]
    return [score(bundle, text).logprobs[alike - 1:].sum() for text in texts]


@pytest.mark.parametrize("end", [False, True])
def test_choices_equal_whole_texts_scored_without_a_cache(bundle, end):
    mark = bundle.tokenizer.id_of("eos_token")
    found = choice_logprobs(bundle, PROMPTS, ANSWERS, end=end)
    expected = [by_hand(bundle, prompt, ANSWERS, mark if end else None) for prompt in PROMPTS]
    assert found.shape == (3, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_neither_batch_nor_neighbours_change_a_choice(bundle):
    found = choice_logprobs(bundle, PROMPTS, ANSWERS)
    one = [choice_logprobs(bundle, [prompt], [answer] * 2)[0, 0]
           for prompt in PROMPTS for answer in ANSWERS]
    for batch in (1, 2, 64):
        np.testing.assert_allclose(choice_logprobs(bundle, PROMPTS, ANSWERS, batch=batch), found,
                                   atol=1e-4)
    np.testing.assert_allclose(np.reshape(one, (3, 3)), found, atol=1e-4)


def test_a_token_across_the_border_belongs_to_the_answer(models_dir):
    """sentencepiece joins "hap" and "py" into one token: both choices are scored from there."""
    bundle = load(models_dir / "stories260K", dtype=jnp.float32)
    prompt, choices = "Tom was very hap", ["py", "less", "py and sad"]
    ids = [bundle.tokenizer.encode(prompt + choice) for choice in choices]
    alone = bundle.tokenizer.encode(prompt)
    assert common([*ids, alone]) < len(alone), "no token crosses the border: choose another text"
    found = choice_logprobs(bundle, [prompt], choices)[0]
    np.testing.assert_allclose(found, by_hand(bundle, prompt, choices), atol=2e-4)
    assert found.argmax() == 0


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 4, "tensor": 2}], ids=str)
def test_a_mesh_changes_nothing(bundle, tiny_folder, axes):
    spread = load(tiny_folder, mesh=make_mesh(**axes))
    found = choice_logprobs(spread, PROMPTS, ANSWERS, batch=8)
    np.testing.assert_allclose(found, choice_logprobs(bundle, PROMPTS, ANSWERS), atol=1e-4)


@pytest.mark.parametrize(("prompts", "choices", "said"), [
    ([], ["a"], "prompts is \\[\\]; expected a list"), ("text", ["a"], "prompts is 'text'"),
    (["a"], [], "choices is \\[\\]"), (["a"], [1], "choices is \\[1\\]"),
    (["a"], ["b", ""], "choice '' adds no token to prompt 'a'"),
    (["a" * 5000], ["b"], "tokens; the model reads"),
], ids=["no prompts", "a text", "no choices", "a number", "nothing added", "too long"])
def test_what_cannot_be_scored_is_refused_before_any_compute(bundle, prompts, choices, said):
    with pytest.raises(ShapeError, match=said):
        Choices.encode(bundle, prompts, choices)


def test_a_batch_of_none_and_weights_that_are_not_numbers(bundle):
    with pytest.raises(ConfigError, match="batch"):
        choice_logprobs(bundle, PROMPTS, ANSWERS, batch=0)
    table = bundle.params["embed"]["table"]
    broken = bundle.replace(params=bundle.params | {"embed": {"table": table * jnp.nan}})
    with pytest.raises(NumericsError, match="prompt 0: the log-probability of choice 0 is not"):
        choice_logprobs(broken, PROMPTS, ANSWERS)
