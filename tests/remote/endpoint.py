"""A real HTTP server on loopback whose answers a test chooses, faults included."""

from __future__ import annotations

import json
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mistral_rerank import InvalidInputError, RankedPassage, Score
from mistral_rerank.protocols import PROTOCOLS, RerankReply
from mistral_rerank.scores import order


def logit_of(passage: str) -> float:
    """What every endpoint of these tests thinks of a passage, in steps that JSON keeps exactly."""
    return zlib.crc32(passage.encode()) % 4096 / 256 - 8


def expected(passages: Sequence[str]) -> list[RankedPassage]:
    return order(passages, [Score.from_logit(logit_of(passage)) for passage in passages])


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class Exchange:
    """One request being answered; `write` and `reset` reach the socket itself."""

    def __init__(self, handler: BaseHTTPRequestHandler, request: Request, released: threading.Event) -> None:
        self.handler, self.request, self.released = handler, request, released

    def head(self, status: int, length: int | None, headers: dict[str, str]) -> None:
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name, value)
        if length is None:
            self.handler.send_header("Connection", "close")
            self.handler.close_connection = True
        else:
            self.handler.send_header("Content-Length", str(length))
        self.handler.end_headers()

    def write(self, data: bytes) -> None:
        self.handler.wfile.write(data)
        self.handler.wfile.flush()

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)  # close() sends RST instead of FIN
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.handler.close_connection = True
        self.handler.wfile.close()
        self.handler.rfile.close()
        self.handler.connection.close()

    def respond(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.head(status, len(content), {"Content-Type": "application/json"} | (headers or {}))
        self.write(content)


Behaviour = Callable[[Exchange], None]


def speaks(protocol: str, *, most: int | None = None, path: str | None = None) -> Behaviour:
    """Answers as the protocol says, on its own path alone; refuses more than `most` passages as TEI does."""
    protocol = PROTOCOLS[protocol]

    def behave(exchange: Exchange) -> None:
        if exchange.request.path != (path or protocol.path):
            exchange.respond(404, b"404 page not found\n", {"Content-Type": "text/plain"})
            return
        try:
            request = protocol.read_request(exchange.request.body)
        except InvalidInputError as error:
            exchange.respond(422, {"detail": str(error)})
            return
        if most is not None and len(request.passages) > most:
            message = f"batch size {len(request.passages)} > maximum allowed batch size {most}"
            exchange.respond(422, {"error": message, "error_type": "Validation"})
            return
        reply = RerankReply(tuple(expected(request.passages)), "m", "id", 1)
        exchange.respond(200, protocol.write_reply(request, reply))

    return behave


def gives(status: int, body: Any, headers: dict[str, str] | None = None) -> Behaviour:
    return lambda exchange: exchange.respond(status, body, headers)


def rankings(change: Callable[[list[dict[str, Any]]], Any]) -> Behaviour:
    """The right NIM answer, changed."""

    def behave(exchange: Exchange) -> None:
        request = PROTOCOLS["nvidia"].read_request(exchange.request.body)
        right = [{"index": place.index, "logit": place.score.logit} for place in expected(request.passages)]
        exchange.respond(200, {"rankings": change(right)})

    return behave


def resets_before_answering(exchange: Exchange) -> None:
    exchange.reset()


def resets_in_the_body(exchange: Exchange) -> None:
    exchange.head(200, 1000, {"Content-Type": "application/json"})
    exchange.write(b'{"rankings":[{"index":0,')
    exchange.reset()


def ends_early(exchange: Exchange) -> None:
    exchange.head(200, None, {"Content-Type": "application/json"})
    exchange.write(b'{"rankings":[{"index":0,"lo')


def hangs(exchange: Exchange) -> None:
    exchange.released.wait()


def drips(exchange: Exchange) -> None:
    """A byte at a time, for ever."""
    exchange.head(200, 10_000, {"Content-Type": "application/json"})
    while not exchange.released.wait(0.02):
        exchange.write(b" ")


def drips_its_head(exchange: Exchange) -> None:
    """A byte of a header at a time, for ever."""
    exchange.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not exchange.released.wait(0.02):
        exchange.write(b"x")


@dataclass
class Endpoint:
    """Answers with each of `script` once, then with `then` for ever."""

    then: Behaviour
    script: list[Behaviour] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Endpoint:
        outer, released, lock = self, threading.Event(), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_any(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, self.path, headers, json.loads(content) if content else None)
                with lock:
                    outer.requests.append(request)
                    behave = outer.script.pop(0) if outer.script else outer.then
                try:
                    behave(Exchange(self, request, released))
                except (ConnectionError, ValueError):
                    self.close_connection = True  # the client has gone

            do_GET = do_POST = handle_any  # noqa: N815 - the names that BaseHTTPRequestHandler looks for

            def log_message(self, *_: object) -> None:
                pass

            def finish(self) -> None:
                with suppress(OSError, ValueError):  # reset on purpose
                    super().finish()

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128

            def shutdown_request(self, request: socket.socket) -> None:
                with suppress(OSError):
                    super().shutdown_request(request)

            def handle_error(self, *_: object) -> None:
                pass

        self._server, self._released = Server(("127.0.0.1", 0), Handler), released
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def bodies(self) -> list[Any]:
        return [request.body for request in self.requests if request.method == "POST"]
