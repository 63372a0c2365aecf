"""The small real checkpoints give the figures and the text of their README files."""

import ast
import lzma
import re

import pytest

from jaxlm.decode.generate import generate
from jaxlm.decode.score import perplexity, score
from jaxlm.hf.bundle import load

STORIES = "text/tinystories_cs336_sample.txt"
MODELS = ["stories260K", "babyllama-1M-tok105"]


@pytest.fixture(scope="module", params=MODELS)
def real(request, models_dir):
    folder = models_dir / request.param
    return load(folder), (folder / "README.md").read_text()


def test_perplexity(real, data_dir):
    """Five stories, each cut to the model's length; the figure of the line `cs336x5`."""
    bundle, readme = real
    stated = re.search(r"cs336x5: .*'tokens': (\d+), .*'ppl': ([\d.]+)", readme)
    text = (data_dir / STORIES).read_text()
    for curly, plain in {"“": '"', "”": '"', "‘": "'", "’": "'"}.items():
        text = text.replace(curly, plain)
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    ids = [bundle.tokenizer.encode(story)[: bundle.lm.config.max_len] for story in stories]
    scores = score(bundle, ids)
    assert sum(len(s.logprobs) for s in scores) == int(stated[1])
    assert abs(perplexity(scores) - float(stated[2])) < 1e-3


def test_perplexity_off_its_domain(models_dir, data_dir):
    """The first 60 kB of plays, a begin mark before each window; babyllama's figure alone: how
    the others of those lines were cut is not written there."""
    bundle = load(models_dir / MODELS[1])
    readme = (models_dir / MODELS[1] / "README.md").read_text()
    text = lzma.open(data_dir / "text/tinyshakespeare.txt.xz").read()[:60_000].decode()
    begin, *ids = bundle.tokenizer.encode(text)
    step = bundle.lm.config.max_len - 1
    scores = score(bundle, [[begin, *ids[at:at + step]] for at in range(0, len(ids), step)])
    stated = re.search(r"tinyshakespeare \(first 60 kB\) ppl ([\d.]+)", readme)[1]
    assert abs(perplexity(scores) - float(stated)) < 1e-3


def test_greedy_text(real):
    bundle, readme = real
    stated = ast.literal_eval(re.search(r"^greedy: (.*)$", readme, re.M)[1])
    prompt = "Once upon a time"
    answer = generate(bundle, prompt, max_new_tokens=230, stop_ids=[])
    assert len(stated) > 150 and (prompt + answer.text).startswith(stated)
