"""Rewrite results in README.md and docs (results, performance, serve, found, fit, search), between
markers.

Command: python experiments/readme_tables.py

No figure there is typed by hand; tests/test_readme.py fails when one is out of date.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import continual_table, kv_stats, osft_fit, recipe_table, scaling_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "results.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
SERVE = ROOT / "docs" / "serve.md"
FOUND = ROOT / "docs" / "found.md"
FIT = ROOT / "docs" / "fit.md"
KV = ROOT / "docs" / "kv_cache.md"
SEARCH = ROOT / "docs" / "search.md"
BEGIN, END = "<!-- results: experiments/readme_tables.py -->", "<!-- end of results -->"
NOTHING = "No results are committed yet."


@dataclass(frozen=True)
class Row:
    """One line of the table: a metric of a script, by the dotted path to it, in words."""

    script: str
    metric: str
    words: str
    form: str = "{:.2f}"


PERCENT = "{:.1%}"
TIMES = "{:.1f} times"
GROUPS: dict[str, tuple[Row, ...]] = {
    "The bundled model": (
        *(Row("eval_tiny", f"arithmetic.{level}.{name}.value",
              f"bundled model, {level} arithmetic, {words}", PERCENT)
          for level in ("easy", "medium", "hard")
          for name, words in (("greedy", "greedy"), ("t0.8", "temperature 0.8"))),
        *(Row("eval_tiny", f"arithmetic.hard.t0.8_any{n}.value",
              f"bundled model, hard arithmetic, temperature 0.8, any of {n} samples", PERCENT)
          for n in (4, 16)),
        *(Row("eval_tiny", f"recall.{length}.value", f"bundled model, recall over {length} tokens",
              PERCENT) for length in (64, 256, 1024)),
        *(Row("make_models", f"{size}.skills.arithmetic.hard.value",
              f"a {size} sibling, 64 problems of hard arithmetic, greedy", PERCENT)
          for size in ("small", "large")),
    ),
    "Decoding": (
        Row("parity", "max_logit_error", "largest logit difference from transformers, random twins "
            "of every family, float32", "{:.1e}"),
        *(Row("bench_decode", f"decode_b{rows}_ratio", f"greedy decoding, batch {rows}, against "
              "transformers' generate", TIMES) for rows in (1, 32)),
        Row("bench_decode", "decode_135m_ratio",
            "greedy decoding, 135M random weights, against transformers' static cache with "
            "torch.compile", TIMES),
        Row("bench_decode", "bandwidth_fraction",
            "greedy decoding, 135M random weights: share of the machine's memory bandwidth"),
        Row("bench_decode", "prefill_ratio", "prefill, batch 8 x 256, against transformers", TIMES),
        Row("bench_decode", "first_token_s",
            "`jaxlm generate`, process start to first token, compiled before", "{:.1f} s"),
        Row("bench_decode", "import_and_names_s",
            "`import jaxlm` beyond `import jax`, with its first use of `load` and `generate`",
            "{:.2f} s"),
    ),
    "2-bit cache": (
        Row("quant_ablation", "heldout_ratio_geomean",
            "2-bit keys, logit error over plain KIVI's (without shrunk grids) at equal bytes, "
            "held-out queries, geometric mean"),
        Row("quant_ablation", "heldout_ratio_max",
            "2-bit keys, logit error over plain KIVI's, held-out queries, worst input"),
        Row("quant_decode_cpu", "cpu_attention_vs_dense",
            "attention over 2-bit codes, time over float32 dense, 8 rows x 4,096 tokens"),
        Row("kv_speed", "cpu_step_vs_dense",
            "a decode step with a 2-bit cache, time over float32 dense, 8 rows x 4,096 tokens"),
        Row("kv_speed", "cpu_step_vs_quantizedcache",
            "a decode step with a 2-bit cache, against transformers' QuantizedCache", TIMES),
        Row("kv_capacity", "kv_bytes_fraction_4k",
            "bytes of a 2-bit cache over 16-bit, everything counted, 4,096 tokens", "{:.3f}"),
        Row("kv_capacity", "capacity_ratio", "rows of 16k tokens that fit v5e:2x4 by its compiler, "
            "Llama-3.1-8B, 2-bit cache over bfloat16", TIMES),
        *(Row("kv_quality", f"{task}_drop_points{tail}", f"{words}, points lost at {bits} bits")
          for task, words in (("recall", "recall in one prompt"),
                              ("lookup", "recall asked after the context was coded"),
                              ("arithmetic", "arithmetic, hard split"))
          for tail, bits in (("", 2), ("_4bit", 4))),
        Row("kv_quality", "best_share",
            "2-, 4- and 8-bit caches: SQuat best or tied among kinds of no more bytes", PERCENT),
        *(Row("device_suite", f"kv_attention.{path}.ms", "decode attention, 8 rows x 65,536 "
              f"tokens, 32 and 8 heads of 128: {words}", "{:.3f} ms")
          for path, words in (("codes.2 bits", "2 bits"), ("codes.4 bits", "4 bits"),
                              ("exact.cudnn", "bfloat16, cuDNN"),
                              ("exact.pallas decode kernel", "bfloat16, jax's Pallas kernel"),
                              ("exact.jaxlm dense", "bfloat16, jaxlm's own"))),
        Row("device_suite", "kv_attention.speedup_over_bf16",
            "decode attention, 2-bit cache, against the fastest with bfloat16", TIMES),
        *(Row("device_suite", f"kv_attention.{path}", f"decode attention, {bits}-bit cache: "
              "bytes a second over those of a copy")
          for path, bits in (("roofline_fraction", 2), ("codes.4 bits.roofline", 4))),
        Row("device_suite", "library.logits.error_as_is", "the bundled model's logits, largest "
            "difference from the CPU's over the largest logit", "{:.1e}"),
        Row("device_suite", "library.logits.error", "the bundled model's logits, with float32 "
            "products (jax_default_matmul_precision): largest difference likewise", "{:.1e}"),
    ),
    "Particles and search": (
        Row("smc_exact", "evidence_z_max",
            "evidence of the Monte Carlo core over seeds, largest absolute z from enumeration"),
        *(Row("smc_exact", f"tv_over_floor{tail}", "distance of the core's laws from the exact "
              f"ones, over that of exact draws, {words} of all settings")
          for tail, words in (("", "mean"), ("_max", "largest"))),
        Row("smc_exact", "tv_over_floor_bound",
            "that largest distance: what exact draws stay below 99 times of 100"),
        Row("smc_exact", "its_hub_rejected_z", "evidence by the published rule, which weighs "
            "finished particles again: absolute z from enumeration", "{:.0f}"),
        *(Row("inference_scaling", f"accuracy.{method}|{reward}.16.value",
              f"hard sums, 16 answers, {words}: {method}", PERCENT)
          for reward, words in (("checker", "exact checker"),
                                ("checker, noise 0.1", "a tenth of its verdicts wrong"))
          for method in ("particle-filter", "dvts", "best-of-n")),
        Row("pf_speed", "pf_overhead_ratio",
            "particle filter, 32 particles x 8 prompts, time per iteration over plain decoding"),
        Row("pf_speed", "row_utilisation.uniform_fixed",
            "share of rows at work, steps of 8 to 24 tokens"),
        Row("pf_speed", "row_utilisation.lognormal_fixed",
            "share of rows at work, log-normal steps (median 12)"),
        Row("pf_speed", "lent_speed",
            "speed of a queue, 256 rows at once of 16 resident prompts, over all rows of 8"),
        Row("pf_speed", "lent_speed_alone",
            "speed of a queue, 255 rows at once of 8 resident prompts, over all rows of 8"),
        Row("pf_speed", "lent_bytes_ratio", "memory of 16 resident prompts over that of 8"),
        Row("pf_speed", "prompt_copies", "copies of a prompt that 32 particles hold", "{:.0f}"),
        Row("pf_speed", "resample_extra_layers",
            "layers of suffix that resampling needs beside the state", "{:.1f}"),
    ),
    "Serving": (
        Row("bench_serve", "serve_overhead_ratio",
            "32 plain requests at once over HTTP, time over `generate`'s"),
        Row("bench_serve", "vs_its_hub_speed",
            "particle filter over HTTP, against its_hub's over the same server", TIMES),
        Row("bench_serve", "vs_its_hub_accuracy_points",
            "particle filter over HTTP, accuracy points above its_hub's, 40 problems", "{:+.1f}"),
        Row("bench_serve", "vs_its_hub_accuracy_error",
            "standard error of these accuracy points", "{:.1f}"),
        Row("bench_serve", "mixed_requests", "of 1,000 requests at once, answers that are not "
            "those alone", "{:.0f}"),
        Row("bench_serve", "rss_growth_mb", "the server's memory over 5,000 plain requests, MB "
            "grown", "{:.1f}"),
    ),
    "Fine-tuning": (
        Row("osft_exact", "golden_max_error",
            "OSFT over five steps, largest difference from mini_trainer's weights", "{:.1e}"),
        Row("osft_exact", "peft_max_error", "OSFT over five steps, largest difference from "
            "peft's weights, gradients alone projected, float32", "{:.1e}"),
        *(Row("osft_exact", f"leak_{side}", f"OSFT, 1,000 AdamW steps: leak into the kept {words} "
              "subspace, over the weights' norm", "{:.1e}")
          for side, words in (("left", "input"), ("right", "output"))),
        Row("osft_exact", "control.update.leak_left_of_update", "OSFT with the projection "
            "before AdamW, 1,000 steps: share of the update that leaks", PERCENT),
        Row("osft_kill", "kills", "training killed with -9, a checkpoint a step", "{:.0f} kills"),
        Row("osft_kill", "resume_bit_exact", "of these, kills of runs that ended to the bit as the "
            "one never killed", "{:.0f}"),
        Row("osft_speed", "trainer_overhead", "the trainer's loop (data, packing, logs), seconds a "
            "step over bare optax steps on the same batches"),
        *(Row("osft_speed", f"step_ratio_{name}", f"time of an OSFT step over {words}, form")
          for name, words in (("full", "a full step's"), ("peft", "peft's OSF"),
                              ("mini_trainer", "mini_trainer's"))),
        *(Row("osft_speed", f"mfu.{name}", f"model FLOPs of a step over the CPU's measured float32 "
              f"peak, {words}", PERCENT)
          for name, words in (("full", "full"), ("update", "OSFT, form update"))),
        Row("osft_speed", "step_flops_ratio_8b", "FLOPs of an OSFT step over a full step's, "
            "Llama-3.1-8B", "{:.3f}"),
        *(Row("osft_continual", f"{metric}.{row}", f"five tasks in turn, {words}: {row}", PERCENT)
          for row in ("full", "replay", "ewc", "olora", "osft importance", "osft uniform")
          for metric, words in (("accuracy", "average accuracy"), ("forgetting", "forgetting"),
                                ("chosen_accuracy", "average accuracy among a task's own labels"),
                                ("chosen_forgetting", "forgetting among a task's own labels"))),
        *(Row("sft_recipe", f"windows.window 8.early_{name}_spearman.{end}", f"36 fine-tuning "
              f"runs, {words} of the first 8 steps: rank correlation with the final quality{which}",
              "{:+.2f}")
          for name, words in (("loss", "training loss"), ("gradnorm", "gradient norm"))
          for end, which in (("rho", ""), ("low", ", 95% interval from"), ("high", ", to"))),
        Row("sft_recipe", "stacked_minus_phased", "held-out loss of shuffled samples less that of "
            "three phases in turn, nats a token", "{:+.3f}"),
        Row("masked_thought", "gain_points.share 0.2.mean", "a fifth of the tokens masked, 128 "
            "worked sums: points gained on held-out ones", "{:+.1f}"),
    ),
}

# What a user chooses by, for the README; docs/results.md has all.
HEADLINES = (
    Row("parity", "max_logit_error", "largest logit difference from transformers, random twins of "
        "every family, float32", "{:.1e}"),
    *(Row("bench_decode", f"decode_b{rows}_ratio.tiny", "greedy decoding against transformers' "
          f"generate, bundled model, batch {rows}", TIMES) for rows in (1, 32)),
    Row("bench_decode", "decode_135m_ratio", "greedy decoding, 135M random weights, against "
        "transformers' static cache with torch.compile", TIMES),
    Row("bench_decode", "prefill_ratio.tiny", "prefill, batch 8 x 256, bundled model, against "
        "transformers", TIMES),
    Row("quant_ablation", "heldout_ratio_geomean",
        "2-bit keys, logit error over plain KIVI's (without shrunk grids) at equal bytes"),
    Row("kv_speed", "cpu_step_vs_dense",
        "a decode step with a 2-bit cache, time over float32 dense, 8 rows x 4,096 tokens"),
    Row("kv_capacity", "capacity_ratio", "rows of 16k tokens that fit v5e:2x4 by its compiler, "
        "Llama-3.1-8B, 2-bit cache over bfloat16", TIMES),
    Row("kv_quality", "recall_drop_points", "recall in one prompt, points lost at 2 bits"),
    Row("kv_quality", "arithmetic_drop_points", "worked sums, hard split, points lost at 2 bits"),
    Row("kv_quality", "arithmetic_drop_points_4bit",
        "worked sums, hard split, points lost at 4 bits"),
    *(Row("inference_scaling", f"accuracy.{method}|checker, noise 0.1.16.value", "hard sums, 16 "
          f"answers, a tenth of the checker's verdicts wrong: {method}", PERCENT)
      for method in ("particle-filter", "best-of-n")),
    Row("bench_serve", "serve_overhead_ratio",
        "32 plain requests at once over HTTP, time over `generate`'s"),
    Row("osft_speed", "step_ratio_full.update", "time of an OSFT step over a full step's"),
    *(Row("osft_continual", f"accuracy.{row}", f"five tasks in turn, average accuracy: {row}",
          PERCENT) for row in ("full", "osft importance", "replay")),
)

WANTED = (("decode_b1_ratio", "15"), ("decode_b32_ratio", "2, better 4"),
          ("bandwidth_fraction", "0.7"), ("decode_135m_ratio", "1.2"), ("prefill_ratio", "1.2"),
          ("first_token_s", "at most 5"), ("import_s", "at most 0.3"),
          ("import_and_names_s", "at most 0.3"))

FOUND_TABLES = {"osft_continual": continual_table.TABLES,
                "osft_share": {"shares": continual_table.shares}, **recipe_table.TABLES}
# Of experiments/results, shown in docs: mkdocs serves what lies in its own folder alone.
PLOTS = {f"{script}-{name}.png": RESULTS / script / f"cpu-{name}.png"
         for script, names in (("osft_continual", ("tradeoff", "through", "tradeoff-chosen",
                                                   "through-chosen")),
                               ("sft_recipe", ("effects", "early-loss", "early-norm")),
                               ("masked_thought", ("gain",))) for name in names}
FIT_TABLES = {"osft_fit": {"slices": osft_fit.table}}
KV_TABLES = {"quant_ablation": {"ablation": kv_stats.ablation, "later": kv_stats.later},
             "kv_quality": {"lost": kv_stats.lost, "beside": kv_stats.beside},
             "kv_capacity": {"capacity": kv_stats.capacity, "paper": kv_stats.whole_memory}}
SEARCH_TABLES = {"inference_scaling": scaling_table.TABLES}


def results(folder: Path) -> list[dict[str, Any]]:
    """The committed results, in order."""
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]


def find(metrics: Any, path: str) -> dict[str, Any]:
    """The number at a path, or the numbers one level below it, by name.

    A level's name may hold a dot. A measured ratio is a dict whose `ratio` is the number.

    >>> find({"a": {"t0.8": 1.5}}, "a.t0.8")
    {'': 1.5}
    >>> find({"a": {"small": {"ratio": 2.0}, "large": 3.0}}, "a")
    {'small': 2.0, 'large': 3.0}
    >>> find({"a": 1}, "b")
    {}
    """
    if path:
        if not isinstance(metrics, dict):
            return {}
        heads = [key for key in metrics if path == key or path.startswith(f"{key}.")]
        found = (find(metrics[key], path[len(key) + 1:]) for key in heads)
        return next((numbers for numbers in found if numbers), {})
    if (number := _number(metrics)) is not None:
        return {"": number}
    values = {key: _number(value) for key, value in metrics.items()} if isinstance(
        metrics, dict) else {}
    return {key: value for key, value in values.items() if value is not None}


def _number(value: Any) -> float | None:
    value = value.get("ratio") if isinstance(value, dict) else value
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def lines(found: list[dict[str, Any]], rows: Iterable[Row]) -> list[list[str]]:
    """Cells of a table: what, figure, device, command."""
    return [
        [f"{row.words}, {name}" if name else row.words, row.form.format(value), result["device"],
         f"`python experiments/{row.script}.py`"]
        for row in rows
        for result in found if result["name"] == row.script
        for name, value in find(result["metrics"], row.metric).items()
    ]


def table(title: str, found: list[dict[str, Any]], rows: Iterable[Row]) -> str:
    """A table of what is measured of these rows; empty where nothing is."""
    cells = lines(found, rows)
    head = [[title, "measured", "device", "command"], ["---"] * 4]
    return "\n".join("| " + " | ".join(row) + " |" for row in [*head, *cells]) if cells else ""


def block(found: list[dict[str, Any]]) -> str:
    """What stands between the markers of docs/results.md: a table a group."""
    tables = [table(f"**{group}**", found, rows) for group, rows in GROUPS.items()]
    return "\n\n".join(filter(None, tables)) or NOTHING


def rewritten(readme: str, found: list[dict[str, Any]]) -> str:
    """The README with its few results up to date."""
    return between(readme, table("what", found, HEADLINES) or NOTHING)


def between(page: str, text: str) -> str:
    """The page with `text` between its two markers."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs {BEGIN!r} and {END!r} once each")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def targets(bench: dict[str, Any]) -> str:
    """The table of docs/performance.md: what was wanted, what was measured, and its range."""
    cells = [["figure", "on", "wanted", "measured", "range", "ceiling"], ["---"] * 6]
    ceilings = bench["metrics"].get("decode_b1_ceiling", {})
    for metric, wanted in WANTED:
        found = bench["metrics"].get(metric)
        if found is None:
            continue
        named = {"": found} if not isinstance(found, dict) or "ratio" in found else found
        for name, value in named.items():
            number, ends = _number(value), isinstance(value, dict)
            span = f"{value['ratio_min']:.2f} to {value['ratio_max']:.2f}" if ends else ""
            limit = ceilings.get(name) if metric == "decode_b1_ratio" else None
            cells.append([f"`{metric}`", name, wanted, f"{number:.2f}", span,
                          f"{limit:.1f}" if limit else ""])
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def main() -> int:
    """Rewrite the README and docs/results.md, performance.md, serve.md, found.md, fit.md,
    kv_cache.md and search.md."""
    found = results(RESULTS)
    README.write_text(rewritten(README.read_text(), found))
    PAGE.write_text(between(PAGE.read_text(), block(found)))
    PERFORMANCE.write_text(between(PERFORMANCE.read_text(), bench_table()))
    SERVE.write_text(between(SERVE.read_text(), serve_tables()))
    FOUND.write_text(filled(FOUND.read_text(), FOUND_TABLES))
    FIT.write_text(filled(FIT.read_text(), FIT_TABLES))
    KV.write_text(filled(KV.read_text(), KV_TABLES))
    SEARCH.write_text(filled(SEARCH.read_text(), SEARCH_TABLES))
    for name, plot in PLOTS.items():
        (FOUND.parent / "plots").mkdir(exist_ok=True)
        (FOUND.parent / "plots" / name).write_bytes(plot.read_bytes())
    return 0


