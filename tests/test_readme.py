"""The README's figures come from the committed results, and what it names is there."""

import ast
import json
import re
import shlex

import pytest
import yaml

from experiments import readme_tables as tables
from experiments import scaling_table
from jaxlm.cli import COMMANDS
from tests.source_tree import ROOT

README = (ROOT / "README.md").read_text()


def result(name, metrics, device="cpu"):
    """A result as the scripts write it."""
    return {"name": name, "command": f"python {name}", "device": device, "metrics": metrics}


def test_results_are_up_to_date():
    fresh = tables.rewritten(README, tables.results(tables.RESULTS))
    assert fresh == README, "run python experiments/readme_tables.py"
    page = tables.PAGE.read_text()
    whole = tables.block(tables.results(tables.RESULTS))
    assert tables.between(page, whole) == page, "run experiments/readme_tables.py"
    page = tables.PERFORMANCE.read_text()
    assert tables.between(page, tables.bench_table()) == page, "run experiments/readme_tables.py"
    page = tables.FOUND.read_text()
    assert tables.filled(page, tables.FOUND_TABLES) == page, "run experiments/readme_tables.py"
    page = tables.FIT.read_text()
    assert tables.filled(page, tables.FIT_TABLES) == page, "run experiments/readme_tables.py"
    page = tables.KV.read_text()
    assert tables.filled(page, tables.KV_TABLES) == page, "run experiments/readme_tables.py"
    page = tables.SEARCH.read_text()
    assert tables.filled(page, tables.SEARCH_TABLES) == page, "run experiments/readme_tables.py"
    page = tables.SERVE.read_text()
    assert tables.between(page, tables.serve_tables()) == page, "run experiments/readme_tables.py"


def test_figures_in_the_prose_about_budgets_are_those_of_the_result():
    page = " ".join(tables.SEARCH.read_text().split())
    found = json.loads((tables.RESULTS / "inference_scaling" / "cpu.json").read_text())["metrics"]
    noisy = "checker, noise 0.1"
    share = lambda method, n: "{:.1f} %".format(
        100 * found["accuracy"][f"{method}|{noisy}"][n]["value"])
    assert (f"in {share('particle-filter', '32')}, less often than with 16 ("
            f"{share('particle-filter', '16')}) and than beams with 32 ({share('beam', '32')})"
            ) in page
    ratios = scaling_table.ratios(found["accuracy"])["best-of-n"][noisy]
    four, eight = (scaling_table.said(ratios[n]) for n in ("4", "8"))
    assert f"needs {four} times the filter's budget of 4 and {eight} times that of 8" in page


def test_figures_in_the_prose_of_what_we_found_are_those_of_the_results():
    page = " ".join(tables.FOUND.read_text().split())
    load = lambda name: json.loads((tables.RESULTS / name / "cpu.json").read_text())["metrics"]
    share, turns = load("osft_share"), load("osft_continual")
    of, chance = share["by_share_and_rate"], 1 / 14
    kept = lambda one: (one["choice_kept"] - chance) / (one["choice_learnt"] - chance)
    assert (f"keeps {100 * kept(of['0.25, 0.003']):.0f} % of its accuracy among its own labels at "
            f"u = 0.25 and {100 * kept(of['0.5, 0.003']):.0f} % at 0.5") in page
    assert abs(kept(of["1, 0.003"])) < 0.02  # "nothing at that rate"
    assert (f"{of['0.25, 0.001']['choice_kept']:.3f} at u = 0.25, "
            f"{of['1, 0.001']['choice_kept']:.3f} with all free") in page
    half = share["by_share_and_rate"]["0.5, 0.003"]
    assert f"only {half['update_protected']:.0%}".replace("%", " %") in page
    assert f"random directions ({half['update_protected_random']:.0%})".replace("%", " %") in page
    right = {task: [] for task in ("ag", "dbpedia")}
    for key, one in turns["courses"].items():
        if one["accuracy"][1:] and re.match("full, (?!matrices)", key):
            for i, task in enumerate(one["order"]):
                right.get(task, []).append(one["accuracy"][i + 1][i])
    means = [f"{100 * sum(x) / len(x):.0f} %" for x in right.values()]
    assert "right on {} of AG News and {} of DBpedia".format(*means) in page
    below = ("osft importance", "osft scheduled", "osft factored")
    same = turns["forgetting_minus_same_rate"]
    assert {turns["rates"][row] for row in below} == {0.001}
    less = sorted(-same[row]["mean"] for row in below)
    assert f"forget {less[0]:.1f} to {less[-1]:.1f} points less of the answers" in page
    over = turns["forgetting_minus_same_rate_over_seeds"]
    assert all(same[row]["high"] < 0 and over[row]["high"] < 0 for row in below)
    assert all(turns["accuracy_minus_same_rate"][row]["high"] > 0 for row in below)
    control = "full, matrices alone, 0.001"
    assert all(turns["learnt"][row] < turns["learnt"][control] - 0.02 for row in below)
    more = turns["chosen_accuracy_minus_same_rate"]["osft uniform"]
    assert f"are {more['mean']:.1f} points more accurate than their control" in page
    assert more["low"] > 0
    against = turns["chosen_accuracy_minus_replay"]["ewc"]
    assert f"{against['mean']:.1f} points of accuracy are barely told" in page
    seeds = turns["chosen_forgetting_minus_replay_over_seeds"]["ewc"]
    assert seeds["low"] < 0 < seeds["high"]
    lost = turns["chosen_lost_share"]
    assert 0.3 < lost["ewc"] < 0.4 and 0.55 < lost["replay"] < 0.65
    assert min(x for row, x in lost.items() if row not in ("ewc", "replay")) > 0.75
    moved = turns["general"]["subspaces/protected_share"]["full"]
    assert f"{100 * moved:.0f} % of its change lies" in page
    assert f"any direction has {100 * half['update_protected_random']:.0f} %" in page


