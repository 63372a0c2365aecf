"""The protocol: what a request may hold, and what answers look like.

The names and meanings are OpenAI's, with what vLLM's clients add (`top_k`, `min_p`,
`include_stop_str_in_output`, `continue_final_message`, `add_generation_prompt`, `extra_body`)
and `method` with `budget`. A field that would be ignored is refused, unless its value asks for
nothing.
"""

from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from jaxlm.decode.pool import TOPS
from jaxlm.search.methods import METHODS

MAX_N, MAX_STOPS, MAX_STRING, INT64 = 1024, 16, 256, 2**63


def encodable(value: Any) -> Any:
    """Refuse text with half of a surrogate pair, which no tokenizer can read."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("the text is not valid Unicode: it holds a lone surrogate; send both "
                             "halves of the pair") from None
    return value


Text = Annotated[str, BeforeValidator(encodable)]
Number = Annotated[float, Field(allow_inf_nan=False)]
StopText = Annotated[Text, Field(min_length=1, max_length=MAX_STRING)]
Nothing = Annotated[float, Field(ge=0, le=0)]


class Strict(BaseModel):
    """A model that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    """What a stream reports besides text."""

    include_usage: bool = False


class ResponseFormat(Strict):
    """The form of an answer; another than text would need a grammar."""

    type: Literal["text"]


class Request(Strict):
    """What completions and chat have in common."""

    model: Text
    max_tokens: int | None = Field(None, ge=1)
    temperature: Number | None = Field(None, ge=0, le=100)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: Number | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_N)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    method: Text = Field("plain", json_schema_extra={"enum": ["plain", *METHODS]})
    budget: int | None = Field(None, ge=1)
    step: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    max_steps: int | None = Field(None, ge=1, le=1024)
    user: Text | None = None
    frequency_penalty: Nothing | None = None
    presence_penalty: Nothing | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    response_format: ResponseFormat | None = None
    store: Literal[False] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def unfold(cls, given: Any) -> Any:
        """Take in `extra_body`, which some clients send as it is."""
        if isinstance(given, dict) and isinstance(given.get("extra_body"), dict):
            given = dict(given)
            given = {**given.pop("extra_body"), **given}
        return given

    @model_validator(mode="after")
    def check_stream(self) -> "Request":
        """Options of a stream that is not asked for."""
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true; ask for a stream, or leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def question(self) -> str | None:
        """What a reward is told; None: the prompt."""
        return None


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Request):
    """A request to `/v1/completions`."""

    prompt: Text | Ids | Annotated[list[Text] | list[Ids], Field(min_length=1, max_length=MAX_N)]
    logprobs: int | None = Field(None, ge=0, le=TOPS)
    echo: Literal[False] | None = None
    best_of: int | None = Field(None, ge=1)
    suffix: None = None

    @model_validator(mode="after")
    def check_best(self) -> "CompletionRequest":
        """`best_of` other than `n` would need the old API's ranking."""
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of must equal n; for the best of several answers use method")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]  # type: ignore[return-value]

    @property
    def tops(self) -> int | None:
        """Alternatives at each token; None: no log-probabilities."""
        return self.logprobs


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: None = None

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class ChatRequest(Request):
    """A request to `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=TOPS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None

    @model_validator(mode="after")
    def check_turns(self) -> "ChatRequest":
        """Fields that contradict one another."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true; give both or neither")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other; "
                             "give one of them")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
                self.max_tokens != self.max_completion_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def begins_answer(self) -> bool:
        """Whether a new answer is begun, by default unless the last message is to go on."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt

    @property
    def tops(self) -> int | None:
        """Alternatives at each token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def question(self) -> str | None:
        """The user's last turn, of one message or several, and what an answer was begun with."""
        roles = [message.role == "user" for message in self.messages]
        if not any(roles):
            return None
        first = len(roles) - roles[::-1].index(True) - 1
        while first and roles[first - 1]:
            first -= 1
        texts = [message.plain()["content"] for message in self.messages[first:]]
        return "\n".join(texts)


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> dict:
    """An error in OpenAI's form.

    >>> error("no", 429)["error"]["type"]
    'rate_limit_error'
    """
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error",
             500: "api_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(prompt: int, completion: int) -> dict:
    """Tokens read and tokens drawn."""
    return {"prompt_tokens": prompt, "completion_tokens": completion,
            "total_tokens": prompt + completion}


Drawn = list[tuple[bytes, float, list[tuple[bytes, float]]]]  # token, log-probability, others


def chat_logprobs(drawn: Drawn) -> dict:
    """Log-probabilities as chat answers have them."""
    def one(token: bytes, logprob: float) -> dict:
        return {"token": token.decode(errors="replace"), "logprob": logprob, "bytes": list(token)}

    return {"content": [
        {**one(token, logprob), "top_logprobs": [one(*other) for other in others]}
        for token, logprob, others in drawn
    ]}


def completion_logprobs(drawn: Drawn, offset: int) -> dict:
    """Log-probabilities as completions have them; `offset` characters came before."""
    texts = [token.decode(errors="replace") for token, _, _ in drawn]
    places = list(accumulate(map(len, texts), initial=offset))[:-1]
    return {
        "tokens": texts, "token_logprobs": [logprob for _, logprob, _ in drawn],
        "top_logprobs": [{other.decode(errors="replace"): value for other, value in others}
                         for _, _, others in drawn],
        "text_offset": places,
    }
