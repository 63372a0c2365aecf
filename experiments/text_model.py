"""A small Llama pre-trained here on real text, for experiments that fine-tune one.

Command: python experiments/text_model.py --folder build/text_model --out build/text_model.json
Hardware: 2 CPU cores, 2 GB.
Minutes: 12 on 2 idle cores; a stopped run goes on where it was, and what is finished is not made
    again.
Expected: held-out perplexity per byte-pair token of Wikipedia below 150, of instructions below 60

It learns the texts of the tasks' training parts without their labels, the training part of the
instructions as chats, paragraphs of WikiText-2's validation part and a few stories. `model` gives
the Bundle; the folder is one that `jaxlm.load` and transformers read.
"""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from experiments import _harness
from experiments.task_texts import SOURCES, instructions, paragraphs, split, stories
from jaxlm.hf.bundle import Bundle, load, save
from jaxlm.hf.tokenizer import Tokenizer
from jaxlm.models.config import ModelConfig
from jaxlm.models.lm import LM, count_params
from jaxlm.train import Config, Data, Optimizer, fit, setup
from jaxlm.train.data import open_examples
from jaxlm.train.evaluation import evaluate

VOCAB, WINDOW, ROWS, EPOCHS = 2048, 128, 16, 1
SPECIAL = ("<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>")
PAD, BOS, EOS = range(3)
TEMPLATE = ("{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
            "{{ message['content'] }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
SMALL = ModelConfig(vocab_size=VOCAB, dim=128, num_layers=4, num_heads=4, num_kv_heads=4,
                    head_dim=32, ffn_dim=352, max_len=256, tie_embeddings=True)
TINY = replace(SMALL, dim=64, num_layers=2, head_dim=16, ffn_dim=176)
MUON = Optimizer(kind="muon", rate=0.01, schedule="linear", warmup=40, b1=0.95, clip=1.0)


def corpus(data: Path) -> list[dict[str, Any]]:
    """Every line that the model learns from; no label, no held-out text."""
    texts = [record["sentence"] for name in SOURCES for record in _seen(data, name)]
    texts += paragraphs(data, "valid") + stories(data)
    return [{"text": text.strip()} for text in texts] + instructions(data)[0]


def _seen(data: Path, name: str) -> list[dict[str, str]]:
    parts = split(data, name)
    return parts.train + parts.validation


def write_tokenizer(lines: list[dict[str, Any]], folder: Path, vocab: int = VOCAB) -> None:
    """Byte-level BPE of the corpus, with marks for a chat's turns."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    bpe = Backend(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(map(_words, lines), trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    roles = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=False))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **roles, "chat_template": TEMPLATE,
                "model_max_length": SMALL.max_len, "clean_up_tokenization_spaces": False}
    _harness.write_json(settings, folder / "tokenizer_config.json")


def _words(line: dict[str, Any]) -> str:
    turns = line.get("messages", [])
    return line["text"] if "text" in line else "\n".join(turn["content"] for turn in turns)


def write_lines(lines: list[dict[str, Any]], path: Path) -> str:
    """jsonl, under a temporary name first. Returns: the path, as settings want it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    half.replace(path)
    return str(path)


def untrained(folder: Path, config: ModelConfig, seed: int) -> Bundle:
    """The model before it has learnt anything, with the tokenizer of `folder`."""
    lm, ids = LM(config), {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return Bundle(lm, lm.init(jax.random.key(seed)), Tokenizer(folder), (EOS,), ids)


def model(
    folder: Path, data: Path, *, smoke: bool = False, seed: int = 0, config: ModelConfig = SMALL,
    steps: int | None = None,
) -> Bundle:
    """The model in `folder/model`; trained first where it is not there, going on where it was.

    Args:
      folder: of its own; a smoke run needs another one.
      data: folder of the data sets.
      smoke: a few steps of a model that has learnt nothing.
      config: SMALL, of a million parameters, or TINY, of a quarter of that.
      steps: default one pass over the corpus.
    """
    folder = Path(folder).expanduser()
    done = folder / "model"
    if done.exists():
        return load(done)
    lines = corpus(data)[::100 if smoke else 1]
    if not (folder / "tokenizer" / "tokenizer_config.json").exists():
        write_tokenizer(lines, folder / "tokenizer", 512 if smoke else VOCAB)
    if smoke:
        steps, config = 2, ModelConfig(512, 32, 2, 2, 2, 16, 64, 256, tie_embeddings=True)
    train = write_lines(lines, folder / "corpus.jsonl")
    fitted = fit(untrained(folder / "tokenizer", config, seed), Config(
        out=str(folder / "run"), data=Data((train,), window=WINDOW, loss_on="all"),
        optimizer=MUON, batch=ROWS, epochs=None if steps else EPOCHS, steps=steps,
        checkpoint_every=200, seed=seed, export="none"))
    if fitted.stopped:
        raise SystemExit(f"stopped; the same call goes on in {folder}")
    save(fitted.bundle, done, overwrite=True)
    return load(done)


def held_out(bundle: Bundle, data: Path, folder: Path, most: int = 200) -> dict[str, Any]:
    """Perplexity a token of text that it has not seen; of instructions, of the answers alone."""
    texts: dict[str, list[dict[str, Any]]] = {
        name: [{"text": one["sentence"].strip()} for one in split(data, name).test[:most]]
        for name in SOURCES}
    texts["wikitext"] = [{"text": text} for text in paragraphs(data, "test")[:most]]
    texts["instructions"] = instructions(data)[1][:most]
    found = {}
    for name, lines in texts.items():
        config = Config(data=Data(window=WINDOW), batch=ROWS)
        examples = open_examples([write_lines(lines, folder / f"{name}.jsonl")],
                                 setup.reader(bundle, config), WINDOW)
        batches = setup.plain(examples, config, None, packed=True)
        found[name] = evaluate(bundle.lm, bundle.params, batches)["perplexity"]
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Make the model, and judge it on held-out text."""
    if args.smoke:
        args.folder = Path(tempfile.mkdtemp())
    bundle = model(args.folder, args.data, smoke=args.smoke, seed=args.seed)
    return {"parameters": count_params(bundle.lm),
            "perplexity": held_out(bundle, args.data, args.folder / "held_out",
                                   4 if args.smoke else 200)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the model is kept."""
    parser.add_argument("--folder", type=Path, default=Path("build/text_model"))


if __name__ == "__main__":
    _harness.run(__file__, __doc__, measure, add_arguments)
