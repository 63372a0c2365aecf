"""`jaxlm serve`: an HTTP server in OpenAI's protocol."""

import ipaddress
import math
import os
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

from jaxlm.cache.policy import open_cache
from jaxlm.cli.options import Loading, note, open_model, read_text
from jaxlm.core.errors import ConfigError, whole
from jaxlm.decode.batcher import Batcher
from jaxlm.eval.named_reward import open_reward


def run(
    model: str, prm: str | None = None, host: str = "127.0.0.1", port: int = 8000, rows: int = 32,
    max_len: int = 1024, cache: str = "dense", chunk: int = 8, piece: int | None = None,
    readers: int | None = None, prompt_cache_mb: int = 256, queue: int = 256,
    search_queue: int = 16, max_body_kb: int = 1024, max_budget: int = 64,
    chat_template: str | None = None, name: str | None = None, token_file: Path | None = None,
    grace: float = 30.0, loading: Loading = Loading(), revision: str | None = None,
) -> None:
    """Serve a model: /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics.

    Args:
      model: a model folder, a hub id such as org/name, or "tiny", the bundled model.
      prm: a process reward model for the methods that need one, as a folder or a hub id; or
        "arithmetic", the exact checker of the problems that the bundled model was taught, or
        arithmetic:0.1, wrong in a tenth of its verdicts; or module:function, as in `jaxlm solve`.
      host: where to listen; anything but loopback lets others use the model.
      port: 0 takes any that is free.
      rows: answers that grow together in one compiled batch; each step computes all of them.
      max_len: tokens of a prompt and its answer together, at most.
      cache: how keys and values are kept: dense, kivi2, squat2, ..., or a file of tune-cache.
      chunk: tokens drawn between two moments at which answers join and leave the batch.
      piece: tokens of a prompt read at once; default 32 on a CPU, 256 elsewhere and for squat2.
      readers: prompts read together; default 4 on a CPU, 8 elsewhere.
      prompt_cache_mb: memory for prompts that may come again; 0 keeps none.
      queue: answers that may wait for a row; beyond them, 429.
      search_queue: searches that may wait for their turn; beyond them, 429.
      max_body_kb: of a request; beyond it, 413.
      max_budget: answers that one search may spend.
      chat_template: a Jinja file instead of the model's own; verbatim writes messages as they are.
      name: of the model in the protocol; default what was given as model.
      token_file: a file whose text clients must send as bearer token; JAXLM_TOKEN does the same.
      grace: seconds that answers in flight get at SIGTERM; a second signal ends all at once.
      revision: of a hub id.
      loading: how a model is loaded.
    """
    app, server = serving()
    from jaxlm.serve.engine import Engine
    from jaxlm.serve.methods import Methods, memory_left

    check_numbers(
        port=(port, 0, 65535), rows=(rows, 1, 2**20), max_len=(max_len, 2, 2**31 - 1),
        chunk=(chunk, 1, 2**20), prompt_cache_mb=(prompt_cache_mb, 0, 2**31 - 1),
        queue=(queue, 0, 2**31 - 1), search_queue=(search_queue, 0, 2**31 - 1),
        max_body_kb=(max_body_kb, 1, 2**20), max_budget=(max_budget, 1, 2**20))
    check_grace(grace)
    token, template = read_token(token_file), template_of(chat_template, app.VERBATIM)
    warn_of(host, token)
    with listen(host, port) as listener:  # before a model is read: a taken port is known at once
        opened = partial(open_model, loading=loading)
        bundle = opened(model, revision=revision)
        check_template(bundle, template)
        kinds = open_cache(cache, bundle.lm.config, bundle.params)
        reward = None if prm is None else open_reward(prm, bundle, opened)
        batcher = Batcher(
            bundle, rows=rows, max_len=min(max_len, bundle.lm.config.max_len), chunk=chunk,
            piece=piece, readers=readers, cache=kinds, prompt_bytes=prompt_cache_mb << 20)
        methods = Methods(bundle, reward, kinds, max_budget, memory_left(batcher))
        compile_all(batcher, methods)
        engine = Engine(batcher, queue, search_queue)
        settings = app.Settings(name or model, token, template, max_body_kb << 10)
        note(f"serving {settings.name!r} at http://{host}:{listener.getsockname()[1]}/v1")
        server.serve(app.create_app(engine, settings, methods), engine, listener, grace)
    leave(engine)


def serving() -> tuple[Any, Any]:
    """jaxlm.serve.app and jaxlm.serve.run, which need the extra's packages."""
    try:
        from jaxlm.serve import app, run
    except ImportError as error:
        raise ConfigError(f"{error}; install the extra `serve`, or fastapi, uvicorn and "
                          "prometheus-client") from error
    return app, run


def compile_all(batcher: Batcher, methods: Any) -> None:
    """What plain requests run, and, with a reward, a search that leaves all to the server."""
    note("compiling")
    batcher.warm()
    if methods.reward is not None:
        methods.warm(batcher.max_len)


def leave(engine: Any) -> None:
    """Say that the server is closed; end the process under a search that did not end."""
    if engine.alive:  # Python would wait for it, and the device's runtime may not end under it
        note("closed; a search that did not end is left behind")
        sys.stdout.flush()
        os._exit(0)
    note("closed")


def check_numbers(**given: tuple[int, int, int]) -> None:
    """ConfigError for a flag's number outside its range: value, least, most."""
    for name, (value, low, high) in given.items():
        whole(f"--{name.replace('_', '-')}", value, low, high)


def check_grace(grace: float) -> None:
    """ConfigError for anything but seconds, up to a day."""
    if not (math.isfinite(grace) and 0 <= grace <= 86400):
        raise ConfigError(f"--grace is {grace!r}; expected seconds from 0 to 86400")


def template_of(given: str | None, verbatim: str) -> str | None:
    """The text of a chat template that a flag names."""
    if given is None or given == "verbatim":
        return given and verbatim
    try:
        return read_text(given)
    except ConfigError as error:
        raise ConfigError(f"--chat-template: {error}; expected a Jinja file, or verbatim") from None


def check_template(bundle: Any, template: str | None) -> None:
    """Try the chat template, which also imports what renders it; say so where there is none."""
    if template is None and not bundle.tokenizer.has_template:
        note("the model has no chat template, so /v1/chat/completions refuses; give "
             "--chat-template verbatim, or a Jinja file, to have chats")
        return
    bundle.tokenizer.chat([{"role": "user", "content": "x"}], template=template)


def read_token(path: Path | None) -> str | None:
    """The bearer token, from a file or JAXLM_TOKEN; never from an argument, which `ps` shows."""
    token = os.environ.get("JAXLM_TOKEN") if path is None else read_text(path)
    if token is not None and not token.strip():
        raise ConfigError("the bearer token is empty; write one into the file, or leave it out")
    return None if token is None else token.strip()


def warn_of(host: str, token: str | None) -> None:
    """Say so where others than this machine's users can reach the server."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        guard = "with the token" if token else "without a token"
        note(f"warning: --host {host} is not loopback; whoever reaches it {guard} can use the "
             "model, and nothing is encrypted")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ConfigError where that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {error.strerror}; take "
                          "another --port (0: any that is free), or an address of this machine"
                          ) from error
