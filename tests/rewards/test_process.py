"""A process reward model that reads step by step scores as one that reads from scratch."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, TokenizerError
from jaxlm.hf.bundle import Bundle
from jaxlm.rewards import PLAIN, Layout, Prompts, process_reward, qwen_layout, rlhflow_layout
from tests.rewards.twins import (
    PROBLEMS,
    SPECIAL,
    Growing,
    network,
    random_step,
    scratch,
    softmax,
    twin,
    words,
)

SCORE = jax.jit(lambda reward, carry, rows: reward.score(carry, rows))
GATHER = jax.jit(lambda reward, carry, ancestors: reward.gather(carry, ancestors))
LENGTHS = (1, 5, 17, 2, 3)  # odd to the chunk of 16
STOP = 257


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("prm")


@pytest.fixture(scope="module")
def labelled(folder):
    return twin(folder / "labelled", 2)


@pytest.fixture(scope="module")
def answering(folder):
    return twin(folder / "answering", None)


def formatted(bundle, layout, problem, steps, aggregate):
    """Independent of the code: the whole text of a partial answer, and where it is scored."""
    encode = lambda text, special=False: bundle.tokenizer.encode(text, special=special)
    if layout == PLAIN:
        ids, marks = encode(problem, True), []
        for step in steps:
            ids += [i for i in step if i != STOP]
            marks.append(len(ids) - 1)
        return ids, marks[-1:] if aggregate == "model" else marks
    texts = [bundle.tokenizer.decode(step).strip() for step in steps]
    if aggregate == "model":
        texts = [bundle.tokenizer.decode(sum(steps, [])).strip()]
    if layout.pair is None:
        text = ("<|im_start|>system\nPlease reason step by step, and put your final answer within "
                f"\\boxed{{}}.<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n"
                "<|im_start|>assistant\n")
        ids, marks = encode(text), []
        for step in texts:
            ids += encode(step + "<extra_0>")
            marks.append(len(ids) - 1)
        return ids, marks
    ids, marks = [], []
    for number, step in enumerate(texts):
        said = f"{problem} {step}" if number == 0 else step
        ids += encode(f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n")
        marks.append(len(ids) - 1)  # what comes before "+" predicts it
        ids += encode("+<|im_end|>\n")
    return ids, marks


def expected(bundle, layout, problem, steps, aggregate):
    """The aggregated score by one pass over the formatted text."""
    if not steps:
        return 1.0
    ids, marks = formatted(bundle, layout, problem, steps, aggregate)
    logits = scratch(bundle, ids)[marks]
    if layout.pair is not None:
        plus, minus = (bundle.tokenizer.encode(c, special=False)[0] for c in "+-")
        logits = logits[:, [minus, plus]]
    scores = softmax(logits)[:, 1]
    return {"prod": scores.prod, "min": scores.min}.get(aggregate, lambda: scores[-1])()


def all_expected(bundle, layout, growing, aggregate):
    return np.array([
        expected(bundle, layout, growing.problems[row // growing.particles], steps, aggregate)
        for row, steps in enumerate(growing.steps)])


def grow(reward, bundle, layout, aggregate, on_device, seed=0, particles=3):
    """Steps of odd lengths in some rows, resampled now and then; scores beside the expected."""
    rng = np.random.default_rng(seed)
    growing, seen = Growing(bundle.tokenizer, PROBLEMS[:2], particles), []
    carry = reward.init(growing.given(), particles, 96)
    score, gather = (SCORE, GATHER) if on_device else (
        lambda reward, *args: reward.score(*args), lambda reward, *args: reward.gather(*args))
    for length in LENGTHS:
        for row in range(len(growing.steps)):
            if rng.random() < 0.8:
                growing.steps[row].append(random_step(rng, length + row % 2))
        found, carry = score(reward, carry, growing.rows(not on_device))
        seen.append(all_expected(bundle, layout, growing, aggregate))
        np.testing.assert_allclose(found, seen[-1], atol=1e-4)
        again, carry = score(reward, carry, growing.rows(not on_device))
        np.testing.assert_array_equal(again, found)  # nothing came: nothing changes
        ancestors = rng.integers(0, particles, (2, particles))
        growing.gather(ancestors)
        carry = gather(reward, carry, ancestors)
    assert np.std(seen) > 0.01  # a hundred tolerances apart


SLOW = pytest.mark.slow
CASES = [("plain", "prod"), pytest.param("plain", "min", marks=SLOW),
         pytest.param("plain", "last", marks=SLOW), pytest.param("qwen", "last", marks=SLOW),
         ("qwen", "model"), ("rlhflow", "prod"), pytest.param("rlhflow", "model", marks=SLOW)]


def case(name, request):
    bundle = request.getfixturevalue("answering" if name == "rlhflow" else "labelled")
    layout = {"plain": lambda t: PLAIN, "qwen": qwen_layout, "rlhflow": rlhflow_layout}[name]
    return bundle, layout(bundle.tokenizer)


@pytest.mark.parametrize(("name", "aggregate"), CASES)
def test_on_the_device_as_from_scratch(name, aggregate, request):
    bundle, layout = case(name, request)
    reward = process_reward(bundle, bundle, layout=layout, aggregate=aggregate)
    assert reward.on_device
    grow(reward, bundle, layout, aggregate, True)


@pytest.mark.parametrize(("name", "aggregate"), CASES[2:])
def test_over_the_host_as_from_scratch(name, aggregate, request):
    bundle, layout = case(name, request)
    reward = process_reward(bundle, bundle, layout=layout, aggregate=aggregate, on_device=False)
    assert not reward.on_device
    grow(reward, bundle, layout, aggregate, False, seed=1)


@pytest.mark.parametrize(("name", "aggregate"), [("plain", "prod"), ("qwen", "model")])
def test_a_loop_can_carry_it(name, aggregate, request):
    """Shapes and types of what is carried stay the same, as a loop on the device wants them."""
    bundle, layout = case(name, request)
    reward = process_reward(bundle, bundle, layout=layout, aggregate=aggregate)
    growing = Growing(bundle.tokenizer, PROBLEMS[:1], 2)
    carry = reward.init(growing.given(), 2, 96)
    both = lambda reward, carry, rows: reward.gather(
        reward.score(carry, rows)[1], jnp.zeros((1, 2), jnp.int32))
    after = jax.eval_shape(both, reward, carry, growing.rows())
    chex.assert_trees_all_equal_shapes_and_dtypes(after, carry)


def test_tokens_are_read_once(labelled):
    """T tokens cost T, and a separator a step, however many the steps."""
    rng = np.random.default_rng(0)
    for name, aggregate, extra in (("plain", "prod", 0), ("qwen", "model", 1)):
        layout = PLAIN if name == "plain" else qwen_layout(labelled.tokenizer)
        for on_device in (True, False):
            reward = process_reward(labelled, labelled, layout=layout, aggregate=aggregate,
                                    on_device=on_device)
            growing = Growing(labelled.tokenizer, PROBLEMS[:1], 2)
            carry = reward.init(growing.given(), 2, 96)
            for size in (4, 9, 3):
                for steps in growing.steps:
                    steps.append(random_step(rng, size, end="" if name == "qwen" else "\n"))
                args = (carry, growing.rows(not on_device))
                _, carry = SCORE(reward, *args) if on_device else reward.score(*args)
            total = sum(map(len, growing.steps[0])) + 3 * extra
            np.testing.assert_array_equal(carry.appended_B, total)


def test_a_prompt_is_stored_once(labelled):
    reward = process_reward(labelled, labelled, layout=PLAIN)
    growing = Growing(labelled.tokenizer, PROBLEMS, 4)
    carry = reward.init(growing.given(), 4, 32)
    prompt = jax.tree.leaves(carry.state.caches[0].prompt)
    own = jax.tree.leaves(carry.state.caches[0].own)
    assert {x.shape[0] for x in prompt} == {3} and {x.shape[0] for x in own} == {12}


def test_a_stop_id_is_no_step(labelled):
    """A row that only ends keeps its score, and one that ends in its last step is read up to it."""
    for layout, aggregate in ((PLAIN, "prod"), (qwen_layout(labelled.tokenizer), "model")):
        reward = process_reward(labelled, labelled, layout=layout, aggregate=aggregate)
        growing = Growing(labelled.tokenizer, PROBLEMS[:1], 2)
        carry = reward.init(growing.given(), 2, 96)
        step = random_step(np.random.default_rng(0), 6)
        growing.steps = [[step], [[*step, STOP]]]
        first, carry = SCORE(reward, carry, growing.rows())
        growing.steps[0].append([STOP])
        then, _ = SCORE(reward, carry, growing.rows())
        want = expected(labelled, layout, PROBLEMS[0], [step], aggregate)
        np.testing.assert_allclose([*first, *then], want, atol=1e-5)


def test_another_reward_of_the_same_shapes_compiles_nothing(folder, labelled):
    traces = []

    @jax.jit
    def score(reward, carry, rows):
        traces.append(None)
        return reward.score(carry, rows)

    growing = Growing(labelled.tokenizer, PROBLEMS[:1], 2)
    growing.steps = [[random_step(np.random.default_rng(0), 6)]] * 2
    found = []
    for seed in (0, 1):
        lm, params = network(2, seed=seed)
        again = labelled.replace(params=params, tokenizer=words(folder / f"again{seed}"))
        reward = process_reward(again, again, layout=PLAIN)
        found.append(score(reward, reward.init(growing.given(), 2, 96), growing.rows())[0])
    assert len(traces) == 1 and abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize("on_device", [True, False])
def test_without_room_a_row_is_nan_for_good(labelled, on_device):
    """Also when a later, shorter step would fit again: its text would have a hole."""
    reward = process_reward(labelled, labelled, layout=PLAIN, on_device=on_device)
    growing = Growing(labelled.tokenizer, PROBLEMS[:1], 2)
    carry = reward.init(growing.given(), 2, 8)
    rng = np.random.default_rng(0)
    growing.steps = [[random_step(rng, 40, end="\n")], [random_step(rng, 3, end="\n")]]
    for _ in range(2):
        args = (carry, growing.rows(not on_device))
        found, carry = SCORE(reward, *args) if on_device else reward.score(*args)
        assert np.isnan(found[0]) and np.isfinite(found[1])
        growing.steps[0].append(random_step(rng, 1, end="\n"))
    carry = reward.gather(carry, np.array([[1, 0]]))
    growing.gather(np.array([[1, 0]]))
    growing.steps[0].append(random_step(rng, 1, end="\n"))
    args = (carry, growing.rows(not on_device))
    found, _ = SCORE(reward, *args) if on_device else reward.score(*args)
    assert np.isfinite(found[0]) and np.isnan(found[1])


@pytest.mark.parametrize("on_device", [True, False])
def test_beyond_the_length_that_the_model_was_made_for_a_row_is_nan(labelled, on_device):
    growing = Growing(labelled.tokenizer, PROBLEMS[:1], 2)
    rng = np.random.default_rng(0)
    growing.steps = [[random_step(rng, 8, end="\n")], [random_step(rng, 9, end="\n")]]
    bound = len(growing.prompts[0]) + 9
    config = replace(labelled.lm.config, max_len=bound)
    small = labelled.replace(lm=replace(labelled.lm, config=config))
    found = []
    for judge in (labelled, small):
        reward = process_reward(judge, labelled, layout=PLAIN, on_device=on_device)
        args = (reward.init(growing.given(), 2, 32), growing.rows(not on_device))
        found.append((SCORE(reward, *args) if on_device else reward.score(*args))[0])
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).tolist() == [False, True]
    np.testing.assert_allclose(found[1][0], found[0][0], atol=1e-6)


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("aggregate", ["prod", "min", "last"])
def test_nan_parameters_are_nan_scores(labelled, aggregate, on_device):
    params = jax.tree.map(lambda x: x * np.nan, labelled.params)
    reward = process_reward(labelled.replace(params=params), labelled, layout=PLAIN,
                            aggregate=aggregate, on_device=on_device)
    growing = Growing(labelled.tokenizer, PROBLEMS[:1], 2)
    growing.steps = [[random_step(np.random.default_rng(0), 6)]] * 2
    carry = reward.init(growing.given(), 2, 96)
    args = (carry, growing.rows(not on_device))
    found, _ = SCORE(reward, *args) if on_device else reward.score(*args)
    assert np.isnan(found).all()


def test_a_scalar_head_is_a_logistic_score(folder):
    bundle = twin(folder / "scalar", 1)
    reward = process_reward(bundle, bundle, layout=PLAIN)
    growing = Growing(bundle.tokenizer, PROBLEMS[:1], 1)
    growing.steps = [[random_step(np.random.default_rng(0), 6)]]
    found, _ = SCORE(reward, reward.init(growing.given(), 1, 96), growing.rows())
    logit = scratch(bundle, bundle.tokenizer.encode(PROBLEMS[0]) + growing.steps[0][0])[-1, 0]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logit)), atol=1e-5)


def test_other_ids_go_over_the_host(folder, labelled):
    """A policy of another vocabulary is read by its texts; asking for the device is an error."""
    other = twin(folder / "other", None, special=("<pad>", *SPECIAL))
    reward = process_reward(labelled, other)
    assert not reward.on_device and reward.layout == qwen_layout(labelled.tokenizer)
    with pytest.raises(TokenizerError, match="do not share token ids: '<pad>' is 256"):
        process_reward(labelled, other, on_device=True)
    fewer = twin(folder / "fewer", None, special=SPECIAL[:4])
    assert process_reward(labelled, fewer).on_device  # the separator may be the reward's own


def test_a_step_is_stripped_where_a_token_joins_its_end_to_white_space(folder):
    """As Qwen's tokenizer does: by default the text is read, and on the device, if asked, not."""
    made = words(folder / "joining", merges=(("\u010a", "\u010a"), (".", "\u010a\u010a")))
    bundle = Bundle(*network(2), made, (made.id_of("eos_token"),))
    step = made.encode("Add them.\n\n", special=False)
    assert made.decode(step[-1:]) == ".\n\n"
    growing = Growing(made, PROBLEMS[:1], 1)
    growing.steps = [[step]]
    scores, odds = {}, lambda score: np.log(score / (1 - score))
    for on_device in (None, True):
        reward = process_reward(bundle, bundle, on_device=on_device)
        assert reward.layout == qwen_layout(made) and reward.on_device == bool(on_device)
        args = (reward.init(growing.given(), 1, 96), growing.rows(not on_device))
        scores[on_device] = float(
            (SCORE(reward, *args) if on_device else reward.score(*args))[0][0])
    want = expected(bundle, qwen_layout(made), PROBLEMS[0], [step], "last")
    assert abs(odds(scores[None]) - odds(want)) < 0.01 < 0.1 < abs(odds(scores[True]) - odds(want))
    assert process_reward(bundle, bundle, layout=PLAIN).on_device


