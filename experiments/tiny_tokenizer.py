"""The bundled model's tokenizer: one printable ASCII character (or newline) is one token."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)
VOCAB = {t: i for i, t in enumerate((*SPECIAL, "\n", *map(chr, range(32, 127))))}


def build() -> Tokenizer:
    """A character tokenizer that puts `<bos>` first and shows what it does not know as `<unk>`."""
    tokenizer = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL[:3]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)])
    return tokenizer


def encode(text: str) -> list[int]:
    """The ids of a text without specials; a quick path for text that is known to be in range."""
    return [VOCAB[c] for c in text]


def write(folder: Path, max_len: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as transformers reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    roles = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **roles, "model_max_length": max_len,
                "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
