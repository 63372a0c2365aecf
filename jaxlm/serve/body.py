"""A bound on the bytes of a request's body, before anything reads it."""

import json
from typing import Any

from jaxlm.serve.schema import error


class BodyLimit:
    """Middleware that answers 413 to a body of more than `limit` bytes, declared or not."""

    def __init__(self, app: Any, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Pass a request on, with its body counted as it comes."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            return await self._refuse(send)
        got, begun = 0, False

        async def counted() -> dict:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self.limit:
                raise _TooLong
            return message

        async def noted(message: dict) -> None:
            nonlocal begun
            if got <= self.limit or begun:  # else whatever the handlers make of it is not sent
                begun = True
                await send(message)

        try:
            await self.app(scope, counted, noted)
        except _TooLong:
            pass
        if got > self.limit and not begun:
            await self._refuse(send)

    async def _refuse(self, send: Any) -> None:
        await refuse(send, f"the body is longer than {self.limit} bytes", 413)


async def refuse(send: Any, message: str, status: int, *more: tuple[bytes, bytes]) -> None:
    """Answer with an error, whatever of the body is unread; `more`: headers."""
    body = json.dumps(error(message, status)).encode()
    head = [(b"content-type", b"application/json"), (b"connection", b"close"),
            (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


class _TooLong(Exception):
    pass
