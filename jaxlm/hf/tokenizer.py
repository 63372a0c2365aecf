"""A thin tokenizer: the `tokenizers` file where there is one, transformers only where needed."""

import os
import pathlib
import threading
from typing import Any

from jaxlm.core.errors import TokenizerError, unicode
from jaxlm.hf.config import read_json

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
         "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja")
VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt")  # of those, what holds the tokens

_LOADING = threading.Lock()  # transformers' lazy modules cannot be imported by two threads at once


def _auto_tokenizer() -> Any:
    """transformers' class, imported without the advice that torch is not there: none is needed."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    given = os.environ.get(name)
    os.environ[name] = "1"
    try:
        from transformers import AutoTokenizer
    finally:
        if given is None:
            del os.environ[name]
        else:
            os.environ[name] = given
    return AutoTokenizer


class Tokenizer:
    """Text to ids and back.

    Importing transformers takes seconds, so it is left alone where `tokenizer.json` suffices;
    chat templates and slow tokenizers do import it.

    Args: folder: a model folder with `tokenizer.json`, or with files that transformers reads.
    Raises: TokenizerError when there is no tokenizer or its file is damaged.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        self.settings: dict[str, Any] = {}
        if (self.folder / "tokenizer_config.json").exists():
            self.settings = read_json(self.folder / "tokenizer_config.json")
        self._slow: Any = None  # transformers' own, once it is needed
        self._backend = self._open()

    def _open(self) -> Any:
        path = self.folder / "tokenizer.json"
        if path.exists():
            import tokenizers

            try:
                backend = tokenizers.Tokenizer.from_file(str(path))
            except Exception as error:  # the binding raises bare Exception
                raise TokenizerError(f"{path} is damaged: {error}; fetch it again") from error
            backend.no_truncation()  # a file may carry both, and cut or pad texts in silence
            backend.no_padding()
            return backend
        try:
            made = self._transformers()
            # without any vocabulary many of its classes give the few special tokens they know of
            names = {*VOCABULARIES, *made.vocab_files_names.values()}
            if not any((self.folder / name).exists() for name in names):
                raise ValueError(f"{type(made).__name__} has read no vocabulary")
            return made.backend_tokenizer
        except (OSError, ValueError, AttributeError, ImportError) as error:
            here = [name for name in FILES if (self.folder / name).exists()]
            raise TokenizerError(
                f"{self.folder} has no tokenizer.json, and transformers makes no tokenizer of "
                f"{', '.join(here) or 'what is there'}; copy the model's tokenizer files beside "
                "the weights" + " (a tokenizer.model needs sentencepiece or tiktoken installed)"
                * ("tokenizer.model" in here)
            ) from error

    def _transformers(self) -> Any:
        with _LOADING:
            if self._slow is None:
                AutoTokenizer = _auto_tokenizer()
                self._slow = AutoTokenizer.from_pretrained(
                    str(self.folder), trust_remote_code=False)
        return self._slow

    @property
    def backend_tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` underneath, under transformers' name for it."""
        return self._backend

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def base_size(self) -> int:
        """The same without added tokens: Gemma 3's image token lies beyond its text models."""
        return max(self._backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    @property
    def added_ids(self) -> set[int]:
        """The ids of added tokens, special ones among them."""
        return set(self._backend.get_added_tokens_decoder())

    def id_of(self, name: str) -> int | None:
        """The id of a special token by its role, such as `eos_token`; None where there is none.

        Raises: TokenizerError where tokenizer_config.json has no text for it.
        """
        given = self.settings.get(name)
        if given is None:
            return None
        token = given.get("content") if isinstance(given, dict) else given
        if not isinstance(token, str):
            raise TokenizerError(
                f"{self.folder / 'tokenizer_config.json'}: field {name!r} is {given!r}; expected a "
                "token's text, or an object with its content"
            )
        return self._backend.token_to_id(token)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text, with the tokenizer's own begin and end marks where `special`.

        Raises: TokenizerError for half a character, as bytes that are no UTF-8 become.
        """
        unicode("text", text, TokenizerError)
        return self._backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Any, special: bool = False) -> str:
        """Text of ids; special tokens are dropped unless `special`.

        Raises: TokenizerError for a number that is no id.
        """
        whole = [int(i) for i in ids]
        if whole and not 0 <= min(whole) <= max(whole) < 2**31:
            raise TokenizerError(f"got the id {min(whole) if min(whole) < 0 else max(whole)}; "
                                 "expected ids of the vocabulary, from 0 on")
        return self._backend.decode(whole, skip_special_tokens=not special)

    @property
    def has_template(self) -> bool:
        """Whether the folder holds a chat template."""
        return bool(self.settings.get("chat_template")) or (
            self.folder / "chat_template.jinja").exists()

    def chat(
        self, messages: list[dict[str, str]], answer: bool = True, *, resume: bool | None = None,
        template: str | None = None,
    ) -> str:
        """The model's chat template over messages, ready for its answer, or else for more text of
        the last message.

        Args:
          answer: begin the model's answer. resume: leave the last message open; default where no
            answer is begun. template: a Jinja template instead of the model's own.
        Raises: TokenizerError for a model without a template, or messages that it refuses.
        """
        import jinja2

        try:
            return self._transformers().apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer, chat_template=template,
                continue_final_message=not answer if resume is None else resume,
            )
        except (ValueError, jinja2.TemplateError) as error:
            raise TokenizerError(f"{self.folder}: no usable chat template: {error}") from error

    def render(
        self, messages: list[dict[str, str]], prompt: bool = False, template: str | None = None
    ) -> str:
        """The chat template over whole messages, as a text to be trained on.

        Args:
          prompt: end with what begins an answer.
          template: Jinja, in place of the folder's own.
        Raises: TokenizerError where there is no template, or it refuses the messages.
        """
        return self.chat(messages, prompt, resume=False, template=template)
