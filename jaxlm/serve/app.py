"""The endpoints: checks and forms; what is drawn comes from the engine."""

import asyncio
import logging
import secrets
import time
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from jaxlm.core.errors import JaxlmError, NumericsError, TokenizerError
from jaxlm.decode.batcher import Request as Wanted
from jaxlm.decode.generate import to_ids
from jaxlm.hf.bundle import Bundle
from jaxlm.rewards.base import RewardError
from jaxlm.serve.answers import Answer, Choice, collect, events, search_body
from jaxlm.serve.body import BodyLimit
from jaxlm.serve.engine import Engine, Refused
from jaxlm.serve.guard import Guard
from jaxlm.serve.invalid import reason
from jaxlm.serve.jobs import Whole
from jaxlm.serve.methods import TOKENS
from jaxlm.serve.metrics import Counted, Metrics
from jaxlm.serve.schema import ChatRequest, CompletionRequest, error

VERBATIM = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
LOG = logging.getLogger("uvicorn.error")
OURS = (RewardError, NumericsError)  # of the library's errors, those that no request causes


@dataclass(frozen=True)
class Settings:
    """What a server allows.

    name: of the model, as clients name it. token: a bearer token that every request but one for
    `/health` must carry. template: a chat template instead of the model's own. max_body: bytes.
    """

    name: str
    token: str | None = field(default=None, repr=False)
    template: str | None = None
    max_body: int = 1 << 20


def create_app(
    engine: Engine, settings: Settings, methods: Any = None
) -> FastAPI:
    """The application; the engine starts and closes with it."""
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    # a search's own; it quotes the reward, which may quote a prompt; the client is told why
    warnings.filterwarnings("ignore", "the reward failed for")
    app = FastAPI(title="jaxlm", lifespan=lifespan, docs_url=None, redoc_url=None)
    server = Server(engine, settings, methods)
    app.add_middleware(BodyLimit, limit=settings.max_body)
    app.add_middleware(Guard, token=settings.token)
    app.add_middleware(Counted, metrics=server.metrics)
    for kind, handler in ((RequestValidationError, server.invalid), (JaxlmError, server.bad_input),
                          (StarletteHTTPException, server.refused), (Exception, server.unexpected)):
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": what} for status, what in
        ((400, "bad input"), (401, "no or another token"), (404, "no such model"),
         (413, "the body is too long"), (429, "too many wait"), (503, "shutting down"))}
    app.get("/health")(server.health)
    app.get("/metrics")(server.metrics_text)
    app.get("/v1/models")(server.models)
    app.get("/v1/models/{name:path}", responses=errors)(server.model)
    post = lambda path, endpoint: app.post(path, responses=errors, response_model=None)(endpoint)
    post("/v1/completions", server.completions)
    post("/v1/chat/completions", server.chat)
    app.openapi = partial(described, app, settings.name)  # type: ignore[method-assign]
    return app


def described(app: FastAPI, name: str) -> dict[str, Any]:
    """The description at `/openapi.json`, with the model's name."""
    made = FastAPI.openapi(app)
    for form in (CompletionRequest, ChatRequest):
        made["components"]["schemas"][form.__name__]["properties"]["model"]["enum"] = [name]
    return made


