"""Rows and their order: nothing lost, nothing seen by a neighbour, the same for every process."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.train.batches import Ahead, Batches, Order, mask_thoughts, stream
from jaxlm.train.data import Example, Examples
from jaxlm.train.packing import fill, pack
from tests.tiny import model


def examples(lengths, limit=16, seed=0):
    """Samples of these lengths, in memory."""
    rng = np.random.default_rng(seed)
    found = Examples(None, [(None, i, 0) for i in range(len(lengths))],
                     np.zeros(len(lengths), np.int32), limit, "")
    found.lengths = np.asarray(lengths)
    found.cache = {i: Example(rng.integers(0, 250, n).astype(np.int32),
                              np.append(0, np.ones(n - 1)).astype(np.float32))
                   for i, n in enumerate(lengths)}
    return found


@given(st.lists(st.integers(1, 16), min_size=1, max_size=80))
@settings(max_examples=50, deadline=None)
def test_rows_fit_and_nothing_is_lost(lengths):
    rows = pack(lengths, range(len(lengths)), 16)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in row) for row in rows]
    assert max(loads) <= 16
    # best fit decreasing never leaves two rows that would go into one
    assert len(rows) < 2 or sum(sorted(loads)[:2]) > 16


def test_packed_logits_are_those_of_a_sample_alone():
    lm, params = model()
    found = examples([5, 7, 3])
    row = fill([found[i] for i in range(3)], 16)
    packed = lm.apply(params, row["tokens"][None, :-1], segments_BT=row["segments"][None],
                      positions_BT=row["positions"][None]).logits[0]
    start = 0
    for i in range(3):
        tokens = found[i].tokens
        alone = lm.apply(params, jnp.asarray(tokens)[None]).logits[0]
        np.testing.assert_allclose(packed[start:start + len(tokens)], alone, atol=2e-5)
        start += len(tokens)
    naive = lm.apply(params, row["tokens"][None, :-1]).logits[0]  # the test would see a leak
    assert np.abs(naive[5:12] - packed[5:12]).max() > 1e-2


def test_a_row_weighs_targets_within_a_sample_only():
    row = fill([Example(np.array([1, 2, 3], np.int32), np.ones(3, np.float32))] * 2, 8)
    assert row["weights"].tolist() == [1, 1, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("packed", [False, True])
def test_an_epoch_is_every_sample_once(packed):
    found = examples([3, 9, 4, 4, 12, 2, 7, 5, 16, 1 + 1])
    batches = Batches(found, Order((np.arange(10),), 2, seed=3), 4, packed)
    rows = [row for step in range(len(batches)) for row in batches.samples(step)]
    seen = [i for row in rows for i in row]
    assert sorted(seen) == sorted(list(range(10)) * 2)
    assert seen[:10] != seen[10:]
    assert len(list(batches)) == len(batches)  # a loop over them ends
    total = sum(batches[s]["weights"].sum() for s in range(len(batches)))
    assert total == 2 * (found.lengths.sum() - 10)


def test_order_depends_on_the_seed_and_nothing_else():
    found = examples([4] * 30)
    of = lambda seed: Batches(found, Order((np.arange(30),), None, seed), 4, steps=20)
    one, two, other = of(0), of(0), of(1)
    assert [one.samples(s) for s in range(20)] == [two.samples(s) for s in (*range(20),)]
    assert two.samples(7) == of(0).samples(7)  # asked for out of turn
    assert one.samples(0) != other.samples(0)


def test_processes_share_the_rows_of_one_batch():
    found, order = examples([3, 9, 4, 4, 12, 2, 7, 5]), Order((np.arange(8),), None, 0)
    whole = Batches(found, order, 4, steps=5)
    for shares in ([[0, 1], [2, 3]], [[0], [1], [2], [3]]):
        for step in range(5):
            parts = [Batches(found, order, 4, mine=np.array(mine), steps=5)[step]
                     for mine in shares]
            for name, value in whole[step].items():
                np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), value)


def test_phased_takes_files_in_turn():
    groups = (np.arange(6), np.arange(6, 10))
    phased = [set(p.tolist()) for p in Order(groups, 2, 0, phased=True).passes()]
    assert phased == [set(range(6))] * 2 + [set(range(6, 10))] * 2
    stacked = [sorted(p.tolist()) for p in Order(groups, 2, 0).passes()]
    assert stacked == [list(range(10))] * 2


@pytest.mark.parametrize(("share", "count"), [(0.1, 10), (0.5, 90), (0.0, 0)])
def test_replay_is_a_share_of_each_pass(share, count):
    order = Order((np.arange(90),), 2, 0, replay=np.arange(90, 110), share=share)
    first, second = order.passes()
    old = first[first >= 90]
    assert len(old) == count and sorted(first[first < 90].tolist()) == list(range(90))
    assert np.ptp(np.bincount(old, minlength=110)[90:]) <= 1  # none twice before all once
    assert count in (0, 90) or set(old) != set(second[second >= 90])


def test_masked_thoughts_change_inputs_of_the_answer_alone():
    found = examples([16] * 50)
    for i, example in found.cache.items():
        found.cache[i] = example._replace(weights=np.repeat([0, 1], 8).astype(np.float32))
    make = lambda: Batches(found, Order((np.arange(50),), 1, 0), 50,
                           noise=mask_thoughts(0.25, 257))
    batch = make()[0]
    inputs, tokens = batch["inputs"], batch["tokens"][:, :-1]
    hidden = inputs != tokens
    assert (inputs[hidden] == 257).all() and not hidden[:, :8].any()
    share, error = hidden[:, 8:].mean(), (0.25 * 0.75 / (50 * 7)) ** 0.5
    assert abs(share - 0.25) < 4 * error < 0.1  # so that 0.15 or 0.35 would be seen
    np.testing.assert_array_equal(make()[0]["inputs"], inputs)


@pytest.mark.parametrize("make", [stream, Ahead], ids=["grain", "plain"])
def test_a_stream_goes_on_where_it_was(make):
    batches = Batches(examples([4] * 30), Order((np.arange(30),), 2, 0), 4)
    straight = make(batches)
    wanted = [next(straight)["tokens"] for _ in range(len(batches))]
    with pytest.raises(StopIteration):
        next(straight)
    first = make(batches)
    for _ in range(3):
        next(first)
    second = make(batches)
    second.set_state(first.get_state())
    assert first.get_state() == {"next_index": 3}
    for tokens in wanted[3:]:
        np.testing.assert_array_equal(next(second)["tokens"], tokens)
