"""Running a server: uvicorn, and what a signal does."""

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
        """Of the first signal; a second one ends at once."""
        self.engine.drain(self.grace)
        self.force_exit = self.should_exit  # uvicorn's own would raise the signal again at the end
        self.should_exit = True


def config_of(app: FastAPI, grace: float) -> uvicorn.Config:
    """What uvicorn is told."""
    return uvicorn.Config(app, log_level="warning", access_log=False, server_header=False,
                          timeout_graceful_shutdown=int(grace) + 5)


def serve(app: FastAPI, engine: Engine, listener: socket.socket, grace: float) -> None:
    """Serve on a listening socket until a signal.

    Args: grace: seconds that answers in flight get at SIGTERM.
    """
    Server(config_of(app, grace), engine, grace).run(sockets=[listener])
