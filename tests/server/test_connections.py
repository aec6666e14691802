"""Connections and bodies that come too slowly, too many or too large, on a real socket; and models that come late."""

import socket
import time

import httpx
import pytest
from server.running import running
from support import LengthReranker

from mistral_rerank.errors import AuthenticationError, CheckpointError, EndpointUnreachableError
from mistral_rerank.server import service as services

BODY = {"query": "q", "documents": ["a", "bbb"]}
HEAD = b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"


def connected(url: str, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=30)
    connection.sendall(sent)
    return connection


def ending(connection: socket.socket) -> bytes:
    """All that the server still sends, up to its closing the connection."""
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize("sent", [b"", HEAD[:40]])
def test_a_connection_without_a_whole_request_is_closed(sent, monkeypatch):
    monkeypatch.setattr("mistral_rerank.server.connections.limited_protocol.__defaults__", (0.2,))
    with running(LengthReranker()) as url:
        assert ending(connected(url, sent)) == b""
        assert httpx.get(url + "/health").status_code == 200


def test_a_body_that_does_not_arrive_is_a_408_and_frees_its_place():
    with running(LengthReranker(), transfer_timeout=0.2, max_requests=1) as url:
        reply = ending(connected(url, HEAD + b"\r\n{"))
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert b'"status":408' in reply
        assert httpx.post(url + "/v1/rerank", json=BODY).status_code == 200


def test_a_request_counts_before_its_body_is_there():
    with running(LengthReranker(), max_requests=1) as url:
        with connected(url, HEAD + b"\r\n{"):
            while "mistral_rerank_queue_size 1.0" not in httpx.get(url + "/metrics").text:
                pass
            assert httpx.post(url + "/v1/rerank", json=BODY).status_code == 429


def test_bodies_of_all_requests_together_have_a_limit():
    with running(LengthReranker(), max_held_bytes=1000) as url:
        reply = httpx.post(url + "/v1/rerank", json=BODY | {"documents": ["a" * 2000]})
        assert (reply.status_code, reply.headers["Retry-After"]) == (429, "1")
        assert httpx.post(url + "/v1/rerank", json=BODY).status_code == 200


def test_the_longest_idle_connection_gives_way_to_a_new_one():
    with running(LengthReranker(), max_connections=2) as url:
        first, second = connected(url), connected(url)
        assert httpx.get(url + "/health").status_code == 200
        assert ending(first) == b""
        second.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert ending(second).startswith(b"HTTP/1.1 200 ")


def test_no_body_is_read_before_its_key_is_checked():
    with running(LengthReranker(), api_keys="key") as url:
        with connected(url, HEAD + b"\r\n") as connection:  # and no byte of the body
            assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")


class Late(LengthReranker):
    """Fails twice, and then answers."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.asked = error, 0

    async def ascore_pairs(self, pairs, *, overflow=None):
        self.asked += 1
        if self.asked <= 2:
            raise self.error
        return self.score_pairs(pairs)


def unfetched() -> CheckpointError:
    error = CheckpointError("could not be fetched")
    error.__cause__ = httpx.ConnectError("no route")
    return error


@pytest.mark.parametrize("error", [EndpointUnreachableError("refused"), unfetched()], ids=["remote", "local"])
def test_a_server_recovers_from_what_passes_at_its_start(error, monkeypatch):
    monkeypatch.setattr(services, "FIRST_PAUSE", 0.01, raising=False)
    late = Late(error)
    with running(late) as url:
        while httpx.get(url + "/v1/health/ready").status_code != 200:
            time.sleep(0.01)
    assert late.asked == 3


@pytest.mark.parametrize("error", [AuthenticationError("no", status=401), CheckpointError("no weights")])
def test_what_does_not_pass_ends_the_start(error):
    assert not services.is_temporary(error)
