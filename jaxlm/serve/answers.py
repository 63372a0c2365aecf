"""From a checked request to its answer, whole or in pieces."""

import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from jaxlm.decode.batcher import Progress, Request
from jaxlm.decode.text import vocabulary
from jaxlm.hf.bundle import Bundle
from jaxlm.serve.engine import Refused, Ticket
from jaxlm.serve.schema import (
    ChatRequest,
    CompletionRequest,
    Drawn,
    chat_logprobs,
    completion_logprobs,
    error,
    usage,
)

FINISH_EARLY = ("stop", "string")
FINISH = {"stop": "stop", "string": "stop", "length": "length"}


@dataclass
class Choice:
    """One answer as it grows."""

    request: Request
    text: str = ""
    finish: str | None = None
    told: int = 0  # tokens whose log-probabilities were sent
    characters: int = 0  # of those tokens


@dataclass
class Answer:
    """The answers to one HTTP request, in the form of its endpoint."""

    given: ChatRequest | CompletionRequest
    bundle: Bundle
    name: str
    choices: list[Choice]
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: secrets.token_hex(12))

    @property
    def chat(self) -> bool:
        """Whether this is a chat's answer."""
        return isinstance(self.given, ChatRequest)

    @property
    def usage(self) -> dict:
        """True counts: every prompt once, and every drawn token up to where each answer ends."""
        return usage(self.prompt_tokens, sum(len(c.request.drawn) for c in self.choices))

    def take(self, progress: Progress) -> Choice:
        """Add what is new.

        Raises: Refused with 500 where the model gave a number that is not finite.
        """
        if progress.finish == "error":
            raise Refused("the model gave a logit that is NaN or infinite; check the weights", 500)
        choice = next(c for c in self.choices if c.request is progress.request)
        choice.text += progress.text
        choice.finish = None if progress.finish is None else FINISH[progress.finish]
        return choice

    @property
    def over(self) -> bool:
        """Whether every answer has ended."""
        return all(choice.finish is not None for choice in self.choices)

    def whole(self) -> dict:
        """The body of an answer that is over."""
        return self._body(not self.chat, [
            {"index": index, "finish_reason": choice.finish,
             **({"message": {"role": "assistant", "content": choice.text}} if self.chat
                else {"text": choice.text}),
             "logprobs": self._logprobs(choice, len(choice.request.drawn))}
            for index, choice in enumerate(self.choices)
        ]) | {"usage": self.usage}

    def piece(self, choice: Choice, text: str, count: int, first: bool) -> dict:
        """The body of one piece of a stream."""
        delta = {"content": text} | ({"role": "assistant"} if first else {})
        return self._body(False, [
            {"index": self.choices.index(choice), "finish_reason": choice.finish,
             **({"delta": delta} if self.chat else {"text": text}),
             "logprobs": self._logprobs(choice, count)}
        ])

    def _body(self, plain: bool, choices: list[dict]) -> dict:
        kind = ("chat.completion" if plain or not self.given.stream else "chat.completion.chunk")
        return {"id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
                "object": kind if self.chat else "text_completion", "created": self.created,
                "model": self.name, "choices": choices}

    def _logprobs(self, choice: Choice, count: int) -> dict | None:
        """Of the tokens that were not told of yet, up to `count`."""
        if self.given.tops is None:
            return None
        names = vocabulary(self.bundle.tokenizer, self.bundle.lm.config.vocab_size)
        request, first = choice.request, choice.told
        others = request.alternatives or [[]] * count
        drawn: Drawn = [
            (names[request.drawn[i]], request.logprobs[i],
             [(names[token], value) for token, value in others[i]])
            for i in range(first, count)
        ]
        choice.told = count
        if self.chat:
            return chat_logprobs(drawn)
        before = choice.characters
        choice.characters += sum(len(token.decode(errors="replace")) for token, _, _ in drawn)
        return completion_logprobs(drawn, before)


def search_body(given: Any, name: str, prompt_tokens: int, found: Any) -> dict:
    """The body of a search's answer; `search` says what is not in the protocol.

    Completion tokens are all that the model computed, those of losing answers included.
    """
    chat = isinstance(given, ChatRequest)
    text = {"message": {"role": "assistant", "content": found.text}} if chat else {
        "text": found.text}
    number = lambda x: x if math.isfinite(x) else None
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
        "object": "chat.completion" if chat else "text_completion", "created": int(time.time()),
        "model": name, "usage": usage(prompt_tokens, found.tokens),
        "choices": [{"index": 0, **text, "logprobs": None,
                     "finish_reason": "stop" if found.finish in FINISH_EARLY else "length"}],
        "search": {"method": given.method, "answer": found.answer, "score": number(found.score),
                   "log_evidence": number(found.log_evidence), "flags": list(found.flags)},
    }


async def collect(answer: Answer, ticket: Ticket, first: Callable[[], None]) -> dict:
    """The whole answer."""
    while not answer.over:
        answer.take(await ticket.next())
        first()
    return answer.whole()


async def events(
    answer: Answer, ticket: Ticket, first: Callable[[], None], ended: Callable[[Answer], None]
) -> AsyncIterator[str]:
    """The answer as server-sent events; an error that comes in the middle is the last of them."""
    begun: set[int] = set()
    options = answer.given.stream_options
    with ticket:
        try:
            while not answer.over:
                progress = await ticket.next()
                choice = answer.take(progress)
                first()
                new = id(choice) not in begun
                begun.add(id(choice))
                if new or progress.text or progress.finish or answer.given.tops is not None:
                    piece = answer.piece(choice, progress.text, progress.settled, new)
                    yield sse(piece)
            if options is not None and options.include_usage:
                yield sse(answer.piece(answer.choices[0], "", 0, False)
                          | {"choices": [], "usage": answer.usage})
            yield "data: [DONE]\n\n"
        except Refused as refused:
            yield sse(error(str(refused), refused.status))
        ended(answer)


def sse(body: Any) -> str:
    """One event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"
