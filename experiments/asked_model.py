"""The model of text_model.py, taught to sort texts into groups that nobody labelled.

Language modelling alone leaves a model of this size unable to gather a text into an answer: from
600 samples it learns next to nothing of a task. What a large model brings to a task is taught here
by groups found in the training texts: tf-idf, its leading directions, k-means; a group's name is
the word that marks it most. Prompts have the form of the tasks; no label and no held-out text is
in them. Plain text is mixed in, so that language is not forgotten meanwhile.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import svds

from experiments import text_model
from experiments.continual_tasks import filled
from experiments.task_texts import SOURCES, shuffled, split
from jaxlm.hf.bundle import Bundle, load, save
from jaxlm.train import Config, Data, Optimizer, fit

QUESTION = "Which group is it in?"
MUON = Optimizer(kind="muon", rate=0.005, schedule="linear", warmup=20, b1=0.95)
STEPS = 400  # of language modelling before
ASKED, PLAIN = 6_000, 1_500  # lines; the second of plain text, or language is lost
GROUPS, WORDS, DIRECTIONS = 48, 4000, 48
ROOM = 10  # tokens of a row for a group's name


def tfidf(texts: list[str]) -> tuple[csr_matrix, list[str]]:
    """Rows of unit length over the WORDS words in the most texts; and those words.

    `log(1 + count) log(texts / texts with the word)`.
    """
    counts = [Counter(re.findall(r"[a-z]{3,}", text.lower())) for text in texts]
    found = Counter(word for count in counts for word in count)
    words = [word for word, seen in found.most_common(WORDS) if seen < 0.2 * len(texts)]
    index = {word: i for i, word in enumerate(words)}
    entries = [(row, index[word], np.log1p(n) * np.log(len(texts) / found[word]))
               for row, count in enumerate(counts) for word, n in count.items() if word in index]
    rows, columns, values = map(np.array, zip(*entries, strict=True))
    norms = np.sqrt(np.bincount(rows, values**2, len(texts)))
    return csr_matrix((values / norms[rows], (rows, columns)), (len(texts), len(words))), words


def groups(texts: list[str], count: int = GROUPS, seed: int = 0) -> list[str]:
    """The name of each text's group."""
    x, words = tfidf(texts)
    u, s, _ = svds(x, min(DIRECTIONS, min(x.shape) - 1), random_state=seed)
    _, member = kmeans2(u * s, count, seed=seed, minit="++")
    names: dict[int, str] = {}
    mean, sizes = np.asarray(x.mean(0))[0], np.bincount(member, minlength=count)
    for group in np.argsort(-sizes):
        if sizes[group]:
            marked = np.asarray(x[member == group].mean(0))[0] - mean
            names[group] = next(words[i] for i in np.argsort(-marked)
                                if words[i] not in names.values())
    return [names[group] for group in member]


def lines(bundle: Bundle, texts: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Prompts and groups of texts, each with its task's name; shuffled."""
    named = groups([text for _, text in texts])
    return shuffled([
        {"prompt": filled(bundle.tokenizer, f"Dataset: {name}. {QUESTION}\n", text, ROOM),
         "completion": f" {group}"}
        for (name, text), group in zip(texts, named, strict=True)])


def model(folder: Path, base: Path, data: Path, *, smoke: bool = False, seed: int = 0) -> Bundle:
    """The model in `folder/model`, taught first where it is not there; goes on where it was.

    Args: base: the folder of text_model.py.
    """
    folder = Path(folder).expanduser()
    done = folder / "model"
    if done.exists():
        return load(done)
    bundle = text_model.model(base, data, smoke=smoke, config=text_model.TINY, steps=STEPS)
    texts = [(name, record["sentence"].strip()) for name in SOURCES
             for record in split(data, name).train][::50 if smoke else 1]
    mixed = lines(bundle, texts)[:ASKED] + shuffled(text_model.corpus(data))[:PLAIN]
    train = text_model.write_lines(mixed[::40 if smoke else 1], folder / "groups.jsonl")
    fitted = fit(bundle, Config(
        out=str(folder / "run"), data=Data((train,), window=64), optimizer=MUON, batch=16,
        epochs=1, checkpoint_every=200, seed=seed, export="none"))
    if fitted.stopped:
        raise SystemExit(f"stopped; the same call goes on in {folder}")
    save(fitted.bundle, done, overwrite=True)
    return load(done)
