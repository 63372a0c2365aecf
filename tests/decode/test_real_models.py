"""The small real checkpoints give the figures and the text of their README files."""

import ast
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


def test_greedy_text(real):
    bundle, readme = real
    stated = ast.literal_eval(re.search(r"^greedy: (.*)$", readme, re.M)[1])
    prompt = "Once upon a time"
    answer = generate(bundle, prompt, max_new_tokens=230, stop_ids=[])
    assert len(stated) > 150 and (prompt + answer.text).startswith(stated)