class Server:
    """The handlers of one application."""

    def __init__(self, engine: Engine, settings: Settings, methods: Any):
        self.engine, self.settings, self.methods = engine, settings, methods
        self.metrics = Metrics(engine)
        self.created = int(time.time())

    @property
    def bundle(self) -> Bundle:
        """The model."""
        return self.engine.batcher.bundle

    # refusals

    async def invalid(self, request: Request, found: RequestValidationError) -> JSONResponse:
        """400 with the first thing that is wrong."""
        chat = request.url.path.endswith("/chat/completions")
        text, place = reason(found.errors(), found.body, chat)
        return JSONResponse(error(text.encode(errors="replace").decode(), 400, place), 400)

    async def bad_input(self, request: Request, found: JaxlmError) -> JSONResponse:
        """What the library refuses is 400; what the engine refuses has a status of its own."""
        status = getattr(found, "status", 500 if isinstance(found, OURS) else 400)
        headers = {"Retry-After": "1"} if status == 429 else None
        return JSONResponse(error(str(found), status), status, headers)

    async def refused(self, request: Request, found: StarletteHTTPException) -> JSONResponse:
        """An unknown path, a wrong verb."""
        return JSONResponse(error(str(found.detail), found.status_code), found.status_code,
                            found.headers)

    async def unexpected(self, request: Request, found: Exception) -> JSONResponse:
        """500 for what nothing foresaw; it is logged, and the server lives on."""
        return JSONResponse(error(f"{type(found).__name__} in the server: {found}", 500), 500)

    # endpoints

    async def health(self) -> Response:
        """200 while requests are answered."""
        if self.engine.failure is not None:
            return JSONResponse(error(self.engine.failure, 503), 503)
        return JSONResponse({"status": "ok"})

    async def metrics_text(self) -> Response:
        """Prometheus' text."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict:
        """The one model."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict:
        """The model by name."""
        self._check_model(name)
        return self._card()

    async def completions(self, given: CompletionRequest, request: Request) -> Response:
        """Continue one text or several."""
        return await self._answer(given, given.prompts, request)

    async def chat(self, given: ChatRequest, request: Request) -> Response:
        """Answer a chat, or go on with its last message."""
        self._check_model(given.model)
        messages = [message.plain() for message in given.messages]
        ids = await asyncio.to_thread(self._rendered, messages, given)
        return await self._answer(given, [ids], request)

    def _rendered(self, messages: list[dict[str, str]], given: ChatRequest) -> list[int]:
        """A chat's token ids.

        Raises: Refused without a template, or for messages that it does not take.
        """
        tokenizer, template = self.bundle.tokenizer, self.settings.template
        if template is None and not tokenizer.has_template:
            raise Refused("this model has no chat template; use /v1/completions, or start the "
                          "server with --chat-template verbatim, or a Jinja file", 400)
        try:
            text = tokenizer.chat(messages, given.begins_answer, template=template,
                                  resume=bool(given.continue_final_message))
        except TokenizerError as error:  # its own message names a folder of the server
            raise Refused(f"the chat template does not take these messages: {error.__cause__}; "
                          "change their roles or order", 400) from error
        return tokenizer.encode(text, special=False)

    def _card(self) -> dict:
        return {"id": self.settings.name, "object": "model", "created": self.created,
                "owned_by": "jaxlm", "max_model_len": self.engine.batcher.max_len}

    def _check_model(self, name: str) -> None:
        if name != self.settings.name:
            raise Refused(f"no model {name!r}; this server has {self.settings.name!r}", 404)

    async def _answer(
        self, given: CompletionRequest | ChatRequest, prompts: list, request: Request
    ) -> Response:
        """The answer to a checked request, of whatever method."""
        self._check_model(given.model)
        if given.method != "plain":
            return await self._search(given, prompts, request)
        self.engine.check(len(prompts) * (given.n or 1))  # before any work on so many
        wanted = await asyncio.to_thread(self._wanted, given, prompts)
        count = sum(len(one.prompt) for one in wanted[:: given.n or 1])
        ticket = self.engine.submit(wanted)
        answer = Answer(given, self.bundle, self.settings.name, [Choice(one) for one in wanted],
                        count)
        first = self._first()
        if given.stream:
            pieces = events(answer, ticket, first, self._ended)
            return StreamingResponse(pieces, media_type="text/event-stream")
        with ticket:
            body = await unless_gone(collect(answer, ticket, first), request)
        self._ended(answer)
        return JSONResponse(body)

    def _wanted(self, given: CompletionRequest | ChatRequest, prompts: list) -> list[Wanted]:
        """One checked request to the batcher for each answer."""
        if lone := [name for name in ("budget", "step", "max_steps") if getattr(given, name)]:
            raise Refused(f"{', '.join(lone)}: for a search; give method too", 400)
        limit = new_tokens(given)
        if isinstance(given, CompletionRequest):
            limit = limit or 16  # the protocol's default
        common: dict[str, Any] = {
            "max_new_tokens": limit, "stop": given.stops, "stream": bool(given.stream),
            "temperature": 1.0 if given.temperature is None else given.temperature,
            "top_p": 1.0 if given.top_p is None else given.top_p,
            "top_k": given.top_k if (given.top_k or 0) > 0 else None, "min_p": given.min_p or 0.0,
            "include_stop": bool(given.include_stop_str_in_output), "tops": given.tops or 0,
            "seed": seed_of(given),
        }
        n = given.n or 1
        firsts = [self.engine.batcher.request(prompt, choice=number * n, **common)
                  for number, prompt in enumerate(prompts)]
        return [first.another(first.choice + i) for first in firsts for i in range(n)]

    async def _search(
        self, given: CompletionRequest | ChatRequest, prompts: list, request: Request
    ) -> Response:
        """A search over one prompt, as a whole job beside the batch."""
        if self.methods is None:
            raise Refused("this server has no methods; leave method out", 400)
        job, count = await asyncio.to_thread(self._job, given, prompts)
        try:
            solution = await unless_gone(self.engine.call(job), request)
        except JaxlmError:
            raise
        except Exception as failure:  # of a reward or a method; the engine has gone on
            LOG.exception("a search failed")
            raise Refused(f"the search failed: {type(failure).__name__}: {failure}", 500) from None
        body = search_body(given, self.settings.name, count, solution)
        self.metrics.tokens(body["usage"])
        return JSONResponse(body)

    def _job(
        self, given: CompletionRequest | ChatRequest, prompts: list
    ) -> tuple[Whole, int]:
        """A checked search, and its prompt's tokens."""
        ids, _ = to_ids(self.bundle, prompts)
        room = self.engine.batcher.max_len - max(map(len, ids))
        limit = new_tokens(given)
        if room < 1 or (limit or 0) > room:
            raise Refused(f"the prompt leaves room for {max(room, 0)} tokens; ask for less", 400)
        job = self.methods.job(given, ids, min(limit or TOKENS, room), seed_of(given))
        return job, len(ids[0])

    def _first(self) -> Callable[[], None]:
        """Records the time to the first token, once."""
        began = time.perf_counter()
        told: list[bool] = []

        def first() -> None:
            if not told:
                told.append(True)
                self.metrics.first.observe(time.perf_counter() - began)

        return first

    def _ended(self, answer: Answer) -> None:
        """Count an answer's tokens."""
        self.metrics.tokens(answer.usage)


def new_tokens(given: CompletionRequest | ChatRequest) -> int | None:
    """The most tokens of an answer, where the request says."""
    return getattr(given, "max_completion_tokens", None) or given.max_tokens


def seed_of(given: CompletionRequest | ChatRequest) -> int:
    """The request's seed, or one by chance."""
    return secrets.randbits(63) if given.seed is None else given.seed


async def unless_gone(work: Any, request: Request) -> Any:
    """The result of `work`, given up when the client leaves.

    Raises: Refused when it has left; nobody reads it.
    """
    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused("the client has left", 499)
        return task.result()
    finally:
        task.cancel(), watch.cancel()
