"""The server: where each path leads, and what becomes of a client that goes or never reads."""

import asyncio
import json
import socket
from contextlib import aclosing, asynccontextmanager, suppress
from importlib.resources import files

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from aqaa.serve import realtime, sound
from aqaa.serve.guard import LIMITS, Guard, check_host, refused
from aqaa.serve.requests import MODEL, Chats, Fault, fault_of, object_of, speech
from aqaa.serve.worker import Reply, Waiting, Worker

WHY_CLOSED = {  # how one of a session's tasks ended: a client that has gone needs no reason
    TimeoutError: "nothing was sent for too long", KeyError: "events are sent as text",
    type(None): "events were read too slowly",
}  # fmt: skip
LEAVE = 5.0  # seconds in which a client takes notice that its session has ended


class Streamed(StreamingResponse):
    """Ends its source when the client goes, at once and not when garbage is collected."""

    async def __call__(self, scope, receive, send):
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


async def unless_gone(request, work):
    """The result of a coroutine, which ends when the client of a request goes."""

    async def left():
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise HTTPException(499, "the client has gone")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


class Server:
    """The paths. model: an AQAA; sampling: as of its `ask`, where a request says nothing else."""

    def __init__(self, model, limits, sampling):
        self.model, self.limits, self.sampling, self.worker = model, limits, sampling, Worker()
        self.chats = Chats(model, self.worker, sampling)

    @asynccontextmanager
    async def lifespan(self, app):
        yield
        await run_in_threadpool(self.worker.stop)

    async def _body(self, request):
        """The object that a request sends. Raises Fault."""
        data, most = bytearray(), self.limits.body
        try:
            async with asyncio.timeout(self.limits.arrive):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > most:
                        fact = f"the request has more than {most:,} bytes"
                        raise Fault(f"{fact}: send a shorter sound.", status=413)
        except TimeoutError:
            raise Fault("the request came too slowly: send it again.", status=408) from None
        return object_of(data, "the request")

    async def speech(self, request):
        form, make = speech(self.model, await self._body(request), self.sampling)

        async def waves():
            async with aclosing(Reply(make).items(self.worker)) as items:
                async for wave in items:
                    if not isinstance(wave, Waiting):
                        yield wave

        if form in ("pcm", "wav"):

            async def stream(first, rest):
                async with aclosing(rest):
                    yield (sound.wav_header() if form == "wav" else b"") + sound.pcm(first)
                    async for wave in rest:
                        yield sound.pcm(wave)

            first = await anext(rest := waves())  # a fault before the first sound has its status
            return Streamed(stream(first, rest), media_type=sound.FORMATS[form])

        async def whole():
            wav = torch.cat([wave async for wave in waves()])
            return await run_in_threadpool(sound.encoded, wav, form)

        return Response(await unless_gone(request, whole()), media_type=sound.FORMATS[form])

    async def chat(self, request):
        body = await self._body(request)
        asked = await run_in_threadpool(self.chats.asked, body)  # decodes sound
        if not asked.stream:
            return JSONResponse(await unless_gone(request, self.chats.whole(asked)))

        async def events():
            try:
                async with aclosing(self.chats.chunks(asked)) as chunks:
                    async for chunk in chunks:
                        if isinstance(chunk, Waiting):  # a comment, which clients may skip
                            yield f": queued, place {chunk:d}\n\n"
                        else:
                            yield f"data: {json.dumps(chunk)}\n\n"
            except Exception as fault:
                yield f"data: {json.dumps({'error': fault_of(fault).body})}\n\n"
            yield "data: [DONE]\n\n"

        return Streamed(events(), media_type="text/event-stream")

    async def models(self, request):
        known = {"id": MODEL, "object": "model", "created": 0, "owned_by": "aqaa"}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [known]})
        if name != MODEL:
            raise Fault(f"there is no model {name!r}: {MODEL} is here.", "model",
                        "model_not_found", 404)  # fmt: skip
        return JSONResponse(known)

    async def page(self, request):
        parts = (files("aqaa.serve").joinpath(name) for name in ("talk.html", "live.js"))
        html, script = (part.read_text(encoding="utf-8") for part in parts)
        return HTMLResponse(html.replace("/* live.js */", script))

    async def realtime(self, websocket):
        asked = websocket.scope.get("subprotocols", ())
        await websocket.accept("realtime" if "realtime" in asked else None)
        loop, unsent, full = asyncio.get_running_loop(), asyncio.Queue(), asyncio.Event()
        size = 0  # of what is unsent, in bytes: an event may be a word or seconds of sound

        def put(line):
            nonlocal size
            unsent.put_nowait(line)
            size += len(line)  # ASCII
            if size > self.limits.unread:
                full.set()

        def send(event):
            loop.call_soon_threadsafe(put, realtime.line(event))

        session = realtime.Session(self.model, send, **self.sampling)

        async def write():
            nonlocal size
            while True:
                line = await unsent.get()
                await websocket.send_text(line)
                size -= len(line)

        async def read():
            while True:
                async with asyncio.timeout(self.limits.idle):
                    session.put(await websocket.receive_text())
                self.worker.wake()
                while session.unread > self.limits.event:  # the model is behind: the client waits
                    await asyncio.sleep(0.02)

        # `write` may be waiting for a client that reads no more: `full` ends the session then.
        tasks = [asyncio.create_task(step()) for step in (read, write, full.wait)]
        try:
            self.worker.add(session)
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                why = WHY_CLOSED.get(type(task.exception()))
                if why:  # who reads nothing does not read this either
                    with suppress(TimeoutError):
                        async with asyncio.timeout(LEAVE):
                            await websocket.close(1008, why)
        finally:
            self.worker.remove(session)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def on_fault(request, fault):
    if isinstance(fault, HTTPException):
        place = f"{request.method} {request.url.path}"
        fault = Fault(f"{place}: {fault.detail}.", status=fault.status_code)
    return refused(fault_of(fault))


