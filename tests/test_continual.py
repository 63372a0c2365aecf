"""The continual-learning experiment's parts: splits, prompts, rows, what is counted."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import continual_table, osft_share, plots, text_model
from experiments import osft_continual as study
from experiments.continual_rows import GRID, ROWS
from experiments.continual_tasks import ORDERS, TUNING_ORDER, WINDOW, line, longest, short
from experiments.task_texts import ASKED, SOURCES, chat, instructions, shuffled, split, unique
from jaxlm.hf.tokenizer import Tokenizer
from jaxlm.train import Osft


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    text_model.write_tokenizer([{"text": "the answer of a text is a label " * 3},
                                chat("What?", "That.")], folder, vocab=300)
    return Tokenizer(folder)


def test_splits_are_disjoint_and_never_move(data_dir):
    for name, sizes in {"dbpedia": (5040, 560, 2000), "sst2": (1800, 200, 872)}.items():
        parts = split(data_dir, name)
        texts = [{one["sentence"] for one in part}
                 for part in (parts.train, parts.validation, parts.test)]
        assert tuple(map(len, texts)) == sizes
        assert not texts[0] & texts[1] and not texts[2] & (texts[0] | texts[1])
        assert split(data_dir, name) == parts
        labels = {one["label"] for one in parts.train}
        assert labels == {one["label"] for one in parts.test}  # each can be learnt


def test_nothing_held_out_is_in_the_corpus(data_dir):
    lines = text_model.corpus(data_dir)
    seen = {line["text"] for line in lines if "text" in line}
    for name in SOURCES:
        assert not seen & {one["sentence"].strip() for one in split(data_dir, name).test}
    held = {json.dumps(one) for one in instructions(data_dir)[1]}
    assert not held & {json.dumps(line) for line in lines}
    assert not any("label" in line for line in lines)


def test_an_order_depends_on_count_and_seed_alone():
    assert shuffled([3, 1, 2]) == shuffled([3, 1, 2])
    assert sorted(shuffled(list(range(9)), 4)) == list(range(9))
    assert shuffled(list(range(50)), 1) != shuffled(list(range(50)), 2)
    twice = [{"sentence": "a", "label": "x"}, {"sentence": "a", "label": "y"}]
    assert unique(twice) == twice[:1]


def test_orders_are_permutations_of_the_tasks():
    assert all(sorted(order) == sorted(SOURCES) for order in ORDERS.values())
    assert len(set(ORDERS.values())) == 3 and set(TUNING_ORDER) < set(SOURCES)
    assert TUNING_ORDER not in [order[:len(TUNING_ORDER)] for order in ORDERS.values()]


@pytest.mark.parametrize("text", ["a", "the answer " * 40, "ünï\ncode " * 90, "x" * 500, "\n\n"])
def test_a_prompt_leaves_room_and_does_not_tell_its_answer(tokenizer, text):
    records = [{"sentence": text, "label": label} for label in ("a", "the text of a label")]
    room = longest(tokenizer, records)
    found = [line(tokenizer, "ag", record, room) for record in records]
    assert found[0]["prompt"] == found[1]["prompt"], "where a text is cut tells the label"
    for one in found:
        ids = tokenizer.backend_tokenizer.encode(one["prompt"] + one["completion"]).ids
        assert len(ids) + 1 <= WINDOW + 1  # the end mark, and the last target
        assert one["prompt"].startswith("Dataset: ag. " + ASKED["topic"])
        assert one["prompt"].endswith("\nAnswer:")


def test_a_cut_keeps_the_beginning_and_wastes_little(tokenizer):
    text = "the answer of a text is " * 40
    record = {"sentence": text, "label": "label"}
    room = longest(tokenizer, [record])
    prompt = line(tokenizer, "ag", record, room)["prompt"]
    assert text.startswith(prompt.split("\n")[1])
    used = len(tokenizer.backend_tokenizer.encode(prompt).ids)
    assert WINDOW + 1 - room - 3 <= used <= WINDOW + 1 - room


def test_short_chats_keep_whole_answers():
    chats = [chat("a" * 10, "b"), chat("a" * 500, "b")]
    assert short(chats, 50) == chats[:1]


def test_every_row_tries_as_many_rates():
    tuned = {name: row for name, row in ROWS.items() if len(row.rates) > 1}
    assert {len(set(row.rates)) for row in tuned.values()} == {3}
    controls = set(ROWS) - set(tuned)
    assert all(name == f"full, matrices alone, {ROWS[name].rates[0]:g}" for name in controls)
    forms = {row.tuning.form for row in ROWS.values() if isinstance(row.tuning, Osft)}
    assert forms == {"update", "coordinates", "factored"}
    assert [name for name, row in ROWS.items() if isinstance(row.tuning, Osft)
            and row.tuning.others != "freeze"] == ["osft uniform, rest trained"]
    for row in ROWS.values():
        at = GRID.index(row.rates[0])
        assert row.rates == GRID[at:at + len(row.rates)]
    tunings = ROWS["osft scheduled"].tunings(5)
    assert [(one.task, one.tasks) for one in tunings] == [(i, 5) for i in range(1, 6)]


def test_rates_are_chosen_by_validation_alone_and_scored_cells_cover_all():
    cells = study.tuning_cells(ROWS)
    assert {(cell.order, cell.seed) for cell in cells} == {("tuning", study.TUNING_SEED)}
    assert study.TUNING_SEED >= study.SEEDS
    good = {row: ROWS[row].rates[1] for row in ROWS if len(ROWS[row].rates) > 1}
    made = {cell: {"accuracy": [[cell.rate]],
                   "chosen": [[0.5, 0.5 + 0.1 * (cell.rate == good[cell.row])]]}
            for cell in cells}
    assert study.best_rates(made) == good
    level = {cell: {"accuracy": [[cell.rate]], "chosen": [[0.5, 0.5]]} for cell in cells}
    assert study.best_rates(level) == {row: min(ROWS[row].rates) for row in good}
    scored = study.scored_cells(good, ORDERS, range(study.SEEDS))
    count = {row: sum(cell.row == row for cell in scored) for row in good}
    assert {count[row] for row in good if ROWS[row].kind == "course"} == {9}
    assert {count[row] for row in study.REFERENCES} == {3}
    assert len({cell.key for cell in scored}) == len(scored)


@pytest.mark.parametrize(("at", "tried"), [(3, 3), (1, 5), (0, 5), (6, 5), (5, 5)])
def test_rates_beyond_an_edge_are_tried_twice_at_most(at, tried):
    """"full" begins with GRID[2:5]; the best of all is GRID[at]."""
    asked = []

    def all(cells, words):
        asked.append([cell.rate for cell in cells])
        return {cell: {"chosen": [[-abs(GRID.index(cell.rate) - at)]]} for cell in cells}

    found = study.tuned(SimpleNamespace(all=all), ["full"])
    assert len(found) == tried == len({cell.rate for cell in found})
    assert {(cell.order, cell.seed) for cell in found} == {("tuning", study.TUNING_SEED)}
    assert max(map(len, asked[1:]), default=1) == 1
    nearest = min(range(2 - (at < 2) * 2, 5 + (at > 4) * 2), key=lambda i: abs(i - at))
    assert study.best_rates(found) == {"full": GRID[nearest]}


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.normal(0.3, 2.0, (2000, 9))
    found = [study.interval(row) for row in draws]
    share = np.mean([one["low"] <= 0.3 <= one["high"] for one in found])
    assert abs(share - 0.95) < 4 * (0.95 * 0.05 / 2000) ** 0.5
    narrow = np.mean([abs(one["mean"] - 0.3) <= 1.96 * one["sd"] / 3 for one in found])
    assert narrow < share - 0.02  # a normal's quantile is too small for nine


def fake(accuracy: list[list[float]]) -> dict:
    """A course as `continual_courses.course` gives it."""
    return {"accuracy": accuracy, "chosen": [[0.5 + x / 2 for x in line] for line in accuracy],
            "order": list(SOURCES)[:len(accuracy[0])], "chance": dict.fromkeys(SOURCES, 0.5),
            "notes": [{"free_share": 1.0, "leak_left": 1e-7, "subspaces/protected_share": 0.6}],
            "format": [1.0, 0.5], "others": {"wikitext": {"perplexity": [10.0, 12.0]}}}


def test_the_summary_counts_what_it_says():
    rates = dict.fromkeys(("full", "full, matrices alone", "olora", "osft importance"), 1.0)
    cells = study.scored_cells(rates, ORDERS, (0,))
    ends = {"full": 0.2, "full, matrices alone": 0.3, "olora": 0.6, "osft importance": 0.5}
    scored = {cell: fake([[0.0, 0.0], [0.8, 0.1], [ends[cell.row], 0.8]]) for cell in cells}
    found = study.summary(scored)
    assert found["forgetting"] == pytest.approx({row: 0.8 - end for row, end in ends.items()})
    assert found["accuracy"]["full"] == pytest.approx(0.5)
    assert found["accuracy_minus_olora_points"] == pytest.approx(-5.0)
    assert found["forgetting_minus_olora_points"] == pytest.approx(10.0)
    assert found["forgetting_minus_matrices_points"] == pytest.approx(-20.0)
    assert found["least_forgetting"] == "olora" and found["osft_forgets_least"] is False
    assert found["general"]["wikitext_perplexity"]["full"] == pytest.approx(
        {"before": 10.0, "after": 12.0})
    assert found["learnt"]["full"] == pytest.approx(0.8)
    assert found["lost_share"] == pytest.approx({row: (0.8 - x) / 0.8 for row, x in ends.items()})
    assert found["general"]["leak_left"]["olora"] == pytest.approx(1e-7)
    assert found["chosen_accuracy"]["full"] == pytest.approx(0.75)
    assert found["chosen_forgetting"]["full"] == pytest.approx(0.3)
    assert found["chosen_forgetting_minus_olora_points"] == pytest.approx(5.0)
    assert found["chosen_lost_share"] == pytest.approx(found["lost_share"])  # both above chance
    assert found["general"]["format"]["full"] == pytest.approx({"before": 1.0, "after": 0.5})


def test_a_course_that_is_there_is_not_run_again(tmp_path, monkeypatch):
    model = tmp_path / "model" / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    args = study._harness.parser("").parse_args(["--smoke"])
    args.work, args.model, runs = tmp_path, tmp_path / "model", []
    monkeypatch.setattr(study.Courses, "_run", lambda self, cell: runs.append(cell) or {"a": 0.5})
    cell = study.Cell("full", "tuning", 100, 1e-3)
    for _ in range(2):
        assert study.Courses(None, args)(cell) == {"a": 0.5}
    assert runs == [cell]
    (model / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match="was made with"):
        study.Courses(None, args)(cell)


def test_files_are_named_by_what_they_hold():
    cells = study.tuning_cells(ROWS)
    names = [Path(cell.key).name for cell in cells]
    assert names == [cell.key for cell in cells] and len(set(names)) == len(cells)


@pytest.fixture
def metrics():
    """What the script writes, of made-up courses."""
    rates = dict.fromkeys(("full", "full, matrices alone", "osft importance", "joint"), 1.0)
    rates |= {"olora": 2.0}
    scored = {cell: fake([[0.0] * 5] * 5 + [[0.1 * len(cell.row), 0.5, 0.5, 0.5, 0.5]])
              for cell in study.scored_cells(rates, ORDERS, (0, 1))}
    for cell, one in scored.items():
        one |= {"rate": cell.rate}
        one["others"]["instructions"] = {"token_accuracy": [0.3, 0.25], "perplexity": [8.0, 9.0]}
    return study.summary(scored) | {
        "rates": rates, "rates_tried": {row: [1.0, 2.0, 3.0] for row in rates},
        "courses": {cell.key: one for cell, one in scored.items()}}


def test_plots_and_tables_can_be_made_of_it(metrics):
    drawn = plots.draw({"name": "osft_continual", "metrics": metrics})
    assert set(drawn) == {"tradeoff", "through", "tradeoff-chosen", "through-chosen"}
    page = "".join(f"a\n{continual_table.BEGIN.format(n)}\nold\n{continual_table.END.format(n)}\n"
                   for n in continual_table.TABLES)
    new = continual_table.filled(page, metrics)
    assert "old" not in new and new.count("a\n<!--") == len(continual_table.TABLES)
    assert continual_table.filled(new, metrics) == new
    for row in metrics["rates"]:
        assert new.count(f"| {continual_table.WORDS[row]} |") == (2 if row == "joint" else 6)
    assert new.count("| 1 (edge) |") == 4 and new.count("| 2 | 3 |") == 1  # rates
    with pytest.raises(ValueError, match="once each"):
        continual_table.filled("nothing", metrics)
    assert set(continual_table.WORDS) == set(ROWS)


def test_a_stopped_run_over_shares_goes_on_with_the_next_course(tmp_path, monkeypatch):
    """Of two shares and two seeds the third course is killed: the second run computes two."""
    asked, broken = [], [True]

    def course(bundle, files, u, rate, seed, out):
        if len(asked) == 2 and broken:
            broken.clear()
            raise KeyboardInterrupt
        asked.append((u, seed))
        return {"first_kept": u + seed}

    monkeypatch.setattr(osft_share, "course", course)
    monkeypatch.setattr(osft_share, "prepare", lambda *_: None)
    monkeypatch.setattr(osft_share.text_model, "model", lambda *_, **__: SimpleNamespace(
        tokenizer=None))
    monkeypatch.setattr(osft_share, "SHARES", {1e-3: (0.25, 1.0)})
    monkeypatch.setattr(osft_share, "SEEDS", 2)
    args = SimpleNamespace(out=tmp_path / "cpu.json", smoke=False, model=tmp_path, data=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        osft_share.measure(args)
    found = osft_share.measure(args)
    assert asked == [(0.25, 0), (1.0, 0), (0.25, 1), (1.0, 1)] and not broken
    assert found["runs"]["0.25, 0.001"] == [{"first_kept": 0.25}, {"first_kept": 1.25}]
    assert not list(tmp_path.iterdir())
