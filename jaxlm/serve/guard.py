"""The bearer token, before anything else of a request is looked at."""

import hmac
from typing import Any

from jaxlm.serve.body import refuse

OPEN = "/health"


class Guard:
    """Middleware that answers 401 without the token, where there is one; `OPEN` needs none."""

    def __init__(self, app: Any, token: str | None):
        self.app, self.token = app, token

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Pass a request on that has it."""
        if scope["type"] == "http" and self.token is not None and scope["path"] != OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
                return await refuse(
                    send, "a bearer token is needed: Authorization: Bearer TOKEN", 401,
                    (b"www-authenticate", b"Bearer"))
        await self.app(scope, receive, send)