def application(model, *, token=None, limits=LIMITS, **sampling):
    server = Server(model, limits, sampling)
    routes = [Route("/", server.page), Route("/v1/models", server.models),
              Route("/v1/models/{name:path}", server.models),
              Route("/v1/audio/speech", server.speech, methods=["POST"]),
              Route("/v1/chat/completions", server.chat, methods=["POST"]),
              WebSocketRoute("/v1/realtime", server.realtime)]  # fmt: skip
    faults = dict.fromkeys((HTTPException, ValueError, Exception), on_fault)
    app = Starlette(routes=routes, exception_handlers=faults, lifespan=server.lifespan)
    return Guard(app, token, limits)


class Protocol(WebSocketsSansIOProtocol):
    """uvicorn's, which would keep the connection of a client that never reads to its end."""

    async def run_asgi(self):
        await super().run_asgi()
        self.loop.call_later(LEAVE, self.transport.abort)


def server(model, host="127.0.0.1", port=8000, token=None, limits=LIMITS, **sampling):
    """A uvicorn Server, ready to run; it ends gracefully on SIGINT and SIGTERM."""
    check_host(host, token)
    config = uvicorn.Config(
        application(model, token=token, limits=limits, **sampling), host=host, port=port,
        lifespan="on", log_level="warning", ws=Protocol, ws_max_size=limits.event,
        ws_ping_timeout=None,  # a busy client is not lost; limits.idle ends a dead one
        ws_per_message_deflate=False,  # sound in base64 costs more time than it saves room
        timeout_graceful_shutdown=30, server_header=False,
    )  # fmt: skip
    return uvicorn.Server(config)


def bound(host, port):
    """A socket that listens there. Raises ValueError where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as fault:
        raise ValueError(f"{host}, port {port}, cannot be used ({fault.strerror}): "
                         "choose another --port or --host.") from None  # fmt: skip


def main(model, host, taken, token, **sampling):
    """Serve at `taken`, a socket of `bound`, until a signal ends it."""
    port, place = taken.getsockname()[1], f"[{host}]" if ":" in host else host
    ready = server(model, host, port, token, **sampling)
    print(f"http://{place}:{port}/ is a page to talk with; the API is under /v1. Ctrl-C ends.",
          flush=True)  # fmt: skip
    with suppress(KeyboardInterrupt):  # which uvicorn raises again behind its graceful end
        ready.run(sockets=[taken])