def test_layouts_are_found(folder, labelled, answering):
    assert process_reward(labelled, labelled).layout == qwen_layout(labelled.tokenizer)
    assert process_reward(answering, answering).layout.pair == ("+", "-")
    bare = twin(folder / "bare", 2, special=SPECIAL[:4])
    assert process_reward(bare, bare).layout == PLAIN


def test_what_does_not_fit_is_refused(folder, labelled, answering):
    three = twin(folder / "three", 3)
    with pytest.raises(ConfigError, match="3 labels"):
        process_reward(three, three, layout=PLAIN)
    with pytest.raises(ConfigError, match="2 labels but the layout compares"):
        process_reward(labelled, labelled, layout=Layout(pair=("+", "-")))
    with pytest.raises(ConfigError, match="a vocabulary"):
        process_reward(answering, answering, layout=PLAIN)
    with pytest.raises(ConfigError, match="aggregate is 'mean'"):
        process_reward(labelled, labelled, aggregate="mean")
    with pytest.raises(ConfigError, match="problem"):
        Layout(prompt="no place")
    with pytest.raises(TokenizerError, match="one token each"):
        process_reward(answering, answering, layout=Layout(pair=("good", "bad")))
    bare = twin(folder / "none", 2, special=SPECIAL[:4])
    with pytest.raises(TokenizerError, match="<extra_0>"):
        qwen_layout(bare.tokenizer)
    silent = twin(folder / "silent", 2, chat=None)
    with pytest.raises(TokenizerError, match="chat template"):
        qwen_layout(silent.tokenizer)