def test_plots_of_the_docs_are_those_of_the_results():
    shown = set(re.findall(r"plots/([\w-]+\.png)", tables.FOUND.read_text()))
    assert shown == set(tables.PLOTS), "each is shown on docs/found.md, and no other"
    for name, plot in tables.PLOTS.items():
        copied = tables.FOUND.parent / "plots" / name
        assert copied.read_bytes() == plot.read_bytes(), "run python experiments/readme_tables.py"


def test_a_new_result_changes_the_pages(tmp_path):
    folder = tmp_path / "bench_decode"
    folder.mkdir()
    made = result("bench_decode", {"decode_b1_ratio": {"tiny": {"ratio": 123.44}, "n": 5.04}})
    (folder / "cpu.json").write_text(json.dumps(made))
    found = tables.results(tmp_path)
    end = "| 123.4 times | cpu | `python experiments/bench_decode.py` |"
    page = tables.between(tables.PAGE.read_text(), tables.block(found))
    assert f"generate, tiny {end}" in page and "generate, n | 5.0 times" in page
    fresh = tables.rewritten(README, found)
    assert f"bundled model, batch 1 {end}" in fresh and "5.0 times" not in fresh
    assert tables.rewritten(fresh, found) == fresh
    gone = tables.rewritten(fresh, [])
    assert "123.4" not in gone and "No results are committed yet." in gone


def test_the_readme_has_few_results_and_the_page_all():
    page, rows = tables.PAGE.read_text(), readme_rows("## Results")
    assert 10 <= len(rows) <= 18
    for row in rows:
        assert row.split("|", 2)[2] in page, "of the same figure, device and command"
    cells = tables.lines(tables.results(tables.RESULTS), sum(tables.GROUPS.values(), ()))
    assert all("| " + " | ".join(line) + " |" in page for line in cells) and len(cells) > 100


def test_only_what_is_measured_is_listed():
    found = [result("eval_tiny", {"arithmetic": {"hard": {"t0.8": {"value": 0.456, "n": 400}}}}),
             result("other", {"decode_b1_ratio": 3.0})]
    assert [row[:2] for row in tables.lines(found, tables.GROUPS["The bundled model"])] == [
        ["bundled model, hard arithmetic, temperature 0.8", "45.6%"]
    ]


def test_markers_are_needed():
    with pytest.raises(ValueError, match="once each"):
        tables.rewritten("# no markers", [])


def test_commands_of_the_readme_exist():
    named = set(re.findall(r"\bjaxlm ([a-z]+) ", "\n".join(code_blocks())))
    assert named and named <= set(COMMANDS)
    targets = {shlex.split(line)[1] for line in "\n".join(code_blocks()).splitlines()
               if line.startswith("make ")}
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def readme_rows(heading):
    """The lines of the table below a heading, without its head."""
    section = README.split(heading)[1].split("\n## ")[0]
    return [line for line in section.splitlines() if re.match(r"\| [^-]", line)][1:]


def test_the_commands_that_need_more_say_so():
    lines = "\n".join(code_blocks()).splitlines()
    for command, words in (("jaxlm serve", "extra serve"), ("--verify", "pip install torch")):
        assert all(words in line for line in lines if command in line), command


def code_blocks():
    """What stands between fences."""
    return re.findall(r"^```[a-z]*\n(.*?)^```", README, re.S | re.M)


def test_the_two_commands_come_first():
    assert [line for line in code_blocks()[0].splitlines() if line][:2][0].startswith("make demo")
    assert code_blocks()[0].splitlines()[1].startswith("make test")


def test_modules_marked_as_here_are_here():
    rows = [line.split("|")[1:-1] for line in readme_rows("## Methods")]
    assert rows
    for _, _, module, state in rows:
        here = [path for path in re.findall(r"`([\w/]+(?:\.py)?)`", module)]
        exists = bool(here) and all((ROOT / path).exists() for path in here)
        assert state.strip() == ("here" if exists else "planned"), module


def test_papers_of_the_methods_that_are_here_are_cited():
    papers = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    assert all(paper["title"] and paper["year"] and paper["authors"] for paper in papers)
    cited = {paper["url"].removeprefix("https://arxiv.org/abs/") for paper in papers}
    ids = {"here": set(), "planned": set()}
    for line in readme_rows("## Methods"):
        _, paper, _, state = line.split("|")[1:-1]
        ids[state.strip()] |= set(re.findall(r"\d{4}\.\d{4,5}", paper))
    assert len(ids["here"]) > 15 and ids["here"] <= cited, ids["here"] - cited
    assert not ids["planned"] & cited


@pytest.mark.slow
def test_the_examples_do_what_they_say(capsys):
    names, printed = {}, []
    for block in re.findall(r"^```python\n(.*?)^```", README, re.S | re.M):
        exec(compile(block, "README.md", "exec"), names)
        printed.append(capsys.readouterr().out)
    answers = ast.literal_eval(printed[0].splitlines()[-2])
    assert len(answers) == 4 and all(answer.startswith("A:") for answer in answers)
    assert any(answer != "A:30" for answer in answers)  # some are wrong
    assert "A:30" in printed[1]
    looked_up, expected = printed[2].split()
    assert looked_up == expected
