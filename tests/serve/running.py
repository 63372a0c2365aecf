"""A server in this process, on a port of its own, over the tiny random model."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jaxlm.cli.serve import listen
from jaxlm.decode.batcher import Batcher
from jaxlm.serve.app import VERBATIM, Settings, create_app
from jaxlm.serve.engine import Engine
from jaxlm.serve.run import Server, config_of

ASK = {"model": "tiny-model", "prompt": "Hello, ", "max_tokens": 12, "seed": 5}
CHAT = {"model": "tiny-model", "messages": [{"role": "user", "content": "Hi. "}], "max_tokens": 9,
        "seed": 1}


def make_batcher(bundle, **changes) -> Batcher:
    """As in `tests/decode/test_batcher.py`, so that programs are compiled once."""
    return Batcher(bundle, **{**dict(rows=4, max_len=96, chunk=4, piece=8, readers=2), **changes})


@contextmanager
def running(
    batcher: Batcher, waiting: int = 64, methods=None, grace: float = 5.0, **settings
) -> Iterator[tuple[str, Engine]]:
    """The address and the engine of a server that runs until the block ends."""
    engine = Engine(batcher, waiting)
    settings = {"template": VERBATIM, **settings}
    app = create_app(engine, Settings("tiny-model", **settings), methods)
    with listen("127.0.0.1", 0) as listener:
        server = Server(config_of(app, grace), engine, grace)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
        finally:
            server.handle_exit(15, None)
            thread.join(timeout=60)
            assert not thread.is_alive()
