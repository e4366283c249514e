"""Who may ask the server, and how much.

Without a token it serves this machine alone, and no page of another site: names that a browser
gives (Host, Origin) must be those of the loopback. With one, every path but the page needs it."""

import asyncio
import hmac
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.websockets import WebSocket

from aqaa.serve.requests import Fault

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PROTOCOL_KEY = "openai-insecure-api-key."  # how a page names its token: it cannot send headers


@dataclass(frozen=True)
class Limits:
    """sessions at once; bytes of a request and of an event; seconds for a request to arrive, to be
    answered, of silence on a WebSocket, and of its whole; bytes of events that wait unread."""

    sessions: int = 32
    body: int = 32 << 20
    event: int = 4 << 20
    arrive: float = 30
    answer: float = 600
    idle: float = 300
    session: float = 1800
    unread: int = 16 << 20


LIMITS = Limits()


def check_host(host, token):
    """Raise ValueError where others could reach a server without a token."""
    if host not in LOOPBACK and not token:
        raise ValueError(f"{host} can be reached by others: add --token, or leave --host out.")


def refused(fault, headers=None):
    return JSONResponse({"error": fault.body}, fault.status, headers)


class Guard:
    """ASGI in front of all: token, names, and how many at once, how long."""

    def __init__(self, app, token, limits):
        self.app, self.token, self.limits, self.open = app, token, limits, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        counted = scope["type"] == "websocket" or scope["method"] == "POST"
        if fault := self._fault(scope, counted):
            response = refused(fault, {"retry-after": "5"} if fault.status == 429 else None)
            if scope["type"] == "websocket":
                return await WebSocket(scope, receive, send).send_denial_response(response)
            return await response(scope, receive, send)
        self.open += counted
        longest = self.limits.session if scope["type"] == "websocket" else self.limits.answer
        try:  # also ends what waits for a client that reads no more
            async with asyncio.timeout(longest):
                await self.app(scope, receive, send)
        except TimeoutError:
            pass
        finally:
            self.open -= counted

    def _fault(self, scope, counted):
        headers = {a.decode("latin1"): b.decode("latin1") for a, b in scope["headers"]}
        if self.token:
            page = scope["type"] == "http" and scope["path"] == "/"
            given = headers.get("authorization", "").removeprefix("Bearer ")
            for protocol in scope.get("subprotocols", ()):
                if protocol.startswith(PROTOCOL_KEY):
                    given = protocol.removeprefix(PROTOCOL_KEY)
            if not page and not hmac.compare_digest(given.encode(), self.token.encode()):
                return Fault("the token is missing or wrong: send it as the API key.",
                             code="invalid_api_key", status=401)  # fmt: skip
        else:
            for name in (f"//{headers.get('host', '')}", headers.get("origin")):
                if name is not None and host_of(name) not in LOOPBACK:
                    return Fault("another site's name stands in this request: start the server "
                                 "with --token to be reached by it.", status=403)  # fmt: skip
        if counted and self.open >= self.limits.sessions:
            return Fault(f"{self.open} others are being served: try again in a while.",
                         code="rate_limit_exceeded", status=429)  # fmt: skip


def host_of(url):
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
