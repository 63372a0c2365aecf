"""Running a server: uvicorn, and what a signal does."""

import asyncio
import os
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from jaxlm.serve.engine import Engine


class Server(uvicorn.Server):
    """At a signal, answers in flight get `grace` seconds; the rest ends with a reason."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float):
        super().__init__(config)
        self.engine, self.grace = engine, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of the first signal; a second one ends the process at once."""
        if self.should_exit:
            os._exit(128 + sig)
        self.engine.drain(self.grace)
        self.should_exit = True  # uvicorn's own would raise the signal again at the end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's; after the grace all that waits is refused by this loop, which is always free,
        where the engine's threads may be in a long job."""
        refusal = asyncio.get_running_loop().call_later(self.grace, self.engine.end)
        await super().shutdown(sockets)
        refusal.cancel()


def config_of(app: FastAPI, grace: float) -> uvicorn.Config:
    """What uvicorn is told."""
    return uvicorn.Config(app, log_level="warning", access_log=False, server_header=False,
                          timeout_graceful_shutdown=int(grace) + 5)


def serve(app: FastAPI, engine: Engine, listener: socket.socket, grace: float) -> None:
    """Serve on a listening socket until a signal.

    Args: grace: seconds that answers in flight get at SIGTERM. The engine's threads may outlive
      this, in a job that does not ask whether it is still wanted.
    """
    Server(config_of(app, grace), engine, grace).run(sockets=[listener])
