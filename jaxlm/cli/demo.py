"""`jaxlm demo`: the main job on the bundled model, with a report."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm.cli import INTERRUPTED
from jaxlm.cli.options import Device, Loading, Names, columns, note, open_model
from jaxlm.core.errors import whole
from jaxlm.eval import demo_page
from jaxlm.eval.demo import QUICK, Plan, measure
from jaxlm.eval.report import write_files


def run(
    out: Path = Path("report"), model: str = "tiny", seed: int = 0, quick: bool = False,
    device: Device | None = None, ignore_fields: Names = (), check_tokenizer: bool = True,
) -> None:
    """Solve held-out problems, score and time, and write a table, plots and one HTML page.

    Args:
      out: the report's folder; files of an earlier report are replaced.
      model: "tiny" is the bundled model, which was taught these problems; others were not.
      seed: of the problems and of the sampling.
      quick: a handful of problems, to see that all works.
      device: where to run; default what jax finds.
      ignore_fields: of config.json, unknown to jaxlm, that you know not to change the maths.
      check_tokenizer: refuse a tokenizer that looks like another model's.
    """
    from tqdm import tqdm  # comes with huggingface_hub

    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; --out names the report's folder")
    whole("--seed", seed, 0)
    bundle = open_model(model, Loading(device, None, ignore_fields, check_tokenizer))
    plan = QUICK if quick else Plan()
    try:
        with tqdm(total=plan.parts, disable=None, leave=False) as bar:  # None: only on a terminal
            findings = measure(bundle, model, plan, seed, bar.update, stages(bar))
    except KeyboardInterrupt:
        note("interrupted")
        os._exit(INTERRUPTED)  # a thread that compiles cannot be told to end
    print(columns([list(demo_page.HEAD), *demo_page.arithmetic_rows(findings)]))
    print()
    print(columns([list(demo_page.RECALL_HEAD), *demo_page.recall_rows(findings)]))
    print()
    print(columns([list(demo_page.SEARCH_HEAD), *demo_page.search_rows(findings)]))
    print()
    print(columns([list(demo_page.CACHE_HEAD), *demo_page.cache_rows(findings)]))
    if findings.taught:
        print()
        print(columns([list(demo_page.TAUGHT_HEAD), *demo_page.taught_rows(findings)]))
    rates = ", ".join(f"{rate:,.0f} at batch {batch}" for batch, rate in findings.speed)
    print(f"\ngreedy decoding, tokens/s: {rates}")
    write_files(out, demo_page.files(findings))
    note(f"{out / 'index.html'} written; {findings.seconds:.0f} s, without loading and plotting")


def stages(bar: Any) -> Callable[[str], None]:
    """Tells what comes next: on the bar, or in lines where there is none (CI, a notebook)."""
    began = time.perf_counter()
    if not bar.disable:
        return bar.set_description
    return lambda text: note(f"{time.perf_counter() - began:4.0f} s: {text}")
