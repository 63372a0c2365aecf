"""The learned process reward of `experiments/train_prm.py`: its targets, its start, its batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from experiments import train_prm
from experiments.prm_data import WIDTHS, Rollout, by_width, rows_of
from experiments.tiny_tokenizer import BOS, encode

SOME = [Rollout("Q:12+34=\n", "12+34=46\nA:46\n"), Rollout("Q:5*7-3=\n", "5*7=35\n35-3=22\nA:22\n"),
        Rollout("Q:12+34=\n", "12+34=4")]


@pytest.fixture(scope="module")
def tiny():
    return jaxlm.load("tiny", dtype=jnp.float32)


@pytest.fixture(scope="module")
def begun(tiny):
    return train_prm.start(tiny, 2, jax.random.key(0))


def test_the_targets_are_a_token_s_likelihood_and_the_least_of_its_line_so_far(tiny):
    batch = rows_of(SOME, WIDTHS[0], len(SOME))
    doubts_BT2, answer_BT = map(np.asarray, train_prm.doubts(tiny, jnp.asarray(batch["tokens"])))
    for row, rollout in enumerate(SOME):
        ids = [BOS, *encode(rollout.prompt + rollout.answer)]
        logp_TV = np.asarray(jax.nn.log_softmax(tiny.lm.apply(
            tiny.params, jnp.array([ids])).logits[0]))
        worst, wanted, first = 0.0, [], 1 + len(rollout.prompt)
        for t in range(first, len(ids)):
            logp = max(logp_TV[t - 1, ids[t]], train_prm.LEAST)
            worst = min(worst, logp)
            wanted.append([logp, worst])
            worst = 0.0 if ids[t] == train_prm.NEWLINE else worst
        np.testing.assert_allclose(doubts_BT2[row, first: len(ids)], wanted, atol=1e-4)
        assert answer_BT[row].tolist() == [first <= t < len(ids) for t in range(WIDTHS[0])]
    assert doubts_BT2.min() == train_prm.LEAST  # 35-3=22 is not what the model would have written


def test_it_starts_as_the_bundle_and_knows_nothing(tiny, begun):
    lm, params = begun
    assert not set(params) & {"embed", "layers_0", "layers_7"} and "layers_9" in params
    batch = {name: jnp.asarray(x) for name, x in rows_of(SOME, WIDTHS[0], len(SOME)).items()}
    whole = tiny.params | params
    np.testing.assert_allclose(lm.apply(whole, batch["tokens"], logits_at=None).final,
                               tiny.lm.apply(tiny.params, batch["tokens"]).final, atol=1e-5)
    loss, found = train_prm.objective_of(tiny, lm)(params, batch, None)
    assert float(found["loss"]) == pytest.approx(np.log(2)) and float(found["doubt"]) > 0.1
    assert float(loss) == pytest.approx(float(found["loss"] + found["doubt"]))


def test_training_moves_nothing_of_the_bundle_and_is_written_whole(
        tiny, begun, tmp_path, monkeypatch):
    monkeypatch.setattr(train_prm, "ROWS", 4)
    lm, params = begun
    before = jax.tree.map(np.array, tiny.params)
    trained, losses = train_prm.fit(tiny, lm, jax.tree.map(jnp.copy, params), SOME, 12, 0.01,
                                    tmp_path / "work", seed=0)
    assert losses["loss"][-1] < 0.5 < losses["loss"][0] and losses["doubt"][-1] < losses["doubt"][0]
    jax.tree.map(np.testing.assert_array_equal, before, tiny.params)
    train_prm.write(tiny, lm, trained, tmp_path / "prm")
    judge = jaxlm.load(str(tmp_path / "prm"), dtype=jnp.float32)
    assert judge.lm.labels == 2 and judge.lm.per_token and judge.lm.config.num_layers == 10
    np.testing.assert_array_equal(judge.params["layers_3"]["attn"]["q"]["kernel"],
                                  tiny.params["layers_3"]["attn"]["q"]["kernel"])
    mine = train_prm.step_scores(lm, tiny.params | trained, SOME)
    for ours, read, rollout in zip(mine, train_prm.step_scores(judge.lm, judge.params, SOME),
                                   SOME, strict=True):
        assert len(ours) == len(rollout.labels)
        np.testing.assert_allclose(ours, read, atol=0.05)  # written in bf16


def test_digits_of_half_the_rows_are_put_at_random_and_their_labels_taken_away():
    batch = rows_of(SOME * 20, WIDTHS[0], 60)
    made = train_prm.corrupted(np.random.default_rng(0), batch)
    for name in ("tokens", "labels"):
        np.testing.assert_array_equal(made[name][:30], batch[name][:30])
    assert (made["labels"][30:] == -1).all() and (batch["labels"][30:] >= 0).any()
    other, first = made["tokens"][30:] != batch["tokens"][30:], [
        1 + len(rollout.prompt) for rollout in SOME * 10]
    assert not any(row[:at].any() for row, at in zip(other, first, strict=True))
    digits = np.isin(batch["tokens"][30:], train_prm.DIGITS)
    assert not other[~digits].any()
    answers = sum(char.isdigit() for rollout in SOME * 10 for char in rollout.answer)
    share = other.sum() / answers  # nine in ten of those put at random are others
    assert abs(share - 0.9 * train_prm.CORRUPTED) < 4 * (0.18 * 0.82 / answers) ** 0.5


def test_every_rollout_comes_once_a_round_each_time_in_another_order():
    digits = np.random.default_rng(0).integers(10, 99, (100, 2))
    some = [Rollout(f"Q:{a}+{b}=\n", f"{a}+{b}={a + b}\n" * (1 + 8 * (a % 2))) for a, b in digits]
    of_round = sum(-(-len(part) // train_prm.ROWS) for part in by_width(some).values())
    rounds = [[train_prm.batch_of(some, n, 0)["tokens"] for n in range(first, first + of_round)]
              for first in (0, of_round)]
    rows = lambda batches: sorted(tuple(row[row > 0]) for batch in batches for row in batch
                                  if row.any())
    assert rows(rounds[0]) == rows(rounds[1]) == sorted(
        (BOS, *encode(r.prompt + r.answer)) for r in some)
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(*rounds, strict=True))
    again = train_prm.batch_of(some, 1, 0)["tokens"]
    np.testing.assert_array_equal(again, rounds[0][1])