def filled(page: str, of: dict[str, dict[str, Any]]) -> str:
    """A page with its tables up to date. Args: of: script -> marker -> table of its metrics."""
    for result in results(RESULTS):
        if tables := of.get(result["name"]):
            page = continual_table.filled(page, result["metrics"], tables)
    return page


def bench_table() -> str:
    """`targets` of the committed result."""
    return targets(json.loads((RESULTS / "bench_decode" / "cpu.json").read_text()))


def serve_tables() -> str:
    """The tables of docs/serve.md: the load curve, plain requests, and the filters."""
    found = json.loads((RESULTS / "bench_serve" / "cpu.json").read_text())["metrics"]
    load = [["clients", "tokens/s", "seconds an answer, median", "95 %"], ["---"] * 4]
    load += [[str(row["clients"]), f"{row['tokens_per_s']:.0f}", f"{row['latency_median_s']:.2f}",
              f"{row['latency_95_s']:.2f}"] for row in found["load"]]
    pair = found["overhead"]
    plain = [["32 plain requests", "over HTTP", "`generate`", "ratio", "range"], ["---"] * 5,
             ["seconds", f"{pair['slow_s']:.2f}", f"{pair['fast_s']:.2f}", f"{pair['ratio']:.2f}",
              f"{pair['ratio_min']:.2f} to {pair['ratio_max']:.2f}"]]
    words = {"its_hub": "its_hub, over HTTP", "ours_http": "this project, over HTTP",
             "ours_in_process": "this project, in process"}
    search = [[f"{found['problems']} problems, {found['budget']} particles", "seconds", "tokens",
               "right"], ["---"] * 4]
    search += [[words[name], f"{one['seconds']:.1f}", str(one["tokens"]), f"{one['accuracy']:.0%}"]
               for name, one in found["particle_filters"].items()]
    says = (f"{found['rows']} rows. The filter over HTTP is {found['vs_its_hub_speed']:.1f} times "
            f"as fast as its_hub's, {found['vs_its_hub_accuracy_points']:+.1f} ± "
            f"{found['vs_its_hub_accuracy_error']:.1f} points of accuracy.")
    tables = ["\n".join("| " + " | ".join(row) + " |" for row in t) for t in (load, plain, search)]
    return "\n\n".join([*tables, says])


if __name__ == "__main__":
    sys.exit(main())
