"""`jaxlm demo`: the main job on the bundled model, with a report."""

import os
from pathlib import Path

from jaxlm.cli import INTERRUPTED
from jaxlm.cli.options import Device, columns, note, open_model
from jaxlm.core.errors import whole
from jaxlm.eval import demo_page
from jaxlm.eval.demo import QUICK, Plan, measure
from jaxlm.eval.report import write_files


def run(
    out: Path = Path("report"), model: str = "tiny", seed: int = 0, quick: bool = False,
    device: Device | None = None,
) -> None:
    """Solve held-out problems, score and time, and write a table, plots and one HTML page.

    Args:
      out: the report's folder; files of an earlier report are replaced.
      model: "tiny" is the bundled model, which was taught these problems; others were not.
      seed: of the problems and of the sampling.
      quick: a handful of problems, to see that all works.
      device: where to run; default what jax finds.
    """
    from tqdm import tqdm  # comes with huggingface_hub

    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; --out names the report's folder")
    whole("--seed", seed, 0)
    bundle = open_model(model, device)
    plan = QUICK if quick else Plan()
    try:
        with tqdm(total=plan.parts, disable=None, leave=False) as bar:  # None: only on a terminal
            findings = measure(bundle, model, plan, seed, bar.update, bar.set_description)
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
