"""Each token's bytes, read from a tokenizer."""

import json
from typing import Any

from jaxlm.core.errors import TokenizerError


def token_bytes(tokenizer: Any, size: int | None = None) -> list[bytes]:
    """What every token id adds to a text.

    Args:
      tokenizer: jaxlm's, a `tokenizers.Tokenizer`, or a fast transformers one, of the byte-level
        kind (GPT-2, Llama 3, Qwen), the sentencepiece kind (Llama 2, Mistral, Gemma), or with
        tokens that stand for themselves (the bundled model).
      size: the model's vocabulary, at least the tokenizer's without its added tokens; ids without
        a token add nothing, and added tokens beyond it are left out: Gemma 3's image token lies
        beyond its text models, which never draw it.
    Returns: bytes by id. Special tokens count with their name, so that a rule may look for it.
    Raises: TokenizerError for another kind of tokenizer, or a model's vocabulary that is smaller.
    """
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    spec = json.loads(tokenizer.to_str())
    names = decoder_names(spec.get("decoder"))
    if "ByteLevel" in names:
        convert = from_byte_level
    elif names & {"ByteFallback", "Metaspace", "Replace"}:
        convert = from_sentencepiece
    elif names == {"Fuse"}:
        convert = as_it_is
    else:
        raise TokenizerError(
            f"the tokenizer decodes with {sorted(names) or None}; expected a byte-level or "
            "sentencepiece vocabulary, or one whose tokens are fused as they are"
        )
    added = {token["id"]: token["content"] for token in spec.get("added_tokens", [])}
    least = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    if size is not None and size < least:
        raise TokenizerError(f"the tokenizer has ids up to {least - 1}, the model {size} tokens")
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    size = max(vocab.values(), default=-1) + 1 if size is None else size
    texts = [b""] * size
    for token, index in vocab.items():
        if index < size:
            texts[index] = added[index].encode() if index in added else convert(token)
    return texts


def decoder_names(decoder: dict | None) -> set[str]:
    """The types of a tokenizer's decoder and of its parts."""
    if decoder is None:
        return set()
    parts = (decoder_names(part) for part in decoder.get("decoders", []))
    return set().union({decoder["type"]}, *parts)


def from_byte_level(token: str) -> bytes:
    """Every character stands for one byte.

    >>> from_byte_level("\u0120a\u010a")
    b' a\\n'
    """
    table = _byte_of_character()
    if not all(character in table for character in token):
        return token.encode()
    return bytes(table[character] for character in token)


def from_sentencepiece(token: str) -> bytes:
    """A low line stands for a space, `<0x0A>` for a byte.

    >>> from_sentencepiece("\u2581a"), from_sentencepiece("<0x0A>")
    (b' a', b'\\n')
    """
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def as_it_is(token: str) -> bytes:
    """A token stands for itself.

    >>> as_it_is("a ")
    b'a '
    """
    return token.encode()


def _byte_of_character() -> dict[str, int]:
    """Printable bytes stand for themselves; the others follow in order from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}
