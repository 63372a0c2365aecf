"""lm-evaluation-harness on the bundled model, on tasks that need no network, against the library.

Writes three tasks (held-out sums, generated; look-ups, multiple choice; texts, rolling) as YAML and
JSON lines, runs `lm_eval.simple_evaluate` on them through jaxlm.eval.lm_eval, and finds the same
figures by `generate` and `score` alone. A smoke run without the harness does the latter only.

Command: python experiments/lm_eval_tasks.py --out experiments/results/lm_eval_tasks/cpu.json
Hardware: 2 CPU cores; pip install ".[lm-eval]" torch==2.13.0 (the harness seeds torch)
Minutes: 2
Expected: harness and library equal in each figure
"""

import argparse
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import jaxlm
from experiments._harness import run
from jaxlm.eval import arithmetic, recall
from jaxlm.eval.lm_eval import lm_eval_model

LEVEL, ROOM, CONTEXT, CHOICES = "hard", 112, 256, 4
COMMON = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
"""
TASKS = {
    "jaxlm_arithmetic": """\
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Q:"], max_gen_toks: 112, do_sample: false}
filter_list:
  - name: answer
    filter: [{function: regex, regex_pattern: "A:([0-9]+)"}, {function: take_first}]
metric_list: [{metric: exact_match}]
""",
    "jaxlm_recall": """\
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "jaxlm_pages": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
""",
}


def rows(problems: int, documents: int, pages: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The documents of each task."""
    rng = np.random.default_rng(seed)
    sums = [arithmetic.sample(rng, LEVEL, "test") for _ in range(problems)]
    found = [recall.sample(rng, CONTEXT, 1, "test") for _ in range(documents)]
    texts = [arithmetic.sample(rng, LEVEL, "test") for _ in range(pages)]
    return {
        "jaxlm_arithmetic": [{"prompt": p.prompt, "answer": str(p.answer)} for p in sums],
        "jaxlm_recall": [choice(rng, document) for document in found],
        "jaxlm_pages": [{"text": p.prompt + p.solution} for p in texts],
    }


def choice(rng: np.random.Generator, document: recall.Document) -> dict[str, Any]:
    """One look-up as a choice among values of the same context, the right one among them."""
    right = document.answers[0]
    others = sorted({value for _, value in document.pairs} - {right})
    wrong = rng.permutation(others)[: CHOICES - 1].tolist()
    label = int(rng.integers(len(wrong) + 1))
    values = wrong[:label] + [right] + wrong[label:]
    return {"prompt": document.prompt(0), "choices": [value + "\n" for value in values],
            "label": label}


def write(folder: Path, **sizes: int) -> None:
    """The tasks as files that `--include_path` takes."""
    for name, documents in rows(**sizes).items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, path=path) + TASKS[name])


def evaluate(folder: Path, model: str, **sizes: int) -> dict[str, dict[str, float]]:
    """Each task's metrics, by the harness."""
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1",
                   "HF_DATASETS_CACHE": str(folder / "cache")}
    import lm_eval
    from lm_eval.tasks import TaskManager

    write(folder, **sizes)
    found = lm_eval.simple_evaluate(
        model=lm_eval_model(jaxlm.load(model)), tasks=list(TASKS), bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    numbers = lambda values: {key.split(",")[0]: value for key, value in values.items()
                              if isinstance(value, float) and "stderr" not in key}
    return {name: numbers(values) for name, values in found["results"].items()}


def by_the_library(bundle: jaxlm.Bundle, **sizes: int) -> dict[str, float]:
    """The same figures from `generate` and `score` alone."""
    made = rows(**sizes)
    sums = made["jaxlm_arithmetic"]
    answers = jaxlm.generate(bundle, [row["prompt"] for row in sums], stop="Q:",
                             max_new_tokens=ROOM)
    said = [re.search("A:([0-9]+)", answer.text) for answer in answers]
    right = [match is not None and match[1] == row["answer"]
             for match, row in zip(said, sums, strict=True)]
    picked = []
    for row in made["jaxlm_recall"]:
        scores = jaxlm.score(bundle, [row["prompt"] + value for value in row["choices"]])
        picked.append(int(np.argmax([score.logprobs.sum() for score in scores])) == row["label"])
    texts = [row["text"] for row in made["jaxlm_pages"]]
    total = sum(float(score.logprobs.sum()) for score in jaxlm.score(bundle, texts))
    size = sum(len(text.encode()) for text in texts)
    return {"arithmetic": float(np.mean(right)), "recall": float(np.mean(picked)),
            "byte_perplexity": float(np.exp(-total / size))}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides."""
    sizes = {"problems": 8, "documents": 4, "pages": 2} if args.smoke else {
        "problems": 200, "documents": 100, "pages": 50}
    sizes["seed"] = args.seed
    found: dict[str, Any] = {"library": by_the_library(jaxlm.load("tiny"), **sizes)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            tasks = evaluate(Path(folder), "tiny", **sizes)
    except ImportError as error:
        if args.smoke:
            return found | {"harness": f"not here: {error}"}
        raise
    found["harness"] = {
        "arithmetic": tasks["jaxlm_arithmetic"]["exact_match"],
        "recall": tasks["jaxlm_recall"]["acc"],
        "byte_perplexity": tasks["jaxlm_pages"]["byte_perplexity"],
    }
    return found | {"sizes": sizes}


if __name__ == "__main__":
    run(__file__, __doc__, measure)