def put(tree, new, slot):
    """One prompt's part of a carry in place of another's: leaves lead with R or with B."""
    def one(leaf, part):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or not leaf.ndim:
            return leaf  # nothing is drawn
        whole = np.array(leaf)
        assert whole[: len(part)].shape == part.shape
        whole[slot * len(part): (slot + 1) * len(part)] = part
        return whole if isinstance(leaf, np.ndarray) else jnp.asarray(whole)

    return jax.tree.map(one, tree, new)


@pytest.mark.parametrize("on_device", [True, False])
def test_another_problem_takes_the_place_of_one_that_is_done(labelled, on_device):
    reward = process_reward(labelled, labelled, on_device=on_device)
    growing = Growing(labelled.tokenizer, PROBLEMS[:2], 2)
    rng, given = np.random.default_rng(0), growing.given()
    carry = reward.init(given, 2, 96)
    score = SCORE if on_device else lambda reward, *args: reward.score(*args)
    for steps in growing.steps:
        steps.append(random_step(rng, 7))
    _, carry = score(reward, carry, growing.rows(not on_device))
    other = PROBLEMS[2]
    new = reward.init(Prompts(given.tokens_RT[:1], given.length_R[:1], [other]), 2, 96)
    carry = put(carry, new, 1)
    growing.problems[1], growing.steps[2:] = other, [[], []]
    for steps in growing.steps:
        steps.append(random_step(rng, 4))
    found, _ = score(reward, carry, growing.rows(not on_device))
    want = all_expected(labelled, reward.layout, growing, "last")
    np.testing.assert_allclose(found, want, atol=1e-4)
