"""`jaxlm serve`: an HTTP server in OpenAI's protocol."""

import ipaddress
import os
import socket
from pathlib import Path

from jaxlm.cache.policy import open_cache
from jaxlm.cli.options import Device, Dtype, note, open_model, read_text
from jaxlm.core.errors import ConfigError


def run(
    model: str, prm: str | None = None, host: str = "127.0.0.1", port: int = 8000, rows: int = 32,
    max_len: int = 1024, cache: str = "dense", chunk: int = 8, piece: int | None = None,
    readers: int | None = None, prompt_cache_mb: int = 256, queue: int = 256,
    max_body_kb: int = 1024, max_budget: int = 64, chat_template: Path | None = None,
    name: str | None = None, token_file: Path | None = None, grace: float = 30.0,
    device: Device | None = None, dtype: Dtype | None = None, revision: str | None = None,
) -> None:
    """Serve a model: /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics.

    Args:
      model: a model folder, a hub id such as org/name, or "tiny", the bundled model.
      prm: a process reward model for the methods that need one, as a folder or a hub id; or
        "arithmetic", the exact checker of the problems that the bundled model was taught; or
        module:function, as in `jaxlm solve`.
      host: where to listen; anything but loopback lets others use the model.
      port: 0 takes any that is free.
      rows: answers that grow together in one compiled batch.
      max_len: tokens of a prompt and its answer together, at most.
      cache: how keys and values are kept: dense, kivi2, squat2, ..., or a file of tune-cache.
      chunk: tokens drawn between two moments at which answers join and leave the batch.
      piece: tokens of a prompt read at once; default 32 on a CPU, 256 elsewhere.
      readers: prompts read together; default 4 on a CPU, 8 elsewhere.
      prompt_cache_mb: memory for prompts that may come again; 0 keeps none.
      queue: answers that may wait for a row; beyond them, 429.
      max_body_kb: of a request; beyond it, 413.
      max_budget: answers that one search may spend.
      chat_template: a Jinja file for /v1/chat/completions instead of the model's own template.
      name: of the model in the protocol; default what was given as model.
      token_file: a file whose text clients must send as bearer token; JAXLM_TOKEN does the same.
      grace: seconds that answers in flight get at SIGTERM.
      device: where to run; default what jax finds.
      dtype: of the parameters; default float32 on a CPU, the checkpoint's own elsewhere.
      revision: of a hub id.
    """
    try:
        from jaxlm.serve.app import Settings, create_app
        from jaxlm.serve.run import serve
    except ImportError as error:
        raise ConfigError(f"{error}; install the extra `serve`, or fastapi, uvicorn and "
                          "prometheus-client") from error
    from jaxlm.decode.batcher import Batcher
    from jaxlm.eval.named_reward import open_reward
    from jaxlm.serve.engine import Engine
    from jaxlm.serve.methods import Methods

    token = read_token(token_file)
    warn_of(host, token)
    bundle = open_model(model, device, dtype, revision)
    kinds = open_cache(cache, bundle.lm.config)
    reward = None if prm is None else open_reward(
        prm, bundle, lambda source: open_model(source, device, dtype))
    batcher = Batcher(
        bundle, rows=rows, max_len=min(max_len, bundle.lm.config.max_len), chunk=chunk, piece=piece,
        readers=readers, cache=kinds, prompt_bytes=prompt_cache_mb << 20)
    note("compiling")
    batcher.warm()
    engine = Engine(batcher, queue)
    settings = Settings(
        name or model, token, None if chat_template is None else read_text(chat_template),
        max_body_kb << 10)
    if settings.template or bundle.tokenizer.has_template:  # imports what renders it
        bundle.tokenizer.chat([{"role": "user", "content": "x"}], template=settings.template)
    methods = Methods(bundle, reward, kinds, max_budget)
    with listen(host, port) as listener:
        note(f"serving {settings.name!r} at http://{host}:{listener.getsockname()[1]}/v1")
        serve(create_app(engine, settings, methods), engine, listener, grace)
    note("closed")


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
    """A listening socket; OSError where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)
